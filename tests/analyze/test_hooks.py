"""Tests that hooks have TransformerLens' names, and that the model does not notice them."""

from dataclasses import replace

import pytest
import torch

from rorqual.analyze.hooks import hook_points
from rorqual.analyze.taps import Taps, quiet, run_with_cache
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moe import MoEConfig
from rorqual.model import LanguageModel, ModelConfig

CONFIG = ModelConfig(
    vocab_size=50,
    dim=16,
    layers=2,
    dense_width=24,
    moe=MoEConfig(routed=6, active=2, width=8, first_dense=1, swiglu_limit=0.05),
    hyper=HyperConfig(streams=2),
    init_std=0.3,
)
IDS = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])
MLP = "blocks.1.mlp"
INSIDE = ("hook_pre", "hook_pre_linear", "hook_post")


@pytest.fixture(scope="module")
def model():
    return LanguageModel(CONFIG, seed=1).eval()


def test_names_and_shapes(model):
    shapes = {name: tuple(value.shape) for name, value in run_with_cache(model, IDS)[1].items()}
    assert shapes == {
        "hook_embed": (2, 5, 16),
        **{
            f"blocks.{n}.hook_resid_{end}": (2, 5, 2, 16) for n in (0, 1) for end in ("pre", "post")
        },
        **{f"blocks.{n}.hook_{kind}_out": (2, 5, 16) for n in (0, 1) for kind in ("attn", "mlp")},
        f"{MLP}.hook_router_scores": (10, 6),
        f"{MLP}.hook_expert_weights": (10, 6),
        f"{MLP}.hook_expert_indices": (10, 2),
        **{f"blocks.0.mlp.{kind}": (2, 5, 24) for kind in INSIDE},
        **{f"{MLP}.shared.{kind}": (2, 5, 8) for kind in INSIDE},
    }


def test_the_model_computes_the_same_bits_with_hooks_and_without(model):
    """Everything is tapped: logits, losses and gradients do not change in a single bit."""

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        total = model.loss(IDS[:, :-1], IDS[:, 1:]).total
        total.backward()
        gradients = [one.grad for one in model.parameters() if one.grad is not None]
        return [model(IDS).detach(), total.detach(), *map(torch.clone, gradients)]

    before = step()
    with Taps(model, "hook_*", "blocks.*.hook_*") as taps:
        during = step()
    after = step()
    assert len(taps.seen) == len(hook_points(model)) and all(taps.seen.values())
    for one, two, three in zip(before, during, after, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    modules = list(model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_what_is_inside_the_experts_gives_their_output(model):
    """The weights times the experts' outputs, and the shared one's, are the block's output."""
    _, cache = run_with_cache(model, IDS, f"{MLP}.*hook_*", "blocks.1.hook_mlp_out")
    weights = cache[f"{MLP}.hook_expert_weights"]
    shared = model.blocks[1].ffn.shared
    out = shared.down_proj(cache[f"{MLP}.shared.hook_post"]).flatten(0, 1).detach()
    slots = 0
    for expert in range(6):
        name = f"{MLP}.experts.{expert}"
        tokens = cache[f"{name}.hook_tokens"]
        gate, up = (cache[f"{name}.{kind}"] for kind in ("hook_pre", "hook_pre_linear"))
        clipped = torch.nn.functional.silu(gate.clamp(max=0.05)) * up.clamp(-0.05, 0.05)
        assert torch.equal(cache[f"{name}.hook_post"], clipped)
        assert gate.shape == up.shape == (len(tokens), 8)
        out[tokens] += weights[tokens, expert, None] * cache[f"{name}.hook_out"]
        slots += len(tokens)
    assert slots == 10 * 2
    expected = cache["blocks.1.hook_mlp_out"].flatten(0, 1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)


def test_weights_and_indices_are_those_of_the_routing(model):
    _, cache = run_with_cache(model, IDS, f"{MLP}.hook_expert_*")
    with quiet(model):
        (routing,) = [aux.routing for aux in model.hidden(IDS)[1] if aux.routing is not None]
    indices, weights = cache[f"{MLP}.hook_expert_indices"], cache[f"{MLP}.hook_expert_weights"]
    assert torch.equal(indices, routing.topk_indices.flatten(0, 1))
    assert torch.equal(weights.gather(1, indices), routing.weights.flatten(0, 1))
    assert torch.equal((weights != 0).sum(1), torch.full((10,), 2))


def test_a_single_token_is_read_like_many(model):
    """Few tokens are computed slot by slot, past the module of the experts."""
    _, cache = run_with_cache(model, IDS[:1, :1], f"{MLP}.experts.*.hook_out")
    assert sum(len(rows) for rows in cache.values()) == 2


def test_refusals(model):
    with pytest.raises(ValueError, match=r"matches no hook; expected one such as .*expert_indices"):
        Taps(model, f"{MLP}.hook_expert_index")
    with pytest.raises(ValueError, match="expected a model of rorqual"):
        Taps(torch.nn.Linear(2, 2), "hook_embed")
    moe = LanguageModel(replace(CONFIG, hyper=None)).blocks[1].ffn
    moe.exchange = lambda *args: pytest.fail("no exchange is made")
    name = f"{MLP}.experts.0.hook_pre"
    read = hook_points(model)[name].read
    with pytest.raises(ValueError, match="split over ranks"):
        read(moe, (), None)
