"""The arithmetic of hyper-connections as functions of tensors: read, mix and write streams.

    pre, post  = sigmoid(scale_0 m_pre + base_pre) + eps, 2 sigmoid(scale_1 m_post + base_post)
    comb       = Sinkhorn(scale_2 m_comb + base_comb)
    u          = sum_i pre_i x_i                              `pre_mapping` computes all of these
    x_k       <- post_k F(u) + sum_j comb[j, k] x_j           `post_mapping`

It is the arithmetic of mHC (arXiv:2512.24880) without its parameters. Every sum over streams is
computed in the precision of the coefficients. The S*S matrices of all tokens are stored as
[S, S, N], tokens last.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rorqual.kernels import kernel
from rorqual.kernels.results import Read as Read


class Streams(NamedTuple):
    """The residual streams between two sublayers."""

    values: Float[Tensor, "B T S D"]
    pre: Float[Tensor, "B T S"] | None = None  # the pre-mapping of the site before, if any

    def add(self, update: Float[Tensor, "B T S D"]) -> "Streams":
        """Returns the streams with `update` added to their values."""
        return self._replace(values=self.values + update)


class Squashed(NamedTuple):
    """Two of a site's coefficients, and what the third is made of, tokens last."""

    pre: Float[Tensor, "S N"]
    post: Float[Tensor, "S N"]
    logits: Float[Tensor, "L N"]  # of comb, row-major; none if the streams do not mix


def coefficient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of coefficients: float32, or float64 for float64 streams."""
    return torch.promote_types(dtype, torch.float32)


class _Sinkhorn(torch.autograd.Function):
    """Sinkhorn normalisation, tokens last; backward recomputes the iterates from the logits.

    Step n normalises axis n mod 2. One step and its backward, with P = c' dL/dc', are

        c' = c / d,   d = sum_axis c + eps          P <- P - c' sum_axis P

    There is no division, so no gradient can overflow however small a sum was. Only the logits are
    saved. Backward stores the sums d, a quarter of the size of the iterates c = c' d.
    """

    @staticmethod
    def forward(ctx, logits, iterations, eps):
        ctx.save_for_backward(logits)
        ctx.iterations = iterations
        ctx.eps = eps
        # A row in which all exponentials underflow must not become 0 / 0.
        comb = logits.softmax(1) + (eps or torch.finfo(logits.dtype).tiny)
        for step in range(2 * iterations - 1):
            comb.div_(comb.sum(step % 2, keepdim=True).add_(eps))
        return comb

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors
        start = logits.softmax(1)
        sums = []
        comb = start + (ctx.eps or torch.finfo(start.dtype).tiny)
        for step in range(2 * ctx.iterations - 1):
            sums.append(comb.sum(step % 2, keepdim=True).add_(ctx.eps))
            comb.div_(sums[-1])
        # A strided gradient would make every step strided.
        flow = gradient.contiguous() * comb
        for step in reversed(range(2 * ctx.iterations - 1)):
            flow.addcmul_(comb, flow.sum(step % 2, keepdim=True), value=-1)
            comb.mul_(sums[step])
        if ctx.eps:
            flow.mul_(start).div_(start + ctx.eps)
        return flow.addcmul_(start, flow.sum(1, keepdim=True), value=-1), None, None


@kernel(numba="rorqual.kernels.hyper:sinkhorn")
def sinkhorn(
    logits: Float[Tensor, "S S N"], iterations: int = 20, eps: float = 1e-6
) -> Float[Tensor, "S S N"]:
    """Normalises the logits to a matrix that is doubly stochastic once it has converged.

    c = softmax(logits, axis 1) + eps, then axis 0 is normalised; then iterations - 1 times axis 1
    and axis 0. Every normalisation divides by (sum + eps). Axis 0 sums to 1 within 1e-5; axis 1
    only as far as it has converged (3e-2 and more off for logits of deviation 2). The S*S matrices
    come first so that every step runs along the tokens.
    """
    return _Sinkhorn.apply(logits, iterations, eps)


class _Project(torch.autograd.Function):
    """Computes (weight x^T) / rms(x) without storing the normalised streams.

    This is possible because the norm commutes with the product.
    """

    @staticmethod
    def forward(ctx, flat, weight, eps):
        mean = torch.linalg.vector_norm(flat, dim=-1).square() / flat.shape[-1]
        inverse = (mean + eps).rsqrt()  # [N]
        # Not in place: selective activation checkpointing stores the results of products.
        projected = (weight @ flat.T) * inverse  # [K, N]
        ctx.save_for_backward(flat, weight, inverse, projected)
        return projected

    @staticmethod
    def backward(ctx, gradient):
        flat, weight, inverse, projected = ctx.saved_tensors
        scaled = gradient * inverse
        shrink = (gradient * projected).sum(0) * inverse.square() / -flat.shape[-1]
        return (scaled.T @ weight).addcmul_(flat, shrink[:, None]), scaled @ flat, None


def project(
    flat: Float[Tensor, "N F"], weight: Float[Tensor, "K F"], eps: float = 1e-6
) -> Float[Tensor, "K N"]:
    """Computes m[k, n] = <weight_k, x_n> rsqrt(mean(x_n^2) + eps), tokens last."""
    return _Project.apply(flat, weight, eps)


def squash(
    m: Float[Tensor, "K N"],
    scale: Float[Tensor, "3"],
    base: Float[Tensor, " K"],
    streams: int,
    eps: float,
) -> Squashed:
    """Computes pre, post and the logits of comb from the projections m.

    Rows of m and base: S of pre, S of post, the rest of comb.
    """
    S = streams
    base = base[:, None]
    # One rounding for product and sum, as DeepSeek-V4.1's reference has it: Sinkhorn's gradients
    # are small differences, in which a second rounding shows.
    pre = torch.sigmoid(torch.addcmul(base[:S], m[:S], scale[0])) + eps
    post = 2 * torch.sigmoid(torch.addcmul(base[S : 2 * S], m[S : 2 * S], scale[1]))
    return Squashed(pre, post, torch.addcmul(base[2 * S :], m[2 * S :], scale[2]))


def read(streams: Float[Tensor, "N S D"], pre: Float[Tensor, "S N"]) -> Float[Tensor, "N D"]:
    """Computes the sublayer's input, u = sum_i pre_i x_i.

    It is summed in the precision of pre and returned in the dtype of the streams.
    """
    # A compiler fuses sums, but calls a library for products.
    if torch.compiler.is_compiling():
        return (pre.T[..., None] * streams).sum(1).to(streams.dtype)
    return (pre.T[:, None].contiguous() @ streams.to(pre.dtype))[:, 0].to(streams.dtype)


@kernel(
    numba="rorqual.kernels.hyper:pre_mapping", triton="rorqual.kernels.triton_hyper:pre_mapping"
)
def pre_mapping(
    streams: Float[Tensor, "N S D"],
    m: Float[Tensor, "K N"],
    scale: Float[Tensor, "3"],
    base: Float[Tensor, " K"],
    handed_on: Float[Tensor, "S N"] | None = None,
    iterations: int = 20,
    eps: float = 1e-6,
) -> Read:
    """Computes u, pre, post and comb of one site, with K = 2S + S*S projections.

    comb's rows are row-major [j, k]. u is read with the pre-mapping `handed_on` if it is given.
    """
    S = streams.shape[1]
    squashed = squash(m, scale, base, S, eps)
    comb = sinkhorn(squashed.logits.view(S, S, -1), iterations, eps)
    u = read(streams, squashed.pre if handed_on is None else handed_on)
    return Read(u, squashed.pre, squashed.post, comb)


@kernel(
    numba="rorqual.kernels.hyper:post_mapping", triton="rorqual.kernels.triton_hyper:post_mapping"
)
def post_mapping(
    streams: Float[Tensor, "N S D"],
    out: Float[Tensor, "N D"],
    post: Float[Tensor, "S N"],
    comb: Float[Tensor, "S S N"] | None,
) -> Float[Tensor, "N S D"]:
    """Writes a sublayer's output back: x_k <- post_k out + sum_j comb[j, k] x_j.

    It is summed in the precision of post and returned in the dtype of the streams. comb None is the
    identity. A compiler gets one sum for each stream, which it fuses into one pass over all of
    them.
    """
    out = out.to(post.dtype)
    wide_streams = streams.to(post.dtype)
    if comb is not None and torch.compiler.is_compiling():
        rows = wide_streams.unbind(1)
        every = range(streams.shape[1])
        made = [
            sum((comb[j, k, :, None] * rows[j] for j in every), post[k, :, None] * out)
            for k in every
        ]
        return torch.stack(made, 1).to(streams.dtype)
    mixed = streams if comb is None else comb.permute(2, 1, 0).contiguous() @ wide_streams
    return torch.addcmul(mixed, post.T[..., None], out[:, None]).to(streams.dtype)
