"""Parameters, FLOPs and cache bytes of a model, by formula from its config: no model is built, no torch is imported.

activated = total - resting experts - memory + recalled rows - input embedding
FLOPs a token = 2 (activated matrices + attention + mixing of the streams + Engram)      forward

Attention is the mean over the tokens of a context, which see context / 2 keys, or fewer: the last `window`, or those
that DSA, NSA or MoBA choose, and then what choosing takes counts too. Additions alone, softmax and norms do not count.
tests/test_costs.py builds models without storage and counts their parameters: both must agree exactly.
"""

from dataclasses import dataclass
from typing import NamedTuple

from rorqual.model_config import (
    DSAConfig,
    EngramConfig,
    GQAConfig,
    HyperConfig,
    MLAConfig,
    MoBAConfig,
    ModelConfig,
    MoEConfig,
    NSAConfig,
    longest_context,
    row_totals,
)


class Costs(NamedTuple):
    """What a model weighs and takes. Parameters are counted, FLOPs are 2 for a multiply and add, forward only."""

    total: int  # with router biases, without MTP's modules
    activated: int  # all a token goes through but the input embedding
    activated_with_embedding: int  # the published "activated" of most reports: both embeddings
    memory: int  # rows of Engram's tables, in parameters; never activated but for the few recalled
    mtp: int  # MTP's modules
    mtp_activated: int  # a token's way through them, the shared head included
    mtp_activated_with_embedding: int  # and the shared embedding
    flops_per_token: int  # forward, the mean over the tokens of a context
    cache_bytes_per_token: int  # attention's and its choosers', in bfloat16
    longest_context: int  # tokens that the rotary base, stretched by YaRN, tells apart


def costs(config: ModelConfig, context: int = 4096) -> Costs:
    """What a model of this config weighs, and what a token in a context of so many tokens takes.

    context: tokens that attention and its choosers see half of on average. ValueError for no token, and for a config
    that no model can be built of.
    """
    if context < 1:
        raise ValueError(f"context: got {context}, expected at least 1 token")
    config.check_parts()
    embedding = config.vocabulary * config.dim
    input_embedding = (
        0 if config.tied else embedding
    )  # beside the head, which is the embedding where they are tied
    blocks, memory = _backbone(config), _rows(config)
    total = (
        embedding + input_embedding + blocks.matrices + blocks.others + config.dim + memory
    )  # dim: the last norm

    blocks_with_experts = sum(config.has_experts(i) for i in range(config.layers))
    resting = blocks_with_experts * _resting(config)
    recalled = (
        len(config.engram.layers) * config.engram.memory_width if config.engram is not None else 0
    )
    activated = total - resting - memory + recalled  # both embeddings among them

    depth = config.mtp.depth if config.mtp is not None else 0
    mtp = sum(_mtp(config, k) for k in range(depth))
    drafted = (
        mtp - depth * _resting(config) + (embedding if depth else 0)
    )  # the shared head among them

    products = blocks.matrices - resting + embedding  # the head multiplies, tied or not
    products += config.layers * _attention_products(config, context)
    products += _hyper_products(config) + _engram_products(config)
    return Costs(
        total=total,
        activated=activated - input_embedding,
        activated_with_embedding=activated,
        memory=memory,
        mtp=mtp,
        mtp_activated=drafted,
        mtp_activated_with_embedding=drafted + (input_embedding if depth else 0),
        flops_per_token=2 * products,
        cache_bytes_per_token=_cached_bytes(config),
        longest_context=longest_context(
            config.rope.base, yarn.factor if (yarn := config.rope.yarn) else 1.0
        ),
    )


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a part of a model: matrices that multiply every token once, and all others.

    The others only scale or shift (norms, biases), or their products are counted by a function of their own.
    """

    matrices: int = 0
    others: int = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.matrices + other.matrices, self.others + other.others)


def _backbone(config: ModelConfig) -> Parameters:
    """All blocks and the exit of the streams; neither embedding, head nor the last norm."""
    found = Parameters(others=_exit(config.hyper, config.dim) if config.hyper is not None else 0)
    for index in range(config.layers):
        found += _block(config, index)
        if config.engram is not None and config.remembers(index):
            found += Parameters(others=_engram(config.engram, config.dim, config.streams))
        if config.hyper is not None:
            found += Parameters(
                others=2 * _connection(config.hyper, config.dim)
            )  # of attention, of the feed-forward
    return found


def _block(config: ModelConfig, index: int) -> Parameters:
    """Two norms, attention, feed-forward: a block as it is with one stream and without memory."""
    found = Parameters(others=2 * config.dim) + _attention(config)
    if config.moe is not None and config.has_experts(index):
        return found + _moe(config.moe, config.dim)
    return found + Parameters(matrices=_swiglu(config.dim, config.dense_width))


def _attention(config: ModelConfig) -> Parameters:
    """MLA or GQA with the attention inside it; MoBA has no parameters."""
    if config.mla is not None:
        found = _mla(config.mla, config.dim)
        return found if config.dsa is None else found + _dsa(config.dsa, config.mla, config.dim)
    assert config.gqa is not None
    found = _gqa(config.gqa, config.dim)
    return found if config.nsa is None else found + _nsa(config.nsa, config.gqa, config.dim)


def _mla(mla: MLAConfig, dim: int) -> Parameters:
    """W_q, or W_dq and W_uq with a norm between; W_dkv beside W_kr, a norm, W_uk beside W_uv; W_o."""
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
    """The indexer's W_q (of the query latent, if there is one), W_k and W_w; the layer norm of its keys."""
    queries = (mla.q_lora_rank or dim) * dsa.heads * dsa.dim
    return Parameters(queries + dim * dsa.dim + dim * dsa.heads, 2 * dsa.dim)


def _gqa(gqa: GQAConfig, dim: int) -> Parameters:
    """W_q and W_o of the query heads, W_k and W_v of the key heads; norms of queries and keys, sinks."""
    matrices = dim * (gqa.heads + gqa.kv_heads) * _widths(gqa)
    norms = 2 * gqa.head_dim if gqa.qk_norm else 0
    return Parameters(matrices, norms + (gqa.heads if gqa.sinks else 0))


def _nsa(nsa: NSAConfig, gqa: GQAConfig, dim: int) -> Parameters:
    """Keys and values of two more branches, the gates' two layers; what compresses keys and values.

    Compressing a block of l keys of width P takes a position for each, [l P, P] and [P, P]; `_nsa_products` counts it.
    """
    gates = 3 * gqa.heads
    widths = (gqa.head_dim, gqa.value_dim or gqa.head_dim)
    compression = sum(
        nsa.block * width + nsa.block * width * width + width * width for width in widths
    )
    matrices = 2 * dim * gqa.kv_heads * _widths(gqa) + dim * gates + gates * gates
    return Parameters(matrices, compression + gates)


def _moe(moe: MoEConfig, dim: int) -> Parameters:
    """The router and the biases it chooses with, all routed experts, the shared one."""
    experts = moe.routed * _swiglu(dim, moe.width)
    shared = _swiglu(dim, moe.shared_hidden) if moe.shared else 0
    return Parameters(moe.routed * dim + experts + shared, moe.routed if moe.router.bias else 0)


def _resting(config: ModelConfig) -> int:
    """Parameters of one block's experts that a token does not take."""
    return (
        0
        if config.moe is None
        else (config.moe.routed - config.moe.active) * _swiglu(config.dim, config.moe.width)
    )


def _swiglu(dim: int, width: int) -> int:
    """W_gate, W_up and W_down."""
    return 3 * dim * width


def _engram(engram: EngramConfig, dim: int, streams: int) -> int:
    """W_k of each gate and W_v over the recalled width M, two norms a gate, the convolution's norm and taps."""
    gates = engram.gates(streams)
    projections = (engram.memory_width + engram.bias) * (gates + 1) * dim
    convolution = streams * dim * (1 + engram.kernel) if engram.conv else 0
    return projections + 2 * gates * dim + convolution


def _rows(config: ModelConfig) -> int:
    """All rows of all tables, in parameters."""
    return 0 if config.engram is None else sum(row_totals(config.engram)) * config.engram.head_dim


def _connection(hyper: HyperConfig, dim: int) -> int:
    """fn, base and scale of one site; its coefficients are S of pre, S of post and those of comb."""
    S = hyper.streams
    if hyper.kind == "hc":
        return (
            (2 + S) * dim + (2 * S + S * S) + 2
        )  # fn reads each stream by itself, and writes comb's row of it
    coefficients = 2 * S + (S * S if hyper.mix == "sinkhorn" else 0)
    return coefficients * S * dim + coefficients + 3


def _exit(hyper: HyperConfig, dim: int) -> int:
    """fn, base and scale of what reads the streams at the end, where that is learned."""
    S = hyper.streams
    return S * S * dim + S + 1 if hyper.kind == "mhc" else 0


def _mtp(config: ModelConfig, depth: int) -> int:
    """Three norms, the projection of two hidden states to one, a block that comes after the model's last."""
    block = _block(config, config.layers + depth)
    return 3 * config.dim + 2 * config.dim * config.dim + block.matrices + block.others


def _attention_products(config: ModelConfig, context: int) -> int:
    """Products of one token in one block beside its projections, the mean over the tokens of a context and blocks."""
    if config.mla is not None:
        scored, seen = _dsa_products(config, context)
        return scored + config.mla.heads * (
            config.mla.nope_dim + config.mla.rope_dim + config.mla.value_dim
        ) * seen // (2 * context)
    assert config.gqa is not None
    if config.nsa is not None:
        return _nsa_products(config.nsa, config.gqa, context)
    full = (
        _widths(config.gqa) * config.gqa.heads * _seen(context, config.gqa.window) // (2 * context)
    )
    if config.moba is None:
        return full
    dense = min(config.moba.full_layers, config.layers)
    sparse = _moba_products(config.moba, config.gqa, context)
    return (dense * full + (config.layers - dense) * sparse) // config.layers


def _seen(context: int, most: int | None = None) -> int:
    """Twice the query-key pairs of a context: a token sees those before it, `most` at most; context^2 without limit."""
    reach = min(context, most or context)
    return reach * (2 * context - reach)


def _widths(gqa: GQAConfig) -> int:
    """Width of a key and of a value: the products of one query with one key and of its probability with the value."""
    return gqa.head_dim + (gqa.value_dim or gqa.head_dim)


def _dsa_products(config: ModelConfig, context: int) -> tuple[int, int]:
    """The indexer's products a token, each head's <q, k> and its weight over half the context, and twice the pairs
    attended. Where every key is chosen nothing is scored."""
    if config.dsa is None or context <= config.dsa.chosen:
        return 0, _seen(context)
    return config.dsa.heads * (config.dsa.dim + 1) * context // 2, _seen(context, config.dsa.chosen)


def _nsa_products(nsa: NSAConfig, gqa: GQAConfig, context: int) -> int:
    """Compressing, three branches, three gates. Compressed block i is seen from its last key on: i d + l - 1."""
    value = gqa.value_dim or gqa.head_dim
    blocks = max(0, (context - nsa.block) // nsa.stride + 1)
    compressing = gqa.kv_heads * blocks * (nsa.block + 1) * (gqa.head_dim**2 + value**2)
    pairs = blocks * (context - nsa.block + 1) - nsa.stride * blocks * (blocks - 1) // 2
    near = _seen(context, nsa.window) + _seen(context, nsa.chosen * nsa.select_block)
    attended = gqa.heads * _widths(gqa) * (2 * pairs + near)
    return (2 * compressing + attended) // (2 * context) + 3 * gqa.heads * value


def _moba_products(moba: MoBAConfig, gqa: GQAConfig, context: int) -> int:
    """A query's score with the mean of every block before its own, and the keys of its own and the chosen ones."""
    scored = seen = 0  # of the whole context; seen twice
    for before in range(-(-context // moba.block)):
        width = min(moba.block, context - before * moba.block)
        scored += width * before
        seen += width * width + 2 * width * moba.block * min(before, moba.chosen - 1)
    return gqa.heads * (2 * gqa.head_dim * scored + _widths(gqa) * seen) // (2 * context)


def _hyper_products(config: ModelConfig) -> int:
    """Two sites a block and the exit: coefficients, reading S streams into one, writing one to S, mixing S with S."""
    hyper, S, D = config.hyper, config.streams, config.dim
    if hyper is None:
        return 0
    sites = 2 * config.layers
    mixed = S * S * D
    if hyper.kind == "hc":
        coefficients = S * (2 + S) * D  # fn reads every stream by itself
    elif hyper.mix == "sinkhorn":
        coefficients = (2 * S + S * S) * S * D + (2 * hyper.iterations - 1) * S * S
    else:
        coefficients, mixed = 2 * S * S * D, 0
    reads = sites - (hyper.kind == "single_pass")  # its first site takes stream 0
    leaving = {"mhc": S * S * D + S * D, "single_pass": S * D, "hc": 0}[hyper.kind]
    return sites * (coefficients + S * D + mixed) + reads * S * D + leaving


def _engram_products(config: ModelConfig) -> int:
    """Key and value projections, the gates and what they scale, the convolution."""
    if config.engram is None:
        return 0
    wide, keys = config.streams * config.dim, config.engram.gates(config.streams) * config.dim
    taps = config.engram.kernel if config.engram.conv else 0
    once = config.engram.memory_width * (keys + config.dim) + keys + (taps + (keys > 0)) * wide
    return len(config.engram.layers) * once


def _cached_bytes(config: ModelConfig) -> int:
    """Of all blocks, for each further token, in bfloat16 but for MoBA's float32 means. A window forgets nothing."""
    if config.mla is not None:
        indexed = config.dsa.dim if config.dsa is not None else 0
        return 2 * config.layers * (config.mla.kv_lora_rank + config.mla.rope_dim + indexed)
    assert config.gqa is not None
    pair = 2 * config.layers * config.gqa.kv_heads * _widths(config.gqa)
    if config.nsa is not None:
        return 3 * pair + pair // config.nsa.stride
    if config.moba is not None:
        return (
            pair
            + 4 * config.layers * config.gqa.kv_heads * config.gqa.head_dim // config.moba.block
        )
    return pair
