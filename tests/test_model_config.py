"""Tests configs without torch, also under the names of their layers, and primes against a sieve."""

import importlib
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual import model_config
from rorqual.config import from_dict, to_dict
from rorqual.model_config import EngramConfig, GQAConfig, ModelConfig, head_primes, row_totals

LAYERS = {
    "model": ("ModelConfig",),
    "layers.rope": ("RopeConfig", "YarnConfig", "longest_context"),
    "layers.attention": ("MLAConfig", "GQAConfig"),
    "layers.nsa": ("NSAConfig",),
    "layers.moba": ("MoBAConfig",),
    "layers.dsa": ("DSAConfig",),
    "layers.router": ("RouterConfig",),
    "layers.balance": ("BalanceConfig",),
    "layers.moe": ("MoEConfig",),
    "layers.mtp": ("MTPConfig",),
    "layers.addresses": ("EngramConfig", "row_totals"),
    "layers.engram": ("EngramConfig", "row_totals"),
    "layers.hyper": ("HyperConfig",),
}
PRIMES = [n for n in range(2, 1500) if all(n % d for d in range(2, n))]


@pytest.mark.parametrize("module", LAYERS)
def test_a_layer_offers_its_config(module: str) -> None:
    layer = importlib.import_module(f"rorqual.{module}")
    for name in LAYERS[module]:
        assert getattr(layer, name) is getattr(model_config, name)


def test_neither_torch_nor_numpy_is_loaded() -> None:
    code = (
        "import sys; import rorqual.model_config, rorqual.presets, rorqual.costs;"
        "print(sorted({'torch', 'numpy', 'transformers', 'jaxtyping'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]"]


def test_a_config_survives_json_and_pickle() -> None:
    config = ModelConfig(
        mla=None, gqa=GQAConfig(window=7), engram=EngramConfig(rows_per_head=(50, 60, 70))
    )
    assert from_dict(ModelConfig, to_dict(config)) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.engram
@given(st.lists(st.integers(2, 900), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 3))
def test_primes_are_the_next_of_a_sieve_and_never_taken_twice(
    rows: list[int], heads: int, layers: int
) -> None:
    config = EngramConfig(layers=tuple(range(layers)), rows_per_head=tuple(rows), heads=heads)
    free = PRIMES
    for orders in head_primes(config):
        for least, primes in zip(rows, orders, strict=True):
            assert primes == [n for n in free if n >= least][:heads]
            free = [n for n in free if n not in primes]
    assert row_totals(config) == tuple(sum(map(sum, orders)) for orders in head_primes(config))
