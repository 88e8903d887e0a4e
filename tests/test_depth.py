"""Tests that no call below a block is nested deeper than four functions.

Counted are functions of rorqual below Block.forward while kernels are off. The forward of an
autograd.Function counts as one with the function that applies it, and what chooses a kernel
(rorqual/kernels) is not counted.
"""

import functools
import sys
from dataclasses import replace
from pathlib import Path
from types import CodeType

import pytest
import torch

import rorqual
from rorqual import kernels
from rorqual.model import LanguageModel
from rorqual.model_config import (
    CSA2Config,
    CSAConfig,
    DeltaNetConfig,
    DSAConfig,
    GQAConfig,
    HyperConfig,
    MLAConfig,
    MoBAConfig,
    ModelConfig,
    NSAConfig,
    QSAConfig,
)
from rorqual.presets import preset

DEEPEST = 4
ROOT = Path(rorqual.__file__).parent
GQA = {"mla": None, "gqa": GQAConfig(heads=4, kv_heads=2, head_dim=16, qk_norm=True)}
NSA = {"block": 8, "stride": 4, "select_block": 4, "top_k": 4, "window": 6}
SPARSE = {"mla": None, "gqa": GQAConfig(heads=4, kv_heads=2, head_dim=16)}
CSA = CSAConfig(window=8, ratio=4, heavy_ratio=8, top_k=3, kinds=("window", "csa", "hca"))
KINDS = {
    "mla": {},
    "gqa": GQA,
    "window and sinks": {"mla": None, "gqa": GQAConfig(window=7, sinks=True)},
    "nsa": SPARSE | {"nsa": NSAConfig(**NSA)},
    "nsa tile": SPARSE | {"nsa": NSAConfig(**NSA, choice="tile")},
    "moba": SPARSE | {"moba": MoBAConfig(block=4, top_k=3)},
    "moba tile": SPARSE | {"moba": MoBAConfig(block=4, top_k=3, choice="tile")},
    "csa": {"mla": None, "csa": CSA},
    "dsa": {"mla": MLAConfig(q_lora_rank=24), "dsa": DSAConfig(heads=2, dim=32, top_k=10)},
    "csa2": {
        "mla": None,
        "csa": CSAConfig(window=5, top_k=3),
        "csa2": CSA2Config(
            ratios=(2, 2, 1), kv_sources=(0, 2), index_sources=(0, 2), cache_formats="published"
        ),
    },
    "qsa": {
        "mla": None,
        "gqa": GQAConfig(rope_dim=8, output_gate=True, qk_norm=True, centred=True),
        "qsa": QSAConfig(heads=2, dim=16, block=4, budget=8),
        "hyper": HyperConfig(kind="gated", rank=8),
    },
    "delta": {"mla": None, "gqa": GQAConfig(), "delta": DeltaNetConfig(layers=(0, 1, 2))},
}


def train(model: LanguageModel, ids: torch.Tensor) -> None:
    document_ids = torch.arange(ids.shape[1]).expand_as(ids) // 20
    for more in ({}, {"document_ids": document_ids}):
        model.train().loss(ids, ids, **more).total.backward()


@torch.no_grad()
def decode(model: LanguageModel, ids: torch.Tensor) -> None:
    """Prefills prompts of equal and of different lengths, and goes on by one and by many."""
    model.eval()
    for lengths in (None, [25, 30]):
        cache = model.new_cache(2)
        model.hidden(ids[:, :30], lengths=lengths, cache=cache, last=True)
        model.hidden(ids[:, 30:31], cache=cache)
        model.hidden(ids[:, 31:], cache=cache)


@functools.cache
def counted(code: CodeType) -> str | None:
    """Returns the name of a function that counts as one of ours."""
    path = Path(code.co_filename)
    ours = path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "kernels")
    applied = code.co_name == "forward" and code.co_varnames[:1] == ("ctx",)
    # Comprehensions and lambdas belong to the function that they stand in.
    return code.co_qualname if ours and not applied and not code.co_name.startswith("<") else None


def chains(call) -> list[tuple[str, ...]]:
    """Returns the chains of functions below Block.forward that are deeper than DEEPEST."""
    stack: list[str | None] = []
    deep: set[tuple[str, ...]] = set()

    def profile(frame, event, arg) -> None:
        if event == "return" and stack:
            stack.pop()
        if event != "call":
            return
        name = counted(frame.f_code)
        stack.append(name)
        if name is None:
            return
        names = [name for name in stack if name]
        if "Block.forward" in names:
            below = names[len(names) - names[::-1].index("Block.forward") :]
            if len(below) > DEEPEST:
                deep.add(tuple(below))

    call()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sorted(deep)


@pytest.mark.parametrize("what", [train, decode])
@pytest.mark.parametrize("kind", KINDS)
def test_no_call_of_a_block_is_nested_deeper_than_four(kind, what, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, kernels.REFERENCE)
    config: ModelConfig = replace(preset("tiny"), vocab_size=64, **KINDS[kind])
    model = LanguageModel(config)
    ids = torch.randint(config.vocab_size, (2, 40))
    deep = chains(lambda: what(model, ids))
    assert not deep, "\n".join(" > ".join(chain) for chain in deep)
