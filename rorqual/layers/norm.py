"""Root-mean-square norms, which compute in float32.

    RMSNorm(x)        = x / sqrt(mean(x^2) + eps) * weight
    CentredRMSNorm(x) = x / sqrt(mean(x^2) + eps) * (1 + weight), over groups of values

Root Mean Square Layer Normalization, arXiv:1910.07467.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def as_float32(x: Tensor) -> Tensor:
    """Converts x to float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x * scale * weight, and scale = 1 / sqrt(mean(x^2) + eps)."""
    scale = torch.linalg.vecdot(x, x).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight), scale


class _RMSNorm(torch.autograd.Function):
    """Computes the RMS norm with an explicit backward, once differentiable.

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


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a learned weight that starts at one.

    It computes x / sqrt(mean(x^2) + eps) * weight in float32 and returns it in the dtype of x.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        arguments = as_float32(x), as_float32(self.weight), self.eps
        out = _RMSNorm.apply(*arguments) if torch.is_grad_enabled() else _normed(*arguments)[0]
        return out.to(x.dtype)


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
        groups = as_float32(x).unflatten(-1, (-1, self.group))
        normed = F.rms_norm(groups, (self.group,), None, self.eps).flatten(-2)
        return (normed * (1.0 + as_float32(self.weight))).to(x.dtype)
