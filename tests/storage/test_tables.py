"""Tables, row ids and files, sound and broken, in -> the rows, the counts or the refusal that must come."""

import json
import os
import pathlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from rorqual.storage import DeviceTable, DiskTable, HostTable, TableError, measure, write_table

ROWS, WIDTH = 101, 7


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def values(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(ROWS, WIDTH).to(request.param)


def homes(values: Tensor, folder: pathlib.Path) -> list:
    device = DeviceTable(ROWS, WIDTH, dtype=values.dtype)
    device.load_state_dict({"weight": values})
    row = WIDTH * values.dtype.itemsize
    disks = [DiskTable(folder, hot_bytes=hot, prefetch=bool(hot % 2)) for hot in (0, 1, row, 13 * row, 1 << 20)]
    return [device, HostTable(values), HostTable(values, prefetch=False), *disks]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_home_gives_the_same_bits(values: Tensor, data: st.DataObject, tmp_path_factory) -> None:
    folder = write_table(tmp_path_factory.mktemp("table") / "t", values, shard_rows=data.draw(st.integers(1, 150)))
    tables = homes(values, folder)
    for _ in range(data.draw(st.integers(1, 6))):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        ids = torch.randint(ROWS, shape)
        for table in tables:
            assert torch.equal(table.request(ids).wait(), values[ids])
    for table in tables[3:]:
        table.close()


def test_several_requests_on_their_way_at_once(values: Tensor, tmp_path: pathlib.Path) -> None:
    table = DiskTable(write_table(tmp_path / "t", values), hot_bytes=200)
    ids = [torch.randint(ROWS, (5, 3)) for _ in range(40)]  # more than the queue holds
    pending = [table.request(each) for each in ids]
    for each, rows in zip(reversed(ids), reversed(pending), strict=True):
        assert torch.equal(rows.wait(), values[each])
        assert torch.equal(rows.wait(), values[each])
    table.close()


def test_gradients_of_the_device_table_are_sparse_and_exact() -> None:
    table, ids = DeviceTable(9, 3), torch.tensor([[1, 4], [4, 8]])
    grad = torch.randn(2, 2, 3)
    (table.request(ids).wait() * grad).sum().backward()
    assert table.weight.grad.is_sparse
    expected = torch.zeros(9, 3).index_add(0, ids.flatten(), grad.view(4, 3))
    torch.testing.assert_close(table.weight.grad.to_dense(), expected)
    dense = DeviceTable(9, 3, sparse=False)
    dense.request(ids).wait().sum().backward()
    assert not dense.weight.grad.is_sparse
    assert 0.015 < DeviceTable(1000, 10).weight.std() < 0.025


@pytest.mark.parametrize("bad", [-1, ROWS, 2**40, -(2**62)])
def test_ids_outside_the_table_are_refused(values: Tensor, bad: int, tmp_path: pathlib.Path) -> None:
    for table in homes(values, write_table(tmp_path / "t", values)):
        with pytest.raises(ValueError, match=f"got row id {bad}, expected 0 to {ROWS - 1}"):
            table.request(torch.tensor([[0, bad], [1, 2]]))
        assert torch.equal(table.request(torch.tensor([3])).wait(), values[3:4])


def test_hot_rows_are_counted_and_the_oldest_gives_way(tmp_path: pathlib.Path) -> None:
    values = torch.randn(ROWS, WIDTH)
    table = DiskTable(write_table(tmp_path / "t", values), hot_bytes=2 * WIDTH * 4, prefetch=False)
    for ids, hits in (([1, 1, 2], 0), ([1], 1), ([3], 1), ([2], 1), ([3], 2), ([1], 2)):
        table.request(torch.tensor(ids)).wait()
        assert table.metrics()["hits"] == hits, ids
    assert table.metrics()["rows"] == 8
    assert table.metrics()["bytes"] == 5 * WIDTH * 4
    assert DeviceTable(2, 2).metrics() == {}


def test_any_matrix_of_any_safetensors_file_is_a_table(tmp_path: pathlib.Path) -> None:
    weight = torch.randn(ROWS, WIDTH)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, dtype=torch.int8), "tables.0.weight": weight, "z": torch.ones(2, 2)}, path)
    table = DiskTable(path, name="tables.0.weight")
    assert torch.equal(table.request(torch.arange(ROWS)).wait(), weight)
    for name, reason in (("rows", "expected 'rows'"), ("a", "expected rows by width")):
        with pytest.raises(TableError, match=reason):
            DiskTable(path, name=name)


def damage(path: pathlib.Path, header: dict | str | bytes, data: bytes = bytes(24), size: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
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
    ],
)
def test_malformed_files_are_refused(header, size: int | None, reason: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bad.safetensors"
    damage(path, header, size=size)
    with pytest.raises(TableError, match=reason) as caught:
        DiskTable(path)
    assert str(path) in str(caught.value)


def test_sound_file_of_the_same_making_opens(tmp_path: pathlib.Path) -> None:
    damage(tmp_path / "good.safetensors", {"rows": entry()})
    assert torch.equal(DiskTable(tmp_path / "good.safetensors").request(torch.tensor([1])).wait(), torch.zeros(1, 3))


@pytest.mark.parametrize("content", [b"", b"1234567", b"12345678"])
def test_fragments_are_refused(content: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(TableError):
        DiskTable(path)
    with pytest.raises(TableError, match="No such file"):
        DiskTable(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TableError, match="without"):
        DiskTable(tmp_path / "empty")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_mutated_file_is_refused_or_read_within_itself(data: st.DataObject, tmp_path_factory) -> None:
    """Bytes flipped, cut or inserted in the header: a TableError at once, or a table that fits its file exactly."""
    folder = write_table(tmp_path_factory.mktemp("table") / "t", torch.randn(5, 3), shard_rows=9)
    path = next(folder.glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    head = 8 + struct.unpack("<Q", raw[:8])[0]
    place = data.draw(st.integers(0, head - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "shorten"]))
    if kind == "flip":
        raw[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del raw[place]
    elif kind == "insert":
        raw.insert(place, data.draw(st.integers(0, 255)))
    else:
        del raw[len(raw) - data.draw(st.integers(1, len(raw))) :]
    path.write_bytes(raw)
    try:
        table = DiskTable(folder, prefetch=False)
    except TableError as error:
        refusal = str(error)
        table = None
    if table is None:
        assert str(folder) in refusal
        return
    assert table.request(torch.arange(table.rows)).wait().shape == (table.rows, table.width)
    assert kind in ("flip", "insert", "cut")
    table.close()


def test_shards_missing_doubled_or_of_another_table_are_refused(tmp_path: pathlib.Path) -> None:
    folder = write_table(tmp_path / "t", torch.randn(10, 3), shard_rows=3)
    shards = sorted(folder.glob("*"))
    assert [shard.name for shard in shards] == [f"table-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    kept = {shard: shard.read_bytes() for shard in shards}

    def refused(reason: str) -> None:
        with pytest.raises(TableError, match=reason):
            DiskTable(folder)
        for file in folder.glob("*"):
            file.unlink()
        for shard, content in kept.items():
            shard.write_bytes(content)

    shards[1].unlink()
    refused("expected rows from 3: a shard missing or doubled")
    shards[3].unlink()
    refused("expected 10: the last ones are missing")
    (folder / "table-copy.safetensors").write_bytes(kept[shards[0]])
    refused("expected rows from 3: a shard missing or doubled")
    save_file({"rows": torch.randn(3, 3)}, shards[2])
    refused("no first_row")
    save_file({"rows": torch.randn(3, 4)}, shards[2], {"first_row": "6", "rows_in_all": "10"})
    refused("another table")
    save_file({"rows": torch.randn(3, 3)}, shards[2], {"first_row": "6", "rows_in_all": "11"})
    refused("another table")
    assert DiskTable(folder).rows == 10


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_file_cut_while_serving_fails_the_call_and_no_more(prefetch: bool, tmp_path: pathlib.Path) -> None:
    values = torch.randn(10, 3)
    folder = write_table(tmp_path / "t", values)
    (path,) = folder.glob("*.safetensors")
    table = DiskTable(folder, hot_bytes=0, prefetch=prefetch)
    os.truncate(path, path.stat().st_size - 5)
    pending = table.request(torch.tensor([9]))
    with pytest.raises(TableError, match=r"got 7 bytes of row 9, expected 12"):
        pending.wait()
    assert torch.equal(table.request(torch.tensor([0, 8])).wait(), values[[0, 8]])
    path.unlink()  # an open file stays readable
    assert torch.equal(table.request(torch.tensor([1])).wait(), values[1:2])
    table.close()
    with pytest.raises(TableError, match="closed"):
        table.request(torch.tensor([1])).wait()


def test_opening_a_refused_folder_leaves_no_file_open(tmp_path: pathlib.Path) -> None:
    folder = write_table(tmp_path / "t", torch.randn(10, 3), shard_rows=3)
    (folder / "z.safetensors").write_bytes(b"junk")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(5):
        with pytest.raises(TableError):
            DiskTable(folder)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


def test_bad_sizes_and_places_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="got 0 rows"):
        DeviceTable(0, 3)
    folder = write_table(tmp_path / "t", torch.randn(4, 3))
    with pytest.raises(ValueError, match="-1 bytes"):
        DiskTable(folder, hot_bytes=-1)
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        write_table(folder, torch.randn(4, 3))
    with pytest.raises(ValueError, match="expected float32 or bfloat16"):
        write_table(tmp_path / "u", torch.randn(4, 3).double())


def test_measure_says_what_a_table_gives(tmp_path: pathlib.Path) -> None:
    values = torch.randn(1000, 4)
    for table in (DeviceTable(1000, 4), HostTable(values), DiskTable(write_table(tmp_path / "t", values))):
        found = measure(table, rows_per_token=8, seconds=0.02)
        assert set(found) == {"rows_per_second", "step_p50", "step_p99"}
        assert all(np.isfinite(value) and value > 0 for value in found.values())
        assert found["step_p50"] <= found["step_p99"]
