"""A Python loop over arrays in -> machine code out, for tensors on the CPU."""

import inspect
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor


def usable(*where: Tensor | torch.device) -> str:
    """Why a compiled twin cannot run on these tensors or devices; "" if it can."""
    for thing in where:
        if not isinstance(thing, torch.device) and thing.is_cpu:
            continue  # at decode naming the device costs as much as the work
        device = thing if isinstance(thing, torch.device) else thing.device
        if device.type != "cpu":
            return f"it runs on the cpu, not on {device.type}"
    return ""


def compiled(function: Callable[..., Any], *, any_order: bool = False) -> Callable[..., Any]:
    """Machine code at the first call, kept beside the source for the next process where that can be written.

    `any_order` lets sums of floats be taken in any order, and so on vectors.
    """
    plain = inspect.unwrap(function)  # tests wrap every function to check its shapes
    options = {"nogil": True, "fastmath": {"reassoc", "contract"} if any_order else False}
    try:
        return numba.njit(**options, cache=True)(plain)
    except RuntimeError:  # no writable place for numba's cache
        return numba.njit(**options)(plain)


@intrinsic
def pointer(context, address):
    """In compiled code: a whole number, such as a tensor's data_ptr(), as what numba.carray reads from."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba.types.voidptr(address), generate


def _fetch(builder, place):
    number = cgutils.int32_t
    shape = cgutils.ir.FunctionType(cgutils.ir.VoidType(), [place.type, number, number, number])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], shape)
    builder.call(
        fetch, [place, number(0), number(3), number(1)]
    )  # to read, to the nearest cache, data


@intrinsic
def ask(context, array, row, column):
    """In compiled code: begin to fetch this number of a matrix, which is wanted soon; nothing waits for it."""

    def generate(context, builder, signature, arguments):
        kind = signature.args[0]
        held = context.make_array(kind)(context, builder, arguments[0])
        place = cgutils.get_item_pointer(
            context, builder, kind, held, list(arguments[1:]), wraparound=False
        )
        _fetch(builder, builder.bitcast(place, cgutils.voidptr_t))
        return context.get_dummy_value()

    return numba.types.void(array, row, column), generate


@intrinsic
def prefetch(context, address):
    """In compiled code: ask for the line of memory at an address before it is read. No address is wrong."""

    def generate(context, builder, signature, arguments):
        _fetch(builder, builder.inttoptr(arguments[0], cgutils.voidptr_t))
        return context.get_dummy_value()

    return numba.types.void(address), generate


def spread(loop: Callable[[int, int, int], None], count: int, parts: int) -> None:
    """loop(part, first, last) for `parts` equal parts of `count`, each on a thread; compiled code holds no lock."""
    if parts <= 1:
        loop(0, 0, count)
        return
    edges = [count * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(lambda part: loop(part[0], *part[1]), enumerate(itertools.pairwise(edges))))
