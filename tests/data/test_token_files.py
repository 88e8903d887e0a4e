"""Tests token_files.py: files as other tools write them, read by map, and refused where damaged."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data import token_files, tokenizer
from rorqual.data.stream import Stream, validation_batches
from rorqual.data.token_files import MAGIC, open_file, open_token_files
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tokens import TokenFolder, Tokens

CODES = {"u1": 1, "i2": 3, "i4": 4, "i8": 5, "u2": 8}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer.train(["the sea is deep"] * 9, 270)


@pytest.fixture(scope="module")
def two_ended(words: Tokenizer) -> Tokenizer:
    """A tokenizer whose begin is not its end."""
    backend = type(words.backend).from_str(words.backend.to_str())
    backend.add_special_tokens(["<begin>"])
    return Tokenizer(backend, words.settings | {"bos_token": "<begin>"})


def write_raw(path: Path, documents: list[list[int]], end: int, dtype: str = "<u2") -> Path:
    np.array([i for ids in documents for i in (*ids, end)], dtype=dtype).tofile(path)
    return path


def write_megatron(
    path: Path, documents: list[list[list[int]]], dtype: str = "u2", modes: bool = False
) -> Path:
    """Writes documents of sequences; byte by byte as Megatron's documentation has it."""
    sequences = [ids for document in documents for ids in document]
    lengths = [len(ids) for ids in sequences]
    np.array([i for ids in sequences for i in ids], dtype=f"<{dtype}").tofile(path)
    pointers = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    bounds = np.cumsum([0, *map(len, documents)])
    head = MAGIC + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(bounds))
    arrays = [np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(bounds, "<i8")]
    arrays += [np.zeros(len(sequences), "i1")] * modes
    path.with_suffix(".idx").write_bytes(head + b"".join(a.tobytes() for a in arrays))
    return path


def read(side: Tokens) -> list[list[int]]:
    return [side.ids[a:b].tolist() for a, b in zip(side.starts, side.starts[1:], strict=False)]


def opened(source: Path, used: Tokenizer, tmp_path: Path, **options) -> TokenFolder:
    return open_token_files(str(source), used, tmp_path / "cache", name="words", **options)


def texts_of(count: int, used: Tokenizer) -> list[list[int]]:
    return [used.encode(f"the sea is deep {i}") for i in range(count)]


def test_every_form_gives_the_same_documents(tmp_path: Path, words: Tokenizer) -> None:
    """And the same sides, whatever holds the ids."""
    documents = texts_of(150, words)
    for name in ("raw", "wide", "npy", "llm_c", "megatron", "eod", "pieces"):
        (tmp_path / name).mkdir()
    end = words.end_id
    flat = np.array([i for ids in documents for i in (*ids, end)])
    write_raw(tmp_path / "raw" / "a.bin", documents, end)
    write_raw(tmp_path / "wide" / "a.npy", documents, end, "<u4")
    np.save(tmp_path / "npy" / "a.npy", flat.astype(np.int32))
    header = np.zeros(256, "<i4")
    header[:3] = (20240520, 1, len(flat))
    (tmp_path / "llm_c" / "a.bin").write_bytes(header.tobytes() + flat.astype("<u2").tobytes())
    write_megatron(tmp_path / "megatron" / "a.bin", [[ids] for ids in documents])
    write_megatron(tmp_path / "eod" / "a.bin", [[[*ids, end]] for ids in documents], "i4", True)
    write_megatron(tmp_path / "pieces" / "a.bin", [[ids[:2], [], ids[2:]] for ids in documents])
    expected: list[list[int]] | None = None
    for name in ("raw", "wide", "npy", "llm_c", "megatron", "eod", "pieces"):
        dtype = "uint32" if name == "wide" else "auto"
        folder = opened(tmp_path / name, words, tmp_path, dtype=dtype)
        together = [*read(folder.train), *read(folder.validation)]
        assert sorted(together) == sorted([words.begin_id, *ids] for ids in documents)
        assert 1 <= folder.validation.documents < 15
        for side in (folder.train, folder.validation):
            assert side.sizes.tolist() == [
                len(words.decode(ids[1:]).encode()) for ids in read(side)
            ]
        expected = expected or read(folder.validation)
        assert read(folder.validation) == expected
    by_prefix = opened(tmp_path / "megatron" / "a", words, tmp_path)
    by_index = opened(tmp_path / "megatron" / "a.idx", words, tmp_path)
    assert by_prefix.train.digest == by_index.train.digest


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 255), max_size=7), min_size=2, max_size=9),
    piece=st.integers(1, 12),
    has_last_end=st.booleans(),
)
def test_documents_of_any_length_in_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    piece: int,
    has_last_end: bool,
) -> None:
    """Including empty ones, which are left out and counted."""
    tmp_path = tmp_path_factory.mktemp("files")
    used = tokenizer.train(["the sea"] * 9, 270)
    raw = write_raw(tmp_path / "raw.bin", documents, used.end_id)
    if not has_last_end:
        raw.write_bytes(raw.read_bytes()[:-2] + struct.pack("<H", 7) * (not documents[-1]))
        documents[-1] = documents[-1] or [7]
    megatron = write_megatron(tmp_path / "megatron.bin", [[ids] for ids in documents])
    full = [ids for ids in documents if ids]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "PIECE", piece)
        files = [open_file(path, 270) for path in (raw, megatron) if path.stat().st_size]
        for file in files:
            scanned = token_files.scan(file, used, "words")
            ids = [
                file.ids[a : a + n].tolist()
                for a, n in zip(scanned.first, scanned.lengths, strict=True)
            ]
            assert ids == full
            assert scanned.empty == len(documents) - len(full)
            assert scanned.sizes.tolist() == [
                sum(len(used.backend.id_to_token(i)) for i in one) for one in full
            ]


def test_begin_is_neither_lost_nor_doubled(tmp_path: Path, two_ended: Tokenizer) -> None:
    documents = texts_of(60, two_ended)
    plain = write_raw(tmp_path / "plain.bin", documents, two_ended.end_id)
    begun = [[two_ended.begin_id, *ids] for ids in documents]
    begun_path = write_raw(tmp_path / "begun.bin", begun, two_ended.end_id)
    first, second = (opened(path, two_ended, tmp_path) for path in (plain, begun_path))
    for name in ("train", "validation"):
        sides = [getattr(folder, name) for folder in (first, second)]
        assert read(sides[0]) == read(sides[1])
        assert {ids[0] for ids in read(sides[0])} == {two_ended.begin_id}
        batches = list(validation_batches(sides[0], 2, 8))
        labels = [i for batch in batches for i in batch["labels"].reshape(-1).tolist()]
        assert labels.count(two_ended.end_id) == sides[0].documents
        assert two_ended.begin_id not in labels


def test_a_file_called_val_validates_and_the_others_train(tmp_path: Path, words: Tokenizer) -> None:
    """As nanoGPT names them; a text without any end is one document."""
    folder = tmp_path / "shakespeare"
    folder.mkdir()
    for name, text in (("train", "the sea is deep " * 20), ("val", "is the sea deep")):
        np.array(words.encode(text), "<u2").tofile(folder / f"{name}.bin")
    made = opened(folder, words, tmp_path)
    assert (made.train.documents, made.validation.documents) == (1, 1)
    assert words.decode(read(made.validation)[0][1:]) == "is the sea deep"
    batch = next(Stream(made.train, 2, 8))
    assert batch["ids"].shape == (2, 8)
    (folder / "val.bin").rename(folder / "fineweb_val_000000.bin")
    assert read(opened(folder, words, tmp_path).validation) == read(made.validation)
    (folder / "fineweb_val_000000.bin").unlink()
    with pytest.raises(ValueError, match=r"got 1 documents, none to .* on, .* a file called val"):
        opened(folder, words, tmp_path)


def test_a_limit_does_not_cut_a_file_called_val(tmp_path: Path, words: Tokenizer) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    write_raw(folder / "train.bin", texts_of(50, words), words.end_id)
    write_raw(folder / "val.bin", texts_of(12, words), words.end_id)
    for limit in (9, 60):
        made = opened(folder, words, tmp_path, limit=limit)
        assert (made.train.documents, made.validation.documents) == (min(limit, 50), 12)


def test_a_file_is_scanned_once(
    tmp_path: Path, words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_raw(tmp_path / "a.bin", texts_of(50, words), words.end_id)
    first = opened(path, words, tmp_path)
    monkeypatch.setattr(token_files, "scan", None)
    again = opened(path, words, tmp_path)
    assert again.train.digest == first.train.digest
    limited = write_raw(tmp_path / "b.bin", texts_of(50, words)[:9], words.end_id)
    monkeypatch.undo()
    assert read(opened(limited, words, tmp_path).train) == read(
        opened(path, words, tmp_path, limit=9).train
    )
    (first.path / "train.starts.npy").write_bytes(b"")
    assert opened(path, words, tmp_path).train.digest == first.train.digest


def broken(change: Callable[[bytes], bytes], which: str = "a.idx") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_megatron(folder / "a.bin", [[[1, 2, 3]], [[4, 5], [6]]])
        (folder / which).write_bytes(change((folder / which).read_bytes()))

    return write


def header(version: int = 1, code: int = 8, sequences: int = 3, bounds: int = 3) -> bytes:
    return MAGIC + struct.pack("<QBQQ", version, code, sequences, bounds)


def later(index: int, value: int, kind: str) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        packed = struct.pack(kind, value)
        return content[:index] + packed + content[index + len(packed) :]

    return change


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: (f / "a.bin").write_bytes(b""), "got 0 bytes of ids, expected a positive mult"),
        (lambda f: (f / "a.bin").write_bytes(b"\1\0\2"), "got 3 bytes .* it is cut"),
        (lambda f: np.array([1, 70, 999], "<u2").tofile(f / "a.bin"), "got id 999 at position 2, "),
        (lambda f: np.save(f / "a.npy", np.array([1, -1])), "got id -1 at position 1"),
        (
            lambda f: np.save(f / "a.npy", np.ones((2, 2), int)),
            r"shape \(2, 2\), expected integers",
        ),
        (lambda f: np.save(f / "a.npy", np.ones(3)), "got float64 .* expected integers"),
        (
            lambda f: np.save(f / "a.npy", np.array([Path], object), allow_pickle=True),
            "expected a whole .npy file of integers",
        ),
        (
            lambda f: (f / "a.bin").write_bytes(
                struct.pack("<256i", 20240520, 1, 9, *[0] * 253) + b"\1\0" * 4
            ),
            "got 4 ids, expected the 9 that its header names",
        ),
        (broken(lambda b: b"MMIDIDY" + b[7:]), "no index of Megatron"),
        (broken(lambda b: b[:20]), "got 20 bytes, expected 34 of a header"),
        (
            broken(lambda b: b[:-1]),
            "expected 94 of 3 sequences and 3 bounds of documents: it is cut",
        ),
        (broken(lambda b: header(version=2) + b[34:]), "got version 2 and dtype 8"),
        (broken(lambda b: header(code=7) + b[34:]), "got version 1 and dtype 7"),
        (broken(lambda b: header(sequences=2**62) + b[34:]), "it is cut"),
        (broken(later(34, -3, "<i")), "got sequences that do not follow each other"),
        (broken(later(34 + 12 + 8, 3, "<q")), "got sequences that do not follow each other"),
        (broken(later(34 + 36 + 8, 9, "<q")), "got bounds of documents that do not rise from 0 to"),
        (broken(lambda b: b[:-2], "a.bin"), "got 5 ids, expected the 6 of a.idx"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, words: Tokenizer, write: Callable[[Path], None], message: str
) -> None:
    (tmp_path / "ids").mkdir()
    write(tmp_path / "ids")
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "ids", words, tmp_path)
    assert not list((tmp_path / "cache").glob("*/meta.json"))


def test_ids_of_four_bytes_are_not_read_as_two(tmp_path: Path, words: Tokenizer) -> None:
    path = write_raw(tmp_path / "train.bin", [[7, 8, 9]] * 50, words.end_id, "<u4")
    with pytest.raises(ValueError, match=r"every second is 0, .* --data.token-dtype uint32"):
        open_file(path, words.vocab_size)
    assert open_file(path, words.vocab_size, "uint32").ids[:3].tolist() == [7, 8, 9]


def test_hostile_sizes_are_refused(tmp_path: Path, words: Tokenizer) -> None:
    path = write_megatron(tmp_path / "a.bin", [[[1, 2]], [[3]], [[4]], [[5]]])
    index = path.with_suffix(".idx")
    # Their differences wrap around to positive numbers.
    bounds = np.array([0, 2**63 - 1, -(2**63), -1, 4], "<i8")
    index.write_bytes(index.read_bytes()[: -bounds.nbytes] + bounds.tobytes())
    with pytest.raises(ValueError, match="bounds of documents that do not rise"):
        open_file(path, words.vocab_size)
    array = tmp_path / "b.npy"
    np.save(array, np.arange(9, dtype=np.uint16))
    for length in (2**62, 2**70):
        text = array.read_bytes().replace(b"(9,)", f"({length},)".encode())
        (tmp_path / "c.npy").write_bytes(text)
        with pytest.raises(ValueError, match=r"expected a whole .npy file"):
            open_file(tmp_path / "c.npy", words.vocab_size)


def test_another_index_is_another_source(tmp_path: Path, words: Tokenizer) -> None:
    ids = [[5, 6], [7], [8, 9]]
    write_megatron(tmp_path / "a.bin", [[one] for one in ids * 4])
    first = opened(tmp_path / "a.bin", words, tmp_path)
    write_megatron(tmp_path / "a.bin", [ids] * 4)
    again = opened(tmp_path / "a.bin", words, tmp_path)
    count = first.train.documents + first.validation.documents
    assert (count, again.train.documents + again.validation.documents) == (12, 4)
