"""Reports what runs on this machine, on which kernels, and what is missing.

The report has versions, cores, memory, devices, kernels and checks; a failed check has a hint how
to fix it.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rorqual import kernels, runtime
from rorqual.hints import install
from rorqual.model import LanguageModel
from rorqual.model_config import EngramConfig, ModelConfig, MoEConfig

BROUGHT = ("lm-eval",)  # used where the user has installed it; no extra of ours does
BUNDLES = ("all", "dev")  # extras made of the others, or for work on rorqual itself


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One check. `state`: "ok", "missing" (optional) or "wrong" (something will not work)."""

    name: str
    state: str
    value: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The output of `rorqual doctor`; `to_dict` is its --json."""

    rorqual: str
    python: str
    system: str
    cores: int
    threads: int
    memory_bytes: int
    disk_free_bytes: int
    devices: tuple[str, ...]
    # by function and kernel: True, or the reason why it does not run here
    kernels: dict[str, dict[str, Any]]
    # by function: the kernel that a call takes now, "reference", or "" where the choice fails
    kernels_picked: dict[str, str]
    kernels_asked: str  # the environment's choice of kernels; "" leaves it to rorqual
    checks: tuple[Check, ...]

    @property
    def well(self) -> bool:
        """Whether nothing is wrong; what is only missing does not count."""
        return all(check.state != "wrong" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values, with `well`."""
        return asdict(self) | {"well": self.well}


def examine(folder: str | Path = ".") -> Report:
    """Examines this machine; `folder` is where runs would be written."""
    picked = {name: _picked(choice) for name, choice in kernels.registered().items()}
    return Report(
        rorqual=_version("rorqual") or "not installed (run from source)",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=runtime.cores(),
        threads=torch.get_num_threads(),
        memory_bytes=memory(),
        disk_free_bytes=shutil.disk_usage(folder).free,
        devices=tuple(_devices()),
        kernels=dict(kernels.available()),
        kernels_picked={name: kind for name, (kind, _) in picked.items()},
        kernels_asked=os.environ.get(kernels.VARIABLE, ""),
        checks=(
            *_packages(),
            _python(),
            _compiler(),
            _threads(),
            _disk(folder),
            _kernels(picked),
            _arithmetic(),
        ),
    )


def lines(report: Report) -> list[str]:
    """Formats the report as text, one item per line; failures come last, with their hints."""
    gib = 2**30
    head = [
        f"rorqual {report.rorqual}, Python {report.python}, {report.system}",
        f"{report.cores} cores, {report.threads} threads, "
        f"{report.memory_bytes / gib:.1f} GiB of memory, "
        f"{report.disk_free_bytes / gib:.1f} GiB free on disk",
        f"devices: {', '.join(report.devices)}",
    ]
    if report.kernels_asked:
        head.append(f"{kernels.VARIABLE}={report.kernels_asked}")
    for name, kinds in report.kernels.items():
        reasons = [f"{kind}: {state}" for kind, state in kinds.items() if state is not True]
        taken = report.kernels_picked[name] or "none"
        head.append(f"kernel {name}: {taken}" + (f" ({'; '.join(reasons)})" if reasons else ""))
    order = {"ok": 0, "missing": 1, "wrong": 2}
    for check in sorted(report.checks, key=lambda check: order[check.state]):
        head.append(
            f"{check.state:8}{check.name}: {check.value}"
            + (f" -> {check.hint}" if check.hint else "")
        )
    return head


def _version(distribution: str) -> str | None:
    """Returns the version of an installed package, None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _picked(choice: kernels.Choice) -> tuple[str, str]:
    """Returns the kind of kernel that runs on this process's device, or "reference", and "".

    Where it refuses, returns "" and the reason.
    """
    try:
        return choice.kind(runtime.device()), ""
    except ValueError as error:
        return "", str(error)


def _kernels(picked: dict[str, tuple[str, str]]) -> Check:
    """Checks that RORQUAL_KERNELS names what runs here; counts the kernels of each kind."""
    errors = list(dict.fromkeys(error for _, error in picked.values() if error))
    if errors:
        hint = f"unset {kernels.VARIABLE}, or set it to what runs here"
        return Check(name="kernels", state="wrong", value="; ".join(errors), hint=hint)
    kinds = [kind for kind, _ in picked.values()]
    return Check(
        name="kernels",
        state="ok",
        value=", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))),
    )


def memory() -> int:
    """Returns the bytes of memory that this process may use.

    That is the machine's memory, or its control group's limit if that is lower; 0 where it is
    unknown.
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(limit).read_text(encoding="ascii").strip() if Path(limit).is_file() else ""
        if text.isdigit():
            total = min(total, int(text))
    return total


def _devices() -> list[str]:
    """Lists the CPU with its vector instructions, each GPU with its memory, and mps."""
    devices = [
        f"cpu ({platform.processor() or platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()})"
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"cuda:{index} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
        )
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _wanted() -> list[tuple[str, str | None]]:
    """Returns (distribution, its extra or None) of all that rorqual's own metadata names."""
    checks: list[tuple[str, str | None]] = []
    for line in importlib.metadata.requires("rorqual") or ():
        word = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"]([\w-]+)", line)
        named = {name.lower() for name, _ in checks}
        if word and word[0].lower() in named:
            continue
        if word and word[0] != "rorqual" and (extra is None or extra[1] not in BUNDLES):
            checks.append((word[0], extra[1] if extra else None))
    return checks


def _packages() -> list[Check]:
    """Checks the version of every package that rorqual needs; those of extras may be missing."""
    try:
        wanted = _wanted()
    except importlib.metadata.PackageNotFoundError:
        hint = "pip install -e . in the checkout"
        return [
            Check(
                name="rorqual",
                state="missing",
                value="not installed: what it needs is unknown",
                hint=hint,
            )
        ]
    checks = [
        _package(
            name,
            "missing" if extra else "wrong",
            install(extra) if extra else f"pip install {name}",
        )
        for name, extra in wanted
    ]
    return checks + [_package(name, "missing", f"pip install {name}") for name in BROUGHT]


def _package(distribution: str, otherwise: str, hint: str) -> Check:
    """Checks that one distribution is installed, and says which version.

    `otherwise` is the state where it is not installed, `hint` the command that installs it.
    """
    version = _version(distribution)
    if version is not None:
        return Check(name=distribution, state="ok", value=version)
    return Check(name=distribution, state=otherwise, value="not installed", hint=hint)


def _python() -> Check:
    """Checks that Python is 3.11 or later."""
    good = sys.version_info >= (3, 11)
    hint = "" if good else "use Python 3.11 or later"
    return Check(
        name="python", state="ok" if good else "wrong", value=platform.python_version(), hint=hint
    )


def _compiler() -> Check:
    """Looks for the C++ compiler that torch.compile calls."""
    compiler = next(
        (
            path
            for name in (os.environ.get("CXX", ""), "g++", "clang++")
            if (path := shutil.which(name))
        ),
        None,
    )
    if compiler:
        return Check(name="C++ compiler", state="ok", value=compiler)
    return Check(
        name="C++ compiler",
        state="missing",
        value="none on the path",
        hint="install g++: torch.compile needs it (apt install g++, or set CXX)",
    )


def _threads() -> Check:
    """Checks that torch does not use more threads than there are cores."""
    cores = runtime.cores()
    threads = torch.get_num_threads()
    if threads <= cores:
        return Check(name="threads", state="ok", value=f"{threads} for {cores} cores")
    return Check(
        name="threads",
        state="missing",
        value=f"{threads} for {cores} cores, which slows every operation",
        hint=f"export OMP_NUM_THREADS={cores}",
    )


def _disk(folder: str | Path) -> Check:
    """Checks that runs can be written to the folder, on a disk with 2 GiB free."""
    free = shutil.disk_usage(folder).free / 2**30
    good = free >= 2 and os.access(folder, os.W_OK)
    hint = "" if good else "runs are written here: free 2 GiB, or choose another folder"
    return Check(
        name="disk",
        state="ok" if good else "wrong",
        value=f"{free:.1f} GiB free in {folder}",
        hint=hint,
    )


@contextmanager
def _asking(text: str) -> Iterator[None]:
    """Sets the environment's choice of kernels to `text` for a `with` block."""
    before = os.environ.get(kernels.VARIABLE)
    os.environ[kernels.VARIABLE] = text
    try:
        yield
    finally:
        if before is None:
            del os.environ[kernels.VARIABLE]
        else:
            os.environ[kernels.VARIABLE] = before


def _arithmetic() -> Check:
    """Checks that a small model with experts and Engram computes correctly.

    Two runs must agree to the last bit, and with the references to a tolerance.
    """
    engram = EngramConfig(layers=(0,), rows_per_head=(31, 31), heads=2, head_dim=8)
    moe = MoEConfig(routed=8, active=2, width=16)
    model = LanguageModel(
        ModelConfig(vocab_size=32, layers=1, dense_width=32, moe=moe, engram=engram)
    )
    device = runtime.device()
    model.to(device)
    ids = torch.arange(32, device=device)[None]
    try:
        with torch.inference_mode():
            first = model(ids)
            second = model(ids)
            with _asking(kernels.REFERENCE):
                plain = model(ids)
    except ValueError as error:
        hint = f"{kernels.VARIABLE}=reference rorqual doctor"
        return Check(
            name="arithmetic",
            state="wrong",
            value=f"a small model does not run: {error}",
            hint=hint,
        )
    good = (
        bool(torch.isfinite(first).all())
        and torch.equal(first, second)
        and torch.allclose(first, plain, 1e-4, 1e-5)
    )
    if good:
        return Check(
            name="arithmetic",
            state="ok",
            value="a small model repeats itself to the last bit and agrees with the references",
        )
    problem = "a small model is not finite, not itself twice, or not what the references say"
    hint = f"run with {kernels.VARIABLE}=reference; if that mends it, a kernel is at fault"
    return Check(name="arithmetic", state="wrong", value=problem, hint=hint)
