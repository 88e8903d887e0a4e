"""Tests plan_costs.py: against counts of a built model, closed forms by hand, and limits."""

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.costs import costs, flops_by_block, sizes
from rorqual.model_config import row_totals
from rorqual.plan_costs import (
    FLOAT,
    Cluster,
    Layout,
    bytes_sent,
    distinct_ids,
    memory,
    pieces,
    step_seconds,
    work,
)
from rorqual.presets import PRESETS, preset

SMALL = preset("small")
PAPER = preset("engram-27b")
BIG = replace(PAPER, moe=replace(PAPER.moe, routed=56))


def test_formulas_load_no_torch() -> None:
    code = (
        "import sys; from rorqual.plan_costs import *; from rorqual.presets import preset; "
        "step_seconds(preset('engram-27b'), Cluster(), Layout()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parts_are_all_parameters_and_all_flops(name: str) -> None:
    """Both are counted independently in `costs`."""
    config = preset(name)
    counted = costs(config)
    each = sizes(config)
    together = each.rows + sum(each.experts) + sum(each.blocks) + each.embedding + each.others
    assert together == counted.total + counted.mtp
    assert min(*each.blocks, each.embedding) > 0
    assert all(bool(each.experts[i]) == config.has_experts(i) for i in range(config.layers))
    assert 0 <= each.others < each.embedding
    blocks, outside = flops_by_block(config)
    assert sum(block.total for block in blocks) + outside == counted.flops_per_token
    head = 2 * config.vocab_size * config.dim
    assert outside == pytest.approx(head, rel=0.1, abs=1000 * config.layers)
    assert all(0 <= block.experts < block.total for block in blocks)


def test_memory_of_one_device_is_that_of_the_trainer() -> None:
    """Every number of a role of `estimate`, which builds the model."""
    from rorqual.experiments.devices import Machine, estimate

    for optimizer in ("muon", "adamw"):
        layout = Layout(seq_len=512, optimizer=optimizer)
        footprint = memory(SMALL, Cluster(devices=1), layout)
        built = estimate(
            SMALL, Machine(devices=1, step_tokens=layout.tokens, optimizer=optimizer)
        ).roles
        ours = Counter[str]()
        for one in footprint.roles.values():
            ours.update(one._asdict())
        theirs = Counter[str]()
        for role in built.values():
            theirs.update(weights=role.weights, gradients=role.gradients, state=role.state)
        # `costs` counts the routers' biases, which have neither gradient nor moments.
        biases = FLOAT * SMALL.moe.routed * sum(map(bool, sizes(SMALL).experts))
        assert ours["weights"] == theirs["weights"] + biases
        assert ours["gradients"] == theirs["gradients"] + biases
        # Norms and convolutions learn by Adam too, and every tensor has a number of its steps.
        assert ours["state"] == pytest.approx(theirs["state"], rel=0.02)
        assert (footprint.gathered, bytes_sent(SMALL, Cluster(devices=1), layout)) == (
            0,
            dict.fromkeys(("parameters, gathered", "gradients, reduced", "gradients of copies"), 0)
            | {"tokens to experts and back": 0, "rows and their gradients": 0},
        )


@settings(max_examples=20, deadline=None)
@given(log_ranks=st.integers(0, 10), log_experts=st.integers(0, 3), micro_batches=st.integers(1, 4))
def test_bytes_by_hand(log_ranks: int, log_experts: int, micro_batches: int) -> None:
    expert = 2 ** min(log_experts, log_ranks)
    ranks = 2**log_ranks
    layout = Layout(expert=expert, micro_batches=micro_batches, number_bytes=2)
    ids = [1000, 2000]
    sent = bytes_sent(BIG, Cluster(devices=ranks), layout, ids)
    each = sizes(BIG)
    blocks = 4 * sum(each.blocks) * (ranks - 1) / ranks
    blocks += 4 * sum(each.experts) / expert * (ranks - expert) / ranks
    root = 4 * (each.embedding + each.others) * (ranks - 1) / ranks
    gathered = micro_batches * (2 * blocks + root)
    assert sent["parameters, gathered"] == pytest.approx(gathered, rel=1e-9)
    assert sent["gradients, reduced"] == pytest.approx(micro_batches * (blocks + root), rel=1e-9)
    assert sent["tokens to experts and back"] == pytest.approx(
        micro_batches * 29 * 6 * 4096 * 6 * 2560 * 2 * (1 - 1 / expert)
    )
    rows = 3000 * (4 + 2 * 4 * 80) * (1 - 1 / ranks) + 2 * 16 * (ranks - 1)
    assert sent["rows and their gradients"] == pytest.approx(micro_batches * rows, abs=4)
    assert sent["gradients of copies"] == 0
    copies = bytes_sent(BIG, Cluster(devices=2 * ranks), replace(layout, replicate=2), ids)
    parameters = sum(each.blocks) + sum(each.experts) + each.embedding + each.others
    once = 2 * 4 * parameters / ranks / 2
    assert copies["gradients of copies"] == pytest.approx(once, rel=1e-6)


def test_bytes_of_rows_grow_with_ids_and_not_with_the_table() -> None:
    cluster = Cluster(devices=8)
    layout = Layout()
    larger = replace(BIG, engram=replace(BIG.engram, rows_per_head=(7_239_680, 7_239_680)))
    kind = "rows and their gradients"
    ids = distinct_ids(BIG, layout)
    assert bytes_sent(BIG, cluster, layout, ids) == bytes_sent(larger, cluster, layout, ids)
    less = bytes_sent(BIG, cluster, layout, [one // 4 for one in ids])[kind]
    assert less == pytest.approx(bytes_sent(BIG, cluster, layout, ids)[kind] / 4, rel=0.01)
    assert distinct_ids(BIG, layout, 0.25) == [4096 * 16 // 4] * 2
    assert distinct_ids(BIG, replace(layout, sequences=10**6)) == list(row_totals(BIG.engram))


def test_a_rank_holds_its_share_of_everything() -> None:
    one = memory(BIG, Cluster(devices=1), Layout())
    many = memory(BIG, Cluster(devices=64), Layout(expert=8))
    for role, footprint in one.roles.items():
        assert many.roles[role].weights == pytest.approx(footprint.weights / 64, rel=1e-3)
        assert many.roles[role].state == pytest.approx(footprint.state / 64, rel=1e-3)
    copies = memory(BIG, Cluster(devices=64), Layout(expert=8, replicate=8))
    assert copies.roles["rest"].weights == pytest.approx(8 * many.roles["rest"].weights, rel=1e-3)
    assert copies.roles["rows"] == many.roles["rows"], "rows have no copies"
    host = memory(BIG, Cluster(devices=64), Layout(expert=8, placement="host"))
    rows = many.roles["rows"]
    assert host.host == rows.weights + rows.state
    assert host.device == many.device - host.host
    each = sizes(BIG)
    largest = max(
        block + experts // 8 for block, experts in zip(each.blocks, each.experts, strict=True)
    )
    assert many.gathered == 2 * FLOAT * (largest + each.embedding + each.others)
    assert memory(BIG, Cluster(devices=64), Layout(recompute=False)).activations > (
        5 * many.activations
    )


def test_times_of_collectives() -> None:
    net = Cluster(latency=0.0, message=0.0, link=900e9, network=50e9, devices=1024)
    # In a node a ring: each rank receives 7 / 8 of everything.
    assert net.gather_seconds(8e9, 8) == pytest.approx(8e9 * 7 / 8 / 900e9)
    # Of two nodes each receives half over its eight links to the other.
    assert net.gather_seconds(8e9, 16) == pytest.approx(8e9 / 2 / 400e9)
    assert net.gather_seconds(8e9, 1024) == pytest.approx(8e9 * 127 / 128 / 400e9)
    # Ranks that are a node apart have a link to the network each.
    assert net.gather_seconds(8e9, 16, stride=8) == pytest.approx(8e9 * 15 / 16 / 50e9)
    assert net.all_to_all_seconds(8e9, 8) == pytest.approx(8e9 * 7 / 8 / 900e9)
    assert net.all_to_all_seconds(8e9, 64) == pytest.approx(8e9 * 56 / 64 / 50e9)
    slow = replace(net, latency=1.0, message=0.1)
    assert slow.gather_seconds(0, 64) == 6
    assert slow.all_to_all_seconds(0, 11) == pytest.approx(1 + 10 * 0.1)
    assert slow.gather_seconds(1e12, 1) == slow.all_to_all_seconds(1e12, 1) == 0


def test_one_device_only_computes() -> None:
    layout = Layout(micro_batches=3, recompute=False)
    cluster = Cluster(devices=1)
    step = step_seconds(PAPER, cluster, layout)
    flops = 3 * costs(PAPER, 4096).flops_per_token * 3 * 4096
    assert step.compute == pytest.approx(flops / (989.4e12 * 0.4), rel=1e-9)
    assert (step.gather, step.rows, step.exchange) == (0, 0, 0)
    mapping = 2 * 30 * 3 * 4096 * 2 * 4 * (4 * 2560 + 2 * 16) / 3.35e12
    assert step.mapping == pytest.approx(mapping)
    assert step.total == pytest.approx(step.compute + step.mapping + step.update)
    again = step_seconds(PAPER, cluster, replace(layout, recompute=True))
    blocks, _ = flops_by_block(PAPER, 4096)
    more = sum(block.total for block in blocks) * 3 * 4096 / (989.4e12 * 0.4)
    assert again.compute - step.compute == pytest.approx(more)


def test_rows_that_arrive_in_time_cost_nothing() -> None:
    cluster = Cluster(devices=64, message=1e-3)
    layout = Layout(expert=8, sequences=4)
    each = pieces(BIG, cluster, layout)
    in_line = step_seconds(BIG, cluster, replace(layout, overlap_rows=False))
    overlapped = step_seconds(BIG, cluster, layout)
    assert in_line.rows == pytest.approx(sum(map(sum, each.rows.values())))
    first = sum(work(each.blocks[0], layout))
    assert each.rows[1][0] > first, "block 0 is shorter than the exchange"
    # What is left is one table behind block 0, and its gradients behind the same block backward.
    late = each.rows[1][0] - max(first, each.blocks[1].gather + each.blocks[1].gather_experts)
    assert 0 < overlapped.rows <= late + each.rows[1][1]
    assert overlapped.total < in_line.total
    assert step_seconds(BIG, replace(cluster, message=1e-6), layout).rows == 0
    slow = replace(layout, overlap_mapping=False)
    difference = step_seconds(BIG, cluster, slow).mapping - overlapped.mapping
    hidden = sum(
        min(block.mapping, 2 * block.exchange) for block in pieces(BIG, cluster, layout).blocks
    )
    assert difference == pytest.approx(3 * hidden)


@pytest.mark.parametrize(
    ("cluster", "layout", "message"),
    [
        ({"devices": 0}, {}, "devices: got 0, expected at least 1"),
        ({"network": 0.0}, {}, "network: got 0.0, expected more than 0"),
        ({"latency": -1.0}, {}, "latency: got -1.0"),
        ({"utilisation": 1.5}, {}, "utilisation: got 1.5"),
        ({}, {"seq_len": 0}, "seq_len: got 0"),
        ({}, {"number_bytes": 3}, "number_bytes: got 3"),
        ({"devices": 64}, {"replicate": 3}, "replicate: got 3, expected a divisor of 64 devices"),
        ({"devices": 8}, {"expert": 16}, "expert: got 16, expected a divisor of the 8 devices"),
        ({"devices": 16}, {"expert": 16}, "expert: got 16, expected a divisor of 55 experts"),
    ],
)
def test_wrong_plans_are_refused(cluster: dict, layout: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_seconds(PAPER, Cluster(**cluster), Layout(**layout))
    with pytest.raises(ValueError, match="for a model without experts"):
        memory(preset("dense-4b"), Cluster(), Layout(expert=2))
    assert math.isfinite(step_seconds(preset("dense-4b"), Cluster(), Layout()).total)
