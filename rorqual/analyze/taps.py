"""Records the outputs of a model's modules while it runs, without changing it.

with Taps(model, "blocks.*.ffn") as taps:
    model(ids)
taps["blocks.0.ffn"]            the outputs, one per call
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn


class Taps:
    """Puts forward hooks on every module whose dotted name matches a pattern, for a `with` block.

    `*` in a pattern matches dots too. `keep` turns an output into what is stored. By default its
    tensors are copied, so that they stay as they are when a later module writes over the output.
    ValueError where nothing matches.
    """

    def __init__(
        self, model: nn.Module, *patterns: str, keep: Callable[[Any], Any] | None = None
    ) -> None:
        names = [name for name, _ in model.named_modules()]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                similar = ", ".join(name for name in names[1:] if name.count(".") <= 1)[:300]
                raise ValueError(
                    f"taps: got {pattern!r}, which matches no module; "
                    f"expected one of {similar}, ..."
                )
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        self.keep = keep or detached
        self.seen: dict[str, list[Any]] = {name: [] for name in self.modules}
        self._handles: list[Any] = []

    def __enter__(self) -> "Taps":
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def __getitem__(self, name: str) -> list[Any]:
        return self.seen[name]

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            self.seen[name].append(self.keep(output))

        return hook


def detached(value: Any) -> Any:
    """Returns the same structure with copies of its tensors, detached from the graph."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    # An output of transformers is a dict, and its keys must be set one by one.
    if isinstance(value, dict):
        copied = copy.copy(value)
        for key, piece in value.items():
            copied[key] = detached(piece)
        return copied
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(detached(piece) for piece in value))
    if isinstance(value, (tuple, list)):
        return type(value)(detached(piece) for piece in value)
    return value


@contextmanager
def quiet(model: nn.Module) -> Iterator[nn.Module]:
    """Sets evaluation mode without gradients for a `with` block.

    Then it restores the mode of each module.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, training in modes:
            module.training = training
