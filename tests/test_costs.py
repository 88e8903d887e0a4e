"""Costs against the published figures, to the digit where they are published to the digit."""

import subprocess
import sys
from dataclasses import replace

import pytest

from rorqual.costs import costs
from rorqual.layers.attention import GQAConfig, MLAConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moba import MoBAConfig
from rorqual.layers.nsa import NSAConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.presets import PRESETS, preset

PUBLISHED = {  # in 1e9: total, activated, with both embeddings; every digit as it is published
    "deepseek-v3": ("671.026", "36.626", "37.552"),
    "deepseek-v2": ("235.741", "20.85", "21.376"),
    "deepseek-v2-lite": ("15.7065", "2.451", "2.661"),
    "deepseekmoe-16b": ("16.3757", "2.619", "2.829"),
}


def billions(count: int, like: str) -> str:
    """A count in 1e9, with as many digits as another."""
    return f"{count / 1e9:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_of_deepseek_to_the_digit(name):
    found = costs(preset(name))
    counts = found.total, found.activated, found.activated_with_embedding
    assert tuple(map(billions, counts, PUBLISHED[name])) == PUBLISHED[name]


def test_params_of_v3s_mtp_module_to_the_digit():
    found, published = costs(preset("deepseek-v3")), ("11.610", "1.615", "2.54")
    counts = found.mtp, found.mtp_activated, found.mtp_activated_with_embedding
    assert tuple(map(billions, counts, published)) == published


def test_v3_to_the_last_parameter():
    found = costs(preset("deepseek-v3"))
    assert found.total == 671_026_419_200
    assert found.total - 58 * 256 == 671_026_404_352, "and 14,848 router biases"
    assert found.cache_bytes_per_token == 61 * 576 * 2
    assert found.longest_context == 1_256_637  # pi * 10,000 * 40
    assert costs(preset("deepseekmoe-16b")).longest_context == 31_415


@pytest.mark.parametrize(
    ("name", "total", "memory"),
    [("dense-4b", 4.1e9, 0), ("moe-27b", 26.7e9, 0), ("engram-27b", 26.7e9, 5.79e9), ("engram-40b", 39.5e9, 18.53e9)],
)
def test_engrams_four(name, total, memory):
    found = costs(preset(name))
    assert found.total == pytest.approx(total, rel=0.005)
    assert found.memory == pytest.approx(memory, rel=1e-3)
    assert found.activated == pytest.approx(3.8e9, rel=0.03)


def test_the_classroom_model_by_hand():
    attention, experts, router, norms = 4 * 64 * 64, 4 * 3 * 64 * 8, 4 * 64, 2 * 64
    by_hand = 100 * 64 + 2 * (attention + experts + router + norms) + 64
    assert by_hand == 52_288
    assert costs(preset("classroom")).total == by_hand + 2 * 4, "and the router biases"


@pytest.mark.parametrize("name", ["tiny", "small", "classroom"])
def test_counts_are_those_of_a_real_model(name):
    config = preset(name)
    model = LanguageModel(config)
    found = costs(config)
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    assert found.total + found.mtp == sum(p.numel() for p in model.parameters()) + biases


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


def test_every_preset_is_counted_on_no_memory():
    for name in PRESETS:
        assert costs(preset(name)).total > 0


PLAIN = ModelConfig(
    vocabulary=10, dim=8, layers=3, dense_width=4, mla=None, gqa=GQAConfig(heads=2, kv_heads=1, head_dim=4)
)
MATRICES = 3 * (8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 4) + 8 * 10  # q k v, o, SwiGLU; head


def products(config: ModelConfig, context: int = 100) -> int:
    """Multiply-adds a token."""
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


def test_moba_by_hand():
    moba = replace(PLAIN, moba=MoBAConfig(block=10, chosen=3))
    before = sum(range(10)) / 10  # blocks before the own, the mean of ten
    seen = 5 + 10 * (0 + 1 + 8 * 2) / 10
    assert products(moba) == MATRICES + 3 * 2 * (4 * before + (4 + 4) * seen)
    assert costs(moba).cache_bytes_per_token == 3 * (2 * (4 + 4) + 4) - 3 * 4 + 3 * 4 * 4 // 10
    every = replace(PLAIN, moba=MoBAConfig(block=10, chosen=10))
    assert products(every) == products(PLAIN) + 3 * 2 * 4 * before, "all blocks is full attention and the scores"
    assert products(replace(PLAIN, moba=MoBAConfig(block=100))) == products(PLAIN)


def test_nsa_by_hand():
    nsa = replace(PLAIN, nsa=NSAConfig(block=4, stride=2, select_block=4, chosen=3, window=10))
    projections = 3 * (2 * 8 * 8 + 8 * 6 + 6 * 6)  # two more pairs of keys and values; the gates' two layers
    blocks = range(3, 100, 2)  # the last key of each
    compressing = len(blocks) * 2 * (4 * 4 * 4 + 4 * 4) / 100
    compressed = sum(100 - last for last in blocks) / 100
    selected, near = (12 * 12 / 2 + 88 * 12) / 100, (10 * 10 / 2 + 90 * 10) / 100
    each = compressing + 2 * (4 + 4) * (compressed + selected + near) + 3 * 2 * 4
    assert products(nsa) == MATRICES + projections + 3 * int(each)
    assert costs(nsa).cache_bytes_per_token == 3 * 2 * (4 + 4) * 3 + 3 * 2 * (4 + 4) // 2


def test_dsa_by_hand():
    mla = MLAConfig(heads=2, q_lora_rank=None, kv_lora_rank=6, nope_dim=4, rope_dim=2, value_dim=3)
    dense = replace(PLAIN, gqa=None, mla=mla)
    sparse = replace(dense, dsa=DSAConfig(heads=3, dim=5, chosen=20))
    indexer = 8 * 3 * 5 + 8 * 5 + 8 * 3 + 3 * (5 + 1) * 50
    seen = (20 * 20 / 2 + 80 * 20) / 100
    assert products(sparse) - products(dense) == 3 * (indexer + 2 * (4 + 2 + 3) * (seen - 50))
    assert costs(sparse).cache_bytes_per_token == 3 * 2 * (6 + 2 + 5)
    assert products(sparse, 20) - products(dense, 20) == 3 * (8 * 3 * 5 + 8 * 5 + 8 * 3), "all are chosen: no scores"


SITE = 2 * 4 * 8 + 4 * 4 * 8  # read, write, mix of 4 streams of width 8


@pytest.mark.parametrize(
    ("hyper", "by_hand"),
    [
        (HyperConfig(kind="mhc", iterations=20), 6 * (24 * 32 + 39 * 16 + SITE) + 4 * 32 + 32),
        (HyperConfig(kind="mhc", mix="identity", exit="mean"), 6 * (8 * 32 + 2 * 32)),
        (HyperConfig(kind="mhc", mix="permutations", exit="sum"), 6 * (32 * 32 + 24 * 16 + SITE)),
        (HyperConfig(kind="single_pass"), 6 * (24 * 32 + 39 * 16 + SITE) - 32 + 32),
        (HyperConfig(kind="hc"), 6 * (4 * 6 * 8 + SITE)),
    ],
    ids=["mhc", "identity", "permutations", "single_pass", "hc"],
)
def test_hyper_connections_by_hand(hyper, by_hand):
    assert products(replace(PLAIN, hyper=hyper)) - products(PLAIN) == by_hand


def test_engram_by_hand():
    engram = EngramConfig(layers=(0, 2), rows_per_head=(11, 11), heads=2, head_dim=3, kernel=4)
    memory, gate = 2 * 2 * 3, 2 * 8
    one = memory * (8 + 8) + gate + 4 * 8
    assert products(replace(PLAIN, engram=engram)) - products(PLAIN) == 2 * one
    assert products(replace(PLAIN, engram=replace(engram, conv=False))) - products(PLAIN) == 2 * (one - 4 * 8)
    hyper = HyperConfig()
    streams = memory * (4 * 8 + 8) + 4 * gate + 4 * 4 * 8
    assert products(replace(PLAIN, engram=engram, hyper=hyper)) - products(replace(PLAIN, hyper=hyper)) == 2 * streams
    for gating, less in (("shared", 3 * (memory + 1) * 8), ("open", 4 * (memory + 1) * 8 + 4 * 8)):
        part = replace(PLAIN, engram=replace(engram, gating=gating), hyper=hyper)
        assert products(part) - products(replace(PLAIN, hyper=hyper)) == 2 * (streams - less)


def test_counting_loads_neither_the_compiler_nor_transformers() -> None:
    """torch.compile's front end, which random numbers on the meta device load, takes longer than torch itself."""
    code = (
        "import sys; from rorqual.cli.main import main; assert main(['params', 'tiny', '--json']) == 0;"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'sympy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
