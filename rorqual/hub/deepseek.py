"""DeepSeek V2, V2-Lite, V3 and R1: config.json and tensor names, ours and theirs.

    deepseek_v2   softmax scores, one group (greedy) or the groups with the largest maxima
                  (group_limited_greedy)
    deepseek_v3   sigmoid scores and a bias for the selection, groups by the sum of their two best

    model.layers.1.mlp.experts.7.gate_proj.weight [F, D]
        <->  blocks.1.ffn.experts.gate_up[7, :, :F] transposed
    model.layers.N (N = num_hidden_layers)
        <->  mtp.0, whose embedding and head are the model's own

What only one of the two can express is refused by name. Fields that transformers ignores, fields of
training (dropout, auxiliary losses) and of deployment (ep_size) are ignored.

Released configurations of arXiv 2405.04434, 2412.19437 and 2501.12948.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from rorqual.hub.places import Place, Sizes
from rorqual.model_config import (
    BalanceConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RopeConfig,
    RouterConfig,
    YarnConfig,
)

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")
EMBEDDING = "model.embed_tokens.weight"
SIZES = Sizes(r"^model\.layers\.(\d+)\.", ".mlp.gate.weight", r"\.mlp\.experts\.(\d+)\.")
ATTENTION = (
    "q_proj",
    "q_a_proj",
    "q_a_layernorm",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_a_layernorm",
    "kv_b_proj",
    "o_proj",
)
BIASED = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")  # biased where the config has attention_bias
SWIGLU = ("gate_proj", "up_proj", "down_proj")
WHOLE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
REQUIRED = (*WHOLE, "q_lora_rank")
REQUIRED_WITH_EXPERTS = ("moe_intermediate_size", "num_experts_per_tok")
DEFAULTS: dict[str, dict[str, Any]] = {  # transformers' DeepseekV2Config and DeepseekV3Config
    "deepseek_v2": {
        "n_routed_experts": 64, "n_shared_experts": 2, "first_k_dense_replace": 0, "n_group": None,
        "topk_group": None,
        "topk_method": "greedy", "routed_scaling_factor": 1.0, "max_position_embeddings": 2048,
    },
    "deepseek_v3": {
        "n_routed_experts": 256, "n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "max_position_embeddings": 4096,
        "rope_interleave": True,
    },
}  # fmt: skip
DEFAULTS_OF_BOTH = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
ALIASES = {
    "deepseek_v2": {"num_experts": "n_routed_experts"},
    "deepseek_v3": {"num_local_experts": "n_routed_experts"},
}
ONLY: dict[str, tuple[Any, ...]] = {  # None also means absent
    "hidden_act": ("silu", None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "mlp_layer_types": (None,),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None),
    "sliding_window": (None,),
    "use_qk_norm": (False, None),
    "index_topk": (None,),
}
ONLY_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v2": {
        "scoring_func": ("softmax", None),
        "topk_method": ("greedy", "group_limited_greedy", None),
    },
    "deepseek_v3": {"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)},
}


def config_of(description: Mapping[str, Any], names: Collection[str] = ()) -> ModelConfig:
    """Converts a published config.json; `names` are the folder's tensors, which show MTP's blocks.

    Missing fields have transformers' defaults; fields that transformers ignores (V2's
    norm_topk_prob and rope_interleave, moe_layer_freq) are ignored. ValueError for another
    architecture, absent sizes, or values that this architecture does not support.
    """
    kind = description.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type: got {kind!r}, expected {' or '.join(MODEL_TYPES)}")
    mtp_depth = _mtp_depth(description, names)
    fields = {ALIASES[kind].get(key, key): value for key, value in description.items()}
    d = DEFAULTS_OF_BOTH | DEFAULTS[kind] | fields
    has_experts = d["n_routed_experts"] is not None and (
        "num_hidden_layers" not in d
        or _whole(d, "first_k_dense_replace") < _whole(d, "num_hidden_layers") + mtp_depth
    )
    needed = REQUIRED + (REQUIRED_WITH_EXPERTS if has_experts else ())
    if lacking := [key for key in needed if key not in d]:
        raise ValueError(f"config.json: no {', '.join(lacking)}")
    size = {key: _whole(d, key) for key in WHOLE}
    _refuse_unknown(d, kind)
    return ModelConfig(
        vocab_size=size["vocab_size"],
        dim=size["hidden_size"],
        layers=size["num_hidden_layers"],
        dense_width=size["intermediate_size"],
        mla=_mla_of(d, size),
        rope=_rope_of(d, interleaved=kind == "deepseek_v2" or bool(d["rope_interleave"])),
        moe=_moe_of(d, kind) if has_experts else None,
        mtp=MTPConfig(depth=mtp_depth) if mtp_depth else None,
        tied=bool(d["tie_word_embeddings"]),
        eps=_number(d, "rms_norm_eps"),
        init_std=_number(d, "initializer_range"),
    )


def _mla_of(d: Mapping[str, Any], size: Mapping[str, int]) -> MLAConfig:
    return MLAConfig(
        heads=size["num_attention_heads"],
        q_lora_rank=None if d["q_lora_rank"] is None else _whole(d, "q_lora_rank"),
        kv_lora_rank=size["kv_lora_rank"],
        nope_dim=size["qk_nope_head_dim"],
        rope_dim=size["qk_rope_head_dim"],
        value_dim=size["v_head_dim"],
        bias=bool(d.get("attention_bias")),
    )


def _number(fields: Mapping[str, Any], key: str, within: str = "") -> float:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config.json: {within}{key}: got {value!r}, expected a number")
    return float(value)


def _whole(fields: Mapping[str, Any], key: str, within: str = "") -> int:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError(f"config.json: {within}{key}: got {value!r}, expected a whole number")
    return int(value)


def _refuse_unknown(description: Mapping[str, Any], kind: str) -> None:
    for key, allowed in {**ONLY, **ONLY_OF[kind]}.items():
        if (value := description.get(key)) not in allowed:
            expected = " or ".join(str(x) for x in allowed if x is not None) or "none"
            raise ValueError(f"config.json: {key}: got {value!r}, expected {expected}")
    heads, keys = description["num_attention_heads"], description.get("num_key_value_heads")
    if keys not in (None, heads):
        raise ValueError(
            f"num_key_value_heads: got {keys}, expected the {heads} of num_attention_heads, or none"
        )
    quantised = description.get("quantization_config") or {}
    method = quantised.get("quant_method", "fp8") if isinstance(quantised, Mapping) else quantised
    if method != "fp8":
        raise ValueError(
            f"quantization_config.quant_method: got {method!r}, expected 'fp8' or none"
        )


def _rope_of(description: Mapping[str, Any], interleaved: bool) -> RopeConfig:
    """Reads rope_theta with rope_scaling (as released), or rope_parameters (transformers 5).

    Of both, the first is read.
    """
    key = "rope_scaling" if description.get("rope_scaling") else "rope_parameters"
    rope = description.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(
            f"config.json: {key}: got {rope!r}, expected fields such as rope_theta, or none"
        )
    if rope.get("partial_rotary_factor") not in (1.0, None):
        raise ValueError(
            f"config.json: {key}.partial_rotary_factor: "
            f"got {rope['partial_rotary_factor']}, expected 1.0"
        )
    base = _number({"rope_theta": description["rope_theta"], **rope}, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(f"config.json: {key}.type: got {kind!r}, expected 'yarn' or 'default'")
    yarn = _yarn_of(description, rope, f"{key}.") if kind == "yarn" else None
    return RopeConfig(base=base, interleaved=interleaved, yarn=yarn)


def _yarn_of(description: Mapping[str, Any], fields: Mapping[str, Any], within: str) -> YarnConfig:
    if fields.get("truncate", True) is not True:
        raise ValueError(
            f"config.json: {within}truncate: got {fields['truncate']!r}, expected true or none"
        )
    # transformers ignores 0 and null.
    yarn = {key: value for key, value in fields.items() if value}
    length = "original_max_position_embeddings"
    lengths = {length: description["max_position_embeddings"]} | yarn
    # Beside the rope fields it has priority over them.
    if description.get(length) is not None:
        lengths[length] = description[length]
    factor = _number(fields, "factor", within)
    mscale, of_softmax = _mscales(fields, yarn, factor, within)
    return YarnConfig(
        factor=factor,
        original_length=_whole(lengths, length, within),
        beta_fast=_number({"beta_fast": 32} | yarn, "beta_fast", within),
        beta_slow=_number({"beta_slow": 1} | yarn, "beta_slow", within),
        mscale=mscale,
        mscale_all_dim=of_softmax,
    )


def _mscales(
    fields: Mapping[str, Any], yarn: Mapping[str, Any], factor: float, within: str
) -> tuple[float, float]:
    """Returns mscale and mscale_all_dim that give transformers' factor on cos and sin.

    That factor is attention_factor if it is set, else the ratio of both mscales if both are, else
    mscale(s, 1); the softmax is scaled by mscale(s, mscale_all_dim)^2.
    """
    of_softmax = _number(yarn, "mscale_all_dim", within) if "mscale_all_dim" in yarn else 0.0
    if fields.get("attention_factor") is None:
        if "mscale_all_dim" not in yarn:
            return 1.0, of_softmax
        if "mscale" in yarn:
            return _number(yarn, "mscale", within), of_softmax
    stretch = 0.1 * math.log(factor) if factor > 1 else 0.0
    wanted = (
        stretch + 1
        if fields.get("attention_factor") is None
        else _number(fields, "attention_factor", within)
    )
    if wanted != 1 and not stretch:
        raise ValueError(
            f"config.json: {within}attention_factor: "
            f"got {wanted} with factor {factor}, expected 1 or none"
        )
    return (wanted * (stretch * of_softmax + 1) - 1) / stretch if stretch else 1.0, of_softmax


def _moe_of(description: Mapping[str, Any], kind: str) -> MoEConfig:
    d = description
    shared = d["n_shared_experts"]
    sigmoid = kind == "deepseek_v3"
    router, balance = (
        (_sigmoid_router(d), BalanceConfig()) if sigmoid else (_softmax_router(d), _v2_balance(d))
    )
    return MoEConfig(
        routed=_whole(d, "n_routed_experts"),
        active=_whole(d, "num_experts_per_tok"),
        shared=0 if shared is None else _whole(d, "n_shared_experts"),
        width=_whole(d, "moe_intermediate_size"),
        first_dense=_whole(d, "first_k_dense_replace"),
        router=router,
        balance=balance,
    )


def _sigmoid_router(d: Mapping[str, Any]) -> RouterConfig:
    return RouterConfig(
        score="sigmoid",
        groups=_whole(d, "n_group"),
        groups_kept=_whole(d, "topk_group"),
        renormalise=bool(d["norm_topk_prob"]),
        scale=_number(d, "routed_scaling_factor"),
    )


def _softmax_router(d: Mapping[str, Any]) -> RouterConfig:
    limited = d["topk_method"] == "group_limited_greedy"
    return RouterConfig(
        score="softmax",
        groups=_whole(d, "n_group") if limited else 1,
        groups_kept=_whole(d, "topk_group") if limited else 1,
        group_score="max",
        renormalise=False,
        scale=_number(d, "routed_scaling_factor"),
        bias=False,
    )


def _v2_balance(d: Mapping[str, Any]) -> BalanceConfig:
    alpha = 0.001 if d.get("aux_loss_alpha") is None else _number(d, "aux_loss_alpha")
    return BalanceConfig(bias_rate=0.0, sequence=0.0, expert=alpha)


def published(config: ModelConfig, **fields: Any) -> dict[str, Any]:
    """Returns the config.json that transformers' DeepseekV2Config or DeepseekV3Config reads.

    `fields` are added unchanged. ValueError with the parts of our model that the format cannot
    express.
    """
    if lacking := foreign(config):
        raise ValueError(f"a DeepSeek folder cannot hold {', '.join(lacking)}")
    mla, moe = config.mla, config.moe
    assert mla is not None
    kind = "deepseek_v2" if moe is not None and moe.router.score == "softmax" else "deepseek_v3"
    description = {
        "architectures": [kind.title().replace("_", "").replace("seekv", "seekV") + "ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.dense_width,
        "num_attention_heads": mla.heads,
        "num_key_value_heads": mla.heads,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "rms_norm_eps": config.eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": mla.bias,
        "num_nextn_predict_layers": config.mtp.depth if config.mtp is not None else 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return description | _published_rope(config.rope) | _published_moe(config) | fields


def foreign(config: ModelConfig) -> list[str]:
    """Describes the parts of a model that DeepSeek V2 or V3 does not have."""
    differences = [
        name
        for name in ("gqa", "nsa", "moba", "dsa", "qsa", "delta", "engram", "hyper")
        if getattr(config, name) is not None
    ]
    if config.mla is None:
        return differences
    if config.mla.eps != 1e-6:
        differences.append(f"latent norms with eps {config.mla.eps} (1e-6 only)")
    if config.moe is None:
        return differences
    router, v2 = config.moe.router, config.moe.router.score == "softmax"
    unlike = {
        f"score {router.score}": router.score not in ("softmax", "sigmoid"),
        "adaptive_mass": router.adaptive_mass is not None,
        "token_id_layers": router.token_id_layers > 0,
        "renormalised softmax weights": v2 and router.renormalise,
        "a softmax router with a bias": v2 and router.bias,
        "a sigmoid router without a bias": not v2 and not router.bias,
        f"group_score {router.group_score}": router.groups > 1
        and router.group_score != ("max" if v2 else "top2"),
        f"shared_width {config.moe.shared_width}": config.moe.shared_hidden
        != config.moe.shared * config.moe.width,
        "shared_gate": config.moe.shared_gate,
        "MTP with a softmax router": v2 and config.mtp is not None,
        "a width that is no multiple of the heads, with a softmax router": v2
        and config.dim % config.mla.heads != 0,
        "half-split rope with a softmax router": v2 and not config.rope.interleaved,
    }
    return differences + [name for name, true in unlike.items() if true]


def _published_rope(rope: RopeConfig) -> dict[str, Any]:
    values = {"rope_theta": rope.base, "rope_interleave": rope.interleaved}
    if rope.yarn is None:
        return values | {"rope_scaling": None, "max_position_embeddings": 4096}
    yarn = rope.yarn
    scaling = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
    # transformers ignores a 0.
    if 0 in (yarn.mscale, yarn.mscale_all_dim) and yarn.mscale != 1 and yarn.factor > 1:
        stretch = 0.1 * math.log(yarn.factor)
        scaling["attention_factor"] = (stretch * yarn.mscale + 1) / (
            stretch * yarn.mscale_all_dim + 1
        )
    return values | {
        "rope_scaling": scaling,
        "max_position_embeddings": int(yarn.factor * yarn.original_length),
    }


def _published_moe(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {
            "first_k_dense_replace": config.layers
            + (config.mtp.depth if config.mtp is not None else 0)
        }
    router = moe.router
    limited = "group_limited_greedy" if router.groups > 1 else "greedy"
    return {
        "n_routed_experts": moe.routed,
        "n_shared_experts": moe.shared,
        "num_experts_per_tok": moe.active,
        "moe_intermediate_size": moe.width,
        "first_k_dense_replace": moe.first_dense,
        "moe_layer_freq": 1,
        "n_group": router.groups,
        "topk_group": router.groups_kept,
        "norm_topk_prob": router.renormalise,
        "routed_scaling_factor": router.scale,
        "scoring_func": router.score,
        "topk_method": limited if router.score == "softmax" else "noaux_tc",
    }


def places(config: ModelConfig) -> dict[str, Place]:
    """Maps published names to places, for every tensor that a folder of this config must have."""
    table = {
        "model.embed_tokens.weight": Place("embed.weight"),
        "model.norm.weight": Place("norm.weight"),
    }
    if not config.tied:
        table["lm_head.weight"] = Place("head.weight")
    for index in range(config.layers):
        table |= _block(f"model.layers.{index}", f"blocks.{index}", config, index)
    for depth in range(config.mtp.depth if config.mtp is not None else 0):
        theirs, ours = f"model.layers.{config.layers + depth}", f"mtp.{depth}"
        table |= _block(theirs, f"{ours}.block", config, config.layers + depth)
        for name, our_name in (
            ("enorm", "enorm"),
            ("hnorm", "hnorm"),
            ("eh_proj", "eh_proj"),
            ("shared_head.norm", "norm"),
        ):
            table[f"{theirs}.{name}.weight"] = Place(f"{ours}.{our_name}.weight")
    return table


def copies(config: ModelConfig) -> dict[str, Place]:
    """Maps published names to places, for tensors that a folder may repeat.

    These are MTP's embedding and head, and a tied head.
    """
    embed, head = Place("embed.weight"), Place("embed.weight" if config.tied else "head.weight")
    table = {"lm_head.weight": head} if config.tied else {}
    for depth in range(config.mtp.depth if config.mtp is not None else 0):
        theirs = f"model.layers.{config.layers + depth}"
        table |= {f"{theirs}.embed_tokens.weight": embed, f"{theirs}.shared_head.head.weight": head}
    return table


def aliases(config: ModelConfig) -> dict[str, Place]:
    """Maps transformers' parameters that no file holds, a layer's experts in one, to places."""
    table = {}
    for index in range(config.layers):
        if config.has_experts(index):
            for theirs, ours in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
                table[f"model.layers.{index}.mlp.experts.{theirs}"] = Place(
                    f"blocks.{index}.ffn.experts.{ours}", (), transposed=True
                )
    return table


def skipped(name: str) -> bool:
    """Whether a tensor of a folder is read past: rotary frequencies, which the config gives."""
    return name.endswith(".rotary_emb.inv_freq")


def hollow(config: ModelConfig) -> dict[str, Place]:
    """Maps published names to empty places, for the shared experts of a model without any.

    The state dict needs an entry "" for them.
    """
    if config.moe is None or config.moe.shared:
        return {}
    blocks = config.layers + (config.mtp.depth if config.mtp is not None else 0)
    return {
        f"model.layers.{index}.mlp.shared_experts.{name}.weight": Place(
            "", transposed=name == "down_proj"
        )
        for index in range(config.moe.first_dense, blocks)
        for name in SWIGLU
    }


def _block(theirs: str, ours: str, config: ModelConfig, index: int) -> dict[str, Place]:
    assert config.mla is not None
    absent = (
        ("q_a_proj", "q_a_layernorm", "q_b_proj") if config.mla.q_lora_rank is None else ("q_proj",)
    )
    table = {
        f"{theirs}.self_attn.{name}.weight": Place(f"{ours}.attention.{name}.weight")
        for name in ATTENTION
        if name not in absent
    }
    if config.mla.bias:
        table |= {
            f"{theirs}.self_attn.{name}.bias": Place(f"{ours}.attention.{name}.bias")
            for name in BIASED
            if name not in absent
        }
    table[f"{theirs}.input_layernorm.weight"] = Place(f"{ours}.attention_norm.weight")
    table[f"{theirs}.post_attention_layernorm.weight"] = Place(f"{ours}.ffn_norm.weight")
    if config.has_experts(index):
        return table | _experts(f"{theirs}.mlp", f"{ours}.ffn", config)
    return table | {
        f"{theirs}.mlp.{name}.weight": Place(f"{ours}.ffn.{name}.weight") for name in SWIGLU
    }


def _experts(theirs: str, ours: str, config: ModelConfig) -> dict[str, Place]:
    moe = config.moe
    assert moe is not None
    table = {f"{theirs}.gate.weight": Place(f"{ours}.router.weight")}
    if moe.router.bias:
        table[f"{theirs}.gate.e_score_correction_bias"] = Place(
            f"{ours}.router.e_score_correction_bias"
        )
    if moe.shared:
        table |= {
            f"{theirs}.shared_experts.{name}.weight": Place(f"{ours}.shared.{name}.weight")
            for name in SWIGLU
        }
    every = slice(None)
    for expert in range(moe.routed):
        for name, our_name, columns in (
            ("gate_proj", "gate_up", slice(moe.width)),
            ("up_proj", "gate_up", slice(moe.width, None)),
            ("down_proj", "down", every),
        ):
            tensor_place = Place(
                f"{ours}.experts.{our_name}", (expert, every, columns), transposed=True
            )
            table[f"{theirs}.experts.{expert}.{name}.weight"] = tensor_place
    return table


def _mtp_depth(description: Mapping[str, Any], names: Collection[str]) -> int:
    """Counts the blocks stored after the last layer.

    A folder may have them in its config and leave out their weights.
    """
    matches = (re.match(r"model\.layers\.(\d+)\.(eh_proj|enorm|hnorm)\.", name) for name in names)
    layers = description.get("num_hidden_layers")
    return len(
        {
            match[1]
            for match in matches
            if match and isinstance(layers, int) and int(match[1]) >= layers
        }
    )
