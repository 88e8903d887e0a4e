"""Distributes a model over several processes.

    parallelize  makes a model run on a mesh of ranks with the axes replicate, shard, context and
                 expert: FSDP2 and HSDP, expert and context parallelism, activation checkpointing,
                 torch.compile
    build        makes a model on such a mesh, of which no rank ever has the whole
    Exchange     expert parallelism: one all-to-all sends tokens to their experts, another returns
                 the results
    exchanges    lists what counts the bytes that it sends
    mean_rows    gathers a table's row gradients of all ranks, which each have the whole table
    torchrun     runs a command in several processes, and restarts it when one of them dies

Parallelism is applied from outside; model code does not depend on it. The mathematics is that of
one process with the batches of all ranks concatenated.
"""

import argparse
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
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
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from rorqual import runtime
from rorqual.context_parallel import split_sequences
from rorqual.distributed_config import DistributedConfig, refuse_layout
from rorqual.layers.context import Context
from rorqual.layers.experts import Experts
from rorqual.layers.moe import MoE
from rorqual.layers.mtp import MTP
from rorqual.layers.streams import Streams
from rorqual.model import Block, LanguageModel, init
from rorqual.ranks import barrier as barrier
from rorqual.ranks import raise_together as raise_together
from rorqual.ranks import rank as rank
from rorqual.ranks import together as together
from rorqual.ranks import total as total
from rorqual.ranks import world as world
from rorqual.sharded_rows import RowExchange
from rorqual.tables import Handle, Table

T = TypeVar("T")

AXES = ("replicate", "shard", "context", "expert")

# Operators whose results selective activation checkpointing stores: products, attention, and what
# other ranks sent.
STORED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
}


def join(device: torch.device) -> bool:
    """Joins the process group that torchrun's environment describes.

    False where there is none, or it was already joined.
    """
    if runtime.ranks()[1] == 1 or dist.is_initialized():
        return False
    if device.type == "cuda":
        # FSDP and NCCL use the current device, which is the first one for every rank.
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return True


def leave() -> None:
    """Leaves the process group that `join` joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def torchrun_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits argv into torchrun's leading flags, with their values, and the rest.

    ValueError where a flag is not torchrun's, and where nothing follows the flags.
    """
    words = _torchrun_parser().parse_args(argv).training_script_args
    offset = len(argv) - len(words) - 1
    return list(argv[:offset]), list(argv[offset:])


def torchrun_ranks(flags: Sequence[str]) -> int | None:
    """Returns the number of processes that these flags ask for; None where they leave it open."""
    asked = _torchrun_parser().parse_args([*flags, "-m", "rorqual"])
    fewest, _, largest = str(asked.nnodes).partition(":")
    numbers = (fewest, str(asked.nproc_per_node))
    if largest not in ("", fewest) or not all(number.isdigit() for number in numbers):
        return None
    return int(numbers[0]) * int(numbers[1])


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
    """Returns torchrun's own parser, which raises ValueError where it would end the process."""
    parser = run.get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    return parser


def _refuse(message: str) -> NoReturn:
    """Raises ValueError with the parser's message, or with ours where no command follows."""
    if "training_script" in message:
        message = "got flags alone, expected a preset's name or a run folder behind them"
    raise ValueError(message)


def first(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 before the other ranks, which find its files on the disk.

    An error of one of them is raised on all.
    """
    results = []
    with together():
        if rank() == 0:
            results.append(work())
    with together():
        if rank() > 0:
            results.append(work())
    return results[0]


def exchanges(model: nn.Module) -> "list[Exchange | RowExchange]":
    """Returns what sends rows, and tokens to experts, between ranks; each counts its bytes.

    They count both there and back, forward and backward. FSDP's parameters and gradients, context
    parallelism, and sums over ranks are sent by others.
    """
    by_id: dict[int, Exchange | RowExchange] = {}
    for module in model.modules():
        exchange = getattr(module, "exchange", None)
        if isinstance(exchange, (Exchange, RowExchange)):
            by_id[id(exchange)] = exchange
    return list(by_id.values())


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
    """Returns a sparse gradient of the table without a row."""
    index = torch.zeros(1, 0, dtype=torch.long, device=table.device)
    return torch.sparse_coo_tensor(
        index, table.new_zeros(0, table.shape[1]), table.shape, check_invariants=False
    )


def make_mesh(config: DistributedConfig, device_type: str) -> DeviceMesh:
    """Returns the mesh of all ranks, with the axes AXES. ValueError where the ranks do not fit."""
    sizes = config.sizes(world())
    return init_device_mesh(device_type, tuple(sizes[axis] for axis in AXES), mesh_dim_names=AXES)


def parallelize(
    model: LanguageModel, mesh: DeviceMesh | None, config: DistributedConfig
) -> LanguageModel:
    """Makes the model run on the ranks of `mesh`, in place; without a mesh on this rank alone.

    Parameters are sharded over the ranks that share them, block by block. `loss` and `forward`
    gather those that they need, in their own dtype. Gradients are reduced in float32: matrix
    products in bfloat16 come from autocast, as on one rank. A policy that cast parameters would
    also cast the rotary tables and the residual streams' coefficients. Experts are split over the
    axis `expert` and then sharded over the other ranks. Engram's tables stay as they were built:
    sharded over all ranks (sharded_rows.py), or whole on every rank (`mean_rows`). ValueError for a
    layout that the model cannot have.
    """
    refuse_layout(model.config, config, 1 if mesh is None else mesh.size())
    blocks = _blocks(model)
    for block in blocks:
        if config.compile == "block":
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        if config.activation_checkpointing != "none":
            _checkpoint(block, selective=config.activation_checkpointing == "selective")
    if mesh is not None:
        if model.addresses is not None:
            # Before any rank asks others for rows: an exchange that one rank does not join would be
            # answered by its next one.
            addresses = model.addresses
            addresses.forward = together()(addresses.forward)  # type: ignore[method-assign]
        if config.context > 1:
            split_sequences(model, mesh.get_group("context"))
        _shard(model, blocks, mesh)
    return model


def build(
    make: Callable[[], LanguageModel],
    mesh: DeviceMesh,
    config: DistributedConfig,
    device: torch.device,
    seed: int,
) -> LanguageModel:
    """Builds a model on the ranks of `mesh`, as `parallelize` does of a model that is there.

    `make` returns a model without values. Its parameters get the values that one process draws from
    the seed, to the bit, and no rank ever has more of them than its shards and one whole tensor.
    """
    with _without_values():
        model = make()
    parallelize(model, mesh, config)
    model._apply(
        lambda tensor: (
            torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
        )
    )
    if model.config.tied:
        model.head.weight = model.embed.weight
    init(model, seed, write=_write_shard, whole=_whole)
    return model


@contextmanager
def _without_values() -> Iterator[None]:
    """Leaves parameters that are made in the block without memory, but for those of tables.

    Buffers, which are small and are computed when a module is made, have theirs. Modules that other
    threads make meanwhile are left alone: torch calls the hook for all of the process.
    """
    thread = threading.get_ident()

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        del name
        others = threading.get_ident() != thread
        if others or isinstance(module, Table) or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    # Its type says that a hook returns nothing, its documentation that it may return a parameter.
    hook = register_module_parameter_registration_hook(cast(Any, emptied))
    try:
        yield
    finally:
        hook.remove()


def _write_shard(parameter: Tensor, values: Tensor) -> None:
    """Writes this rank's part of whole values, without asking other ranks."""
    if isinstance(parameter, DTensor):
        shard = distribute_tensor(
            values, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        parameter = parameter.to_local()
        values = shard.to_local()
    parameter.copy_(values)


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """Makes a module's parameters whole in the block; afterwards this rank has its parts of them.

    What the block does not set is undefined.
    """
    sharded = dict(module.named_parameters())
    for name, parameter in sharded.items():
        whole = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
        _replace_parameter(module, name, whole)
    try:
        yield
        values = dict(module.named_parameters())
    finally:
        for name, parameter in sharded.items():
            _replace_parameter(module, name, parameter)
    for name, parameter in sharded.items():
        _write_shard(parameter, values[name])


def _replace_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Sets a parameter by its dotted name, without the hooks of a registration."""
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = parameter


def _blocks(model: LanguageModel) -> list[Block]:
    """Returns the blocks of the model and those of MTP."""
    drafting = [cast(MTP, module).block for module in model.mtp]
    return [cast(Block, block) for block in (*model.blocks, *drafting)]


def _checkpoint(block: Block, selective: bool) -> None:
    """Makes backward compute the block again instead of storing what is in it.

    Its hooks run once: FSDP's, which gather its parameters, are outside.
    """
    forward = block.forward
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)

    def run(values: Tensor, x: Streams, ctx: Context) -> Any:
        del values
        return forward(x, ctx)

    def recomputed(x: Streams, ctx: Context) -> Any:
        if not torch.is_grad_enabled():
            return forward(x, ctx)
        if ctx.rows is not None:
            # They are looked up once: that may be an exchange between ranks.
            rows = ctx.rows.wait()
            ctx = replace(ctx, rows=Handle(lambda: rows))
        # A tensor among the arguments tells the device whose random numbers are drawn again.
        return checkpoint(run, x.values, x, ctx, **options)

    block.forward = recomputed  # type: ignore[method-assign]


def _policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Decides for one operator: its result is stored if it is in STORED, else computed again."""
    del ctx, args, kwargs
    stored = operator in STORED
    return CheckpointPolicy.MUST_SAVE if stored else CheckpointPolicy.PREFER_RECOMPUTE


def _shard(model: LanguageModel, blocks: Sequence[Block], mesh: DeviceMesh) -> None:
    """Shards parameters by FSDP2, or by HSDP where there are replicas.

    Split experts are sharded over the ranks of a replica that have the same ones, all else over all
    ranks of a replica.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    replicas, _, _, experts_over = mesh.shape
    ignored = {
        p for module in model.modules() if isinstance(module, Table) for p in module.parameters()
    }
    mixtures = [block.ffn for block in blocks if isinstance(block.ffn, MoE)]
    if experts_over > 1:
        # Split and sharding need meshes of one root.
        ranks = mesh.mesh.reshape(replicas, -1, experts_over)
        sparse = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("replicate", "copy", "expert"))
        # The norm of gradients is summed over both at once.
        sparse["copy", "expert"]._flatten()
        copies = sparse["replicate", "copy"] if replicas > 1 else sparse["copy"]
        for mixture in mixtures:
            _split_experts(mixture, sparse["expert"])
            if copies.size() > 1:
                fully_shard(mixture.experts, mesh=copies, mp_policy=policy)
            else:
                ignored |= set(mixture.experts.parameters())
    dense = DeviceMesh(
        mesh.device_type, mesh.mesh.reshape(replicas, -1), mesh_dim_names=("replicate", "rank")
    )
    dense = dense if replicas > 1 else dense["rank"]
    for block in blocks:
        fully_shard(block, mesh=dense, mp_policy=policy, ignored_params=ignored)
    fully_shard(model, mesh=dense, mp_policy=policy, ignored_params=ignored)
    register_fsdp_forward_method(model, "loss")


def average_over_replicas(model: nn.Module, now: bool) -> None:
    """Makes the next backward average gradients over replicas, or leave that to a later one.

    Of micro-batches only the last one needs it: the ranks of a replica add theirs until then.
    Without replicas it changes nothing.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(now, recurse=False)


def _split_experts(mixture: MoE, mesh: DeviceMesh) -> None:
    """Gives rank r of W the r-th range of E / W experts; an Exchange sends tokens to them."""
    experts = mixture.experts
    for name, parameter in list(experts.named_parameters()):
        # All ranks have the same values, or none yet.
        split = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(split))
    # Its hooks are FSDP's; the weights that it has are this rank's.
    with torch.device("meta"):
        local = Experts(
            experts.down.shape[0], experts.down.shape[2], experts.down.shape[1], experts.limit
        )
    forward = functools.partial(_apply_local, experts, local)
    experts.forward = forward  # type: ignore[method-assign]
    mixture.exchange = Exchange(mesh.get_group())


def _apply_local(
    experts: Experts, local: Experts, rows: Float[Tensor, "N D"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "N D"]:
    """Applies this rank's experts; `local` only says how."""
    weights = {
        name: weight.to_local() if isinstance(weight, DTensor) else weight
        for name, weight in experts.named_parameters()
    }
    return functional_call(local, weights, (rows, counts))


class Exchange:
    """Sends tokens to the ranks of their experts and returns the results; fits `MoE.exchange`.

    It counts the bytes that this rank sends to others.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = cast(dist.ProcessGroup, dist.group.WORLD if group is None else group)
        self.rank = dist.get_rank(self.group)
        self.bytes_sent = 0

    def start(self, rows: Tensor, out_sizes: list[int], in_sizes: list[int]) -> Tensor:
        """Starts to send out_sizes[r] rows to each rank r; the result is being filled."""
        count = len(rows) - out_sizes[self.rank]
        self.bytes_sent += count * rows.shape[1:].numel() * rows.itemsize
        return torch.ops._c10d_functional.all_to_all_single(
            rows.contiguous(), in_sizes, out_sizes, self.group.group_name
        )

    def __call__(
        self, rows: Float[Tensor, "N D"], counts: Int[Tensor, " E"], experts: Experts
    ) -> Callable[[], Float[Tensor, "N D"]]:
        """Starts to send `rows` to the experts of all ranks; call what it returns for the results.

        rows: tokens sorted by expert, counts[e] of them for expert e of all E. The experts' outputs
        are in the same order. `experts` are this rank's.
        """
        ranks = dist.get_world_size(self.group)
        sent = counts.view(ranks, -1)  # [W, E / W]
        equal = [1] * ranks
        due = _finished(self.start(sent, equal, equal))
        out_sizes, in_sizes = torch.stack([sent.sum(1), due.sum(1)]).tolist()
        to_experts = _Transfer(self, out_sizes, in_sizes, float(ranks))
        on_the_way = _Start.apply(rows, to_experts)

        def results() -> Tensor:
            arrived = _Wait.apply(on_the_way, to_experts)
            expert = torch.arange(due.shape[1], device=rows.device).repeat(ranks)
            # Tokens arrive by rank, experts need them by expert.
            order = expert.repeat_interleave(due.flatten()).argsort(stable=True)
            made = experts(arrived[order], due.sum(0))
            made = torch.empty_like(made).index_copy(0, order, made)
            back = _Transfer(self, in_sizes, out_sizes, 1.0 / ranks)
            return _Wait.apply(_Start.apply(made, back), back)

        return results


def _finished(on_the_way: Tensor) -> Tensor:
    """Waits for a collective and returns its result."""
    return torch.ops._c10d_functional.wait_tensor(on_the_way)


class _Transfer:
    """An all-to-all of rows by rank and, backward, that of their gradients.

    `scale` turns an expert's gradients, which all ranks add to, into their mean.
    """

    def __init__(
        self, exchange: Exchange, out_sizes: list[int], in_sizes: list[int], scale: float
    ) -> None:
        self.exchange = exchange
        self.out_sizes = out_sizes
        self.in_sizes = in_sizes
        self.scale = scale
        self.gradient: Tensor | None = None  # on the way back


class _Start(torch.autograd.Function):
    """Starts a transfer; its backward waits for the gradients, which `_Wait` has sent back."""

    @staticmethod
    def forward(ctx, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.exchange.start(rows, transfer.out_sizes, transfer.in_sizes)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        on_the_way = ctx.transfer.gradient
        ctx.transfer.gradient = None
        return _finished(on_the_way), None


class _Wait(torch.autograd.Function):
    """Waits for a transfer; its backward starts to send the gradients back."""

    @staticmethod
    def forward(ctx, on_the_way: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return _finished(on_the_way)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.gradient = transfer.exchange.start(
            grads[0] * transfer.scale, transfer.in_sizes, transfer.out_sizes
        )
        # Only of the right shape: _Start takes the gradients from the transfer.
        return grads[0], None
