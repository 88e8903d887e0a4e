"""Registers kernels on their PyTorch references, and runs the fastest that can take the arguments.

    @kernel(
        numba="rorqual.kernels.select:selected_attention",
        triton="rorqual.kernels.triton_select:selected_attention",
    )
    def selected_attention(query, key, ...): ...

The decorated function is the reference: it documents the operation, and runs wherever no kernel
can. A kernel is a function of the same signature that returns the same numbers. It is named by
module and function, and imported when it first runs: neither numba nor triton need be installed.

    selected_attention(query, ...)             runs the fastest kernel, or else the reference
    selected_attention.reference(query, ...)   runs the reference
    selected_attention.choose(query, ...)      returns the kernel that would run, or None

The environment variable RORQUAL_KERNELS overrides the choice: "reference" selects the reference
everywhere, and "hash_rows=reference,row_adam=numba" decides function by function.
"""

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from rorqual.hints import choose

VARIABLE = "RORQUAL_KERNELS"
REFERENCE = "reference"

# The modules that register something. A name in RORQUAL_KERNELS may belong to one that is not
# imported yet; `registered` imports them all. `_register` refuses a module that is not listed.
MODULES = (
    "rorqual.tables.fp8",
    "rorqual.tables.row_file",
    "rorqual.layers.addresses",
    "rorqual.layers.engram",
    "rorqual.layers.streams",
    "rorqual.layers.sparse",
    "rorqual.layers.nsa",
    "rorqual.layers.dsa",
    "rorqual.train.optim",
    "rorqual.serve.step",
)

# The dictionary behind os.environ, and the variable's key in it. Reading it takes 0.03
# microseconds; os.environ.get takes up to 2, which is more than all other checks of a call.
_ENVIRONMENT: Mapping[Any, Any] = os.environ._data  # type: ignore[attr-defined]
_KEY = os.environ.encodekey(VARIABLE)

# Fewer look-ups in a module than torch.float32.
_FLOAT32 = torch.float32

REGISTERED: dict[str, "Choice"] = {}

P = ParamSpec("P")
R = TypeVar("R")


def numba_refuses(
    args: Sequence[Any], floats: Iterable[int], others: Iterable[int], selected: bool
) -> str:
    """Returns why numba's kernels cannot take these arguments; "" if they can.

    They take tensors on the CPU, of integers or float32, without gradients. args[i] is a tensor or
    None for i in `floats` and `others`; those of `others` are known to be no floats.
    """
    for i in others:
        x = args[i]
        if x is not None and not x.is_cpu:
            return f"it runs on the cpu, not on {x.device.type}"
    with_gradients = bool(floats) and is_grad_enabled()
    for i in floats:
        x = args[i]
        if x is None:
            continue
        if not x.is_cpu:
            return f"it runs on the cpu, not on {x.device.type}"
        if x.dtype is not _FLOAT32 and x.dtype.is_floating_point:
            return f"it computes in float32, not in {x.dtype}"
        if with_gradients and x.requires_grad:
            return "it has no backward"
    return ""


def triton_refuses(
    args: Sequence[Any], floats: Iterable[int], others: Iterable[int], selected: bool
) -> str:
    """Returns why Triton's kernels cannot take these arguments, as numba_refuses does.

    They take tensors on a GPU, of any dtype but float64. Where TRITON_INTERPRET=1 was set before
    Triton was imported, they run on the CPU, statement by statement in numpy: slow, and meant for
    tests. They do so only where RORQUAL_KERNELS has `selected` them.
    """
    interpreted = selected and os.environ.get("TRITON_INTERPRET") == "1"
    for i in (*floats, *others):
        x = args[i]
        if x is None:
            continue
        if not (x.device.type == "cuda" or (interpreted and x.is_cpu)):
            return f"it runs on cuda, not on {x.device.type}"
        if x.dtype is torch.float64:
            return "it computes in float32, not in float64"
    return ""


_Refuses = Callable[[Sequence[Any], Iterable[int], Iterable[int], bool], str]
# By kind of kernel, which is also the name of the package that compiles it.
_REFUSES: Mapping[str, _Refuses] = MappingProxyType(
    {"numba": numba_refuses, "triton": triton_refuses}
)


@dataclass(frozen=True, slots=True)
class _On:
    """Stands for any float32 tensor on a device."""

    device: torch.device
    dtype = torch.float32
    requires_grad = False

    @property
    def is_cpu(self) -> bool:
        """Whether the device is the CPU, as tensors say it."""
        return self.device.type == "cpu"


class Kernel:
    """One implementation, "module:function", which is imported when it first runs."""

    def __init__(self, kind: str, target: str, missing: str = "") -> None:
        self.kind = kind
        self.target = target
        self.refuses = _REFUSES[kind]
        self.missing = missing or ("" if is_installed(kind) else f"{kind} is not installed")

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The kernel itself; its module is imported when this is first read."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


class Choice:
    """The kernels of one name, the preferred one first."""

    def __init__(
        self,
        name: str,
        module: str,
        targets: Mapping[str, str],
        reference: Callable[..., Any] | None = None,
        missing: str = "",
    ) -> None:
        self.name = name
        self.module = module
        self.reference = reference
        self.kernels = tuple(Kernel(kind, target, missing) for kind, target in targets.items())

    def select(
        self, args: Sequence[Any], floats: Iterable[int], others: Iterable[int] = ()
    ) -> Kernel | None:
        """Returns the first kernel that can take these arguments; None stands for the reference.

        args[i] is a tensor or None for i in `floats` and `others`; those of `others` are no floats.
        Under torch.compile it is None, since the compiler turns the reference into a kernel of its
        own. ValueError where RORQUAL_KERNELS names a kernel that cannot take the arguments.
        """
        if is_compiling():
            return None
        if text := _ENVIRONMENT.get(_KEY):
            everywhere, by_name = parse_variable(os.environ.decodevalue(text))
            kind = by_name.get(self.name, everywhere)
            if kind is not None:
                return self._selected(kind, args, floats, others)
        for kernel in self.kernels:
            if not (kernel.refuses(args, floats, others, False) or kernel.missing):
                return kernel
        return None

    def _selected(
        self, kind: str, args: Sequence[Any], floats: Iterable[int], others: Iterable[int]
    ) -> Kernel | None:
        """Returns the kernel of the kind that RORQUAL_KERNELS names."""
        if kind == REFERENCE:
            return None
        (kernel,) = (kernel for kernel in self.kernels if kernel.kind == kind)
        if reason := kernel.refuses(args, floats, others, True) or kernel.missing:
            raise ValueError(
                f"{VARIABLE} asks for {self.name}={kind}, which does not run here: {reason}"
            )
        return kernel

    def kind(self, *where: Tensor | torch.device) -> str:
        """Returns the kind of the kernel that runs on these tensors or devices, or "reference"."""
        kernel = self._select(where)
        return REFERENCE if kernel is None else kernel.kind

    def choose(self, *where: Tensor | torch.device) -> Callable[..., Any] | None:
        """Returns the kernel that runs on these tensors or devices, or None."""
        kernel = self._select(where)
        return None if kernel is None else kernel.function

    def _select(self, where: Sequence[Tensor | torch.device]) -> Kernel | None:
        """Selects as a call would whose tensors are these, or float32 ones on these devices."""
        tensors = [_On(x) if isinstance(x, torch.device) else x for x in where]
        return self.select(tensors, range(len(tensors)))

    def reasons(self, device: torch.device) -> dict[str, str]:
        """Returns for each kind why its kernel does not run on a device; "" if it does."""
        return {
            kernel.kind: kernel.refuses([_On(device)], [0], [], False) or kernel.missing
            for kernel in self.kernels
        }

    def load(self, kind: str) -> Callable[..., Any]:
        """Returns the kernel of one kind, wherever it can run."""
        kinds = {kernel.kind: kernel for kernel in self.kernels}
        return kinds[choose(f"kind of {self.name}", kind, kinds)].function


@runtime_checkable
class Operation(Protocol[P, R]):
    """A decorated reference: a function whose calls run a kernel where one can run."""

    __name__: str
    reference: Callable[P, R]
    choice: Choice
    choose: Callable[..., Callable[P, R] | None]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def kernel(*, missing: str = "", **targets: str) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Registers kernels of a reference, by kind: "numba" or "triton", each as "module:function".

    Where more than one can run, the first is taken. The tensors among the required parameters
    decide which can. `missing` says what this system lacks for them; "" if nothing.
    """

    def register(reference: Callable[P, R]) -> Operation[P, R]:
        made = Choice(reference.__name__, reference.__module__, targets, reference, missing)
        _register(made)
        signature = inspect.signature(reference)
        select = made.select
        floats, others = _tensors(signature)

        @functools.wraps(reference)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            arguments: Sequence[Any] = args
            if kwargs:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                arguments = tuple(bound.arguments.values())
            try:
                kernel = select(arguments, floats, others)
            except IndexError:  # too few arguments, which the reference refuses
                kernel = None
            if kernel is None:
                return reference(*args, **kwargs)
            return kernel.function(*args, **kwargs)

        operation = cast(Operation[P, R], run)
        operation.reference = reference
        operation.choice = made
        operation.choose = made.choose
        return operation

    return register


def _tensors(signature: inspect.Signature) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the places of the required tensors that may be floats, and of the others.

    They are read from the annotations, since a look at every argument of a call would take as long
    as some kernels do.
    """
    floats: tuple[int, ...] = ()
    others: tuple[int, ...] = ()
    for i, parameter in enumerate(signature.parameters.values()):
        words = str(parameter.annotation)
        if parameter.default is not parameter.empty or "Tensor" not in words:
            continue
        if any(f"{dtype}[" in words for dtype in ("Int", "UInt8", "Bool")):
            others += (i,)
        else:
            floats += (i,)
    return floats, others


def choice(name: str, module: str, **targets: str) -> Choice:
    """Registers kernels of something that no single function can be the reference of.

    The caller, `module`, asks `choose` and does without where that is None.
    """
    made = Choice(name, module, targets)
    _register(made)
    return made


def _register(made: Choice) -> None:
    """Adds a choice under its name; that belongs to one module, which MODULES must list."""
    name = made.name
    module = made.module
    assert module in MODULES or not module.startswith("rorqual."), (
        f"{name}: list {module} in rorqual.kernels.MODULES"
    )
    before = REGISTERED.setdefault(name, made)
    assert before.module == module, f"{module}: {name} is already registered by {before.module}"
    REGISTERED[name] = made


def registered() -> Mapping[str, Choice]:
    """Returns every choice by its name, which is that of the reference."""
    for module in MODULES:
        importlib.import_module(module)
    return dict(sorted(REGISTERED.items()))


def available() -> dict[str, dict[str, bool | str]]:
    """Lists the kernels that run on this machine's CPU and accelerator.

    {name: {kind: True, or the reason why it does not run}}.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [torch.device("cpu"), *([accelerator] if accelerator is not None else [])]
    result: dict[str, dict[str, bool | str]] = {}
    for name, made in registered().items():
        reasons = [made.reasons(device) for device in devices]
        result[name] = {
            kind: True if any(not each[kind] for each in reasons) else reason
            for kind, reason in reasons[0].items()
        }
    return result


@functools.cache
def is_installed(package: str) -> bool:
    """Returns whether a package is installed, without importing it."""
    return importlib.util.find_spec(package) is not None


@functools.lru_cache(maxsize=8)
def parse_variable(text: str) -> tuple[str | None, Mapping[str, str]]:
    """Parses RORQUAL_KERNELS: the kind for every name, or None, and the kinds of single names.

    ValueError for an unknown name or kind.
    """
    if text.strip() in ("", REFERENCE):
        return text.strip() or None, {}
    kinds = {}
    for item in text.split(","):
        name, equals, kind = (piece.strip() for piece in item.partition("="))
        if not equals:
            raise ValueError(
                f"got {VARIABLE}={text!r}, expected 'reference' or name=kind,name=kind"
            )
        choices = REGISTERED if name in REGISTERED else registered()
        choose(f"{VARIABLE} name", name, choices)
        expected = [REFERENCE, *(kernel.kind for kernel in choices[name].kernels)]
        kinds[name] = choose(f"kind of {name}", kind, expected)
    return None, kinds
