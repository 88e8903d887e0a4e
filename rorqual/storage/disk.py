"""Row ids in -> rows out of a safetensors file, or a folder of shards, read at their positions and never mapped.

Rows that lie within a page of each other are one read. The system is told of the reads to come some hundreds ahead, so
that the disk answers many at a time while one thread waits for the first.
"""

import os
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rorqual.storage.shards import Shard, open_shards
from rorqual.storage.tables import Fetched

_NEAR = 4096  # bytes between rows that are read over: the disk reads whole pages anyhow
_RUN = 1 << 20  # bytes; a run of rows ends where it passes a multiple of it
_AHEAD = 1024  # runs that the system is told of together; twice as many pages of its cache are ours at most


class Run(NamedTuple):
    """`span` rows of a shard from its row `first` on, read together for rows `begin` to `end` of those asked for."""

    shard: Shard
    first: int
    span: int
    begin: int
    end: int


class DiskTable(Fetched):
    """Rows in one safetensors file, or in a folder of shards, read at their positions and never mapped."""

    def __init__(
        self, path: str | os.PathLike[str], *, name: str = "rows", hot_bytes: int = 64 << 20, prefetch: bool = True
    ) -> None:
        """`name` is the tensor's: any float32 or bfloat16 matrix of any safetensors file, or a table of fp8 records."""
        self._shards = open_shards(Path(path), name)
        first = self._shards[0]
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])
        super().__init__(int(self._starts[-1]), first.width, first.dtype, hot_bytes, prefetch)

    def _read(self, ids: np.ndarray) -> Tensor:
        raw = torch.empty(len(ids), self.row_bytes, dtype=torch.uint8)
        runs, size, target = self._runs(ids), self.row_bytes, raw.numpy().data.cast("B")
        groups = [runs[at : at + _AHEAD] for at in range(0, len(runs), _AHEAD)]
        self._foretell(groups[0] if len(runs) > 1 else [])
        for group, later in pairwise(chain(groups, [[]])):
            self._foretell(later)
            for run in group:
                if run.span == run.end - run.begin:
                    run.shard.read(run.first, target[run.begin * size : run.end * size])
                else:
                    self._pick(run, ids, raw.numpy())
        self._count(bytes=raw.numel())
        return raw

    def _foretell(self, runs: list[Run]) -> None:
        for run in runs:
            run.shard.foretell(run.first, run.span)

    def _pick(self, run: Run, ids: np.ndarray, into: np.ndarray) -> None:
        """Reads a run with rows in between that nobody asked for."""
        whole = np.empty((run.span, self.row_bytes), dtype=np.uint8)
        run.shard.read(run.first, whole.data.cast("B"))
        into[run.begin : run.end] = whole[ids[run.begin : run.end] - ids[run.begin]]

    def _runs(self, ids: np.ndarray) -> list[Run]:
        """Rising ids cut where the shard changes, more than a page lies between, or a run would grow too long."""
        which = np.searchsorted(self._starts, ids, side="right") - 1
        within = ids - self._starts[which]
        offsets = within * self.row_bytes
        apart = (np.diff(which) != 0) | (np.diff(offsets) > _NEAR + self.row_bytes) | (np.diff(offsets // _RUN) != 0)
        edges = np.array([0, *(np.flatnonzero(apart) + 1), len(ids)])
        begins, ends = edges[:-1], edges[1:]
        spans = within[ends - 1] - within[begins] + 1
        columns = (which[begins], within[begins], spans, begins, ends)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [Run(self._shards[shard], *rest) for shard, *rest in rows]

    def close(self) -> None:
        """Ends the worker and closes the files."""
        super().close()
        for shard in self._shards:
            shard.close()
