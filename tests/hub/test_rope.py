"""Tests how rotary fields are read from a config.json and written back."""

import pytest

from rorqual.hub.rope import published_rope, rope_of
from rorqual.model_config import (
    DynamicRopeConfig,
    LinearRopeConfig,
    Llama3RopeConfig,
    LongRopeConfig,
    QueryScaleConfig,
    RopeConfig,
    YarnConfig,
)

LENGTHS = {"rope_theta": 10000.0, "max_position_embeddings": 160}
CONFIGS = [
    RopeConfig(base=500.0),
    RopeConfig(interleaved=False, yarn=YarnConfig(factor=3.0, original_length=32)),
    RopeConfig(linear=LinearRopeConfig(factor=2.5)),
    RopeConfig(dynamic=DynamicRopeConfig(factor=2.0, original_length=48)),
    RopeConfig(llama3=Llama3RopeConfig(factor=4.0, low_turns=0.5, original_length=64)),
    RopeConfig(longrope=LongRopeConfig(short=(1.0, 1.5), long=(2.0, 3.0), factor=2.0)),
    RopeConfig(longrope=LongRopeConfig(attention_factor=1.25)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_is_written_is_read_again(config):
    assert rope_of(published_rope(config), config.interleaved) == config


def test_longrope_without_a_factor_takes_the_ratio_of_its_lengths():
    fields = {"type": "longrope", "short_factor": [1, 1], "long_factor": [2, 2]}
    parameters = fields | {"original_max_position_embeddings": 40}
    longrope = rope_of(LENGTHS | {"rope_parameters": parameters}, True).longrope
    assert longrope.factor == 4.0 and longrope.long == (2.0, 2.0)
    # Beside the rope fields the original length has priority.
    other = LENGTHS | {"rope_parameters": parameters, "original_max_position_embeddings": 80}
    assert rope_of(other, True).longrope.factor == 2.0


def test_a_share_of_the_head_and_a_query_scale_are_read():
    fields = {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 40,
        "partial_rotary_factor": 0.25,
        "llama_4_scaling_beta": 0.3,
    }
    rope = rope_of(LENGTHS | {"rope_parameters": fields}, True, share=(4, 16))
    assert rope.query_scale == QueryScaleConfig(beta=0.3, original_length=40)
    with pytest.raises(ValueError, match=r"partial_rotary_factor: got 0.25, expected 0.5"):
        rope_of(LENGTHS | {"rope_parameters": fields}, True, share=(8, 16))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"type": "axial"}, "type: got 'axial', expected yarn, linear, dynamic, llama3, longrope"),
        ({"type": "linear"}, "factor: got None, expected a number"),
        ({"type": "linear", "factor": 2, "mscale_all_dim": 1}, "mscale_all_dim: got 1 with type"),
        ({"type": "longrope", "factor": 2}, "short_factor: got None, expected a list"),
        ({"type": "llama3", "factor": 2, "low_freq_factor": 1}, "high_freq_factor: got None"),
        ("linear", "got 'linear', expected fields"),
    ],
)
def test_what_is_lacking_or_unknown_is_named(fields, words):
    with pytest.raises(ValueError, match=words):
        rope_of(LENGTHS | {"rope_scaling": fields}, True)
