"""The page holds what the runs say, loads nothing from elsewhere, and refuses what is no run."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from rorqual.analyze import report
from rorqual.analyze.report import read_run, table, write_report
from rorqual.checkpoint import load_model, save_model
from rorqual.costs import costs
from rorqual.data.corpus import trained
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tokenizer import train as train_tokenizer
from rorqual.layers.engram import EngramConfig
from rorqual.model import LanguageModel
from rorqual.presets import preset

TEXTS = ["the whale swims in the <sea> & sings", "a river runs to the sea"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = train_tokenizer(TEXTS * 20, 300)
    base = replace(preset("tiny"), vocabulary=tokenizer.vocabulary)
    for name, engram in (("moe", None), ("engram", EngramConfig(rows_per_head=(50, 60)))):
        model = LanguageModel(replace(base, engram=engram), tokenizer.canonical_map() if engram else None)
        save_model(folder / name, model, tokenizer)
        records = [
            {"step": s, "tokens": 100 * s, "loss": 5.0 / s, "max_violation": 0.5, "seconds": s} for s in range(1, 9)
        ]
        records.append({"step": 8, "validation_loss": 4.25, "bits_per_byte": 1.5})
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return [folder / "moe", folder / "engram"]


class Balanced(HTMLParser):
    """Every tag that must be closed is."""

    OPEN = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self):
        super().__init__()
        self.stack = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.OPEN:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_page(runs, tmp_path):
    page = write_report(
        runs, tmp_path / "page" / "report.html", texts=TEXTS, sentence="the whale <sings>", note="a & b"
    )
    text = page.read_text(encoding="utf-8")
    assert "{{" not in text.replace("{{}}", "") and "4.2500" in text and "a &amp; b" in text
    assert "engram, block 1" in text and "&lt;" in text and text.count("<svg") == 4
    assert not re.search(r'(src|href)="(?!#|data:)', text), "nothing is loaded from elsewhere"
    parser = Balanced()
    parser.feed(text)
    assert parser.stack == []


def test_a_reading_knows_its_run(runs):
    reading = read_run(runs[1], texts=TEXTS)
    assert reading.last("validation_loss") == 4.25 and reading.last("nothing") is None
    assert reading.load.counts.sum() > 0 and reading.gates is not None and reading.costs.memory > 0
    assert read_run(runs[0], texts=TEXTS).gates is None


def test_costs_and_load_are_those_of_the_training(runs, tmp_path, monkeypatch):
    notes = tmp_path / "notes.jsonl"
    notes.write_text("".join(json.dumps({"body": f"the whale {n} swims in the sea"}) + "\n" for n in range(3)))
    folders = []
    for folder in runs:
        folders.append(tmp_path / folder.name)
        shutil.copytree(folder, folders[-1])
        said = {"data": {"source": str(notes), "column": "body", "limit": None}, "length": 64}
        (folders[-1] / "train.json").write_text(json.dumps(said))
    drawn, draw = [], report._held_out
    monkeypatch.setattr(report, "_held_out", lambda *given: drawn.append((given, draw(*given))) or drawn[-1][1])
    write_report(folders, tmp_path / "report.html", sentence="the whale")
    assert [given[:3] for given, _ in drawn] == [(str(notes), "body", None)], "once for both runs"
    assert len(drawn[0][1]) == 1
    assert read_run(folders[0], texts=TEXTS).costs == costs(read_run(folders[0], texts=TEXTS).config, 64)
    notes.unlink()
    monkeypatch.setattr(
        report, "_held_out", lambda source, *_: draw(str(notes), "text", None, 1) if source != "wordnet" else ("a",)
    )
    assert report.sample(trained(folders[0])) == ("a",)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a run folder"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(ValueError, match="expected at least one run"):
        write_report([], tmp_path / "report.html")


def test_cells_are_escaped():
    assert "&lt;b&gt;" in table(["x"], [["<b>"]])


def test_expert_load_begins_each_text_as_a_document(runs):
    model, tokenizer = load_model(runs[0]), Tokenizer.load(runs[0])
    tokenizer.begin_id = tokenizer.end_id + 5
    taken = report._load(model, tokenizer, ["", ""]).by_token.sum((0, 1))
    assert taken.nonzero().flatten().tolist() == [tokenizer.begin_id]


def test_a_figure_is_shown_no_wider_than_it_was_drawn(runs, tmp_path):
    from rorqual.analyze import figures
    from rorqual.analyze.report import svg

    drawing = svg(figures.curves([]))
    assert 'style="--own: 540pt"' in drawing and 'height="' not in drawing.split(">")[1], "7.5 inches of 72 points"
    page = write_report(runs[:1], tmp_path / "report.html", texts=TEXTS).read_text(encoding="utf-8")
    assert "max-width: min(60rem, var(--own" in page
