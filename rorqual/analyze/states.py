"""Reads hidden states, logits and selected experts of our models and of transformers' models.

A host is any causal model of transformers. Its early predictions are computed by the host itself:
the output of the last block is replaced by that of an earlier one, and the host applies whatever
comes after its blocks.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rorqual.analyze.taps import Taps, quiet
from rorqual.layers.context import context
from rorqual.layers.engram import Addresses, Engram
from rorqual.model import LanguageModel

# Names that transformers' experts give to the argument with the experts of each token.
CHOICES = (
    "top_k_index",
    "router_indices",
)


class ExpertSelection(NamedTuple):
    """The experts that one forward pass selected: indices from 0, and -1 in a slot not used."""

    layers: tuple[int, ...]  # the blocks with experts
    experts: int  # E, of the largest
    slots: list[Int[Tensor, "N K"]]  # one per block in layers, tokens flattened


def ours(model: nn.Module) -> LanguageModel | None:
    """Returns the model if it is one of ours, or the one that a wrapper holds, or None."""
    inner = model if isinstance(model, LanguageModel) else getattr(model, "model", None)
    return inner if isinstance(inner, LanguageModel) else None


def block_names(model: nn.Module) -> list[str]:
    """Returns the dotted names of the blocks in order; ValueError if this is no causal model."""
    if (our_model := ours(model)) is not None:
        modules: list[nn.Module] = list(our_model.blocks)
    else:
        from rorqual.hub.attach import find_blocks

        modules = list(find_blocks(model)[1])
    named = {id(module): name for name, module in model.named_modules()}
    return [named[id(module)] for module in modules]


def run(model: nn.Module, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
    """Returns the logits of the token after each id."""
    if isinstance(model, LanguageModel):
        return model(ids)
    return model(input_ids=ids, use_cache=False).logits.float()


def block_states(model: nn.Module, ids: Int[Tensor, "B T"]) -> list[Float[Tensor, "N D"]]:
    """Returns the output of each block in float32, tokens flattened; several streams are summed."""
    names = block_names(model)
    with quiet(model), Taps(model, *map(_literally, names)) as taps:
        run(model, ids)
    left = [_first(taps[name][0]) for name in names]
    streams = 1 if ours(model) is not None else _streams_of(model)
    if streams > 1:  # Qwen4-Exp has them side by side
        left = [state.unflatten(2, (streams, -1)) if state.dim() == 3 else state for state in left]
    return [(state.sum(2) if state.dim() == 4 else state).flatten(0, 1).float() for state in left]


def _streams_of(host: nn.Module) -> int:
    """Returns the number of residual streams of a transformers model, 1 for most."""
    from rorqual.hub.attach import streams_of

    return streams_of(host)


def lens_logits(
    model: nn.Module, ids: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T V"], Iterator[Float[Tensor, "B T V"]]]:
    """Returns the model's own logits, and those of each block before the last.

    The latter are what the model would predict if that block were its last. They are computed one
    at a time; for a host, each takes a forward pass of its own.
    """
    names = block_names(model)
    with quiet(model), Taps(model, *map(_literally, names)) as taps:
        final = run(model, ids)
    return final, (_early(model, ids, names[-1], taps[name][0]) for name in names[:-1])


def _early(model: nn.Module, ids: Tensor, last: str, output: Any) -> Tensor:
    """Returns the logits as if `output`, of an earlier block, were that of the last one."""
    our_model = ours(model)
    with quiet(model):
        if our_model is None:
            return _replayed(model, ids, model.get_submodule(last), _first(output))
        return our_model.logits(our_model.reduce_streams(output[0]))


def _replayed(model: nn.Module, ids: Tensor, last: nn.Module, state: Tensor) -> Tensor:
    """Returns a host's logits with `state` in place of the output of its last block."""

    def instead(module: nn.Module, inputs: Any, output: Any) -> Any:
        return state if isinstance(output, Tensor) else (state, *output[1:])

    handle = last.register_forward_hook(instead)
    try:
        return run(model, ids)
    finally:
        handle.remove()


def gate_names(model: nn.Module) -> dict[int, str]:
    """Maps the block of each Engram to the dotted name of its gate.

    This covers our models and memories attached to a host.
    """
    results_by_layer: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Engram):
            results_by_layer[_block_of(model, name)] = f"{name}.gate"
    return results_by_layer


def looking_up(model: nn.Module, ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Returns a mask that is False at dead tokens, for documents that begin in the first column.

    Dead tokens look nothing up, whatever their gate is.
    """
    modules = (module for module in model.modules() if isinstance(module, Addresses))
    lookup_mask = [
        addresses.lookup_mask(ids, context(ids.shape[0], ids.shape[1], ids.device))
        for addresses in modules
    ]
    return next(
        (one for one in lookup_mask if one is not None), torch.ones_like(ids, dtype=torch.bool)
    )


def _block_of(model: nn.Module, engram: str) -> int:
    """Returns the block of an Engram module from its name.

    A memory attached to a host has a list of its own, in the order of its config.
    """
    if block := re.search(r"blocks\.(\d+)\.engram$", engram):
        return int(block[1])
    memory, _, table_index = engram.rpartition(".engrams.")
    return cast(Any, model.get_submodule(memory)).config.layers[int(table_index)]


def expert_choices(model: nn.Module, ids: Int[Tensor, "B T"]) -> ExpertSelection:
    """Returns the experts that every token selected; ValueError for a model without experts."""
    if (our_model := ours(model)) is not None and our_model.config.moe is not None:
        with quiet(model):
            routings = [aux.routing for aux in our_model.hidden(ids)[1] if aux.routing is not None]
        slots = [r.topk_indices.masked_fill(r.weights == 0, -1).flatten(0, 1) for r in routings]
        layers = tuple(i for i in range(our_model.config.layers) if our_model.config.has_experts(i))
        return ExpertSelection(layers, our_model.config.moe.routed, slots)
    mixtures = (
        {}
        if our_model is not None
        else {name: m for name, m in model.named_modules() if _choice(m) is not None}
    )
    if not mixtures:
        raise ValueError(
            "experts: got a model without experts, or one whose modules do not show which experts "
            "a token takes, expected a mixture of experts"
        )
    blocks = block_names(model)
    seen = dict[str, Tensor]()
    handles = [_listen(module, name, seen) for name, module in mixtures.items()]
    try:
        with quiet(model):
            run(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    counts = {name: next(module.parameters()).shape[0] for name, module in mixtures.items()}
    slots = [seen[name].masked_fill(seen[name] >= counts[name], -1) for name in seen]
    layers = tuple(
        n for name in seen for n, block in enumerate(blocks) if name.startswith(f"{block}.")
    )
    return ExpertSelection(layers, max(counts.values()), slots)


def _choice(module: nn.Module) -> str | None:
    """Returns the name of the argument with the selected experts, None if there is none.

    Only the experts of a host have one.
    """
    parameters = inspect.signature(module.forward).parameters if hasattr(module, "forward") else {}
    return next((name for name in CHOICES if name in parameters), None)


def _listen(module: nn.Module, name: str, seen: dict[str, Tensor]) -> Any:
    """Registers a hook that stores a host's selected experts, [tokens, K], in `seen`."""
    names = list(inspect.signature(module.forward).parameters)

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        by_name = dict(zip(names, args, strict=False)) | kwargs
        seen[name] = by_name[cast(str, _choice(module))].detach().flatten(0, -2)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _first(output: Any) -> Tensor:
    """Returns a block's hidden state; for our models, the values of its streams."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _literally(name: str) -> str:
    """Returns a pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)
