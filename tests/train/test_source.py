"""Tests source.py: a tokenized text, its cache, and the vocabularies that are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rorqual.data.tokenizer import train as learn
from rorqual.train import source
from rorqual.train.config import DataConfig
from rorqual.train.source import open_source, prepare


def test_preparing_twice_reads_the_cache(config, text):
    first = prepare(config.data)
    marks = {
        path: path.stat().st_mtime_ns for path in (text / "cache").rglob("*") if path.is_file()
    }
    second = prepare(config.data)
    assert marks == {
        path: path.stat().st_mtime_ns for path in (text / "cache").rglob("*") if path.is_file()
    }
    assert first.tokens.train.digest == second.tokens.train.digest
    trained, held = (side.documents for side in (first.tokens.train, first.tokens.validation))
    assert trained + held + first.tokens.about["skipped"]["near-duplicate"] == 480
    assert trained > held > 0
    assert f"of {trained} documents to train on" in str(first)
    assert f"of {held} to validate" in str(first)
    own = prepare(
        replace(config.data, tokenizer=str(next((text / "cache" / "tokenizers").iterdir())))
    )
    assert own.tokens.train.digest == first.tokens.train.digest


def test_no_tokenizer_learns_from_what_validates(tmp_path, monkeypatch):
    notes = ["a whale sings", "no fish flies", "the sea is deep"]
    (tmp_path / "notes.jsonl").write_text(
        "".join(json.dumps({"text": note}) + "\n" for note in notes)
    )
    learnt = []
    monkeypatch.setattr(
        source, "train_tokenizer", lambda texts, size: learnt.extend(texts) or learn(notes, size)
    )
    data = DataConfig(
        source=str(tmp_path / "notes.jsonl"), vocabulary=260, cache=str(tmp_path / "cache")
    )
    found = prepare(data)
    held = found.tokenizer.decode(found.tokens.validation.ids[1:].tolist())
    assert sorted([*learnt, held]) == notes


def test_a_text_of_one_document_says_that_it_needs_another(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("A single short text.", encoding="utf-8")
    with pytest.raises(ValueError, match="got one document, expected at least two"):
        prepare(
            DataConfig(
                source=str(tmp_path / "one.txt"), vocabulary=300, cache=str(tmp_path / "cache")
            )
        )


def test_a_small_model_vocabulary_is_refused(config):
    with pytest.raises(
        ValueError, match=r"model\.vocabulary: got 280, expected at least the tokenizer's 300"
    ):
        open_source(replace(config, model=replace(config.model, vocabulary=280)))


def test_a_vocabulary_below_the_bytes_says_what_to_type(config):
    config = replace(
        config,
        model=replace(config.model, vocabulary=100),
        data=replace(config.data, vocabulary=None),
    )
    with pytest.raises(
        ValueError,
        match=r"model\.vocabulary: got 100, expected at least 257.*--model\.vocabulary 4096",
    ):
        open_source(config)
