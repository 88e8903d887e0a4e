"""DeepSeek-V4: config.json and tensor names, ours and theirs.

    layers.1.attn.compressor.wkv.weight   <->  blocks.1.attention.compressor.wkv.weight
    layers.1.ffn.experts.7.w1.weight      <->  blocks.1.ffn.experts.gate_up[7, :, :F] transposed
    layers.1.ffn.gate.tid2eid [V, K]      <->  blocks.1.ffn.router.table
    layers.1.hc_attn_fn, hc_head_fn       <->  blocks.1.attention_residual.mixer.fn, reduction.fn
    mtp.0.attn.wq_a.weight                <->  mtp.0.block.attention.wq_a.weight
    mtp.0.e_proj.weight, h_proj.weight    <->  mtp.0.eh_proj.weight[:, :D], [:, D:]
    mtp.0.hc_head_fn                      <->  mtp.0.reduction.fn

transformers writes some of these names otherwise (`canonical`). Blocks see compressed entries as
`layer_types` or the published `compress_ratios` say, and select experts by token id as
`mlp_layer_types` or `num_hash_layers` say. Fields that transformers ignores (norm_topk_prob,
n_shared_experts, num_key_value_heads, attention_bias, router_jitter_noise) are ignored, and so are
those of training (dropout, auxiliary losses). A line says where one of the first three has a value
that would be another model. What our model cannot express is refused by name.

Multi-token prediction (`mtp.*`), which transformers ignores, is that of layers/mtp.py on streams.
There are as many depths as the folder has tensors of, or as a config.json without weights says;
their blocks see what the entries of `compress_ratios` behind the layers' say, or their window
alone, as in the released models. Folders whose `mtp.*` are the draft layers of DSpark, another
module, are loaded without them.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from rorqual import runtime
from rorqual.hub.fields import flag, mtp_layers, number, quantisation, whole
from rorqual.hub.places import Sizes, StateSlice
from rorqual.hub.rope import published_rope, rope_of, tables_alone
from rorqual.model_config import (
    CSAConfig,
    CSAKind,
    HyperConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RopeConfig,
    RouterConfig,
)

MODEL_TYPES = ("deepseek_v4",)
MODEL_PARTS = ("csa", "moe", "hyper", "mtp")
EMBEDDING = "embed.weight"
SIZES = Sizes(r"^layers\.(\d+)\.", ".ffn.gate.weight", r"\.ffn\.experts\.(\d+)\.", mtp_counts=False)
PARTS = {"mtp.": "DSpark draft"}
DSPARK = re.compile(r"mtp\.\d+\.(main_proj|main_norm|markov_head|confidence_head)\.")

KINDS: dict[str, CSAKind] = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
ROPES = ("default", "yarn", "linear", "llama3")  # whose frequencies are the same in every call
RATIOS: dict[int, CSAKind] = {0: "window", 4: "csa", 128: "hca"}
DEFAULTS: dict[str, Any] = {  # transformers' DeepseekV4Config
    "vocab_size": 129280, "hidden_size": 4096, "moe_intermediate_size": 2048,
    "num_hidden_layers": 43, "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512,
    "q_lora_rank": 1024, "num_experts_per_tok": 6, "n_routed_experts": 256,
    "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5,
    "max_position_embeddings": 1048576, "rope_theta": 10000.0, "compress_rope_theta": 160000.0,
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "swiglu_limit": 10.0,
    "sliding_window": 128, "o_groups": 8, "o_lora_rank": 1024, "index_n_heads": 64,
    "index_head_dim": 128, "index_topk": 512, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip
ALIASES = {"num_local_experts": "n_routed_experts", "intermediate_size": "moe_intermediate_size"}
ONLY: dict[str, tuple[Any, ...]] = {  # None also means absent
    "hidden_act": ("silu", None),
    "mlp_bias": (False, None),
    "scoring_func": ("sqrtsoftplus", "sigmoid"),
    # How the experts are stored is seen in the files; a type that these cannot tell is refused.
    "expert_dtype": ("fp4", "fp8", "bf16", "bfloat16", None),
    "tie_word_embeddings": (False, True, None),
}
# What every model has, whatever config.json says: transformers reads none of these fields.
FIXED = {"norm_topk_prob": True, "n_shared_experts": 1, "num_key_value_heads": 1}
NO_LIMIT = 3e38  # of swiglu_limit, which transformers asks for: more than any activation
ATTENTION = ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b")
EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# transformers' parameters, where they differ from the published names, in the order of replacing
THEIRS = (
    (".attn.indexer.compressor.", ".self_attn.compressor.indexer."),
    (".attn.indexer.wq_b.", ".self_attn.compressor.indexer.q_b_proj."),
    (".attn.indexer.weights_proj.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (".attn.attn_sink", ".self_attn.sinks"),
    (".attn.", ".self_attn."),
    (".wq_a.", ".q_a_proj."),
    (".q_norm.", ".q_a_norm."),
    (".wq_b.", ".q_b_proj."),
    (".wkv.", ".kv_proj."),
    (".wgate.", ".gate_proj."),
    (".wo_a.", ".o_a_proj."),
    (".wo_b.", ".o_b_proj."),
    (".norm.", ".kv_norm."),
    (".ape", ".position_bias"),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".hc_attn_", ".attn_hc."),
    (".hc_ffn_", ".ffn_hc."),
    (".ffn.gate.bias", ".mlp.gate.e_score_correction_bias"),
    (".ffn.", ".mlp."),
    (".w1.", ".gate_proj."),
    (".w2.", ".down_proj."),
    (".w3.", ".up_proj."),
)


def config_of(description: Mapping[str, Any], names: Collection[str] = ()) -> ModelConfig:
    """Converts a published config.json; missing fields have transformers' defaults.

    ValueError for values that our model cannot express.
    """
    if description.get("model_type") not in MODEL_TYPES:
        got = description.get("model_type")
        raise ValueError(f"model_type: got {got!r}, expected {' or '.join(MODEL_TYPES)}")
    fields = {ALIASES.get(key, key): value for key, value in description.items()}
    d = DEFAULTS | {key: value for key, value in fields.items() if value is not None}
    for key, allowed in ONLY.items():
        if (value := d.get(key)) not in allowed:
            expected = " or ".join(str(x) for x in allowed if x is not None)
            raise ValueError(f"config.json: {key}: got {value!r}, expected {expected}")
    allowed = ONLY["expert_dtype"]
    if (dtype := quantisation(d).get("expert_dtype")) not in allowed:
        expected = " or ".join(str(x) for x in allowed if x is not None)
        raise ValueError(f"quantization_config.expert_dtype: got {dtype!r}, expected {expected}")
    for key, value in FIXED.items():
        if (got := d.get(key, value)) != value:
            runtime.log(f"config.json: {key}: {got} is ignored, DeepSeek-V4 has {value} only")
    layers = whole(d, "num_hidden_layers")
    head_dim = whole(d, "head_dim")
    depth = _mtp_depth(d, names)
    main, compress, rope_dim = _ropes(d, head_dim)
    rates = d.get("compress_rates") or {}
    kinds = _kinds(d, layers) + _mtp_kinds(d, layers, depth)
    first_hashed, others_hashed = _hash_layers(d, layers)
    eps = number(d, "rms_norm_eps")
    return ModelConfig(
        vocab_size=whole(d, "vocab_size"),
        dim=whole(d, "hidden_size"),
        layers=layers,
        mla=None,
        csa=CSAConfig(
            heads=whole(d, "num_attention_heads"),
            head_dim=head_dim,
            rope_dim=rope_dim,
            q_lora_rank=whole(d, "q_lora_rank"),
            groups=whole(d, "o_groups"),
            o_lora_rank=whole(d, "o_lora_rank"),
            window=whole(d, "sliding_window"),
            kinds=kinds,
            ratio=_rate(d, rates, "compressed_sparse_attention", "compress_rate_csa", 4),
            heavy_ratio=_rate(d, rates, "heavily_compressed_attention", "compress_rate_hca", 128),
            index_heads=whole(d, "index_n_heads"),
            index_dim=whole(d, "index_head_dim"),
            top_k=whole(d, "index_topk"),
            compress_rope=compress,
            ties="topk",
        ),
        rope=main,
        moe=MoEConfig(
            routed=whole(d, "n_routed_experts"),
            active=whole(d, "num_experts_per_tok"),
            shared=1,
            width=whole(d, "moe_intermediate_size"),
            swiglu_limit=number(d, "swiglu_limit"),
            router=RouterConfig(
                score=d["scoring_func"],
                scale=number(d, "routed_scaling_factor"),
                token_id_layers=first_hashed,
                other_token_id_layers=others_hashed,
            ),
        ),
        hyper=HyperConfig(
            streams=whole(d, "hc_mult"),
            # 0 and 1 mean the same.
            iterations=max(1, whole(d, "hc_sinkhorn_iters")),
            eps=number(d, "hc_eps"),
            norm_eps=eps,
        ),
        mtp=MTPConfig(depth=depth, streams=True) if depth else None,
        tied=flag(d, "tie_word_embeddings"),
        eps=eps,
        init_std=number(d, "initializer_range"),
    )


def _rate(d: Mapping[str, Any], rates: Any, kind: str, scalar: str, default: int) -> int:
    """Reads the tokens of an entry: of `compress_rates`, or of the field before it."""
    if not isinstance(rates, Mapping):
        raise ValueError(f"config.json: compress_rates: got {rates!r}, expected a number a kind")
    if d.get(scalar) is not None:
        return whole(d, scalar)
    return whole({kind: default, **rates}, kind, "compress_rates.")


def _kinds(d: Mapping[str, Any], layers: int) -> tuple[CSAKind, ...]:
    """Reads what each block sees: layer_types, or compress_ratios, or transformers' default."""
    read: dict[str, tuple[CSAKind, ...]] = {}
    for key, table in (("layer_types", KINDS), ("compress_ratios", RATIOS)):
        listed = d.get(key)
        if listed is None:
            continue
        if not isinstance(listed, list) or len(listed) < layers:
            got = f"{len(listed)} values" if isinstance(listed, list) else repr(listed)
            raise ValueError(
                f"config.json: {key}: got {got}, expected a list of one for each of {layers} layers"
            )
        if wrong := [value for value in listed[:layers] if value not in list(table)]:
            expected = ", ".join(map(str, table))
            raise ValueError(f"config.json: {key}: got {wrong[0]!r}, expected one of {expected}")
        read[key] = tuple(table[value] for value in listed[:layers])
    if len(set(read.values())) > 1:
        raise ValueError(
            f"config.json: compress_ratios: got {d['compress_ratios'][:layers]}, expected those of "
            "layer_types"
        )
    for kinds in read.values():
        return kinds
    return tuple("csa" if i >= 2 and i % 2 else "hca" for i in range(layers))


def _mtp_kinds(d: Mapping[str, Any], layers: int, depth: int) -> tuple[CSAKind, ...]:
    """Reads what MTP's blocks see; a last one that sees its window alone is not named."""
    for key, table in (("layer_types", KINDS), ("compress_ratios", RATIOS)):
        listed = d.get(key)
        if not isinstance(listed, list) or len(listed) <= layers:
            continue
        beyond = listed[layers : layers + depth]
        if wrong := [value for value in beyond if value not in table]:
            expected = ", ".join(map(str, table))
            raise ValueError(f"config.json: {key}: got {wrong[0]!r}, expected one of {expected}")
        kinds = [table[value] for value in beyond]
        while kinds and kinds[-1] == "window":
            kinds.pop()
        return tuple(kinds)
    return ()


def _mtp_depth(d: Mapping[str, Any], names: Collection[str]) -> int:
    """Counts the depths of MTP that a folder has tensors of; DSpark's layers are none.

    Without tensors they are those of the config.
    """
    if not names:
        return mtp_layers(d)
    if any(DSPARK.match(name) for name in names):
        return 0
    return len({match[1] for name in names if (match := re.match(r"mtp\.(\d+)\.", name))})


def _hash_layers(d: Mapping[str, Any], layers: int) -> tuple[int, tuple[int, ...]]:
    """Reads how many first blocks select experts by token id, and which others do."""
    listed = d.get("mlp_layer_types")
    count = None if d.get("num_hash_layers") is None else whole(d, "num_hash_layers")
    if count is not None and not 0 <= count <= layers:
        raise ValueError(
            f"config.json: num_hash_layers: got {count}, expected 0 to {layers} layers"
        )
    if listed is None:
        return min(layers, 3) if count is None else count, ()
    if (
        not isinstance(listed, list)
        or len(listed) < layers
        or any(kind not in ("moe", "hash_moe") for kind in listed)
    ):
        raise ValueError(
            f"config.json: mlp_layer_types: got {listed!r}, "
            f"expected hash_moe or moe for each of {layers} layers"
        )
    hashed = [index for index in range(layers) if listed[index] == "hash_moe"]
    if count is not None and hashed != list(range(count)):
        raise ValueError(
            f"config.json: num_hash_layers: got {count}, "
            f"expected the layers {hashed} of mlp_layer_types"
        )
    first = next((i for i in range(layers) if listed[i] != "hash_moe"), layers)
    return first, tuple(hashed[first:])


def _ropes(d: Mapping[str, Any], head_dim: int) -> tuple[RopeConfig, RopeConfig, int]:
    """Reads both rotary bases, nested in rope_parameters or as published, and the rotated width."""
    key = "rope_scaling" if d.get("rope_scaling") else "rope_parameters"
    rope = d.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: {key}: got {rope!r}, expected fields such as rope_theta")
    share = d.get("partial_rotary_factor")
    if isinstance(rope.get("main"), Mapping) and isinstance(rope.get("compress"), Mapping):
        nested = {"rope_theta": d["rope_theta"], "partial_rotary_factor": share or 1.0}
        both = {name: {**nested, **rope[name]} for name in ("main", "compress")}
    else:
        if share is None:
            width = d.get("qk_rope_head_dim")
            share = 64 / 512 if width is None else whole(d, "qk_rope_head_dim") / head_dim
        flat = {name: value for name, value in rope.items() if name not in ("main", "compress")}
        both = {"main": {"rope_theta": d["rope_theta"]}}
        both["compress"] = {**flat, "rope_theta": d["compress_rope_theta"]}
        both["compress"].setdefault("attention_factor", 1.0)
        for each in both.values():
            each["partial_rotary_factor"] = share
    if d.get("qk_rope_head_dim") is not None and share is not None:
        width = int(head_dim * number({"partial_rotary_factor": share}, "partial_rotary_factor"))
        if (got := whole(d, "qk_rope_head_dim")) != width:
            raise ValueError(
                f"config.json: qk_rope_head_dim: got {got}, "
                f"expected {width} as partial_rotary_factor has it"
            )
    widths = {
        name: int(head_dim * number(each, "partial_rotary_factor", f"{key}.{name}."))
        for name, each in both.items()
    }
    if widths["main"] != widths["compress"]:
        raise ValueError(
            f"config.json: {key}: got rotary widths {widths['main']} of main and "
            f"{widths['compress']} of compress, expected the same"
        )
    main, compress = (_rope(d, each, f"{key}.{name}.") for name, each in both.items())
    return main, compress, widths["main"]


def _rope(d: Mapping[str, Any], rope: Mapping[str, Any], within: str) -> RopeConfig:
    """Reads one of the model's two sets of rotary fields; `within` names it in errors."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPES:
        raise ValueError(
            f"config.json: {within}rope_type: got {kind!r}, expected {', '.join(ROPES)}"
        )
    # transformers reads `truncate` where no folder has it.
    fields = {key: rope[key] for key in rope if key not in ("partial_rotary_factor", "truncate")}
    fields["rope_type"] = kind
    fields = fields if kind == "default" else tables_alone(fields)
    lengths = {"max_position_embeddings": d["max_position_embeddings"]}
    base = {"rope_theta": number(rope, "rope_theta", within)}
    return rope_of({**base, **lengths, "rope_parameters": fields}, interleaved=True)


def published(config: ModelConfig, **fields: Any) -> dict[str, Any]:
    """Returns the config.json that transformers' DeepseekV4Config reads, with `fields` added.

    ValueError with the parts of our model that the format cannot express.
    """
    if lacking := foreign(config):
        raise ValueError(f"a DeepSeek-V4 folder cannot hold {', '.join(lacking)}")
    csa = config.csa
    moe = config.moe
    hyper = config.hyper
    assert csa is not None and moe is not None and hyper is not None
    depth = config.mtp.depth if config.mtp is not None else 0
    named = {kind: name for name, kind in KINDS.items()}
    yarn = csa.compress_rope.yarn
    longest = 1048576 if yarn is None else int(yarn.factor * yarn.original_length)
    share = csa.rope_dim / csa.head_dim
    description = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": csa.heads,
        "num_key_value_heads": 1,
        "head_dim": csa.head_dim,
        "q_lora_rank": csa.q_lora_rank,
        "o_groups": csa.groups,
        "o_lora_rank": csa.o_lora_rank,
        "sliding_window": csa.window,
        "layer_types": [named[csa.kind(i)] for i in range(config.layers)],
        "compress_rates": {
            "compressed_sparse_attention": csa.ratio,
            "heavily_compressed_attention": csa.heavy_ratio,
        },
        "index_n_heads": csa.index_heads,
        "index_head_dim": csa.index_dim,
        "index_topk": csa.top_k,
        "n_routed_experts": moe.routed,
        "n_shared_experts": 1,
        "num_experts_per_tok": moe.active,
        "moe_intermediate_size": moe.width,
        "scoring_func": moe.router.score,
        "norm_topk_prob": True,
        "routed_scaling_factor": moe.router.scale,
        "swiglu_limit": NO_LIMIT if moe.swiglu_limit is None else moe.swiglu_limit,
        "mlp_layer_types": [
            "hash_moe" if moe.router.by_token_id(index) else "moe" for index in range(config.layers)
        ],
        "hc_mult": hyper.streams,
        "hc_sinkhorn_iters": hyper.iterations,
        "hc_eps": hyper.eps,
        "rms_norm_eps": config.eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "rope_theta": config.rope.base,
        "compress_rope_theta": csa.compress_rope.base,
        "partial_rotary_factor": share,
        "qk_rope_head_dim": csa.rope_dim,
        "rope_parameters": {
            "main": _published_rope(config.rope, share),
            "compress": _published_rope(csa.compress_rope, share),
        },
        "max_position_embeddings": longest,
        "num_nextn_predict_layers": depth,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if len(csa.kinds) > config.layers:
        # transformers reads layer_types, which are those of the layers alone.
        ratios = {kind: ratio for ratio, kind in RATIOS.items()}
        listed = [ratios[csa.kind(index)] for index in range(config.layers + depth)]
        description["compress_ratios"] = listed
    return description | fields


def _published_rope(rope: RopeConfig, share: float) -> dict[str, Any]:
    """Returns rotary fields with YaRN's factor on cos and sin; `share` of a head is rotated."""
    base = {"rope_theta": rope.base, "partial_rotary_factor": share}
    fields = published_rope(rope)["rope_scaling"] or {"rope_type": "default"}
    left_out = ("type", "mscale", "mscale_all_dim")
    fields = {key: value for key, value in fields.items() if key not in left_out} | base
    if (yarn := rope.yarn) is not None:
        stretch = 0.1 * math.log(yarn.factor)
        fields["attention_factor"] = (stretch * yarn.mscale + 1) / (
            stretch * yarn.mscale_all_dim + 1
        )
    return fields


def foreign(config: ModelConfig) -> list[str]:
    """Describes the parts of a model that DeepSeek-V4's format does not have."""
    differences = [name for name in config.parts if name not in MODEL_PARTS]
    csa = config.csa
    moe = config.moe
    hyper = config.hyper
    for name, value in (("csa", csa), ("moe", moe), ("hyper", hyper)):
        if value is None:
            differences.append(f"a model without {name}")
    if csa is None or moe is None or hyper is None:
        return differences
    router = moe.router
    mtp = config.mtp
    unlike = {
        "MTP on one stream": mtp is not None and not mtp.streams,
        "MTP with experts by token id": mtp is not None
        and any(router.by_token_id(config.layers + depth) for depth in range(mtp.depth)),
        "rope of kind dynamic or longrope, or a query_scale": any(
            rope.varies or rope.query_scale is not None for rope in (config.rope, csa.compress_rope)
        ),
        "YaRN without truncate": any(
            rope.yarn is not None and not rope.yarn.truncate
            for rope in (config.rope, csa.compress_rope)
        ),
        f"hyper.kind {hyper.kind}": hyper.kind != "mhc",
        f"hyper.mix {hyper.mix}": hyper.mix != "sinkhorn",
        f"hyper.norm_eps {hyper.norm_eps} (eps is {config.eps})": hyper.norm_eps != config.eps,
        "blocks without experts": moe.first_dense > 0 or bool(moe.dense_layers),
        "norm_eps of experts": moe.norm_eps is not None,
        "shared_gate": moe.shared_gate,
        f"score {router.score}": router.score not in ("sigmoid", "sqrtsoftplus"),
        "groups of experts": router.groups_kept < router.groups,
        "weights that are not renormalised": not router.renormalise,
        "a router without a bias": not router.bias,
        "adaptive_mass": router.adaptive_mass is not None,
        f"shared experts of width {moe.shared_hidden}": moe.shared_hidden != moe.width,
    }
    return differences + [name for name, true in unlike.items() if true]


def places(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps published names to places, for every tensor that a folder of this config must have."""
    table = {"embed.weight": StateSlice("embed.weight"), "norm.weight": StateSlice("norm.weight")}
    if not config.tied:
        table["head.weight"] = StateSlice("head.weight")
    for name in ("fn", "base", "scale"):
        table[f"hc_head_{name}"] = StateSlice(f"reduction.{name}")
    for index in range(config.layers):
        table |= _block(f"layers.{index}", f"blocks.{index}", config, index)
    for depth in range(config.mtp.depth if config.mtp is not None else 0):
        name = f"mtp.{depth}"
        table |= _block(name, f"{name}.block", config, config.layers + depth)
        for norm in ("enorm", "hnorm", "norm"):
            table[f"{name}.{norm}.weight"] = StateSlice(f"{name}.{norm}.weight")
        for half, columns in (("e", slice(config.dim)), ("h", slice(config.dim, None))):
            tensor_place = StateSlice(f"{name}.eh_proj.weight", (slice(None), columns))
            table[f"{name}.{half}_proj.weight"] = tensor_place
        for leaf in ("fn", "base", "scale"):
            table[f"{name}.hc_head_{leaf}"] = StateSlice(f"{name}.reduction.{leaf}")
    return table


def _block(theirs: str, ours: str, config: ModelConfig, index: int) -> dict[str, StateSlice]:
    """Returns the places of a block's tensors by published names, which begin with `theirs`."""
    csa = config.csa
    moe = config.moe
    assert csa is not None and moe is not None
    table = {
        f"{theirs}.attn_norm.weight": StateSlice(f"{ours}.attention_norm.weight"),
        f"{theirs}.ffn_norm.weight": StateSlice(f"{ours}.ffn_norm.weight"),
        f"{theirs}.attn.attn_sink": StateSlice(f"{ours}.attention.attn_sink"),
    }
    for site, our_site in (("attn", "attention"), ("ffn", "ffn")):
        for name in ("fn", "base", "scale"):
            tensor_place = StateSlice(f"{ours}.{our_site}_residual.mixer.{name}")
            table[f"{theirs}.hc_{site}_{name}"] = tensor_place
    tensors = [f"{name}.weight" for name in ATTENTION]
    compressor = ("wkv.weight", "wgate.weight", "norm.weight", "ape")
    if csa.kind(index) != "window":
        tensors += [f"compressor.{name}" for name in compressor]
    if csa.kind(index) == "csa":
        tensors += ["indexer.wq_b.weight", "indexer.weights_proj.weight"]
        tensors += [f"indexer.compressor.{name}" for name in compressor]
    table |= {f"{theirs}.attn.{name}": StateSlice(f"{ours}.attention.{name}") for name in tensors}
    table[f"{theirs}.ffn.gate.weight"] = StateSlice(f"{ours}.ffn.router.weight")
    if moe.router.by_token_id(index):
        table[f"{theirs}.ffn.gate.tid2eid"] = StateSlice(f"{ours}.ffn.router.table")
    else:
        table[f"{theirs}.ffn.gate.bias"] = StateSlice(f"{ours}.ffn.router.e_score_correction_bias")
    for name, our_name in EXPERT.items():
        shared = f"{ours}.ffn.shared.{our_name}.weight"
        table[f"{theirs}.ffn.shared_experts.{name}.weight"] = StateSlice(shared)
    every = slice(None)
    columns = {"w1": slice(moe.width), "w3": slice(moe.width, None), "w2": every}
    for expert in range(moe.routed):
        for name in EXPERT:
            our_name = f"{ours}.ffn.experts.{'down' if name == 'w2' else 'gate_up'}"
            tensor_place = StateSlice(our_name, (expert, every, columns[name]), transposed=True)
            table[f"{theirs}.ffn.experts.{expert}.{name}.weight"] = tensor_place
    return table


def copies(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps published names to places, for what a folder may repeat: a tied head."""
    return {"head.weight": StateSlice("embed.weight")} if config.tied else {}


def hollow(config: ModelConfig) -> dict[str, StateSlice]:
    """Returns no tensors: transformers asks for none that our model lacks."""
    return {}


def aliases(config: ModelConfig) -> dict[str, StateSlice]:
    """Maps transformers' parameter names to places."""
    table = {transformers_name(name): each for name, each in places(config).items()}
    table |= {transformers_name(name): each for name, each in copies(config).items()}
    for index in range(config.layers):
        for theirs, ours in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            table[f"model.layers.{index}.mlp.experts.{theirs}"] = StateSlice(
                f"blocks.{index}.ffn.experts.{ours}", (), transposed=True
            )
    return table


def transformers_name(name: str) -> str:
    """Returns transformers' parameter name of a published tensor."""
    whole = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    if name in whole:
        return whole[name]
    if name.startswith("hc_head_"):
        return f"model.hc_head.hc_{name.removeprefix('hc_head_')}"
    if name == "norm.weight":
        return "model.norm.weight"
    if name.startswith("layers."):
        for published_name, theirs in THEIRS:
            name = name.replace(published_name, theirs)
    return f"model.{name}"


def canonical(name: str) -> str:
    """Returns the published name of a tensor that transformers' save_pretrained calls otherwise."""
    name = name.removeprefix("model.")
    name = {"embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}.get(name, name)
    name = name.replace("hc_head.hc_", "hc_head_")
    return re.sub(r"^(layers\.\d+\.attn)\.norm\.", r"\1.kv_norm.", name)


def skipped(name: str) -> bool:
    """Returns whether a tensor without a place is not read: draft layers, rotary frequencies."""
    return name.startswith("mtp.") or name.endswith("inv_freq")
