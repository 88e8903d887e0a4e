"""What a forward pass knows beside the hidden states, built once and read by every layer.

    positions, documents, present    where each new token stands in its row
    key_..., mask                    the same of all keys, cached ones first, and which of them a query sees
    cos, sin                         the rotations of the new tokens
    ids, live, rows                  the token ids, where Engram recalls nothing, this block's rows of its table
    cache                            what this block keeps between calls
    warm, last_only                  whether DSA's indexers warm up; whether the last position alone is wanted

Layers take `(x, ctx)`. What a new layer must know is a new field here, not a parameter of every function on the way.
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
    """Where the T new tokens of a call stand, the L = past + T keys that they may look at, and what layers keep.

    `documents` None means one document a row, `present` None that nothing is padding, and `mask` None that query t
    sees the cached keys and the new ones up to t. The `key_` fields are the same for all L keys.
    """

    positions: Int[Tensor, "B T"]  # within its document, padding not counted
    documents: Int[Tensor, "B T"] | None = None
    present: Bool[Tensor, "B T"] | None = None
    mask: Bool[Tensor, "B 1 T L"] | None = None
    key_positions: Int[Tensor, "B L"]
    key_documents: Int[Tensor, "B L"] | None = None
    key_present: Bool[Tensor, "B L"] | None = None
    past: int = 0  # tokens cached before this call
    lead: Int[Tensor, " B"] | None = (
        None  # behind a cache: padding before each row's first token, if none is elsewhere
    )
    cos: Float[Tensor, "B T F"] | None = None
    sin: Float[Tensor, "B T F"] | None = None
    ids: Int[Tensor, "B T"] | None = None
    live: Bool[Tensor, "B T"] | None = None  # False where nothing is recalled
    rows: Any = None  # of the block's Engram: `rows.wait()` is float [B, T, R, head_dim]
    cache: Any = None  # the block's BlockCache
    warm: bool | None = None  # None where no indexer learns
    last_only: bool = False  # attention returns its last position alone; the others are its keys

    def for_block(self, cache: Any, rows: Any = None, last_only: bool = False) -> "Context":
        """The same call as one block sees it."""
        return replace(self, cache=cache, rows=rows, last_only=last_only)

    def visible(self) -> Bool[Tensor, "B 1 T L"]:
        """`mask`, or the plain causal mask (batch axis 1) where it is None."""
        if self.mask is not None:
            return self.mask
        time = self.positions.shape[1]
        return _causal(time, self.past + time, self.positions.device)[None, None]

    def rotate(self, x: Float[Tensor, "B T *H P"], interleaved: bool) -> Float[Tensor, "B T *H P"]:
        """Queries or keys of the new tokens, turned by their positions."""
        assert self.cos is not None and self.sin is not None, "a context without rope"
        return rotate(x, self.cos, self.sin, interleaved)

    def last(self) -> "Context":
        """The last new token alone, the others as if they had been cached before."""
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
    """The last `time` of `length` tokens as queries: each sees the keys up to itself."""
    return torch.ones(time, length, dtype=torch.bool, device=device).tril(length - time)


def _count(documents: Tensor | None, present: Tensor | None) -> Tensor:
    """Positions [B, L]: present tokens since the start of the document; padding repeats its predecessor's."""
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
    """[B, 1, T, L]: causal, within the document, present keys only. A padding query sees itself alone, so that its
    softmax is defined; nobody else sees it."""
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
    """Columns of padding before each row's first token; None where there are documents, or padding elsewhere."""
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
    """The context of `time` new tokens in each row, behind what `past` holds. They are appended to `past`.

    The mask is None whenever neither documents nor present is known, of new or cached tokens. rope: the config and the
    rotary width of the model's attention, without which there are no cos and sin. more: other fields of Context.
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
