"""The configuration of a model and its layers, and the arithmetic that needs nothing else.

Frozen dataclasses that refuse impossible values. Nothing here imports torch or numpy, so that what
only describes or counts a model (presets, costs, `rorqual params`) starts at once. A layer's config
is also a name of the layer's file: `from rorqual.layers.nsa import NSAConfig`.
"""

import itertools
import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

ROUTER_SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("top2", "max")

CSA_KINDS = ("window", "csa", "hca")

Choice = Literal["token", "tile"]  # what selects the blocks of keys in NSA and MoBA
CSAKind = Literal["window", "csa", "hca"]  # what a block of CSAConfig sees before its window


def _at_least(config: Any, section: str, least: int, *names: str) -> None:
    """Refuses fields that are below `least` or NaN; None is left to the caller."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            expected = f"at least {least}" if least else "0 or more"
            raise ValueError(f"{section}{name}: got {value}, expected {expected}")


def _one_of(config: Any, section: str, **allowed: tuple[str, ...]) -> None:
    """Refuses fields that are none of the words that are allowed for them."""
    for name, words in allowed.items():
        if (value := getattr(config, name)) not in words:
            *others, last = words
            expected = f"{', '.join(others)} or {last}"
            raise ValueError(f"{section}{name}: got {value!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """Stretches a rotary base trained on `original_length` tokens to `factor` times as many."""

    factor: float = 40.0
    original_length: int = 4096
    # pairs that turn more often than this within original_length stay as they are
    beta_fast: float = 32.0
    beta_slow: float = 1.0  # pairs that turn less often than this are slowed by the whole factor
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    truncate: bool = True  # the ends of what is slowed in part are rounded to whole pairs

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_length < 1:
            raise ValueError(
                f"got factor {self.factor} and original_length {self.original_length}, "
                "expected both at least 1"
            )
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(
                f"got beta_fast {self.beta_fast}, beta_slow {self.beta_slow}, "
                "expected 0 < slow <= fast"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRopeConfig:
    """Divides every rotary frequency, which is to divide the positions."""

    factor: float = 4.0

    def __post_init__(self) -> None:
        _check_stretch("linear", self.factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicRopeConfig:
    """Raises the rotary base with the longest position of a call (NTK scaling).

    Up to `original_length` tokens nothing changes. Beyond it the frequencies depend on the call, so
    keys that are cached keep those of the call that computed them.
    """

    factor: float = 4.0
    original_length: int = 4096

    def __post_init__(self) -> None:
        _check_stretch("dynamic", self.factor, self.original_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3RopeConfig:
    """Slows the pairs that turn seldom within `original_length` tokens, as Llama 3.1 does.

    Pairs that turn less often than `low_turns` are slowed by the whole factor, those that turn more
    often than `high_turns` are not, and between the two the frequency is interpolated.
    """

    factor: float = 8.0
    low_turns: float = 1.0
    high_turns: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        _check_stretch("llama3", self.factor, self.original_length)
        if not 0 < self.low_turns < self.high_turns:
            raise ValueError(
                f"rope.llama3: got low_turns {self.low_turns}, high_turns {self.high_turns}, "
                "expected 0 < low < high"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRopeConfig:
    """Divides the frequency of each pair by a factor of its own (LongRoPE, arXiv 2402.13753).

    The factors are `short` where no position of a call reaches `original_length`, otherwise `long`.
    """

    short: tuple[float, ...] = (1.0,)
    long: tuple[float, ...] = (1.0,)
    original_length: int = 4096
    factor: float = 1.0  # the longest context over original_length
    # multiplies cos and sin; None: sqrt(1 + ln factor / ln original_length)
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check_stretch("longrope", self.factor, self.original_length)
        if not self.short or len(self.short) != len(self.long):
            raise ValueError(
                f"rope.longrope: got {len(self.short)} short and {len(self.long)} long factors, "
                "expected one of each for every rotary pair"
            )
        if min(*self.short, *self.long) <= 0:
            raise ValueError(
                f"rope.longrope: got the factor {min(*self.short, *self.long)}, "
                "expected factors above 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryScaleConfig:
    """Multiplies queries by 1 + beta ln(1 + position // original_length), as Llama 4 does."""

    beta: float = 0.1
    original_length: int = 8192

    def __post_init__(self) -> None:
        if self.original_length < 1:
            raise ValueError(
                f"rope.query_scale: got original_length {self.original_length}, expected at least 1"
            )


def _check_stretch(kind: str, factor: float, original_length: int = 2) -> None:
    """Raises ValueError unless the factor is at least 1 and the length at least 2 tokens."""
    if factor < 1 or original_length < 2:
        raise ValueError(
            f"rope.{kind}: got factor {factor} and original_length {original_length}, "
            "expected at least 1 and at least 2"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary positions: the base, and how it is stretched to longer contexts.

    `interleaved`: pairs are (2i, 2i+1) as DeepSeek trains them, otherwise (i, i + dim/2). At most
    one of the fields that stretch the base to longer contexts is set.
    """

    base: float = 10000.0
    interleaved: bool = True
    yarn: YarnConfig | None = None
    linear: LinearRopeConfig | None = None
    dynamic: DynamicRopeConfig | None = None
    llama3: Llama3RopeConfig | None = None
    longrope: LongRopeConfig | None = None
    query_scale: QueryScaleConfig | None = None  # of MLA's queries

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise ValueError(f"got rope base {self.base}, expected more than 1")
        if len(names := [name for name in ROPE_KINDS if getattr(self, name) is not None]) > 1:
            raise ValueError(f"rope: got {' and '.join(names)}, expected at most one of them")

    @property
    def factor(self) -> float:
        """Factor by which positions are stretched beyond the context that was trained on."""
        for name in ROPE_KINDS:
            if (kind := getattr(self, name)) is not None:
                return float(kind.factor)
        return 1.0

    @property
    def varies(self) -> bool:
        """Whether the frequencies depend on the longest position of a call."""
        return self.dynamic is not None or self.longrope is not None


ROPE_KINDS = ("yarn", "linear", "dynamic", "llama3", "longrope")


def longest_context(base: float, factor: float = 1.0) -> int:
    """Returns how many tokens a rotary base tells apart, pi * base * the factor of its stretching.

    The slowest pair turns once in about 2 pi base tokens, and angles theta and 2 pi - theta have
    one cosine, so half a turn is usable.
    """
    return int(math.pi * base * factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class MLAConfig:
    """Sizes of multi-head latent attention; DeepSeek-V3: 128 heads, 1536, 512, 128, 64, 128."""

    heads: int = 4
    q_lora_rank: int | None = None  # None: queries are projected directly from the hidden state
    kv_lora_rank: int = 32
    nope_dim: int = 16  # per head, without position
    rope_dim: int = 16  # per head, rotated; the key's is shared by all heads
    value_dim: int = 16
    eps: float = 1e-6  # of both latents' norms, whatever the model's is
    bias: bool = False  # on the two down projections and the output projection

    def __post_init__(self) -> None:
        _at_least(
            self, "", 1, "heads", "q_lora_rank", "kv_lora_rank", "nope_dim", "rope_dim", "value_dim"
        )
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim: got {self.rope_dim}, expected an even width")


@dataclass(frozen=True, kw_only=True, slots=True)
class GQAConfig:
    """Sizes of grouped-query attention; kv_heads = heads is plain multi-head attention."""

    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    value_dim: int | None = None  # None: head_dim
    window: int | None = None  # keys a query sees, itself included; None: all
    sinks: bool = False  # one learned logit a head that takes probability and has no value
    qk_norm: bool = False  # RMSNorm over each head's query and key, before rope
    norm_eps: float = 1e-6  # of the norms of queries and keys
    centred: bool = False  # the weights of those norms are stored less one, so that they start at 0
    rope_dim: int | None = None  # first values of a head that are rotated; None: all of them
    output_gate: bool = False  # each head's output is multiplied by sigmoid(W_g x)
    bias: bool = False  # of all four projections

    def __post_init__(self) -> None:
        _at_least(self, "", 1, "heads", "kv_heads", "head_dim")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: got {self.kv_heads}, expected a divisor of {self.heads} heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim: got {self.head_dim}, "
                "expected an even width, which rope rotates in pairs"
            )
        if self.rope_dim is not None and (
            self.rope_dim % 2 or not 1 < self.rope_dim <= self.head_dim
        ):
            raise ValueError(
                f"rope_dim: got {self.rope_dim}, "
                f"expected an even width up to head_dim, {self.head_dim}, or None"
            )
        _at_least(self, "", 1, "value_dim", "window")

    @property
    def rotated(self) -> int:
        """Number of values of a head that are rotated."""
        return self.head_dim if self.rope_dim is None else self.rope_dim

    def check_sparse(self) -> None:
        """Refuses a window and sinks, which attention to selected keys does not have."""
        if self.window is not None or self.sinks:
            raise ValueError(
                "got window or sinks together with sparse attention, expected one or the other"
            )

    def check_plain(self) -> None:
        """Refuses partial rope, output gates and biases, which NSA and MoBA do not have."""
        if self.rotated != self.head_dim or self.output_gate or self.bias:
            raise ValueError(
                f"got rope_dim {self.rope_dim}, output_gate {self.output_gate}, bias {self.bias} "
                "together with nsa or moba, expected None, False and False"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class NSAConfig:
    """Sizes of Native Sparse Attention, in keys; the paper's are the defaults."""

    block: int = 32  # l, keys that a compressed key summarises
    stride: int = 16  # d, between compressed keys; divides the other two
    select_block: int = 64  # l', keys in a selection block
    top_k: int = 16  # selection blocks a query sees, the three forced ones included
    window: int = 512
    # what selects blocks: each token, or (ours) the first of a tile of 128 for all of them
    choice: Choice = "token"

    def __post_init__(self) -> None:
        _at_least(self, "nsa.", 1, "block", "stride", "select_block", "window")
        for name in ("block", "select_block"):
            if getattr(self, name) % self.stride:
                raise ValueError(
                    f"nsa.{name}: got {getattr(self, name)}, "
                    f"expected a multiple of the stride, {self.stride}"
                )
        if self.top_k < 3:
            raise ValueError(
                f"nsa.top_k: got {self.top_k}, expected at least 3, the blocks that are forced"
            )
        _one_of(self, "nsa.", choice=("token", "tile"))


@dataclass(frozen=True, kw_only=True, slots=True)
class MoBAConfig:
    """Sizes of mixture of block attention: keys of a block, and blocks that a query sees."""

    block: int = 512  # keys in a block
    top_k: int = 3  # blocks a query sees, its own included
    # attention of single new tokens; the paper serves with full
    decode: Literal["sparse", "full"] = "sparse"
    # what selects blocks: each token, or (ours) the first of a tile of 128 for all of them
    choice: Choice = "token"
    full_layers: int = 0  # number of last layers that attend fully; the paper: 3 of 32
    # share of the training steps after which all layers attend fully; the paper: 0.9
    full_from: float = 1.0

    def __post_init__(self) -> None:
        if self.full_layers < 0 or not 0 <= self.full_from <= 1:
            got = f"got full_layers {self.full_layers}, full_from {self.full_from}"
            raise ValueError(f"moba: {got}, expected at least 0 layers, a share of 0..1")
        _at_least(self, "moba.", 1, "block", "top_k")
        _one_of(self, "moba.", decode=("sparse", "full"), choice=("token", "tile"))


@dataclass(frozen=True, kw_only=True, slots=True)
class DSAConfig:
    """Sizes of the indexer, and how it is trained.

    DeepSeek-V3.2: 64 heads of 128, top-k 2048, 1000 steps.
    """

    heads: int = 4
    dim: int = 32  # per head, at least MLA's rope_dim
    top_k: int = 2048  # keys a query sees
    warmup: int = 1000  # steps in which MLA attends to every key and the loss is over every key
    # of the indexer loss, a mean over layers; its gradient reaches only the indexers
    weight: float = 1.0
    # steps before the warm-up, in which MLA attends to every key and the indexers are not trained
    dense: int = 0
    interleaved: bool = False  # the indexer's rope rotates pairs (2i, 2i+1), not (i, i + rope/2)
    # blocks without an indexer, which attend to the keys that the nearest block before selected
    shared: tuple[int, ...] = ()
    # Of keys of equal score the latest are selected, however the tokens reach the model, or those
    # that torch.topk returns for all keys of the call, as transformers' models do.
    ties: Literal["last", "topk"] = "last"

    def __post_init__(self) -> None:
        _at_least(self, "dsa.", 1, "heads", "dim", "top_k")
        _at_least(self, "dsa.", 0, "warmup", "weight", "dense")
        if self.shared and min(self.shared) < 1:
            raise ValueError(
                f"dsa.shared: got {self.shared}, expected block indices from 1: "
                "the first block has nothing to share"
            )
        _one_of(self, "dsa.", ties=("last", "topk"))

    def check_rope_dim(self, rope_dim: int) -> None:
        """Refuses a surrounding attention that rotates more than the indexer's heads hold."""
        if self.dim < rope_dim:
            raise ValueError(f"dsa.dim: got {self.dim}, expected at least mla.rope_dim, {rope_dim}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CSAConfig:
    """Sizes of attention to a window and to compressed entries; its keys are also its values.

    DeepSeek-V4-Flash: 64 heads of 512, 64 rotated, query rank 1024, 8 groups of rank 1024, window
    128, ratios 4 and 128, an indexer of 64 heads of 128 that selects 512 entries.
    """

    heads: int = 4
    head_dim: int = 16  # of queries and of the one key, which is also the value
    rope_dim: int = 8  # the last values of a head, rotated
    q_lora_rank: int = 32
    groups: int = 2  # of heads, which share a low-rank output projection
    o_lora_rank: int = 16  # of one group
    window: int = 128  # keys a query sees uncompressed, itself included
    # What each block sees before its window: nothing, the top_k entries of an indexer (csa), or all
    # entries (hca). MTP's blocks come after the model's; blocks after the list's end see nothing.
    kinds: tuple[CSAKind, ...] = ()
    ratio: int = 4  # tokens of a csa entry, which overlaps with the one before
    heavy_ratio: int = 128  # tokens of an hca entry
    index_heads: int = 4
    index_dim: int = 16  # per head, at least rope_dim
    top_k: int = 512  # entries that a query of a csa block sees
    # Which of equal scores are selected. last: the last ones, however tokens are split into calls;
    # topk: those of torch.topk over all entries of a call, as transformers does. Scores of 0 are
    # often equal.
    ties: Literal["last", "topk"] = "last"
    # Rotary positions of the blocks with entries; the model's are those of the others.
    compress_rope: RopeConfig = field(default_factory=lambda: RopeConfig(base=160000.0))
    warmup: int = 1000  # steps in which csa blocks see every entry and the loss is over all
    weight: float = 1.0  # of the indexer loss

    def __post_init__(self) -> None:
        widths = ("heads", "head_dim", "q_lora_rank", "groups", "o_lora_rank", "window")
        sizes = ("ratio", "heavy_ratio", "index_heads", "index_dim", "top_k")
        _at_least(self, "csa.", 1, *widths, *sizes)
        _at_least(self, "csa.", 0, "warmup", "weight")
        if self.heads % self.groups:
            raise ValueError(
                f"csa.groups: got {self.groups}, expected a divisor of {self.heads} heads"
            )
        if self.rope_dim % 2 or not 2 <= self.rope_dim <= min(self.head_dim, self.index_dim):
            raise ValueError(
                f"csa.rope_dim: got {self.rope_dim}, expected an even width up to head_dim "
                f"{self.head_dim} and index_dim {self.index_dim}"
            )
        _one_of(self, "csa.", ties=("last", "topk"))
        if self.compress_rope.varies:
            raise ValueError(
                "csa.compress_rope: got dynamic or longrope, expected a kind whose frequencies are "
                "the same in every call"
            )
        if wrong := [kind for kind in self.kinds if kind not in CSA_KINDS]:
            raise ValueError(f"csa.kinds: got {wrong[0]!r}, expected one of {', '.join(CSA_KINDS)}")

    def kind(self, index: int) -> CSAKind:
        """Returns what block `index` sees before its window, by `kinds`; "window" is nothing."""
        return self.kinds[index] if index < len(self.kinds) else "window"


@dataclass(frozen=True, kw_only=True, slots=True)
class CSA2Config:
    """The blocks that compress tokens to entries, and those that use an earlier block's entries.

    It works inside `csa`, which has the sizes of heads, window and indexer. DeepSeek-V4.1-Flash: 2
    blocks with a window alone, 18 of ratio 2, 20 of ratio 1; sources 2, 8, 14, 20; 24, 28, 32 and
    36 select anew.
    """

    # Tokens of an entry in each block; 0: a window alone. Blocks after the last one of this list
    # have a window alone.
    ratios: tuple[int, ...] = ()
    # Blocks that compress: their entries serve until the next of them. Each selects, too.
    kv_sources: tuple[int, ...] = ()
    index_sources: tuple[int, ...] = ()  # blocks that select entries; the others keep the selection
    # A block of kv_sources that also selects coarse blocks of entries, among which later
    # index_sources select; None: later ones select among all.
    candidate_source: int | None = None
    candidate_block: int = 8  # entries of a coarse block
    candidate_blocks: int = 2048  # coarse blocks that a query keeps
    # How cached values are rounded, in training, too: not at all, or as DeepSeek-V4.1 stores them
    # (window keys fp8, entries nvfp4, the indexer's queries and keys mxfp4).
    cache_formats: Literal["none", "published"] = "none"

    def __post_init__(self) -> None:
        if min(self.ratios, default=0) < 0:
            raise ValueError(f"csa2.ratios: got {self.ratios}, expected 0 or more for each block")
        _at_least(self, "csa2.", 1, "candidate_block", "candidate_blocks")
        _one_of(self, "csa2.", cache_formats=("none", "published"))
        for name in ("kv_sources", "index_sources"):
            sources = getattr(self, name)
            if list(sources) != sorted(set(sources)) or min(sources, default=0) < 0:
                raise ValueError(
                    f"csa2.{name}: got {sources}, expected rising block indices from 0"
                )
        if lacking := set(self.kv_sources) - set(self.index_sources):
            raise ValueError(
                f"csa2.index_sources: got {self.index_sources}, "
                f"expected {min(lacking)}, too, which compresses"
            )
        if self.candidate_source is not None and self.candidate_source not in self.kv_sources:
            raise ValueError(
                f"csa2.candidate_source: got {self.candidate_source}, "
                f"expected a block of kv_sources {self.kv_sources}, or none"
            )
        self._check_sources()

    def _check_sources(self) -> None:
        """Refuses blocks whose entries no block before them makes."""
        ratio = 0
        for index, own_ratio in enumerate(self.ratios):
            if own_ratio == 0:
                if index in self.index_sources:
                    raise ValueError(
                        f"csa2.index_sources: got block {index}, whose ratio is 0, "
                        "expected blocks with entries"
                    )
                continue
            if index in self.kv_sources:
                ratio = own_ratio
            if ratio != own_ratio:
                raise ValueError(
                    f"csa2.ratios: got {own_ratio} for block {index}, expected {ratio} as its "
                    "entries have, or the block among kv_sources"
                )
        if late := [index for index in self.index_sources if index >= len(self.ratios)]:
            raise ValueError(
                f"csa2.index_sources: got block {late[0]}, expected one of the {len(self.ratios)} "
                "that ratios names"
            )
        source = self.candidate_source
        for index in self.kv_sources:
            if source is None or index < source or self.ratio(index) == self.ratio(source):
                continue
            raise ValueError(
                f"csa2.kv_sources: got {index} of ratio {self.ratio(index)} after candidate_source "
                f"{source}, expected its ratio, {self.ratio(source)}, which its coarse blocks have"
            )

    def ratio(self, index: int) -> int:
        """Returns the tokens of an entry in block `index`; 0 for a window alone."""
        return self.ratios[index] if index < len(self.ratios) else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class QSAConfig:
    """Sizes of the indexer that selects blocks of keys for grouped-query attention.

    Qwen3.8-Flash-Next: 4 heads of 128, blocks of 4 keys, a budget of 2048 keys.
    """

    heads: int = 4
    dim: int = 32  # per head, at least the rotated width of gqa's heads
    block: int = 4  # keys in a block
    budget: int = 2048  # keys of the blocks that a query selects, a multiple of `block`

    def __post_init__(self) -> None:
        _at_least(self, "qsa.", 1, "heads", "dim", "block", "budget")
        if self.budget % self.block:
            raise ValueError(
                f"qsa.budget: got {self.budget} keys, expected a multiple of the {self.block} of "
                "a block"
            )

    @property
    def top_k(self) -> int:
        """Blocks that a query selects, besides the incomplete one that it is in."""
        return self.budget // self.block

    def check_rope(self, rope: RopeConfig, rope_dim: int) -> None:
        """Refuses rotary positions that the indexer's heads and keys cannot have."""
        if self.dim < rope_dim:
            raise ValueError(
                f"qsa.dim: got {self.dim}, expected at least the {rope_dim} values that gqa rotates"
            )
        if rope.varies:
            kind = "dynamic" if rope.dynamic is not None else "longrope"
            raise ValueError(
                f"rope: got {kind} with qsa, whose keys of blocks stay as they are, expected "
                "frequencies that no later position changes"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaNetConfig:
    """Sizes of gated delta net, and the blocks that have it in place of attention.

    Qwen3.8-Flash-Next: 16 key heads and 48 value heads of 128, in three of four blocks.
    """

    key_heads: int = 2
    value_heads: int = 4  # a multiple of key_heads; each has a state [key_dim, value_dim]
    key_dim: int = 16  # per head
    value_dim: int = 16  # per head
    kernel: int = 4  # taps of the convolution over queries, keys and values
    gate: Literal["silu", "sigmoid"] = "silu"  # of the output's norm
    norm_eps: float = 1e-6  # of that norm
    full_every: int = 4  # every so many-th block has attention
    layers: tuple[int, ...] | None = None  # the blocks that have delta net; None: by full_every

    def __post_init__(self) -> None:
        sizes = ("key_heads", "value_heads", "key_dim", "value_dim", "kernel", "full_every")
        _at_least(self, "delta.", 1, *sizes)
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"delta.value_heads: got {self.value_heads}, "
                f"expected a multiple of {self.key_heads} key heads"
            )
        _one_of(self, "delta.", gate=("silu", "sigmoid"))
        if self.layers is not None and (
            len(set(self.layers)) < len(self.layers) or min(self.layers, default=0) < 0
        ):
            raise ValueError(
                f"delta.layers: got {self.layers}, expected different block indices from 0, or None"
            )

    def replaces(self, index: int) -> bool:
        """Returns whether block `index` has delta net in place of attention."""
        if self.layers is None:
            return (index + 1) % self.full_every != 0
        return index in self.layers

    @property
    def conv_width(self) -> int:
        """Width of queries, keys and values together, which the convolution is over."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Settings of the router: how a token's experts are scored, selected and weighted."""

    score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "sigmoid"
    groups: int = 1  # number of equal groups of experts
    groups_kept: int = 1  # groups from which a token takes all of its experts
    group_score: Literal["top2", "max"] = "top2"
    renormalise: bool = True  # weights of the selected experts sum to `scale`
    scale: float = 1.0  # of the routed weights; shared experts have none
    bias: bool = True  # a bias on the selection, moved by loss-free balancing
    noise: float = 0.0  # standard deviation of the noise on the logits in training
    # experts are taken, best first, until they hold this share of the scores
    adaptive_mass: float | None = None
    min_active: int = 1  # experts that adaptive_mass takes at least
    token_id_layers: int = 0  # number of first layers that select experts by token id
    other_token_id_layers: tuple[int, ...] = ()  # and the others that do
    # raw ids of image tokens, whose selection has a bias of its own; (): there is none
    image_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _one_of(self, "router.", score=ROUTER_SCORES, group_score=GROUP_SCORES)
        if not 1 <= self.groups_kept <= self.groups:
            raise ValueError(
                f"router.groups_kept: got {self.groups_kept}, "
                f"expected 1 to the {self.groups} groups"
            )
        if not self.scale > 0:
            raise ValueError(f"router.scale: got {self.scale}, expected more than 0")
        _at_least(self, "router.", 0, "noise")
        if self.adaptive_mass is not None and not 0 < self.adaptive_mass <= 1:
            raise ValueError(
                f"router.adaptive_mass: got {self.adaptive_mass}, expected more than 0, at most 1"
            )
        _at_least(self, "router.", 1, "min_active")
        _at_least(self, "router.", 0, "token_id_layers")

    def by_token_id(self, layer: int) -> bool:
        """Returns whether the router of a block selects experts by token id."""
        return layer < self.token_id_layers or layer in self.other_token_id_layers

    def bias_of(self, layer: int) -> bool:
        """Returns whether the router of a block has a bias: none has that selects by token id."""
        return self.bias and not self.by_token_id(layer)


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    """Coefficients of the balance losses; 0 leaves a loss out.

    Device d holds the d-th of `devices` equal groups of experts.
    """

    bias_rate: float = 1e-3  # gamma of the loss-free bias
    sequence: float = 1e-4
    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0
    devices: int = 1  # D, devices that hold the experts
    device_limit: int = 1  # M, devices that a token's experts may be on
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        losses = ("sequence", "expert", "device", "communication", "z_loss")
        _at_least(self, "balance.", 0, "bias_rate", *losses)
        _at_least(self, "balance.", 1, "devices")
        if not 1 <= self.device_limit <= self.devices:
            raise ValueError(
                f"balance.device_limit: got {self.device_limit}, "
                f"expected 1 to the {self.devices} of balance.devices"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """A mixture of `routed` experts, `active` of them a token, and shared experts.

    Every token takes the shared experts.
    """

    routed: int = 32  # E, routed experts
    active: int = 2  # K, routed experts of a token
    shared: int = 1  # shared experts, built as one SwiGLU; 0 for none
    width: int = 32  # hidden width of one expert
    shared_width: int | None = None  # width of the shared SwiGLU; None: shared * width
    shared_gate: bool = False  # the shared experts' output is multiplied by sigmoid(<w, x>)
    first_dense: int = 0  # blocks before this one have a dense feed-forward
    # Clips the gate of experts and of shared ones from above, and their other factor on both sides.
    swiglu_limit: float | None = None
    dense_layers: tuple[int, ...] = ()  # blocks after these that have one too
    norm_eps: float | None = None  # of an RMSNorm of the output (A.X-K1); None: no norm
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)

    def __post_init__(self) -> None:
        _at_least(self, "moe.", 1, "routed", "width")
        _at_least(self, "moe.", 0, "shared", "first_dense")
        if not 1 <= self.active <= self.routed:
            raise ValueError(
                f"moe.active: got {self.active}, expected 1 to the {self.routed} routed experts"
            )
        if self.shared_width is not None and (self.shared_width < 1 or not self.shared):
            raise ValueError(
                f"moe.shared_width: got {self.shared_width} with shared {self.shared}, "
                "expected at least 1 of each"
            )
        if self.swiglu_limit is not None and not self.swiglu_limit > 0:
            raise ValueError(
                f"moe.swiglu_limit: got {self.swiglu_limit}, expected more than 0 or None"
            )
        if self.shared_gate and not self.shared:
            raise ValueError("moe.shared_gate: got no shared expert, expected one that it gates")
        self._check_groups()
        if self.router.min_active > self.active:
            raise ValueError(
                f"router.min_active: got {self.router.min_active}, "
                f"expected at most active, {self.active}"
            )
        if self.routed % self.balance.devices:
            raise ValueError(
                f"balance.devices: got {self.balance.devices}, "
                f"expected a divisor of {self.routed} experts"
            )

    def _check_groups(self) -> None:
        """Raises ValueError unless the groups are equal, and those selected have enough experts."""
        router = self.router
        if self.routed % router.groups:
            raise ValueError(
                f"router.groups: got {router.groups}, expected a divisor of {self.routed} experts"
            )
        size = self.routed // router.groups
        if router.groups_kept * size < self.active:
            raise ValueError(
                f"router.groups_kept: got {router.groups_kept} groups of {size}, "
                f"expected room for {self.active}"
            )
        if router.groups_kept < router.groups and router.group_score == "top2" and size < 2:
            raise ValueError(
                "router.group_score: got 'top2' with groups of one expert, expected 'max'"
            )

    @property
    def shared_hidden(self) -> int:
        """Width of the shared SwiGLU, 0 without one."""
        return self.shared * self.width if self.shared_width is None else self.shared_width


@dataclass(frozen=True, kw_only=True, slots=True)
class EngramConfig:
    """The blocks that have Engram, the sizes of their memory, and its variants.

    Every production variant is one setting of these fields.
    """

    layers: tuple[int, ...] = (1,)  # blocks with Engram, counted from 0
    # one for each n-gram order, 2 first; rounded up to primes
    rows_per_head: tuple[int, ...] = (4096, 4096)
    # Rows of each layer's table where files pad it; None: as many as are looked up, the sum of the
    # primes.
    table_rows: tuple[int, ...] | None = None
    heads: int = 4  # hash heads of each order
    head_dim: int = 16  # width of a row
    kernel: int = 4  # taps of the convolution over time
    dilation: int | None = None  # tokens between two taps; None: the largest n-gram
    conv: bool = True
    bias: bool = False  # of the key and value projections
    # a gate for each stream; one, of their mean; or none, always 1
    gating: Literal["streams", "shared", "open"] = "streams"
    # of the square root at a score of exactly 0: gate 1/2, or a little more
    sign: Literal["sign", "copysign"] = "sign"
    eps: float = 1.1920929e-7  # of the gate's norms; the default of torch's rms_norm
    conv_eps: float = 1e-5  # of the norm before the convolution
    centred: bool = False  # the weights of its norms are stored less one, so that they start at 0
    seed: int = 0
    # what draws the multipliers: numpy's default generator (DeepSeek), or splitmix64 (Qwen)
    generator: Literal["numpy", "splitmix64"] = "numpy"
    canonical: bool = True  # hash canonical ids; False: raw ones
    pad_id: int = 0  # raw id that replaces missing left context
    # raw id that ends a text: look-back stops at it, and it replaces missing left context in place
    # of pad_id
    eos_id: int | None = None
    end_of_document: bool = True  # look-back and convolution stop where a document begins
    # raw ids (images) that look-back stops at and that look nothing up
    dead_tokens: tuple[int, ...] = ()
    # a table's rows are rounded up to a multiple of it; no hash reaches the rows that this adds
    row_multiple: int = 1
    shards: int = 1  # tensors that a published folder splits a table into

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise ValueError(
                f"engram.layers: got {self.layers}, expected different block indices from 0"
            )
        if not self.rows_per_head or min(self.rows_per_head) < 2:
            raise ValueError(
                f"engram.rows_per_head: got {self.rows_per_head}, "
                "expected 2 or more for each n-gram order"
            )
        if self.table_rows is not None and len(self.table_rows) != len(self.layers):
            raise ValueError(
                f"engram.table_rows: got {len(self.table_rows)} tables, "
                f"expected one for each of the {len(self.layers)} layers, or none"
            )
        _at_least(
            self, "engram.", 1, "heads", "head_dim", "kernel", "dilation", "row_multiple", "shards"
        )
        _one_of(self, "engram.", sign=("sign", "copysign"))
        _one_of(self, "engram.", gating=("streams", "shared", "open"))
        _one_of(self, "engram.", generator=("numpy", "splitmix64"))
        if self.eos_id is not None and self.eos_id < 0:
            raise ValueError(
                f"engram.eos_id: got {self.eos_id}, expected an id of the tokenizer, or none"
            )
        if min(self.seed, self.pad_id, *self.dead_tokens) < 0:
            got = f"seed {self.seed}, pad_id {self.pad_id}, dead_tokens {self.dead_tokens}"
            raise ValueError(f"engram: got {got}, expected none negative")

    @property
    def ngram(self) -> int:
        """N, the largest n-gram."""
        return len(self.rows_per_head) + 1

    @property
    def rows_per_token(self) -> int:
        """R, the rows that one token reads in one layer."""
        return self.heads * len(self.rows_per_head)

    @property
    def memory_width(self) -> int:
        """M, the width of what one token looks up in one layer."""
        return self.rows_per_token * self.head_dim

    @property
    def missing_id(self) -> int:
        """The raw id that replaces missing left context."""
        return self.pad_id if self.eos_id is None else self.eos_id

    def unknown_missing_id(self, ids: int) -> ValueError:
        """Returns the error for a missing_id that a tokenizer of so many ids does not have."""
        name = "pad_id" if self.eos_id is None else "eos_id"
        return ValueError(
            f"engram.{name}: got {self.missing_id}, expected an id of the tokenizer, below {ids}"
        )

    def gates(self, streams: int) -> int:
        """Returns the number of keys, and of different gates, that a token has in one layer."""
        return {"streams": streams, "shared": 1, "open": 0}[self.gating]

    @property
    def halo(self) -> int:
        """Number of earlier tokens that the convolution of one token reads."""
        return (self.kernel - 1) * (self.dilation or self.ngram) if self.conv else 0


def _is_prime(n: int) -> bool:
    """Returns whether n is a prime number, by trial division."""
    return n == 2 or (n > 2 and n % 2 == 1 and all(n % d for d in range(3, math.isqrt(n) + 1, 2)))


def head_primes(config: EngramConfig) -> list[list[list[int]]]:
    """Returns the primes of the heads, [Lm][N-1][J].

    Each head has the next prime >= its order's rows_per_head that no head before it has taken.
    """
    taken: set[int] = set()
    layers = []
    for _ in config.layers:
        orders = []
        for rows in config.rows_per_head:
            free = (n for n in itertools.count(rows) if n not in taken and _is_prime(n))
            primes = list(itertools.islice(free, config.heads))
            taken.update(primes)
            orders.append(primes)
        layers.append(orders)
    return layers


def row_totals(config: EngramConfig) -> tuple[int, ...]:
    """Returns the rows of each table: `table_rows`, or the sum of primes up to a `row_multiple`.

    ValueError if the table has fewer than are looked up.
    """
    multiple = config.row_multiple
    sums = tuple(sum(map(sum, orders)) for orders in head_primes(config))
    rows = config.table_rows or tuple(-(-rows // multiple) * multiple for rows in sums)
    for layer, got, least in zip(config.layers, rows, sums, strict=True):
        if got < least:
            raise ValueError(
                f"engram.table_rows: got {got} for layer {layer}, expected at least the {least} "
                "that are looked up"
            )
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class HyperConfig:
    """Settings of the residual streams: how many, how they are mixed, how they start."""

    kind: Literal["mhc", "single_pass", "hc", "gated"] = "mhc"
    streams: int = 4
    rank: int = 320  # of the input's weights; gated only
    iterations: int = 20  # Sinkhorn normalisations of each axis
    eps: float = 1e-6  # of the Sinkhorn sums and of pre; 0 in the paper, 1e-6 in DeepSeek-V4
    norm_eps: float = 1e-6  # inside the root of the norm
    mix: Literal["sinkhorn", "identity"] = "sinkhorn"  # how the streams mix; identity: not at all
    scale: float = 0.01  # a, the start of every learned scale
    # start of comb's diagonal logits; far above 5 their gradient nearly vanishes
    identity: float = 2.0

    def __post_init__(self):
        _one_of(self, "hyper.", kind=("mhc", "single_pass", "hc", "gated"))
        _one_of(self, "hyper.", mix=("sinkhorn", "identity"))
        _at_least(self, "hyper.", 1, "streams", "iterations", "rank")
        _at_least(self, "hyper.", 0, "eps")
        if not self.norm_eps > 0:
            raise ValueError(f"hyper.norm_eps: got {self.norm_eps}, expected more than 0")
        if self.kind == "hc" and self.mix != "sinkhorn":
            raise ValueError(
                f"hyper.mix: got {self.mix!r} with kind='hc', "
                "whose mix is its own; leave it as it is"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MTPConfig:
    """The number of tokens beyond the next that are predicted, and the weight of their loss."""

    depth: int = 1
    weight: float = 0.3  # lambda, of the mean over depths; V3 lowers it to 0.1 late in training
    # Whether the modules work on the streams of hyper-connections (of kind mhc), as DeepSeek-V4's
    # do; otherwise on the one hidden state that these are reduced to.
    streams: bool = False

    def __post_init__(self) -> None:
        _at_least(self, "mtp.", 1, "depth")
        _at_least(self, "mtp.", 0, "weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Every size of a model. A part is off if its config is None.

    Exactly one of `mla`, `gqa` and `csa` is on.
    """

    vocab_size: int = 4096  # ids that the embedding and the head have
    dim: int = 64  # width of the hidden states
    layers: int = 3  # blocks
    dense_width: int = 256  # SwiGLU width of blocks without experts
    mla: MLAConfig | None = field(default_factory=MLAConfig)
    gqa: GQAConfig | None = None
    nsa: NSAConfig | None = None  # selects keys of gqa
    moba: MoBAConfig | None = None  # selects keys of gqa
    dsa: DSAConfig | None = None  # selects keys of mla
    csa: CSAConfig | None = None
    csa2: CSA2Config | None = None  # entries of csa that blocks share
    qsa: QSAConfig | None = None  # selects keys of gqa
    delta: DeltaNetConfig | None = None  # in place of attention in most blocks
    rope: RopeConfig = field(default_factory=RopeConfig)
    moe: MoEConfig | None = None
    engram: EngramConfig | None = None
    hyper: HyperConfig | None = None
    mtp: MTPConfig | None = None
    tied: bool = False  # the head is the embedding
    eps: float = 1e-6  # of every RMSNorm but Engram's own
    init_std: float = 0.006  # standard deviation of matrices at the start

    def __post_init__(self) -> None:
        _at_least(self, "", 1, "vocab_size", "dim", "layers", "dense_width")
        attention = [name for name in ("mla", "gqa", "csa") if getattr(self, name) is not None]
        if len(attention) != 1:
            raise ValueError(
                f"attention: got {' and '.join(attention) or 'none'}, "
                "expected exactly one of mla, gqa and csa"
            )
        inside = ("nsa", "gqa"), ("moba", "gqa"), ("qsa", "gqa"), ("dsa", "mla"), ("csa2", "csa")
        for inner, outer in inside:
            if getattr(self, inner) is not None and getattr(self, outer) is None:
                raise ValueError(
                    f"{inner}: got attention {attention[0]}, "
                    f"expected {outer}, which it works inside"
                )
        self._check_blocks()
        kind = self.hyper.kind if self.hyper is not None else "none"
        if self.mtp is not None and self.mtp.streams and kind != "mhc":
            raise ValueError(f"mtp.streams: got hyper.kind {kind}, expected mhc")
        sparse = [name for name in ("nsa", "moba", "qsa") if getattr(self, name) is not None]
        if len(sparse) > 1:
            raise ValueError(f"sparse attention: got {' and '.join(sparse)}, expected at most one")

    def _check_blocks(self) -> None:
        """Refuses settings of single blocks that do not fit the number of blocks."""
        if self.delta is not None and (
            late := [i for i in self.delta.layers or () if i >= self.layers]
        ):
            raise ValueError(
                f"delta.layers: got {late}, expected block indices 0..{self.layers - 1}"
            )
        by_token_id = self.moe.router.other_token_id_layers if self.moe is not None else ()
        blocks = self.layers + (self.mtp.depth if self.mtp is not None else 0)
        if wrong := [i for i in by_token_id if not 0 <= i < blocks]:
            raise ValueError(
                f"moe.router.other_token_id_layers: got {wrong}, "
                f"expected block indices 0..{blocks - 1}"
            )
        if self.csa is not None and 0 < len(self.csa.kinds) < self.layers:
            raise ValueError(
                f"csa.kinds: got {len(self.csa.kinds)} kinds, "
                f"expected one for each of the {self.layers} blocks, or none"
            )
        if self.csa2 is not None and self.csa is not None and self.csa.kinds:
            raise ValueError(
                "csa.kinds: got kinds together with csa2, expected none: csa2.ratios says it"
            )
        if self.csa2 is not None and len(self.csa2.ratios) < self.layers:
            raise ValueError(
                f"csa2.ratios: got {len(self.csa2.ratios)}, "
                f"expected one for each of the {self.layers} blocks"
            )
        if self.engram is not None and (
            late := [i for i in self.engram.layers if not 0 <= i < self.layers]
        ):
            raise ValueError(
                f"engram.layers: got {late}, expected block indices 0..{self.layers - 1}"
            )
        if self.dsa is not None and len(set(self.dsa.shared)) < len(self.dsa.shared):
            raise ValueError(f"dsa.shared: got {self.dsa.shared}, expected different blocks")
        if self.dsa is not None and (
            late := [i for i in self.dsa.shared if not 1 <= i < self.layers]
        ):
            raise ValueError(f"dsa.shared: got {late}, expected block indices 1..{self.layers - 1}")
        if self.moe is not None and self.moe.first_dense > self.layers:
            raise ValueError(
                f"moe.first_dense: got {self.moe.first_dense}, "
                f"expected at most {self.layers} layers"
            )

    @property
    def parts(self) -> list[str]:
        """The names of the parts that are on, attention first.

        Parts are the fields that hold a config, but for rope, which every model has.
        """
        names = [each.name for each in fields(self) if each.name != "rope"]
        return [name for name in names if is_dataclass(getattr(self, name))]

    @property
    def streams(self) -> int:
        """Number of residual streams; 1 without hyper-connections."""
        return self.hyper.streams if self.hyper is not None else 1

    @property
    def indexer(self) -> DSAConfig | CSAConfig | None:
        """The config that trains the indexers, with `warmup` and `weight`; None without any."""
        if self.csa is not None and ("csa" in self.csa.kinds or self.csa2 is not None):
            return self.csa
        return self.dsa

    @property
    def gated_residual(self) -> bool:
        """Whether the sites of the residual streams norm what they read, so that no block does."""
        return self.hyper is not None and self.hyper.kind == "gated"

    @property
    def rope_dim(self) -> int:
        """Number of values of a head's queries and keys that are rotated."""
        if self.mla is not None:
            return self.mla.rope_dim
        if self.csa is not None:
            return self.csa.rope_dim
        assert self.gqa is not None
        return self.gqa.rotated

    def has_delta(self, index: int) -> bool:
        """Returns whether block `index` has gated delta net; MTP's blocks have attention."""
        return self.delta is not None and index < self.layers and self.delta.replaces(index)

    def has_experts(self, index: int) -> bool:
        """Returns whether block `index` has experts; MTP's blocks, which follow the last, have."""
        return (
            self.moe is not None
            and index >= self.moe.first_dense
            and index not in self.moe.dense_layers
        )

    def has_engram(self, index: int) -> bool:
        """Returns whether block `index` has Engram; MTP's blocks never have."""
        return self.engram is not None and index in self.engram.layers

    def check_parts(self) -> None:
        """Refuses parts that do not fit each other, as building the model would."""
        if self.gqa is not None and (self.nsa or self.moba or self.qsa) is not None:
            self.gqa.check_sparse()
        if self.gqa is not None and (self.nsa or self.moba) is not None:
            self.gqa.check_plain()
        if self.gqa is not None and self.qsa is not None:
            self.qsa.check_rope(self.rope, self.gqa.rotated)
        if self.mla is not None and self.dsa is not None:
            self.dsa.check_rope_dim(self.mla.rope_dim)
        if self.engram is not None and self.engram.missing_id >= self.vocab_size:
            raise self.engram.unknown_missing_id(self.vocab_size)
