"""Lists what users may call: Python names, commands and their flags, options, keys of JSON answers.

    python scripts/list_public.py           prints what differs from tests/golden/public.json
                                            (exit code 1)
    python scripts/list_public.py --write   writes it, after a change that is meant;
                                            review the diff

tests/test_public.py fails where the committed list is not today's.
"""

import argparse
import contextlib
import difflib
import inspect
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import rorqual
from rorqual import checkpoint, explore
from rorqual import config as configs
from rorqual.cli.main import COMMANDS, main
from rorqual.cli.table import VERBS
from rorqual.data import tokenizer
from rorqual.experiments.allocation import KINDS
from rorqual.model import LanguageModel
from rorqual.presets import PRESETS, preset
from rorqual.serve.generate import load
from rorqual.train.config import TrainConfig

COMMITTED = Path(__file__).resolve().parents[1] / "tests" / "golden" / "public.json"
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
PROSE = [
    "The blue whale is the largest animal known to have lived.",
    "A fin whale sings below the sea.",
]
# Below these, keys are data and no interface.
OPEN = {
    "config",
    "kernels",
    "kernels_picked",
    "sizes",
    "parts",
}


def callable_names() -> dict[str, Any]:
    """Returns everything that a user may call, as JSON."""
    return {
        "python": names(),
        "options": options(TrainConfig),
        "presets": sorted(PRESETS),
        "commands": commands(),
    }


def public() -> dict[str, Any]:
    """Returns everything that a user may call or read, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        return callable_names() | {"json": answers(Path(folder))}


def names() -> dict[str, Any]:
    """Describes each name of `rorqual.__all__`: its parameters, or those of its public functions.

    For a class these are the parameters of its constructor and of its public methods.
    """
    return {name: described(getattr(rorqual, name)) for name in sorted(rorqual.__all__)}


def described(thing: Any) -> Any:
    if isinstance(thing, ModuleType):
        names = [name for name in vars(thing) if not name.startswith("_")]
        return {
            name: described(getattr(thing, name)) for name in sorted(names) if _is_own(thing, name)
        }
    if inspect.isclass(thing):
        methods = [name for name in vars(thing) if not name.startswith("_")]
        results = {"()": parameters(thing)}
        return results | {
            name: described(inspect.getattr_static(thing, name)) for name in sorted(methods)
        }
    if isinstance(thing, (staticmethod, classmethod)):
        return parameters(thing.__func__)
    return parameters(thing) if callable(thing) else "value"


def _is_own(module: ModuleType, name: str) -> bool:
    """Returns whether a module defines the name: a function or class of its own, or a constant."""
    thing = getattr(module, name)
    return (
        getattr(thing, "__module__", module.__name__ if name.isupper() else None) == module.__name__
    )


def parameters(call: Any) -> list[str]:
    """Lists names, with * before those that are keyword-only and = after those with a default."""
    results = []
    for parameter in inspect.signature(inspect.unwrap(call)).parameters.values():
        stars = {
            parameter.VAR_POSITIONAL: "*",
            parameter.VAR_KEYWORD: "**",
            parameter.KEYWORD_ONLY: "*",
        }
        default = "" if parameter.default is parameter.empty else "="
        results.append(stars.get(parameter.kind, "") + parameter.name + default)
    return results


def options(cls: Any) -> dict[str, Any]:
    """Returns each option by its dotted name, with its default; parts that are off are listed."""
    listed = configs.options(cls)
    return {
        each.name: configs.to_dict(each.default)
        for each in listed
        if each.part is None or each.default is None
    }


def commands() -> dict[str, list[str]]:
    """Returns each command and sub-command, with the flags that its --help names."""
    typed = [[name] for name in COMMANDS]
    typed += [["table", verb] for verb in VERBS] + [["sweep", kind] for kind in (*KINDS, "needle")]
    results = {}
    with _wide_terminal():
        for words in typed:
            reply = _printed([*words, "--help"])
            results[" ".join(words)] = sorted(set(FLAG.findall(reply)))
        top = _printed(["--help"])
    assert all(name in top for name in COMMANDS)
    return results


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """Sets a terminal width in which no flag is cut in two."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "400"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _printed(words: list[str], *, may_fail: bool = False) -> str:
    """Returns what a command prints on standard output."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    if code and not may_fail:
        raise RuntimeError(
            f"rorqual {' '.join(words)}: got exit code {code}, expected 0: {err.getvalue()}"
        )
    return out.getvalue()


def keys(value: Any, path: str = "") -> list[str]:
    """Lists dotted names in a JSON value.

    [] stands for the items of a list, * for keys that are data.
    """
    if isinstance(value, Mapping):
        results = set()
        for name, section in value.items():
            is_name = re.fullmatch(r"[A-Za-z_]\w*", name) is not None
            here = f"{path}.{name if is_name else '*'}".lstrip(".")
            results |= {here, *([] if name in OPEN else keys(section, here))}
        return sorted(results)
    if isinstance(value, list):
        return sorted({name for item in value for name in keys(item, f"{path}[]")})
    return []


def answers(folder: Path) -> dict[str, list[str]]:
    """Returns keys of the output of --json, of metrics.jsonl and of both servers' answers."""
    text = folder / "text.jsonl"
    run = folder / "run"
    text.write_text(
        "".join(json.dumps({"text": f"{n}. {PROSE[n % 2]}"}) + "\n" for n in range(60)),
        encoding="utf-8",
    )
    save_run(run)
    little = [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--seq-len",
        "32",
        "--data.vocab-size",
        "300",
        "--model.vocab-size",
        "300",
    ]
    little += [
        "--data",
        str(text),
        "--data.cache",
        str(folder / "cache"),
        "--folder",
        str(folder / "trained"),
    ]
    little += ["--model.layers", "2", "--model.engram.layers", "1", "--model.mtp.depth", "1"]
    edit = ["--suppress", "qz", "--data", str(text), "--limit", "5", "--edits"]
    asked = {
        "data": ["data", str(text)],
        "doctor": ["doctor"],
        "params": ["params", "tiny"],
        "params --base": ["params", "--base", "500000"],
        "plan": ["plan", "--like", "tiny", "--rho", "0.75"],
        "train": ["train", "tiny", *little],
        "eval": ["eval", str(run), "--data", str(text), "--split", "all", "--limit", "4"],
        "generate": ["generate", str(run), "The whale", "--max-new-tokens", "2"],
        "memory": ["memory", str(run), "the fin whale sings", *edit],
        "report": ["report", str(run), "--out", str(folder / "report.html")],
        "table build": ["table", "build", str(folder / "table"), "--rows", "64", "--width", "32"],
        "table inspect": ["table", "inspect", str(folder / "table")],
        "table verify": ["table", "verify", str(folder / "table")],
        "table convert": [
            "table",
            "convert",
            str(folder / "table"),
            str(folder / "fp8"),
            "--dtype",
            "fp8",
        ],
        "table hot": [
            "table",
            "hot",
            str(run),
            str(folder / "hot.safetensors"),
            "--data",
            str(text),
            "--rows",
            "4",
        ],
    }
    results = {}
    for name, words in asked.items():
        lines = _printed([*words, "--json"], may_fail=name == "doctor").strip().splitlines()
        printed = {key for line in lines for key in keys(json.loads(line))}
        results[f"rorqual {name} --json"] = sorted(printed)
    lines = (folder / "trained" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    results["metrics.jsonl"] = sorted({key for line in lines for key in keys(json.loads(line))})
    return results | served(run)


def save_run(folder: Path) -> None:
    """Saves an untrained `tiny` of two blocks with Engram, and a tokenizer of a few words."""
    words = tokenizer.train(PROSE * 40, 300)
    small = preset("tiny")
    for name, value in {
        "layers": 2,
        "vocab_size": words.vocab_size,
        "engram.rows_per_head": (50, 50),
    }.items():
        small = configs.replace(small, name, value)
    checkpoint.save_model(
        folder, LanguageModel(small, torch.as_tensor(words.canonical_map())), words
    )


def served(folder: Path) -> dict[str, list[str]]:
    """Returns keys of the answers of `rorqual serve` and `rorqual explore`."""
    from starlette.testclient import TestClient

    from rorqual.serve.server import Service, application

    run = load(folder, device="cpu")
    result = {}
    body: dict[str, Any] = {"prompt": "The whale", "max_tokens": 2}
    with TestClient(
        application(Service(run, max_batch_size=2, context=64)), base_url="http://127.0.0.1"
    ) as client:
        result["GET /v1/models"] = keys(client.get("/v1/models").json())
        result["POST /v1/completions"] = keys(client.post("/v1/completions", json=body).json())
        wrong = client.post("/v1/completions", json=body | {"max_tokens": "x"})
        result["an error of serve"] = keys(wrong.json())
        reply = client.post("/v1/completions", json=body | {"stream": True}).text
        sent = [line.removeprefix("data: ") for line in reply.splitlines() if line[:7] == "data: {"]
        events = {key for event in sent for key in keys(json.loads(event))}
        result["POST /v1/completions, streamed"] = sorted(events)
    page = TestClient(explore.app(run), base_url="http://127.0.0.1")
    result["GET /api/model"] = keys(page.get("/api/model").json())
    result["POST /api/read"] = keys(page.post("/api/read", json={"text": "the whale sings"}).json())
    return result


def difference(committed: Any, now: Any) -> list[str]:
    """Lists lines that went (-) and came (+), with where they stand."""
    before, after = (sorted(_lines(value, "")) for value in (committed, now))
    # The first two lines name files.
    lines = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    return [line for line in lines if line[0] in "+-"]


def _lines(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, section in value.items():
            yield from _lines(section, f"{path} > {name}" if path else name)
        return
    if isinstance(value, list) and path.startswith(("commands", "json")):
        yield path
        for item in value:
            yield f"{path}: {item}"
        return
    yield f"{path}: {json.dumps(value)}"


def run_script() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--write", action="store_true", help="write tests/golden/public.json")
    written = parser.parse_args().write
    now = public()
    before = json.loads(COMMITTED.read_text(encoding="utf-8")) if COMMITTED.is_file() else {}
    changed = difference(before, now)
    for line in changed:
        print(line)
    if written:
        COMMITTED.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(bool(changed) and not written)


if __name__ == "__main__":
    raise SystemExit(run_script())
