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
    trained, stored = (side.documents for side in (first.tokens.train, first.tokens.validation))
    assert trained + stored + first.tokens.about["skipped"]["near-duplicate"] == 480
    assert trained > stored > 0
    assert f"of {trained} documents to train on" in str(first)
    assert f"of {stored} to validate" in str(first)
    ours = prepare(
        replace(config.data, tokenizer=str(next((text / "cache" / "tokenizers").iterdir())))
    )
    assert ours.tokens.train.digest == first.tokens.train.digest


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
        source=str(tmp_path / "notes.jsonl"), vocab_size=260, cache=str(tmp_path / "cache")
    )
    result = prepare(data)
    stored = result.tokenizer.decode(result.tokens.validation.ids[1:].tolist())
    assert sorted([*learnt, stored]) == notes


def test_a_text_of_one_document_says_that_it_needs_another(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("A single short text.", encoding="utf-8")
    with pytest.raises(ValueError, match="got one document, expected at least two"):
        prepare(
            DataConfig(
                source=str(tmp_path / "one.txt"), vocab_size=300, cache=str(tmp_path / "cache")
            )
        )


def test_a_small_model_vocab_size_is_refused(config):
    with pytest.raises(
        ValueError, match=r"model\.vocab_size: got 280, expected at least the tokenizer's 300"
    ):
        open_source(replace(config, model=replace(config.model, vocab_size=280)))


def test_a_vocab_size_below_the_bytes_says_what_to_type(config):
    config = replace(
        config,
        model=replace(config.model, vocab_size=100),
        data=replace(config.data, vocab_size=None),
    )
    with pytest.raises(
        ValueError,
        match=r"model\.vocab_size: got 100, expected at least 257.*--model\.vocab-size 4096",
    ):
        open_source(config)
