"""Says where the tensors of a published folder are in our state dict."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class StateSlice(NamedTuple):
    """The place of one published tensor in our state dict: state[name][slices].

    Its last two axes are exchanged if `transposed`; with a `shape` it is seen in that one.
    """

    name: str
    slices: tuple[int | slice, ...] = ()
    transposed: bool = False
    shape: tuple[int, ...] | None = None

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """Returns the part of our state dict, a view, in the published shape."""
        tensor = state[self.name][self.slices] if self.slices else state[self.name]
        tensor = tensor.mT if self.transposed else tensor
        return tensor if self.shape is None else tensor.view(self.shape)


class Joined(NamedTuple):
    """The places of one published tensor that is several of ours, one after another by rows."""

    parts: tuple[StateSlice, ...]

    @property
    def name(self) -> str:
        """The name of the first of them in our state dict."""
        return self.parts[0].name

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """Returns the published tensor, a copy."""
        return torch.cat([each.of(state) for each in self.parts])


AnyPlace = StateSlice | Joined


def fill(tensor_place: AnyPlace, state: Mapping[str, Tensor], values: Tensor) -> None:
    """Copies a published tensor to its place, or to its places, in our state dict."""
    parts = tensor_place.parts if isinstance(tensor_place, Joined) else (tensor_place,)
    row = 0
    for each in parts:
        target = each.of(state)
        target.copy_(values[row : row + len(target)] if len(parts) > 1 else values)
        row += len(target)


class Sizes(NamedTuple):
    """Patterns of tensor names by which a folder's layers and experts are counted.

    They are compared with the config before a model, or the names of its tensors, are made: a wrong
    config.json must not allocate memory.
    """

    layer: str  # matches every tensor of a layer; group 1 is its number
    router: str  # the end of the name of a router's weight, [experts, dim]
    expert: str  # matches every tensor of an expert; group 1 is its number
    mtp_counts: bool = True  # whether `layer` matches MTP's blocks, too
