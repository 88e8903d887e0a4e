"""Multi-token prediction: extra blocks that predict tokens beyond the next one.

    h'_i = block(W [norm_e(embed(t_{i+k})) ; norm_h(h_i)])    depth k = 1, 2, ..; h of depth k - 1
    logits of t_{i+k+1} = head(norm(h'_i))                    embedding and head are the model's

h_i of depth 0 is the last block's output before the final norm; the embedding comes first, as
released. In training each depth adds weight / depths times its cross-entropy; in decoding it drafts
tokens that the model then checks. DeepSeek-V3, arXiv:2412.19437, section 2.2.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.layers.basics import RMSNorm
from rorqual.layers.context import Context
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
    """One depth: two norms, a projection, one block of the model's kind, and its own final norm."""

    def __init__(self, dim: int, eps: float, block: nn.Module) -> None:
        super().__init__()
        self.enorm = RMSNorm(dim, eps)
        self.hnorm = RMSNorm(dim, eps)
        self.eh_proj = nn.Linear(2 * dim, dim, bias=False)
        self.block = block
        self.norm = RMSNorm(dim, eps)

    def forward(
        self, hidden: Float[Tensor, "B T D"], embedded: Float[Tensor, "B T D"], ctx: Context
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        """Returns the block's output before `norm` and the block's Aux.

        The next depth takes that output. `embedded[:, i]` is the embedding of the token `depth`
        after i.
        """
        joined = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        x, aux = self.block(Streams(joined[:, :, None]), ctx)
        return x.values[:, :, 0], aux
