"""Says where the tensors of a published folder are in our state dict."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Place(NamedTuple):
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


class Sizes(NamedTuple):
    """Patterns by which a folder's tensors tell how many layers and experts it has.

    They are compared with the config before a model, or the names of its tensors, are made: a wrong
    config.json must not allocate memory.
    """

    layer: str  # matches every tensor of a layer; group 1 is its number
    router: str  # the end of the name of a router's weight, [experts, dim]
    expert: str  # matches every tensor of an expert; group 1 is its number
