"""Tests the routers against transformers' DeepSeek-V2, V3 and V4, closed forms and kernels.

It also tests what they leave unchanged.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HashRouter,
    DeepseekV4TopKRouter,
)

from rorqual.layers.router import (
    Router,
    RouterConfig,
    Routing,
    score,
    token_table,
    within_groups,
    within_mass,
)
from rorqual.model_config import ROUTER_SCORES

V3 = RouterConfig(score="sigmoid", groups=4, groups_kept=2, group_score="top2", scale=2.5)
V2 = RouterConfig(
    score="softmax",
    groups=4,
    groups_kept=2,
    group_score="max",
    scale=16.0,
    renormalise=False,
    bias=False,
)
V4 = RouterConfig(score="sqrtsoftplus", scale=1.5)


def spread(routing: Routing) -> torch.Tensor:
    """Returns the weight of every expert, [B, T, E], whatever the order of the selected ones."""
    return torch.zeros_like(routing.scores).scatter(-1, routing.topk_indices, routing.weights)


def theirs(weights: torch.Tensor, topk_indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (
        torch.zeros_like(like)
        .view(-1, like.shape[-1])
        .scatter(-1, topk_indices, weights)
        .view_as(like)
    )


@pytest.mark.parametrize("offset", [0.0, -3.0, 3.0])
def test_v3_is_the_published_router(offset: float) -> None:
    config = DeepseekV3Config(
        hidden_size=24,
        n_routed_experts=16,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    oracle = DeepseekV3TopkRouter(config)
    ours = Router(V3, 24, 16, 3)
    oracle.weight.data = ours.weight.data = torch.randn(16, 24)
    oracle.e_score_correction_bias = ours.e_score_correction_bias = torch.randn(16) + offset
    hidden = torch.randn(2, 37, 24)
    routing = ours(hidden)
    logits, weights, topk_indices = oracle(hidden)
    assert torch.equal(routing.logits.view(-1, 16), logits)
    torch.testing.assert_close(spread(routing), theirs(weights, topk_indices, routing.scores))


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_v2_is_the_published_router(method: str) -> None:
    config = DeepseekV2Config(
        hidden_size=24, num_attention_heads=2, n_routed_experts=16, num_experts_per_tok=3,
        n_group=4, topk_group=2,
        topk_method=method, routed_scaling_factor=16.0,
    )  # fmt: skip
    limits = {} if method == "group_limited_greedy" else {"groups": 1, "groups_kept": 1}
    ours = Router(
        RouterConfig(**{name: getattr(V2, name) for name in V2.__slots__} | limits), 24, 16, 3
    )
    oracle = DeepseekV2TopkRouter(config)
    oracle.weight.data = ours.weight.data = torch.randn(16, 24)
    hidden = torch.randn(3, 19, 24)
    routing = ours(hidden)
    _, weights, topk_indices = oracle(hidden)
    torch.testing.assert_close(spread(routing), theirs(weights, topk_indices, routing.scores))


@pytest.mark.parametrize("by_id", [False, True])
def test_v4_is_the_published_router(by_id: bool) -> None:
    config = DeepseekV4Config(
        hidden_size=24, n_routed_experts=8, num_experts_per_tok=2, vocab_size=31
    )
    config.routed_scaling_factor = 1.5
    config.num_local_experts = 8
    config.scoring_func = "sqrtsoftplus"
    hidden = torch.randn(2, 13, 24)
    ids = torch.randint(31, (2, 13))
    ours = Router(
        RouterConfig(score="sqrtsoftplus", scale=1.5, token_id_layers=int(by_id)), 24, 8, 2, 0, 31
    )
    oracle = (DeepseekV4HashRouter if by_id else DeepseekV4TopKRouter)(config)
    oracle.weight.data = ours.weight.data
    if by_id:
        oracle.tid2eid = ours.table
        _, weights, topk_indices = oracle(hidden, ids)
    else:
        oracle.e_score_correction_bias = ours.e_score_correction_bias = torch.randn(8)
        _, weights, topk_indices = oracle(hidden)
    routing = ours(hidden, ids)
    assert routing.fixed is by_id
    torch.testing.assert_close(spread(routing), theirs(weights, topk_indices, routing.scores))


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("level", [-60.0, -87.0, -88.5, -100.0, -103.5, -110.0, -1e4, 50.0, 1e4])
def test_v4_is_the_published_router_at_extreme_logits(level: float, by_id: bool) -> None:
    """Where every score of a token vanishes, so do its weights.

    The gradient stays finite, unlike theirs.
    """
    config = DeepseekV4Config(
        hidden_size=1, n_routed_experts=8, num_experts_per_tok=3, vocab_size=31
    )
    config.routed_scaling_factor = 1.5
    config.num_local_experts = 8
    config.scoring_func = "sqrtsoftplus"
    ours = Router(
        RouterConfig(score="sqrtsoftplus", scale=1.5, token_id_layers=int(by_id)), 1, 8, 3, 0, 31
    )
    oracle = (DeepseekV4HashRouter if by_id else DeepseekV4TopKRouter)(config)
    ours.weight.data = oracle.weight.data = level + torch.arange(8.0)[:, None] / 7
    hidden = torch.ones(1, 5, 1)
    ids = torch.arange(5)[None]
    if by_id:
        oracle.tid2eid = ours.table
    _, weights, topk_indices = oracle(hidden, *([ids] if by_id else []))
    routing = ours(hidden, ids)
    expected = theirs(weights, topk_indices, routing.scores)
    assert expected.isfinite().all()
    torch.testing.assert_close(spread(routing), expected, rtol=1e-6, atol=0)
    routing.weights.square().sum().backward()
    assert ours.weight.grad.isfinite().all()


def one_token(
    logits: list[float], bias: list[float], config: RouterConfig, active: int
) -> dict[int, float]:
    """Computes the formulas of the module's docstring for one token, in Python floats.

    Returns {expert: weight}.
    """
    if config.score == "softmax":
        whole = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / whole for x in logits]
    elif config.score == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        scores = [math.sqrt(math.log1p(math.exp(x))) for x in logits]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // config.groups
    best_of_group = 1 if config.group_score == "max" else 2
    groups = [range(g * size, (g + 1) * size) for g in range(config.groups)]
    groups.sort(
        key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:best_of_group])
    )
    allowed = [e for group in groups[: config.groups_kept] for e in group]
    topk_indices = sorted(allowed, key=lambda e: -biased[e])[:active]
    if config.adaptive_mass is not None:
        taken: list[int] = []
        for e in topk_indices:
            enough = sum(scores[t] for t in taken) >= config.adaptive_mass * sum(scores)
            if not enough or len(taken) < config.min_active:
                taken.append(e)
        topk_indices = taken
    whole = sum(scores[e] for e in topk_indices) if config.renormalise else 1.0
    return {e: config.scale * scores[e] / whole for e in topk_indices}


@st.composite
def routers(draw) -> tuple[RouterConfig, int, int]:
    """Draws any valid config, its number of experts and how many of them are active."""
    groups = draw(st.integers(1, 5))
    size = draw(st.integers(2, 4))
    cached = draw(st.integers(1, groups))
    active = draw(st.integers(1, cached * size))
    config = RouterConfig(
        score=draw(st.sampled_from(ROUTER_SCORES)), groups=groups,
        groups_kept=cached,
        group_score=draw(st.sampled_from(["top2", "max"])), renormalise=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5, 16.0])), bias=draw(st.booleans()),
        adaptive_mass=draw(st.none() | st.floats(0.05, 0.95)), min_active=draw(st.integers(1,
        active)),
    )  # fmt: skip
    return config, groups * size, active


@settings(max_examples=80, deadline=None)
@given(routers(), st.integers(0, 10**6), st.sampled_from([-6.0, -1.0, 0.0, 2.0]))
def test_any_router_is_its_formulas(
    shape: tuple[RouterConfig, int, int], seed: int, offset: float
) -> None:
    config, experts, active = shape
    draws = torch.Generator().manual_seed(seed)
    router = Router(config, 6, experts, active).double().eval()
    router.weight.data.normal_(0, 0.7, generator=draws)
    bias = torch.zeros(experts)
    if config.bias:
        router.e_score_correction_bias.normal_(0, 0.5, generator=draws).add_(offset)
        bias = router.e_score_correction_bias
    hidden = torch.randn(1, 5, 6, generator=draws, dtype=torch.float64)
    routing = router(hidden)
    for token, logits in enumerate((hidden[0] @ router.weight.T).tolist()):
        expected = one_token(logits, bias.double().tolist(), config, active)
        weights = spread(routing)[0, token]
        assert {e for e, w in enumerate(weights.tolist()) if w} == set(expected)
        assert [float(weights[e].detach()) for e in expected] == pytest.approx(
            list(expected.values()), rel=1e-9
        )
    taken = sum(
        len(one_token(row, bias.double().tolist(), config, active))
        for row in routing.logits[0].tolist()
    )
    assert int(routing.counts().sum()) == taken


def test_scores_in_numbers() -> None:
    logits = torch.tensor([0.0, 1.0, -200.0])
    torch.testing.assert_close(score(logits, "sigmoid"), torch.tensor([0.5, 0.73105858, 0.0]))
    torch.testing.assert_close(
        score(logits, "softmax"), torch.tensor([0.26894142, 0.73105858, 0.0])
    )
    torch.testing.assert_close(
        score(logits, "sqrtsoftplus"), torch.tensor([0.83255461, 1.14597361, 0.0])
    )


@pytest.mark.parametrize("kind", ROUTER_SCORES)
def test_scores_that_vanish_have_finite_gradients(kind: str) -> None:
    logits = torch.tensor([[-300.0, -300.0, -300.0]], requires_grad=True)
    values = score(logits, kind)
    (values / (values.sum() + 1e-20)).square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_experts_outside_of_the_groups_are_never_taken_though_every_bias_is_negative() -> None:
    """A mask of 0 would prefer the masked experts to the allowed ones, which are all below 0."""
    biased = torch.tensor([[-0.1, -5.0, -0.9, -0.9, -2.0, -2.0]])
    allowed = within_groups(biased, 3, 1, "top2")
    assert allowed.tolist() == [
        [-torch.inf, -torch.inf, pytest.approx(-0.9), pytest.approx(-0.9), -torch.inf, -torch.inf]
    ]
    assert within_groups(biased, 3, 1, "max").isfinite().tolist() == [
        [True, True, False, False, False, False]
    ]
    router = Router(RouterConfig(groups=3, groups_kept=1), 8, 6, 2)
    router.e_score_correction_bias = torch.full((6,), -7.0)
    assert (router(torch.randn(2, 50, 8)).topk_indices // 2).unique_consecutive(dim=-1).shape[
        -1
    ] == 1


@pytest.mark.parametrize("config", [V2, V3, V4])
def test_renormalised_weights_sum_to_the_scale(config: RouterConfig) -> None:
    routing = Router(config, 8, 16, 3)(torch.randn(2, 9, 8))
    if config.renormalise:
        torch.testing.assert_close(routing.weights.sum(-1), torch.full((2, 9), config.scale))
    else:
        torch.testing.assert_close(
            routing.weights, 16 * routing.scores.gather(-1, routing.topk_indices)
        )


def test_the_bias_chooses_and_does_not_weigh() -> None:
    router = Router(RouterConfig(renormalise=False), 8, 4, 1)
    router.e_score_correction_bias = torch.tensor([0.0, 9.0, 0.0, 0.0])
    routing = router(torch.randn(1, 20, 8))
    assert (routing.topk_indices == 1).all()
    torch.testing.assert_close(routing.weights[..., 0], routing.scores[..., 1])


def test_gradients_are_those_of_the_formula() -> None:
    for config in (V2, V3, V4, RouterConfig(adaptive_mass=0.6)):
        router = Router(config, 6, 8, 3).double()
        router.e_score_correction_bias = None
        hidden = torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, r=router: r(x).weights, (hidden,))


def test_logits_are_float32_whatever_surrounds_them() -> None:
    router = Router(RouterConfig(), 64, 8, 2).bfloat16()
    hidden = torch.randn(1, 30, 64, dtype=torch.bfloat16)
    expected = hidden.float() @ router.weight.float().T
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(hidden)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.logits, expected)


def test_the_bias_stays_float32_when_the_model_does_not() -> None:
    router = Router(RouterConfig(), 8, 4, 2)
    router.e_score_correction_bias = torch.tensor([0.001, 1.001, 0.0, 0.0])
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert (
        router.e_score_correction_bias.tolist() == torch.tensor([0.001, 1.001, 0.0, 0.0]).tolist()
    )
    assert router.double().e_score_correction_bias.dtype == torch.float32


def test_noise_moves_choices_in_training_only() -> None:
    router = Router(RouterConfig(noise=1.0), 16, 8, 2)
    hidden = torch.randn(4, 50, 16)
    noisy = router(hidden)
    again = router(hidden)
    assert not torch.equal(noisy.topk_indices, again.topk_indices)
    assert torch.equal(noisy.logits, again.logits)  # returned logits have no noise
    router.eval()
    assert torch.equal(router(hidden).weights, router(hidden).weights)
    silent = Router(RouterConfig(), 16, 8, 2)
    silent.weight = router.weight
    assert torch.equal(router(hidden).topk_indices, silent(hidden).topk_indices)


def test_noise_has_its_standard_deviation() -> None:
    router = Router(RouterConfig(noise=0.7), 4, 64, 1)
    routing = router(torch.randn(8, 100, 4))
    noise = torch.logit(routing.scores.double(), eps=1e-9) - routing.logits
    assert noise.std().item() == pytest.approx(0.7, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.integers(1, 4))
def test_adaptive_k_takes_the_fewest_that_hold_the_mass(seed: int, mass: float, least: int) -> None:
    scores = torch.rand(7, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = scores.topk(4, -1).values
    cached = within_mass(best, scores.sum(-1), mass, least)
    for row, values in enumerate(best.tolist()):
        wanted = 0
        stored = 0.0
        while wanted < 4 and (stored < mass * float(scores[row].sum()) or wanted < least):
            stored = stored + values[wanted]
            wanted = wanted + 1
        assert cached[row].tolist() == [slot < wanted for slot in range(4)]


def test_adaptive_k_weighs_only_what_it_took() -> None:
    router = Router(RouterConfig(adaptive_mass=0.3, score="softmax", scale=2.0), 8, 16, 4)
    routing = router(4 * torch.randn(2, 40, 8))
    sizes = routing.taken().sum(-1)
    assert 1 <= int(sizes.min()) < int(sizes.max()) <= 4
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((2, 40), 2.0))
    assert int(routing.counts().sum()) == int(sizes.sum())


def test_token_ids_decide_in_the_first_layers_alone() -> None:
    config = RouterConfig(token_id_layers=2)
    ids = torch.tensor([[5, 6, 5, 7]])
    first = Router(config, 8, 6, 2, 1, 30)
    one = first(torch.randn(1, 4, 8), ids)
    two = first(torch.randn(1, 4, 8), ids)
    assert torch.equal(one.topk_indices, two.topk_indices)
    assert torch.equal(one.topk_indices[0, 0], one.topk_indices[0, 2])
    assert not torch.equal(one.weights, two.weights)  # the weights still come from the hidden state
    assert not Router(config, 8, 6, 2, 2, 30)(torch.randn(1, 4, 8)).fixed
    others = RouterConfig(token_id_layers=1, other_token_id_layers=(3,))
    by_id = [Router(others, 8, 6, 2, layer, 30).table is not None for layer in range(5)]
    assert by_id == [True, False, False, True, False]
    assert [others.bias_of(layer) for layer in range(5)] == [not each for each in by_id]
    with pytest.raises(ValueError, match="token ids"):
        first(torch.randn(1, 4, 8))
    with pytest.raises(ValueError, match="vocabulary"):
        Router(config, 8, 6, 2, 0)


def test_the_token_table_is_even_repeatable_and_without_kernels() -> None:
    table = token_table(4000, 16, 4, 3)
    assert torch.equal(table, token_table(4000, 16, 4, 3))
    assert not torch.equal(table, token_table(4000, 16, 4, 2))
    assert (table.sort(-1).values.diff(dim=-1) > 0).all()
    counts = table.flatten().bincount(minlength=16)
    assert counts.min() > 850
    assert counts.max() < 1150


def test_padding_is_counted_nowhere() -> None:
    valid = torch.tensor([[True, True, False], [False, True, True]])
    routing = Router(RouterConfig(), 8, 4, 2)(torch.randn(2, 3, 8), None, valid)
    assert (routing.weights[~valid] == 0).all()
    assert (routing.weights[valid] > 0).all()
    expected = routing.topk_indices[valid].flatten().bincount(minlength=4)
    assert torch.equal(routing.counts(), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": 4, "groups_kept": 5}, "1 to the 4 groups"),
        ({"groups_kept": 0}, "groups_kept"),
        ({"scale": 0.0}, "more than 0"),
        ({"noise": -1.0}, "0 or more"),
        ({"adaptive_mass": 1.5}, "at most 1"),
        ({"min_active": 0}, "at least 1"),
        ({"token_id_layers": -1}, "0 or more"),
    ],
)
def test_impossible_configs_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RouterConfig(**change)


@pytest.mark.parametrize(("name", "words"), [("score", "sqrtsoftplus"), ("group_score", "top2")])
def test_unknown_kinds_are_refused(name: str, words: str) -> None:
    """The config itself refuses them; under pytest the annotations would do so first."""
    config = RouterConfig()
    object.__setattr__(config, name, "loudest")
    with pytest.raises(ValueError, match=words):
        config.__post_init__()
