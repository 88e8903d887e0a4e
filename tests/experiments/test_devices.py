"""Tests the estimate against an optimizer's real state, and against seconds computed by hand."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rorqual import doctor
from rorqual.costs import costs
from rorqual.experiments.devices import (
    DEVICES,
    Device,
    Machine,
    estimate,
    this_machine,
    usual_machine,
)
from rorqual.layers.engram import EngramConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel
from rorqual.presets import preset
from rorqual.train.config import OptimConfig
from rorqual.train.optim import Optimizer, roles

MEMORY = EngramConfig(layers=(0, 2), rows_per_head=(151, 157), heads=2, head_dim=8)
TINY = replace(preset("tiny"), engram=MEMORY)


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_bytes_are_those_of_the_optimizer(kind):
    model = LanguageModel(TINY)
    optimizer = Optimizer(model, OptimConfig(kind=kind))
    role = roles(model)
    state = optimizer.state_dict()
    result = estimate(TINY, Machine(optimizer=kind, devices=1)).roles
    assert result.keys() == set(role.values())
    for name, cached in result.items():
        ours = [each for each, what in role.items() if what == name]
        assert cached.parameters == sum(optimizer.parameters[each].numel() for each in ours)
        assert cached.weights == bytes_of(optimizer.parameters[each] for each in ours)
        states = [
            tensor
            for key, tensor in state.items()
            if any(key.startswith(f"{each}.") for each in ours)
        ]
        assert cached.state == bytes_of(states)
    assert sum(cached.state for cached in result.values()) == bytes_of(state.values())


def test_gradients_are_those_of_a_step():
    """Compares the estimated bytes of gradients with those of a backward pass.

    A table has gradients of the rows that were read, each with its index; other weights have as
    many as there are weights.
    """
    torch.manual_seed(0)
    model = LanguageModel(TINY)
    for table in model.tables:
        # The trainer's optimizer sets it, too.
        table.sparse = True
    ids = torch.randint(0, TINY.vocab_size, (1, 9))
    model.loss(ids, ids.roll(-1, 1)).total.backward()
    rows = [table.weight.grad.coalesce() for table in model.tables]
    result = estimate(TINY, Machine(devices=1, step_tokens=9)).roles
    largest = result["rows"].gradients
    assert bytes_of([g.values() for g in rows]) + bytes_of([g.indices() for g in rows]) <= largest
    assert largest == 2 * 9 * 4 * (8 * 4 + 8), "two tables, nine tokens, four rows each"
    dense = bytes_of(
        p.grad
        for name, p in model.named_parameters()
        if roles(model)[name] != "rows" and p.grad is not None
    )
    assert dense == sum(cached.gradients for role, cached in result.items() if role != "rows")
    many = estimate(TINY, Machine(devices=1, step_tokens=1 << 20)).roles["rows"]
    assert many.gradients == sum(table.rows for table in model.tables) * (8 * 4 + 8), (
        "no more rows than there are"
    )


def test_seconds_by_hand(monkeypatch):
    monkeypatch.setitem(DEVICES, "toy", Device(flops=1e9, memory=1e12, bandwidth=1e8, link=1e7))
    machine = Machine(device="toy", devices=2, utilisation=0.5, step_tokens=64, optimizer="adamw")
    result = estimate(TINY, machine, 128)
    assert result.compute == pytest.approx(3 * costs(TINY, 128).flops_per_token * 64 / 1e9)
    dense = [cached for role, cached in result.roles.items() if role != "rows"]
    moved = sum(2 * cached.weights + cached.gradients + 2 * cached.state for cached in dense)
    assert result.update == pytest.approx(moved / 2e8)
    read = 64 * 4 * 2 * 8 * 4
    touched = 2 * 64 * 4 * 8 * 4
    assert result.rows == pytest.approx((2 * read + 7 * touched) / 2e8)
    assert result.step == pytest.approx(result.compute + result.update + result.rows)
    assert result.device_bytes == pytest.approx(
        sum(sum(cached[1:]) for cached in result.roles.values()) / 2, abs=1
    )
    host = estimate(TINY, replace(machine, placement="host"), 128)
    assert (
        host.rows == pytest.approx(read / 2e7)
        and host.step == max(host.compute, host.rows) + host.update
    )
    assert host.host_bytes == sum(result.roles["rows"][1:])
    assert host.device_bytes == pytest.approx(result.device_bytes - host.host_bytes / 2, abs=1)


def test_this_machine_is_measured():
    measured = this_machine()
    assert 1e8 < measured.flops < 1e15 and 1e8 < measured.bandwidth < 1e13, (
        "no machine is slower or faster"
    )
    assert measured.memory == doctor.memory()
    result = estimate(TINY, usual_machine(10**6), 128)
    assert result.compute == pytest.approx(
        3 * costs(TINY, 128).flops_per_token * 4096 / (0.4 * measured.flops)
    )
    assert result.fits
    assert usual_machine(10**6).device == "cpu" and usual_machine(10**9) == Machine()


@pytest.mark.parametrize("depth", [1, 3])
def test_mtp_is_trained_too(monkeypatch, depth):
    """A module predicts with the model's own head.

    Its weights and the head's multiply every token once more.
    """
    monkeypatch.setitem(DEVICES, "toy", Device(flops=1e9, memory=1e12, bandwidth=1e8, link=1e7))
    machine = Machine(device="toy", devices=1, utilisation=1.0, step_tokens=10)
    with_mtp = replace(TINY, mtp=MTPConfig(depth=depth))
    weights = sum(
        p.numel()
        for name, p in LanguageModel(with_mtp).named_parameters()
        if name.startswith("mtp.") and p.dim() > 1
    )
    moe = with_mtp.moe
    weights -= depth * (moe.routed - moe.active) * 3 * with_mtp.dim * moe.width
    weights += depth * with_mtp.vocab_size * with_mtp.dim
    more = estimate(with_mtp, machine, 128).compute - estimate(TINY, machine, 128).compute
    assert more == pytest.approx(3 * 2 * weights * 10 / 1e9, rel=5e-3), (
        "norms scale, and count as weights there"
    )


def test_muon_costs_its_products():
    """Tests five rounds of a gram matrix, its square and their product with the matrix.

    Gate and up are two matrices.
    """
    plain = replace(preset("classroom"), layers=1, moe=None, engram=None, hyper=None)
    slow, fast = (
        estimate(plain, Machine(optimizer=kind, devices=1, utilisation=1.0))
        for kind in ("muon", "adamw")
    )
    d = plain.dim
    w = plain.dense_width
    shapes = [(d, d)] * 4 + [(d, w)] * 3
    products = sum(5 * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in shapes)
    matrix = slow.roles["matrix"]
    assert matrix.parameters == sum(m * n for m, n in shapes)
    saved = 2 * (fast.roles["matrix"].state - matrix.state) / DEVICES["h100"].bandwidth
    assert slow.update == pytest.approx(
        fast.update - saved + products / DEVICES["h100"].flops, rel=1e-6
    )


def test_a_model_without_memory_has_no_rows_and_a_large_one_does_not_fit():
    assert estimate(replace(TINY, engram=None), Machine()).rows == 0
    # The model has half of the blocks, and all of the memory.
    large = replace(preset("engram-40b"), layers=15)
    here, there = (
        estimate(large, Machine(devices=3, placement=tables)) for tables in ("device", "host")
    )
    assert not here.fits and here.roles["rows"].parameters / 1e9 == pytest.approx(18.53, abs=0.01)
    assert there.fits and there.device_bytes < DEVICES["h100"].memory < here.device_bytes
    assert estimate(TINY, Machine(devices=1)).fits


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "h10"}, "did you mean 'h100'"),
        ({"devices": 0}, "devices: got 0, expected at least 1"),
        ({"step_tokens": 0}, "step_tokens: got 0"),
        ({"utilisation": 0.0}, "utilisation: got 0.0, expected a share of the peak"),
        ({"utilisation": 1.5}, "utilisation: got 1.5"),
    ],
)
def test_what_is_no_machine_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Machine(**wrong)


def test_an_estimate_does_not_load_the_compiler() -> None:
    """Loading torch.compile's front end takes longer than the estimate.

    Random numbers on the meta device load it.
    """
    code = (
        "import sys; from rorqual.experiments.devices import Machine, estimate; "
        "from rorqual.presets import preset;"
        "estimate(preset('tiny'), Machine());"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
