"""Cross-entropy of hidden @ weight.T, computed in chunks so that not all logits exist at once."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from rorqual.layers.norm import as_float32

LOGITS = 1 << 22  # per chunk; 16 MiB in float32


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the loss chunk by chunk, and its gradient, if needed, from the same logits."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, graded: bool
    ) -> Tensor:
        total = as_float32(hidden.new_zeros(()))
        wants_hidden = graded and ctx.needs_input_grad[0]
        wants_weight = graded and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = as_float32(torch.zeros_like(weight)) if wants_weight else None
        for start in range(0, hidden.shape[0], chunk):
            rows = hidden[start : start + chunk]
            targets = labels[start : start + chunk]
            logits = as_float32(rows @ weight.T)
            # torch's softmax takes a fifth of its log_softmax's time on a CPU. The logarithm of the
            # largest probability is exact where that of the target's would underflow.
            error = logits.softmax(-1)
            log_sum = logits.amax(-1) - error.amax(-1).log()
            losses = log_sum + F.nll_loss(logits, targets, ignore_index=-100, reduction="none")
            total += torch.where(targets == -100, 0.0, losses).sum()
            del logits
            if wants_hidden or wants_weight:
                has_target = (targets != -100)[:, None]
                columns = targets.clamp_min(0)[:, None]
                # softmax - onehot; tokens without a target are masked by `has_target` below
                error = error.scatter_add_(1, columns, error.new_full(columns.shape, -1.0)).to(
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
