"""Estimates the bytes and the seconds of one training step on given devices.

These are estimates from published figures, not measurements; bytes are given by parameter role.

    weights 4 P, gradients 4 P                                      float32, as in the trainer
    state   rows 8 P + 4 per row    matrices 4 P (Muon), 8 P (AdamW)    others 8 P
    compute = 3 (FLOPs + 2 M) tokens / (devices peak utilisation)   backward is two forward passes
    update  = bytes of the state, read and written / (devices bandwidth), and Muon's products
    rows    = (8 tokens R W + 28 distinct W) / (devices bandwidth)  lookup, sum, update; all tables
            = 4 tokens R W / (devices link), in both directions at once: tables in the host's memory
    step    = compute + update + rows
            = max(compute, rows) + update: tables in the host's memory, read behind the compute

M weights of MTP's modules multiply a token, the shared head's in each of them; their attention is
left out. Each block with Engram reads R rows of width W per token, and a step reads at most
tokens x R distinct rows of a table; other rows have neither gradient nor update. Everything is
spread evenly over the devices. Activations, communication between devices and the allocator's
losses are not included.

Published peaks, bfloat16 with sums in float32 and without sparsity (half of what a sheet gives with
it). NVIDIA's data sheets of A100 (80GB SXM, 2021), H100 (SXM, 2023), H200 (SXM, 2024) and HGX B200
(2024), its Ada architecture paper for the RTX 4090 (2022); AMD's data sheet of the MI300X (2023):
304 units x 2048 x 2.1 GHz. `link` is PCIe x16, one direction: generation 4 for the A100 and the
RTX 4090, 5 for the others, including the B200, as its usual hosts have it. The device `cpu` is this
machine: the speed of its float32 products and of its memory is measured on first use.
"""

import functools
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from rorqual import doctor
from rorqual.costs import costs
from rorqual.hints import choose
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig, row_totals
from rorqual.train.config import TrainConfig
from rorqual.train.optim import Role, roles

FLOAT = 4  # bytes; parameters, gradients and moments are float32
ROUNDS = 5  # Newton-Schulz iterations of Muon


class Device(NamedTuple):
    """Published figures of one device."""

    flops: float  # per second, bfloat16 products, without sparsity
    memory: float  # bytes
    bandwidth: float  # bytes per second, of its own memory
    link: float  # bytes per second, from the host's memory


DEVICES = {
    "a100": Device(312e12, 80e9, 2.039e12, 32e9),
    "h100": Device(989.4e12, 80e9, 3.35e12, 64e9),
    "h200": Device(989.4e12, 141e9, 4.8e12, 64e9),
    "b200": Device(2250e12, 180e9, 8.0e12, 64e9),
    "mi300x": Device(1307.4e12, 192e9, 5.3e12, 64e9),
    "rtx4090": Device(165.2e12, 24e9, 1.008e12, 32e9),
}
# Up to this many parameters a model is planned for this machine, unless another is named.
SMALL = 100_000_000


@functools.cache
def this_machine() -> Device:
    """Measures this machine's cores, as torch uses them, in half a second.

    Its memory counts both as the device's own and as the host's.
    """

    def best(work: Callable[[], object]) -> float:
        """Returns the seconds of the fastest of several calls.

        Other programs disturb it least.
        """
        spans = []
        for _ in range(9):
            began = time.perf_counter()
            work()
            spans.append(time.perf_counter() - began)
        return min(spans)

    size = 512
    left = torch.randn(size, size)
    right = torch.randn(size, size)
    # The copied tensor is larger than the caches.
    source = torch.zeros(1 << 23)
    target = torch.empty_like(source)
    flops = 2 * size**3 / best(lambda: left @ right)
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    return Device(flops, doctor.memory() or math.inf, bandwidth, bandwidth)


def device_of(name: str) -> Device:
    """Returns the figures of a device, by its name in DEVICES, or `cpu`."""
    return this_machine() if name == "cpu" else DEVICES[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The devices that a model is trained on, and how they are used."""

    device: str = "h100"  # one of DEVICES, or cpu: this machine
    devices: int = 8
    utilisation: float = 0.4  # share of the peak that products reach; measure your own
    step_tokens: int = 1 << 20  # tokens per update, over all devices
    optimizer: Literal["adamw", "muon"] = "muon"  # of the blocks' matrices
    # placement of Engram's rows and of their moments
    placement: Literal["device", "host"] = "device"

    def __post_init__(self) -> None:
        choose("device", self.device, (*DEVICES, "cpu"))
        for name in ("devices", "step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not 0 < self.utilisation <= 1:
            raise ValueError(
                f"utilisation: got {self.utilisation}, "
                "expected a share of the peak, more than 0, at most 1"
            )


def usual_machine(parameters: float) -> Machine:
    """Returns the default machine for a model of this size: this machine, or eight H100s."""
    if parameters > SMALL:
        return Machine()
    trained = TrainConfig()
    return Machine(device="cpu", devices=1, step_tokens=trained.batch_size * trained.seq_len)


class Bytes(NamedTuple):
    """Parameters of one role and their bytes, over all devices."""

    parameters: int  # their number
    weights: int
    gradients: int  # for rows: at most those that a step reads
    state: int  # of the optimizer


class Estimate(NamedTuple):
    """Bytes and seconds of one training step of one model on one machine."""

    roles: dict[Role, Bytes]  # rows, matrix, decayed, plain
    device_bytes: int  # on each device, without activations
    host_bytes: int  # in the memory of all hosts together
    fits: bool  # whether device_bytes fit into the device's memory
    compute: float  # seconds: forward and backward products
    update: float  # seconds: the optimizer, rows not counted
    rows: float  # seconds: rows looked up, their gradients summed, their update
    step: float  # seconds, all together


def estimate(config: ModelConfig, machine: Machine, context: int = 4096) -> Estimate:
    """Estimates bytes and seconds of one training step.

    The utilisation is assumed, not measured.
    """
    device = device_of(machine.device)
    count = machine.devices
    sizes, tensors, products = _sizes(config)
    state_bytes = _bytes(config, machine, sizes, tensors)
    rows = state_bytes.get("rows", Bytes(0, 0, 0, 0))
    hosted = sum(rows[1:]) if machine.placement == "host" else 0
    bytes_of_state = (sum(sum(one[1:]) for one in state_bytes.values()) - hosted) / count
    peak = device.flops * machine.utilisation * count
    counted = costs(config, context)
    # The costs count the shared head once, although every MTP module multiplies by it.
    heads = config.vocab_size * config.dim * (config.mtp.depth - 1 if config.mtp is not None else 0)
    compute = (
        3
        * (counted.flops_per_token + 2 * (counted.mtp_activated + heads))
        * machine.step_tokens
        / peak
    )
    moved = sum(
        2 * (one.weights + one.state) + one.gradients
        for role, one in state_bytes.items()
        if role != "rows"
    )
    update = moved / (device.bandwidth * count) + (
        products / peak if machine.optimizer == "muon" else 0.0
    )
    looked_up = _row_seconds(config, machine)
    together = max(compute, looked_up) if machine.placement == "host" else compute + looked_up
    return Estimate(
        state_bytes,
        math.ceil(bytes_of_state),
        hosted,
        bytes_of_state <= device.memory,
        compute,
        update,
        looked_up,
        together + update,
    )


def _sizes(config: ModelConfig) -> tuple[Counter[Role], Counter[Role], float]:
    """Counts parameters and tensors by role, and the FLOPs of Muon's products over all matrices."""
    with torch.device("meta"), _Unfilled():
        model = LanguageModel(config, seed=None)
    role = roles(model)
    sizes = Counter[Role]()
    tensors = Counter[Role]()
    products = 0.0
    for name, parameter in model.named_parameters():
        sizes[role[name]] += parameter.numel()
        tensors[role[name]] += 1
        if role[name] == "matrix":
            *stack, tall, width = parameter.shape
            # Gate and up are two matrices side by side.
            halves = 2 if name.endswith("gate_up") else 1
            small, large = sorted((tall, width // halves))
            products += math.prod(stack) * halves * ROUNDS * (4 * small**2 * large + 2 * small**3)
    return sizes, tensors, products


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


def _bytes(
    config: ModelConfig, machine: Machine, sizes: Counter[Role], tensors: Counter[Role]
) -> dict[Role, Bytes]:
    by_role: dict[Role, Bytes] = {}
    for role, number in sizes.items():
        weights = FLOAT * number
        if role == "rows":
            assert config.engram is not None
            width = config.engram.head_dim
            # The last term counts how often each row was updated.
            state = 2 * weights + 4 * (number // width)
            by_role[role] = Bytes(
                number, weights, _touched(config, machine) * (FLOAT * width + 8), state
            )
        elif role == "matrix" and machine.optimizer == "muon":
            by_role[role] = Bytes(number, weights, weights, weights)
        else:
            by_role[role] = Bytes(number, weights, weights, 2 * weights + FLOAT * tensors[role])
    return by_role


def _touched(config: ModelConfig, machine: Machine) -> int:
    """Returns the most rows that one step can read, over all tables."""
    if config.engram is None:
        return 0
    read = machine.step_tokens * config.engram.rows_per_token
    return sum(min(read, rows) for rows in row_totals(config.engram))


def _row_seconds(config: ModelConfig, machine: Machine) -> float:
    """Estimates the seconds of lookups, of the rows' gradients and of their update.

    Each token's rows are fetched and their gradients returned; each distinct row and its moments
    are rewritten.
    """
    if config.engram is None:
        return 0.0
    device = device_of(machine.device)
    width = config.engram.head_dim
    read = (
        machine.step_tokens
        * config.engram.rows_per_token
        * len(config.engram.layers)
        * width
        * FLOAT
    )
    if machine.placement == "host":
        # Rows and gradients move at the same time, since the link has two directions.
        return read / (device.link * machine.devices)
    return (2 * read + 7 * FLOAT * _touched(config, machine) * width) / (
        device.bandwidth * machine.devices
    )
