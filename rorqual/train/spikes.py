"""Finds steps whose loss or gradient norm jumps out of those of the steps before it.

    spike    value - mean > factor * std     of the loss, or of the norm of all gradients

Mean and standard deviation are those of the SPIKE_WINDOW steps before; none is found before half of
them. It is the rule of OLMo-core's SkipStepOptimizer, on numbers of all ranks, so that every rank
decides alike. A spike enters the window, too: a loss that stays high is soon no spike any more.
"""

from collections import deque
from typing import Any

import numpy as np

from rorqual.train.config import SPIKE_WINDOW


class SpikeDetector:
    """Compares each step with the steps before it."""

    def __init__(self, factor: float, window: int = SPIKE_WINDOW) -> None:
        self.factor = factor
        self.least = max(2, window // 2)
        self.losses: deque[float] = deque(maxlen=window)
        self.grad_norms: deque[float] = deque(maxlen=window)

    def find(self, loss: float, grad_norm: float) -> str | None:
        """Returns what has a spike in this step, "loss" or "gradient norm"; None for neither."""
        spike = None
        if len(self.losses) + 1 >= self.least:
            if self._jumps(grad_norm, self.grad_norms):
                spike = "gradient norm"
            if self._jumps(loss, self.losses):
                spike = "loss"
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        return spike

    def _jumps(self, value: float, before: deque[float]) -> bool:
        """Returns whether a value is more than `factor` standard deviations above the mean."""
        return bool(value - np.mean(before) > self.factor * np.std(before, ddof=1))

    def state_dict(self) -> dict[str, Any]:
        """Returns the window as JSON values, which lose no bit."""
        return {"losses": list(self.losses), "grad_norms": list(self.grad_norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the window by a saved one."""
        for values, saved in (
            (self.losses, state["losses"]),
            (self.grad_norms, state["grad_norms"]),
        ):
            values.clear()
            values.extend(saved)
