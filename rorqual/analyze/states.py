"""A model, ours or transformers', and ids in -> what its blocks left, said and chose, out.

A host is any causal model of transformers. What its blocks would say is asked of the host itself: the output of the
last block is replaced by that of an earlier one, and whatever the host does after its blocks is done to it.
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

CHOICES = (
    "top_k_index",
    "router_indices",
)  # what transformers' experts call the experts of each token


class Chosen(NamedTuple):
    """What the mixtures of one forward took: experts from 0, -1 in a slot that was not taken."""

    layers: tuple[int, ...]  # the blocks with experts
    experts: int  # E, of the largest
    slots: list[Int[Tensor, "N K"]]  # of each of those blocks, tokens flattened


def ours(model: nn.Module) -> LanguageModel | None:
    """The model if it is one of ours, or the one that a wrapper for transformers holds."""
    found = model if isinstance(model, LanguageModel) else getattr(model, "model", None)
    return found if isinstance(found, LanguageModel) else None


def block_names(model: nn.Module) -> list[str]:
    """Dotted names of the blocks, first to last. ValueError for what is no causal model."""
    if (own := ours(model)) is not None:
        modules: list[nn.Module] = list(own.blocks)
    else:
        from rorqual.hub.attach import find_blocks

        modules = list(find_blocks(model)[1])
    named = {id(module): name for name, module in model.named_modules()}
    return [named[id(module)] for module in modules]


def run(model: nn.Module, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
    """Logits of the token after each id."""
    if isinstance(model, LanguageModel):
        return model(ids)
    return model(input_ids=ids, use_cache=False).logits.float()


def block_states(model: nn.Module, ids: Int[Tensor, "B T"]) -> list[Float[Tensor, "N D"]]:
    """What each block leaves, float32, tokens flattened; several streams are summed."""
    names = block_names(model)
    with quiet(model), Taps(model, *map(_literally, names)) as taps:
        run(model, ids)
    left = [_first(taps[name][0]) for name in names]
    return [(state.sum(2) if state.dim() == 4 else state).flatten(0, 1).float() for state in left]


def lens_logits(
    model: nn.Module, ids: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T V"], Iterator[Float[Tensor, "B T V"]]]:
    """The model's own logits, and what each block before the last would say if it were the last, one at a time.

    Of a host, each of those takes a forward of its own.
    """
    names = block_names(model)
    with quiet(model), Taps(model, *map(_literally, names)) as taps:
        final = run(model, ids)
    return final, (_early(model, ids, names[-1], taps[name][0]) for name in names[:-1])


def _early(model: nn.Module, ids: Tensor, last: str, output: Any) -> Tensor:
    own = ours(model)
    with quiet(model):
        if own is None:
            return _replayed(model, ids, model.get_submodule(last), _first(output))
        return own.logits(own.leave(output[0]))


def _replayed(model: nn.Module, ids: Tensor, last: nn.Module, state: Tensor) -> Tensor:
    def instead(module: nn.Module, inputs: Any, output: Any) -> Any:
        return state if isinstance(output, Tensor) else (state, *output[1:])

    handle = last.register_forward_hook(instead)
    try:
        return run(model, ids)
    finally:
        handle.remove()


def gate_names(model: nn.Module) -> dict[int, str]:
    """The block of each Engram -> the dotted name of its gate, in ours and in a memory attached to a host."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Engram):
            found[_block_of(model, name)] = f"{name}.gate"
    return found


def recalling(model: nn.Module, ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """False at dead tokens, of documents that begin in the first column: they recall nothing, whatever a gate says."""
    found = (module for module in model.modules() if isinstance(module, Addresses))
    live = [
        addresses.live(ids, context(ids.shape[0], ids.shape[1], ids.device)) for addresses in found
    ]
    return next((one for one in live if one is not None), torch.ones_like(ids, dtype=torch.bool))


def _block_of(model: nn.Module, engram: str) -> int:
    """From the name of ours; a memory attached to a host has a list of its own, in the order of its config."""
    if block := re.search(r"blocks\.(\d+)\.engram$", engram):
        return int(block[1])
    memory, _, place = engram.rpartition(".engrams.")
    return cast(Any, model.get_submodule(memory)).config.layers[int(place)]


def chosen(model: nn.Module, ids: Int[Tensor, "B T"]) -> Chosen:
    """Which experts every token took. ValueError for a model without any."""
    if (own := ours(model)) is not None and own.config.moe is not None:
        with quiet(model):
            routings = [aux.routing for aux in own.hidden(ids)[1] if aux.routing is not None]
        slots = [r.chosen.masked_fill(r.weights == 0, -1).flatten(0, 1) for r in routings]
        layers = tuple(i for i in range(own.config.layers) if own.config.has_experts(i))
        return Chosen(layers, own.config.moe.routed, slots)
    mixtures = (
        {}
        if own is not None
        else {name: m for name, m in model.named_modules() if _choice(m) is not None}
    )
    if not mixtures:
        raise ValueError(
            "experts: got a model without experts, or whose experts are not told what each token chose"
        )
    blocks, seen = block_names(model), dict[str, Tensor]()
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
    return Chosen(layers, max(counts.values()), slots)


def _choice(module: nn.Module) -> str | None:
    """The argument that tells a host's experts what was chosen, if this module is one."""
    known = inspect.signature(module.forward).parameters if hasattr(module, "forward") else {}
    return next((name for name in CHOICES if name in known), None)


def _listen(module: nn.Module, name: str, seen: dict[str, Tensor]) -> Any:
    names = list(inspect.signature(module.forward).parameters)

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        seen[name] = given[cast(str, _choice(module))].detach().flatten(0, -2)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _first(output: Any) -> Tensor:
    """A block's hidden state, of ours the values of its streams."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _literally(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)
