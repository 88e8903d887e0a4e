"""record.py: what is kept of a metrics file, and the arithmetic of validation."""

import json
import math

import pytest
import torch
from torch import nn

from rorqual.model import LanguageModel, ModelConfig
from rorqual.train.record import trim, validate


def test_trim_keeps_the_steps_made_and_drops_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    trim(path, 3)
    assert not path.exists()
    whole = [{"step": step, "loss": 0.1 * step} for step in range(1, 6)] + [{"step": 3, "validation_loss": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in whole) + '{"step": 2, "lo')
    trim(path, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [whole[0], whole[1], whole[2], whole[5]]


def batches(ids: torch.Tensor, labels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    whole = {"ids": ids, "labels": labels, "documents": torch.zeros_like(ids)}
    return [{name: tensor[at : at + 1] for name, tensor in whole.items()} for at in range(len(ids))]


def test_validation_is_a_mean_over_tokens_whatever_the_batches():
    model = LanguageModel(ModelConfig(vocabulary=20, dim=16, layers=1, dense_width=24, init_std=0.5))
    ids = torch.randint(0, 20, (3, 9))
    labels = torch.randint(0, 20, (3, 9))
    labels[0, 2:] = -100
    labels[2] = -100
    model.train()
    state = torch.get_rng_state()
    found = validate(model, batches(ids, labels), 2.5, torch.float32)
    expected = nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert found["validation_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(expected.item() / math.log(2) / 2.5, rel=1e-5)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="no validation documents"):
        validate(model, [], 1.0, torch.float32)
