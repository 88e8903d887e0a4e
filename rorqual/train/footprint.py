"""Counts what a training run holds and sends, from its configuration alone.

The model is built on the meta device: its tensors have shapes and no values.

    weights 4 P, gradients 4 P                                      float32, as in the trainer
    state   rows 8 P + 4 per row    matrices 4 P (Muon), 8 P (AdamW)    others 8 P
    ranks   each of the F that share parameters holds 1 / F of what is not rows, and two blocks
            while they run; each of all R holds 1 / R of the rows, or all of them where they are
            replicated. What is sent is `rorqual.plan_costs`'

Activations are an estimate: what autograd saves of the inputs and outputs of linear maps, norms,
experts and residual streams, in float32, for the tokens of one micro-batch. docs/log.md compares it
with what is saved.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rorqual.costs import Costs, costs, sizes, train_flops_per_token
from rorqual.distributed_config import refuse_layout
from rorqual.layers.experts import Experts
from rorqual.layers.hyper import Connection
from rorqual.layers.moe import MoE
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig, row_totals
from rorqual.plan_costs import Cluster, Layout, bytes_sent
from rorqual.train.config import TrainConfig
from rorqual.train.optim import Role, roles

FLOAT = 4  # bytes; parameters, gradients and moments are float32
INDEX = 8  # bytes of a row's id

# Operations that give values alone: their result has the shape of the tensor they are called on.
FILLING = (
    torch.Tensor.mul,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.fill_,
    torch.Tensor.zero_,
    torch.Tensor.copy_,
    torch.Tensor.__setitem__,
)


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters without values.

    On the meta device they have none, and filling them would load the compiler.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return arguments["tensor"] if "tensor" in arguments else args[0]
        if func in FILLING:
            return args[0]
        if func is torch.eye:
            return torch.empty(args[0], args[-1])
        if func in (torch.randn, torch.rand):
            return torch.empty(*args, **arguments)
        return func(*args, **arguments)


def meta_model(config: ModelConfig) -> LanguageModel:
    """Builds a model without values, whatever its size."""
    with torch.device("meta"), _Unfilled():
        return LanguageModel(config, seed=None)


class Bytes(NamedTuple):
    """Parameters of one role and their bytes, over all devices."""

    parameters: int  # their number
    weights: int
    gradients: int  # for rows: at most those that a step reads
    state: int  # of the optimizer


def bytes_by_role(
    model: LanguageModel, optimizer: Literal["adamw", "muon"], step_tokens: int
) -> dict[Role, Bytes]:
    """Returns the bytes of parameters, gradients and optimizer state, by role."""
    role = roles(model)
    numbers = Counter[Role]()
    tensors = Counter[Role]()
    for name, parameter in model.named_parameters():
        numbers[role[name]] += parameter.numel()
        tensors[role[name]] += 1
    by_role: dict[Role, Bytes] = {}
    for each, number in numbers.items():
        weights = FLOAT * number
        if each == "rows":
            assert model.config.engram is not None
            width = model.config.engram.head_dim
            # The last term counts how often each row was updated.
            state = 2 * weights + 4 * (number // width)
            touched = touched_rows(model.config, step_tokens)
            by_role[each] = Bytes(number, weights, touched * (FLOAT * width + INDEX), state)
        elif each == "matrix" and optimizer == "muon":
            by_role[each] = Bytes(number, weights, weights, weights)
        else:
            by_role[each] = Bytes(number, weights, weights, 2 * weights + FLOAT * tensors[each])
    return by_role


def touched_rows(config: ModelConfig, tokens: int) -> int:
    """Returns the most rows that so many tokens can read, over all tables."""
    if config.engram is None:
        return 0
    read = tokens * config.engram.rows_per_token
    return sum(min(read, rows) for rows in row_totals(config.engram))


class Footprint(NamedTuple):
    """What a rank of a run holds, computes and sends."""

    shapes: list[tuple[str, tuple[int, ...], int, Role]]  # name, shape, tensors of them, role
    costs: Costs
    flops_per_step: int  # forward and backward, over all ranks
    tokens_per_step: int  # over all ranks
    ranks: int
    micro_batches: int  # of a rank, a step
    roles: dict[Role, Bytes]  # of one rank
    gathered: int  # bytes of two blocks and of what is outside of blocks, which a rank holds whole
    activations: int  # bytes, an estimate
    wire: dict[str, int]  # bytes that a rank sends in a step, by what they are
    placement: Literal["device", "host", "disk"]  # of rows, with their gradients and state

    @property
    def memory(self) -> int:
        """The bytes of a rank's device, all together."""
        by_role = sum(sum(each[1:]) for each in self.roles.values())
        return by_role - self.rows_elsewhere + self.gathered + self.activations

    @property
    def rows_elsewhere(self) -> int:
        """The bytes of rows in the host's memory or on its disk, which is the device's on a CPU."""
        if self.placement == "device" or "rows" not in self.roles:
            return 0
        return sum(self.roles["rows"][1:])


def footprint(config: TrainConfig, ranks: int = 1) -> Footprint:
    """Returns the footprint of a run on so many ranks.

    ValueError where the batch cannot be split over them.
    """
    if ranks < 1:
        raise ValueError(f"ranks: got {ranks}, expected at least 1")
    spread = config.distributed
    refuse_layout(config.model, spread, ranks)
    if spread.context > 1:
        raise ValueError(
            f"distributed.context: got {spread.context}, expected 1: what ranks send each other of "
            "a sequence is not counted yet"
        )
    if config.batch_size % ranks:
        raise ValueError(
            f"batch_size: got {config.batch_size}, expected a multiple of the {ranks} ranks"
        )
    model = meta_model(config.model)
    sequences = config.batch_size // ranks
    micro_batch_size = min(config.micro_batch_size or sequences, sequences)
    micro_batches = -(-sequences // micro_batch_size)
    tokens_per_step = config.batch_size * config.seq_len
    whole = bytes_by_role(model, config.optim.kind, tokens_per_step)
    shared = ranks // spread.replicate
    rows_shared = ranks if spread.rows == "shard" else 1
    counted = sizes(config.model)
    blocks = [
        block + experts // spread.expert
        for block, experts in zip(counted.blocks, counted.experts, strict=True)
    ]
    layout = Layout(
        expert=spread.expert,
        replicate=spread.replicate,
        sequences=micro_batch_size,
        micro_batches=micro_batches,
        seq_len=config.seq_len,
        recompute=spread.activation_checkpointing == "block",
        optimizer=config.optim.kind,
    )
    return Footprint(
        shapes=_grouped_shapes(model),
        costs=costs(config.model, config.seq_len),
        flops_per_step=train_flops_per_token(config.model, config.seq_len) * tokens_per_step,
        tokens_per_step=tokens_per_step,
        ranks=ranks,
        micro_batches=micro_batches,
        roles={
            role: Bytes(
                *(-(-number // (rows_shared if role == "rows" else shared)) for number in each)
            )
            for role, each in whole.items()
        },
        # What is outside of blocks stays through forward and backward, and so does its gradient.
        gathered=0
        if shared == 1
        else 2 * FLOAT * (max(blocks) + counted.embedding + counted.others),
        activations=_activations(model, layout),
        wire=_wire(config, layout, ranks),
        placement=config.placement,
    )


def _wire(config: TrainConfig, layout: Layout, ranks: int) -> dict[str, int]:
    """Returns the bytes that a rank sends in a step, by what they are."""
    if ranks == 1:
        return {}
    wire = bytes_sent(config.model, Cluster(devices=ranks), layout)
    if config.model.engram is not None and config.distributed.rows == "replicate":
        del wire["rows and their gradients"]
        tokens = config.batch_size // ranks * config.seq_len
        rows = touched_rows(config.model, tokens)
        size = FLOAT * config.model.engram.head_dim + INDEX
        wire["rows' gradients, gathered"] = rows * size * (ranks - 1)
    return {what: number for what, number in wire.items() if number}


def _grouped_shapes(model: LanguageModel) -> list[tuple[str, tuple[int, ...], int, Role]]:
    """Returns parameters with equal names but for their blocks' numbers, and equal shapes, once."""
    role = roles(model)
    groups: dict[tuple[str, tuple[int, ...], Role], list[int]] = {}
    for name, parameter in model.named_parameters():
        match = re.match(r"(blocks|mtp|tables)\.(\d+)\.(.*)", name)
        pattern = f"{match[1]}.*.{match[3]}" if match else name
        number = int(match[2]) if match else 0
        groups.setdefault((pattern, tuple(parameter.shape), role[name]), []).append(number)
    return [(name, shape, len(numbers), each) for (name, shape, each), numbers in groups.items()]


def _activations(model: LanguageModel, layout: Layout) -> int:
    """Estimates the bytes that autograd saves of a micro-batch.

    Blocks that are computed again save the streams they begin with, and one block is whole at a
    time.
    """
    config = model.config
    saved = sum(_saved_by(module, config) for module in model.modules())
    if layout.recompute:
        saved = saved // config.layers + config.layers * config.streams * config.dim
    # Ids, labels and positions do not count; of the head, one gradient of the hidden states does.
    return FLOAT * layout.tokens * (saved + 2 * config.dim)


def _saved_by(module: nn.Module, config: ModelConfig) -> int:
    """Estimates the numbers that autograd saves of a token in one module, without its children."""
    if isinstance(module, Experts):
        return 0
    if isinstance(module, MoE):
        # Each expert's input and output, its gate and up projection, and their product.
        return module.config.active * (2 * config.dim + 3 * module.config.width)
    if isinstance(module, Connection):
        # The streams before and after the site, and what its mixer reads of them.
        return 3 * config.streams * config.dim
    maps = [child for child in module.children() if isinstance(child, nn.Linear)]
    inputs = {child.in_features for child in maps}
    return sum(inputs) + sum(_outputs(maps, config))


def _outputs(maps: list[nn.Linear], config: ModelConfig) -> Iterator[int]:
    """Yields the widths of the outputs that a later operation saves; not those of the head."""
    for each in maps:
        if each.out_features != config.vocab_size:
            yield each.out_features
