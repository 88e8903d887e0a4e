"""Tests which family reads a folder, and which one writes a model."""

import copy
from dataclasses import dataclass, fields

import pytest

from rorqual.hub import deepseek, deepseek_moe, deepseek_v4, deepseek_v41, qwen4_exp
from rorqual.hub.families import FAMILIES, MODEL_TYPES, Family, family_for, family_of
from rorqual.model_config import (
    CSA2Config,
    CSAConfig,
    DeltaNetConfig,
    DSAConfig,
    EngramConfig,
    GQAConfig,
    HyperConfig,
    MLAConfig,
    MoBAConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    NSAConfig,
    QSAConfig,
)
from rorqual.presets import preset


@dataclass(frozen=True, kw_only=True, slots=True)
class Extended(ModelConfig):
    """A config with a kind of attention that does not exist."""

    retention: GQAConfig | None = None


PARTS = {
    "mla": MLAConfig(),
    "gqa": GQAConfig(),
    "nsa": NSAConfig(),
    "moba": MoBAConfig(),
    "dsa": DSAConfig(),
    "csa": CSAConfig(),
    "csa2": CSA2Config(ratios=(1,), kv_sources=(0,), index_sources=(0,)),
    "qsa": QSAConfig(),
    "delta": DeltaNetConfig(),
    "moe": MoEConfig(),
    "engram": EngramConfig(),
    "hyper": HyperConfig(),
    "mtp": MTPConfig(),
    "retention": GQAConfig(),
}
# A model that each family can express.
MODELS = {
    deepseek: "deepseek-v3",
    deepseek_moe: "deepseekmoe-16b",
    deepseek_v4: "deepseek-v4-flash",
    deepseek_v41: "deepseek-v4.1-flash",
    qwen4_exp: "qwen3.8-flash-next",
}


def with_part(config: ModelConfig, name: str) -> Extended:
    """Returns a config with one more part, which need not fit the others."""
    extended = Extended(**{each.name: getattr(config, each.name) for each in fields(config)})
    extended = copy.copy(extended)
    object.__setattr__(extended, name, PARTS[name])
    return extended


def test_these_are_all_parts() -> None:
    optional = {each.name for each in fields(Extended) if str(each.type).endswith("| None")}
    assert set(PARTS) == optional


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("family", MODELS, ids=lambda family: family.__name__.split(".")[-1])
def test_a_family_refuses_every_part_that_its_format_does_not_have(family, name) -> None:
    config = preset(MODELS[family])
    assert not family.foreign(config)
    assert set(config.parts) <= set(family.MODEL_PARTS)
    if name in family.MODEL_PARTS:
        return
    extended = with_part(config, name)
    assert name in extended.parts
    assert name in family.foreign(extended)
    with pytest.raises(ValueError, match=rf"cannot hold .*\b{name}\b"):
        family.published(extended)


def test_every_family_defines_everything():
    for family in FAMILIES:
        assert isinstance(family, Family)
    assert len(set(MODEL_TYPES)) == len(MODEL_TYPES)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_a_folder_is_read_by_its_family(kind):
    assert kind in family_of({"model_type": kind}).MODEL_TYPES


def test_other_folders_are_refused():
    with pytest.raises(ValueError, match="model_type: got 'llama', expected deepseek_v2, "):
        family_of({"model_type": "llama"})


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("deepseek-v3", deepseek),
        ("deepseek-v4-flash", deepseek_v4),
        ("deepseek-v4.1-flash", deepseek_v41),
        ("v4.1-tiny", deepseek_v41),
        ("qwen4-tiny", qwen4_exp),
        ("deepseek-v3.2", deepseek),
    ],
)
def test_a_model_is_written_by_the_family_that_can(name, family):
    assert family_for(preset(name)) is family
    assert not family.foreign(preset(name))
