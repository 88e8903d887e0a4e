"""Calls the Triton kernels, and imports Triton at the first call.

Where TRITON_INTERPRET=1 was set before Triton was imported, the kernels run on the CPU, statement
by statement in numpy: slow, and meant for tests. They are then used only where RORQUAL_KERNELS
selects them.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def hash_rows(*given: Any) -> Tensor:
    """Computes layers.addresses.hash_rows."""
    from rorqual.kernels import triton_hash

    return triton_hash.hash_rows(*given)


def recall(*given: Any) -> Tensor:
    """Computes tables.fp8.lookup."""
    from rorqual.kernels import triton_rows

    return triton_rows.recall(*given)


def fuse(*given: Any) -> tuple[Tensor, Tensor | None]:
    """Computes layers.engram.fuse."""
    from rorqual.kernels import triton_fuse

    return triton_fuse.fuse(*given)


def collapse(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes layers.streams.collapse."""
    from rorqual.kernels import triton_hyper

    return triton_hyper.collapse(*given)


def write(*given: Any) -> Tensor:
    """Computes layers.streams.write."""
    from rorqual.kernels import triton_hyper

    return triton_hyper.write(*given)


def selected_attention(*given: Any) -> Tensor:
    """Computes layers.sparse.selected_attention."""
    from rorqual.kernels import triton_select

    return triton_select.selected_attention(*given)


def usable(name: str) -> Callable[..., str]:
    """Returns a function that returns why the kernel `name` cannot run on some tensors or devices.

    The reason is "" where it can.
    """

    def reason(*where: Tensor | torch.device) -> str:
        for thing in where:
            device = thing if isinstance(thing, torch.device) else thing.device
            if isinstance(thing, Tensor) and thing.dtype == torch.float64:
                return "it computes in float32, not in float64"
            if device.type != "cuda" and not (device.type == "cpu" and _interpreted(name)):
                return f"it runs on cuda, not on {device.type}"
        return "" if _installed() else "triton is not installed"

    return reason


def _interpreted(name: str) -> bool:
    asked = os.environ.get("RORQUAL_KERNELS", "").replace(" ", "").split(",")
    return f"{name}=triton" in asked and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
