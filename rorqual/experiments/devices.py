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

Figures of devices are in hardware.py. The device `cpu` is this machine: the speed of its float32
products and of its memory is measured on first use.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from rorqual import doctor
from rorqual.costs import train_flops_per_token
from rorqual.hardware import DEVICES, Device, fastest, product_flops
from rorqual.hints import choose
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig
from rorqual.train.config import TrainConfig
from rorqual.train.footprint import FLOAT, Bytes, bytes_by_role, meta_model, touched_rows
from rorqual.train.optim import Role, roles

ROUNDS = 5  # Newton-Schulz iterations of Muon
# Up to this many parameters a model is planned for this machine, unless another is named.
SMALL = 100_000_000


@functools.cache
def this_machine() -> Device:
    """Measures this machine's cores, as torch uses them, in half a second.

    Its memory counts both as the device's own and as the host's.
    """
    # The copied tensor is larger than the caches.
    source = torch.zeros(1 << 23)
    target = torch.empty_like(source)
    flops = product_flops(torch.float32)
    bandwidth = 2 * source.nbytes / fastest(lambda: target.copy_(source))
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
    model = meta_model(config)
    state_bytes = bytes_by_role(model, machine.optimizer, machine.step_tokens)
    rows = state_bytes.get("rows", Bytes(0, 0, 0, 0))
    hosted = sum(rows[1:]) if machine.placement == "host" else 0
    bytes_of_state = (sum(sum(one[1:]) for one in state_bytes.values()) - hosted) / count
    peak = device.flops * machine.utilisation * count
    compute = train_flops_per_token(config, context) * machine.step_tokens / peak
    moved = sum(
        2 * (one.weights + one.state) + one.gradients
        for role, one in state_bytes.items()
        if role != "rows"
    )
    update = moved / (device.bandwidth * count) + (
        _muon_products(model) / peak if machine.optimizer == "muon" else 0.0
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


def _muon_products(model: LanguageModel) -> float:
    """Counts the FLOPs of Muon's products over all matrices."""
    role = roles(model)
    products = 0.0
    for name, parameter in model.named_parameters():
        if role[name] == "matrix":
            *stack, tall, width = parameter.shape
            # Gate and up are two matrices side by side.
            halves = 2 if name.endswith("gate_up") else 1
            small, large = sorted((tall, width // halves))
            products += math.prod(stack) * halves * ROUNDS * (4 * small**2 * large + 2 * small**3)
    return products


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
    return (2 * read + 7 * FLOAT * touched_rows(config, machine.step_tokens) * width) / (
        device.bandwidth * machine.devices
    )
