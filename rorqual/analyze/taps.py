"""Records the outputs of a model's modules while it runs, without changing it.

with Taps(model, "blocks.*.ffn", "blocks.*.mlp.hook_expert_weights") as taps:
    model(ids)
taps["blocks.0.ffn"]                             the outputs of a module, one per call
taps["blocks.0.mlp.hook_expert_weights"][0]      [tokens, experts]: a name of hooks.py
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.analyze.hooks import HookPoint, hook_points


class Taps:
    """Puts forward hooks on every module whose dotted name matches a pattern, for a `with` block.

    `*` in a pattern matches dots too. A pattern whose last part has hook_ in it is for the names
    of hooks.py, which are those of TransformerLens. `keep` turns an output into what is stored. By
    default its tensors are copied, so that they stay as they are when a later module writes over
    the output. ValueError where nothing matches.
    """

    def __init__(
        self, model: nn.Module, *patterns: str, keep: Callable[[Any], Any] | None = None
    ) -> None:
        modules = dict(model.named_modules())
        points = hook_points(model) if any(map(_is_hook, patterns)) else {}
        self.points: dict[str, HookPoint] = {}
        for pattern in patterns:
            every = points if _is_hook(pattern) else {name: _whole(name) for name in modules}
            matching = {name: every[name] for name in every if fnmatchcase(name, pattern)}
            if not matching:
                raise ValueError(_no_match(pattern, list(modules), list(points)))
            self.points |= matching
        self.modules = {name: modules[point.module] for name, point in self.points.items()}
        self.keep = keep or detached
        self.seen: dict[str, list[Any]] = {name: [] for name in self.points}
        self._handles: list[Any] = []

    def __enter__(self) -> "Taps":
        for name, point in self.points.items():
            module = self.modules[name]
            hook = self._hook(name, point)
            self._handles.append(
                module.register_forward_pre_hook(hook)
                if point.before
                else module.register_forward_hook(hook)
            )
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def __getitem__(self, name: str) -> list[Any]:
        return self.seen[name]

    def _hook(self, name: str, point: HookPoint) -> Callable[..., None]:
        """Returns a hook that appends the point's value to `seen` at every call."""

        def hook(module: nn.Module, inputs: tuple, output: Any = None) -> None:
            self.seen[name].append(self.keep(point.read(module, inputs, output)))

        return hook


def run_with_cache(model: nn.Module, ids: Tensor, *patterns: str) -> tuple[Tensor, dict[str, Any]]:
    """Returns the logits of token ids, and by name what `Taps` records of them.

    Without patterns that is every point of hooks.py outside of single experts. The model is in
    evaluation mode meanwhile, and computes no gradients.
    """
    names = patterns or tuple(name for name in hook_points(model) if ".experts." not in name)
    with quiet(model), Taps(model, *names) as taps:
        logits = model(ids)
    return logits, {name: values[0] for name, values in taps.seen.items() if values}


def _is_hook(pattern: str) -> bool:
    """Returns whether a pattern is for the names of hooks.py and not for modules."""
    return "hook_" in pattern.rpartition(".")[2]


def _whole(name: str) -> HookPoint:
    """Returns the point that is the whole output of a module."""
    return HookPoint(name, lambda module, inputs, output: output)


def _no_match(pattern: str, modules: list[str], points: list[str]) -> str:
    """Returns the message for a pattern that matches nothing."""
    if not _is_hook(pattern):
        similar = ", ".join(name for name in modules[1:] if name.count(".") <= 1)[:300]
        return f"taps: got {pattern!r}, which matches no module; expected one of {similar}, ..."
    if not points:
        return f"taps: got {pattern!r}, expected a model of rorqual, whose hooks have names"
    similar = ", ".join(get_close_matches(pattern, points, 5, 0.4) or points[:5])
    return f"taps: got {pattern!r}, which matches no hook; expected one such as {similar}"


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
