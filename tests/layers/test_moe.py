"""Tests the mixture against transformers' own and against one expert at a time.

Covers padding, dropping, the exchange hook, torch.compile and kernels.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from rorqual.layers.balance import BalanceConfig, losses, max_violation, update_bias
from rorqual.layers.context import context
from rorqual.layers.experts import Experts
from rorqual.layers.moe import MoE, MoEConfig, sort_by_expert, sort_slots
from rorqual.layers.router import RouterConfig, Routing
from rorqual.model_config import ROUTER_SCORES

SIZES = {
    "hidden_size": 24, "num_attention_heads": 2, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
}  # fmt: skip
V3 = RouterConfig(groups=4, groups_kept=2, scale=2.5)
V2 = RouterConfig(
    score="softmax",
    groups=4,
    groups_kept=2,
    group_score="max",
    scale=2.5,
    renormalise=False,
    bias=False,
)


def one_by_one(moe: MoE, hidden: Tensor, routing: Routing) -> Tensor:
    """Computes shared(u) + sum of weight * expert(u), one expert at a time."""
    out = torch.zeros_like(hidden) if moe.shared is None else moe.shared(hidden)
    for expert in range(moe.config.routed):
        gate, up = (hidden @ moe.experts.gate_up[expert]).chunk(2, -1)
        weight = (routing.weights * (routing.topk_indices == expert)).sum(-1, keepdim=True)
        out = out + weight * ((F.silu(gate) * up) @ moe.experts.down[expert])
    return out


@pytest.mark.parametrize(("router", "shared"), [(V3, 1), (V2, 2)])
def test_equal_to_transformers_forward_and_backward(router: RouterConfig, shared: int) -> None:
    if router is V3:
        oracle = DeepseekV3MoE(DeepseekV3Config(**SIZES, n_shared_experts=shared))
    else:
        config = DeepseekV2Config(
            **SIZES, n_shared_experts=shared, topk_method="group_limited_greedy"
        )
        oracle = DeepseekV2Moe(config)
    ours = MoE(MoEConfig(routed=8, active=3, shared=shared, width=16, router=router), 24)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(oracle.shared_experts, name).weight.data = getattr(
            ours.shared, name
        ).weight.data.clone()
    oracle.gate.weight.data = ours.router.weight.data.clone()
    oracle.experts.gate_up_proj.data = ours.experts.gate_up.data.transpose(1, 2).clone()
    oracle.experts.down_proj.data = ours.experts.down.data.transpose(1, 2).clone()
    if router.bias:
        oracle.gate.e_score_correction_bias = ours.router.e_score_correction_bias = (
            torch.randn(8) - 2
        )
    hidden = torch.randn(2, 23, 24)
    gradients = []
    for run in (oracle, lambda x: ours(x)[0]):
        leaf = hidden.clone().requires_grad_()
        out = run(leaf)
        (out * hidden.flip(-1)).sum().backward()
        gradients.append((out.detach(), leaf.grad))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.router.weight.grad, oracle.gate.weight.grad, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        ours.experts.down.grad, oracle.experts.down_proj.grad.transpose(1, 2), rtol=1e-4, atol=1e-5
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (3, 0)])
@pytest.mark.parametrize(
    "router", [RouterConfig(), RouterConfig(adaptive_mass=0.3), RouterConfig(score="sqrtsoftplus")]
)
def test_equal_to_one_expert_at_a_time(router: RouterConfig, shape: tuple[int, int]) -> None:
    compare(
        MoE(MoEConfig(routed=6, active=4, shared=1, width=5, router=router), 7),
        torch.randn(*shape, 7),
    )


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3), size=st.integers(2, 4), shared=st.integers(0, 2), dim=st.integers(1,
    9),
    width=st.integers(1, 9), shape=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    to_one=st.booleans(),
    data=st.data(),
)  # fmt: skip
def test_equal_to_one_expert_at_a_time_at_any_size(
    groups, size, shared, dim, width, shape, to_one, data
) -> None:
    """Compares with one expert at a time.

    Covers odd widths, experts without tokens, a single token, and all tokens on the same experts.
    """
    cached = data.draw(st.integers(1, groups))
    active = data.draw(st.integers(1, cached * size))
    mass = data.draw(st.none() | st.floats(0.1, 0.9))
    score = data.draw(st.sampled_from(ROUTER_SCORES))
    router = RouterConfig(
        score=score, groups=groups, groups_kept=cached, adaptive_mass=mass, scale=1.5
    )
    moe = MoE(
        MoEConfig(routed=groups * size, active=active, shared=shared, width=width, router=router),
        dim,
    )
    if to_one:
        moe.router.e_score_correction_bias = 100.0 * torch.arange(groups * size).float()
    compare(moe, torch.randn(*shape, dim))


def compare(moe: MoE, hidden: Tensor) -> None:
    """Compares outputs and all gradients with the loop."""
    wish = torch.randn_like(hidden)
    results = []
    for run in (lambda x: moe(x)[0], lambda x: one_by_one(moe, x, moe.router(x))):
        leaf = hidden.clone().requires_grad_()
        moe.zero_grad()
        out = run(leaf)
        (out * wish).sum().backward()
        results.append([out.detach(), leaf.grad, *[p.grad.clone() for p in moe.parameters()]])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_formula() -> None:
    router = RouterConfig(adaptive_mass=0.5, renormalise=False)
    moe = MoE(MoEConfig(routed=4, active=3, shared=0, width=2, router=router), 4).double()
    hidden = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    parameters = tuple(moe.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: moe(x)[0], (hidden, *parameters))


def test_rows_are_sorted_by_expert_and_stay_in_order_within() -> None:
    routing = Routing(
        topk_indices=torch.tensor([[[2, 0], [0, 1], [2, 1]]]),
        weights=torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.3, 0.7]]]),
        scores=torch.zeros(1, 3, 4),
        logits=torch.zeros(1, 3, 4),
    )
    whole = sort_slots(routing, dropping=False)
    assert whole.order.tolist() == [1, 2, 3, 5, 0, 4]
    assert whole.rows.tolist() == [[4, 0], [1, 2], [5, 3]]
    assert whole.counts.tolist() == [2, 2, 2, 0]
    fewer = sort_slots(routing, dropping=True)
    assert fewer.order.tolist() == [1, 2, 5, 0, 4]
    assert fewer.rows.tolist() == [[3, 0], [1, 5], [4, 2]]
    assert fewer.counts.tolist() == routing.counts().tolist() == [2, 1, 2, 0]


@pytest.mark.parametrize(("slots", "experts"), [(0, 3), (1, 1), (7, 3), (1000, 17)])
def test_slots_are_sorted_by_expert_and_stay_in_order_within_one(slots: int, experts: int) -> None:
    topk_indices = torch.randint(experts + 1, (slots,))  # E means no expert
    by_expert = sort_by_expert(topk_indices, experts)
    order = by_expert.order.tolist()
    assert order == sorted(range(slots), key=lambda slot: (int(topk_indices[slot]), slot))
    assert torch.equal(by_expert.order[by_expert.rows], torch.arange(slots))
    assert by_expert.ends.tolist() == [
        int((topk_indices <= expert).sum()) for expert in range(experts)
    ]


def test_a_few_slots_are_not_sorted_and_come_out_the_same() -> None:
    """Decoding without gradients computes the same numbers in another way."""
    config = MoEConfig(
        routed=8, active=2, shared=1, width=5, router=RouterConfig(adaptive_mass=0.3)
    )
    moe = MoE(config, 6)
    hidden = torch.randn(2, 2, 6)
    for where in (None, context(2, 2, "cpu", lengths=[2, 1])):
        expected, _ = moe(hidden, where)
        with torch.no_grad():
            torch.testing.assert_close(moe(hidden, where)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        expected = moe(hidden)[0]
        with torch.no_grad():
            torch.testing.assert_close(moe(hidden)[0], expected, rtol=0.02, atol=0.02)


def test_slots_that_are_not_taken_cost_no_row() -> None:
    rows = []

    def counted(arguments: Tensor, counts: Tensor, experts: Experts) -> Callable[[], Tensor]:
        rows.append((len(arguments), int(counts.sum())))
        return lambda: experts(arguments, counts)

    moe = MoE(
        MoEConfig(
            routed=8, active=4, width=4, router=RouterConfig(adaptive_mass=0.4, score="softmax")
        ),
        8,
    )
    moe.exchange = counted
    _, routing = moe(3 * torch.randn(2, 30, 8))
    assert rows == [(int(routing.taken().sum()),) * 2]
    assert rows[0][0] < 2 * 30 * 4


def test_padding_takes_no_expert_and_moves_no_other_token() -> None:
    moe = MoE(MoEConfig(routed=8, active=2, shared=1, width=4), 8)
    where = context(2, 6, "cpu", lengths=[4, 1])
    valid = where.valid
    hidden = torch.randn(2, 6, 8, requires_grad=True)
    out, routing = moe(hidden, where)
    torch.testing.assert_close(out[valid], moe(hidden)[0][valid])
    torch.testing.assert_close(out[~valid], moe.shared(hidden)[~valid])
    assert int(routing.counts().sum()) == 2 * int(valid.sum())
    nothing, _ = moe(hidden, context(2, 6, "cpu", lengths=[0, 0]))
    torch.testing.assert_close(nothing, moe.shared(hidden))
    nothing.sum().backward()
    assert moe.experts.down.grad.abs().sum() == 0


def test_the_exchange_takes_the_place_of_the_experts() -> None:
    moe = MoE(MoEConfig(routed=4, active=2, shared=0, width=4), 8)
    hidden = torch.randn(2, 5, 8)
    expected = moe(hidden)[0]

    def swapped(rows: Tensor, counts: Tensor, experts: Experts) -> Callable[[], Tensor]:
        """Acts as another machine with the experts: it gets a copy and returns the results."""
        assert int(counts.sum()) == len(rows) == 2 * 5 * 2
        there = rows.clone()
        return lambda: experts(there, counts).clone()

    moe.exchange = swapped
    assert torch.equal(moe(hidden)[0], expected)


def test_without_shared_experts_and_with_a_width_of_their_own() -> None:
    assert MoE(MoEConfig(shared=0), 8).shared is None
    assert MoEConfig(shared=2, width=16).shared_hidden == 32
    width = MoEConfig(shared=1, width=16, shared_width=40)
    assert width.shared_hidden == 40
    assert MoE(width, 8).shared.up_proj.weight.shape == (40, 8)
    assert MoEConfig(shared=0).shared_hidden == 0


def test_layers_that_choose_by_token_id_do_so() -> None:
    config = MoEConfig(routed=8, active=2, width=4, router=RouterConfig(token_id_layers=1))
    ids = torch.tensor([[3, 4, 3]])
    ctx = context(1, 3, "cpu", ids=ids)
    moe = MoE(config, 8, 0, 20)
    _, routing = moe(torch.randn(1, 3, 8), ctx)
    assert torch.equal(routing.topk_indices[0], moe.router.table[ids[0]])
    assert not MoE(config, 8, 1, 20)(torch.randn(1, 3, 8), ctx)[1].fixed


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_bfloat16_stays_near_float32(kind: str) -> None:
    moe = MoE(MoEConfig(routed=8, active=2, shared=1, width=16), 32)
    hidden = torch.randn(2, 20, 32)
    expected, routing = moe(hidden)
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            out, again = moe(hidden)
        assert torch.equal(again.topk_indices, routing.topk_indices)
    else:
        out, again = moe.bfloat16()(hidden.bfloat16())
        assert out.dtype == torch.bfloat16
    same = (again.topk_indices.sort(-1).values == routing.topk_indices.sort(-1).values).all(-1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(out.float()[same], expected[same], rtol=0.05, atol=0.05)


def test_the_same_input_gives_the_same_bits() -> None:
    moe = MoE(MoEConfig(), 16)
    hidden = torch.randn(4, 64, 16)
    gradients = []
    for _ in range(2):
        moe.zero_grad()
        moe(hidden)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in moe.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def trained(name: str) -> tuple[float, float]:
    """Trains a mixture on four linear maps and returns MaxVio and the error.

    The router starts with all tokens on experts 0 and 1. MaxVio is over experts, or over the four
    devices of two experts if the remedy works on those.
    """
    torch.manual_seed(0)
    remedy = {} if name == "none" else {name: {"bias_rate": 0.03, "z_loss": 1e-3}.get(name, 0.3)}
    balance = BalanceConfig(
        **{"bias_rate": 0.0, "sequence": 0.0} | remedy, devices=4, device_limit=2
    )
    router = RouterConfig(score="sigmoid" if name == "bias_rate" else "softmax")
    moe = MoE(MoEConfig(routed=8, active=2, width=8, router=router, balance=balance), 8)
    moe.router.weight.data *= 0.3
    moe.router.weight.data[:2, 0] += 4.0
    hidden = torch.randn(8, 32, 8)
    hidden[..., 0] = 1.0
    wish = (hidden[..., None, :] @ torch.randn(4, 8, 8)[hidden[..., 1:5].argmax(-1)]).squeeze(-2)
    optimizer = torch.optim.Adam(moe.parameters(), lr=0.02)
    for _ in range(100):
        out, routing = moe(hidden)
        error = (out - wish).square().mean()
        optimizer.zero_grad()
        (error + sum(losses(routing, balance, 2).values())).backward()
        optimizer.step()
        update_bias(moe.router.e_score_correction_bias, routing.counts(), balance.bias_rate)
    counts = moe(hidden)[1].counts()
    devices = name in ("device", "communication")
    return max_violation(counts.view(4, 2).sum(1) if devices else counts), error.item()


@pytest.mark.parametrize("name", ["none", "z_loss"])
def test_a_collapsed_mixture_stays_so_and_learns_little(name: str) -> None:
    violation, error = trained(name)
    assert violation > 2.5
    assert error > 1.2


@pytest.mark.parametrize("remedy", ["bias_rate", "sequence", "expert", "device", "communication"])
def test_a_collapsed_mixture_recovers_and_learns_with(remedy: str) -> None:
    violation, error = trained(remedy)
    assert violation < 0.9
    assert error < 1.0


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "padded", "backend"),
    [
        (V3, False, "inductor"),
        (V3, True, "aot_eager"),
        (RouterConfig(adaptive_mass=0.5), True, "aot_eager"),
    ],
)
def test_compiles_without_a_break(router: RouterConfig, padded: bool, backend: str) -> None:
    moe = MoE(MoEConfig(routed=8, active=3, shared=1, width=16, router=router), 16)
    hidden = torch.randn(2, 9, 16)
    valid = torch.ones(2, 9, dtype=torch.bool)
    if padded:
        valid[0, 5:] = False
    where = context(2, 9, "cpu", lengths=valid.sum(1))
    results = []
    for module in (moe, torch.compile(moe, fullgraph=True, backend=backend)):
        leaf = hidden.clone().requires_grad_()
        moe.zero_grad()
        out = module(leaf, where)[0]
        (out.square().sum(-1) * valid).sum().backward()
        results.append(
            [out.detach()[valid], leaf.grad, *[p.grad.clone() for p in moe.parameters()]]
        )
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"routed": 0}, "moe.routed"),
        ({"active": 33}, "1 to the 32"),
        ({"active": 0}, "moe.active"),
        ({"width": 0}, "moe.width"),
        ({"shared": -1}, "moe.shared"),
        ({"first_dense": -1}, "first_dense"),
        ({"shared_width": 0}, "shared_width"),
        ({"shared_width": 8, "shared": 0}, "shared_width"),
        ({"router": RouterConfig(groups=5)}, "divisor of 32"),
        ({"active": 6, "router": RouterConfig(groups=8, groups_kept=1)}, "room for 6"),
        ({"active": 1, "router": RouterConfig(groups=32, groups_kept=2)}, "expected 'max'"),
        ({"router": RouterConfig(min_active=3)}, "at most active, 2"),
        ({"balance": BalanceConfig(devices=5)}, "divisor of 32"),
    ],
)
def test_impossible_configs_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoEConfig(**change)
