"""DeepSeek V2, V3, R1, V3.2 and their relatives: config.json and tensor names, ours and theirs.

    deepseek_v2     softmax scores, one group (greedy) or the groups with the largest maxima
                    (group_limited_greedy)
    deepseek_v3     sigmoid scores and a bias for the selection, groups by the sum of their two best
    deepseek_v32    V3 with DSA in every block
    glm_moe_dsa     V3.2, its indexer's rope interleaved; some blocks reuse the selection before
    kimi_k2         V3 by another name
    glm4_moe_lite   V3, its dense blocks listed
    axk1            V3 with a norm of the output of a mixture of experts; perhaps without the bias
    youtu           V3 without experts, with one embedding
    mistral4        softmax scores, groups by the sum of their two best, renormalised; queries
                    scaled by their position; all experts of a block in one tensor

    model.layers.1.mlp.experts.7.gate_proj.weight [F, D]
        <->  blocks.1.ffn.experts.gate_up[7, :, :F] transposed
    model.layers.N (N = num_hidden_layers)
        <->  mtp.0, whose embedding and head are the model's own

What a kind cannot express is refused by name. Fields that transformers ignores, fields of training
(dropout, auxiliary losses) and of deployment (ep_size) are ignored. A model is written as the first
kind that has all of its parts: Kimi K2 as deepseek_v3.

Released configurations of arXiv 2405.04434, 2412.19437, 2501.12948 and 2512.02556.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from rorqual.hub.fields import flag, mtp_layers, number, quantisation, whole
from rorqual.hub.places import Sizes, StateSlice
from rorqual.hub.rope import published_rope, rope_of
from rorqual.model_config import (
    BalanceConfig,
    DSAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RouterConfig,
)

CLASSES = {  # of transformers
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "axk1": "AXK1ForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
}
MODEL_TYPES = (*CLASSES, "kimi_k2", "youtu")
INDEXED = ("deepseek_v32", "glm_moe_dsa")  # kinds with DSA
SOFTMAX = ("deepseek_v2", "mistral4")
LISTED = ("deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "axk1")  # dense blocks by mlp_layer_types
MODEL_PARTS = ("mla", "dsa", "moe", "mtp")
EMBEDDING = "model.embed_tokens.weight"
SIZES = Sizes(r"^model\.layers\.(\d+)\.", ".mlp.gate.weight", r"\.mlp\.experts\.(\d+)\.")
PARTS: dict[str, str] = {}
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
INDEXER = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
BIASED = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")  # biased where the config has attention_bias
MANY = 100_000  # layers; no more are counted of a config that no folder has the tensors of
SWIGLU = ("gate_proj", "up_proj", "down_proj")
WHOLE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
REQUIRED = (*WHOLE, "q_lora_rank")
REQUIRED_WITH_EXPERTS = ("moe_intermediate_size", "num_experts_per_tok")
_V3: dict[str, Any] = {
    "n_routed_experts": 256, "n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "max_position_embeddings": 4096,
    "rope_interleave": True,
}  # fmt: skip
_V32 = _V3 | {
    "max_position_embeddings": 163840, "index_topk": 2048, "index_head_dim": 128,
    "index_n_heads": 64,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {  # of transformers' configs
    "deepseek_v2": {
        "n_routed_experts": 64, "n_shared_experts": 2, "first_k_dense_replace": 0, "n_group": None,
        "topk_group": None,
        "topk_method": "greedy", "routed_scaling_factor": 1.0, "max_position_embeddings": 2048,
        "rope_interleave": True,
    },
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "deepseek_v32": _V32,
    "glm_moe_dsa": _V32 | {
        "n_group": 1, "topk_group": 1, "max_position_embeddings": 202752, "index_n_heads": 32,
        "rms_norm_eps": 1e-5,
    },
    "glm4_moe_lite": _V3 | {
        "n_routed_experts": 64, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8,
        "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "first_k_dense_replace": 1,
    },
    "axk1": _V3 | {
        "n_routed_experts": 192, "max_position_embeddings": 32768, "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
    },
    "youtu": _V3 | {
        "n_routed_experts": None, "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "initializer_range": None,
    },
    "mistral4": _V3 | {
        "n_routed_experts": 128, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "max_position_embeddings": 1048576, "first_k_dense_replace": 0,
    },
}  # fmt: skip
DEFAULTS_OF_ALL = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
ALIASES = {"num_local_experts": "n_routed_experts"}
ALIASES_OF = {
    "deepseek_v2": {"num_experts": "n_routed_experts"},
    "deepseek_v32": ALIASES | {"num_experts": "n_routed_experts"},
    "glm_moe_dsa": ALIASES | {"num_experts": "n_routed_experts"},
}
ONLY: dict[str, tuple[Any, ...]] = {  # None also means absent
    "hidden_act": ("silu", None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None),
    "sliding_window": (None,),
    "use_qk_norm": (False, None),
}
_ONLY_V3 = {"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)}
_NO_LIST = {"mlp_layer_types": (None,)}
_NO_INDEXER = {"index_topk": (None,)}
ONLY_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v2": {
        "scoring_func": ("softmax", None),
        "topk_method": ("greedy", "group_limited_greedy", None),
        **_NO_LIST,
        **_NO_INDEXER,
    },
    "deepseek_v3": _ONLY_V3 | _NO_LIST | _NO_INDEXER,
    "kimi_k2": _ONLY_V3 | _NO_LIST | _NO_INDEXER,
    "deepseek_v32": _ONLY_V3,
    "glm_moe_dsa": _ONLY_V3,
    "glm4_moe_lite": _ONLY_V3 | _NO_INDEXER,
    "axk1": _ONLY_V3 | _NO_INDEXER,
    "youtu": {"n_routed_experts": (None,)} | _NO_LIST | _NO_INDEXER,
    "mistral4": {"scoring_func": ("softmax", None)} | _NO_LIST | _NO_INDEXER,
}


def config_of(description: Mapping[str, Any], names: Collection[str] = ()) -> ModelConfig:
    """Converts a published config.json; `names` are the folder's tensors, which show MTP's blocks.

    Without names the config says how many there are. Missing fields have transformers' defaults;
    fields that transformers ignores (V2's norm_topk_prob and rope_interleave, moe_layer_freq) are
    ignored. ValueError for another architecture, absent sizes, or values that this architecture
    does not support.
    """
    kind = description.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type: got {kind!r}, expected {' or '.join(MODEL_TYPES)}")
    mtp_depth = _mtp_depth(description, names)
    aliases_of_kind = ALIASES_OF.get(kind, ALIASES)
    fields = {aliases_of_kind.get(key, key): value for key, value in description.items()}
    d = DEFAULTS_OF_ALL | DEFAULTS[kind] | fields
    if kind == "youtu" and d["initializer_range"] is None and d.get("hidden_size"):
        d["initializer_range"] = 2.0 / (5.0 * whole(d, "hidden_size")) ** 0.5
    first, others = _dense_blocks(d, kind) if "num_hidden_layers" in d else (0, ())
    has_experts = d["n_routed_experts"] is not None and (
        "num_hidden_layers" not in d
        or first + len(others) < whole(d, "num_hidden_layers") + mtp_depth
    )
    needed = REQUIRED + (REQUIRED_WITH_EXPERTS if has_experts else ())
    if lacking := [key for key in needed if key not in d]:
        raise ValueError(f"config.json: no {', '.join(lacking)}")
    size = {key: whole(d, key) for key in WHOLE}
    _refuse_unknown(d, kind)
    share = None
    if kind == "mistral4":
        width = size["qk_nope_head_dim"] + size["qk_rope_head_dim"]
        share = size["qk_rope_head_dim"], width
        if not (d.get("rope_scaling") or d.get("rope_parameters")):
            d["rope_parameters"] = MISTRAL4_ROPE
    always = kind == "deepseek_v2" or kind in INDEXED
    return ModelConfig(
        vocab_size=size["vocab_size"],
        dim=size["hidden_size"],
        layers=size["num_hidden_layers"],
        dense_width=size["intermediate_size"],
        mla=_mla_of(d, size),
        dsa=_dsa_of(d, kind) if kind in INDEXED else None,
        rope=rope_of(d, interleaved=always or flag(d, "rope_interleave"), share=share),
        moe=_moe_of(d, kind, (first, others), names) if has_experts else None,
        mtp=MTPConfig(depth=mtp_depth) if mtp_depth else None,
        tied=flag(d, "tie_word_embeddings"),
        eps=number(d, "rms_norm_eps"),
        init_std=number(d, "initializer_range"),
    )


MISTRAL4_ROPE = {  # what transformers takes if there is none
    "type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _dense_blocks(d: Mapping[str, Any], kind: str) -> tuple[int, tuple[int, ...]]:
    """Returns the number of first blocks without experts, and the others that have none.

    They are the first ones, or those that a list or a period names.
    """
    layers = whole(d, "num_hidden_layers")
    kinds = d.get("mlp_layer_types") if kind in LISTED else None
    if kinds is None:
        # transformers reads no such field of GLM-4 Lite.
        first = 1 if kind == "glm4_moe_lite" else whole(d, "first_k_dense_replace")
        period = max(1, whole(d, "moe_layer_freq")) if kind == "axk1" else 1
        dense = [] if period == 1 else [i for i in range(first, min(layers, MANY)) if i % period]
    else:
        if not isinstance(kinds, list) or any(kind not in ("dense", "sparse") for kind in kinds):
            raise ValueError(
                f"config.json: mlp_layer_types: got {kinds!r}, "
                "expected a list of 'dense' and 'sparse'"
            )
        if len(kinds) < layers:
            raise ValueError(
                f"config.json: mlp_layer_types: got {len(kinds)} kinds, "
                f"expected one for each of {layers} layers"
            )
        first = 0
        dense = [index for index in range(layers) if kinds[index] == "dense"]
    while first in dense:
        first += 1
    return first, tuple(index for index in dense if index > first)


def _dsa_of(d: Mapping[str, Any], kind: str) -> DSAConfig:
    """Reads the fields of the indexer of V3.2, or of GLM, whose rope pairs neighbours."""
    kinds = d.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(each != "indexed_attention" for each in kinds)
    ):
        raise ValueError(
            f"config.json: layer_types: got {kinds!r}, expected 'indexed_attention' of every layer"
        )
    glm = kind == "glm_moe_dsa"
    return DSAConfig(
        heads=whole(d, "index_n_heads"),
        dim=whole(d, "index_head_dim"),
        top_k=whole(d, "index_topk"),
        interleaved=glm,
        shared=_shared_blocks(d) if glm else (),
        ties="topk",
    )


def _shared_blocks(d: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the blocks that reuse a selection: by a list, by a pattern, or by a period."""
    layers = whole(d, "num_hidden_layers")
    kinds = d.get("indexer_types")
    if kinds is None and (pattern := d.get("index_topk_pattern")) is not None:
        kinds = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    if kinds is None:
        period = max(whole({"index_topk_freq": 1, **d}, "index_topk_freq"), 1)
        first = whole({"index_skip_topk_offset": 2, **d}, "index_skip_topk_offset")
        return tuple(
            index
            for index in range(0 if period == 1 else min(layers, MANY))
            if max(index - first + 1, 0) % period
        )
    if not isinstance(kinds, list) or not set(kinds) <= {"full", "shared"} or len(kinds) < layers:
        raise ValueError(
            f"config.json: indexer_types: got {kinds!r}, "
            f"expected 'full' or 'shared' for each of {layers} layers"
        )
    return tuple(index for index in range(layers) if kinds[index] == "shared")


def _mla_of(d: Mapping[str, Any], size: Mapping[str, int]) -> MLAConfig:
    """Reads the ranks and widths of latent attention."""
    return MLAConfig(
        heads=size["num_attention_heads"],
        q_lora_rank=None if d["q_lora_rank"] is None else whole(d, "q_lora_rank"),
        kv_lora_rank=size["kv_lora_rank"],
        nope_dim=size["qk_nope_head_dim"],
        rope_dim=size["qk_rope_head_dim"],
        value_dim=size["v_head_dim"],
        bias=flag(d, "attention_bias"),
    )


def _refuse_unknown(description: Mapping[str, Any], kind: str) -> None:
    """Raises ValueError for a field whose value this code cannot compute."""
    for key, allowed in {**ONLY, **ONLY_OF[kind]}.items():
        if (value := description.get(key)) not in allowed:
            expected = " or ".join(str(x) for x in allowed if x is not None) or "none"
            raise ValueError(f"config.json: {key}: got {value!r}, expected {expected}")
    heads = description["num_attention_heads"]
    keys = description.get("num_key_value_heads")
    # transformers asks for one key head a query head, and divides rounding down.
    if keys is not None and heads // max(1, whole(description, "num_key_value_heads")) != 1:
        raise ValueError(
            f"num_key_value_heads: got {keys}, expected the {heads} of num_attention_heads, or none"
        )
    quantisation(description)


def _moe_of(
    d: Mapping[str, Any], kind: str, dense: tuple[int, tuple[int, ...]], names: Collection[str]
) -> MoEConfig:
    """Reads the experts, their router and its losses.

    `dense` are the blocks without experts, as `_dense_blocks` returns them; `names` the stored
    tensors.
    """
    shared = d["n_shared_experts"]
    router, balance = (
        (_softmax_router(d, kind), _v2_balance(d))
        if kind in SOFTMAX
        else (_sigmoid_router(d, kind, names), BalanceConfig())
    )
    return MoEConfig(
        routed=whole(d, "n_routed_experts"),
        active=whole(d, "num_experts_per_tok"),
        shared=0 if shared is None else whole(d, "n_shared_experts"),
        width=whole(d, "moe_intermediate_size"),
        first_dense=dense[0],
        dense_layers=dense[1],
        norm_eps=number(d, "rms_norm_eps") if kind == "axk1" else None,
        router=router,
        balance=balance,
    )


def _sigmoid_router(d: Mapping[str, Any], kind: str, names: Collection[str]) -> RouterConfig:
    """Reads V3's router, with a bias unless the weights of an A.X-K1 lack it."""
    # The released A.X-K1 has no bias; transformers then adds zeros.
    biased = any(name.endswith(".e_score_correction_bias") for name in names)
    return RouterConfig(
        score="sigmoid",
        groups=whole(d, "n_group"),
        groups_kept=whole(d, "topk_group"),
        renormalise=flag(d, "norm_topk_prob"),
        scale=number(d, "routed_scaling_factor"),
        bias=biased or kind != "axk1" or not names,
    )


def _softmax_router(d: Mapping[str, Any], kind: str) -> RouterConfig:
    """Reads the router of V2 or Mistral 4; V2 has groups only with group_limited_greedy."""
    v2 = kind == "deepseek_v2"
    limited = not v2 or d["topk_method"] == "group_limited_greedy"
    return RouterConfig(
        score="softmax",
        groups=whole(d, "n_group") if limited else 1,
        groups_kept=whole(d, "topk_group") if limited else 1,
        group_score="max" if v2 else "top2",
        renormalise=not v2 and flag(d, "norm_topk_prob"),
        scale=number(d, "routed_scaling_factor"),
        bias=False,
    )


def _v2_balance(d: Mapping[str, Any]) -> BalanceConfig:
    """Reads the coefficient of V2's expert loss, 0.001 if there is none, and no other loss."""
    alpha = 0.001 if d.get("aux_loss_alpha") is None else number(d, "aux_loss_alpha")
    return BalanceConfig(bias_rate=0.0, sequence=0.0, expert=alpha)


def published(config: ModelConfig, **fields: Any) -> dict[str, Any]:
    """Returns the config.json that transformers' class for the architecture reads.

    `fields` are added unchanged. ValueError with the parts of our model that no kind can express.
    """
    if lacking := foreign(config):
        raise ValueError(f"a DeepSeek folder cannot hold {', '.join(lacking)}")
    mla = config.mla
    kind = kind_of(config)
    assert mla is not None
    description = {
        "architectures": [CLASSES[kind]],
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
    description |= published_rope(config.rope) | {"rope_interleave": config.rope.interleaved}
    description |= _published_moe(config, kind)
    if config.dsa is not None:
        description |= {
            "index_n_heads": config.dsa.heads,
            "index_head_dim": config.dsa.dim,
            "index_topk": config.dsa.top_k,
        }
    if config.dsa is not None and kind == "glm_moe_dsa":
        every = range(config.layers)
        kinds = ["shared" if index in config.dsa.shared else "full" for index in every]
        description["indexer_types"] = kinds
    if config.rope.query_scale is not None:
        description |= _mistral4_rope(description, config)
    return description | fields


def _mistral4_rope(description: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns the rotary fields as Mistral 4 has them, in rope_parameters with the query scale."""
    scale = config.rope.query_scale
    mla = config.mla
    assert scale is not None and mla is not None
    rope = {"rope_theta": config.rope.base} | (description["rope_scaling"] or {})
    rope |= {
        "llama_4_scaling_beta": scale.beta,
        "original_max_position_embeddings": scale.original_length,
        "partial_rotary_factor": mla.rope_dim / (mla.nope_dim + mla.rope_dim),
    }
    return {"rope_parameters": rope, "rope_scaling": None}


def kind_of(config: ModelConfig) -> str:
    """Returns the model_type that a model is written as."""
    softmax = config.moe is not None and config.moe.router.score == "softmax"
    if config.dsa is not None:
        glm = config.dsa.interleaved or config.dsa.shared
        return "glm_moe_dsa" if glm else "deepseek_v32"
    if config.rope.query_scale is not None:
        return "mistral4"
    if softmax:
        return "deepseek_v2"
    if config.moe is not None and config.moe.norm_eps is not None:
        return "axk1"
    return "glm4_moe_lite" if config.moe is not None and config.moe.dense_layers else "deepseek_v3"


def foreign(config: ModelConfig) -> list[str]:
    """Describes the parts of a model that no DeepSeek or relative of one has."""
    differences = [name for name in config.parts if name not in MODEL_PARTS]
    if config.mla is None:
        return differences
    kind = kind_of(config)
    lora = config.mla.q_lora_rank is not None
    if config.mla.eps != 1e-6:
        differences.append(f"latent norms with eps {config.mla.eps} (1e-6 only)")
    unlike = {
        f"{kind} without a rank of queries": kind in (*INDEXED, "axk1") and not lora,
        "half-split rope with DSA": kind in INDEXED and not config.rope.interleaved,
        "query_scale with DSA": kind in INDEXED and config.rope.query_scale is not None,
        "shared indexers with half-split rope": config.dsa is not None
        and bool(config.dsa.shared)
        and not config.dsa.interleaved,
        "query_scale with the rope of another length": _other_length(config),
    }
    return differences + [name for name, true in unlike.items() if true] + _foreign_moe(config)


def _other_length(config: ModelConfig) -> bool:
    """Returns whether the query scale and the stretching of rope differ in original length."""
    rope = config.rope
    kind = rope.yarn or rope.llama3 or rope.longrope
    return (
        rope.query_scale is not None
        and kind is not None
        and kind.original_length != rope.query_scale.original_length
    )


def _foreign_moe(config: ModelConfig) -> list[str]:
    """Describes the parts of a model's experts that its kind of folder has not."""
    moe = config.moe
    kind = kind_of(config)
    mla = config.mla
    if moe is None or mla is None:
        return []
    router = moe.router
    v2 = kind == "deepseek_v2"
    softmax = kind in SOFTMAX
    unlike = {
        f"score {router.score} in {kind}": router.score != ("softmax" if softmax else "sigmoid"),
        "adaptive_mass": router.adaptive_mass is not None,
        "token_id_layers": router.token_id_layers > 0 or bool(router.other_token_id_layers),
        "swiglu_limit": moe.swiglu_limit is not None,
        "renormalised softmax weights": v2 and router.renormalise,
        "a softmax router with a bias": softmax and router.bias,
        "a sigmoid router without a bias": not softmax and not router.bias and kind != "axk1",
        f"group_score {router.group_score}": router.groups > 1
        and router.group_score != ("max" if v2 else "top2"),
        f"shared_width {moe.shared_width}": moe.shared_hidden != moe.shared * moe.width,
        "shared_gate": moe.shared_gate,
        "MTP with a softmax router": softmax and config.mtp is not None,
        "a width that is no multiple of the heads, with a softmax router": v2
        and config.dim % mla.heads != 0,
        "half-split rope with a softmax router": v2 and not config.rope.interleaved,
        f"dense_layers in {kind}": bool(moe.dense_layers) and kind not in LISTED,
        f"norm_eps in {kind}": moe.norm_eps is not None and kind != "axk1",
        f"norm_eps {moe.norm_eps}": moe.norm_eps not in (None, config.eps),
    }
    return [name for name, true in unlike.items() if true]


def _published_moe(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Returns the fields of the experts and their router; without experts every block is dense."""
    moe = config.moe
    every = range(config.layers)
    listed: dict[str, Any] = {}
    if kind in LISTED:
        kinds = ["sparse" if config.has_experts(index) else "dense" for index in every]
        listed["mlp_layer_types"] = kinds
    if moe is None:
        depth = config.mtp.depth if config.mtp is not None else 0
        return listed | {"first_k_dense_replace": config.layers + depth}
    router = moe.router
    limited = "group_limited_greedy" if router.groups > 1 else "greedy"
    method = {"deepseek_v2": limited, "mistral4": None}.get(kind, "noaux_tc")
    return listed | {
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
        "topk_method": method,
    }


def places(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps published names to places, for every tensor that a folder of this config must have."""
    table = {
        "model.embed_tokens.weight": StateSlice("embed.weight"),
        "model.norm.weight": StateSlice("norm.weight"),
    }
    if not config.tied:
        table["lm_head.weight"] = StateSlice("head.weight")
    for index in range(config.layers):
        table |= _block(f"model.layers.{index}", f"blocks.{index}", config, index)
    for depth in range(config.mtp.depth if config.mtp is not None else 0):
        theirs = f"model.layers.{config.layers + depth}"
        ours = f"mtp.{depth}"
        table |= _block(theirs, f"{ours}.block", config, config.layers + depth)
        for name, our_name in (
            ("enorm", "enorm"),
            ("hnorm", "hnorm"),
            ("eh_proj", "eh_proj"),
            ("shared_head.norm", "norm"),
        ):
            table[f"{theirs}.{name}.weight"] = StateSlice(f"{ours}.{our_name}.weight")
    return table


def copies(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps published names to places, for tensors that a folder may repeat.

    These are MTP's embedding and head, and a tied head.
    """
    embed = StateSlice("embed.weight")
    head = StateSlice("embed.weight" if config.tied else "head.weight")
    table = {"lm_head.weight": head} if config.tied else {}
    for depth in range(config.mtp.depth if config.mtp is not None else 0):
        theirs = f"model.layers.{config.layers + depth}"
        table |= {f"{theirs}.embed_tokens.weight": embed, f"{theirs}.shared_head.head.weight": head}
    return table


def aliases(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps transformers' parameters that no file holds, a layer's experts in one, to places."""
    table = {}
    for index in range(config.layers):
        layer = f"model.layers.{index}"
        if config.has_experts(index) and config.moe is not None and config.moe.norm_eps is not None:
            norm = StateSlice(f"blocks.{index}.ffn.norm.weight")
            table[f"{layer}.mlp.post_mlp_layernorm.weight"] = norm
        if config.has_experts(index):
            for theirs, ours in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
                table[f"{layer}.mlp.experts.{theirs}"] = StateSlice(
                    f"blocks.{index}.ffn.experts.{ours}", (), transposed=True
                )
    return table


def canonical(name: str) -> str:
    """Returns the name itself: all writers of such folders use the published ones."""
    return name


def skipped(name: str) -> bool:
    """Returns whether a tensor of a folder is not read.

    These are rotary frequencies, which the config gives, and norms that A.X-K1's dense blocks have
    and do not use.
    """
    return name.endswith((".rotary_emb.inv_freq", ".post_mlp_layernorm.weight"))


def hollow(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps published names to empty places, for the shared experts of a model without any.

    The state dict needs an entry "" for them.
    """
    if config.moe is None or config.moe.shared:
        return {}
    blocks = config.layers + (config.mtp.depth if config.mtp is not None else 0)
    return {
        f"model.layers.{index}.mlp.shared_experts.{name}.weight": StateSlice(
            "", transposed=name == "down_proj"
        )
        for index in range(blocks)
        if config.has_experts(index)
        for name in SWIGLU
    }


def _block(theirs: str, ours: str, config: ModelConfig, index: int) -> dict[str, StateSlice]:
    """Returns the places of a block's tensors by published names, which begin with `theirs`."""
    assert config.mla is not None
    absent = (
        ("q_a_proj", "q_a_layernorm", "q_b_proj") if config.mla.q_lora_rank is None else ("q_proj",)
    )
    table = {
        f"{theirs}.self_attn.{name}.weight": StateSlice(f"{ours}.attention.{name}.weight")
        for name in ATTENTION
        if name not in absent
    }
    if config.mla.bias:
        table |= {
            f"{theirs}.self_attn.{name}.bias": StateSlice(f"{ours}.attention.{name}.bias")
            for name in BIASED
            if name not in absent
        }
    if config.dsa is not None and index not in config.dsa.shared:
        table |= {
            f"{theirs}.self_attn.indexer.{name}": StateSlice(f"{ours}.attention.indexer.{name}")
            for name in INDEXER
        }
    table[f"{theirs}.input_layernorm.weight"] = StateSlice(f"{ours}.attention_norm.weight")
    table[f"{theirs}.post_attention_layernorm.weight"] = StateSlice(f"{ours}.ffn_norm.weight")
    if config.has_experts(index) and config.moe is not None and config.moe.norm_eps is not None:
        table[f"{theirs}.post_mlp_layernorm.weight"] = StateSlice(f"{ours}.ffn.norm.weight")
    if config.has_experts(index):
        return table | _experts(f"{theirs}.mlp", f"{ours}.ffn", config)
    return table | {
        f"{theirs}.mlp.{name}.weight": StateSlice(f"{ours}.ffn.{name}.weight") for name in SWIGLU
    }


def _experts(theirs: str, ours: str, config: ModelConfig) -> dict[str, StateSlice]:
    """Returns the places of a mixture's tensors by published names, which begin with `theirs`."""
    moe = config.moe
    assert moe is not None
    table = {f"{theirs}.gate.weight": StateSlice(f"{ours}.router.weight")}
    if moe.router.bias:
        table[f"{theirs}.gate.e_score_correction_bias"] = StateSlice(
            f"{ours}.router.e_score_correction_bias"
        )
    if moe.shared:
        table |= {
            f"{theirs}.shared_experts.{name}.weight": StateSlice(f"{ours}.shared.{name}.weight")
            for name in SWIGLU
        }
    if kind_of(config) == "mistral4":
        for name, our_name in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            table[f"{theirs}.experts.{name}"] = StateSlice(f"{ours}.experts.{our_name}", (), True)
        return table
    every = slice(None)
    for expert in range(moe.routed):
        for name, our_name, columns in (
            ("gate_proj", "gate_up", slice(moe.width)),
            ("up_proj", "gate_up", slice(moe.width, None)),
            ("down_proj", "down", every),
        ):
            tensor_place = StateSlice(
                f"{ours}.experts.{our_name}", (expert, every, columns), transposed=True
            )
            table[f"{theirs}.experts.{expert}.{name}.weight"] = tensor_place
    return table


def _mtp_depth(description: Mapping[str, Any], names: Collection[str]) -> int:
    """Counts the blocks stored after the last layer; without tensors, those of the config.

    A folder may have them in its config and leave out their weights.
    """
    if not names:
        return mtp_layers(description)
    matches = (re.match(r"model\.layers\.(\d+)\.(eh_proj|enorm|hnorm)\.", name) for name in names)
    layers = description.get("num_hidden_layers")
    return len(
        {
            match[1]
            for match in matches
            if match and isinstance(layers, int) and int(match[1]) >= layers
        }
    )
