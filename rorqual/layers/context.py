"""Holds the facts of a forward pass, besides the hidden states, that layers read.

`Attended` is what an attention returns of it.

    positions, document_ids, lengths position and document of each new token; valid ones a sequence
    past, starts                     tokens cached before the call
    key_..., mask                    the same for all keys, cached ones first; keys each query sees
    cos, sin                         rotary tables of the new tokens
    compressed_cos, compressed_sin   the same of blocks with compressed entries (layers/csa.py)
    ids, lookup_mask, rows           token ids, where Engram looks up, the block's table rows
    cache                            the block's cache between calls
    shared                           what earlier blocks leave for this one
    indexer_warmup, last_only        DSA's indexer warm-up; whether only the last position is needed

A context is built once per call, and layers take `(x, ctx)`. A fact that a new layer needs is a new
field here, not a parameter of every function on the way.

Every sequence begins at column 0 of the keys and has a length of its own. Padding follows its
tokens, where causal attention never sees it; there is no padding before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from rorqual.layers.cache import Past
from rorqual.layers.rope import rope_factor, rope_frequencies, rope_tables, rotate
from rorqual.model_config import RopeConfig

# Fields of Context that have a value for each new token, or are None.
PER_TOKEN = (
    "positions",
    "columns",
    "document_ids",
    "cos",
    "sin",
    "compressed_cos",
    "compressed_sin",
    "ids",
    "lookup_mask",
)


@dataclass(frozen=True, kw_only=True)
class Context:
    """Describes the T new tokens of each sequence of a call, its keys, and the block's cache.

    There are L = past + T columns of keys. New token t of sequence b is key past + t, or
    starts[b] + t where the sequences have different lengths. It sees the keys up to its own, of its
    document. `mask` says so where columns alone do not: it is None if all sequences have the same
    number of cached tokens and no documents.
    """

    positions: Int[Tensor, "B T"]  # within the document
    lengths: Int[Tensor, " B"] | None = None  # valid new tokens of each sequence; None: all T
    document_ids: Int[Tensor, "B T"] | None = None
    past: int = 0  # tokens cached before this call, in the longest sequence
    starts: Int[Tensor, " B"] | None = None  # the same for each sequence; None: all have `past`
    columns: Int[Tensor, "B T"]  # the column of each new token among the keys
    key_count: int  # L
    # Of all L keys, with documents only.
    key_positions: Int[Tensor, "B L"] | None = None
    key_document_ids: Int[Tensor, "B L"] | None = None
    mask: Bool[Tensor, "B 1 T L"] | None = None
    cos: Float[Tensor, "B T F"] | None = None
    sin: Float[Tensor, "B T F"] | None = None
    # The same of blocks with compressed entries, whose rotary base is another one.
    compressed_cos: Float[Tensor, "B T F"] | None = None
    compressed_sin: Float[Tensor, "B T F"] | None = None
    # What they are made of, for entries at other positions: radians a token, YaRN's factor.
    compressed_frequencies: Float[Tensor, " F"] | None = None
    compressed_factor: float = 1.0
    ids: Int[Tensor, "B T"] | None = None
    lookup_mask: Bool[Tensor, "B T"] | None = None  # False where Engram looks nothing up
    # Prefetched rows of the block's Engram table: `rows.wait()` is float [B, T, R, head_dim].
    rows: Any = None
    cache: Any = None  # the block's BlockCache
    # What the attention of an earlier block leaves for later ones: the columns that DSA selected,
    # or a csa2.Shared.
    shared: Any = None
    indexer_warmup: bool | None = None  # whether the indexers warm up; None: they are not trained
    # Attention returns only its last position; the other positions serve as its keys.
    last_only: bool = False

    def for_block(self, cache: Any, rows: Any = None, last_only: bool = False) -> "Context":
        """Returns this context with the cache and the table rows of one block."""
        return replace(self, cache=cache, rows=rows, last_only=last_only)

    @property
    def valid(self) -> Bool[Tensor, "B T"] | None:
        """Mask of the new tokens that is False at padding; None without padding."""
        if self.lengths is None:
            return None
        steps = torch.arange(self.positions.shape[1], device=self.lengths.device)
        return steps < self.lengths[:, None]

    def visible(self, run: slice = slice(None)) -> Bool[Tensor, "#B 1 T L"]:
        """Returns the keys that the new tokens `run` see: those of `mask`, or all up to them."""
        if self.mask is not None:
            return self.mask[:, :, run]
        # Where all sequences have the same length, one mask serves the batch.
        columns = self.columns[:, run] if self.starts is not None else self.columns[:1, run]
        keys = torch.arange(self.key_count, device=columns.device)
        return (keys <= columns[..., None])[:, None]

    def within(self, window: int, run: slice = slice(None)) -> Bool[Tensor, "#B 1 T L"]:
        """Returns the keys that are less than `window` tokens before the new tokens `run`."""
        columns = self.columns[:, run] if self.starts is not None else self.columns[:1, run]
        keys = torch.arange(self.key_count, device=columns.device)
        return (columns[..., None] - keys < window)[:, None]

    def spans(self) -> Int[Tensor, "B T 2"] | None:
        """Returns the first column of each new token's document, and the one after its last.

        None where every sequence is one document of all columns.
        """
        if self.starts is None and self.lengths is None and self.key_document_ids is None:
            return None
        time = self.positions.shape[1]
        counts = time if self.lengths is None else self.lengths
        ends = (self.past if self.starts is None else self.starts) + counts
        if not isinstance(ends, Tensor):
            ends = torch.full_like(self.columns[:, 0], ends)
        if self.key_document_ids is None:
            ends = ends[:, None].expand(-1, time)
            return torch.stack([torch.zeros_like(ends), ends], dim=-1)
        assert self.document_ids is not None
        first = self.columns - self.positions
        stored = torch.arange(self.key_count, device=ends.device) < ends[:, None]  # [B, L]
        same = self.document_ids[..., None] == self.key_document_ids[:, None]
        return torch.stack([first, first + (same & stored[:, None]).sum(-1)], dim=-1)

    def documents_before(self, count: int) -> Int[Tensor, "B W"] | None:
        """Returns the documents of the last `count` tokens before the new ones and of those.

        Before the start of a sequence it is -1. None without documents.
        """
        if self.key_document_ids is None:
            return None
        padded = F.pad(self.key_document_ids, (count, 0), value=-1)
        if self.starts is None:
            return padded[:, self.past :]
        time = self.positions.shape[1]
        return padded.gather(1, Span(self.past, self.starts).columns(count + time, padded.device))

    def rotate(self, x: Float[Tensor, "B T *H P"], interleaved: bool) -> Float[Tensor, "B T *H P"]:
        """Applies the rotary embedding of the new tokens to their queries or keys."""
        assert self.cos is not None and self.sin is not None, "a context without rope"
        return rotate(x, self.cos, self.sin, interleaved)

    def last_of(self, x: Shaped[Tensor, "B T ..."]) -> Shaped[Tensor, "B 1 ..."]:
        """Returns the values of each sequence's last valid new token (its first if it has none)."""
        if self.lengths is None:
            return x[:, -1:]
        last = (self.lengths[:, None] - 1).clamp_min(0)
        return x[torch.arange(len(x), device=x.device)[:, None], last]

    def last(self) -> "Context":
        """Returns the context of the last valid new token; those before it count as cached."""
        starts = self.starts
        mask = self.mask
        if self.lengths is not None:
            starts = (self.past if starts is None else starts) + (self.lengths - 1).clamp_min(0)
            mask = _causal(starts[:, None], self.key_count)[:, None] if mask is None else mask
        elif starts is not None:
            starts = starts + self.positions.shape[1] - 1
        if mask is not None and mask is self.mask:
            mask = self.last_of(mask.transpose(1, 2)).transpose(1, 2)
        per_token: dict[str, Any] = {
            name: value if value is None else self.last_of(value)
            for name in PER_TOKEN
            for value in (getattr(self, name),)
        }
        return replace(
            self,
            **per_token,
            lengths=None,
            starts=starts,
            mask=mask,
            past=self.key_count - 1,
            last_only=False,
        )


def _causal(columns: Int[Tensor, "#B T"], length: int) -> Bool[Tensor, "#B T L"]:
    """Returns which of `length` keys the queries at these columns see: those up to themselves."""
    return torch.arange(length, device=columns.device) <= columns[..., None]


def _count(document_ids: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Counts the tokens since the start of the document, from 0."""
    count = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return count - torch.where(begins, count, 0).cummax(1).values


class IndexerLoss(NamedTuple):
    """The indexer loss and recall of one attention call, or their mean over several."""

    loss: Float[Tensor, ""]  # nats a query
    # Share of the probability over every key that the selected keys carry, over queries with more
    # keys than they may select.
    recall: Float[Tensor, ""]
    # The loss of an indexer that gives the same score to every key that the loss is over.
    uniform: Float[Tensor, ""]


class Attended(NamedTuple):
    """What an attention returns."""

    out: Float[Tensor, "B T2 D"]  # of the new tokens, or of the last one of each sequence
    indexer_loss: IndexerLoss | None = None  # where an indexer is trained
    shared: Any = None  # what later blocks read: Context.shared


class Span(NamedTuple):
    """The columns of new tokens: behind `past` cached ones, or `starts` in each sequence."""

    past: int
    starts: Int[Tensor, " B"] | None
    lengths: Int[Tensor, " B"] | None = None

    def columns(self, time: int, device: torch.device | str) -> Int[Tensor, "#B T"]:
        """Returns the column of each of `time` new tokens."""
        steps = torch.arange(time, device=device)
        return self.past + steps[None] if self.starts is None else self.starts[:, None] + steps


def checked_lengths(
    lengths: Int[Tensor, " B"] | Sequence[int] | None, batch: int, time: int
) -> list[int] | None:
    """Returns the number of valid tokens in each sequence; None if there is no padding."""
    if lengths is None:
        return None
    counts = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if len(counts) != batch or not all(0 <= count <= time for count in counts):
        raise ValueError(
            f"lengths: got {counts}, expected {batch} numbers of tokens from 0 to {time}; "
            "padding follows the tokens of a sequence"
        )
    return None if min(counts) == time else counts


def context(
    batch: int,
    time: int,
    device: torch.device | str,
    *,
    document_ids: Int[Tensor, "B T"] | None = None,
    lengths: Int[Tensor, " B"] | Sequence[int] | None = None,
    past: Past | None = None,
    rope: tuple[RopeConfig, int] | None = None,
    compress_rope: RopeConfig | None = None,
    **more: Any,
) -> Context:
    """Builds the context of `time` new tokens in each sequence and appends them to `past`.

    `past` counts the tokens cached before. `lengths` is the number of valid tokens in each
    sequence, which padding follows; None if there is no padding. `rope` is the config and the
    rotary width of the model's attention; without it there are no cos and sin. `compress_rope` is
    the config of blocks with compressed entries, of the same width. `more` are other fields of
    Context. New tokens without `document_ids` continue the last document of their sequence.
    """
    counts = checked_lengths(lengths, batch, time)
    if past is None:
        span = Span(0, None)
        all_document_ids = document_ids
    else:
        past.take(batch)
        span = Span(past.length, past.starts(device))
        all_document_ids = _append_documents(past, document_ids, span, (batch, time))
        past.append([time] * batch if counts is None else counts)
    length = span.past + time
    columns = span.columns(time, device).expand(batch, -1)
    fields: dict[str, Any] = {"positions": columns, "columns": columns}
    if all_document_ids is not None:
        key_positions = _count(all_document_ids)
        itself = all_document_ids.gather(1, columns)
        fields |= {
            "positions": key_positions.gather(1, columns),
            "document_ids": itself,
            "key_positions": key_positions,
            "key_document_ids": all_document_ids,
            "mask": (_causal(columns, length) & (itself[..., None] == all_document_ids[:, None]))[
                :, None
            ],
        }
    elif span.starts is not None:
        fields["mask"] = _causal(columns, length)[:, None]
    if counts is not None:
        fields["lengths"] = torch.tensor(counts, device=device)
    if rope is not None:
        longest = None
        if rope[0].varies and counts is not None:
            # Padding does not count.
            padding = torch.arange(time, device=device) >= fields["lengths"][:, None]
            longest = fields["positions"].masked_fill(padding, 0).max() + 1
        fields["cos"], fields["sin"] = rope_tables(*rope, fields["positions"], longest)
        if compress_rope is not None:
            tables = rope_tables(compress_rope, rope[1], fields["positions"])
            fields["compressed_cos"], fields["compressed_sin"] = tables
            frequencies = rope_frequencies(compress_rope, rope[1]).to(device)
            fields["compressed_frequencies"] = frequencies
            fields["compressed_factor"] = rope_factor(compress_rope)
    return Context(past=span.past, starts=span.starts, key_count=length, **fields, **more)


def _append_documents(
    past: Past, document_ids: Int[Tensor, "B T"] | None, span: Span, shape: tuple[int, int]
) -> Int[Tensor, "B L"] | None:
    """Stores the documents of the new tokens; returns those of all, or None if none was ever given.

    New tokens without documents continue the last one of their sequence.
    """
    if document_ids is None:
        if not past.named:
            return None
        stored = past.document_ids.stored
        assert stored is not None
        last = torch.tensor([[max(0, length - 1)] for length in past.lengths], device=stored.device)
        document_ids = stored.gather(1, last).expand(shape)
    return past.document_ids.append(document_ids, span)
