"""Formulas for a training step on many devices: memory of a rank, bytes it sends, seconds.

With W ranks, F = W / replicate of them that share each parameter, E expert ranks, n tokens of a
rank in a micro-batch, M micro-batches, P_d parameters outside of rows and routed experts, P_e in
routed experts, D the width, K active experts, U distinct row ids that a rank looks up in a table:

    memory      weights 4 P, gradients 4 P, Adam 8 P or Muon 4 P, P = (P_d + P_e) / F
                rows: 12 w + 4 bytes of R / W rows, and the gradients that arrive, (4 w + 8) U
    gathered    4 (P_d (F - 1) / F + P_e / E (F - E) / F), twice a micro-batch (forward, backward)
                of blocks; once of what is outside of them, which stays until backward has ended
    reduced     the same once; with r replicas 2 (r - 1) / r of 4 (P_d + P_e) / F, once a step
    tokens      A n K D b (1 - 1 / E) for each block with experts, b bytes a number;
                A = 4 all-to-alls (there and back, forward and backward), 6 with recomputation
    rows        (1 - 1 / W) (4 U + 4 w U + 4 w U) + 16 W for each table
                (ids, rows, their gradients, counts)

    gather      latency ceil(log2 n) + S max((N - 1) / N / (L network), (n - 1) / n / link)
                S bytes on n ranks of N nodes, L of them in each
    all-to-all  latency + (n - 1) message + max(b (L - 1) / n / link, b (n - L) / n / network)
                b bytes of a rank
    forward     gather_root + gather_0 + sum_i max(work_i + late rows, gather_(i+1))
    backward    sum_i max(2 or 3 work_i, gather_(i-1) + reduce_(i+1)) + reduce_0 + reduce_root
                + rows' gradients that are still on their way
    work_i      products / (peak utilisation) + all-to-alls + mapping

The mapping of a site of the streams is reading them once more for post and comb, which its
sublayer's output waits for and its input does not: overlapped, it runs during the all-to-alls.
Rows are requested when the step begins, since ids follow from tokens: overlapped, block 1 waits
only for what blocks before it have not hidden. Figures of the network are assumptions. Imports no
torch; `experiments/cluster.py` replays recorded routing over the same pieces.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rorqual.costs import flops_by_block, sizes
from rorqual.model_config import ModelConfig, row_totals

FLOAT = 4  # bytes; parameters, gradients and moments are float32
ID = 4  # bytes of a row's id within the shard of its owner
COUNT = 16  # bytes that two ranks tell each other before rows follow


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Devices, and what connects them; seconds and bytes a second, one direction."""

    devices: int = 8
    per_node: int = 8
    flops: float = 989.4e12  # peak of a device: bfloat16 products, without sparsity
    utilisation: float = 0.4  # share of the peak that products reach; measure your own
    memory: float = 80e9
    bandwidth: float = 3.35e12  # of a device's memory
    link: float = 450e9  # from a device to others of its node
    network: float = 50e9  # from a device to other nodes
    latency: float = 10e-6  # of a collective, a hop
    message: float = 1e-6  # of each message of an all-to-all

    def __post_init__(self) -> None:
        for name in ("devices", "per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("flops", "memory", "bandwidth", "link", "network"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        for name in ("latency", "message"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0 seconds")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation: got {self.utilisation}, expected 0 < share <= 1")

    def gather_seconds(self, size: float, ranks: int, stride: int = 1) -> float:
        """Returns the time in which `ranks` ranks gather, or reduce and scatter, `size` bytes.

        They are `stride` ranks apart.
        """
        if ranks == 1:
            return 0.0
        inside = max(1, min(ranks, self.per_node // stride))
        nodes = -(-ranks // inside)
        across = (nodes - 1) / nodes / (inside * self.network)
        within = (ranks - 1) / ranks / self.link if inside > 1 else 0.0
        return self.latency * math.ceil(math.log2(ranks)) + size * max(across, within)

    def all_to_all_seconds(self, size: float, ranks: int) -> float:
        """Returns the time in which each of `ranks` neighbours sends `size` bytes to all."""
        if ranks == 1:
            return 0.0
        inside = min(ranks, self.per_node)
        within = size * (inside - 1) / ranks / self.link
        across = size * (ranks - inside) / ranks / self.network
        return self.latency + (ranks - 1) * self.message + max(within, across)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The way a batch and a model are spread over the devices."""

    expert: int = 1  # ranks that share the experts of a block; neighbours
    replicate: int = 1  # copies of all parameters but rows
    sequences: int = 1  # of a rank in a micro-batch
    micro_batches: int = 1  # of a rank in a step
    seq_len: int = 4096
    recompute: bool = True  # blocks are computed again in the backward pass
    number_bytes: int = 4  # of a number that is sent to an expert
    optimizer: Literal["adamw", "muon"] = "muon"  # of matrices
    placement: Literal["device", "host"] = "device"  # of rows
    overlap_rows: bool = True  # rows are fetched while blocks before them are computed
    overlap_mapping: bool = True  # the streams' mapping is computed during all-to-alls

    def __post_init__(self) -> None:
        for name in ("expert", "replicate", "sequences", "micro_batches", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.number_bytes not in (1, 2, 4):
            raise ValueError(f"number_bytes: got {self.number_bytes}, expected 1, 2 or 4")

    @property
    def tokens(self) -> int:
        """Tokens of a rank in a micro-batch."""
        return self.sequences * self.seq_len


class RoleBytes(NamedTuple):
    """Bytes of one role on one rank."""

    weights: int
    gradients: int
    state: int  # of the optimizer


class Memory(NamedTuple):
    """The bytes that one rank holds, by role, and in sum on the device and the host."""

    roles: dict[str, RoleBytes]  # rows, experts, embedding, rest
    gathered: int  # as a whole: the block that runs and the next, and what is outside of blocks
    activations: int  # an estimate
    device: int  # all of it that is on the device
    host: int  # rows in the host's memory

    def fits(self, cluster: Cluster) -> bool:
        """Returns whether a device of the cluster has enough memory."""
        return self.device <= cluster.memory


def check_layout(config: ModelConfig, cluster: Cluster, layout: Layout) -> int:
    """Returns F, the ranks that share a parameter; ValueError where the devices do not divide."""
    if cluster.devices % layout.replicate:
        raise ValueError(
            f"replicate: got {layout.replicate}, expected a divisor of {cluster.devices} devices"
        )
    shared = cluster.devices // layout.replicate
    if shared % layout.expert:
        raise ValueError(
            f"expert: got {layout.expert}, expected a divisor of the {shared} devices of a copy"
        )
    if layout.expert > 1 and config.moe is None:
        raise ValueError(f"expert: got {layout.expert} for a model without experts, expected 1")
    if config.moe is not None and config.moe.routed % layout.expert:
        raise ValueError(
            f"expert: got {layout.expert}, expected a divisor of {config.moe.routed} experts"
        )
    return shared


def distinct_ids(config: ModelConfig, layout: Layout, share: float = 1.0) -> list[int]:
    """Returns U of each table: distinct ids that a rank looks up in a micro-batch, at most.

    share: of the lookups that are distinct; 1 where it is not known.
    """
    if config.engram is None:
        return []
    lookups = layout.tokens * config.engram.rows_per_token
    return [min(math.ceil(share * lookups), rows) for rows in row_totals(config.engram)]


def memory(
    config: ModelConfig, cluster: Cluster, layout: Layout, distinct: list[int] | None = None
) -> Memory:
    """Returns the memory of a rank; `distinct` ids of each table, at most all lookups."""
    shared = check_layout(config, cluster, layout)
    counted = sizes(config)
    moment = FLOAT if layout.optimizer == "muon" else 2 * FLOAT
    expert_parameters = -(-sum(counted.experts) // shared)
    embedding = -(-counted.embedding // shared)
    rest = -(-(sum(counted.blocks) + counted.others) // shared)
    roles = {
        "experts": RoleBytes(
            FLOAT * expert_parameters, FLOAT * expert_parameters, moment * expert_parameters
        ),
        # Embeddings learn by Adam in either case.
        "embedding": RoleBytes(FLOAT * embedding, FLOAT * embedding, 2 * FLOAT * embedding),
        "rest": RoleBytes(FLOAT * rest, FLOAT * rest, moment * rest),
    }
    on_host = 0
    if config.engram is not None:
        width = config.engram.head_dim
        rows = sum(-(-total // cluster.devices) for total in row_totals(config.engram))
        ids = distinct_ids(config, layout) if distinct is None else distinct
        gradients = (FLOAT * width + 8) * sum(ids)
        row_bytes = RoleBytes(FLOAT * width * rows, gradients, (2 * FLOAT * width + 4) * rows)
        roles = {"rows": row_bytes} | roles
        on_host = row_bytes.weights + row_bytes.state if layout.placement == "host" else 0
    blocks = [
        FLOAT * (block + experts // layout.expert)
        for block, experts in zip(counted.blocks, counted.experts, strict=True)
    ]
    # What is outside of blocks is whole through forward and backward, and so is its gradient.
    root = 2 * FLOAT * (counted.embedding + counted.others)
    gathered = 2 * max(blocks) + root if shared > 1 else 0
    activations = _activations(config, layout)
    total = sum(map(sum, roles.values())) + gathered + activations - on_host
    return Memory(roles, gathered, activations, total, on_host)


def _activations(config: ModelConfig, layout: Layout) -> int:
    """Estimates what autograd saves: numbers of float32 for every token of a micro-batch.

    A block saves its streams six times over (before, after and mixed, at two sites), the inputs and
    outputs of its experts, and about eight vectors of its width around attention. Recomputed blocks
    save the streams they begin with, and one block is whole at a time.
    """
    block = 6 * config.streams * config.dim + 8 * config.dim
    if config.moe is not None:
        block += config.moe.active * (2 * config.dim + 3 * config.moe.width)
        block += 3 * config.moe.shared_hidden
    else:
        block += 3 * config.dense_width
    saved = config.layers * config.streams * config.dim + block
    numbers = saved if layout.recompute else config.layers * block
    return FLOAT * layout.tokens * numbers


def bytes_sent(
    config: ModelConfig, cluster: Cluster, layout: Layout, distinct: list[int] | None = None
) -> dict[str, int]:
    """Returns the bytes that a rank sends in a step, by kind."""
    shared = check_layout(config, cluster, layout)
    counted = sizes(config)
    dense = sum(counted.blocks)
    outside = counted.embedding + counted.others
    experts = sum(counted.experts)
    others = shared // layout.expert  # ranks that hold the same experts
    of_blocks = FLOAT * (
        dense * (shared - 1) // shared + experts // layout.expert * (others - 1) // others
    )
    of_root = FLOAT * (outside * (shared - 1) // shared)
    kinds = {
        "parameters, gathered": layout.micro_batches * (2 * of_blocks + of_root),
        "gradients, reduced": layout.micro_batches * (of_blocks + of_root),
        # Once a step: until its last micro-batch the ranks of a copy add theirs.
        "gradients of copies": 2
        * FLOAT
        * (layout.replicate - 1)
        * ((dense + outside + experts) // shared)
        // layout.replicate,
        "tokens to experts and back": layout.micro_batches * _token_bytes(config, layout),
    }
    if config.engram is not None:
        ids = distinct_ids(config, layout) if distinct is None else distinct
        each = ID + 2 * FLOAT * config.engram.head_dim
        looked_up = sum(ids) * each * (cluster.devices - 1) // cluster.devices
        counts = COUNT * (cluster.devices - 1) * len(ids)
        kinds["rows and their gradients"] = layout.micro_batches * (looked_up + counts)
    return kinds


def _token_bytes(config: ModelConfig, layout: Layout) -> int:
    """Returns the bytes that a rank sends to experts of other ranks in a micro-batch."""
    if config.moe is None:
        return 0
    blocks = sum(config.has_experts(index) for index in range(config.layers))
    times = 6 if layout.recompute else 4
    size = expert_bytes(config, layout)
    return blocks * times * size * (layout.expert - 1) // layout.expert


def expert_bytes(config: ModelConfig, layout: Layout) -> int:
    """Returns the bytes of all tokens of a rank, once for each of their experts."""
    assert config.moe is not None
    return layout.tokens * config.moe.active * config.dim * layout.number_bytes


class Block(NamedTuple):
    """Seconds of one block's pieces in a forward pass of a micro-batch, with even loads."""

    dense: float  # products, but for those of routed experts
    experts: float  # products of routed experts
    exchange: float  # one all-to-all of tokens; a pass has two
    mapping: float  # post and comb of the streams, at both sites
    gather: float  # parameters of the block, gathered; as long as their gradients are reduced
    gather_experts: float  # the same of its experts


class Pieces(NamedTuple):
    """Seconds of all pieces of a micro-batch, and of the update that follows the last one."""

    blocks: list[Block]
    root: float  # embedding, head and the reduction of the streams, gathered
    head: float  # products outside of blocks, forward
    rows: dict[int, tuple[float, float]]  # by block: rows fetched, their gradients sent
    copies: float  # gradients of copies, averaged
    update: float


def pieces(
    config: ModelConfig, cluster: Cluster, layout: Layout, distinct: list[int] | None = None
) -> Pieces:
    """Returns the seconds of a step's pieces."""
    shared = check_layout(config, cluster, layout)
    counted = sizes(config)
    flops, outside = flops_by_block(config, layout.seq_len)
    rate = layout.tokens / (cluster.flops * cluster.utilisation)
    exchange = 0.0
    if config.moe is not None:
        exchange = cluster.all_to_all_seconds(expert_bytes(config, layout), layout.expert)
    S = config.streams
    read = FLOAT * (S * config.dim + 2 * S * S) if config.hyper is not None else 0
    mapping = 2 * layout.tokens * read / cluster.bandwidth
    others = shared // layout.expert
    blocks = [
        Block(
            dense=(block.total - block.experts) * rate,
            experts=block.experts * rate,
            exchange=exchange if block.experts else 0.0,
            mapping=mapping,
            gather=cluster.gather_seconds(FLOAT * dense, shared),
            gather_experts=cluster.gather_seconds(
                FLOAT * experts / layout.expert, others if experts else 1, layout.expert
            ),
        )
        for block, dense, experts in zip(flops, counted.blocks, counted.experts, strict=False)
    ]
    root = cluster.gather_seconds(FLOAT * (counted.embedding + counted.others), shared)
    parameters = (sum(counted.blocks) + sum(counted.experts) + counted.embedding) / shared
    copies = 2 * cluster.gather_seconds(FLOAT * parameters, layout.replicate, shared)
    roles = memory(config, cluster, layout, distinct).roles
    moved = sum(
        2 * (one.weights + one.state) + one.gradients
        for role, one in roles.items()
        if role != "rows"
    )
    rows = _row_seconds(config, cluster, layout, distinct)
    return Pieces(blocks, root, outside * rate, rows, copies, moved / cluster.bandwidth)


def _row_seconds(
    config: ModelConfig, cluster: Cluster, layout: Layout, distinct: list[int] | None
) -> dict[int, tuple[float, float]]:
    """Returns the seconds of looking rows up on other ranks, and of their gradients, by block."""
    if config.engram is None:
        return {}
    ids = distinct_ids(config, layout) if distinct is None else distinct
    width = FLOAT * config.engram.head_dim
    ranks = cluster.devices
    counts = cluster.all_to_all_seconds(COUNT * ranks, ranks)
    seconds: dict[int, tuple[float, float]] = {}
    for layer, count in zip(config.engram.layers, ids, strict=True):
        there = cluster.all_to_all_seconds(ID * count, ranks)
        back = cluster.all_to_all_seconds(width * count, ranks)
        seconds[layer] = (counts + there + back, back)
    return seconds


class Step(NamedTuple):
    """Seconds of a step, all together and by what a rank waits for."""

    total: float
    compute: float  # products, with those of recomputation
    exchange: float  # all-to-alls of tokens, as far as nothing hides them
    mapping: float  # of the streams, likewise
    gather: float  # parameters and gradients, likewise
    rows: float  # rows and their gradients, likewise
    update: float


def work(block: Block, layout: Layout) -> tuple[float, float, float]:
    """Returns the seconds of a block's forward pass: products, all-to-alls, mapping.

    The mapping that runs during all-to-alls counts where it is longer.
    """
    exchange = 2 * block.exchange
    if layout.overlap_mapping:
        return block.dense + block.experts, exchange, max(0.0, block.mapping - exchange)
    return block.dense + block.experts, exchange, block.mapping


def step_seconds(
    config: ModelConfig, cluster: Cluster, layout: Layout, distinct: list[int] | None = None
) -> Step:
    """Returns the time of a step by the formulas of this file, with even loads."""
    each = pieces(config, cluster, layout, distinct)
    works = [work(block, layout) for block in each.blocks]
    gathers = [block.gather + block.gather_experts for block in each.blocks]
    products = 3 if layout.recompute else 2  # passes of products in a backward pass
    # All-to-alls and mappings have as much to do backward as forward.
    again = 2 if layout.recompute else 1
    forward = [sum(one) for one in works]
    backward = [products * one[0] + again * (one[1] + one[2]) for one in works]
    first = each.root + gathers[0]
    gathered, row_waits = _forward_waits(each.rows, forward, gathers, layout.overlap_rows)
    reduced, gradient_waits = _backward_waits(each.rows, backward, gathers, layout.overlap_rows)
    # The last gradients are reduced when nothing is left to hide them.
    waits = first + gathered + reduced + first
    rows = row_waits + gradient_waits
    compute = sum((1 + products) * one[0] for one in works) + 3 * each.head
    exchange = sum((1 + again) * one[1] for one in works)
    mapping = sum((1 + again) * one[2] for one in works)
    times = layout.micro_batches
    total = times * (compute + exchange + mapping + waits + rows) + each.copies + each.update
    return Step(
        total,
        times * compute,
        times * exchange,
        times * mapping,
        times * waits + each.copies,
        times * rows,
        each.update,
    )


def _forward_waits(
    rows: Mapping[int, tuple[float, float]],
    forward: list[float],
    gathers: list[float],
    overlapped: bool,
) -> tuple[float, float]:
    """Returns how long a forward pass waits for parameters, and for rows.

    Tables are fetched one after another from the step's beginning on, or each by its block.
    """
    arrival: dict[int, float] = {}
    for layer in sorted(rows):
        arrival[layer] = max(arrival.values(), default=0.0) + rows[layer][0]
    now = waited = waited_for_rows = 0.0
    for index, seconds in enumerate(forward):
        start = now
        if index in rows:
            late = max(0.0, arrival[index] - now) if overlapped else rows[index][0]
            waited_for_rows += late
            now += late
        now += seconds
        following = gathers[index + 1] if index + 1 < len(gathers) else 0.0
        late = max(0.0, start + following - now)
        waited += late
        now += late
    return waited, waited_for_rows


def _backward_waits(
    rows: Mapping[int, tuple[float, float]],
    backward: list[float],
    gathers: list[float],
    overlapped: bool,
) -> tuple[float, float]:
    """Returns how long a backward pass waits for parameters and gradients, and for rows' gradients.

    While a block runs, the parameters of the block before it are gathered, and the gradients of the
    block behind it are reduced. Rows' gradients are sent behind the blocks before theirs.
    """
    now = waited = waited_for_rows = sent = 0.0
    last = len(backward) - 1
    for index in range(last, -1, -1):
        moved = (gathers[index - 1] if index else 0.0) + (gathers[index + 1] if index < last else 0)
        late = max(0.0, moved - backward[index])
        waited += late
        now += backward[index] + late
        if index in rows:
            sent = max(sent, now) + rows[index][1]
            if not overlapped:
                waited_for_rows += rows[index][1]
                now = sent
    return waited, waited_for_rows + max(0.0, sent - now)
