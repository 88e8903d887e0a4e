"""Flags into dataclasses, and the parser's paragraphs into a line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch
from tyro.conf import Positional

from rorqual.cli.parse import UsageError, jsonable, parse, parse_new, split_first, take


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    rows: tuple[int, ...] = (4, 4)
    heads: int = 2

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"heads: got {self.heads}, expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    dim: int = 8
    rank: int | None = 3
    memory: Memory | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What it does."""

    model: Model = field(default_factory=Model)
    steps: int = 4  # how many
    fast: bool = False
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    run: Positional[str]  # the folder
    steps: int = 4


def test_flags_change_a_default_and_put_parts_in() -> None:
    words = ["--model.memory.rows", "5", "6", "7", "--steps=9", "--fast", "--kind", "b"]
    assert parse(Options(steps=1), words, "x") == Options(
        model=Model(memory=Memory(rows=(5, 6, 7))), steps=9, fast=True, kind="b"
    )


def test_none_takes_a_part_out() -> None:
    start = Options(model=Model(memory=Memory(heads=5)))
    assert parse(start, ["--model.memory", "none", "--model.rank", "none"], "x").model == Model(rank=None)
    assert parse(start, ["--model.memory.rows", "1"], "x").model.memory == Memory(rows=(1,), heads=5)


def test_a_class_may_have_required_fields() -> None:
    assert parse_new(Named, ["here", "--steps", "2"], "x") == Named(run="here", steps=2)
    with pytest.raises(UsageError, match="Missing from rorqual x: RUN"):
        parse_new(Named, [], "x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stepz", "3"], r"--stepz.*did you mean --steps\?"),
        (["--steps", "many"], "--steps.*'many'"),
        (["--kind", "c"], r"'c'.*\('a', 'b'\)"),
        (["--model.memory.heads", "0"], "heads: got 0, expected at least 1"),
        (["--model.memori.heads", "1"], "--model.memori.heads, 1"),
        (["stray"], "stray"),
    ],
)
def test_what_fits_nothing_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse(Options(), words, "x")
    assert "\n" not in str(caught.value)
    assert not set(str(caught.value)) & set("│╭╰─")


def test_help_says_what_and_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(Options(), ["--help"], "x")
    assert not caught.value.code
    said = capsys.readouterr().out
    assert "What it does." in said
    assert "how many" in said
    with pytest.raises(SystemExit):
        parse(Options(), ["--help"], "x", "examples: x --steps 3")
    assert capsys.readouterr().out == said + "examples: x --steps 3\n"


def test_split_first() -> None:
    assert split_first(["tiny", "--steps", "3"], "a name", "x tiny") == ("tiny", ["--steps", "3"])
    assert split_first(["--help"], "a name", "x tiny") == ("--help", [])
    for words in ([], ["--steps", "3"]):
        with pytest.raises(UsageError, match="expected a name first: x tiny"):
            split_first(words, "a name", "x tiny")


def test_take() -> None:
    assert take("--json", ["a", "--json", "b"]) == (True, ["a", "b"])
    assert take("--json", ["a", "--", "--json"]) == (False, ["a", "--", "--json"])


def test_jsonable() -> None:
    class Pair(NamedTuple):
        a: int
        b: torch.Tensor

    value = {"x": Pair(1, torch.tensor(2.0)), 3: (Path("a/b"), Memory(), None, True)}
    assert jsonable(value) == {"x": {"a": 1, "b": 2.0}, "3": ["a/b", {"rows": [4, 4], "heads": 2}, None, True]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What it does, in one sentence.

    A second paragraph.

    rorqual x here
    rorqual x there --steps 3
    """

    steps: int = 4


def test_examples_stand_one_a_line_at_the_end_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Shown(), ["--help"], "x", "epilogue")
    said = capsys.readouterr().out
    assert said.endswith("examples:\n  rorqual x here\n  rorqual x there --steps 3\nepilogue\n")
    assert "What it does, in one sentence." in said and "A second paragraph." in said
    assert said.count("rorqual x here") == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    lr: float = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    optim: Optim = field(default_factory=Optim)
    rows: int = 8
    micro_rows: int | None = None
    steps: int = 10
    length: int = 16
    folder: str = "x"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch-size", "32"], "got --batch-size, which rorqual train calls --rows"),
        (["--batch_size=32"], "got --batch-size, which rorqual train calls --rows"),
        (["--epochs", "3"], "calls --steps; steps = epochs * tokens of the text / (--rows * --length)"),
        (["--gradient-accumulation-steps", "4"], "calls --micro-rows; steps of accumulation = --rows / (ranks"),
        (["--learning-rate", "1e-3"], "calls --optim.lr"),
        (["--lr", "1e-3"], "calls --optim.lr"),
        (["--max-steps", "5"], "calls --steps"),
        (["--block-size", "64"], "calls --length"),
        (["--max-length", "64"], "calls --length"),
        (["--output-dir", "y"], "calls --folder"),
    ],
)
def test_a_flag_of_another_tool_gets_ours(words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(Training(), words, "train PRESET")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
