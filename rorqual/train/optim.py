"""Parameters and their gradients in -> updated parameters out.

    AdamW        m, v <- averages of g, g^2;  p <- p - lr (m^ / (sqrt(v^) + eps) + decay p)     everything else
    Muon         b <- average of g;  p <- p - lr (0.2 sqrt(max(m, n)) O(b) + decay p)           matrices of the blocks
    sparse Adam  Adam without decay, only for rows that were read, at 5 times the rate, each    Engram's tables
                 row corrected for its own number of updates

O is the nearest matrix with all singular values 1, by five Newton-Schulz rounds; with the factor 0.2 sqrt(max) one
learning rate serves Muon and AdamW. Only matrices decay. Muon: Jordan et al. 2024, arXiv 2502.16982; rows: arXiv
2601.07372.
"""

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rorqual import kernels
from rorqual.layers.experts import Experts
from rorqual.layers.router import Router
from rorqual.tables import Table

QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients of the Muon reference
NEEDLE_RATE = 6e-3  # of Muon; at 1e-2 attention stays at chance for hundreds of steps
WIDEST = 512  # width of a model that `recipe` has a rate of its own for
CHUNK = 512  # rows updated at a time: their three float32 copies stay in a core's cache


class Diverged(RuntimeError):
    """Training has left the finite numbers and cannot go on from where it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """How parameters learn. Rates are of the peak; `schedule` scales them all."""

    kind: Literal["adamw", "muon"] = "adamw"  # what updates the matrices of the blocks
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices and embeddings
    momentum: float = 0.95  # Muon's
    clip: float = 1.0  # of the norm of all gradients together
    row_scale: float = 5.0  # the tables' rate over the others'
    warmup: int = 20  # steps
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    decay_share: float = 1.0  # of the steps after the warm-up; the rate stays constant before

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip", "row_scale"):
            if not (0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("momentum", self.momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: got {value}, expected 0 <= value < 1")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: got {self.weight_decay}, expected at least 0")
        if self.warmup < 0:
            raise ValueError(f"warmup: got {self.warmup}, expected at least 0 steps")
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"decay_share: got {self.decay_share}, expected 0..1")
        if self.kind not in ("adamw", "muon") or self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"got kind {self.kind!r} and decay {self.decay!r}, expected adamw or muon, a known decay")


def recipe(dim: int, *, needles: bool = False) -> OptimConfig:
    """The optimizer that `rorqual train`, the demo and the sweeps begin with, for a model of this width.

    Muon at 0.02 up to a width of 64, where it was measured (docs/log.md). An update's largest singular value grows with
    sqrt(width) here, and should not for one rate to serve every width (arXiv 2310.17813), so the rate falls with
    1 / sqrt(width). Questions about needles are learnt at NEEDLE_RATE (docs/needle.md). Beyond WIDEST, which models of
    papers are, it is AdamW as OptimConfig has it.
    """
    if dim > WIDEST:
        return OptimConfig()
    if needles:
        return OptimConfig(kind="muon", lr=NEEDLE_RATE)
    return OptimConfig(kind="muon", lr=0.02 * min(1.0, math.sqrt(64 / dim)))


def schedule(step: int, total: int, config: OptimConfig) -> float:
    """What the rates are multiplied by in step `step` (from 0) of `total`: up to 1, flat, then down to 0 at `total`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    begin = total - config.decay_share * (total - config.warmup)
    if config.decay == "constant" or step < begin:
        return 1.0
    left = max(0.0, (total - step) / max(total - begin, 1.0))
    return left if config.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


Role = Literal["rows", "matrix", "decayed", "plain"]


def roles(model: nn.Module) -> dict[str, Role]:
    """Parameter name -> what it is to the optimizer.

    rows: Engram's tables. matrix: weights of linear maps, routers and experts inside the blocks.
    decayed: embedding and head. plain: norms, biases, convolutions, hyper-connections' maps.
    """
    found: dict[str, Role] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            name = names[id(parameter)]
            if name in found:
                continue
            if isinstance(module, Table):
                found[name] = "rows"
            elif parameter.dim() < 2 or not isinstance(module, (nn.Linear, nn.Embedding, Router, Experts)):
                found[name] = "plain"
            else:
                found[name] = "decayed" if isinstance(module, nn.Embedding) or path == "head" else "matrix"
    return {name: found[name] for name, _ in model.named_parameters()}


def orthogonalise(matrix: Float[Tensor, "*batch m n"], rounds: int = 5) -> Float[Tensor, "*batch m n"]:
    """Singular values near 1 (0.7 to 1.2), singular vectors kept, of each matrix by itself.

    On a CPU in float32, elsewhere in bfloat16 as in the reference; one that is 0 stays 0.
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
    """One Adam update, in place, of the rows `touched`, which are distinct; every other row and its state stay.

    p <- p - lr m^ / (sqrt(v^) + eps),  m^ = m / (1 - b1^n),  v^ = v / (1 - b2^n),  n = how often this row was updated.
    The averages m and v are float32 whatever the rows are: in bfloat16 v would hardly ever fall.
    """
    width, (b1, b2) = rows.shape[1], betas
    scratch = first.new_empty(3, min(CHUNK, max(len(touched), 1)), width)
    for at in range(0, len(touched), CHUNK):
        index, g = touched[at : at + CHUNK], gradient[at : at + CHUNK].to(first.dtype)
        m, v, p = scratch[:, : len(index)].unbind()
        count = updates.index_select(0, index).add_(1)
        updates.index_copy_(0, index, count)
        torch.index_select(first, 0, index, out=m)
        first.index_copy_(0, index, m.lerp_(g, 1 - b1))
        torch.index_select(second, 0, index, out=v)
        second.index_copy_(0, index, v.mul_(b2).addcmul_(g, g, value=1 - b2))
        n = count.double()
        root = (1 - b2**n).sqrt()
        size, floor = (lr * root / (1 - b1**n)).float(), (eps * root).float()
        p.copy_(rows.index_select(0, index))
        p.addcdiv_(m.mul_(size[:, None]), v.sqrt_().add_(floor[:, None]), value=-1)
        rows.index_copy_(0, index, p.to(rows.dtype))


def sum_rows(index: Int[Tensor, " K"], values: Float[Tensor, "K W"]) -> tuple[Int[Tensor, " D"], Float[Tensor, "D W"]]:
    """The different numbers of `index`, rising, and for each the sum of its `values`."""
    index, order = index.sort(stable=True)
    distinct, counts = torch.unique_consecutive(index, return_counts=True)
    # a bag a row reads and adds in one pass; index_add adds slice by slice
    return distinct, F.embedding_bag(order, values, counts.cumsum(0) - counts, mode="sum")


def coalesce(gradient: Tensor) -> Tensor:
    """A gradient of rows as a sparse one with each row once, duplicates added, in rising order.

    Of a dense gradient the rows that are not 0 are taken. The values may be changed in place.
    """
    if not gradient.is_sparse:
        touched = gradient.any(dim=1).nonzero()[:, 0]
        values = gradient.index_select(0, touched)
        return torch.sparse_coo_tensor(touched[None], values, gradient.shape, is_coalesced=True, check_invariants=False)
    if gradient.is_coalesced():
        return gradient
    index, values = gradient._indices()[0], gradient._values()
    distinct, summed = kernels.pick("sum_rows", sum_rows, index, values)(index, values)
    return torch.sparse_coo_tensor(distinct[None], summed, gradient.shape, is_coalesced=True, check_invariants=False)


def _give_dense_gradients(tables: Iterable[Table]) -> None:
    for table in tables:
        table.sparse = False


class Optimizer:
    """All parameters of a model, each by the optimizer of its role; one step, one norm, one flat state.

    From `zero_grad()` to `step()`, tables on the device give sparse gradients: a dense one would be as large as the
    table. Before and after, their gradients are dense, as other optimizers expect them.
    Of a table that learns where its rows live, the rows' state is there, too, and not in `state`.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.tables = [table for table in model.modules() if isinstance(table, Table)]
        weakref.finalize(self, _give_dense_gradients, self.tables)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        role = roles(model)
        self.rows = [name for name in self.parameters if role[name] == "rows"]
        own = {id(module.weight): module for module in self.tables if module.file is not None}
        self.apart = {name: own[id(p)] for name, p in self.parameters.items() if id(p) in own}  # they keep their state
        muon = config.kind == "muon"
        self.matrices = [name for name in self.parameters if role[name] == "matrix" and muon]
        self.dense = [name for name in self.parameters if name not in self.rows and name not in self.matrices]
        decayed = [name for name in self.dense if role[name] in ("matrix", "decayed")]
        plain = [name for name in self.dense if name not in decayed]
        groups = [
            {"params": [self.parameters[n] for n in names], "weight_decay": decay}
            for names, decay in ((decayed, config.weight_decay), (plain, 0.0))
            if names
        ]
        self.adamw = torch.optim.AdamW(groups, config.lr, config.betas, config.eps, fused=True) if groups else None
        self.state = self._new_state()

    def _new_state(self) -> dict[str, Tensor]:
        """Everything that is carried from step to step, by name; AdamW's is the tensors it works on."""
        state: dict[str, Tensor] = {}
        for name in self.dense:
            parameter = self.parameters[name]
            count = torch.zeros((), device=parameter.device)
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            assert self.adamw is not None
            self.adamw.state[parameter] = {"step": count, **moments}
            state |= {f"{name}.step": count.view(1), **{f"{name}.{key}": value for key, value in moments.items()}}
        for name in self.matrices:
            state[f"{name}.momentum"] = torch.zeros_like(self.parameters[name])
        for name in self.rows:
            if name in self.apart:
                continue
            table = self.parameters[name]
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{name}.{key}"] = torch.zeros_like(table, dtype=torch.float32)
            state[f"{name}.updates"] = torch.zeros(len(table), dtype=torch.int32, device=table.device)
        return {key: value.detach() for key, value in state.items()}

    def zero_grad(self) -> None:
        """Drop all gradients; those of the step that now begins are sparse for tables on the device."""
        for table in self.tables:
            table.sparse = True
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def clip(self) -> Float[Tensor, ""]:
        """Scale all gradients, the rows' coalesced, to a norm of at most `clip` together; returns the norm before."""
        for name in self.rows:
            parameter = self.parameters[name]
            if parameter.grad is not None:
                parameter.grad = coalesce(parameter.grad)
        gradients = list(self._gradients())
        sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
        norm = nn.utils.get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
        if sharded:
            norm = torch.hypot(norm, nn.utils.get_total_norm(sharded).full_tensor())  # type: ignore[attr-defined]
        factor = (self.config.clip / (norm + 1e-6)).clamp_max(1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))
        return norm

    def _gradients(self) -> Iterable[Tensor]:
        """The tensors that hold gradient values; of a sparse one, the values of its rows."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                yield parameter.grad._values() if parameter.grad.is_sparse else parameter.grad

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """Update everything that has a gradient, at `factor` times the configured rates."""
        lr = self.config.lr * factor
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        for name in self.matrices:
            if self.parameters[name].grad is not None:
                self._muon(name, lr)
        for name in self.rows:  # last: a device does its part while rows elsewhere are updated
            if self.parameters[name].grad is not None:
                self._rows(name, lr * self.config.row_scale)
        _give_dense_gradients(self.tables)

    def _muon(self, name: str, lr: float) -> None:
        parameter, momentum = self.parameters[name], self.config.momentum
        assert parameter.grad is not None
        average = self.state[f"{name}.momentum"].lerp_(parameter.grad, 1 - momentum)
        update = parameter.grad.lerp(average, momentum)
        whole = update.full_tensor() if isinstance(update, DTensor) else update
        stack = whole.unflatten(-1, (2, -1)).transpose(-2, -3) if name.endswith("gate_up") else whole
        turned = orthogonalise(stack)  # a gate and an up projection side by side are two matrices
        turned = turned.transpose(-2, -3).flatten(-2) if name.endswith("gate_up") else turned
        if isinstance(update, DTensor):
            turned = distribute_tensor(turned, update.device_mesh, update.placements)
        parameter.mul_(1 - lr * self.config.weight_decay)
        parameter.add_(turned, alpha=-lr * 0.2 * math.sqrt(max(stack.shape[-2:])))

    def _rows(self, name: str, lr: float) -> None:
        table = self.parameters[name]
        assert table.grad is not None
        gradient = coalesce(table.grad)
        if name in self.apart:
            self._rows_apart(self.apart[name], gradient, lr)
            return
        first, second, updates = (self.state[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "updates"))
        touched, values = gradient._indices()[0], gradient._values()
        update = kernels.pick("row_adam", row_adam, table, values)
        update(table.detach(), first, second, updates, touched, values, lr, self.config.betas, self.config.eps)

    def _rows_apart(self, table: Table, gradient: Tensor, lr: float) -> None:
        def change(*given: Tensor) -> None:
            kernels.pick("row_adam", row_adam, *given)(*given, lr, self.config.betas, self.config.eps)

        table.update(gradient._indices()[0], gradient._values(), change)

    def mark(self, step: int) -> None:
        """Tables that learn on a disk can come back to this step from now on."""
        for table in self.apart.values():
            table.mark(step)

    def rewind(self, step: int) -> None:
        """Tables that learn on a disk are what they were at that mark. TableError where they cannot."""
        for table in self.apart.values():
            table.rewind(step)

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> tensor, the live ones: filling them in place restores the optimizer."""
        return dict(self.state)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """ValueError unless the names are this optimizer's own."""
        if state.keys() != self.state.keys():
            odd = sorted(state.keys() ^ self.state.keys())[0]
            raise ValueError(f"optimizer state: got other names, first {odd!r}, expected those of this model and kind")
        for name, value in state.items():
            self.state[name].copy_(value)
