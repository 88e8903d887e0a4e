"""Tests the fields that several families read, and the blocks of MTP of a config.json alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rorqual.cli.main import main
from rorqual.costs import costs
from rorqual.hub import checkpoints
from rorqual.hub.families import family_for
from rorqual.hub.fields import flag, mtp_layers, number, quantisation, scale_block, whole
from rorqual.model import LanguageModel
from rorqual.model_config import MTPConfig
from rorqual.presets import preset


def test_numbers_are_named_where_they_are_none() -> None:
    assert (number({"a": 2}, "a"), whole({"a": 2.0}, "a")) == (2.0, 2)
    for read, value, words in (
        (number, True, r"config.json: rope\.a: got True, expected a number"),
        (number, None, r"config.json: rope\.a: got None, expected a number"),
        (whole, 2.5, r"config.json: rope\.a: got 2.5, expected a whole number"),
        (whole, "2", r"config.json: rope\.a: got '2', expected a whole number"),
        (whole, float("nan"), r"config.json: rope\.a: got nan, expected a whole number"),
        (number, float("inf"), r"config.json: rope\.a: got inf, expected a number"),
        (flag, "false", r"config.json: rope\.a: got 'false', expected true or false"),
        (flag, [], r"config.json: rope\.a: got \[\], expected true or false"),
    ):
        with pytest.raises(ValueError, match=words):
            read({"a": value}, "a", "rope.")


@pytest.mark.parametrize(
    ("value", "read"), [(True, True), (False, False), (None, False), (1, True), (0, False)]
)
def test_a_flag_is_read_as_other_libraries_do(value: object, read: bool) -> None:
    assert flag({"a": value}, "a") is read


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("deepseek-v3.2", "layer_types"),
        ("deepseek-v3.2", "mlp_layer_types"),
        ("deepseek-v4-flash", "layer_types"),
        ("deepseek-v4-flash", "mlp_layer_types"),
        ("qwen3.8-flash-next", "layer_types"),
    ],
)
@pytest.mark.parametrize("value", [0, True, 1.5, [[]], [{}], ["dense", None]])
def test_a_list_of_anything_else_is_refused_by_name(name: str, key: str, value: object) -> None:
    family = family_for(preset(name))
    described = family.published(preset(name))
    described.get("text_config", described)[key] = value
    with pytest.raises(ValueError, match=f"config.json: {key}: got "):
        family.config_of(described)


def test_float8_is_the_only_quantisation() -> None:
    for nothing in ({}, {"quantization_config": None}, {"quantization_config": {}}):
        assert not quantisation(nothing) and scale_block(nothing) == (128, 128)
    described = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 64]}}
    assert quantisation(described)["quant_method"] == "fp8" and scale_block(described) == (32, 64)
    assert scale_block({"quantization_config": {"weight_block_size": None}}) is None
    for value, words in (
        ("fp8", "quantization_config: got 'fp8', expected its fields"),
        ({"quant_method": "awq"}, "quant_method: got 'awq', expected 'fp8'"),
        ({"weight_block_size": [128]}, r"weight_block_size: got \[128\]"),
        ({"weight_block_size": [128, 0]}, r"weight_block_size: got \[128, 0\]"),
    ):
        with pytest.raises(ValueError, match=words):
            scale_block({"quantization_config": value})


def test_blocks_of_mtp_have_several_names() -> None:
    assert mtp_layers({}) == mtp_layers({"num_nextn_predict_layers": None}) == 0
    assert mtp_layers({"num_nextn_predict_layers": 0, "num_mtp_layers": 2}) == 0
    assert mtp_layers({"mtp_num_hidden_layers": 3}) == 3
    with pytest.raises(ValueError, match="num_mtp_layers: got 'one'"):
        mtp_layers({"num_mtp_layers": "one"})


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash", "deepseek-v4-pro"]
)
def test_a_config_without_weights_counts_its_mtp(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = preset(name)
    streams = model.hyper is not None
    model = replace(model, mtp=MTPConfig(streams=streams))
    description = family_for(model).published(model)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(description), encoding="utf-8")
    assert checkpoints.read_config(tmp_path).mtp == checkpoints.read_config(path).mtp == model.mtp
    assert main(["params", str(path), "--json"]) == 0
    (counted,) = json.loads(capsys.readouterr().out).values()
    expected = costs(model)
    assert (counted["total"], counted["mtp"]) == (expected.total, expected.mtp)
    path.write_text(json.dumps(description | {"num_nextn_predict_layers": 0}), encoding="utf-8")
    assert checkpoints.read_config(tmp_path).mtp is None


@pytest.mark.parametrize("name", ["deepseek-v4.1-flash", "qwen3.8-flash-next"])
def test_draft_layers_that_are_not_loaded_are_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = preset(name)
    fields = {} if model.engram is None else {"canonical_ids": 99_092}
    description = family_for(model).published(model, **fields)
    text = description.get("text_config", description)
    text |= {"num_nextn_predict_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(description), encoding="utf-8")
    assert checkpoints.read_config(tmp_path).mtp is None
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("config.json: 3 layers of multi-token prediction are not counted")


def test_weights_decide_and_not_the_config(tmp_path: Path) -> None:
    """A folder may speak of MTP and leave out its weights; its config.json alone has it."""
    model = LanguageModel(replace(preset("v4-tiny"), mtp=None), seed=0)
    checkpoints.export(model, tmp_path, num_nextn_predict_layers=1)
    assert checkpoints.load(tmp_path).config.mtp is None
    assert checkpoints.read_config(tmp_path).mtp is None
    alone = checkpoints.read_config(tmp_path / "config.json")
    assert alone.mtp == MTPConfig(streams=True)
