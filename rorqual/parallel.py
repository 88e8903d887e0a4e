"""A model in one process -> the same model over many out.

    shard      FSDP2: every block's parameters cut over the ranks, gathered while it runs
    Exchange   experts cut over the ranks: one all-to-all carries rows to their experts, another the results back
    mean_rows  a table's row gradients of all ranks, added where they are: tables are whole on every rank
    torchrun   a command -> that command in many processes, started again when one of them dies

Parallelism is put on from outside; a model does not know of it. The mathematics stays that of one process with the
batches of all ranks put together.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.distributed import run
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call

from rorqual import runtime
from rorqual.layers.experts import Experts
from rorqual.layers.moe import MoE
from rorqual.tables import Table

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if _together() else 0


def world() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if _together() else 1


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def join(device: torch.device) -> bool:
    """Enter the process group that torchrun's environment describes; False where there is none, or it was entered."""
    if runtime.ranks()[1] == 1 or _together():
        return False
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return True


def leave() -> None:
    """Undo `join`."""
    if _together():
        dist.destroy_process_group()


def torchrun_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of torchrun that come first, with their values, and the words from the first that is neither.

    ValueError where a flag is not torchrun's, and where nothing else comes.
    """
    words = _torchrun_parser().parse_args(argv).training_script_args
    at = len(argv) - len(words) - 1
    return list(argv[:at]), list(argv[at:])


def torchrun(flags: Sequence[str], command: Sequence[str]) -> None:
    """Run `python -m COMMAND` in as many processes as the flags say, all again when one of them dies.

    RuntimeError when the last try has failed, KeyboardInterrupt when this process was asked to stop.
    """
    asked = _torchrun_parser().parse_args([*flags, "-m", *command])
    # processes that start again would else meet in the store of those that died, full of their addresses
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if asked.nproc_per_node.isdigit():
        os.environ.setdefault(
            "OMP_NUM_THREADS", str(max(1, runtime.cores() // max(1, int(asked.nproc_per_node))))
        )
    try:
        run.run(asked)
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"signal {-code}" if code < 0 else f"code {code}"
        tries = f"{asked.max_restarts} restarts" if asked.max_restarts else "no restart"
        raise RuntimeError(
            f"rank {number} ended with {how}, after {tries}; what it said stands above"
        ) from None


def _torchrun_parser() -> argparse.ArgumentParser:
    parser = run.get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    return parser


def _refuse(message: str) -> NoReturn:
    if "training_script" in message:
        message = "got flags alone, expected a preset's name or a run folder behind them"
    raise ValueError(message)


def first(work: Callable[[], T]) -> T:
    """What `work` returns, on rank 0 before the others begin: they find what it left on the disk."""
    if rank() > 0:
        dist.barrier()
    found = work()
    if rank() == 0 and world() > 1:
        dist.barrier()
    return found


def total(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over all ranks."""
    if world() == 1:
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def mean_rows(table: nn.Parameter) -> None:
    """Give every rank the mean of all ranks' sparse gradients of a table, as rows and values one after another.

    Ranks touch different numbers of rows: shorter ones are filled up with zeros for row 0, which change nothing.
    """
    if world() == 1:
        return
    own = table.grad if table.grad is not None else _no_rows(table)
    rows, values = own._indices()[0], own._values()
    longest = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    missing = int(longest) - len(rows)
    rows = torch.cat([rows, rows.new_zeros(missing)])
    values = torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
    all_rows, all_values = _gathered(rows), _gathered(values) / world()
    table.grad = torch.sparse_coo_tensor(
        all_rows[None], all_values, table.shape, check_invariants=False
    )


def _gathered(tensor: Tensor) -> Tensor:
    """Every rank's tensor, all of one shape, one after another."""
    found = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(found, tensor.contiguous())
    return torch.cat(found)


def _no_rows(table: Tensor) -> Tensor:
    index = torch.zeros(1, 0, dtype=torch.long, device=table.device)
    return torch.sparse_coo_tensor(
        index, table.new_zeros(0, table.shape[1]), table.shape, check_invariants=False
    )


def shard(model: nn.Module, mesh: DeviceMesh | None = None, experts: bool = False) -> nn.Module:
    """Cut the model over the ranks in place, block by block; `loss` and `forward` gather what they need.

    Parameters are gathered as they are kept and gradients reduced in float32: products in bfloat16 are autocast's, as
    on one rank. A policy that cast them would cast the rotary tables and the residual streams' coefficients, too.
    Engram's tables are left whole (`mean_rows`). experts: every rank keeps some experts and is sent their tokens, in
    place of gathering all of them.
    """
    device = next(model.parameters()).device
    mesh = mesh or init_device_mesh(device.type, (world(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    if experts:
        _cut_experts(model, mesh)
    apart = (Table, Experts) if experts else Table
    ignored = {
        p for module in model.modules() if isinstance(module, apart) for p in module.parameters()
    }
    for block in (*model.blocks, *(module.block for module in model.mtp)):  # type: ignore[misc, union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    assert isinstance(model, FSDPModule)
    register_fsdp_forward_method(model, "loss")
    return model


def _cut_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Rank r of W keeps the r-th run of E / W experts of every mixture; tokens come to them by an Exchange."""
    for mixture in (module for module in model.modules() if isinstance(module, MoE)):
        if mixture.config.routed % mesh.size():
            raise ValueError(
                f"got {mesh.size()} ranks, expected a divisor of {mixture.config.routed} experts"
            )
        for name, parameter in list(mixture.experts.named_parameters()):
            cut = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            mixture.experts.register_parameter(name, nn.Parameter(cut))
        mixture.exchange = Exchange(mesh.get_group())


class Exchange:
    """Carries rows to the ranks that hold their experts, and what these made of them back; fits `MoE.exchange`."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __call__(
        self, rows: Float[Tensor, "N D"], counts: Int[Tensor, " E"], experts: Experts
    ) -> Float[Tensor, "N D"]:
        """Rows sorted by expert, counts[e] of them for expert e of all E -> what experts return, in the same order."""
        ranks = dist.get_world_size(self.group)
        sent = counts.view(ranks, -1)  # [W, E / W]
        due = torch.empty_like(sent)
        dist.all_to_all_single(due, sent.contiguous(), group=self.group)
        out_sizes, in_sizes = sent.sum(1).tolist(), due.sum(1).tolist()
        arrived = _AllToAll.apply(rows, in_sizes, out_sizes, self.group, float(ranks))
        expert = (
            torch.arange(due.shape[1], device=rows.device)
            .repeat(ranks)
            .repeat_interleave(due.flatten())
        )
        order = expert.argsort(stable=True)  # they come by rank, experts want them by expert
        own = {
            name: p.to_local() if isinstance(p, DTensor) else p
            for name, p in experts.named_parameters()
        }
        made = functional_call(experts, own, (arrived[order], due.sum(0)))
        made = torch.empty_like(made).index_copy(0, order, made)
        return _AllToAll.apply(made, out_sizes, in_sizes, self.group, 1.0 / ranks)


class _AllToAll(torch.autograd.Function):
    """Rows by rank, differentiable. `scale` makes of an expert's gradients, which all ranks add to, their mean."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, in_sizes: list[int], out_sizes: list[int], group, scale: float
    ) -> Tensor:
        ctx.sizes, ctx.group, ctx.scale = (in_sizes, out_sizes), group, scale
        found = rows.new_empty(sum(in_sizes), rows.shape[1])
        dist.all_to_all_single(found, rows.contiguous(), in_sizes, out_sizes, group=group)
        return found

    @staticmethod
    def backward(ctx, *grads: Tensor):
        in_sizes, out_sizes = ctx.sizes
        found = grads[0].new_empty(sum(out_sizes), grads[0].shape[1])
        dist.all_to_all_single(
            found, (grads[0] * ctx.scale).contiguous(), out_sizes, in_sizes, group=ctx.group
        )
        return found, None, None, None, None
