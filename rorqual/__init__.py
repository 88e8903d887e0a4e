"""Sparse language models: experts, conditional memory and sparse attention.

The public names are loaded on first use; `import rorqual` itself loads neither torch nor a module.
It registers our models with transformers' Auto classes: now, if they are loaded already, or else
when they are.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rorqual import costs as costs
    from rorqual import presets as presets
    from rorqual.config import from_dict as from_dict
    from rorqual.config import replace as replace
    from rorqual.config import to_dict as to_dict
    from rorqual.data.corpus import open_corpus as open_corpus
    from rorqual.data.tokenizer import Tokenizer as Tokenizer
    from rorqual.hub.attach import attach as attach
    from rorqual.model import LanguageModel as LanguageModel
    from rorqual.model_config import ModelConfig as ModelConfig
    from rorqual.presets import preset as preset
    from rorqual.serve.generate import Run as Run
    from rorqual.serve.generate import load as load
    from rorqual.train.config import TrainConfig as TrainConfig

# A module's own name stays the module, since importing a module sets it as an attribute of this
# package: rq.costs.costs(config), rq.presets.PRESETS.
_MODULES = {
    "costs": "rorqual.costs:",
    "presets": "rorqual.presets:",
    "from_dict": "rorqual.config:from_dict",
    "replace": "rorqual.config:replace",
    "to_dict": "rorqual.config:to_dict",
    "open_corpus": "rorqual.data.corpus:open_corpus",
    "Tokenizer": "rorqual.data.tokenizer:Tokenizer",
    "attach": "rorqual.hub.attach:attach",
    "LanguageModel": "rorqual.model:LanguageModel",
    "ModelConfig": "rorqual.model_config:ModelConfig",
    "preset": "rorqual.presets:preset",
    "Run": "rorqual.serve.generate:Run",
    "load": "rorqual.serve.generate:load",
    "TrainConfig": "rorqual.train.config:TrainConfig",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rorqual' has no attribute {name!r}")
    # A program that loads our models may use transformers' Auto classes afterwards.
    if name == "load":
        importlib.import_module("rorqual.hub.auto")
    module, _, attribute = _MODULES[name].partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    return sorted(__all__)


_AUTO = "transformers.models.auto"  # the package of the Auto classes


def _register() -> None:
    """Registers our models with transformers' Auto classes.

    transformers works without us, so whatever goes wrong is a warning.
    """
    try:
        importlib.import_module("rorqual.hub.auto")
    except Exception as error:
        message = f"rorqual's models are not registered: {error}; import rorqual.hub.auto registers"
        warnings.warn(f"{message} them once that is mended", stacklevel=2)


class _Registration(importlib.abc.MetaPathFinder):
    """Registers our models when a program asks transformers for its first Auto class.

    So a program that imports rorqual can open a folder with `AutoModelForCausalLM` without code in
    the folder, and `import transformers` alone takes no longer than it did.
    """

    def __init__(self) -> None:
        self._depth = 0

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Finds transformers' modules with a loader that registers our models with Auto classes.

        It does so behind the outermost import that loads these classes: within one, what our models
        import may be half loaded. It leaves sys.meta_path then.
        """
        if fullname.partition(".")[0] != "transformers":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: Any) -> None:
            self._depth += 1
            try:
                load(module)
            finally:
                self._depth -= 1
            if _AUTO in sys.modules and not self._depth and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if _AUTO in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Registration())
