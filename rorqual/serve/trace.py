"""Records which experts and which rows of memory a forward pass uses, for every token.

    routed experts   of each block with experts, the experts of the token, best first
    memory           of each block with Engram, the rows that the token reads and its gates

A forward pass is recorded only while a request asks for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rorqual.layers.context import Context
from rorqual.model import Aux, Block, LanguageModel


class MemoryRead(NamedTuple):
    """The rows [R] that a token reads in one block, order-major, and the gate [S] of each stream.

    The gates of a token that looks nothing up are 0.
    """

    rows: list[int]
    gates: list[float]


@dataclass(slots=True, eq=False)
class Trace:
    """What one forward pass used; values are by block."""

    rows: Tensor | None = None  # [Lm, B, T, R]
    lookup_mask: Tensor | None = None  # [B, T]
    gates: dict[int, Tensor] = field(default_factory=dict)  # [B, T, S]

    def keep_last(self, starts: Sequence[int], time: int) -> None:
        """Drops the tokens that the model read before `starts`: `time` of each sequence are left.

        It reads all tokens again where the new ones change what it computes for the others.
        """
        if self.rows is None or self.rows.shape[2] == time:
            return
        steps = torch.arange(time, device=self.rows.device)
        columns = torch.tensor(list(starts), device=self.rows.device)[:, None] + steps
        slots = torch.arange(len(columns), device=self.rows.device)[:, None]
        self.rows = self.rows[:, slots, columns]
        if self.lookup_mask is not None:
            self.lookup_mask = self.lookup_mask[slots, columns]
        self.gates = {layer: gates[slots, columns] for layer, gates in self.gates.items()}

    def memory(self, slot: int, count: int) -> list[dict[int, MemoryRead]]:
        """Returns what the first `count` tokens of a sequence read, by block."""
        if self.rows is None:
            return [{} for _ in range(count)]
        read = self.rows[:, slot, :count].tolist()
        gates = {}
        for layer, values in self.gates.items():
            values = values[slot, :count].float()
            if self.lookup_mask is not None:
                values = values.masked_fill(~self.lookup_mask[slot, :count, None], 0.0)
            gates[layer] = values.tolist()
        return [
            {
                layer: MemoryRead(read[index][token], gates[layer][token])
                for index, layer in enumerate(sorted(gates))
            }
            for token in range(count)
        ]


@contextmanager
def traced(model: LanguageModel, *, memory: bool) -> Iterator[Trace]:
    """Records the memory that the model reads in a `with` block, if `memory` is True."""
    trace = Trace()
    hooks = []
    if memory and model.addresses is not None and model.config.engram is not None:

        def addressed(_: Any, args: tuple, rows: Tensor) -> None:
            ctx = cast(Context, args[1])
            # A large result is memory that the next call uses again.
            trace.rows = rows.clone()
            trace.lookup_mask = ctx.lookup_mask

        hooks.append(model.addresses.register_forward_hook(addressed))
        for layer in model.config.engram.layers:

            def opened(_: Any, args: tuple, gates: Tensor, layer: int = layer) -> None:
                trace.gates[layer] = gates.detach()

            engram = cast(Block, model.blocks[layer]).engram
            assert engram is not None
            hooks.append(engram.gate.register_forward_hook(opened))
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def experts_of(auxes: Sequence[Aux], slot: int, count: int) -> list[dict[int, list[int]]]:
    """Returns the experts of the first `count` tokens of a sequence, by block.

    Adaptive routing may leave a token fewer than K; only those it uses are in the list.
    """
    tokens: list[dict[int, list[int]]] = [{} for _ in range(count)]
    for layer, aux in enumerate(auxes):
        if aux.routing is None:
            continue
        indices = aux.routing.topk_indices[slot, :count]
        used = aux.routing.taken()[slot, :count]
        by_token = torch.where(used, indices, -1).tolist()
        for token, experts in zip(tokens, by_token, strict=True):
            token[layer] = [expert for expert in experts if expert >= 0]
    return tokens
