"""Tests tensor_file.py: what it writes is what safetensors reads, and the other way round."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rorqual import tensor_file
from rorqual.tensor_file import DTYPES, Layout, open_tensors, read_pieces, write_tensors


def tensors_of_every_kind() -> dict[str, torch.Tensor]:
    numbers = torch.arange(24).view(4, 6)
    kinds = {str(dtype): numbers.to(dtype) for dtype in DTYPES if dtype != torch.float8_e8m0fnu}
    shapes = {
        "empty": torch.empty(0, 5),
        "number": torch.tensor(2.5),
        "line": torch.arange(7.0),
        "cube": torch.randn(3, 2, 5),
        "turned": torch.randn(3, 4).T,
        "rows of another": torch.randn(9, 4)[2:5],
    }
    return kinds | shapes


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether all bytes are the same, of dtypes that cannot be compared, too."""
    both = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right)]
    return left.shape == right.shape and torch.equal(*both)


def test_a_file_is_read_as_it_was_written(tmp_path, monkeypatch):
    tensors = tensors_of_every_kind()
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors, {"format": "pt"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    monkeypatch.setattr(tensor_file, "PIECE", 100)
    for name, value in load_file(path).items():
        assert value.dtype == tensors[name].dtype
        assert same(value, tensors[name])
        read = torch.empty_like(value)
        with open_tensors(path) as file:
            for rows, values in read_pieces(file, name):
                read[rows] = values
        assert same(read, value)
    assert load_file(path).keys() == tensors.keys()


def test_slices_of_a_file_of_safetensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "PIECE", 48)
    value = torch.randn(11, 5)
    save_file({"a": value}, tmp_path / "a.safetensors")
    with open_tensors(tmp_path / "a.safetensors") as file:
        pieces = list(read_pieces(file, "a", [slice(2, 9), slice(1, 4)]))
    assert len(pieces) == 4
    assert torch.equal(torch.cat([values for _, values in pieces]), value[2:9, 1:4])
    assert [rows.start for rows, _ in pieces] == [0, 2, 4, 6]


def test_several_write_their_rows_of_one_tensor(tmp_path):
    value = torch.randn(10, 3)
    layout = Layout({"a": value, "b": value[0]})
    path = tmp_path / "a.safetensors"
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    layout.write_header(file)
    for first in (7, 0, 3):
        layout.write(file, "a", value[first : first + 4], first)
    layout.write(file, "b", value[0])
    os.close(file)
    assert path.stat().st_size == layout.bytes
    assert torch.equal(load_file(path)["a"], value)
    assert torch.equal(load_file(path)["b"], value[0])


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a: got torch\.complex64, expected one"):
        write_tensors(tmp_path / "a", {"a": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(OSError, match="nowhere"):
        write_tensors(tmp_path / "nowhere" / "a", {"a": torch.zeros(2)})


def test_a_whole_file_is_read_with_its_metadata_or_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.arange(6.0).view(2, 3), "y": torch.tensor([1], dtype=torch.int8)}
    save_file(tensors, path, metadata={"format": "pt"})
    metadata, read = tensor_file.read_tensors(path)
    assert metadata == {"format": "pt"} and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    path.write_bytes(path.read_bytes()[:-3])
    for damaged in (path, tmp_path / "none.safetensors"):
        with pytest.raises(ValueError, match=f"{damaged.name} cannot be read as safetensors"):
            tensor_file.read_tensors(damaged)
