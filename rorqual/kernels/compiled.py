"""Compiles Python loops over arrays to machine code for tensors on the CPU, with numba."""

import contextlib
import functools
import hashlib
import inspect
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
from numba.core import cgutils
from numba.extending import intrinsic


def compiled(function: Callable[..., Any], *, any_order: bool = False) -> Callable[..., Any]:
    """Compiles a function to machine code with numba, at its first call.

    The machine code is cached beside the source for later processes, where that can be written,
    until any kernel's source changes: numba itself looks at the time and size of the one file,
    which an installed wheel does not change, and not at those of the functions that it calls.
    `any_order` permits sums of floats in any order, and so vector instructions.
    """
    # Tests wrap every function to check its shapes.
    plain = inspect.unwrap(function)
    options = {"nogil": True, "fastmath": {"reassoc", "contract"} if any_order else False}
    try:
        machine_code: Any = numba.njit(**options, cache=True)(plain)
        # numba keeps it to itself, and without compilation (NUMBA_DISABLE_JIT) there is none.
        with contextlib.suppress(AttributeError):
            machine_code._cache._cache_file._source_stamp = sources()
        return machine_code
    # numba finds no directory where it can write its cache.
    except RuntimeError:
        return numba.njit(**options)(plain)


@functools.cache
def sources() -> str:
    """Returns a hash of the sources of all kernels."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@intrinsic
def pointer(context, address):
    """Converts an integer, such as data_ptr(), to the input of numba.carray, in compiled code."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba.types.voidptr(address), generate


def _fetch(builder, pointer):
    """Emits LLVM's prefetch instruction for an address."""
    number = cgutils.int32_t
    shape = cgutils.ir.FunctionType(cgutils.ir.VoidType(), [pointer.type, number, number, number])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], shape)
    # Arguments: read access, the nearest cache, data (not instructions).
    builder.call(fetch, [pointer, number(0), number(3), number(1)])


@intrinsic
def prefetch_line(context, array, row, column):
    """Prefetches the cache line of a matrix element without waiting for it, in compiled code."""

    def generate(context, builder, signature, arguments):
        kind = signature.args[0]
        buffer_array = context.make_array(kind)(context, builder, arguments[0])
        pointer = cgutils.get_item_pointer(
            context, builder, kind, buffer_array, list(arguments[1:]), wraparound=False
        )
        _fetch(builder, builder.bitcast(pointer, cgutils.voidptr_t))
        return context.get_dummy_value()

    return numba.types.void(array, row, column), generate


@intrinsic
def prefetch(context, address):
    """Prefetches the cache line at an address, any address, in compiled code."""

    def generate(context, builder, signature, arguments):
        _fetch(builder, builder.inttoptr(arguments[0], cgutils.voidptr_t))
        return context.get_dummy_value()

    return numba.types.void(address), generate


def spread(loop: Callable[[int, int, int], None], count: int, parts: int) -> None:
    """Calls loop(part, first, last) for `parts` equal parts of `count`, each on its own thread.

    Compiled code releases the GIL, so the threads run at the same time.
    """
    if parts <= 1:
        loop(0, 0, count)
        return
    edges = [count * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        list(
            pool.map(lambda piece: loop(piece[0], *piece[1]), enumerate(itertools.pairwise(edges)))
        )
