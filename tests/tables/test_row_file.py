"""Tests that sound files open, and that damaged ones are refused or reported."""

import itertools
import json
import os
import pathlib
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rorqual.tables import Table, TableError, dequantise, quantise, verify, write_table
from rorqual.tables.row_file import checksums, read_rows

pytestmark = pytest.mark.engram

FP8 = torch.float8_e4m3fn
ROWS = 101
WIDTH = 7


def damage(
    path: pathlib.Path, header: dict | str | bytes, data: bytes = bytes(24), size: int | None = None
) -> None:
    raw = (
        header
        if isinstance(header, bytes)
        else (header if isinstance(header, str) else json.dumps(header)).encode()
    )
    path.write_bytes(struct.pack("<Q", len(raw) if size is None else size) + raw + data)


def entry(**changes: object) -> dict:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


ENTRY = json.dumps(entry())


@pytest.mark.parametrize(
    ("header", "size", "reason"),
    [
        ({"rows": entry()}, 2**63, "got a header of 9223372036854775808 bytes"),
        ({"rows": entry()}, 10**6, "expected at most"),
        ({"rows": entry()}, 7, "no JSON object"),
        ("[]", None, "is a list"),
        ("null", None, "is a NoneType"),
        ("{", None, "no JSON object"),
        ("[" * 100_000, None, "no JSON object"),
        (b"\xff\xfe", None, "no JSON object"),
        (f'{{"rows": {ENTRY}, "rows": {ENTRY}}}', None, "stands twice"),
        ({"rows": 3}, None, "without exactly"),
        ({"rows": {"dtype": "F32", "shape": [2, 3]}}, None, "without exactly"),
        ({"rows": entry(more=1)}, None, "without exactly"),
        ({"rows": entry(shape=[2, -3])}, None, "expected counts from 0"),
        ({"rows": entry(shape=[2, 3.0])}, None, "expected counts from 0"),
        ({"rows": entry(shape=[True, 6])}, None, "expected counts from 0"),
        ({"rows": entry(shape="23")}, None, "expected counts from 0"),
        ({"rows": entry(shape=[3, 3])}, None, "expected F32 of shape"),
        ({"rows": entry(dtype=["F32"])}, None, "expected counts from 0"),
        ({"rows": entry(dtype="F16")}, None, "got 'rows' as F16"),
        ({"rows": entry(dtype="BF16")}, None, "expected BF16 of shape"),
        ({"rows": entry(shape=[6])}, None, "expected rows by width"),
        ({"rows": entry(data_offsets=[24, 0])}, None, "got bytes 24 to 0"),
        ({"rows": entry(data_offsets=[0, 24, 24])}, None, "expected counts from 0"),
        ({"rows": entry(data_offsets=[8, 32])}, None, "gap or overlap"),
        ({"rows": entry(), "more": entry()}, None, "gap or overlap"),
        ({"rows": entry(shape=[1, 3], data_offsets=[0, 12])}, None, "cut or lengthened"),
        ({"rows": entry(shape=[4, 3], data_offsets=[0, 48])}, None, "cut or lengthened"),
        ({"row": entry()}, None, "got tensors row, expected 'rows'"),
        ({"__metadata__": {"a": 1}, "rows": entry()}, None, "metadata"),
        ({"__metadata__": [], "rows": entry()}, None, "metadata"),
        (
            {"__metadata__": {"xxh3_header": "\ud800"}, "rows": entry()},
            None,
            "not as it was written",
        ),
        ({"rows": entry(shape=[1] * 65)}, None, "expected counts from 0"),
        ({"rows": entry(shape=[-1] * 10_000)}, None, "expected counts from 0"),
        ({"rows": entry(shape=[1, 6, *[1] * 50])}, None, "expected rows by width"),
        ({"a\n\ud800" * 1000: entry()}, None, "expected 'rows'"),
        ({"a\n" * 1000: 3}, None, "without exactly"),
        ({"rows": entry(dtype="F\n" * 1000)}, None, "expected rows by width"),
        ({"rows": entry(dtype="F\n" * 1000, data_offsets=[24, 0])}, None, "got bytes 24 to 0"),
        (f'{{"rows": {ENTRY[:-1]}, "shape": [{"9" * 5000}]}}}}', None, "no JSON object"),
    ],
)
def test_malformed_files_are_refused(
    header, size: int | None, reason: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "bad.safetensors"
    damage(path, header, size=size)
    with pytest.raises(TableError, match=reason) as caught:
        Table.of_file(path)
    assert str(path) in str(caught.value)
    # The message is one line.
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(path)) + 300


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: pathlib.Path) -> None:
    """Tests a folder, and a pipe without a writer, in the place of a shard."""
    (tmp_path / "a.safetensors").mkdir()
    os.mkfifo(tmp_path / "b.safetensors")
    for path in (tmp_path, tmp_path / "b.safetensors"):
        with pytest.raises(
            TableError, match=r"[ab].safetensors: got a folder, a device or a pipe, expected a"
        ):
            Table.of_file(path)


def test_a_disk_that_cannot_read_is_a_refusal(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading fails within the header, and within the rows."""
    folder = write_table(tmp_path / "t", torch.randn(4, 3))
    read = os.preadv
    # The size of the header and the header are two reads.
    for good in (0, 2):
        left = [True] * good

        def failing(*arguments: object, left: list[bool] = left) -> int:
            if left:
                left.pop()
                return read(*arguments)
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing)
            with pytest.raises(
                TableError, match=r"table-00001-of-00001.safetensors: Input/output error"
            ):
                verify(folder)
    assert verify(folder) == []


def test_sound_file_of_the_same_making_opens(tmp_path: pathlib.Path) -> None:
    damage(tmp_path / "good.safetensors", {"rows": entry()})
    table = Table.of_file(tmp_path / "good.safetensors")
    assert torch.equal(table.prefetch(torch.tensor([1])).wait(), torch.zeros(1, 3))


@pytest.mark.parametrize("content", [b"", b"1234567", b"12345678"])
def test_fragments_are_refused(content: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(TableError):
        Table.of_file(path)
    with pytest.raises(TableError, match="No such file"):
        Table.of_file(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TableError, match="without"):
        Table.of_file(tmp_path / "empty")


def mutated(kind: str, raw: bytes, draw: np.random.Generator) -> bytes:
    """Returns the bytes of a file of one table with one kind of damage."""
    head = 8 + struct.unpack("<Q", raw[:8])[0]
    position = int(draw.integers(head))
    other = bytearray(raw)
    if kind == "flip":
        other[position] ^= 1 << int(draw.integers(8))
    elif kind == "cut within the header":
        del other[position]
    elif kind == "insert":
        other.insert(position, int(draw.integers(256)))
    elif kind == "cut":
        del other[int(draw.integers(len(raw))) :]
    elif kind == "lengthen":
        other += draw.bytes(int(draw.integers(1, 99)))
    elif kind == "junk":
        return draw.bytes(int(draw.integers(300)))
    elif kind == "giant header":
        other[:8] = struct.pack("<Q", int(draw.integers(head, 2**63)))
    else:
        words = {
            "dtype": (
                b'"F32"',
                draw.choice([b'"F64"', b'"F16"', b'"U8"', b'"BF16"', b'"I32"', b"F32"]),
            ),
            "shape": (
                b"[5, 3]",
                draw.choice([b"[3, 5]", b"[5, 4]", b"[6, 3]", b"[15]", b"[0, 3]", b"[-5, -3]"]),
            ),
            "offsets": (
                b"[0, 60]",
                draw.choice([b"[0, 59]", b"[4, 64]", b"[60, 0]", b"[0, 61]", b"[60]"]),
            ),
        }
        header = raw[8:head].replace(*words[kind])
        return struct.pack("<Q", len(header)) + header + raw[head:]
    return bytes(other)


def refusal(folder: pathlib.Path) -> str | None:
    """Returns the message with which a table is refused, or None if it opens."""
    try:
        Table.of_file(folder)
    except TableError as error:
        return str(error)
    return None


KINDS = (
    *(
        "flip",
        "cut within the header",
        "insert",
        "cut",
        "lengthen",
        "junk",
        "giant header",
        "dtype",
        "shape",
    ),
    *("offsets", "missing", "doubled"),
)


def test_a_thousand_harmed_tables_are_refused_before_the_first_row(tmp_path: pathlib.Path) -> None:
    """Each is refused with a TableError that names the table and a reason."""
    folder = write_table(tmp_path / "t", torch.randn(20, 3), shard_rows=5)
    shards = {file: file.read_bytes() for file in sorted(folder.glob("*"))}
    draw = np.random.default_rng(0)
    read = []
    for turn in range(1008):
        kind = KINDS[turn % len(KINDS)]
        victim = list(shards)[int(draw.integers(4))]
        extra = folder / "z.safetensors"
        if kind == "missing":
            victim.unlink()
        elif kind == "doubled":
            extra.write_bytes(shards[victim])
        else:
            victim.write_bytes(mutated(kind, shards[victim], draw))
        if (
            (reason := refusal(folder)) is None
            or str(folder) not in reason
            or len(reason) < len(str(folder)) + 20
        ):
            read.append((turn, kind, reason, victim.exists() and victim.read_bytes()))
        extra.unlink(missing_ok=True)
        victim.write_bytes(shards[victim])
    assert read == []
    assert refusal(folder) is None


def test_shards_missing_doubled_or_of_another_table_are_refused(tmp_path: pathlib.Path) -> None:
    folder = write_table(tmp_path / "t", torch.randn(10, 3), shard_rows=3)
    shards = sorted(folder.glob("*"))
    assert [shard.name for shard in shards] == [
        f"table-0000{n}-of-00004.safetensors" for n in range(1, 5)
    ]
    cached = {shard: shard.read_bytes() for shard in shards}

    def refused(reason: str) -> None:
        with pytest.raises(TableError, match=reason):
            Table.of_file(folder)
        for file in folder.glob("*"):
            file.unlink()
        for shard, content in cached.items():
            shard.write_bytes(content)

    shards[1].unlink()
    refused("expected rows from 3: a shard missing or doubled")
    shards[3].unlink()
    refused("expected 10: the last ones are missing")
    (folder / "table-copy.safetensors").write_bytes(cached[shards[0]])
    refused("expected rows from 3: a shard missing or doubled")
    save_file({"rows": torch.randn(3, 3)}, shards[2])
    refused("no first_row")
    save_file(
        {"rows": torch.randn(3, 3)}, shards[2], {"first_row": "9" * 5000, "rows_in_all": "10"}
    )
    refused("no first_row")
    save_file({"rows": torch.randn(3, 4)}, shards[2], {"first_row": "6", "rows_in_all": "10"})
    refused("another table")
    save_file({"rows": torch.randn(3, 3)}, shards[2], {"first_row": "6", "rows_in_all": "11"})
    refused("another table")
    assert Table.of_file(folder).rows == 10


def test_rows_keep_their_order_whatever_their_files_are_called(tmp_path: pathlib.Path) -> None:
    values = torch.randn(10, 3)
    folder = write_table(tmp_path / "t", values, shard_rows=3)
    for file, letter in zip(sorted(folder.glob("*")), "cadb", strict=True):
        file.rename(folder / f"{letter}.safetensors")
    table = Table.of_file(folder)
    assert torch.equal(table.prefetch(torch.arange(10)).wait(), values)
    assert verify(folder) == []
    table.close()


def test_opening_a_refused_folder_leaves_no_file_open(tmp_path: pathlib.Path) -> None:
    folder = write_table(tmp_path / "t", torch.randn(10, 3), shard_rows=3)
    (folder / "z.safetensors").write_bytes(b"junk")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(5):
        with pytest.raises(TableError):
            Table.of_file(folder)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ([2, 66], {"format": None}),
        ([2, 66], {"format": "fp8-e5m2"}),
        ([2, 66], {"width": None}),
        ([2, 66], {"width": "66"}),
        ([2, 66], {"width": "x"}),
        ([2, 67], {"width": "64"}),
        ([2, 32], {"width": "31"}),
    ],
)
def test_bytes_without_a_fitting_format_are_refused(
    shape: list[int], changes: dict, tmp_path: pathlib.Path
) -> None:
    text = {"format": "fp8-e4m3-e8m0-32", "width": "64", "first_row": "0", "rows_in_all": "2"}
    text = {name: word for name, word in (text | changes).items() if word is not None}
    save_file({"rows": torch.zeros(shape, dtype=torch.uint8)}, tmp_path / "bad.safetensors", text)
    with pytest.raises(
        TableError, match=r"bad.safetensors: got \d+-byte rows.*expected 'fp8-e4m3-e8m0-32'"
    ):
        Table.of_file(tmp_path)


def test_shards_of_other_formats_are_of_another_table(tmp_path: pathlib.Path) -> None:
    folder = write_table(tmp_path / "t", torch.randn(10, 64), dtype=FP8, shard_rows=5)
    last = sorted(folder.glob("*"))[1]
    save_file({"rows": torch.zeros(5, 66)}, last, {"first_row": "5", "rows_in_all": "10"})
    with pytest.raises(TableError, match="another table"):
        Table.of_file(folder)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_among_the_rows_is_found_in_its_block(
    data: st.DataObject, tmp_path_factory
) -> None:
    """Flips bits in shards of 2.5 MiB.

    Each reported range of rows contains the damaged one, and is no larger than its MiB.
    """
    folder = write_table(
        tmp_path_factory.mktemp("table") / "t", torch.zeros(1500, 1000), shard_rows=650
    )
    files = sorted(folder.glob("*"))
    assert verify(folder) == []
    hits = data.draw(
        st.lists(
            st.tuples(st.integers(0, 1499), st.integers(0, 4000 * 8 - 1)), min_size=1, max_size=3
        )
    )
    for row, bit in set(hits):
        path = files[row // 650]
        within = row % 650
        rows = min(650, 1500 - row // 650 * 650)
        raw = bytearray(path.read_bytes())
        raw[len(raw) - rows * 4000 + within * 4000 + bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
    is_damaged = verify(folder)
    for row, bit in set(hits):
        block = (row % 650 * 4000 + bit // 8) >> 20
        first = row // 650 * 650 + (block << 20) // 4000
        assert any(
            each.path == files[row // 650] and each.rows.start == first and row in each.rows
            for each in is_damaged
        )
    assert len(is_damaged) <= len(set(hits))
    assert all(len(each.rows) <= (1 << 20) // 4000 + 2 for each in is_damaged)


def test_every_flipped_bit_of_a_file_is_found(tmp_path: pathlib.Path) -> None:
    """Every flipped bit of the header and of the rows leads to a refusal or a report."""
    (path,) = write_table(tmp_path / "t", torch.randn(1, 32), dtype=FP8).glob("*")
    whole = path.read_bytes()

    def is_damaged() -> bool:
        try:
            return bool(verify(path.parent))
        except TableError as error:
            return str(path.parent) in str(error)

    assert not is_damaged()
    missed = []
    for index in range(len(whole)):
        for bit in range(8):
            raw = bytearray(whole)
            raw[index] ^= 1 << bit
            path.write_bytes(raw)
            if not is_damaged():
                missed.append((index, bit, bytes(raw[max(0, index - 9) : index + 9])))
    assert missed == []


def test_files_without_checksums_cannot_be_verified(tmp_path: pathlib.Path) -> None:
    save_file(
        {"rows": torch.randn(3, 3)},
        tmp_path / "a.safetensors",
        {"first_row": "0", "rows_in_all": "3"},
    )
    with pytest.raises(
        TableError, match="got no checksum for each MiB, expected a file that write_table wrote"
    ):
        verify(tmp_path)
    with pytest.raises(TableError, match="No such file"):
        verify(tmp_path / "none")


def test_systems_without_positional_reads_read_and_write_the_same(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, checksums and written files are those of a system with preadv and pwrite.

    Threads take turns there.
    """
    values = torch.randn(1003, 7)
    folder = write_table(tmp_path / "t", values, shard_rows=400)
    names = [name for name in dir(os) if name.startswith(("pread", "pwrite", "posix_fadvise"))]
    assert "preadv" in names or sys.platform == "win32"
    monkeypatch.setenv("RORQUAL_KERNELS", "reference")
    for name in names:
        monkeypatch.delattr(os, name)
    table = Table.of_file(folder, cache_bytes=0)
    ids = [torch.randint(1003, (50,)) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for rows, got in zip(
            ids, pool.map(lambda rows: table.prefetch(rows).wait(), ids), strict=True
        ):
            assert torch.equal(got, values[rows])
    table.file.drop_page_cache()
    table.file.fill_page_cache()
    table.close()
    assert verify(folder) == []


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 3 << 20), max_size=6), size=st.integers(0, 3 << 20))
def test_checksums_are_those_of_each_mib_however_it_comes(cuts: list[int], size: int) -> None:
    raw = bytes(size)
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    pieces = [memoryview(raw)[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    expected = [
        xxhash.xxh3_64_hexdigest(raw[start : start + (1 << 20)])
        for start in range(0, size, 1 << 20)
    ]
    assert list(checksums(pieces)) == expected


def test_any_matrix_of_any_safetensors_file_is_a_table(tmp_path: pathlib.Path) -> None:
    weight = torch.randn(ROWS, WIDTH)
    path = tmp_path / "model.safetensors"
    save_file(
        {"a": torch.ones(3, dtype=torch.int8), "tables.0.weight": weight, "z": torch.ones(2, 2)},
        path,
    )
    table = Table.of_file(path, name="tables.0.weight")
    assert torch.equal(table.prefetch(torch.arange(ROWS)).wait(), weight)
    for name, reason in (("rows", "expected 'rows'"), ("a", "expected rows by width")):
        with pytest.raises(TableError, match=reason):
            Table.of_file(path, name=name)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_that_lie_apart_and_together_are_the_ones_asked_for(
    data: st.DataObject, tmp_path_factory
) -> None:
    """Reads rows of 400 bytes in shards: adjacent, a few apart, a page apart, in other shards."""
    values = torch.arange(300).view(300, 1) + torch.arange(100) / 128
    rows = data.draw(st.integers(1, 320))
    table = Table.of_file(
        write_table(tmp_path_factory.mktemp("table") / "t", values, shard_rows=rows), cache_bytes=0
    )
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 299), min_size=1, max_size=60)))
    assert torch.equal(table.prefetch(ids).wait(), values[ids])
    table.close()


@pytest.mark.parametrize("count", [3, 64, 65, 3000])
def test_rows_that_the_system_does_not_hold_are_waited_for(
    count: int, tmp_path: pathlib.Path
) -> None:
    """Reads few rows and many, near and apart, after the page cache was dropped."""
    values = torch.randn(6000, 300)
    (path,) = write_table(tmp_path / "t", values).glob("*")
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    table = Table.of_file(path.parent, cache_bytes=0, prefetch=False)
    ids = torch.randperm(6000)[:count]
    assert torch.equal(table.prefetch(ids).wait(), values[ids])
    table.close()


def test_hot_rows_of_fp8_cost_their_record(tmp_path: pathlib.Path) -> None:
    records = quantise(torch.randn(ROWS, 64))
    table = Table.of_file(write_table(tmp_path / "t", records), cache_bytes=2 * 66, prefetch=False)
    for ids, hits in (([1, 2], 0), ([1, 2], 2), ([3], 2), ([2], 3), ([3], 4)):
        assert torch.equal(table.prefetch(torch.tensor(ids)).wait(), dequantise(records, 64)[ids])
        assert table.metrics()["hits"] == hits, ids
    assert table.metrics()["bytes"] == 3 * 66
    table.close()


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_file_cut_while_serving_fails_the_call_and_no_more(
    prefetch: bool, tmp_path: pathlib.Path
) -> None:
    values = torch.randn(10, 3)
    folder = write_table(tmp_path / "t", values)
    (path,) = folder.glob("*.safetensors")
    table = Table.of_file(folder, cache_bytes=0, prefetch=prefetch)
    os.truncate(path, path.stat().st_size - 5)
    pending = table.prefetch(torch.tensor([9]))
    with pytest.raises(TableError, match=r"got 7 bytes of row 9, expected 12"):
        pending.wait()
    assert torch.equal(table.prefetch(torch.tensor([0, 8])).wait(), values[[0, 8]])
    # An open file stays readable.
    path.unlink()
    assert torch.equal(table.prefetch(torch.tensor([1])).wait(), values[1:2])
    table.close()
    with pytest.raises(TableError, match="closed"):
        table.prefetch(torch.tensor([1])).wait()


def test_a_cut_names_the_first_row_that_is_lost(tmp_path: pathlib.Path) -> None:
    values = torch.randn(10, 3)
    (path,) = write_table(tmp_path / "t", values).glob("*.safetensors")
    table = Table.of_file(path.parent, cache_bytes=0, prefetch=False)
    os.truncate(path, path.stat().st_size - 3 * 12 - 5)
    with pytest.raises(TableError, match=r"got 7 bytes of row 6, expected 12"):
        table.prefetch(torch.arange(10)).wait()
    assert torch.equal(table.prefetch(torch.arange(6)).wait(), values[:6])
    table.close()


def test_files_replaced_fifty_times_while_serving(tmp_path: pathlib.Path) -> None:
    """Cuts, replaces and unlinks files in turn.

    A call that needs lost rows fails; the process and the next table are not affected.
    """
    values = torch.randn(100, 16)
    for turn in range(50):
        folder = write_table(tmp_path / str(turn), values)
        (path,) = folder.glob("*.safetensors")
        table = Table.of_file(folder, cache_bytes=0, prefetch=bool(turn % 2))
        ids = torch.randint(100, (40,))
        pending = table.prefetch(ids)
        if turn % 3 == 0:
            pending.wait()
            os.truncate(path, path.stat().st_size - 1)
            with pytest.raises(TableError, match="row 99"):
                table.prefetch(torch.tensor([99])).wait()
        elif turn % 3 == 1:
            fresh = write_table(tmp_path / f"{turn} anew", values + 1)
            next(fresh.glob("*")).replace(path)
        else:
            path.unlink()
        if turn % 3:
            assert torch.equal(pending.wait(), values[ids])
            assert torch.equal(table.prefetch(ids).wait(), values[ids])
        table.close()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_small_batches_are_right_and_counted(data: st.DataObject, tmp_path_factory) -> None:
    """Checks the rows and the metrics of small batches.

    There are duplicates, shards, and cached rows that are evicted or frozen.
    """
    values = torch.arange(90).view(90, 1) + torch.arange(5) / 8
    folder = write_table(
        tmp_path_factory.mktemp("t") / "t", values, shard_rows=data.draw(st.integers(7, 90))
    )
    cached = data.draw(st.sampled_from([0, 20, 60, 2000]))
    frozen = torch.tensor(data.draw(st.lists(st.integers(0, 89), max_size=4)), dtype=torch.int64)
    table = Table.of_file(folder, cache_bytes=cached, cached_rows=frozen)
    seen: set[int] = set()
    for ids in data.draw(
        st.lists(st.lists(st.integers(0, 89), min_size=1, max_size=20), max_size=5)
    ):
        before = table.metrics()
        assert torch.equal(table.prefetch(torch.tensor(ids)).wait(), values[ids])
        more = {name: value - before[name] for name, value in table.metrics().items()}
        assert (more["rows"], more["different"]) == (len(ids), len(set(ids)))
        assert more["bytes"] == (more["different"] - more["hits"]) * 20
        if cached == 2000 and not len(frozen):
            assert more["hits"] == len(seen & set(ids))
        seen |= set(ids)
    table.close()


def test_small_batches_of_cached_rows_need_no_file(tmp_path: pathlib.Path) -> None:
    """Nor do they wait for the thread; larger batches and other rows do."""
    values = torch.randn(600, 4)
    folder = write_table(tmp_path / "t", values)
    table = Table.of_file(folder, cache_bytes=300 * 16)
    table.prefetch(torch.arange(300)).wait()
    waited = table.metrics()["wait_seconds"]
    for path in folder.glob("*"):
        os.truncate(path, 1)
    ids = torch.randint(300, (4, 64))
    assert torch.equal(table.prefetch(ids).wait(), values[ids])
    assert table.metrics()["wait_seconds"] == waited
    with pytest.raises(TableError, match="of row 500"):
        table.prefetch(torch.tensor([500])).wait()
    table.close()


def test_the_page_cache_is_dropped_and_filled(tmp_path: pathlib.Path) -> None:
    values = torch.randn(3000, 300)
    table = Table.of_file(write_table(tmp_path / "t", values, shard_rows=1000), cache_bytes=0)
    ids = torch.arange(0, 3000, 40)
    for _ in range(2):
        for change in (table.file.drop_page_cache, table.file.fill_page_cache):
            change()
            assert torch.equal(table.prefetch(ids).wait(), values[ids])
    table.close()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the kernel reads with RWF_NOWAIT")
@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    row_bytes=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 200), min_size=4, max_size=4),
    steps=st.lists(st.sampled_from([-7, -1, 0, 1, 1, 1, 5, 40]), max_size=40),
    wait=st.booleans(),
)
def test_compiled_reads_are_those_of_the_reference(
    sizes: list[int],
    row_bytes: int,
    cuts: list[int],
    steps: list[int],
    wait: bool,
    tmp_path_factory,
) -> None:
    """Reads odd sizes, repeated rows, rows in no order, none, and files that were cut."""
    folder = tmp_path_factory.mktemp("raw")
    kernel = read_rows.choose()
    assert kernel is not None
    rows = sum(sizes)
    whole = np.random.default_rng(0).integers(256, size=(rows, row_bytes), dtype=np.uint8)
    first_rows = np.cumsum([0, *sizes])
    files = []
    lost = np.zeros(rows, bool)
    for n, (first, end) in enumerate(itertools.pairwise(first_rows.tolist())):
        raw = bytes(n) + whole[first:end].tobytes()
        raw = raw[: max(0, len(raw) - cuts[n])]
        (folder / str(n)).write_bytes(raw)
        files.append(os.open(folder / str(n), os.O_RDONLY))
        lost[first + max(0, len(raw) - n) // row_bytes : end] = True
    ids = np.cumsum([0, *steps])[1:] % rows
    read = []
    for function in (read_rows.reference, kernel):
        into = np.full((len(ids), row_bytes), 0xA5, np.uint8)
        starts = np.arange(len(files))
        done = function(np.array(files), starts, first_rows, ids, into, wait)
        read.append((done, into))
    for file in files:
        os.close(file)
    (expected, reference), (done, into) = read
    assert done == expected == next(iter(np.flatnonzero(lost[ids])), len(ids))
    # Bytes of a row that was read in part are the same too.
    assert np.array_equal(reference, into)
    assert np.array_equal(into[:done], whole[ids[:done]])
    if not wait:
        assert np.array_equal(into[~lost[ids]], whole[ids[~lost[ids]]])


@pytest.mark.parametrize("kernels", ["", "reference"])
def test_closed_files_give_no_row(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORQUAL_KERNELS", kernels)
    ids = np.array([0, 1])
    into = np.full((2, 3), 0xA5, np.uint8)
    for wait in (True, False):
        assert read_rows(np.array([-1]), np.array([0]), np.array([0, 9]), ids, into, wait) == 0
    assert (into == 0xA5).all()


@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("hot", [0, 40, 1 << 20])
def test_rows_in_the_page_cache_are_not_waited_for(
    kernels: str, hot: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small batches need no thread, and damage that comes later does not reach them."""
    monkeypatch.setenv("RORQUAL_KERNELS", kernels)
    values = torch.randn(1000, 5)
    folder = write_table(tmp_path / "t", values, shard_rows=300)
    threads = threading.active_count()
    table = Table.of_file(folder, cache_bytes=hot)
    pending = []
    for _ in range(20):
        ids = torch.randint(1000, (3, 16))
        ids[0, :3] = ids[1, 0]
        pending.append((ids, table.prefetch(ids)))
    for path in folder.glob("*"):
        os.truncate(path, 1)
    if hasattr(os, "RWF_NOWAIT"):
        for ids, rows in pending:
            assert torch.equal(rows.wait(), values[ids])
        assert table.metrics()["wait_seconds"] == 0
        assert threading.active_count() <= threads
    table.close()
