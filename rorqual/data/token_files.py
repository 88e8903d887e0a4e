"""Opens files of token ids that other tools wrote, by memory map.

    raw       .bin or .npy: uint16 or uint32 one after another, as nanoGPT and OLMo write them;
              documents end with the tokenizer's end of text
    header    the same behind 256 int32 (llm.c), or behind numpy's own header
    Megatron  .bin with .idx beside it: "MMIDIDX\\0\\0", version 1, a code for the dtype, numbers of
              sequences S and of document bounds D; then int32 lengths [S], int64 pointers in
              bytes [S], int64 bounds of documents in sequences [D]

Nothing is copied. Each file is read once from beginning to end, a piece at a time, which checks
every id against the tokenizer and finds the documents; that index is cached, and later runs read
only what they train on. A document validates by the hash of its first ids, whichever form they are
stored in; in a folder with a file called val, that file validates instead. Imports `corpus`,
`tokenizer` and `tokens` beside it.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from rorqual.data.corpus import VALIDATION, Side
from rorqual.data.files import token_paths
from rorqual.data.tokenizer import Tokenizer, token_sizes
from rorqual.data.tokens import (
    SIDES,
    Ids,
    JoinedIds,
    TokenFolder,
    Tokens,
    positions_of,
    write_array,
    write_meta,
)
from rorqual.io import new_folder

MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<QBQQ")  # behind the magic: version, dtype, sequences, document bounds
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
_NUMPY = b"\x93NUMPY"
_LLM_C = {20240520: "<u2", 20240801: "<u4"}  # the first int32 of a header, and what follows it
_LLM_C_HEADER = 1024  # bytes
_FORMAT = 2
_LOOKED_AT = 1 << 16  # ids at the beginning of a file that tell its dtype
PIECE = 1 << 18  # ids that are looked at together, which fit into a processor's cache
_HASHED = 256  # ids of a document that decide its side
_VALIDATES = re.compile(r"(^|[_.-])val(id(ation)?)?([_.-]|\d|$)")


class IdFile(NamedTuple):
    """A file of ids, and the bounds of its documents where an index tells them."""

    path: Path
    ids: np.ndarray  # a memory map [tokens]
    bounds: np.ndarray | None  # int64 [documents + 1]; None: documents end with the end id


def open_file(path: Path, vocab_size: int, dtype: str = "auto") -> IdFile:
    """Opens a file of ids. `dtype` is that of raw ids; auto: the smallest for the vocabulary.

    ValueError for a file that is cut, of another kind, or of another dtype.
    """
    index = path.with_suffix(".idx")
    try:
        if path.suffix == ".bin" and index.is_file():
            return _megatron(path, index)
        with open(path, "rb") as file:
            head = file.read(_LLM_C_HEADER)
        if head.startswith(_NUMPY):
            return IdFile(path, _numpy(path), None)
        raw = ("<u2" if vocab_size <= 2**16 else "<u4") if dtype == "auto" else dtype
        offset = 0
        if len(head) == _LLM_C_HEADER and (magic := struct.unpack_from("<i", head)[0]) in _LLM_C:
            raw, offset = _LLM_C[magic], _LLM_C_HEADER
        ids = _mapped(path, np.dtype(raw), offset)
        if dtype == "auto" and not offset:
            _refuse_wider(path, ids)
    except OSError as error:
        raise ValueError(f"{path}: got {error.strerror}, expected a file of token ids") from error
    if offset and len(ids) != (count := struct.unpack_from("<i", head, 8)[0]):
        raise ValueError(
            f"{path}: got {len(ids):,} ids, expected the {count:,} that its header names: it is cut"
        )
    return IdFile(path, ids, None)


def _mapped(path: Path, dtype: np.dtype, offset: int = 0) -> np.ndarray:
    """Maps the ids behind `offset` bytes. ValueError for a file of none, or of half an id."""
    size = path.stat().st_size - offset
    if size <= 0 or size % dtype.itemsize:
        raise ValueError(
            f"{path}: got {size:,} bytes of ids, expected a positive multiple of {dtype.itemsize} "
            f"for {dtype.name}: it is cut, or has another dtype (--data.token-dtype)"
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=offset)


def _refuse_wider(path: Path, ids: np.ndarray) -> None:
    """Raises ValueError where ids of two bytes look like ids of four: every second one is 0."""
    head = ids[:_LOOKED_AT]
    # Of few ids it may be chance.
    even = ids.dtype.itemsize == 2 and len(ids) % 2 == 0 and len(head) >= 64
    if even and head[::2].any() and not head[1::2].any():
        raise ValueError(
            f"{path}: got ids of two bytes of which every second is 0, expected ids of two bytes "
            "for this vocabulary: --data.token-dtype uint32 reads them as four"
        )


def _numpy(path: Path) -> np.ndarray:
    """Maps a .npy file. ValueError unless it holds integers in one dimension."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}, expected a whole .npy file of integers") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
        raise ValueError(
            f"{path}: got {ids.dtype} of shape {ids.shape}, expected integers in one dimension"
        )
    return ids


def _megatron(path: Path, index: Path) -> IdFile:
    """Maps the ids of a .bin file, with the bounds of documents from its .idx file.

    ValueError where one of the two is cut, or where they do not fit together.
    """
    head = len(MAGIC) + _HEADER.size
    with open(index, "rb") as file:
        magic = file.read(len(MAGIC))
        rest = file.read(_HEADER.size)
    if magic != MAGIC:
        raise ValueError(f"{index}: got {magic!r}, expected {MAGIC!r}: no index of Megatron")
    if len(rest) < _HEADER.size:
        raise ValueError(f"{index}: got {len(magic + rest)} bytes, expected {head} of a header")
    version, code, sequences, documents = _HEADER.unpack(rest)
    if version != 1 or code not in _DTYPES:
        raise ValueError(
            f"{index}: got version {version} and dtype {code}, expected version 1 and a dtype of "
            f"whole numbers ({', '.join(map(str, _DTYPES))})"
        )
    needed = head + 12 * sequences + 8 * documents
    size = index.stat().st_size
    # A byte a sequence may follow, of texts with images.
    if size not in (needed, needed + sequences):
        raise ValueError(
            f"{index}: got {size:,} bytes, expected {needed:,} of {sequences:,} sequences and "
            f"{documents:,} bounds of documents: it is cut"
        )
    dtype = np.dtype(_DTYPES[code])
    ids = _mapped(path, dtype)
    # The arrays do not begin at multiples of their items' size.
    raw = np.memmap(index, dtype=np.uint8, mode="r", offset=head)
    lengths = np.frombuffer(raw, "<i4", sequences).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, 4 * sequences)
    bounds = np.frombuffer(raw, "<i8", documents, 12 * sequences)
    expected = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    if (lengths < 0).any() or not np.array_equal(pointers, expected[:-1] * dtype.itemsize):
        raise ValueError(
            f"{index}: got sequences that do not follow each other in {path.name}, expected "
            "pointers that are the sums of the lengths before"
        )
    if expected[-1] != len(ids):
        raise ValueError(
            f"{path}: got {len(ids):,} ids, expected the {expected[-1]:,} of {index.name}: "
            "one of the two is cut or of another run"
        )
    whole = len(bounds) and bounds[0] == 0 and bounds[-1] == sequences
    inside = not len(bounds) or (bounds.min() >= 0 and bounds.max() <= sequences)
    # A difference of hostile bounds would wrap around.
    if not whole or not inside or (bounds[1:] < bounds[:-1]).any():
        raise ValueError(
            f"{index}: got bounds of documents that do not rise from 0 to {sequences:,}, "
            "expected an index that Megatron finalised"
        )
    return IdFile(path, ids, expected[bounds])


class FileDocuments(NamedTuple):
    """The documents of one file."""

    first: np.ndarray  # int64 [documents], the position of the first id of each, without `begin`
    lengths: np.ndarray  # int64 [documents], ids without `begin` and `end`
    sizes: np.ndarray  # int64 [documents], UTF-8 bytes
    positions: np.ndarray  # float64 [documents], hashes in [0, 1) that decide who validates
    digest: bytes
    empty: int  # documents without any id


def scan(file: IdFile, tokenizer: Tokenizer, name: str) -> FileDocuments:
    """Reads a file once: checks all ids, and finds its documents.

    `name` is the tokenizer's, for the ValueError where an id is beyond its vocabulary.
    """
    sizes = token_sizes(tokenizer.backend, tokenizer.vocab_size)
    sizes[[tokenizer.begin_id, tokenizer.end_id]] = 0
    digest = xxhash.xxh3_128()
    ends: list[np.ndarray] = []  # behind the last id of each document, its `end` not counted
    bytes_before: list[np.ndarray] = []  # of the file's text, at these ends
    total = 0
    for start in range(0, len(file.ids), PIECE):
        piece = np.asarray(file.ids[start : start + PIECE])
        _check_ids(piece, start, file, tokenizer, name)
        digest.update(np.ascontiguousarray(piece).data)
        sums = np.zeros(len(piece) + 1, dtype=np.int64)
        np.cumsum(sizes[piece], out=sums[1:])
        inside = (
            np.flatnonzero(piece == tokenizer.end_id)
            if file.bounds is None
            else _within(file.bounds[1:], start, start + len(piece)) - start
        )
        ends.append(inside + start)
        bytes_before.append(sums[inside] + total)
        total += int(sums[-1])
    if file.bounds is None and file.ids[-1] != tokenizer.end_id:
        ends.append(np.array([len(file.ids)]))
        bytes_before.append(np.array([total]))
    bound = np.concatenate(ends)
    text = np.diff(np.concatenate(bytes_before), prepend=0)
    skipped = 1 if file.bounds is None else 0  # the end id between two documents
    first = np.concatenate([np.zeros(1, np.int64), bound[:-1] + skipped])
    return _trimmed(file.ids, first, bound, text, tokenizer, digest.digest())


def _within(bounds: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Returns the bounds in (start, stop]; the first piece has those at 0, too."""
    side = "left" if start == 0 else "right"
    low = np.searchsorted(bounds, start, side=side)  # type: ignore[call-overload]
    return bounds[low : np.searchsorted(bounds, stop, side="right")]


def _trimmed(
    ids: np.ndarray,
    first: np.ndarray,
    bound: np.ndarray,
    text: np.ndarray,
    tokenizer: Tokenizer,
    digest: bytes,
) -> FileDocuments:
    """Leaves `begin` and `end` out of documents, and documents without other ids."""
    last = np.maximum(bound - 1, 0)
    bound = bound - ((bound > first) & (ids[last] == tokenizer.end_id))
    begins = (bound > first) & (ids[np.minimum(first, len(ids) - 1)] == tokenizer.begin_id)
    first = first + begins
    full = bound > first
    empty = int(len(full) - full.sum())
    first = first[full]
    lengths = bound[full] - first
    return FileDocuments(first, lengths, text[full], _hashes(ids, first, lengths), digest, empty)


def _hashes(ids: np.ndarray, first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Hashes the first ids of each document to a number in [0, 1), float64 [documents]."""
    plain = np.asarray(ids)
    hashes = np.empty(len(first))
    stops = first + np.minimum(lengths, _HASHED)
    for n, (start, stop) in enumerate(zip(first.tolist(), stops.tolist(), strict=True)):
        head = plain[start:stop].astype("<u4").tobytes()
        number = int.from_bytes(hashlib.blake2b(head, digest_size=6).digest(), "big")
        hashes[n] = number / 2**48
    return hashes


def _check_ids(
    piece: np.ndarray, start: int, file: IdFile, tokenizer: Tokenizer, name: str
) -> None:
    """Raises ValueError for an id beyond the vocabulary; the piece begins at id `start`."""
    if piece.min() < 0 or piece.max() >= tokenizer.vocab_size:
        position = int(((piece < 0) | (piece >= tokenizer.vocab_size)).argmax())
        raise ValueError(
            f"{file.path}: got id {piece[position]} at position {start + position:,}, expected 0 "
            f"to {tokenizer.vocab_size - 1} of the tokenizer {name}; give the tokenizer that wrote "
            f"it (--data.tokenizer), or its dtype, which is not {file.ids.dtype} "
            "(--data.token-dtype)"
        )


@dataclass(frozen=True, slots=True, eq=False)
class DocumentIds:
    """Documents of token files with `begin` before each, as `Tokens` has them.

    files     ids of the files, one after another
    first     int64 [documents], the position of each document's first id in `files`
    starts    int64 [documents + 1], where each document begins in this view
    """

    files: Ids
    first: np.ndarray
    starts: np.ndarray
    begin_id: int

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        positions = positions_of(index, len(self))
        ranks = np.searchsorted(self.starts, positions, side="right") - 1
        offsets = positions - self.starts[ranks]
        ids = self.files[self.first[ranks] + np.maximum(offsets - 1, 0)]
        return np.where(offsets > 0, ids, self.begin_id)


def open_token_files(
    source: str,
    tokenizer: Tokenizer,
    cache: str | os.PathLike[str],
    *,
    name: str,
    dtype: str = "auto",
    limit: int | None = None,
) -> TokenFolder:
    """Opens token files as a tokenised corpus; `cache` keeps the index of their documents.

    name: the tokenizer's, as the user wrote it. dtype: of raw ids. limit: documents at most,
    besides those of files called val.
    ValueError for files that are no whole token files, or of another tokenizer, and for fewer than
    two documents.
    """
    paths = token_paths(Path(source))
    files = [open_file(path, tokenizer.vocab_size, dtype) for path in paths]
    stats = [path.stat() for path in paths]
    described = [
        [os.path.abspath(file.path), stat.st_size, stat.st_mtime_ns, file.ids.dtype.str]
        for file, stat in zip(files, stats, strict=True)
    ]
    indices = [path.with_suffix(".idx") for path in paths]
    described += [
        [str(stat.st_size), stat.st_mtime_ns]
        for stat in (index.stat() for index in indices if index.is_file())
    ]
    identity = [_FORMAT, VALIDATION, limit, described, tokenizer.backend.to_str()]
    identity += [tokenizer.begin_id, tokenizer.end_id]
    key = hashlib.blake2b(json.dumps(identity).encode(), digest_size=10).hexdigest()
    path = Path(cache) / key
    folder = _opened(path, files, tokenizer)
    if folder is None:
        with new_folder(path, lambda made: _opened(made, files, tokenizer) is not None) as beside:
            _write_index(beside, files, tokenizer, source, name, limit)
        folder = _opened(path, files, tokenizer)
    assert folder is not None
    return folder


def _write_index(
    folder: Path,
    files: list[IdFile],
    tokenizer: Tokenizer,
    source: str,
    name: str,
    limit: int | None,
) -> None:
    """Writes where the documents of both sides begin, how long they are and their bytes.

    Where none would validate the one of the smallest hash does. ValueError for a side without a
    document.
    """
    scanned = [scan(file, tokenizer, name) for file in files]
    offsets = np.cumsum([0, *(len(file.ids) for file in files)])
    stays = _first_documents(files, scanned, limit)
    first = np.concatenate(
        [one.first + offset for one, offset in zip(scanned, offsets, strict=False)]
    )[stays]
    lengths = np.concatenate([one.lengths for one in scanned])[stays]
    sizes = np.concatenate([one.sizes for one in scanned])[stays]
    validates = _validates(files, scanned)[stays]
    if len(validates) > 1 and not validates.any():
        validates[np.concatenate([one.positions for one in scanned])[stays].argmin()] = True
    content = b"".join(one.digest for one in scanned)
    meta: dict[str, Any] = {}
    for side in SIDES:
        mine = validates if side == "validation" else ~validates
        if not mine.any():
            raise ValueError(
                f"{source}: got {len(first)} documents, none to "
                f"{'validate' if side == 'validation' else 'train'} on, expected at least two that "
                "end with the tokenizer's end of text, or a file called val beside the others"
            )
        starts = np.concatenate([np.zeros(1, np.int64), (lengths[mine] + 1).cumsum()])
        for what, array in (("starts", starts), ("sizes", sizes[mine]), ("first", first[mine])):
            write_array(folder / f"{side}.{what}.npy", array)
        marks = hashlib.blake2b(content + first[mine].tobytes() + starts.tobytes(), digest_size=16)
        meta[side] = {"documents": int(mine.sum()), "digest": marks.hexdigest()}
    empty = sum(one.empty for one in scanned)
    about = {
        "name": f"token files {source}",
        "license": "unstated: local files",
        "bytes": int(sum(file.ids.nbytes for file in files)),
        "skipped": {"document without any id": empty} if empty else {},
    }
    write_meta(folder, meta | {"about": about})


def _first_documents(
    files: list[IdFile], scanned: list[FileDocuments], limit: int | None
) -> np.ndarray:
    """Returns which documents are used, bool [documents]: the first, and all of val files."""
    named = _of_named_files(files, scanned)
    return named | (np.cumsum(~named) <= (len(named) if limit is None else limit))


def _of_named_files(files: list[IdFile], scanned: list[FileDocuments]) -> np.ndarray:
    """Returns which documents are of files called val, where others are not; bool [documents]."""
    named = [bool(_VALIDATES.search(file.path.stem.lower())) for file in files]
    return np.concatenate(
        [
            np.full(len(one.first), val and not all(named))
            for one, val in zip(scanned, named, strict=True)
        ]
    )


def _validates(files: list[IdFile], scanned: list[FileDocuments]) -> np.ndarray:
    """Returns which documents validate, bool [documents]: those of files called val, or by hash."""
    named = _of_named_files(files, scanned)
    if named.any():
        return named
    return np.concatenate([one.positions for one in scanned]) < VALIDATION


def _opened(path: Path, files: Iterable[IdFile], tokenizer: Tokenizer) -> TokenFolder | None:
    """Opens the index in a folder, or returns None where there is no whole one."""
    ids = JoinedIds(file.ids for file in files)
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        train, validation = (_side(path, side, meta[side], ids, tokenizer) for side in SIDES)
        about = meta["about"]
        return TokenFolder(path, train, validation, tokenizer.vocab_size, tokenizer.end_id, about)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def _side(path: Path, side: Side, entry: dict[str, Any], ids: Ids, tokenizer: Tokenizer) -> Tokens:
    """Maps one side of the index. ValueError where an array is not as long as meta.json says."""
    starts, sizes, first = (
        np.load(path / f"{side}.{what}.npy", mmap_mode="r", allow_pickle=False)
        for what in ("starts", "sizes", "first")
    )
    count = entry["documents"]
    if (len(starts), len(sizes), len(first)) != (count + 1, count, count):
        raise ValueError(f"{path}: got {len(sizes)} documents, expected {count}")
    view = DocumentIds(ids, first, starts, tokenizer.begin_id)
    return Tokens(view, starts, sizes, tokenizer.end_id, entry["digest"])
