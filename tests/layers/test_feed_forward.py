"""Tests SwiGLU against its equation."""

import torch

from rorqual.layers.feed_forward import SwiGLU, gated


def test_swiglu_is_its_equation():
    layer = SwiGLU(6, 10)
    x = torch.randn(2, 3, 6)
    gate = x @ layer.gate_proj.weight.T
    up = x @ layer.up_proj.weight.T
    torch.testing.assert_close(layer(x), (gate * gate.sigmoid() * up) @ layer.down_proj.weight.T)


def test_both_factors_are_clipped_at_the_limit():
    gate = torch.tensor([-30.0, 1.0, 30.0, 30.0, 2.0])
    up = torch.tensor([1.0, 9.0, -9.0, 2.0, 3.0])
    clipped_gate = torch.tensor([-30.0, 1.0, 5.0, 5.0, 2.0])
    clipped_up = torch.tensor([1.0, 5.0, -5.0, 2.0, 3.0])
    expected = clipped_gate * clipped_gate.sigmoid() * clipped_up
    torch.testing.assert_close(gated(gate, up, 5.0), expected)
