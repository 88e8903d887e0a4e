"""Multi-token prediction: extra blocks that predict tokens beyond the next one.

    h'_i = block(W [norm_e(embed(t_{i+k})) ; norm_h(h_i)])    depth k = 1, 2, ..; h of depth k - 1
    logits of t_{i+k+1} = head(norm(h'_i))                    embedding and head are the model's

h_i of depth 0 is the last block's output before the final norm; the embedding comes first, as
released. In training each depth adds weight / depths times its cross-entropy; in decoding it drafts
tokens that the model then checks. DeepSeek-V3, arXiv:2412.19437, section 2.2.

With a `reduction` a depth works on residual streams, as in DeepSeek-V4:

    x'_j = block(W_e norm_e(embed(t_{i+k})) + W_h norm_h(x_j))        for each stream j
    logits of t_{i+k+1} = head(norm(reduction(x')))       block, reduction and norm are the depth's

x of depth 0 are the streams that the last block leaves, before the model's reduction. The equation
is that of `MTPBlock` in the authors' inference/model.py (deepseek-ai/DeepSeek-V4-Flash), whose
e_proj and h_proj are the two halves of our eh_proj = [W_e W_h]. The released weights have one
depth, and that code says nothing of training. Two things are assumed: depth k + 1 takes the streams
of depth k before their reduction, which SGLang hands on from one draft to the next (its NextN model
of DeepSeek-V4), and the loss is that of DeepSeek-V3.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.layers.context import Context
from rorqual.layers.norm import RMSNorm
from rorqual.layers.streams import Streams
from rorqual.model_config import MTPConfig as MTPConfig


def ahead(
    ids: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"] | None = None, beyond: int = 0
) -> Int[Tensor, "B T"]:
    """Shifts ids by one: the result at t is the id at t + 1.

    It is `beyond` where t + 1 is past the end of the sequence or of the document of t.
    """
    moved = torch.full_like(ids, beyond)
    moved[:, :-1] = ids[:, 1:]
    if document_ids is not None:
        moved[:, :-1][document_ids[:, 1:] != document_ids[:, :-1]] = beyond
    return moved


class MTP(nn.Module):
    """One depth of multi-token prediction: two norms, a projection, a block and a final norm.

    The block is of the model's kind. With a `reduction`, which leaves one of several streams, it
    works on streams.
    """

    def __init__(
        self, dim: int, eps: float, block: nn.Module, reduction: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.enorm = RMSNorm(dim, eps)
        self.hnorm = RMSNorm(dim, eps)
        self.eh_proj = nn.Linear(2 * dim, dim, bias=False)
        self.block = block
        self.reduction = reduction
        self.norm = RMSNorm(dim, eps)

    def forward(
        self, hidden: Float[Tensor, "B T *S D"], embedded: Float[Tensor, "B T D"], ctx: Context
    ) -> tuple[Float[Tensor, "B T *S D"], Any]:
        """Returns the block's output before `head_input` and the block's Aux.

        The next depth takes that output. `embedded[:, i]` is the embedding of the token `depth`
        after i. With a reduction, `hidden` and the output are streams.
        """
        if self.reduction is not None:
            # The embedding is projected once for all streams.
            of_embedding, of_hidden = self.eh_proj.weight.chunk(2, dim=1)
            projected = F.linear(self.enorm(embedded), of_embedding)[:, :, None]
            x, aux = self.block(Streams(projected + F.linear(self.hnorm(hidden), of_hidden)), ctx)
            return x.values, aux
        joined = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        x, aux = self.block(Streams(joined[:, :, None]), ctx)
        return x.values[:, :, 0], aux

    def head_input(self, hidden: Float[Tensor, "B T *S D"]) -> Float[Tensor, "B T D"]:
        """Reduces the streams of `forward`, if it works on them, and norms them for the head."""
        return self.norm(hidden if self.reduction is None else self.reduction(Streams(hidden)))
