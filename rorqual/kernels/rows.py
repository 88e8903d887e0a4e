"""Touched rows and their gradients in -> the rows after one Adam update out: the compiled twin of train.optim.row_adam.

One pass: a row, its two averages and its count are read, changed and written back before the next row is touched, so
each costs one visit to memory. Threads split the rows, which are distinct. On the CPU, float32.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rorqual.kernels import compiled

_WORTH_A_THREAD = 2048  # rows; below, starting threads takes longer than the work


@compiled.compiled
def _update(rows, first, second, updates, touched, gradient, rates, begin, end):  # pragma: no cover
    """`rates`: float64 [lr, b1, b2, eps]."""
    b1, b2 = np.float32(rates[1]), np.float32(rates[2])
    c1, c2 = np.float32(1.0 - rates[1]), np.float32(1.0 - rates[2])
    for k in range(begin, end):
        row = touched[k]
        updates[row] += 1
        n = updates[row]
        root = np.sqrt(1.0 - rates[2] ** n)
        size, floor = np.float32(rates[0] * root / (1.0 - rates[1] ** n)), np.float32(rates[3] * root)
        p, m, v, g = rows[row], first[row], second[row], gradient[k]
        for i in range(p.shape[0]):
            m[i] = b1 * m[i] + c1 * g[i]
            v[i] = b2 * v[i] + c2 * g[i] * g[i]
            # np.divide does not check for 0, which would keep the loop from running on vectors
            p[i] -= np.divide(size * m[i], np.sqrt(v[i]) + floor)


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
    """See train.optim.row_adam, whose numbers these are within float32 rounding."""
    arrays = [tensor.detach().numpy() for tensor in (rows, first, second, updates, touched, gradient.contiguous())]
    rates = np.array([lr, *betas, eps])
    parts = min(torch.get_num_threads(), max(1, len(touched) // _WORTH_A_THREAD))
    edges = [len(touched) * i // parts for i in range(parts + 1)]
    if parts == 1:
        _update(*arrays, rates, 0, len(touched))
        return
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(lambda span: _update(*arrays, rates, *span), itertools.pairwise(edges)))


def usable(*where: Tensor | torch.device) -> str:
    """Why it cannot run on these tensors or this device; "" if it can."""
    for thing in where:
        if isinstance(thing, Tensor) and thing.dtype != torch.float32:
            return f"it computes in float32, not in {thing.dtype}"
    return compiled.usable(*where)
