"""Tests configs as JSON, by dotted name and by flags."""

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
    memory=st.none()
    | st.builds(Memory, layers=st.lists(st.integers(0, 9)).map(tuple), heads=st.integers(1, 9)),
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
    ("mapping", "message"),
    [
        (
            {"stepz": 1},
            "got Run key 'stepz', expected one of model, steps, note; did you mean 'steps'",
        ),
        ({"steps": 1.5}, r"Run\.steps: got 1\.5, expected int"),
        ({"steps": True}, r"Run\.steps: got True, expected int"),
        ({"model": 3}, r"Run\.model: got 3, expected a mapping of Model fields"),
        ({"model": {"dense": 1}}, r"Run\.model\.dense: got 1, expected bool"),
        ({"model": {"rank": "x"}}, r"Run\.model\.rank: got 'x', expected int"),
        ({"model": {"sizes": [1]}}, r"Run\.model\.sizes: got \[1\], expected tuple\[float, int\]"),
        (
            {"model": {"memory": {"layers": [1, "x"]}}},
            r"layers: got \[1, 'x'\], expected tuple\[int, \.\.\.\]",
        ),
        (
            {"model": {"memory": {"headz": 1}}},
            r"got Run\.model\.memory key 'headz', .*; did you mean 'heads'",
        ),
        ({"model": {"folder": 3}}, r"Run\.model\.folder: got 3, expected Path"),
        ({"model": {"rank": 1.0}}, r"Run\.model\.rank: got 1\.0, expected int or none"),
        ({"model": {"memory": {"sign": "up"}}}, "expected 'sign' or 'copysign'"),
        ({"model": {"memory": {"heads": 0}}}, "heads: got 0, expected at least 1"),
        ({"model": {"memory": None}}, "got neither, expected experts or memory"),
    ],
)
def test_a_wrong_mapping_is_refused(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
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
    assert configs.replace(Model(), "experts.memory.layers", [2, 3]).experts == Experts(
        memory=Memory(layers=(2, 3))
    )
    assert configs.replace(Model(), "experts", Experts(routed=2)).experts == Experts(routed=2)
    assert configs.replace(Model(experts=Experts()), "memory", None).memory is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("memori.heads", 1, "did you mean 'memory'"),
        ("memory.head", 1, "did you mean 'heads'"),
        ("dim.x", 1, "expected 'dim' to have fields"),
        ("rank.x", 1, "expected 'rank' to have fields"),
        ("memory.heads", "4", "heads: got '4', expected int"),
        ("memory.heads", 0, "heads: got 0"),
    ],
)
def test_replace_refuses(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configs.replace(Model(), name, value)


def test_change_switches_on_what_is_named() -> None:
    assert configs.change(Run(), [("model.experts.memory.heads", 5)]).model.experts == Experts(
        memory=Memory(heads=5)
    )
    assert configs.change(Run(), [("model.experts", {"routed": 5})]).model.experts == Experts(
        routed=5
    )
    assert configs.change(Run(), [("model.experts", {}), ("steps", 3)]) == Run(
        model=Model(experts=Experts()), steps=3
    )


def test_change_switches_off_and_takes_defaults() -> None:
    changed = configs.change(Run(), [("model.memory", "none"), ("model.experts", "default")])
    assert changed.model == Model(memory=None, experts=Experts())
    reset = Run(model=Model(memory=Memory(heads=9)))
    assert configs.change(reset, [("model.memory", "default")]) == Run()
    assert configs.change(reset, [("model.memory", "none"), ("model.memory.layers", [3])]) == Run(
        model=Model(memory=Memory(layers=(3,)))
    )


def test_only_the_sum_of_all_changes_has_to_be_valid() -> None:
    """Without memory and before experts there is neither, which Model refuses."""
    changed = configs.change(Run(), [("model.memory", "none"), ("model.experts.routed", 4)])
    assert changed.model == Model(memory=None, experts=Experts(routed=4))
    with pytest.raises(ValueError, match="got neither"):
        configs.change(Run(), [("model.memory", "none")])


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("dim", "12", 12),
        ("dim", "1_000", 1000),
        ("rate", "1e-3", 1e-3),
        ("rate", "3", 3.0),
        ("rank", "none", None),
        ("rank", "7", 7),
        ("dense", "true", True),
        ("folder", "a b/1e3", Path("a b/1e3")),
        ("sizes", "1.5,2", (1.5, 2)),
        ("sizes", "[1.5, 2]", (1.5, 2)),
        ("sizes", ["1.5", "2"], (1.5, 2)),
        ("names", "{a: 1}", {"a": 1}),
        ("memory.layers", ["4"], (4,)),
        ("memory.layers", [], ()),
        ("memory.layers", "", ()),
        ("memory.sign", "copysign", "copysign"),
        ("experts.routed", "3", 3),
    ],
)
def test_texts_become_what_their_fields_hold(name: str, text: Any, value: Any) -> None:
    result: Any = configs.change(Model(), [(name, text)], lax=True)
    for piece in name.split("."):
        result = getattr(result, piece)
    assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dim", "x", "dim: got 'x', expected int"),
        ("dim", "1.5", "dim: got '1.5', expected int"),
        ("dense", "maybe", "dense: got 'maybe', expected bool"),
        ("memory.layers", ["1", "x"], r"memory\.layers: got \['1', 'x'\], expected tuple"),
        ("memory.layers", "[1", r"memory\.layers: got '\[1', expected tuple"),
        ("memory.sign", "up", "memory.sign: got 'up', expected 'sign' or 'copysign'"),
        ("memory", "on", "memory: got 'on', expected default, none or a mapping of Memory fields"),
        ("sizes", "1", r"sizes: got '1', expected tuple\[float, int\]"),
    ],
)
def test_a_text_of_the_wrong_kind_is_refused(name: str, text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configs.change(Model(), [(name, text)], lax=True)


words = st.text() | st.sampled_from(
    ["none", "default", "true", "1e3", "[a]", "a: b", "# c", "-", "\u2028", "é\n x"]
)
runs = st.builds(Run, model=models, steps=st.integers(), note=words)


@given(runs)
def test_yaml_and_back_is_the_same_config(
    tmp_path_factory: pytest.TempPathFactory, run: Run
) -> None:
    path = tmp_path_factory.getbasetemp() / "run.yaml"
    path.write_text(configs.to_yaml(run), encoding="utf-8")
    assert configs.load(Run, path) == run


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """Which comments stand where."""

    # above the field,
    # on two lines
    first: int = 1
    second: str = "#"  # behind it
    memory: Memory | None = None
    experts: Experts | None = None  # the experts
    third: int = 3


def test_yaml_says_what_each_field_is_about() -> None:
    assert configs.to_yaml(Explained(memory=Memory())).splitlines() == [
        "first: 1  # above the field, on two lines",
        "second: '#'  # behind it",
        "memory:",
        "  layers: [1]",
        "  heads: 4",
        "  sign: sign",
        "experts: null  # the experts (off; {} switches it on)",
        "third: 3",
    ]
    assert configs.field_comments(Run) == {"model": ""}


def test_a_yaml_file_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(
        "model:\n  rate: 1e-3\n  rank: none\n  memory: {heads: 7}\n  experts: default\n"
    )
    start = Run(steps=5, model=Model(memory=Memory(layers=(2,))))
    model = Model(rate=1e-3, rank=None, memory=Memory(layers=(2,), heads=7), experts=Experts())
    assert configs.load(Run, path, start) == Run(steps=5, model=model)
    path.write_text("# nothing\n")
    assert configs.load(Run, path) == Run()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "stepz: 3",
            "got Run key 'stepz', expected one of model, steps, note; did you mean 'steps'",
        ),
        ("model: {memory: {headz: 3}}", "got model.memory key 'headz', .*did you mean 'heads'"),
        ("model: {dim: x}", "model.dim: got 'x', expected int"),
        ("model: [1]", r"model: got \[1\], expected .*a mapping of Model fields"),
        ("steps: 3\nsteps: 4", "line 2, column 1: got 'steps' twice"),
        ("steps: {", "line 1, column 9: expected the node content"),
        ("- 1", r"got \[1\], expected a mapping of fields"),
        ("note: !!python/name:os.system", "could not determine a constructor"),
    ],
)
def test_a_wrong_yaml_file_names_itself_and_the_place(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"run\.yaml: .*{message}") as caught:
        configs.load(Run, path)
    assert "\n" not in str(caught.value)
