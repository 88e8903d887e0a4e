"""Indices of the largest scores, with a rule for equal ones."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
