"""Tests norms against their equation."""

import pytest
import torch
import torch.nn.functional as F

from rorqual.layers.norm import CentredRMSNorm, RMSNorm


@pytest.mark.parametrize("shape", [(7,), (2, 1), (2, 3, 5)])
def test_rms_norm_is_its_equation(shape):
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(shape[-1], dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    norm = RMSNorm(shape[-1], 1e-3).double()
    norm.weight = torch.nn.Parameter(weight)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(norm(x), expected * weight, rtol=1e-12, atol=1e-12)


def test_rms_norm_works_in_float32_and_answers_in_its_dtype():
    norm = RMSNorm(512).bfloat16()
    x = (1e18 * torch.randn(3, 512)).bfloat16()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out, F.rms_norm(x.float(), (512,), None, 1e-6).bfloat16(), rtol=0, atol=0
    )


@pytest.mark.parametrize("group", [None, 3])
def test_centred_rms_norm_is_its_equation(group):
    norm = CentredRMSNorm(6, 1e-3, group).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    groups = x.unflatten(-1, (-1, group or 6))
    expected = groups / (groups.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected.flatten(-2) * (1 + norm.weight))
    norm.reset_parameters()
    torch.testing.assert_close(norm(x), expected.flatten(-2))
