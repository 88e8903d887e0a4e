"""Basic functions and modules: norms, rotary positions, SwiGLU, cross-entropy and top-k indices.

RMSNorm(x)     = x / sqrt(mean(x^2) + eps) * weight                 float32 inside
swiglu(x)      = W_down (silu(W_gate x) * W_up x)                  both factors may be clipped
rotate(x)      = (a cos - b sin, a sin + b cos) for each pair (a, b)
                 rotary positions, arXiv:2104.09864
YaRN           = rotary frequencies stretched where they are slow   arXiv:2309.00071
                 (and linear, dynamic, llama3 and longrope, see rope_frequencies)
convolve       = a causal depthwise convolution over time
chunked_cross_entropy = cross-entropy of hidden @ weight.T, never holding all logits
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rorqual.model_config import RopeConfig as RopeConfig
from rorqual.model_config import YarnConfig as YarnConfig
from rorqual.model_config import longest_context as longest_context

LOGITS = 1 << 22  # per chunk; 16 MiB in float32


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x * scale * weight, and scale = 1 / sqrt(mean(x^2) + eps)."""
    scale = torch.linalg.vecdot(x, x).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight), scale


class _RMSNorm(torch.autograd.Function):
    """RMS norm with an explicit backward. Once differentiable.

    Autograd would record seven operations forward and a dozen backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Computes the gradients of x and weight.

        With n = x scale: dL/dn = g w, dL/dx = scale (dL/dn - n mean(dL/dn n)), dL/dw = sum g n.
        """
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        along = grads[0] * normed
        to_weight = along.flatten(0, -2).sum(0)
        share = (along @ weight).unsqueeze(-1) / x.shape[-1]
        return normed.mul_(-share).addcmul_(grads[0], weight).mul_(scale), to_weight, None


def _wide(x: Tensor) -> Tensor:
    """Converts x to float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a learned weight that starts at one.

    It computes x / sqrt(mean(x^2) + eps) * weight in float32 and returns it in the dtype of x.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        arguments = _wide(x), _wide(self.weight), self.eps
        out = _RMSNorm.apply(*arguments) if torch.is_grad_enabled() else _normed(*arguments)[0]
        return out.to(x.dtype)


def gated(gate: Tensor, up: Tensor, limit: float | None = None) -> Tensor:
    """Computes silu(gate) * up; with a limit gate is at most that, and up within plus and minus."""
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit)
    return F.silu(gate) * up


class CentredRMSNorm(nn.Module):
    """Root-mean-square norm whose weight is stored less one, so that it starts at zero.

    It computes x / sqrt(mean(x^2) + eps) * (1 + weight) in float32 over groups of `group` values of
    the last axis (all of them by default), and returns it in the dtype of x.
    """

    def __init__(self, dim: int, eps: float = 1e-6, group: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps
        self.group = dim if group is None else group

    def reset_parameters(self) -> None:
        """Resets the weight to zero."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        groups = _wide(x).unflatten(-1, (-1, self.group))
        normed = F.rms_norm(groups, (self.group,), None, self.eps).flatten(-2)
        return (normed * (1.0 + _wide(self.weight))).to(x.dtype)


class SwiGLU(nn.Module):
    """Computes W_down (silu(W_gate x) * W_up x), without biases: from dim over width to dim.

    With a `limit` the two factors are clipped (DeepSeek-V4).
    """

    def __init__(self, dim: int, width: int, limit: float | None = None):
        super().__init__()
        self.limit = limit
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.limit))


def convolve(
    window: Float[Tensor, "B W S D"],
    weight: Float[Tensor, "S D taps"],
    document_ids: Int[Tensor, "B W"] | None,
    halo: int,
) -> Float[Tensor, "B T S D"]:
    """Applies a causal depthwise convolution over the T = W - halo last tokens.

    weight[..., taps-1-j] multiplies the value j dilations before. halo is (taps - 1) dilations, the
    number of tokens before the first one. A value of another document counts as 0.
    """
    time = window.shape[1] - halo
    taps = weight.shape[-1]
    out = window[:, halo:] * weight[..., -1]
    for j in range(1, taps):
        start = halo - j * (halo // (taps - 1))
        tap = window[:, start : start + time]
        if document_ids is not None:
            other = document_ids[:, start : start + time] != document_ids[:, halo:]
            tap = tap.masked_fill(other[..., None, None], 0.0)
        out = out + tap * weight[..., taps - 1 - j]
    return out


def _mscale(factor: float, weight: float) -> float:
    """Computes YaRN's attention factor, 0.1 weight ln(factor) + 1; 1 if factor <= 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _ramp_ends(yarn: YarnConfig, base: float, dim: int) -> tuple[float, float]:
    """Returns the pairs between which YaRN goes from the original to the slowed frequencies."""

    def pair(turns: float) -> float:
        return dim * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = pair(yarn.beta_fast)
    high = pair(yarn.beta_slow)
    if yarn.truncate:
        low = float(math.floor(low))
        high = float(math.ceil(high))
    low = max(low, 0.0)
    high = min(high, dim - 1.0)
    return low, high + 0.001 if low == high else high


def rope_frequencies(
    config: RopeConfig, dim: int, length: Int[Tensor, ""] | None = None
) -> Float[Tensor, " F"]:
    """Computes the rotary frequencies of the dim/2 pairs, in radians a token.

        f_i = base^(-2i/dim), and with YaRN f (1 - ramp) + f/s ramp,
        ramp(i) = clamp((i - low) / (high - low), 0, 1)

    | kind     | frequency                                                                   |
    |----------|-----------------------------------------------------------------------------|
    | linear   | f / s                                                                       |
    | dynamic  | base' = base (s n / N - s + 1)^(dim / (dim - 2)), n = max(`length`, N)      |
    | llama3   | f (1 - ramp) / s + f ramp, ramp = clamp((N f / 2 pi - low) / (high - low))  |
    | longrope | f / short_i, or f / long_i where `length` is more than N                    |

    N is original_length; `length` is one more than the longest position of a call, and None counts
    as N. ValueError if dim is odd.
    """
    if dim % 2:
        raise ValueError(f"got a rotary width of {dim}, expected an even one")
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if length is not None:
        exponents = exponents.to(length.device)
    if (dynamic := config.dynamic) is not None and length is not None:
        if dim < 4:
            raise ValueError(f"rope.dynamic: got a rotary width of {dim}, expected at least 4")
        longest = length.clamp_min(dynamic.original_length)
        raised = dynamic.factor * longest / dynamic.original_length - (dynamic.factor - 1)
        return 1.0 / (config.base * raised ** (dim / (dim - 2))) ** exponents
    frequencies = 1.0 / config.base**exponents
    if config.linear is not None:
        return frequencies / config.linear.factor
    if (llama3 := config.llama3) is not None:
        turns = llama3.original_length * frequencies / (2 * math.pi)
        ramp = (turns - llama3.low_turns) / (llama3.high_turns - llama3.low_turns)
        ramp = ramp.clamp(0, 1)
        return frequencies * (1 - ramp) / llama3.factor + frequencies * ramp
    if (longrope := config.longrope) is not None:
        if len(longrope.short) != dim // 2:
            raise ValueError(
                f"rope.longrope: got {len(longrope.short)} factors, "
                f"expected one for each of the {dim // 2} pairs"
            )
        short, long = (exponents.new_tensor(factors) for factors in (longrope.short, longrope.long))
        if length is not None:
            short = torch.where(length > longrope.original_length, long, short)
        return frequencies / short
    if config.yarn is None:
        return frequencies
    low, high = _ramp_ends(config.yarn, config.base, dim)
    ramp = torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device)
    ramp = ((ramp - low) / (high - low)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / config.yarn.factor * ramp


def rope_tables(
    config: RopeConfig,
    dim: int,
    positions: Int[Tensor, "B T"],
    length: Int[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "B T F"], Float[Tensor, "B T F"]]:
    """Computes cos and sin of position * frequency in float32.

    Both are multiplied by `rope_factor`. `length` is one more than the longest position that counts
    for dynamic and LongRoPE; None: of all positions.
    """
    if config.varies and length is None and positions.numel():
        length = positions.max() + 1
    frequencies = rope_frequencies(config, dim, length).to(positions.device)
    angles = positions.unsqueeze(-1).float() * frequencies
    if (factor := rope_factor(config)) == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def rope_factor(config: RopeConfig) -> float:
    """Returns the factor on cos and sin.

    It is mscale(s, mscale) / mscale(s, mscale_all_dim) with YaRN, the attention factor with
    LongRoPE, and else 1.
    """
    if (yarn := config.yarn) is not None:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    if (longrope := config.longrope) is not None:
        stretched = 1 + math.log(longrope.factor) / math.log(longrope.original_length)
        return longrope.attention_factor or math.sqrt(stretched)
    return 1.0


def rotate(
    x: Float[Tensor, "B T *H P"],
    cos: Float[Tensor, "B T F"],
    sin: Float[Tensor, "B T F"],
    interleaved: bool,
) -> Float[Tensor, "B T *H P"]:
    """Maps each pair (a, b) of the last axis to (a cos - b sin, a sin + b cos), P = 2 F.

    Heads may lie between T and P.
    """
    shape = (*cos.shape[:2], *(1,) * (x.dim() - 3), cos.shape[-1])
    cos = cos.view(shape)
    sin = sin.view(shape)
    # The gradient of a single vector may start at an odd storage offset.
    alone = x.requires_grad and x.numel() == x.shape[-1]
    # Interleaved pairs are rotated as complex numbers, which must start at an even storage offset.
    if interleaved and cos.dtype == x.dtype and not (alone or torch.compiler.is_compiling()):
        x = x.contiguous()
        x = x.clone() if x.storage_offset() % 2 else x
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    return (
        torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    ).to(x.dtype)


def softmax_factor(config: RopeConfig) -> float:
    """Returns YaRN's factor on the softmax scale.

    It is mscale(s, mscale_all_dim)^2 (1.8739 for DeepSeek-V3), or 1 without YaRN.
    """
    return (
        1.0 if config.yarn is None else _mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the loss chunk by chunk, and its gradient, if needed, from the same logits."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, graded: bool
    ) -> Tensor:
        total = _wide(hidden.new_zeros(()))
        wants_hidden = graded and ctx.needs_input_grad[0]
        wants_weight = graded and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = _wide(torch.zeros_like(weight)) if wants_weight else None
        for start in range(0, hidden.shape[0], chunk):
            rows = hidden[start : start + chunk]
            targets = labels[start : start + chunk]
            logits = _wide(rows @ weight.T)
            # torch's softmax takes a fifth of its log_softmax's time on a CPU. The logarithm of the
            # largest probability is exact where that of the target's would underflow.
            error = logits.softmax(-1)
            log_sum = logits.amax(-1) - error.amax(-1).log()
            losses = log_sum + F.nll_loss(logits, targets, ignore_index=-100, reduction="none")
            total += torch.where(targets == -100, 0.0, losses).sum()
            del logits
            if wants_hidden or wants_weight:
                has_target = (targets != -100)[:, None]
                places = targets.clamp_min(0)[:, None]
                # softmax - onehot; tokens without a target are masked by `has_target` below
                error = error.scatter_add_(1, places, error.new_full(places.shape, -1.0)).to(
                    hidden.dtype
                )
                if grad_hidden is not None:
                    torch.mul(error @ weight, has_target, out=grad_hidden[start : start + chunk])
                if grad_weight is not None:
                    _add_product(grad_weight, error.T, rows * has_target)
        ctx.gradients = (
            grad_hidden,
            grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
        )
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor):
        hidden, weight = (None if g is None else g * grads[0].to(g.dtype) for g in ctx.gradients)
        return hidden, weight, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to total, in one fused operation if the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def chunked_cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " N"],
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Sums -log softmax(hidden @ weight.T)[label] over the tokens, in nats; label -100 is left out.

    At most `chunk` tokens' logits exist at a time. The product is taken in the dtype of its
    operands, all that follows in float32. Once differentiable.
    """
    if chunk is None:
        # A CPU's chunk fits its caches; each chunk costs one pass over the weight's gradient.
        chunk = min(max(LOGITS // len(weight), 256), 2048) if weight.device.type == "cpu" else 2048
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk, torch.is_grad_enabled())


def largest(scores: Float[Tensor, "*B L"], count: int) -> Int[Tensor, "*B K"]:
    """Returns the indices of the `count` largest float32 scores along the last axis, in no order.

    Of equal scores the last is taken. topk leaves ties open, so one call over all tokens and many
    calls over a cache could select differently. Here the index stands in the low half of the
    compared integers, under the bits of the score, reordered so that integers compare as floats.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    ordered = ordered | torch.arange(scores.shape[-1], device=scores.device)
    return ordered.topk(min(count, scores.shape[-1]), dim=-1, sorted=False).values & 0xFFFFFFFF
