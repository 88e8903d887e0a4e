"""Tests the parts of a model card: front matter that the hub reads, sizes, usage."""

from huggingface_hub import ModelCard

from rorqual.costs import costs
from rorqual.hub.card import description, front_matter, table, usage
from rorqual.presets import preset


def test_the_hub_reads_the_front_matter() -> None:
    scores = {"validation_loss": 4.51239, "bits_per_byte": 2.0, "other": 1.0}
    text = front_matter("whale", preset("tiny"), "WordNet 3.0", scores, license="mit")
    data = ModelCard(f"{text}\n# whale\n").data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "rorqual",
        "text-generation",
        "mit",
    )
    assert data.tags == ["rorqual", "mla", "moe", "hyper"]
    results = {one.metric_type: one for one in data.eval_results}
    assert set(results) == {"loss", "bits_per_byte"}
    assert results["loss"].metric_value == 4.5124
    assert results["loss"].metric_name == "nats a token"
    assert results["loss"].dataset_name == "WordNet 3.0, held out"


def test_a_card_without_scores_has_no_results() -> None:
    data = ModelCard(front_matter("whale", preset("tiny"))).data
    assert data.eval_results is None and data.license is None


def test_sizes_are_those_of_the_costs() -> None:
    config = preset("tiny-engram")
    text = description(config, 128)
    counted = costs(config, 128)
    assert f"| parameters | {counted.total:,} |" in text
    assert f"| FLOPs a token, forward, context 128 | {counted.flops_per_token:,} |" in text
    assert "| parts | mla, moe, engram, hyper |" in text


def test_usage_needs_no_code_of_the_folder() -> None:
    assert "import rorqual" in usage() and "trust_remote_code" not in usage()


def test_a_table_has_a_line_a_row() -> None:
    assert table({"a": "1", "b": "2"}).splitlines()[2:] == ["| a | 1 |", "| b | 2 |"]
