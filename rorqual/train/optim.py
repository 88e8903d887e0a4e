"""The optimizers of a model's parameters, and the schedule of their rates.

    AdamW        m, v are averages of g, g^2
                 p <- p - lr (m^ / (sqrt(v^) + eps) + decay p)
    Muon         b is the average of g; for matrices of the blocks
                 p <- p - lr (0.2 sqrt(max(m, n)) O(b) + decay p)
    sparse Adam  Adam without decay for Engram's tables: only rows that were read, at 5 times the
                 rate, each corrected for its own number of updates

O(b) is the nearest matrix with all singular values 1, by five Newton-Schulz rounds. With the factor
0.2 sqrt(max(m, n)) one learning rate serves Muon and AdamW. Only matrices decay. Muon: Jordan et
al. 2024, arXiv 2502.16982; rows: arXiv 2601.07372.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from rorqual import distributed
from rorqual.kernels import kernel
from rorqual.layers.experts import Experts
from rorqual.layers.router import Router
from rorqual.sharded_rows import ShardedTable
from rorqual.tables import Table
from rorqual.tables.row_snapshot import RowSnapshot
from rorqual.train.config import OptimConfig
from rorqual.train.whole_matrices import has_sharded_rows, map_whole

QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients of the Muon reference
WSD_SHARE = 0.2  # of the steps after the warm-up, in which wsd falls
TOGETHER = 1 << 26  # numbers of sharded matrices that a rank sends at once, or a few more
CHUNK = 512  # rows updated at a time: their three float32 copies stay in a core's cache


def schedule(step: int, total: int, config: OptimConfig) -> float:
    """Returns the factor of all rates in step `step` of `total`, counted from 0.

    It rises to 1 in the warm-up, stays there, and falls to 0 at `total`: linearly, along a cosine,
    or, of wsd (warmup, stable, decay; arXiv 2404.06395), linearly in the last fifth.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    share = config.decay_share
    if share is None:
        share = WSD_SHARE if config.schedule == "wsd" else 1.0
    decay_start = total - share * (total - config.warmup)
    if config.schedule == "constant" or step < decay_start:
        return 1.0
    left = max(0.0, (total - step) / max(total - decay_start, 1.0))
    return 0.5 - 0.5 * math.cos(math.pi * left) if config.schedule == "cosine" else left


Role = Literal["rows", "matrix", "decayed", "plain"]


def roles(model: nn.Module) -> dict[str, Role]:
    """Returns the role of each parameter in the optimizer, by name.

    rows: Engram's tables. matrix: weights of linear maps, routers and experts inside the blocks.
    decayed: embedding and head. plain: norms, biases, convolutions, hyper-connections' maps.
    """
    roles_by_name: dict[str, Role] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            name = names[id(parameter)]
            if name in roles_by_name:
                continue
            if isinstance(module, Table):
                roles_by_name[name] = "rows"
            elif parameter.dim() < 2 or not isinstance(
                module, (nn.Linear, nn.Embedding, Router, Experts)
            ):
                roles_by_name[name] = "plain"
            else:
                roles_by_name[name] = (
                    "decayed" if isinstance(module, nn.Embedding) or path == "head" else "matrix"
                )
    return {name: roles_by_name[name] for name, _ in model.named_parameters()}


def orthogonalise(
    matrix: Float[Tensor, "*batch m n"], rounds: int = 5
) -> Float[Tensor, "*batch m n"]:
    """Brings the singular values of each matrix near 1 (0.7 to 1.2) and keeps its singular vectors.

    On a CPU in float32, elsewhere in bfloat16 as in the reference. A matrix of zeros stays so.
    """
    a, b, c = QUINTIC
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrix.dtype)


@kernel(numba="rorqual.kernels.rows:row_adam")
def row_adam(
    rows: Float[Tensor, "N W"],
    first: Float[Tensor, "N W"],
    second: Float[Tensor, "N W"],
    updates: Int[Tensor, " N"],
    touched: Int[Tensor, " K"],
    gradient: Float[Tensor, "K W"],
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Updates the distinct rows `touched` in place by Adam; other rows do not change.

        p <- p - lr m^ / (sqrt(v^) + eps),  m^ = m / (1 - b1^n),  v^ = v / (1 - b2^n)

    n is the number of updates of this row. The averages m and v are float32 whatever the rows are:
    in bfloat16 v would hardly ever fall. The state of other rows does not change, either.
    """
    width, (b1, b2) = rows.shape[1], betas
    scratch = first.new_empty(3, min(CHUNK, max(len(touched), 1)), width)
    for start in range(0, len(touched), CHUNK):
        index = touched[start : start + CHUNK]
        g = gradient[start : start + CHUNK].to(first.dtype)
        m, v, p = scratch[:, : len(index)].unbind()
        count = updates.index_select(0, index).add_(1)
        updates.index_copy_(0, index, count)
        torch.index_select(first, 0, index, out=m)
        first.index_copy_(0, index, m.lerp_(g, 1 - b1))
        torch.index_select(second, 0, index, out=v)
        second.index_copy_(0, index, v.mul_(b2).addcmul_(g, g, value=1 - b2))
        n = count.double()
        root = (1 - b2**n).sqrt()
        size = (lr * root / (1 - b1**n)).float()
        epsilon = (eps * root).float()
        p.copy_(rows.index_select(0, index))
        p.addcdiv_(m.mul_(size[:, None]), v.sqrt_().add_(epsilon[:, None]), value=-1)
        rows.index_copy_(0, index, p.to(rows.dtype))


def sum_rows(
    index: Int[Tensor, " K"], values: Float[Tensor, "K W"]
) -> tuple[Int[Tensor, " D"], Float[Tensor, "D W"]]:
    """Returns the distinct numbers of `index`, ascending, and for each the sum of its `values`."""
    index, order = index.sort(stable=True)
    distinct, counts = torch.unique_consecutive(index, return_counts=True)
    # A bag for each row reads and adds in one pass; index_add adds slice by slice.
    return distinct, F.embedding_bag(order, values, counts.cumsum(0) - counts, mode="sum")


def coalesce(gradient: Tensor) -> Tensor:
    """Converts a gradient of rows to a sparse one with each row once, in ascending order.

    Duplicates are added; of a dense gradient the rows that are not 0 are kept. The values may be
    changed in place.
    """
    if not gradient.is_sparse:
        touched = gradient.any(dim=1).nonzero()[:, 0]
        values = gradient.index_select(0, touched)
        return torch.sparse_coo_tensor(
            touched[None], values, gradient.shape, is_coalesced=True, check_invariants=False
        )
    if gradient.is_coalesced():
        return gradient
    index = gradient._indices()[0]
    values = gradient._values()
    distinct, summed = sum_rows(index, values)
    return torch.sparse_coo_tensor(
        distinct[None], summed, gradient.shape, is_coalesced=True, check_invariants=False
    )


def _turned(name: str, update: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """Orthogonalises whole matrices. A gate and an up projection in one tensor are two of them."""
    if not name.endswith("gate_up"):
        return orthogonalise(update)
    pairs = orthogonalise(update.unflatten(-1, (2, -1)).transpose(-2, -3))
    return pairs.transpose(-2, -3).flatten(-2)


def _has_whole_matrices(tensor: DTensor) -> bool:
    """Returns whether this rank's part of a stack consists of whole matrices."""
    return tensor.dim() > 2 and all(
        placement.is_replicate() or getattr(placement, "dim", None) == 0
        for placement in tensor.placements
    )


def _by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups tensors by the mesh of ranks that they are sharded over, if they are."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        groups.setdefault(mesh, []).append(tensor)
    return list(groups.values())


class Optimizer:
    """Updates all parameters of a model, each by the optimizer of its role.

    One norm is clipped, one call updates everything, and the state is one flat dictionary. Of
    tables whose rows are sharded over ranks it updates this rank's rows, whose state it has. From
    `begin_step()` to `step()`, tables on the device have sparse gradients: a dense one would be as
    large as the table. Without `begin_step()` they are dense, and updated alike. A table on disk
    stores the state of its rows itself, not in `state`.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.tables = [table for table in model.modules() if isinstance(table, Table)]
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        role = roles(model)
        self.rows = [name for name in self.parameters if role[name] == "rows"]
        by_weight = {id(table.weight): table for table in self.tables}
        self.row_tables = {name: by_weight[id(self.parameters[name])] for name in self.rows}
        self.sharded_rows = [
            name for name, table in self.row_tables.items() if isinstance(table, ShardedTable)
        ]
        # Every rank has all rows of these, and their gradients are to be averaged.
        self.replicated_rows = [name for name in self.rows if name not in self.sharded_rows]
        # These tables store the state of their rows themselves.
        self.tables_on_disk = {
            name: table for name, table in self.row_tables.items() if table.file is not None
        }
        muon = config.kind == "muon"
        self.matrices = [name for name in self.parameters if role[name] == "matrix" and muon]
        self.dense = [
            name for name in self.parameters if name not in self.rows and name not in self.matrices
        ]
        decayed = [name for name in self.dense if role[name] in ("matrix", "decayed")]
        plain = [name for name in self.dense if name not in decayed]
        groups = [
            {"params": parameters, "weight_decay": decay}
            for names, decay in ((decayed, config.weight_decay), (plain, 0.0))
            # One fused update takes tensors of one mesh of ranks.
            for parameters in _by_mesh(self.parameters[n] for n in names)
        ]
        self.adamw = (
            torch.optim.AdamW(groups, config.lr, config.betas, config.eps, fused=True)
            if groups
            else None
        )
        self.state = self._new_state()
        # Of tables in memory that are being written to a checkpoint.
        self.snapshots: dict[str, RowSnapshot] = {}

    def _new_state(self) -> dict[str, Tensor]:
        """Returns the optimizer's state by name, as the tensors that AdamW updates."""
        state: dict[str, Tensor] = {}
        for name in self.dense:
            parameter = self.parameters[name]
            count = torch.zeros((), device=parameter.device)
            moments = {
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            assert self.adamw is not None
            self.adamw.state[parameter] = {"step": count, **moments}
            state |= {
                f"{name}.step": count.view(1),
                **{f"{name}.{key}": value for key, value in moments.items()},
            }
        for name in self.matrices:
            state[f"{name}.momentum"] = torch.zeros_like(self.parameters[name])
        for name in self.rows:
            if name in self.tables_on_disk:
                continue
            table = self.parameters[name]
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{name}.{key}"] = torch.zeros_like(table, dtype=torch.float32)
            state[f"{name}.updates"] = torch.zeros(
                len(table), dtype=torch.int32, device=table.device
            )
        return {key: value.detach() for key, value in state.items()}

    def begin_step(self) -> None:
        """Removes all gradients and makes those of tables on the device sparse until `step`."""
        self.zero_grad()
        for table in self.tables:
            table.sparse = True

    def zero_grad(self) -> None:
        """Removes all gradients; the next ones are dense, as every optimizer accepts them."""
        for table in self.tables:
            table.sparse = False
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def clip(self) -> Float[Tensor, ""]:
        """Scales all gradients to a norm of at most `clip` together; returns the norm before.

        Gradients of rows are coalesced first.
        """
        for name in self.rows:
            parameter = self.parameters[name]
            if parameter.grad is not None:
                parameter.grad = coalesce(parameter.grad)
        norm = self._norm()
        factor = (self.config.clip / (norm + 1e-6)).clamp_max(1.0)
        for gradient in self._gradients(self.parameters):
            gradient.mul_(factor.to(gradient.device))
        return norm

    def _norm(self) -> Float[Tensor, ""]:
        """Returns the norm of all gradients of all ranks, each number of which counts once."""
        sharded_rows = list(self._gradients(self.sharded_rows))
        others = list(self._gradients(self.parameters.keys() - set(self.sharded_rows)))
        norm = torch.zeros((), device=others[0].device if others else None)
        for group in _by_mesh(others):
            of_group = nn.utils.get_total_norm(group)
            whole = of_group.full_tensor() if isinstance(of_group, DTensor) else of_group
            norm = torch.hypot(norm, whole.to(norm.device))
        if self.sharded_rows:
            # A rank whose rows nobody read has no gradient, and takes part in the sum.
            squared = nn.utils.get_total_norm(sharded_rows).to(norm) ** 2
            norm = torch.hypot(norm, distributed.total(squared).sqrt())
        return norm

    def _gradients(self, names: Iterable[str]) -> Iterable[Tensor]:
        """Yields the values of the gradients; of a sparse one, the values of its rows."""
        for name, parameter in self.parameters.items():
            if name in names and parameter.grad is not None:
                yield parameter.grad._values() if parameter.grad.is_sparse else parameter.grad

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """Updates everything that has a gradient, at `factor` times the configured rates."""
        lr = self.config.lr * factor
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        self._update_matrices(lr)
        # Rows come last: the device computes its updates while rows elsewhere are updated.
        for name in self.rows:
            if self.parameters[name].grad is not None:
                self._update_rows(name, lr * self.config.row_scale)
        for table in self.tables:
            table.sparse = False

    def _update_matrices(self, lr: float) -> None:
        """Updates the parameters that Muon updates."""
        momentum = self.config.momentum
        sharded: dict[DeviceMesh, dict[str, DTensor]] = {}
        for name in self.matrices:
            grad = self.parameters[name].grad
            if grad is None:
                continue
            average = self.state[f"{name}.momentum"].lerp_(grad, 1 - momentum)
            update = grad.lerp(average, momentum)
            # Whole matrices are updated where they are. A part of a matrix is not enough.
            if not isinstance(update, DTensor):
                self._update_matrix(name, lr, _turned(name, update))
            elif _has_whole_matrices(update):
                self._update_matrix(name, lr, _turned(name, update.to_local()))
            elif has_sharded_rows(update):
                updates = sharded.setdefault(update.device_mesh, {})
                updates[name] = update
                # Of whole matrices: ranks with fewer rows have to exchange after the same ones.
                numbers = sum(each.numel() for each in updates.values())
                if numbers >= TOGETHER * update.device_mesh.size(-1):
                    self._update_sharded(sharded.pop(update.device_mesh), lr)
            else:
                # Every rank has the result, and takes its part of it.
                parts = distribute_tensor(
                    _turned(name, update.full_tensor()),
                    update.device_mesh,
                    update.placements,
                    src_data_rank=None,
                )
                self._update_matrix(name, lr, parts.to_local())
        for updates in sharded.values():
            self._update_sharded(updates, lr)

    def _update_sharded(self, updates: Mapping[str, DTensor], lr: float) -> None:
        """Updates matrices whose rows are sharded: each is turned on one of their ranks."""
        turned = map_whole(list(updates.values()), orthogonalise)
        for name, rows in zip(updates, turned, strict=True):
            self._update_matrix(name, lr, rows)

    def _update_matrix(self, name: str, lr: float, turned: Tensor) -> None:
        """Adds this rank's part of a turned update to a matrix, or a stack of matrices."""
        parameter = self.parameters[name]
        sides = [parameter.shape[-2], parameter.shape[-1]]
        if name.endswith("gate_up"):
            sides[1] //= 2
        target = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        target.mul_(1 - lr * self.config.weight_decay)
        target.add_(turned, alpha=-lr * 0.2 * math.sqrt(max(sides)))

    def _update_rows(self, name: str, lr: float) -> None:
        """Updates the rows of a table that have a gradient, by Adam with rate `lr`."""
        table = self.parameters[name]
        assert table.grad is not None
        gradient = coalesce(table.grad)
        if name in self.tables_on_disk:
            self._update_on_disk(self.tables_on_disk[name], gradient, lr)
            return
        first, second, updates = (
            self.state[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "updates")
        )
        touched = gradient._indices()[0]
        values = gradient._values()
        if name in self.snapshots:
            self.snapshots[name].preserve(touched)
        row_adam(
            table.detach(),
            first,
            second,
            updates,
            touched,
            values,
            lr,
            self.config.betas,
            self.config.eps,
        )

    def _update_on_disk(self, table: Table, gradient: Tensor, lr: float) -> None:
        """Updates rows in the table's own files, which have the state of Adam beside each row."""
        betas = self.config.betas
        eps = self.config.eps

        def change(
            rows: Tensor,
            first: Tensor,
            second: Tensor,
            updates: Tensor,
            touched: Tensor,
            values: Tensor,
        ) -> None:
            """Updates the rows that the table has read, in place."""
            row_adam(rows, first, second, updates, touched, values, lr, betas, eps)

        table.update(gradient._indices()[0], gradient._values(), change)

    def snapshot(self) -> dict[str, Callable[[int, int], Tensor]]:
        """Returns what reads rows in memory, and their state, as they are now, by name.

        The names are those of the parameters and of `state_dict`; each is read from its first row
        to its last while steps go on. It lasts until the next one, or `close_snapshot`.
        """
        self.close_snapshot()
        pieces: dict[str, Callable[[int, int], Tensor]] = {}
        for name in self.rows:
            if name in self.tables_on_disk:
                continue
            keys = [f"{name}.{key}" for key in ("exp_avg", "exp_avg_sq", "updates")]
            tensors = {name: self.parameters[name].detach(), **{k: self.state[k] for k in keys}}
            table = self.row_tables[name]
            # The last ranks may have rows without an id, which nobody changes or reads.
            count = table.count if isinstance(table, ShardedTable) else table.rows
            snapshot = RowSnapshot({key: tensor[:count] for key, tensor in tensors.items()})
            self.snapshots[name] = snapshot
            pieces |= {each: partial(snapshot.rows, each) for each in (name, *keys)}
        return pieces

    def close_snapshot(self) -> None:
        """Releases the copies of the last snapshot."""
        for snapshot in self.snapshots.values():
            snapshot.close()

    def forget_former_ranks(self, steps: Sequence[int]) -> bool:
        """Removes what other numbers of ranks left of tables on disk; see record_shards.py."""
        gone = [table.record_shard().forget_others(steps) for table in self.tables_on_disk.values()]
        return all(gone)

    def failed_write(self) -> Exception | None:
        """Waits for the rows that the last step writes to the disk; returns the error of a write.

        It is of this rank. The next update would raise it, on this rank alone. After this step's
        forward pass there is nothing to wait for: its rows were read behind that write, by the same
        thread.
        """
        try:
            for table in self.tables_on_disk.values():
                table.flush()
        except (ValueError, OSError) as error:
            return error
        return None

    def mark(self, step: int) -> None:
        """Marks a step to which tables on disk can be rewound."""
        for table in self.tables_on_disk.values():
            table.mark(step)

    def rewind(self, step: int) -> None:
        """Rewinds tables on disk to a marked step; TableError where that is not possible."""
        for table in self.tables_on_disk.values():
            table.rewind(step)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the live tensors by name; filling them in place restores the optimizer.

        Those of sharded rows are DTensors of all ranks' rows.
        """
        tables = {
            f"{name}.{key}": table
            for name, table in self.row_tables.items()
            for key in ("exp_avg", "exp_avg_sq", "updates")
        }
        return {
            key: tables[key].whole(value) if key in tables else value
            for key, value in self.state.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies a state into this optimizer's; ValueError unless it has the same names."""
        if state.keys() != self.state.keys():
            odd = sorted(state.keys() ^ self.state.keys())[0]
            raise ValueError(
                f"optimizer state: got other names, first {odd!r}, "
                "expected those of this model and kind"
            )
        current = self.state_dict()
        for name, value in state.items():
            current[name].copy_(value)
