"""Packs documents into batches, the same after any stop and on any number of ranks.

    epoch e     the documents in the order that (seed, e) draws; epochs follow each other
                without end
    window w    the ids at w * length .. (w + 1) * length of that endless text;
                its labels are shifted by one
    sequence n  window W k + draw(seed, k)[n mod W],  k = n // W,  W = windows of an epoch
    batch s     sequences  (s * world + rank) * batch_size  ..  + batch_size - 1

So in every epoch each token is read once, and predicted once but for `begin`: the label of a
document's last token is `end`, whichever document follows; that of a sequence's last token, where
its document goes on, is the first token of the next window. Many tokenizers have one token for
both, <|end|>. The position in the stream is one number, n. In a mixture, sequence n is a sequence
of one of the texts (`mixture`). Imports `mixture` and `tokens` beside it.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from rorqual.data.mixture import Pattern
from rorqual.data.tokens import ORDER, WINDOWS, Tokens, draw

IGNORED = -100  # the label of padding

Batch = dict[str, Int64[Tensor, "B T"]]
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, labels, document_ids


@runtime_checkable
class Reader(Protocol):
    """Reads the sequences of a text by their numbers."""

    digest: str  # changes with the text
    windows: int  # sequences that are drawn together: an epoch, or a group

    def read(self, numbers: np.ndarray) -> Arrays:
        """Returns int64 [B, seq_len] each; `numbers` do not fall much from call to call."""
        ...

    def state(self, number: int) -> Any:
        """Returns JSON values that `restore` needs to go on with this sequence."""
        ...

    def restore(self, number: int, state: Any) -> None:
        """Goes on with this sequence, whose `state` was saved."""
        ...


@runtime_checkable
class Readable(Protocol):
    """A text that is not in token files, and is read by a Reader of its own."""

    def reader(self, seq_len: int, seed: int) -> Reader:
        """Returns what reads windows of `seq_len` tokens, in the order that `seed` draws."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Several texts, and the share of sequences that each of them has; the shares sum to 1."""

    texts: "tuple[Tokens | Readable, ...]"
    shares: tuple[Fraction, ...]


Text = Tokens | Readable | Mixture


class _Order:
    """The documents one after another in a given order."""

    def __init__(self, tokens: Tokens, order: np.ndarray) -> None:
        starts = np.asarray(tokens.starts)
        self.documents = order
        self.ends = (starts[1:] - starts[:-1])[order].cumsum()
        # Added to a place in this order, the shift gives the place in the file.
        self.shift = starts[1:][order] - self.ends

    def find(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places in the file, and the ranks of the documents, of places in order."""
        ranks = np.searchsorted(self.ends, positions, side="right")
        return positions + self.shift[ranks], ranks


def _check_sizes(batch_size: int, seq_len: int, rank: int, world: int) -> None:
    """Raises ValueError for numbers that make no batch."""
    if batch_size < 1 or seq_len < 1:
        raise ValueError(
            f"got batch_size={batch_size} and seq_len={seq_len}, expected at least 1 of each"
        )
    if not 0 <= rank < world:
        raise ValueError(f"got rank={rank} and world={world}, expected 0 <= rank < world")


def _windows_of(tokens: Tokens, seq_len: int) -> int:
    """Returns the number of windows of one epoch."""
    if not len(tokens):
        raise ValueError("got no tokens, expected at least one document")
    return -(-len(tokens) // seq_len)


class TokensReader:
    """Reads token files: the windows of all epochs, each epoch's in a drawn order."""

    def __init__(self, tokens: Tokens, seq_len: int, seed: int) -> None:
        self.tokens = tokens
        self.digest = tokens.digest
        self.seq_len = seq_len
        self.seed = seed
        self.windows = _windows_of(tokens, seq_len)
        self._orders: dict[int, _Order] = {}
        self._drawn: dict[int, np.ndarray] = {}

    def read(self, numbers: np.ndarray) -> Arrays:
        """Returns ids, labels and document ids, int64 [B, seq_len] each."""
        places = self.placed(numbers)[:, None] * self.seq_len
        files, document_ids = self._read(places + np.arange(self.seq_len + 1))
        ids = self.tokens.ids[files].astype(np.int64)
        labels = _labels(self.tokens, ids, files, document_ids)
        return ids[:, :-1], labels, document_ids[:, :-1]

    def state(self, number: int) -> None:
        """Returns nothing: the number of a sequence says all."""

    def restore(self, number: int, state: None) -> None:
        """Does nothing, since any sequence can be read at any time."""

    def placed(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the numbers of the windows that these sequences are."""
        groups = numbers // self.windows
        placed = np.empty_like(numbers)
        for group in np.unique(groups):
            drawn = _cached(
                self._drawn, int(group), lambda k: draw(self.seed, WINDOWS, k, self.windows)
            )
            mine = groups == group
            placed[mine] = group * self.windows + drawn[numbers[mine] % self.windows]
        return placed

    def _read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places in the file, and the documents, of places in the endless text."""
        epochs = positions // len(self.tokens)
        files = np.empty_like(positions)
        document_ids = np.empty_like(positions)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            mine = epochs == epoch
            if mine.any():
                order = _cached(
                    self._orders, epoch, lambda e: _Order(self.tokens, self._documents(e))
                )
                files[mine], ranks = order.find(positions[mine] - epoch * len(self.tokens))
                document_ids[mine] = ranks + epoch * self.tokens.documents
        return files, document_ids

    def _documents(self, epoch: int) -> np.ndarray:
        """Draws the order of the documents in an epoch."""
        return draw(self.seed, ORDER, epoch, self.tokens.documents)


def _cached(name: dict[int, Any], number: int, make: Callable[[int], Any]) -> Any:
    """Returns the cached value of a number, or makes it; the four latest are cached."""
    if number not in name:
        if len(name) >= 4:
            del name[next(iter(name))]
        name[number] = make(number)
    return name[number]


class MixtureReader:
    """Reads sequences of several texts, in the order of a Pattern."""

    def __init__(self, mixture: Mixture, seq_len: int, seed: int) -> None:
        self.pattern = Pattern(mixture.shares)
        # Equal texts of one mixture are read in different orders.
        self.readers = [
            reader_of(text, seq_len, (seed + number) % 2**63)
            for number, text in enumerate(mixture.texts)
        ]
        self.windows = self.pattern.period
        described = [*(reader.digest for reader in self.readers), *map(str, mixture.shares)]
        self.digest = hashlib.blake2b("\n".join(described).encode(), digest_size=16).hexdigest()

    def read(self, numbers: np.ndarray) -> Arrays:
        """Returns ids, labels and document ids; those of several texts never share a number."""
        parts = np.array([self.pattern(int(n)) for n in numbers], dtype=np.int64).reshape(-1, 2)
        mixed: list[np.ndarray] = []
        for text, reader in enumerate(self.readers):
            mine = parts[:, 0] == text
            if not mine.any():
                continue
            ids, labels, document_ids = reader.read(parts[mine, 1])
            # Documents of two texts have two numbers.
            document_ids = document_ids * len(self.readers) + text
            mixed = mixed or [np.empty((len(numbers), ids.shape[1]), np.int64) for _ in range(3)]
            for whole, array in zip(mixed, (ids, labels, document_ids), strict=True):
                whole[mine] = array
        ids, labels, document_ids = mixed
        return ids, labels, document_ids

    def state(self, number: int) -> list[Any]:
        """Returns what the reader of each text needs to go on, in the order of the texts."""
        return [
            reader.state(of_text)
            for reader, of_text in zip(self.readers, self._next_numbers(number), strict=True)
        ]

    def restore(self, number: int, state: list[Any]) -> None:
        """Moves the reader of each text to its own next sequence."""
        numbers = self._next_numbers(number)
        for reader, of_text, one in zip(self.readers, numbers, state, strict=True):
            reader.restore(of_text, one)

    def _next_numbers(self, number: int) -> list[int]:
        """Returns how many sequences of each text come before one of the mixture."""
        periods, rest = divmod(number, self.pattern.period)
        before = self.pattern.order[:rest]
        return [
            periods * count + before.count(text) for text, count in enumerate(self.pattern.counts)
        ]


def reader_of(text: Text, seq_len: int, seed: int) -> Reader:
    """Returns what reads the sequences of a text."""
    if isinstance(text, Mixture):
        return MixtureReader(text, seq_len, seed)
    if isinstance(text, Tokens):
        return TokensReader(text, seq_len, seed)
    return text.reader(seq_len, seed)


class Stream:
    """Yields endless training batches of one rank.

    A batch is {"ids", "labels", "document_ids"}, each int64 [batch_size, seq_len]. `document_ids`
    numbers the documents as they come, so two tokens belong together if and only if their numbers
    agree. `batch_size` is per rank: batch_size * world sequences of one stream are the same text,
    whatever the world. An iterator over itself; state_dict() after a batch, and load_state_dict()
    of that elsewhere, goes on with the very next batch.
    """

    def __init__(
        self,
        text: Text,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        _check_sizes(batch_size, seq_len, rank, world)
        if not 0 <= seed < 2**63:
            raise ValueError(f"got seed {seed}, expected 0 <= seed < 2**63")
        self.reader = reader_of(text, seq_len, seed)
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.rank = rank
        self.world = world
        self._number = 0

    @property
    def total_batches(self) -> int:
        """The number of batches of one epoch, the last of which reaches into the next."""
        return -(-self.reader.windows // (self.batch_size * self.world))

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        first = self._number + self.rank * self.batch_size
        arrays = self.reader.read(np.arange(first, first + self.batch_size))
        self._number += self.batch_size * self.world
        return _batch(*arrays)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the stream as JSON values, the same on every rank."""
        state = {
            # The name of it in the checkpoints that there are.
            "row": self._number,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "tokens": self.reader.digest,
        }
        reader = self.reader.state(self._number)
        return state if reader is None else state | {"reader": reader}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a saved position.

        ValueError for the state of another text, seed or length; batch_size and world may have
        changed.
        """
        for name, value in (
            ("seed", self.seed),
            ("seq_len", self.seq_len),
            ("tokens", self.reader.digest),
        ):
            if state[name] != value:
                raise ValueError(
                    f"stream: got a state with {name} {state[name]}, expected {value}; "
                    "it cannot be resumed"
                )
        self._number = int(state["row"])
        self.reader.restore(self._number, state.get("reader"))


def validation_batches(
    tokens: Tokens, batch_size: int, seq_len: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Yields every token of a side once, in batches like those of `Stream`.

    Every token but `begin` is predicted once, and so is each document's end. The documents come in
    an order drawn once and for all, so the first few batches are a fair sample; `document_ids` are
    their numbers in `tokens` (with `tokens.sizes` for bits a byte). All batches have the full batch
    size, and all ranks equally many batches: padding has end_id with label -100 and document -1, so
    a rank may have no label at all.
    """
    _check_sizes(batch_size, seq_len, rank, world)
    windows = _windows_of(tokens, seq_len)
    order = _Order(tokens, draw(0, ORDER, 0, tokens.documents))
    for first in range(0, windows, batch_size * world):
        mine = np.arange(first + rank * batch_size, first + (rank + 1) * batch_size)
        columns = mine[:, None] * seq_len + np.arange(seq_len + 1)
        there = columns < len(tokens)
        files, ranks = order.find(np.where(there, columns, 0))
        ids = np.where(there, tokens.ids[files], tokens.end_id).astype(np.int64)
        document_ids = np.where(there, order.documents[ranks], -1)
        labels = np.where(there[:, :-1], _labels(tokens, ids, files, document_ids), IGNORED)
        yield _batch(ids[:, :-1], labels, document_ids[:, :-1])


def _labels(
    tokens: Tokens, ids: np.ndarray, files: np.ndarray, document_ids: np.ndarray
) -> np.ndarray:
    """Returns the next id of the document for each id but the last, or the document's end.

    An id that is no target is IGNORED. `ids` and `files`, their places in the file, are
    [batch_size, seq_len + 1], labels [batch_size, seq_len].
    """
    following = ids[:, 1:]
    if tokens.targets is not None:
        following = np.where(tokens.targets[files[:, 1:]], following, IGNORED)
    return np.where(document_ids[:, 1:] == document_ids[:, :-1], following, tokens.end_id)


def _batch(ids: np.ndarray, labels: np.ndarray, document_ids: np.ndarray) -> Batch:
    """Returns the arrays as a batch of int64 tensors, copied where they are not contiguous."""
    arrays = {"ids": ids, "labels": labels, "document_ids": document_ids}
    return {
        name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
        for name, array in arrays.items()
    }
