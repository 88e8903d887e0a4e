"""Sets up this process: device, dtype, seeds, ranks, threads, clock and log."""

import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device(name: str = "auto") -> torch.device:
    """Returns the device of that name; "auto" is the accelerator if there is one, else the CPU.

    A plain "cuda" becomes this process's own, by LOCAL_RANK. ValueError when there is no such
    device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        name = accelerator.type if accelerator is not None else "cpu"
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"got device {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if wanted.type not in ("cpu", "meta") and (
        accelerator is None or accelerator.type != wanted.type
    ):
        raise ValueError(
            f"got device {name!r}, expected one that is here: {accelerator or 'cpu'} "
            "(try --device auto)"
        )
    if wanted.type == "cuda" and wanted.index is None:
        wanted = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if wanted.type == "cuda" and wanted.index >= torch.cuda.device_count():
        raise ValueError(
            f"got device {wanted}, expected an index below {torch.cuda.device_count()}"
        )
    return wanted


def dtype(name: str) -> torch.dtype:
    """Returns the torch dtype named "float32" or "bfloat16"."""
    if name not in DTYPES:
        raise ValueError(f"got dtype {name!r}, expected {' or '.join(DTYPES)}")
    return DTYPES[name]


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch on every device.

    A seed is a whole number of 32 bits, which is what numpy takes.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"got seed {seed}, expected 0 <= seed < 2**32")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def ranks() -> tuple[int, int]:
    """Returns (rank, world size) from RANK and WORLD_SIZE, which torchrun sets.

    They are (0, 1) in a process that runs alone.
    """
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < world:
        raise ValueError(f"got RANK={rank} WORLD_SIZE={world}, expected 0 <= RANK < WORLD_SIZE")
    return rank, world


def cores() -> int:
    """Returns the number of cores that this process may use.

    In a container or under taskset they are fewer than the machine's.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(count: int) -> None:
    """Sets the number of threads of torch, and of every process started from here.

    The environment is set because the training engine defaults OMP_NUM_THREADS to 8 when it is
    imported without one.
    """
    if count < 1:
        raise ValueError(f"got {count} threads, expected at least 1")
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


_COUNTING = threading.Lock()
_INSIDE: list[int] = []  # the threads that run without the pool
_USUAL: list[int] = []  # the number of threads before the first of them


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch's operations of this thread without its pool.

    The threads of the pool keep their cores busy for milliseconds after an operation, waiting for
    the next; a compiled kernel with threads of its own would wait for a core. A thread whose first
    operation falls into this has no pool until it has been here itself: torch gives new threads
    the number that was set last.
    """
    with _COUNTING:
        if not _INSIDE:
            _USUAL[:] = [torch.get_num_threads()]
        _INSIDE.append(threading.get_ident())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _COUNTING:
            _INSIDE.remove(threading.get_ident())
            torch.set_num_threads(_USUAL[0])


def memory_used(device: torch.device) -> int | None:
    """Returns the peak of a GPU's memory that torch has allocated, else resident memory, in bytes.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError, ValueError):
        return None


@dataclass
class Clock:
    """Measures seconds since its creation (`seconds`) and since the last `lap()`.

    It uses the performance counter, which is monotonic.
    """

    started: float = field(default_factory=time.perf_counter)
    last: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.started

    def lap(self) -> float:
        """Returns the seconds since the last lap, the first one since the clock was made."""
        now = time.perf_counter()
        elapsed = now - self.last
        self.last = now
        return elapsed


def log(message: str, style: str = "") -> None:
    """Prints one line on standard error, from rank 0 only.

    Standard output stays free for the command's result.
    """
    if ranks()[0] == 0:
        console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
        console.print(escape(message), style=style or None)
