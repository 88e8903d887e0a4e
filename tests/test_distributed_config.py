"""Tests distributed_config.py: the sizes of a mesh, who reads what, and what is refused."""

from dataclasses import dataclass
from itertools import product

import pytest
from jaxtyping import TypeCheckError

from rorqual.distributed_config import DistributedConfig, refuse_layout
from rorqual.model_config import (
    DSAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from rorqual.train.config import TrainConfig


def test_by_default_all_ranks_share_parameters() -> None:
    assert TrainConfig().distributed == DistributedConfig()
    sizes = {"replicate": 1, "shard": 6, "context": 1, "expert": 1}
    assert DistributedConfig().sizes(6) == sizes
    assert DistributedConfig().data_rank(4, 6) == (4, 6)


def test_shard_takes_what_is_left() -> None:
    layout = DistributedConfig(replicate=2, context=3, expert=4)
    assert layout.sizes(48) == {"replicate": 2, "shard": 2, "context": 3, "expert": 4}
    assert DistributedConfig(shard=2, expert=4).sizes(8)["shard"] == 2


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (DistributedConfig(expert=4), "got 6 ranks .*1 x shard x 1 x 4, expected a multiple of 4"),
        (DistributedConfig(shard=4), "got 6 ranks .*1 x 4 x 1 x 1, expected 4 ranks"),
        (DistributedConfig(replicate=12), "expected a multiple of 12"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(layout: DistributedConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layout.sizes(6)


def test_ranks_that_share_sequences_read_the_same_part_of_a_batch() -> None:
    layout = DistributedConfig(replicate=2, shard=3, context=2, expert=4)
    axes = product(range(2), range(3), range(2), range(4))
    for rank, (replica, shard, _, expert) in enumerate(axes):
        assert layout.data_rank(rank, 48) == ((replica * 3 + shard) * 4 + expert, 24)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"expert": 0}, "distributed.expert: got 0, expected at least 1"),
        ({"shard": -1}, "distributed.shard"),
        ({"activation_checkpointing": "all"}, "'all'"),
        ({"compile": "model"}, "'model'"),
        ({"compile": "block", "expert": 2}, "distributed.expert: got 2 with .*compile block"),
        ({"compile": "block", "context": 2}, "distributed.context: got 2 with"),
        ({"compile": "block", "activation_checkpointing": "selective"}, "no single products"),
    ],
)
def test_impossible_values_are_refused(change: dict, words: str) -> None:
    with pytest.raises((ValueError, TypeCheckError), match=words):
        DistributedConfig(**change)


MLA = MLAConfig(heads=2)


@pytest.mark.parametrize(
    ("model", "layout", "words"),
    [
        (ModelConfig(moe=None), {"expert": 2}, "got 2 for a model without experts"),
        (ModelConfig(moe=MoEConfig(routed=5)), {"expert": 2}, "expected a divisor of 5 experts"),
        (ModelConfig(mla=MLA, gqa=None, dsa=DSAConfig()), {"context": 2}, "a model with dsa"),
        (
            ModelConfig(rope=RopeConfig(longrope=None), layers=2),
            {"context": 3},
            "got 2 ranks",
        ),
    ],
)
def test_layouts_that_a_model_cannot_have_are_refused(
    model: ModelConfig, layout: dict, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        refuse_layout(model, DistributedConfig(**layout), 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Extended(ModelConfig):
    """A config with a kind of attention that does not exist."""

    retention: MLAConfig | None = None


def test_context_parallelism_refuses_a_part_that_it_does_not_know() -> None:
    layout = DistributedConfig(context=2)
    refuse_layout(Extended(), layout, 2)
    with pytest.raises(ValueError, match=r"distributed\.context: got 2 for a model with retention"):
        refuse_layout(Extended(retention=MLA), layout, 2)
