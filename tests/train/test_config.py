"""Tests config.py: refused values, and the default optimizer of trainings."""

import subprocess
import sys

import pytest

from rorqual.config import from_dict
from rorqual.presets import PRESETS
from rorqual.train.config import OptimConfig, TrainConfig, recipe


def test_options_load_no_torch() -> None:
    code = (
        "import sys; from rorqual.train.config import TrainConfig; TrainConfig(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_recipe_falls_with_the_width_and_leaves_the_papers_models_alone():
    assert recipe(64) == OptimConfig(kind="muon", lr=0.02)
    assert recipe(256) == OptimConfig(kind="muon", lr=0.01)
    assert recipe(16) == recipe(64)  # a rate above the measured one is not established
    rates = [recipe(width).lr for width in range(64, 513)]
    assert all(wider < narrower for narrower, wider in zip(rates, rates[1:], strict=False))
    laptop = {name for name in PRESETS if "tiny" in name} | {"small", "classroom"}
    for name in laptop:
        assert recipe(PRESETS[name].dim).kind == "muon"
    for name in PRESETS.keys() - laptop:
        assert recipe(PRESETS[name].dim) == OptimConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": [0.9, 1.0]}, "betas: got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"warmup": -1}, "warmup"),
        ({"decay_share": 1.5}, "decay_share"),
        ({"schedule": "exponential"}, "'exponential', expected"),
        ({"decay": "linear"}, "'decay', expected 'schedule'"),
        ({"kind": "sgd"}, "'sgd', expected 'adamw' or 'muon'"),
        ({"clip": 0.0}, "clip"),
    ],
)
def test_a_wrong_optimizer_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(OptimConfig, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": -1}, "batch_size: got -1"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"bias_rest": 2.0}, "bias_rest"),
        ({"keep_every": 300}, "keep_every: got 300, expected a multiple of save_every, 250"),
        ({"skip_spikes": 0.0}, "skip_spikes"),
        (
            {"skip_spikes": 3.0},
            "skip_spikes: got 3.0 with skip_limit 10, expected a limit above 13",
        ),
        ({"keep_every": 250, "placement": "disk"}, "keep_every: got 250 with rows on the disk"),
        ({"rollbacks": -1}, "rollbacks"),
        ({"on_diverged": "restart"}, "'restart', expected 'stop' or 'rollback'"),
        ({"profile": 0}, "profile"),
        ({"lm_eval": {"tasks": []}}, "tasks: got none"),
        ({"lm_eval": {"tasks": ["piqa"], "every": 0}}, "every: got 0"),
        ({"seed": -1}, "seed"),
        ({"dtype": "float8"}, "'float8', expected 'float32' or 'bfloat16'"),
        ({"data": {"limit": 1}}, "limit: got 1"),
        (
            {"data": {"source": "hf:a/b", "streaming": True, "limit": 9}},
            "limit: got 9 documents with streaming, expected none",
        ),
        ({"data": {"vocab_size": 20}}, "vocab_size: got 20"),
        ({"data": {"sauce": "x"}}, "source"),
        ({"data": {"processes": 0}}, "processes: got 0"),
        ({"data": {"mixture": ["wordnet"]}}, "mixture: got 'wordnet', expected TEXT:WEIGHT"),
        ({"data": {"mixture": ["a:1"], "source": "b"}}, "got 'a:1' and the source 'b'"),
        ({"data": {"streaming": True}}, "streaming: got wordnet, expected a Hugging Face dataset"),
        ({"data": {"token_dtype": "int8"}}, "'int8', expected 'auto' or 'uint16' or 'uint32'"),
    ],
)
def test_a_wrong_training_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, change)


def test_indexers_alone_without_indexers_are_refused():
    with pytest.raises(ValueError, match="indexer_alone: got a model without DSA"):
        TrainConfig(indexer_alone=True)
