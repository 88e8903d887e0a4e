"""Packs documents into batches, the same after any stop and on any number of ranks.

    stored      begin t1 .. tn, one document after another; flat files, two bytes an id, or four
    targets     of chats (`chats`), a byte an id: whether it is a label; all ids of a text are
    epoch e     the documents in the order that (seed, e) draws; epochs follow each other
                without end
    window w    the ids at w * length .. (w + 1) * length of that endless text;
                its labels are shifted by one
    row n       window W k + draw(seed, k)[n mod W],  k = n // W,  W = windows of an epoch
    batch s     rows  s * batch_size * world + rank * rows  ..  + rows - 1

A row is a sequence of a batch. So in every epoch each token is read once, and predicted once but
for `begin`: the label of a document's last token is `end`, whichever document follows; that of a
sequence's last token, where its document goes on, is the first token of the next window. Many
tokenizers have one token for both, <|end|>. The position in the stream is one number, n. Imports
`chats`, `corpus` and `tokenizer` beside it.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from rorqual.data import chats
from rorqual.data.corpus import VALIDATION, Corpus, Side, position_of
from rorqual.data.tokenizer import Tokenizer
from rorqual.io import flush, flush_folder

IGNORED = -100  # the label of padding
_FORMAT = 1
_SIDES: tuple[Side, ...] = ("train", "validation")
_BATCH_BYTES = 2**19  # of text handed to the tokenizer at once
_ORDER, _WINDOWS = 0, 1  # the two purposes of a draw

Batch = dict[str, Int64[Tensor, "B T"]]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One side of the split, as token ids.

    Document d is ids[starts[d] : starts[d + 1]] and begins with the tokenizer's `begin_id`.

        ids       uint16 or uint32 [tokens]
        targets   bool [tokens], or None where every id is a target
        starts    int64 [documents + 1]
        sizes     int64 [documents], UTF-8 bytes of the text, of a chat's answers
        digest    of ids, targets and starts
    """

    ids: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    end_id: int
    digest: str
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        return len(self.sizes)

    @property
    def bytes(self) -> int:
        return int(self.sizes.sum())

    @property
    def labels(self) -> int:
        """The number of labels of an epoch, the end of each document among them."""
        return len(self) if self.targets is None else int(self.targets.sum()) + self.documents


@dataclass(frozen=True, slots=True, eq=False)
class TokenFolder:
    """A tokenised corpus on disk.

    `about`: name, license, bytes of the source, and what was skipped, by reason.
    """

    path: Path
    train: Tokens
    validation: Tokens
    vocab_size: int
    end_id: int
    about: dict[str, Any]


def tokenise(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    *,
    progress: Callable[[int], None] | None = None,
) -> TokenFolder:
    """Tokenises a corpus into a folder below `folder`.

    The folder's name changes with the documents and the tokenizer. A folder that exists already is
    opened, not made again; a half-written one never has that name. `progress` is called with the
    bytes of text done so far. Sides are those of `Corpus.sided`. ValueError for a corpus of fewer
    than two documents.
    """
    identity = [
        _FORMAT,
        VALIDATION,
        corpus.fingerprint,
        tokenizer.backend.to_str(),
        tokenizer.end_id,
    ]
    identity += [tokenizer.begin_id] * (tokenizer.begin_id != tokenizer.end_id)
    identity += [chats.TEMPLATE] * corpus.chats
    path = Path(folder) / hashlib.blake2b(json.dumps(identity).encode(), digest_size=10).hexdigest()
    opened = _opened(path)
    if opened is not None:
        return opened
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write(corpus, tokenizer, beside, progress)
        _put(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return open_tokens(path)


def open_tokens(path: str | os.PathLike[str]) -> TokenFolder:
    """Opens a folder that `tokenise` wrote.

    ValueError for any other folder, and for one that has been damaged since.
    """
    folder = _opened(Path(path))
    if folder is None:
        raise ValueError(
            f"{os.fspath(path)}: got no whole token folder, expected one that tokenise() wrote"
        )
    return folder


def _put(beside: Path, path: Path) -> None:
    """Renames the folder to its name, unless another process was first; replaces a damaged one."""
    for attempt in range(2):
        try:
            os.rename(beside, path)
            break
        except OSError:
            if _opened(path) is not None:
                return
            if attempt:
                raise
            shutil.rmtree(path, ignore_errors=True)
    flush(path.parent)


def _write(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, progress: Callable[[int], None] | None
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    writers = {side: _Writer(folder / f"{side}.bin", dtype, tokenizer.begin_id) for side in _SIDES}
    encoder = chats.ChatEncoder(tokenizer) if corpus.chats else None
    done = 0
    for texts in _batches(_ordered(corpus.sided())):
        if encoder is not None:
            _write_chats(texts, encoder, writers, corpus)
        else:
            encoded = tokenizer.encode_batch([text for _, text in texts])
            for side, writer in writers.items():
                mine = [i for i, (where, _) in enumerate(texts) if where == side]
                sizes = [len(texts[i][1].encode("utf-8")) for i in mine]
                writer.add([encoded[i] for i in mine], sizes)
        done += sum(len(text.encode("utf-8")) for _, text in texts)
        if progress is not None:
            progress(done)
    sides = {side: writer.close() for side, writer in writers.items()}
    if not all(side["documents"] for side in sides.values()):
        count = sum(side["documents"] for side in sides.values())
        got = "one document" if count == 1 else f"{count} documents, none on one side of the split"
        why = "".join(f" ({count} x {reason})" for reason, count in corpus.skipped.most_common(1))
        raise ValueError(
            f"{corpus.name}: got {got}, expected at least two{why}, one of them to validate on"
        )
    about = {
        "name": corpus.name,
        "license": corpus.license,
        "bytes": corpus.bytes,
        "skipped": dict(corpus.skipped),
    }
    meta = {
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.end_id,
        "dtype": dtype.str,
        "about": about,
        "chats": corpus.chats,
    } | sides
    (folder / "meta.json").write_text(
        json.dumps(meta, indent=2, ensure_ascii=True) + "\n", encoding="utf-8"
    )
    flush_folder(folder)


def _write_chats(
    texts: list[tuple[Side, str]],
    encoder: chats.ChatEncoder,
    writers: dict[Side, "_Writer"],
    corpus: Corpus,
) -> None:
    """Writes ids and targets of chats; those that cannot be encoded are counted as skipped."""
    mine: dict[Side, list[tuple[str, list[int], list[bool]]]] = {side: [] for side in writers}
    encoded = encoder.encode_batch([text for _, text in texts])
    for (side, text), one in zip(texts, encoded, strict=True):
        if one is None:
            corpus.skip(chats.SPELLED, text[:60])
        else:
            mine[side].append((text, *one))
    for side, writer in writers.items():
        writer.add(
            [ids for _, ids, _ in mine[side]],
            [chats.answers_size(text) for text, _, _ in mine[side]],
            [targets for _, _, targets in mine[side]],
        )


def _ordered(sided: Iterable[tuple[Side, str]]) -> Iterator[tuple[Side, str]]:
    """Reorders texts so that the train text nearest to validation waits until another validates.

    Token files have been ordered like this since the first version.
    """
    order_key: str | None = None
    validated = False
    for side, text in sided:
        if side == "train" and not validated:
            if order_key is None:
                order_key = text
                continue
            if position_of(text) < position_of(order_key):
                order_key, text = text, order_key
        yield side, text
        if side == "validation" and not validated:
            validated = True
            if order_key is not None:
                yield "train", order_key
    if order_key is not None and not validated:
        yield "train", order_key


def _batches(texts: Iterable[tuple[Side, str]]) -> Iterator[list[tuple[Side, str]]]:
    batch: list[tuple[Side, str]] = []
    size = 0
    for side, text in texts:
        batch.append((side, text))
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


class _Writer:
    """Appends documents to one side's file."""

    def __init__(self, path: Path, dtype: np.dtype, begin_id: int) -> None:
        self.path = path
        self.dtype = dtype
        self.begin_id = begin_id
        self.digest = hashlib.blake2b(digest_size=16)
        self.lengths: list[np.ndarray] = []
        self.sizes: list[np.ndarray] = []

    def add(
        self,
        documents: list[list[int]],
        sizes: list[int],
        targets: list[list[bool]] | None = None,
    ) -> None:
        flat = np.fromiter(
            chain.from_iterable([self.begin_id, *ids] for ids in documents), dtype=self.dtype
        )
        with open(self.path, "ab") as file:
            file.write(flat.data)
        self.digest.update(flat.data)
        if targets is not None:
            # begin is no target
            marks = np.fromiter(chain.from_iterable([False, *one] for one in targets), dtype=bool)
            with open(self.path.with_suffix(".targets.bin"), "ab") as file:
                file.write(marks.data)
            self.digest.update(marks.data)
        self.lengths.append(np.array([len(ids) + 1 for ids in documents], dtype=np.int64))
        self.sizes.append(np.array(sizes, dtype=np.int64))

    def close(self) -> dict[str, Any]:
        starts = np.concatenate([np.zeros(1, np.int64), *self.lengths]).cumsum()
        sizes = np.concatenate([np.zeros(0, np.int64), *self.sizes])
        for name, array in (("starts", starts), ("sizes", sizes)):
            # numpy's own writing to a file raises no error when the disk is full
            whole = io.BytesIO()
            np.save(whole, array)
            self.path.with_suffix(f".{name}.npy").write_bytes(whole.getvalue())
        self.digest.update(starts.data)
        return {
            "tokens": int(starts[-1]),
            "documents": len(sizes),
            "bytes": int(sizes.sum()),
            "digest": self.digest.hexdigest(),
        }


def _opened(path: Path) -> TokenFolder | None:
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        train, validation = (_side(path / f"{side}.bin", meta, side) for side in _SIDES)
        return TokenFolder(
            path, train, validation, meta["vocab_size"], meta["end_id"], meta["about"]
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def _side(path: Path, meta: dict[str, Any], side: str) -> Tokens:
    entry = meta[side]
    ids = np.memmap(path, dtype=np.dtype(meta["dtype"]), mode="r")
    starts = np.load(path.with_suffix(".starts.npy"), mmap_mode="r", allow_pickle=False)
    sizes = np.load(path.with_suffix(".sizes.npy"), mmap_mode="r", allow_pickle=False)
    marks = path.with_suffix(".targets.bin")
    targets = np.memmap(marks, dtype=bool, mode="r") if meta.get("chats") else None
    if (len(ids), len(starts), len(sizes), len(ids if targets is None else targets)) != (
        entry["tokens"],
        entry["documents"] + 1,
        entry["documents"],
        entry["tokens"],
    ):
        raise ValueError(f"{path}: got {len(ids)} tokens, expected {entry['tokens']}")
    return Tokens(ids, starts, sizes, meta["end_id"], entry["digest"], targets)


def _draw(seed: int, what: int, number: int, count: int) -> np.ndarray:
    """Draws a permutation, int64 [count].

    Philox's raw bits and a stable sort are the same in every version of numpy.
    """
    bits = np.random.Philox(key=np.array([seed, 2 * number + what], dtype=np.uint64)).random_raw(
        count
    )
    return np.argsort(bits, kind="stable")


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


def _windows_of(tokens: Tokens, batch_size: int, seq_len: int, rank: int, world: int) -> int:
    """Returns the number of windows of one epoch; ValueError for numbers that make no batch."""
    if batch_size < 1 or seq_len < 1:
        raise ValueError(
            f"got batch_size={batch_size} and seq_len={seq_len}, expected at least 1 of each"
        )
    if not 0 <= rank < world:
        raise ValueError(f"got rank={rank} and world={world}, expected 0 <= rank < world")
    if not len(tokens):
        raise ValueError("got no tokens, expected at least one document")
    return -(-len(tokens) // seq_len)


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
        tokens: Tokens,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._windows = _windows_of(tokens, batch_size, seq_len, rank, world)
        if not 0 <= seed < 2**63:
            raise ValueError(f"got seed {seed}, expected 0 <= seed < 2**63")
        self.tokens = tokens
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.rank = rank
        self.world = world
        self._row = 0
        self._orders: dict[int, _Order] = {}
        self._drawn: dict[int, np.ndarray] = {}

    @property
    def total_batches(self) -> int:
        """The number of batches of one epoch, the last of which reaches into the next."""
        return -(-self._windows // (self.batch_size * self.world))

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        first = self._row + self.rank * self.batch_size
        places = self._placed(np.arange(first, first + self.batch_size))[:, None] * self.seq_len
        files, document_ids = self._read(places + np.arange(self.seq_len + 1))
        self._row += self.batch_size * self.world
        ids = self.tokens.ids[files].astype(np.int64)
        return _batch(
            ids[:, :-1], _labels(self.tokens, ids, files, document_ids), document_ids[:, :-1]
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the stream as JSON values."""
        return {
            "row": self._row,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "tokens": self.tokens.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a saved position.

        ValueError for the state of another text, seed or length; rows and world may have changed.
        """
        for name, value in (
            ("seed", self.seed),
            ("seq_len", self.seq_len),
            ("tokens", self.tokens.digest),
        ):
            if state[name] != value:
                raise ValueError(
                    f"stream: got a state with {name} {state[name]}, expected {value}; "
                    "it cannot be resumed"
                )
        self._row = int(state["row"])

    def _placed(self, rows: np.ndarray) -> np.ndarray:
        """Returns the numbers of the windows in these rows."""
        groups = rows // self._windows
        placed = np.empty_like(rows)
        for group in np.unique(groups):
            drawn = _kept(
                self._drawn, int(group), lambda k: _draw(self.seed, _WINDOWS, k, self._windows)
            )
            mine = groups == group
            placed[mine] = group * self._windows + drawn[rows[mine] % self._windows]
        return placed

    def _read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places in the file, and the documents, of places in the endless text."""
        epochs = positions // len(self.tokens)
        files = np.empty_like(positions)
        document_ids = np.empty_like(positions)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            mine = epochs == epoch
            if mine.any():
                order = _kept(
                    self._orders, epoch, lambda e: _Order(self.tokens, self._documents(e))
                )
                files[mine], ranks = order.find(positions[mine] - epoch * len(self.tokens))
                document_ids[mine] = ranks + epoch * self.tokens.documents
        return files, document_ids

    def _documents(self, epoch: int) -> np.ndarray:
        return _draw(self.seed, _ORDER, epoch, self.tokens.documents)


def _kept(name: dict[int, Any], number: int, make: Callable[[int], Any]) -> Any:
    """Returns the cached value of a number, or makes it; the four latest are cached."""
    if number not in name:
        if len(name) >= 4:
            del name[next(iter(name))]
        name[number] = make(number)
    return name[number]


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
    windows = _windows_of(tokens, batch_size, seq_len, rank, world)
    order = _Order(tokens, _draw(0, _ORDER, 0, tokens.documents))
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
    arrays = {"ids": ids, "labels": labels, "document_ids": document_ids}
    return {
        name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
        for name, array in arrays.items()
    }
