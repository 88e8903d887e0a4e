"""Tests `rorqual table`: what it writes, what it prints, and its exit codes."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rorqual.analyze.report import write_report
from rorqual.cli.main import main
from rorqual.tables import Table, hot_rows, quantise, verify, write_table

pytestmark = pytest.mark.engram


def printed_json(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def test_a_drawn_table_is_built_inspected_and_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(tmp_path / "one")
    two = str(tmp_path / "two")
    words = [
        "table",
        "build",
        one,
        "--rows",
        "1000",
        "--width",
        "64",
        "--shard-bytes",
        "100000",
        "--json",
    ]
    assert main(words) == 0
    (about,) = printed_json(capsys)["tables"]
    assert (about["rows"], about["width"], about["dtype"], about["bytes"]) == (
        1000,
        64,
        "float32",
        256_000,
    )
    assert [shard["rows"] for shard in about["shards"]] == [390, 390, 220]
    assert about["checksums"]
    assert main(["table", "convert", one, two, "--dtype", "fp8", "--json"]) == 0
    (about,) = printed_json(capsys)["tables"]
    assert (about["rows"], about["width"], about["dtype"], about["row_bytes"]) == (
        1000,
        64,
        "fp8",
        66,
    )
    values = torch.cat([load_file(file)["rows"] for file in sorted(Path(one).glob("*"))])
    assert torch.equal(load_file(next(Path(two).glob("*")))["rows"], quantise(values))
    assert main(["table", "inspect", one]) == 0
    printed = capsys.readouterr().out
    assert (
        "1,000 rows of 64 values in float32, 256 bytes each, 256,000 bytes in 3 files, "
        "with checksums" in printed
    )
    assert "rows 390 to 779" in printed


def test_the_tables_of_a_run(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", "inspect", str(small_run), "--json"]) == 0
    tables = printed_json(capsys)["tables"]
    weights = load_file(small_run / "model.safetensors")
    assert [about["name"] for about in tables] == sorted(
        name for name in weights if name.startswith("tables.")
    )
    last = len(tables) - 1
    words = [
        "table",
        "build",
        str(tmp_path / "t"),
        "--source",
        str(small_run),
        "--number",
        str(last),
    ]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    rows = Table.of_file(tmp_path / "t")
    expected = weights[f"tables.{last}.weight"].bfloat16()
    assert torch.equal(rows.prefetch(torch.arange(rows.rows)).wait(), expected)
    assert not tables[0]["checksums"]


def test_damage_is_named_and_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_table(tmp_path / "t", torch.randn(1000, 300))
    assert main(["table", "verify", str(folder)]) == 0
    assert "every byte is as it was written" in capsys.readouterr().out
    (path,) = folder.glob("*")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert main(["table", "verify", str(folder)]) == 1
    assert f"{path}: rows 873 to 999 are not as they were written" in capsys.readouterr().out
    assert main(["table", "verify", str(folder), "--json"]) == 1
    result = printed_json(capsys)
    assert not result["sound"]
    assert result["damaged"] == [{"file": str(path), "first": 873, "last": 999}]


def test_a_build_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "table",
        "build",
        str(tmp_path / "t"),
        "--rows",
        "100",
        "--width",
        "32",
        "--shard-bytes",
        "5000",
    ]
    generator = np.random.default_rng

    def stop(seed: list[int]) -> np.random.Generator:
        if seed != [0, 0]:
            raise KeyboardInterrupt
        return generator(seed)

    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", stop)
        assert main(words) == 130
    assert not (tmp_path / "t").exists()
    assert main(words) == 0
    assert verify(tmp_path / "t") == []
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_mistakes_are_a_line(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = write_table(tmp_path / "there", torch.randn(4, 3))
    (tmp_path / "junk.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    # A file of weights, which must not be overwritten.
    save_file({"weight": torch.ones(2)}, tmp_path / "kept.safetensors")
    new = str(tmp_path / "new")
    shape = ["--rows", "3", "--width", "33"]
    for words, code, expected in (
        ([], 2, "expected one of build, inspect, verify, convert, hot, bench"),
        (["buildx"], 2, "did you mean 'build'?"),
        (["build"], 2, "required: TABLE"),
        (["build", new], 2, "got no --source and not both --rows and --width"),
        (["build", new, "--rows", "0", "--width", "3"], 2, "got 0 rows"),
        (["build", new, *shape, "--dtype", "fp8"], 1, "expected a multiple of 32"),
        (
            ["build", new, *shape, "--dtype", "int4"],
            2,
            "dtype: got 'int4', expected 'float32' or 'bfloat16' or",
        ),
        (["build", new, *shape, "--number", "1"], 2, "without --source"),
        (["build", new, *shape, "--name", "rows"], 2, "without --source"),
        (["build", str(there), *shape], 1, "expected a new or empty folder"),
        (["build", new, "--source", str(small_run), "--number", "9"], 2, "got --number 9"),
        (
            ["build", new, "--source", str(small_run), "--rows", "9"],
            2,
            "a source has its own shape",
        ),
        (
            ["build", new, "--rows", "9", "--width", "8", "--shard-bytes", "31"],
            2,
            "at least the 32 bytes of a row",
        ),
        (["convert", str(there), new], 2, "--dtype"),
        (
            ["convert", str(there), new, "--dtype", "float32", "--shard-bytes", "-1"],
            2,
            "at least the 12 bytes",
        ),
        (
            ["hot", str(small_run), str(tmp_path / "none" / "hot")],
            2,
            "expected a file in a folder that is there",
        ),
        (["hot", str(small_run), str(tmp_path)], 2, "expected a file in a folder that is there"),
        (
            ["hot", str(small_run), str(tmp_path / "kept.safetensors")],
            1,
            "expected int64 row ids by their table's",
        ),
        (
            ["bench", "--figure", str(tmp_path / "f.txt")],
            2,
            "expected a .svg, .png or .pdf in a folder that is there",
        ),
        (["bench", "--figure", str(tmp_path / "none" / "f.svg")], 2, "in a folder that is there"),
        (["bench", "--folder", str(tmp_path / "none")], 2, "expected a folder that is there"),
        (["convert", str(tmp_path / "none"), new, "--dtype", "fp8"], 1, "No such file"),
        (["inspect", str(tmp_path / "junk.safetensors")], 1, "got a header of"),
        (["inspect", str(there), "--name", "x"], 1, "got tensors rows, expected 'x'"),
        (["verify", str(small_run)], 1, "expected"),
    ):
        assert main(["table", *words]) == code, words
        printed = capsys.readouterr().err
        assert expected in printed, (words, printed)
        assert len(printed.splitlines()) <= 2, printed
    assert not Path(new).exists()
    assert load_file(tmp_path / "kept.safetensors")["weight"].tolist() == [1, 1]


def test_rows_that_a_corpus_reads_most_stay_in_memory(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["The blue whale sings below the sea.", "A fin whale sings below the sea."]
    (tmp_path / "notes.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts * 3)
    )
    words = [
        "table",
        "hot",
        str(small_run),
        str(tmp_path / "hot"),
        "--data",
        str(tmp_path / "notes.jsonl"),
    ]
    assert main([*words, "--rows", "20", "--json"]) == 0
    (about,) = printed_json(capsys)["tables"]
    assert about["rows"] == 20
    lists = hot_rows(tmp_path / "hot")
    assert list(lists) == ["0"]
    assert lists["0"].tolist()[:5] == [row for row, _, _ in about["first"]]
    assert main(["table", "inspect", str(small_run), "--hot", str(tmp_path / "hot")]) == 0
    row = load_file(small_run / "model.safetensors")["tables.0.weight"].shape[1] * 4
    first = ", ".join(map(str, lists["0"].tolist()[:5]))
    assert f"hot: 20 rows, {20 * row:,} bytes; first {first}" in capsys.readouterr().out
    assert main(words) == 0
    assert "table 0: " in capsys.readouterr().out
    assert main([*words, "--rows", "0"]) == 2


def test_bench_compares_every_placement(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [
        "--rows",
        "2000",
        "--width",
        "32",
        "--dtype",
        "fp8",
        "--dim",
        "32",
        "--layers",
        "2",
        "--tokens",
        "3",
    ]
    words = [
        "table",
        "bench",
        *sizes,
        "--rounds",
        "1",
        "--seconds",
        "0.02",
        "--folder",
        str(tmp_path),
    ]
    assert main([*words, "--run", str(tmp_path / "none")]) == 2
    assert "expected a run folder with config.json" in capsys.readouterr().err
    shutil.copytree(small_run, tmp_path / "run")
    assert (
        main(
            [*words, "--figure", str(tmp_path / "f.svg"), "--run", str(tmp_path / "run"), "--json"]
        )
        == 0
    )
    lines = {line["name"]: line for line in printed_json(capsys)["lines"]}
    assert next(iter(lines)) == "resident"
    assert {
        "host memory, no prefetch",
        "disk warm",
        "disk cold",
        "disk cold, no prefetch",
        "disk warm, hot rows",
    } < set(lines)
    assert all(
        line["tokens_per_second"] > 0 and line["rows_per_second"] > 0 for line in lines.values()
    )
    assert all(0 < line["step_p50"] <= line["step_p99"] for line in lines.values())
    assert lines["disk warm, hot rows"]["hit_rate"] > 0
    assert lines["disk warm"]["hit_rate"] == 0
    assert "tokens a second" in (tmp_path / "f.svg").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.svg", "run"]
    page = write_report([tmp_path / "run"], tmp_path / "page.html", texts=("a whale",)).read_text(
        encoding="utf-8"
    )
    assert "Speed by placement of the rows" in page
    assert "disk warm, hot rows" in page
    assert main(["table", "bench", "--rows", "0"]) == 2
    assert "rows: got 0, expected at least 1" in capsys.readouterr().err


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in ("build", "inspect", "verify", "convert"))
    assert main(["table", "build", "--help"]) == 0
    assert "--shard-bytes" in capsys.readouterr().out
