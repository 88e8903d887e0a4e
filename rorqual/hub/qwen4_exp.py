"""Qwen4-Exp (Qwen3.8-Flash-Next), its text model: config.json and tensor names, ours and theirs.

    model.layers.1.linear_attn.conv1d.weight [F, 1, K]     <->  blocks.1.attention.conv
    model.layers.1.ple.norm_key.weight [S D]               <->  blocks.1.engram.gate.key_norm
    model.layers.1.ple.ple_embedding.ngram_embedding.shard_0.weight
                                                           <->  the first rows of tables.0.weight
    model.layers.3.self_attn.indexer.index_qk_proj.weight  <->  blocks.3.attention.indexer...

`qwen4_exp` is the multimodal model, whose config has the text model's as `text_config` and whose
tensors begin with model.language_model; `qwen4_exp_text` is the text model alone, which export
writes. The vision tower and MTP's layers (visual.*, mtp.*) are skipped, as transformers does.
What our model cannot express is refused by name; fields of training and of generation are ignored.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from rorqual.hub.fields import flag, number, quantisation, whole
from rorqual.hub.places import Sizes, StateSlice
from rorqual.hub.rope import published_rope, rope_of, tables_alone
from rorqual.model_config import (
    BalanceConfig,
    DeltaNetConfig,
    EngramConfig,
    GQAConfig,
    HyperConfig,
    ModelConfig,
    MoEConfig,
    QSAConfig,
    RopeConfig,
    RouterConfig,
    row_totals,
)

MODEL_TYPES = ("qwen4_exp", "qwen4_exp_text")
MODEL_PARTS = ("gqa", "qsa", "delta", "moe", "hyper", "engram")
EMBEDDING = "model.embed_tokens.weight"
SIZES = Sizes(r"^model\.layers\.(\d+)\.", ".mlp.gate.weight", r"\.mlp\.experts\.(\d+)\.")
PARTS = {"mtp.": "MTP", "model.mtp.": "MTP", "model.visual.": "vision"}
SWIGLU = ("gate_proj", "up_proj", "down_proj")
DEFAULTS: dict[str, Any] = {  # transformers' Qwen4ExpTextConfig
    "vocab_size": 248_320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "hidden_act": "silu", "initializer_range": 0.02,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "num_experts_per_tok": 10, "num_experts": 512,
    "norm_topk_prob": True, "router_aux_loss_coef": 0.001, "full_attention_interval": 4,
    "hc_count": 4, "hc_lowrank": 320, "ple_layer_ids": None, "ple_embed_dim": None,
    "ple_conv_kernel_size": 4, "ngram_size": 3, "heads_per_ngram": 8,
    "ngram_vocab_size_base": 20_000_000, "make_ngram_vocab_size_divisible_by": 128, "seed": 1234,
    "split_ngram_parts": 512, "output_gate_type": None, "eos_token_id": None,
    "max_position_embeddings": 32_768,
}  # fmt: skip
INDEXER = (
    "indexer_n_heads",
    "indexer_kv_heads",
    "indexer_head_dim",
    "indexer_budget",
    "indexer_compress_ratio",
)
ONLY: dict[str, tuple[Any, ...]] = {  # None also means absent
    "hidden_act": ("silu", None),
    "output_gate_type": ("silu", "sigmoid", None),
    "indexer_kv_heads": (1, None),
    "attn_output_gate": (True, None),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None),
    "sliding_window": (None,),
}


def config_of(description: Mapping[str, Any], names: Collection[str] = ()) -> ModelConfig:
    """Converts a published config.json, of the text model or of the multimodal one.

    Missing fields have transformers' defaults. ValueError for values that this architecture does
    not support.
    """
    d = _text_of(description)
    for key, allowed in ONLY.items():
        if (value := d.get(key)) not in allowed:
            expected = " or ".join(str(x) for x in allowed if x is not None) or "none"
            raise ValueError(f"config.json: {key}: got {value!r}, expected {expected}")
    eps = number(d, "rms_norm_eps")
    layers = whole(d, "num_hidden_layers")
    types = _layer_types(d, layers)
    return ModelConfig(
        vocab_size=whole(d, "vocab_size"),
        dim=whole(d, "hidden_size"),
        layers=layers,
        mla=None,
        gqa=_gqa_of(d, eps),
        qsa=_qsa_of(d) if "indexed_attention" in types else None,
        delta=_delta_of(d, types, eps),
        rope=_rope_of(d),
        moe=_moe_of(d),
        engram=_engram_of(d, types, eps) if d["ple_layer_ids"] else None,
        hyper=HyperConfig(
            kind="gated",
            streams=whole(d, "hc_count"),
            rank=whole(d, "hc_lowrank"),
            norm_eps=eps,
        ),
        tied=flag(d, "tie_word_embeddings"),
        eps=eps,
        init_std=number(d, "initializer_range"),
    )


def _text_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the text model's fields with the defaults of those that are missing."""
    kind = description.get("model_type")
    fields = dict(description)
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type: got {kind!r}, expected {' or '.join(MODEL_TYPES)}")
    if kind == "qwen4_exp":
        text = description.get("text_config") or {}
        if not isinstance(text, Mapping):
            raise ValueError(
                f"config.json: text_config: got {text!r}, expected the fields of a text model"
            )
        fields = dict(text)
        # transformers ties the multimodal model by the outer field.
        fields["tie_word_embeddings"] = description.get("tie_word_embeddings", False)
        fields.setdefault("quantization_config", description.get("quantization_config"))
    quantisation(fields)
    return DEFAULTS | fields


def _check_list(value: Any, name: str) -> None:
    """Raises ValueError unless the field of this name is a list."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"config.json: {name}: got {value!r}, expected a list")


def _layer_types(d: Mapping[str, Any], layers: int) -> list[str]:
    """Returns the kind of each block; full_attention is the older name of indexed_attention."""
    types = d.get("layer_types")
    if types is None:
        every = whole(d, "full_attention_interval")
        if every < 1:
            raise ValueError(
                f"config.json: full_attention_interval: got {every}, expected 1 or more"
            )
        return [
            "linear_attention" if (index + 1) % every else "indexed_attention"
            for index in range(layers)
        ]
    _check_list(types, "layer_types")
    types = ["indexed_attention" if kind == "full_attention" else kind for kind in types]
    if unknown := [x for x in types if x not in ("linear_attention", "indexed_attention")]:
        raise ValueError(
            f"config.json: layer_types: got {', '.join(sorted(set(map(str, unknown))))}, "
            "expected linear_attention or indexed_attention"
        )
    if len(types) != layers:
        raise ValueError(
            f"config.json: layer_types: got {len(types)}, "
            f"expected the {layers} of num_hidden_layers"
        )
    return types


def _delta_of(d: Mapping[str, Any], types: list[str], eps: float) -> DeltaNetConfig:
    """Reads the delta net, in blocks that `types` does not call indexed attention.

    Where every n-th block has indexed attention, full_every is n; otherwise `layers` lists the
    blocks with delta net.
    """
    full = [index for index, kind in enumerate(types) if kind == "indexed_attention"]
    every = full[0] + 1 if full else len(types) + 1
    regular = full == [index for index in range(len(types)) if (index + 1) % every == 0]
    linear = tuple(index for index in range(len(types)) if index not in full)
    return DeltaNetConfig(
        key_heads=whole(d, "linear_num_key_heads"),
        value_heads=whole(d, "linear_num_value_heads"),
        key_dim=whole(d, "linear_key_head_dim"),
        value_dim=whole(d, "linear_value_head_dim"),
        kernel=whole(d, "linear_conv_kernel_dim"),
        gate=d["output_gate_type"] or "silu",
        norm_eps=eps,
        **{"full_every": every} if regular else {"layers": linear},
    )


def _gqa_of(d: Mapping[str, Any], eps: float) -> GQAConfig:
    """Reads the full attention; partial_rotary_factor says how much of a head is rotated."""
    head_dim = whole(d, "head_dim")
    factor = _rope_fields(d).get("partial_rotary_factor", d.get("partial_rotary_factor"))
    rope_dim = head_dim
    if factor is not None:
        name = "partial_rotary_factor"
        rope_dim = int(head_dim * number({name: factor}, name))
    if rope_dim % 2 or rope_dim < 2:
        raise ValueError(
            f"config.json: partial_rotary_factor: got {rope_dim} of {head_dim} values of a head, "
            "expected an even number of them, at least 2"
        )
    return GQAConfig(
        heads=whole(d, "num_attention_heads"),
        kv_heads=whole(d, "num_key_value_heads"),
        head_dim=head_dim,
        qk_norm=True,
        norm_eps=eps,
        centred=True,
        rope_dim=None if rope_dim == head_dim else rope_dim,
        output_gate=True,
        bias=flag(d, "attention_bias"),
    )


def _qsa_of(d: Mapping[str, Any]) -> QSAConfig:
    """Reads the indexer. ValueError if one of its fields is missing."""
    if lacking := [key for key in INDEXER if d.get(key) is None]:
        raise ValueError(
            f"config.json: no {', '.join(lacking)}, expected all fields of the indexer that "
            "layers of indexed attention have"
        )
    return QSAConfig(
        heads=whole(d, "indexer_n_heads"),
        dim=whole(d, "indexer_head_dim"),
        block=whole(d, "indexer_compress_ratio"),
        budget=whole(d, "indexer_budget"),
    )


def _rope_fields(d: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the rotary fields, from rope_scaling or else from rope_parameters.

    ValueError if they are no object.
    """
    key = "rope_scaling" if d.get("rope_scaling") else "rope_parameters"
    rope = d.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(
            f"config.json: {key}: got {rope!r}, expected fields such as rope_theta, or none"
        )
    return rope


def _rope_of(d: Mapping[str, Any]) -> RopeConfig:
    """Reads rope_parameters; sections of image positions (mrope) do not concern text."""
    rope = {key: value for key, value in _rope_fields(d).items() if key != "partial_rotary_factor"}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "mrope":
        rope["rope_type"] = "default"
    if rope.get("llama_4_scaling_beta") is not None:
        got = rope["llama_4_scaling_beta"]
        raise ValueError(f"config.json: llama_4_scaling_beta: got {got!r}, expected none")
    if kind == "yarn":
        rope = tables_alone(rope)
    fields = {
        "rope_theta": d.get("rope_theta", 10_000.0),
        "max_position_embeddings": d["max_position_embeddings"],
        "rope_parameters": rope,
    }
    return rope_of(fields, interleaved=False)


def _moe_of(d: Mapping[str, Any]) -> MoEConfig:
    """Reads the experts, the shared one with its gate, and the coefficient of their loss."""
    return MoEConfig(
        routed=whole(d, "num_experts"),
        active=whole(d, "num_experts_per_tok"),
        shared=1,
        width=whole(d, "moe_intermediate_size"),
        shared_width=whole(d, "shared_expert_intermediate_size"),
        shared_gate=True,
        router=RouterConfig(score="softmax", renormalise=flag(d, "norm_topk_prob"), bias=False),
        balance=BalanceConfig(
            bias_rate=0.0, sequence=0.0, expert=number(d, "router_aux_loss_coef")
        ),
    )


def _engram_of(d: Mapping[str, Any], types: list[str], eps: float) -> EngramConfig:
    """Reads the fields of PLE; its layers are counted from 1."""
    name = "ple_layer_ids"
    _check_list(d[name], name)
    layers = tuple(sorted({whole({name: layer}, name) for layer in d[name]}))
    if wrong := [x for x in layers if not 1 <= x <= len(types)]:
        raise ValueError(f"config.json: ple_layer_ids: got {wrong}, expected 1 to {len(types)}")
    if wrong := [x for x in layers if types[x - 1] != "linear_attention"]:
        raise ValueError(
            f"config.json: ple_layer_ids: got {wrong}, expected layers of linear_attention"
        )
    eos = d["eos_token_id"]
    eos = eos[0] if isinstance(eos, list) and eos else eos
    orders = whole(d, "ngram_size") - 1
    heads = whole(d, "heads_per_ngram")
    width = whole(d, "hidden_size" if d["ple_embed_dim"] is None else "ple_embed_dim")
    if orders < 1 or heads < 1 or width % (orders * heads):
        raise ValueError(
            f"config.json: ple_embed_dim: got {width}, expected a multiple of the "
            f"{max(0, orders * heads)} heads of ngram_size and heads_per_ngram"
        )
    return EngramConfig(
        layers=tuple(x - 1 for x in layers),
        # 1 and 2 mean the same, since the least prime is 2.
        rows_per_head=(max(2, whole(d, "ngram_vocab_size_base")),) * orders,
        heads=heads,
        head_dim=width // (orders * heads),
        kernel=whole(d, "ple_conv_kernel_size"),
        eps=eps,
        conv_eps=eps,
        centred=True,
        seed=whole(d, "seed"),
        generator="splitmix64",
        canonical=False,
        eos_id=whole({"eos_token_id": eos}, "eos_token_id"),
        row_multiple=whole(d, "make_ngram_vocab_size_divisible_by"),
        shards=whole(d, "split_ngram_parts"),
    )


def published(config: ModelConfig, **fields: Any) -> dict[str, Any]:
    """Returns the config.json that transformers' Qwen4ExpTextConfig reads.

    `fields` are added unchanged. ValueError with the parts of our model that the format cannot
    express.
    """
    if lacking := foreign(config):
        raise ValueError(f"a Qwen4-Exp folder cannot hold {', '.join(lacking)}")
    gqa = config.gqa
    delta = config.delta
    moe = config.moe
    hyper = config.hyper
    assert gqa is not None and delta is not None and moe is not None and hyper is not None
    description = {
        "architectures": ["Qwen4ExpForCausalLM"],
        "model_type": "qwen4_exp_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "layer_types": [
            "linear_attention" if config.has_delta(index) else "indexed_attention"
            for index in range(config.layers)
        ],
        "num_attention_heads": gqa.heads,
        "num_key_value_heads": gqa.kv_heads,
        "head_dim": gqa.head_dim,
        "attention_bias": gqa.bias,
        "hidden_act": "silu",
        "output_gate_type": delta.gate,
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.kernel,
        "num_experts": moe.routed,
        "num_experts_per_tok": moe.active,
        "moe_intermediate_size": moe.width,
        "shared_expert_intermediate_size": moe.shared_hidden,
        "norm_topk_prob": moe.router.renormalise,
        "router_aux_loss_coef": moe.balance.expert,
        "hc_count": hyper.streams,
        "hc_lowrank": hyper.rank,
        "rms_norm_eps": config.eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    description |= _published_rope(config.rope, gqa.rotated / gqa.head_dim)
    return description | _published_qsa(config) | _published_engram(config) | fields


def _published_rope(rope: RopeConfig, share: float) -> dict[str, Any]:
    """Returns the rotary fields; `share` of a head is rotated."""
    fields = published_rope(rope)
    parameters = fields["rope_scaling"] or {"rope_type": "default"}
    parameters |= {"rope_theta": rope.base, "partial_rotary_factor": share}
    if rope.factor == 1.0:
        return {"rope_parameters": parameters}
    length = fields["max_position_embeddings"]
    return {"rope_parameters": parameters, "max_position_embeddings": length}


def _published_qsa(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of the indexer, all null without one."""
    if (qsa := config.qsa) is None:
        return dict.fromkeys(INDEXER)
    return {
        "indexer_n_heads": qsa.heads,
        "indexer_kv_heads": 1,
        "indexer_head_dim": qsa.dim,
        "indexer_budget": qsa.budget,
        "indexer_compress_ratio": qsa.block,
    }


def _published_engram(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of Engram; its layers are counted from 1 there."""
    if (engram := config.engram) is None:
        return {"ple_layer_ids": []}
    return {
        "ple_layer_ids": [layer + 1 for layer in engram.layers],
        "ple_embed_dim": engram.memory_width,
        "ple_conv_kernel_size": engram.kernel,
        "ngram_size": engram.ngram,
        "heads_per_ngram": engram.heads,
        "ngram_vocab_size_base": engram.rows_per_head[0],
        "make_ngram_vocab_size_divisible_by": engram.row_multiple,
        "seed": engram.seed,
        "split_ngram_parts": engram.shards,
        "eos_token_id": engram.eos_id,
    }


def foreign(config: ModelConfig) -> list[str]:
    """Describes the parts of a model that Qwen4-Exp does not have, and those that it must have."""
    differences = [name for name in config.parts if name not in MODEL_PARTS]
    gqa, delta, moe, hyper, engram = (
        config.gqa, config.delta, config.moe, config.hyper, config.engram,
    )  # fmt: skip
    if gqa is None or delta is None or moe is None or hyper is None:
        missing = {"gqa": gqa, "delta": delta, "moe": moe, "hyper": hyper}
        return differences + [f"no {name}" for name, value in missing.items() if value is None]
    router = moe.router
    attention = any(not config.has_delta(index) for index in range(config.layers))
    like_gqa = GQAConfig(
        heads=gqa.heads, kv_heads=gqa.kv_heads, head_dim=gqa.head_dim, qk_norm=True,
        norm_eps=config.eps, centred=True, rope_dim=gqa.rope_dim, output_gate=True, bias=gqa.bias,
    )  # fmt: skip
    like_router = RouterConfig(score="softmax", renormalise=router.renormalise, bias=False)
    rope = config.rope
    of_softmax = rope.query_scale is not None or (
        rope.yarn is not None and rope.yarn.mscale_all_dim != 0
    )
    unlike = {
        "gqa with other options than qk_norm, centred, output_gate and eps": gqa != like_gqa,
        "attention without qsa": attention and config.qsa is None,
        f"delta.norm_eps {delta.norm_eps}": delta.norm_eps != config.eps,
        f"hyper.kind {hyper.kind}": hyper.kind != "gated",
        f"hyper.norm_eps {hyper.norm_eps}": hyper.norm_eps != config.eps,
        "a single stream": hyper.streams < 2,
        "rope that is interleaved": rope.interleaved,
        "rope that scales the softmax": of_softmax,
        "a router with other options than softmax and no bias": router != like_router,
        "dense blocks": moe.first_dense > 0 or bool(moe.dense_layers),
        "norm_eps of experts": moe.norm_eps is not None,
        "swiglu_limit": moe.swiglu_limit is not None,
        "no shared expert with a gate": not (moe.shared == 1 and moe.shared_gate),
    }
    if engram is not None:
        like_engram = EngramConfig(
            layers=tuple(sorted(engram.layers)),
            rows_per_head=engram.rows_per_head[:1] * (engram.ngram - 1),
            heads=engram.heads, head_dim=engram.head_dim, kernel=engram.kernel, eps=config.eps,
            conv_eps=config.eps, centred=True, seed=engram.seed, generator="splitmix64",
            canonical=False, pad_id=engram.pad_id, eos_id=engram.eos_id,
            end_of_document=engram.end_of_document, row_multiple=engram.row_multiple,
            shards=engram.shards,
        )  # fmt: skip
        unlike |= {
            "engram with other options than those of PLE": engram != like_engram,
            "engram without eos_id": engram.eos_id is None,
            "engram in blocks with attention": not all(map(config.has_delta, engram.layers)),
        }
    return differences + [name for name, true in unlike.items() if true]


def places(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps published names to places, for every tensor that a folder of this config must have."""
    table = {EMBEDDING: StateSlice("embed.weight")}
    if not config.tied:
        table["lm_head.weight"] = StateSlice("head.weight")
    table |= _mixer("model.hyper_connection_mixer", "reduction")
    for index in range(config.layers):
        theirs = f"model.layers.{index}"
        ours = f"blocks.{index}"
        for name, site in (("attn", "attention_residual"), ("mlp", "ffn_residual")):
            connection = f"{theirs}.{name}_hyper_connection"
            table |= _mixer(connection, f"{ours}.{site}.mixer")
            table[f"{connection}.block_inject_weight.weight"] = StateSlice(
                f"{ours}.{site}.block_inject_weight.weight"
            )
        if config.has_delta(index):
            table |= _delta(f"{theirs}.linear_attn", f"{ours}.attention", config)
        else:
            table |= _attention(f"{theirs}.self_attn", f"{ours}.attention", config)
        table |= _experts(f"{theirs}.mlp", f"{ours}.ffn", config)
        if config.has_engram(index):
            table |= _engram(f"{theirs}.ple", index, config)
    return table


def _mixer(theirs: str, ours: str) -> dict[str, StateSlice]:
    """Returns the places of one site of the streams by their published names."""
    names = ("hc_norm", "input_mix_weight_down", "input_mix_weight_up")
    return {f"{theirs}.{name}.weight": StateSlice(f"{ours}.{name}.weight") for name in names}


def _delta(theirs: str, ours: str, config: ModelConfig) -> dict[str, StateSlice]:
    """Returns the places of a delta net's tensors by their published names."""
    delta = config.delta
    assert delta is not None
    linears = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "norm", "out_proj")
    names = [*(f"{name}.weight" for name in linears), "A_log", "dt_bias"]
    return {f"{theirs}.{name}": StateSlice(f"{ours}.{name}") for name in names} | {
        f"{theirs}.conv1d.weight": StateSlice(
            f"{ours}.conv", shape=(delta.conv_width, 1, delta.kernel)
        )
    }


def _attention(theirs: str, ours: str, config: ModelConfig) -> dict[str, StateSlice]:
    """Returns the places of a full attention and its indexer by their published names."""
    assert config.gqa is not None
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    index = ("index_qk_proj", "q_layernorm", "k_layernorm")
    names = [f"{name}.weight" for name in (*projections, "q_norm", "k_norm")]
    names += [f"indexer.{name}.weight" for name in index]
    if config.gqa.bias:
        names += [f"{name}.bias" for name in projections]
    return {f"{theirs}.{name}": StateSlice(f"{ours}.{name}") for name in names}


def _experts(theirs: str, ours: str, config: ModelConfig) -> dict[str, StateSlice]:
    """Returns the places of a mixture's tensors by their published names."""
    moe = config.moe
    assert moe is not None
    table = {
        f"{theirs}.gate.weight": StateSlice(f"{ours}.router.weight"),
        f"{theirs}.shared_expert_gate.weight": StateSlice(f"{ours}.shared_gate.weight"),
    }
    for name in SWIGLU:
        table[f"{theirs}.shared_expert.{name}.weight"] = StateSlice(f"{ours}.shared.{name}.weight")
    every = slice(None)
    for expert in range(moe.routed):
        for name, our_name, columns in (
            ("gate_proj", "gate_up", slice(moe.width)),
            ("up_proj", "gate_up", slice(moe.width, None)),
            ("down_proj", "down", every),
        ):
            table[f"{theirs}.experts.{expert}.{name}.weight"] = StateSlice(
                f"{ours}.experts.{our_name}", (expert, every, columns), transposed=True
            )
    return table


def _engram(theirs: str, index: int, config: ModelConfig) -> dict[str, StateSlice]:
    """Returns the places of a block's Engram and of its table's shards by published names."""
    engram = config.engram
    width = config.streams * config.dim
    assert engram is not None
    table_index = engram.layers.index(index)
    ours = f"blocks.{index}.engram"
    table = {
        f"{theirs}.key_proj.weight": StateSlice(f"{ours}.key_proj.weight"),
        f"{theirs}.value_proj.weight": StateSlice(f"{ours}.value_proj.weight"),
        f"{theirs}.norm_key.weight": StateSlice(f"{ours}.gate.key_norm", shape=(width,)),
        f"{theirs}.norm_query.weight": StateSlice(f"{ours}.gate.query_norm", shape=(width,)),
        f"{theirs}.norm_conv.weight": StateSlice(f"{ours}.conv_norm", shape=(width,)),
        f"{theirs}.conv1d.weight": StateSlice(f"{ours}.conv", shape=(width, 1, engram.kernel)),
    }
    for shard, rows in enumerate(shards(row_totals(engram)[table_index], engram.shards)):
        name = f"{theirs}.ple_embedding.ngram_embedding.shard_{shard}.weight"
        table[name] = StateSlice(f"tables.{table_index}.weight", (rows,))
    return table


def shards(rows: int, count: int) -> list[slice]:
    """Returns the rows of each shard of a table: equally many in all but the last, as torch.chunk.

    There may be fewer than `count`.
    """
    size = -(-rows // count)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def copies(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps published names to places, for tensors that a folder may repeat.

    They are a tied head, and what the hash of PLE computes with.
    """
    table = {"lm_head.weight": StateSlice("embed.weight")} if config.tied else {}
    if (engram := config.engram) is None:
        return table
    heads = (engram.rows_per_token,)
    for table_index, index in enumerate(engram.layers):
        theirs = f"model.layers.{index}.ple.ple_embedding"
        of_table = (table_index,)
        table |= {
            f"{theirs}.layer_multipliers": StateSlice("addresses.multipliers", of_table),
            f"{theirs}.ngram_heads_vocab_sizes": StateSlice(
                "addresses.primes", of_table, shape=heads
            ),
            f"{theirs}.ngram_heads_offsets": StateSlice("addresses.offsets", of_table),
        }
    return table


def aliases(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps transformers' parameters that no file holds to places.

    They are a layer's experts in one tensor, and a table whole.
    """
    table = {}
    for index in range(config.layers):
        for theirs, ours in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            table[f"model.layers.{index}.mlp.experts.{theirs}"] = StateSlice(
                f"blocks.{index}.ffn.experts.{ours}", (), transposed=True
            )
    for table_index, index in enumerate(config.engram.layers if config.engram is not None else ()):
        name = f"model.layers.{index}.ple.ple_embedding.ngram_embedding.weight"
        table[name] = StateSlice(f"tables.{table_index}.weight")
    return table


def hollow(config: ModelConfig) -> dict[str, StateSlice]:
    """Returns nothing: transformers asks for no empty tensors."""
    return {}


def canonical(name: str) -> str:
    """Returns the name in the text model alone of a tensor of the multimodal one."""
    return re.sub(r"^model\.language_model\.", "model.", name)


def skipped(name: str) -> bool:
    """Returns whether a tensor of a folder is not read.

    That are the vision tower, MTP, rotary frequencies, and statistics of the hash.
    """
    leaf = name.rpartition(".")[2]
    aside = leaf.startswith("hashstats_") or leaf in ("token_lookup", "inv_freq")
    return aside or name.startswith(tuple(PARTS))
