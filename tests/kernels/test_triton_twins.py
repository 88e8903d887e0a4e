"""Devices, an environment and a machine without Triton in -> whether a Triton twin is taken; what loads it."""

import subprocess
import sys

import pytest
import torch

from rorqual import kernels
from rorqual.kernels import triton_twins

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def reference() -> None:
    """What a twin would take the place of."""


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_twins, "_installed", lambda: True)


@pytest.mark.parametrize("name", ["engram_rows", "engram_fuse", "fp8_rows"])
def test_taken_on_cuda_and_interpreted_only_where_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = {"engram_rows": "hash_rows", "engram_fuse": "fuse", "fp8_rows": "recall"}[name]
    ours = getattr(triton_twins, twin)
    assert kernels.pick(name, reference, CUDA) is ours
    assert kernels.pick(name, reference, CPU) is not ours
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.pick(name, reference, CPU) is not ours
    monkeypatch.setenv(kernels.VARIABLE, f"best_experts=reference, {name} = triton")
    assert kernels.pick(name, reference, CPU) is ours
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="does not run here: it runs on cuda, not on cpu"):
        kernels.pick(name, reference, CPU)
    monkeypatch.setattr(triton_twins, "_installed", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        kernels.pick(name, reference, CUDA)


def test_a_model_that_runs_on_the_cpu_does_not_load_triton() -> None:
    code = """
import sys, torch
from rorqual.model import LanguageModel
from rorqual.presets import preset
model = LanguageModel(preset("tiny"))
model.loss(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).total.backward()
assert not any(name == "triton" or name.startswith("rorqual.kernels.triton_fuse") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
