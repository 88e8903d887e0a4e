"""Commands that look at text, runs and this machine."""

import json
import shutil
from pathlib import Path

import pytest

from rorqual.cli import look
from rorqual.cli.main import main


def test_data_counts_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        "the blue whale is large and eats krill",
        "a fin whale sings very low",
        "the blue whale is large and eats krill",
    ]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    words = ["data", str(tmp_path / "notes.jsonl"), "--column", "body"]
    assert main([*words, "--json", "--sample", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == 2
    assert found["bytes"] == len(texts[0]) + len(texts[1])
    assert sum(found["skipped"].values()) == 1
    assert len(found["sample"]) == 1
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "2 documents" in said
    assert "licence: " in said
    assert f"  | {texts[0]}" in said


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["data", "no-such-thing"], 1, "no-such-thing"),
        (["data", "wordnet", "--limit", "0"], 1, "got limit 0"),
        (["data"], 2, "Missing from rorqual data: SOURCE"),
        (["report", "no-such-folder"], 1, "got no-such-folder, expected a run folder"),
    ],
)
def test_mistakes_are_a_line(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.splitlines()) <= 2


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    assert "cores" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["well"] is True
    monkeypatch.setattr("rorqual.doctor.Report.well", False)
    assert main(["doctor"]) == 1


def test_report_of_a_folder_of_runs(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rorqual.analyze.report.sample", lambda run: ("A fin whale sings below the sea.",))
    for name in ("a", "b", "b.before-1"):
        shutil.copytree(small_run, tmp_path / "runs" / name)
    assert look.runs_in(tmp_path / "runs") == [tmp_path / "runs" / "a", tmp_path / "runs" / "b"]
    assert look.runs_in(small_run) == [small_run]
    assert main(["report", str(tmp_path / "runs"), "--json", "--sentence", "The blue whale"]) == 0
    page = Path(json.loads(capsys.readouterr().out)["report"])
    assert page == tmp_path / "runs" / "report.html"
    assert page.read_text(encoding="utf-8").startswith("<!")
    assert main(["report", str(tmp_path / "runs" / "a"), "--out", str(tmp_path / "one.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'one.html'}: 1 run; open it in a browser\n"


def test_a_report_of_a_run_that_is_not_finished_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 1
    assert f"expected a run that has a checkpoint or is finished (go on: rorqual train {tmp_path})" in capsys.readouterr().err
