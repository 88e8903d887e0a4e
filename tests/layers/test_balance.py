"""Tests the balance losses and the training that they do.

The losses are compared with closed forms at uniform and collapsed routing, and with loops.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rorqual.layers.balance import BalanceConfig, losses, max_violation, update_bias, z_loss
from rorqual.layers.router import Router, RouterConfig, Routing

NAMES = ("sequence", "expert", "device", "communication")
OFF = BalanceConfig(bias_rate=0.0, sequence=0.0)


def uniform(batch: int, time: int, experts: int, active: int) -> Routing:
    """Builds a routing that takes every expert equally often with equal scores.

    Slot k of token t is expert t K + k.
    """
    topk_indices = (torch.arange(time)[:, None] * active + torch.arange(active)) % experts
    scores = torch.full((batch, time, experts), 1 / experts)
    weights = torch.ones(batch, time, active)
    return Routing(topk_indices.expand(batch, -1, -1), weights, scores, scores.log())


def collapsed(batch: int, time: int, experts: int, active: int) -> Routing:
    """Builds a routing of all tokens to experts 0..K-1, which share all of the score."""
    topk_indices = torch.arange(active).expand(batch, time, active)
    scores = torch.zeros(batch, time, experts)
    scores[..., :active] = 1 / active
    return Routing(topk_indices, torch.ones(batch, time, active), scores, scores)


@st.composite
def sizes(draw) -> tuple[int, int, int, int]:
    """Draws devices D, experts per device, K of them active, and sequences.

    K fills whole devices or shares one.
    """
    devices = draw(st.integers(1, 5))
    size = draw(st.integers(1, 4))
    batch = draw(st.integers(1, 3))
    active = draw(
        st.sampled_from([k for k in range(1, devices * size + 1) if size % k == 0 or k % size == 0])
    )
    return devices, size, active, batch


@settings(max_examples=40, deadline=None)
@given(sizes(), st.floats(1e-3, 1.0))
def test_uniform_routing_costs_the_coefficient(
    shape: tuple[int, int, int, int], coefficient: float
) -> None:
    """Each loss is its coefficient when routing is uniform.

    A token's K experts are on M = max(1, K / size) devices, the limit of the communication loss.
    """
    devices, size, active, batch = shape
    experts = devices * size
    limit = max(1, active // size)
    routing = uniform(batch, experts, experts, active)
    for name in NAMES:
        config = replace(OFF, **{name: coefficient}, devices=devices, device_limit=limit)
        result = losses(routing, config, active)
        assert list(result) == [name]
        assert float(result[name]) == pytest.approx(coefficient, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(sizes(), st.integers(1, 9))
def test_collapsed_routing_costs_its_closed_form(
    shape: tuple[int, int, int, int], time: int
) -> None:
    """All tokens go to experts 0..K-1, which share all of the score.

    There f is E/K, P sums to 1, and M devices get all tokens.
    """
    devices, size, active, batch = shape
    experts = devices * size
    limit = max(1, active // size)
    values = {
        "sequence": experts / active,
        "expert": experts / active,
        # The mean of f over a device, which K may fill in part.
        "device": experts / active * min(active, size) / size,
        "communication": devices / limit,
    }
    for name, value in values.items():
        config = replace(OFF, **{name: 0.5}, devices=devices, device_limit=limit)
        assert float(
            losses(collapsed(batch, time, experts, active), config, active)[name]
        ) == pytest.approx(0.5 * value)
    assert max_violation(collapsed(batch, time, experts, active).counts()) == pytest.approx(
        experts / active - 1
    )


def test_the_gradient_of_the_sequence_loss_in_numbers() -> None:
    """The gradient flows through P alone, and f is constant.

    It is d/d logits of a sum f_i softmax(logits)_i, with sigmoids in place of exp.
    """
    router = Router(RouterConfig(score="sigmoid"), 5, 6, 2).double()
    hidden = torch.randn(2, 7, 5, dtype=torch.float64)
    routing = router(hidden)
    losses(routing, replace(OFF, sequence=0.3), 2)["sequence"].backward()
    by_hand = torch.zeros_like(router.weight)
    for b in range(2):
        load = 6 / (2 * 7) * routing.topk_indices[b].flatten().bincount(minlength=6).double()
        for t in range(7):
            s = (hidden[b, t] @ router.weight.detach().T).sigmoid()
            share = s / s.sum()
            to_scores = (load - (load * share).sum()) / s.sum()
            by_hand += 0.3 / 2 / 7 * torch.outer(to_scores * s * (1 - s), hidden[b, t])
    torch.testing.assert_close(router.weight.grad, by_hand)


def test_sending_to_all_allowed_devices_costs_the_coefficient() -> None:
    """Each token goes to M = 2 of D = 4 devices, evenly, so f'' is 1."""
    routing = uniform(1, 8, 8, 2)
    topk_indices = torch.stack([torch.arange(8) % 4 * 2, (torch.arange(8) + 2) % 4 * 2], -1)[None]
    config = replace(OFF, communication=1.0, devices=4, device_limit=2)
    assert float(
        losses(routing._replace(topk_indices=topk_indices), config, 2)["communication"]
    ) == pytest.approx(1.0)


def by_hand(routing: Routing, name: str, active: int, devices: int, limit: int) -> float:
    """Computes the formulas of the module's docstring, one token at a time."""
    experts = routing.scores.shape[-1]
    result = []
    for b in range(len(routing.topk_indices)):
        there = [
            t
            for t in range(routing.topk_indices.shape[1])
            if routing.valid is None or bool(routing.valid[b, t])
        ]
        if not there:
            continue
        count = [0.0] * experts
        probability = [0.0] * experts
        sent = [0.0] * devices
        for t in there:
            scores = routing.scores[b, t].double()
            if name == "sequence":
                scores = scores / scores.sum()
            taken = [
                int(i)
                for i, w in zip(routing.topk_indices[b, t], routing.weights[b, t], strict=True)
                if w != 0
            ]
            for i in taken:
                count[i] += 1
            for d in {i * devices // experts for i in taken}:
                sent[d] += 1
            probability = [
                p + s / len(there) for p, s in zip(probability, scores.tolist(), strict=True)
            ]
        load = [experts / (active * len(there)) * c for c in count]
        size = experts // devices
        groups = [slice(d * size, (d + 1) * size) for d in range(devices)]
        if name in ("sequence", "expert"):
            result.append(sum(f * p for f, p in zip(load, probability, strict=True)))
        elif name == "device":
            result.append(sum(sum(load[g]) / size * sum(probability[g]) for g in groups))
        else:
            share = [devices / (limit * len(there)) * s for s in sent]
            result.append(sum(f * sum(probability[g]) for f, g in zip(share, groups, strict=True)))
    return sum(result) / len(result)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_are_the_formulas(name: str, padded: bool, score: str) -> None:
    valid = torch.rand(4, 11) < 0.7 if padded else None
    if valid is not None:
        valid[2] = False  # only padding, so it does not count as a sequence
    router = Router(RouterConfig(score=score, adaptive_mass=0.5, groups=4, groups_kept=2), 6, 12, 3)
    routing = router(torch.randn(4, 11, 6), None, valid)
    config = replace(OFF, **{name: 0.7}, devices=4, device_limit=2)
    expected = 0.7 * by_hand(routing, name, 3, 4, 2)
    assert losses(routing, config, 3)[name].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "z_loss"])
def test_padding_takes_no_part(name: str) -> None:
    router = Router(RouterConfig(), 6, 8, 2)
    hidden = torch.randn(2, 9, 6)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[:, 6:] = False
    config = replace(OFF, **{name: 1.0}, devices=2)
    short = losses(router(hidden[:, :6]), config, 2)[name]
    one = losses(router(hidden, None, valid), config, 2)[name]
    hidden[:, 6:] = 100 * torch.randn(2, 3, 6)
    two = losses(router(hidden, None, valid), config, 2)[name]
    torch.testing.assert_close(one, short)
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", [*NAMES, "z_loss"])
def test_gradients_reach_the_router_and_the_hidden_states(name: str) -> None:
    router = Router(RouterConfig(), 6, 8, 2)
    hidden = torch.randn(2, 9, 6, requires_grad=True)
    losses(router(hidden), replace(OFF, **{name: 1.0}, devices=4), 2)[name].backward()
    assert router.weight.grad.abs().sum() > 0
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [*NAMES, "z_loss"])
def test_nothing_but_padding_costs_nothing(name: str) -> None:
    routing = Router(RouterConfig(), 6, 8, 2)(
        torch.randn(2, 3, 6), None, torch.zeros(2, 3, dtype=torch.bool)
    )
    assert losses(routing, replace(OFF, **{name: 1.0}, devices=4), 2)[name].item() == 0


def test_only_losses_with_a_coefficient_appear() -> None:
    routing = uniform(1, 4, 4, 2)
    assert losses(routing, OFF, 2) == {}
    assert list(losses(routing, BalanceConfig(), 2)) == ["sequence"]
    everything = replace(OFF, sequence=1.0, expert=1.0, device=1.0, communication=1.0, z_loss=1.0)
    assert list(losses(routing, everything, 2)) == [*NAMES, "z_loss"]
    assert list(losses(routing._replace(fixed=True), everything, 2)) == ["z_loss"]


def test_z_loss_in_numbers() -> None:
    logits = torch.zeros(1, 2, 4)
    assert float(z_loss(logits)) == pytest.approx(1.9218121)  # ln(4)^2
    logits[0, 1] = 50.0
    assert float(z_loss(logits, torch.tensor([[True, False]]))) == pytest.approx(1.9218121)


def test_the_bias_moves_towards_the_mean_by_its_rate() -> None:
    bias = torch.tensor([0.1, 0.0, -0.1, 0.0])
    update_bias(bias, torch.tensor([4, 2, 0, 2]), 0.01)
    torch.testing.assert_close(bias, torch.tensor([0.09, 0.0, -0.09, 0.0]))
    update_bias(None, torch.tensor([1]), 0.01)


def test_max_violation_in_numbers() -> None:
    assert max_violation(torch.tensor([3, 3, 3])) == 0
    assert max_violation(torch.tensor([6, 6, 0, 0, 0, 0])) == 2  # E/K - 1
    assert max_violation(torch.zeros(4, dtype=torch.long)) == 0


def trained(config: BalanceConfig, score: str = "sigmoid", steps: int = 120) -> float:
    """Trains a router that starts with all tokens on experts 0 and 1 and returns MaxVio.

    The task rewards that a little.
    """
    torch.manual_seed(0)
    router = Router(RouterConfig(score=score), 8, 8, 2)
    router.weight.data *= 0.3
    router.weight.data[:2, 0] += 4.0
    hidden = torch.randn(16, 32, 8)
    hidden[..., 0] = 1.0
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(steps):
        routing = router(hidden)
        wish = F.mse_loss(routing.weights[..., 0], torch.full((16, 32), 0.5))
        optimizer.zero_grad()
        (0.01 * wish + sum(losses(routing, config, 2).values())).backward()
        optimizer.step()
        update_bias(router.e_score_correction_bias, routing.counts(), config.bias_rate)
    return max_violation(router(hidden).counts())


def test_a_collapsed_router_stays_collapsed_without_a_remedy() -> None:
    assert trained(OFF) > 2.5
    assert trained(replace(OFF, z_loss=1e-3)) > 1.5  # keeps logits small, balances nothing


@pytest.mark.parametrize("remedy", ["bias_rate", *NAMES])
def test_a_collapsed_router_recovers_with(remedy: str) -> None:
    coefficient = 0.02 if remedy == "bias_rate" else 0.1
    config = replace(OFF, **{remedy: coefficient}, devices=8, device_limit=2)
    score = "sigmoid" if remedy in ("bias_rate", "sequence") else "softmax"
    assert trained(config, score) < 0.7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequence": -1.0}, "balance.sequence"),
        ({"bias_rate": float("nan")}, "bias_rate"),
        ({"devices": 0}, "devices"),
        ({"devices": 2, "device_limit": 3}, "1 to the 2"),
    ],
)
def test_impossible_configs_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BalanceConfig(**change)
