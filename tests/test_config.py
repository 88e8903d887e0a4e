"""Configs as JSON, by dotted name and by flags."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual import config as configs


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    layers: tuple[int, ...] = (1,)
    heads: int = 4
    sign: Literal["sign", "copysign"] = "sign"

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"heads: got {self.heads}, expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    routed: int = 8
    memory: Memory | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    dim: int = 16
    rank: int | None = 4
    rate: float = 0.5
    dense: bool = False
    experts: Experts | None = None
    memory: Memory | None = field(default_factory=Memory)
    sizes: tuple[float, int] = (1.0, 2)
    names: dict[str, int] = field(default_factory=dict)
    folder: Path = Path("runs")

    def __post_init__(self) -> None:
        if self.experts is None and self.memory is None:
            raise ValueError("got neither, expected experts or memory")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    model: Model = field(default_factory=Model)
    steps: int = 10
    note: str = ""


models = st.builds(
    Model,
    dim=st.integers(1, 99),
    rank=st.none() | st.integers(0, 9),
    rate=st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 3),
    dense=st.booleans(),
    experts=st.builds(Experts, routed=st.integers(), memory=st.none() | st.builds(Memory)),
    memory=st.none() | st.builds(Memory, layers=st.lists(st.integers(0, 9)).map(tuple), heads=st.integers(1, 9)),
    names=st.dictionaries(st.text(), st.integers()),
    folder=st.sampled_from([Path("a"), Path("a b/c")]),
)


@given(models)
def test_json_and_back_is_the_same_config(model: Model) -> None:
    assert configs.from_dict(Model, json.loads(json.dumps(configs.to_dict(model)))) == model


def test_save_and_load(tmp_path: Path) -> None:
    run = Run(model=Model(experts=Experts()), note="bøk")
    configs.save(run, tmp_path / "new folder" / "run.json")
    assert configs.load(Run, tmp_path / "new folder" / "run.json") == run
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["run.json"]


def test_what_is_absent_takes_its_default() -> None:
    assert configs.from_dict(Run, {"model": {"dim": 3}}) == Run(model=Model(dim=3))


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"stepz": 1}, "got Run key 'stepz', expected one of model, steps, note; did you mean 'steps'"),
        ({"steps": 1.5}, r"Run\.steps: got 1\.5, expected int"),
        ({"steps": True}, r"Run\.steps: got True, expected int"),
        ({"model": 3}, r"Run\.model: got 3, expected a mapping of Model fields"),
        ({"model": {"dense": 1}}, r"Run\.model\.dense: got 1, expected bool"),
        ({"model": {"rank": "x"}}, r"Run\.model\.rank: got 'x', expected int"),
        ({"model": {"sizes": [1]}}, r"Run\.model\.sizes: got \[1\], expected tuple\[float, int\]"),
        ({"model": {"memory": {"layers": [1, "x"]}}}, r"layers\[1\]: got 'x', expected int"),
        ({"model": {"memory": {"sign": "up"}}}, "expected 'sign' or 'copysign'"),
        ({"model": {"memory": {"heads": 0}}}, "heads: got 0, expected at least 1"),
        ({"model": {"memory": None}}, "got neither, expected experts or memory"),
    ],
)
def test_a_wrong_mapping_is_refused(mapping: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        configs.from_dict(Run, mapping)


def test_a_wrong_file_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: Expecting"):
        configs.load(Run, path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"run\.json"):
        configs.load(Run, path)


def test_replace_by_dotted_name() -> None:
    assert configs.replace(Model(), "memory.heads", 7) == Model(memory=Memory(heads=7))
    assert configs.replace(Model(), "experts.memory.layers", [2, 3]).experts == Experts(memory=Memory(layers=(2, 3)))
    assert configs.replace(Model(), "experts", Experts(routed=2)).experts == Experts(routed=2)
    assert configs.replace(Model(experts=Experts()), "memory", None).memory is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("memori.heads", 1, "did you mean 'memory'"),
        ("memory.head", 1, "did you mean 'heads'"),
        ("dim.x", 1, "expected 'dim' to have fields"),
        ("rank.x", 1, "expected 'rank' to have fields"),
        ("memory.heads", "4", "heads: got '4', expected int"),
        ("memory.heads", 0, "heads: got 0"),
    ],
)
def test_replace_refuses(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        configs.replace(Model(), name, value)


def test_fill_puts_in_what_flags_name() -> None:
    filled, rest = configs.fill(Run(), ["--model.experts.memory.heads", "5", "--steps", "3"])
    assert filled.model.experts == Experts(memory=Memory())
    assert rest == ["--model.experts.memory.heads", "5", "--steps", "3"]
    assert configs.fill(Run(), ["--model.experts.routed=5"])[0].model.experts == Experts()


def test_fill_takes_out_and_puts_in_whole() -> None:
    filled, rest = configs.fill(Run(), ["--model.memory", "none", "--model.experts=default", "--steps", "3"])
    assert filled.model == Model(memory=None, experts=Experts())
    assert rest == ["--steps", "3"]
    reset = Run(model=Model(memory=Memory(heads=9)))
    assert configs.fill(reset, ["--model.memory", "default"])[0] == Run()


def test_fill_validates_only_the_sum_of_all_flags() -> None:
    """Without memory and before experts there is neither, which Model refuses."""
    filled, _ = configs.fill(Run(), ["--model.memory", "none", "--model.experts.routed", "4"])
    assert filled.model.memory is None
    assert filled.model.experts == Experts()


def test_fill_leaves_the_rest_to_the_parser() -> None:
    words = ["--stepz", "1", "--model.nothing.x", "none", "--note", "none", "word", "--", "--model.memory", "none"]
    assert configs.fill(Run(), words) == (Run(), words)
    assert configs.fill(Run(), ["--model.rank", "none"])[1] == ["--model.rank", "None"]
    assert configs.fill(Run(), []) == (Run(), [])


def test_choose_names_the_nearest() -> None:
    assert configs.choose("preset", "tiny", ["tiny"]) == "tiny"
    with pytest.raises(ValueError, match=r"got preset 'tin', expected one of tiny, small; did you mean 'tiny'\?"):
        configs.choose("preset", "tin", ["tiny", "small"])
    with pytest.raises(ValueError, match=r"expected one of a, b$"):
        configs.choose("letter", "zzzzzz", ["a", "b"])
