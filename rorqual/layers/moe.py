"""Mixture of experts: the shared experts and the few routed experts of each token.

    y = shared(u) + sum over the K chosen of weight_i * expert_i(u)      norm(y) with norm_eps
    y = sigmoid(<w, u>) shared(u) + ...          with shared_gate, as Qwen trains it

Tokens are copied to K slots, slots are sorted by expert so that all experts are one grouped
product, and the results are summed for each token. DeepSeekMoE, arXiv:2401.06066.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.layers.context import Context
from rorqual.layers.experts import Experts
from rorqual.layers.feed_forward import SwiGLU
from rorqual.layers.norm import RMSNorm
from rorqual.layers.router import Router, Routing
from rorqual.model_config import MoEConfig as MoEConfig

SMALL_BATCH = 8  # slots; up to so many, one product for each slot is faster than a grouped one

Exchange = Callable[
    [Float[Tensor, "N D"], Int[Tensor, " E"], Experts], Callable[[], Float[Tensor, "N D"]]
]


class Sorted(NamedTuple):
    """An order of slots in which those of one expert are rows side by side.

    Slots of no expert are its last rows.
    """

    order: Int[Tensor, " slots"]  # slot of each row
    rows: Int[Tensor, " slots"]  # row of each slot
    ends: Int[Tensor, " E"]  # one more than the last row of each expert


class Slots(NamedTuple):
    """Copies of tokens, sorted by expert; there are fewer than N * K where slots are not taken.

    Here rows are these copies.
    """

    order: Int[Tensor, " slots"]  # slot n * K + k of each row
    rows: Int[Tensor, "N K"]  # row of each slot; R for one not taken
    counts: Int[Tensor, " E"]  # rows of each expert


def sort_by_expert(topk_indices: Int[Tensor, " slots"], experts: int) -> Sorted:
    """Sorts slots by expert, those of one expert in their order; those of no expert (E) last."""
    expert, order = topk_indices.sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return Sorted(order, rows, ends)


def sort_slots(routing: Routing, dropping: bool) -> Slots:
    """Sorts slots by expert, with tokens in their order within each expert.

    With `dropping`, slots of weight 0 get no row.
    """
    experts = routing.scores.shape[-1]
    topk_indices = routing.topk_indices.flatten()
    if dropping:
        topk_indices = topk_indices.where(routing.taken().flatten(), experts)
    by_expert = sort_by_expert(topk_indices, experts)
    order = by_expert.order
    rows = by_expert.rows
    ends = by_expert.ends
    if dropping:
        taken = int(ends[-1])
        order = order[:taken]
        rows = rows.clamp_max(taken)
    return Slots(
        order, rows.view(-1, routing.topk_indices.shape[-1]), ends.diff(prepend=ends.new_zeros(1))
    )


def _summed(values: Tensor, slots: Slots, weights: Tensor | None) -> Tensor:
    """Computes the (weighted) sum of each token's rows; a row that does not exist counts as 0."""
    if len(slots.order) < slots.rows.numel():
        values = torch.cat([values, values.new_zeros(1, values.shape[1])])
    return F.embedding_bag(slots.rows, values, mode="sum", per_sample_weights=weights)


class _Scatter(torch.autograd.Function):
    """Copies hidden [N, D] to rows [R, D].

    The backward sums a token's rows in place, with K reads and no atomics.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        return hidden.index_select(0, slots.order // slots.rows.shape[1])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0].contiguous(), ctx.slots, None), None


class _Gather(torch.autograd.Function):
    """Sums rows [R, D] with weights [N, K] to hidden [N, D], in the dtype of the weights."""

    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        ctx.save_for_backward(rows, weights)
        return _summed(rows.to(weights.dtype), slots, weights)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        order = ctx.slots.order
        spread = grads[0].index_select(0, order // weights.shape[1])  # [R, D]
        of_slot = (spread * rows).sum(-1)
        flat_weights = weights.flatten()
        to_weights = torch.zeros_like(flat_weights).index_copy(0, order, of_slot).view_as(weights)
        return (
            spread.mul_(flat_weights.index_select(0, order)[:, None]).to(rows.dtype),
            to_weights,
            None,
        )


class MoE(nn.Module):
    """A feed-forward of routed experts and an optional shared SwiGLU.

    If `exchange` is set, it runs the experts in place of a direct call: exchange(rows, counts,
    experts) starts, and what it returns is called for the results, rows in the same order. The
    shared experts are computed in between. Expert parallelism puts its all-to-all there and splits
    `experts` over the ranks.
    """

    def __init__(
        self, config: MoEConfig, dim: int, layer: int = 0, vocab_size: int | None = None
    ) -> None:
        """Builds the router and the experts. `layer` is the block's index.

        `vocab_size` is needed if experts are selected by token id.
        """
        super().__init__()
        self.config = config
        self.router = Router(config.router, dim, config.routed, config.active, layer, vocab_size)
        limit = config.swiglu_limit
        self.experts = Experts(config.routed, dim, config.width, limit)
        self.shared = SwiGLU(dim, config.shared_hidden, limit) if config.shared else None
        self.shared_gate = nn.Linear(dim, 1, bias=False) if config.shared_gate else None
        self.norm = RMSNorm(dim, config.norm_eps) if config.norm_eps is not None else None
        self.exchange: Exchange | None = None

    def forward(
        self, hidden: Float[Tensor, "B T D"], ctx: Context | None = None
    ) -> tuple[Float[Tensor, "B T D"], Routing]:
        """Returns the sum of shared and routed experts for each token, and the routing.

        Padding uses no routed expert; token ids select the experts where the config wants that.
        Both come from the context.
        """
        extras = (None, None) if ctx is None else (ctx.ids, ctx.valid)
        routing = self.router(hidden, *extras)
        rows = hidden.flatten(0, 1)
        weights = routing.weights.flatten(0, 1)
        if self._is_small(routing):
            slots = None
            of_slots = self.experts.small_batch(rows, routing.topk_indices.flatten(0, 1))
        else:
            # The number of rows would depend on the values, which breaks a traced graph in two.
            droppable = self.config.router.adaptive_mass is not None or routing.valid is not None
            slots = sort_slots(routing, droppable and not torch.compiler.is_compiling())
            spread = _Scatter.apply(rows, slots)
            if self.exchange is not None:
                exchanged = self.exchange(spread, slots.counts, self.experts)
        # Rows may be on their way to the ranks of their experts meanwhile.
        shared = None if self.shared is None else self.shared(hidden)
        if shared is not None and self.shared_gate is not None:
            shared = shared * self.shared_gate(hidden).sigmoid()
        if slots is None:
            out = (of_slots * weights[..., None]).sum(1)
        else:
            here = self.exchange is None
            results = self.experts(spread, slots.counts) if here else exchanged()
            out = _Gather.apply(results, weights, slots)
        out = out.to(hidden.dtype).view_as(hidden)
        if shared is not None:
            out = out + shared
        return (out if self.norm is None else self.norm(out)), routing

    def _is_small(self, routing: Routing) -> bool:
        """Returns whether one product for each slot is cheaper than sorting.

        That is so for a token or two of decoding, on a device where reading the selected experts
        does not wait.
        """
        waits = (
            routing.topk_indices.device.type != "cpu"
            or torch.compiler.is_compiling()
            or self.exchange is not None
        )
        return (
            routing.topk_indices.numel() <= SMALL_BATCH
            and not waits
            and not torch.is_grad_enabled()
        )
