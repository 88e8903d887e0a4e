"""Tests rows that are read where published checkpoints have them."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rorqual.hub.formats import ROWS, decode, encode_e4m3
from rorqual.tables import Table, TableError
from rorqual.tables.tensor_rows import Source, TensorRows


@pytest.fixture
def published(tmp_path):
    """Writes 50 rows of width 64 as fp8 with scales, among other tensors; returns their numbers."""
    values = torch.randn(50, 64) * 2.0 ** torch.randint(-20, 20, (50, 1))
    weight, scale = encode_e4m3(values, ROWS, power_of_two=True)
    tensors = {"a": torch.zeros(3), "embed.weight": weight, "z": torch.ones(5, 2)}
    save_file(tensors, tmp_path / "one.safetensors")
    save_file({"embed.scale": scale, "y": torch.zeros(1)}, tmp_path / "two.safetensors")
    return tmp_path, decode(weight, scale, ROWS)


def of(folder, *names: str) -> list[Source]:
    files = {"embed.weight": "one", "embed.scale": "two"}
    return [Source(folder / f"{files[name]}.safetensors", name) for name in names]


def test_rows_are_read_with_their_scales(published):
    folder, numbers = published
    rows = TensorRows(of(folder, "embed.weight"), of(folder, "embed.scale"))
    assert (rows.rows, rows.width, rows.row_bytes) == (50, 64, 66)
    ids = np.array([3, 4, 5, 49, 0])
    assert torch.equal(rows.numbers(rows.read(ids)), numbers[ids])
    table = Table.of_rows(rows, cache_bytes=10 * 66)
    for ids in ([[7, 7, 0], [49, 3, 7]], [list(range(50))], [[]]):
        wanted = torch.tensor(ids, dtype=torch.long)
        assert torch.equal(table.prefetch(wanted).wait(), numbers[wanted])
    assert table.damage() is None
    table.close()


def test_shards_of_plain_rows(tmp_path):
    values = torch.randn(30, 12)
    cuts = [0, 7, 8, 30]
    sources = []
    for n, (first, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        path = tmp_path / f"{n}.safetensors"
        save_file({f"shard_{n}.weight": values[first:end].contiguous()}, path)
        sources.append(Source(path, f"shard_{n}.weight", first))
    rows = TensorRows(sources, rows=29)
    ids = np.arange(28, -1, -1)
    assert rows.rows == 29
    assert torch.equal(rows.numbers(rows.read(ids)), values[ids])
    table = Table.of_rows(rows)
    with pytest.raises(ValueError, match="got row id 29, expected 0 to 28"):
        table.prefetch(torch.tensor([29]))
    table.close()
    with pytest.raises(TableError, match="expected rows from 7: a shard missing or doubled"):
        TensorRows([sources[0], sources[2]])


def test_shards_with_one_scale_for_all(tmp_path):
    stored = (torch.randn(20, 5) * 30).to(torch.float8_e4m3fn)
    sources = []
    for n, rows in enumerate(stored.split(8)):
        save_file({"weight": rows.contiguous()}, tmp_path / f"{n}.safetensors")
        sources.append(Source(tmp_path / f"{n}.safetensors", "weight", 8 * n))
    table = Table.of_rows(TensorRows(sources, scale=0.25))
    ids = torch.tensor([[19, 0], [8, 7]])
    assert torch.equal(table.prefetch(ids).wait(), stored.float()[ids] * 0.25)
    assert torch.equal(table.file.stored(2, 9), stored[2:9].float() * 0.25)
    table.close()


def test_tensors_that_do_not_fit_are_refused(published):
    folder, _ = published
    with pytest.raises(TableError, match="without scales, expected scales with e4m3 rows"):
        TensorRows(of(folder, "embed.weight"))
    with pytest.raises(TableError, match="got 50 rows, expected 51"):
        TensorRows(of(folder, "embed.weight"), of(folder, "embed.scale"), rows=51)
    with pytest.raises(TableError, match="expected rows by width in F32 or BF16 or F8_E4M3"):
        TensorRows([Source(folder / "one.safetensors", "a")])
    with pytest.raises(TableError, match="expected 'absent'"):
        TensorRows([Source(folder / "one.safetensors", "absent")])
    with pytest.raises(TableError, match="No such file"):
        TensorRows([Source(folder / "absent.safetensors", "a")])
    with pytest.raises(ValueError, match="got no tensor of rows"):
        TensorRows([])
    one = (folder / "one.safetensors").read_bytes()
    (folder / "one.safetensors").write_bytes(one[:-5])
    with pytest.raises(TableError, match="cut or lengthened"):
        TensorRows(of(folder, "embed.weight"), of(folder, "embed.scale"))


def test_scales_of_another_shape_are_refused(published):
    folder, _ = published
    save_file({"embed.scale": torch.zeros(50, 3, dtype=torch.uint8)}, folder / "two.safetensors")
    with pytest.raises(TableError, match="with scales 50 by 3, expected one for 32 numbers"):
        TensorRows(of(folder, "embed.weight"), of(folder, "embed.scale"))


def test_a_file_that_is_cut_later_fails_a_call(published):
    folder, _ = published
    rows = TensorRows(of(folder, "embed.weight"), of(folder, "embed.scale"))
    with (folder / "two.safetensors").open("r+b") as file:
        file.truncate(120)
    with pytest.raises(TableError, match=r"two.safetensors: got .* bytes of row"):
        rows.read(np.array([49]))
    assert "two.safetensors" in (rows.damage() or "")
