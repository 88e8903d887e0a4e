"""Published and measured figures of the devices that models are trained on.

Published peaks, bfloat16 with sums in float32 and without sparsity (half of what a sheet gives with
it). NVIDIA's data sheets of A100 (80GB SXM, 2021), H100 (SXM, 2023), H200 (SXM, 2024) and HGX B200
(2024), its Ada architecture paper for the RTX 4090 (2022); AMD's data sheet of the MI300X (2023):
304 units x 2048 x 2.1 GHz. `link` is PCIe x16, one direction: generation 4 for the A100 and the
RTX 4090, 5 for the others, including the B200, as its usual hosts have it.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """Published figures of one device: products, memory, and the links to it."""

    flops: float  # per second, bfloat16 products, without sparsity
    memory: float  # bytes
    bandwidth: float  # bytes per second, of its own memory
    link: float  # bytes per second, from the host's memory


DEVICES = {
    "a100": Device(312e12, 80e9, 2.039e12, 32e9),
    "h100": Device(989.4e12, 80e9, 3.35e12, 64e9),
    "h200": Device(989.4e12, 141e9, 4.8e12, 64e9),
    "b200": Device(2250e12, 180e9, 8.0e12, 64e9),
    "mi300x": Device(1307.4e12, 192e9, 5.3e12, 64e9),
    "rtx4090": Device(165.2e12, 24e9, 1.008e12, 32e9),
}
SIZE = 512  # of the matrices whose product is timed


def fastest(work: Callable[[], object]) -> float:
    """Returns the seconds of the fastest of nine calls, which other programs disturb least."""
    spans = []
    for _ in range(9):
        began = time.perf_counter()
        work()
        spans.append(time.perf_counter() - began)
    return min(spans)


@functools.cache
def product_flops(dtype: torch.dtype) -> float:
    """Measures the FLOPs a second of matrix products on this machine's cores, as torch uses them.

    It draws no random number, so that a training may call it.
    """
    left = torch.linspace(-1.0, 1.0, SIZE * SIZE).view(SIZE, SIZE).to(dtype)
    right = left.T.contiguous()
    return 2 * SIZE**3 / fastest(lambda: left @ right)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the FLOPs a second that a device can reach in matrix products of this dtype.

    Of a GPU it is the published figure for bfloat16, by its name; of a CPU it is measured. None
    where it is unknown: for another GPU, and for float32 on a GPU.
    """
    if device.type == "cpu":
        return product_flops(dtype)
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    if "pcie" in name or "nvl" in name:
        # They reach less than the boards of DEVICES.
        return None
    return next((figures.flops for key, figures in DEVICES.items() if key in name), None)
