"""Tests the model card of a run: what it says, and that its command is the training."""

import json
import shlex
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from rorqual import config as configs
from rorqual.cli.train import train_options
from rorqual.data.needle_config import NeedleConfig
from rorqual.presets import PRESETS, preset
from rorqual.train import card
from rorqual.train.config import DataConfig, OptimConfig, TaskConfig, TrainConfig, recipe
from rorqual.train.trainer import train

CONFIGS = {
    "a preset": TrainConfig(model=preset("tiny"), optim=recipe(64)),
    "parts off and on": TrainConfig(
        model=replace(preset("small"), engram=None, mtp=None, hyper=None, moe=None),
        optim=recipe(256),
    ),
    "other attention": TrainConfig(
        model=configs.change(preset("tiny"), [("mla", "none"), ("gqa.kv_heads", 2)]),
        optim=OptimConfig(lr=0.01, betas=(0.8, 0.99), decay_share=0.5),
    ),
    "a wide one": TrainConfig(model=preset("moe-27b"), optim=OptimConfig()),
    "options": TrainConfig(
        model=preset("tiny-engram"),
        optim=recipe(64),
        data=DataConfig(mixture=("notes/:0.3", "my texts/:0.7"), limit=100),
        steps=10,
        placement="host",
        skip_spikes=6.0,
        lm_eval=TaskConfig(),
    ),
    "needles": TrainConfig(
        model=preset("tiny"), optim=recipe(64, needles=True), needles=NeedleConfig(needles=3)
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_is_the_training(name: str) -> None:
    config = replace(CONFIGS[name], folder="runs/x y")
    words = shlex.split(shlex.join(card.command(config)))
    assert words[:2] == ["rorqual", "train"] and words[2] in PRESETS
    assert train_options(words[2:]) == config
    assert len(words) < 20


def test_a_run_has_its_card(config) -> None:
    folder = train(config)
    loaded = ModelCard.load(folder / "README.md")
    results = {one.metric_type: one.metric_value for one in loaded.data.eval_results}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "validation_loss" in line)
    assert results["loss"] == pytest.approx(last["validation_loss"], abs=1e-4)
    assert loaded.data.tags == ["rorqual", "mla", "moe", "engram"]
    text = loaded.content
    assert f"{shlex.join(card.command(config))}" in text
    assert "8 steps of 4 x 24 tokens, 768 tokens" in text
    assert "Licence of the data: " in text
    assert "rorqual 0" in text and "torch 2" in text and "Python 3" in text

    # A text of somebody's own stays, one of ours is replaced.
    (folder / "README.md").write_text("mine")
    again = replace(config, steps=9)
    train(again)
    assert (folder / "README.md").read_text() == "mine"
    (folder / "README.md").write_text(f"old {card.MARK}")
    train(replace(config, steps=10))
    assert "10 steps of 4 x 24 tokens" in (folder / "README.md").read_text()


def test_a_run_on_needles_has_a_card_without_licence(config) -> None:
    needles = NeedleConfig(keys=4, values=4, needles=2, drill=0, shortest=12, questions=4)
    model = replace(config.model, engram=None)
    run = replace(config, needles=needles, steps=2, seq_len=32, model=model)
    text = (train(run) / "README.md").read_text(encoding="utf-8")
    assert "share of right answers" in text and "none: rorqual makes them up" in text
