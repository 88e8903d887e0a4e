"""Tests when compiled code is taken from numba's cache."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from rorqual.kernels import compiled


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("module_of_a_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_machine_code_is_cached_until_any_kernel_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "module_of_a_test.py"
    path.write_text("def twice(x):\n    return 2 * x\n")
    os.utime(path, (1580601600, 1580601600))  # as in every wheel

    def stats(stamp: str) -> Any:
        monkeypatch.setattr(compiled, "sources", lambda: stamp)
        function: Any = compiled.compiled(load(path).twice)
        assert function(21) == 42
        return function.stats

    assert stats("one").cache_misses
    assert stats("one").cache_hits
    assert stats("two").cache_misses
    assert stats("two").cache_hits
