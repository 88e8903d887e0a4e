"""Ids of a window in -> the table rows they address out: the compiled twin of layers.addresses.hash_rows, on the CPU.

One pass over the tokens, all layers and heads of a token together, without the reference's intermediate tensors. Where
every prime exceeds 8191 the remainder is taken without a division, and still exactly:

    q = trunc(x * (1/p)) in float64,  r = x - q p in int64,  then r + p if r < 0, r - p if r >= p

x < 2^63, and three roundings of at most 2^-53 each put x * (1/p) off by at most 3 * 2^10 / p < 1, so that q is off by
at most one. Threads split the tokens; the compiled code holds no lock of Python's.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rorqual.kernels.compiled import compiled

_EXACT_FROM = 8192  # the smallest prime for which one correction of the reciprocal's quotient is enough
_WORTH_A_THREAD = 16384  # addresses; below, starting threads takes longer than the work


@compiled
def _hash(ids, reach, canonical, multipliers, primes, inverse, offsets, pad, out, first, last):  # pragma: no cover
    """Fills out[:, first:last], tokens counted over the batch; returns the place of a bad id, or -1."""
    layers, orders, heads = primes.shape
    time = ids.shape[1] - orders
    known = np.empty(orders + 1, np.int64)
    for n in range(first, last):
        row, t = n // time, n % time + orders
        allowed = orders if reach.shape[0] == 0 else reach[row, t - orders]
        for k in range(orders + 1):
            raw = ids[row, t - k]
            if raw < 0 or raw >= canonical.shape[0] or canonical[raw] < 0:
                return n
            known[k] = canonical[raw] if k <= allowed else pad
        for layer in range(layers):
            mix = known[0] * multipliers[layer, 0]
            for order in range(orders):
                mix ^= known[order + 1] * multipliers[layer, order + 1]
                base = order * heads
                if inverse.shape[0] == 0:
                    for head in range(heads):
                        out[layer, n, base + head] = mix % primes[layer, order, head] + offsets[layer, base + head]
                else:
                    wide = np.float64(mix)
                    for head in range(heads):
                        prime = primes[layer, order, head]
                        rest = mix - np.int64(wide * inverse[layer, order, head]) * prime
                        rest += prime if rest < 0 else 0
                        rest -= prime if rest >= prime else 0
                        out[layer, n, base + head] = rest + offsets[layer, base + head]
    return -1


def hash_rows(
    ids: Int[Tensor, "B W"],
    reach: Int[Tensor, "B T"] | None,
    canonical_map: Int[Tensor, " V"],
    multipliers: Int[Tensor, "Lm N"],
    primes: Int[Tensor, "Lm O J"],
    offsets: Int[Tensor, "Lm R"],
    pad: int,
) -> Int[Tensor, "Lm B T R"]:
    """See layers.addresses.hash_rows, whose numbers these are, bit for bit."""
    batch, time = ids.shape[0], ids.shape[1] - primes.shape[1]
    out = torch.empty(len(primes), batch, time, offsets.shape[1], dtype=torch.int64)
    moduli = primes.numpy()
    inverse = 1.0 / moduli if moduli.min() >= _EXACT_FROM else np.empty((0, 1, 1))
    near = np.empty((0, 0), np.int64) if reach is None else reach.contiguous().numpy()
    given = (ids.contiguous().numpy(), near, canonical_map.numpy(), multipliers.numpy(), moduli, inverse)
    target = out.flatten(1, 2).numpy()

    def part(bounds: tuple[int, int]) -> int:
        return _hash(*given, offsets.numpy(), pad, target, *bounds)

    parts = min(torch.get_num_threads(), max(1, out.numel() // _WORTH_A_THREAD))
    edges = [batch * time * i // parts for i in range(parts + 1)]
    spans = list(itertools.pairwise(edges))
    if parts == 1:
        bad = part(spans[0])
    else:
        with ThreadPoolExecutor(parts) as pool:
            bad = max(pool.map(part, spans))
    if bad >= 0:
        raise IndexError(f"an id in or before token {bad} has no canonical id")
    return out
