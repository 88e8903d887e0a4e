"""Attends within selected blocks of keys, as MoBA and the selected branch of NSA do.

    out[t]  = softmax(scale q_t . k) v over the keys up to t of the blocks that are selected for t

The two differ in how they score a block. A selection is index[b, t, j] of K blocks, -1 where fewer
are selected, one for each KV group (j of G) or each head (j of H). The same sum is computed in two
ways:

    masked_attention     a boolean mask for scaled_dot_product_attention, with documents, padding
                         and gradients
    selected_attention   only the selected keys, gathered for each token: decoding; its kernel is
                         kernels/select.py

layers/tiles.py has two more, for many queries that share one selection.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rorqual.kernels import kernel
from rorqual.layers.attend import attend
from rorqual.layers.basics import largest
from rorqual.layers.cache import Appended
from rorqual.layers.context import Context

QUERIES = 512  # processed at a time, so that no mask is T x T
FEW = 16  # up to so many new tokens after a cache read selected keys in place, left-padded ones too


def runs(time: int) -> Iterator[slice]:
    """Splits the queries of a call into slices of QUERIES."""
    return (slice(start, min(start + QUERIES, time)) for start in range(0, time, QUERIES))


def segments(ctx: Context, block: int) -> Int[Tensor, "B L"]:
    """Returns the block of its sequence that each key is in.

    Blocks are numbered through the documents in order; padding has the block of the key before it.
    Block m of a sequence belongs to the document of query t when own[t] - positions[t] // block <=
    m <= own[t].
    """
    starts = ctx.key_positions % block == 0
    if ctx.key_present is not None:
        starts = starts & ctx.key_present
    return (starts.cumsum(1) - 1).clamp_min(0)


def most_blocks(segment: Int[Tensor, "B L"]) -> int:
    """Returns the largest number of blocks of any sequence.

    While a compiler traces, values are not known, and the number of keys is returned.
    """
    return segment.shape[1] if torch.compiler.is_compiling() else int(segment.max()) + 1


def straight(ctx: Context) -> tuple[Context, Int[Tensor, " B"] | None]:
    """Removes the mask of a few tokens after a cache if their only padding is on the left.

    Returns the context without its mask, and the left padding of each sequence in columns, by which
    the sequence is shifted. In all other cases it returns the context itself and None.
    """
    if ctx.lead is None or not ctx.past or ctx.positions.shape[1] > FEW:
        return ctx, None
    return replace(ctx, mask=None, present=None, key_present=None), ctx.lead


class Blocks:
    """Caches one value per complete block of a growing sequence of keys.

    No block is read twice. Block i of a sequence is its keys i stride .. i stride + block - 1,
    counted from its first token.
    """

    def __init__(self, block: int, stride: int, capacity: int = 0):
        self.block, self.stride, self.tokens = block, stride, 0
        self.made = Appended(capacity // stride)

    def count(self, tokens: int) -> int:
        """Returns the number of complete blocks in `tokens` tokens."""
        return max(0, (tokens - self.block) // self.stride + 1)

    def update(
        self,
        keys: Float[Tensor, "B L G P"],
        make: Callable[[Tensor], Tensor],
        lead: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B M G P"]:
        """Computes the newly completed blocks and returns those of the whole sequence.

        `make` maps keys [B, N, G, block, P] to [B, N, G, P]. Sequence b starts at column lead[b].
        Zeros follow the last block of a sequence that has fewer blocks than another.
        """
        before, self.tokens = self.tokens, keys.shape[1]
        if lead is None:
            done = self.made.length
            if done and done == self.count(self.tokens) and self.made.buffer is not None:
                return self.made.buffer[:, :done]
            return self.made.append(
                make(windows(keys[:, done * self.stride :], self.block, self.stride))
            )
        starts = lead.tolist()
        self.made.crop(max(0, self.made.length - self.count(before - min(starts))))
        spans = [
            range(self.count(before - start), self.count(self.tokens - start)) for start in starts
        ]
        fresh = [(row, block) for row, span in enumerate(spans) for block in span]
        if not fresh and self.made.length and self.made.buffer is not None:
            return self.made.buffer[:, : self.made.length]
        rows, blocks = (
            torch.tensor(fresh, device=keys.device, dtype=torch.long).view(-1, 2).unbind(1)
        )
        columns = (lead[rows] + blocks * self.stride)[:, None] + torch.arange(
            self.block, device=keys.device
        )
        made = make(keys[rows[:, None], columns].transpose(1, 2)[:, None])[:, 0].detach()
        more = max(span.stop for span in spans) - self.made.length
        held = self.made.append(made.new_zeros(len(starts), more, *made.shape[1:]))
        # The dtype may differ from that of the first call, if autocast was switched since.
        held[rows, blocks] = made.to(held.dtype)
        return held

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keeps the sequences `index`, in that order."""
        self.made.select(index)

    def crop(self, count: int) -> None:
        """Removes the last `count` tokens, and the blocks that become incomplete."""
        self.tokens = max(0, self.tokens - count)
        self.made.crop(max(0, self.made.length - self.count(self.tokens)))

    def reset(self) -> None:
        """Removes all tokens."""
        self.tokens = 0
        self.made.reset()


def windows(keys: Float[Tensor, "B L G P"], block: int, stride: int) -> Float[Tensor, "B M G l P"]:
    """Returns the complete blocks of sequences without documents or padding."""
    if keys.shape[1] < block:
        return keys.new_empty(keys.shape[0], 0, keys.shape[2], block, keys.shape[3])
    return keys.unfold(1, block, stride).transpose(-1, -2)


def visible(ctx: Context, run: slice) -> Bool[Tensor, "#B 1 T L"]:
    """Returns the mask of a slice of the queries without forming that of all queries."""
    if ctx.mask is not None:
        return ctx.mask[:, :, run]
    columns = torch.arange(ctx.key_positions.shape[1], device=ctx.key_positions.device)
    return (
        columns <= ctx.past + torch.arange(run.start, run.stop, device=columns.device)[:, None]
    )[None, None]


def full_attention(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    ctx: Context,
    scale: float,
) -> Float[Tensor, "B T H Q"]:
    """Attends to every visible key."""
    if ctx.mask is None and query.shape[1] == 1:
        return attend(query, key, value, scale)
    if ctx.mask is None and not ctx.past:
        return attend(query, key, value, scale, causal=True)
    parts = [
        attend(query[:, run], key, value, scale, visible(ctx, run)) for run in runs(query.shape[1])
    ]
    return torch.cat(parts, dim=1)


def best_blocks(
    scores: Float[Tensor, "B T J M"],
    own: Int[Tensor, "B T"],
    first: Int[Tensor, "B T"],
    chosen: int,
    forced: int = 1,
) -> Int[Tensor, "B T J K"]:
    """Selects the `chosen` blocks with the largest scores; -1 where there are fewer.

    Scores are compared in float32, and of equal ones the later block is taken. Only blocks first ..
    own can be selected, and `own` always is; with `forced` 3 the document's `first` and the one
    before `own` are, too. They are sorted by column, backwards: `own` first, -1 last.
    """
    block = torch.arange(scores.shape[-1], device=scores.device)
    own, first = own[:, :, None, None], first[:, :, None, None]
    always = block == own
    if forced == 3:
        always = always | (block == first) | (block == own - 1)
    scores = (
        scores.float()
        .masked_fill(always, torch.inf)
        .masked_fill((block < first) | (block > own), -torch.inf)
    )
    index = largest(scores, chosen)
    index = (
        index.masked_fill(scores.gather(-1, index) == -torch.inf, -1)
        .sort(-1, descending=True)
        .values
    )
    return F.pad(index, (0, chosen - index.shape[-1]), value=-1)


def attend_chosen(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    index: Int[Tensor, "B T J K"],
    ctx: Context,
    run: slice,
    segment: Int[Tensor, "B L"] | None,
    block: int,
    scale: float,
    lead: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B T H Q"]:
    """Attends from a slice of the queries to their selected blocks, in the cheapest way.

    `segment` is segments(ctx, block) if there are documents or padding, else None; `lead` is from
    `straight`.
    """
    if segment is None:
        has_kernel = selected_attention.choose(query, key, value) is not None
        few = query.shape[1] * index.shape[-1] * block < key.shape[1]
        if has_kernel or few or lead is not None:
            positions = ctx.positions[:, run]
            return selected_attention(query, key, value, index, positions, block, scale, lead)
    return masked_attention(query, key, value, index, ctx, run, segment, block, scale)


@kernel(
    numba="rorqual.kernels.select:selected_attention",
    triton="rorqual.kernels.triton_select:selected_attention",
)
def selected_attention(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    index: Int[Tensor, "B T J K"],
    positions: Int[Tensor, "B T"],
    block: int,
    scale: float,
    lead: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B T H Q"]:
    """Attends by reading only the keys of the selected blocks, in sequences of one document.

    Block j of a sequence starts at j * block, counted from column lead[b], or from the first. Query
    t sees key c of its sequence if c // block is in its index and c <= positions[t]; a query that
    sees nothing gets 0. The index must not contain a block twice.
    """
    groups, choices = key.shape[2], index.shape[2]
    # [B, T, J, K, block]
    columns = index[..., None] * block + torch.arange(block, device=key.device)
    seen = (index[..., None] >= 0) & (columns <= positions[:, :, None, None, None])
    if lead is not None:
        columns = columns + lead[:, None, None, None, None]
    columns, seen = columns.flatten(3).clamp(0, key.shape[1] - 1), seen.flatten(3)[:, :, :, None]
    row = torch.arange(len(key), device=key.device)[:, None, None, None]
    group = (torch.arange(choices, device=key.device) * groups // choices)[:, None]
    keys, values = key[row, columns, group], value[row, columns, group]
    logits = wide(query).unflatten(2, (choices, -1)) @ wide(keys).transpose(-1, -2) * scale
    weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) * seen
    return (weights.to(value.dtype) @ values).flatten(2, 3)


def masked_attention(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    index: Int[Tensor, "B T J K"],
    ctx: Context,
    run: slice,
    segment: Int[Tensor, "B L"] | None,
    block: int,
    scale: float,
) -> Float[Tensor, "B T H Q"]:
    """Computes attend_chosen with a mask over the keys.

    The mask is formed for the heads of one selection at a time.
    """
    choices, length = index.shape[2], key.shape[1] if segment is not None else ctx.past + run.stop
    count = most_blocks(segment) if segment is not None else -(-length // block)
    seen = visible(ctx, run)[..., :length]
    key, value, out = key[:, :length], value[:, :length], []
    for j in range(choices):
        own, heads = (
            index[:, :, j],
            slice(j * query.shape[2] // choices, (j + 1) * query.shape[2] // choices),
        )
        kept = own.new_zeros(*own.shape[:2], count + 1, dtype=torch.bool)
        kept = kept.scatter_(-1, own.where(own >= 0, count), True)[..., :count]  # [B, T, M]
        if segment is None:
            mask = kept.repeat_interleave(block, dim=-1)[..., :length]
        else:
            mask = kept.gather(-1, segment[:, None].expand(-1, own.shape[1], -1))
        group = slice(j * key.shape[2] // choices, j * key.shape[2] // choices + 1)
        out.append(
            attend(
                query[:, :, heads],
                key[:, :, group],
                value[:, :, group],
                scale,
                mask[:, None] & seen,
            )
        )
    return torch.cat(out, dim=2)


def wide(x: Tensor) -> Tensor:
    """Converts x to float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()
