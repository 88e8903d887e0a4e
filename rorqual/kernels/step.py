"""Computes the logits of one decoding step of up to some dozens of sequences in compiled calls.

It does what serve.step does with the model's modules, for DeepSeek models with any number of
residual streams, in float32 on the CPU. A step of few tokens reads each weight that it needs once
and computes little; module by module it is bound by Python's overhead. MLA is compiled; another
attention is a module that the caller runs between the two parts of a block.

    Every thread runs `_step` on its share of each product's rows, columns or heads, or of the
    tokens, and waits at `_meet` where the next part reads what all of them wrote.

Attention is the absorbed form of layers.attention.MLA: one query of kv_rank + rope values a head
over the cached latents, which are read where they are, PAGE tokens at a time. Every sum is in the
same order whatever other tokens are in the batch: a sequence gets the same bits alone.
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
from rorqual.kernels.compiled import pointer as pointer_at
from rorqual.kernels.vectors import (
    ONE,
    ZERO,
    dots,
    fill,
    matrix_at,
    norm,
    rotate,
    score_tile,
    softmax,
    sum_rows,
)

PLACES = (
    "attention_norm", "q_a", "q_norm", "q_b", "kv_a", "kv_norm", "kv_b", "o", "latent",
    "ffn_norm", "gate", "up", "down", "router", "bias", "table", "gate_up", "experts_down",
    "attention_fn", "attention_base", "attention_scale", "ffn_fn", "ffn_base", "ffn_scale",
)  # fmt: skip
(
    ATTENTION_NORM, Q_A, Q_NORM, Q_B, KV_A, KV_NORM, KV_B, O, LATENT,
    FFN_NORM, GATE, UP, DOWN, ROUTER, BIAS, TABLE, GATE_UP, EXPERTS_DOWN,
    ATTENTION_FN, ATTENTION_BASE, ATTENTION_SCALE, FFN_FN, FFN_BASE, FFN_SCALE,
) = range(len(PLACES))  # fmt: skip
ENDS = ("norm", "head", "fn", "base", "scale")  # the last three reduce the streams
SOFTMAX, SIGMOID, SQRTSOFTPLUS = range(3)  # kinds of score
PAGE = 64  # cached latents that are read together: they stay in the first cache for all heads
LINE = 8  # int64 numbers in a cache line: no two threads write to the same line
PATIENCE = 2000  # polls of another thread's clock before the core is yielded
GONE = np.iinfo(np.int64).max  # the clock of a thread that failed: no other thread waits for it
TINY = np.float32(np.finfo(np.float32).tiny)
BARRIERS = 6  # of a part of a block, at most


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
    limit: float  # of the factors inside of the experts and of the shared SwiGLU
    score: int
    groups: int
    groups_kept: int
    by_two: bool  # a group's score is the sum of its two best, not its best
    renormalise: bool
    weight_scale: float
    streams: int
    single_pass: bool  # a site reads with the pre-mapping of the site before
    iterations: int  # of Sinkhorn
    hyper_eps: float
    hyper_norm_eps: float


class Tokens(NamedTuple):
    """The N tokens of a step: one of each sequence, or several that follow each other."""

    ids: np.ndarray  # [N], which select experts where the router does so
    x: np.ndarray  # [N, S, D], their residual streams
    pre: np.ndarray  # [N, S], the pre-mapping that is handed on
    positions: np.ndarray  # [N], how many tokens of its sequence are cached before each
    pages: np.ndarray  # [N, P], where page p of its sequence begins in a layer's cache, in tokens
    cos: np.ndarray  # [N, F]
    sin: np.ndarray


class Scratch(NamedTuple):
    """Memory that the threads share between two barriers."""

    mapping: np.ndarray  # [N, K], what the coefficients of a site are made of
    coefficients: np.ndarray  # [N, K], pre, post and comb, row-major
    hidden: np.ndarray  # [N, D]
    low: np.ndarray  # [N, query_rank]
    latent: np.ndarray  # [N, rank + rope]
    heads: np.ndarray  # [N, heads value]
    plain: np.ndarray  # [N widest], inside of the SwiGLU that all tokens take
    inner: np.ndarray  # [N active, width], inside of the experts
    delta: np.ndarray  # [N, D], output of a sublayer, of the caller's attention too
    expert_ids: np.ndarray  # [N, active]
    expert_weights: np.ndarray  # [N, active]


def scratch(sizes: Sizes, tokens: int, widest: int) -> Scratch:
    """Allocates the memory for steps of so many tokens; `widest` is the widest SwiGLU."""

    def floats(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    rows = sizes.streams * (2 + sizes.streams)
    return Scratch(
        mapping=floats(tokens, rows),
        coefficients=floats(tokens, rows),
        hidden=floats(tokens, sizes.dim),
        low=floats(tokens, sizes.query_rank),
        latent=floats(tokens, sizes.rank + sizes.rope),
        heads=floats(tokens, sizes.heads * sizes.value),
        plain=floats(tokens * widest),
        inner=floats(tokens * sizes.active, sizes.width),
        delta=floats(tokens, sizes.dim),
        expert_ids=np.zeros((tokens, sizes.active), np.int64),
        expert_weights=floats(tokens, sizes.active),
    )


@intrinsic
def _publish(context, address, value):
    """Stores an int64 at an address after all earlier writes of this thread, in compiled code."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _read_published(context, address):
    """Reads an int64 that another thread published before any later read, in compiled code."""

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
        while _read_published(clocks.ctypes.data + 8 * LINE * other) < phase:
            looks += 1
            if looks % PATIENCE == 0:
                _give_way()


@compiled
def _share(count, me, threads):  # pragma: no cover
    """Returns the start and the end of thread `me`'s equal share of `count` items."""
    return count * me // threads, count * (me + 1) // threads


@compiled
def _vector(address, size):  # pragma: no cover
    """Views the `size` float32 numbers at an address as a vector."""
    return matrix_at(address, 1, size)[0]


@compiled
def _ids_at(address, size):  # pragma: no cover
    """Views the `size` int64 numbers at an address as a vector."""
    return numba.carray(pointer_at(address), (size,), np.int64)


@compiled
def _sigmoid(x):  # pragma: no cover
    """Computes 1 / (1 + exp(-x)) of one float32 number."""
    return ONE / (ONE + math.exp(-x))


@compiled
def _inverse_rms(x, eps):  # pragma: no cover
    """Computes 1 / sqrt(mean(x^2) + eps) of a vector, in a fixed order of sums."""
    total = ZERO
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return ONE / math.sqrt(total / np.float32(x.shape[0]) + np.float32(eps))


@compiled
def _sinkhorn(comb, sizes):  # pragma: no cover
    """Normalises the logits comb[j, k] in place, as layers.streams.sinkhorn does."""
    size = sizes.streams
    eps = np.float32(sizes.hyper_eps)
    for j in range(size):
        best = comb[j, 0]
        total = ZERO
        for k in range(size):
            best = max(best, comb[j, k])
        for k in range(size):
            comb[j, k] = math.exp(comb[j, k] - best)
            total += comb[j, k]
        for k in range(size):
            comb[j, k] = comb[j, k] / total + max(eps, TINY)
    for step in range(2 * sizes.iterations - 1):
        for a in range(size):
            total = eps
            for b in range(size):
                total += comb[a, b] if step % 2 else comb[b, a]
            share = ONE / total
            for b in range(size):
                if step % 2:
                    comb[a, b] *= share
                else:
                    comb[b, a] *= share


@compiled
def _coefficients(mapping, x, base, scale, sizes, out):  # pragma: no cover
    """Computes pre, post and comb of one token from the products with its streams x [S D]."""
    size = sizes.streams
    inverse = _inverse_rms(x, sizes.hyper_norm_eps)
    for k in range(size):
        pre = mapping[k] * inverse * scale[0] + base[k]
        post = mapping[size + k] * inverse * scale[1] + base[size + k]
        out[k] = _sigmoid(pre) + np.float32(sizes.hyper_eps)
        out[size + k] = np.float32(2) * _sigmoid(post)
    for k in range(2 * size, size * (2 + size)):
        out[k] = mapping[k] * inverse * scale[2] + base[k]
    _sinkhorn(out[2 * size :].reshape(size, size), sizes)


@compiled
def _reduce(x, pre, out):  # pragma: no cover
    """Writes out = sum_s pre_s x_s."""
    fill(out, ZERO)
    for s in range(x.shape[0]):
        for i in range(out.shape[0]):
            out[i] += pre[s] * x[s, i]


@compiled
def _read(fn, base, scale, weight, sizes, tokens, work, clocks, me, phase):  # pragma: no cover
    """Writes the normalised input of a sublayer to work.hidden. Two barriers at most."""
    threads = clocks.shape[0]
    count = tokens.x.shape[0]
    size = sizes.streams
    flat_dim = size * sizes.dim
    rows = size * (2 + size)
    if size > 1:
        start, end = _share(rows, me, threads)
        streams = matrix_at(tokens.x.ctypes.data, count, flat_dim)
        score_tile(streams, matrix_at(fn, rows, flat_dim), work.mapping, start, end)
        _meet(clocks, me, phase)
    # One token of one stream is less work than a barrier: each thread writes all of it.
    alone = count == 1 and size == 1
    start, end = (0, 1) if alone else _share(count, me, threads)
    weights = _vector(weight, sizes.dim)
    read = np.empty(sizes.dim, np.float32)
    for n in range(start, end):
        if size == 1:
            norm(tokens.x[n, 0], weights, sizes.eps, work.hidden[n])
            continue
        ours = work.coefficients[n]
        flat = _vector(tokens.x.ctypes.data + 4 * n * flat_dim, flat_dim)
        _coefficients(work.mapping[n], flat, _vector(base, rows), _vector(scale, 3), sizes, ours)
        if sizes.single_pass:
            _reduce(tokens.x[n], tokens.pre[n], read)
        else:
            _reduce(tokens.x[n], ours, read)
        for s in range(size):
            tokens.pre[n, s] = ours[s]
        norm(read, weights, sizes.eps, work.hidden[n])
    if not alone:
        _meet(clocks, me, phase + 1)


@compiled
def _write(sizes, tokens, work, start, end):  # pragma: no cover
    """Adds the columns from `start` to `end` of work.delta to the streams, which it mixes."""
    size = sizes.streams
    width = end - start
    mixed = np.empty((size, width), np.float32)
    for n in range(tokens.x.shape[0]):
        x = tokens.x[n]
        delta = work.delta[n, start:end]
        ours = work.coefficients[n]
        if size == 1:
            for i in range(width):
                x[0, start + i] += delta[i]
            continue
        for k in range(size):
            row = mixed[k]
            post = ours[size + k]
            for i in range(width):
                row[i] = post * delta[i]
            for j in range(size):
                share = ours[2 * size + j * size + k]
                stream = x[j, start:end]
                for i in range(width):
                    row[i] += share * stream[i]
        for k in range(size):
            for i in range(width):
                x[k, start + i] = mixed[k, i]


@compiled
def _attend(queries, latents, pages, length, width, summed):  # pragma: no cover
    """Writes summed[h] = softmax(queries[h] . keys) keys, over the first `length` of a sequence.

    Only the first summed.shape[1] of a key's `width` values are summed. `latents` is the address
    of a layer's cache, in which page p of the sequence begins at token pages[p].
    """
    heads = queries.shape[0]
    step = 4 * width
    whole = length // 4 * 4
    scores = np.empty((heads, length), np.float32)
    bits = np.empty(length, np.int32)
    for l in range(0, whole, 4):
        a = latents + (pages[l // PAGE] + l % PAGE) * step
        dots(queries, a, a + step, a + 2 * step, a + 3 * step, scores, l)
    for l in range(whole, length):
        key = _vector(latents + (pages[l // PAGE] + l % PAGE) * step, width)
        for h in range(heads):
            p = ZERO
            for i in range(width):
                p += queries[h, i] * key[i]
            scores[h, l] = p
    for h in range(heads):
        softmax(scores[h], bits)
        fill(summed[h], ZERO)
    for l in range(0, length, PAGE):
        count = min(PAGE, length - l)
        sum_rows(scores[:, l:], latents + pages[l // PAGE] * step, step, count, summed)


@compiled
def _queries(pointer, sizes, low, tokens, start, end, queries):  # pragma: no cover
    """Writes queries[n, h] of the heads from `start` to `end`, in the space of the latents."""
    count = low.shape[0]
    ours = end - start
    width = sizes.nope + sizes.rope
    up = sizes.nope + sizes.value
    scale = np.float32(sizes.scale)
    raw = np.empty((count, ours * width), np.float32)
    first = pointer[Q_B] + 4 * start * width * low.shape[1]
    score_tile(low, matrix_at(first, ours * width, low.shape[1]), raw, 0, ours * width)
    nope = np.empty((count, sizes.nope), np.float32)
    absorbed = np.empty((count, sizes.rank), np.float32)
    for h in range(ours):
        for n in range(count):
            item = raw[n, h * width : (h + 1) * width]
            query = queries[n, h]
            for i in range(sizes.nope):
                nope[n, i] = item[i] * scale
            for i in range(sizes.rope):
                query[sizes.rank + i] = item[sizes.nope + i] * scale
            rotate(query[sizes.rank :], tokens.cos[n], tokens.sin[n], sizes.interleaved)
            fill(absorbed[n], ZERO)
        key_up = pointer[KV_B] + 4 * (start + h) * up * sizes.rank
        sum_rows(nope, key_up, 4 * sizes.rank, sizes.nope, absorbed)
        for n in range(count):
            for i in range(sizes.rank):
                queries[n, h, i] = absorbed[n, i]


@compiled
def _heads(pointer, sizes, low, tokens, out, me, threads):  # pragma: no cover
    """Computes `out` of this thread's heads, for all tokens.

    `low` are the queries' normalised latents, or the normalised hidden states without latents.
    """
    start, end = _share(sizes.heads, me, threads)
    count = low.shape[0]
    ours = end - start
    down = sizes.rank + sizes.rope
    if not ours:
        return
    queries = np.empty((count, ours, down), np.float32)
    _queries(pointer, sizes, low, tokens, start, end, queries)
    summed = np.empty((count, ours, sizes.rank), np.float32)
    for n in range(count):
        length = tokens.positions[n] + 1
        _attend(queries[n], pointer[LATENT], tokens.pages[n], length, down, summed[n])
    of_head = np.empty((count, sizes.rank), np.float32)
    values = np.empty((count, sizes.value), np.float32)
    for h in range(ours):
        for n in range(count):
            for i in range(sizes.rank):
                of_head[n, i] = summed[n, h, i]
        row = (start + h) * (sizes.nope + sizes.value) + sizes.nope
        value_up = matrix_at(pointer[KV_B] + 4 * row * sizes.rank, sizes.value, sizes.rank)
        score_tile(of_head, value_up, values, 0, sizes.value)
        for n in range(count):
            for i in range(sizes.value):
                out[n, (start + h) * sizes.value + i] = values[n, i]


@compiled
def _attention(pointer, sizes, tokens, work, clocks, me, phase):  # pragma: no cover
    """Adds attention to the streams; the new latents are cached. Six barriers.

    Where the caller runs the attention, only its input is written, to work.hidden.
    """
    threads = clocks.shape[0]
    down = sizes.rank + sizes.rope
    site = pointer[ATTENTION_FN], pointer[ATTENTION_BASE], pointer[ATTENTION_SCALE]
    _read(*site, pointer[ATTENTION_NORM], sizes, tokens, work, clocks, me, phase)
    if not pointer[O]:
        return
    hidden = work.hidden
    low = work.low
    start, end = _share(sizes.query_rank, me, threads)
    score_tile(hidden, matrix_at(pointer[Q_A], sizes.query_rank, sizes.dim), low, start, end)
    start, end = _share(down, me, threads)
    score_tile(hidden, matrix_at(pointer[KV_A], down, sizes.dim), work.latent, start, end)
    _meet(clocks, me, phase + 2)
    start, end = _share(tokens.x.shape[0], me, threads)
    for n in range(start, end):
        position = tokens.positions[n]
        new = work.latent[n]
        page = tokens.pages[n, position // PAGE]
        latent = _vector(pointer[LATENT] + 4 * down * (page + position % PAGE), down)
        norm(new[: sizes.rank], _vector(pointer[KV_NORM], sizes.rank), sizes.latent_eps, latent)
        for i in range(sizes.rank, down):
            latent[i] = new[i]
        rotate(latent[sizes.rank :], tokens.cos[n], tokens.sin[n], sizes.interleaved)
        if sizes.query_rank:
            norm(low[n], _vector(pointer[Q_NORM], sizes.query_rank), sizes.latent_eps, low[n])
    _meet(clocks, me, phase + 3)
    if sizes.query_rank:
        _heads(pointer, sizes, low, tokens, work.heads, me, threads)
    else:
        _heads(pointer, sizes, hidden, tokens, work.heads, me, threads)
    _meet(clocks, me, phase + 4)
    start, end = _share(sizes.dim, me, threads)
    projection = matrix_at(pointer[O], sizes.dim, sizes.heads * sizes.value)
    score_tile(work.heads, projection, work.delta, start, end)
    _write(sizes, tokens, work, start, end)
    _meet(clocks, me, phase + 5)


@compiled
def _best_groups(biased, sizes):  # pragma: no cover
    """Sets the scores outside of the groups_kept best groups to -inf, in place.

    Of equal groups the lower is kept.
    """
    size = sizes.experts // sizes.groups
    least = np.float32(-np.inf)
    worth = np.empty(sizes.groups, np.float32)
    for g in range(sizes.groups):
        first = least
        second = least
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
    """Applies the router's score function `kind` to one token's logits, in place."""
    best = logits[0]
    total = ZERO
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
def _route(pointer, sizes, hidden, token_id, expert_ids, weights):  # pragma: no cover
    """Computes the router of layers.router for one token, hidden [1, D].

    Of equal scores the lower expert is selected.
    """
    logits = np.empty((1, sizes.experts), np.float32)
    biased = np.empty(sizes.experts, np.float32)
    score_tile(
        hidden, matrix_at(pointer[ROUTER], sizes.experts, sizes.dim), logits, 0, sizes.experts
    )
    scores = logits[0]
    _score(scores, sizes.score)
    for e in range(sizes.experts):
        biased[e] = scores[e]
        if pointer[BIAS]:
            biased[e] += _vector(pointer[BIAS], sizes.experts)[e]
    if sizes.groups_kept < sizes.groups:
        _best_groups(biased, sizes)
    total = np.float32(1e-20)
    # What other threads may read is written once: several may compute the same token.
    factors = np.empty(sizes.active, np.float32)
    for k in range(sizes.active):
        best = 0
        for e in range(1, sizes.experts):
            if biased[e] > biased[best]:
                best = e
        if pointer[TABLE]:
            best = _ids_at(pointer[TABLE] + 8 * token_id * sizes.active, sizes.active)[k]
        expert_ids[k] = best
        factors[k] = scores[best] * np.float32(sizes.weight_scale)
        biased[best] = np.float32(-np.inf)
        total += scores[best]
    for k in range(sizes.active):
        weights[k] = factors[k] / total if sizes.renormalise else factors[k]


@compiled
def _slots_of(expert_ids, expert, slots):  # pragma: no cover
    """Writes the slots n * active + k of one expert; returns their number."""
    count = 0
    active = expert_ids.shape[1]
    for slot in range(expert_ids.shape[0] * active):
        if expert_ids[slot // active, slot % active] == expert:
            slots[count] = slot
            count += 1
    return count


@compiled
def _gated(gate, up, limit, out, factor):  # pragma: no cover
    """Writes out = factor silu(gate) up, with both clipped as layers.feed_forward.gated does."""
    for i in range(gate.shape[0]):
        g = gate[i]
        u = up[i]
        if g > limit:
            g = limit
        if abs(u) > limit:
            u = math.copysign(limit, u)
        out[i] = g * _sigmoid(g) * u * factor


@compiled
def _experts_in(pointer, sizes, work, start, end):  # pragma: no cover
    """Writes work.inner[slot, start:end] = weight silu(gate) up of every slot."""
    dim = sizes.dim
    width = sizes.width
    active = sizes.active
    slots = np.empty(work.inner.shape[0], np.int64)
    limit = np.float32(sizes.limit)
    if start == end:
        return
    for expert in range(sizes.experts):
        count = _slots_of(work.expert_ids, expert, slots)
        if not count:
            continue
        hidden = np.empty((count, dim), np.float32)
        gate = np.zeros((count, end - start), np.float32)
        up = np.zeros((count, end - start), np.float32)
        for c in range(count):
            for i in range(dim):
                hidden[c, i] = work.hidden[slots[c] // active, i]
        weight = pointer[GATE_UP] + 4 * (2 * expert * dim * width + start)
        sum_rows(hidden, weight, 8 * width, dim, gate)
        sum_rows(hidden, weight + 4 * width, 8 * width, dim, up)
        for c in range(count):
            share = work.expert_weights[slots[c] // active, slots[c] % active]
            _gated(gate[c], up[c], limit, work.inner[slots[c], start:end], share)


@compiled
def _experts_out(pointer, sizes, work, start, end):  # pragma: no cover
    """Adds the experts' outputs to the columns from `start` to `end` of work.delta."""
    dim = sizes.dim
    width = sizes.width
    active = sizes.active
    slots = np.empty(work.inner.shape[0], np.int64)
    if start == end:
        return
    for expert in range(sizes.experts):
        count = _slots_of(work.expert_ids, expert, slots)
        if not count:
            continue
        inner = np.empty((count, width), np.float32)
        out = np.zeros((count, end - start), np.float32)
        for c in range(count):
            for i in range(width):
                inner[c, i] = work.inner[slots[c], i]
        weight = pointer[EXPERTS_DOWN] + 4 * (expert * dim * width + start)
        sum_rows(inner, weight, 4 * dim, width, out)
        for c in range(count):
            delta = work.delta[slots[c] // active]
            for i in range(end - start):
                delta[start + i] += out[c, i]


@compiled
def _feed_forward(pointer, sizes, tokens, work, width, clocks, me, phase):  # pragma: no cover
    """Adds the SwiGLU, dense or shared, and the selected experts to the streams. Six barriers.

    Where the caller ran the attention, its output is added first.
    """
    threads = clocks.shape[0]
    count = tokens.x.shape[0]
    if not pointer[O]:
        start, end = _share(sizes.dim, me, threads)
        _write(sizes, tokens, work, start, end)
        _meet(clocks, me, phase)
    site = pointer[FFN_FN], pointer[FFN_BASE], pointer[FFN_SCALE]
    _read(*site, pointer[FFN_NORM], sizes, tokens, work, clocks, me, phase + 1)
    if pointer[ROUTER]:
        start, end = (0, 1) if count == 1 else _share(count, me, threads)
        for n in range(start, end):
            hidden = work.hidden[n : n + 1]
            ids = work.expert_ids[n]
            weights = work.expert_weights[n]
            _route(pointer, sizes, hidden, tokens.ids[n], ids, weights)
        if count > 1:
            _meet(clocks, me, phase + 3)
    plain = matrix_at(work.plain.ctypes.data, count, width)
    start, end = _share(width, me, threads)
    gate = np.empty((count, width), np.float32)
    up = np.empty((count, width), np.float32)
    score_tile(work.hidden, matrix_at(pointer[GATE], width, sizes.dim), gate, start, end)
    score_tile(work.hidden, matrix_at(pointer[UP], width, sizes.dim), up, start, end)
    limit = np.float32(sizes.limit if pointer[ROUTER] else np.inf)
    for n in range(count):
        _gated(gate[n, start:end], up[n, start:end], limit, plain[n, start:end], ONE)
    if pointer[ROUTER]:
        start, end = _share(sizes.width, me, threads)
        _experts_in(pointer, sizes, work, start, end)
    _meet(clocks, me, phase + 4)
    start, end = _share(sizes.dim, me, threads)
    score_tile(plain, matrix_at(pointer[DOWN], sizes.dim, width), work.delta, start, end)
    if pointer[ROUTER]:
        _experts_out(pointer, sizes, work, start, end)
    _write(sizes, tokens, work, start, end)
    _meet(clocks, me, phase + 5)


@compiled
def _logits(ends, sizes, tokens, work, logits, clocks, me, phase):  # pragma: no cover
    """Reduces the streams and writes the logits [N, V]. One barrier."""
    threads = clocks.shape[0]
    size = sizes.streams
    flat_dim = sizes.streams * sizes.dim
    start, end = _share(tokens.x.shape[0], me, threads)
    weight = _vector(ends[0], sizes.dim)
    read = np.empty(sizes.dim, np.float32)
    mapping = np.empty((1, size), np.float32)
    for n in range(start, end):
        if size == 1:
            norm(tokens.x[n, 0], weight, sizes.eps, work.hidden[n])
            continue
        share = tokens.pre[n]
        if not sizes.single_pass:
            x = matrix_at(tokens.x.ctypes.data + 4 * n * flat_dim, 1, flat_dim)
            score_tile(x, matrix_at(ends[2], size, flat_dim), mapping, 0, size)
            inverse = _inverse_rms(x[0], sizes.hyper_norm_eps)
            base = _vector(ends[3], size)
            scale = _vector(ends[4], 1)
            for s in range(size):
                logit = mapping[0, s] * inverse * scale[0] + base[s]
                share[s] = _sigmoid(logit) + np.float32(sizes.hyper_eps)
        _reduce(tokens.x[n], share, read)
        norm(read, weight, sizes.eps, work.hidden[n])
    _meet(clocks, me, phase)
    start, end = _share(sizes.vocab_size, me, threads)
    score_tile(work.hidden, matrix_at(ends[1], sizes.vocab_size, sizes.dim), logits, start, end)


@compiled
def _step(
    places, widths, ends, sizes, tokens, work, first, last, logits, clocks, me, phase
):  # pragma: no cover
    """Computes this thread's share of the parts from `first` to `last` of a decoding step.

    Part 2 l is the attention of block l, part 2 l + 1 its feed-forward. The logits are computed
    unless `logits` is empty. `places` [layers, PLACES] and `ends` are addresses; `widths` are those
    of each SwiGLU; `phase` is greater than that of every barrier so far.
    """
    for half in range(first, last):
        layer = half // 2
        barrier = phase + BARRIERS * (half - first)
        pointer = places[layer]
        if half % 2:
            _feed_forward(pointer, sizes, tokens, work, widths[layer], clocks, me, barrier)
        else:
            _attention(pointer, sizes, tokens, work, clocks, me, barrier)
    if logits.shape[0]:
        barrier = phase + BARRIERS * (last - first)
        _logits(ends, sizes, tokens, work, logits, clocks, me, barrier)


CODE: Any = _step  # the same function as a numba dispatcher


def _types() -> tuple:
    """Returns the numba types of `_step`'s arguments, which are the same for every model."""
    whole = np.zeros(1, np.int64)
    sizes = Sizes(*(kind() for kind in Sizes.__annotations__.values()))
    step = Step(np.zeros((1, len(PLACES)), np.int64), whole, whole, sizes, 1)
    none = np.empty((0, 0), np.float32)
    streams = np.empty((1, 1, 1), np.float32)
    pages = np.zeros((1, 1), np.int64)
    tokens = Tokens(whole, streams, none, whole, pages, none, none)
    arguments = step.arguments(tokens, 0, 0, none)
    return tuple(numba.typeof(value) for value in (*arguments, 0, 0))


class Step:
    """A model's addresses, sizes and scratch memory.

    The weights must not move in memory.
    """

    # For the caller, which does not import this module.
    PLACES = PLACES
    ENDS = ENDS
    PAGE = PAGE
    SIZES = Sizes
    TOKENS = Tokens

    def __init__(
        self, places: np.ndarray, widths: np.ndarray, ends: np.ndarray, sizes: Sizes, threads: int
    ) -> None:
        """Stores the addresses and starts the threads.

        `places` [layers, PLACES] may be changed between calls: a cache that grows moves.
        """
        self.places = places
        self.widths = widths
        self.ends = ends
        self.sizes = sizes
        self.clocks = np.zeros((threads, LINE), np.int64)
        self.work = scratch(sizes, 1, int(widths.max()))
        self.pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self.phase = 1

    @staticmethod
    def build() -> None:
        """Compiles the step, or loads it from numba's cache.

        Compilation takes some 30 seconds of a core, loading a tenth of a second.
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
        """Returns whether numba has a folder where it can cache machine code."""
        return CODE.stats.cache_path is not None

    @staticmethod
    def keep() -> None:
        """Compiles the step into numba's cache for other processes, unless another does so."""
        offset = Path(CODE.stats.cache_path)
        offset.mkdir(parents=True, exist_ok=True)
        with suppress(Locked), lock(offset / "step.lock", "another process builds the step"):
            Step.build()

    def arguments(self, tokens: Tokens, first: int, last: int, logits: np.ndarray) -> tuple:
        """Returns the arguments of `_step` but for the thread's number and its phase."""
        sizes = self.places, self.widths, self.ends, self.sizes
        return *sizes, tokens, self.work, first, last, logits, self.clocks

    def __call__(self, tokens: Tokens, first: int, last: int, logits: np.ndarray) -> None:
        """Runs the parts of blocks from `first` to `last` on the tokens' streams, in place.

        `logits` [N, V] are written if they are not empty.
        """
        if len(tokens.x) != len(self.work.hidden):
            self.work = scratch(self.sizes, len(tokens.x), int(self.widths.max()))
        arguments = self.arguments(tokens, first, last, logits)
        phase = self.phase
        self.phase += BARRIERS * (last - first) + 1
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
