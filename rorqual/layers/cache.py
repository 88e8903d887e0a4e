"""New tokens of a call in -> what a layer remembers of all calls out.

Containers only; what is kept in them is each layer's business. Every container knows three verbs:

    select(index)   keep these rows, in this order (beams, finished requests)
    crop(k)         forget the last k tokens (rejected drafts)
    reset()         forget everything, keep the memory

Nothing here carries gradients: a cache is for inference, and what an `append` or `extend` returns is valid
until the next call of the same container.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


class State(Protocol):
    """What every container can do."""

    def select(self, index: Tensor) -> None: ...
    def crop(self, count: int) -> None: ...
    def reset(self) -> None: ...


class Appended:
    """Everything since the start, in one preallocated buffer [B, capacity, ...] that doubles when it is full.

    `capacity` is the number of tokens to make room for at the first append; `.length` the number held.
    """

    def __init__(self, capacity: int = 0):
        self.capacity = capacity
        self.length = 0
        self.buffer: Tensor | None = None

    def append(self, new: Shaped[Tensor, "B T ..."]) -> Shaped[Tensor, "B L ..."]:
        """Put `new` behind what is held; returns all of it, a view. ValueError if the batch has changed."""
        new, batch, stop = new.detach(), new.shape[0], self.length + new.shape[1]
        if self.length and self.buffer is not None and self.buffer.shape[0] != batch:
            raise ValueError(
                f"got a batch of {batch}, expected the {self.buffer.shape[0]} rows that are cached"
            )
        if self.buffer is None or self.buffer.shape[0] != batch or self.buffer.shape[1] < stop:
            self._grow(new, stop)
        assert self.buffer is not None
        self.buffer[:, self.length : stop] = new
        self.length = stop
        return self.buffer[:, :stop]

    def claim(self, count: int) -> tuple[Shaped[Tensor, "B L ..."], int]:
        """The buffer and the column from which the caller must write `count` tokens into it. ValueError where nothing
        has been appended, so that neither width nor batch is known."""
        if self.buffer is None or not self.length:
            raise ValueError(
                "claim: got an empty cache, expected one that holds a token: append the first"
            )
        at, stop = self.length, self.length + count
        if self.buffer.shape[1] < stop:
            self._grow(self.buffer, stop)
        self.length = stop
        return self.buffer, at

    def _grow(self, new: Tensor, needed: int) -> None:
        held = 0 if self.buffer is None else self.buffer.shape[1]
        size = max(needed, self.capacity, 2 * held if held < needed else held, 16)
        buffer = new.new_empty(new.shape[0], size, *new.shape[2:])
        if self.length and self.buffer is not None:
            buffer[:, : self.length] = self.buffer[:, : self.length]
        self.buffer = buffer

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keep the rows `index`, in that order. An empty buffer may still have the rows of a batch before `reset`."""
        if self.buffer is not None and self.length:
            kept = self.buffer[:, : self.length].index_select(0, index)
            if len(index) != self.buffer.shape[0]:
                self.buffer = self.buffer.new_empty(len(index), *self.buffer.shape[1:])
            self.buffer[:, : self.length] = kept

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens. ValueError if fewer are held."""
        if not 0 <= count <= self.length:
            raise ValueError(f"got {count} tokens to forget, expected 0 to the {self.length} held")
        self.length -= count

    def reset(self) -> None:
        """Forget everything; the buffer stays for the next sequence."""
        self.length = 0


class Recent:
    """The last `count` tokens, and up to `slack` more so that `crop` can go back that far.

    Where nothing came before, `fill` stands.
    """

    length: int  # tokens seen
    known: int  # of those, the last that are still held
    end: int  # where the next goes

    def __init__(self, count: int, slack: int = 64, fill: int | float = 0):
        self.count, self.slack, self.fill = count, slack, fill
        self.buffer: Tensor | None = None
        self.reset()

    def extend(self, new: Shaped[Tensor, "B T ..."]) -> Shaped[Tensor, "B L ..."]:
        """Put `new` behind what is held; returns the `count` tokens before it and `new` itself, L = count + T."""
        new, time, keep = new.detach(), new.shape[1], self.count + self.slack
        if (claimed := self.claim(new)) is not None:
            buffer, at = claimed
            buffer[:, at : at + time] = new
            return buffer[:, at - self.count : at + time]
        assert self.buffer is not None
        result = torch.cat([self.buffer[:, self.end - self.count : self.end], new], dim=1)
        whole = torch.cat([self.buffer[:, : self.end], new], dim=1)
        self.buffer[:, :keep] = whole[:, whole.shape[1] - keep :]
        self.length, self.known, self.end = self.length + time, min(self.known + time, keep), keep
        return result

    def claim(self, new: Shaped[Tensor, "B T ..."]) -> tuple[Tensor, int] | None:
        """The buffer [B, L, ...] and the column from which the caller must write `new` into it.

        None, and nothing is claimed, where the buffer is too short: `extend` then. ValueError if the batch has changed.
        """
        (batch, time), keep, buffer = new.shape[:2], self.count + self.slack, self.buffer
        if buffer is None or (self.length == 0 and len(buffer) != batch):
            buffer = self.buffer = new.new_full((batch, 2 * keep + 16, *new.shape[2:]), self.fill)
        if len(buffer) != batch:
            raise ValueError(
                f"got a batch of {batch}, expected the {len(buffer)} rows that are cached"
            )
        if self.end + time > buffer.shape[1]:
            self._to_front(keep)
        at = self.end
        if at + time > buffer.shape[1]:
            return None
        self.length, self.known, self.end = (
            self.length + time,
            min(self.known + time, keep),
            at + time,
        )
        return buffer, at

    def _to_front(self, keep: int) -> None:
        assert self.buffer is not None
        self.buffer[:, :keep] = self.buffer[:, self.end - keep : self.end].clone()
        self.end = keep

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keep the rows `index`, in that order."""
        if self.buffer is not None and self.length:
            self.buffer = self.buffer.index_select(0, index)

    @property
    def spare(self) -> int:
        """How many of the last tokens can be forgotten so that what came before the next one is still held."""
        return self.length if self.known == self.length else self.known - self.count

    def hold(self, slack: int) -> None:
        """Hold `slack` tokens more than are read, so that `crop` can go back that far. For an empty container."""
        if self.length:
            raise ValueError(
                f"hold: got a container of {self.length} tokens, expected an empty one: reset it first"
            )
        self.slack, self.buffer = slack, None
        self.reset()

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens, `spare` at most, or all. ValueError where what came before is not held."""
        if count == self.length:
            self.reset()
            return
        if not 0 <= count <= self.spare:
            raise ValueError(
                f"got {count} tokens to forget, expected 0 to {self.spare}, or all {self.length}"
            )
        self.length, self.known, self.end = (
            self.length - count,
            self.known - count,
            self.end - count,
        )
        if self.end < self.count + self.slack and self.buffer is not None:
            self._shift(self.count + self.slack - self.end)

    def _shift(self, room: int) -> None:
        assert self.buffer is not None
        kept = self.buffer[:, : self.end].clone()
        self.buffer[:, :room] = self.fill
        self.buffer[:, room : room + self.end] = kept
        self.end += room

    def reset(self) -> None:
        """Forget everything."""
        self.length = self.known = 0
        self.end = self.count + self.slack
        if self.buffer is not None:
            self.buffer.fill_(self.fill)


class Past:
    """How many tokens a model has cached, and, where any call named them, their documents and which are present."""

    def __init__(self, capacity: int = 0):
        self.length = 0
        self.documents, self.present = Appended(capacity), Appended(capacity)

    @property
    def named(self) -> bool:
        """Whether any call has named documents or padding."""
        return bool(self.documents.length or self.present.length)

    def append(
        self,
        batch: int,
        time: int,
        documents: Int[Tensor, "B T"] | None,
        present: Bool[Tensor, "B T"] | None,
    ) -> tuple[Int[Tensor, "B L"] | None, Bool[Tensor, "B L"] | None]:
        """The documents and presence of all tokens, cached and new; None where no call has named them.

        New tokens without documents go on with the last document of their row; without `present` they are present.
        Tokens cached before the first call that names documents belong to document 0.
        """
        if documents is None and self.documents.length:
            assert self.documents.buffer is not None
            documents = self.documents.buffer[:, self.documents.length - 1, None].expand(
                batch, time
            )
        if present is None and self.present.length:
            assert self.present.buffer is not None
            present = self.present.buffer.new_ones(batch, time)
        everyone = (
            self._append(self.documents, documents, 0),
            self._append(self.present, present, True),
        )
        self.length += time
        return everyone

    def _append(self, kept: Appended, new: Tensor | None, before: int | bool) -> Tensor | None:
        if new is None:
            return None
        if kept.length < self.length:
            kept.append(new.new_full((new.shape[0], self.length), before))
        return kept.append(new)

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keep the rows `index`, in that order."""
        self.documents.select(index)
        self.present.select(index)

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens."""
        if not 0 <= count <= self.length:
            raise ValueError(f"got {count} tokens to forget, expected 0 to the {self.length} held")
        self.length -= count
        for kept in (self.documents, self.present):
            kept.crop(min(count, kept.length))

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self.documents.reset()
        self.present.reset()


class Bundle:
    """Several containers as the fields of a dataclass, which says what is kept.

    A field is a container, None, or a tuple of those. What is done to the bundle is done to all of them.
    """

    @property
    def parts(self) -> dict[str, Any]:
        """The fields by their names."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}  # type: ignore[arg-type]

    def states(self) -> list[Any]:
        """The containers, of tuples, too."""
        found: list[Any] = []
        for part in self.parts.values():
            found += part if isinstance(part, tuple) else [part]
        return [part for part in found if part is not None]

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keep the rows `index` in every part."""
        for state in self.states():
            state.select(index)

    @property
    def recent(self) -> list[Recent]:
        """The containers, of bundles in this one, too, that do not hold everything."""
        held = [state for state in self.states() if isinstance(state, Recent)]
        return held + [
            one for state in self.states() if isinstance(state, Bundle) for one in state.recent
        ]

    def hold(self, slack: int) -> None:
        """Every part holds so much that `crop` can go back `slack` tokens (64 otherwise). For empty containers."""
        for part in self.recent:
            part.hold(slack)

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens in every part. ValueError, and nothing is forgotten, where one cannot."""
        for held in self.recent:
            if held.spare < count < held.length:
                got = f"got {count} tokens to forget, expected 0 to {held.spare}, or all {held.length}"
                raise ValueError(f"{got}: hold({count}) an empty cache, and it can go back as far")
        for state in self.states():
            state.crop(count)

    def reset(self) -> None:
        """Forget everything in every part."""
        for state in self.states():
            state.reset()


@dataclass(eq=False)
class BlockCache(Bundle):
    """What a block keeps between calls."""

    attention: Any  # MLACache or GQACache
    engram: Recent | None = None


@dataclass(eq=False)
class DraftCache(BlockCache):
    """What a depth of MTP keeps, which is called by itself."""

    past: Past = field(kw_only=True)


@dataclass(eq=False)
class _All(Bundle):
    every: tuple[Any, ...]


class Cache:
    """What a model keeps between calls: a bundle a block, who stands where, the last ids, and MTP's own.

    select(index) keeps or reorders rows of the batch, crop(k) forgets the last k tokens, reset() forgets all.
    A draft's bundle has a `past` of its own: every depth of MTP is called by itself.
    """

    def __init__(
        self, layers: Sequence[Any], past: Past, ids: Recent | None, drafts: Sequence[Any]
    ) -> None:
        self.layers, self.past, self.ids, self.drafts = tuple(layers), past, ids, tuple(drafts)
        self._model, self._ahead = _All((past, ids, *layers)), _All(self.drafts)

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.past.length

    def select(self, index: Int[Tensor, " B2"]) -> None:
        self._model.select(index)
        self._ahead.select(index)

    def crop(self, k: int) -> None:
        """Forget the last k tokens; drafts that went further are forgotten as far."""
        if not 0 <= k <= self.length:
            raise ValueError(f"crop: got {k}, expected 0..{self.length}, the tokens cached")
        self._model.crop(k)
        for draft in self.drafts:
            draft.crop(max(0, draft.past.length - self.length))

    def hold(self, k: int) -> None:
        """Let `crop` go back k tokens; without this 64. For an empty cache: it costs k tokens of Engram's values."""
        if k < 0:
            raise ValueError(f"hold: got {k}, expected at least 0 tokens")
        self._model.hold(k)

    def crop_drafts(self, k: int) -> None:
        """Every depth of MTP forgets the last k tokens: what it was told of them was itself a draft."""
        self._ahead.crop(k)

    def reset(self) -> None:
        self._model.reset()
        self._ahead.reset()
