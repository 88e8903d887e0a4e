"""Tests that sweeps compare the right points, and claim no more than their seeds allow."""

import csv
import io
import json
import math
import re
import statistics
from dataclasses import replace

import pytest
from rich.console import Console

from rorqual.config import from_dict
from rorqual.costs import costs
from rorqual.experiments import allocation
from rorqual.experiments.allocation import (
    Point,
    SweepConfig,
    at_best,
    conclusion,
    main,
    points,
    tabulate,
)
from rorqual.layers.attention import MLAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.moe import MoEConfig
from rorqual.model import ModelConfig
from rorqual.presets import preset
from rorqual.train.config import DataConfig, TrainConfig

BASE = preset("tiny")
TINY = ModelConfig(
    vocab_size=300,
    dim=16,
    layers=1,
    mla=MLAConfig(heads=1, kv_lora_rank=8, nope_dim=8, rope_dim=8, value_dim=8),
    moe=MoEConfig(routed=16, active=1, width=8),
    engram=EngramConfig(layers=(0,), heads=2, head_dim=4),
)


def _point(name: str, x: float = 0.0, control: bool = False) -> Point:
    return Point(name, x, BASE, control)


def _rows(*losses, controls=(), rate=0.02):
    axis = [(_point(f"p{i}", float(i)), rate, ours) for i, ours in enumerate(losses)]
    return tabulate(
        [*axis, *((_point(f"c{i}", control=True), rate, ours) for i, ours in enumerate(controls))]
    )


def test_paired_differences_and_their_error():
    rows = _rows([4.0, 5.0, 6.0], [3.9, 4.8, 5.7])
    assert rows[1].difference == pytest.approx(-0.2) and rows[1].difference_error == pytest.approx(
        0.1 / 3**0.5
    )
    assert rows[0].difference == 0


def test_points_are_compared_at_each_rate_and_each_at_its_best():
    places = [_point("p0"), _point("p1", 1.0)]
    losses = {
        ("p0", 0.01): [5.0, 5.2],
        ("p1", 0.01): [4.9, 5.0],
        ("p0", 0.02): [4.0, 4.2],
        ("p1", 0.02): [6.0, 6.0],
    }
    rows = tabulate([(p, rate, losses[p.name, rate]) for rate in (0.01, 0.02) for p in places])
    assert [(r.point.name, r.rate) for r in rows] == [
        ("p0", 0.01),
        ("p1", 0.01),
        ("p0", 0.02),
        ("p1", 0.02),
    ]
    assert [r.difference for r in rows] == pytest.approx([0.0, -0.15, 0.0, 1.9])
    best = at_best(rows)
    assert [(r.point.name, r.rate) for r in best] == [("p0", 0.02), ("p1", 0.01)]
    assert best[1].difference == pytest.approx(0.85)
    text = conclusion("slots", rows)
    assert text.startswith(
        "p0 scored lowest (4.1000 nats a token at a rate of 0.02, 2 seeds); p0 against p1 -0.8500"
    )
    assert "at a rate of 0.01 p0 against p1 +0.1500 +- 0.0500, not established;" in text
    assert "at a rate of 0.02 p0 against p1 -1.9000 +- 0.1000, established" in text


def test_allocation_keeps_the_budget():
    places = points(SweepConfig(rhos=(0.5, 1.0, 0.8)), BASE)
    assert [p.x for p in places[:3]] == [1.0, 0.8, 0.5] and places[0].config.engram is None
    assert [p.name for p in places if p.control] == ["plain", "few-rows"]
    assert places[3].config == BASE and places[4].config.moe == BASE.moe
    item = [costs(places[i].config, context=128) for i in (0, 1, 2, 4)]
    assert max(c.total for c in item[:3]) / min(c.total for c in item[:3]) < 1.001
    assert max(c.flops_per_token for c in item) / min(c.flops_per_token for c in item) < 1.001
    assert item[3].memory < 0.003 * item[3].total and item[3].total / item[0].total < 1.003


def test_every_point_has_its_own_experts_and_its_own_name():
    same = points(SweepConfig(rhos=(0.5, 0.8, 0.801, 1.0)), BASE)
    assert [p.name for p in same] == ["rho-1.00", "rho-0.80", "rho-0.50", "plain", "few-rows"]
    many = replace(BASE, moe=replace(BASE.moe, routed=600, active=2))
    close = points(SweepConfig(rhos=(0.5, 0.7, 0.702, 0.704)), many)[:-2]
    assert (
        len({p.name for p in close}) == len({p.config.moe.routed for p in close}) == len(close) == 5
    )
    assert [p.name for p in points(SweepConfig(rhos=(1.0,)), BASE)] == [
        "rho-1.00",
        "plain",
        "few-rows",
    ]


def test_experts_cost_a_token_the_same_and_remember_nothing():
    places = points(
        SweepConfig(kind="experts", experts=(32, 2, 8)), replace(BASE, engram=EngramConfig())
    )
    assert [(p.name, p.x) for p in places] == [
        ("experts-2", 2.0),
        ("experts-8", 8.0),
        ("experts-32", 32.0),
    ]
    assert [p.config.moe.routed for p in places] == [2, 8, 32] and {
        p.config.engram for p in places
    } == {None}
    item = [costs(p.config, context=128).flops_per_token for p in places]
    assert max(item) / min(item) < 1.001 and {p.config.moe.active for p in places} == {2}
    assert places[-1].config.moe == BASE.moe


def test_slots_fix_the_backbone_and_layers_fix_the_rows():
    slots = points(SweepConfig(kind="slots", rows_per_head=(64, 512)), BASE)
    assert slots[0].config.moe == slots[1].config.moe and slots[1].config.engram.rows_per_head == (
        512,
        512,
    )
    layers = points(SweepConfig(kind="layers"), BASE)
    assert [p.config.engram.layers for p in layers] == [(0,), (1,), (2,)]
    assert len({costs(p.config).total for p in layers}) == 1


def test_ablations_take_one_thing_away():
    parts = {p.name: p.config for p in points(SweepConfig(kind="ablation"), BASE)}
    whole = parts["whole"].engram
    gone = ["no-gate", "one-gate", "no-conv", "raw-ids", "bigrams-only", "to-5-grams"]
    assert (
        list(parts) == ["whole", *gone]
        and whole.gating == "streams"
        and whole.conv
        and whole.canonical
    )
    assert parts["no-gate"].engram == replace(whole, gating="open")
    assert parts["one-gate"].engram == replace(whole, gating="shared")
    assert parts["no-conv"].engram == replace(whole, conv=False)
    assert parts["raw-ids"].engram == replace(whole, canonical=False)
    item = {name: costs(config, context=128) for name, config in parts.items()}
    for name, orders in (("bigrams-only", 1), ("to-5-grams", 4)):
        assert (
            len(parts[name].engram.rows_per_head) == orders
            and parts[name].engram.halo == whole.halo
        )
        assert (item[name].total, item[name].flops_per_token) == (
            item["whole"].total,
            item["whole"].flops_per_token,
        )
    assert (
        item["no-gate"].flops_per_token
        < item["one-gate"].flops_per_token
        < item["whole"].flops_per_token
    )
    assert "one-gate" not in [
        p.name for p in points(SweepConfig(kind="ablation"), replace(BASE, hyper=None))
    ]


@pytest.mark.parametrize(
    ("losses", "kind", "message"),
    [
        (
            [[4.0], [3.0]],
            "slots",
            "3.0000 nats a token, 1 seed); p1 against p0 -1.0000, not established",
        ),
        (
            [[4.0, 4.0, 4.1], [3.5, 3.5, 3.5]],
            "slots",
            "p1 against p0 -0.5333 +- 0.0333, established",
        ),
        (
            [[4.0, 4.1, 4.2], [3.0, 4.3, 4.4]],
            "slots",
            "p1 against p0 -0.2000 +- 0.4000, not established",
        ),
        (
            [[3.0, 3.1], [3.5, 3.6]],
            "slots",
            "p0 scored lowest (3.0500 nats a token, 2 seeds); p0 against p1 -0.5000",
        ),
        ([[3.0, 3.1]], "slots", "p0 scored lowest (3.0500 nats a token, 2 seeds) (95 %"),
        (
            [[4.0, 4.0, 4.1], [3.5, 3.5, 3.6], [4.2, 4.2, 4.3]],
            "allocation",
            "a U-shape over rho: established",
        ),
        ([[4.0, 4.0, 4.1], [3.5, 3.5, 3.6]], "allocation", "a U-shape over rho: not established"),
        (
            [[4.0, 4.0, 4.1], [3.5, 3.5, 3.6], [3.4, 3.7, 3.9]],
            "allocation",
            "a U-shape over rho: not established",
        ),
        (
            [[4.0, 4.0, 4.1], [3.5, 3.5, 3.6], [3.6, 3.6, 3.7]],
            "experts",
            "more experts pay: established",
        ),
        ([[4.0, 4.1, 4.2], [3.0, 4.3, 4.4]], "experts", "more experts pay: not established"),
        ([[3.0, 3.0, 3.0], [3.5, 3.6, 3.5]], "experts", "more experts pay: not established"),
    ],
)
def test_conclusions(losses, kind, message):
    assert message in conclusion(kind, _rows(*losses))


@pytest.mark.parametrize(
    "losses",
    [([4.0, 4.1], [4.5, 4.7], [4.2, 4.2], [4.9, 5.0]), ([4.0, 4.1], [3.5, 3.7], [4.2, 4.2])],
)
def test_an_ablation_is_given_part_by_part(losses):
    text = conclusion("ablation", _rows(*losses))
    for n in range(1, len(losses)):
        assert len(re.findall(f"(p{n} against p0|p0 against p{n}) ", text)) == 1
    assert text.count("against") == len(losses) - 1


NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "controls", "kind", "message"),
    [
        (
            [[NAN, 4.0], [3.5, 3.6]],
            [],
            "slots",
            "p1 scored lowest (3.5500 nats a token, 2 seeds); p1 against p0 no",
        ),
        ([[4.0, 4.1], [NAN, 1.0]], [], "slots", "p0 scored lowest (4.0500"),
        (
            [[NAN, NAN], [4.0, 4.1], [3.5, 3.7]],
            [],
            "slots",
            "2 seeds); p2 against p1 -0.4500 +- 0.0500, not",
        ),
        (
            [[4.0, 4.0, 4.1], [3.5, 3.5, 3.6], [NAN, 4.2, 4.3]],
            [],
            "allocation",
            "a U-shape over rho: not established",
        ),
        (
            [[NAN, 4.0, 4.1], [3.5, 3.5, 3.6], [4.2, 4.2, 4.3]],
            [],
            "experts",
            "more experts pay: not established",
        ),
        (
            [[NAN, NAN], [NAN, 1.0]],
            [],
            "slots",
            "no point has a mean, since runs of each diverged; 2 of 2 runs of p0",
        ),
        (
            [[4.0, 4.1], [3.0, 3.1]],
            [[NAN, 3.2]],
            "slots",
            "c0 against p0 no number, not established",
        ),
    ],
)
def test_a_point_that_diverged_never_wins_and_is_named(losses, controls, kind, message):
    rows = _rows(*losses, controls=controls)
    text = conclusion(kind, rows)
    assert message in text and "nan" not in text
    for row in rows:
        gone = sum(map(math.isnan, row.losses))
        assert (f"{gone} of {len(row.losses)} runs of {row.point.name} diverged" in text) == bool(
            gone
        )


def test_a_rate_at_which_a_point_diverged_is_not_its_best():
    places = [_point("p0"), _point("p1", 1.0)]
    losses = {
        ("p0", 0.08): [NAN, 5.2],
        ("p1", 0.08): [4.9, 5.0],
        ("p0", 0.02): [4.0, 4.2],
        ("p1", 0.02): [6.0, 6.0],
    }
    rows = tabulate([(p, rate, losses[p.name, rate]) for rate in (0.08, 0.02) for p in places])
    assert [(r.point.name, r.rate) for r in at_best(rows)] == [("p0", 0.02), ("p1", 0.08)]
    text = conclusion("slots", rows)
    assert text.startswith("p0 scored lowest (4.1000 nats a token at a rate of 0.02")
    assert "1 of 2 runs of p0 at a rate of 0.08 diverged" in text


def test_points_keep_their_names_whatever_stands_beside_them():
    """With other names, a longer list of points would train finished runs again."""
    moe = replace(BASE.moe, routed=400, width=8, active=2)
    base = replace(BASE, moe=moe)
    small, many = (
        [p.name for p in points(SweepConfig(rhos=rhos), base)]
        for rhos in ((1.0, 0.7), (1.0, 0.7, 0.698, 0.4))
    )
    assert set(small) < set(many) and len(set(many)) == len(many) == 6


def test_controls_are_compared_and_never_win():
    text = conclusion(
        "allocation", _rows([4.0, 4.1], [3.9, 4.0], [3.95, 4.05], controls=[[3.0, 3.2]])
    )
    assert text.startswith("p1 scored lowest (3.9500 nats a token")
    assert (
        "c0 against p0 -0.9500 +- 0.0500, established; p1 against c0 +0.8500 +- 0.0500, established"
        in text
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "rho"}, r"got 'rho', expected .*allocation"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"rates": [1.0, 1.0]}, r"rates: got \(1.0, 1.0\), expected different values"),
        ({"rates": [1.0, 0.0]}, "expected factors above 0"),
        ({"rates": [math.nan]}, "expected factors above 0"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"batch_size": -1}, "batch_size: got -1"),
        ({"seq_len": 0}, "seq_len: got 0"),
        ({"workers": 0}, "workers: got 0"),
        ({"experts": []}, "experts: got"),
    ],
)
def test_a_wrong_sweep_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(SweepConfig, change)


def test_a_model_without_experts_is_refused():
    for kind in ("allocation", "experts", "ablation"):
        with pytest.raises(ValueError, match="expected moe to be on"):
            points(from_dict(SweepConfig, {"kind": kind}), replace(BASE, moe=None))


class Text:
    vocab_size = 300


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Replaces training in a sweep: the losses are computed from the configs."""
    seen: list[TrainConfig] = []

    def score(folder, key):
        config = next(config for config in seen if config.folder == str(folder))
        memory = (
            0.2
            if config.model.engram is not None and max(config.model.engram.rows_per_head) > 2
            else 0.0
        )
        noise = 0.01 * config.seed * (config.model.moe.routed % 3)
        return {key: 4.0 + 0.1 * config.seed + 5 * abs(config.optim.lr - 0.02) - memory + noise}

    monkeypatch.setattr(allocation, "prepare", lambda data: Text())
    monkeypatch.setattr(
        allocation, "run", lambda jobs, diverging, **_: seen.extend(job.config for job in jobs)
    )
    monkeypatch.setattr(allocation, "last", score)
    return seen


def _read(folder):
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("rates", [(1.0,), (1.0, 0.5)])
def test_the_sentence_and_the_figure_are_those_of_the_csv(tmp_path, trained, rates):
    config = SweepConfig(
        model=TINY, rhos=(1.0, 0.6, 0.3), rates=rates, seeds=3, folder=str(tmp_path)
    )
    folder = main(config, console=Console(file=io.StringIO(), width=120))
    rows = _read(folder)
    text = (folder / "conclusion.txt").read_text()
    assert len(rows) == 5 * len(rates) and len(trained) == 15 * len(rates)
    assert [c.seed for c in trained] == sorted(c.seed for c in trained), "a seed after the other"
    item = {(r["point"], float(r["rate"])): [float(r[str(s)]) for s in range(3)] for r in rows}
    for row in rows:
        ours = item[row["point"], float(row["rate"])]
        first = item["rho-1.00", float(row["rate"])]
        gaps = [a - b for a, b in zip(ours, first, strict=True)]
        assert float(row["mean"]) == pytest.approx(statistics.fmean(ours))
        assert float(row["difference"]) == pytest.approx(statistics.fmean(gaps))
        assert float(row["difference_error"]) == pytest.approx(statistics.stdev(gaps) / 3**0.5)
    best = [r for r in rows if r["best_rate"] == "True"]
    assert {float(r["rate"]) for r in best} == {0.02} and len(best) == 5
    low = min((r for r in best if r["control"] == "False"), key=lambda r: float(r["mean"]))
    assert text.startswith(f"{low['point']} scored lowest ({float(low['mean']):.4f} nats a token")
    message = (
        f"{low['point']} against rho-1.00 {float(low['difference']):+.4f} "
        f"+- {float(low['difference_error']):.4f}"
    )
    assert (
        message in text
        and "few-rows against rho-1.00" in text
        and f"{low['point']} against plain" in text
    )
    for rate in rates if len(rates) > 1 else ():
        each = next(
            r for r in rows if r["point"] == low["point"] and float(r["rate"]) == 0.02 * rate
        )
        assert (
            f"at a rate of {0.02 * rate:g} {low['point']} against rho-1.00 "
            f"{float(each['difference']):+.4f}" in text
        )
    drawn = (folder / "sweep.svg").read_text()
    assert drawn.startswith("<?xml") and all(word in drawn for word in ("few-rows", ">rho<"))


def test_a_sweep_of_which_runs_diverged_is_written_whole(tmp_path, trained, monkeypatch):
    """A diverged run's loss is nan in the table.

    The figure leaves its point out, and the conclusion names it.
    """
    score = allocation.last
    gone = "rho-1.00-lr-0.02-seed-1"
    monkeypatch.setattr(
        allocation, "last", lambda folder, key: {} if folder.name == gone else score(folder, key)
    )
    config = SweepConfig(model=TINY, rhos=(1.0, 0.6, 0.3), seeds=3, folder=str(tmp_path))
    text = io.StringIO()
    folder = main(config, console=Console(file=text, width=120))
    first, *others = _read(folder)
    assert (first["point"], first["1"], first["mean"], first["best_rate"]) == (
        "rho-1.00",
        "nan",
        "nan",
        "True",
    )
    assert all(row["difference"] == "nan" and math.isfinite(float(row["mean"])) for row in others)
    message = (folder / "conclusion.txt").read_text()
    assert "1 of 3 runs of rho-1.00 diverged" in message and "diverged" in text.getvalue()
    low = min(others[:2], key=lambda row: float(row["mean"]))
    assert (
        message.startswith(f"{low['point']} scored lowest")
        and "few-rows against rho-1.00 no number" in message
    )
    assert json.loads((folder / "sweep.json").read_text())["rhos"] == [1.0, 0.6, 0.3]
    assert sorted(path.name for path in folder.iterdir()) == [
        "conclusion.txt",
        "sweep.csv",
        "sweep.json",
        "sweep.svg",
    ]


def test_a_sweep_that_cannot_be_drawn_leaves_what_was_there(tmp_path, trained, monkeypatch):
    config = SweepConfig(model=TINY, rhos=(1.0, 0.6), folder=str(tmp_path))
    folder = main(config, console=Console(file=io.StringIO()))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(allocation, "chart", lambda kind, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(replace(config, rhos=(1.0, 0.3)), console=Console(file=io.StringIO()))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_curve_is_drawn_from_the_rows():
    rows = _rows([4.0, 5.0], [3.9, 4.8], controls=[[4.0, 4.2]])
    axes = allocation.chart("allocation", rows).axes[0]
    assert axes.lines[0].get_xdata().tolist() == [0.0, 1.0]
    assert axes.lines[0].get_ydata().tolist() == [row.mean for row in rows[:2]]
    assert axes.get_legend_handles_labels()[1] == ["c0", "validation"]
    ticks = [
        text.get_text() for text in allocation.chart("ablation", rows[:2]).axes[0].get_xticklabels()
    ]
    assert ticks == ["p0", "p1"]


def test_every_kind_says_and_draws_something(tmp_path, trained):
    for kind in allocation.KINDS:
        config = from_dict(
            SweepConfig, {"kind": kind, "folder": str(tmp_path), "seeds": 1, "experts": [1, 16]}
        )
        folder = main(replace(config, model=TINY), console=Console(file=io.StringIO()))
        rows = _read(folder)
        text = (folder / "conclusion.txt").read_text()
        assert folder.name == kind and (folder / "sweep.svg").is_file() and "1 seed)" in text
        assert ", established" not in text and ("not established" in text or len(rows) == 1)


# It makes four short runs, each in a process of its own.
@pytest.mark.slow
def test_from_a_text_to_the_sentence_and_again(tmp_path):
    words = ["whale", "river", "stone", "cloud", "engine", "harbour", "violet", "copper"]
    lines = (f"The {a} of the {b} is {c}, entry {n}." for n, (a, b, c) in enumerate(
        (x, y, z) for x in words for y in words for z in words))  # fmt: skip
    (tmp_path / "text").mkdir()
    for n, line in enumerate(lines):
        (tmp_path / "text" / f"{n}.txt").write_text(line * 3)
    data = DataConfig(source=str(tmp_path / "text"), cache=str(tmp_path / "cache"))
    config = SweepConfig(
        kind="experts",
        model=TINY,
        experts=(1, 4),
        data=data,
        steps=4,
        batch_size=2,
        seq_len=32,
        folder=str(tmp_path / "runs"),
    )
    folder = main(config, console=Console(file=io.StringIO()))
    rows = _read(folder)
    text = (folder / "conclusion.txt").read_text()
    assert len(rows) == 2 and re.match(
        r"experts-[14] scored lowest \(\d\.\d{4} nats a token, 2 seeds\)", text
    )
    marks = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert len(marks) == 4
    main(config, console=Console(file=io.StringIO()))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")} == marks
    assert (folder / "conclusion.txt").read_text() == text
