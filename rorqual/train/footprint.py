"""Counts what a training run holds and sends, from its configuration alone.

The model is built on the meta device: its tensors have shapes and no values.

    weights 4 P, gradients 4 P                                      float32, as in the trainer
    state   rows 8 P + 4 per row    matrices 4 P (Muon), 8 P (AdamW)    others 8 P
    FSDP    each of R ranks holds 1 / R of what is not rows, and for the time of a block the whole
            block; a pass of a micro-batch gathers all parameters twice and reduces gradients once,
            4 P (R - 1) / R bytes each

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

from rorqual.costs import Costs, costs, train_flops_per_token
from rorqual.layers.experts import Experts
from rorqual.layers.hyper import Connection
from rorqual.layers.moe import MoE
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig, row_totals
from rorqual.train.config import TrainConfig
from rorqual.train.optim import Role, roles

FLOAT = 4  # bytes; parameters, gradients and moments are float32
INDEX = 8  # bytes of a row's id

# Operations that fill an existing tensor with values.
FILLING = (
    *(
        torch.Tensor.mul,
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        torch.Tensor.fill_,
        torch.Tensor.zero_,
    ),
    *(torch.Tensor.copy_, torch.Tensor.__setitem__),
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
    gathered: int  # bytes of the largest block, which a rank holds while it runs it
    activations: int  # bytes, an estimate
    wire: dict[str, int]  # bytes that a rank sends in a step, by what they are

    @property
    def memory(self) -> int:
        """The bytes of a rank, all together."""
        by_role = sum(sum(each[1:]) for each in self.roles.values())
        return by_role + self.gathered + self.activations


def footprint(config: TrainConfig, ranks: int = 1) -> Footprint:
    """Returns the footprint of a run on so many ranks.

    ValueError where the batch cannot be split over them.
    """
    if ranks < 1:
        raise ValueError(f"ranks: got {ranks}, expected at least 1")
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
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    return Footprint(
        shapes=_grouped_shapes(model),
        costs=costs(config.model, config.seq_len),
        flops_per_step=train_flops_per_token(config.model, config.seq_len) * tokens_per_step,
        tokens_per_step=tokens_per_step,
        ranks=ranks,
        micro_batches=micro_batches,
        roles={role: _of_rank(role, each, ranks) for role, each in whole.items()},
        gathered=0 if ranks == 1 else 2 * FLOAT * max(blocks),
        activations=_activations(model, micro_batch_size * config.seq_len),
        wire=_wire(config, whole, ranks, micro_batches),
    )


def _of_rank(role: Role, whole: Bytes, ranks: int) -> Bytes:
    """Returns a rank's share. Rows are whole on every rank."""
    if role == "rows":
        return whole
    return Bytes(*(-(-number // ranks) for number in whole))


def _wire(
    config: TrainConfig, whole: dict[Role, Bytes], ranks: int, micro_batches: int
) -> dict[str, int]:
    """Returns the bytes that a rank sends in a step, by what they are."""
    if ranks == 1:
        return {}
    dense = sum(each.weights for role, each in whole.items() if role != "rows")
    once = dense * (ranks - 1) // ranks
    wire = {
        "parameters, gathered": 2 * micro_batches * once,
        "gradients, reduced": micro_batches * once,
    }
    if config.model.engram is not None:
        tokens = config.batch_size // ranks * config.seq_len
        rows = touched_rows(config.model, tokens)
        size = FLOAT * config.model.engram.head_dim + INDEX
        wire["rows' gradients, gathered"] = rows * size * (ranks - 1)
    return wire


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


def _activations(model: LanguageModel, tokens: int) -> int:
    """Estimates the bytes that autograd saves of a micro-batch of so many tokens."""
    saved = sum(_saved_by(module, model.config) for module in model.modules())
    # Ids, labels and positions do not count; of the head, one gradient of the hidden states does.
    return FLOAT * tokens * (saved + 2 * model.config.dim)


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
