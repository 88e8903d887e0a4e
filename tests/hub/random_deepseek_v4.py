"""Draws random small configurations of transformers' DeepSeek-V4."""

import random

from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

MODEL = DeepseekV4ForCausalLM
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")


def oracle_config(seed: int) -> DeepseekV4Config:
    """Returns the configuration of this seed; the same for the same seed."""
    draw = random.Random(seed)
    layers, groups = draw.randint(1, 5), draw.choice([1, 2, 3])
    head_dim, experts = draw.choice([8, 16, 24]), draw.randint(2, 9)
    rope_dim = 2 * draw.randint(1, head_dim // 2)
    hashed = draw.randint(0, layers)
    fields = {
        "vocab_size": draw.randint(50, 200),
        "hidden_size": draw.choice([16, 24, 40]),
        "moe_intermediate_size": draw.choice([4, 12, 20]),
        "num_hidden_layers": layers,
        "num_attention_heads": groups * draw.randint(1, 3),
        "head_dim": head_dim,
        "q_lora_rank": draw.randint(4, 20),
        "o_groups": groups,
        "o_lora_rank": draw.randint(3, 12),
        "sliding_window": draw.randint(2, 20),
        "n_routed_experts": experts,
        "num_experts_per_tok": draw.randint(1, min(4, experts)),
        "scoring_func": draw.choice(["sqrtsoftplus", "sqrtsoftplus", "sigmoid"]),
        "routed_scaling_factor": draw.choice([1.0, 1.5, 2.5]),
        "swiglu_limit": draw.choice([0.5, 2.0, 10.0]),
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        "index_n_heads": draw.randint(1, 6),
        "index_head_dim": rope_dim + 2 * draw.randint(0, 5),
        "index_topk": draw.randint(1, 8),
        "hc_mult": draw.randint(1, 4),
        "hc_sinkhorn_iters": draw.choice([1, 3, 20]),
        "hc_eps": draw.choice([1e-6, 1e-4]),
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "tie_word_embeddings": draw.random() < 0.3,
        "num_nextn_predict_layers": 0,
        "rope_theta": draw.choice([100.0, 10000.0]),
        "compress_rope_theta": draw.choice([500.0, 160000.0]),
        "max_position_embeddings": 256,
        "pad_token_id": None,
    }
    if draw.random() < 0.5:
        # As released; the kinds of entries follow from their sizes.
        fields["compress_ratios"] = [draw.choice([0, 4, 128]) for _ in range(layers)] + [0]
        fields["qk_rope_head_dim"] = rope_dim
    else:
        fields["layer_types"] = [draw.choice(KINDS) for _ in range(layers)]
        fields["compress_rates"] = {KINDS[1]: draw.randint(1, 6), KINDS[2]: draw.randint(1, 12)}
        fields["partial_rotary_factor"] = rope_dim / head_dim
    if draw.random() < 0.5:
        fields["rope_scaling"] = {
            "type": "yarn",
            "factor": draw.choice([2.0, 16.0]),
            "original_max_position_embeddings": draw.choice([16, 64]),
            "beta_fast": 32,
            "beta_slow": 1,
        }
    return DeepseekV4Config(**fields)


FAMILIES = {"deepseek_v4": oracle_config}
CANCELS = True  # gradients of the mappings of the streams
