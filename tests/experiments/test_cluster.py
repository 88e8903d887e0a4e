"""Tests cluster.py: even loads give the formulas' seconds, uneven ones more, from one recording."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rorqual.experiments.cluster import (
    RECORDED,
    Traffic,
    read_traffic,
    recorded_ids,
    simulate,
)
from rorqual.plan_costs import Cluster, Layout, distinct_ids, step_seconds
from rorqual.presets import preset

PAPER = preset("engram-27b")
MODEL = replace(PAPER, moe=replace(PAPER.moe, routed=56))
EVEN = Traffic(
    loads=((1.0,) * 8,),
    tokens=(100, 100_000),
    distinct=(((50, 50_000),), ((90, 90_000),)),
    about="even",
)


@pytest.mark.parametrize(
    ("cluster", "layout"),
    [
        (Cluster(devices=1), Layout()),
        (Cluster(devices=8), Layout(expert=8, micro_batches=2)),
        (Cluster(devices=64), Layout(expert=8, sequences=2, recompute=False)),
        (Cluster(devices=64), Layout(expert=4, replicate=2, overlap_rows=False)),
        (Cluster(devices=64, network=5e9), Layout(expert=8, overlap_mapping=False)),
        (Cluster(devices=64), Layout()),
    ],
)
def test_even_loads_take_the_formulas_time(cluster: Cluster, layout: Layout) -> None:
    ids = recorded_ids(MODEL, layout, EVEN)
    result = simulate(MODEL, cluster, layout, EVEN, steps=1, jitter=0.0)
    formula = step_seconds(MODEL, cluster, layout, ids)
    # A rank serves a little more than the mean, by chance.
    assert result.mean == pytest.approx(formula.total, rel=0.002)
    assert result.mean >= formula.total * (1 - 1e-9)
    assert result.load == 1
    assert result.ids == pytest.approx(tuple(ids), rel=1e-3)


def test_uneven_loads_and_jitter_take_longer() -> None:
    cluster = Cluster(devices=64)
    layout = Layout(expert=8, sequences=2)
    uneven = replace(EVEN, loads=((3.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5),))
    seconds = [
        simulate(MODEL, cluster, layout, traffic, steps=1, jitter=jitter).mean
        for traffic, jitter in ((EVEN, 0.0), (uneven, 0.0), (uneven, 0.1))
    ]
    assert seconds[0] < seconds[1] < seconds[2]
    again = simulate(MODEL, cluster, layout, uneven, steps=2, seed=5)
    assert again == simulate(MODEL, cluster, layout, uneven, steps=2, seed=5)
    assert again.steps[0] != again.steps[1]
    assert 1 < again.load < 2


def test_n_grams_follow_powers_between_and_beyond_what_was_counted() -> None:
    traffic = replace(EVEN, tokens=(100, 1000, 10_000), distinct=(((50, 400, 3200),),))
    assert traffic.n_grams(2, 1000) == pytest.approx(400)
    assert traffic.n_grams(2, 100 * 10**0.5) == pytest.approx(50 * 8**0.5)
    assert traffic.n_grams(2, 100_000) == pytest.approx(3200 * 8)
    assert traffic.n_grams(4, 1000) == pytest.approx(400), "orders beyond are the longest"
    layout = Layout(seq_len=1000)
    # 400 n-grams are 400 rows of each of 8 heads, of both orders, but for rows that share one.
    assert recorded_ids(MODEL, layout, traffic) == pytest.approx([6400, 6400], abs=2)
    tiny = replace(MODEL, engram=replace(MODEL.engram, rows_per_head=(11, 11)))
    assert all(
        ids <= limit
        for ids, limit in zip(
            recorded_ids(tiny, layout, traffic), distinct_ids(tiny, layout), strict=True
        )
    )
    dense = preset("dense-4b")
    assert simulate(dense, Cluster(), Layout(), EVEN, steps=1).ids == ()


def test_the_recording_that_ships() -> None:
    traffic = read_traffic()
    assert RECORDED.stat().st_size < 100_000
    assert all(np.mean(one) == pytest.approx(1, abs=0.01) for one in traffic.loads)
    assert all(list(one) == sorted(one, reverse=True) for one in traffic.loads)
    for order, samples in enumerate(traffic.distinct, 2):
        for sample in samples:
            assert list(sample) == sorted(sample)
            assert all(
                0 < count <= tokens for count, tokens in zip(sample, traffic.tokens, strict=True)
            ), order


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"loads": [], "tokens": [1], "distinct": [[[1]]], "about": ""}']
)
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "traffic.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"traffic\.json: got .*expected a recording of"):
        read_traffic(path)
    values = {"loads": [[1.0]], "tokens": [1, 2], "distinct": [[[1]]], "about": ""}
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="expected 2"):
        read_traffic(path)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="steps: got 0"):
        simulate(MODEL, Cluster(), Layout(), EVEN, steps=0)
    with pytest.raises(ValueError, match="jitter: got 1"):
        simulate(MODEL, Cluster(), Layout(), EVEN, jitter=1.0)
