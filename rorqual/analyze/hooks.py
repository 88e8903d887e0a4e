"""Names what passes through our models as TransformerLens does, for `taps.Taps`.

    hook_embed                              embeddings                        [B, T, D]
    blocks.N.hook_resid_pre, _post          residual before and after a block [B, T, S, D]
    blocks.N.hook_attn_out, hook_mlp_out    output of a sublayer              [B, T, D]
    blocks.N.mlp.hook_router_scores         score of every expert             [tokens, experts]
    blocks.N.mlp.hook_expert_weights        weight, 0 where not taken         [tokens, experts]
    blocks.N.mlp.hook_expert_indices        selected experts, best first      [tokens, K]
    blocks.N.mlp.experts.E.hook_tokens      tokens of expert E (ours)         [n]
    blocks.N.mlp.experts.E.hook_pre         gate, before its silu             [n, W]
    blocks.N.mlp.experts.E.hook_pre_linear  up projection                     [n, W]
    blocks.N.mlp.experts.E.hook_post        silu(gate) * up                   [n, W]
    blocks.N.mlp.experts.E.hook_out         expert's output, unweighted (ours) [n, D]
    blocks.N.mlp.shared.hook_pre ...        the same three of the shared experts [B, T, W]
    blocks.N.mlp.hook_pre ...               and of a block without experts    [B, T, W]

Nothing of this is in the model: a tap is a forward hook on a module, and what is inside an expert
is computed again from the module's input. In TransformerLens hook_expert_weights has two meanings:
for gpt-oss it is what ours is; for Mixtral it is the softmax over all experts before the selection,
which is hook_router_scores here.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.layers.feed_forward import SwiGLU, gated
from rorqual.layers.moe import MoE
from rorqual.layers.router import Routing
from rorqual.model import Block, LanguageModel

INSIDE = ("hook_pre", "hook_pre_linear", "hook_post")


class HookPoint(NamedTuple):
    """A value at a module: which module, and how it is read from the module's call."""

    module: str  # its dotted name
    read: Callable[[nn.Module, tuple, Any], Any]  # module, arguments, output
    before: bool = False  # read before the module runs; the output is None then


def hook_points(model: nn.Module) -> dict[str, HookPoint]:
    """Returns the points of our model, or of the one that a wrapper holds; {} for another model."""
    for prefix, module in model.named_modules():
        if isinstance(module, LanguageModel):
            return dict(_of_model(module, f"{prefix}." if prefix else ""))
    return {}


def _of_model(model: LanguageModel, prefix: str) -> Iterator[tuple[str, HookPoint]]:
    """Yields the points of a model by name; `prefix` is where a wrapper has the model."""
    yield "hook_embed", HookPoint(f"{prefix}embed", _output)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        name = f"blocks.{index}"
        module = prefix + name
        yield f"{name}.hook_resid_pre", HookPoint(module, _streams_before, before=True)
        yield f"{name}.hook_resid_post", HookPoint(module, _streams)
        yield f"{name}.hook_attn_out", HookPoint(f"{module}.attention", _output)
        yield f"{name}.hook_mlp_out", HookPoint(f"{module}.ffn", _output)
        if isinstance(block.ffn, SwiGLU):
            yield from _of_swiglu(f"{name}.mlp", f"{module}.ffn")
        else:
            yield from _of_experts(block.ffn, f"{name}.mlp", f"{module}.ffn")


def _of_experts(moe: MoE, name: str, module: str) -> Iterator[tuple[str, HookPoint]]:
    """Yields the points of a block's mixture of experts, its shared experts and each routed one."""
    yield f"{name}.hook_router_scores", HookPoint(module, _router_scores)
    yield f"{name}.hook_expert_weights", HookPoint(module, _expert_weights)
    yield f"{name}.hook_expert_indices", HookPoint(module, _expert_indices)
    if moe.shared is not None:
        yield from _of_swiglu(f"{name}.shared", f"{module}.shared")
    for expert in range(moe.config.routed):
        for kind in ("hook_tokens", *INSIDE, "hook_out"):
            read = partial(_expert, expert, kind)
            yield f"{name}.experts.{expert}.{kind}", HookPoint(module, read)


def _of_swiglu(name: str, module: str) -> Iterator[tuple[str, HookPoint]]:
    """Yields the points inside of a SwiGLU."""
    for kind in INSIDE:
        yield f"{name}.{kind}", HookPoint(module, partial(_swiglu, kind))


def _output(module: nn.Module, args: tuple, output: Any) -> Tensor:
    """Returns the first value of an output: attentions and experts return others beside it."""
    return output if isinstance(output, Tensor) else output[0]


def _streams(module: nn.Module, args: tuple, output: Any) -> Float[Tensor, "B T S D"]:
    """Returns the residual streams that a block returned."""
    return output[0].values


def _streams_before(module: nn.Module, args: tuple, output: Any) -> Float[Tensor, "B T S D"]:
    """Returns the residual streams that a block was called with."""
    return args[0].values


def _router_scores(module: nn.Module, args: tuple, output: Any) -> Float[Tensor, "N E"]:
    """Returns the scores of a mixture's routing, tokens flattened."""
    return output[1].scores.flatten(0, 1)


def _expert_indices(module: nn.Module, args: tuple, output: Any) -> Int[Tensor, "N K"]:
    """Returns the selected experts of a mixture's routing, tokens flattened."""
    return output[1].topk_indices.flatten(0, 1)


def _expert_weights(module: nn.Module, args: tuple, output: Any) -> Float[Tensor, "N E"]:
    """Returns the weight of every expert, 0 for those not selected, tokens flattened."""
    routing: Routing = output[1]
    weights = torch.zeros_like(routing.scores, dtype=routing.weights.dtype)
    return weights.scatter(-1, routing.topk_indices, routing.weights).flatten(0, 1)


def _expert(expert: int, kind: str, module: nn.Module, args: tuple, output: Any) -> Tensor:
    """Computes a value inside one expert for the tokens that it took, in their order."""
    assert isinstance(module, MoE)
    if module.exchange is not None:
        raise ValueError(
            f"{kind}: got experts that are split over ranks, expected a model on one of them"
        )
    routing: Routing = output[1]
    taken = ((routing.topk_indices == expert) & routing.taken()).any(-1).flatten()
    tokens = taken.nonzero()[:, 0]
    if kind == "hook_tokens":
        return tokens
    experts = module.experts
    rows = args[0].flatten(0, 1)[tokens]
    gate, up = (rows @ experts.gate_up[expert].to(rows.dtype)).chunk(2, dim=-1)
    if kind == "hook_out":
        return gated(gate, up, experts.limit) @ experts.down[expert].to(rows.dtype)
    return _inside(kind, gate, up, experts.limit)


def _swiglu(kind: str, module: nn.Module, args: tuple, output: Any) -> Tensor:
    """Computes a value inside a SwiGLU from its input."""
    assert isinstance(module, SwiGLU)
    return _inside(kind, module.gate_proj(args[0]), module.up_proj(args[0]), module.limit)


def _inside(kind: str, gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """Returns the value of this name inside of a SwiGLU: gate, up projection or their product."""
    values = {"hook_pre": gate, "hook_pre_linear": up}
    return values[kind] if kind in values else gated(gate, up, limit)
