"""Tests whole_matrices.py: ranks share the work on whole matrices, each of which is done once.

Run as a script, this file is four ranks.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from rorqual import distributed
from rorqual.train import optim
from rorqual.train.config import OptimConfig
from rorqual.train.whole_matrices import has_sharded_rows, map_whole

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import fork_ranks, run_script

# Some ranks have fewer rows than others, or none.
SHAPES = ((8, 8), (7, 3), (1, 5), (2, 9), (12, 4), (5, 5))


def matrices() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def check(replicas: int, count: int) -> None:
    """Every rank gets its rows of the results, and all ranks together work on each matrix once."""
    mesh = init_device_mesh("cpu", (replicas, 4 // replicas), mesh_dim_names=("replicate", "rank"))
    placements = [Replicate(), Shard(0)]
    if replicas == 1:
        mesh = mesh["rank"]
        placements = placements[1:]
    seen = []

    def work(matrix: Tensor) -> Tensor:
        seen.append(tuple(matrix.shape))
        return matrix @ matrix.mT @ matrix

    whole = matrices()[:count]
    sharded = [distribute_tensor(matrix, mesh, placements) for matrix in whole]
    assert all(map(has_sharded_rows, sharded))
    results = map_whole(sharded, work)
    for rows, matrix in zip(results, whole, strict=True):
        expected = distribute_tensor(matrix @ matrix.mT @ matrix, mesh, placements).to_local()
        assert torch.equal(rows, expected)
    counts = torch.tensor([seen.count(shape) for shape in SHAPES])
    assert distributed.total(counts).tolist() == [1] * count + [0] * (len(SHAPES) - count)


def check_others() -> None:
    """Columns, and stacks, are not matrices whose rows are sharded."""
    mesh = init_device_mesh("cpu", (4,))
    for tensor, placement in ((torch.ones(4, 4), Shard(1)), (torch.ones(4, 4, 4), Shard(0))):
        assert not has_sharded_rows(DTensor.from_local(tensor, mesh, [placement]))
    assert not map_whole([], torch.clone)


def check_steps() -> None:
    """Muon's steps are those of one process, where ranks with fewer rows send fewer numbers."""
    optim.TOGETHER = 8
    whole = matrices()
    results = []
    for mesh in (None, init_device_mesh("cpu", (4,))):
        model = nn.ModuleList(nn.Linear(*reversed(each.shape), bias=False) for each in whole)
        for linear, matrix in zip(model, whole, strict=True):
            weight = matrix.clone()
            if mesh is not None:
                weight = distribute_tensor(weight, mesh, [Shard(0)])
            linear.weight = nn.Parameter(weight)
        optimizer = optim.Optimizer(model, OptimConfig(kind="muon", lr=0.1))
        for _ in range(3):
            for linear in model:
                linear.weight.grad = linear.weight.detach().cos()
            optimizer.step()
        results.append([linear.weight.detach() for linear in model])
    for expected, rows in zip(*results, strict=True):
        assert torch.equal(rows.full_tensor(), expected)


def everything() -> None:
    for replicas in (1, 2, 4):
        for count in (6, 1):
            check(replicas, count)
    check_others()
    check_steps()


@pytest.mark.slow
def test_four_ranks_work_on_each_matrix_once():
    run_script(__file__)


def test_a_whole_matrix_is_not_sharded():
    assert not has_sharded_rows(torch.ones(3, 3))


if __name__ == "__main__":
    fork_ranks(4, everything)
