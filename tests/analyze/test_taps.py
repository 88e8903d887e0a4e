"""Taps see what goes through and leave no trace."""

import pytest
import torch
from torch import nn

from rorqual.analyze.taps import Taps, quiet


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_taps_see_outputs_and_are_gone_afterwards():
    model, x = _model(), torch.randn(5, 4)
    with Taps(model, "0", "2") as taps:
        y = model(x)
        model(x)
    assert len(taps["0"]) == 2 and torch.equal(taps["2"][0], y) and not taps["0"][0].requires_grad
    model(x)
    assert len(taps["0"]) == 2
    assert not any(module._forward_hooks for module in model.modules())


def test_taps_are_gone_after_an_error():
    model = _model()
    with pytest.raises(RuntimeError), Taps(model, "*"):
        model(torch.randn(5, 3))
    assert not any(module._forward_hooks for module in model.modules())


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="got 'blocks', which matches no module; expected one of 0, 1, 2"):
        Taps(_model(), "blocks")


def test_quiet_gives_the_mode_back():
    model = _model().train()
    with quiet(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and torch.is_grad_enabled()
