"""A Python loop over arrays in -> machine code out, where numba is installed and the tensors lie on the CPU."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import numba
except ImportError:  # the reference then does the work
    numba = None


def usable(*where: Tensor | torch.device) -> str:
    """Why a compiled twin cannot run on these tensors or devices; "" if it can."""
    if numba is None:
        return "numba is not installed"
    for thing in where:
        device = thing if isinstance(thing, torch.device) else thing.device
        if device.type != "cpu":
            return f"it runs on the cpu, not on {device.type}"
    return ""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Machine code at the first call, kept beside the source for the next process where that can be written."""
    if numba is None:
        return function
    plain = inspect.unwrap(function)  # tests wrap every function to check its shapes
    try:
        return numba.njit(nogil=True, cache=True)(plain)
    except RuntimeError:  # no writable place for numba's cache
        return numba.njit(nogil=True)(plain)
