"""What functions with kernels return where it is more than a tensor or two.

A reference in layers/ and its kernels return the same type. It is defined here because kernels
import nothing of layers.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Read(NamedTuple):
    """What one site makes of the streams: its sublayer's input, and its coefficients, tokens last.

    comb[j, k] is the weight from stream j to stream k.
    """

    u: Float[Tensor, "N D"]  # the sublayer's input
    pre: Float[Tensor, "S N"]  # how much of each stream is read
    post: Float[Tensor, "S N"]  # how much of the sublayer's output each stream takes
    comb: Float[Tensor, "S S N"] | None  # how the streams mix; None: they do not
