"""Where the ranks that train a table on a disk keep their records, and who takes them over.

    ROOT/records                  of one process
    ROOT/rank2-of-4/records       of rank 2 of 4: rows 2K .. 3K - 1, K = ceil(rows / 4)

All ranks see ROOT. When a run is resumed with another number of ranks, each rank copies its rows
from the records that were marked at that step. Those stay as long as there are checkpoints before
it.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rorqual.tables.journal import read_marks
from rorqual.tables.record_file import RecordFile, read_records

_COPIED = 1 << 16  # records copied at a time


class RecordShard(NamedTuple):
    """The rows of rank `rank` of `world`, of a table of `rows` rows in all."""

    root: Path
    rows: int
    width: int
    rank: int = 0
    world: int = 1

    @property
    def each(self) -> int:
        """Rows of a rank; the last ones have fewer, and records without a row behind them."""
        return -(-self.rows // self.world)

    @property
    def first(self) -> int:
        """First row of the table that this rank has."""
        return min(self.rank * self.each, self.rows)

    @property
    def size(self) -> int:
        """Rows of this rank, which may be none."""
        return min(self.each, self.rows - self.first)

    @property
    def folder(self) -> Path:
        """Folder of this rank's records: ROOT itself if there is one rank."""
        if self.world == 1:
            return self.root
        return self.root / f"rank{self.rank}-of-{self.world}"

    def of(self, world: int) -> "list[RecordShard]":
        """Returns the shards of the same table on another number of ranks."""
        return [self._replace(rank=rank, world=world) for rank in range(world)]

    def marked(self, step: int) -> bool:
        """Returns whether every rank of this world has marked the step."""
        return all(step in read_marks(shard.folder) for shard in self.of(self.world))

    def others(self, step: int) -> "list[RecordShard]":
        """Returns the shards of another number of ranks, where these marked the step last.

        An older mark may be of a checkpoint that was never whole, and of other values. Marking and
        rewinding both count. None where this number of ranks was the last, or none has the mark.
        """
        candidates = [self.of(world) for world in self._worlds() | {self.world}]
        marked = [shards for shards in candidates if shards[0].marked(step)]
        newest = max(
            marked,
            key=lambda shards: (shards[0].folder / "marks.json").stat().st_mtime_ns,
            default=list[RecordShard](),
        )
        return [] if newest and newest[0].world == self.world else newest

    def _worlds(self) -> set[int]:
        """Returns the numbers of ranks that have records here."""
        names = (re.fullmatch(r"rank0-of-(\d+)", path.name) for path in self.root.glob("rank0-*"))
        alone = {1} if (self.root / "marks.json").is_file() else set()
        return alone | {int(name[1]) for name in names if name}

    def forget_others(self, steps: Sequence[int]) -> bool:
        """Removes the records of other numbers of ranks once none of the steps needs them.

        That is so when these have marked all the steps, of which there is one at least. Returns
        whether nothing of others is left.
        """
        others = self._worlds() - {self.world}
        if not others:
            return True
        if not steps or not all(self.marked(step) for step in steps):
            return False
        for world in others:
            for shard in self.of(world):
                # Nobody goes back to records without marks, should the rest not be removed.
                (shard.folder / "marks.json").unlink(missing_ok=True)
                if world > 1:
                    shutil.rmtree(shard.folder, ignore_errors=True)
                    continue
                for path in (*shard.folder.glob("records*"), *shard.folder.glob("undo-*")):
                    path.unlink(missing_ok=True)
        return True

    def take_over(
        self, file: RecordFile, step: int, together: Callable[[], AbstractContextManager]
    ) -> None:
        """Fills this rank's file with its rows as another number of ranks had them at a mark.

        Every rank calls it. It does nothing if no other number of ranks marked the step
        after these. `together()` is a block whose error is raised on every rank, and which ends
        when all ranks have ended it.
        """
        sources: list[RecordShard] = []
        with together():
            sources = self.others(step)
        if not sources:
            return
        with together():
            for source in sources[self.rank :: self.world]:
                records = RecordFile(source.folder, source.each, self.width, keep=1)
                try:
                    records.rewind(step)
                finally:
                    records.close()
        with together():
            file.replace_all(self._records_of(sources), step)

    def _records_of(self, sources: "list[RecordShard]") -> Iterator[UInt8[np.ndarray, "K record"]]:
        """Yields this rank's records in order, from those of other shards."""
        for source in sources:
            first = max(self.first, source.first)
            end = min(self.first + self.size, source.first + source.size)
            for start in range(first, end, _COPIED):
                span = range(start - source.first, min(start + _COPIED, end) - source.first)
                yield read_records(source.folder, span, self.width)

    def read(self, first: int, end: int) -> Float[Tensor, "K W"]:
        """Returns the values of rows first..end, of all ranks of this world."""
        pieces = [records[:, : 4 * self.width] for records in self._between(first, end)]
        values = np.concatenate(pieces) if pieces else np.empty((0, 4 * self.width), np.uint8)
        return torch.from_numpy(np.ascontiguousarray(values)).view(torch.float32)

    def _between(self, first: int, end: int) -> Iterator[UInt8[np.ndarray, "K record"]]:
        """Yields the records of rows first..end in order, from all ranks of this world."""
        for source in self.of(self.world):
            start = max(first, source.first) - source.first
            stop = min(end, source.first + source.size) - source.first
            if start < stop:
                yield read_records(source.folder, range(start, stop), self.width)
