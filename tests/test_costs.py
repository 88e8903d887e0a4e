"""Tests costs against the parameters of real models and against the published figures.

The models are built without storage; figures must agree to the digit.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.costs import (
    attention_products,
    costs,
    delta_products,
    engram_products,
    hyper_products,
)
from rorqual.model import LanguageModel
from rorqual.model_config import (
    BalanceConfig,
    DeltaNetConfig,
    DSAConfig,
    EngramConfig,
    GQAConfig,
    HyperConfig,
    MLAConfig,
    MoBAConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    NSAConfig,
    QSAConfig,
    RouterConfig,
)
from rorqual.presets import PRESETS, preset

PUBLISHED = {  # in 1e9: total, activated, with both embeddings; every digit as published
    "deepseek-v3": ("671.026", "36.626", "37.552"),
    "deepseek-v2": ("235.741", "20.85", "21.376"),
    "deepseek-v2-lite": ("15.7065", "2.451", "2.661"),
    "deepseekmoe-16b": ("16.3757", "2.619", "2.829"),
}


def billions(count: int, like: str) -> str:
    """Formats a count in 1e9 with as many digits as `like`."""
    return f"{count / 1e9:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_of_deepseek_to_the_digit(name):
    result = costs(preset(name))
    counts = result.total, result.activated, result.activated_with_embedding
    assert tuple(map(billions, counts, PUBLISHED[name])) == PUBLISHED[name]


def test_params_of_v3s_mtp_module_to_the_digit():
    result = costs(preset("deepseek-v3"))
    published = ("11.610", "1.615", "2.54")
    counts = result.mtp, result.mtp_activated, result.mtp_activated_with_embedding
    assert tuple(map(billions, counts, published)) == published


def test_v3_to_the_last_parameter():
    result = costs(preset("deepseek-v3"))
    assert result.total == 671_026_419_200
    assert result.total - 58 * 256 == 671_026_404_352, "and 14,848 router biases"
    assert result.cache_bytes_per_token == 61 * 576 * 2
    assert result.longest_context == 1_256_637  # pi * 10,000 * 40
    assert costs(preset("deepseekmoe-16b")).longest_context == 31_415


@pytest.mark.parametrize(
    ("name", "total", "memory"),
    [
        ("dense-4b", 4.1e9, 0),
        ("moe-27b", 26.7e9, 0),
        ("engram-27b", 26.7e9, 5.79e9),
        ("engram-40b", 39.5e9, 18.53e9),
    ],
)
def test_engrams_four(name, total, memory):
    result = costs(preset(name))
    assert result.total == pytest.approx(total, rel=0.005)
    assert result.memory == pytest.approx(memory, rel=1e-3)
    assert result.activated == pytest.approx(3.8e9, rel=0.03)


def test_the_classroom_model_by_hand():
    attention = 4 * 64 * 64
    experts = 4 * 3 * 64 * 8
    router = 4 * 64
    norms = 2 * 64
    by_hand = 100 * 64 + 2 * (attention + experts + router + norms) + 64
    assert by_hand == 52_288
    assert costs(preset("classroom")).total == by_hand + 2 * 4, "and the router biases"


class Counted(NamedTuple):
    """The results of `costs`, counted on a model."""

    total: int
    activated: int
    activated_with_embedding: int
    memory: int
    mtp: int
    mtp_activated: int
    mtp_activated_with_embedding: int
    matrices: int  # activated weights that multiply each token once


def counted(config: ModelConfig) -> Counted:
    """Counts the parameters of the model itself, built on the meta device without memory."""
    with torch.device("meta"):
        model = LanguageModel(config, seed=None)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    biases = {
        name: buffer.numel()
        for name, buffer in model.named_buffers()
        if name.endswith("e_score_correction_bias")
    }
    of_mtp = sum(size for name, size in (sizes | biases).items() if name.startswith("mtp."))
    memory = sum(size for name, size in sizes.items() if name.startswith("tables."))
    total = sum(sizes.values()) + sum(biases.values()) - of_mtp
    resting = 0
    if config.moe is not None:
        resting = (config.moe.routed - config.moe.active) * 3 * config.dim * config.moe.width
    resting_of_blocks = resting * sum(config.has_experts(i) for i in range(config.layers))
    looked_up = (
        len(config.engram.layers) * config.engram.memory_width if config.engram is not None else 0
    )
    embedding = config.vocab_size * config.dim
    depth = len(model.mtp)
    input_embedding = 0 if config.tied else embedding
    activated = total - resting_of_blocks - memory + looked_up
    drafted = of_mtp - depth * resting + (embedding if depth else 0)
    apart = ("tables.", "mtp.", "embed.", "reduction.")
    inside = ("_residual.", ".engram.", ".compress_", ".ape", ".attention.conv")
    matrices = [
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
        and not name.startswith(apart)
        and not any(piece in name for piece in inside)
    ]
    return Counted(
        total=total,
        activated=activated - input_embedding,
        activated_with_embedding=activated,
        memory=memory,
        mtp=of_mtp,
        mtp_activated=drafted,
        mtp_activated_with_embedding=drafted + (input_embedding if depth else 0),
        matrices=sum(matrices) + (embedding if config.tied else 0) - resting_of_blocks,
    )


def agrees(config: ModelConfig, context: int = 4096) -> None:
    result = costs(config, context)
    model = counted(config)
    assert result[: len(model) - 1] == model[:-1]
    assert result._fields[: len(model) - 1] == model._fields[:-1]
    deltas = sum(map(config.has_delta, range(config.layers)))
    beside = (
        (config.layers - deltas) * attention_products(config, context)
        + hyper_products(config)
        + engram_products(config)
    )
    if config.delta is not None:
        beside += deltas * delta_products(config.delta)
    assert result.flops_per_token == 2 * (model.matrices + beside)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_counted_as_its_model(name: str) -> None:
    agrees(preset(name))


def drawn_delta(number: Callable[[int, int], int]) -> DeltaNetConfig:
    key_heads = number(1, 3)
    return DeltaNetConfig(
        key_heads=key_heads,
        value_heads=key_heads * number(1, 3),
        key_dim=number(1, 5),
        value_dim=number(1, 5),
        kernel=number(1, 4),
        full_every=number(1, 4),
    )


def drawn(draw: Callable[[st.SearchStrategy[Any]], Any]) -> ModelConfig:
    """Draws a small odd model with any parts and options."""

    def number(least: int, limit: int) -> int:
        return draw(st.integers(least, limit))

    def some(value: Any) -> Any:
        return draw(st.sampled_from([None, value]))

    flag = st.booleans()
    parts = dict[str, Any](mla=None)
    dim = number(1, 33)
    layers = number(1, 5)
    attention = draw(st.sampled_from(["mla", "dsa", "gqa", "nsa", "moba", "qsa"]))
    if attention in ("mla", "dsa"):
        rope = 2 * number(1, 4)
        parts["mla"] = MLAConfig(
            heads=number(1, 5),
            q_lora_rank=some(number(1, 9)),
            kv_lora_rank=number(1, 9),
            nope_dim=number(1, 7),
            rope_dim=rope,
            value_dim=number(1, 7),
            bias=draw(flag),
        )
        if attention == "dsa":
            parts["dsa"] = DSAConfig(
                heads=number(1, 5), dim=rope + number(0, 5), top_k=number(1, 9)
            )
    else:
        kv_heads = number(1, 3)
        plain = attention == "gqa"
        parts["gqa"] = GQAConfig(
            heads=kv_heads * number(1, 3),
            kv_heads=kv_heads,
            head_dim=2 * number(1, 4),
            value_dim=some(number(1, 9)),
            window=some(number(1, 9)) if plain else None,
            sinks=plain and draw(flag),
            qk_norm=draw(flag),
            **{"rope_dim": 2, "output_gate": draw(flag), "bias": draw(flag)}
            if attention in ("gqa", "qsa")
            else {},
        )
        if attention == "qsa":
            block = number(1, 4)
            parts["qsa"] = QSAConfig(
                heads=number(1, 3), dim=number(2, 6), block=block, budget=block * number(1, 9)
            )
        stride = number(1, 3)
        sizes = {"block": stride * number(1, 3), "select_block": stride * number(1, 3)}
        if attention == "nsa":
            parts["nsa"] = NSAConfig(
                stride=stride, top_k=number(3, 5), window=number(1, 9), **sizes
            )
        if attention == "moba":
            parts["moba"] = MoBAConfig(
                block=number(1, 9), top_k=number(1, 4), full_layers=number(0, 6)
            )
    parts["delta"] = some(drawn_delta(number))
    if draw(flag):
        groups = number(1, 3)
        shared = number(0, 2)
        routed = groups * number(2, 4)
        parts["moe"] = MoEConfig(
            routed=routed,
            active=number(1, routed),
            shared=shared,
            width=number(1, 9),
            shared_width=some(number(1, 9)) if shared else None,
            shared_gate=shared > 0 and draw(flag),
            first_dense=number(0, layers),
            router=RouterConfig(
                groups=groups, groups_kept=groups, bias=draw(flag), token_id_layers=number(0, 2)
            ),
            balance=BalanceConfig(devices=groups),
        )
    if draw(flag):
        parts["engram"] = EngramConfig(
            layers=tuple(draw(st.sets(st.integers(0, layers - 1), min_size=1))),
            rows_per_head=tuple(draw(st.lists(st.integers(2, 60), min_size=1, max_size=3))),
            heads=number(1, 3),
            head_dim=number(1, 5),
            kernel=number(1, 4),
            conv=draw(flag),
            bias=draw(flag),
            gating=draw(st.sampled_from(["streams", "shared", "open"])),
        )
    if draw(flag):
        kind = draw(st.sampled_from(["mhc", "single_pass", "hc", "gated"]))
        mixes = ["sinkhorn"] if kind in ("hc", "gated") else ["sinkhorn", "identity"]
        parts["hyper"] = HyperConfig(
            kind=kind,
            streams=number(1, 5),
            rank=number(1, 9),
            mix=draw(st.sampled_from(mixes)),
        )
    if draw(flag):
        on_streams = "hyper" in parts and parts["hyper"].kind == "mhc" and draw(flag)
        parts["mtp"] = MTPConfig(depth=number(1, 3), streams=on_streams)
    return ModelConfig(
        vocab_size=number(1, 99),
        dim=dim,
        layers=layers,
        dense_width=number(1, 40),
        tied=draw(flag),
        **parts,
    )


@settings(max_examples=20, deadline=None)
@given(data=st.data(), context=st.integers(1, 200))
def test_any_config_is_counted_as_its_model(data: st.DataObject, context: int) -> None:
    agrees(drawn(data.draw), context)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(data=st.data(), context=st.integers(1, 200))
def test_many_more_configs_are_counted_as_their_models(data: st.DataObject, context: int) -> None:
    agrees(drawn(data.draw), context)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(mla=None, gqa=GQAConfig(window=4), moba=MoBAConfig()),
        ModelConfig(mla=None, gqa=GQAConfig(sinks=True), nsa=NSAConfig()),
        ModelConfig(mla=MLAConfig(rope_dim=16), dsa=DSAConfig(dim=15)),
        ModelConfig(vocab_size=10, engram=EngramConfig(pad_id=10)),
        ModelConfig(vocab_size=10, engram=EngramConfig(pad_id=3, eos_id=11)),
    ],
    ids=["window", "sinks", "dsa", "pad_id", "eos_id"],
)
def test_what_no_model_can_be_is_refused_as_the_model_refuses_it(config: ModelConfig) -> None:
    with pytest.raises(ValueError) as of_costs:
        costs(config)
    with pytest.raises(ValueError) as of_model:
        LanguageModel(config)
    assert str(of_costs.value) == str(of_model.value)


def test_flops_of_a_dense_model_by_hand():
    config = replace(preset("classroom"), moe=None, dense_width=10)
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 10) + 100 * 64
    attended = 2 * 4 * (16 + 16) * 50
    assert costs(config, context=100).flops_per_token == 2 * (matrices + attended)


@pytest.mark.parametrize("context", [0, -1])
def test_a_context_without_a_token_is_refused(context):
    for name in ("tiny", "classroom"):
        with pytest.raises(ValueError, match=f"context: got {context}, expected at least 1"):
            costs(preset(name), context)


def test_experts_at_rest_cost_nothing():
    tiny = preset("tiny")
    more = replace(tiny, moe=replace(tiny.moe, routed=64))
    router = 3 * 32 * 64
    assert costs(more).flops_per_token - costs(tiny).flops_per_token == 2 * router
    assert costs(more).activated - costs(tiny).activated == router + 3 * 32


PLAIN = ModelConfig(
    vocab_size=10,
    dim=8,
    layers=3,
    dense_width=4,
    mla=None,
    gqa=GQAConfig(heads=2, kv_heads=1, head_dim=4),
)
MATRICES = 3 * (8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 4) + 8 * 10  # q k v, o, SwiGLU; head


def products(config: ModelConfig, context: int = 100) -> int:
    """Returns the multiply-adds a token."""
    flops = costs(config, context).flops_per_token
    assert flops % 2 == 0
    return flops // 2


def test_plain_attention_by_hand():
    assert products(PLAIN) == MATRICES + 3 * 2 * (4 + 4) * 50
    assert costs(PLAIN).cache_bytes_per_token == 3 * 2 * (4 + 4)


def test_a_window_limits_what_is_seen_but_not_what_is_kept():
    windowed = replace(PLAIN, gqa=replace(PLAIN.gqa, window=20))
    seen = (20 * 20 / 2 + 80 * 20) / 100  # the first 20 tokens see half of 20 on average
    assert products(windowed) == MATRICES + 3 * 2 * (4 + 4) * seen
    assert costs(windowed).cache_bytes_per_token == costs(PLAIN).cache_bytes_per_token
    assert products(replace(PLAIN, gqa=replace(PLAIN.gqa, window=100))) == products(PLAIN)
    far = costs(windowed, 2 * 32768).flops_per_token - costs(windowed, 32768).flops_per_token
    assert far <= 2, "more context costs nothing more"


def test_qwen_as_published():
    """125B parameters and 51B in the table, of which a token activates 6B."""
    result = costs(preset("qwen3.8-flash-next"), 1 << 20)
    assert round((result.total - result.memory) / 1e9) == 126
    assert result.memory == 320_001_536 * 160
    assert 6e9 < result.activated < 7e9
    # Twelve blocks cache 2 pairs of 256, an index key of 128 and a quarter of one.
    token = 12 * 2 * (2 * 2 * 256 + 128 + 32)
    assert result.cache_bytes_per_token == token
    state = 36 * (4 * 48 * 128 * 128 + 2 * 3 * 10_240)
    assert result.cache_bytes == token * (1 << 20) + state


def test_delta_net_and_qsa_by_hand():
    delta = DeltaNetConfig(key_heads=1, value_heads=2, key_dim=3, value_dim=4, layers=(0, 2))
    config = replace(PLAIN, delta=delta)
    inner = 8 * (6 + 8 + 2 * 8 + 2 * 2)
    change = 2 * (inner - 3 * 8 * 8) + 2 * (3 * 2 * 3 * 4 + 14 * 4 - 2 * (4 + 4) * 50)
    assert products(config) == products(PLAIN) + change
    qsa = replace(PLAIN, qsa=QSAConfig(heads=2, dim=4, block=4, budget=8))
    seen = (11 * 11 / 2 + 89 * 11) / 100  # two blocks and up to three keys more
    scored = 2 * 4 * 100 // 8
    assert products(qsa) == MATRICES + 3 * (8 * 3 * 4 + int(2 * 8 * seen) + scored)


def test_moba_by_hand():
    moba = replace(PLAIN, moba=MoBAConfig(block=10, top_k=3))
    before = sum(range(10)) / 10  # blocks before the own, mean over ten
    seen = 5 + 10 * (0 + 1 + 8 * 2) / 10
    assert products(moba) == MATRICES + 3 * 2 * (4 * before + (4 + 4) * seen)
    assert costs(moba).cache_bytes_per_token == 3 * (2 * (4 + 4) + 4) - 3 * 4 + 3 * 4 * 4 // 10
    every = replace(PLAIN, moba=MoBAConfig(block=10, top_k=10))
    assert products(every) == products(PLAIN) + 3 * 2 * 4 * before, (
        "all blocks is full attention and the scores"
    )
    assert products(replace(PLAIN, moba=MoBAConfig(block=100))) == products(PLAIN)


def test_nsa_by_hand():
    nsa = replace(PLAIN, nsa=NSAConfig(block=4, stride=2, select_block=4, top_k=3, window=10))
    # two more pairs of keys and values; the gates' two layers
    projections = 3 * (2 * 8 * 8 + 8 * 6 + 6 * 6)
    blocks = range(3, 100, 2)  # the last key of each
    compressing = len(blocks) * 2 * (4 * 4 * 4 + 4 * 4) / 100
    compressed = sum(100 - last for last in blocks) / 100
    selected = (12 * 12 / 2 + 88 * 12) / 100
    in_window = (10 * 10 / 2 + 90 * 10) / 100
    each = compressing + 2 * (4 + 4) * (compressed + selected + in_window) + 3 * 2 * 4
    assert products(nsa) == MATRICES + projections + 3 * int(each)
    assert costs(nsa).cache_bytes_per_token == 3 * 2 * (4 + 4) * 3 + 3 * 2 * (4 + 4) // 2


def test_dsa_by_hand():
    mla = MLAConfig(heads=2, q_lora_rank=None, kv_lora_rank=6, nope_dim=4, rope_dim=2, value_dim=3)
    dense = replace(PLAIN, gqa=None, mla=mla)
    sparse = replace(dense, dsa=DSAConfig(heads=3, dim=5, top_k=20))
    indexer = 8 * 3 * 5 + 8 * 5 + 8 * 3 + 3 * (5 + 1) * 50
    seen = (20 * 20 / 2 + 80 * 20) / 100
    assert products(sparse) - products(dense) == 3 * (indexer + 2 * (4 + 2 + 3) * (seen - 50))
    assert costs(sparse).cache_bytes_per_token == 3 * 2 * (6 + 2 + 5)
    assert products(sparse, 20) - products(dense, 20) == 3 * (8 * 3 * 5 + 8 * 5 + 8 * 3), (
        "all are chosen: no scores"
    )


SITE = 2 * 4 * 8 + 4 * 4 * 8  # read, write, mix of 4 streams of width 8


@pytest.mark.parametrize(
    ("hyper", "by_hand"),
    [
        (HyperConfig(kind="mhc", iterations=20), 6 * (24 * 32 + 39 * 16 + SITE) + 4 * 32 + 32),
        (HyperConfig(kind="mhc", mix="identity"), 6 * (8 * 32 + 2 * 32) + 4 * 32 + 32),
        (HyperConfig(kind="single_pass"), 6 * (24 * 32 + 39 * 16 + SITE) - 32 + 32),
        (HyperConfig(kind="hc"), 6 * (4 * 6 * 8 + SITE)),
    ],
    ids=["mhc", "identity", "single_pass", "hc"],
)
def test_hyper_connections_by_hand(hyper, by_hand):
    assert products(replace(PLAIN, hyper=hyper)) - products(PLAIN) == by_hand


def test_engram_by_hand():
    engram = EngramConfig(layers=(0, 2), rows_per_head=(11, 11), heads=2, head_dim=3, kernel=4)
    memory = 2 * 2 * 3
    gate = 2 * 8
    one = memory * (8 + 8) + gate + 4 * 8
    assert products(replace(PLAIN, engram=engram)) - products(PLAIN) == 2 * one
    assert products(replace(PLAIN, engram=replace(engram, conv=False))) - products(PLAIN) == 2 * (
        one - 4 * 8
    )
    hyper = HyperConfig()
    streams = memory * (4 * 8 + 8) + 4 * gate + 4 * 4 * 8
    assert (
        products(replace(PLAIN, engram=engram, hyper=hyper)) - products(replace(PLAIN, hyper=hyper))
        == 2 * streams
    )
    for gating, less in (("shared", 3 * (memory + 1) * 8), ("open", 4 * (memory + 1) * 8 + 4 * 8)):
        piece = replace(PLAIN, engram=replace(engram, gating=gating), hyper=hyper)
        assert products(piece) - products(replace(PLAIN, hyper=hyper)) == 2 * (streams - less)


def test_the_bytes_of_tables_are_those_of_their_rows() -> None:
    """V4.1's two tables of fp8 records: 256 values and 8 scales a row."""
    result = costs(preset("deepseek-v4.1-flash"))
    rows = 384_006_168 + 384_016_682
    assert result.table_bytes == 2 * 256 * rows
    assert result.table_bytes_fp8 == 264 * rows
    assert costs(preset("tiny")).table_bytes == costs(preset("tiny")).table_bytes_fp8 == 0
