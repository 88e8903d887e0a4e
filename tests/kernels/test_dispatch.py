"""Tests which kernel runs for which arguments, devices and value of RORQUAL_KERNELS."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rorqual import kernels
from rorqual.layers.addresses import hash_rows
from rorqual.layers.sparse import selected_attention

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Starts without RORQUAL_KERNELS, and forgets what a test registers."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels.registered()
    monkeypatch.setattr(kernels, "REGISTERED", dict(kernels.REGISTERED))
    monkeypatch.setattr(kernels, "is_installed", lambda package: True)
    kernels.parse_variable.cache_clear()
    yield
    kernels.parse_variable.cache_clear()


def double(x: Float[Tensor, "N"], y: Int[Tensor, "N"] | None, out: Tensor | None = None) -> str:
    """Says which implementation ran."""
    return "reference"


def registered(*kinds: str) -> kernels.Operation:
    operation = kernels.kernel(**dict.fromkeys(kinds, "nowhere:nothing"))(double)
    for kernel in operation.choice.kernels:
        kernel.function = lambda *args, kind=kernel.kind, **named: kind
    return operation


FLOATS = torch.zeros(2)
INTS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("text", "both", "triton"),
    [
        ("", "numba", "reference"),
        ("reference", "reference", "reference"),
        ("double=reference", "reference", "reference"),
        (" double = numba , hash_rows=reference", "numba", None),
        ("hash_rows=reference", "numba", "reference"),
    ],
)
def test_the_first_kernel_that_can_run_runs(
    text: str, both: str, triton: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = registered("triton", "numba")
    monkeypatch.setenv(kernels.VARIABLE, text)
    assert operation(FLOATS, INTS) == both
    assert operation(FLOATS, y=None) == both
    assert operation(y=INTS, x=FLOATS) == both
    top_k = operation.choose(CPU)
    assert ("reference" if top_k is None else top_k()) == both
    if triton is not None:
        assert registered("triton")(FLOATS, INTS) == triton


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("double", "expected 'reference' or name=kind"),
        ("doubles=numba", "did you mean 'double'"),
        ("row_adams=numba", "did you mean 'row_adam'"),
        ("double=numbas", "did you mean 'numba'"),
        ("double=triton", "which does not run here: it runs on cuda, not on cpu"),
    ],
)
def test_what_cannot_be_is_refused(text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = registered("triton", "numba")
    monkeypatch.setenv(kernels.VARIABLE, text)
    with pytest.raises(ValueError, match=reason):
        operation(FLOATS, INTS)
    with pytest.raises(ValueError, match=reason):
        operation.choose(CPU)


def test_a_name_of_a_module_that_is_not_imported_is_known() -> None:
    """row_adam is registered by train.optim, which no layer imports."""
    code = """
import sys, torch
from rorqual.layers.sparse import selected_attention
assert "rorqual.train.optim" not in sys.modules
assert selected_attention.choose(torch.zeros(1)) is not None
"""
    environment = {kernels.VARIABLE: "row_adam=reference"}
    run(code, environment)


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (FLOATS, INTS, ""),
        (INTS, None, ""),
        (FLOATS, INTS.to("meta"), "it runs on the cpu, not on meta"),
        (FLOATS.to("meta"), INTS, "it runs on the cpu, not on meta"),
        (FLOATS.bfloat16(), INTS, "it computes in float32, not in torch.bfloat16"),
        (FLOATS.double(), INTS, "it computes in float32, not in torch.float64"),
        (FLOATS.clone().requires_grad_(), INTS, "it has no backward"),
    ],
)
def test_numba_takes_float32_on_the_cpu_without_gradients(
    x: Tensor, y: Tensor | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = registered("numba")
    assert operation(x, y) == ("reference" if reason else "numba")
    with torch.no_grad():
        without = "reference" if reason and "backward" not in reason else "numba"
        assert operation(x, y) == without
    monkeypatch.setenv(kernels.VARIABLE, "double=numba")
    if reason:
        with pytest.raises(ValueError, match=f"{kernels.VARIABLE} asks for double=numba.*{reason}"):
            operation(x, y)
    else:
        assert operation(x, y) == "numba"


def test_triton_takes_a_gpu_and_interprets_only_where_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operation = registered("triton")
    choice = operation.choice
    assert choice.kind(CUDA) == "triton" and choice.kind(CPU) == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choice.kind(CPU) == "reference" and operation(FLOATS, INTS) == "reference"
    monkeypatch.setenv(kernels.VARIABLE, "hash_rows=reference, double = triton")
    assert choice.kind(CPU) == "triton" and operation(FLOATS, INTS) == "triton"
    with pytest.raises(ValueError, match="it computes in float32, not in float64"):
        operation(FLOATS.double(), INTS)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="does not run here: it runs on cuda, not on cpu"):
        operation(FLOATS, INTS)


def test_what_is_not_installed_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_installed", lambda package: False)
    operation = registered("numba", "triton")
    assert operation(FLOATS, INTS) == "reference"
    assert operation.choice.kind(CUDA) == "reference"
    monkeypatch.setenv(kernels.VARIABLE, "double=numba")
    with pytest.raises(ValueError, match="does not run here: numba is not installed"):
        operation(FLOATS, INTS)


def test_a_decorated_reference_is_still_a_function() -> None:
    assert hash_rows.__name__ == "hash_rows" and "Computes the rows" in (hash_rows.__doc__ or "")
    assert pickle.loads(pickle.dumps(hash_rows)) is hash_rows
    assert copy.deepcopy(hash_rows) is hash_rows
    with pytest.raises(TypeError, match="missing a required argument"):
        selected_attention(query=FLOATS)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.device | None], None]:
    """Makes torch report this accelerator, or none, whatever the machine has."""
    return lambda device: monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda **_: device
    )


def test_available_says_why_not(accelerator: Callable[[torch.device | None], None]) -> None:
    registered("numba", "triton")
    accelerator(None)
    here = kernels.available()
    assert here["double"] == {"numba": True, "triton": "it runs on cuda, not on cpu"}
    assert here["row_adam"] == {"numba": True} and here["decode_step"] == {"numba": True}
    accelerator(CUDA)
    assert kernels.available()["double"] == {"numba": True, "triton": True}
    assert kernels.available()["fuse"] == {"triton": True}


@pytest.mark.slow
def test_a_model_on_the_cpu_loads_no_triton_and_needs_no_numba() -> None:
    code = """
import sys, torch
if sys.argv[1:]:
    sys.modules["numba"] = None
from dataclasses import replace
from rorqual.model import LanguageModel
from rorqual.model_config import EngramConfig
from rorqual.presets import preset
config = replace(preset("tiny"), engram=EngramConfig(rows_per_head=(50, 50)))
model, ids = LanguageModel(config), torch.zeros(1, 4, dtype=torch.int64)
assert "rorqual.kernels.engram" not in sys.modules
model.loss(ids, ids).total.backward()
assert not any(name.startswith(("triton", "rorqual.kernels.triton_")) for name in sys.modules)
assert ("rorqual.kernels.engram" in sys.modules) == (not sys.argv[1:])
from rorqual.serve.step import STEP
assert (STEP.choose(torch.zeros(1)) is None) == bool(sys.argv[1:])
"""
    run(code)
    run(code, without_numba=True)


def run(
    code: str, environment: dict[str, str] | None = None, *, without_numba: bool = False
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *(["without numba"] if without_numba else [])],
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
