"""Tests the measurements of a small table in every placement.

Placements that generate different ids are an error.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual.experiments import tables
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel
from rorqual.serve.decoding import decode, speculate
from rorqual.tables import Table, TableConfig, write_table

pytestmark = pytest.mark.engram

SMALL = {
    "rows": 1000,
    "width": 8,
    "dim": 32,
    "layers": 2,
    "tokens": 4,
    "sequences": 2,
    "rounds": 1,
    "seconds": 0.01,
}


def test_every_way_is_measured(tmp_path: Path) -> None:
    text: list[str] = []
    lines = tables.bench(tables.BenchConfig(folder=str(tmp_path), **SMALL), text.append)
    assert [line.name for line in lines] == [way.name for way in tables.ways(1)]
    assert len({line.name for line in lines}) == 9
    assert all(line.tokens_per_second > 0 for line in lines)
    assert text[0].startswith("drawing ")
    assert list(tmp_path.iterdir()) == []


def test_ways_that_say_other_ids_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = tables.opened

    def changed(config: tables.BenchConfig, folder: Path, placed: TableConfig) -> tables.Tables:
        result = opened(config, folder, placed)
        for table in result if placed.placement == "host" else ():
            table.values.fill_(50.0)
        return result

    monkeypatch.setattr(tables, "opened", changed)
    with pytest.raises(RuntimeError, match="host memory says other ids than resident"):
        tables.bench(tables.BenchConfig(folder=str(tmp_path), **SMALL | {"tokens": 20}))


def test_measure_says_what_a_table_gives(tmp_path: Path) -> None:
    values = torch.randn(1000, 4)
    for table in (
        Table(1000, 4),
        Table.of_values(values),
        Table.of_file(write_table(tmp_path / "t", values)),
    ):
        result = tables.measure(table, rows_per_token=8, seconds=0.02)
        assert set(result) == {"rows_per_second", "step_p50", "step_p99"}
        assert all(np.isfinite(value) and value > 0 for value in result.values())
        assert result["step_p50"] <= result["step_p99"]


def generated(model: LanguageModel, prompt: list[int], count: int) -> tuple[list, torch.Tensor]:
    """Returns the prompt with `count` generated ids, and the logits after all of them."""
    ids = [*prompt, *(step[0] for step in decode(model, [prompt], max_new_tokens=count))]
    with torch.no_grad():
        return ids, model(torch.tensor([ids]))


@pytest.mark.parametrize(
    ("generations", "count"), [(1, 12), pytest.param(6, 64, marks=pytest.mark.slow)]
)
def test_generations_are_the_same_bits_from_every_placement(
    generations: int, count: int, tmp_path: Path
) -> None:
    """Compares ids and logits between placements.

    There are three sizes of the row cache, one of them a row, each with and without prefetch.
    """
    config = tables.BenchConfig(rows=20_000, width=16, dim=32, layers=2)
    folder = tables.drawn(config, tmp_path)
    placements = [
        TableConfig(),
        TableConfig(placement="host"),
        TableConfig(placement="host", prefetch=False),
    ]
    placements += [
        TableConfig(placement="disk", hot_bytes=hot, prefetch=on)
        for hot in (0, 32, 3200)
        for on in (True, False)
    ]
    every = [tables.opened(config, folder, placement) for placement in placements]
    # The model initialises its parameters, which would overwrite resident rows, so it is built with
    # tables on the disk.
    model = tables.model_with(config, every[-1])
    for seed in range(generations):
        prompt = torch.randint(
            model.config.vocab_size, (5,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        results = []
        for each in every:
            model.tables = torch.nn.ModuleList(each)
            results.append(generated(model, prompt, count))
        assert all(ids == results[0][0] for ids, _ in results)
        assert all(torch.equal(logits, results[0][1]) for _, logits in results)


def test_drafts_are_checked_with_rows_from_the_disk(tmp_path: Path) -> None:
    """Speculative decoding looks up the rows of drafts like those of any ids.

    Its result is that of plain decoding.
    """
    config = tables.BenchConfig(rows=5000, width=16, dim=32, layers=2)
    stored = tables.opened(
        config, tables.drawn(config, tmp_path), TableConfig(placement="disk", hot_bytes=64)
    )
    shape = replace(tables.model_with(config, stored).config, mtp=MTPConfig(depth=2))
    model = LanguageModel(shape, seed=0, tables=stored).eval()
    prompts = [[3, 1, 4, 1], [5, 9]]
    read = stored[0].metrics()["rows"]
    drafted = list(speculate(model, prompts, max_new_tokens=20))
    assert stored[0].metrics()["rows"] > read
    assert drafted == list(decode(model, prompts, max_new_tokens=20))


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"rounds": 0}, {"hot_bytes": -1}, {"seconds": 0.0}])
def test_sizes_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        tables.BenchConfig(**wrong)
