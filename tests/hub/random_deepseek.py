"""Draws configurations of DeepSeek's families and their relatives, for benchmarks/families.py."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.axk1.configuration_axk1 import AXK1Config
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.glm4_moe_lite.configuration_glm4_moe_lite import Glm4MoeLiteConfig
from transformers.models.glm_moe_dsa.configuration_glm_moe_dsa import GlmMoeDsaConfig
from transformers.models.mistral4.configuration_mistral4 import Mistral4Config
from transformers.models.mistral4.modeling_mistral4 import Mistral4ForCausalLM
from transformers.models.youtu.configuration_youtu import YoutuConfig


def sizes(draw: random.Random) -> dict[str, Any]:
    """Draws what all families have."""
    heads = draw.choice([1, 2, 3, 4, 5, 7])
    return {
        "vocab_size": draw.choice([41, 97, 128, 211]),
        "hidden_size": draw.choice([15, 24, 32, 49]),
        "intermediate_size": draw.choice([1, 24, 40, 65]),
        "num_hidden_layers": draw.choice([1, 2, 3, 4, 5]),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": draw.choice([5, 8, 12, 20]),
        "kv_lora_rank": draw.choice([3, 8, 12, 16, 33]),
        "qk_nope_head_dim": draw.choice([1, 4, 7, 8, 12]),
        "qk_rope_head_dim": draw.choice([2, 4, 6, 8, 16]),
        "v_head_dim": draw.choice([1, 4, 10, 16, 21]),
        "rms_norm_eps": draw.choice([1e-12, 1e-6, 1e-5, 1e-3]),
        "attention_bias": draw.random() < 0.3,
        "attention_dropout": draw.choice([0.0, 0.0, 0.1]),
        "tie_word_embeddings": draw.random() < 0.3,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": draw.choice([None, 1, [1, 2]]),
        "pad_token_id": draw.choice([None, None, 0, 3]),
    }


def experts(draw: random.Random, *, most_groups: int = 4) -> dict[str, Any]:
    """Draws a mixture of experts; a group has two or more."""
    groups = draw.choice([n for n in (1, 2, 3, 4) if n <= most_groups])
    routed = groups * draw.choice([2, 3, 4, 7])
    groups_of_token = draw.randint(1, groups)
    size = routed // groups
    return {
        "n_routed_experts": routed,
        "n_shared_experts": draw.choice([0, 1, 1, 2, 3]),
        "num_experts_per_tok": draw.randint(1, min(6, groups_of_token * size)),
        "moe_intermediate_size": draw.choice([1, 8, 16, 23]),
        "n_group": groups,
        "topk_group": groups_of_token,
        "norm_topk_prob": draw.random() < 0.7,
        "routed_scaling_factor": draw.choice([0.3, 1.0, 1.8, 2.5, 16.0]),
    }


def ropes(draw: random.Random, width: int) -> dict[str, Any]:
    """Draws one of the kinds of rope, with positions on both sides of what it was trained on."""
    pairs = width // 2
    base = draw.choice([1e4, 500.0])
    kinds = ["default", "default", "yarn", "yarn", "linear", "dynamic", "llama3", "longrope"]
    # NTK's exponent has no value for a single pair.
    kind = draw.choice([kind for kind in kinds if pairs > 1 or kind != "dynamic"])
    fields: dict[str, Any] = {"rope_type": kind, "rope_theta": base}
    length = draw.choice([64, 256])
    if kind != "default":
        fields["factor"] = draw.choice([1.0, 2.0, 4.0, 5.5])
    if kind == "dynamic":
        length = draw.choice([16, 256])
    if kind in ("yarn", "llama3", "longrope") and draw.random() < 0.8:
        # Without it, it is max_position_embeddings.
        fields["original_max_position_embeddings"] = draw.choice([4, 16, 64])
    if kind == "yarn":
        fields |= _yarn(draw, fields["factor"])
    if kind == "llama3":
        fields["low_freq_factor"] = draw.choice([0.5, 1.0])
        fields["high_freq_factor"] = draw.choice([2.0, 4.0])
    if kind == "longrope":
        fields["short_factor"] = [draw.uniform(1, 2) for _ in range(pairs)]
        fields["long_factor"] = [draw.uniform(1, 6) for _ in range(pairs)]
        if draw.random() < 0.3:
            fields["attention_factor"] = 1.3
        if draw.random() < 0.3:
            del fields["factor"]
    return {"rope_parameters": fields, "max_position_embeddings": length}


def _yarn(draw: random.Random, factor: float) -> dict[str, Any]:
    """Draws what a folder may say of YaRN's ends, its factors and its rounding."""
    fields: dict[str, Any] = {}
    if draw.random() < 0.5:
        fields |= {"beta_fast": draw.choice([4.0, 32]), "beta_slow": draw.choice([0.5, 1])}
    how = draw.choice(["none", "both", "one", "softmax", "given"])
    if how in ("both", "one"):
        fields["mscale"] = draw.choice([0.7, 1.0])
    if how in ("both", "softmax"):
        fields["mscale_all_dim"] = draw.choice([0.7, 1.0])
    if how == "given" and factor > 1:
        fields["attention_factor"] = draw.choice([1.0, 0.8])
    if draw.random() < 0.2:
        fields["truncate"] = draw.random() < 0.5
    return fields


def indexer(draw: random.Random, rope: int) -> dict[str, Any]:
    """Draws an indexer. With few heads many keys score exactly 0."""
    return {
        "index_n_heads": draw.choice([1, 2, 3, 5, 8]),
        "index_head_dim": rope + draw.choice([0, 1, 4, 8]),
        "index_topk": draw.choice([1, 3, 6, 9, 14, 40, 2048]),
    }


def dense_blocks(draw: random.Random, layers: int) -> dict[str, Any]:
    if draw.random() < 0.5:
        return {"first_k_dense_replace": draw.randint(0, layers)}
    return {"mlp_layer_types": [draw.choice(["dense", "sparse"]) for _ in range(layers)]}


def deepseek_v32(seed: int) -> PreTrainedConfig:
    draw = random.Random(f"deepseek_v32 {seed}")
    fields = sizes(draw) | experts(draw)
    fields |= indexer(draw, fields["qk_rope_head_dim"]) | ropes(draw, fields["qk_rope_head_dim"])
    return DeepseekV32Config(**fields | dense_blocks(draw, fields["num_hidden_layers"]))


def glm_moe_dsa(seed: int) -> PreTrainedConfig:
    draw = random.Random(f"glm_moe_dsa {seed}")
    fields = sizes(draw) | experts(draw)
    fields |= indexer(draw, fields["qk_rope_head_dim"]) | ropes(draw, fields["qk_rope_head_dim"])
    layers = fields["num_hidden_layers"]
    how = draw.choice(["list", "pattern", "period", "none"])
    later = [draw.choice(["full", "shared"]) for _ in range(layers - 1)]
    if how == "list":
        fields["indexer_types"] = ["full", *later]
    elif how == "pattern":
        fields["index_topk_pattern"] = "".join(kind[0].upper() for kind in ["full", *later])
    elif how == "period":
        fields |= {"index_topk_freq": draw.randint(1, 3), "index_skip_topk_offset": 1}
    return GlmMoeDsaConfig(**fields | dense_blocks(draw, layers))


def deepseek_v3(seed: int) -> PreTrainedConfig:
    draw = random.Random(f"deepseek_v3 {seed}")
    fields = sizes(draw) | experts(draw)
    fields |= ropes(draw, fields["qk_rope_head_dim"])
    fields["q_lora_rank"] = draw.choice([None, fields["q_lora_rank"]])
    fields["rope_interleave"] = draw.random() < 0.7
    fields["first_k_dense_replace"] = draw.randint(0, fields["num_hidden_layers"])
    return DeepseekV3Config(**fields)


def deepseek_v2(seed: int) -> PreTrainedConfig:
    draw = random.Random(f"deepseek_v2 {seed}")
    fields = sizes(draw) | experts(draw)
    fields |= ropes(draw, fields["qk_rope_head_dim"])
    limited = fields["n_group"] > 1
    fields |= {
        # The config asks for a multiple of the heads, and its complex numbers for even places.
        "hidden_size": fields["num_attention_heads"] * draw.choice([5, 8, 12]),
        "qk_nope_head_dim": draw.choice([2, 4, 8]),
        "kv_lora_rank": draw.choice([8, 12, 16]),
        "q_lora_rank": draw.choice([None, fields["q_lora_rank"]]),
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "first_k_dense_replace": draw.randint(0, fields["num_hidden_layers"]),
        "norm_topk_prob": False,
    }
    return DeepseekV2Config(**fields)


class KimiK2Config(DeepseekV3Config):
    """Kimi K2's folders have another model_type; transformers has no class of its own for it."""


def kimi_k2(seed: int) -> PreTrainedConfig:
    """Draws a V3 with other numbers: no groups of experts, one dense block, a long YaRN."""
    draw = random.Random(f"kimi_k2 {seed}")
    fields = sizes(draw) | experts(draw, most_groups=1) | {"tie_word_embeddings": False}
    fields |= {
        "first_k_dense_replace": min(1, fields["num_hidden_layers"]),
        "routed_scaling_factor": 2.827,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 50_000.0,
            "factor": draw.choice([8.0, 32.0]),
            "original_max_position_embeddings": draw.choice([8, 16]),
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }
    return KimiK2Config(**fields)


def glm4_moe_lite(seed: int) -> PreTrainedConfig:
    draw = random.Random(f"glm4_moe_lite {seed}")
    fields = sizes(draw) | experts(draw) | {"rope_interleave": draw.random() < 0.7}
    fields |= ropes(draw, fields["qk_rope_head_dim"])
    fields["q_lora_rank"] = draw.choice([None, fields["q_lora_rank"]])
    kinds = [draw.choice(["dense", "sparse"]) for _ in range(fields["num_hidden_layers"])]
    return Glm4MoeLiteConfig(**fields, mlp_layer_types=kinds)


def axk1(seed: int) -> PreTrainedConfig:
    draw = random.Random(f"axk1 {seed}")
    fields = sizes(draw) | experts(draw) | {"rope_interleave": draw.random() < 0.7}
    # The norm of a single expert's output takes the gradient of its weight away.
    fields["n_shared_experts"] = max(1, fields["n_shared_experts"])
    fields |= ropes(draw, fields["qk_rope_head_dim"])
    return AXK1Config(**fields | dense_blocks(draw, fields["num_hidden_layers"]))


def youtu(seed: int) -> PreTrainedConfig:
    draw = random.Random(f"youtu {seed}")
    fields = sizes(draw) | {"rope_interleave": draw.random() < 0.7}
    fields |= ropes(draw, fields["qk_rope_head_dim"])
    fields["q_lora_rank"] = draw.choice([None, fields["q_lora_rank"]])
    return YoutuConfig(**fields)


def mistral4(seed: int) -> PreTrainedConfig:
    draw = random.Random(f"mistral4 {seed}")
    fields = sizes(draw) | experts(draw) | {"rope_interleave": draw.random() < 0.7}
    fields["q_lora_rank"] = draw.choice([None, fields["q_lora_rank"]])
    fields["first_k_dense_replace"] = draw.randint(0, fields["num_hidden_layers"])
    original = draw.choice([8, 16])
    fields["rope_parameters"] = {
        "type": "yarn",
        "rope_type": "yarn",
        "rope_theta": draw.choice([1e4, 500.0]),
        "factor": draw.choice([4.0, 16.0]),
        "original_max_position_embeddings": original,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": draw.choice([0.0, 1.0]),
        "llama_4_scaling_beta": draw.choice([0.1, 0.5]),
    }
    return Mistral4Config(**fields)


FAMILIES: dict[str, Callable[[int], PreTrainedConfig]] = {
    "deepseek_v32": deepseek_v32,
    "glm_moe_dsa": glm_moe_dsa,
    "deepseek_v3": deepseek_v3,
    "deepseek_v2": deepseek_v2,
    "kimi_k2": kimi_k2,
    "glm4_moe_lite": glm4_moe_lite,
    "axk1": axk1,
    "youtu": youtu,
    "mistral4": mistral4,
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a model; AutoModelForCausalLM lists Mistral 4 only as a part of another model."""
    if isinstance(config, Mistral4Config):
        return Mistral4ForCausalLM(config)
    if isinstance(config, KimiK2Config):
        model = DeepseekV3ForCausalLM(config)
        plain = model.save_pretrained

        def save_pretrained(folder: Path) -> None:
            plain(folder)
            path = Path(folder) / "config.json"
            description = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(description | {"model_type": "kimi_k2"}))

        model.save_pretrained = save_pretrained
        return model
    return AutoModelForCausalLM.from_config(config)


def again(folder: Path) -> PreTrainedModel:
    """Loads an exported folder."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    loader = Mistral4ForCausalLM if kind == "mistral4" else AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32)
