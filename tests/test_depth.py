"""Tests that no call below a block is nested deeper than four functions, and no lookup than six.

Counted are functions of rorqual below Block.forward while kernels are off. The forward of an
autograd.Function counts as one with the function that applies it, and what chooses a kernel
(rorqual/kernels) is not counted.
"""

import functools
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import CodeType
from typing import Any

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
from rorqual.presets import PRESETS, preset
from rorqual.tables.fp8 import FP8
from rorqual.tables.row_writer import write_table
from rorqual.tables.table import Table

DEEPEST = 4
DEEPEST_LOOKUP = 6
# Presets that call what those of KINDS do not; the other presets are slow tests.
FAST = ("tiny-engram", "tiny-csa2", "v4.1-tiny", "qwen4-tiny", "deepseek-v3.2")
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


def chains(call, top: str, deepest: int) -> list[tuple[str, ...]]:
    """Returns the chains of functions below the innermost `top` that are deeper than `deepest`.

    They are chains of all functions of ours if `top` is "".
    """
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
        if not top or top in names:
            below = names[len(names) - names[::-1].index(top) :] if top else names
            if len(below) > deepest:
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
    deep = chains(lambda: what(model, ids), "Block.forward", DEEPEST)
    assert not deep, "\n".join(" > ".join(chain) for chain in deep)


def narrow(config: ModelConfig) -> ModelConfig:
    """Returns a model of the same parts and options, with small widths and few layers."""
    if config.dim <= 256:
        return config
    small: dict[str, Any] = {"dim": 64, "vocab_size": 64, "layers": 6}
    if config.mla is not None:
        ranks = {"q_lora_rank": config.mla.q_lora_rank and 16, "kv_lora_rank": 16}
        small["mla"] = replace(config.mla, heads=2, nope_dim=8, rope_dim=8, value_dim=8, **ranks)
    if config.gqa is not None:
        rope_dim = config.gqa.rope_dim and 8
        small["gqa"] = replace(config.gqa, heads=4, kv_heads=2, head_dim=16, rope_dim=rope_dim)
    if config.csa is not None:
        attention = {"heads": 4, "head_dim": 32, "rope_dim": 16, "window": 16}
        projections = {"q_lora_rank": 32, "o_lora_rank": 32, "groups": 2}
        indexer = {"index_heads": 4, "index_dim": 16, "top_k": 8}
        small["csa"] = replace(config.csa, **attention, **projections, **indexer)
    if config.dsa is not None:
        small["dsa"] = replace(config.dsa, heads=2, dim=16, top_k=10)
    if config.qsa is not None:
        small["qsa"] = replace(config.qsa, heads=2, dim=16, budget=8)
    if config.delta is not None:
        small["delta"] = replace(config.delta, key_heads=2, value_heads=4, key_dim=16, value_dim=16)
    if config.moe is not None:
        moe = config.moe
        step = math.lcm(moe.router.groups, moe.balance.devices)
        routed = step * -(-2 * moe.active // step)
        shared_width = moe.shared_width and 16
        small["moe"] = replace(moe, routed=routed, width=16, shared_width=shared_width)
    if config.engram is not None:
        rows = (31,) * len(config.engram.rows_per_head)
        ids = {"pad_id": 2, "eos_id": config.engram.eos_id and 3, "dead_tokens": ()}
        small["engram"] = replace(
            config.engram, layers=(1,), rows_per_head=rows, heads=2, head_dim=8, **ids
        )
    return replace(config, **small)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in PRESETS]
)
def test_no_call_of_a_preset_is_nested_deeper_than_four(name, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, kernels.REFERENCE)
    config = narrow(preset(name))
    assert config.parts == preset(name).parts
    model = LanguageModel(config)
    ids = torch.randint(config.vocab_size, (2, 40))

    def both() -> None:
        train(model, ids)
        decode(model, ids)

    deep = chains(both, "Block.forward", DEEPEST)
    assert not deep, "\n".join(" > ".join(chain) for chain in deep)


def opened(kind: str, values: torch.Tensor, folder: Path) -> Table:
    """Opens these values as a table, or rows that a table draws; no background thread fetches."""
    rows, width = values.shape
    if kind == "device":
        return Table(rows, width, prefetch=False)
    if kind == "host":
        return Table.of_values(values, prefetch=False)
    if kind == "trained on disk":
        table = Table.of_records(folder / "records", rows, width, prefetch=False)
        table.draw(0.1)
        return table
    dtype = FP8 if kind == "fp8 on disk" else torch.float32
    write_table(folder / "rows", values, dtype=dtype, shard_rows=3000)
    return Table.of_file(folder / "rows", cache_bytes=0, prefetch=False)


@pytest.mark.parametrize("count", [4, 4000])
@pytest.mark.parametrize("kind", ["device", "host", "disk", "fp8 on disk", "trained on disk"])
def test_a_row_id_becomes_a_vector_in_six_calls(kind, count, tmp_path, monkeypatch):
    """Looks up few rows and many without a background thread, so that a profile sees every call.

    read_rows is one, as its kernel is: what the reference calls is not counted.
    """
    monkeypatch.setenv(kernels.VARIABLE, kernels.REFERENCE)
    table = opened(kind, torch.randn(8000, 32), tmp_path)
    row_ids = torch.randint(8000, (count,))
    results = []
    deep = chains(lambda: results.append(table.prefetch(row_ids).wait()), "", DEEPEST_LOOKUP)
    deep = [chain for chain in deep if "read_rows" not in chain[:DEEPEST_LOOKUP]]
    assert not deep, "\n".join(" > ".join(chain) for chain in deep)
    torch.testing.assert_close(*results)
    assert results[0].shape == (count, 32)
