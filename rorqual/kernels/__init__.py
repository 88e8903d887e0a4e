"""Chooses the fastest kernel that can run on the given tensors, or the PyTorch reference.

A kernel has the signature of its reference and gives the same numbers. The environment variable
RORQUAL_KERNELS overrides the choice: "reference" selects the reference everywhere, and
"engram_rows=reference,other=numba" decides name by name.
"""

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from rorqual.hints import choose
from rorqual.kernels import (
    compiled,
    dsa,
    engram,
    files,
    nsa,
    rows,
    select,
    step,
    triton_twins,
)

VARIABLE = "RORQUAL_KERNELS"
REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Twin:
    """One kernel of an operation: its kind, its function and where it can run.

    `usable(*tensors_or_device)` is "" where `function` can run on them, else the reason why not.
    """

    kind: str
    function: Callable[..., Any]
    usable: Callable[..., str]


TWINS: Mapping[str, tuple[Twin, ...]] = MappingProxyType(
    {
        "engram_rows": (
            Twin("numba", engram.hash_rows, compiled.usable),
            Twin("triton", triton_twins.hash_rows, triton_twins.usable("engram_rows")),
        ),
        "engram_follow": (Twin("numba", engram.follow_rows, compiled.usable),),
        "engram_fuse": (Twin("triton", triton_twins.fuse, triton_twins.usable("engram_fuse")),),
        "hyper_collapse": (
            Twin("triton", triton_twins.collapse, triton_twins.usable("hyper_collapse")),
        ),
        "hyper_write": (Twin("triton", triton_twins.write, triton_twins.usable("hyper_write")),),
        "fp8_rows": (Twin("triton", triton_twins.recall, triton_twins.usable("fp8_rows")),),
        "selected_attention": (
            Twin("numba", select.selected_attention, select.usable),
            Twin(
                "triton", triton_twins.selected_attention, triton_twins.usable("selected_attention")
            ),
        ),
        "dsa_few": (Twin("numba", dsa.attend_best, select.usable),),
        "nsa_few": (Twin("numba", nsa.attend_few, select.usable),),
        "decode_step": (Twin("numba", step.Step, rows.usable),),
        "read_rows": (Twin("numba", files.read_rows, files.usable),),
        "row_adam": (Twin("numba", rows.row_adam, rows.usable),),
        "sum_rows": (Twin("numba", rows.sum_rows, rows.usable),),
    }
)


def pick(name: str, reference: Callable[..., Any], *where: Any) -> Callable[..., Any]:
    """Returns the first kernel of `name` that can run on these tensors or this device.

    It is `reference` where no kernel can run. Under torch.compile it is always the reference, which
    the compiler turns into a kernel of its own. ValueError where the environment selects a kernel
    that cannot run here.
    """
    if torch.compiler.is_compiling():
        return reference
    wanted = _wanted(os.environ.get(VARIABLE, "")).get(name)
    if wanted == REFERENCE:
        return reference
    for twin in TWINS.get(name, ()):
        if wanted not in (None, twin.kind):
            continue
        reason = twin.usable(*where)
        if not reason:
            return twin.function
        if wanted is not None:
            raise ValueError(
                f"{VARIABLE} asks for {name}={wanted}, which does not run here: {reason}"
            )
    return reference


def available() -> dict[str, dict[str, bool | str]]:
    """Lists the kernels that run on this machine's CPU and accelerator.

    {name: {kind: True, or the reason why it does not run}}.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [torch.device("cpu"), *([accelerator] if accelerator is not None else [])]
    found: dict[str, dict[str, bool | str]] = {}
    for name, twins in TWINS.items():
        reasons = {twin.kind: [twin.usable(device) for device in devices] for twin in twins}
        found[name] = {kind: True if "" in each else each[0] for kind, each in reasons.items()}
    return found


@functools.lru_cache(maxsize=8)
def _wanted(text: str) -> Mapping[str, str]:
    """Parses RORQUAL_KERNELS into {name: kind}; ValueError for an unknown name or kind."""
    if text.strip() in ("", REFERENCE):
        return dict.fromkeys(TWINS, REFERENCE) if text.strip() else {}
    wanted = {}
    for item in text.split(","):
        name, equals, kind = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(
                f"got {VARIABLE}={text!r}, expected 'reference' or name=kind,name=kind"
            )
        choose(f"{VARIABLE} name", name, TWINS)
        wanted[name] = choose(
            f"kind of {name}", kind, [REFERENCE, *(twin.kind for twin in TWINS[name])]
        )
    return wanted
