"""DeepSeek's config.json in -> ModelConfig out, ModelConfig -> such a description.

    deepseek_v2   softmax scores, one group (greedy) or the best groups by their maximum (group_limited_greedy)
    deepseek_v3   sigmoid scores and a bias for choosing, groups by the sum of their two best

What the format can say and we do not compute, and what we compute and it cannot say, is refused by name.
"""

from collections.abc import Mapping
from typing import Any

from rorqual.layers.attention import MLAConfig
from rorqual.layers.balance import BalanceConfig
from rorqual.layers.basics import RopeConfig, YarnConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.router import RouterConfig
from rorqual.model import ModelConfig

KINDS = ("deepseek_v2", "deepseek_v3")
REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
REQUIRED_WITH_EXPERTS = ("moe_intermediate_size", "num_experts_per_tok")
ONLY: dict[str, tuple[Any, ...]] = {  # None stands for absent, too
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "moe_layer_freq": (1, None),
    "ep_size": (1, None),
}
ONLY_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v2": {
        "scoring_func": ("softmax", None),
        "topk_method": ("greedy", "group_limited_greedy", None),
        "norm_topk_prob": (False, None),
    },
    "deepseek_v3": {"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)},
}


def config_of(description: Mapping[str, Any], mtp_depth: int = 0) -> ModelConfig:
    """The ModelConfig of a published config.json; `mtp_depth` is how many MTP blocks the folder really holds.

    ValueError for another architecture, absent keys, or values that this architecture does not know.
    """
    kind = description.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"model_type: got {kind!r}, expected {' or '.join(KINDS)}")
    has_experts = description.get("n_routed_experts") is not None and description.get(
        "first_k_dense_replace", _first_dense(kind)
    ) < description.get("num_hidden_layers", 0)
    needed = REQUIRED + (REQUIRED_WITH_EXPERTS if has_experts else ())
    if lacking := [key for key in needed if key not in description]:
        raise ValueError(f"config.json: no {', '.join(lacking)}")
    _refuse_unknown(description, kind)
    d = description
    return ModelConfig(
        vocabulary=d["vocab_size"],
        dim=d["hidden_size"],
        layers=d["num_hidden_layers"],
        dense_width=d["intermediate_size"],
        mla=MLAConfig(
            heads=d["num_attention_heads"],
            q_lora_rank=d["q_lora_rank"],
            kv_lora_rank=d["kv_lora_rank"],
            nope_dim=d["qk_nope_head_dim"],
            rope_dim=d["qk_rope_head_dim"],
            value_dim=d["v_head_dim"],
        ),
        rope=_rope_of(d),
        moe=_moe_of(d, kind) if has_experts else None,
        mtp=MTPConfig(depth=mtp_depth) if mtp_depth else None,
        tied=bool(d.get("tie_word_embeddings", False)),
        eps=float(d.get("rms_norm_eps", 1e-6)),
        init_std=float(d.get("initializer_range", 0.02)),
    )


def _first_dense(kind: str) -> int:
    """transformers' default where a config.json does not say how many dense blocks come first."""
    return 3 if kind == "deepseek_v3" else 0


def _refuse_unknown(description: Mapping[str, Any], kind: str) -> None:
    for key, allowed in {**ONLY, **ONLY_OF[kind]}.items():
        if (value := description.get(key)) not in allowed:
            raise ValueError(f"{key}: got {value!r}, expected {' or '.join(str(x) for x in allowed if x is not None)}")
    heads, keys = description["num_attention_heads"], description.get("num_key_value_heads")
    if keys not in (None, heads):
        raise ValueError(f"num_key_value_heads: got {keys}, expected the {heads} of num_attention_heads, or none")
    method = (description.get("quantization_config") or {}).get("quant_method", "fp8")
    if method != "fp8":
        raise ValueError(f"quantization_config.quant_method: got {method!r}, expected 'fp8' or none")


def _rope_of(description: Mapping[str, Any]) -> RopeConfig:
    """rope_parameters (transformers 5), or rope_theta with rope_scaling (as released)."""
    said = description.get("rope_parameters") or description.get("rope_scaling") or {}
    base = float(said.get("rope_theta", description.get("rope_theta", 10000.0)))
    interleaved = description.get("rope_interleave", True) is not False
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return RopeConfig(base=base, interleaved=interleaved)
    if kind != "yarn":
        raise ValueError(f"rope_scaling.type: got {kind!r}, expected 'yarn' or 'default'")
    if said.get("attention_factor") is not None or said.get("truncate", True) is not True:
        raise ValueError("rope_scaling: got attention_factor or truncate, expected mscale and mscale_all_dim only")
    mscale, all_dim = said.get("mscale") or 0, said.get("mscale_all_dim") or 0
    if all_dim and not mscale:
        raise ValueError(f"rope_scaling: got mscale_all_dim {all_dim} without mscale, expected both or neither")
    length = said.get("original_max_position_embeddings") or description.get("max_position_embeddings")
    if length is None:
        raise ValueError("rope_scaling: no original_max_position_embeddings")
    yarn = YarnConfig(
        factor=float(said["factor"]),
        original_length=int(length),
        beta_fast=float(said.get("beta_fast") or 32),
        beta_slow=float(said.get("beta_slow") or 1),
        mscale=float(mscale if all_dim else 1),  # alone, mscale counts for nothing in transformers
        mscale_all_dim=float(all_dim),
    )
    return RopeConfig(base=base, interleaved=interleaved, yarn=yarn)


def _moe_of(description: Mapping[str, Any], kind: str) -> MoEConfig:
    d = description
    groups, kept, scale = d.get("n_group") or 1, d.get("topk_group") or 1, float(d.get("routed_scaling_factor") or 1)
    if kind == "deepseek_v3":
        renormalise = d.get("norm_topk_prob", True) is not False
        router = RouterConfig(score="sigmoid", groups=groups, groups_kept=kept, renormalise=renormalise, scale=scale)
        balance = BalanceConfig()
    else:
        if d.get("topk_method", "greedy") != "group_limited_greedy":
            groups = kept = 1
        router = RouterConfig(
            score="softmax",
            groups=groups,
            groups_kept=kept,
            group_score="max",
            renormalise=False,
            scale=scale,
            bias=False,
        )
        balance = BalanceConfig(bias_rate=0.0, sequence=0.0, expert=float(d.get("aux_loss_alpha") or 0.001))
    return MoEConfig(
        routed=d["n_routed_experts"],
        active=d["num_experts_per_tok"],
        shared=d.get("n_shared_experts") or 0,
        width=d["moe_intermediate_size"],
        first_dense=d.get("first_k_dense_replace", _first_dense(kind)),
        router=router,
        balance=balance,
    )


def published(config: ModelConfig, **fields: Any) -> dict[str, Any]:
    """The config.json that transformers' DeepseekV2Config or DeepseekV3Config reads; `fields` are added as they are.

    ValueError naming the parts of our model that the format cannot hold.
    """
    if foreign := _foreign(config):
        raise ValueError(f"a DeepSeek folder cannot hold {', '.join(foreign)}")
    mla, moe = config.mla, config.moe
    assert mla is not None
    kind = "deepseek_v2" if moe is not None and moe.router.score == "softmax" else "deepseek_v3"
    description = {
        "architectures": [kind.title().replace("_", "").replace("seekv", "seekV") + "ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocabulary,
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
        "attention_bias": False,
        "num_nextn_predict_layers": config.mtp.depth if config.mtp is not None else 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return description | _published_rope(config.rope) | _published_moe(config) | fields


def _foreign(config: ModelConfig) -> list[str]:
    """What of a model is not DeepSeek V2's or V3's, in words."""
    found = [name for name in ("gqa", "nsa", "moba", "dsa", "engram", "hyper") if getattr(config, name) is not None]
    if config.mla is None:
        return found
    if config.mla.eps != 1e-6:
        found.append(f"latent norms with eps {config.mla.eps} (1e-6 only)")
    if (yarn := config.rope.yarn) is not None and 0 in (yarn.mscale, yarn.mscale_all_dim) and yarn.mscale != 1:
        found.append(f"YaRN with mscale {yarn.mscale} and mscale_all_dim {yarn.mscale_all_dim}")
    if config.moe is None:
        return found
    router, v2 = config.moe.router, config.moe.router.score == "softmax"
    unlike = {
        f"score {router.score}": router.score not in ("softmax", "sigmoid"),
        "adaptive_mass": router.adaptive_mass is not None,
        "token_id_layers": router.token_id_layers > 0,
        "no shared expert": config.moe.shared == 0,
        "renormalised softmax weights": v2 and router.renormalise,
        "a softmax router with a bias": v2 and router.bias,
        "a sigmoid router without a bias": not v2 and not router.bias,
        f"group_score {router.group_score}": router.groups > 1 and router.group_score != ("max" if v2 else "top2"),
        f"shared_width {config.moe.shared_width}": config.moe.shared_hidden != config.moe.shared * config.moe.width,
        "MTP with a softmax router": v2 and config.mtp is not None,
        "a width that is no multiple of the heads, with a softmax router": v2 and config.dim % config.mla.heads != 0,
        "half-split rope with a softmax router": v2 and not config.rope.interleaved,
    }
    return found + [name for name, true in unlike.items() if true]


def _published_rope(rope: RopeConfig) -> dict[str, Any]:
    said = {"rope_theta": rope.base, "rope_interleave": rope.interleaved}
    if rope.yarn is None:
        return said | {"rope_scaling": None, "max_position_embeddings": 4096}
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
    return said | {"rope_scaling": scaling, "max_position_embeddings": int(yarn.factor * yarn.original_length)}


def _published_moe(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {"first_k_dense_replace": config.layers}
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
