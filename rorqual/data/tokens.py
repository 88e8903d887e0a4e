"""Writes documents as files of token ids, and reads them.

    stored      begin t1 .. tn, one document after another; flat files, two bytes an id, or four
    targets     of chats (`chats`), a byte an id: whether it is a label; all ids of a text are

A corpus is read, cleaned and split by one process, in order. Its texts are encoded in batches, by
that process or by several others, and the batches are written in the order in which they were read:
the files are the same, byte for byte, for any number of processes. Imports `chats`, `corpus` and
`tokenizer` beside it.
"""

import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import tokenizers

from rorqual.data import chats
from rorqual.data.corpus import VALIDATION, Corpus, Side, position_of
from rorqual.data.tokenizer import Tokenizer
from rorqual.io import flush_folder, new_folder

ORDER, WINDOWS = 0, 1  # the two purposes of a draw
_FORMAT = 1
SIDES: tuple[Side, ...] = ("train", "validation")
BATCH_LETTERS = 2**19  # of text handed to the tokenizer at once
_AHEAD = 2  # batches a process that are read before they are needed

Sided = list[tuple[Side, str]]
Encode = Callable[[Iterable[Sided]], "Iterator[tuple[Sided, Encoded]]"]


@runtime_checkable
class Ids(Protocol):
    """Token ids by position: an array, a memory map, or a view of several."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


def positions_of(index: Any, length: int) -> np.ndarray:
    """Returns the positions that an index of a sequence means: a slice, or an array."""
    if isinstance(index, slice):
        return np.arange(*index.indices(length))
    return np.asarray(index)


class JoinedIds:
    """Arrays of ids one after another; reads only the ids that are asked for."""

    def __init__(self, arrays: Iterable[Ids]) -> None:
        self.arrays = tuple(arrays)
        self.ends = np.cumsum([len(array) for array in self.arrays], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        positions = positions_of(index, len(self))
        flat = positions.reshape(-1)
        numbers = np.searchsorted(self.ends, flat, side="right")
        ids = np.empty(len(flat), np.int64)
        for number in np.unique(numbers):
            array = self.arrays[number]
            mine = numbers == number
            ids[mine] = array[flat[mine] - (self.ends[number] - len(array))]
        return ids.reshape(positions.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One side of the split, as token ids.

    Document d is ids[starts[d] : starts[d + 1]] and begins with the tokenizer's `begin_id`.

        ids       uint16 or uint32 [tokens], in memory, mapped, or a view of several files
        targets   bool [tokens], or None where every id is a target
        starts    int64 [documents + 1]
        sizes     int64 [documents], UTF-8 bytes of the text, of a chat's answers
        digest    of ids, targets and starts
    """

    ids: Ids
    starts: np.ndarray
    sizes: np.ndarray
    end_id: int
    digest: str
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.sizes)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the texts, or of chats' answers, without special tokens."""
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
    processes: int = 1,
) -> TokenFolder:
    """Tokenises a corpus into a folder below `folder`.

    The folder's name changes with the documents and the tokenizer. A folder that exists already is
    opened, not made again; a half-written one never has that name. `progress` is called with the
    bytes of text done so far. Sides are those of `Corpus.sided`. processes: how many encode; 1 is
    this process, with the threads of the tokenizer. ValueError for a corpus of fewer than two
    documents.
    """
    if processes < 1:
        raise ValueError(f"processes: got {processes}, expected at least 1")
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
    with new_folder(path, _is_whole) as beside:
        _write(corpus, tokenizer, beside, progress, processes)
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


def _is_whole(path: Path) -> bool:
    """Returns whether a folder can be opened by `open_tokens`."""
    return _opened(path) is not None


class Documents(NamedTuple):
    """Documents as ids, each with `begin` before it."""

    ids: np.ndarray  # of all documents, one after another
    lengths: np.ndarray  # int64 [documents]
    sizes: np.ndarray  # int64 [documents], UTF-8 bytes of the text, or of a chat's answers
    targets: np.ndarray | None  # bool, an entry an id, of chats


class Encoded(NamedTuple):
    """A batch of texts as documents, those of each side, and the texts that are left out."""

    sides: dict[Side, Documents]
    spelled: list[str]  # chats that spell a special token


class Encoder:
    """Encodes batches of texts. It is built again in every process from what `settings` holds."""

    def __init__(self, tokenizer: Tokenizer, as_chats: bool) -> None:
        self.tokenizer = tokenizer
        self.chat_encoder = chats.ChatEncoder(tokenizer) if as_chats else None
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")

    def __call__(self, texts: Sided) -> Encoded:
        if self.chat_encoder is not None:
            return self._chats(texts, self.chat_encoder)
        encoded = self.tokenizer.encode_batch([text for _, text in texts])
        sides: dict[Side, Documents] = {}
        for side in SIDES:
            mine = [i for i, (where, _) in enumerate(texts) if where == side]
            sizes = [len(texts[i][1].encode("utf-8")) for i in mine]
            sides[side] = self._documents([encoded[i] for i in mine], sizes)
        return Encoded(sides, [])

    def _chats(self, texts: Sided, encoder: chats.ChatEncoder) -> Encoded:
        """Encodes chats; those that cannot be encoded are left out."""
        spelled: list[str] = []
        mine: dict[Side, list[tuple[str, list[int], list[bool]]]] = {side: [] for side in SIDES}
        encoded = encoder.encode_batch([text for _, text in texts])
        for (side, text), one in zip(texts, encoded, strict=True):
            if one is None:
                spelled.append(text[:60])
            else:
                mine[side].append((text, *one))
        sides = {
            side: self._documents(
                [ids for _, ids, _ in item],
                [chats.answers_size(text) for text, _, _ in item],
                [targets for _, _, targets in item],
            )
            for side, item in mine.items()
        }
        return Encoded(sides, spelled)

    def _documents(
        self, ids: list[list[int]], sizes: list[int], targets: list[list[bool]] | None = None
    ) -> Documents:
        """Joins the ids of documents, `begin` before each, in the dtype of the files."""
        begin_id = self.tokenizer.begin_id
        flat = np.fromiter(chain.from_iterable([begin_id, *one] for one in ids), dtype=self.dtype)
        lengths = np.array([len(one) + 1 for one in ids], dtype=np.int64)
        marks = None
        if targets is not None:
            # begin is no target
            marks = np.fromiter(chain.from_iterable([False, *one] for one in targets), dtype=bool)
        return Documents(flat, lengths, np.array(sizes, dtype=np.int64), marks)


@contextmanager
def _encoding(tokenizer: Tokenizer, as_chats: bool, processes: int) -> Iterator[Encode]:
    """Yields a function from batches of texts to these batches and what they are encoded to.

    Batches come back in their order, whichever process encoded them.
    """
    if processes == 1:
        encoder = Encoder(tokenizer, as_chats)
        yield lambda batches: ((batch, encoder(batch)) for batch in batches)
        return
    # A process that is forked would share locks of threads that it does not have.
    context = multiprocessing.get_context("spawn")
    start = (tokenizer.backend.to_str(), dict(tokenizer.settings), as_chats)
    with ProcessPoolExecutor(processes, context, _start_process, start) as pool:

        def encode(batches: Iterable[Sided]) -> Iterator[tuple[Sided, Encoded]]:
            """Yields batches with what they are encoded to; a few more are encoded meanwhile."""
            ahead: deque[tuple[Sided, Future[Encoded]]] = deque()
            for batch in batches:
                ahead.append((batch, pool.submit(_encode, batch)))
                if len(ahead) > _AHEAD * processes:
                    first, future = ahead.popleft()
                    yield first, future.result()
            for first, future in ahead:
                yield first, future.result()

        try:
            yield encode
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Process:
    """Holds the encoder of a process that encodes, from batch to batch."""

    encoder: Encoder


def _end_with_parent() -> None:
    """Waits until the parent process has ended, however it did, and ends this one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _start_process(tokenizer: str, settings: dict[str, Any], as_chats: bool) -> None:
    """Prepares a process that encodes: it builds the Encoder and ends when its parent does."""
    # Ctrl-C goes to all processes of a terminal: the parent ends these.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The processes are the threads here.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backend = tokenizers.Tokenizer.from_str(tokenizer)
    _Process.encoder = Encoder(Tokenizer(backend, settings), as_chats)


def _encode(texts: Sided) -> Encoded:
    """Encodes a batch by this process's encoder; a pool can call functions of modules only."""
    return _Process.encoder(texts)


def _write(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    progress: Callable[[int], None] | None,
    processes: int,
) -> None:
    """Encodes a corpus and writes the files of both sides, and meta.json last.

    ValueError where a side gets no document.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    writers = {side: _Writer(folder / f"{side}.bin") for side in SIDES}
    done = 0
    with _encoding(tokenizer, corpus.chats, processes) as encode:
        for texts, encoded in encode(_batches(_ordered(corpus.sided()))):
            for side, writer in writers.items():
                writer.add(encoded.sides[side])
            for text in encoded.spelled:
                corpus.skip(chats.SPELLED, text)
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
    write_meta(folder, meta)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Writes meta.json, the last file of a folder, and flushes all of them."""
    (folder / "meta.json").write_text(
        json.dumps(meta, indent=2, ensure_ascii=True) + "\n", encoding="utf-8"
    )
    flush_folder(folder)


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
    """Groups texts to batches of half a million letters or more; the last one may be smaller."""
    batch: list[tuple[Side, str]] = []
    size = 0
    for side, text in texts:
        batch.append((side, text))
        size += len(text)
        if size >= BATCH_LETTERS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


class _Writer:
    """Appends documents to one side's file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = hashlib.blake2b(digest_size=16)
        self.lengths: list[np.ndarray] = []
        self.sizes: list[np.ndarray] = []

    def add(self, documents: Documents) -> None:
        """Appends ids and targets to the files; lengths and sizes wait for `close`."""
        with open(self.path, "ab") as file:
            file.write(documents.ids.data)
        self.digest.update(documents.ids.data)
        if documents.targets is not None:
            with open(self.path.with_suffix(".targets.bin"), "ab") as file:
                file.write(documents.targets.data)
            self.digest.update(documents.targets.data)
        self.lengths.append(documents.lengths)
        self.sizes.append(documents.sizes)

    def close(self) -> dict[str, Any]:
        """Writes starts and sizes, and returns what meta.json says of this side."""
        starts = np.concatenate([np.zeros(1, np.int64), *self.lengths]).cumsum()
        sizes = np.concatenate([np.zeros(0, np.int64), *self.sizes])
        write_array(self.path.with_suffix(".starts.npy"), starts)
        write_array(self.path.with_suffix(".sizes.npy"), sizes)
        self.digest.update(starts.data)
        return {
            "tokens": int(starts[-1]),
            "documents": len(sizes),
            "bytes": int(sizes.sum()),
            "digest": self.digest.hexdigest(),
        }


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array as numpy does, with an error where the disk is full."""
    # numpy's own writing to a file raises no error when the disk is full
    whole = io.BytesIO()
    np.save(whole, array)
    path.write_bytes(whole.getvalue())


def _opened(path: Path) -> TokenFolder | None:
    """Opens a token folder, or returns None where it is not whole."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        train, validation = (_side(path / f"{side}.bin", meta, side) for side in SIDES)
        return TokenFolder(
            path, train, validation, meta["vocab_size"], meta["end_id"], meta["about"]
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def _side(path: Path, meta: dict[str, Any], side: str) -> Tokens:
    """Maps one side of a folder. ValueError where a file has another length than meta.json says."""
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


def joined(folders: Iterable[TokenFolder]) -> TokenFolder:
    """Returns several folders of one tokenizer as one, their documents one after another."""
    several = tuple(folders)
    if len(several) == 1:
        return several[0]
    skipped: dict[str, int] = {}
    for folder in several:
        for reason, count in folder.about["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + count
    about = {
        name: "; ".join(dict.fromkeys(folder.about[name] for folder in several))
        for name in ("name", "license")
    }
    return TokenFolder(
        several[0].path,
        # Batches of training are drawn from each folder's own tokens.
        _joined_side([folder.train for folder in several], targets=False),
        _joined_side([folder.validation for folder in several]),
        several[0].vocab_size,
        several[0].end_id,
        about | {"bytes": None, "skipped": skipped},
    )


def _joined_side(sides: list[Tokens], targets: bool = True) -> Tokens:
    """Joins tokens; without `targets` it has none of those that chats have."""
    starts = [np.zeros(1, np.int64)]
    for side in sides:
        starts.append(starts[-1][-1] + np.asarray(side.starts[1:]))
    digest = hashlib.blake2b("".join(side.digest for side in sides).encode(), digest_size=16)
    marks = None
    if targets and any(side.targets is not None for side in sides):
        marks = np.concatenate([_targets_of(side) for side in sides])
    return Tokens(
        JoinedIds(side.ids for side in sides),
        np.concatenate(starts),
        np.concatenate([np.asarray(side.sizes) for side in sides]),
        sides[0].end_id,
        digest.hexdigest(),
        marks,
    )


def _targets_of(side: Tokens) -> np.ndarray:
    """Returns which ids are targets: of a text all but `begin`."""
    if side.targets is not None:
        return side.targets
    targets = np.ones(len(side), bool)
    targets[np.asarray(side.starts[:-1])] = False
    return targets


def draw(seed: int, purpose: int, number: int, count: int) -> np.ndarray:
    """Draws a permutation, int64 [count], for a purpose (ORDER or WINDOWS) and a number of it.

    Philox's raw bits and a stable sort are the same in every version of numpy.
    """
    bits = np.random.Philox(key=np.array([seed, 2 * number + purpose], dtype=np.uint64)).random_raw(
        count
    )
    return np.argsort(bits, kind="stable")
