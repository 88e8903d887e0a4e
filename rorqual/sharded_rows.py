"""Shards the rows of a table over ranks, and exchanges rows and gradients with their owners.

    rank r of W owns rows r K .. (r + 1) K - 1,  K = ceil(rows / W)
    forward     distinct ids -> their owners -> rows back       two all-to-alls, and one of counts
    backward    summed gradients of distinct ids -> their owners -> added there     one all-to-all

So a step sends numbers for the distinct ids of every rank, whatever the size of the table. No rank
has the whole table, its gradient or its optimizer's state: an optimizer updates the rows that its
rank owns. A gradient is the mean over ranks, as FSDP's are.

Exchanges run in order on one background thread, by a process group that nothing else uses, so that
every rank makes the same ones in the same order, while the model computes. An error of one rank,
such as a read that fails, is sent along with what is exchanged anyway, and raised on all.

Conditional Memory via Scalable Lookup, section 2.5, arXiv:2601.07372, shards tables so.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from rorqual.ranks import raise_together, together
from rorqual.tables import Handle, Table
from rorqual.tables.draw import draw_rows
from rorqual.tables.fp8 import FP8
from rorqual.tables.record_file import RecordFile
from rorqual.tables.record_shards import RecordShard
from rorqual.tables.table import Placement, check_ids
from rorqual.tables.thread import BackgroundThread

T = TypeVar("T")


class Route(NamedTuple):
    """Which rows of a lookup come from which rank."""

    order: Int[Tensor, " N"]  # sorts the N looked up ids
    starts: Int[Tensor, " U"]  # where each distinct id begins among the sorted ones
    inverse: Int[Tensor, " N"]  # the distinct id of each id
    asked: list[int]  # distinct ids that this rank asks of each rank, U in all
    served: list[int]  # ids that each rank asks of this one, S in all
    local_ids: Int[Tensor, " S"]  # these ids, as numbers of this rank's rows


class RowExchange:
    """The ranks of a process group that share tables; counts the bytes that this rank sends.

    Every rank builds it, and its tables, in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Makes a process group of the same ranks as `group`, which is all of them if None."""
        ranks = None if group is None else dist.get_process_group_ranks(group)
        self.group = dist.new_group(ranks, use_local_synchronization=ranks is not None)
        self.rank = dist.get_rank(self.group)
        self.world = dist.get_world_size(self.group)
        self.bytes_sent = 0
        self._thread = BackgroundThread()
        self._meshes: dict[str, DeviceMesh] = {}

    def submit(self, device: torch.device, call: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Runs an exchange behind those before it, without gradients.

        Tensors of an accelerator are exchanged at once: its collectives return early, and run
        behind the computations that they wait for.
        """
        if device.type == "cpu":
            return self._thread.submit(torch.no_grad()(call), *arguments)
        done: Future[T] = Future()
        with torch.no_grad():
            done.set_result(call(*arguments))
        return done

    def all_to_all(
        self, tensor: Shaped[Tensor, "N ..."], sent: Sequence[int], received: Sequence[int]
    ) -> Shaped[Tensor, "M ..."]:
        """Sends sent[r] entries to each rank r, and returns the received[r] of each, by rank."""
        out = tensor.new_empty(sum(received), *tensor.shape[1:])
        dist.all_to_all_single(
            out, tensor.contiguous(), list(received), list(sent), group=self.group
        )
        count = len(tensor) - sent[self.rank]
        self.bytes_sent += count * tensor[:1].numel() * tensor.itemsize
        return out

    def all_to_all_of(
        self,
        make: Callable[[], Shaped[Tensor, "N ..."]],
        like: Shaped[Tensor, "..."],
        sent: Sequence[int],
        received: Sequence[int],
    ) -> Shaped[Tensor, "M ..."]:
        """Sends the entries that `make` returns; its error on one rank is raised on all.

        Behind its entries each rank gets one more, which says whether there are any. `like` has the
        shape, dtype and device of an entry.
        """
        error: Exception | None = None
        try:
            entries = make()
        except Exception as raised:
            error = raised
            entries = like.new_zeros(sum(sent), *like.shape)
        failed = like.new_full((1, *like.shape), error is not None)
        pieces = [piece for rows in entries.split(list(sent)) for piece in (rows, failed)]
        counts = [count + 1 for count in received]
        arrived = self.all_to_all(torch.cat(pieces), [count + 1 for count in sent], counts)
        by_rank = arrived.split(counts)
        if torch.cat([rows[-1:] for rows in by_rank]).any():
            raise_together(error, self.group)
        return torch.cat([rows[:-1] for rows in by_rank])

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Returns the ranks as the mesh of DTensors on such devices."""
        if device.type not in self._meshes:
            self._meshes[device.type] = DeviceMesh.from_group(self.group, device.type)
        return self._meshes[device.type]

    def close(self) -> None:
        """Waits for exchanges in progress and ends the thread."""
        self._thread.close()


class ShardedTable(Table):
    """A table of which every rank has ceil(rows / ranks) rows, in any placement.

    `rows` is the number of all rows, and `weight` has the rows of this rank; the last ranks may
    have fewer, or none, and rows without an id behind them. State dicts have DTensors, Shard(0) of
    [rows, width], so that a checkpoint can be read by any number of ranks.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        placement: Placement = "device",
        *,
        exchange: RowExchange,
        folder: str | os.PathLike[str] | None = None,
        keep: int = 3,
        **options: Any,
    ) -> None:
        """Creates this rank's shard of a new table; `options` are those of Table.

        folder: of a table on a disk, which all ranks see; each has the records of its rows there,
        with `keep` marks to go back to.
        """
        if placement == "disk" and folder is None:
            raise ValueError("table: got no folder, expected that of rows on a disk")
        shard = RecordShard(Path(folder or "."), rows, width, exchange.rank, exchange.world)
        if shard.each > 2**31:
            raise ValueError(
                f"table: got {shard.each} rows a rank, expected at most 2**31: take more ranks"
            )
        if placement == "disk":
            options["source"] = RecordFile(shard.folder, shard.each, width, keep)
        # `draw` gives the rows their values; ranks that draw nothing else stay alike.
        with torch.random.fork_rng(devices=[]):
            super().__init__(shard.each, width, placement, **options)
        self.exchange = exchange
        self.shard = shard
        self.rows = rows
        self.shard_rows = shard.each
        self.first = shard.first
        self.count = shard.size  # rows of this rank that have an id

    def prefetch(self, row_ids: Int[Tensor, "*B"]) -> Handle:
        """Starts fetching rows from their ranks. Every rank calls it, and for the same tables.

        ValueError from `wait`, on all ranks, for ids outside the table on any of them; TableError
        where rows of one of them cannot be read.
        """
        # The caller may write to its ids before they are used.
        ids = row_ids.detach().clone()
        fetched = self.exchange.submit(ids.device, self._fetch_rows, ids)
        learns = self.trainable and self.training and torch.is_grad_enabled()

        def wait() -> Tensor:
            values, route = fetched.result()
            values = values.view(*row_ids.shape, self.width)
            return _RowGradient.apply(self.weight, values, self, route) if learns else values

        return Handle(wait)

    def _fetch_rows(self, ids: Int[Tensor, "*B"]) -> tuple[Float[Tensor, "N W"], Route]:
        """Fetches rows from the ranks that own them; returns the route of their gradients, too."""
        route = self._route(ids.reshape(-1))
        read = super().prefetch
        values = self._send(
            lambda: read(route.local_ids).wait(), ids.device, route.served, route.asked
        )
        return values.index_select(0, route.inverse), route

    def _send(
        self,
        make: Callable[[], Float[Tensor, "N W"]],
        device: torch.device,
        sent: Sequence[int],
        received: Sequence[int],
    ) -> Float[Tensor, "M W"]:
        """Sends the rows, or gradients of rows, that `make` returns.

        Its error is raised on all ranks, but where everything is on an accelerator: the host would
        have to wait for what arrives.
        """
        if device.type == "cpu" or self.placement != "device":
            dtype = torch.float32 if self.dtype == FP8 else self.dtype
            like = torch.empty(self.width, dtype=dtype, device=device)
            return self.exchange.all_to_all_of(make, like, sent, received)
        return self.exchange.all_to_all(make(), sent, received)

    def _route(self, ids: Int[Tensor, " N"]) -> Route:
        """Asks the owners of the distinct ids for their rows.

        A rank with ids outside the table, or another error, asks for nothing and says so, and all
        raise its error.
        """
        error: Exception | None = None
        try:
            _check_ids(ids, self.rows)
            order, starts, inverse, sizes, wanted = self._sorted(ids)
        except Exception as raised:
            error = raised
            order, starts, inverse, sizes, wanted = self._sorted(ids[:0])
        header = torch.stack([sizes, torch.full_like(sizes, error is not None)], dim=1)
        one_each = [1] * self.exchange.world
        headers = self.exchange.all_to_all(header, one_each, one_each)
        served, failed = headers.T.tolist()
        if any(failed):
            raise_together(error, self.exchange.group)
        asked = sizes.tolist()
        local_ids = self.exchange.all_to_all(wanted, asked, served).to(torch.int64)
        return Route(order, starts, inverse, asked, served, local_ids)

    def _sorted(self, ids: Int[Tensor, " N"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns order, starts and inverse of a route, and what is asked of each rank.

        That is the number of its rows, [ranks], and their numbers within its shard, rank by rank.
        """
        by_id, order = ids.to(torch.int64).sort(stable=True)
        distinct, counts = torch.unique_consecutive(by_id, return_counts=True)
        bounds = torch.arange(self.exchange.world + 1, device=ids.device) * self.shard_rows
        sizes = torch.searchsorted(distinct, bounds).diff()
        # Ids within a shard are small numbers.
        wanted = (distinct % self.shard_rows).to(torch.int32)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(distinct), device=ids.device).repeat_interleave(counts)
        return order, counts.cumsum(0) - counts, inverse, sizes, wanted

    def gradient(self, grad: Float[Tensor, "*B W"], route: Route) -> Tensor:
        """Sends the gradients of looked up rows to their ranks; returns that of this rank's rows.

        It is sparse, [rows of this rank, width], with an entry for every rank that asked for a row.
        """
        grad = grad.reshape(-1, self.width)

        def sums() -> Tensor:
            if not len(grad):
                return grad
            # A bag for each distinct row reads and adds in one pass; index_add adds slice by slice.
            return F.embedding_bag(route.order, grad, route.starts, mode="sum")

        arrived = self._send(sums, grad.device, route.asked, route.served)
        arrived = arrived.div_(self.exchange.world).to(self.weight.device)
        local_ids = route.local_ids.to(self.weight.device)
        return torch.sparse_coo_tensor(
            local_ids[None], arrived, self.weight.shape, check_invariants=False
        )

    @torch.no_grad()
    def draw(self, std: float) -> None:
        """Draws this rank's rows of a table that is the same for any number of ranks."""
        if self.placement == "disk":
            with self._together():
                self._record_file().draw(std, self.first, self.rows)
            return
        end = self.first + self.count
        for start, values in draw_rows(self.rows, self.width, std, self.first, end):
            start -= self.first
            self.weight[start : start + len(values)] = values.to(self.weight)

    def whole(self, local: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "all ..."]:
        """Returns a tensor with an entry a row of this rank as a DTensor of all ranks' rows."""
        shape = torch.Size([self.rows, *local.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        shard = local.detach()[: self.count]
        mesh = self.exchange.mesh(local.device)
        return DTensor.from_local(
            shard, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    def record_shard(self) -> RecordShard:
        """Returns where this rank's rows are that are trained on the disk."""
        return self.shard

    def _together(self) -> AbstractContextManager:
        return together(self.exchange.group)

    def close(self) -> None:
        """Ends the threads and closes the files. TableError if the last write failed."""
        self.exchange.close()
        super().close()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.placement != "disk":
            destination[prefix + "weight"] = self.whole(self.weight)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Loads rows from a DTensor of this table, or this rank's rows of a whole tensor."""
        name = prefix + "weight"
        value = state_dict.get(name)
        if self.placement != "disk" and isinstance(value, Tensor) and len(value) == self.rows:
            rows = (
                value.to_local()
                if isinstance(value, DTensor)
                else value[self.first : self.first + self.count]
            )
            with torch.no_grad():
                self.weight[: self.count] = rows.to(self.weight)
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _RowGradient(torch.autograd.Function):
    """Passes looked up rows on, and sends their gradients to the ranks that own them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, table: ShardedTable, route: Route):
        ctx.table = table
        ctx.route = route
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        table = ctx.table
        grad = gradients[0]
        sent = table.exchange.submit(grad.device, table.gradient, grad, ctx.route)
        return sent.result(), None, None, None


def _check_ids(ids: Int[Tensor, " N"], rows: int) -> None:
    """Raises ValueError for ids that are not all rows of the table, on an accelerator too."""
    if not len(ids):
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= rows:
        check_ids(ids.cpu(), rows)
