"""The language model: its blocks, its cache, its losses and its initial values.

    x_0     = embed(ids), copied to S streams                 one stream without hyper-connections
    x      <- x + engram(x)                                   blocks with Engram
    x      <- H_res x + H_post^T attention(norm(H_pre x))     x + attention(norm(x)) for one stream
    x      <- H_res x + H_post^T ffn(norm(H_pre x))           dense first, then experts
    logits  = head(norm(reduce(x_n)))                         streams are reduced to one state

With gated residuals the sites of the streams norm what they read; no block has norms of its own,
nor has the head. DeepSeek-V3 (arXiv 2412.19437), mHC (2512.24880), Engram (2601.07372).
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import starmap
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.layers.attention import GQA, MLA
from rorqual.layers.balance import losses
from rorqual.layers.cache import Appended, BlockCache, Cache, DraftCache, Past
from rorqual.layers.context import Context, context
from rorqual.layers.cross_entropy import chunked_cross_entropy
from rorqual.layers.csa import CSA, HCA, SharedKV
from rorqual.layers.csa2 import CSA2
from rorqual.layers.delta_net import DeltaNet
from rorqual.layers.dsa import DSA, IndexerLoss, mean_indexer_loss
from rorqual.layers.engram import Addresses, Engram
from rorqual.layers.feed_forward import SwiGLU
from rorqual.layers.gated_residual import GatedReduction, GatedResidual
from rorqual.layers.hyper import Connection, Residual, StreamReduction, Streams, expand
from rorqual.layers.moba import MoBA
from rorqual.layers.moe import MoE
from rorqual.layers.mtp import MTP, ahead
from rorqual.layers.norm import CentredRMSNorm, RMSNorm
from rorqual.layers.nsa import NSA
from rorqual.layers.qsa import QSA
from rorqual.layers.router import Routing
from rorqual.model_config import HyperConfig, row_totals
from rorqual.model_config import ModelConfig as ModelConfig
from rorqual.tables import Handle, Table

IGNORED = -100  # a label that is no target
ROW_STD = 0.02  # standard deviation of Engram's rows at the start


class Loss(NamedTuple):
    """The loss of a batch and its parts, in nats; `total` is what is minimised."""

    total: Float[Tensor, ""]
    next_token: Float[Tensor, ""]  # mean over the labels that are targets
    mtp: Float[Tensor, ""] | None  # mean over depths, unweighted
    balance: dict[str, Tensor]  # weighted, summed over layers
    counts: Int[Tensor, "layers E"] | None  # tokens of each expert
    tokens: Int[Tensor, ""]  # number of labels that are targets
    # loss of the indexers of DSA and CSA, in training; the mean over layers
    indexer_loss: IndexerLoss | None = None


class Target(NamedTuple):
    """What one head predicts at each position."""

    labels: Int[Tensor, "B T"]
    tokens: Int[Tensor, ""]  # number of labels that are targets
    following: Int[Tensor, "B T"] | None = None  # the ids that a depth of MTP reads
    # Where the positions are one of several parts of the sequences: `tokens` counts those of all,
    # and the mean of the parts' losses is that of the whole.
    parts: int = 1

    @classmethod
    def of(
        cls, labels: Int[Tensor, "B T"], following: Int[Tensor, "B T"] | None = None
    ) -> "Target":
        """Makes the target of whole sequences, with its labels counted."""
        return cls(labels, (labels != IGNORED).sum(), following)


class Aux(NamedTuple):
    """A block's outputs besides the streams, for losses and measures; None if it lacks the part."""

    indexer_loss: IndexerLoss | None  # loss of its indexer, in training
    routing: Routing | None  # routing of its mixture of experts
    shared: Any = None  # what its attention leaves for later blocks: Context.shared


def _attention(config: ModelConfig, index: int) -> MLA | GQA | SharedKV | DeltaNet:
    """Builds the attention of block `index` that the config gives it."""
    if config.delta is not None and config.has_delta(index):
        return DeltaNet(config.delta, config.dim)
    if config.csa is not None and config.csa2 is not None:
        return CSA2(config.csa2, config.csa, config.dim, config.eps, index)
    if config.csa is not None:
        cls = {"window": SharedKV, "hca": HCA, "csa": CSA}[config.csa.kind(index)]
        return cls(config.csa, config.dim, config.eps)
    if config.mla is not None:
        if config.dsa is not None:
            return DSA(config.dsa, config.mla, config.dim, config.rope, index)
        return MLA(config.mla, config.dim, config.rope)
    assert config.gqa is not None
    if config.nsa is not None:
        return NSA(config.nsa, config.gqa, config.dim, config.rope)
    if config.moba is not None:
        return MoBA(config.moba, config.gqa, config.dim, config.rope, config.layers - index)
    if config.qsa is not None:
        return QSA(config.qsa, config.gqa, config.dim, config.rope)
    return GQA(config.gqa, config.dim, config.rope)


def _residual(
    hyper: HyperConfig | None, dim: int, site: int
) -> Residual | Connection | GatedResidual:
    """Builds one site of the streams, a plain addition without hyper-connections.

    `site` counts the sublayers from 0 through the whole model.
    """
    if hyper is None:
        return Residual()
    return GatedResidual(hyper, dim) if hyper.kind == "gated" else Connection(hyper, dim, site)


class Block(nn.Module):
    """One transformer block: Engram, attention and feed-forward, each added to the streams."""

    def __init__(self, config: ModelConfig, index: int, *, plain: bool = False) -> None:
        """Builds the parts that the config gives to block `index`.

        If `plain` is True, the block has neither hyper-connections nor Engram, as the blocks of MTP
        that works on one hidden state.
        """
        super().__init__()
        hyper = None if plain else config.hyper
        self.engram = (
            Engram(config.engram, config.dim, config.streams)
            if config.engram is not None and config.has_engram(index) and not plain
            else None
        )
        normed = config.gated_residual and not plain
        self.attention_norm = nn.Identity() if normed else RMSNorm(config.dim, config.eps)
        self.attention = _attention(config, index)
        self.ffn_norm = nn.Identity() if normed else RMSNorm(config.dim, config.eps)
        self.ffn: MoE | SwiGLU = (
            MoE(config.moe, config.dim, index, config.vocab_size)
            if config.moe is not None and config.has_experts(index)
            else SwiGLU(config.dim, config.dense_width)
        )
        self.attention_residual = _residual(hyper, config.dim, 2 * index)
        self.ffn_residual = _residual(hyper, config.dim, 2 * index + 1)

    def forward(self, x: Streams, ctx: Context) -> tuple[Streams, Aux]:
        """Adds Engram, attention and feed-forward to the residual streams."""
        if self.engram is not None:
            x = x.add(self.engram(x.values, ctx))
        # h is [B, T, D]; the mapping says how the output is written back to the streams.
        h, mapping = self.attention_residual.read(x)
        attended = self.attention(self.attention_norm(h), ctx)
        # The positions before the last one were needed only for their keys.
        if ctx.last_only:
            mapping = mapping.last(ctx.lengths)
            ctx = ctx.last()
        x = self.attention_residual.write(attended.out, mapping)
        h, mapping = self.ffn_residual.read(x)
        h = self.ffn_norm(h)
        out, routing = self.ffn(h, ctx) if isinstance(self.ffn, MoE) else (self.ffn(h), None)
        aux = Aux(attended.indexer_loss, routing, attended.shared)
        return self.ffn_residual.write(out, mapping), aux

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> BlockCache:
        """Returns an empty cache of the attention and of Engram's convolution."""
        of = (batch, capacity, dtype, device)
        return BlockCache(
            self.attention.new_cache(*of),
            None if self.engram is None else self.engram.new_cache(*of),
        )


class LanguageModel(nn.Module):
    """The whole model, which maps token ids to logits or to a loss.

    `canonical_map` maps the tokenizer's ids to canonical ids for Engram; loading a checkpoint
    restores it.
    """

    def __init__(
        self,
        config: ModelConfig,
        canonical_map: Int[Tensor, " V"] | Int[np.ndarray, " V"] | None = None,
        *,
        seed: int | None = 0,
        tables: Sequence[nn.Module] | None = None,
    ) -> None:
        """Builds the model and draws its values with `init(self, seed)`.

        With seed None the values stay as allocated (loading, meta device). `tables` hold Engram's
        rows, one table a layer; without them the model allocates the rows on its own device.
        """
        super().__init__()
        self.config = config
        # Modules draw values when they are built; `init` sets the values that count.
        with torch.random.fork_rng(devices=[]):
            self._build(config, canonical_map, tables)
        if seed is not None:
            init(self, seed)

    def _build(self, config: ModelConfig, canonical_map, tables) -> None:
        """Builds all modules; their values are set later.

        ValueError if the given tables have other sizes than the config says.
        """
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        blocks = [Block(config, index) for index in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.rope_dim = config.rope_dim
        self.reduction: StreamReduction | GatedReduction | None = None
        if config.hyper is not None:
            kind = GatedReduction if config.gated_residual else StreamReduction
            self.reduction = kind(config.hyper, config.dim)
        self.norm = nn.Identity() if config.gated_residual else RMSNorm(config.dim, config.eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.addresses = (
            Addresses(config.engram, canonical_map, config.vocab_size) if config.engram else None
        )
        shapes = (
            [(rows, config.engram.head_dim) for rows in row_totals(config.engram)]
            if config.engram
            else []
        )
        self.tables = nn.ModuleList(starmap(Table, shapes) if tables is None else tables)
        if (got := [(table.rows, table.width) for table in self.tables]) != shapes:
            raise ValueError(
                f"tables: got rows by width {got}, expected {shapes} as the config says"
            )
        self.mtp = nn.ModuleList()
        for k in range(config.mtp.depth if config.mtp is not None else 0):
            plain = config.mtp is None or not config.mtp.streams
            block = Block(config, config.layers + k, plain=plain)
            reduction = None if plain else StreamReduction(config.hyper, config.dim)
            self.mtp.append(MTP(config.dim, config.eps, block, reduction))

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | Sequence[int] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Returns the logits [B, T, V] of the token after each id, in float32."""
        return self.logits(
            self.hidden(ids, document_ids=document_ids, lengths=lengths, cache=cache)[0]
        )

    def logits(self, hidden: Float[Tensor, "B T *S D"]) -> Float[Tensor, "B T V"]:
        """Computes the logits of `hidden`, taken before the final norm."""
        return self.head(self.head_input(hidden)).float()

    def head_input(self, hidden: Float[Tensor, "B T *S D"]) -> Float[Tensor, "B T D"]:
        """Norms `hidden` for the head; streams are reduced before."""
        return self.norm(self.reduce_streams(Streams(hidden)) if hidden.dim() == 4 else hidden)

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | Sequence[int] | None = None,
        cache: Cache | None = None,
        last: bool = False,
        for_mtp: bool = False,
        indexer_warmup: bool | None = None,
    ) -> tuple[Float[Tensor, "B T2 *S D"], list[Aux]]:
        """Returns the last block's output before the final norm, and the Aux of each block.

        With `for_mtp` it is what MTP's first depth takes: the streams, if it works on them.
        With `last` it is of the last position alone, T2 = 1; the other positions of a prompt skip
        the end of the last block. If `indexer_warmup` is given, the indexers of DSA and CSA are
        trained; while it is True every key is attended to. document_ids [B, T] numbers packed
        documents, which never see each other; lengths [B] is the number of valid tokens of each
        sequence, which padding follows.
        """
        if cache is not None and cache.length and self.cache_is_outdated(cache, ids, lengths):
            return self._hidden_again(ids, document_ids, lengths, cache, last, for_mtp)
        ctx, pending = self.prepare(
            ids,
            cache,
            document_ids=document_ids,
            lengths=lengths,
            indexer_warmup=indexer_warmup,
        )
        x = expand(self.embed(ids), self.config.hyper)  # [B, T, S, D]
        auxes: list[Aux] = []
        for index in range(len(self.blocks)):
            x, ctx, aux = self._run_block(index, x, ctx, cache, pending, last)
            auxes.append(aux)
        return self._output(x, for_mtp), auxes

    def hidden_by_block(
        self, ids: Int[Tensor, "B T"], cache: Cache, *, last: bool = False, for_mtp: bool = False
    ) -> Generator[None, None, tuple[Float[Tensor, "B T2 *S D"], list[Aux]]]:
        """Computes `hidden`, the generator's value, and pauses between two blocks.

        In a pause the model may be called for other sequences, which have caches of their own.
        """
        if cache.length and self.cache_is_outdated(cache, ids):
            return self.hidden(ids, cache=cache, last=last, for_mtp=for_mtp)
        ctx, pending = self.prepare(ids, cache)
        x = expand(self.embed(ids), self.config.hyper)  # [B, T, S, D]
        auxes: list[Aux] = []
        for index in range(len(self.blocks)):
            if index:
                yield
            x, ctx, aux = self._run_block(index, x, ctx, cache, pending, last)
            auxes.append(aux)
        return self._output(x, for_mtp), auxes

    def _run_block(
        self,
        index: int,
        x: Streams,
        ctx: Context,
        cache: Cache | None,
        pending: dict[int, object],
        last: bool,
    ) -> tuple[Streams, Context, Aux]:
        """Runs one block; the context has what its attention leaves for later ones."""
        block_cache = cache.layers[index] if cache is not None else None
        last_only = last and index == self.config.layers - 1
        x, aux = self.blocks[index](x, ctx.for_block(block_cache, pending.get(index), last_only))
        if aux.shared is not None:
            ctx = replace(ctx, shared=aux.shared)
        return x, ctx, aux._replace(shared=None)

    def _output(self, x: Streams, for_mtp: bool) -> Float[Tensor, "B T *S D"]:
        """Returns what the last block's streams are for the head, or for MTP."""
        on_streams = for_mtp and self.config.mtp is not None and self.config.mtp.streams
        return x.values if on_streams else self.reduce_streams(x)

    def prepare(
        self,
        ids: Int[Tensor, "B T"],
        cache: Cache | None = None,
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | Sequence[int] | None = None,
        indexer_warmup: bool | None = None,
    ) -> tuple[Context, dict[int, object]]:
        """Returns the context of a call, and the rows prefetched for each block with Engram.

        The new tokens are counted in the cache.
        """
        ctx = self._context(ids, cache, document_ids, lengths, indexer_warmup)
        if self.addresses is None and cache is not None and cache.ids is not None:
            cache.ids.append(ids, ctx)
        if self.addresses is not None:
            ctx = replace(ctx, lookup_mask=self.addresses.lookup_mask(ids, ctx))
        if cache is not None and cache.announced:
            announced = cache.announced
            cache.announced = []
            if torch.equal(torch.cat([one for one, _ in announced], 1), ids):
                return ctx, _concatenated([fetched for _, fetched in announced])
        return ctx, self._prefetch(ids, ctx, cache.ids if cache is not None else None)

    def announce(self, ids: Int[Tensor, "B T"], cache: Cache) -> None:
        """Starts to fetch the rows of ids that are likely to follow, from tables far from them.

        They follow those that were announced before. A call that reads other ids fetches its own.
        """
        past = cache.past
        tables = (cast(Table, table) for table in self.tables)
        if past.named or not any(table.is_far(ids) for table in tables):
            return
        before = sum(one.shape[1] for one, _ in cache.announced)
        ahead = Past(past.batch)
        ahead.append([length + before for length in past.lengths])
        ctx = context(ids.shape[0], ids.shape[1], ids.device, past=ahead)
        cache.announced.append((ids, self._prefetch(ids, ctx, cache.ids)))

    def cache_is_outdated(
        self,
        cache: Cache,
        ids: Int[Tensor, "B T"],
        lengths: Int[Tensor, " B"] | Sequence[int] | None = None,
    ) -> bool:
        """Returns whether the new tokens change what an uncached call computes for the cached ones.

        They do if an indexer selects among equal scores as torch.topk does, and if the rotary
        frequencies change with the longest position.
        """
        if cache.tied:
            return True
        rope = self.config.rope
        if not rope.varies:
            return False
        counts = [ids.shape[1]] * len(ids) if lengths is None else [int(n) for n in lengths]
        longest = max(map(sum, zip(cache.lengths, counts, strict=True)))
        # Keys are those of the longest that the sequences have been, whatever was cropped since.
        before = max(cache.past.longest)
        if rope.dynamic is not None:
            return max(longest, before) > rope.dynamic.original_length
        assert rope.longrope is not None
        original = rope.longrope.original_length
        return (longest > original) != (before > original) or (
            longest > original and cache.past.named
        )

    def _hidden_again(
        self,
        ids: Int[Tensor, "B T"],
        document_ids: Int[Tensor, "B T"] | None,
        lengths: Int[Tensor, " B"] | Sequence[int] | None,
        cache: Cache,
        last: bool,
        for_mtp: bool,
    ) -> tuple[Tensor, list[Aux]]:
        """Computes the cached tokens again, together with the new ones, and caches them anew."""
        assert cache.ids is not None
        stored = cache.ids.stored
        assert stored is not None
        past = list(cache.past.lengths)
        time = ids.shape[1]
        counts = [time] * len(ids) if lengths is None else [int(n) for n in lengths]
        stored_documents = None
        if cache.past.named or document_ids is not None:
            named = cache.past.document_ids.stored
            stored_documents = torch.zeros_like(stored) if named is None else named
        everything = []
        documents_of_all = []
        for sequence, length in enumerate(past):
            everything.append(torch.cat([stored[sequence, :length], ids[sequence]]))
            if stored_documents is not None:
                before = stored_documents[sequence, :length]
                new = before[-1:].expand(time) if document_ids is None else document_ids[sequence]
                documents_of_all.append(torch.cat([before, new]))
        padded = nn.utils.rnn.pad_sequence
        for state in (*cache.states(), cache.past):
            state.clear()
        totals = [length + count for length, count in zip(past, counts, strict=True)]
        hidden, auxes = self.hidden(
            padded(everything, batch_first=True),
            document_ids=padded(documents_of_all, batch_first=True) if documents_of_all else None,
            lengths=None if len(set(past)) == 1 and lengths is None else totals,
            cache=cache,
            last=last,
            for_mtp=for_mtp,
        )
        columns = torch.tensor(past, device=ids.device)[:, None] + torch.arange(
            time, device=ids.device
        )
        sequences = torch.arange(len(ids), device=ids.device)[:, None]
        if last:
            return hidden, auxes
        routings = (
            None if aux.routing is None else aux.routing.select(sequences, columns) for aux in auxes
        )
        auxes = [
            aux._replace(routing=routing) for aux, routing in zip(auxes, routings, strict=True)
        ]
        return hidden[sequences, columns], auxes

    def reduce_streams(self, x: Streams) -> Float[Tensor, "B T D"]:
        """Reduces the residual streams of the last block to one hidden state."""
        return self.reduction(x) if self.reduction is not None else x.values[:, :, 0]

    def _context(
        self,
        ids: Int[Tensor, "B T"],
        cache: Cache | DraftCache | None,
        document_ids: Int[Tensor, "B T"] | None,
        lengths: Int[Tensor, " B"] | Sequence[int] | None,
        indexer_warmup: bool | None,
    ) -> Context:
        """Returns the context of new tokens behind those of the cache, which then counts them."""
        return context(
            ids.shape[0],
            ids.shape[1],
            ids.device,
            document_ids=document_ids,
            lengths=lengths,
            past=cache.past if cache is not None else None,
            rope=(self.config.rope, self.rope_dim),
            compress_rope=self.config.csa.compress_rope if self.config.csa is not None else None,
            ids=ids,
            indexer_warmup=indexer_warmup,
        )

    def _prefetch(self, ids: Tensor, ctx: Context, history: Appended | None) -> dict[int, object]:
        """Hashes all layers' addresses once and prefetches all rows before the first block runs."""
        if self.addresses is None or self.config.engram is None:
            return {}
        rows = self.addresses(ids, ctx, history)  # [Lm, B, T, R]
        return {
            layer: cast(Table, table).prefetch(rows[n])
            for n, (layer, table) in enumerate(
                zip(self.config.engram.layers, self.tables, strict=True)
            )
        }

    def draft(
        self,
        hidden: Float[Tensor, "B T *S D"],
        following: Int[Tensor, "B T"],
        *,
        depth: int = 0,
        document_ids: Int[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | Sequence[int] | None = None,
        cache: Cache | None = None,
        indexer_warmup: bool | None = None,
    ) -> tuple[Float[Tensor, "B T *S D"], Aux]:
        """Runs MTP module `depth` on the hidden states of positions i and the ids at i + 1 + depth.

        The hidden states are those of `hidden(..., for_mtp=True)`, or of the depth before. Returns
        those that predict the next id, and the Aux. The logits are
        head(mtp[depth].head_input(hidden)); depth + 1 takes the hidden states.
        """
        block_cache = cache.drafts[depth] if cache is not None else None
        ctx = self._context(
            following, block_cache, document_ids, lengths, indexer_warmup
        ).for_block(block_cache)
        return cast(MTP, self.mtp[depth])(hidden, self.embed(following), ctx)

    def loss(
        self,
        ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | Sequence[int] | None = None,
        indexer_warmup: bool = False,
    ) -> Loss:
        """Computes the total loss of a batch and its parts, in nats.

        The total is the next-token loss plus MTP, balance and indexer losses by their weights.
        labels[t] follows ids[t]; -100 is no target. If `indexer_warmup` is True, DSA's indexers are
        in their warm-up; they are trained only in training mode.
        """
        return self.loss_of_targets(
            ids,
            self.targets(ids, labels, document_ids),
            document_ids=document_ids,
            lengths=lengths,
            indexer_warmup=indexer_warmup,
        )

    def targets(
        self,
        ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        document_ids: Int[Tensor, "B T"] | None = None,
    ) -> list[Target]:
        """Returns the Target of the next token, and one for each depth of MTP.

        Depth k reads the ids up to t + k, whether they are labels or not, and predicts label t + k,
        within one document.
        """
        result = [Target.of(labels)]
        following = ahead(ids, document_ids, 0)
        following[:, -1:] = labels[:, -1:].clamp_min(0)
        for _ in self.mtp:
            labels = ahead(labels, document_ids, IGNORED)
            result.append(Target.of(labels, following))
            following = ahead(following, document_ids, 0)
        return result

    def loss_of_targets(
        self,
        ids: Int[Tensor, "B T"],
        targets: Sequence[Target],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | Sequence[int] | None = None,
        indexer_warmup: bool = False,
        cache: Cache | None = None,
    ) -> Loss:
        """Computes `loss` for targets that are known; with a cache the ids follow those in it."""
        training = self.training and self.config.indexer is not None
        shared_kwargs: dict[str, Any] = {
            "document_ids": document_ids,
            "lengths": lengths,
            "indexer_warmup": indexer_warmup if training else None,
            "cache": cache,
        }
        hidden, auxes = self.hidden(ids, for_mtp=True, **shared_kwargs)
        next_token = self._nats(self.head_input(hidden), targets[0])
        mtp, more = self._mtp_loss(hidden, targets[1:], shared_kwargs)
        auxes = auxes + more
        routings = [aux.routing for aux in auxes if aux.routing is not None]
        balance: dict[str, Tensor] = {}
        for routing in routings:
            assert self.config.moe is not None
            for name, value in losses(
                routing, self.config.moe.balance, self.config.moe.active
            ).items():
                balance[name] = balance.get(name, 0.0) + value
        total = next_token + sum(balance.values())
        if mtp is not None and self.config.mtp is not None:
            total = total + self.config.mtp.weight * mtp
        indexer_loss = mean_indexer_loss(
            [aux.indexer_loss for aux in auxes if aux.indexer_loss is not None]
        )
        if indexer_loss is not None and self.config.indexer is not None:
            total = total + self.config.indexer.weight * indexer_loss.loss
        counts = torch.stack([routing.counts() for routing in routings]) if routings else None
        return Loss(total, next_token, mtp, balance, counts, targets[0].tokens, indexer_loss)

    def _nats(self, normed: Tensor, target: Target) -> Tensor:
        """Computes the mean cross-entropy of a target, in nats, for some positions at a time.

        For one of several parts of the sequences it is scaled, so that the mean over the parts is
        that of the whole.
        """
        labels = target.labels.flatten()
        summed = chunked_cross_entropy(normed.flatten(0, 1), self.head.weight, labels)
        mean = summed / target.tokens.clamp_min(1)
        return mean if target.parts == 1 else mean * target.parts

    def _mtp_loss(self, hidden, targets, shared_kwargs) -> tuple[Tensor | None, list[Aux]]:
        """Computes the mean loss over the depths of MTP, in nats; None without MTP."""
        if self.config.mtp is None:
            return None, []
        nats = []
        auxes = []
        for depth, (module, target) in enumerate(zip(self.mtp, targets, strict=True)):
            hidden, aux = self.draft(hidden, target.following, depth=depth, **shared_kwargs)
            nats.append(self._nats(cast(MTP, module).head_input(hidden), target))
            auxes.append(aux)
        return torch.stack(nats).mean(), auxes

    def new_cache(self, batch: int, capacity: int = 256) -> Cache:
        """Returns an empty cache for `batch` sequences.

        It holds `capacity` tokens at first and grows. ValueError for less than one of each.
        """
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"cache: got batch {batch} and capacity {capacity}, expected at least 1 of each"
            )
        weight = self.embed.weight
        of = (batch, capacity, weight.dtype, weight.device)
        ids = self.addresses.new_cache(*of) if self.addresses is not None else None
        ties = self.config.indexer is not None and self.config.indexer.ties == "topk"
        if ids is None and (ties or self.config.rope.varies):
            ids = Appended(capacity)  # of tokens that may have to be computed again
        blocks = [cast(Block, cast(MTP, module).block) for module in self.mtp]
        drafts = [
            DraftCache(past=Past(batch, capacity), **block.new_cache(*of).parts) for block in blocks
        ]
        layers = [cast(Block, block).new_cache(*of) for block in self.blocks]
        return Cache(layers, Past(batch, capacity), ids, drafts)


def _concatenated(fetched: list[dict[int, Any]]) -> dict[int, Any]:
    """Joins, by block, rows of tables that are fetched for ids announced one after the other."""
    if len(fetched) == 1:
        return fetched[0]

    def wait(layer: int) -> Tensor:
        return torch.cat([each[layer].wait() for each in fetched], 1)

    return {layer: Handle(partial(wait, layer)) for layer in fetched[0]}


def init(
    model: LanguageModel,
    seed: int = 0,
    *,
    write: Callable[[Tensor, Tensor], object] = Tensor.copy_,
    whole: Callable[[nn.Module], AbstractContextManager] = nullcontext,
) -> None:
    """Draws every parameter from one seed, on the CPU so that every device starts alike.

    The caller's RNG is left unchanged. Of parameters that are spread over ranks, `write(parameter,
    values)` stores this rank's part of whole values, and in a block `whole(module)` the module's
    parameters are whole: one tensor or one small module is in memory at a time.

    | parameter                                     | value                                      |
    |-----------------------------------------------|--------------------------------------------|
    | embedding, head, projections, router, experts | normal, standard deviation `init_std`      |
    | norm weights                                  | 1                                          |
    | biases, router biases, attention sinks        | 0                                          |
    | Engram's rows                                 | normal, standard deviation 0.02            |
    | Engram's convolution                          | 0                                          |
    | hyper-connections                             | fn normal(0, 1/(S D)), see `Connection`,   |
    |                                               | `StreamReduction`, `GatedResidual`         |
    | delta net's decay and convolution             | see `DeltaNet`                             |
    | norm weights that are stored less one         | 0                                          |
    """
    std = model.config.init_std
    starts_itself = (
        Connection,
        StreamReduction,
        GatedResidual,
        GatedReduction,
        CentredRMSNorm,
        DeltaNet,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, starts_itself):
                with whole(module):
                    module.reset_parameters()
        # Of delta net only what it has besides its projections and norm.
        reset_ids = {
            id(p)
            for m in model.modules()
            if isinstance(m, starts_itself)
            for p in m.parameters(recurse=not isinstance(m, DeltaNet))
        }
        centred = model.config.engram is not None and model.config.engram.centred
        tables = {
            id(table.weight): table
            for table in model.tables
            if isinstance(table, Table) and table.trainable
        }
        for name, parameter in model.named_parameters():
            if id(parameter) in reset_ids:
                continue
            if id(parameter) in tables:
                tables[id(parameter)].draw(ROW_STD)
            elif name.endswith((".conv", "bias", "attn_sink", ".ape")):
                parameter.zero_()
            elif parameter.dim() == 1 or name.endswith("norm"):
                parameter.fill_(0.0 if centred and name.endswith("_norm") else 1.0)
            else:
                write(parameter, torch.randn(parameter.shape, dtype=torch.float32).mul_(std))
