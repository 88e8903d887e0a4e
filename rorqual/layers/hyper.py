"""Hyper-connections: residual streams that each sublayer reads, mixes and writes.

    m    = (fn vec(x)) / rms(vec(x))                       one norm over all S*D values, unweighted
    pre  = sigmoid(scale_0 m_pre + base_pre) + eps         how much of each stream is read
    post = 2 sigmoid(scale_1 m_post + base_post)           how much of its output each stream takes
    comb = Sinkhorn(scale_2 m_comb + base_comb)            how the streams mix, doubly stochastic
    x_k <- post_k F(sum_i pre_i x_i) + sum_j comb[j, k] x_j           transposed: H_res = comb^T

mHC: Manifold-Constrained Hyper-Connections, arXiv:2512.24880, in the arithmetic of DeepSeek-V4;
`kind="single_pass"` reads with the previous site's pre (V4.1). The unconstrained ancestor,
`kind="hc"`, is Hyper-Connections, 2409.19606:

    n    = norm(x_j)
    pre  = s_a tanh(n W_m) + A_m0
    post = s_b tanh(n W_b) + B_0
    comb = s_a tanh(n W_r) + A_r0

With `eps=0` this is the paper's arithmetic: exp, columns of H_res normalised first, rows last, and
pre = sigmoid alone. Coefficients are float32 for any dtype of streams and autocast (float64 stays
float64). The tensor functions are in streams.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.layers.streams import (
    Read,
    coefficient_dtype,
    post_mapping,
    pre_mapping,
    project,
    read,
    squash,
)
from rorqual.layers.streams import Streams as Streams
from rorqual.model_config import HyperConfig as HyperConfig


class Mapping(NamedTuple):
    """The streams that a site read, and the mappings that write its sublayer's output back.

    Tokens of all sequences come first or last, as the shapes show.
    """

    streams: Float[Tensor, "N S D"]
    shape: tuple[int, int]  # batch and time, N = B T
    post: Float[Tensor, "S N"] | None = None  # None: the output is added to the only stream
    comb: Float[Tensor, "S S N"] | None = None  # None: the streams do not mix
    pre: Float[Tensor, "S N"] | None = None  # the pre-mapping that is handed on

    def last(self, lengths: Int[Tensor, " B"] | None) -> "Mapping":
        """Returns the mapping of each sequence's last token; `lengths` is None without padding."""
        batch, time = self.shape
        sequences = torch.arange(batch, device=self.streams.device)
        column = (
            (sequences, (lengths - 1).clamp_min(0)) if lengths is not None else (slice(None), -1)
        )
        others = (
            None if tokens_last is None else tokens_last.unflatten(-1, (batch, time))[..., *column]
            for tokens_last in (self.post, self.comb, self.pre)
        )
        return Mapping(self.streams.unflatten(0, (batch, time))[column], (batch, 1), *others)


class Coefficients(NamedTuple):
    """The coefficients that a site computes from the streams.

    comb[j, k] is the weight from stream j to stream k; None is the identity.
    """

    pre: Float[Tensor, "B T S"]
    post: Float[Tensor, "B T S"]
    comb: Float[Tensor, "B T S S"] | None


def unrounded(streams: Tensor) -> torch.autocast:
    """Disables autocast for a `with` block.

    Autocast would round coefficients, and the products that mix the streams, to bfloat16.
    """
    return torch.autocast(streams.device.type, enabled=False)


class Manifold(nn.Module):
    """Computes the coefficients of mHC, with comb doubly stochastic.

    Parameters are as in DeepSeek-V4: rows pre | post | comb, the last row-major [j, k]. At the
    start pre sums to 1 and post is 1 up to scale * noise, so equal streams make a plain residual
    network. fn is random, because with fn = 0 and equal biases the streams would stay equal for
    ever.
    """

    def __init__(self, config: HyperConfig, dim: int):
        super().__init__()
        self.config = config
        rows = 2 * config.streams + (config.streams**2 if config.mix == "sinkhorn" else 0)
        self.fn = nn.Parameter(torch.empty(rows, config.streams * dim))
        self.base = nn.Parameter(torch.empty(rows))
        self.scale = nn.Parameter(torch.empty(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets fn ~ N(0, 1/(S D)), so that m has deviation 1, and scale = config.scale.

        base starts as the class describes.
        """
        streams = self.config.streams
        with torch.no_grad():
            self.fn.copy_(torch.randn(self.fn.shape) * self.fn.shape[1] ** -0.5)
            self.scale.fill_(self.config.scale)
            self.base.zero_()
            self.base[:streams] = _even(streams)
            if self.config.mix == "sinkhorn":
                self.base[2 * streams :] = self.config.identity * torch.eye(streams).flatten()

    def forward(
        self, streams: Float[Tensor, "N S D"], handed_on: Float[Tensor, "S N"] | None = None
    ) -> Read:
        """Computes u, pre, post and comb [S, S, N] or None, in float32 at least.

        u is read with the pre-mapping `handed_on` if it is given.
        """
        config = self.config
        precision = coefficient_dtype(streams.dtype)
        # [K, N]
        m = project(streams.flatten(1).to(precision), self.fn.to(precision), config.norm_eps)
        scale = self.scale.to(precision)
        base = self.base.to(precision)
        if config.mix == "sinkhorn":
            return pre_mapping(streams, m, scale, base, handed_on, config.iterations, config.eps)
        squashed = squash(m, scale, base, config.streams, config.eps)
        u = read(streams, squashed.pre if handed_on is None else handed_on)
        return Read(u, squashed.pre, squashed.post, None)


class Unconstrained(nn.Module):
    """Computes the coefficients of Hyper-Connections.

    At the start it is a pre-norm residual network that reads stream site mod S.
    """

    def __init__(self, config: HyperConfig, dim: int, site: int):
        super().__init__()
        self.config = config
        self.site = site
        streams = config.streams
        self.fn = nn.Parameter(torch.empty(2 + streams, dim))  # rows W_m | W_b | W_r^T
        self.base_pre = nn.Parameter(torch.empty(streams))
        self.base_post = nn.Parameter(torch.empty(streams))
        self.base_comb = nn.Parameter(torch.empty(streams, streams))
        self.scale = nn.Parameter(torch.empty(2))  # s_a of pre and comb, s_b of post
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets W = 0, s = config.scale, B_0 = ones, A_m0 = e_{site mod S}, A_r0 = I."""
        streams = self.config.streams
        with torch.no_grad():
            self.fn.zero_()
            self.scale.fill_(self.config.scale)
            self.base_post.fill_(1.0)
            self.base_pre.copy_(torch.eye(streams)[self.site % streams])
            self.base_comb.copy_(torch.eye(streams))

    def forward(
        self, streams: Float[Tensor, "N S D"], handed_on: Float[Tensor, "S N"] | None = None
    ) -> Read:
        """Computes u, pre, post and comb, in float32 at least; `handed_on` must be None.

        comb[j, k] is A_r's row of stream j.
        """
        assert handed_on is None
        precision = coefficient_dtype(streams.dtype)
        S = self.config.streams
        flat = streams.flatten(0, 1).to(precision)
        m = project(flat, self.fn.to(precision), self.config.norm_eps).tanh()
        m = m.view(2 + S, -1, S).transpose(1, 2)  # [2 + S, S, N]
        scale = self.scale.to(precision)
        pre = scale[0] * m[0] + self.base_pre.to(precision)[:, None]
        post = scale[1] * m[1] + self.base_post.to(precision)[:, None]
        comb = scale[0] * m[2:].transpose(0, 1) + self.base_comb.to(precision)[..., None]
        return Read(read(streams, pre), pre, post, comb)


class Connection(nn.Module):
    """One site: `read` computes a sublayer's input from the streams, `write` adds its output.

    The sublayer applies its own norm to its input. `site` counts sublayers from 0 through the whole
    model. The pre-mapping is handed on in wide precision, with its gradient; only single_pass reads
    with that of the site before.
    """

    def __init__(self, config: HyperConfig, dim: int, site: int = 0):
        super().__init__()
        self.config = config
        self.mixer = (
            Unconstrained(config, dim, site) if config.kind == "hc" else Manifold(config, dim)
        )

    def reset_parameters(self) -> None:
        """Resets every parameter to the start that the mixer's docstring describes."""
        self.mixer.reset_parameters()

    def coefficients(self, streams: Float[Tensor, "B T S D"]) -> Coefficients:
        """Computes pre, post and comb for these streams, for analysis."""
        batch, time, S, _ = streams.shape
        with unrounded(streams):
            made = self.mixer(streams.flatten(0, 1))
        comb = made.comb
        if comb is not None:
            comb = comb.permute(2, 0, 1).reshape(batch, time, S, S)
        pre, post = (x.T.reshape(batch, time, S) for x in (made.pre, made.post))
        return Coefficients(pre, post, comb)

    def read(self, x: Streams) -> tuple[Float[Tensor, "B T D"], Mapping]:
        """Returns the sublayer's input, sum_i pre_i x_i, and the mapping for `write`."""
        batch, time, S, dim = x.values.shape
        flat = x.values.reshape(batch * time, S, dim)
        single = self.config.kind == "single_pass"
        with unrounded(flat):
            handed_on = x.pre.flatten(0, 1).T if single and x.pre is not None else None
            made = self.mixer(flat, handed_on)
        # The first site's pre-mapping is one-hot on stream 0.
        u = x.values[:, :, 0] if single and x.pre is None else made.u
        mapping = Mapping(flat, (batch, time), made.post, made.comb, made.pre)
        return u.view(batch, time, dim), mapping

    def write(self, out: Float[Tensor, "B T D"], mapping: Mapping) -> Streams:
        """Computes x_k <- post_k out + sum_j comb[j, k] x_j."""
        assert mapping.post is not None and mapping.pre is not None
        with unrounded(mapping.streams):
            written = post_mapping(mapping.streams, out.flatten(0, 1), mapping.post, mapping.comb)
        values = written.unflatten(0, mapping.shape)
        return Streams(values, mapping.pre.T.unflatten(0, mapping.shape))


class Residual(nn.Module):
    """The plain residual connection, x + F(x), with the methods of Connection for one stream."""

    def read(self, x: Streams) -> tuple[Float[Tensor, "B T D"], Mapping]:
        """Returns the stream itself, and a mapping without coefficients."""
        batch, time = x.values.shape[:2]
        return x.values[:, :, 0], Mapping(x.values.flatten(0, 1), (batch, time))

    def write(self, out: Float[Tensor, "B T D"], mapping: Mapping) -> Streams:
        """Adds the output to the only stream: x + out."""
        return Streams(mapping.streams.unflatten(0, mapping.shape) + out[:, :, None])


def expand(hidden: Float[Tensor, "B T D"], config: HyperConfig | None) -> Streams:
    """Copies the embedding to every stream; to one stream when config is None."""
    streams = hidden[:, :, None].expand(-1, -1, config.streams if config else 1, -1)
    # Batched products of streams that share memory would be computed one by one.
    return Streams(streams.contiguous())


class StreamReduction(nn.Module):
    """Reduces the streams to one hidden state before the final norm.

    mhc (DeepSeek-V4)     u = sum_i (sigmoid(scale m_i + base_i) + eps) x_i, m as in Manifold
    single_pass (V4.1)    u = sum_i pre_i x_i, with the last site's pre
    hc                    u = sum_i x_i

    With config None it returns the only stream.
    """

    def __init__(self, config: HyperConfig | None, dim: int):
        super().__init__()
        self.config = config
        self.kind = config.kind if config is not None else "hc"
        if config is not None and self.kind == "mhc":
            self.fn = nn.Parameter(torch.empty(config.streams, config.streams * dim))
            self.base = nn.Parameter(torch.empty(config.streams))
            self.scale = nn.Parameter(torch.empty(1))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets fn ~ N(0, 1/(S D)) and scale = config.scale.

        base is reset so that the weights start at 1/S each.
        """
        if self.config is not None and self.kind == "mhc":
            with torch.no_grad():
                self.fn.copy_(torch.randn(self.fn.shape) * self.fn.shape[1] ** -0.5)
                self.base.fill_(_even(self.config.streams))
                self.scale.fill_(self.config.scale)

    def forward(self, x: Streams) -> Float[Tensor, "B T D"]:
        """Returns one stream of width D. Without a site before, single_pass returns stream 0."""
        streams, handed_on = x
        if self.kind == "hc":
            alone = streams.shape[2] == 1
            return (
                streams[:, :, 0]
                if alone
                else streams.sum(2, dtype=coefficient_dtype(streams.dtype)).to(streams.dtype)
            )
        if self.kind == "single_pass" and handed_on is None:
            return streams[:, :, 0]
        with unrounded(streams):
            flat = streams.flatten(0, 1)
            pre = (
                self._weights(flat)
                if handed_on is None or self.kind == "mhc"
                else handed_on.flatten(0, 1).T
            )
            return read(flat, pre).view_as(streams[:, :, 0])

    def _weights(self, flat: Float[Tensor, "N S D"]) -> Float[Tensor, "S N"]:
        """Computes the weight of each stream in the result of kind mhc, in float32 at least."""
        assert self.config is not None
        precision = coefficient_dtype(flat.dtype)
        m = project(flat.flatten(1).to(precision), self.fn.to(precision), self.config.norm_eps)
        return (
            torch.sigmoid(m * self.scale.to(precision) + self.base.to(precision)[:, None])
            + self.config.eps
        )


def _even(streams: int) -> float:
    """Returns the logit whose sigmoid is 1/S.

    S = 1 has none, so its sigmoid is 0.9999.
    """
    return -math.log(streams - 1) if streams > 1 else math.log(9999.0)


def composite_gain(combs: Sequence[Float[Tensor, "*N S S"]]) -> tuple[float, float]:
    """Computes the largest absolute row and column sum of H_res_L ... H_res_1 over all tokens.

    H_res = comb^T; the result is (1, 1) without any. The sums bound how far a signal (rows) and a
    gradient (columns) may grow along the streams alone: about 1 for mHC, thousands for
    unconstrained HC (section 3 of arXiv:2512.24880). `combs` are in the order of the sites.
    """
    if not combs:
        return 1.0, 1.0
    total = torch.eye(
        combs[0].shape[-1], dtype=coefficient_dtype(combs[0].dtype), device=combs[0].device
    )
    for comb in combs:
        total = comb.to(total.dtype).transpose(-1, -2) @ total
    return total.abs().sum(-1).max().item(), total.abs().sum(-2).max().item()


def spread(streams: Float[Tensor, "B T S D"]) -> float:
    """Computes the RMS of the streams around their mean over the RMS of the mean.

    It is 0 when all streams are equal.
    """
    streams = streams.to(coefficient_dtype(streams.dtype))
    mean = streams.mean(2, keepdim=True)
    return ((streams - mean).square().mean() / mean.square().mean().clamp_min(1e-30)).sqrt().item()


class Health(NamedTuple):
    """The gains and the spread of a model's streams over one call."""

    row_gain: float
    column_gain: float
    spread: float  # after the last site


def health(model: nn.Module, call: Callable[[], object]) -> Health | None:
    """Measures the gains and the spread of the streams while `call` runs the model.

    Returns None if it reaches no block with hyper-connections. Hooks record every mixer in the
    order in which they run, and the streams that the last block returns. Sites that do not mix
    count as identities. No gradient is kept.
    """
    combs: list[Tensor] = []
    last: list[Tensor] = []

    def mixed(_mixer: nn.Module, _inputs: tuple, made: Read) -> None:
        if made.comb is not None:
            combs.append(made.comb.permute(2, 0, 1))

    def returned(_block: nn.Module, _inputs: tuple, made: tuple[Streams, object]) -> None:
        last[:] = [made[0].values]

    hooks = []
    for module in model.modules():
        if isinstance(module, Connection):
            hooks.append(module.mixer.register_forward_hook(mixed))
        elif any(isinstance(child, Connection) for child in module.children()):
            hooks.append(module.register_forward_hook(returned))
    try:
        with torch.no_grad():
            call()
            return Health(*composite_gain(combs), spread(last[0])) if last else None
    finally:
        for hook in hooks:
            hook.remove()
