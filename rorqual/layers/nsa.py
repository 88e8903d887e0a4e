"""Queries, keys, values and hidden states in -> values attended at three resolutions out.

    out      = g_cmp Attn(q, K_cmp, V_cmp) + g_slc Attn(q, K_slc, V_slc) + g_win Attn(q, K_win, V_win)
    g        = sigmoid(MLP(hidden))                          one a head and branch
    K_cmp,i  = mean(k) + MLP(vec(k + position)),  k = keys i d .. i d + l - 1 of the document; V_cmp likewise;
               query t sees block i when i d + l - 1 <= t, and gets 0 where it sees none
    p_slc    = sum over the heads of a group of p_cmp W       W[i, j]: stride-d pieces of block i in selection block j
    K_slc    = keys of the `chosen` selection blocks of l' keys with the largest p_slc, up to t; forced among them: the
               document's first, the query's own and the one before
    K_win    = the last `window` keys

Each branch has keys and values of its own: GQA's are the selected branch's, the other two are projected here. All keys
are rotated before anything else. The choice carries no gradient. Blocks are counted from the start of each document,
padding left out, so that a packed or padded document attends exactly as it would alone.

Native Sparse Attention, arXiv:2502.11089. The mean beside the MLP is ours: the start is mean pooling.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rorqual.layers.basics import Layout, RopeConfig, largest, rope_tables, rotate
from rorqual.layers.cache import Appended, Bundle

QUERIES = 512  # attended at a time, so that no mask is T x T


@dataclass(frozen=True, kw_only=True, slots=True)
class NSAConfig:
    """Sizes in keys; the paper's are the defaults."""

    block: int = 32  # l, keys a compressed key stands for
    stride: int = 16  # d, between compressed keys; divides the other two
    select_block: int = 64  # l'
    chosen: int = 16  # selection blocks, the three forced ones among them
    window: int = 512

    def __post_init__(self) -> None:
        for name in ("block", "stride", "select_block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"nsa.{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("block", "select_block"):
            if getattr(self, name) % self.stride:
                raise ValueError(
                    f"nsa.{name}: got {getattr(self, name)}, expected a multiple of the stride, {self.stride}"
                )
        if self.chosen < 3:
            raise ValueError(f"nsa.chosen: got {self.chosen}, expected at least 3, the blocks that are forced")


@runtime_checkable
class Heads(Protocol):
    """What must be known of the attention around; GQAConfig is one."""

    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def value_dim(self) -> int | None: ...


class Compressed(NamedTuple):
    """The compressed blocks of each row: what they are, where each ends, which selection blocks its pieces lie in."""

    keys: Float[Tensor, "B M G P"]
    values: Float[Tensor, "B M G Q"]
    ends: Int[Tensor, "B M"]  # column of the last key
    pieces: Int[Tensor, "B M U"]  # selection block of each stride-d piece
    real: Bool[Tensor, "B M"] | None  # None: all; rows of a batch may hold fewer than M


class Branches(NamedTuple):
    """What each branch attended to, before the gates."""

    compressed: Float[Tensor, "B T H Q"]
    selected: Float[Tensor, "B T H Q"]
    window: Float[Tensor, "B T H Q"]


class Compression(nn.Module):
    """block keys (or values) -> one: mean(x) + W_2 silu(W_1 vec(x + position)), the same for every group."""

    def __init__(self, block: int, dim: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(block, dim))
        self.up = nn.Linear(block * dim, dim, bias=False)
        self.down = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "B M G l P"]) -> Float[Tensor, "B M G P"]:
        return x.mean(-2) + self.down(F.silu(self.up((x + self.position).flatten(-2))))


class CompressedBlocks:
    """Compressed keys and values of a growing sequence without documents or padding; each block is compressed once."""

    def __init__(self, block: int, stride: int):
        self.block, self.stride, self.tokens = block, stride, 0
        self.keys, self.values = Appended(), Appended()

    def count(self, tokens: int) -> int:
        """Blocks that are complete in so many tokens."""
        return max(0, (tokens - self.block) // self.stride + 1)

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keep the rows `index`, in that order."""
        self.keys.select(index)
        self.values.select(index)

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens, and the blocks that they leave incomplete."""
        self.tokens = max(0, self.tokens - count)
        for kept in (self.keys, self.values):
            kept.crop(max(0, kept.length - self.count(self.tokens)))

    def reset(self) -> None:
        """Forget everything."""
        self.tokens = 0
        self.keys.reset()
        self.values.reset()


class NSA(nn.Module):
    """Inner attention for GQA, with keys and values of its own for the compressed and the window branch."""

    def __init__(self, config: NSAConfig, dim: int, gqa: Heads, rope: RopeConfig):
        """`rope` is the attention's, for the keys made here are rotated here."""
        super().__init__()
        self.config, self.rope = config, rope
        self.groups, self.key_dim, self.value_dim = gqa.kv_heads, gqa.head_dim, gqa.value_dim or gqa.head_dim
        width = gqa.kv_heads * (self.key_dim + self.value_dim)
        self.compressed_kv = nn.Linear(dim, width, bias=False)
        self.window_kv = nn.Linear(dim, width, bias=False)
        self.compress_key = Compression(config.block, self.key_dim)
        self.compress_value = Compression(config.block, self.value_dim)
        self.gate_up = nn.Linear(dim, 3 * gqa.heads, bias=False)
        self.gate_down = nn.Linear(3 * gqa.heads, 3 * gqa.heads)

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Bundle:
        """Keys and values of both branches made here, and the compressed blocks."""
        compressed, window = (Bundle(keys=Appended(capacity), values=Appended(capacity)) for _ in range(2))
        blocks = CompressedBlocks(self.config.block, self.config.stride)
        return Bundle(blocks=blocks, compressed=compressed, window=window)

    def forward(
        self,
        query: Float[Tensor, "B T H P"],
        key: Float[Tensor, "B L G P"],
        value: Float[Tensor, "B L G Q"],
        *,
        hidden: Float[Tensor, "B T D"],
        layout: Layout,
        scale: float,
        cache: Bundle | None = None,
    ) -> Float[Tensor, "B T H Q"]:
        """Attended values of the last T of L tokens; rotary positions are in query and key already."""
        gates = self.gates(hidden).to(query.dtype)[..., None]  # [B, T, 3, H, 1]
        branches = self.branches(query, key, value, hidden=hidden, layout=layout, scale=scale, cache=cache)
        return (gates * torch.stack(branches, dim=2)).sum(2)

    def gates(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T 3 H"]:
        """How much of the compressed, the selected and the window branch each head takes, each in (0, 1)."""
        return torch.sigmoid(self.gate_down(F.silu(self.gate_up(hidden)))).unflatten(-1, (3, -1))

    def branches(
        self,
        query: Float[Tensor, "B T H P"],
        key: Float[Tensor, "B L G P"],
        value: Float[Tensor, "B L G Q"],
        *,
        hidden: Float[Tensor, "B T D"],
        layout: Layout,
        scale: float,
        cache: Bundle | None = None,
    ) -> Branches:
        """The three branches apart, for tests and pictures."""
        kept = (cache.compressed, cache.window) if cache is not None else (None, None)
        raw = self._own(self.compressed_kv, hidden, layout, kept[0])
        near_keys, near_values = self._own(self.window_kv, hidden, layout, kept[1])
        segment = _segments(layout, self.config.select_block)
        blocks = self._compress(*raw, layout, segment, cache.blocks if cache is not None else None)
        runs = []
        for start in range(0, query.shape[1], QUERIES):
            run = slice(start, min(start + QUERIES, query.shape[1]))
            visible = _visible(layout, run)
            compressed, importance = self._attend_compressed(query[:, run], blocks, visible, segment, scale)
            index, real = self._choose(importance, segment[:, layout.past :][:, run], layout.positions[:, run])
            selected = self._attend_selected(query[:, run], key, value, index, real, segment, visible, layout, scale)
            near = self._attend_window(query[:, run], near_keys, near_values, visible, layout, run, scale)
            runs.append((compressed, selected, near))
        return Branches(*(torch.cat(parts, dim=1) for parts in zip(*runs, strict=True)))

    def _own(
        self, linear: nn.Module, hidden: Tensor, layout: Layout, cache: Bundle | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys [B, L, G, P] and values [B, L, G, Q] of a branch."""
        both = linear(hidden).unflatten(-1, (self.groups, -1))
        key, value = both.split([self.key_dim, self.value_dim], dim=-1)
        cos, sin = rope_tables(self.rope, self.key_dim, layout.positions)
        key = rotate(key, cos, sin, self.rope.interleaved)
        if cache is None:
            return key, value
        kept = cache.keys.append(key), cache.values.append(value)
        return kept if layout.past else (key, value)

    def _compress(
        self, keys: Tensor, values: Tensor, layout: Layout, segment: Tensor, cache: CompressedBlocks | None
    ) -> Compressed:
        block, stride = self.config.block, self.config.stride
        if layout.mask is not None:
            columns, real = _block_columns(layout, block, stride)
            rows = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
            pieces = segment.gather(1, columns[..., ::stride].flatten(1)).unflatten(1, (-1, block // stride))
            keys, values = (x[rows, columns].transpose(2, 3) for x in (keys, values))  # [B, M, G, l, P]
            return Compressed(self.compress_key(keys), self.compress_value(values), columns[..., -1], pieces, real)
        length, done = keys.shape[1], cache.keys.length if cache is not None else 0
        total = max(0, (length - block) // stride + 1)
        starts = torch.arange(total, device=keys.device) * stride
        columns = (starts[:, None] + torch.arange(block, device=keys.device)).expand(keys.shape[0], -1, -1)
        keys, values = (x[:, columns[0, done:]].transpose(2, 3) for x in (keys, values))
        keys, values = self.compress_key(keys), self.compress_value(values)
        if cache is not None:
            cache.tokens = length
            kept = cache.keys.append(keys), cache.values.append(values)
            keys, values = kept if layout.past else (keys, values)
        return Compressed(keys, values, columns[..., -1], columns[..., ::stride] // self.config.select_block, None)

    def _attend_compressed(
        self, query: Tensor, blocks: Compressed, visible: Tensor, segment: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The branch's values [B, T, H, Q] and the importance p_slc [B, G, T, J] of every selection block."""
        seen = visible.expand(len(query), -1, -1, -1).gather(
            -1, blocks.ends[:, None, None].expand(-1, -1, query.shape[1], -1)
        )[:, :, None]  # [B, 1, 1, T, M]
        if blocks.real is not None:
            seen = seen & blocks.real[:, None, None, None]
        grouped = query.unflatten(2, (self.groups, -1))
        logits = torch.einsum("btghp,bmgp->bghtm", grouped.float(), blocks.keys.float()) * scale
        weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) * seen
        attended = torch.einsum("bghtm,bmgq->btghq", weights.to(query.dtype), blocks.values.to(query.dtype))
        count = int(segment[:, -1].max()) + 1
        share = F.one_hot(blocks.pieces, count).sum(2).to(weights.dtype)  # W, [B, M, J]
        return attended.flatten(2, 3), weights.detach().sum(2) @ share[:, None]

    def _choose(self, importance: Tensor, own: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen selection blocks [B, G, T, K] and which of them are real."""
        own = own[:, None, :, None]
        first = own - (positions // self.config.select_block)[:, None, :, None]
        block = torch.arange(importance.shape[-1], device=importance.device)
        forced = (block == first) | (block == own) | (block == own - 1)
        scores = importance.masked_fill(forced, torch.inf)
        scores = scores.masked_fill((block < first) | (block > own), -torch.inf)
        index = largest(scores, self.config.chosen)
        return index, scores.gather(-1, index) > -torch.inf

    def _attend_selected(
        self, query, key, value, index: Tensor, real: Tensor, segment: Tensor, visible: Tensor, layout: Layout, scale
    ) -> Tensor:
        block, length = self.config.select_block, key.shape[1]
        if layout.past and layout.mask is None and query.shape[1] * index.shape[-1] * block < length:
            return self._gathered(query, key, value, index, real, layout, scale)
        kept = real.new_zeros(*real.shape[:3], int(segment[:, -1].max()) + 1).scatter_(-1, index, real)
        where = segment[:, None, None].expand(-1, kept.shape[1], kept.shape[2], -1)
        mask = kept.gather(-1, where) & visible  # [B, G, T, L]
        return _attend(query, key, value, mask.repeat_interleave(query.shape[2] // self.groups, dim=1), scale)

    def _gathered(self, query, key, value, index: Tensor, real: Tensor, layout: Layout, scale: float) -> Tensor:
        """Reads the keys of the chosen blocks alone, for rows without documents or padding: block j starts at l' j."""
        block = self.config.select_block
        columns = index[..., None] * block + torch.arange(block, device=key.device)  # [B, G, T, K, l']
        seen = (real[..., None] & (columns <= layout.positions[:, None, :, None, None])).flatten(3)
        columns = columns.flatten(3).clamp_max(key.shape[1] - 1)
        row = torch.arange(len(key), device=key.device)[:, None, None, None]
        group = torch.arange(self.groups, device=key.device)[:, None, None]
        grouped = query.unflatten(2, (self.groups, -1))
        logits = torch.einsum("btghp,bgtkp->bghtk", grouped, key[row, columns, group]).float() * scale
        weights = logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1).to(value.dtype)
        return torch.einsum("bghtk,bgtkq->btghq", weights, value[row, columns, group]).flatten(2, 3)

    def _attend_window(self, query, key, value, visible: Tensor, layout: Layout, run: slice, scale: float) -> Tensor:
        near = layout.positions[:, run, None] - layout.key_positions[:, None] < self.config.window
        mask = near[:, None] & visible
        if layout.mask is None:  # nothing before the window, nothing after the last query
            span = slice(max(0, layout.past + run.start - self.config.window + 1), layout.past + run.stop)
            key, value, mask = key[:, span], value[:, span], mask[..., span]
        return _attend(query, key, value, mask, scale)


def _segments(layout: Layout, block: int) -> Int[Tensor, "B L"]:
    """Which selection block of its row each key is in; padding with its predecessor."""
    starts = layout.key_positions % block == 0
    if layout.key_present is not None:
        starts = starts & layout.key_present
    return (starts.cumsum(1) - 1).clamp_min(0)


def _block_columns(layout: Layout, block: int, stride: int) -> tuple[Int[Tensor, "B M l"], Bool[Tensor, "B M"]]:
    """The columns of each compressed block's keys, and which blocks are real, where there are documents or padding.

    A block ends at each key whose position is l - 1, l - 1 + d, ...; its keys are the l present ones up to there.
    """
    places, length = layout.key_positions, layout.key_positions.shape[1]
    present = layout.key_present if layout.key_present is not None else torch.ones_like(places, dtype=torch.bool)
    order = (~present).long().argsort(dim=1, stable=True)  # present columns first
    ends = present & (places >= block - 1) & ((places - block + 1) % stride == 0)
    ends = ends.gather(1, order)
    most = int(ends.sum(1).max())
    ranks = (~ends).long().argsort(dim=1, stable=True)[:, :most]  # [B, M]
    span = torch.arange(1 - block, 1, device=places.device)
    columns = (ranks[..., None] + span).clamp(0, length - 1).flatten(1)
    return order.gather(1, columns).unflatten(1, (most, block)), ends.gather(1, ranks)


def _visible(layout: Layout, run: slice) -> Bool[Tensor, "B 1 T L"]:
    """Which keys a run of the queries may see, without forming the mask of all queries."""
    if layout.mask is not None:
        return layout.mask[:, :, run]
    columns = torch.arange(layout.key_positions.shape[1], device=layout.key_positions.device)
    return (columns <= layout.past + torch.arange(run.start, run.stop, device=columns.device)[:, None])[None, None]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale q . k) v over the keys where the mask [B, 1 or H, T, L] is True."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
