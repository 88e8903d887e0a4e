"""Configures pytest: imports rorqual with its shapes checked, on OMP_NUM_THREADS threads, or one.

Every jaxtyping annotation in rorqual is checked by beartype while tests run, once for each kind of
call, and by nothing in production. torch.compile cannot trace the checks, so a test
marked `compiled` runs in a process of its own without them. One marked `interpreted` runs Triton's
kernels: on a GPU where there is one, else in a process of its own, interpreted.
"""

import dataclasses
import functools
import gc
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import typing
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jaxtyping
import numpy as np
import pytest

CHECKED = os.environ.get("RORQUAL_SHAPES", "1") != "0"
SEEN: set[int] = set()  # hashes of the calls that were checked
KINDS: dict[type, Callable[[Any], Any]] = {}  # what gives the kind of a class's values
STRUCTURES: dict[tuple, int] = {}  # a number for each structure of a module
STRUCTURE_OF: weakref.WeakKeyDictionary[Any, tuple] = weakref.WeakKeyDictionary()
jaxtyped = jaxtyping.jaxtyped


def checked_once(fn: Any = None, **options: Any) -> Any:
    """Decorates as jaxtyping.jaxtyped does, but equal calls of a function are checked once.

    Calls are equal if their tensors and arrays have equal shapes and dtypes, also those in lists
    and dataclasses as a context, their numbers are equal, their modules have equal structures, and
    other arguments have equal types. A check takes longer than most functions of small tensors.
    """
    if fn is None:
        return functools.partial(checked_once, **options)
    if dataclasses.is_dataclass(fn):
        if "__init__" in vars(fn) and not hasattr(fn.__init__, "__wrapped__"):
            fn.__init__ = checked_once(fn.__init__, **options)
        return fn
    if getattr(fn, "__module__", None) == "rorqual":
        # It takes part in imports, and a check would import.
        return fn
    if not inspect.isfunction(fn):
        return jaxtyped(fn, **options)
    if not any(map(_has_shapes, fn.__annotations__.values())):
        return fn
    # A function inside of another one is made anew whenever that one is called.
    code = fn.__code__
    checked = list[Any]()

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        key = hash((code, *map(_kind, args), *((name, _kind(x)) for name, x in kwargs.items())))
        if key in SEEN:
            return fn(*args, **kwargs)
        if not checked:
            checked.append(jaxtyped(fn, **options))
        result = checked[0](*args, **kwargs)
        SEEN.add(key)
        return result

    return call


def _has_shapes(annotation: Any) -> bool:
    """Returns whether an annotation is of jaxtyping, or has such a part."""
    if isinstance(annotation, str):
        return True  # not known yet
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_has_shapes, typing.get_args(annotation)))


def _kind(x: Any) -> Any:
    """Returns what two values share that a check cannot tell apart."""
    kind = KINDS.get(type(x))
    if kind is None:
        kind = KINDS[type(x)] = _kind_of(type(x))
    return kind(x)


def _kind_of(cls: type) -> Callable[[Any], Any]:
    """Returns the function that gives the kind of the values of a class."""
    if issubclass(cls, torch.Tensor | np.ndarray):
        return lambda x: (x.shape, x.dtype)
    if issubclass(cls, str | bool | int):
        return lambda x: x
    if issubclass(cls, torch.nn.Module):
        return lambda x: _structure(x) if "_modules" in vars(x) else cls
    if issubclass(cls, slice):
        return lambda x: (x.start, x.stop, x.step)
    if issubclass(cls, tuple | list):
        # Long lists are of ids: their number says enough.
        return lambda x: (cls, len(x), *map(_kind, x[:8]))
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls)]

        def fields(x: Any) -> Any:
            # Not its numbers, or each step of a decoding loop would be a kind of its own.
            values = [getattr(x, name, None) for name in names]
            return cls, *(
                (y.shape, y.dtype) if isinstance(y, torch.Tensor) else type(y) for y in values
            )

        return fields
    return lambda x: cls


def _structure(module: Any) -> int:
    """Returns a number that two modules share if they are built alike.

    Their classes, settings, and the shapes and dtypes of their tensors are equal, and their parts'.
    """
    # A module may be seen while it is being built.
    size = len(vars(module)), len(module._parameters), len(module._buffers), len(module._modules)
    seen, number = STRUCTURE_OF.get(module, (None, 0))
    if seen != size:
        settings = [
            (name, value)
            for name, value in vars(module).items()
            if isinstance(value, str | bool | int | float | tuple)
        ]
        tensors = [
            (name, None if tensor is None else (tuple(tensor.shape), tensor.dtype))
            for named in (module._parameters, module._buffers)
            for name, tensor in named.items()
        ]
        children = [
            (name, None if child is None else _structure(child))
            for name, child in module._modules.items()
        ]
        key = (type(module), repr(settings), *tensors, *children)
        number = STRUCTURES.setdefault(key, len(STRUCTURES))
        STRUCTURE_OF[module] = size, number
    return number


if CHECKED:
    jaxtyping.jaxtyped = checked_once
    jaxtyping.install_import_hook(
        "rorqual", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )

import torch  # noqa: E402 (after the hook and the threads, which it reads when it loads)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# The environment that a test with a mark needs before anything is imported.
ALONE = {
    "compiled": {"RORQUAL_SHAPES": "0"},
    "interpreted": {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"},
}


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test whose mark needs another environment in a process of its own."""
    marks = [mark.name for mark in pyfuncitem.iter_markers() if mark.name in ALONE]
    needed = {name: value for mark in marks for name, value in ALONE[mark].items()}
    if "interpreted" in marks and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if all(os.environ.get(name) == value for name, value in needed.items()):
        return None
    if "compiled" in marks and any(map(str.isspace, torch.__file__)):
        pytest.skip(
            "torch's C++ builder does not quote its folder, and this one has a space in its name"
        )
    pytest_quietly = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", ""]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    done = subprocess.run(
        [sys.executable, *pytest_quietly, pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env=environment | needed,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return True


class NoOtherSkips:
    """Fails the run in CI if a test was skipped for a reason that tests/skips.txt does not list."""

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = [re.compile(pattern) for pattern in allowed]
        self.refused: list[str] = []

    def record_skip(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Records the skip of a test, or of a whole file."""
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(pattern.search(reason) for pattern in self.allowed):
            self.refused.append(f"{report.nodeid}: {reason}")

    pytest_runtest_logreport = record_skip
    pytest_collectreport = record_skip

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.refused and session.exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.refused:
            terminalreporter.section("skips that tests/skips.txt does not allow")
            for line in sorted(set(self.refused)):
                terminalreporter.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the list of allowed skips if the environment has CI set.

    xdist's workers report to the first process.
    """
    if os.environ.get("CI") and not hasattr(config, "workerinput"):
        lines = Path(__file__).with_name("skips.txt").read_text(encoding="utf-8").splitlines()
        patterns = [line for line in lines if line and not line.startswith("#")]
        config.pluginmanager.register(NoOtherSkips(patterns))


def pytest_collection_finish() -> None:
    """Leaves what was imported out of later garbage collections, which trainers ask for often.

    With all libraries loaded one takes a tenth of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Starts every test from the same seed, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills uninitialised memory of torch with NaN or the largest integer.

    A read before a write then changes the result.
    """
    fills = torch.utils.deterministic.fill_uninitialized_memory
    strict = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(strict)
    torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.fixture
def no_larger_file(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Provides a function that limits the size of files in bytes until the test ends.

    Writes beyond it fail, as on a disk that is full. The limit ends before pytest reports the test,
    perhaps into a file of its own.
    """
    resource = pytest.importorskip("resource", reason="a system without limits of resources")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    test = request.node.obj

    @functools.wraps(test)
    def limited(*args: Any, **named: Any) -> Any:
        try:
            return test(*args, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    request.node.obj = limited
    return lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))


@pytest.fixture
def tiled() -> torch.device:
    """The device on which Triton's kernels run in a test marked `interpreted`."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves a run folder: an untrained `tiny` of two blocks with Engram, and a small tokenizer."""
    from rorqual import checkpoint, config
    from rorqual.data import tokenizer
    from rorqual.model import LanguageModel
    from rorqual.presets import preset

    text = [
        "The blue whale is the largest animal known to have lived.",
        "A fin whale sings below the sea.",
    ] * 40
    words = tokenizer.train(text, 300)
    small = preset("tiny")
    for name, value in {
        "layers": 2,
        "vocab_size": words.vocab_size,
        "engram.rows_per_head": (50, 50),
    }.items():
        small = config.replace(small, name, value)
    folder = tmp_path_factory.mktemp("runs") / "engram"
    checkpoint.save_model(
        folder, LanguageModel(small, torch.as_tensor(words.canonical_map())), words
    )
    return folder
