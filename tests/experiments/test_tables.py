"""A small table in every home -> lines that can be compared, and the refusal of homes that differ."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual.experiments import tables
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel
from rorqual.serve.decoding import decode, speculate
from rorqual.tables import DiskTable, TableConfig

pytestmark = pytest.mark.engram

SMALL = {"rows": 1000, "width": 8, "dim": 32, "layers": 2, "tokens": 4, "sequences": 2, "rounds": 1, "seconds": 0.01}


def test_every_way_is_measured(tmp_path: Path) -> None:
    told: list[str] = []
    lines = tables.bench(tables.BenchConfig(folder=str(tmp_path), **SMALL), told.append)
    assert [line.name for line in lines] == [way.name for way in tables.ways(1)]
    assert len({line.name for line in lines}) == 9
    assert all(line.tokens_per_second > 0 for line in lines)
    assert told[0].startswith("drawing ")
    assert list(tmp_path.iterdir()) == []


def test_a_warm_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the cold ways of every round have the system forget the same files."""
    walked, at_once, waited = tables._walked, DiskTable._at_once, []
    way = [way.name for way in tables.ways(1)]

    def seen(*given: object) -> tuple:
        way.append(way.pop(0))
        return walked(*given)

    def given(own: DiskTable, ids: np.ndarray) -> torch.Tensor | None:
        found = at_once(own, ids)
        waited.extend([way[-1]] if found is None else [])
        return found

    monkeypatch.setattr(tables, "_walked", seen)
    monkeypatch.setattr(DiskTable, "_at_once", given)
    config = tables.BenchConfig(folder=str(tmp_path), **SMALL | {"rounds": 2, "rows": 400_000, "width": 64})
    monkeypatch.setattr(tables, "_line", lambda _, way, *rest: tables.Line(way.name, *[0.0] * 5))
    tables.bench(config)
    assert not [name for name in waited if "warm" in name]


def test_ways_that_say_other_ids_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = DiskTable._numbers
    monkeypatch.setattr(DiskTable, "_numbers", lambda own, raw: torch.full_like(numbers(own, raw), 50.0))
    with pytest.raises(RuntimeError, match="disk warm says other ids than resident"):
        tables.bench(tables.BenchConfig(folder=str(tmp_path), **SMALL | {"tokens": 20}))


def said(model: LanguageModel, prompt: list[int], count: int) -> tuple[list, torch.Tensor]:
    """`count` ids, and the logits after all of them."""
    ids = [*prompt, *(step[0] for step in decode(model, [prompt], max_new_tokens=count))]
    with torch.no_grad():
        return ids, model(torch.tensor([ids]))


@pytest.mark.parametrize(("generations", "count"), [(1, 12), pytest.param(64, 64, marks=pytest.mark.slow)])
def test_generations_are_the_same_bits_from_every_home(generations: int, count: int, tmp_path: Path) -> None:
    """Three sizes of the hot set, one of them a row, prefetch on and off: ids and logits."""
    config = tables.BenchConfig(rows=20_000, width=16, dim=32, layers=2)
    folder = tables.drawn(config, tmp_path)
    homes = [TableConfig(), TableConfig(placement="host"), TableConfig(placement="host", prefetch=False)]
    homes += [
        TableConfig(placement="disk", hot_bytes=hot, prefetch=on) for hot in (0, 32, 3200) for on in (True, False)
    ]
    every = [tables.opened(config, folder, home) for home in homes]
    model = tables.model_with(config, every[-1])  # which draws the values of parameters, so not of the resident rows
    for seed in range(generations):
        prompt = torch.randint(model.config.vocabulary, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
        found = []
        for each in every:
            model.tables = torch.nn.ModuleList(each)
            found.append(said(model, prompt, count))
        assert all(ids == found[0][0] for ids, _ in found)
        assert all(torch.equal(logits, found[0][1]) for _, logits in found)


def test_drafts_are_checked_with_rows_from_the_disk(tmp_path: Path) -> None:
    """Speculative decoding asks for the rows of drafts as of any ids, and says what decoding says."""
    config = tables.BenchConfig(rows=5000, width=16, dim=32, layers=2)
    held = tables.opened(config, tables.drawn(config, tmp_path), TableConfig(placement="disk", hot_bytes=64))
    shape = replace(tables.model_with(config, held).config, mtp=MTPConfig(depth=2))
    model, prompts = LanguageModel(shape, seed=0, tables=held).eval(), [[3, 1, 4, 1], [5, 9]]
    read = held[0].metrics()["rows"]
    drafted = list(speculate(model, prompts, max_new_tokens=20))
    assert held[0].metrics()["rows"] > read
    assert drafted == list(decode(model, prompts, max_new_tokens=20))


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"rounds": 0}, {"hot_bytes": -1}, {"seconds": 0.0}])
def test_sizes_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        tables.BenchConfig(**wrong)
