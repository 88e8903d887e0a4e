"""This machine -> what runs here, on which kernels, and what is missing.

report = versions, cores, memory, devices, kernels, checks        a check that failed says what mends it
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rorqual import kernels, runtime
from rorqual.model import LanguageModel, ModelConfig

# distribution, import name, extra that brings it (None: always needed)
PACKAGES = (
    ("torch", "torch", None),
    ("numpy", "numpy", None),
    ("tokenizers", "tokenizers", None),
    ("safetensors", "safetensors", None),
    ("tyro", "tyro", None),
    ("rich", "rich", None),
    ("ai2-olmo-core", "olmo_core", "train"),
    ("transformers", "transformers", None),
    ("huggingface_hub", "huggingface_hub", "hub"),
    ("datasets", "datasets", "hub"),
    ("matplotlib", "matplotlib", "report"),
    ("starlette", "starlette", "serve"),
    ("uvicorn", "uvicorn", "serve"),
    ("lm-eval", "lm_eval", None),
    ("peft", "peft", None),
    ("numba", "numba", None),
    ("triton", "triton", None),
)
OPTIONAL = frozenset({"peft", "numba", "triton", "lm-eval"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing looked at. `state`: "ok", "missing" (optional) or "wrong" (something will not work)."""

    name: str
    state: str
    found: str
    mend: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `rorqual doctor` prints; `to_dict` is its --json."""

    rorqual: str
    python: str
    system: str
    cores: int
    threads: int
    memory_bytes: int
    disk_free_bytes: int
    devices: tuple[str, ...]
    kernels: dict[str, dict[str, Any]]  # by name and twin: True, or the reason why it does not run here
    kernels_asked: str  # what the environment asks for; "" leaves the choice to us
    checks: tuple[Check, ...]

    @property
    def well(self) -> bool:
        return all(check.state != "wrong" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"well": self.well}


def examine(folder: str | Path = ".") -> Report:
    """Look at everything; `folder` is where runs would be written."""
    return Report(
        rorqual=_version("rorqual") or "not installed (run from source)",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=_memory(),
        disk_free_bytes=shutil.disk_usage(folder).free,
        devices=tuple(_devices()),
        kernels={name: dict(twins) for name, twins in kernels.available().items()},
        kernels_asked=os.environ.get(kernels.VARIABLE, ""),
        checks=(*_packages(), _python(), _compiler(), _threads(), _disk(folder), _arithmetic()),
    )


def lines(report: Report) -> list[str]:
    """The report as text, one thing a line, what is wrong last and with its mend."""
    gib = 2**30
    head = [
        f"rorqual {report.rorqual}, Python {report.python}, {report.system}",
        f"{report.cores} cores, {report.threads} threads, {report.memory_bytes / gib:.1f} GiB of memory, "
        f"{report.disk_free_bytes / gib:.1f} GiB free on disk",
        f"devices: {', '.join(report.devices)}",
    ]
    if report.kernels_asked:
        head.append(f"{kernels.VARIABLE}={report.kernels_asked}")
    for name, twins in report.kernels.items():
        usable = [twin for twin, state in twins.items() if state is True]
        reasons = [f"{twin}: {state}" for twin, state in twins.items() if state is not True]
        head.append(
            f"kernel {name}: {usable[0] if usable else 'reference'}" + (f" ({'; '.join(reasons)})" if reasons else "")
        )
    order = {"ok": 0, "missing": 1, "wrong": 2}
    for check in sorted(report.checks, key=lambda check: order[check.state]):
        head.append(f"{check.state:8}{check.name}: {check.found}" + (f" -> {check.mend}" if check.mend else ""))
    return head


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    """Bytes of memory this process may use: the machine's, or its control group's limit if that is lower."""
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
    found = [f"cpu ({platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _packages() -> list[Check]:
    checks = []
    for distribution, module, extra in PACKAGES:
        version = _version(distribution) if importlib.util.find_spec(module) else None
        if version is not None:
            checks.append(Check(name=distribution, state="ok", found=version))
            continue
        needed = extra is None and distribution not in OPTIONAL
        mend = f"pip install {distribution}" if extra is None else f"pip install 'rorqual[{extra}]'"
        checks.append(
            Check(name=distribution, state="wrong" if needed else "missing", found="not installed", mend=mend)
        )
    return checks


def _python() -> Check:
    good = sys.version_info >= (3, 11)
    mend = "" if good else "use Python 3.11 or later"
    return Check(name="python", state="ok" if good else "wrong", found=platform.python_version(), mend=mend)


def _compiler() -> Check:
    found = next((path for name in (os.environ.get("CXX", ""), "g++", "clang++") if (path := shutil.which(name))), None)
    if found:
        return Check(name="C++ compiler", state="ok", found=found)
    return Check(
        name="C++ compiler",
        state="missing",
        found="none on the path",
        mend="install g++: torch.compile needs it (apt install g++, or set CXX)",
    )


def _threads() -> Check:
    cores, threads = _cores(), torch.get_num_threads()
    if threads <= cores:
        return Check(name="threads", state="ok", found=f"{threads} for {cores} cores")
    return Check(
        name="threads",
        state="missing",
        found=f"{threads} for {cores} cores, which slows every operation",
        mend=f"export OMP_NUM_THREADS={cores}",
    )


def _disk(folder: str | Path) -> Check:
    free = shutil.disk_usage(folder).free / 2**30
    good = free >= 2 and os.access(folder, os.W_OK)
    mend = "" if good else "runs are written here: free 2 GiB, or choose another folder"
    return Check(name="disk", state="ok" if good else "wrong", found=f"{free:.1f} GiB free in {folder}", mend=mend)


def _arithmetic() -> Check:
    """A small model says the same twice, to the last bit, and nothing that is not a number."""
    model = LanguageModel(ModelConfig(vocabulary=32, dim=64, layers=1, dense_width=32))
    device = runtime.device()
    model.to(device)
    ids = torch.arange(8, device=device)[None]
    with torch.inference_mode():
        first, second = model(ids), model(ids)
    good = bool(torch.isfinite(first).all()) and torch.equal(first, second)
    found = (
        "a small model repeats itself to the last bit" if good else "a small model is not finite, or not itself twice"
    )
    mend = "" if good else "run with RORQUAL_KERNELS=reference; if that mends it, a kernel is at fault"
    return Check(name="arithmetic", state="ok" if good else "wrong", found=found, mend=mend)
