"""Tests scores.py: the arithmetic of validation, of answers and of samples."""

import math

import pytest
import torch
from torch import nn

from rorqual.data.needle_config import NeedleConfig
from rorqual.data.needles import DEPTHS, TASKS, column, exams
from rorqual.model import LanguageModel, ModelConfig
from rorqual.train.scores import needle_accuracy, sample_continuation, validate


def batches(ids: torch.Tensor, labels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    whole = {"ids": ids, "labels": labels, "document_ids": torch.zeros_like(ids)}
    return [
        {name: tensor[start : start + 1] for name, tensor in whole.items()}
        for start in range(len(ids))
    ]


def test_validation_is_a_mean_over_tokens_whatever_the_batches():
    model = LanguageModel(
        ModelConfig(vocab_size=20, dim=16, layers=1, dense_width=24, init_std=0.5)
    )
    ids = torch.randint(0, 20, (3, 9))
    labels = torch.randint(0, 20, (3, 9))
    labels[0, 2:] = -100
    labels[2] = -100
    model.train()
    model.blocks[0].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    result = validate(model, batches(ids, labels), 2.5, torch.float32)
    expected = nn.functional.cross_entropy(
        model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100
    )
    assert result["validation_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(expected.item() / math.log(2) / 2.5, rel=1e-5)
    assert [module.training for module in model.modules()] == modes and model.training
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="no validation documents"):
        validate(model, [], 1.0, torch.float32)


NEEDLES = NeedleConfig(questions=96)


class Reader(nn.Module):
    """Answers with the result of `choose` for the ids, whatever it was trained on."""

    def __init__(self, choose) -> None:
        super().__init__()
        self.choose, self.unused = choose, nn.Parameter(torch.zeros(1))

    def forward(self, ids: torch.Tensor, *, document_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(self.choose(ids), NEEDLES.vocab_size).float()


def looked_up(ids: torch.Tensor) -> torch.Tensor:
    """Reads the language: the first value after the key, or the next ones of a key's values."""
    first = 1 + NEEDLES.filler
    out = torch.zeros_like(ids)
    for row, line in enumerate(ids.tolist()):
        text = line[: line.index(0)]
        question = line[line.index(0) :]
        hidden = [
            pair
            for pair in zip(text, text[1:], strict=False)
            if first <= pair[0] < first + NEEDLES.keys
        ]
        values = []
        key = 0
        for index, token in enumerate(question):
            if first <= token < first + NEEDLES.keys:
                key = token
                values = [value for k, value in hidden if k == token]
            if values:
                out[row, len(text) + index] = values.pop(0)
        assert key
    return out


def test_a_perfect_reader_finds_everything_and_a_blind_one_what_chance_gives():
    model = Reader(looked_up).train()
    state = torch.get_rng_state()
    result = needle_accuracy(model, exams(NEEDLES, 16, 64))
    lengths = (32, 64, 128)
    assert {column(task, n) for task in TASKS for n in lengths} | {"accuracy"} == {
        n for n in result if "part" not in n
    }
    assert (
        set(result.values()) == {1.0}
        and {column(t, 64, p) for t in TASKS for p in range(DEPTHS)} <= result.keys()
    )
    assert model.training and torch.equal(torch.get_rng_state(), state)

    generator = torch.Generator().manual_seed(1)
    first = 1 + NEEDLES.filler + NEEDLES.keys
    blind = Reader(
        lambda ids: torch.randint(first, first + NEEDLES.values, ids.shape, generator=generator)
    )
    result = needle_accuracy(blind, exams(NEEDLES, 16, 64))
    assert 0.5 / NEEDLES.values < result["accuracy"] < 2 / NEEDLES.values
    assert needle_accuracy(Reader(torch.zeros_like), exams(NEEDLES, 16, 64))["accuracy"] == 0


def test_a_needle_that_is_found_only_in_the_beginning_shows_in_the_parts():
    def near_the_beginning(ids: torch.Tensor) -> torch.Tensor:
        text = (ids == 0).long().argmax(1, keepdim=True)
        cached = torch.where(
            torch.arange(ids.shape[1]) * DEPTHS >= text + DEPTHS, ids.clamp_max(1), ids
        )
        return looked_up(torch.where(torch.arange(ids.shape[1]) >= text, ids, cached))

    singles = {key: made for key, made in exams(NEEDLES, 16, 64).items() if key[0] == "single"}
    result = needle_accuracy(Reader(near_the_beginning), singles)
    assert result[column("single", 64, 0)] > 0.9 and result[column("single", 64, 3)] == 0
    assert 0 < result[column("single", 64)] < 0.5


def test_a_sample_is_the_same_each_time_and_stays_within_the_vocab_size():
    model = LanguageModel(
        ModelConfig(vocab_size=20, dim=16, layers=1, dense_width=24, init_std=0.5)
    ).train()
    state = torch.get_rng_state()
    prompt = torch.tensor([3, 1])
    sample = sample_continuation(model, prompt, 12, 5, torch.float32)
    assert sample == sample_continuation(model, prompt, 12, 5, torch.float32)
    assert len(sample) == 12 and set(sample) <= set(range(5)) and len(set(sample)) > 1
    assert model.training and torch.equal(torch.get_rng_state(), state)
    nn.init.constant_(model.head.weight, torch.nan)
    assert sample_continuation(model, prompt, 12, 5, torch.float32) == []
