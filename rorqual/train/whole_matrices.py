"""Works on whole matrices whose rows are sharded over ranks, each of them on one rank.

    rank r  has rows of every matrix    -> all-to-all ->    whole matrices, a share of all
            the same work on each of them, which needs all of its rows (Muon)
    rank r  has whole results           -> all-to-all ->    rows of every result

So W ranks do the work once between them. Gathered on every rank, each matrix would be worked on W
times, and sent W / 2 times as often.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def has_sharded_rows(tensor: Tensor) -> bool:
    """Returns whether a matrix is sharded by rows alone, in one replica or in each of several."""
    if not isinstance(tensor, DTensor) or tensor.dim() != 2:
        return False
    *replicas, rows = tensor.placements
    return (
        type(rows) is Shard
        and rows.dim == 0
        and len(replicas) < 2
        and all(type(placement) is Replicate for placement in replicas)
    )


def map_whole(
    matrices: Sequence[DTensor], work: Callable[[Float[Tensor, "m n"]], Float[Tensor, "m n"]]
) -> list[Float[Tensor, "rows n"]]:
    """Applies `work` to each of some matrices of one mesh; returns this rank's rows of the results.

    Every rank calls it for the same matrices, which `has_sharded_rows`, in the same order. What
    `work` returns has the shape of its argument.
    """
    if not matrices:
        return []
    mesh = matrices[0].device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
    ranks = _Ranks(dist.get_rank(group), mesh.size(), mesh.size(-1))
    owners = _owners(matrices, ranks.count)
    local = [matrix.to_local() for matrix in matrices]
    mine = [matrix for matrix, owner in zip(matrices, owners, strict=True) if owner == ranks.rank]

    # Rows go to the owners of their matrices. Every replica has them: each serves its own owners.
    sent = [
        [rows for rows, owner in zip(local, owners, strict=True) if owner == rank]
        if ranks.is_of_my_replica(rank)
        else []
        for rank in range(ranks.count)
    ]
    expected = [
        [(ranks.rows_of(rank, len(matrix)), matrix.shape[1]) for matrix in mine]
        if ranks.is_of_my_replica(rank)
        else []
        for rank in range(ranks.count)
    ]
    arrived = _exchange(sent, expected, local[0], group)
    parts = [each for each in arrived if each]
    results = [work(torch.cat(rows)) for rows in zip(*parts, strict=True)]

    # Rows of the results go to all ranks.
    sent = [
        [result[ranks.span_of(rank, len(result))] for result in results]
        for rank in range(ranks.count)
    ]
    expected = [
        [
            (rows.shape[0], rows.shape[1])
            for rows, owner in zip(local, owners, strict=True)
            if owner == rank
        ]
        for rank in range(ranks.count)
    ]
    returned: list[Iterator[Tensor]] = [
        iter(each) for each in _exchange(sent, expected, local[0], group)
    ]
    return [next(returned[owner]) for owner in owners]


class _Ranks:
    """Ranks of a mesh of replicas, of each of which `shards` ranks share the rows of a matrix."""

    def __init__(self, rank: int, count: int, shards: int) -> None:
        self.rank = rank
        self.count = count
        self.shards = shards

    def is_of_my_replica(self, rank: int) -> bool:
        """Returns whether a rank is of this one's replica."""
        return rank // self.shards == self.rank // self.shards

    def span_of(self, rank: int, rows: int) -> slice:
        """Returns which rows a rank has, as Shard splits them: the last ranks may have fewer."""
        each = -(-rows // self.shards)
        first = min(rank % self.shards * each, rows)
        return slice(first, min(first + each, rows))

    def rows_of(self, rank: int, rows: int) -> int:
        """Returns how many of a matrix's rows a rank has."""
        span = self.span_of(rank, rows)
        return span.stop - span.start


def _owners(matrices: Sequence[DTensor], ranks: int) -> list[int]:
    """Returns the rank that works on each matrix, so that all have about as much to do."""
    costs = [max(each.shape) * min(each.shape) ** 2 for each in matrices]
    owners = [0] * len(matrices)
    loads = [0] * ranks
    for index in sorted(range(len(matrices)), key=lambda index: -costs[index]):
        owner = loads.index(min(loads))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners


def _exchange(
    sent: Sequence[Sequence[Tensor]],
    expected: Sequence[Sequence[tuple[int, int]]],
    like: Tensor,
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """Sends tensors to each rank, and returns those of the expected shapes from each rank."""
    flat = [tensor.reshape(-1) for tensors in sent for tensor in tensors]
    out = torch.cat(flat) if flat else like.new_empty(0)
    out_sizes = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
    numels = [[rows * columns for rows, columns in shapes] for shapes in expected]
    in_sizes = [sum(counts) for counts in numels]
    arrived = like.new_empty(sum(in_sizes))
    dist.all_to_all_single(arrived, out, in_sizes, out_sizes, group=group)
    return [
        [piece.view(shape) for piece, shape in zip(numbers.split(counts), shapes, strict=True)]
        for numbers, counts, shapes in zip(arrived.split(in_sizes), numels, expected, strict=True)
    ]
