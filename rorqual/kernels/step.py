"""Computes the logits of one token's decoding step in one compiled call.

It does what serve.step does with the model's modules, for one sequence of a DeepSeek model in
float32 on the CPU. A step reads each weight that it needs once and computes little, so it is bound
by memory bandwidth; module by module it is bound by Python's overhead.

    Every thread runs `_step` on its share of each product's rows, columns or heads, and waits at
    `_meet` where the next product reads what all of them wrote. Each thread computes cheap parts
    (norms, router) itself.

Attention is the absorbed form of layers.attention.MLA: one query of kv_rank + rope values a head
over the cached latents.
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

from rorqual.io import Locked, lock
from rorqual.kernels.compiled import compiled
from rorqual.kernels.vectors import (
    ONE,
    ZERO,
    columns,
    fill,
    matrix_at,
    norm,
    rotate,
    rows,
    score_tile,
    softmax,
    sum_tile,
)

PLACES = (
    "attention_norm", "q_a", "q_norm", "q_b", "kv_a", "kv_norm", "kv_b", "o", "latent",
    "ffn_norm", "gate", "up", "down", "router", "bias", "gate_up", "experts_down",
)  # fmt: skip
(
    ATTENTION_NORM, Q_A, Q_NORM, Q_B, KV_A, KV_NORM, KV_B, O, LATENT,
    FFN_NORM, GATE, UP, DOWN, ROUTER, BIAS, GATE_UP, EXPERTS_DOWN,
) = range(len(PLACES))  # fmt: skip
SOFTMAX, SIGMOID, SQRTSOFTPLUS = range(3)  # kinds of score
TILE = 64  # cached latents that stay in the first cache while every head reads them
LINE = 8  # int64 numbers in a cache line: no two threads write to the same line
PATIENCE = 2000  # polls of another thread's clock before the core is yielded
GONE = np.iinfo(np.int64).max  # the clock of a thread that failed: no other thread waits for it
TINY = np.float32(np.finfo(np.float32).tiny)


class Sizes(NamedTuple):
    """The sizes and options of a model, besides its weights' addresses.

    Widths are 0 where a part is absent.
    """

    dim: int
    vocab_size: int
    heads: int
    query_rank: int
    rank: int
    nope: int
    rope: int
    value: int
    interleaved: bool
    scale: float  # of the softmax
    eps: float
    latent_eps: float
    experts: int
    active: int
    width: int
    score: int
    groups: int
    groups_kept: int
    by_two: bool  # a group's score is the sum of its two best, not its best
    renormalise: bool
    weight_scale: float


@intrinsic
def _publish(context, address, value):
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _look(context, address):
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


_give_way = types.ExternalFunction("sched_yield", types.int32())


@compiled
def _meet(clocks, me, phase):  # pragma: no cover
    """Waits until every thread has reached `phase`; what they wrote before can then be read."""
    _publish(clocks.ctypes.data + 8 * LINE * me, phase)
    for other in range(clocks.shape[0]):
        looks = 0
        while _look(clocks.ctypes.data + 8 * LINE * other) < phase:
            looks += 1
            if looks % PATIENCE == 0:
                _give_way()


@compiled
def _share(count, me, threads):  # pragma: no cover
    return count * me // threads, count * (me + 1) // threads


@compiled
def _attend(queries, keys, summed):  # pragma: no cover
    """Writes summed[h] = softmax(queries[h] . keys) keys.

    Only the first summed.shape[1] values of a key are summed.
    """
    heads, length = queries.shape[0], keys.shape[0]
    scores, bits = np.empty((heads, length), np.float32), np.empty(length, np.int32)
    for start in range(0, length, TILE):
        score_tile(queries, keys, scores, start, min(start + TILE, length))
    for h in range(heads):
        softmax(scores[h], bits)
    for start in range(0, length, TILE):
        sum_tile(scores, keys, summed, start, min(start + TILE, length))


@compiled
def _heads(pointer, sizes, low, latent, cos, sin, out, me, threads):  # pragma: no cover
    """Computes `out` of this thread's heads.

    `low` is the query's normalized latent, or the normalized hidden state where there is no latent.
    """
    start, end = _share(sizes.heads, me, threads)
    width, up = sizes.nope + sizes.rope, sizes.nope + sizes.value
    raw = np.zeros(sizes.heads * width, np.float32)
    rows(
        matrix_at(pointer[Q_B], sizes.heads * width, low.shape[0]),
        low,
        raw,
        start * width,
        end * width,
    )
    weight = matrix_at(pointer[KV_B], sizes.heads * up, sizes.rank)
    queries = np.zeros((end - start, sizes.rank + sizes.rope), np.float32)
    for h in range(start, end):
        query_of_head, query = raw[h * width : (h + 1) * width], queries[h - start]
        for i in range(width):
            query_of_head[i] *= np.float32(sizes.scale)
        for i in range(sizes.rope):
            query[sizes.rank + i] = query_of_head[sizes.nope + i]
        rotate(query[sizes.rank :], cos, sin, sizes.interleaved)
        columns(
            weight[h * up : h * up + sizes.nope], query_of_head[: sizes.nope], query, 0, sizes.rank
        )
    summed = np.zeros((end - start, sizes.rank), np.float32)
    _attend(queries, latent, summed)
    fill(out[start * sizes.value : end * sizes.value], ZERO)
    for h in range(start, end):
        values = weight[h * up + sizes.nope : (h + 1) * up]
        rows(
            values, summed[h - start], out[h * sizes.value : (h + 1) * sizes.value], 0, sizes.value
        )


@compiled
def _attention(pointer, sizes, x, length, cos, sin, shared, clocks, me, phase):  # pragma: no cover
    """Adds attention(norm(x)) to x; the new cache entry is number `length`. Four barriers."""
    threads, down = clocks.shape[0], sizes.rank + sizes.rope
    hidden = np.empty(sizes.dim, np.float32)
    norm(x, matrix_at(pointer[ATTENTION_NORM], 1, sizes.dim)[0], sizes.eps, hidden)
    first, second = shared[0, : sizes.query_rank], shared[1, :down]
    start, end = _share(sizes.query_rank, me, threads)
    fill(first[start:end], ZERO)
    rows(matrix_at(pointer[Q_A], sizes.query_rank, sizes.dim), hidden, first, start, end)
    start, end = _share(down, me, threads)
    fill(second[start:end], ZERO)
    rows(matrix_at(pointer[KV_A], down, sizes.dim), hidden, second, start, end)
    _meet(clocks, me, phase)
    latent = matrix_at(pointer[LATENT], length + 1, down)
    if me == 0:
        norm(
            second[: sizes.rank],
            matrix_at(pointer[KV_NORM], 1, sizes.rank)[0],
            sizes.latent_eps,
            latent[length],
        )
        for i in range(sizes.rank, down):
            latent[length, i] = second[i]
        rotate(latent[length, sizes.rank :], cos, sin, sizes.interleaved)
    low = hidden
    if sizes.query_rank:
        low = np.empty(sizes.query_rank, np.float32)
        norm(first, matrix_at(pointer[Q_NORM], 1, sizes.query_rank)[0], sizes.latent_eps, low)
    _meet(clocks, me, phase + 1)
    out = shared[2, : sizes.heads * sizes.value]
    _heads(pointer, sizes, low, latent, cos, sin, out, me, threads)
    _meet(clocks, me, phase + 2)
    start, end = _share(sizes.dim, me, threads)
    rows(matrix_at(pointer[O], sizes.dim, out.shape[0]), out, x, start, end)
    _meet(clocks, me, phase + 3)


@compiled
def _best_groups(biased, sizes):  # pragma: no cover
    """Sets the scores outside of the groups_kept best groups to -inf, in place.

    Of equal groups the lower is kept.
    """
    size, least = sizes.experts // sizes.groups, np.float32(-np.inf)
    worth = np.empty(sizes.groups, np.float32)
    for g in range(sizes.groups):
        first, second = least, least
        for e in range(g * size, (g + 1) * size):
            if biased[e] > first:
                first, second = biased[e], first
            elif biased[e] > second:
                second = biased[e]
        worth[g] = first + second if sizes.by_two else first
    for _ in range(sizes.groups - sizes.groups_kept):
        worst = -1
        for g in range(sizes.groups):
            if worth[g] > least and (worst < 0 or worth[g] <= worth[worst]):
                worst = g
        if worst >= 0:
            worth[worst] = least
            fill(biased[worst * size : (worst + 1) * size], least)


@compiled
def _score(logits, kind):  # pragma: no cover
    """Applies the router's score function in place."""
    best, total = logits[0], ZERO
    for e in range(logits.shape[0]):
        best = max(best, logits[e])
    for e in range(logits.shape[0]):
        x = logits[e]
        if kind == SIGMOID:
            logits[e] = ONE / (ONE + math.exp(-x))
        elif kind == SOFTMAX:
            logits[e] = math.exp(x - best)
            total += logits[e]
        else:
            logits[e] = math.sqrt(max(max(x, ZERO) + math.log1p(math.exp(-abs(x))), TINY))
    if kind == SOFTMAX:
        for e in range(logits.shape[0]):
            logits[e] /= total


@compiled
def _route(pointer, sizes, hidden, expert_ids, weights):  # pragma: no cover
    """Computes the router of layers.router for one token.

    Of equal scores the lower expert is selected.
    """
    scores, biased = np.zeros(sizes.experts, np.float32), np.zeros(sizes.experts, np.float32)
    rows(matrix_at(pointer[ROUTER], sizes.experts, sizes.dim), hidden, scores, 0, sizes.experts)
    _score(scores, sizes.score)
    for e in range(sizes.experts):
        biased[e] = scores[e]
        if pointer[BIAS]:
            biased[e] += matrix_at(pointer[BIAS], 1, sizes.experts)[0, e]
    if sizes.groups_kept < sizes.groups:
        _best_groups(biased, sizes)
    total = np.float32(1e-20)
    for k in range(sizes.active):
        best = 0
        for e in range(1, sizes.experts):
            if biased[e] > biased[best]:
                best = e
        expert_ids[k], weights[k] = best, scores[best]
        biased[best] = np.float32(-np.inf)
        total += scores[best]
    for k in range(sizes.active):
        weights[k] *= np.float32(sizes.weight_scale)
        if sizes.renormalise:
            weights[k] /= total


@compiled
def _gated(gate, up, out, factor):  # pragma: no cover
    for i in range(gate.shape[0]):
        out[i] = gate[i] / (ONE + math.exp(-gate[i])) * up[i] * factor


@compiled
def _experts_in(pointer, sizes, hidden, expert_ids, weights, inner, start, end):  # pragma: no cover
    """Writes inner[k, start:end] = weight_k silu(gate) up.

    These are this thread's columns of every selected expert.
    """
    width, both = sizes.width, np.empty(2 * sizes.width, np.float32)
    every = matrix_at(pointer[GATE_UP], sizes.experts * sizes.dim, 2 * width)
    for k in range(sizes.active):
        weight = every[expert_ids[k] * sizes.dim : (expert_ids[k] + 1) * sizes.dim]
        fill(both, ZERO)
        columns(weight, hidden, both, start, end)
        columns(weight, hidden, both, width + start, width + end)
        _gated(both[start:end], both[width + start : width + end], inner[k, start:end], weights[k])


@compiled
def _feed_forward(pointer, sizes, x, width, shared, clocks, me, phase):  # pragma: no cover
    """Adds SwiGLU(norm(x)), dense or shared, and the selected experts to x. Two barriers."""
    threads, hidden = clocks.shape[0], np.empty(sizes.dim, np.float32)
    norm(x, matrix_at(pointer[FFN_NORM], 1, sizes.dim)[0], sizes.eps, hidden)
    inner, plain = shared[3:], shared[2, :width]
    expert_ids, weights = np.empty(sizes.active, np.int64), np.empty(sizes.active, np.float32)
    start, end = _share(width, me, threads)
    gate, up = np.zeros(width, np.float32), np.zeros(width, np.float32)
    rows(matrix_at(pointer[GATE], width, sizes.dim), hidden, gate, start, end)
    rows(matrix_at(pointer[UP], width, sizes.dim), hidden, up, start, end)
    _gated(gate[start:end], up[start:end], plain[start:end], ONE)
    if pointer[ROUTER]:
        _route(pointer, sizes, hidden, expert_ids, weights)
        start, end = _share(sizes.width, me, threads)
        _experts_in(pointer, sizes, hidden, expert_ids, weights, inner, start, end)
    _meet(clocks, me, phase)
    start, end = _share(sizes.dim, me, threads)
    rows(matrix_at(pointer[DOWN], sizes.dim, width), plain, x, start, end)
    if pointer[ROUTER]:
        every = matrix_at(pointer[EXPERTS_DOWN], sizes.experts * sizes.width, sizes.dim)
        for k in range(sizes.active):
            weight = every[expert_ids[k] * sizes.width : (expert_ids[k] + 1) * sizes.width]
            columns(weight, inner[k, : sizes.width], x, start, end)
    _meet(clocks, me, phase + 1)


@compiled
def _step(
    places, widths, ends, sizes, x, length, cos, sin, shared, clocks, logits, me, phase
):  # pragma: no cover
    """Computes this thread's share of a decoding step.

    `places` [layers, PLACES] and `ends` (final norm, head) are addresses; `widths` are those of
    each SwiGLU; `phase` is greater than that of every barrier so far.
    """
    for layer in range(places.shape[0]):
        _attention(places[layer], sizes, x, length, cos, sin, shared, clocks, me, phase + 6 * layer)
        _feed_forward(
            places[layer], sizes, x, widths[layer], shared, clocks, me, phase + 6 * layer + 4
        )
    hidden = np.empty(sizes.dim, np.float32)
    norm(x, matrix_at(ends[0], 1, sizes.dim)[0], sizes.eps, hidden)
    start, end = _share(sizes.vocab_size, me, clocks.shape[0])
    fill(logits[start:end], ZERO)
    rows(matrix_at(ends[1], sizes.vocab_size, sizes.dim), hidden, logits, start, end)


CODE: Any = _step  # the same function as a numba dispatcher


def _types() -> tuple:
    """Returns the numba types of `_step`'s arguments, which are the same for every model."""
    none, whole = np.empty(0, np.float32), np.zeros(1, np.int64)
    sizes = Sizes(*(kind() for kind in Sizes.__annotations__.values()))
    empty = Step(np.zeros((1, len(PLACES)), np.int64), whole, whole, sizes, 1)
    return tuple(numba.typeof(value) for value in (*empty._given(none, 0, none, none, none), 0, 0))


class Step:
    """A model's addresses, sizes and scratch memory; call it once a token.

    The weights must not move in memory.
    """

    # For the caller, which does not import this module.
    PLACES = PLACES
    SIZES = Sizes

    def __init__(
        self, places: np.ndarray, widths: np.ndarray, ends: np.ndarray, sizes: Sizes, threads: int
    ) -> None:
        """Stores the addresses and starts the threads.

        `places` [layers, PLACES] may be changed between calls: a cache that grows moves.
        """
        self.places, self.widths, self.ends, self.sizes = places, widths, ends, sizes
        self.clocks = np.zeros((threads, LINE), np.int64)
        widest = max(
            sizes.query_rank,
            sizes.rank + sizes.rope,
            sizes.heads * sizes.value,
            sizes.width,
            int(widths.max()),
        )
        self.shared = np.zeros((3 + sizes.active, widest), np.float32)
        self.pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self.calls = 0

    @staticmethod
    def build() -> None:
        """Compiles the step, or loads it from numba's cache.

        Compilation takes some 20 seconds of a core, loading a tenth of a second.
        """
        CODE.compile(_types())

    @staticmethod
    def is_cached() -> bool:
        """Returns whether the machine code exists, in this process or cached on disk.

        Code that is cached is loaded.
        """
        if not CODE.signatures and CODE._cache.load_overload(_types(), CODE.targetctx) is None:
            return False
        Step.build()
        return True

    @staticmethod
    def keepable() -> bool:
        return CODE.stats.cache_path is not None

    @staticmethod
    def keep() -> None:
        """Compiles the step into numba's cache for other processes, unless another does so."""
        offset = Path(CODE.stats.cache_path)
        offset.mkdir(parents=True, exist_ok=True)
        with suppress(Locked), lock(offset / "step.lock", "another process builds the step"):
            Step.build()

    def _given(
        self, x: np.ndarray, length: int, cos: np.ndarray, sin: np.ndarray, logits: np.ndarray
    ) -> tuple:
        return (
            self.places,
            self.widths,
            self.ends,
            self.sizes,
            x,
            length,
            cos,
            sin,
            self.shared,
            self.clocks,
            logits,
        )

    def __call__(self, x: np.ndarray, length: int, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """Returns the logits [V] of one token.

        x [D], the token's embedding, is overwritten; `length` tokens are cached.
        """
        logits = np.empty(self.sizes.vocab_size, np.float32)
        arguments = self._given(x, length, cos, sin, logits)
        phase = 1 + 6 * len(self.places) * self.calls
        self.calls += 1
        others: list[Future[None]] = []
        try:
            for me in range(1, len(self.clocks)):
                assert self.pool is not None
                others.append(self.pool.submit(_step, *arguments, me, phase))
            _step(*arguments, 0, phase)
        # An exception such as Ctrl-C between two submissions: the threads that were started would
        # wait for ever.
        except BaseException:
            self.clocks[:, 0] = GONE
            wait(others)
            self.clocks[:, 0] = 0
            raise
        for other in others:
            other.result()
        return logits
