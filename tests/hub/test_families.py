"""Tests which family reads a folder, and which one writes a model."""

import pytest

from rorqual.hub import deepseek, qwen4_exp
from rorqual.hub.families import FAMILIES, MODEL_TYPES, family_for, family_of
from rorqual.presets import preset


def test_every_type_belongs_to_one_family() -> None:
    assert len(set(MODEL_TYPES)) == len(MODEL_TYPES)
    for family in FAMILIES:
        for kind in family.MODEL_TYPES:
            assert family_of({"model_type": kind}) is family


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"got 'gpt2', expected deepseek_v2.* or \w+"):
        family_of({"model_type": "gpt2"})


@pytest.mark.parametrize(
    ("name", "family"),
    [("deepseek-v3", deepseek), ("deepseek-v2", deepseek), ("qwen4-tiny", qwen4_exp)],
)
def test_a_model_is_written_by_the_family_that_can_express_it(name, family) -> None:
    assert family_for(preset(name)) is family and not family.foreign(preset(name))
