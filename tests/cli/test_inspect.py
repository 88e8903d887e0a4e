"""Tests the commands that inspect text, runs and this machine."""

import json
import shutil
from pathlib import Path

import pytest

from rorqual.cli import inspect
from rorqual.cli.main import main


def test_data_counts_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        "the blue whale is large and eats krill",
        "a fin whale sings very low",
        "the blue whale is large and eats krill",
    ]
    (tmp_path / "notes.jsonl").write_text(
        "".join(json.dumps({"body": text}) + "\n" for text in texts)
    )
    words = ["data", str(tmp_path / "notes.jsonl"), "--column", "body"]
    assert main([*words, "--json", "--sample", "1"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["documents"] == 2
    assert content["bytes"] == len(texts[0]) + len(texts[1])
    assert sum(content["skipped"].values()) == 1
    assert len(content["sample"]) == 1
    assert main(words) == 0
    message = capsys.readouterr().out
    assert "2 documents" in message
    assert "licence: " in message
    assert f"  | {texts[0]}" in message


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["data", "no-such-thing"], 1, "no-such-thing"),
        (["data", "wordnet", "--limit", "0"], 1, "got limit 0"),
        (["data"], 2, "required: SOURCE"),
        (["report", "no-such-folder"], 1, "got no-such-folder, expected a run folder"),
    ],
)
def test_mistakes_are_a_line(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) <= 2


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    assert "cores" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["well"] is True
    monkeypatch.setattr("rorqual.doctor.Report.well", False)
    assert main(["doctor"]) == 1


def test_report_of_a_folder_of_runs(
    small_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "rorqual.analyze.report.sample", lambda run: ("A fin whale sings below the sea.",)
    )
    for name in ("a", "b", "b.before-1"):
        shutil.copytree(small_run, tmp_path / "runs" / name)
    assert inspect.runs_in(tmp_path / "runs") == [tmp_path / "runs" / "a", tmp_path / "runs" / "b"]
    assert inspect.runs_in(small_run) == [small_run]
    assert main(["report", str(tmp_path / "runs"), "--json", "--sentence", "The blue whale"]) == 0
    page = Path(json.loads(capsys.readouterr().out)["report"])
    assert page == tmp_path / "runs" / "report.html"
    assert page.read_text(encoding="utf-8").startswith("<!")
    assert main(["report", str(tmp_path / "runs" / "a"), "--out", str(tmp_path / "one.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'one.html'}: 1 run; open it in a browser\n"


@pytest.mark.slow
def test_a_report_leaves_the_pages_of_other_runs_alone(
    small_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "rorqual.analyze.report.sample", lambda run: ("A fin whale sings below the sea.",)
    )
    one, other = (shutil.copytree(small_run, tmp_path / "runs" / name) for name in ("a", "b"))

    def written(*words: str) -> Path:
        assert main(["report", *words, "--json"]) == 0
        return Path(json.loads(capsys.readouterr().out)["report"])

    page = written(str(one))
    before = page.read_bytes()
    assert page == one / "report.html"
    assert written(str(one), str(other)) == one / "report-2.html"
    assert written(str(other), str(one)) == other / "report.html"
    assert written(str(one), str(other)) == one / "report-2.html"
    assert page.read_bytes() == before
    assert written(str(one)) == page
    assert written(str(tmp_path / "runs")) == tmp_path / "runs" / "report.html"
    shutil.copytree(one, tmp_path / "runs" / "c")
    assert written(str(tmp_path / "runs")) == tmp_path / "runs" / "report.html"

    assert main(["report", str(one), "--out", str(other / "model.safetensors")]) == 1
    assert "which is no page, to write over" in capsys.readouterr().err
    assert (other / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    assert main(["report", str(other), "--out", str(page)]) == 0
    assert "replaces a page that was made from other runs" in capsys.readouterr().err.replace(
        "\n", " "
    )


def test_a_report_of_a_run_that_is_not_finished_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 1
    printed = (
        f"expected a run that has a checkpoint or is finished (go on: rorqual train {tmp_path})"
    )
    assert printed in capsys.readouterr().err
