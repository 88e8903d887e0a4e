"""Tests which family reads a folder, and which one writes a model."""

import pytest

from rorqual.hub import deepseek, deepseek_v4, deepseek_v41, qwen4_exp
from rorqual.hub.families import FAMILIES, MODEL_TYPES, Family, family_for, family_of
from rorqual.presets import preset


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
