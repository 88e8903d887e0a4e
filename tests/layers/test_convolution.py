"""Tests the convolution and its gradients against one sum a token."""

import pytest
import torch
from torch import Tensor

from rorqual.layers.convolution import convolve


@pytest.mark.parametrize(
    ("batch", "time", "streams", "dim", "taps", "step", "threads"),
    [
        (1, 1, 1, 1, 1, 0, 1),
        (2, 7, 3, 5, 4, 3, 1),
        (3, 11, 1, 130, 2, 1, 2),
        (2, 290, 2, 80, 3, 2, 2),
        (1, 4, 4, 3, 4, 9, 1),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_convolution_and_its_gradients(
    batch: int,
    time: int,
    streams: int,
    dim: int,
    taps: int,
    step: int,
    threads: int,
    packed: bool,
    poisoned: None,
) -> None:
    """Compares with one sum a token, in double.

    The values before the first token are a cache's, and get gradients too.
    """
    halo = step * (taps - 1)
    window = torch.randn(batch, halo + time, streams, dim)
    weight = torch.randn(streams, dim, taps)
    document_ids = torch.randint(2, (batch, halo + time)).cumsum(1) // 3 if packed else None
    change = torch.randn(batch, time, streams, dim)

    def by_token(window: Tensor, weight: Tensor) -> Tensor:
        tokens = []
        for t in range(halo, halo + time):
            total = 0
            for j in range(taps):
                same = (
                    1.0
                    if document_ids is None
                    else (document_ids[:, t - j * step] == document_ids[:, t]).double()
                )
                total = (
                    total
                    + window[:, t - j * step]
                    * weight[..., taps - 1 - j]
                    * (torch.ones(batch) * same)[:, None, None]
                )
            tokens.append(total)
        return torch.stack(tokens, 1)

    def run(function, dtype: torch.dtype) -> list[Tensor]:
        arguments = [x.to(dtype).requires_grad_() for x in (window, weight)]
        out = function(*arguments)
        return [out, *torch.autograd.grad((out * change.to(dtype)).sum(), arguments)]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = run(lambda *arguments: convolve(*arguments, document_ids, halo), torch.float32)
    finally:
        torch.set_num_threads(before)
    for ours, expected in zip(got, run(by_token, torch.float64), strict=True):
        torch.testing.assert_close(
            ours.double(), expected, atol=1e-6 * max(1.0, expected.abs().max().item()), rtol=1e-6
        )
