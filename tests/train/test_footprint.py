"""Tests footprint.py against real models, optimizers and saved tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from rorqual.costs import sizes
from rorqual.distributed_config import DistributedConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel
from rorqual.presets import preset
from rorqual.train.config import OptimConfig, TrainConfig
from rorqual.train.footprint import Footprint, footprint, meta_model
from rorqual.train.optim import Optimizer, roles

MEMORY = EngramConfig(layers=(0, 2), rows_per_head=(151, 157), heads=2, head_dim=8)
TINY = replace(preset("tiny"), engram=MEMORY)


def test_a_models_shapes_are_those_of_the_built_one():
    config = replace(TINY, mtp=MTPConfig())
    model = LanguageModel(config)
    result = footprint(TrainConfig(model=config, batch_size=4, seq_len=32))
    assert all(p.is_meta for p in meta_model(config).parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(
        tensors * torch.Size(shape).numel() for _, shape, tensors, _ in result.shapes
    )
    names = {name for name, *_ in result.shapes}
    assert {"embed.weight", "blocks.*.attention_norm.weight", "tables.*.weight"} <= names
    assert result.costs.total - result.costs.memory < sum(
        each.parameters for each in result.roles.values()
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_ranks_bytes_are_those_of_the_optimizer(kind):
    optim = OptimConfig(kind=kind)
    one, four = (
        footprint(TrainConfig(model=TINY, optim=optim, batch_size=8, seq_len=16), ranks)
        for ranks in (1, 4)
    )
    model = LanguageModel(TINY)
    state = Optimizer(model, optim).state_dict()
    assert sum(each.state for each in one.roles.values()) == sum(t.nbytes for t in state.values())
    assert one.roles.keys() == set(roles(model).values())
    for role, whole in one.roles.items():
        assert four.roles[role].weights == -(-whole.weights // 4)
    assert not one.wire and one.gathered == 0
    dense = sum(each.weights for role, each in one.roles.items() if role != "rows")
    # costs.py counts the routers' biases, too, which are no parameters.
    once = pytest.approx(dense * 3 / 4, rel=1e-3)
    assert four.wire["gradients, reduced"] == once
    outside = sizes(TINY).embedding + sizes(TINY).others
    assert four.wire["parameters, gathered"] == pytest.approx(
        2 * four.wire["gradients, reduced"] - 4 * outside * 3 / 4, abs=8
    )
    twice = TrainConfig(model=TINY, optim=optim, batch_size=8, seq_len=16, micro_batch_size=1)
    assert footprint(twice, 4).wire["gradients, reduced"] == 2 * four.wire["gradients, reduced"]


def test_a_rank_holds_what_its_layout_gives_it():
    def of(ranks: int = 4, **layout) -> Footprint:
        spread = DistributedConfig(**layout)
        return footprint(
            TrainConfig(model=TINY, batch_size=8, seq_len=16, distributed=spread), ranks
        )

    one = of(1)
    sharded = of()
    whole_rows = of(rows="replicate")
    assert whole_rows.roles["rows"] == one.roles["rows"]
    assert "rows' gradients, gathered" in whole_rows.wire
    assert "rows and their gradients" in sharded.wire
    copies = of(replicate=2)
    for role, each in copies.roles.items():
        shared = 4 if role == "rows" else 2
        assert each.weights == -(-one.roles[role].weights // shared)
    assert copies.wire["gradients of copies"] and "gradients of copies" not in sharded.wire
    experts = of(expert=4)
    assert experts.wire["tokens to experts and back"]
    assert experts.wire["parameters, gathered"] < sharded.wire["parameters, gathered"]
    assert experts.gathered < sharded.gathered
    assert of(activation_checkpointing="block").activations < sharded.activations / 2


def test_rows_elsewhere_take_no_memory_of_the_device():
    device, host, disk = (
        footprint(TrainConfig(model=TINY, batch_size=4, seq_len=16, placement=placement))
        for placement in ("device", "host", "disk")
    )
    rows = sum(device.roles["rows"][1:])
    assert (device.rows_elsewhere, host.rows_elsewhere, disk.rows_elsewhere) == (0, rows, rows)
    assert host.memory == disk.memory == device.memory - rows


def test_a_batch_that_cannot_be_split_is_refused():
    spread = DistributedConfig(context=2)
    with pytest.raises(ValueError, match=r"distributed.context: got 2, expected 1"):
        footprint(TrainConfig(model=replace(TINY, nsa=None), distributed=spread), 2)
    with pytest.raises(ValueError, match="batch_size: got 16, expected a multiple of the 3 ranks"):
        footprint(TrainConfig(model=TINY), 3)


@contextmanager
def saved_bytes(model: LanguageModel) -> Iterator[list[int]]:
    """Yields a list with the bytes of every tensor that autograd saves, but the parameters'."""
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: list[int] = []
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            # Another tensor would get the address of one that is gone.
            alive.append(storage)
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("name", ["tiny", "dense", pytest.param("small", marks=pytest.mark.slow)])
def test_activations_are_estimated_within_a_factor_of_two(name):
    config = preset("small" if name == "small" else "tiny")
    if name == "dense":
        config = replace(config, moe=None, engram=None, hyper=None)
    estimated = footprint(TrainConfig(model=config, batch_size=2, seq_len=64)).activations
    model = LanguageModel(config).train()
    ids = torch.randint(0, config.vocab_size, (2, 64))
    with saved_bytes(model) as sizes:
        model.loss(ids, ids.roll(-1, 1))
    assert 0.5 < estimated / sum(sizes) < 2
