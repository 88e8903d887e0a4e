"""Presets are data: they validate, survive JSON, and a misspelt one is named."""

import pytest

from rorqual.config import from_dict, to_dict
from rorqual.model import ModelConfig
from rorqual.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    assert from_dict(ModelConfig, to_dict(preset(name))) == preset(name)


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'engram-27b'"):
        preset("engram27b")


def test_the_published_sizes():
    assert preset("engram-27b").moe.routed == 55 and preset("moe-27b").moe.routed == 72
    assert preset("engram-27b").engram.layers == (1, 14), "layers 2 and 15, counted from 1"
    assert preset("deepseek-v3").moe.router.scale == 2.5
