"""Containers for the state that layers keep between calls.

Each layer decides what it stores in them. Every container has three methods:

    select(index)   keeps these sequences of the batch, in this order (beams, finished requests)
    crop(k)         removes the last k tokens (rejected drafts)
    reset()         removes all tokens and keeps the memory

Nothing here carries gradients: a cache is for inference. What an `append` or `extend` returns is
valid until the next call of the same container.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


class State(Protocol):
    """The methods of every container."""

    def select(self, index: Tensor) -> None: ...
    def crop(self, count: int) -> None: ...
    def reset(self) -> None: ...


class Appended:
    """Stores all tokens since the start in a buffer [B, capacity, ...].

    The buffer is preallocated and doubles when it is full. `capacity` is the number of tokens
    allocated at the first append; `.length` is the number stored.
    """

    def __init__(self, capacity: int = 0):
        self.capacity = capacity
        self.length = 0
        self.buffer: Tensor | None = None

    def append(self, new: Shaped[Tensor, "B T ..."]) -> Shaped[Tensor, "B L ..."]:
        """Appends `new` and returns all stored tokens as a view.

        ValueError if the batch size has changed.
        """
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
        """Reserves `count` tokens and returns the buffer and the first reserved column.

        The caller must write them from that column on. ValueError if nothing has been appended, so
        that neither the width nor the batch size is known.
        """
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
        """Keeps the sequences `index`, in that order.

        An empty buffer may still have the batch size from before `reset`.
        """
        if self.buffer is not None and self.length:
            kept = self.buffer[:, : self.length].index_select(0, index)
            if len(index) != self.buffer.shape[0]:
                self.buffer = self.buffer.new_empty(len(index), *self.buffer.shape[1:])
            self.buffer[:, : self.length] = kept

    def crop(self, count: int) -> None:
        """Removes the last `count` tokens. ValueError if fewer are stored."""
        if not 0 <= count <= self.length:
            raise ValueError(f"got {count} tokens to forget, expected 0 to the {self.length} held")
        self.length -= count

    def reset(self) -> None:
        """Removes all tokens; the buffer stays allocated for the next sequence."""
        self.length = 0


class Recent:
    """Stores the last `count` tokens, and up to `slack` more so that `crop` can go back that far.

    Columns before the first token hold `fill`.
    """

    length: int  # tokens seen
    known: int  # of those, the latest ones that are still stored
    end: int  # column of the next token

    def __init__(self, count: int, slack: int = 64, fill: int | float = 0):
        self.count, self.slack, self.fill = count, slack, fill
        self.buffer: Tensor | None = None
        self.reset()

    def extend(self, new: Shaped[Tensor, "B T ..."]) -> Shaped[Tensor, "B L ..."]:
        """Appends `new`; returns the `count` tokens before it and `new` itself, L = count + T."""
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
        """Reserves columns for `new`; returns the buffer [B, L, ...] and the first of them.

        The caller must write `new` there. Returns None, and reserves nothing, if the buffer is too
        short; call `extend` then. ValueError if the batch size has changed.
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
        """Keeps the sequences `index`, in that order."""
        if self.buffer is not None and self.length:
            self.buffer = self.buffer.index_select(0, index)

    @property
    def spare(self) -> int:
        """How many tokens `crop` can remove while those before the next one stay stored."""
        return self.length if self.known == self.length else self.known - self.count

    def hold(self, slack: int) -> None:
        """Stores `slack` tokens more than are read, so that `crop` can go back that far.

        The container must be empty.
        """
        if self.length:
            raise ValueError(
                f"hold: got a container of {self.length} tokens, "
                "expected an empty one: reset it first"
            )
        self.slack, self.buffer = slack, None
        self.reset()

    def crop(self, count: int) -> None:
        """Removes the last `count` tokens, at most `spare` of them, or all.

        ValueError if the tokens before them are no longer stored.
        """
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
        """Removes all tokens."""
        self.length = self.known = 0
        self.end = self.count + self.slack
        if self.buffer is not None:
            self.buffer.fill_(self.fill)


class Past:
    """Counts the cached tokens of a model and stores their documents and validity.

    Both are stored only if some call has given them.
    """

    def __init__(self, capacity: int = 0):
        self.length = 0
        self.documents, self.present = Appended(capacity), Appended(capacity)

    @property
    def named(self) -> bool:
        """Whether any call has given documents or padding."""
        return bool(self.documents.length or self.present.length)

    def append(
        self,
        batch: int,
        time: int,
        documents: Int[Tensor, "B T"] | None,
        present: Bool[Tensor, "B T"] | None,
    ) -> tuple[Int[Tensor, "B L"] | None, Bool[Tensor, "B L"] | None]:
        """Appends new tokens and returns the documents and validity of all tokens, cached and new.

        Both are None if no call has given them. New tokens without `documents` continue the last
        document of their sequence; without `present` they are valid. Tokens cached before the first
        call that gives documents belong to document 0.
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
        """Keeps the sequences `index`, in that order."""
        self.documents.select(index)
        self.present.select(index)

    def crop(self, count: int) -> None:
        """Removes the last `count` tokens."""
        if not 0 <= count <= self.length:
            raise ValueError(f"got {count} tokens to forget, expected 0 to the {self.length} held")
        self.length -= count
        for kept in (self.documents, self.present):
            kept.crop(min(count, kept.length))

    def reset(self) -> None:
        """Removes all tokens."""
        self.length = 0
        self.documents.reset()
        self.present.reset()


class Bundle:
    """Groups several containers as the fields of a dataclass.

    A field is a container, None, or a tuple of those. Each method applies to all of them.
    """

    @property
    def parts(self) -> dict[str, Any]:
        """The fields by name."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}  # type: ignore[arg-type]

    def states(self) -> list[Any]:
        """Returns the containers, including those in tuples."""
        found: list[Any] = []
        for part in self.parts.values():
            found += part if isinstance(part, tuple) else [part]
        return [part for part in found if part is not None]

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keeps the sequences `index` in every part."""
        for state in self.states():
            state.select(index)

    @property
    def recent(self) -> list[Recent]:
        """The containers that do not store all tokens, including those of nested bundles."""
        held = [state for state in self.states() if isinstance(state, Recent)]
        return held + [
            one for state in self.states() if isinstance(state, Bundle) for one in state.recent
        ]

    def hold(self, slack: int) -> None:
        """Lets `crop` go back `slack` tokens in every part; the default is 64.

        The containers must be empty.
        """
        for part in self.recent:
            part.hold(slack)

    def crop(self, count: int) -> None:
        """Removes the last `count` tokens in every part.

        ValueError, with nothing removed, if a part cannot go back that far.
        """
        for held in self.recent:
            if held.spare < count < held.length:
                got = (
                    f"got {count} tokens to forget, "
                    f"expected 0 to {held.spare}, or all {held.length}"
                )
                raise ValueError(f"{got}: hold({count}) an empty cache, and it can go back as far")
        for state in self.states():
            state.crop(count)

    def reset(self) -> None:
        """Removes all tokens in every part."""
        for state in self.states():
            state.reset()


@dataclass(eq=False)
class BlockCache(Bundle):
    """The cache of one block."""

    attention: Any  # MLACache or GQACache
    engram: Recent | None = None


@dataclass(eq=False)
class DraftCache(BlockCache):
    """The cache of one MTP depth, which counts its own tokens."""

    past: Past = field(kw_only=True)


@dataclass(eq=False)
class _All(Bundle):
    every: tuple[Any, ...]


class Cache:
    """The cache of a model: a bundle per block, past tokens, last ids, and the caches of MTP.

    select(index) keeps or reorders the sequences of the batch, crop(k) removes the last k tokens,
    and reset() removes all. A draft's bundle has a `past` of its own, because every depth of MTP is
    called separately.
    """

    def __init__(
        self, layers: Sequence[Any], past: Past, ids: Recent | None, drafts: Sequence[Any]
    ) -> None:
        self.layers, self.past, self.ids, self.drafts = tuple(layers), past, ids, tuple(drafts)
        self._model, self._ahead = _All((past, ids, *layers)), _All(self.drafts)

    @property
    def length(self) -> int:
        """Number of tokens seen."""
        return self.past.length

    def select(self, index: Int[Tensor, " B2"]) -> None:
        self._model.select(index)
        self._ahead.select(index)

    def crop(self, k: int) -> None:
        """Removes the last k tokens; drafts that are longer are cropped to the same length."""
        if not 0 <= k <= self.length:
            raise ValueError(f"crop: got {k}, expected 0..{self.length}, the tokens cached")
        self._model.crop(k)
        for draft in self.drafts:
            draft.crop(max(0, draft.past.length - self.length))

    def hold(self, k: int) -> None:
        """Lets `crop` go back k tokens; the default is 64. The cache must be empty.

        It costs the memory of k tokens of Engram's values.
        """
        if k < 0:
            raise ValueError(f"hold: got {k}, expected at least 0 tokens")
        self._model.hold(k)

    def crop_drafts(self, k: int) -> None:
        """Removes the last k tokens of every MTP depth, because their input was itself a draft."""
        self._ahead.crop(k)

    def reset(self) -> None:
        self._model.reset()
        self._ahead.reset()
