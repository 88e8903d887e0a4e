"""Context parallelism: each rank of a group computes a part of every sequence.

Rank r of C has the tokens from r T / C to (r + 1) T / C. To a layer it is as if it continued a
sequence after a cache, which here other ranks fill, with gradients:

    Gathered   keys, values or latents of all tokens up to this rank's last; gathered from all ranks
    Halo       the last few values before this rank's first, for convolutions; from the rank before

Ids, labels and documents of whole sequences are on every rank, so that hashes of n-grams, positions
and MTP's targets across a border need no exchange. The loss is the rank's part of that of the whole
sequences: its mean over the group is the loss of one process. Attention is causal, so the last rank
has the most keys.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int, Shaped
from torch import Tensor

from rorqual.layers.attention import GQACache, MLACache
from rorqual.layers.cache import BlockCache, Cache, DraftCache, Past, Recent
from rorqual.layers.context import Span
from rorqual.layers.moe import MoE
from rorqual.layers.router import Routing
from rorqual.model import LanguageModel, Loss


def split_sequences(model: LanguageModel, group: dist.ProcessGroup) -> None:
    """Makes `model.loss` compute this rank's part of every sequence, in place.

    `forward` still computes whole sequences, on every rank of the group alike.
    """
    model.loss = functools.partial(_part_of_loss, model, group)  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, MoE):
            balance = module.config.balance
            if balance.sequence or balance.expert or balance.device or balance.communication:
                module.router.register_forward_hook(functools.partial(_with_whole, group))


def _part_of_loss(
    model: LanguageModel,
    group: dist.ProcessGroup,
    ids: Int[Tensor, "B T"],
    labels: Int[Tensor, "B T"],
    *,
    document_ids: Int[Tensor, "B T"] | None = None,
    lengths: Any = None,
    indexer_warmup: bool = False,
) -> Loss:
    """Computes the loss of this rank's part of whole sequences.

    ValueError for a length that is not a multiple of the group's size, for parts that are shorter
    than what a convolution looks back at, and for padding.
    """
    ranks = dist.get_world_size(group)
    engram = model.config.engram
    halo = 0 if engram is None else engram.halo
    size = ids.shape[1] // ranks
    if ids.shape[1] % ranks or size < max(1, halo):
        raise ValueError(
            f"context: got sequences of {ids.shape[1]} tokens for {ranks} ranks, expected a "
            f"multiple of {ranks} and at least {max(1, halo)} tokens a rank"
        )
    if lengths is not None:
        raise ValueError("context: got padded sequences, expected packed ones without padding")
    start = dist.get_rank(group) * size
    end = start + size
    targets = [
        target._replace(
            labels=target.labels[:, start:end],
            following=None if target.following is None else target.following[:, start:end],
            parts=ranks,
        )
        for target in model.targets(ids, labels, document_ids)
    ]
    return model.loss_of_targets(
        ids[:, start:end],
        targets,
        document_ids=None if document_ids is None else document_ids[:, start:end],
        indexer_warmup=indexer_warmup,
        cache=_cache(model, group, ids[:, :start], document_ids),
    )


def _cache(
    model: LanguageModel,
    group: dist.ProcessGroup,
    before: Int[Tensor, "B T2"],
    document_ids: Int[Tensor, "B T"] | None,
) -> Cache:
    """Returns a cache of the tokens before this rank's first one, which other ranks compute."""
    batch, start = before.shape
    cache = model.new_cache(batch)
    first = Span(0, None)
    if cache.ids is not None and start:
        cache.ids.append(before, first)
    for past in (cache.past, *(draft.past for draft in cache.drafts)):
        _count(past, start, document_ids, first)
    for bundle in (*cache.layers, *cache.drafts):
        _connect(bundle, group)
    return cache


def _count(past: Past, start: int, document_ids: Tensor | None, first: Span) -> None:
    """Counts `start` tokens as cached in every sequence, and stores their documents."""
    if document_ids is not None and start:
        past.document_ids.append(document_ids[:, :start], first)
    past.append([start] * past.batch)


def _connect(bundle: BlockCache | DraftCache, group: dist.ProcessGroup) -> None:
    """Replaces the containers of a block's cache by those that other ranks fill."""
    attention = bundle.attention
    assert isinstance(attention, (MLACache, GQACache)), type(attention)
    for name in attention.parts:
        setattr(attention, name, Gathered(group))
    if isinstance(bundle.engram, Recent):
        bundle.engram = Halo(bundle.engram.count, group)


class Gathered:
    """Stands for `Appended`: the tokens before the new ones are those of the ranks before."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def append(self, new: Shaped[Tensor, "B T ..."], ctx: Any) -> Shaped[Tensor, "B L ..."]:
        """Returns the values of all tokens up to the last new one, L = past + T."""
        return _Gather.apply(new, ctx.past + new.shape[1], self.group)


class Halo:
    """Stands for `Recent`: the tokens before the new ones are the last ones of the rank before."""

    def __init__(self, count: int, group: dist.ProcessGroup) -> None:
        self.count = count
        self.group = group

    def extend(self, new: Shaped[Tensor, "B T ..."], ctx: Any) -> Shaped[Tensor, "B L ..."]:
        """Returns the `count` tokens before the new ones, and these."""
        del ctx
        return _WithHalo.apply(new, self.count, self.group)


def _all_gather(tensor: Tensor, group: Any) -> Shaped[Tensor, "C B ..."]:
    """Returns the tensors of all ranks, which have one shape, along a new first axis."""
    ranks = dist.get_world_size(group)
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(
        tensor.contiguous(), ranks, group.group_name
    )
    return torch.ops._c10d_functional.wait_tensor(gathered).unflatten(0, (ranks, -1))


class _Gather(torch.autograd.Function):
    """Concatenates the tokens of all ranks up to `length`; backward adds what all ranks send."""

    @staticmethod
    def forward(ctx, new: Tensor, length: int, group: Any) -> Tensor:
        ctx.group = group
        ctx.time = new.shape[1]
        return _all_gather(new, group).transpose(0, 1).flatten(1, 2)[:, :length].contiguous()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        group = ctx.group
        ranks = dist.get_world_size(group)
        grad = grads[0]
        # Tokens after this rank's were not seen.
        whole = grad.new_zeros(len(grad), ranks * ctx.time, *grad.shape[2:])
        whole[:, : grad.shape[1]] = grad
        by_rank = whole.unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 1).contiguous()
        summed = torch.ops._c10d_functional.reduce_scatter_tensor(
            by_rank, "sum", ranks, group.group_name
        )
        return torch.ops._c10d_functional.wait_tensor(summed), None, None


class _WithHalo(torch.autograd.Function):
    """Puts the last tokens of the rank before in front; backward sends their gradients there."""

    @staticmethod
    def forward(ctx, new: Tensor, count: int, group: Any) -> Tensor:
        ctx.count = count
        ctx.group = group
        ends = _all_gather(new[:, new.shape[1] - count :], group)
        rank = dist.get_rank(group)
        before = ends[rank - 1] if rank else torch.zeros_like(ends[0])
        return torch.cat([before, new], dim=1)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        count = ctx.count
        grad = grads[0][:, count:].clone()
        of_ends = _all_gather(grads[0][:, :count], ctx.group)
        following = dist.get_rank(ctx.group) + 1
        if following < len(of_ends):
            grad[:, grad.shape[1] - count :] += of_ends[following]
        return grad, None, None


def _with_whole(group: Any, module: Any, args: Any, routing: Routing) -> Routing:
    """Adds the choices of the whole sequences, whose load the balance losses need."""
    del module, args
    indices, weights = (
        _all_gather(tensor.detach(), group).transpose(0, 1).flatten(1, 2)
        for tensor in (routing.topk_indices, routing.weights)
    )
    shape = (*indices.shape[:2], routing.scores.shape[-1])
    none = routing.scores.new_zeros(()).expand(shape)
    return routing._replace(whole=Routing(indices, weights, none, none, None, routing.fixed))
