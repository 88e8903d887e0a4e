"""Tests parsing command lines into dataclasses, and one-line errors for all else."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch

from rorqual.cli.parse import (
    Positional,
    UsageError,
    jsonable,
    parse,
    parse_new,
    read,
    split_first,
    take,
)


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
    text: Positional[str] = "-"
    steps: int = 4
    pair: tuple[str, str] | None = None
    stop: tuple[str, ...] = ()
    fast: bool = False


def test_flags_change_a_default_and_put_parts_in() -> None:
    words = ["--model.memory.rows", "5", "6", "7", "--steps=9", "--fast", "--kind", "b"]
    assert parse(Options(steps=1), words, "x") == Options(
        model=Model(memory=Memory(rows=(5, 6, 7))), steps=9, fast=True, kind="b"
    )


def test_a_name_and_its_value_may_be_one_word() -> None:
    words = [
        "model.memory.rows=5,6,7",
        "steps=9",
        "fast=true",
        "--kind=b",
        "--model.memory.heads",
        "3",
    ]
    expected = Options(
        model=Model(memory=Memory(rows=(5, 6, 7), heads=3)), steps=9, fast=True, kind="b"
    )
    assert parse(Options(steps=1), words, "x") == expected
    assert parse(expected, ["fast=false", "model.memory=none", "model.rank=none"], "x") == Options(
        model=Model(rank=None), steps=9, kind="b"
    )
    assert parse(
        Options(), ["--fast", "false", "--model.memory.rows", "[1,2]"], "x"
    ).model.memory == Memory(rows=(1, 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    lr: float = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    optim: Optim = field(default_factory=Optim)
    batch_size: int = 8
    micro_batch_size: int | None = None
    steps: int = 10
    seq_len: int = 16
    folder: str = "x"


def test_names_may_have_dashes_or_underscores_and_the_last_value_counts() -> None:
    words = [
        "--micro-batch-size",
        "1",
        "--micro_batch_size=2",
        "micro-batch-size=3",
        "micro_batch_size=4",
        "seq_len=-5",
    ]
    assert parse(Training(), words, "x") == Training(micro_batch_size=4, seq_len=-5)


def test_a_short_name_stands_for_a_longer_one() -> None:
    words = ["--rate", "1", "rate=2", "--optim.lr", "3"]
    assert read(Training(), words, "x", short={"rate": "optim.lr"}) == [
        ("optim.lr", "1"), ("optim.lr", "2"), ("optim.lr", "3")
    ]  # fmt: skip


def test_none_takes_a_part_out() -> None:
    start = Options(model=Model(memory=Memory(heads=5)))
    assert parse(start, ["--model.memory", "none", "--model.rank", "none"], "x").model == Model(
        rank=None
    )
    assert parse(start, ["--model.memory.rows", "1"], "x").model.memory == Memory(
        rows=(1,), heads=5
    )


def test_a_class_may_have_required_fields() -> None:
    assert parse_new(Named, ["here", "--steps", "2"], "x") == Named(run="here", steps=2)
    with pytest.raises(UsageError, match="required: RUN"):
        parse_new(Named, [], "x")
    with pytest.raises(UsageError, match="--pair: expected 2 arguments"):
        parse_new(Named, ["here", "--pair", "a"], "x")


def test_what_is_given_by_its_place_may_stand_anywhere_and_be_any_text() -> None:
    expected = Named(run="here", text="steps=5", steps=2, fast=True)
    assert parse_new(Named, ["here", "steps=5", "--steps", "2", "--fast"], "x") == expected
    assert parse_new(Named, ["--steps", "2", "here", "--fast", "steps=5"], "x") == expected
    assert parse_new(Named, ["here", "--pair", "a", "b", "c"], "x") == Named(
        run="here", pair=("a", "b"), text="c"
    )
    assert parse_new(Named, ["here", "--stop", ",", "[x]"], "x").stop == (",", "[x]")
    assert parse_new(Named, ["here", "--stop", ","], "x").stop == (",",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stepz", "3"], r"--stepz.*did you mean --steps\?"),
        (["--stepz=3"], r"--stepz=3.*did you mean --steps=3\?"),
        (["stepz=3"], r"stepz=3.*did you mean steps=3\?"),
        (["heads=3"], r"heads=3.*did you mean model\.memory\.heads=3\?"),
        (["--steps"], "--steps: expected one argument"),
        (["--steps", "many"], "steps: got 'many', expected int"),
        (["--kind", "c"], "kind: got 'c', expected 'a' or 'b'"),
        (["--model.memory.heads", "0"], "heads: got 0, expected at least 1"),
        (
            ["--model.memory.rows", "1", "x"],
            r"model\.memory\.rows: got \['1', 'x'\], expected tuple\[int, \.\.\.\]",
        ),
        (
            ["--model.memori.heads", "1"],
            r"--model\.memori\.heads.*did you mean --model\.memory\.heads\?",
        ),
        (
            ["--model.memory", "on"],
            "model.memory: got 'on', expected default, none or a mapping of Memory",
        ),
        (["--no-fast"], "got --no-fast, expected fast=false"),
        (["--fast", "--zzzzz"], "--zzzzz.* --help lists them"),
        (["stray"], "got 'stray', expected an option"),
    ],
)
def test_what_fits_nothing_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(Options(), words, "x")
    assert "\n" not in str(caught.value)
    assert not set(str(caught.value)) & set("│╭╰─")


def test_help_says_what_and_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(Options(), ["--help"], "x")
    assert not caught.value.code
    message = capsys.readouterr().out
    assert "What it does." in message
    assert re.search(r"--steps INT +how many \(default: 4\)", message)
    assert re.search(r"--kind a\|b +\(default: a\)", message)
    assert re.search(r"--model\.memory default\|none +switches it on or off \(it is off\)", message)
    assert re.search(r"--model\.memory\.rows \[INT \.\.\.\] +\(default: 4 4\)", message), (
        "parts that are off are shown too"
    )
    with pytest.raises(SystemExit):
        parse(Options(), ["--help"], "x", "examples: x --steps 3")
    assert capsys.readouterr().out == message + "\nexamples: x --steps 3\n"


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
    assert jsonable(value) == {
        "x": {"a": 1, "b": 2.0},
        "3": ["a/b", {"rows": [4, 4], "heads": 2}, None, True],
    }


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
    message = capsys.readouterr().out
    assert message.endswith("examples:\n  rorqual x here\n  rorqual x there --steps 3\nepilogue\n")
    assert "What it does, in one sentence." in message and "A second paragraph." in message
    assert message.count("rorqual x here") == 1
