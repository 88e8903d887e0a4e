"""Tests source.py: a tokenized text, its cache, and the vocabularies that are refused."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual import checkpoint
from rorqual import config as configs
from rorqual.data.stream import validation_batches
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tokenizer import train as learn
from rorqual.model import LanguageModel
from rorqual.train import source
from rorqual.train.config import DataConfig, TrainConfig
from rorqual.train.source import check_sources, open_source, prepare


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


@pytest.fixture
def words(config, tmp_path) -> Path:
    """The tokenizer of the text, by name."""
    folder = tmp_path / "words"
    prepare(config.data).tokenizer.save(folder)
    return folder


def test_a_mixture_of_texts_ids_and_a_stream(config, text, words, tmp_path, capsys):
    """All three kinds of sources, each with its share of the sequences, from a YAML file."""
    pytest.importorskip("datasets")
    tokenizer = Tokenizer.load(words)
    whales = [f"{n} whales sing of the sea" for n in range(80)]
    ids = [i for line in whales for i in (*tokenizer.encode(line), tokenizer.end_id)]
    np.array(ids, dtype="<u2").tofile(tmp_path / "whales.bin")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} krill drift"}) + "\n" for n in range(150))
    )
    sources = [config.data.source, str(tmp_path / "whales.bin"), f"hf:{tmp_path / 'hub'}"]
    mixture = [f"{name}:{weight}" for name, weight in zip(sources, (2, 1, 1), strict=True)]
    (tmp_path / "run.yaml").write_text(
        f"data:\n  mixture: {json.dumps(mixture)}\n  streaming: true\n"
        f"  tokenizer: {words}\n  cache: {config.data.cache}\n"
    )
    mixed = replace(
        config, data=configs.load(TrainConfig, tmp_path / "run.yaml").data, batch_size=8
    )
    shares = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 4))
    assert tuple(mixed.data.shares.items()) == tuple(zip(sources, shares, strict=True))
    source = open_source(mixed)
    batch = next(source.stream(mixed))
    lines = [tokenizer.decode(row) for row in batch["ids"].tolist()]
    counts = {word: sum(word in line for line in lines) for word in ("lives", "whales", "krill d")}
    assert counts == {"lives": 4, "whales": 2, "krill d": 2}
    # A checkpoint's state goes on with the very next batch, in the engine's own form.
    stream = source.stream(mixed)
    batches = [next(stream) for _ in range(9)]
    state = source.stream(mixed)
    for _ in range(5):
        next(state)
    saved = checkpoint.decode(json.loads(json.dumps(checkpoint.encode(state.state_dict()))))
    resumed = open_source(mixed).stream(mixed)
    resumed.load_state_dict(saved)
    for batch in batches[5:]:
        assert torch.equal(next(resumed)["labels"], batch["labels"])
    held_out = tokenizer.decode(source.tokens.validation.ids[:].tolist())
    assert all(word in held_out for word in counts)
    logged = capsys.readouterr().err
    assert "and a stream to train on" in logged.replace("\n", " ")
    assert f"epochs of {sources[1]}" in logged.replace("\n", "")
    model = LanguageModel(mixed.model, torch.from_numpy(source.canonical_map()), seed=0)
    assert 0 < source.score(model, mixed, whole=True)["validation_loss"] < 20


def test_ids_and_streams_need_a_tokenizer_by_name(config, tmp_path, words):
    np.array([5, 6, 0] * 60, dtype="<u2").tofile(tmp_path / "a.bin")
    ids = replace(config, data=replace(config.data, source=str(tmp_path / "a.bin")))
    with pytest.raises(ValueError, match=r"data\.tokenizer: got none for token ids, .*a\.bin"):
        check_sources(ids)
    with pytest.raises(ValueError, match=r"data\.tokenizer: got none, expected the name"):
        prepare(ids.data)
    check_sources(replace(ids, data=replace(ids.data, tokenizer=str(words))))
    with pytest.raises(ValueError, match="data 'nowhere'"):
        check_sources(replace(config, data=DataConfig(mixture=("wordnet:1,nowhere:1",))))
    streamed = DataConfig(source="hf:nobody/nothing", streaming=True)
    with pytest.raises(ValueError, match=r"data\.tokenizer: got none for a stream"):
        check_sources(replace(config, data=streamed))
    wrong = tmp_path / "wrong.bin"
    np.array([5, 300, 0] * 60, dtype="<u2").tofile(wrong)
    with pytest.raises(
        ValueError, match=r"wrong\.bin: got id 300 at position 1, expected 0 to 299"
    ):
        prepare(DataConfig(source=str(wrong), tokenizer=str(words), cache=str(tmp_path)))


def test_a_tokenizer_of_a_mixture_learns_from_all_of_it(config, tmp_path):
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": f"zzzz zzzz {n}"}) + "\n" for n in range(90))
    )
    mixture = (f"{config.data.source}:1", f"{tmp_path / 'b.jsonl'}:1")
    source = prepare(DataConfig(mixture=mixture, vocab_size=300, cache=str(tmp_path / "cache")))
    assert any("zz" in source.tokenizer.token(i) for i in range(257, 300))
    assert [share.tokens for share in source.shares] == [
        len(folder) for folder in source.text.texts
    ]


def test_long_tokenising_is_logged(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(source, "LOGGED_EVERY", -1.0)
    data = replace(config.data, cache=str(tmp_path / "cache"))
    open_source(replace(config, data=data))
    assert "tokenised 0 of 0 MB in 0 s" in capsys.readouterr().err
    open_source(replace(config, data=data))
    assert "tokenised" not in capsys.readouterr().err
