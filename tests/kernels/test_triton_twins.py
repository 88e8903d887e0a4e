"""Tests when a Triton kernel is chosen, and that Triton is imported only then."""

import subprocess
import sys

import pytest
import torch

from rorqual import kernels
from rorqual.kernels import triton_twins

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def reference() -> None:
    """The reference that a kernel would replace."""


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_twins, "_installed", lambda: True)


TWINS = {
    "engram_rows": triton_twins.hash_rows,
    "engram_fuse": triton_twins.fuse,
    "fp8_rows": triton_twins.recall,
    "hyper_collapse": triton_twins.collapse,
    "hyper_write": triton_twins.write,
    "selected_attention": triton_twins.selected_attention,
}


@pytest.mark.parametrize("name", TWINS)
def test_taken_on_cuda_and_interpreted_only_where_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = TWINS[name]
    assert kernels.pick(name, reference, CUDA) is ours
    assert kernels.pick(name, reference, CPU) is not ours
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.pick(name, reference, CPU) is not ours
    monkeypatch.setenv(kernels.VARIABLE, f"row_adam=reference, {name} = triton")
    assert kernels.pick(name, reference, CPU) is ours
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="does not run here: it runs on cuda, not on cpu"):
        kernels.pick(name, reference, CPU)
    monkeypatch.setattr(triton_twins, "_installed", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        kernels.pick(name, reference, CUDA)


@pytest.mark.parametrize("name", ["hyper_collapse", "hyper_write", "selected_attention"])
def test_not_taken_in_float64(name: str) -> None:
    where = torch.empty(1, dtype=torch.float64, device="meta")
    assert TWINS[name] is not kernels.pick(name, reference, where)
    assert triton_twins.usable(name)(where) == "it computes in float32, not in float64"


def test_a_model_that_runs_on_the_cpu_does_not_load_triton() -> None:
    code = """
import sys, torch
from rorqual.model import LanguageModel
from rorqual.presets import preset
model = LanguageModel(preset("tiny"))
model.loss(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))\
.total.backward()
assert not any(name == "triton" or name.startswith("rorqual.kernels.triton_fuse") \
for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
