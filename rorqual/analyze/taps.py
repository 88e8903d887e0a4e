"""A model and names of its modules in -> what went through them while it ran, without touching it.

with Taps(model, "blocks.*.ffn") as taps:
    model(ids)
taps["blocks.0.ffn"]            the outputs, one a call
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn


class Taps:
    """Forward hooks on every module whose dotted name matches a pattern (`*` matches dots too), for a `with` block.

    `keep` turns an output into what is kept; as it is, copies of its tensors are, which stay as they are when a later
    module writes over the output. ValueError where nothing matches.
    """

    def __init__(
        self, model: nn.Module, *patterns: str, keep: Callable[[Any], Any] | None = None
    ) -> None:
        names = [name for name, _ in model.named_modules()]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = ", ".join(name for name in names[1:] if name.count(".") <= 1)[:300]
                raise ValueError(
                    f"taps: got {pattern!r}, which matches no module; expected one of {near}, ..."
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
    """The same structure with copies of its tensors, cut from the graph."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):  # an output of transformers is one, and wants its keys one by one
        found = copy.copy(value)
        for key, part in value.items():
            found[key] = detached(part)
        return found
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(detached(part) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(detached(part) for part in value)
    return value


@contextmanager
def quiet(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients for a `with` block; the mode that each module was in comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, training in modes:
            module.training = training
