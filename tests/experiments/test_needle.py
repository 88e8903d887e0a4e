"""Tests the needle sweep: its arms, its conclusion, and a whole run to its table."""

import csv
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from rorqual.config import from_dict
from rorqual.data.needle_config import NeedleConfig
from rorqual.data.needles import DEPTHS, TASKS, column
from rorqual.experiments import needle
from rorqual.experiments.needle import KINDS, NeedleSweep, arms, conclusion, main, overall
from rorqual.layers.engram import EngramConfig

pytestmark = pytest.mark.nsa

TINY = NeedleSweep(
    kinds=("gqa", "nsa"),
    needles=NeedleConfig(
        keys=4,
        values=4,
        filler=2,
        needles=2,
        asked=2,
        drill=4,
        shortest=16,
        alone=1,
        grow=2,
        questions=4,
    ),
    dim=16,
    layers=1,
    dense_width=16,
    engram=EngramConfig(
        layers=(0,), rows_per_head=(31, 31), heads=1, head_dim=4, conv=False, canonical=False
    ),
    steps=4,
    batch_size=4,
    seq_len=32,
    seeds=2,
    workers=1,
)


def scores(*shares: float, length: int = 32) -> list[dict[str, float]]:
    """Returns the scores of seeds that found these shares of every task's answers."""
    return [{column(task, length): share for task in TASKS} for share in shares]


def test_every_kind_is_entered_twice_and_is_sparse():
    entered = arms(NeedleSweep())
    assert [arm.name for arm in entered] == [
        name for kind in KINDS for name in (kind, f"{kind}-engram")
    ]
    models = {arm.name: arm.config for arm in entered}
    assert all(
        (model.engram is not None) == name.endswith("-engram") for name, model in models.items()
    )
    assert [name for name, model in models.items() if model.nsa or model.moba or model.dsa] == [
        name for name in models if name.partition("-")[0] in needle.FULL
    ]
    assert all(
        (model.mla is None) == (name[:3] in ("gqa", "nsa", "mob")) for name, model in models.items()
    )
    assert {model.vocab_size for model in models.values()} == {NeedleSweep().needles.vocab_size}
    length = NeedleSweep().seq_len
    nsa = models["nsa"].nsa
    moba = models["moba"].moba
    dsa = models["dsa"].dsa
    assert nsa.top_k * nsa.select_block + nsa.window <= length // 2
    assert moba.top_k * moba.block <= length // 2 and dsa.top_k <= length // 2
    assert [arm.name for arm in arms(NeedleSweep(kinds=("dsa",), memory="on"))] == ["dsa-engram"]


def test_overall_is_the_mean_of_the_tasks():
    item = {
        column(task, 32): share for task, share in zip(TASKS, (1.0, 0.5, 0.25, 0.25), strict=True)
    }
    assert overall(item, 32) == 0.5


def test_the_conclusion_says_no_more_than_the_seeds():
    config = replace(TINY, kinds=("gqa", "nsa"), memory="both", seeds=3)
    results = {
        "gqa": scores(0.90, 0.91, 0.92),
        "gqa-engram": scores(0.95, 0.85, 0.99),
        "nsa": scores(0.50, 0.52, 0.51),
        "nsa-engram": scores(0.95, 0.96, 0.97),
    }
    text = conclusion(config, arms(config), results)
    assert text.startswith("nsa-engram found most (0.960 of the answers at 32 tokens, 3 seeds); ")
    assert "nsa against gqa -0.400 +- 0.006, established;" in text
    assert "nsa-engram against gqa-engram +0.030 +- 0.040, not established" in text
    assert "gqa-engram against gqa +0.020 +- 0.040, not established" in text
    assert "nsa-engram against nsa +0.450 +- 0.006, established" in text
    one = conclusion(
        replace(config, seeds=1), arms(config), {name: each[:1] for name, each in results.items()}
    )
    assert "1 seed)" in one and "nsa against gqa -0.400, not established" in one
    assert ", established" not in one


def test_a_kind_without_its_full_one_is_compared_with_nothing():
    config = replace(TINY, kinds=("dsa",), memory="off")
    assert "against" not in conclusion(config, arms(config), {"dsa": scores(0.5, 0.6)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds: got 0"),
        ({"kinds": []}, "kinds: got"),
        ({"kinds": ["gqa", "gqa"]}, "kinds: got"),
        ({"kinds": ["linear"]}, "linear"),
        ({"memory": "maybe"}, "'maybe'"),
        ({"seq_len": 0}, "seq_len: got 0"),
        ({"needles": {"asked": 90}}, "expected 90"),
    ],
)
def test_a_wrong_sweep_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(NeedleSweep, change)


@pytest.mark.slow
def test_from_nothing_to_the_table_and_again(tmp_path):
    config = replace(TINY, kinds=("nsa",), seeds=1, folder=str(tmp_path))
    heard = io.StringIO()
    folder = main(config, console=Console(file=heard, width=120))
    with (folder / "needle.csv").open() as file:
        read = list(csv.DictReader(file))
    assert {(r["kind"], r["engram"], r["seed"]) for r in read} == {
        ("nsa", "True", "0"),
        ("nsa", "False", "0"),
    }
    wholes = [r for r in read if not r["part"]]
    assert len(wholes) == 2 * len(TASKS) * 3 and {r["seq_len"] for r in wholes} == {
        "16",
        "32",
        "64",
    }
    assert all(0 <= float(r["accuracy"]) <= 1 for r in read) and {
        int(r["part"]) for r in read if r["part"]
    } <= set(range(DEPTHS))
    for name in ("length", "depth", "length-engram", "depth-engram"):
        assert (folder / f"{name}.svg").read_text().startswith("<?xml")
    text = (folder / "conclusion.txt").read_text().strip()
    assert "nsa-engram against nsa" in text and text[:40] in heard.getvalue()
    assert "chance: any value" in heard.getvalue() and "0.250" in heard.getvalue()
    one = [r for r in wholes if r["engram"] == "False"]
    metrics = [
        json.loads(line)
        for line in (folder / "nsa-seed-0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(
        float(r["accuracy"]) == metrics[-1][column(r["task"], int(r["seq_len"]))] for r in one
    )

    marks = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert len(marks) == 2
    (folder / "nsa-engram-seed-0" / "model.safetensors").unlink()
    main(config, console=Console(file=io.StringIO()))
    again = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert [path.parent.name for path in marks if again[path] != marks[path]] == [
        "nsa-engram-seed-0"
    ]
    assert (folder / "conclusion.txt").read_text().strip() == text
