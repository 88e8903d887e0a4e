"""Sparse language models: experts, conditional memory and sparse attention.

The public names are loaded on first use; `import rorqual` itself loads neither torch nor a module.
"""

import importlib
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
