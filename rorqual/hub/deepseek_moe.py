"""DeepSeekMoE-16B: config.json and tensor names, ours and theirs.

    deepseek   grouped-query attention, half-split rope; softmax scores, one group

Its model is code in its folder, which nothing here reads; the names are Llama's and DeepSeek V2's.
Fields of training and of deployment are ignored. arXiv 2401.06066.
"""

from collections.abc import Collection, Mapping
from typing import Any

from rorqual.hub.fields import flag, number, whole
from rorqual.hub.places import Sizes, StateSlice
from rorqual.hub.rope import published_rope, rope_of
from rorqual.model_config import (
    BalanceConfig,
    GQAConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)

MODEL_TYPES = ("deepseek",)
MODEL_PARTS = ("gqa", "moe")
EMBEDDING = "model.embed_tokens.weight"
SIZES = Sizes(r"^model\.layers\.(\d+)\.", ".mlp.gate.weight", r"\.mlp\.experts\.(\d+)\.")
PARTS: dict[str, str] = {}
WHOLE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
ONLY: dict[str, tuple[Any, ...]] = {  # None also means absent
    "hidden_act": ("silu", None),
    "scoring_func": ("softmax", None),
    "topk_method": ("greedy", None),
    "routed_scaling_factor": (1.0, None),
    "kv_lora_rank": (None,),
    "quantization_config": (None,),
}
SWIGLU = ("gate_proj", "up_proj", "down_proj")
MANY = 100_000  # layers; no more are counted of a config that no folder has the tensors of


def config_of(description: Mapping[str, Any], names: Collection[str] = ()) -> ModelConfig:
    """Converts a published config.json; nothing is read from `names`.

    ValueError for another architecture, absent sizes, or values that it does not support.
    """
    kind = description.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type: got {kind!r}, expected {' or '.join(MODEL_TYPES)}")
    d = {**DEFAULTS, **description}
    if lacking := [key for key in WHOLE if key not in d]:
        raise ValueError(f"config.json: no {', '.join(lacking)}")
    for key, allowed in ONLY.items():
        if (value := d.get(key)) not in allowed:
            expected = " or ".join(str(x) for x in allowed if x is not None) or "none"
            raise ValueError(f"config.json: {key}: got {value!r}, expected {expected}")
    heads, layers, dim = (
        whole(d, key) for key in ("num_attention_heads", "num_hidden_layers", "hidden_size")
    )
    if dim % max(heads, 1):
        raise ValueError(
            f"config.json: num_attention_heads: got {heads}, expected a divisor of {dim}"
        )
    first = whole(d, "first_k_dense_replace")
    period = max(1, whole(d, "moe_layer_freq"))
    # A period may leave no block with experts.
    sparse = any(index % period == 0 for index in range(first, min(layers, first + period)))
    has_experts = d["n_routed_experts"] is not None and sparse
    return ModelConfig(
        vocab_size=whole(d, "vocab_size"),
        dim=dim,
        layers=layers,
        dense_width=whole(d, "intermediate_size"),
        mla=None,
        gqa=GQAConfig(
            heads=heads,
            kv_heads=heads if d["num_key_value_heads"] is None else whole(d, "num_key_value_heads"),
            head_dim=dim // heads,
            bias=flag(d, "attention_bias"),
        ),
        rope=rope_of(d, interleaved=False),
        moe=_moe_of(d, first, layers) if has_experts else None,
        tied=flag(d, "tie_word_embeddings"),
        eps=number(d, "rms_norm_eps"),
        init_std=number(d, "initializer_range"),
    )


def _moe_of(d: Mapping[str, Any], first: int, layers: int) -> MoEConfig:
    """Reads the experts and their router.

    From block `first` on those have experts whose index is a multiple of moe_layer_freq.
    """
    period = max(1, whole(d, "moe_layer_freq"))
    alpha = d.get("aux_loss_alpha")
    dense = [i for i in range(first, min(layers, MANY)) if i % period] if period > 1 else []
    while first in dense:
        first += 1
    balance = 0.001 if alpha is None else number(d, "aux_loss_alpha")
    return MoEConfig(
        routed=whole(d, "n_routed_experts"),
        active=whole(d, "num_experts_per_tok"),
        shared=0 if d["n_shared_experts"] is None else whole(d, "n_shared_experts"),
        width=whole(d, "moe_intermediate_size"),
        first_dense=first,
        dense_layers=tuple(index for index in dense if index > first),
        router=RouterConfig(
            score="softmax",
            # One expert keeps its score as its weight.
            renormalise=flag(d, "norm_topk_prob") and whole(d, "num_experts_per_tok") > 1,
            bias=False,
        ),
        balance=BalanceConfig(bias_rate=0.0, sequence=0.0, expert=balance),
    )


def published(config: ModelConfig, **fields: Any) -> dict[str, Any]:
    """Returns the config.json that the published code reads, with `fields` added unchanged.

    ValueError with the parts of our model that the format cannot express.
    """
    if lacking := foreign(config):
        raise ValueError(f"a DeepSeekMoE folder cannot hold {', '.join(lacking)}")
    gqa = config.gqa
    moe = config.moe
    assert gqa is not None
    description: dict[str, Any] = {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.dense_width,
        "num_attention_heads": gqa.heads,
        "num_key_value_heads": gqa.kv_heads,
        "rms_norm_eps": config.eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": gqa.bias,
        "n_routed_experts": None,
        "first_k_dense_replace": config.layers,
    }
    if moe is not None:
        description |= {
            "n_routed_experts": moe.routed,
            "n_shared_experts": moe.shared or None,
            "num_experts_per_tok": moe.active,
            "moe_intermediate_size": moe.width,
            "first_k_dense_replace": moe.first_dense,
            "moe_layer_freq": _period(config),
            "norm_topk_prob": moe.router.renormalise,
            "scoring_func": "softmax",
            "aux_loss_alpha": moe.balance.expert,
        }
    return description | published_rope(config.rope) | fields


def _period(config: ModelConfig) -> int | None:
    """Returns the period of the blocks with experts; None if they have none."""
    assert config.moe is not None
    for period in range(1, config.layers + 1):
        if all(
            config.has_experts(index) == (index % period == 0)
            for index in range(config.moe.first_dense, config.layers)
        ):
            return period
    return None


def foreign(config: ModelConfig) -> list[str]:
    """Describes the parts of a model that DeepSeekMoE does not have."""
    differences = [name for name in config.parts if name not in MODEL_PARTS]
    rope = config.rope
    gqa = config.gqa
    moe = config.moe
    if gqa is None:
        return differences
    unlike = {
        "interleaved rope": rope.interleaved,
        "yarn, llama3, longrope or query_scale": any(
            kind is not None for kind in (rope.yarn, rope.llama3, rope.longrope, rope.query_scale)
        ),
        "a window": gqa.window is not None,
        "sinks": gqa.sinks,
        "qk_norm": gqa.qk_norm,
        "output_gate": gqa.output_gate,
        "heads that are rotated in part": gqa.rotated != gqa.head_dim,
        "heads of a width of their own": gqa.head_dim * gqa.heads != config.dim
        or gqa.value_dim not in (None, gqa.head_dim),
    }
    if moe is not None:
        router = moe.router
        unlike |= {
            f"score {router.score}": router.score != "softmax",
            "groups of experts": router.groups_kept != router.groups,
            f"router scale {router.scale}": router.scale != 1,
            "a softmax router with a bias": router.bias,
            "adaptive_mass": router.adaptive_mass is not None,
            "token_id_layers": router.token_id_layers > 0 or bool(router.other_token_id_layers),
            "norm_eps": moe.norm_eps is not None,
            "swiglu_limit": moe.swiglu_limit is not None,
            "shared_gate": moe.shared_gate,
            f"shared_width {moe.shared_width}": moe.shared_hidden != moe.shared * moe.width,
            "dense_layers without a period": _period(config) is None,
        }
    return differences + [name for name, true in unlike.items() if true]


def places(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps published names to places, for every tensor that a folder of this config must have."""
    table = {
        "model.embed_tokens.weight": StateSlice("embed.weight"),
        "model.norm.weight": StateSlice("norm.weight"),
    }
    if not config.tied:
        table["lm_head.weight"] = StateSlice("head.weight")
    for index in range(config.layers):
        theirs = f"model.layers.{index}"
        ours = f"blocks.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            for kind in (
                ("weight", "bias") if config.gqa is not None and config.gqa.bias else ("weight",)
            ):
                table[f"{theirs}.self_attn.{name}.{kind}"] = StateSlice(
                    f"{ours}.attention.{name}.{kind}"
                )
        table[f"{theirs}.input_layernorm.weight"] = StateSlice(f"{ours}.attention_norm.weight")
        table[f"{theirs}.post_attention_layernorm.weight"] = StateSlice(f"{ours}.ffn_norm.weight")
        table |= _feed_forward(f"{theirs}.mlp", f"{ours}.ffn", config, index)
    return table


def _feed_forward(theirs: str, ours: str, config: ModelConfig, index: int) -> dict[str, StateSlice]:
    """Returns the places of a block's feed-forward tensors by their published names."""
    moe = config.moe
    if moe is None or not config.has_experts(index):
        return {f"{theirs}.{name}.weight": StateSlice(f"{ours}.{name}.weight") for name in SWIGLU}
    table = {f"{theirs}.gate.weight": StateSlice(f"{ours}.router.weight")}
    if moe.shared:
        table |= {
            f"{theirs}.shared_experts.{name}.weight": StateSlice(f"{ours}.shared.{name}.weight")
            for name in SWIGLU
        }
    every = slice(None)
    for expert in range(moe.routed):
        columns = {"gate_proj": slice(moe.width), "up_proj": slice(moe.width, None)}
        for name, run in columns.items():
            table[f"{theirs}.experts.{expert}.{name}.weight"] = StateSlice(
                f"{ours}.experts.gate_up", (expert, every, run), transposed=True
            )
        table[f"{theirs}.experts.{expert}.down_proj.weight"] = StateSlice(
            f"{ours}.experts.down", (expert,), transposed=True
        )
    return table


def copies(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps published names to places, for tensors that a folder may repeat: a tied head."""
    return {"lm_head.weight": StateSlice("embed.weight")} if config.tied else {}


def aliases(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps the names of a layer's experts in one tensor, as transformers' parts of the model."""
    return {
        f"model.layers.{index}.mlp.experts.{theirs}": StateSlice(
            f"blocks.{index}.ffn.experts.{ours}", (), transposed=True
        )
        for index in range(config.layers)
        if config.has_experts(index)
        for theirs, ours in (("gate_up_proj", "gate_up"), ("down_proj", "down"))
    }


def hollow(config: ModelConfig) -> dict[str, StateSlice]:
    """Returns no names: the published code has no empty tensors."""
    return {}


def canonical(name: str) -> str:
    """Returns the name itself: all writers of such folders use the published ones."""
    return name


def skipped(name: str) -> bool:
    """Returns whether a tensor is not read: rotary frequencies, which the config gives."""
    return name.endswith(".rotary_emb.inv_freq")
