"""Shared fixtures of the training tests: a small model and steps that train it, a text, a run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rorqual.data.stream import Stream
from rorqual.data.tokens import Tokens
from rorqual.layers.attention import MLAConfig
from rorqual.layers.balance import BalanceConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.router import RouterConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.train.config import DataConfig, OptimConfig, TrainConfig
from rorqual.train.optim import Optimizer
from rorqual.train.step import TrainStep

CONFIG = ModelConfig(
    vocab_size=61,
    dim=16,
    layers=2,
    dense_width=24,
    mla=MLAConfig(heads=2, kv_lora_rank=8, nope_dim=8, rope_dim=4, value_dim=8),
    moe=MoEConfig(
        routed=4,
        active=2,
        width=8,
        first_dense=1,
        router=RouterConfig(noise=0.1),
        balance=BalanceConfig(sequence=0.01),
    ),
    engram=EngramConfig(layers=(1,), rows_per_head=(61, 61), heads=2, head_dim=4),
    mtp=MTPConfig(),
    init_std=0.02,
)
ROWS = 4
LENGTH = 12


def make_tokens(seed: int = 0) -> Tokens:
    """Returns forty documents of a language in which every word is followed by one of three."""
    rng = np.random.default_rng(seed)
    document_ids = []
    for _ in range(40):
        words = [int(rng.integers(1, 61))]
        for _ in range(int(rng.integers(4, 30))):
            words.append(1 + (words[-1] * 7 + int(rng.integers(3))) % 60)
        document_ids.append([0, *words])
    lengths = [len(document) for document in document_ids]
    starts = np.cumsum([0, *lengths]).astype(np.int64)
    ids = np.array([word for document in document_ids for word in document], dtype=np.uint16)
    return Tokens(ids, starts, np.array(lengths), 0, f"{seed}")


def make_step(
    steps: int = 20, kind: str = "adamw", config: ModelConfig = CONFIG, **options: Any
) -> TrainStep:
    """Returns a step of a run of `steps`, whose biases are always updated by default."""
    optim = OptimConfig(kind=kind, lr=5e-3, warmup=3)
    options = {"bias_rest": 0.0, "batch_size": ROWS, "seq_len": LENGTH} | options
    training = TrainConfig(model=config, optim=optim, steps=steps, **options)
    model = LanguageModel(config, seed=5)
    return TrainStep(model, Optimizer(model, optim), training)


def make_stream() -> Stream:
    return Stream(make_tokens(), ROWS, LENGTH, seed=3)


def without_noise(config: ModelConfig) -> ModelConfig:
    return replace(config, moe=replace(config.moe, router=RouterConfig()))


def spoil(step: TrainStep, what: Callable[[TrainStep, dict], None], *numbers: int) -> TrainStep:
    """Changes losses or gradients of these steps before they are used."""
    forward_backward = step.forward_backward

    def spoilt(batch, number):
        losses, expert_counts = forward_backward(batch, number)
        if number in numbers:
            what(step, losses)
        return losses, expert_counts

    step.forward_backward = spoilt
    return step


def nan_gradient(step: TrainStep, losses: dict, value: float = torch.nan) -> None:
    step.model.blocks[0].ffn.down_proj.weight.grad.view(-1)[7] = value


@pytest.fixture(scope="session")
def small() -> SimpleNamespace:
    return SimpleNamespace(
        config=CONFIG,
        batch_size=ROWS,
        seq_len=LENGTH,
        tokens=make_tokens,
        step=make_step,
        stream=make_stream,
        without_noise=without_noise,
        spoil=spoil,
        nan_gradient=nan_gradient,
    )


MODEL = ModelConfig(
    vocab_size=300,
    dim=16,
    layers=2,
    dense_width=24,
    moe=MoEConfig(routed=4, active=2, width=8, first_dense=1, router=RouterConfig(noise=0.1)),
    engram=EngramConfig(layers=(1,), rows_per_head=(97, 97), heads=2, head_dim=4),
    init_std=0.02,
)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    animals = ("whale", "otter", "heron", "lynx", "newt")
    places = ("the sea", "a river", "the marsh", "a wood")
    lines = [
        json.dumps(
            {
                "text": f"{number}. A {animal} lives in {position} "
                f"with {number % 9} young, and eats {food}."
            }
        )
        for number in range(12)
        for animal in animals
        for position in places
        for food in ("krill", "fish and frogs")
    ]
    (folder / "animals.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def config(text, tmp_path) -> TrainConfig:
    data = DataConfig(source=str(text / "animals.jsonl"), vocab_size=300, cache=str(text / "cache"))
    optim = OptimConfig(lr=1e-2, warmup=2)
    return TrainConfig(
        model=MODEL,
        optim=optim,
        data=data,
        folder=str(tmp_path / "run"),
        steps=8,
        batch_size=4,
        seq_len=24,
        save_every=3,
    )
