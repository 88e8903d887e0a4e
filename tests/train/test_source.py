"""Tests source.py: a tokenized text, its cache, and the vocabularies that are refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorqual.data.stream import validation_batches
from rorqual.data.tokenizer import train as learn
from rorqual.model import LanguageModel
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


def write_chats(path: Path, *chats: tuple[str, str]) -> Path:
    """Writes a chat a line, of a question and an answer."""
    lines = [
        {
            "messages": [
                {"role": r, "content": c} for r, c in zip(("user", "assistant"), chat, strict=True)
            ]
        }
        for chat in chats
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("limits", [{}, {"validation_tokens": 8}])
def test_a_sample_of_long_questions_reaches_to_a_label(config, tmp_path, limits):
    """The bits of a byte count one byte where every answer is empty."""
    chats = [(f"What follows {n}? " + "a whale, " * 60, "") for n in range(3)]
    data = replace(
        config.data, source=str(write_chats(tmp_path / "chats.jsonl", *chats)), column="messages"
    )
    config = replace(config, data=data, batch_size=2, seq_len=8, **limits)
    text = prepare(data)
    held_out = text.tokens.validation
    assert (
        held_out.bytes == 0 and not (next(validation_batches(held_out, 2, 8))["labels"] >= 0).any()
    )
    model = LanguageModel(config.model, torch.from_numpy(text.canonical_map()), seed=0)
    scores = text.score(model, config, whole=False)
    assert 0 < scores["validation_loss"] < 20
    assert scores["bits_per_byte"] == pytest.approx(
        scores["validation_loss"] * held_out.labels / math.log(2)
    )


def test_what_is_left_out_is_logged(config, tmp_path, capsys):
    chats = [(f"What follows {n}?", f"{n + 1}.") for n in range(9)]
    file = write_chats(tmp_path / "chats.jsonl", *chats, chats[0], chats[1], ("a", "<|end|>"))
    open_source(replace(config, data=replace(config.data, source=str(file), column="messages")))
    expected = "left out: 2 x duplicate, 1 x a chat that spells a special token"
    assert expected in capsys.readouterr().err
