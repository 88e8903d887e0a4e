"""Lists the families of models whose folders are read and written: a module of this package each.

A family converts config.json to ModelConfig and back and says where each published tensor is in our
state dict. checkpoints.py does the rest for all of them.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol, cast, runtime_checkable

from rorqual.hub import deepseek, deepseek_moe, deepseek_v4, deepseek_v41, qwen4_exp
from rorqual.hub.places import AnyPlace, Sizes, StateSlice
from rorqual.model_config import ModelConfig


@runtime_checkable
class Family(Protocol):
    """The functions and constants that the module of a family of models defines."""

    MODEL_TYPES: tuple[str, ...]  # values of model_type in config.json
    MODEL_PARTS: tuple[str, ...]  # parts of a model that the format has, as ModelConfig names them
    EMBEDDING: str  # the published name of the embedding
    SIZES: Sizes
    PARTS: Mapping[str, str]  # beginnings of names that are skipped, and what has these tensors

    def config_of(self, description: Mapping[str, Any], names: Collection[str] = ()) -> ModelConfig:
        """Converts a published config.json; `names` are the folder's tensors.

        ValueError for what our model cannot express.
        """

    def published(self, config: ModelConfig, **fields: Any) -> dict[str, Any]:
        """Returns the config.json that the family's other readers know, with `fields` added."""

    def foreign(self, config: ModelConfig) -> list[str]:
        """Describes the parts of a model that the family's format cannot express."""

    def places(self, config: ModelConfig) -> Mapping[str, AnyPlace]:
        """Maps published names to places, for every tensor that a folder must have."""

    def copies(self, config: ModelConfig) -> dict[str, StateSlice]:
        """Maps published names to places, for tensors that a folder may repeat."""

    def aliases(self, config: ModelConfig) -> Mapping[str, AnyPlace]:
        """Maps the parameter names of the family's other readers to places, where no file has them.

        Golden folders name gradients so.
        """

    def hollow(self, config: ModelConfig) -> dict[str, StateSlice]:
        """Maps published names to empty tensors that other readers ask for.

        Their place is "", for which the state dict needs an entry.
        """

    def canonical(self, name: str) -> str:
        """Returns the published name of a tensor that another writer's folders call otherwise."""

    def skipped(self, name: str) -> bool:
        """Returns whether a tensor of a folder without a place is not read, as of vision towers."""


FAMILIES: tuple[Family, ...] = (
    cast(Family, deepseek),
    cast(Family, deepseek_moe),
    cast(Family, deepseek_v4),
    cast(Family, deepseek_v41),
    cast(Family, qwen4_exp),
)
MODEL_TYPES = tuple(name for family in FAMILIES for name in family.MODEL_TYPES)


def family_of(description: Mapping[str, Any]) -> Family:
    """Returns the family of a published config.json; ValueError if there is none."""
    kind = description.get("model_type")
    for family in FAMILIES:
        if kind in family.MODEL_TYPES:
            return family
    *others, last = MODEL_TYPES
    raise ValueError(f"model_type: got {kind!r}, expected {', '.join(others)} or {last}")


def family_for(config: ModelConfig) -> Family:
    """Returns the family that can express most of a model."""
    return min(FAMILIES, key=lambda family: len(family.foreign(config)))
