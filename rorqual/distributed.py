"""Distributes a model over several processes.

    shard      FSDP2: every block's parameters are sharded over the ranks and gathered while it runs
    Exchange   expert parallelism: one all-to-all sends tokens to their experts, another returns
               the results
    mean_rows  gathers a table's row gradients of all ranks: tables are replicated on every rank
    torchrun   runs a command in several processes, and restarts it when one of them dies

Parallelism is applied from outside; model code does not depend on it. The mathematics is that of
one process with the batches of all ranks concatenated.
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
    """Returns the number of ranks; 1 without a process group."""
    return dist.get_world_size() if _together() else 1


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def join(device: torch.device) -> bool:
    """Joins the process group that torchrun's environment describes.

    False where there is none, or it was already joined.
    """
    if runtime.ranks()[1] == 1 or _together():
        return False
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return True


def leave() -> None:
    """Leaves the process group that `join` joined."""
    if _together():
        dist.destroy_process_group()


def torchrun_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits argv into torchrun's leading flags, with their values, and the rest.

    ValueError where a flag is not torchrun's, and where nothing follows the flags.
    """
    words = _torchrun_parser().parse_args(argv).training_script_args
    offset = len(argv) - len(words) - 1
    return list(argv[:offset]), list(argv[offset:])


def torchrun(flags: Sequence[str], command: Sequence[str]) -> None:
    """Runs `python -m COMMAND` in as many processes as the flags set; all restart when one dies.

    RuntimeError when the last try has failed, KeyboardInterrupt when this process was interrupted.
    """
    asked = _torchrun_parser().parse_args([*flags, "-m", *command])
    # Otherwise restarted processes would read the addresses of those that died from a shared store.
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
    """Runs `work` on rank 0 before the other ranks, which find its files on the disk."""
    if rank() > 0:
        dist.barrier()
    result = work()
    if rank() == 0 and world() > 1:
        dist.barrier()
    return result


def total(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Returns the sum over all ranks."""
    if world() == 1:
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def mean_rows(table: nn.Parameter) -> None:
    """Replaces a table's sparse gradient by the mean over all ranks.

    The rows and values of the ranks are concatenated. Ranks touch different numbers of rows:
    shorter ones are padded with zeros for row 0, which change nothing.
    """
    if world() == 1:
        return
    grad = table.grad if table.grad is not None else _no_rows(table)
    rows = grad._indices()[0]
    values = grad._values()
    longest = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    missing = int(longest) - len(rows)
    rows = torch.cat([rows, rows.new_zeros(missing)])
    values = torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
    all_rows = _gathered(rows)
    all_values = _gathered(values) / world()
    table.grad = torch.sparse_coo_tensor(
        all_rows[None], all_values, table.shape, check_invariants=False
    )


def _gathered(tensor: Tensor) -> Tensor:
    """Concatenates the tensors of all ranks, which have one shape."""
    parts = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _no_rows(table: Tensor) -> Tensor:
    index = torch.zeros(1, 0, dtype=torch.long, device=table.device)
    return torch.sparse_coo_tensor(
        index, table.new_zeros(0, table.shape[1]), table.shape, check_invariants=False
    )


def shard(model: nn.Module, mesh: DeviceMesh | None = None, experts: bool = False) -> nn.Module:
    """Shards the model over the ranks in place, block by block.

    `loss` and `forward` gather the parameters that they need, in their own dtype. Gradients are
    reduced in float32: matrix products in bfloat16 come from autocast, as on one rank. A policy
    that cast parameters would also cast the rotary tables and the residual streams' coefficients.
    Engram's tables are not sharded (`mean_rows`). experts: every rank keeps some experts and
    receives their tokens, instead of gathering all experts.
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
    """Gives rank r of W the r-th range of E / W experts of every MoE.

    An Exchange sends the experts their tokens.
    """
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
    """Sends tokens to the ranks of their experts and returns the results; fits `MoE.exchange`."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __call__(
        self, rows: Float[Tensor, "N D"], counts: Int[Tensor, " E"], experts: Experts
    ) -> Float[Tensor, "N D"]:
        """Applies the experts of all ranks to `rows`.

        rows: tokens sorted by expert, counts[e] of them for expert e of all E. Returns the experts'
        outputs in the same order.
        """
        ranks = dist.get_world_size(self.group)
        sent = counts.view(ranks, -1)  # [W, E / W]
        due = torch.empty_like(sent)
        dist.all_to_all_single(due, sent.contiguous(), group=self.group)
        out_sizes = sent.sum(1).tolist()
        in_sizes = due.sum(1).tolist()
        arrived = _AllToAll.apply(rows, in_sizes, out_sizes, self.group, float(ranks))
        expert = (
            torch.arange(due.shape[1], device=rows.device)
            .repeat(ranks)
            .repeat_interleave(due.flatten())
        )
        # Tokens arrive by rank, experts need them by expert.
        order = expert.argsort(stable=True)
        local_weights = {
            name: p.to_local() if isinstance(p, DTensor) else p
            for name, p in experts.named_parameters()
        }
        made = functional_call(experts, local_weights, (arrived[order], due.sum(0)))
        made = torch.empty_like(made).index_copy(0, order, made)
        return _AllToAll.apply(made, out_sizes, in_sizes, self.group, 1.0 / ranks)


class _AllToAll(torch.autograd.Function):
    """Differentiable all-to-all of rows by rank.

    `scale` turns an expert's gradients, which all ranks add to, into their mean.
    """

    @staticmethod
    def forward(
        ctx, rows: Tensor, in_sizes: list[int], out_sizes: list[int], group, scale: float
    ) -> Tensor:
        ctx.sizes = (in_sizes, out_sizes)
        ctx.group = group
        ctx.scale = scale
        received = rows.new_empty(sum(in_sizes), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), in_sizes, out_sizes, group=group)
        return received

    @staticmethod
    def backward(ctx, *grads: Tensor):
        in_sizes, out_sizes = ctx.sizes
        received = grads[0].new_empty(sum(out_sizes), grads[0].shape[1])
        dist.all_to_all_single(
            received, (grads[0] * ctx.scale).contiguous(), out_sizes, in_sizes, group=ctx.group
        )
        return received, None, None, None, None
