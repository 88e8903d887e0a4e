"""ModelConfig -> parameters, FLOPs and cache bytes, counted, so that they can be held against the published figures.

activated = total - resting experts - memory + recalled rows - input embedding
FLOPs a token = 2 (activated matrices + attention + mixing of the streams + Engram)      forward

Attention is the mean over the tokens of a context, which see context / 2 keys, or fewer: the last `window`, or those
that DSA, NSA or MoBA choose, and then what choosing takes counts too. Additions alone, softmax and norms do not count.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from rorqual.layers.attention import GQAConfig
from rorqual.layers.basics import longest_context
from rorqual.layers.moba import MoBAConfig
from rorqual.layers.nsa import NSAConfig
from rorqual.model import LanguageModel, ModelConfig


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
    """Counted on a model without storage (meta device), so that the figures are the model's own.

    context: tokens that attention and its choosers see half of on average; ValueError for none.
    """
    if context < 1:
        raise ValueError(f"context: got {context}, expected at least 1 token")
    with torch.device("meta"), _Unfilled():
        model = LanguageModel(config, seed=None)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    biases = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    mtp_biases = sum(b.numel() for name, b in model.mtp.named_buffers() if name.endswith("e_score_correction_bias"))
    mtp = sum(n for name, n in sizes.items() if name.startswith("mtp.")) + mtp_biases
    memory = sum(n for name, n in sizes.items() if name.startswith("tables."))
    total = sum(sizes.values()) + biases - mtp
    expert = 3 * config.dim * config.moe.width if config.moe is not None else 0
    resting = (config.moe.routed - config.moe.active) * expert if config.moe is not None else 0
    blocks_with_experts = sum(config.has_experts(i) for i in range(config.layers))
    recalled = len(config.engram.layers) * config.engram.memory_width if config.engram is not None else 0
    embedding = config.vocabulary * config.dim
    with_embedding = total - blocks_with_experts * resting - memory + recalled
    activated = with_embedding - (0 if config.tied else embedding)
    has_moe = config.moe is not None
    drafted = mtp - len(model.mtp) * resting * has_moe + (embedding if len(model.mtp) else 0)
    return Costs(
        total=total,
        activated=activated,
        activated_with_embedding=with_embedding,
        memory=memory,
        mtp=mtp,
        mtp_activated=drafted,
        mtp_activated_with_embedding=drafted + (embedding if len(model.mtp) and not config.tied else 0),
        flops_per_token=_flops(config, model, context, blocks_with_experts * resting),
        cache_bytes_per_token=_cached_bytes(config),
        longest_context=longest_context(config.rope.base, yarn.factor if (yarn := config.rope.yarn) else 1.0),
    )


FILLING = (  # what gives numbers to a tensor that has its shape
    *(torch.Tensor.mul, torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_),
    *(torch.Tensor.copy_, torch.Tensor.__setitem__),
)


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters without values: on the meta device they have none, and filling them loads the compiler."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        if func in FILLING:
            return args[0]
        if func is torch.eye:
            return torch.empty(args[0], args[-1])
        if func in (torch.randn, torch.rand):
            return torch.empty(*args, **given)
        return func(*args, **given)


def _flops(config: ModelConfig, model: LanguageModel, context: int, resting: int) -> int:
    """2 a multiply and add: the matrices a token goes through, attention, the streams' mixing, Engram."""
    once = 2 * (_matrices(config, model) - resting) + 2 * config.layers * _attention(config, context)
    return once + 2 * (_hyper(config) + _engram(config))


def _matrices(config: ModelConfig, model: LanguageModel) -> int:
    """Weights that multiply each token once. Norms only scale; what is counted by its own function is left out."""
    apart = ("tables.", "mtp.", "embed.", "exit.")
    within = ("_site.", ".engram.", ".inner.compress_")
    counted = [
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() > 1 and not name.startswith(apart) and not any(part in name for part in within)
    ]
    return sum(counted) + (config.vocabulary * config.dim if config.tied else 0)


def _attention(config: ModelConfig, context: int) -> int:
    """Products of one token in one block beside its projections, the mean over the tokens of a context and blocks."""
    if config.mla is not None:
        scored, seen = _dsa(config, context)
        return scored + config.mla.heads * (
            config.mla.nope_dim + config.mla.rope_dim + config.mla.value_dim
        ) * seen // (2 * context)
    assert config.gqa is not None
    if config.nsa is not None:
        return _nsa(config.nsa, config.gqa, context)
    full = _widths(config.gqa) * config.gqa.heads * _seen(context, config.gqa.window) // (2 * context)
    if config.moba is None:
        return full
    dense = min(config.moba.full_layers, config.layers)
    sparse = _moba(config.moba, config.gqa, context)
    return (dense * full + (config.layers - dense) * sparse) // config.layers


def _seen(context: int, most: int | None = None) -> int:
    """Twice the query-key pairs of a context: a token sees those before it, `most` at most; context^2 without limit."""
    reach = min(context, most or context)
    return reach * (2 * context - reach)


def _widths(gqa: GQAConfig) -> int:
    """Width of a key and of a value: the products of one query with one key and of its probability with the value."""
    return gqa.head_dim + (gqa.value_dim or gqa.head_dim)


def _dsa(config: ModelConfig, context: int) -> tuple[int, int]:
    """The indexer's products a token, each head's <q, k> and its weight over half the context, and twice the pairs
    attended. Where every key is chosen nothing is scored."""
    if config.dsa is None or context <= config.dsa.chosen:
        return 0, _seen(context)
    return config.dsa.heads * (config.dsa.dim + 1) * context // 2, _seen(context, config.dsa.chosen)


def _nsa(nsa: NSAConfig, gqa: GQAConfig, context: int) -> int:
    """Compressing, three branches, three gates. Compressed block i is seen from its last key on: i d + l - 1."""
    value = gqa.value_dim or gqa.head_dim
    blocks = max(0, (context - nsa.block) // nsa.stride + 1)
    compressing = gqa.kv_heads * blocks * (nsa.block + 1) * (gqa.head_dim**2 + value**2)
    pairs = blocks * (context - nsa.block + 1) - nsa.stride * blocks * (blocks - 1) // 2
    near = _seen(context, nsa.window) + _seen(context, nsa.chosen * nsa.select_block)
    attended = gqa.heads * _widths(gqa) * (2 * pairs + near)
    return (2 * compressing + attended) // (2 * context) + 3 * gqa.heads * value


def _moba(moba: MoBAConfig, gqa: GQAConfig, context: int) -> int:
    """A query's score with the mean of every block before its own, and the keys of its own and the chosen ones."""
    scored = seen = 0  # of the whole context; seen twice
    for before in range(-(-context // moba.block)):
        width = min(moba.block, context - before * moba.block)
        scored += width * before
        seen += width * width + 2 * width * moba.block * min(before, moba.chosen - 1)
    return gqa.heads * (2 * gqa.head_dim * scored + _widths(gqa) * seen) // (2 * context)


def _hyper(config: ModelConfig) -> int:
    """Two sites a block and the exit: coefficients, reading S streams into one, writing one to S, mixing S with S."""
    hyper, S, D = config.hyper, config.streams, config.dim
    if hyper is None:
        return 0
    sites = 2 * config.layers
    mixed = S * S * D
    if hyper.kind == "hc":
        coefficients = S * (2 + S) * D  # fn reads every stream by itself
    else:
        rows = {"sinkhorn": S * S, "identity": 0, "permutations": math.factorial(S)}[hyper.mix]
        combining = {"sinkhorn": (2 * hyper.iterations - 1) * S * S, "identity": 0, "permutations": rows * S * S}
        coefficients = (2 * S + rows) * S * D + combining[hyper.mix]
        mixed = 0 if hyper.mix == "identity" else mixed
    reads = sites - (hyper.kind == "single_pass")  # its first site takes stream 0
    leaving = {"learned": S * S * D + S * D, "last": S * D, "mean": 0, "sum": 0}[hyper.leaving]
    return sites * (coefficients + S * D + mixed) + reads * S * D + leaving


def _engram(config: ModelConfig) -> int:
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
        return pair + 4 * config.layers * config.gqa.kv_heads * config.gqa.head_dim // config.moba.block
    return pair
