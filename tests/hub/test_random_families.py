"""Tests a few random configurations of every family by the loop of benchmarks/families.py."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "families.py"


def load():
    """Loads the benchmark, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("families_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BENCH = load()


# Relatives of DeepSeek-V3, which differ from it by a line.
RELATIVES = {
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "axk1",
    "glm4_moe_lite",
    "kimi_k2",
    "mistral4",
    "youtu",
}
CASES = [
    pytest.param(name, seed, marks=[pytest.mark.slow] if seed else [])
    for name in BENCH.families()
    for seed in range(3 if name in RELATIVES else 10)
]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_a_random_configuration_is_its_oracle(name, seed):
    result = BENCH.compare(name, seed)
    assert not result.wrong
    assert {"logits", "loss", "grad", "greedy", "greedy, cached", "export"} <= result.errors.keys()


def test_a_configuration_that_differs_is_counted(capsys, monkeypatch):
    """The command prints what differs and exits with 1."""
    name = next(iter(BENCH.families()))
    results = BENCH.results
    wrong = BENCH.Result({"logits": 1.0}, ["WRONG 1.0e+00 logits"])
    monkeypatch.setattr(
        BENCH, "results", lambda name, seeds: results(name, seeds, lambda *_: wrong)
    )
    monkeypatch.setattr(sys, "argv", ["families.py", name, "--count", "2"])
    assert BENCH.main() == 1
    out = capsys.readouterr().out
    assert f"{name}: 0 of 2 agree" in out and "WRONG 1.0e+00 logits" in out
