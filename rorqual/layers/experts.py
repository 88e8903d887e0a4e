"""SwiGLU experts, applied to rows that are grouped by expert.

    out = (silu(gate) * up) W_down[e],   [gate, up] = row W_gate_up[e]           expert e of the row

All experts are one grouped product, which takes groups of any number of rows, including none.
Fine-grained experts: DeepSeekMoE, arXiv:2401.06066.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.layers.feed_forward import gated

ALIGNED = 16  # bytes; the grouped product needs rows of a multiple of it
GROUPED = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# Rows. oneDNN compiles a program for every new shape of a half-precision product, at ten times
# the cost of the product.
WINDOW = 64


def grouped_product(
    rows: Float[Tensor, "N D"], weight: Float[Tensor, "E D W"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "N W"]:
    """Multiplies the first counts[0] rows by weight[0], the next counts[1] by weight[1], and so on.

    sum(counts) is N.
    """
    ends = counts.cumsum(0, dtype=torch.int32)
    if torch.compiler.is_compiling():
        return _traced(rows, weight, ends)
    return _Product.apply(rows, weight, ends)


def _multiply(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Multiplies per group: rows [N, D] by [E, D, W], or [D, N] by [N, W] to [E, D, W]."""
    if left.device.type == "cpu" and left.dtype in HALVES:
        return (_by_window if right.dim() == 3 else _gradient_by_window)(left, right, ends)
    if left.dtype in GROUPED and all(
        t.element_size() * max(t.stride()[-2:]) % ALIGNED == 0 for t in (left, right)
    ):
        return F.grouped_mm(left, right, offs=ends)
    return _one_by_one(left, right, ends)


def _one_by_one(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Computes `_multiply` with one product for each expert.

    It is for sizes and dtypes that the grouped product does not support.
    """
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    if right.dim() == 3:
        return torch.cat(
            [piece @ weight for piece, weight in zip(left.split(sizes), right, strict=True)]
        )
    parts = zip(left.split(sizes, dim=1), right.split(sizes), strict=True)
    return torch.stack([piece @ weight for piece, weight in parts])


def _windows(ends: Tensor) -> list[tuple[int, int, int, int, int]]:
    """Returns (group, first row, last, and a window around them) of every group that has rows.

    A window has a multiple of WINDOW rows. Groups of any size would make a new shape at every step;
    windows have a few shapes that recur. None reaches beyond the last group, where rows may hold
    anything.
    """
    windows = []
    first = 0
    bounds = ends.tolist()
    length = bounds[-1]
    for group, last in enumerate(bounds):
        size = min(-(-(last - first) // WINDOW) * WINDOW, length)
        start = min(first, length - size)
        if last > first:
            windows.append((group, first, last, start, start + size))
        first = last
    return windows


def _by_window(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiplies group by group in ascending order, in windows of a few shapes that recur.

    What a window writes after its own rows is overwritten by the next group.
    """
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for group, first, last, start, end in _windows(ends):
        if start == first:
            torch.mm(rows[start:end], weight[group], out=out[start:end])
        else:
            out[first:last] = (rows[start:end] @ weight[group])[first - start : last - start]
    return out


def _gradient_by_window(rows: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """Multiplies group by group; rows of other groups in a window are multiplied by 0."""
    out = grad.new_zeros(len(ends), rows.shape[0], grad.shape[1])
    for group, first, last, start, end in _windows(ends):
        product = grad.new_zeros(end - start, grad.shape[1])
        product[first - start : last - start] = grad[first:last]
        torch.mm(rows[:, start:end], product, out=out[group])
    return out


def _gradients(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the gradients of a grouped product with respect to its rows and its weight."""
    grad = grad.contiguous()  # the grouped product does not take an expanded one
    return _multiply(grad, weight.transpose(1, 2), ends), _multiply(rows.T, grad, ends)


class _Product(torch.autograd.Function):
    """Multiplies rows by their groups' matrices; its backward is two more grouped products."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight, ends)
        return _multiply(rows, weight, ends)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_gradients(grads[0], *ctx.saved_tensors), None


# torch.compile does not support the grouped product in float32 and cannot split rows by sizes that
# it does not know, so it calls these operators.
@torch.library.custom_op("rorqual::grouped_product", mutates_args=())
def _traced(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Computes the grouped product as one operator, which torch.compile calls as it is."""
    return _multiply(rows.contiguous(), weight, ends)


@torch.library.custom_op("rorqual::grouped_product_gradients", mutates_args=())
def _traced_gradients(
    grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of `_traced` as one operator, too."""
    return _gradients(grad, rows.contiguous(), weight, ends)


@_traced.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Returns an empty tensor of the shape that `_traced` returns, for the compiler."""
    return rows.new_empty(rows.shape[0], weight.shape[2])


@_traced_gradients.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Returns empty tensors of the shapes that `_traced_gradients` returns, for the compiler."""
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    """Saves all inputs of `_traced` for its backward."""
    ctx.save_for_backward(*inputs)


def _traced_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """Returns the gradients of rows and weight; the ends of the groups have none."""
    return *_traced_gradients(grad, *ctx.saved_tensors), None


_traced.register_autograd(_traced_backward, setup_context=_keep)


class Experts(nn.Module):
    """E SwiGLU experts without biases, from dim over width to dim; clipped as SwiGLU is."""

    def __init__(self, experts: int, dim: int, width: int, limit: float | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.gate_up = nn.Parameter(torch.randn(experts, dim, 2 * width) * dim**-0.5)  # gate first
        self.down = nn.Parameter(torch.randn(experts, width, dim) * width**-0.5)

    def forward(
        self, rows: Float[Tensor, "N D"], counts: Int[Tensor, " E"]
    ) -> Float[Tensor, "N D"]:
        """Applies the experts to `rows`, sorted by expert, counts[e] of them for expert e.

        It is computed in the dtype of autocast, which the grouped product does not apply by itself,
        or else in that of the rows.
        """
        dtype = _dtype(rows)
        gate, up = grouped_product(rows.to(dtype), self.gate_up.to(dtype), counts).chunk(2, dim=-1)
        return grouped_product(gated(gate, up, self.limit), self.down.to(dtype), counts)

    def small_batch(
        self, rows: Float[Tensor, "N D"], topk_indices: Int[Tensor, "N K"]
    ) -> Float[Tensor, "N K D"]:
        """Applies its K experts to each of a few unsorted rows, with one product for each slot."""
        dtype = _dtype(rows)
        slots = topk_indices.flatten().tolist()
        copies = rows.to(dtype).repeat_interleave(topk_indices.shape[1], 0).split(1)
        inner = [
            row @ self.gate_up[expert].to(dtype) for row, expert in zip(copies, slots, strict=True)
        ]
        gate, up = torch.cat(inner).chunk(2, dim=-1)
        hidden = gated(gate, up, self.limit).split(1)
        out = [row @ self.down[expert].to(dtype) for row, expert in zip(hidden, slots, strict=True)]
        return torch.cat(out).view(*topk_indices.shape, -1)


def _dtype(rows: Tensor) -> torch.dtype:
    """Returns the dtype to compute in: autocast's where it is on for the device, else the rows'."""
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
