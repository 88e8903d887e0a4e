"""Writes safetensors files from tensors where they are, by one process or by several together.

    8 bytes    the length of the header
    header     JSON: for each tensor its dtype, its shape, and where its bytes are; and metadata
    bytes      tensor after tensor, without gaps

The layout follows from names, dtypes and shapes alone, so that every process can write its rows of
a tensor into the same file. Nothing is copied first: the memory of a large table is there once.
Format: https://huggingface.co/docs/safetensors.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from types import EllipsisType
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rorqual.io import BINARY, write_all_at

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}
# Bytes of a tensor that are read, or written by pieces, at a time: the allocator keeps several.
PIECE = 4 << 20


class Layout:
    """Where each tensor's bytes are in a file: the widest dtypes first, then by name."""

    def __init__(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Lays out tensors of these names, dtypes and (global) shapes.

        ValueError for a dtype that the format does not have.
        """
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self.starts: dict[str, int] = {}
        end = 0
        for name, tensor in sorted(
            tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])
        ):
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{name}: got {tensor.dtype}, expected one that safetensors has")
            self.starts[name] = end
            end += prod(tensor.shape) * tensor.dtype.itemsize
            entries[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [self.starts[name], end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.bytes = len(self.header) + end

    def write_header(self, file: int) -> None:
        """Writes the header to an open file and gives the file its length."""
        write_all_at(file, self.header, 0)
        os.ftruncate(file, self.bytes)

    def write(self, file: int, name: str, rows: Shaped[Tensor, "..."], first: int = 0) -> None:
        """Writes a tensor, or its rows from number `first` on, to an open file."""
        rows = rows.detach().cpu().contiguous()
        start = len(self.header) + self.starts[name]
        row_bytes = prod(rows.shape[1:]) * rows.dtype.itemsize
        raw = rows.reshape(-1).view(torch.uint8).numpy()
        write_all_at(file, raw.data, start + first * row_bytes)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    pieces: Mapping[str, Callable[[int, int], Tensor]] | None = None,
) -> None:
    """Writes tensors to a new file. OSError, which names it, where that is not possible.

    pieces: of some tensors, what returns their rows from one number to another. It is called for
    rising ones.
    """
    layout = Layout(tensors, metadata)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
    try:
        layout.write_header(file)
        for name in layout.starts:
            tensor = tensors[name]
            if pieces is None or name not in pieces:
                layout.write(file, name, tensor)
                continue
            row_bytes = prod(tensor.shape[1:]) * tensor.dtype.itemsize
            step = max(1, PIECE // max(1, row_bytes))
            for first in range(0, len(tensor), step):
                end = min(first + step, len(tensor))
                layout.write(file, name, pieces[name](first, end), first)
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    finally:
        os.close(file)


@contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Opens a file to read by position: pages of a mapped file count as memory of the process."""
    with safe_open(path, "pt", backend="pread") as file:
        yield file


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads the metadata and all tensors of a file; ValueError for one that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def read_pieces(
    file: Any, name: str, slices: Sequence[slice] | None = None
) -> Iterator[tuple[slice | EllipsisType, Tensor]]:
    """Yields a tensor of an open file piece by piece, as (rows of the result, their values).

    slices: of each axis, if not all of it is read.
    """
    stored = file.get_slice(name)
    shape = stored.get_shape()
    if not shape:
        yield ..., file.get_tensor(name)
        return
    rows, *rest = [slice(0, size) for size in shape] if slices is None else slices
    count = rows.stop - rows.start
    row_bytes = 8 * prod(other.stop - other.start for other in rest)
    step = max(1, PIECE // max(1, row_bytes))
    for start in range(0, count, step):
        end = min(start + step, count)
        yield slice(start, end), stored[(slice(rows.start + start, rows.start + end), *rest)]
