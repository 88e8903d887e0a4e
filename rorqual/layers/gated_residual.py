"""Gated residual: hyper-connections whose streams are read through low-rank gates.

    n     = (1 + w) x / rms(x)                    each stream by itself
    a     = sigmoid(W_up silu(W_down vec(n) / S))      a weight for every value of every stream
    u     = mean_i a_i n_i                        the sublayer's input, which needs no other norm
    x_i  <- x_i + 2 sigmoid(<W_inject,i, vec(n)> / S) F(u)         the streams do not mix

The last site has no F: its u is what the head reads, without another norm. This is the residual of
Qwen3.8-Flash-Next; W_down and W_up have a rank of a few hundred. Norms and weights of the output
are float32. Hyper-Connections: arXiv:2409.19606.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rorqual.layers.hyper import Mapping
from rorqual.layers.norm import CentredRMSNorm
from rorqual.layers.streams import Streams, coefficient_dtype, post_mapping
from rorqual.model_config import HyperConfig


class GatedResidual(nn.Module):
    """One site of the streams, with the methods of hyper.Connection: `read` and `write`.

    Its parameters are named as in Qwen's checkpoints.
    """

    def __init__(self, config: HyperConfig, dim: int):
        super().__init__()
        self.mixer = GatedReduction(config, dim)
        self.block_inject_weight = nn.Linear(config.streams * dim, config.streams, bias=False)

    def reset_parameters(self) -> None:
        """Resets the mixer, and draws the weights of the output with the same deviation."""
        self.mixer.reset_parameters()
        nn.init.normal_(self.block_inject_weight.weight, std=self.mixer.std)

    def read(self, x: Streams) -> tuple[Float[Tensor, "B T D"], Mapping]:
        """Returns the sublayer's input, and the mapping for `write`."""
        batch, time, S, _ = x.values.shape
        normed = self.mixer.normed(x.values)
        logits = self.block_inject_weight(normed).to(coefficient_dtype(normed.dtype)) / S
        post = 2 * torch.sigmoid(logits).flatten(0, 1).T
        mapping = Mapping(x.values.flatten(0, 1), (batch, time), post)
        return self.mixer.reduce(normed), mapping

    def write(self, out: Float[Tensor, "B T D"], mapping: Mapping) -> Streams:
        """Adds the output to each stream by its own weight: x_i + post_i out."""
        assert mapping.post is not None
        written = post_mapping(mapping.streams, out.flatten(0, 1), mapping.post, None)
        return Streams(written.unflatten(0, mapping.shape))


class GatedReduction(nn.Module):
    """Reduces the streams to one hidden state: the reading half of a site, and the model's end."""

    def __init__(self, config: HyperConfig, dim: int):
        super().__init__()
        self.streams, width = config.streams, config.streams * dim
        # Equal for all sites; the logits of a start of deviation 1 are then of a deviation below 1.
        self.std = width**-0.5
        self.hc_norm = CentredRMSNorm(width, config.norm_eps, group=dim)
        self.input_mix_weight_down = nn.Linear(width, config.rank, bias=False)
        self.input_mix_weight_up = nn.Linear(config.rank, width, bias=False)

    def reset_parameters(self) -> None:
        """Resets the norm to 1, and the weights to normal with deviation 1 / sqrt(S D)."""
        self.hc_norm.reset_parameters()
        for linear in (self.input_mix_weight_down, self.input_mix_weight_up):
            nn.init.normal_(linear.weight, std=self.std)

    def forward(self, x: Streams) -> Float[Tensor, "B T D"]:
        """Returns the mean of the normed streams by their weights."""
        return self.reduce(self.normed(x.values))

    def normed(self, values: Float[Tensor, "B T S D"]) -> Float[Tensor, "B T E"]:
        """Returns all streams, each normed by itself, side by side."""
        return self.hc_norm(values.flatten(2))

    def reduce(self, normed: Float[Tensor, "B T E"]) -> Float[Tensor, "B T D"]:
        """Computes u, the weighted mean of the streams that are normed already."""
        narrow = F.silu(self.input_mix_weight_down(normed) / self.streams)
        weights = torch.sigmoid(self.input_mix_weight_up(narrow))
        return (weights * normed).unflatten(-1, (self.streams, -1)).mean(2)
