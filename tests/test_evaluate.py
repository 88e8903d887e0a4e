"""Tests scores against sums by hand.

Every token counts once, documents are apart, and bits per byte are over the text's own bytes.
"""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual import evaluate
from rorqual.data import chats
from rorqual.data.corpus import open_corpus, split
from rorqual.data.tokenizer import train
from rorqual.data.tokens import tokenise
from rorqual.layers.engram import EngramConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.presets import preset

TEXTS = ["A whale is a mammal.", "Ein Wal: é 🐋", "x", "the sea, the sea, the open sea " * 3, ""]


@pytest.fixture(scope="module")
def tokenizer():
    return train(TEXTS, 280)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig(
        vocab_size=290,
        dim=32,
        layers=2,
        moe=MoEConfig(routed=4, active=2, width=16),
        engram=EngramConfig(layers=(0,), rows_per_head=(97, 97), heads=2, head_dim=8),
        mtp=MTPConfig(),
        init_std=0.1,
    )
    return LanguageModel(config, torch.from_numpy(tokenizer.canonical_map())).eval()


@pytest.fixture(scope="module", params=["v4-tiny", "v4.1-tiny", "qwen4-tiny"])
def production(request, tokenizer):
    """The presets of production models."""
    config = replace(preset(request.param), vocab_size=290, dim=32)
    canonical = torch.from_numpy(tokenizer.canonical_map())
    mapped = config.engram is not None and config.engram.canonical
    return LanguageModel(config, canonical if mapped else None).eval()


@torch.no_grad()
def by_hand(model, tokenizer, texts) -> tuple[float, int]:
    """Sums the loss of each document alone, its end included."""
    nats = 0.0
    tokens = 0
    for text in texts:
        ids = torch.tensor([[tokenizer.begin_id, *tokenizer.encode(text), tokenizer.end_id]])
        nats += float(F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return nats, tokens


@pytest.mark.parametrize("batch_size", [1, 3])
def test_score_is_the_sum_by_hand(model, tokenizer, batch_size):
    nats, tokens = by_hand(model, tokenizer, TEXTS)
    score = evaluate.score(model, tokenizer, TEXTS, seq_len=512, batch_size=batch_size)
    assert score.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(
        nats / math.log(2) / sum(len(t.encode()) for t in TEXTS), rel=1e-5
    )
    assert score.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert (score.tokens, score.documents) == (tokens, len(TEXTS))
    assert score.bytes == sum(len(text.encode()) for text in TEXTS)


def test_production_models_are_scored_document_by_document(production, tokenizer):
    nats, tokens = by_hand(production, tokenizer, TEXTS)
    score = evaluate.score(production, tokenizer, TEXTS, seq_len=512, batch_size=3)
    assert score.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert score.tokens == tokens


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text("ab é", max_size=12), min_size=1, max_size=6),
    seq_len=st.integers(1, 9),
    batch_size=st.integers(1, 4),
)
def test_every_token_is_foretold_once(tokenizer, texts, seq_len, batch_size):
    given_ids = []
    labels = []
    owners = []
    encoded = evaluate.Encoded(tokenizer).of(texts)
    for ids, targets, document_ids in evaluate.pack(
        encoded, tokenizer, seq_len=seq_len, batch_size=batch_size
    ):
        assert ids.shape == targets.shape == document_ids.shape
        assert ids.shape[1] == seq_len
        assert ids.shape[0] <= batch_size
        cached = targets != -100
        given_ids += ids[cached].tolist()
        labels += targets[cached].tolist()
        owners += document_ids[cached].tolist()
    whole = [[tokenizer.begin_id, *tokenizer.encode(text), tokenizer.end_id] for text in texts]
    assert given_ids == [token for ids in whole for token in ids[:-1]]
    assert labels == [token for ids in whole for token in ids[1:]]
    assert owners == [number for number, ids in enumerate(whole) for _ in ids[:-1]]


def test_of_chats_the_answers_count_and_one_that_spells_a_token_is_counted(
    model, tokenizer, capsys
):
    answers = ["In the sea.", "a <|end|> b", "Everywhere \u00e9."]
    question = {"role": "user", "content": "Where do whales live?"}
    documents = [
        chats.document([question, {"role": "assistant", "content": text}]) for text in answers
    ]
    result = evaluate.score(model, tokenizer, documents, as_chats=True)
    whole = evaluate.score(model, tokenizer, documents[::2], as_chats=True)
    assert replace(result, tokens_per_second=0) == replace(whole, tokens_per_second=0)
    assert (result.documents, result.bytes) == (2, sum(len(a.encode()) for a in answers[::2]))
    assert "left out: 1 x a chat that spells a special token" in capsys.readouterr().err


def test_texts_of_a_file_by_side(tmp_path):
    documents = [f"document number {n} about whale {n * 7}" for n in range(120)]
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in documents), encoding="utf-8")
    every = list(evaluate.texts(str(path), split="all"))
    sides = {
        piece: list(evaluate.texts(str(path), split=piece)) for piece in ("train", "validation")
    }
    assert sorted(every) == sorted(sides["train"] + sides["validation"])
    assert all(split(text) == piece for piece, texts in sides.items() for text in texts)
    assert list(evaluate.texts(str(path), split="all", limit=3)) == every[:3]


@pytest.mark.parametrize("count", [2, 5])
def test_a_small_folder_validates_on_what_training_kept_apart(tmp_path, tokenizer, count):
    (tmp_path / "notes").mkdir()
    for n in range(count):
        (tmp_path / "notes" / f"{n}.md").write_text(
            f"document number {n} about whale {n * 7}", encoding="utf-8"
        )
    result = tokenise(
        open_corpus(str(tmp_path / "notes"), duplicate_threshold=None),
        tokenizer,
        tmp_path / "tokens",
    )
    for piece in ("train", "validation"):
        texts = list(evaluate.texts(tmp_path / "notes", split=piece))
        side = getattr(result, piece)
        assert sum(len(text.encode()) for text in texts) == side.bytes
        assert [tokenizer.begin_id, *tokenizer.encode(texts[-1])] in [
            side.ids[a:b].tolist() for a, b in zip(side.starts, side.starts[1:], strict=False)
        ]


def test_a_corpus_ends_where_training_ended_it(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(f'{{"body": "note {n}"}}\n' for n in range(9)), encoding="utf-8")
    assert list(evaluate.texts(path, split="all", column="body", within=3)) == [
        "note 0",
        "note 1",
        "note 2",
    ]


def test_nothing_to_score_and_bad_numbers(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="got no document"):
        evaluate.score(model, tokenizer, [])
    with pytest.raises(ValueError, match="seq_len=0"):
        evaluate.score(model, tokenizer, TEXTS, seq_len=0)
    with pytest.raises(ValueError, match="split: got 'test'"):
        list(evaluate.texts("wordnet", split="test"))


@pytest.fixture
def questions(tmp_path):
    """Writes a task of lm-eval into a folder: which of two ends a sentence has.

    Nothing is downloaded.
    """
    batch_size = [
        {"text": "the sea, the", "ends": [" sea", " Wal"], "end": 0},
        {"text": "A whale", "ends": ["x", " is"], "end": 1},
    ]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in batch_size), encoding="utf-8"
    )
    task = {
        "task": "whales",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": "end",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    # JSON is YAML.
    (tmp_path / "whales.yaml").write_text(json.dumps(task), encoding="utf-8")
    return batch_size, tmp_path / "whales.yaml"


@pytest.mark.slow
def test_lm_eval_runs_a_local_task(model, tokenizer, questions, tmp_path, monkeypatch):
    check_task(model, tokenizer, questions, tmp_path, monkeypatch)


@pytest.mark.slow
def test_lm_eval_runs_a_task_on_production_models(
    production, tokenizer, questions, tmp_path, monkeypatch
):
    check_task(production, tokenizer, questions, tmp_path, monkeypatch)


def check_task(model, tokenizer, questions, tmp_path, monkeypatch) -> None:
    """Compares the harness's accuracy with that of sums by hand."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    batch_size, task = questions
    result = evaluate.tasks(model, tokenizer, [str(task)])
    right = 0
    for row in batch_size:
        prompt = [tokenizer.begin_id, *tokenizer.encode(row["text"])]
        nats = []
        for end in row["ends"]:
            whole = [tokenizer.begin_id, *tokenizer.encode(row["text"] + end)]
            with torch.no_grad():
                logits = model(torch.tensor([whole[:-1]]))[0, len(prompt) - 1 :]
            nats.append(
                float(F.cross_entropy(logits, torch.tensor(whole[len(prompt) :]), reduction="sum"))
            )
        right += nats.index(min(nats)) == row["end"]
    (scores,) = result.values()
    assert scores["acc,none"] == right / len(batch_size)
    assert scores["sample_len"] == len(batch_size)


@pytest.mark.slow
def test_unknown_tasks_are_named(model, tokenizer):
    with pytest.raises(ValueError, match="tasks: got no_such_task, expected names"):
        evaluate.tasks(model, tokenizer, ["no_such_task"])


def test_tasks_need_the_harness(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="pip install --no-deps lm-eval"):
        evaluate.tasks(model, tokenizer, ["hellaswag"])
