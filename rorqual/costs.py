"""Computes parameters, FLOPs and cache bytes of a model from its config, without torch or a model.

    activated = total - unused experts - memory + looked-up rows - input embedding
    FLOPs a token = 2 (activated matrices + attention + mixing of the streams + Engram)      forward

Attention is the mean over the tokens of a context, which see context / 2 keys, or fewer: the last
`window`, or those that DSA, NSA or MoBA select; then the cost of selecting counts too. Additions
alone, softmax and norms do not count. Gated delta net reads a state of one size instead, whatever
the context. tests/test_costs.py builds models without storage and counts their parameters: both
must agree exactly.
"""

from dataclasses import dataclass
from typing import NamedTuple

from rorqual.model_config import (
    CSA2Config,
    CSAConfig,
    DeltaNetConfig,
    DSAConfig,
    EngramConfig,
    GQAConfig,
    HyperConfig,
    MLAConfig,
    MoBAConfig,
    ModelConfig,
    MoEConfig,
    NSAConfig,
    QSAConfig,
    longest_context,
    row_totals,
)


class Costs(NamedTuple):
    """The sizes of a model, and what a token costs in a context.

    Parameters are counted; FLOPs are 2 for a multiply and add, forward only.
    """

    total: int  # with router biases, without MTP's modules
    activated: int  # all that a token uses, without the input embedding
    activated_with_embedding: int  # the published "activated" of most reports: both embeddings
    # rows of Engram's tables, in parameters; only the few that are looked up are activated
    memory: int
    mtp: int  # MTP's modules
    mtp_activated: int  # what a token uses of them, the shared head included
    mtp_activated_with_embedding: int  # and the shared embedding
    flops_per_token: int  # forward, the mean over the tokens of a context
    cache_bytes_per_token: int  # of attention and of what selects its keys, in bfloat16
    cache_bytes: int  # the same of one sequence of the whole context, with what does not grow
    cache_bytes_1m: int  # the same of one sequence of 1,000,000 tokens
    table_rows: tuple[int, ...]  # rows of each of Engram's tables, in the order of its layers
    table_bytes: int  # of Engram's rows in bfloat16
    table_bytes_fp8: int  # the same as fp8 records with a byte of scale for 32 values
    longest_context: int  # tokens that the rotary base, stretched by YaRN, tells apart


def costs(config: ModelConfig, context: int = 4096) -> Costs:
    """Computes the sizes of a model of this config and the costs of a token in a context.

    context: number of tokens; attention and what selects its keys see half of them on average.
    ValueError for no token, and for a config that no model can be built of.
    """
    if context < 1:
        raise ValueError(f"context: got {context}, expected at least 1 token")
    config.check_parts()
    embedding = config.vocab_size * config.dim
    # `embedding` counts the head; where they are tied, the head is the input embedding.
    input_embedding = 0 if config.tied else embedding
    blocks = _backbone(config)
    memory = _rows(config)
    last_norm = 0 if config.gated_residual else config.dim
    total = embedding + input_embedding + blocks.matrices + blocks.others + last_norm + memory

    blocks_with_experts = sum(config.has_experts(i) for i in range(config.layers))
    unused = blocks_with_experts * _unused_experts(config)
    looked_up = (
        len(config.engram.layers) * config.engram.memory_width if config.engram is not None else 0
    )
    activated = total - unused - memory + looked_up  # includes both embeddings

    depth = config.mtp.depth if config.mtp is not None else 0
    mtp = sum(_mtp(config, k) for k in range(depth))
    # includes the shared head
    drafted = mtp - depth * _unused_experts(config) + (embedding if depth else 0)

    # Blocks with compressed entries, if there are any, see furthest.
    rope = config.rope
    if config.csa is not None and (config.csa2 or set(config.csa.kinds) - {"window"}):
        rope = config.csa.compress_rope

    products = blocks.matrices - unused + embedding  # the head multiplies, tied or not
    deltas = sum(config.has_delta(index) for index in range(config.layers))
    products += (config.layers - deltas) * attention_products(config, context)
    if config.delta is not None:
        products += deltas * delta_products(config.delta)
    products += hyper_products(config) + engram_products(config)
    return Costs(
        total=total,
        activated=activated - input_embedding,
        activated_with_embedding=activated,
        memory=memory,
        mtp=mtp,
        mtp_activated=drafted,
        mtp_activated_with_embedding=drafted + (input_embedding if depth else 0),
        flops_per_token=2 * products,
        cache_bytes_per_token=_cache_bytes_per_token(config),
        cache_bytes=_cache_bytes(config, context),
        cache_bytes_1m=_cache_bytes(config, 1_000_000),
        table_rows=row_totals(config.engram) if config.engram is not None else (),
        table_bytes=2 * memory,
        table_bytes_fp8=_record_bytes(config),
        longest_context=longest_context(rope.base, rope.factor),
    )


class Sizes(NamedTuple):
    """Numbers of parameters by how they are spread over devices; their sum is that of the model."""

    rows: int  # of Engram's tables
    experts: tuple[int, ...]  # routed experts of each block, MTP's blocks last
    blocks: tuple[int, ...]  # everything else of these blocks
    embedding: int  # the embedding, and the head if it is not tied
    others: int  # the reduction of the streams and the last norm


def sizes(config: ModelConfig) -> Sizes:
    """Counts the parameters of every block, and those outside of blocks."""
    depth = config.mtp.depth if config.mtp is not None else 0
    counted = costs(config)
    one = 0
    if config.moe is not None:
        one = config.moe.routed * _swiglu(config.dim, config.moe.width)
    indices = range(config.layers + depth)
    experts = tuple(one * config.has_experts(index) for index in indices)
    whole = [_whole_block(config, index) for index in range(config.layers)]
    whole += [_mtp(config, index) for index in range(depth)]
    blocks = tuple(all_of - routed for all_of, routed in zip(whole, experts, strict=True))
    embedding = config.vocab_size * config.dim * (1 if config.tied else 2)
    inside = sum(blocks) + sum(experts) + embedding + counted.memory
    return Sizes(counted.memory, experts, blocks, embedding, counted.total + counted.mtp - inside)


def _whole_block(config: ModelConfig, index: int) -> int:
    """Counts a block with its norms, its sites of the streams and its Engram, but for rows."""
    block = _block(config, index)
    total = block.matrices + block.others + (0 if config.gated_residual else 2 * config.dim)
    if config.engram is not None and config.has_engram(index):
        total += _engram(config.engram, config.dim, config.streams)
    if config.hyper is not None:
        total += 2 * _connection(config.hyper, config.dim)
    return total


class BlockFlops(NamedTuple):
    """Forward FLOPs a token of one block, and of them those of its routed experts."""

    total: int  # experts included
    experts: int


def flops_by_block(config: ModelConfig, context: int = 4096) -> tuple[list[BlockFlops], int]:
    """Returns the forward FLOPs a token of each block, and those outside of blocks.

    Together they are `Costs.flops_per_token`. The products of attention and of the streams are
    spread evenly over the blocks that have them, those of Engram over its own.
    """
    active = 0
    if config.moe is not None:
        active = 2 * config.moe.active * _swiglu(config.dim, config.moe.width)
    attended = 2 * attention_products(config, context)
    mixed = 2 * hyper_products(config) // config.layers
    engram_blocks = 1 if config.engram is None else len(config.engram.layers)
    looked_up = 2 * engram_products(config) // engram_blocks
    blocks: list[BlockFlops] = []
    for index in range(config.layers):
        experts = active * config.has_experts(index)
        unused = _unused_experts(config) * config.has_experts(index)
        total = 2 * (_block(config, index).matrices - unused) + mixed
        if config.delta is not None and config.has_delta(index):
            total += 2 * delta_products(config.delta)
        else:
            total += attended
        blocks.append(BlockFlops(total + looked_up * config.has_engram(index), experts))
    inside = sum(block.total for block in blocks)
    return blocks, costs(config, context).flops_per_token - inside


def train_flops_per_token(config: ModelConfig, context: int = 4096) -> int:
    """Computes the FLOPs of a token in training: forward, and backward as two of it; MTP, too.

    MTP's modules count by their matrices, the shared head in each of them; their attention, and
    activations that are computed again, do not count.
    """
    counted = costs(config, context)
    # The costs count the shared head once, although every MTP module multiplies by it.
    heads = config.vocab_size * config.dim * (config.mtp.depth - 1 if config.mtp is not None else 0)
    return 3 * (counted.flops_per_token + 2 * (counted.mtp_activated + heads))


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a part of a model: matrices that multiply every token once, and all others.

    The others only scale or shift (norms, biases), or their products are counted by a function of
    their own.
    """

    matrices: int = 0
    others: int = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.matrices + other.matrices, self.others + other.others)


def _backbone(config: ModelConfig) -> Parameters:
    """Counts all blocks and the reduction of the streams, without embedding, head and last norm."""
    total = Parameters(
        others=_reduction(config.hyper, config.dim) if config.hyper is not None else 0
    )
    norms = 0 if config.gated_residual else 2 * config.dim
    for index in range(config.layers):
        total += _block(config, index) + Parameters(others=norms)
        if config.engram is not None and config.has_engram(index):
            total += Parameters(others=_engram(config.engram, config.dim, config.streams))
        if config.hyper is not None:
            # One connection for attention and one for the feed-forward.
            total += Parameters(others=2 * _connection(config.hyper, config.dim))
    return total


def _block(config: ModelConfig, index: int) -> Parameters:
    """Counts attention and feed-forward: a block without norms, streams and Engram."""
    total = (
        _delta(config.delta, config.dim)
        if config.delta is not None and config.has_delta(index)
        else _attention(config, index)
    )
    if config.moe is not None and config.has_experts(index):
        return total + _moe(config.moe, config.dim, index)
    return total + Parameters(matrices=_swiglu(config.dim, config.dense_width))


def _attention(config: ModelConfig, index: int) -> Parameters:
    """Counts CSA, or MLA or GQA with its inner attention; MoBA has no parameters."""
    if config.csa is not None and config.csa2 is not None:
        sharing = _csa2(config.csa2, config.csa, config.dim, index)
        return _csa(config.csa, config.dim, "window") + sharing
    if config.csa is not None:
        return _csa(config.csa, config.dim, config.csa.kind(index))
    if config.mla is not None:
        total = _mla(config.mla, config.dim)
        if config.dsa is None or index in config.dsa.shared:
            return total
        return total + _dsa(config.dsa, config.mla, config.dim)
    assert config.gqa is not None
    total = _gqa(config.gqa, config.dim)
    if config.qsa is not None:
        return total + _qsa(config.qsa, config.dim)
    return total if config.nsa is None else total + _nsa(config.nsa, config.gqa, config.dim)


def _mla(mla: MLAConfig, dim: int) -> Parameters:
    """Counts the projections and norms of queries, keys and values, and W_o.

    They are W_q, or W_dq and W_uq with a norm between; W_dkv beside W_kr, a norm, W_uk beside W_uv.
    """
    query = mla.heads * (mla.nope_dim + mla.rope_dim)
    rank = mla.q_lora_rank
    latent = mla.kv_lora_rank + mla.rope_dim
    queries = dim * query if rank is None else dim * rank + rank * query
    keys = dim * latent + mla.kv_lora_rank * mla.heads * (mla.nope_dim + mla.value_dim)
    out = mla.heads * mla.value_dim * dim
    norms = (rank or 0) + mla.kv_lora_rank
    biases = (rank or 0) + latent + dim if mla.bias else 0
    return Parameters(queries + keys + out, norms + biases)


def _dsa(dsa: DSAConfig, mla: MLAConfig, dim: int) -> Parameters:
    """Counts the indexer's W_q (of the query latent, if any), W_k and W_w, and its key norm."""
    queries = (mla.q_lora_rank or dim) * dsa.heads * dsa.dim
    return Parameters(queries + dim * dsa.dim + dim * dsa.heads, 2 * dsa.dim)


def _csa(csa: CSAConfig, dim: int, kind: str) -> Parameters:
    """Counts the projections of queries, keys and output, two norms, sinks, and compression.

    They are W_qa and W_qb, W_kv, the blocks of W_oa and W_ob; the compressor of a block with
    entries, and in csa blocks the indexer's W_q, W_v and compressor.
    """
    width = csa.heads * csa.head_dim
    rank = csa.q_lora_rank
    queries = dim * rank + rank * width
    out = width * csa.o_lora_rank + csa.groups * csa.o_lora_rank * dim
    total = Parameters(queries + dim * csa.head_dim + out, rank + csa.head_dim + csa.heads)
    if kind == "hca":
        return total + _compressor(dim, csa.head_dim, csa.heavy_ratio, 1)
    if kind == "csa":
        total += _compressor(dim, csa.head_dim, csa.ratio, 2)
        total += _compressor(dim, csa.index_dim, csa.ratio, 2)
        total += Parameters((rank * csa.index_dim + dim) * csa.index_heads)
    return total


def _csa2(csa2: CSA2Config, csa: CSAConfig, dim: int, index: int) -> Parameters:
    """Counts what a block of csa2 has besides its window.

    A source has W_kv, W_gate where several tokens make an entry, the indexer's W_k and two norms; a
    block that selects has the indexer's W_q and W_w.
    """
    total = Parameters()
    ratio = csa2.ratio(index)
    if index in csa2.kv_sources:
        projections = (1 + (ratio > 1)) * dim * csa.head_dim + csa.head_dim * csa.index_dim
        total += Parameters(projections, csa.head_dim + csa.index_dim)
    if index in csa2.index_sources:
        total += Parameters((csa.q_lora_rank * csa.index_dim + dim) * csa.index_heads)
    return total


def _compressor(dim: int, width: int, ratio: int, halves: int) -> Parameters:
    """Counts the projections of values and gates, the positions' gates, and a norm."""
    return Parameters(2 * dim * halves * width, ratio * halves * width + width)


def _gqa(gqa: GQAConfig, dim: int) -> Parameters:
    """Counts the projections of queries, keys, values and output, query and key norms, and sinks.

    W_q and W_o are of the query heads, W_k and W_v of the key heads, and W_g, if there is an output
    gate, of the query heads.
    """
    value = gqa.value_dim or gqa.head_dim
    gates = gqa.heads * value if gqa.output_gate else 0
    matrices = dim * ((gqa.heads + gqa.kv_heads) * _widths(gqa) + gates)
    others = (2 * gqa.head_dim if gqa.qk_norm else 0) + (gqa.heads if gqa.sinks else 0)
    if gqa.bias:
        others += gqa.heads * gqa.head_dim + gates + gqa.kv_heads * _widths(gqa) + dim
    return Parameters(matrices, others)


def _qsa(qsa: QSAConfig, dim: int) -> Parameters:
    """Counts the indexer's projection to queries and a key, and the two norms."""
    return Parameters(dim * (qsa.heads + 1) * qsa.dim, 2 * qsa.dim)


def _delta(delta: DeltaNetConfig, dim: int) -> Parameters:
    """Counts the projections, and the convolution, the decay and the norm of delta net.

    The projections are W_qkv, W_z, W_b, W_a and W_o.
    """
    values = delta.value_heads * delta.value_dim
    matrices = dim * (delta.conv_width + 2 * values + 2 * delta.value_heads)
    return Parameters(
        matrices, delta.conv_width * delta.kernel + 2 * delta.value_heads + delta.value_dim
    )


def _nsa(nsa: NSAConfig, gqa: GQAConfig, dim: int) -> Parameters:
    """Counts keys and values of two more branches, the two layers of the gates, and compression.

    Compressing a block of l keys of width P takes a position for each, [l P, P] and [P, P];
    `_nsa_products` counts its products.
    """
    gates = 3 * gqa.heads
    widths = (gqa.head_dim, gqa.value_dim or gqa.head_dim)
    compression = sum(
        nsa.block * width + nsa.block * width * width + width * width for width in widths
    )
    matrices = 2 * dim * gqa.kv_heads * _widths(gqa) + dim * gates + gates * gates
    return Parameters(matrices, compression + gates)


def _moe(moe: MoEConfig, dim: int, index: int) -> Parameters:
    """Counts the router and its biases, all routed experts, the shared one, and a norm if any."""
    biases = moe.routed if moe.router.bias_of(index) else 0
    experts = moe.routed * _swiglu(dim, moe.width)
    shared = _swiglu(dim, moe.shared_hidden) if moe.shared else 0
    norm = 0 if moe.norm_eps is None else dim
    shared += dim if moe.shared_gate else 0
    return Parameters(moe.routed * dim + experts + shared, biases + norm)


def _unused_experts(config: ModelConfig) -> int:
    """Counts the parameters of one block's experts that a token does not use."""
    return (
        0
        if config.moe is None
        else (config.moe.routed - config.moe.active) * _swiglu(config.dim, config.moe.width)
    )


def _swiglu(dim: int, width: int) -> int:
    """Counts W_gate, W_up and W_down."""
    return 3 * dim * width


def _engram(engram: EngramConfig, dim: int, streams: int) -> int:
    """Counts W_k of each gate and W_v over the memory width M, two norms a gate, convolution.

    The convolution has a norm and taps.
    """
    gates = engram.gates(streams)
    projections = (engram.memory_width + engram.bias) * (gates + 1) * dim
    convolution = streams * dim * (1 + engram.kernel) if engram.conv else 0
    return projections + 2 * gates * dim + convolution


def _rows(config: ModelConfig) -> int:
    """Counts all rows of all tables, in parameters."""
    return 0 if config.engram is None else sum(row_totals(config.engram)) * config.engram.head_dim


def _connection(hyper: HyperConfig, dim: int) -> int:
    """Counts fn, base and scale of one site.

    Its coefficients are S of pre, S of post and those of comb.
    """
    S = hyper.streams
    if hyper.kind == "gated":
        return _reduction(hyper, dim) + S * S * dim
    if hyper.kind == "hc":
        # fn reads each stream by itself and computes comb's row of it
        return (2 + S) * dim + (2 * S + S * S) + 2
    coefficients = 2 * S + (S * S if hyper.mix == "sinkhorn" else 0)
    return coefficients * S * dim + coefficients + 3


def _reduction(hyper: HyperConfig, dim: int) -> int:
    """Counts fn, base and scale of a learned reduction; of a gated one a norm, W_down and W_up."""
    S = hyper.streams
    if hyper.kind == "gated":
        return S * dim + 2 * S * dim * hyper.rank
    return S * S * dim + S + 1 if hyper.kind == "mhc" else 0


def _mtp(config: ModelConfig, depth: int) -> int:
    """Counts five norms, the projection of two hidden states to one, and a block.

    The block comes after the model's last. On streams it has two sites of them, and a reduction.
    """
    block = _block(config, config.layers + depth)
    streams = 0
    if config.hyper is not None and config.mtp is not None and config.mtp.streams:
        streams = 2 * _connection(config.hyper, config.dim) + _reduction(config.hyper, config.dim)
    return 5 * config.dim + 2 * config.dim * config.dim + block.matrices + block.others + streams


def attention_products(config: ModelConfig, context: int) -> int:
    """Counts the products of one token in one block besides its projections.

    It is the mean over the tokens of a context and over the blocks with attention.
    """
    if config.csa is not None and config.csa2 is not None:
        blocks = range(config.layers)
        parts = (_csa2_products(config.csa2, config.csa, index, context) for index in blocks)
        return sum(parts) // config.layers
    if config.csa is not None:
        kinds = [config.csa.kind(index) for index in range(config.layers)]
        return sum(_csa_products(config.csa, kind, context) for kind in kinds) // config.layers
    if config.mla is not None:
        scored, seen = _dsa_products(config, context)
        return scored + config.mla.heads * (
            config.mla.nope_dim + config.mla.rope_dim + config.mla.value_dim
        ) * seen // (2 * context)
    assert config.gqa is not None
    if config.nsa is not None:
        return _nsa_products(config.nsa, config.gqa, context)
    if config.qsa is not None:
        return _qsa_products(config.qsa, config.gqa, context)
    full = (
        _widths(config.gqa) * config.gqa.heads * _seen(context, config.gqa.window) // (2 * context)
    )
    if config.moba is None:
        return full
    dense = min(config.moba.full_layers, config.layers)
    sparse = _moba_products(config.moba, config.gqa, context)
    return (dense * full + (config.layers - dense) * sparse) // config.layers


def _seen(context: int, limit: int | None = None) -> int:
    """Counts twice the query-key pairs of a context.

    A token sees those before it, `limit` at most; the result is context^2 without a limit.
    """
    reach = min(context, limit or context)
    return reach * (2 * context - reach)


def _widths(gqa: GQAConfig) -> int:
    """Returns the width of a key plus that of a value.

    These are the products of one query with one key and of its probability with the value.
    """
    return gqa.head_dim + (gqa.value_dim or gqa.head_dim)


def _dsa_products(config: ModelConfig, context: int) -> tuple[int, int]:
    """Counts the indexer's products a token, and twice the query-key pairs of attention.

    The indexer takes each head's <q, k> and its weight over half the context. If every key is
    selected, nothing is scored. It is the mean over the blocks, of which some have no indexer.
    """
    if config.dsa is None or context <= config.dsa.top_k:
        return 0, _seen(context)
    scored = config.dsa.heads * (config.dsa.dim + 1) * context // 2
    indexers = config.layers - len(config.dsa.shared)
    return scored * indexers // config.layers, _seen(context, config.dsa.top_k)


def _csa_products(csa: CSAConfig, kind: str, context: int) -> int:
    """Counts pooling, the indexer's scores, and attention to the window and to entries.

    If no token has to choose among entries, nothing is scored.
    """
    ratio = csa.ratio if kind == "csa" else csa.heavy_ratio
    pairs = 0 if kind == "window" else _entries_seen(context, ratio)
    scored = pooled = 0
    if kind == "hca":
        pooled = csa.head_dim
    elif kind == "csa":
        pooled = 2 * (csa.head_dim + csa.index_dim)
        if context // ratio > csa.top_k:
            scored = csa.index_heads * (csa.index_dim + 1) * pairs
            pairs = _entries_seen(context, ratio, csa.top_k)
    attended = csa.heads * csa.head_dim * (_seen(context, csa.window) + 2 * pairs)
    return pooled + (scored + attended) // context


def _csa2_products(csa2: CSA2Config, csa: CSAConfig, index: int, context: int) -> int:
    """Counts pooling, the indexer's scores, and attention to the window and to entries.

    A block that selects scores every entry. If no token has to choose, nothing is scored.
    """
    ratio = csa2.ratio(index)
    scored = 0
    pairs = 0
    if ratio:
        pairs = _entries_seen(context, ratio, csa.top_k)
        if index in csa2.index_sources and context // ratio > csa.top_k:
            scored = csa.index_heads * (csa.index_dim + 1) * _entries_seen(context, ratio)
    pooled = csa.head_dim if index in csa2.kv_sources and ratio > 1 else 0
    attended = csa.heads * csa.head_dim * (_seen(context, csa.window) + 2 * pairs)
    return pooled + (scored + attended) // context


def _entries_seen(context: int, ratio: int, limit: int | None = None) -> int:
    """Counts the pairs of a token and an entry that it sees, or the `limit` best of these."""
    count = context // ratio if limit is None else min(limit, context // ratio)
    return ratio * count * (count - 1) // 2 + count * (context - count * ratio + 1)


def _nsa_products(nsa: NSAConfig, gqa: GQAConfig, context: int) -> int:
    """Counts compression, three branches and three gates.

    Compressed block i is seen from its last key on: i d + l - 1.
    """
    value = gqa.value_dim or gqa.head_dim
    blocks = max(0, (context - nsa.block) // nsa.stride + 1)
    compressing = gqa.kv_heads * blocks * (nsa.block + 1) * (gqa.head_dim**2 + value**2)
    pairs = blocks * (context - nsa.block + 1) - nsa.stride * blocks * (blocks - 1) // 2
    selected = _seen(context, nsa.window) + _seen(context, nsa.top_k * nsa.select_block)
    attended = gqa.heads * _widths(gqa) * (2 * pairs + selected)
    return (2 * compressing + attended) // (2 * context) + 3 * gqa.heads * value


def _qsa_products(qsa: QSAConfig, gqa: GQAConfig, context: int) -> int:
    """Counts the products of scoring complete blocks and of attending to the selected ones.

    The incomplete block, half of one in the mean, is seen besides. If every block is selected,
    nothing is scored.
    """
    limit = qsa.budget + qsa.block - 1
    attended = gqa.heads * _widths(gqa) * _seen(context, limit) // (2 * context)
    if context // qsa.block <= qsa.top_k:
        return attended
    return attended + qsa.heads * qsa.dim * context // (2 * qsa.block)


def delta_products(delta: DeltaNetConfig) -> int:
    """Counts the products of one step of delta net: the state is read twice and written once.

    They are k S, the write and q S; the convolution comes before.
    """
    state = delta.value_heads * delta.key_dim * delta.value_dim
    return 3 * state + delta.conv_width * delta.kernel


def _moba_products(moba: MoBAConfig, gqa: GQAConfig, context: int) -> int:
    """Counts the products of scoring block means and of attending to the selected blocks.

    A query scores the mean of every block before its own, and attends to the keys of its own block
    and the selected ones.
    """
    scored = seen = 0  # sums over the whole context; `seen` counts pairs twice
    for before in range(-(-context // moba.block)):
        width = min(moba.block, context - before * moba.block)
        scored += width * before
        seen += width * width + 2 * width * moba.block * min(before, moba.top_k - 1)
    return gqa.heads * (2 * gqa.head_dim * scored + _widths(gqa) * seen) // (2 * context)


def hyper_products(config: ModelConfig) -> int:
    """Counts two sites a block and the reduction.

    They compute coefficients, read S streams into one, write one to S and mix S with S.
    """
    hyper = config.hyper
    S = config.streams
    D = config.dim
    if hyper is None:
        return 0
    sites = 2 * config.layers
    if hyper.kind == "gated":
        reading = 2 * S * D * hyper.rank + S * D
        return sites * (reading + S * S * D + S * D) + reading
    mixed = S * S * D
    if hyper.kind == "hc":
        coefficients = S * (2 + S) * D  # fn reads every stream by itself
    elif hyper.mix == "sinkhorn":
        coefficients = (2 * S + S * S) * S * D + (2 * hyper.iterations - 1) * S * S
    else:
        coefficients = 2 * S * S * D
        mixed = 0
    reads = sites - (hyper.kind == "single_pass")  # its first site takes stream 0
    leaving = {"mhc": S * S * D + S * D, "single_pass": S * D, "hc": 0}[hyper.kind]
    return sites * (coefficients + S * D + mixed) + reads * S * D + leaving


def engram_products(config: ModelConfig) -> int:
    """Counts the key and value projections, the gates and what they scale, and the convolution."""
    if config.engram is None:
        return 0
    width = config.streams * config.dim
    keys = config.engram.gates(config.streams) * config.dim
    taps = config.engram.kernel if config.engram.conv else 0
    once = config.engram.memory_width * (keys + config.dim) + keys + (taps + (keys > 0)) * width
    return len(config.engram.layers) * once


def _record_bytes(config: ModelConfig) -> int:
    """Counts the bytes of Engram's rows as fp8 records: a byte a value, one of scale for 32."""
    if config.engram is None:
        return 0
    width = config.engram.head_dim
    return sum(row_totals(config.engram)) * (width + -(-width // 32))


def _cache_bytes_per_token(config: ModelConfig) -> int:
    """Counts the cache bytes of all blocks for each further token.

    All is bfloat16 but MoBA's float32 means. A window discards nothing, but that of CSA.
    """
    if config.csa is not None:
        far = 1 << 30  # tokens, over which entries are averaged
        return _entry_bytes(config, far) // far
    if config.mla is not None:
        latents = config.layers * (config.mla.kv_lora_rank + config.mla.rope_dim)
        if config.dsa is None:
            return 2 * latents
        return 2 * (latents + (config.layers - len(config.dsa.shared)) * config.dsa.dim)
    assert config.gqa is not None
    blocks = sum(not config.has_delta(index) for index in range(config.layers))
    pair = 2 * blocks * config.gqa.kv_heads * _widths(config.gqa)
    if (qsa := config.qsa) is not None:
        # The indexer's key of each token, and that of each block.
        return pair + 2 * blocks * (qsa.dim + qsa.dim // qsa.block)
    if config.nsa is not None:
        return 3 * pair + pair // config.nsa.stride
    if config.moba is not None:
        return (
            pair
            + 4 * config.layers * config.gqa.kv_heads * config.gqa.head_dim // config.moba.block
        )
    return pair


def _cache_bytes(config: ModelConfig, context: int) -> int:
    """Counts the cache bytes of all blocks after `context` tokens, in bfloat16.

    CSA has a window, what is not yet compressed or overlaps, and entries.
    """
    csa = config.csa
    if csa is None:
        return _cache_bytes_per_token(config) * context + _state_bytes(config)
    total = 2 * config.layers * (csa.window - 1) * csa.head_dim
    for index in range(config.layers):
        if config.csa2 is not None:
            pending = config.csa2.ratio(index) - 1 if index in config.csa2.kv_sources else 0
            total += 8 * pending * csa.head_dim  # in float32
        elif csa.kind(index) == "hca":
            total += 4 * (csa.heavy_ratio - 1) * csa.head_dim
        elif csa.kind(index) == "csa":
            total += 8 * (2 * csa.ratio - 1) * (csa.head_dim + csa.index_dim)
    return total + _entry_bytes(config, context)


def _entry_bytes(config: ModelConfig, context: int) -> int:
    """Counts the bytes of the entries of all blocks, or of sources, after `context` tokens."""
    csa = config.csa
    assert csa is not None
    width = csa.head_dim + csa.index_dim
    if config.csa2 is not None:
        sources = [index for index in config.csa2.kv_sources if index < config.layers]
        return 2 * width * sum(context // config.csa2.ratio(index) for index in sources)
    kinds = [csa.kind(index) for index in range(config.layers)]
    sparse = kinds.count("csa") * (context // csa.ratio) * width
    return 2 * (sparse + kinds.count("hca") * (context // csa.heavy_ratio) * csa.head_dim)


def _state_bytes(config: ModelConfig) -> int:
    """Counts delta net's float32 states and the bfloat16 inputs that its convolution looks back at.

    What it takes to go back some tokens is not counted.
    """
    if (delta := config.delta) is None:
        return 0
    blocks = sum(config.has_delta(index) for index in range(config.layers))
    state = 4 * delta.value_heads * delta.key_dim * delta.value_dim
    return blocks * (state + 2 * (delta.kernel - 1) * delta.conv_width)
