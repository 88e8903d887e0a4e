"""Tests that presets are data: they validate, survive JSON, and a misspelt one is named."""

import runpy

import pytest

from rorqual import model_config, presets
from rorqual.config import from_dict, to_dict
from rorqual.layers.engram import EngramConfig, draw_multipliers, row_totals
from rorqual.model import ModelConfig
from rorqual.model_config import head_primes
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


def memory(name: str) -> EngramConfig:
    result = preset(name).engram
    assert result is not None
    return result


@pytest.mark.engram
@pytest.mark.parametrize(
    ("name", "totals"),
    [
        ("deepseek-v4.1-flash", (384_006_168, 384_016_682)),
        ("qwen3.8-flash-next", (320_001_536,)),
    ],
)
def test_rows_of_the_production_memories(name, totals):
    assert row_totals(memory(name)) == totals


@pytest.mark.engram
def test_the_memory_of_qwen_is_the_published_one():
    """Compares with what its checkpoint stores.

    It stores multipliers, rows (padded to a multiple of 128), and its config's end of text.
    """
    config = preset("qwen3.8-flash-next")
    shape = memory("qwen3.8-flash-next")
    (rows,) = row_totals(shape)
    assert rows == 320_001_536 and rows % shape.shards == 0
    assert sum(map(sum, head_primes(shape)[0])) == 320_001_446
    drawn = draw_multipliers(shape, config.vocab_size)
    assert drawn.tolist() == [[23703573157769, 20109073645365, 8052911324071]]
    assert (config.vocab_size, shape.missing_id) == (248_320, 248_044)
    assert shape.head_dim == 160 and len(shape.layers) == 1 and shape.rows_per_token == 16
    assert not shape.canonical and shape.end_of_document and shape.conv and not shape.bias
    assert (config.dim, config.streams, shape.halo, shape.eps, shape.conv_eps) == (
        2560,
        4,
        9,
        1e-6,
        1e-6,
    )


@pytest.mark.engram
@pytest.mark.parametrize(("name", "billions"), [("engram-27b", 5.79), ("engram-40b", 18.53)])
def test_parameters_of_the_papers_memories(name, billions):
    shape = memory(name)
    assert round(sum(row_totals(shape)) * shape.head_dim / 1e9, 2) == billions


@pytest.mark.engram
def test_the_demo_and_v41_are_what_their_authors_wrote():
    demo = memory("engram-demo")
    flash = memory("deepseek-v4.1-flash")
    assert (demo.rows_per_head, demo.heads, demo.memory_width, demo.layers) == (
        (646_400, 646_400),
        8,
        1024,
        (1, 15),
    )
    assert (
        demo.bias
        and demo.conv
        and demo.sign == "sign"
        and demo.halo == 9
        and not demo.end_of_document
    )
    assert preset("deepseek-v4.1-flash").streams == 4 and preset("deepseek-v4.1-flash").dim == 5120
    assert (flash.ngram, flash.memory_width, flash.halo, flash.sign) == (4, 6144, 0, "copysign")
    assert not flash.bias


def test_no_prime_is_searched_for_by_a_preset(monkeypatch):
    """A search near 16e6 belongs to the model that needs it, not to every import."""
    monkeypatch.setattr(
        model_config, "head_primes", lambda *rows: pytest.fail(f"looked for primes from {rows}")
    )
    assert runpy.run_path(presets.__file__)["PRESETS"] == PRESETS
