from dataclasses import replace

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config

from rorqual.hub.configs import config_of, published
from rorqual.layers.attention import GQAConfig, MLAConfig
from rorqual.layers.basics import RopeConfig, YarnConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.router import RouterConfig
from rorqual.model import ModelConfig

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
SAME = {
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
V3 = SAME | {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rope_scaling": YARN,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}  # fmt: skip
V2_LITE = SAME | {
    "model_type": "deepseek_v2",
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
V2 = V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
MLA = MLAConfig(heads=128, q_lora_rank=1536, kv_lora_rank=512, nope_dim=128, rope_dim=64, value_dim=128)


def test_v3_as_released():
    config = config_of(V3, mtp_depth=1)
    assert (config.vocabulary, config.dim, config.layers, config.dense_width) == (129280, 7168, 61, 18432)
    assert config.mla == MLA and config.mtp is not None and config.mtp.depth == 1
    assert config.rope == RopeConfig(base=10000.0, interleaved=True, yarn=YarnConfig())
    moe = config.moe
    assert (moe.routed, moe.active, moe.shared, moe.width, moe.first_dense) == (256, 8, 1, 2048, 3)
    assert moe.router == RouterConfig(
        score="sigmoid", groups=8, groups_kept=4, group_score="top2", renormalise=True, scale=2.5, bias=True
    )
    assert config_of(V3).mtp is None


def test_v2_and_v2_lite_as_released():
    lite, large = config_of(V2_LITE), config_of(V2)
    assert lite.mla == replace(MLA, heads=16, q_lora_rank=None) and large.mla == MLA
    assert lite.rope.yarn == YarnConfig(mscale=0.707, mscale_all_dim=0.707)
    plain = RouterConfig(score="softmax", group_score="max", renormalise=False, scale=1.0, bias=False)
    assert lite.moe.router == plain
    assert large.moe.router == replace(plain, groups=8, groups_kept=3, scale=16.0)
    assert (lite.moe.shared, lite.moe.first_dense, large.moe.routed) == (2, 1, 160)
    assert large.moe.balance.expert == 0.001


@pytest.mark.parametrize("description", [V3, V2, V2_LITE], ids=["v3", "v2", "v2-lite"])
def test_a_description_survives_the_round_trip(description):
    config = config_of(description)
    again = published(config)
    assert config_of(again) == config
    ours = {"num_nextn_predict_layers", "quantization_config", "aux_loss_alpha", "seq_aux", "rope_scaling"}
    kept = set(description) - ours - {"max_position_embeddings"}
    assert {key: again[key] for key in kept} == {key: description[key] for key in kept}
    theirs = (DeepseekV3Config if description["model_type"] == "deepseek_v3" else DeepseekV2Config)(**again)
    assert config_of(theirs.to_dict()) == config


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "qwen2"}, "model_type: got 'qwen2'"),
        ({"model_type": None}, "model_type: got None"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected silu"),
        ({"attention_bias": True}, "attention_bias: got True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: got 2"),
        ({"scoring_func": "softmax"}, "scoring_func: got 'softmax', expected sigmoid"),
        ({"topk_method": "greedy"}, "topk_method: got 'greedy'"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: got 8"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method: got 'gptq'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type: got 'linear'"),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "attention_factor"),
        ({"rope_scaling": YARN | {"mscale": None}}, "without mscale"),
    ],
)
def test_what_we_do_not_compute_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        config_of(V3 | change)


def test_absent_keys_are_named():
    with pytest.raises(ValueError, match="no kv_lora_rank, v_head_dim, num_experts_per_tok"):
        config_of({key: V3[key] for key in V3 if key not in ("v_head_dim", "kv_lora_rank", "num_experts_per_tok")})


def test_renormalised_softmax_is_refused():
    with pytest.raises(ValueError, match="norm_topk_prob: got True"):
        config_of(V2 | {"norm_topk_prob": True})


@pytest.mark.parametrize(
    "config, words",
    [
        (ModelConfig(mla=None, gqa=GQAConfig()), "gqa"),
        (ModelConfig(mla=MLAConfig(eps=1e-5)), "eps 1e-05"),
        (ModelConfig(moe=MoEConfig(shared=0)), "no shared expert"),
        (ModelConfig(moe=MoEConfig(router=RouterConfig(score="sqrtsoftplus"))), "score sqrtsoftplus"),
        (ModelConfig(rope=RopeConfig(yarn=YarnConfig(mscale=0.5, mscale_all_dim=0.0))), "YaRN with mscale 0.5"),
        (
            ModelConfig(
                moe=MoEConfig(router=RouterConfig(score="softmax", bias=False, renormalise=False)), mtp=MTPConfig()
            ),
            "MTP with a softmax router",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_named(config, words):
    with pytest.raises(ValueError, match=words):
        published(config)
