"""A dataclass of options and argv in -> the dataclass as the flags want it out."""

import contextlib
import dataclasses
import inspect
import io
import json
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from rorqual import config

T = TypeVar("T")


ELSEWHERE = {  # a flag of other trainers and servers -> ours, the first that the command has
    "--batch-size": ("rows",),
    "--train-batch-size": ("rows",),
    "--micro-batch-size": ("micro-rows",),
    "--per-device-train-batch-size": ("micro-rows",),
    "--gradient-accumulation-steps": ("micro-rows",),
    "--grad-accum-steps": ("micro-rows",),
    "--epochs": ("steps",),
    "--num-epochs": ("steps",),
    "--num-train-epochs": ("steps",),
    "--max-steps": ("steps",),
    "--num-steps": ("steps",),
    "--iters": ("steps",),
    "--max-iters": ("steps",),
    "--learning-rate": ("optim.lr", "lr"),
    "--lr": ("optim.lr",),
    "--weight-decay": ("optim.weight-decay",),
    "--warmup-steps": ("optim.warmup",),
    "--warmup-iters": ("optim.warmup",),
    "--max-grad-norm": ("optim.clip",),
    "--grad-clip": ("optim.clip",),
    "--optimizer": ("optim.kind",),
    "--block-size": ("length", "context"),
    "--seq-len": ("length", "context"),
    "--seq-length": ("length", "context"),
    "--max-seq-len": ("length", "context"),
    "--max-model-len": ("context", "length"),
    "--context-length": ("length", "context"),
    "--max-length": ("max-new-tokens", "length", "context"),
    "--max-tokens": ("max-new-tokens", "length"),
    "--max-num-seqs": ("rows",),
    "--output-dir": ("folder", "out"),
    "--out-dir": ("folder", "out"),
    "--output": ("out", "folder"),
    "--dataset": ("data.source", "data"),
    "--dataset-name": ("data.source", "data"),
    "--train-file": ("data.source", "data"),
    "--tokenizer": ("data.tokenizer",),
    "--tokenizer-name": ("data.tokenizer",),
    "--vocab-size": ("model.vocabulary",),
    "--hidden-size": ("model.dim",),
    "--num-layers": ("model.layers",),
    "--save-steps": ("save-every",),
    "--save-interval": ("save-every",),
    "--eval-steps": ("validate-every",),
    "--eval-interval": ("validate-every",),
    "--logging-steps": ("log-every",),
    "--log-interval": ("log-every",),
}
NOTES = {  # where the number means another thing
    "steps": "steps = epochs * tokens of the text / (--rows * --length)",
    "micro-rows": "steps of accumulation = --rows / (ranks * --micro-rows)",
}
COUNTED_OTHERWISE = (
    "--epochs",
    "--num-epochs",
    "--num-train-epochs",
    "--gradient-accumulation-steps",
    "--grad-accum-steps",
)


class UsageError(ValueError):
    """The command line itself is wrong: exit code 2."""

    usage = True


def parse(default: T, argv: Sequence[str], command: str, epilogue: str = "") -> T:
    """The dataclass changed by argv. Sub-configs that a flag names are put in, and `--name none` takes one out.

    UsageError, with the nearest flag, for what fits nothing; --help prints, the epilogue last, and leaves. Without a
    flag the dataclass is the answer, and the parser, which takes a quarter of a second to load, is not asked.
    """
    if not argv:
        return default
    filled, words = config.fill(default, argv)
    return _parse(type(default), filled, words, command, epilogue)


def parse_new(cls: type[T], argv: Sequence[str], command: str) -> T:
    """A dataclass that may have required fields, from argv; errors as `parse`."""
    return _parse(cls, None, list(argv), command)


def _parse(cls: type[T], default: T | None, words: list[str], command: str, epilogue: str = "") -> T:
    import tyro

    heard = io.StringIO()
    sentences, examples = described(cls)
    switches = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)
    try:
        with contextlib.redirect_stderr(heard):
            return tyro.cli(
                cls,
                description=sentences or None,
                default=tyro.MISSING_NONPROP if default is None else default,
                args=words,
                prog=f"rorqual {command}",
                config=switches,
            )
    except SystemExit as stop:
        if not stop.code:
            for text in (examples, epilogue):
                if text:
                    print(text)
            raise
        raise UsageError(ours(cls, words, command) or plain(heard.getvalue())) from None


def described(cls: type) -> tuple[str, str]:
    """What a class's docstring says, and the commands in it, one a line: the parser would join them to a paragraph."""
    lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
    commands = [line for line in lines if line.startswith("rorqual ")]
    if not commands:
        return "", ""
    sentences = "\n".join(line for line in lines if line not in commands).strip()
    return sentences, "\n  ".join(["examples:", *commands])


def ours(cls: Any, words: Sequence[str], command: str) -> str:
    """What to write in place of the first flag that another tool has and this command has not; "" without one."""
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        named = flag[2:].replace("-", "_")
        if flag not in ELSEWHERE or config.has(cls, named):
            continue
        for name in ELSEWHERE[flag]:
            if config.has(cls, name.replace("-", "_")):
                right = "--data" if name == "data.source" else f"--{name}"
                note = f"; {NOTES[name]}" if flag in COUNTED_OTHERWISE else ""
                typed = " ".join(word for word in command.split() if word.islower())
                return f"got {flag}, which rorqual {typed} calls {right}{note}"
    return ""


def plain(box: str) -> str:
    """The parser's framed paragraphs as one line, with the nearest flag if it knows one. A terminal without Unicode has
    frames of + - and |."""
    lines = [re.sub(r"^[│|╭╰+─ ]+|[│|╮╯+─ ]+$|^[│|+─ -]+$", "", line) for line in box.splitlines()[1:]]
    said: list[str] = []
    for line in lines:
        if not line or line.startswith(("Perhaps", "Argument helptext", "For full helptext")):
            break
        said.append(line)
    near = re.search(r"Perhaps you meant.*?(--[\w.-]+)", " ".join(lines))
    text = " ".join(said) or "the arguments fit nothing"
    return text.rstrip(".") + (f"; did you mean {near[1]}?" if near else "")


def split_first(argv: Sequence[str], what: str, example: str) -> tuple[str, list[str]]:
    """The word that comes before all flags, and the rest."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        got = repr(argv[0]) if argv else "nothing"
        raise UsageError(f"got {got}, expected {what} first: {example}")
    return argv[0], list(argv[1:])


def emit(value: Any) -> None:
    """One JSON object on standard output; dataclasses and named tuples become objects."""
    print(json.dumps(jsonable(value), ensure_ascii=False))


def jsonable(value: Any) -> Any:
    """Plain JSON values of dataclasses, named tuples, mappings, sequences and zero-dimensional tensors."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return jsonable(value._asdict())
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def take(flag: str, argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether a flag that every command has is there, and argv without it."""
    end = argv.index("--") if "--" in argv else len(argv)
    return flag in argv[:end], [word for i, word in enumerate(argv) if word != flag or i >= end]
