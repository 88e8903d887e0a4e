"""Compares gradients with an oracle's in float64, where rounding hides nothing.

In float32 the oracles' own gradients are off by up to 1e-4 of the largest value, where they are
small differences of large sums: those of the scales of mHC, of Engram's gate near a score of 0, of
Sinkhorn's logits.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rorqual.model import LanguageModel


class Doubles(TorchFunctionMode):
    """Computes in float64 what a model computes in float32 by its code."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Returns the gradients of all parameters; zeros where there are none."""
    model.zero_grad()
    loss().backward()
    every = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad()
    return every


def check_gradients(
    ours: LanguageModel,
    theirs: nn.Module,
    places: Mapping[str, Any],
    ids: Tensor,
    theirs_loss: Callable[[], Tensor],
    *,
    float32: float,
    padding_id: int | None = None,
    float64: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Holds every gradient to the oracle's to 1e-5 in float64, and in float32 as far as that goes.

    In float32 ours may be off by 1e-5, or by 10 times what the oracle's own are off, but by no more
    than `float32`. Both models
    have float64 parameters afterwards. `padding_id` has no gradient in the oracle's embedding;
    in `float64` it computes in that precision.
    """
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)

    def ours_loss() -> Tensor:
        return ours.loss(ids, labels).next_token

    single = gradients(ours, ours_loss)
    their_single = gradients(theirs, theirs_loss)
    ours.double()
    theirs.double()
    if hasattr(theirs, "set_experts_implementation"):
        theirs.set_experts_implementation("eager")
    with Doubles(), float64():
        exact = gradients(ours, ours_loss)
        expected = gradients(theirs, theirs_loss)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    off = {}
    their_off = {}
    for name, gradient in expected.items():
        rows = slice(None)
        if name.endswith("embed_tokens.weight") and padding_id is not None:
            rows = [row for row in range(len(gradient)) if row != padding_id]
        size = max(float(gradient.abs().max()), 1e-2 * largest)
        difference = (places[name].of(exact) - gradient)[rows]
        assert float(difference.abs().max()) <= 1e-5 * size, (name, difference.abs().max() / size)
        off[name] = float((places[name].of(single) - gradient)[rows].abs().max()) / size
        their_off[name] = float((their_single[name] - gradient)[rows].abs().max()) / size
    allowed = min(float32, max(1e-5, 10 * max(their_off.values())))
    assert max(off.values()) <= allowed, (max(off, key=off.get), off, their_off)
