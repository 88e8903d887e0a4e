"""DeepSeek-V4.1-Flash: config.json and tensor names, ours and theirs.

    layers.1.ffn.experts.7.w1.weight [F, D]         <->  blocks.1.ffn.experts.gate_up[7, :, :F]^T
    layers.1.engram.wkv.weight [(S + 1) D, M]       <->  blocks.1.engram.key_proj, value_proj
    layers.1.engram.embed.weight [rows, W]          <->  tables.0
    layers.1.hc_attn_{fn, base, scale}              <->  blocks.1.attention_residual.mixer
    layers.1.attn.*                                 <->  blocks.1.attention.*, in the same names

The config is composite: text_config is the language model's. Vision (vision_config, `vision.*`,
`aligner.*`, `image_*`) and DSpark's draft layers (`mtp.*`) are skipped, and their sizes are said;
the bias that the router adds for image tokens is read. What the reference checks about a config is
checked here, too.

Aliases are the parameter names of the training reference that reads these folders, which keeps all
experts of a layer in one tensor.
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from math import isfinite
from typing import Any

from rorqual.hub.fields import flag, number, quantisation
from rorqual.hub.places import AnyPlace, Joined, Sizes, StateSlice
from rorqual.model_config import (
    BalanceConfig,
    CSA2Config,
    CSAConfig,
    EngramConfig,
    HyperConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    YarnConfig,
    row_totals,
)

MODEL_TYPES = ("deepseek_v41",)
MODEL_PARTS = ("csa", "csa2", "moe", "hyper", "engram")
EMBEDDING = "embed.weight"
SIZES = Sizes(r"^layers\.(\d+)\.", ".ffn.gate.weight", r"\.ffn\.experts\.(\d+)\.")
PARTS = {"mtp.": "DSpark draft", **dict.fromkeys(("vision.", "aligner.", "image_"), "vision")}
# What text_config has where config.json says nothing: the released model's values.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 5120,
    "moe_intermediate_size": 2304,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1280,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "hidden_act": "silu",
    "swiglu_limit": 10.0,
    "rms_norm_eps": 1e-20,
    "attention_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "sliding_window": 128,
    "compress_ratios": [0, 0] + [2] * 18 + [1] * 20 + [0] * 3,
    "compress_rope_theta": 160000.0,
    "kv_source_layer_ids": [2, 8, 14, 20],
    "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36],
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 512,
    "candidate_source_layer_id": 20,
    "candidate_topk_blocks": 2048,
    "candidate_block_size": 8,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "engram_layer_ids": [1, 14],
    "engram_max_ngram_size": 4,
    "engram_vocab_size": 16000000,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 99092,
    "max_position_embeddings": 1048576,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ENGRAM_ROWS = [384006168, 384016682]
ROPE = {
    "rope_type": "yarn",
    "factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 65536,
}
IMAGE_TOKEN = 129264
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
}
_number = partial(number, within="text_config.")
HYPER = ("fn", "base", "scale")
SWIGLU = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def config_of(description: Mapping[str, Any], names: Collection[str] = ()) -> ModelConfig:
    """Converts a published config.json; fields that it lacks are those of the released model.

    ValueError, with the field's name, for another architecture and for what the reference or this
    model does not support.
    """
    kind = description.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type: got {kind!r}, expected {' or '.join(MODEL_TYPES)}")
    text = description.get("text_config") or {}
    if not isinstance(text, Mapping):
        raise ValueError(f"config.json: text_config: got {text!r:.60}, expected fields")
    # A list that is null is the released one, as for the reference.
    lists = {key for key, value in DEFAULTS.items() if isinstance(value, list)}
    d = DEFAULTS | {key: x for key, x in text.items() if x is not None or key not in lists}
    _refuse_unknown(d, description)
    layers = _whole(d, "num_hidden_layers")
    ratios = _list(d, "compress_ratios")
    candidate = _whole(d, "candidate_source_layer_id", -1)
    if len(ratios) < layers:
        raise ValueError(
            f"config.json: compress_ratios: got {len(ratios)}, expected one for each of the "
            f"{layers} layers"
        )
    sources = {name: _list(d, name) for name in ("kv_source_layer_ids", "index_source_layer_ids")}
    # A folder may have fewer layers than its schedule names.
    kv_sources, index_sources = (tuple(i for i in ids if i < layers) for ids in sources.values())
    return ModelConfig(
        vocab_size=_whole(d, "vocab_size", 1),
        dim=_whole(d, "hidden_size", 1),
        layers=layers,
        dense_width=_whole(d, "moe_intermediate_size", 1),  # no block is dense
        mla=None,
        csa=_csa_of(d),
        csa2=CSA2Config(
            ratios=tuple(ratios[:layers]),
            kv_sources=kv_sources,
            index_sources=index_sources,
            candidate_source=candidate if 0 <= candidate < layers else None,
            candidate_block=_whole(d, "candidate_block_size"),
            candidate_blocks=_whole(d, "candidate_topk_blocks"),
            cache_formats="published",
        ),
        rope=RopeConfig(base=_number(d, "rope_theta")),
        moe=_moe_of(d, description, names),
        engram=_engram_of(d, description, layers),
        hyper=HyperConfig(
            kind="single_pass",
            streams=_whole(d, "hc_mult", 1),
            iterations=_whole(d, "hc_sinkhorn_iters", 1),
            eps=_number(d, "hc_eps"),
            norm_eps=_number(d, "rms_norm_eps"),
        ),
        eps=_number(d, "rms_norm_eps"),
        init_std=_number(d, "initializer_range"),
    )


def _refuse_unknown(d: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Raises ValueError for a field whose value this code cannot compute.

    `d` is text_config with its defaults, `description` the whole config.
    """
    for key, allowed in ONLY.items():
        if (value := d.get(key)) not in allowed:
            expected = " or ".join(str(x) for x in allowed if x is not None)
            raise ValueError(f"config.json: text_config.{key}: got {value!r}, expected {expected}")
    if description.get("tie_word_embeddings"):
        raise ValueError("config.json: tie_word_embeddings: got true, expected false")
    quantisation(description)
    if _whole(d, "num_attention_heads", 1) % _whole(d, "o_groups", 1):
        raise ValueError(
            f"config.json: text_config.o_groups: got {d['o_groups']}, expected a divisor of "
            f"{d['num_attention_heads']} heads"
        )


def _whole(fields: Mapping[str, Any], key: str, least: int = 0) -> int:
    """Returns a whole number of text_config, from `least` on; ValueError for anything else."""
    value: Any = fields.get(key)
    number = not isinstance(value, bool) and isinstance(value, int | float) and isfinite(value)
    if not number or value != value // 1 or value < least:
        raise ValueError(
            f"config.json: text_config.{key}: got {value!r}, "
            f"expected a whole number from {least} on"
        )
    return int(value)


def _list(fields: Mapping[str, Any], key: str) -> list[int]:
    """Returns a list of numbers from 0 on of text_config; ValueError for anything else."""
    value = fields.get(key)
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(
            f"config.json: text_config.{key}: got {value!r:.60}, expected numbers from 0"
        )
    return value


def _csa_of(d: Mapping[str, Any]) -> CSAConfig:
    """Reads the widths, the window and the indexer of the attention."""
    return CSAConfig(
        heads=_whole(d, "num_attention_heads", 1),
        head_dim=_whole(d, "head_dim", 1),
        rope_dim=_whole(d, "qk_rope_head_dim", 1),
        q_lora_rank=_whole(d, "q_lora_rank", 1),
        groups=_whole(d, "o_groups", 1),
        o_lora_rank=_whole(d, "o_lora_rank", 1),
        window=_whole(d, "sliding_window", 1),
        index_heads=_whole(d, "index_n_heads", 1),
        index_dim=_whole(d, "index_head_dim", 1),
        top_k=_whole(d, "index_topk", 1),
        compress_rope=RopeConfig(base=_number(d, "compress_rope_theta"), yarn=_yarn_of(d)),
        ties="topk",
    )


def _yarn_of(d: Mapping[str, Any]) -> YarnConfig | None:
    """Reads rope_scaling, or rope_parameters as transformers 5 writes it; of both, the latter.

    There is no factor on cos and sin, nor on the softmax. Without an original length there is no
    YaRN, whatever the type says.
    """
    rope = d.get("rope_parameters") or d.get("rope_scaling") or ROPE
    if not isinstance(rope, Mapping):
        raise ValueError(
            f"config.json: text_config.rope_scaling: got {rope!r:.60}, expected fields"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(
            f"config.json: text_config.rope_scaling.type: got {kind!r}, "
            "expected 'yarn' or 'default'"
        )
    fields = {"factor": 1.0, "beta_fast": 32, "beta_slow": 1} | dict(rope)
    length = "original_max_position_embeddings"
    if not fields.get(length):
        return None
    return YarnConfig(
        factor=_number(fields, "factor"),
        original_length=_whole(fields, length, 1),
        beta_fast=_number(fields, "beta_fast"),
        beta_slow=_number(fields, "beta_slow"),
        mscale=0.0,
        mscale_all_dim=0.0,
    )


def _moe_of(
    d: Mapping[str, Any], description: Mapping[str, Any], names: Collection[str]
) -> MoEConfig:
    """Reads the experts and their router, which has biases for image tokens if `names` do."""
    # A folder without vision may lack the biases of image tokens.
    images = not names or any(name.endswith(".gate.bias_vl") for name in names)
    limit = _number(d, "swiglu_limit")
    return MoEConfig(
        routed=_whole(d, "n_routed_experts", 1),
        active=_whole(d, "num_experts_per_tok", 1),
        shared=1,
        width=_whole(d, "moe_intermediate_size", 1),
        # 0 means no limit.
        swiglu_limit=limit or None,
        router=RouterConfig(
            score="sqrtsoftplus",
            # The weight of a single expert is never renormalised.
            renormalise=flag(d, "norm_topk_prob") and _whole(d, "num_experts_per_tok") > 1,
            scale=_number(d, "routed_scaling_factor"),
            image_ids=(_image_id(description),) if images else (),
        ),
        balance=BalanceConfig(bias_rate=1e-3),
    )


def _image_id(description: Mapping[str, Any]) -> int:
    """Returns the id of image tokens, that of the released model if config.json has none."""
    return _whole({"image_token_id": IMAGE_TOKEN} | dict(description), "image_token_id")


def _engram_of(
    d: Mapping[str, Any], description: Mapping[str, Any], layers: int
) -> EngramConfig | None:
    """Reads the Engram of the first `layers` blocks; None if it is in none of them.

    ValueError where the sizes of the tables do not fit the layers.
    """
    every = _list(d, "engram_layer_ids")
    rows = d.get("engram_num_embeddings")
    if not every:
        return None
    if rows is None:
        rows = ENGRAM_ROWS
    if not isinstance(rows, list) or len(rows) != len(every):
        raise ValueError(
            f"config.json: text_config.engram_num_embeddings: got {rows!r:.60}, expected the rows "
            f"of each of the {len(every)} tables"
        )
    orders = _whole(d, "engram_max_ngram_size", 2) - 1
    # The primes of later layers depend on those before, not the other way round.
    count = sum(layer < layers for layer in every)
    if not count:
        return None
    return EngramConfig(
        layers=tuple(every[:count]),
        rows_per_head=(_whole(d, "engram_vocab_size", 2),) * orders,
        table_rows=tuple(rows[:count]),
        heads=_whole(d, "engram_n_heads", 1),
        head_dim=_whole(d, "engram_head_dim", 1),
        conv=False,
        sign="copysign",
        eps=_number(d, "rms_norm_eps"),
        pad_id=_whole(d, "engram_pad_token_id"),
        dead_tokens=(_image_id(description),),
    )


def canonical_count(description: Mapping[str, Any]) -> int:
    """Returns the number of canonical ids that the config expects of the tokenizer."""
    return _whole(DEFAULTS | dict(description["text_config"]), "engram_compressed_vocab_size")


def published(config: ModelConfig, **fields: Any) -> dict[str, Any]:
    """Returns the config.json that the reference reads; `fields` are added at its top level.

    `canonical_ids` of them is the number of canonical ids of the tokenizer, for Engram. ValueError
    with the parts of our model that the format cannot express.
    """
    if lacking := foreign(config):
        raise ValueError(f"a DeepSeek-V4.1 folder cannot hold {', '.join(lacking)}")
    csa = config.csa
    csa2 = config.csa2
    moe = config.moe
    hyper = config.hyper
    assert csa is not None and csa2 is not None and moe is not None and hyper is not None
    canonical_ids = fields.pop("canonical_ids", None)
    yarn = csa.compress_rope.yarn
    dtype = fields.get("dtype", "float32")
    text = {
        "model_type": "deepseek_v41_text",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "moe_intermediate_size": moe.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": csa.heads,
        "num_key_value_heads": 1,
        "head_dim": csa.head_dim,
        "qk_rope_head_dim": csa.rope_dim,
        "q_lora_rank": csa.q_lora_rank,
        "o_lora_rank": csa.o_lora_rank,
        "o_groups": csa.groups,
        "hidden_act": "silu",
        "swiglu_limit": moe.swiglu_limit or 0.0,
        "rms_norm_eps": config.eps,
        "initializer_range": config.init_std,
        "rope_theta": config.rope.base,
        "rope_scaling": {
            "rope_type": "default" if yarn is None else "yarn",
            "factor": 1.0 if yarn is None else yarn.factor,
            "beta_fast": 32.0 if yarn is None else yarn.beta_fast,
            "beta_slow": 1.0 if yarn is None else yarn.beta_slow,
            "original_max_position_embeddings": 0 if yarn is None else yarn.original_length,
        },
        "n_routed_experts": moe.routed,
        "n_shared_experts": 1,
        "num_experts_per_tok": moe.active,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": moe.router.renormalise,
        "routed_scaling_factor": moe.router.scale,
        "sliding_window": csa.window,
        "compress_ratios": list(csa2.ratios),
        "compress_rope_theta": csa.compress_rope.base,
        "kv_source_layer_ids": list(csa2.kv_sources),
        "index_source_layer_ids": list(csa2.index_sources),
        "index_n_heads": csa.index_heads,
        "index_head_dim": csa.index_dim,
        "index_topk": csa.top_k,
        "candidate_source_layer_id": (
            -1 if csa2.candidate_source is None else csa2.candidate_source
        ),
        "candidate_topk_blocks": csa2.candidate_blocks,
        "candidate_block_size": csa2.candidate_block,
        "hc_mult": hyper.streams,
        "hc_sinkhorn_iters": hyper.iterations,
        "hc_eps": hyper.eps,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
    }
    images = moe.router.image_ids
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "image_token_id": images[0] if images else IMAGE_TOKEN,
        "pad_token_id": config.engram.pad_id if config.engram is not None else None,
        "tie_word_embeddings": False,
        "text_config": text | _published_engram(config, canonical_ids),
        "vision_config": {"model_type": "deepseek_v41_vision", "num_hidden_layers": 0},
    } | fields


def _published_engram(config: ModelConfig, canonical_ids: int | None) -> dict[str, Any]:
    """Returns the fields of Engram; `canonical_ids` is the number of ids that it hashes."""
    engram = config.engram
    if engram is None:
        return {"engram_layer_ids": [], "engram_num_embeddings": []}
    if canonical_ids is None:
        raise ValueError(
            "canonical_ids: got none, expected the number of canonical ids that Engram hashes"
        )
    return {
        "engram_layer_ids": list(engram.layers),
        "engram_num_embeddings": list(row_totals(engram)),
        "engram_max_ngram_size": engram.ngram,
        "engram_vocab_size": engram.rows_per_head[0],
        "engram_n_heads": engram.heads,
        "engram_head_dim": engram.head_dim,
        "engram_pad_token_id": engram.pad_id,
        "engram_compressed_vocab_size": canonical_ids,
    }


def foreign(config: ModelConfig) -> list[str]:
    """Describes the parts of a model that DeepSeek-V4.1's format does not have."""
    differences = [name for name in config.parts if name not in MODEL_PARTS]
    differences += [
        f"no {name}" for name in ("csa", "csa2", "moe", "hyper") if getattr(config, name) is None
    ]
    if config.csa is None or config.moe is None or config.hyper is None:
        return differences
    rope = config.csa.compress_rope
    moe = config.moe
    hyper = config.hyper
    router = moe.router
    yarn = rope.yarn
    unlike = {
        "a tied head": config.tied,
        "half-split rope": not (config.rope.interleaved and rope.interleaved),
        "YaRN in blocks without entries": config.rope.yarn is not None,
        "YaRN without truncate": yarn is not None and not yarn.truncate,
        "YaRN's factor on cos and sin": yarn is not None and yarn.mscale != yarn.mscale_all_dim,
        f"score {router.score}": router.score != "sqrtsoftplus",
        "groups of experts": router.groups != 1,
        "adaptive_mass": router.adaptive_mass is not None,
        "token_id_layers": router.token_id_layers > 0 or bool(router.other_token_id_layers),
        "a router without a bias": not router.bias,
        f"{len(router.image_ids)} ids of image tokens (1 only)": len(router.image_ids) > 1,
        "dense blocks": moe.first_dense > 0 or bool(moe.dense_layers),
        "norm_eps of experts": moe.norm_eps is not None,
        "shared_gate": moe.shared_gate,
        f"{moe.shared} shared experts (1 only)": moe.shared != 1,
        f"shared_width {moe.shared_width}": moe.shared_hidden != moe.width,
        f"hyper-connections of kind {hyper.kind}": hyper.kind != "single_pass",
        f"hyper.mix {hyper.mix}": hyper.mix != "sinkhorn",
        f"hyper.norm_eps {hyper.norm_eps} (the model's eps only)": hyper.norm_eps != config.eps,
    }
    return differences + [name for name, true in unlike.items() if true] + _foreign_engram(config)


def _foreign_engram(config: ModelConfig) -> list[str]:
    """Describes the parts of a model's Engram that the released model has not."""
    engram = config.engram
    if engram is None:
        return []
    unlike = {
        "Engram's convolution": engram.conv,
        "Engram's biases": engram.bias,
        f"Engram's gating {engram.gating}": engram.gating != "streams",
        f"Engram's sign {engram.sign}": engram.sign != "copysign",
        f"Engram's eps {engram.eps} (the model's only)": engram.eps != config.eps,
        "Engram's seed": engram.seed != 0,
        f"Engram's generator {engram.generator}": engram.generator != "numpy",
        "Engram's raw ids": not engram.canonical,
        "Engram's eos_id": engram.eos_id is not None,
        "Engram across documents": not engram.end_of_document,
        "Engram's rows_per_head that differ": len(set(engram.rows_per_head)) > 1,
    }
    return [name for name, true in unlike.items() if true]


def places(config: ModelConfig) -> dict[str, AnyPlace]:
    """Maps published names to places, for every tensor that a folder of this config must have."""
    table: dict[str, AnyPlace] = {
        EMBEDDING: StateSlice("embed.weight"),
        "norm.weight": StateSlice("norm.weight"),
        "head.weight": StateSlice("head.weight"),
    }
    for index in range(config.layers):
        table |= _block(config, index)
    return table


def _block(config: ModelConfig, index: int) -> dict[str, AnyPlace]:
    """Returns the places of one block's tensors by their published names."""
    theirs = f"layers.{index}"
    ours = f"blocks.{index}"
    table: dict[str, AnyPlace] = {
        f"{theirs}.attn_norm.weight": StateSlice(f"{ours}.attention_norm.weight"),
        f"{theirs}.ffn_norm.weight": StateSlice(f"{ours}.ffn_norm.weight"),
    }
    for name in _attention(config, index):
        table[f"{theirs}.attn.{name}"] = StateSlice(f"{ours}.attention.{name}")
    for site, our_site in (("attn", "attention_residual"), ("ffn", "ffn_residual")):
        for name in HYPER:
            table[f"{theirs}.hc_{site}_{name}"] = StateSlice(f"{ours}.{our_site}.mixer.{name}")
    if config.engram is not None and config.has_engram(index):
        number = config.engram.layers.index(index)
        projections = (f"{ours}.engram.{name}.weight" for name in ("key_proj", "value_proj"))
        table |= {
            f"{theirs}.engram.embed.weight": StateSlice(f"tables.{number}.weight"),
            f"{theirs}.engram.wkv.weight": Joined(tuple(StateSlice(name) for name in projections)),
            f"{theirs}.engram.q_weight": StateSlice(f"{ours}.engram.gate.query_norm"),
            f"{theirs}.engram.k_weight": StateSlice(f"{ours}.engram.gate.key_norm"),
        }
    return table | _experts(f"{theirs}.ffn", f"{ours}.ffn", config)


def _attention(config: ModelConfig, index: int) -> list[str]:
    """Returns the names of a block's attention; they are the same in our state dict."""
    csa2 = config.csa2
    assert csa2 is not None
    names = ["attn_sink", "q_norm.weight", "kv_norm.weight"]
    names += [f"{name}.weight" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")]
    if not csa2.ratio(index):
        return names
    if index in csa2.kv_sources:
        names += ["compressor.wkv.weight", "compressor.norm.weight"]
        names += ["compressor.wgate.weight"] if csa2.ratio(index) > 1 else []
        names += ["indexer.wk.weight", "indexer.k_norm.weight"]
    if index in csa2.index_sources:
        names += ["indexer.wq_b.weight", "indexer.weights_proj.weight"]
    return names


def _experts(theirs: str, ours: str, config: ModelConfig) -> dict[str, AnyPlace]:
    """Returns the places of a mixture's tensors by published names, which begin with `theirs`."""
    moe = config.moe
    assert moe is not None
    table: dict[str, AnyPlace] = {
        f"{theirs}.gate.weight": StateSlice(f"{ours}.router.weight"),
        f"{theirs}.gate.bias": StateSlice(f"{ours}.router.e_score_correction_bias"),
    }
    if moe.router.image_ids:
        table[f"{theirs}.gate.bias_vl"] = StateSlice(f"{ours}.router.image_bias")
    for name, our_name in SWIGLU.items():
        table[f"{theirs}.shared_experts.{name}.weight"] = StateSlice(
            f"{ours}.shared.{our_name}.weight"
        )
    every = slice(None)
    columns = {"w1": slice(moe.width), "w3": slice(moe.width, None), "w2": every}
    for expert in range(moe.routed):
        for name in SWIGLU:
            tensor = f"{ours}.experts.{'down' if name == 'w2' else 'gate_up'}"
            tensor_place = StateSlice(tensor, (expert, every, columns[name]), transposed=True)
            table[f"{theirs}.experts.{expert}.{name}.weight"] = tensor_place
    return table


def copies(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps the biases of image tokens, which the reference asks for, to those of all tokens.

    This is so in a model without them.
    """
    if config.moe is None or config.moe.router.image_ids:
        return {}
    return {
        f"layers.{index}.ffn.gate.bias_vl": StateSlice(
            f"blocks.{index}.ffn.router.e_score_correction_bias"
        )
        for index in range(config.layers)
    }


def hollow(config: ModelConfig) -> dict[str, StateSlice]:
    """Returns no names: the reference asks for no empty tensor."""
    return {}


def aliases(config: ModelConfig) -> dict[str, AnyPlace]:
    """Maps the reference's parameter names to places."""
    table: dict[str, AnyPlace] = {}
    for name, tensor_place in places(config).items():
        if ".ffn.experts." not in name:
            table[_reference_name(name)] = tensor_place
    for index in range(config.layers):
        for name, ours in (("gate_and_up_projs", "gate_up"), ("down_projs", "down")):
            experts = f"blocks.{index}.ffn.experts.{ours}"
            table[f"model.layers.{index}.ffn.experts.{name}"] = StateSlice(experts)
    return table


def _reference_name(name: str) -> str:
    """Returns the reference's name of a published tensor that is not an expert's."""
    if name == EMBEDDING:
        return "model.embed_tokens.weight"
    if name == "head.weight":
        return "lm_head.weight"
    name = re.sub(r"\.hc_(attn|ffn)_", r".\1_hc.", name)
    name = name.replace(".attn.attn_sink", ".attn.sinks_param.weight")
    name = name.replace(".gate.bias", ".gate.e_score_correction_bias")
    name = name.replace("e_score_correction_bias_vl", "bias_vl")
    for theirs, ours in SWIGLU.items():
        name = name.replace(f".shared_experts.{theirs}.", f".shared_experts.{ours}.")
    return f"model.{name}"


def canonical(name: str) -> str:
    """Returns a tensor's name as `places` has it: the published one."""
    return name


def skipped(name: str) -> bool:
    """Returns whether a tensor of a folder is not read: vision, and the draft layers."""
    return name.startswith(tuple(PARTS))
