"""Draws random small configurations of transformers' DeepSeek-V4."""

import random
from typing import Any

from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

MODEL = DeepseekV4ForCausalLM
RATIOS = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
KINDS = tuple(RATIOS)


def oracle_config(seed: int) -> DeepseekV4Config:
    """Returns the configuration of this seed; the same for the same seed."""
    draw = random.Random(seed)
    layers = draw.randint(1, 5)
    groups = draw.choice([1, 2, 3, 5])
    head_dim = draw.choice([8, 9, 16, 24])
    experts = draw.randint(2, 12)
    rope_dim = 2 * draw.randint(1, head_dim // 2)
    hashed = draw.choice([0, draw.randint(0, layers), layers])
    mlp_layer_types = ["hash_moe"] * hashed + ["moe"] * (layers - hashed)
    if draw.random() < 0.2:
        draw.shuffle(mlp_layer_types)
    kinds = draw.choice([KINDS, KINDS, *((kind,) for kind in KINDS)])
    fields = {
        "vocab_size": draw.randint(50, 200),
        "hidden_size": draw.choice([16, 24, 40]),
        "moe_intermediate_size": draw.choice([4, 12, 20]),
        "num_hidden_layers": layers,
        "num_attention_heads": groups * draw.randint(1, 3),
        "head_dim": head_dim,
        "num_key_value_heads": draw.choice([1, 1, 1, 2]),
        "attention_bias": draw.random() < 0.1,
        "q_lora_rank": draw.randint(4, 20),
        "o_groups": groups,
        "o_lora_rank": draw.randint(1, 12),
        "sliding_window": draw.choice([1, 2, 5, 9, 16, 20, 200]),
        "n_routed_experts": experts,
        "n_shared_experts": draw.choice([1, 1, 2]),
        "norm_topk_prob": draw.random() < 0.8,
        "num_experts_per_tok": draw.randint(1, experts),
        "scoring_func": draw.choice(["sqrtsoftplus", "sqrtsoftplus", "sigmoid"]),
        "routed_scaling_factor": draw.choice([1.0, 1.5, 2.5]),
        "swiglu_limit": draw.choice([0.5, 2.0, 10.0]),
        "mlp_layer_types": mlp_layer_types,
        "index_n_heads": draw.randint(1, 6),
        "index_head_dim": rope_dim + draw.randint(0, 10),
        "index_topk": draw.choice([1, 2, 3, 5, 8, 64]),
        "hc_mult": draw.randint(1, 5),
        "hc_sinkhorn_iters": draw.choice([1, 2, 3, 20]),
        "hc_eps": draw.choice([1e-6, 1e-4]),
        "rms_norm_eps": draw.choice([1e-12, 1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": draw.random() < 0.3,
        "num_nextn_predict_layers": 0,
        "rope_theta": draw.choice([100.0, 10000.0]),
        "compress_rope_theta": draw.choice([500.0, 160000.0]),
        "max_position_embeddings": 256,
        "pad_token_id": draw.choice([None, None, 0, 7]),
    }
    if draw.random() < 0.5:
        # As released; the kinds of entries follow from their sizes.
        ratios = [RATIOS[kind] for kind in kinds]
        fields["compress_ratios"] = [draw.choice(ratios) for _ in range(layers)] + [0]
        fields["qk_rope_head_dim"] = rope_dim
    else:
        fields["layer_types"] = [draw.choice(kinds) for _ in range(layers)]
        fields["compress_rates"] = {KINDS[1]: draw.randint(1, 6), KINDS[2]: draw.randint(1, 12)}
        fields["partial_rotary_factor"] = rope_dim / head_dim
    if draw.random() < 0.6:
        fields["rope_scaling"] = scaling = stretched(draw)
        # transformers 5 has both ropes in one field, and yarn's factor on cos and sin if it is set.
        if draw.random() < 0.4:
            share = {"partial_rotary_factor": rope_dim / head_dim}
            main = {"rope_type": "default", "rope_theta": 300.0}
            both = {"main": main, "compress": {"rope_theta": 900.0, **fields.pop("rope_scaling")}}
            if draw.random() < 0.3:
                both["main"] = {"rope_theta": 300.0, **scaling}
            fields["rope_parameters"] = {name: each | share for name, each in both.items()}
    return DeepseekV4Config(**fields)


def stretched(draw: random.Random) -> dict[str, Any]:
    """Draws one of the kinds of rope whose frequencies do not depend on the call."""
    kind = draw.choice(["yarn", "yarn", "linear", "llama3"])
    fields: dict[str, Any] = {"rope_type": kind, "factor": draw.choice([1.0, 2.0, 16.0])}
    if kind != "linear":
        fields["original_max_position_embeddings"] = draw.choice([4, 16, 64])
    if kind == "llama3":
        fields |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "yarn":
        fields |= {"beta_fast": draw.choice([8, 32]), "beta_slow": draw.choice([1, 2])}
    return fields


FAMILIES = {"deepseek_v4": oracle_config}
