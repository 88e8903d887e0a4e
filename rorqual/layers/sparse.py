"""Attends to selected keys: the part that MoBA, NSA and their tiles share.

    keys = Selection(blocks, ...)                     which blocks of keys each query attends to
    out  = attend_selected(query, key, value, keys, ctx, scale)

    out[t] = softmax(scale q_t . k) v over the keys up to t of the blocks that are selected for t

The papers differ in how they score a block. A selection is index[b, t, j] of K blocks, -1 where
fewer are selected, one for each KV group (j of G) or each head (j of H). The same sum is computed
in three ways:

    masked     a boolean mask for scaled_dot_product_attention, with documents and gradients
    gathered   only the selected keys, for each token: decoding; kernels/select.py compiles it
    tiles      one selection for many queries, whose keys are gathered once (layers/tiles.py)
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rorqual.kernels import kernel
from rorqual.layers.attend import attend
from rorqual.layers.cache import Appended, Lengths, Recent
from rorqual.layers.context import Context
from rorqual.layers.norm import as_float32
from rorqual.layers.tiles import TILE, flex_tiles, loop_tiles
from rorqual.layers.top_k import largest

QUERIES = 512  # processed at a time, so that no mask is T x T
SMALL_BATCH = 16  # up to so many new tokens after a cache read their selected keys in place


class Selection(NamedTuple):
    """The blocks of keys that each query attends to."""

    blocks: Int[Tensor, "B T J K"]  # -1 where there are fewer
    block: int  # keys a block
    # The block of each key where documents are packed; None: column // block.
    segment: Int[Tensor, "B L"] | None = None
    # Whether `blocks` has one entry for each tile of the call, and not for each query.
    tiles: bool = False


def runs(time: int) -> Iterator[slice]:
    """Splits the queries of a call into slices of QUERIES."""
    return (slice(start, min(start + QUERIES, time)) for start in range(0, time, QUERIES))


def segments(ctx: Context, block: int) -> Int[Tensor, "B L"] | None:
    """Returns the block of its sequence that each key is in; None where its column determines it.

    Blocks are numbered through the documents of a sequence in order. With o = own_blocks(...)[t],
    block m belongs to the document of query t when o - positions[t] // block <= m <= o.
    """
    if ctx.key_positions is None:
        return None
    return (ctx.key_positions % block == 0).cumsum(1) - 1


def own_blocks(ctx: Context, segment: Int[Tensor, "B L"] | None, block: int) -> Int[Tensor, "B T"]:
    """Returns the block that each new token is in, counted through its sequence's documents."""
    if segment is None:
        return ctx.positions // block
    return segment.gather(1, ctx.columns)


def most_blocks(segment: Int[Tensor, "B L"]) -> int:
    """Returns the largest number of blocks of any sequence.

    While a compiler traces, values are not known, and the number of keys is returned.
    """
    return segment.shape[1] if torch.compiler.is_compiling() else int(segment.max()) + 1


class Blocks:
    """Caches one value per complete block of a growing sequence of keys.

    No block is read twice. Block i of a sequence is its keys i stride .. i stride + block - 1.
    """

    def __init__(self, block: int, stride: int, capacity: int = 0):
        self.block = block
        self.stride = stride
        self.values = Appended(capacity // stride)

    def count(self, tokens: int) -> int:
        """Returns the number of complete blocks in `tokens` tokens."""
        return max(0, (tokens - self.block) // self.stride + 1)

    def update(
        self, keys: Float[Tensor, "B L G P"], make: Callable[[Tensor], Tensor], ctx: Context
    ) -> Float[Tensor, "B M G P"]:
        """Computes the blocks that the new tokens complete and returns those of all tokens.

        `make` maps keys [B, N, G, block, P] to [B, N, G, P]. What follows the last complete block
        of a shorter sequence means nothing.
        """
        total = self.count(ctx.key_count)
        stored = self.values.stored
        # An emptied cache may have had a batch of another size.
        if stored is not None and len(stored) != len(keys):
            stored = None
        if ctx.starts is None:
            done = self.count(ctx.past)
            if done == total and stored is not None:
                return stored[:, :total]
            new = make(windows(keys[:, done * self.stride :], self.block, self.stride)).detach()
            buffer = self.values.reserve(new, total)
            buffer[:, done:total] = new
            return buffer[:, :total]
        numbers, real = self.missing(ctx)
        assert real is not None
        sequences, steps = real.nonzero(as_tuple=True)
        if stored is not None and not len(sequences):
            return self.values.reserve(stored, total)[:, :total]
        blocks = numbers[sequences, steps]
        columns = blocks[:, None] * self.stride + torch.arange(self.block, device=keys.device)
        new = make(keys[sequences[:, None], columns].transpose(1, 2)[:, None])[:, 0].detach()
        buffer = self.values.reserve(new.new_empty(len(keys), 0, *new.shape[1:]), total)
        # The dtype may differ from that of the first call, if autocast was switched since.
        buffer[sequences, blocks] = new.to(buffer.dtype)
        return buffer[:, :total]

    def missing(self, ctx: Context) -> tuple[Int[Tensor, "#B N"], Bool[Tensor, "B N"] | None]:
        """Returns the blocks that the new tokens complete, and which are real (None: all are).

        Where sequences have different lengths some complete fewer than others.
        """
        device = ctx.positions.device
        if ctx.starts is None and ctx.lengths is None:
            first = self.count(ctx.past)
            stop = self.count(ctx.key_count)
            return torch.arange(first, stop, device=device)[None], None
        time = ctx.positions.shape[1]
        starts = ctx.columns[:, 0]
        ends = starts + (time if ctx.lengths is None else ctx.lengths)
        begun, done = (
            ((tokens - self.block) // self.stride + 1).clamp_min(0) for tokens in (starts, ends)
        )
        numbers = begun[:, None] + torch.arange(time // self.stride + 1, device=device)
        return numbers, numbers < done[:, None]

    def put(
        self,
        new: Float[Tensor, "B N ..."],
        numbers: Int[Tensor, "#B N"],
        real: Bool[Tensor, "B N"] | None,
        ctx: Context,
    ) -> Float[Tensor, "B M ..."]:
        """Stores the values of the blocks that are `missing` and returns those of all blocks.

        What follows the last complete block of a shorter sequence means nothing.
        """
        total = self.count(ctx.key_count)
        new = new.detach()
        buffer = self.values.reserve(new[:, :0], total)
        if real is None:
            buffer[:, total - new.shape[1] : total] = new
        else:
            sequences, steps = real.nonzero(as_tuple=True)
            # The dtype may differ from that of the first call, if autocast was switched since.
            buffer[sequences, numbers[sequences, steps]] = new[sequences, steps].to(buffer.dtype)
        return buffer[:, :total]

    def select(self, index: Int[Tensor, " B"], length: int) -> None:
        """Keeps the sequences `index`, in that order."""
        self.values.select(index, self.count(length))

    def clear(self) -> None:
        """Removes all blocks and frees their memory."""
        self.values.clear()

    def join(self, other: "Blocks", lengths: Lengths) -> None:
        """Appends the sequences of another batch."""
        ours, theirs = ([self.count(length) for length in of] for of in lengths)
        self.values.join(other.values, (ours, theirs))

    def load(self, other: "Blocks", length: int) -> None:
        """Becomes a copy of the blocks of the first `length` tokens."""
        self.values.load(other.values, self.count(length))


def windows(keys: Float[Tensor, "B L G P"], block: int, stride: int) -> Float[Tensor, "B M G l P"]:
    """Returns the complete blocks of sequences without documents."""
    if keys.shape[1] < block:
        return keys.new_empty(keys.shape[0], 0, keys.shape[2], block, keys.shape[3])
    return keys.unfold(1, block, stride).transpose(-1, -2)


def full_attention(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    ctx: Context,
    scale: float,
) -> Float[Tensor, "B T H Q"]:
    """Attends to every visible key, a slice of queries at a time where that needs a mask."""
    if ctx.mask is None and query.shape[1] == 1:
        return attend(query, key, value, scale)
    if ctx.mask is None and not ctx.past:
        return attend(query, key, value, scale, causal=True)
    parts = [
        attend(query[:, run], key, value, scale, ctx.visible(run)) for run in runs(query.shape[1])
    ]
    return torch.cat(parts, dim=1)


def best_blocks(
    scores: Float[Tensor, "B T J M"],
    own_block: Int[Tensor, "B T"],
    first: Int[Tensor, "B T"],
    top_k: int,
    forced: int = 1,
) -> Int[Tensor, "B T J K"]:
    """Selects the `top_k` blocks with the largest scores; -1 where there are fewer.

    Scores are compared in float32, and of equal ones the later block is taken. Only blocks from
    `first` to `own_block` can be selected, and `own_block` always is; with `forced` 3 the first of
    the document and the one before `own_block` are, too. They are sorted by column, backwards:
    `own_block` first, -1 last.
    """
    block = torch.arange(scores.shape[-1], device=scores.device)
    own_block = own_block[:, :, None, None]
    first = first[:, :, None, None]
    always = block == own_block
    if forced == 3:
        always = always | (block == first) | (block == own_block - 1)
    scores = (
        scores.float()
        .masked_fill(always, torch.inf)
        .masked_fill((block < first) | (block > own_block), -torch.inf)
    )
    index = largest(scores, top_k)
    index = (
        index.masked_fill(scores.gather(-1, index) == -torch.inf, -1)
        .sort(-1, descending=True)
        .values
    )
    return F.pad(index, (0, top_k - index.shape[-1]), value=-1)


def tile_queries(ctx: Context) -> Int[Tensor, " N"]:
    """Returns the new tokens whose selection `by_tiles` needs: the first one of every tile.

    If sequences of a batch have tiles at different columns, it is every new token, or none where no
    tile starts.
    """
    time = ctx.positions.shape[1]
    device = ctx.positions.device
    if _aligned(ctx):
        first = min(-ctx.past % TILE, time)
        return torch.arange(first, time, TILE, device=device)
    count = 0 if ctx.past and not (ctx.positions % TILE == 0).any() else time
    return torch.arange(count, device=device)


def _aligned(ctx: Context) -> bool:
    """Returns whether a tile starts at the same column in all sequences."""
    return ctx.key_document_ids is None and ctx.starts is None


def by_tiles(
    index: Int[Tensor, "B N J K"],
    ctx: Context,
    segment: Int[Tensor, "B L"] | None,
    block: int,
    cache: Recent | None,
) -> Selection:
    """Returns the selection of a call in which the first query of a tile selects for all of it.

    `index` holds the blocks that `tile_queries` select, own first. `cache` keeps the selection of
    an incomplete tile for the next call.
    """
    time = ctx.positions.shape[1]
    stored = None if cache is None else cache.before(ctx, index)
    steps = torch.arange(time, device=index.device)
    if _aligned(ctx):
        tiles = (
            index if stored is None or ctx.past % TILE == 0 else torch.cat([stored, index], dim=1)
        )
        columns = ctx.past + steps
        each = tiles.index_select(1, columns // TILE - ctx.past // TILE)
    else:
        first = steps.where(ctx.positions % TILE == 0, -1).cummax(1).values[:, :, None, None]
        shape = (len(index), time, *index.shape[2:])
        each = stored.expand(shape) if stored is not None else index
        if index.shape[1]:
            each = index.gather(1, first.clamp_min(0).expand(shape)).where(first >= 0, each)
    if cache is not None:
        cache.store(each, ctx)
    if _aligned(ctx) and time >= TILE:
        return Selection(tiles, block, tiles=True)
    begun = _begun(ctx.positions, own_blocks(ctx, segment, block), block, each.shape[2])
    return Selection(torch.cat([each, begun], dim=-1), block, segment)


def _begun(
    positions: Tensor, own_block: Tensor, block: int, choices: int
) -> Int[Tensor, "B T J E"]:
    """Returns the blocks that a token's tile has begun since its first query.

    It is -1 where the tile has begun fewer than a whole tile spans.
    """
    aligned = block % TILE == 0 or TILE % block == 0
    back = torch.arange(
        (TILE - 1) // block if aligned else -(-(TILE - 1) // block), device=own_block.device
    )
    begun = positions // block - positions // TILE * TILE // block
    blocks = (own_block[..., None] - back).where(back < begun[..., None], -1)
    return blocks[:, :, None].expand(-1, -1, choices, -1)


def attend_selected(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    keys: Selection,
    ctx: Context,
    scale: float,
) -> Float[Tensor, "B T H Q"]:
    """Attends from each query to its selected blocks, in the cheapest way."""
    if keys.tiles:
        # FlexAttention has a backward and fuses on a GPU only; on a CPU the loop is faster.
        if query.is_cuda and ctx.past == 0:
            return flex_tiles(query, key, value, keys.blocks, keys.block, scale)
        return loop_tiles(query, key, value, keys.blocks, ctx.past, keys.block, scale)
    parts = []
    for run in runs(query.shape[1]):
        index = keys.blocks[:, run]
        queries = query[:, run]
        if keys.segment is None:
            gather = queries.shape[1] * index.shape[-1] * keys.block < key.shape[1]
            if gather or selected_attention.choose(queries, key, value) is not None:
                arguments = queries, key, value, index, ctx.positions[:, run]
                parts.append(selected_attention(*arguments, keys.block, scale))
                continue
        parts.append(masked_attention(queries, key, value, index, keys, ctx, run, scale))
    return torch.cat(parts, dim=1)


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
) -> Float[Tensor, "B T H Q"]:
    """Attends by reading only the keys of the selected blocks, in sequences of one document.

    Query t sees key c of its sequence if c // block is in its index and c <= positions[t]; a query
    that sees nothing gets 0. The index must not contain a block twice.
    """
    groups = key.shape[2]
    choices = index.shape[2]
    # [B, T, J, K, block]
    columns = index[..., None] * block + torch.arange(block, device=key.device)
    seen = (index[..., None] >= 0) & (columns <= positions[:, :, None, None, None])
    columns = columns.flatten(3).clamp(0, key.shape[1] - 1)
    seen = seen.flatten(3)[:, :, :, None]
    sequence = torch.arange(len(key), device=key.device)[:, None, None, None]
    group = (torch.arange(choices, device=key.device) * groups // choices)[:, None]
    keys = key[sequence, columns, group]
    values = value[sequence, columns, group]
    logits = (
        as_float32(query).unflatten(2, (choices, -1)) @ as_float32(keys).transpose(-1, -2) * scale
    )
    weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) * seen
    return (weights.to(value.dtype) @ values).flatten(2, 3)


def masked_attention(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    index: Int[Tensor, "B T J K"],
    keys: Selection,
    ctx: Context,
    run: slice,
    scale: float,
) -> Float[Tensor, "B T H Q"]:
    """Attends from the queries `run` with a mask over the keys.

    The mask is formed for the heads of one selection at a time.
    """
    segment = keys.segment
    choices = index.shape[2]
    # Without documents and with one length for all, no query of the run sees later keys.
    length = ctx.past + run.stop if ctx.mask is None else key.shape[1]
    count = most_blocks(segment) if segment is not None else -(-length // keys.block)
    seen = ctx.visible(run)[..., :length]
    key = key[:, :length]
    value = value[:, :length]
    out = []
    for j in range(choices):
        blocks = index[:, :, j]
        heads = slice(j * query.shape[2] // choices, (j + 1) * query.shape[2] // choices)
        selected = blocks.new_zeros(*blocks.shape[:2], count + 1, dtype=torch.bool)
        selected = selected.scatter_(-1, blocks.where(blocks >= 0, count), True)[
            ..., :count
        ]  # [B, T, M]
        if segment is None:
            mask = selected.repeat_interleave(keys.block, dim=-1)[..., :length]
        else:
            mask = selected.gather(-1, segment[:, None].expand(-1, blocks.shape[1], -1))
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
