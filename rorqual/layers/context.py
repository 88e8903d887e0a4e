"""Holds the facts of a forward pass, besides the hidden states, that layers read.

    positions, documents, present    position, document and validity of each new token
    key_..., mask                    the same for all keys, cached ones first; keys each query sees
    cos, sin                         rotary tables of the new tokens
    ids, live, rows                  token ids, where Engram looks rows up, the block's table rows
    cache                            the block's cache between calls
    warm, last_only                  DSA's indexer warm-up; whether only the last position is needed

A context is built once per call, and layers take `(x, ctx)`. A fact that a new layer needs is a new
field here, not a parameter of every function on the way.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rorqual.layers.basics import rope_tables, rotate
from rorqual.layers.cache import Past
from rorqual.model_config import RopeConfig


@dataclass(frozen=True, kw_only=True)
class Context:
    """Describes the T new tokens of a call, the L = past + T keys, and the block's cache.

    If `documents` is None, each sequence is one document. If `present` is None, no token is
    padding. If `mask` is None, query t sees the cached keys and the new ones up to t. The `key_`
    fields are the same for all L keys.
    """

    positions: Int[Tensor, "B T"]  # within the document, padding not counted
    documents: Int[Tensor, "B T"] | None = None
    present: Bool[Tensor, "B T"] | None = None
    mask: Bool[Tensor, "B 1 T L"] | None = None
    key_positions: Int[Tensor, "B L"]
    key_documents: Int[Tensor, "B L"] | None = None
    key_present: Bool[Tensor, "B L"] | None = None
    past: int = 0  # tokens cached before this call
    # With a cache: the left padding of each sequence, if there is no padding elsewhere.
    lead: Int[Tensor, " B"] | None = None
    cos: Float[Tensor, "B T F"] | None = None
    sin: Float[Tensor, "B T F"] | None = None
    ids: Int[Tensor, "B T"] | None = None
    live: Bool[Tensor, "B T"] | None = None  # False where Engram looks nothing up
    # Prefetched rows of the block's Engram table: `rows.wait()` is float [B, T, R, head_dim].
    rows: Any = None
    cache: Any = None  # the block's BlockCache
    warm: bool | None = None  # whether the indexers warm up; None: they are not trained
    # Attention returns only its last position; the other positions serve as its keys.
    last_only: bool = False

    def for_block(self, cache: Any, rows: Any = None, last_only: bool = False) -> "Context":
        """Returns this context with the cache and the table rows of one block."""
        return replace(self, cache=cache, rows=rows, last_only=last_only)

    def visible(self) -> Bool[Tensor, "B 1 T L"]:
        """Returns `mask`, or the plain causal mask (batch axis 1) if it is None."""
        if self.mask is not None:
            return self.mask
        time = self.positions.shape[1]
        return _causal(time, self.past + time, self.positions.device)[None, None]

    def rotate(self, x: Float[Tensor, "B T *H P"], interleaved: bool) -> Float[Tensor, "B T *H P"]:
        """Applies the rotary embedding of the new tokens to their queries or keys."""
        assert self.cos is not None and self.sin is not None, "a context without rope"
        return rotate(x, self.cos, self.sin, interleaved)

    def last(self) -> "Context":
        """Returns the context of the last new token; the tokens before it count as cached."""
        return replace(
            self,
            positions=self.positions[:, -1:],
            documents=_last(self.documents),
            present=_last(self.present),
            mask=None if self.mask is None else self.mask[:, :, -1:],
            past=self.past + self.positions.shape[1] - 1,
            cos=_last(self.cos),
            sin=_last(self.sin),
            ids=_last(self.ids),
            live=_last(self.live),
            last_only=False,
        )


def _last(values: Tensor | None) -> Tensor | None:
    return None if values is None else values[:, -1:]


def _causal(time: int, length: int, device: torch.device) -> Bool[Tensor, "T L"]:
    """Returns the causal mask of the last `time` of `length` tokens as queries.

    Each query sees the keys up to itself.
    """
    return torch.ones(time, length, dtype=torch.bool, device=device).tril(length - time)


def _count(documents: Tensor | None, present: Tensor | None) -> Tensor:
    """Computes positions [B, L]: the valid tokens since the start of the document, counted from 0.

    A padding token has the position of the token before it.
    """
    known = present if present is not None else documents
    assert known is not None
    here = torch.ones_like(known, dtype=torch.long) if present is None else present.long()
    count = here.cumsum(1)
    if documents is not None:
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        count = count - torch.where(begins, count - here, 0).cummax(1).values
    return (count - 1).clamp_min(0)


def _mask(time: int, documents: Tensor | None, present: Tensor | None) -> Tensor:
    """Builds the mask [B, 1, T, L]: causal, within the document, valid keys only.

    A padding query sees itself alone, so that its softmax is defined; no other query sees it.
    """
    known = documents if documents is not None else present
    assert known is not None
    length = known.shape[1]
    mask = _causal(time, length, known.device)[None]
    if documents is not None:
        mask = mask & (documents[:, -time:, None] == documents[:, None, :])
    if present is not None:
        mask = mask & present[:, None, :]
        own = torch.eye(time, dtype=torch.bool, device=known.device)
        mask[:, :, length - time :] |= own & ~present[:, -time:, None]
    return mask[:, None]


def _lead(
    documents: Tensor | None, present: Tensor | None, places: Tensor, cached: int
) -> Tensor | None:
    """Returns the left padding of each sequence, in columns.

    Returns None if there are documents, padding elsewhere, or left padding beyond the cached
    tokens, and while a compiler traces.
    """
    if present is None or documents is not None or torch.compiler.is_compiling():
        return None
    lead = present.shape[1] - 1 - places[:, -1]
    columns = torch.arange(present.shape[1], device=lead.device)
    whole = torch.equal(present, columns >= lead[:, None]) and not (
        cached and bool((lead > cached).any())
    )
    return lead if whole else None


def context(
    batch: int,
    time: int,
    device: torch.device | str,
    *,
    documents: Int[Tensor, "B T"] | None = None,
    present: Bool[Tensor, "B T"] | None = None,
    past: Past | None = None,
    rope: tuple[RopeConfig, int] | None = None,
    **more: Any,
) -> Context:
    """Builds the context of `time` new tokens in each sequence and appends them to `past`.

    `past` holds the tokens cached before. The mask is None if neither documents nor padding is
    known, for new or cached tokens. `rope` is the config and the rotary width of the model's
    attention; without it there are no cos and sin. `more` are other fields of Context.
    """
    cached = 0 if past is None else past.length
    every_document, everyone = documents, present
    if past is not None:
        every_document, everyone = past.append(batch, time, documents, present)
    known = every_document is not None or everyone is not None
    if known:
        places = _count(every_document, everyone)
    else:
        places = torch.arange(cached + time, device=device).expand(batch, -1)
    positions = places[:, cached:]
    cos, sin = rope_tables(*rope, positions) if rope is not None else (None, None)
    return Context(
        positions=positions,
        documents=None if every_document is None else every_document[:, cached:],
        present=None if everyone is None else everyone[:, cached:],
        mask=_mask(time, every_document, everyone) if known else None,
        key_positions=places,
        key_documents=every_document,
        key_present=everyone,
        past=cached,
        lead=_lead(every_document, everyone, places, cached) if past is not None else None,
        cos=cos,
        sin=sin,
        **more,
    )
