"""Hidden states, keys and value in -> the gated value and its norm out: layers.engram.fuse compiled, on the CPU.

A token's values of one stream stay in the core's nearest cache while they are summed, gated and normed, so that memory
is read and written once, in backward too; nothing is kept from forward but its inputs. kernels/triton_fuse.py has the
derivatives. Threads split the tokens. In float32.

Near a score of 0 the slope of the signed root turns the last bit of a score into the fourth digit of a gradient. For
backward torch therefore sums the scores, rounded as in the reference.
"""

import functools
import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.compiled import compiled, spread

_FLAT = np.float32(1e-6)  # below this |score| the signed square root is constant
_WORTH_A_THREAD = 1 << 16  # values; below, starting threads takes longer than the work
_AT_ONCE = 1 << 15  # values whose scores torch sums together: what lies between stays in a core's cache
_loop = functools.partial(compiled, any_order=True)  # sums may run on vectors


@_loop
def _inverse(x, eps):  # pragma: no cover
    """1 / its root mean square."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return np.float32(1 / math.sqrt(total / np.float32(len(x)) + eps))


@_loop
def _score(h, k, both, eps):  # pragma: no cover
    total = np.float32(0)
    for i in range(len(h)):
        total += h[i] * k[i] * both[i]
    return np.float32(total * _inverse(h, eps) * _inverse(k, eps) / math.sqrt(len(h)))


@_loop
def _gate(score, copysign):  # pragma: no cover
    """Gate, and its derivative by the score."""
    root = np.float32(math.sqrt(max(abs(score), _FLAT)))
    signed = -root if score < 0 else root if score > 0 or copysign else np.float32(0)
    gate = np.float32(1 / (1 + math.exp(-signed)))
    slope = gate * (1 - gate) / (2 * root) if abs(score) >= _FLAT else np.float32(0)
    return gate, np.float32(slope)


@_loop
def _forward(hidden, key, value, both, conv, live, eps, copysign, gated, normed, first, last):  # pragma: no cover
    """Optional arrays are empty where there are none."""
    for n in range(first, last):
        for s in range(hidden.shape[1]):
            gate = np.float32(0)
            if not len(live) or live[n]:
                gate = _gate(_score(hidden[n, s], key[n, s], both[s], eps[0]), copysign)[0]
            out, v = gated[n, s], value[n]
            for i in range(len(v)):
                out[i] = gate * v[i]
            if len(conv):
                r, w, norm = _inverse(out, eps[1]), conv[s], normed[n, s]
                for i in range(len(v)):
                    norm[i] = out[i] * r * w[i]


@_loop
def _unnorm(out, w, eps, d_normed, change, d_conv):  # pragma: no cover
    """Adds what comes through norm(out) w to `change`, the gradient of `out`, and to that of w."""
    r, along = _inverse(out, eps), np.float32(0)
    for i in range(len(out)):
        along += d_normed[i] * w[i] * out[i]
        d_conv[i] += d_normed[i] * out[i] * r
    back = along * r * r / np.float32(len(out))
    for i in range(len(out)):
        change[i] += r * (d_normed[i] * w[i] - out[i] * back)


@_loop
def _ungate(h, k, v, w, given, eps, change, d_value, d_hidden, d_key, d_both):  # pragma: no cover
    """`given` is score, gate and slope, `change` the gradient of gate v; adds to d_value and d_both."""
    score, gate, slope = given
    h_r, k_r = _inverse(h, eps), _inverse(k, eps)
    total, size = np.float32(0), np.float32(len(v))
    for i in range(len(v)):
        total += change[i] * v[i]
        d_value[i] += gate * change[i]
    d_score = total * slope
    across = d_score * h_r * k_r / np.float32(math.sqrt(size))
    h_back, k_back = d_score * score / size * h_r * h_r, d_score * score / size * k_r * k_r
    for i in range(len(v)):
        d_both[i] += across * h[i] * k[i]
        d_hidden[i] = across * w[i] * k[i] - h_back * h[i]
        d_key[i] = across * w[i] * h[i] - k_back * k[i]


@_loop
def _backward(
    hidden, key, value, both, conv, live, scores, eps, copysign, d_gated, d_normed,
    d_hidden, d_key, d_value, d_both, d_conv, first, last,
):  # pragma: no cover  # fmt: skip
    """Adds to d_both and d_conv, which are of these tokens only, and to d_value, which comes as zeros."""
    out, change = np.empty(value.shape[1], np.float32), np.empty(value.shape[1], np.float32)
    for n in range(first, last):
        v = value[n]
        for s in range(hidden.shape[1]):
            if len(live) and not live[n]:
                d_hidden[n, s], d_key[n, s] = np.float32(0), np.float32(0)
                continue
            gate, slope = _gate(scores[n, s], copysign)
            for i in range(len(v)):
                out[i], change[i] = gate * v[i], d_gated[n, s, i]
            if len(conv):
                _unnorm(out, conv[s], eps[1], d_normed[n, s], change, d_conv[s])
            _ungate(
                hidden[n, s], key[n, s], v, both[s], (scores[n, s], gate, slope), eps[0], change,
                d_value[n], d_hidden[n, s], d_key[n, s], d_both[s],
            )  # fmt: skip


def _scores(hidden: Tensor, key: Tensor, query_norm: Tensor, key_norm: Tensor, eps: float) -> Tensor:
    """[B T, S], to the bit those of layers.engram.fuse."""
    shape, scale = hidden.shape[-1:], hidden.shape[-1] ** -0.5
    step = max(2, _AT_ONCE // query_norm.numel())
    runs = zip(hidden.flatten(0, 1).split(step), key.flatten(0, 1).split(step), strict=True)
    found = [
        (F.rms_norm(h, shape, None, eps) * query_norm * (F.rms_norm(k, shape, None, eps) * key_norm)).sum(-1)
        for h, k in runs
    ]
    return torch.cat(found) * scale


def _arrays(hidden, key, value, query_norm, key_norm, conv_norm, live) -> list[np.ndarray]:
    """What both loops read; both norm weights of the gate only ever stand as a product. Never a parameter's own memory:
    what numpy has seen cannot be resized, and sharding (FSDP) frees parameters that way."""
    given = [hidden.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), query_norm * key_norm]
    given.append(hidden.new_empty(0, 1) if conv_norm is None else conv_norm.clone())
    given.append(hidden.new_empty(0, dtype=torch.bool) if live is None else live.flatten())
    return [tensor.detach().contiguous().numpy() for tensor in given]


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, key, value, query_norm, key_norm, conv_norm, live, sign, eps, conv_eps):
        given = (hidden, key, value, query_norm, key_norm, conv_norm, live)
        ctx.save_for_backward(*given)
        ctx.parts = min(torch.get_num_threads(), max(1, hidden.numel() // _WORTH_A_THREAD))
        ctx.eps, ctx.rest = eps, (np.array([eps, conv_eps], np.float32), sign == "copysign")
        gated = hidden.new_empty(hidden.shape)
        normed = None if conv_norm is None else torch.empty_like(gated)
        arrays, out = _arrays(*given), gated.flatten(0, 1).numpy()
        norm = out if normed is None else normed.flatten(0, 1).numpy()
        spread(lambda _, *span: _forward(*arrays, *ctx.rest, out, norm, *span), len(out), ctx.parts)
        return gated, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, d_gated, d_normed):
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks no tensor twice
        hidden, key, value, query_norm, key_norm, conv_norm, *_ = saved
        arrays = [*_arrays(*saved), _scores(hidden, key, query_norm, key_norm, ctx.eps).numpy()]
        d_hidden, d_key, d_value = (x.new_empty(x.shape) for x in (hidden, key, value))
        d_both = hidden.new_zeros(ctx.parts, *query_norm.shape)
        d_value.zero_()
        d_conv = torch.zeros_like(d_both) if conv_norm is not None else d_both[:, :0]
        changes = [d_gated, d_gated if d_normed is None else d_normed]
        read = [change.contiguous().flatten(0, 1).numpy() for change in changes]
        made = [change.flatten(0, 1).numpy() for change in (d_hidden, d_key, d_value)]
        sums = (d_both.numpy(), d_conv.numpy())

        def loop(part: int, first: int, last: int) -> None:
            _backward(*arrays, *ctx.rest, *read, *made, sums[0][part], sums[1][part], first, last)

        spread(loop, len(made[0]), ctx.parts)
        of_both, of_conv = d_both.sum(0), None if conv_norm is None else d_conv.sum(0)
        of_norms = (of_both * key_norm, of_both * query_norm, of_conv)
        return d_hidden, d_key, d_value, *of_norms, None, None, None, None


def fuse(
    hidden: Float[Tensor, "B T S D"],
    key: Float[Tensor, "B T S D"],
    value: Float[Tensor, "B T D"],
    query_norm: Float[Tensor, "S D"],
    key_norm: Float[Tensor, "S D"],
    conv_norm: Float[Tensor, "S D"] | None,
    live: Bool[Tensor, "B T"] | None,
    sign: Literal["sign", "copysign"],
    eps: float,
    conv_eps: float,
) -> tuple[Float[Tensor, "B T S D"], Float[Tensor, "B T S D"] | None]:
    """See layers.engram.fuse, whose numbers these are within float32 rounding."""
    return _Fuse.apply(hidden, key, value, query_norm, key_norm, conv_norm, live, sign, eps, conv_eps)
