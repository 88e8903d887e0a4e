"""Names and numbers that a user gives in -> this process's device, dtype, seeds, ranks, threads, clock and log out."""

import os
import random
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is the accelerator that is there, else the CPU.

    A plain "cuda" becomes this process's own, by LOCAL_RANK. ValueError when there is no such device here.
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
            f"got device {name!r}, expected one that is here: {accelerator or 'cpu'} (try --device auto)"
        )
    if wanted.type == "cuda" and wanted.index is None:
        wanted = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if wanted.type == "cuda" and wanted.index >= torch.cuda.device_count():
        raise ValueError(
            f"got device {wanted}, expected an index below {torch.cuda.device_count()}"
        )
    return wanted


def dtype(name: str) -> torch.dtype:
    """ "float32" or "bfloat16" -> the torch dtype."""
    if name not in DTYPES:
        raise ValueError(f"got dtype {name!r}, expected {' or '.join(DTYPES)}")
    return DTYPES[name]


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch on every device. A seed is a whole number of 32 bits, which is what numpy takes."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"got seed {seed}, expected 0 <= seed < 2**32")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def ranks() -> tuple[int, int]:
    """(rank, world size), from the RANK and WORLD_SIZE that torchrun sets; (0, 1) in a process that runs alone."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < world:
        raise ValueError(f"got RANK={rank} WORLD_SIZE={world}, expected 0 <= RANK < WORLD_SIZE")
    return rank, world


def cores() -> int:
    """Cores this process may use, which in a container or under taskset are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(count: int) -> None:
    """Lets torch, and every process started from here, use this many threads.

    The environment is set because the training engine defaults OMP_NUM_THREADS to 8 when it is imported without one.
    """
    if count < 1:
        raise ValueError(f"got {count} threads, expected at least 1")
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


@dataclass
class Clock:
    """Seconds since it was made (`seconds`), and since it was last asked (`lap()`), by the monotonic clock."""

    started: float = field(default_factory=time.perf_counter)
    last: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed


def log(message: str, style: str = "") -> None:
    """One line on standard error, from rank 0 only, so that standard output stays the command's answer."""
    if ranks()[0] == 0:
        console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
        console.print(escape(message), style=style or None)
