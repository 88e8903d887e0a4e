"""New tokens of a call in -> what a layer remembers of all calls out.

Containers only; what is kept in them is each layer's business. Every container knows three verbs:

    select(index)   keep these rows, in this order (beams, finished requests)
    crop(k)         forget the last k tokens (rejected drafts)
    reset()         forget everything, keep the memory

Nothing here carries gradients: a cache is for inference, and what an `append` or `extend` returns is valid
until the next call of the same container.
"""

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
            raise ValueError(f"got a batch of {batch}, expected the {self.buffer.shape[0]} rows that are cached")
        if self.buffer is None or self.buffer.shape[0] != batch or self.buffer.shape[1] < stop:
            self._grow(new, stop)
        assert self.buffer is not None
        self.buffer[:, self.length : stop] = new
        self.length = stop
        return self.buffer[:, :stop]

    def _grow(self, new: Tensor, needed: int) -> None:
        held = 0 if self.buffer is None else self.buffer.shape[1]
        size = max(needed, self.capacity, 2 * held if held < needed else held, 16)
        buffer = new.new_empty(new.shape[0], size, *new.shape[2:])
        if self.length and self.buffer is not None:
            buffer[:, : self.length] = self.buffer[:, : self.length]
        self.buffer = buffer

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keep the rows `index`, in that order."""
        if self.buffer is not None:
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
        if self.buffer is None or (self.length == 0 and self.buffer.shape[0] != new.shape[0]):
            self.buffer = new.new_full((new.shape[0], 2 * keep + 16, *new.shape[2:]), self.fill)
        if self.buffer.shape[0] != new.shape[0]:
            raise ValueError(f"got a batch of {new.shape[0]}, expected the {self.buffer.shape[0]} rows that are cached")
        if self.end + time > self.buffer.shape[1]:
            self._to_front(keep)
        start = self.end - self.count
        if self.end + time <= self.buffer.shape[1]:
            self.buffer[:, self.end : self.end + time] = new
            result, self.end = self.buffer[:, start : self.end + time], self.end + time
        else:
            result = torch.cat([self.buffer[:, start : self.end], new], dim=1)
            whole = torch.cat([self.buffer[:, : self.end], new], dim=1)
            self.buffer[:, :keep] = whole[:, whole.shape[1] - keep :]
            self.end = keep
        self.length += time
        self.known = min(self.known + time, keep)
        return result

    def _to_front(self, keep: int) -> None:
        assert self.buffer is not None
        self.buffer[:, :keep] = self.buffer[:, self.end - keep : self.end].clone()
        self.end = keep

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keep the rows `index`, in that order."""
        if self.buffer is not None:
            self.buffer = self.buffer.index_select(0, index)

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens. ValueError where what came before them is no longer held."""
        left = self.length - count
        if count < 0 or left < 0 or self.known - count < min(self.count, left):
            raise ValueError(f"got {count} tokens to forget, expected 0 to {min(self.slack, self.length)}")
        self.length, self.known, self.end = left, self.known - count, self.end - count
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

    def append(
        self, batch: int, time: int, documents: Int[Tensor, "B T"] | None, present: Bool[Tensor, "B T"] | None
    ) -> tuple[Int[Tensor, "B L"] | None, Bool[Tensor, "B L"] | None]:
        """The documents and presence of all tokens, cached and new; None where no call has named them.

        New tokens without documents go on with the last document of their row; without `present` they are present.
        Tokens cached before the first call that names documents belong to document 0.
        """
        if documents is None and self.documents.length:
            assert self.documents.buffer is not None
            documents = self.documents.buffer[:, self.documents.length - 1, None].expand(batch, time)
        if present is None and self.present.length:
            assert self.present.buffer is not None
            present = self.present.buffer.new_ones(batch, time)
        everyone = self._append(self.documents, documents, 0), self._append(self.present, present, True)
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
    """Several containers under their names, e.g. Bundle(keys=Appended(), values=Appended()); None stays None."""

    def __init__(self, **parts: Any):
        self.parts = parts

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["parts"][name]
        except KeyError:
            raise AttributeError(name) from None

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keep the rows `index` in every part."""
        for part in self.parts.values():
            if part is not None:
                part.select(index)

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens in every part."""
        for part in self.parts.values():
            if part is not None:
                part.crop(count)

    def reset(self) -> None:
        """Forget everything in every part."""
        for part in self.parts.values():
            if part is not None:
                part.reset()


class Cache:
    """What a model keeps between calls: a bundle a block, who stands where, the last ids, and MTP's own.

    select(index) keeps or reorders rows of the batch, crop(k) forgets the last k tokens, reset() forgets all.
    """

    def __init__(
        self, layers: list[Bundle], past: Past, ids: Recent | None, drafts: list[Bundle], draft_past: Past
    ) -> None:
        self.layers, self.past, self.ids = tuple(layers), past, ids
        self.drafts, self.draft_past = tuple(drafts), draft_past
        self._model = Bundle(past=past, ids=ids, **{str(n): layer for n, layer in enumerate(layers)})
        self._ahead = Bundle(past=draft_past, **{str(n): draft for n, draft in enumerate(drafts)})

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
        self._ahead.crop(max(0, self.draft_past.length - self.length))

    def reset(self) -> None:
        self._model.reset()
        self._ahead.reset()
