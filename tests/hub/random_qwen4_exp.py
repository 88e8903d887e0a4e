"""Makes random small models of transformers' Qwen4-Exp, the text model, to compare ours with.

transformers prefers the kernels of flash-linear-attention where that is installed. They need a GPU,
so that its own functions in torch are used here, which are what the kernels are tested with.
"""

import inspect
import random
from typing import Any

import torch
from torch import nn
from transformers import Qwen4ExpTextConfig
from transformers.models.qwen4_exp import modeling_qwen4_exp as modeling

for _name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
    setattr(modeling, _name, inspect.unwrap(getattr(modeling, _name)))


def oracle_config(seed: int) -> Qwen4ExpTextConfig:
    """Draws a configuration: every field that changes what the text model computes."""
    draw = random.Random(seed)
    layers = draw.randint(1, 5)
    kinds = draw.choice([["linear_attention", "indexed_attention"], ["linear_attention"]])
    layer_types: list[str] | None = [draw.choice(kinds) for _ in range(layers)]
    if draw.random() < 0.3:
        layer_types = None
    linear = [
        index + 1
        for index in range(layers)
        if (layer_types[index] == "linear_attention" if layer_types else (index + 1) % 4)
    ]
    key_heads = draw.choice([1, 2, 3, 5])
    kv_heads = draw.choice([1, 2, 3])
    head_dim = draw.choice([4, 8, 12, 16])
    factor = draw.choice([1.0, 1.0, 0.5, 0.25] if head_dim % 8 == 0 else [1.0, 0.5])
    rotated = int(head_dim * factor)
    heads_per_ngram = draw.randint(1, 3)
    ngram_size = draw.randint(2, 5)
    block = draw.choice([1, 2, 3, 4, 5, 16])
    hidden = draw.choice([12, 15, 20, 32])
    vocab_size = draw.randint(20, 90)
    experts = draw.randint(1, 9)
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "layer_types": layer_types,
        "num_attention_heads": kv_heads * draw.randint(1, 3),
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "attention_bias": draw.random() < 0.3,
        "attention_dropout": draw.choice([0.0, 0.0, 0.1]),
        "rms_norm_eps": draw.choice([1e-6, 1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": draw.random() < 0.3,
        "rope_parameters": ropes(draw, rotated) | {"partial_rotary_factor": factor},
        "max_position_embeddings": 128,
        "linear_conv_kernel_dim": draw.randint(1, 5),
        "linear_key_head_dim": draw.choice([3, 6, 16]),
        "linear_value_head_dim": draw.choice([4, 6, 7]),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * draw.randint(1, 3),
        "output_gate_type": draw.choice([None, "silu", "sigmoid"]),
        "num_experts": experts,
        "num_experts_per_tok": draw.randint(1, experts),
        "moe_intermediate_size": draw.choice([1, 8, 16]),
        "shared_expert_intermediate_size": draw.choice([1, 8, 20]),
        "norm_topk_prob": draw.random() < 0.7,
        "hc_count": draw.randint(2, 5),
        "hc_lowrank": draw.choice([1, 3, 10]),
        "ple_layer_ids": draw.sample(linear, min(len(linear), draw.choice([0, 1, 1, 2, 3]))),
        "ple_embed_dim": (ngram_size - 1) * heads_per_ngram * draw.randint(1, 6),
        "ple_conv_kernel_size": draw.randint(1, 4),
        "ngram_size": ngram_size,
        "heads_per_ngram": heads_per_ngram,
        "ngram_vocab_size_base": draw.choice([2, 30, 200]),
        "make_ngram_vocab_size_divisible_by": draw.choice([1, 7, 128]),
        "seed": draw.randint(0, 10_000),
        "split_ngram_parts": draw.choice([1, 3, 16]),
        "indexer_n_heads": draw.randint(1, 3),
        "indexer_kv_heads": 1,
        "indexer_head_dim": rotated + draw.choice([0, 4]),
        "indexer_budget": block * draw.choice([1, 2, 3, 4, 64]),
        "indexer_compress_ratio": block,
        "eos_token_id": draw.choice([0, 3, [5, 2]]),
        "pad_token_id": draw.choice([None, 0, 1]),
    }
    return Qwen4ExpTextConfig(**fields)


def ropes(draw: random.Random, width: int) -> dict[str, Any]:
    """Draws one of the kinds of rope; texts are shorter and longer than what it was trained on."""
    kind = draw.choice(["default", "default", "default", "yarn", "linear", "llama3"])
    fields: dict[str, Any] = {"rope_type": kind, "rope_theta": draw.choice([100.0, 10_000.0])}
    if kind != "default":
        fields["factor"] = draw.choice([1.0, 2.0, 4.0])
    if kind in ("yarn", "llama3"):
        fields["original_max_position_embeddings"] = draw.choice([8, 16, 64])
    if kind == "yarn" and draw.random() < 0.5:
        fields |= {"mscale": draw.choice([0.7, 1.0]), "mscale_all_dim": draw.choice([0.7, 1.0])}
    if kind == "llama3":
        fields |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "default" and draw.random() < 0.3:
        # Of image positions; those of a text are all the same.
        fields |= {"mrope_section": [1, 1, max(0, width // 2 - 2)], "mrope_interleaved": True}
    return fields


def build(config: Qwen4ExpTextConfig) -> modeling.Qwen4ExpForCausalLM:
    """Returns a new model of the configuration, whose experts may have any width."""
    model = modeling.Qwen4ExpForCausalLM._from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")
    return model


def stir(model: nn.Module, seed: int) -> None:
    """Draws every parameter, so that each has an effect and logits are apart.

    Larger weights would make gradients that are sums of large terms, and of few correct digits.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.1)
            elif parameter.dim() == 1 or "embed" in name:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, 0.5 * parameter.shape[-1] ** -0.5)


FAMILIES = {"qwen4_exp": oracle_config}
