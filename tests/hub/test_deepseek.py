import copy
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rorqual.hub.checkpoints import load
from rorqual.hub.deepseek import config_of, published
from rorqual.layers.attention import GQAConfig, MLAConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.rope import RopeConfig, YarnConfig, rope_tables, softmax_factor
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
MLA = MLAConfig(
    heads=128, q_lora_rank=1536, kv_lora_rank=512, nope_dim=128, rope_dim=64, value_dim=128
)


def test_v3_as_released():
    config = config_of(V3, ["model.layers.61.eh_proj.weight"])
    assert (config.vocab_size, config.dim, config.layers, config.dense_width) == (
        129280,
        7168,
        61,
        18432,
    )
    assert config.mla == MLA and config.mtp is not None and config.mtp.depth == 1
    assert config.rope == RopeConfig(base=10000.0, interleaved=True, yarn=YarnConfig())
    moe = config.moe
    assert (moe.routed, moe.active, moe.shared, moe.width, moe.first_dense) == (256, 8, 1, 2048, 3)
    assert moe.router == RouterConfig(
        score="sigmoid",
        groups=8,
        groups_kept=4,
        group_score="top2",
        renormalise=True,
        scale=2.5,
        bias=True,
    )
    assert config_of(V3) == config, "without weights the config tells of MTP"
    assert config_of(V3, ["model.embed_tokens.weight"]).mtp is None


def test_v2_and_v2_lite_as_released():
    lite = config_of(V2_LITE)
    large = config_of(V2)
    assert lite.mla == replace(MLA, heads=16, q_lora_rank=None) and large.mla == MLA
    assert lite.rope.yarn == YarnConfig(mscale=0.707, mscale_all_dim=0.707)
    plain = RouterConfig(
        score="softmax", group_score="max", renormalise=False, scale=1.0, bias=False
    )
    assert lite.moe.router == plain
    assert large.moe.router == replace(plain, groups=8, groups_kept=3, scale=16.0)
    assert (lite.moe.shared, lite.moe.first_dense, large.moe.routed) == (2, 1, 160)
    assert large.moe.balance.expert == 0.001


@pytest.mark.parametrize("description", [V3, V2, V2_LITE], ids=["v3", "v2", "v2-lite"])
def test_a_description_survives_the_round_trip(description):
    config = config_of(description)
    again = published(config)
    assert config_of(again) == config
    ours = {
        "num_nextn_predict_layers",
        "quantization_config",
        "aux_loss_alpha",
        "seq_aux",
        "rope_scaling",
    }
    cached = set(description) - ours - {"max_position_embeddings"}
    assert {key: again[key] for key in cached} == {key: description[key] for key in cached}
    theirs = (DeepseekV3Config if description["model_type"] == "deepseek_v3" else DeepseekV2Config)(
        **again
    )
    assert config_of(theirs.to_dict()) == config


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "qwen2"}, "model_type: got 'qwen2'"),
        ({"model_type": None}, "model_type: got None"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected silu"),
        ({"mlp_bias": True}, "mlp_bias: got True"),
        ({"scoring_func": "softmax"}, "scoring_func: got 'softmax', expected sigmoid"),
        ({"topk_method": "greedy"}, "topk_method: got 'greedy'"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: got 8"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method: got 'gptq'"),
        ({"rope_scaling": {"type": "axial", "factor": 2}}, "rope_scaling.type: got 'axial'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "mscale_all_dim": 1}},
            "mscale_all_dim: got 1 with type 'linear'",
        ),
        ({"quantization_config": ["fp8"]}, "quantization_config: got"),
        (
            {"rope_scaling": YARN | {"attention_factor": 2.0, "factor": 1}},
            "attention_factor: got 2.0 with factor 1",
        ),
        ({"rope_scaling": YARN | {"attention_factor": "x"}}, "attention_factor: got 'x'"),
    ],
)
def test_what_we_do_not_compute_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        config_of(V3 | change)


def test_absent_keys_are_named():
    with pytest.raises(ValueError, match="no kv_lora_rank, v_head_dim, num_experts_per_tok"):
        config_of(
            {
                key: V3[key]
                for key in V3
                if key not in ("v_head_dim", "kv_lora_rank", "num_experts_per_tok")
            }
        )


def without(description: dict, *keys: str) -> dict:
    return {key: value for key, value in description.items() if key not in keys}


OPTIONAL = (
    "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "n_group", "topk_group",
    "topk_method",
    "norm_topk_prob", "routed_scaling_factor", "scoring_func", "rms_norm_eps", "initializer_range",
    "rope_theta",
    "tie_word_embeddings", "rope_scaling", "max_position_embeddings", "hidden_act",
    "num_key_value_heads",
)  # fmt: skip


@pytest.mark.parametrize("description", [V3, V2_LITE], ids=["v3", "v2"])
@pytest.mark.parametrize(
    "keys", [*((key,) for key in OPTIONAL), OPTIONAL], ids=lambda keys: keys[0] * (len(keys) == 1)
)
def test_what_is_left_out_is_as_transformers_has_it(description, keys):
    partial = without(description, *keys)
    theirs = (DeepseekV3Config if description is V3 else DeepseekV2Config).from_dict(
        copy.deepcopy(partial)
    )
    assert config_of(partial) == config_of(theirs.to_dict() | {"aux_loss_alpha": None})


def test_yarns_length_is_as_transformers_has_it():
    scaling = without(YARN, "original_max_position_embeddings")
    for description in (
        V3,
        V2,
        without(V2, "max_position_embeddings"),
        V3 | {"original_max_position_embeddings": 77},
    ):
        text = description | {"rope_scaling": scaling}
        theirs = (
            DeepseekV3Config if text["model_type"] == "deepseek_v3" else DeepseekV2Config
        ).from_dict(copy.deepcopy(text))
        theirs.standardize_rope_params()
        expected = theirs.rope_parameters["original_max_position_embeddings"]
        assert config_of(text).rope.yarn.original_length == expected


NEW_STYLE = {"rope_type": "default", "rope_theta": 5.0}


@pytest.mark.parametrize(
    "message, base, stretched",
    [
        ({"rope_parameters": NEW_STYLE, "rope_theta": 7.0}, 5.0, False),
        ({"rope_parameters": YARN | {"rope_theta": 5.0}}, 5.0, True),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, 7.0, False),
        ({"rope_parameters": NEW_STYLE, "rope_scaling": YARN}, 10000.0, True),
        ({"rope_parameters": None, "rope_scaling": {}}, 10000.0, False),
        ({"rope_parameters": NEW_STYLE | {"partial_rotary_factor": 1.0}}, 5.0, False),
    ],
)
def test_both_ways_of_writing_rope_are_read_as_transformers_reads_them(message, base, stretched):
    description = without(V3, "rope_scaling", "rope_theta") | message
    theirs = DeepseekV3Config.from_dict(copy.deepcopy(description)).rope_parameters
    assert (theirs["rope_theta"], theirs["rope_type"]) == (base, "yarn" if stretched else "default")
    rope = config_of(description).rope
    assert rope == RopeConfig(base=base, yarn=YarnConfig() if stretched else None)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"first_k_dense_replace": None},
            "config.json: first_k_dense_replace: got None, expected a whole number",
        ),
        ({"num_hidden_layers": None}, "config.json: num_hidden_layers: got None"),
        ({"hidden_size": "7168"}, "config.json: hidden_size: got '7168'"),
        ({"num_experts_per_tok": None}, "config.json: num_experts_per_tok: got None"),
        ({"n_group": None}, "config.json: n_group: got None"),
        (
            {"routed_scaling_factor": None},
            "config.json: routed_scaling_factor: got None, expected a number",
        ),
        ({"rms_norm_eps": None}, "config.json: rms_norm_eps: got None"),
        ({"rope_theta": None}, "config.json: rope_theta: got None"),
        ({"rope_scaling": without(YARN, "factor")}, "config.json: rope_scaling.factor: got None"),
        ({"rope_scaling": YARN | {"factor": None}}, "config.json: rope_scaling.factor: got None"),
        ({"rope_scaling": "yarn"}, "config.json: rope_scaling: got 'yarn'"),
        (
            {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}},
            "rope_scaling.partial_rotary_factor: got 0.5",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "config.json: partial_rotary_factor: got 0.5, expected 1.0",
        ),
        (
            {"mlp_layer_types": ["dense", "sparse"]},
            "config.json: mlp_layer_types: got .*, expected none",
        ),
    ],
)
def test_odd_values_are_refused_by_file_and_field(change, words):
    with pytest.raises(ValueError, match=words):
        config_of(V3 | change)


def test_what_transformers_reads_past_is_read_past():
    assert config_of(V2 | {"norm_topk_prob": True, "rope_interleave": False}) == config_of(V2)
    assert config_of(without(V3, "n_routed_experts") | {"num_local_experts": 64}).moe.routed == 64
    assert config_of(V2 | {"aux_loss_alpha": 0.0}).moe.balance.expert == 0.0
    text = {
        "attention_dropout": 0.1,
        "ep_size": 8,
        "moe_layer_freq": 2,
        "pretraining_tp": 4,
        "unheard": [1],
    }
    assert config_of(V3 | text) == config_of(V3)
    assert config_of(V3 | {"rope_scaling": YARN | {"finetuned": True}}) == config_of(V3)


@pytest.mark.parametrize(
    "change",
    [
        {"mscale": None},
        {"mscale": 0},
        {"attention_factor": 1.3},
        {"attention_factor": 0.8, "mscale_all_dim": 0},
    ],
)
def test_yarns_factor_on_cos_is_transformers(change):
    text = V3 | {"rope_scaling": YARN | change}
    theirs = DeepseekV3Config.from_dict(copy.deepcopy(text))
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    cos, sin = rope_tables(config_of(text).rope, 64, torch.arange(9)[None])
    angles = torch.arange(9)[:, None] * frequencies
    torch.testing.assert_close(cos[0], angles.cos() * factor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sin[0], angles.sin() * factor, rtol=1e-5, atol=1e-6)
    again = config_of(published(config_of(text)))
    torch.testing.assert_close(
        rope_tables(again.rope, 64, torch.arange(9)[None])[0], cos, rtol=1e-5, atol=1e-6
    )
    assert softmax_factor(again.rope) == softmax_factor(config_of(text).rope)


@pytest.mark.parametrize(
    "config, words",
    [
        (ModelConfig(mla=None, gqa=GQAConfig()), "gqa"),
        (ModelConfig(mla=MLAConfig(eps=1e-5)), "eps 1e-05"),
        (
            ModelConfig(moe=MoEConfig(router=RouterConfig(score="sqrtsoftplus"))),
            "score sqrtsoftplus",
        ),
        (
            ModelConfig(
                moe=MoEConfig(router=RouterConfig(score="softmax", bias=False, renormalise=False)),
                mtp=MTPConfig(),
            ),
            "MTP with a softmax router",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_named(config, words):
    with pytest.raises(ValueError, match=words):
        published(config)


# Folders that transformers writes are loaded here and compared with transformers' own numbers.
TINY = {
    "vocab_size": 59, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 28,
    "moe_intermediate_size": 12,
    "num_attention_heads": 4, "num_key_value_heads": None, "q_lora_rank": 10, "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None, "max_position_embeddings": 64,
}  # fmt: skip
SHORT_YARN = {
    "rope_type": "yarn",
    "factor": 3.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
}
LIMITED = {"topk_method": "group_limited_greedy"}
V3_FOLDERS = {
    "as is": {},
    "tied": {"tie_word_embeddings": True},
    "one group": {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.7},
    "experts everywhere, rope_scaling null": {"first_k_dense_replace": 0, "rope_scaling": None},
    "no experts": {"first_k_dense_replace": 3},
    "no q latent, weights as scored": {"q_lora_rank": None, "norm_topk_prob": False},
    "null is false": {"norm_topk_prob": None, "rope_interleave": None},
    "two groups": {"n_group": 2, "topk_group": 1, "n_routed_experts": 10, "rms_norm_eps": 1e-4},
    "odd heads": {
        "num_attention_heads": 3,
        "qk_nope_head_dim": 7,
        "v_head_dim": 11,
        "qk_rope_head_dim": 10,
    },
    "yarn": {"rope_parameters": SHORT_YARN | {"mscale_all_dim": 0.4}},
    "yarn, mscale alone": {"rope_parameters": SHORT_YARN | {"rope_theta": 500.0, "beta_fast": 8}},
    "half-split rope": {"rope_interleave": False, "rope_theta": 300.0},
}
V2_FOLDERS = {
    "as is": {},
    "groups": LIMITED | {"routed_scaling_factor": 3.0},
    "renormalised, it says": {"norm_topk_prob": True},
    "tied, no q latent": {"tie_word_embeddings": True, "q_lora_rank": None},
    "groups, experts everywhere, yarn": LIMITED
    | {
        "first_k_dense_replace": 0,
        "n_group": 2,
        "topk_group": 1,
        "rope_parameters": SHORT_YARN | {"mscale_all_dim": 0.7},
    },
    "odd heads, half-split rope, it says": {
        "num_attention_heads": 3,
        "v_head_dim": 7,
        "rope_interleave": False,
    },
}
CASES = [
    pytest.param(kind, change, id=f"{kind}: {name}")
    for kind, changes in (("v3", V3_FOLDERS), ("v2", V2_FOLDERS))
    for name, change in changes.items()
]


def theirs_of(kind: str, change: dict) -> torch.nn.Module:
    torch.manual_seed(3)
    configs = {
        "v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
        "v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    }
    config, model = configs[kind]
    theirs = model._from_config(config(**TINY | change), attn_implementation="eager").eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.5, 0.1)
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return theirs


@torch.no_grad()
def agree(ours, theirs) -> None:
    ids = torch.randint(0, 59, (2, 37))
    expected = theirs(ids, labels=ids, output_hidden_states=True)
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    hidden = ours.norm(ours.hidden(ids)[0])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(hidden, expected.hidden_states[-1], **close)
    torch.testing.assert_close(ours(ids), expected.logits, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.loss(ids, labels).next_token, expected.loss, **close)


@pytest.mark.parametrize(("kind", "change"), CASES)
def test_hidden_logits_and_loss_are_theirs(kind, change, tmp_path):
    theirs = theirs_of(kind, change)
    theirs.save_pretrained(tmp_path)
    agree(load(tmp_path), theirs)


@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_folders_in_bfloat16_and_in_shards(kind, tmp_path):
    theirs_of(kind, {}).bfloat16().save_pretrained(tmp_path, max_shard_size="8KB")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = load(tmp_path)
    assert ours.embed.weight.dtype == torch.bfloat16
    agree(load(tmp_path, dtype=torch.float32), theirs)
