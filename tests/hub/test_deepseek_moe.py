"""Tests DeepSeekMoE-16B's folders against Llama's attention with DeepSeek V2's experts.

The published model is code in its folder; transformers has both of its parts.
"""

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from rorqual.hub.checkpoints import export, load
from rorqual.hub.deepseek_moe import config_of, foreign, places, published
from rorqual.model import LanguageModel
from rorqual.model_config import GQAConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig
from rorqual.presets import preset

# config.json of deepseek-moe-16b-base
PUBLISHED = {
    "architectures": ["DeepseekForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 4096,
    "model_type": "deepseek", "moe_intermediate_size": 1408, "moe_layer_freq": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 28,
    "num_key_value_heads": 16, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 102400,
}  # fmt: skip
CONFIG = ModelConfig(
    vocab_size=61,
    dim=24,
    layers=3,
    dense_width=28,
    mla=None,
    gqa=GQAConfig(heads=4, kv_heads=2, head_dim=6),
    rope=RopeConfig(interleaved=False),
    moe=MoEConfig(
        routed=6,
        active=2,
        shared=2,
        width=12,
        first_dense=1,
        router=RouterConfig(score="softmax", renormalise=False, bias=False),
    ),
    init_std=0.3,
)


def oracle(config: ModelConfig) -> LlamaForCausalLM:
    """Builds Llama with V2's experts in the blocks that have experts."""
    gqa = config.gqa
    moe = config.moe
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.dense_width,
            num_hidden_layers=config.layers,
            num_attention_heads=gqa.heads,
            num_key_value_heads=gqa.kv_heads,
            rms_norm_eps=config.eps,
        )
    )
    experts = DeepseekV2Config(
        hidden_size=config.dim,
        num_attention_heads=gqa.heads,
        num_key_value_heads=gqa.heads,
        n_routed_experts=moe.routed,
        n_shared_experts=moe.shared,
        num_experts_per_tok=moe.active,
        moe_intermediate_size=moe.width,
        routed_scaling_factor=1.0,
        topk_method="greedy",
    )
    for index in range(config.layers):
        if config.has_experts(index):
            model.model.layers[index].mlp = DeepseekV2Moe(experts)
    return model.eval()


@torch.no_grad()
def fill(model: LlamaForCausalLM, ours: LanguageModel) -> None:
    """Copies our weights, by the names of their folder."""
    table = places(ours.config)
    state = ours.state_dict()
    for name, parameter in model.named_parameters():
        if ".mlp.experts." not in name:
            parameter.copy_(table[name].of(state))
    for index in range(ours.config.layers):
        if ours.config.has_experts(index):
            experts = model.model.layers[index].mlp.experts
            for theirs, name in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
                value = state[f"blocks.{index}.ffn.experts.{name}"]
                getattr(experts, theirs).copy_(value.mT)


@torch.no_grad()
def test_logits_are_those_of_its_parts_in_transformers(tmp_path):
    model = LanguageModel(CONFIG, seed=3).eval()
    export(model, tmp_path)
    ours = load(tmp_path)
    theirs = oracle(CONFIG)
    ids = torch.randint(61, (2, 19))
    fill(theirs, ours)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours(ids), model(ids))
    cache = ours.new_cache(2)
    pieces = [ours(piece, cache=cache) for piece in ids.split([7, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), ours(ids), atol=1e-5, rtol=1e-5)


def test_the_published_folder_is_the_preset():
    config = config_of(PUBLISHED)
    ours = preset("deepseekmoe-16b")
    assert replace(config.moe, balance=ours.moe.balance) == ours.moe
    assert replace(config, moe=ours.moe, init_std=ours.init_std) == ours
    assert config_of(published(config)) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected silu"),
        ({"scoring_func": "sigmoid"}, "scoring_func: got 'sigmoid', expected softmax"),
        ({"routed_scaling_factor": 16.0}, "routed_scaling_factor: got 16.0"),
        ({"num_attention_heads": 15}, "num_attention_heads: got 15, expected a divisor of 2048"),
        ({"model_type": "llama"}, "model_type: got 'llama'"),
        ({"vocab_size": "many"}, "vocab_size: got 'many', expected a whole number"),
    ],
)
def test_what_we_do_not_compute_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        config_of(PUBLISHED | change)
    lacking = {key: value for key, value in PUBLISHED.items() if key != "hidden_size"}
    with pytest.raises(ValueError, match="no hidden_size"):
        config_of(lacking)


def test_what_the_format_lacks_is_named():
    assert foreign(CONFIG) == []
    model = replace(CONFIG, rope=RopeConfig(), gqa=replace(CONFIG.gqa, window=3))
    assert foreign(model) == ["interleaved rope", "a window"]
    gated = replace(CONFIG, gqa=replace(CONFIG.gqa, output_gate=True, rope_dim=2, bias=True))
    assert foreign(gated) == ["output_gate", "heads that are rotated in part"]
    with pytest.raises(ValueError, match="a DeepSeekMoE folder cannot hold interleaved rope"):
        published(model)


def test_blocks_with_experts_may_have_a_period():
    changed = PUBLISHED | {"moe_layer_freq": 3, "num_hidden_layers": 8}
    config = config_of(changed)
    assert [config.has_experts(index) for index in range(8)] == [i in (3, 6) for i in range(8)]
    none = PUBLISHED | {"moe_layer_freq": 9, "num_hidden_layers": 8}
    assert config_of(none).moe is None
    assert config_of(published(config)) == config
