"""The presets: a ModelConfig for each name, data only.

`classroom` and the paper's four are built from published sizes; what a paper does not publish is
marked `ours`. DeepSeek: arXiv 2401.06066, 2405.04434, 2412.19437, 2512.02556. Engram's four:
2601.07372.

Two presets publish a memory and stand for that alone; everything else in them that is not named
here is ours.

    engram-demo           the authors' demo: memory, width 1024, 30 blocks, 4 streams; seed 0,
                          pad id 2

`qwen3.8-flash-next` is the whole text model, with its memory row for row: raw ids, splitmix64,
texts that end at id 248044, one table of 320,001,536 rows x 160. `qwen4-tiny` has all its
mechanisms in sizes that are ours; it trains on a laptop.

`tiny`, `tiny-engram` and the seven that are named after an attention come with trained weights
(rorqual/weights): all of them are ours. In `tiny-engram` 9 of the 32 experts of `tiny` became rows
of Engram; it has 3 % more parameters and FLOPs. The seven differ in their attention alone.
"""

from dataclasses import replace

from rorqual.hints import choose
from rorqual.model_config import (
    BalanceConfig,
    CSA2Config,
    CSAConfig,
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
    RopeConfig,
    RouterConfig,
    YarnConfig,
)

_V1 = RouterConfig(score="softmax", renormalise=False, bias=False)
_V2 = replace(_V1, groups=8, groups_kept=3, group_score="max", scale=16.0)
_V3 = RouterConfig(
    score="sigmoid", groups=8, groups_kept=4, group_score="top2", renormalise=True, scale=2.5
)
_SOFTMAX_BALANCE = BalanceConfig(
    bias_rate=0.0,
    sequence=0.0,
    expert=0.003,
    device=0.05,
    communication=0.02,
    devices=8,
    device_limit=3,
)
_MLA = MLAConfig(
    heads=128, q_lora_rank=1536, kv_lora_rank=512, nope_dim=128, rope_dim=64, value_dim=128
)
# The width is ours.
_MOE_27B = MoEConfig(
    routed=72, active=6, shared=2, width=1536, first_dense=1, router=RouterConfig(scale=2.5)
)
_ENGRAM_27B = EngramConfig(
    layers=(1, 14), rows_per_head=(2_262_400, 2_262_400), heads=8, head_dim=80
)
_MOE_16B = MoEConfig(
    routed=64,
    active=6,
    shared=2,
    width=1408,
    first_dense=1,
    router=_V1,
    balance=BalanceConfig(bias_rate=0.0, sequence=0.0, expert=0.001),
)
_YARN = YarnConfig(
    factor=40.0, original_length=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
)

_V4 = RouterConfig(score="sqrtsoftplus", scale=1.5, token_id_layers=3)
# YaRN changes the frequencies alone.
_COMPRESS_ROPE = RopeConfig(
    base=160_000.0,
    yarn=YarnConfig(factor=16.0, original_length=65_536, mscale=0.0, mscale_all_dim=0.0),
)

_CSA = CSAConfig(
    heads=64,
    head_dim=512,
    rope_dim=64,
    q_lora_rank=1024,
    groups=8,
    o_lora_rank=1024,
    window=128,
    kinds=("window", "window", *("csa", "hca") * 20, "csa"),
    ratio=4,
    heavy_ratio=128,
    index_heads=64,
    index_dim=128,
    top_k=512,
    compress_rope=_COMPRESS_ROPE,
)
_MOE_V4 = MoEConfig(routed=256, active=6, shared=1, width=2048, swiglu_limit=10.0, router=_V4)

_MOE_TINY = MoEConfig(
    routed=32, active=2, shared=1, width=32, balance=BalanceConfig(bias_rate=0.01)
)
TINY = ModelConfig(
    vocab_size=4096,
    dim=64,
    layers=3,
    dense_width=256,
    mla=MLAConfig(heads=4, kv_lora_rank=32, nope_dim=16, rope_dim=16, value_dim=16),
    moe=_MOE_TINY,
    hyper=HyperConfig(),
    init_std=0.1,
)

# The arm with Engram of `rorqual plan --like tiny --rho 0.7 --context 128`.
TINY_ENGRAM = replace(
    TINY,
    moe=replace(_MOE_TINY, routed=23),
    engram=EngramConfig(layers=(1,), rows_per_head=(1237, 1237), heads=8, head_dim=8),
)

# What the small models of every attention share. Selections are small enough for sequences of 128
# tokens to need them.
_KIND = ModelConfig(
    vocab_size=2048,
    dim=64,
    layers=3,
    mla=None,
    gqa=GQAConfig(heads=4, kv_heads=2, head_dim=16),
    moe=replace(_MOE_TINY, routed=8, width=16),
    tied=True,
    init_std=0.1,
)

TINY_GQA = _KIND
TINY_NSA = replace(_KIND, nsa=NSAConfig(block=8, stride=4, select_block=8, top_k=4, window=16))
TINY_MOBA = replace(_KIND, moba=MoBAConfig(block=16, top_k=3))
TINY_DSA = replace(
    _KIND,
    gqa=None,
    mla=TINY.mla,
    dsa=DSAConfig(heads=2, dim=16, top_k=32, warmup=100),
)
_CSA_KIND = CSAConfig(
    heads=4,
    head_dim=16,
    rope_dim=8,
    q_lora_rank=32,
    groups=2,
    o_lora_rank=16,
    window=16,
    kinds=("window", "csa", "hca"),
    ratio=4,
    heavy_ratio=16,
    index_heads=2,
    index_dim=16,
    top_k=8,
    warmup=100,
)
TINY_CSA = replace(_KIND, gqa=None, csa=_CSA_KIND)
TINY_CSA2 = replace(
    _KIND,
    gqa=None,
    csa=replace(_CSA_KIND, kinds=(), top_k=16),
    csa2=CSA2Config(
        ratios=(0, 2, 2),
        kv_sources=(1,),
        index_sources=(1, 2),
        candidate_source=1,
        candidate_block=8,
        candidate_blocks=4,
    ),
)
TINY_QSA = replace(
    _KIND,
    gqa=GQAConfig(
        heads=4,
        kv_heads=2,
        head_dim=16,
        qk_norm=True,
        centred=True,
        rope_dim=8,
        output_gate=True,
    ),
    qsa=QSAConfig(heads=2, dim=16, block=4, budget=32),
    delta=DeltaNetConfig(
        key_heads=2, value_heads=4, key_dim=16, value_dim=16, gate="sigmoid", full_every=3
    ),
    rope=RopeConfig(interleaved=False),
)

SMALL = ModelConfig(
    vocab_size=8192,
    dim=256,
    layers=6,
    dense_width=1024,
    mla=MLAConfig(heads=8, q_lora_rank=96, kv_lora_rank=64, nope_dim=32, rope_dim=16, value_dim=32),
    moe=MoEConfig(routed=16, active=4, shared=1, width=128, first_dense=1),
    engram=EngramConfig(layers=(1,), rows_per_head=(8192, 8192), heads=4, head_dim=32),
    hyper=HyperConfig(),
    mtp=MTPConfig(),
    init_std=0.02,
)

# DeepSeek-V4's mechanisms at the size of `tiny`: all three kinds of blocks, a router by token id,
# MTP on the streams.
V4_TINY = ModelConfig(
    vocab_size=4096,
    dim=64,
    layers=4,
    mla=None,
    csa=CSAConfig(
        heads=4,
        head_dim=32,
        rope_dim=16,
        q_lora_rank=32,
        groups=2,
        o_lora_rank=32,
        window=32,
        kinds=("window", "csa", "hca", "csa"),
        ratio=4,
        heavy_ratio=16,
        index_heads=4,
        index_dim=16,
        top_k=16,
        warmup=100,
    ),
    moe=MoEConfig(
        routed=16,
        active=2,
        shared=1,
        width=32,
        swiglu_limit=10.0,
        router=RouterConfig(score="sqrtsoftplus", scale=1.5, token_id_layers=1),
        balance=BalanceConfig(bias_rate=0.01),
    ),
    hyper=HyperConfig(),
    mtp=MTPConfig(streams=True),
    init_std=0.1,
)

# Every mechanism of DeepSeek-V4.1: a window alone, a source of each ratio, blocks that select anew
# and that reuse, coarse blocks, single-pass streams, Engram.
V4_1_TINY = ModelConfig(
    vocab_size=4096,
    dim=64,
    layers=5,
    mla=None,
    csa=CSAConfig(
        heads=4,
        head_dim=32,
        rope_dim=16,
        q_lora_rank=32,
        groups=2,
        o_lora_rank=32,
        window=32,
        index_heads=4,
        index_dim=32,
        top_k=16,
        warmup=100,
    ),
    csa2=CSA2Config(
        ratios=(0, 2, 2, 1, 1),
        kv_sources=(1, 3),
        index_sources=(1, 3, 4),
        candidate_source=3,
        candidate_block=8,
        candidate_blocks=8,
        cache_formats="published",
    ),
    moe=MoEConfig(
        routed=16,
        active=2,
        shared=1,
        width=32,
        swiglu_limit=10.0,
        router=RouterConfig(score="sqrtsoftplus", scale=1.5),
        balance=BalanceConfig(bias_rate=0.01),
    ),
    engram=EngramConfig(
        layers=(1,),
        rows_per_head=(1024, 1024, 1024),
        heads=4,
        head_dim=32,
        conv=False,
        sign="copysign",
        eps=1e-20,
    ),
    hyper=HyperConfig(kind="single_pass", norm_eps=1e-20),
    eps=1e-20,
    init_std=0.1,
)

CLASSROOM = ModelConfig(
    vocab_size=100,
    dim=64,
    layers=2,
    dense_width=256,
    mla=None,
    gqa=GQAConfig(heads=4, kv_heads=4, head_dim=16),
    moe=MoEConfig(routed=4, active=2, shared=0, width=8),
    tied=True,
    init_std=0.02,
)

DENSE_4B = ModelConfig(
    vocab_size=129_280,
    dim=2560,
    layers=30,
    dense_width=11_904,  # ours
    mla=replace(_MLA, heads=32, q_lora_rank=768),  # both ranks ours
    hyper=HyperConfig(),
)

MOE_27B = replace(
    DENSE_4B,
    dense_width=10_944,  # ours
    moe=_MOE_27B,
)

ENGRAM_27B = replace(
    MOE_27B,
    moe=replace(_MOE_27B, routed=55),
    engram=_ENGRAM_27B,
)

ENGRAM_40B = replace(ENGRAM_27B, engram=replace(_ENGRAM_27B, rows_per_head=(7_239_680, 7_239_680)))

ENGRAM_DEMO = replace(
    DENSE_4B,
    dim=1024,
    dense_width=4096,
    mla=replace(_MLA, heads=16, q_lora_rank=None),
    engram=EngramConfig(
        layers=(1, 15),
        rows_per_head=(646_400, 646_400),
        heads=8,
        head_dim=64,
        bias=True,
        pad_id=2,
        end_of_document=False,
    ),
)

# The draft layers are left out: their blocks have parts that those of MTPConfig have not.
DEEPSEEK_V4_1_FLASH = ModelConfig(
    vocab_size=129_280,
    dim=5120,
    layers=40,
    dense_width=2304,  # no block is dense
    mla=None,
    csa=replace(_CSA, q_lora_rank=1280, kinds=(), index_heads=32, ties="topk"),
    csa2=CSA2Config(
        ratios=(0,) * 2 + (2,) * 18 + (1,) * 20,
        kv_sources=(2, 8, 14, 20),
        index_sources=(2, 8, 14, 20, 24, 28, 32, 36),
        candidate_source=20,
        candidate_block=8,
        candidate_blocks=2048,
        cache_formats="published",
    ),
    moe=replace(
        _MOE_V4,
        routed=384,
        width=2304,
        router=replace(_V4, token_id_layers=0, image_ids=(129_264,)),
    ),
    engram=EngramConfig(
        layers=(1, 14),
        rows_per_head=(16_000_000, 16_000_000, 16_000_000),
        heads=8,
        head_dim=256,
        conv=False,
        sign="copysign",
        eps=1e-20,
        pad_id=2,
        dead_tokens=(129_264,),
    ),
    hyper=HyperConfig(kind="single_pass", norm_eps=1e-20),
    eps=1e-20,
    init_std=0.02,
)

_GATED_GQA = GQAConfig(
    heads=24,
    kv_heads=2,
    head_dim=256,
    qk_norm=True,
    centred=True,
    rope_dim=64,
    output_gate=True,
)
_MOE_QWEN = MoEConfig(
    routed=512,
    active=10,
    shared=1,
    width=640,
    shared_width=640,
    shared_gate=True,
    router=RouterConfig(score="softmax", bias=False),
    balance=BalanceConfig(bias_rate=0.0, sequence=0.0, expert=0.001),
)
_PLE = EngramConfig(
    layers=(1,),
    rows_per_head=(20_000_000, 20_000_000),
    heads=8,
    head_dim=160,
    eps=1e-6,
    conv_eps=1e-6,
    centred=True,
    seed=1234,
    generator="splitmix64",
    canonical=False,
    eos_id=248_044,
    row_multiple=128,
    shards=128,
)

QWEN3_8_FLASH_NEXT = ModelConfig(
    vocab_size=248_320,
    dim=2560,
    layers=48,
    mla=None,
    gqa=_GATED_GQA,
    qsa=QSAConfig(heads=4, dim=128, block=4, budget=2048),
    delta=DeltaNetConfig(
        key_heads=16, value_heads=48, key_dim=128, value_dim=128, gate="sigmoid", full_every=4
    ),
    rope=RopeConfig(base=10_000_000.0, interleaved=False),
    moe=_MOE_QWEN,
    hyper=HyperConfig(kind="gated", streams=4, rank=320),
    engram=_PLE,
    init_std=0.02,
)

QWEN4_TINY = replace(
    QWEN3_8_FLASH_NEXT,
    vocab_size=4096,
    dim=64,
    layers=4,
    gqa=replace(_GATED_GQA, heads=4, head_dim=32, rope_dim=8),
    qsa=QSAConfig(heads=2, dim=16, block=4, budget=64),
    delta=DeltaNetConfig(key_heads=2, value_heads=4, key_dim=16, value_dim=16, gate="sigmoid"),
    rope=RopeConfig(interleaved=False),
    moe=replace(_MOE_QWEN, routed=32, active=2, width=32, shared_width=None),
    hyper=HyperConfig(kind="gated", streams=4, rank=16),
    engram=replace(_PLE, rows_per_head=(4096, 4096), heads=4, head_dim=8, eos_id=0, shards=1),
    init_std=0.05,
)

DEEPSEEK_V3 = ModelConfig(
    vocab_size=129_280,
    dim=7168,
    layers=61,
    dense_width=18_432,
    mla=_MLA,
    rope=RopeConfig(base=10_000.0, yarn=_YARN),
    moe=MoEConfig(routed=256, active=8, shared=1, width=2048, first_dense=3, router=_V3),
    mtp=MTPConfig(depth=1),
)

DEEPSEEK_V4_FLASH = ModelConfig(
    vocab_size=129_280,
    dim=4096,
    layers=43,
    mla=None,
    csa=_CSA,
    moe=_MOE_V4,
    hyper=HyperConfig(),
    mtp=MTPConfig(streams=True),
    init_std=0.02,
)

DEEPSEEK_V4_PRO = replace(
    DEEPSEEK_V4_FLASH,
    dim=7168,
    layers=61,
    csa=replace(
        _CSA,
        heads=128,
        q_lora_rank=1536,
        groups=16,
        top_k=1024,
        kinds=("hca", "hca", *("csa", "hca") * 29, "csa"),
    ),
    moe=replace(_MOE_V4, routed=384, width=3072, router=replace(_V4, scale=2.5)),
)
DEEPSEEK_V3_2 = replace(DEEPSEEK_V3, dsa=DSAConfig(heads=64, dim=128, top_k=2048, ties="topk"))

DEEPSEEK_V2 = ModelConfig(
    vocab_size=102_400,
    dim=5120,
    layers=60,
    dense_width=12_288,
    mla=_MLA,
    rope=RopeConfig(base=10_000.0, yarn=replace(_YARN, mscale=0.707, mscale_all_dim=0.707)),
    moe=MoEConfig(
        routed=160,
        active=6,
        shared=2,
        width=1536,
        first_dense=1,
        router=_V2,
        balance=_SOFTMAX_BALANCE,
    ),
)

DEEPSEEK_V2_LITE = ModelConfig(
    vocab_size=102_400,
    dim=2048,
    layers=27,
    dense_width=10_944,
    mla=replace(_MLA, heads=16, q_lora_rank=None),
    rope=DEEPSEEK_V2.rope,
    moe=replace(_MOE_16B, balance=_SOFTMAX_BALANCE),
)

DEEPSEEKMOE_16B = replace(
    DEEPSEEK_V2_LITE,
    layers=28,
    mla=None,
    gqa=GQAConfig(heads=16, kv_heads=16, head_dim=128),
    rope=RopeConfig(base=10_000.0, interleaved=False),
    moe=_MOE_16B,
)

PRESETS: dict[str, ModelConfig] = {
    "tiny": TINY,
    "tiny-engram": TINY_ENGRAM,
    "tiny-gqa": TINY_GQA,
    "tiny-nsa": TINY_NSA,
    "tiny-moba": TINY_MOBA,
    "tiny-dsa": TINY_DSA,
    "tiny-csa": TINY_CSA,
    "tiny-csa2": TINY_CSA2,
    "tiny-qsa": TINY_QSA,
    "v4-tiny": V4_TINY,
    "v4.1-tiny": V4_1_TINY,
    "small": SMALL,
    "classroom": CLASSROOM,
    "dense-4b": DENSE_4B,
    "moe-27b": MOE_27B,
    "engram-27b": ENGRAM_27B,
    "engram-40b": ENGRAM_40B,
    "engram-demo": ENGRAM_DEMO,
    "deepseek-v4.1-flash": DEEPSEEK_V4_1_FLASH,
    "deepseek-v4-flash": DEEPSEEK_V4_FLASH,
    "deepseek-v4-pro": DEEPSEEK_V4_PRO,
    "qwen3.8-flash-next": QWEN3_8_FLASH_NEXT,
    "qwen4-tiny": QWEN4_TINY,
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v3.2": DEEPSEEK_V3_2,
    "deepseek-v2": DEEPSEEK_V2,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "deepseekmoe-16b": DEEPSEEKMOE_16B,
}


def preset(name: str) -> ModelConfig:
    """Returns the config of this name; ValueError, naming the nearest, if there is none."""
    return PRESETS[choose("preset", name, PRESETS)]
