"""Converts batches that are padded anywhere, as transformers' are, to rorqual's and back.

Inside rorqual a sequence begins at column 0 and padding follows it. A batch of transformers has an
attention mask, usually with padding in front; its caches count columns, padding included.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


class Packing(NamedTuple):
    """Moves the valid tokens of each sequence to its front, and results back to where they were."""

    valid: Bool[Tensor, "B T"]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens in each sequence."""
        return self.valid.sum(1).tolist()

    def pack(self, x: Shaped[Tensor, "B T ..."]) -> Shaped[Tensor, "B T ..."]:
        """Returns x with the valid tokens of each sequence first, in their order."""
        order = (~self.valid).long().argsort(dim=1, stable=True)
        return x[torch.arange(len(x), device=x.device)[:, None], order]

    def unpack(self, x: Shaped[Tensor, "B T ..."]) -> Shaped[Tensor, "B T ..."]:
        """Undoes `pack`; padding becomes 0."""
        places = (self.valid.cumsum(1) - 1).clamp_min(0)
        result = x[torch.arange(len(x), device=x.device)[:, None], places]
        return result.masked_fill(~self.valid.view(*self.valid.shape, *[1] * (x.dim() - 2)), 0)


def packing(valid: Bool[Tensor, "B T"] | None) -> Packing | None:
    """Returns the packing of a batch; None where nothing is padded."""
    return None if valid is None or bool(valid.all()) else Packing(valid)


class Columns:
    """Counts the columns that a cache of transformers holds, and the tokens among them."""

    def __init__(self) -> None:
        self.count = 0
        # Whether each column up to the last padding is a token; those after it all are.
        self._valid: Tensor | None = None

    def append(self, batch: int, time: int, packing: Packing | None) -> None:
        """Counts `time` columns of one call, and which of them are padding."""
        if packing is not None:
            before = self._valid_columns(batch, packing.valid.device)
            self._valid = torch.cat([before, packing.valid], dim=1)
        self.count += time

    def tokens(self, count: int, batch: int) -> list[int]:
        """Returns how many tokens of each sequence the last `count` columns hold."""
        remaining = self.count - count
        if self._valid is None or self._valid.shape[1] <= remaining:
            return [count] * batch
        return (count - (~self._valid[:, remaining:]).sum(1)).tolist()

    def crop(self, count: int) -> None:
        """Removes the last `count` columns."""
        self.count -= count
        if self._valid is not None:
            self._valid = self._valid[:, : self.count]

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keeps the sequences `index`, in that order."""
        if self._valid is not None:
            self._valid = self._valid[index]

    def reset(self) -> None:
        """Removes all columns."""
        self.count = 0
        self._valid = None

    def _valid_columns(self, batch: int, device: torch.device) -> Bool[Tensor, "B L"]:
        """Returns which of the columns so far are tokens and not padding."""
        valid = torch.ones(batch, self.count, dtype=torch.bool, device=device)
        if self._valid is not None:
            valid[:, : self._valid.shape[1]] = self._valid
        return valid
