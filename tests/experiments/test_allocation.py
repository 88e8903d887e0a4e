"""Sweeps compare what they say they compare, and claim no more than their seeds allow."""

import csv
from dataclasses import replace

import pytest

from rorqual.config import from_dict
from rorqual.costs import costs
from rorqual.experiments.allocation import Point, SweepConfig, _write, compare, conclusion, points
from rorqual.presets import preset

BASE = preset("tiny")


def _rows(*losses):
    return compare([Point(f"p{i}", float(i), BASE) for i in range(len(losses))], losses)


def test_paired_differences_and_their_error():
    rows = _rows([4.0, 5.0, 6.0], [3.9, 4.8, 5.7])
    assert rows[1].difference == pytest.approx(-0.2) and rows[1].difference_error == pytest.approx(0.1 / 3**0.5)
    assert rows[0].difference == 0


def test_allocation_keeps_the_budget():
    places = points(SweepConfig(rhos=(0.5, 1.0, 0.8)), BASE)
    assert [p.x for p in places] == sorted((p.x for p in places), reverse=True) and places[0].config.engram is None
    found = [costs(p.config, context=128) for p in places]
    assert max(c.total for c in found) / min(c.total for c in found) < 1.005
    assert max(c.flops_per_token for c in found) / min(c.flops_per_token for c in found) < 1.01


def test_every_point_has_its_own_experts_and_its_own_name():
    same = points(SweepConfig(rhos=(0.5, 0.8, 0.801, 1.0)), BASE)
    assert [p.name for p in same] == ["rho-1.00", "rho-0.80", "rho-0.50"]
    many = replace(BASE, moe=replace(BASE.moe, routed=600, active=2))
    close = points(SweepConfig(rhos=(0.5, 0.7, 0.702, 0.704)), many)
    assert len({p.name for p in close}) == len({p.config.moe.routed for p in close}) == len(close) == 5


def test_slots_fix_the_backbone_and_layers_fix_the_budget():
    slots = points(SweepConfig(kind="slots", rows_per_head=(64, 512)), BASE)
    assert slots[0].config.moe == slots[1].config.moe and slots[1].config.engram.rows_per_head == (512, 512)
    layers = points(SweepConfig(kind="layers"), BASE)
    assert [p.config.engram.layers for p in layers] == [(0,), (1,), (2,)]
    assert len({costs(p.config).total for p in layers}) == 1
    names = [p.name for p in points(SweepConfig(kind="ablation"), BASE)]
    assert names[0] == "whole" and len(names) == len(set(names)) == 4


@pytest.mark.parametrize(
    ("losses", "kind", "said"),
    [
        ([[4.0], [3.0]], "slots", "with one seed: not established"),
        ([[4.0, 4.0, 4.1], [3.5, 3.5, 3.6]], "slots", "seeds; established"),
        ([[4.0, 4.1, 4.2], [3.0, 4.3, 4.4]], "slots", "seeds; not established"),
        ([[3.0, 3.1], [3.5, 3.6]], "slots", "no other point beat it"),
        ([[4.0, 4.0, 4.1], [3.5, 3.5, 3.6], [4.2, 4.2, 4.3]], "allocation", "U-shape over rho is established"),
        ([[4.0, 4.0, 4.1], [3.5, 3.5, 3.6]], "allocation", "U-shape over rho is not established"),
    ],
)
def test_conclusions(losses, kind, said):
    assert said in conclusion(kind, _rows(*losses))


def test_the_table_holds_every_loss(tmp_path):
    rows = _rows([4.0, 5.0], [3.9, 4.8])
    _write(tmp_path, SweepConfig(seeds=2), rows, "said")
    with (tmp_path / "sweep.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(r["mean"]) for r in read] == [row.mean for row in rows] and float(read[1]["1"]) == 4.8
    assert (tmp_path / "conclusion.txt").read_text() == "said\n" and (tmp_path / "sweep.svg").read_text().startswith(
        "<?xml"
    )


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"got 'rho', expected .*allocation"):
        from_dict(SweepConfig, {"kind": "rho"})
