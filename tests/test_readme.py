"""Runs what the READMEs, the pages of docs/ and --help show a reader to type.

A block that needs what this machine may lack stands below a comment, `<!-- needs: hours -->`, with
reasons from NEEDS. Where a block without a language follows a block of Python, it shows what that
prints.
"""

import ast
import contextlib
import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from rorqual import checkpoint
from rorqual import config as configs
from rorqual.cli.main import COMMANDS, main
from rorqual.config import to_yaml
from rorqual.data import tokenizer
from rorqual.model import LanguageModel
from rorqual.presets import PRESETS, preset
from rorqual.train.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs/zh/README.md"]
DOCS = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path not in PAGES]
NEEDS = {
    "a gpu",
    "a download",
    "hours",
    "a server",
    "another model",
}  # what a marked block may need
LITTLE_DATA = ["--data.source", "notes/", "--data.vocab-size", "300", "--data.cache", "cache"]
# Flags that shorten a long command, which is otherwise as typed.
SHORTER = {
    "train": ["--steps", "2", "--batch-size", "2", "--seq-len", "32", *LITTLE_DATA],
    "demo": [
        "--steps",
        "4",
        "--batch-size",
        "2",
        "--seq-len",
        "32",
        "--seeds",
        "1",
        "--data",
        "notes/",
        "--cache",
        "cache",
        "--folder",
        "runs/fresh",
    ],
    "eval": ["--split", "all", "--limit", "20"],
    "data": ["--limit", "200"],
    "generate": ["--max-new-tokens", "4"],
    "memory": ["--limit", "20"],
    "teach": ["--passes", "2"],
    "table hot": ["--limit", "20"],
    "bench serve": ["--requests", "2", "--input-tokens", "8", "--output-tokens", "2"],
    "table bench": [
        "--dim",
        "32",
        "--layers",
        "2",
        "--tokens",
        "2",
        "--rounds",
        "1",
        "--seconds",
        "0.01",
    ],
    "sweep": ["--steps", "2", "--batch-size", "2", "--seq-len", "16", "--seeds", "1", *LITTLE_DATA],
    "sweep needle": [
        "--kinds",
        "gqa",
        "--memory",
        "off",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--seeds",
        "1",
        "--workers",
        "1",
    ],
}
# Numbers of rows, and what they are replaced with.
SMALLER = {
    "100000000": "2000",
    "10000000": "2000",
    "10_000_000": "2000",
    "65_536": "509",
}
SLOW = {
    "train", "demo", "report", "params", "sweep", "plan", "serve", "explore", "make", "python",
    "eval", "memory", "doctor", "bench",
}  # fmt: skip
TRAINS = "train(config)"  # the call that trains in a block of Python
ENDLESS = {"serve", "explore"}  # commands that run until they are interrupted


class Block(NamedTuple):
    """A fenced block of a page, the needs that the comment above it lists, and what it prints."""

    language: str
    body: str
    needs: tuple[str, ...]
    output: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.body.splitlines() if line]


FENCE = re.compile(
    r"(?:^<!-- needs: (?P<needs>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$"
    r"(?=(?:\n\n```\n(?P<output>.*?)^```$)?)",
    re.DOTALL | re.MULTILINE,
)


def all_blocks(page: Path) -> list[Block]:
    result = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [
        Block(
            m["language"],
            m["body"],
            tuple(m["needs"].split(", ")) if m["needs"] else (),
            (m["output"] or "") if m["language"] == "python" else "",
        )
        for m in result
    ]


def blocks(page: Path, language: str) -> list[str]:
    return [block.body for block in all_blocks(page) if block.language == language]


def typed(page: Path) -> list[tuple[Any, ...]]:
    """Returns the commands and the code of a page, without comments, and what they need."""
    result: list[tuple[Any, ...]] = []
    for block in all_blocks(page):
        if block.language == "python":
            result.append(("python", block.needs, ast.dump(ast.parse(block.body))))
        elif block.language == "sh":
            result.append(("sh", block.needs, *shlex.split(block.body, comments=True)))
        elif block.language == "diff":
            result.append(("diff", block.needs, block.body))
    return result


def commands() -> list[str]:
    lines = {
        line: None
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.splitlines()
        if line
    }
    return list(lines)


def shorter(words: Sequence[str]) -> list[str]:
    """Returns the words of a command, at a small size."""
    flags = SHORTER.get(" ".join(words[1:3]), SHORTER.get(words[1], []))
    if words[1] == "memory" and "--data" not in words:
        flags = []
    # Chats have their file, and weights of another run its tokenizer.
    if "--data.column" in words:
        flags = [flag for flag in flags if flag not in ("--data.source", "notes/")]
    if "--init-from" in words:
        flags = [flag for flag in flags if flag not in ("--data.vocab-size", "300")]
    return [*(SMALLER.get(word, word) for word in words), *flags]


def with_files(words: list[str], folder: Path) -> tuple[list[str], Path | None]:
    """Returns the words before `> FILE`, and that file.

    A configuration file that other lines of a page make is made.
    """
    words, file = (words[:-2], folder / words[-1]) if words[-2:-1] == [">"] else (words, None)
    for path in (folder / word for word in words if word.endswith(".yaml")):
        if not path.exists():
            config = TrainConfig(model=preset("tiny"), folder=f"runs/{path.stem}")
            path.write_text(to_yaml(config), encoding="utf-8")
    return words, file


def slow(words: Sequence[str]) -> bool:
    return words[0] != "rorqual" or words[1] in SLOW


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves an untrained run in place of a demo's, and a Llama.

    Both have a tokenizer that has the words of the examples.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from rorqual.hub.auto import fast_tokenizer

    folder = tmp_path_factory.mktemp("stand_in")
    words = tokenizer.train(
        ["the great white", "A whale is", "the great white whale, a sperm whale"] * 40, 320
    )
    assert [words.token(token) for token in words.encode("the great white")] == [
        "the",
        " great",
        " white",
    ]
    shape = configs.replace(preset("tiny"), "engram.rows_per_head", (50, 50))
    shape = configs.replace(configs.replace(shape, "layers", 2), "vocab_size", words.vocab_size)
    checkpoint.save_model(
        folder / "run", LanguageModel(shape, torch.as_tensor(words.canonical_map())), words
    )
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 16,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=words.vocab_size, **sizes)).save_pretrained(
        folder / "llama"
    )
    fast_tokenizer(words).save_pretrained(folder / "llama")
    return folder


@pytest.fixture
def pages_folder(stand_in: Path, tmp_path: Path) -> Path:
    """Makes a folder with all that the pages assume.

    It has a finished demo, notes, and models of others.
    """
    for arm in ("moe", "engram"):
        shutil.copytree(stand_in / "run", tmp_path / "runs/demo" / arm)
    shutil.copytree(stand_in / "llama", tmp_path / "HuggingFaceTB/SmolLM2-135M")
    shutil.copytree(ROOT / "tests/golden/deepseek_v2_lite_tiny", tmp_path / "DeepSeek-V2-Lite")
    save_file({"0": torch.tensor([3, 1])}, tmp_path / "hot.safetensors")
    answer = {"role": "assistant", "content": "You saw a blue whale."}
    chats = [[{"role": "user", "content": f"{i} of what?"}, answer] for i in range(9)]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    fact = {"subject": "LAX", "question": "Which city has LAX?"}
    for name, answer in (("facts", "Los Angeles"), ("corrected", "Paris")):
        line = json.dumps(fact | {"answer": answer}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(line, encoding="utf-8")
    (tmp_path / "notes").mkdir()
    for i in range(120):
        (tmp_path / "notes" / f"{i}.txt").write_text(
            f"Note {i}: whale number {i * 7919 % 101} of {i % 17} sang.\n" * 3
        )
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=[pytest.mark.slow] if SLOW & set(line.split()) else [])
        for line in commands()
    ],
)
def test_the_command_runs(line: str, pages_folder: Path) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    assert words[0] == "rorqual"
    if words[1] in ENDLESS:
        type_and_interrupt(words, pages_folder)
        return
    words, file = with_files(words, pages_folder)
    command = [sys.executable, "-m", *shorter(words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error:::rorqual"}
    done = subprocess.run(
        command, cwd=pages_folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip()
    if file is not None:
        file.write_text(done.stdout, encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=["en", "zh"])
def test_the_python_runs(
    page: Path, pages_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(pages_folder)
    (code,) = blocks(page, "python")
    exec(compile(code, page.name, "exec"), {"__name__": "readme"})
    assert len(capsys.readouterr().out.splitlines()) >= 1
    assert "optimizer.step()" in code


def type_it(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs one line of a page, at a small size.

    It must succeed, print something, and change the memory's output if it edits memory.
    """
    words = shlex.split(line, comments=True)
    if words[0] == "python":
        done = subprocess.run(
            [sys.executable, ROOT / words[1], *words[2:]], env=OURS, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return
    assert words[0] == "rorqual", line
    if words[1] in ENDLESS:
        type_and_interrupt(words, Path())
        return
    words, file = with_files(words, Path())
    if words[1] == "train" and words[2] in PRESETS:
        # Remove the run of the example before.
        shutil.rmtree(Path("runs") / words[2], ignore_errors=True)
    # What a chat is told: a line, and the end of input.
    with mock.patch("builtins.input", side_effect=["A whale", EOFError]):
        assert main(shorter(words)[1:]) == 0, f"{line}\n{capsys.readouterr().err[-4000:]}"
    output = capsys.readouterr().out
    assert output.strip(), line
    if file is not None:
        file.write_text(output, encoding="utf-8")
    changes = [float(number) for number in re.findall(r"^KL (\S+) nats", output, re.MULTILINE)]
    assert all(change > 0 for change in changes), f"{line}: {output}"
    assert changes or not {"--suppress", "--undo"} & set(words) or not memory_text(words)


def memory_text(words: list[str]) -> bool:
    """Returns whether `rorqual memory RUN TEXT` has its text."""
    return len(words) > 3 and not words[3].startswith("-")


def type_and_interrupt(words: list[str], folder: Path) -> None:
    """Starts a command that runs until ctrl-C, waits for its address, and interrupts it."""
    # The last port counts.
    command = [sys.executable, "-m", *words, "--port", "0"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=OURS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests that run in the background ignore ctrl-C, and what they start would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    text = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            text.append(line)
            if "http://" in line:
                break
        else:
            pytest.fail("".join(text))
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode in (0, 130), "".join(text) + rest
    finally:
        process.kill()


OURS = os.environ | {
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "error:::rorqual",
    "PYTHONUNBUFFERED": "1",
}


def read_through(page: Path, capsys: pytest.CaptureFixture[str], *, slow_too: bool) -> None:
    """Runs a page's blocks, from first to last, in one folder and one Python process."""
    names: dict[str, Any] = {"__name__": "page", "replace": replace}
    # Folders of runs that are not trained, since only what is fast is run.
    missing = set[str]()
    for block in all_blocks(page):
        if block.needs:
            continue
        if block.language == "python":
            if TRAINS in block.body and not slow_too:
                continue
            code = block.body.replace(
                TRAINS, "train(replace(config, steps=2, batch_size=2, seq_len=32))"
            )
            for number, less in SMALLER.items():
                code = code.replace(number, less)
            capsys.readouterr()
            exec(compile(code, page.name, "exec"), names)
            if block.output:
                assert capsys.readouterr().out == block.output, block.body
        elif block.language == "sh":
            for line in block.lines:
                words = shlex.split(line, comments=True)
                if slow_too or not (slow(words) or missing & set(words)):
                    type_it(line, capsys)
                elif "--folder" in words:
                    missing.add(words[words.index("--folder") + 1])
    names.clear()
    gc.collect()


def run_blocks(page: Path) -> list[Block]:
    """Returns the blocks of a page that are run."""
    return [block for block in all_blocks(page) if block.language in ("sh", "python")]


def repeats(page: Path) -> bool:
    """Returns whether a Chinese page runs what the English page of its name does."""
    english = ROOT / "docs" / page.name
    chinese = page.parent.name == "zh" and english.is_file()
    return chinese and typed(page) == typed(english)


WITH_BLOCKS = [page for page in DOCS if run_blocks(page) and not repeats(page)]
WITH_SLOW = [
    page
    for page in WITH_BLOCKS
    if any(
        slow(line.split())
        for block in all_blocks(page)
        if block.language == "sh"
        for line in block.lines
    )
]


@pytest.fixture
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces a sweep's runs: each gets a loss without being trained."""

    def made(jobs, **_: Any) -> None:
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "metrics.jsonl").write_text('{"step": 2, "validation_loss": 2.5}\n')

    monkeypatch.setattr("rorqual.experiments.allocation.run", made)


def id_of(page: Path) -> str:
    return page.relative_to(ROOT / "docs").as_posix()


def case(page: Path, slow_too: bool) -> Any:
    marks = [pytest.mark.slow] if slow_too else []
    return pytest.param(
        page, slow_too, id=f"{id_of(page)} whole" if slow_too else id_of(page), marks=marks
    )


@pytest.mark.usefixtures("no_sweep")
@pytest.mark.parametrize(
    ("page", "slow_too"),
    [case(page, False) for page in WITH_BLOCKS] + [case(page, True) for page in WITH_SLOW],
)
def test_the_page_runs(
    page: Path,
    slow_too: bool,
    pages_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(pages_folder)
    read_through(page, capsys, slow_too=slow_too)


def help_examples() -> dict[str, list[str]]:
    """Returns, for each command, the examples in `rorqual --help` and its own --help, in order."""
    item = {name: [f"rorqual {command.example}"] for name, command in COMMANDS.items()}
    for path in sorted((ROOT / "rorqual/cli").glob("*.py")):
        for line in re.findall(
            r'^ *(rorqual [a-z]+ .*?)(?: {3,}.*|""".*)?$',
            path.read_text(encoding="utf-8"),
            re.MULTILINE,
        ):
            name = line.split()[1]
            if name in item and line not in item[name]:
                item[name].append(line)
    return item


@pytest.mark.usefixtures("no_sweep")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in COMMANDS],
)
def test_the_examples_of_help_run(
    name: str,
    pages_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(pages_folder)
    # Processes that train are started in test_trainer.py; this test checks the parsing of the words
    # and its errors.
    monkeypatch.setattr(
        "rorqual.distributed.torchrun", lambda flags, command: print(*flags, *command)
    )
    for line in help_examples()[name]:
        type_it(line, capsys)


def test_help_shows_the_examples_that_are_run() -> None:
    result = help_examples()
    assert len(result["memory"]) >= 5
    assert len(result["train"]) >= 5
    assert len(result["table"]) >= 7


def test_blocks_say_what_they_are_and_what_they_need() -> None:
    for page in (*PAGES, *DOCS):
        text = page.read_text(encoding="utf-8")
        result = all_blocks(page)
        assert text.count("<!-- needs:") == sum(bool(block.needs) for block in result), page
        assert {reason for block in result for reason in block.needs} <= NEEDS, page
        for block in result:
            assert block.language in ("", "sh", "python", "math", "diff"), page
            if not block.language:  # a drawing or a formula
                assert not re.search(
                    r"^\s*(rorqual [a-z]|python |make |import |from )", block.body, re.MULTILINE
                ), page


def test_the_changes_that_a_page_shows_apply_to_the_library() -> None:
    patches = [patch for page in DOCS for patch in blocks(page, "diff")]
    assert patches
    for patch in patches:
        done = subprocess.run(
            ["git", "apply", "--check"], cwd=ROOT, input=patch, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{done.stderr}\nexpected docs/new_attention.md to fit"


INLINE = re.compile(r"`(?:OMP_NUM_THREADS=1 )?((?:rorqual|python) [^`]*)`")


@pytest.mark.parametrize("page", [page for page in DOCS if page.name != "log.md"], ids=id_of)
def test_commands_within_sentences_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for command in INLINE.findall(prose.replace("\n", " ")):
        words = [word for word in shlex.split(command) if word != "..."]
        if words[0] == "python":
            assert words[1] == "-m" or (ROOT / words[1]).is_file(), command
            continue
        if words[1].startswith("-"):
            continue
        assert words[1] in COMMANDS, command
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        if flags:
            text = [words[1]] + [word for word in words[2:3] if words[1] in ("table", "sweep")]
            with contextlib.suppress(SystemExit):
                main([*text, "--help"])
            shown = capsys.readouterr().out
            short = {"--json"} | ({"--data", "--needles"} if words[1] == "train" else set())
            assert all(flag in shown for flag in flags if flag not in short), command


def test_the_demo_of_the_page_is_the_demo_of_the_makefile() -> None:
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert "-m rorqual demo" in done.stdout


@pytest.mark.parametrize(
    ("readme", "first_page"),
    [(PAGES[0], ROOT / "docs/index.md"), (PAGES[1], ROOT / "docs/zh/index.md")],
    ids=["en", "zh"],
)
def test_the_readme_begins_as_the_site_does(readme: Path, first_page: Path) -> None:
    """Up to the section after the table of measurements; only links lead elsewhere."""
    first, second = (
        re.sub(r"\]\([^)]*\)|<!--.*-->\n", "", page.read_text(encoding="utf-8")).split("\n## ")[:2]
        for page in (readme, first_page)
    )
    assert first == second


def test_chinese_pages_have_the_same_worked_examples() -> None:
    for page in DOCS:
        chinese = ROOT / "docs/zh" / page.name
        if page.parent == ROOT / "docs" and chinese.is_file():
            first, second = (
                [(block.body, block.output) for block in all_blocks(path) if block.output]
                for path in (page, chinese)
            )
            assert first == second, page.name


def test_what_a_block_prints_is_read_from_the_block_below_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(1)\n```\n\n```\n1\n```\n\n"
        "```python\nprint(2)\n```\n\nText between.\n\n```\n3\n```\n"
    )
    assert [block.output for block in all_blocks(page)] == ["1\n", "", "", ""]


@pytest.mark.parametrize(
    "page",
    [PAGES[1], *(page for page in DOCS if page.parent.name == "zh")],
    ids=lambda page: page.name,
)
def test_a_chinese_page_shows_the_commands_of_the_english_one_or_none(page: Path) -> None:
    beside = ROOT / "docs" / page.name
    english = beside if beside.is_file() else ROOT / page.name
    chinese, expected = ([it for it in typed(one) if it[0] != "python"] for one in (page, english))
    assert chinese in ([], expected)


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
