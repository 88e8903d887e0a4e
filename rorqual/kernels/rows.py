"""Applies one Adam update to the touched rows of a table: row_adam of train.optim, compiled.

A row, its two averages and its count are read, changed and written back before the next row, so
that each is read from memory once; later rows are prefetched meanwhile. Threads split the rows,
which are distinct. On the CPU, float32.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rorqual.kernels import compiled

_WORTH_A_THREAD = 2048  # rows; below, starting threads takes longer than the work
_AHEAD = 6  # rows between the one that is prefetched and the one that is updated; 2 to 8 are alike
_LINE = 16  # float32 numbers in a cache line
# Update counts whose bias correction is precomputed: two powers a row cost as much as 30 of its
# numbers.
_TABULATED = 1024


@compiled.compiled
def _update(
    rows, first, second, updates, touched, gradient, corrections, rates, start, end
):  # pragma: no cover
    """Applies Adam to the rows touched[start:end], in place.

    `rates`: float64 [lr, b1, b2, eps]. `corrections`: float32 [2, n], see `_corrections`.
    """
    b1 = np.float32(rates[1])
    b2 = np.float32(rates[2])
    c1 = np.float32(1.0 - rates[1])
    c2 = np.float32(1.0 - rates[2])
    for k in range(start, end):
        if k + _AHEAD < end:
            soon = touched[k + _AHEAD]
            for i in range(0, rows.shape[1], _LINE):
                compiled.prefetch_line(rows, soon, i)
                compiled.prefetch_line(first, soon, i)
                compiled.prefetch_line(second, soon, i)
        row = touched[k]
        updates[row] += 1
        n = updates[row]
        if n < corrections.shape[1]:
            size = corrections[0, n]
            eps = corrections[1, n]
        else:
            root = np.sqrt(1.0 - rates[2] ** n)
            size = np.float32(rates[0] * root / (1.0 - rates[1] ** n))
            eps = np.float32(rates[3] * root)
        p = rows[row]
        m = first[row]
        v = second[row]
        g = gradient[k]
        for i in range(p.shape[0]):
            m[i] = b1 * m[i] + c1 * g[i]
            v[i] = b2 * v[i] + c2 * g[i] * g[i]
            # np.divide does not check for 0; the check would keep the loop from using vector
            # instructions.
            p[i] -= np.divide(size * m[i], np.sqrt(v[i]) + eps)


def _corrections(lr: float, betas: tuple[float, float], eps: float) -> np.ndarray:
    """Precomputes the bias corrections of the n-th update of a row, float32 [2, n].

    They are the step size lr sqrt(1 - b2^n) / (1 - b1^n) and the term eps sqrt(1 - b2^n).
    """
    n = np.arange(_TABULATED)
    # Entry 0 is never read: the first update is number 1.
    n[0] = 1
    root = np.sqrt(1.0 - betas[1] ** n)
    return np.stack([lr * root / (1.0 - betas[0] ** n), eps * root]).astype(np.float32)


def _split(work: Callable[[int, int], None], count: int) -> None:
    """Calls work(start, end) over 0..count, on as many of torch's threads as are worth starting."""
    parts = min(torch.get_num_threads(), max(1, count // _WORTH_A_THREAD))
    compiled.spread(lambda _, start, end: work(start, end), count, parts)


def row_adam(
    rows: Float[Tensor, "N W"],
    first: Float[Tensor, "N W"],
    second: Float[Tensor, "N W"],
    updates: Int[Tensor, " N"],
    touched: Int[Tensor, " K"],
    gradient: Float[Tensor, "K W"],
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Computes train.optim.row_adam, within float32 rounding."""
    arrays = [
        tensor.detach().numpy()
        for tensor in (rows, first, second, updates, touched, gradient.contiguous())
    ]
    corrections = _corrections(lr, betas, eps)
    rates = np.array([lr, *betas, eps])
    _split(lambda start, end: _update(*arrays, corrections, rates, start, end), len(touched))
