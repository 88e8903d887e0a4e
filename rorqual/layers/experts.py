"""Rows grouped by expert -> rows, each through its own expert.

    out = (silu(gate) * up) W_down[e],   [gate, up] = row W_gate_up[e]                     SwiGLU, expert e of the row

All experts are one grouped product, which takes runs of rows of any length, none included. Fine-grained experts:
DeepSeekMoE, arXiv:2401.06066.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

ALIGNED = 16  # bytes; the grouped product refuses rows that are no multiple of it
GROUPED = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# Rows: oneDNN writes a program for every new shape of a half-precision product, at ten times the product's work.
WINDOW = 64


def grouped_product(
    rows: Float[Tensor, "N D"], weight: Float[Tensor, "E D W"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "N W"]:
    """The first counts[0] rows times weight[0], the next counts[1] times weight[1], and so on; sum(counts) is N."""
    ends = counts.cumsum(0, dtype=torch.int32)
    if torch.compiler.is_compiling():
        return _traced(rows, weight, ends)
    return _Product.apply(rows, weight, ends)


def _multiply(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Per group: rows [N, D] times [E, D, W], or [D, N] times [N, W] to [E, D, W]."""
    if left.device.type == "cpu" and left.dtype in HALVES:
        return (_by_window if right.dim() == 3 else _gradient_by_window)(left, right, ends)
    if left.dtype in GROUPED and all(
        t.element_size() * max(t.stride()[-2:]) % ALIGNED == 0 for t in (left, right)
    ):
        return F.grouped_mm(left, right, offs=ends)
    return _one_by_one(left, right, ends)


def _one_by_one(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """The same, a product an expert: for sizes and dtypes that the grouped product refuses."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    if right.dim() == 3:
        return torch.cat([part @ own for part, own in zip(left.split(sizes), right, strict=True)])
    parts = zip(left.split(sizes, dim=1), right.split(sizes), strict=True)
    return torch.stack([part @ own for part, own in parts])


def _windows(ends: Tensor) -> list[tuple[int, int, int, int, int]]:
    """(group, first row, last, and a window of a multiple of WINDOW rows around them) of every group that has rows.

    Runs of any length make a new shape at every step; windows make a few that come again. None reaches behind the last
    group, where rows may be anything."""
    found, first, bounds = [], 0, ends.tolist()
    length = bounds[-1]
    for group, last in enumerate(bounds):
        size = min(-(-(last - first) // WINDOW) * WINDOW, length)
        begin = min(first, length - size)
        if last > first:
            found.append((group, first, last, begin, begin + size))
        first = last
    return found


def _by_window(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """In ascending order: what a window writes behind its own rows, the next group overwrites."""
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for group, first, last, begin, end in _windows(ends):
        if begin == first:
            torch.mm(rows[begin:end], weight[group], out=out[begin:end])
        else:
            out[first:last] = (rows[begin:end] @ weight[group])[first - begin : last - begin]
    return out


def _gradient_by_window(rows: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """Rows of a window that are another group's meet zeros."""
    out = grad.new_zeros(len(ends), rows.shape[0], grad.shape[1])
    for group, first, last, begin, end in _windows(ends):
        own = grad.new_zeros(end - begin, grad.shape[1])
        own[first - begin : last - begin] = grad[first:last]
        torch.mm(rows[:, begin:end], own, out=out[group])
    return out


def _gradients(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()  # the grouped product refuses an expanded one
    return _multiply(grad, weight.transpose(1, 2), ends), _multiply(rows.T, grad, ends)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight, ends)
        return _multiply(rows, weight, ends)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_gradients(grads[0], *ctx.saved_tensors), None


# torch.compile refuses the grouped product in float32 and cannot cut rows by numbers it has not got: it calls these.
@torch.library.custom_op("rorqual::grouped_product", mutates_args=())
def _traced(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _multiply(rows.contiguous(), weight, ends)


@torch.library.custom_op("rorqual::grouped_product_gradients", mutates_args=())
def _traced_gradients(
    grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    return _gradients(grad, rows.contiguous(), weight, ends)


@_traced.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@_traced_gradients.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _traced_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_traced_gradients(grad, *ctx.saved_tensors), None


_traced.register_autograd(_traced_backward, setup_context=_keep)


class Experts(nn.Module):
    """E SwiGLU experts without biases, dim -> width -> dim."""

    def __init__(self, experts: int, dim: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, dim, 2 * width) * dim**-0.5)  # gate first
        self.down = nn.Parameter(torch.randn(experts, width, dim) * width**-0.5)

    def forward(
        self, rows: Float[Tensor, "N D"], counts: Int[Tensor, " E"]
    ) -> Float[Tensor, "N D"]:
        """`rows` sorted by expert, counts[e] of them for expert e. Computed in the dtype of autocast, which the grouped
        product does not see by itself, or else in that of the rows."""
        dtype = _dtype(rows)
        gate, up = grouped_product(rows.to(dtype), self.gate_up.to(dtype), counts).chunk(2, dim=-1)
        return grouped_product(F.silu(gate) * up, self.down.to(dtype), counts)

    def few(self, rows: Float[Tensor, "N D"], chosen: Int[Tensor, "N K"]) -> Float[Tensor, "N K D"]:
        """The same of unsorted rows, each through its K experts: a product a slot, for few rows."""
        dtype, slots = _dtype(rows), chosen.flatten().tolist()
        own = rows.to(dtype).repeat_interleave(chosen.shape[1], 0).split(1)
        inner = [
            row @ self.gate_up[expert].to(dtype) for row, expert in zip(own, slots, strict=True)
        ]
        gate, up = torch.cat(inner).chunk(2, dim=-1)
        hidden = (F.silu(gate) * up).split(1)
        out = [row @ self.down[expert].to(dtype) for row, expert in zip(hidden, slots, strict=True)]
        return torch.cat(out).view(*chosen.shape, -1)


def _dtype(rows: Tensor) -> torch.dtype:
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
