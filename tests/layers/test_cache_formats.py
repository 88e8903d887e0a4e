"""Tests the rounding of cached values, against its definition and the reference."""

import pytest
import torch

from rorqual.layers.cache_formats import BLOCKS, LEVELS, rounded

KINDS = ["fp8", "mxfp4", "nvfp4"]


def values(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(
        -20, 20, (*shape[:-1], 1), generator=generator
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_reference_bit_for_bit(kind, dtype):
    quantization = pytest.importorskip(
        "nemo_automodel.components.models.deepseek_v41.quantization",
        reason="nemo-automodel is not installed: make venv installs it",
    )
    for width in (64, 40, 8):
        x = values(50, 3, width).to(dtype)
        x[0] = 0
        expected = quantization.quantize_cache(x, format=kind, block_size=BLOCKS[kind])
        assert torch.equal(rounded(x, kind), expected)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_rounding_again_changes_nothing(kind):
    once = rounded(values(40, 64), kind)
    assert torch.equal(rounded(once, kind), once)


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_numbers_of_e2m1_stay(kind):
    x = torch.tensor([*LEVELS, *(-level for level in LEVELS)]).repeat(2)
    assert torch.equal(rounded(x, kind), x)


def test_ties_go_to_the_even_code():
    x = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] * 4)
    expected = torch.tensor([6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0] * 4)
    assert torch.equal(rounded(x, "mxfp4"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_passes_unchanged(kind):
    x = values(4, 40).requires_grad_()
    weight = torch.randn(4, 40)
    (rounded(x, kind) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
