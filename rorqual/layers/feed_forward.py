"""SwiGLU, the feed-forward layer of dense blocks and of every expert.

    swiglu(x) = W_down (silu(W_gate x) * W_up x)        both factors may be clipped

GLU Variants Improve Transformer, arXiv:2002.05202.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def gated(gate: Tensor, up: Tensor, limit: float | None = None) -> Tensor:
    """Computes silu(gate) * up; with a limit gate is at most that, and up within plus and minus."""
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit)
    return F.silu(gate) * up


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
