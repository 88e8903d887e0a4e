"""A small table in every home -> lines that can be compared, and the refusal of homes that differ."""

from pathlib import Path

import pytest
import torch

from rorqual.experiments import tables
from rorqual.storage import DiskTable

pytestmark = pytest.mark.engram

SMALL = {"rows": 1000, "width": 8, "dim": 32, "layers": 2, "tokens": 4, "sequences": 2, "rounds": 1, "seconds": 0.01}


def test_every_way_is_measured(tmp_path: Path) -> None:
    told: list[str] = []
    lines = tables.bench(tables.BenchConfig(folder=str(tmp_path), **SMALL), told.append)
    assert [line.name for line in lines] == [way.name for way in tables.ways(1)]
    assert len({line.name for line in lines}) == 9
    assert all(line.tokens_per_second > 0 for line in lines)
    assert told[0].startswith("drawing 1,")
    assert list(tmp_path.iterdir()) == []


def test_ways_that_say_other_ids_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = DiskTable._fetch
    monkeypatch.setattr(DiskTable, "_fetch", lambda own, ids, wait=True: torch.full_like(fetch(own, ids), 50.0))
    with pytest.raises(RuntimeError, match="disk warm says other ids than resident"):
        tables.bench(tables.BenchConfig(folder=str(tmp_path), **SMALL | {"tokens": 20}))


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"rounds": 0}, {"hot_bytes": -1}, {"seconds": 0.0}])
def test_sizes_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        tables.BenchConfig(**wrong)
