"""Tests distributed.py: several gloo processes compute the numbers of one with all batches.

Run as a script, this file is the processes: two that train in many ways, four in many layouts.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from rorqual import checkpoint, distributed
from rorqual import config as configs
from rorqual.data.needle_config import NeedleConfig
from rorqual.data.needles import exams
from rorqual.distributed_config import DistributedConfig
from rorqual.layers.attention import GQAConfig, MLAConfig
from rorqual.layers.balance import BalanceConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.experts import Experts
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moe import MoE, MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.router import RouterConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.model_config import row_totals
from rorqual.presets import preset
from rorqual.sharded_rows import RowExchange, ShardedTable
from rorqual.tables import Table
from rorqual.train.config import DataConfig, OptimConfig, TrainConfig
from rorqual.train.optim import Optimizer
from rorqual.train.run_folder import losses
from rorqual.train.scores import needle_accuracy
from rorqual.train.step import TrainStep
from rorqual.train.trainer import train

sys.path.insert(0, str(Path(__file__).parent))
from processes import fork_ranks, run_script, write_text

CONFIG = ModelConfig(
    vocab_size=300,
    dim=16,
    layers=2,
    dense_width=24,
    mla=MLAConfig(heads=2, kv_lora_rank=8, nope_dim=8, rope_dim=4, value_dim=8),
    dsa=DSAConfig(heads=2, dim=8, top_k=4, warmup=2, shared=(1,), ties="topk"),
    moe=MoEConfig(routed=4, active=2, width=8, first_dense=1, balance=BalanceConfig(sequence=0.01)),
    engram=EngramConfig(layers=(1,), rows_per_head=(61, 61), heads=2, head_dim=4),
    hyper=HyperConfig(streams=2, iterations=4),
    mtp=MTPConfig(),
    init_std=0.1,
)


def few_keys(name: str) -> ModelConfig:
    """Returns a preset whose attention selects among a few tokens; caches round nothing."""
    config = replace(preset(name), vocab_size=300, dim=16, init_std=0.1)
    if config.csa is not None:
        csa = replace(config.csa, window=3, ratio=2, heavy_ratio=3, top_k=3, warmup=2)
        config = replace(config, csa=csa)
    if config.csa2 is not None:
        blocks = {"candidate_block": 2, "candidate_blocks": 2, "cache_formats": "none"}
        config = replace(config, csa2=replace(config.csa2, **blocks))
    if config.qsa is not None:
        config = replace(config, qsa=replace(config.qsa, block=2, budget=4))
    return config


MODELS = {
    "V3.2 and more": CONFIG,
    **{name: few_keys(name) for name in ("v4-tiny", "v4.1-tiny", "qwen4-tiny")},
}
# The first site's streams are all equal, so that the gradient of their mixer is only rounding
# error, while Adam's step is not.
ROUNDING = "blocks.0.attention_residual.mixer"
STEPS = 3
ROWS = 4
LENGTH = 10
CASES = {
    "whole": ("V3.2 and more", "adamw", False),
    "experts": ("V3.2 and more", "adamw", True),
    "muon": ("V3.2 and more", "muon", False),
    "muon_experts": ("V3.2 and more", "muon", True),
    "v4": ("v4-tiny", "adamw", False),
    "v4_experts": ("v4-tiny", "adamw", True),
    "v41": ("v4.1-tiny", "adamw", False),
    "v41_experts": ("v4.1-tiny", "adamw", True),
    "qwen4": ("qwen4-tiny", "adamw", False),
    "qwen4_experts": ("qwen4-tiny", "adamw", True),
}


def steps(
    of: str, kind: str, prepare: Callable | None = None
) -> tuple[LanguageModel, Optimizer, list[float]]:
    """Runs a few optimizer steps on this rank's share of the batch."""
    model = LanguageModel(MODELS[of], seed=2)
    if prepare is not None:
        prepare(model)
    # In deep models some gradients are small differences of large sums. Adam divides them by
    # themselves, so that only a large eps makes its step as exact as they are.
    eps = 1e-8 if model.config is CONFIG else 1e-3
    optimizer = Optimizer(model, OptimConfig(kind=kind, lr=1e-2, clip=0.5, eps=eps))
    norms = []
    share = ROWS // distributed.world()
    for step in range(STEPS):
        ids = torch.randint(
            0, 300, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step)
        )
        mine = ids[distributed.rank() * share : (distributed.rank() + 1) * share]
        optimizer.begin_step()
        model.loss(mine[:, :-1], mine[:, 1:]).total.backward()
        for name in optimizer.rows:
            distributed.mean_rows(optimizer.parameters[name])
        norms.append(float(optimizer.clip()))
        optimizer.step()
    return model, optimizer, norms


def config_of(folder: Path, name: str) -> TrainConfig:
    """Returns the config of a run by its name: "two", "one_bfloat16", "two_needles" and so on."""
    data = DataConfig(
        source=str(folder / "text.jsonl"), vocab_size=300, cache=str(folder / "cache")
    )
    whole = TrainConfig(
        model=CONFIG,
        data=data,
        folder=str(folder / name),
        steps=4,
        batch_size=4,
        seq_len=12,
        save_every=2,
    )
    # With streams whose coefficients are passed from block to block in float32.
    if name.endswith("bfloat16"):
        return replace(
            whole,
            dtype="bfloat16",
            model=replace(CONFIG, hyper=HyperConfig(kind="single_pass", streams=2)),
        )
    if name == "two_experts":
        return replace(whole, distributed=DistributedConfig(expert=2))
    if name.endswith("context"):
        # With Muon, whose matrices of experts and attention are sharded in different ways.
        layout = DistributedConfig(context=2 if name == "two_context" else 1)
        optim = OptimConfig(kind="muon", lr=1e-3)
        return replace(whole, model=DENSE, optim=optim, distributed=layout)
    if name.endswith("needles"):  # three batches of an exam, for two ranks
        needles = NeedleConfig(shortest=24, alone=1, grow=1, questions=5)
        return replace(
            whole, needles=needles, model=replace(CONFIG, vocab_size=needles.vocab_size), seq_len=24
        )
    return whole


def found_in(folder: Path) -> dict[str, float]:
    """Returns the last validation of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        k: v
        for line in lines
        for k, v in line.items()
        if k.startswith(("accuracy", "validation_loss"))
    }


def spread_as(layout: DistributedConfig) -> Callable[[LanguageModel], LanguageModel]:
    """Returns what parallelizes a model in this layout over all ranks."""
    mesh = distributed.make_mesh(layout, "cpu")
    return lambda model: distributed.parallelize(model, mesh, layout)


def bad_ids() -> None:
    """Gives one rank an id that no tokenizer has, which both ranks refuse."""
    model = spread_as(DistributedConfig())(LanguageModel(CONFIG))
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    ids[0, 3] = 300 * distributed.rank()
    with pytest.raises(ValueError, match="got id 300, expected one of the 300") as raised:
        model.loss(ids, ids)
    assert raised.value.__notes__ == ["raised on rank 1"]


# Layouts of four ranks. The axis `shard` has those that are left. Rows are sharded over all ranks.
LAYOUTS = {
    "fsdp": DistributedConfig(rows="replicate"),
    "fsdp_rows": DistributedConfig(),
    "hsdp": DistributedConfig(replicate=2),
    "experts": DistributedConfig(expert=4, activation_checkpointing="selective"),
    "experts_fsdp": DistributedConfig(expert=2),
    "experts_hsdp": DistributedConfig(replicate=2, expert=2, activation_checkpointing="block"),
    "context_fsdp": DistributedConfig(context=2),
    "context_experts": DistributedConfig(context=2, expert=2, activation_checkpointing="block"),
}
# All at once, on eight ranks.
EVERYTHING = DistributedConfig(
    replicate=2, context=2, expert=2, activation_checkpointing="selective"
)
DENSE = replace(
    CONFIG,
    dsa=None,
    moe=MoEConfig(
        routed=4,
        active=2,
        width=8,
        shared=1,
        first_dense=1,
        balance=BalanceConfig(sequence=0.01, communication=0.01, devices=2, z_loss=1e-3),
    ),
    # The slope of a gate reaches 500 where keys and queries are orthogonal: rounding errors grow.
    engram=replace(CONFIG.engram, end_of_document=True, dilation=1, gating="open"),
)
GROUPED = replace(
    DENSE,
    mla=None,
    gqa=GQAConfig(heads=2, kv_heads=1, head_dim=8, window=7, sinks=True),
)
TOKENS = 16


def spread_batch(step: int, parts: int, number: int) -> dict[str, torch.Tensor]:
    """Returns a part of a batch whose sequences have documents and different numbers of labels."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 300, (ROWS, TOKENS + 1), generator=generator)
    labels = ids[:, 1:].clone()
    for row in range(ROWS):
        labels[row, : 3 * row] = -100
    if step % 3 == 0:
        # The rank that has it has nothing to learn, and takes part in what the others do.
        labels[ROWS - 1] = -100
    starts = torch.rand(ROWS, TOKENS, generator=generator) < 0.15
    batch = {"ids": ids[:, :-1], "labels": labels, "document_ids": starts.long().cumsum(1)}
    return {name: value.chunk(parts)[number] for name, value in batch.items()}


def training(
    model_config: ModelConfig,
    layout: DistributedConfig | None,
    micro_batch_size: int | None = None,
    seed: int = 2,
) -> TrainStep:
    """Returns what trains a model on all ranks, or on this process alone.

    No token uses expert 3. Balance losses of micro-batches, as those of ranks, are weighted by
    their labels.
    """
    if layout is None:
        model = LanguageModel(model_config, seed=seed)
    else:
        model = build_on_all(model_config, layout, seed)
    for module in model.modules():
        if isinstance(module, MoE):
            module.router.e_score_correction_bias[3] = -100.0
    optim = OptimConfig(lr=1e-3, eps=1e-4, warmup=0)
    config = TrainConfig(
        model=model_config,
        optim=optim,
        steps=40,
        batch_size=ROWS,
        micro_batch_size=micro_batch_size,
        distributed=layout or DistributedConfig(),
    )
    return TrainStep(model, Optimizer(model, optim), config)


def part_of_batch(step: TrainStep, number: int) -> dict[str, torch.Tensor]:
    rank, parts = step.config.distributed.data_rank(distributed.rank(), distributed.world())
    return spread_batch(number, parts, rank)


def losses_of(step: TrainStep, first: int, last: int) -> list[float]:
    """Trains in these steps, and returns their losses."""
    losses = []
    for number in range(first, last + 1):
        result = step(part_of_batch(step, number), number)
        total = distributed.total(result.means["total"])
        losses.append(float(total) / distributed.world())
    return losses


def twenty_steps(
    model_config: ModelConfig, layout: DistributedConfig | None, micro_batch_size: int | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns the losses of 20 steps, and then the gradients of another batch by name."""
    step = training(model_config, layout, micro_batch_size)
    losses = losses_of(step, 1, 20)
    step.forward_backward(part_of_batch(step, 21), 21)
    gradients = {}
    for name, parameter in step.model.named_parameters():
        if name in step.optimizer.replicated_rows:
            distributed.mean_rows(parameter)
        grad = parameter.grad
        if name in step.optimizer.sharded_rows:
            table = step.optimizer.row_tables[name]
            local = torch.zeros_like(parameter) if grad is None else grad.to_dense()
            gradients[name] = table.whole(local).full_tensor()
            continue
        assert grad is not None, name
        whole = grad.full_tensor() if isinstance(grad, DTensor) else grad.to_dense()
        gradients[name] = whole
    return losses, gradients


def state_of(step: TrainStep) -> dict[str, torch.Tensor]:
    state = {f"model.{key}": value for key, value in step.model.state_dict().items()}
    return state | {f"optim.{key}": value for key, value in step.optimizer.state_dict().items()}


def assert_same_parts(ours: TrainStep, theirs: dict[str, torch.Tensor]) -> None:
    """AssertionError unless this rank's parts of the states are equal to the bit."""
    state = state_of(ours)
    assert state.keys() == theirs.keys()
    for name, tensor in state.items():
        mine, other = (
            one.to_local() if isinstance(one, DTensor) else one for one in (tensor, theirs[name])
        )
        assert torch.equal(mine, other), name


def resume(folder: Path) -> None:
    """Goes on from step 5 to the bit, also when one process has read and written it in between."""
    alone = dist.new_group([0])
    for name in ("experts_fsdp", "context_experts"):
        layout = LAYOUTS[name]
        step = training(DENSE, layout)
        losses_of(step, 1, 5)
        checkpoint.save_state(folder / name / "step5", state_of(step), {})
        five = {key: value.clone() for key, value in state_of(step).items()}
        losses = losses_of(step, 6, 10)
        if distributed.rank() == 0:
            one = training(DENSE, None, seed=8)
            state = state_of(one)
            checkpoint.load_state(folder / name / "step5", state, group=alone)
            checkpoint.save_state(folder / name / "alone", state, {}, group=alone)
        distributed.barrier()
        for source in ("step5", "alone"):
            again = training(DENSE, layout, seed=9)
            checkpoint.load_state(folder / name / source, state_of(again))
            assert_same_parts(again, five)
            assert losses_of(again, 6, 10) == losses
            assert_same_parts(again, state_of(step))


def one_of_four(folder: Path) -> None:
    """Runs one of four processes; rank 0 writes the losses and gradients to compare."""
    for name, layout in LAYOUTS.items():
        losses, gradients = twenty_steps(GROUPED if name == "context_fsdp" else DENSE, layout)
        if distributed.rank() == 0:
            torch.save((losses, gradients), folder / f"{name}.pt")
    model, optimizer, norms = steps("V3.2 and more", "muon", spread_as(LAYOUTS["hsdp"]))
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    state |= {f"optim.{key}": value for key, value in optimizer.state_dict().items()}
    checkpoint.save_state(folder / "muon", state, {"norms": norms})


def one_of_eight(folder: Path) -> None:
    """Runs one of eight processes, whose layout has all axes."""
    losses, gradients = twenty_steps(DENSE, EVERYTHING)
    if distributed.rank() == 0:
        torch.save((losses, gradients), folder / "everything.pt")


def reduced_bytes(step: TrainStep) -> int:
    """Returns the bytes that all-reduces of one forward and backward add up over ranks."""
    sizes = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: object, **named: object) -> object:
        sizes.append(tensor.nbytes)
        return all_reduce(tensor, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        step.forward_backward(part_of_batch(step, 1), 1)
    return sum(sizes)


def replicas(folder: Path) -> None:
    """Accumulates gradients on two replicas; they are sent once, after the last micro-batch."""
    layout = DistributedConfig(replicate=2)
    sent = [reduced_bytes(training(DENSE, layout, size)) for size in (None, 1)]
    gradients = sum(
        parameter.numel()
        for module in LanguageModel(DENSE).modules()
        if not isinstance(module, Table)
        for parameter in module.parameters(recurse=False)
    )
    # And a few numbers, such as counts of labels.
    assert all(4 * gradients <= one < 4 * gradients + 100 for one in sent), (sent, gradients)
    losses, gradients = twenty_steps(DENSE, layout, 1)
    if distributed.rank() == 0:
        torch.save((losses, gradients), folder / "replicas.pt")


def build_models(folder: Path) -> None:
    """Compares models that four ranks build, and weights that they load, with those of one process.

    They are equal to the bit, with shards of odd sizes and parameters that are tied.
    """
    tied = replace(CONFIG, tied=True, dim=20, vocab_size=301)
    single_pass = replace(CONFIG, hyper=HyperConfig(kind="single_pass", streams=2))
    layouts = [LAYOUTS[name] for name in ("experts_fsdp", "experts_hsdp", "fsdp")]
    for number, config in enumerate((*MODELS.values(), tied, single_pass)):
        layout = layouts[number % 3]
        expected = LanguageModel(config, seed=3)
        built = build_on_all(config, layout, 3)
        assert_same_weights(built, expected)
        ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
        loss = built.loss(ids[:, :-1], ids[:, 1:]).total
        torch.testing.assert_close(loss, expected.loss(ids[:, :-1], ids[:, 1:]).total)
        run = folder / str(number)
        checkpoint.save_model(run, built)
        other = build_on_all(config, layout, 4)
        if number % 2:
            state = {f"model.{key}": value for key, value in built.state_dict().items()}
            path = run / "checkpoints" / "step7"
            checkpoint.save_state(path, state, {})
        assert not checkpoint.load_weights(path if number % 2 else run, other)
        assert_same_weights(other, expected)


def build_on_all(config: ModelConfig, layout: DistributedConfig, seed: int) -> LanguageModel:
    tables = None
    if layout.rows == "shard" and config.engram is not None:
        exchange = RowExchange()
        tables = [
            ShardedTable(rows, config.engram.head_dim, exchange=exchange)
            for rows in row_totals(config.engram)
        ]
    return distributed.build(
        lambda: LanguageModel(config, seed=None, tables=tables),
        distributed.make_mesh(layout, "cpu"),
        layout,
        torch.device("cpu"),
        seed,
    )


def assert_same_weights(ours: LanguageModel, expected: LanguageModel) -> None:
    state = expected.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, tensor in ours.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, state[name]), name


def one_of_two(folder: Path) -> None:
    """Runs one of the two processes; rank 0 writes the results to compare."""
    for name, (of, kind, experts) in CASES.items():
        layout = DistributedConfig(expert=2 if experts else 1)
        model, optimizer, norms = steps(of, kind, spread_as(layout))
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        state |= {f"optim.{key}": value for key, value in optimizer.state_dict().items()}
        checkpoint.save_state(folder / name, state, {"norms": norms, "rank": distributed.rank()})
        for tensor in state.values():
            tensor.zero_()
        assert checkpoint.load_state(folder / name, state)["rank"] == distributed.rank()
        checkpoint.save_state(folder / f"{name}_again", state, {})
        checkpoint.save_model(folder / f"{name}_model", model)
    exchange(folder)
    uneven = LanguageModel(replace(CONFIG, moe=replace(CONFIG.moe, routed=5)))
    with pytest.raises(ValueError, match="got 2 ranks, expected a divisor of 5 experts"):
        spread_as(DistributedConfig(expert=2))(uneven)
    bad_ids()
    for name in ("two", "two_experts", "two_context", "two_bfloat16", "two_needles"):
        train(config_of(folder, name))
    with spoilt_third_step(rank=1):
        train(config_of(folder, "two_skips"))


@contextmanager
def spoilt_third_step(rank: int) -> Iterator[None]:
    """Makes the reported loss of the third step NaN on one rank, and nothing else."""
    forward_backward = TrainStep.forward_backward

    def spoilt(self, batch, step):
        losses, expert_counts = forward_backward(self, batch, step)
        if distributed.rank() == rank and step == 3:
            losses["loss"] = losses["loss"] * torch.nan
        return losses, expert_counts

    TrainStep.forward_backward = spoilt
    try:
        yield
    finally:
        TrainStep.forward_backward = forward_backward


def exchange(folder: Path) -> None:
    """Routes all tokens of rank 1 to experts of rank 0, and none to expert 3."""
    experts = Experts(4, 6, 5)
    torch.nn.init.normal_(experts.down, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(experts.gate_up, generator=torch.Generator().manual_seed(2))
    counts = torch.tensor([[3, 0, 2, 0], [1, 4, 0, 0]][distributed.rank()])
    rows = torch.randn(
        5, 6, generator=torch.Generator().manual_seed(distributed.rank())
    ).requires_grad_()
    expected = experts(rows, counts)
    mine = slice(2 * distributed.rank(), 2 * distributed.rank() + 2)
    ours = Experts(2, 6, 5)
    ours.gate_up.data, ours.down.data = (
        experts.gate_up[mine].detach().clone(),
        experts.down[mine].detach().clone(),
    )
    sender = distributed.Exchange()
    result = sender(rows, counts, ours)()
    torch.testing.assert_close(result, expected)
    weight = torch.arange(30.0).view(5, 6)
    (grad,) = torch.autograd.grad((expected * weight).sum(), rows, retain_graph=True)
    (result * weight).sum().backward()
    torch.testing.assert_close(rows.grad, grad)
    for name, parameter in experts.named_parameters():
        (both,) = torch.autograd.grad((expected * weight).sum(), parameter, retain_graph=True)
        both = distributed.total(both)[mine] / 2
        torch.testing.assert_close(dict(ours.named_parameters())[name].grad, both)
    # One rank sends 2 rows of 6 numbers, the other 5, there and back, forward and backward; and the
    # numbers of rows of two experts.
    assert sender.bytes_sent == 2 * (2 + 5) * 6 * 4 + 2 * 8
    (folder / f"exchanged{distributed.rank()}").touch()


PHASES = {
    "two": (2, one_of_two),
    "four": (4, one_of_four),
    "eight": (8, one_of_eight),
    "replicas": (2, replicas),
    "build": (4, build_models),
    "resume": (4, resume),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder with the results of the two processes."""
    folder = tmp_path_factory.mktemp("two")
    write_text(folder)
    run_script(__file__, folder, "two")
    return folder


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> Path:
    """The folder with the results of the four processes."""
    folder = tmp_path_factory.mktemp("four")
    run_script(__file__, folder, "four")
    return folder


@pytest.mark.slow
def test_four_ranks_build_and_load_the_model_of_one(tmp_path):
    run_script(__file__, tmp_path, "build")


@pytest.mark.slow
def test_four_ranks_resume_to_the_bit_and_read_what_one_process_wrote(tmp_path):
    """Experts are sharded over both of their axes, rows over all ranks."""
    run_script(__file__, tmp_path, "resume")


@pytest.mark.slow
def test_twenty_steps_of_four_ranks_are_those_of_one(layouts):
    """Compares losses and, after 20 steps, gradients.

    Loads are uneven: an expert has no tokens, and a rank has no labels in every third step.
    """
    alone = {}
    for name, layout in LAYOUTS.items():
        model = GROUPED if name == "context_fsdp" else DENSE
        size = ROWS // layout.data_rank(0, 4)[1]
        if (model, size) not in alone:
            alone[model, size] = twenty_steps(model, None, size)
        assert_same_steps(layouts / f"{name}.pt", *alone[model, size])


@pytest.mark.slow
def test_twenty_steps_of_eight_ranks_with_all_axes_are_those_of_one(tmp_path):
    run_script(__file__, tmp_path, "eight")
    size = ROWS // EVERYTHING.data_rank(0, 8)[1]
    assert_same_steps(tmp_path / "everything.pt", *twenty_steps(DENSE, None, size))


@pytest.mark.slow
def test_replicas_send_gradients_once_for_all_micro_batches(tmp_path):
    run_script(__file__, tmp_path, "replicas")
    assert_same_steps(tmp_path / "replicas.pt", *twenty_steps(DENSE, None, 1))


def assert_same_steps(
    path: Path, expected: list[float], gradients: dict[str, torch.Tensor]
) -> None:
    """AssertionError unless losses, and gradients after them, are those of one process."""
    assert not gradients["blocks.1.ffn.experts.down"][3].any()
    losses, ours = torch.load(path)
    assert losses == pytest.approx(expected, abs=1e-5), path
    assert ours.keys() == gradients.keys()
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for key, gradient in gradients.items():
        assert (ours[key] - gradient).norm() <= 1e-5 * norm, (path, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks_make_the_steps_of_one(folder, name):
    """Compares parameters, optimizer state and gradient norms.

    One process reads the checkpoint of two.
    """
    model, optimizer, norms = steps(*CASES[name][:2])
    assert_saved_steps(folder / name, model, optimizer, norms)
    assert_saved_steps(folder / f"{name}_again", model, optimizer, norms)
    whole = checkpoint.load_model(folder / f"{name}_model").state_dict()
    for key, value in model.state_dict().items():
        if ROUNDING not in key:
            torch.testing.assert_close(whole[key], value, rtol=1e-3, atol=2e-5)


def assert_saved_steps(
    path: Path, model: LanguageModel, optimizer: Optimizer, norms: list[float]
) -> None:
    """AssertionError unless a checkpoint of several ranks has the state of this process."""
    expected = {f"model.{key}": value for key, value in model.state_dict().items()}
    expected |= {f"optim.{key}": value for key, value in optimizer.state_dict().items()}
    item = {key: torch.zeros_like(value) for key, value in expected.items()}
    values = checkpoint.load_state(path, item)
    for key, value in expected.items():
        if ROUNDING not in key:
            torch.testing.assert_close(
                item[key], value, rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
            )
    assert values.get("norms", norms) == pytest.approx(norms, rel=1e-4)


@pytest.mark.slow
def test_muon_of_two_replicas_makes_the_steps_of_one_process(layouts):
    """Four ranks share the matrices of two replicas, of which each rank has half of the rows."""
    assert_saved_steps(layouts / "muon", *steps("V3.2 and more", "muon"))


@pytest.mark.slow
def test_exchange_carries_rows_and_gradients(folder):
    assert (folder / "exchanged0").exists()
    assert (folder / "exchanged1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "close"), [("", 1e-4), ("_context", 1e-4), ("_bfloat16", 1e-2)])
def test_training_on_two_ranks_is_training_on_one(folder, name, close):
    train(config_of(folder, f"one{name}"))
    one = folder / f"one{name}"
    two = folder / f"two{name}"
    assert losses(two) == pytest.approx(losses(one), rel=close)
    stored = found_in(one)
    assert stored
    assert found_in(two) == pytest.approx(stored, rel=close)
    assert {path.name for path in (two / "checkpoints" / "step4").glob("rank*")} == {
        "rank0.json",
        "rank1.json",
    }


@pytest.mark.slow
def test_ranks_skip_a_step_together(folder):
    """A NaN on one rank stops the update of both, as it would in one process."""
    with spoilt_third_step(rank=0):
        train(config_of(folder, "one_skips"))
    one, two = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one_skips", "two_skips")
    )
    for lines in (one, two):
        assert [line.get("skipped_steps") for line in lines if "lr" in line] == [None, None, 1, 1]
        assert ["loss" in line for line in lines if "lr" in line] == [True, True, False, True]
    assert losses(folder / "two_skips") == pytest.approx(losses(folder / "one_skips"), rel=1e-4)
    assert found_in(folder / "two_skips") == pytest.approx(found_in(folder / "one_skips"), rel=1e-4)


def ranks_of(launcher: int) -> dict[int, int]:
    """Maps ranks to processes, for those that this launcher started."""
    results = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            words = path.joinpath("environ").read_bytes().split(b"\0") if parent == launcher else []
        except OSError:
            continue
        results |= {
            int(word.removeprefix(b"RANK=")): int(path.name)
            for word in words
            if word.startswith(b"RANK=")
        }
    return results


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="a process is found by its environment"
)
def test_a_killed_rank_is_started_again_and_ends_with_the_same_losses(folder):
    """Compares a `rorqual launch` run with an undisturbed one.

    One rank of it gets kill -9 in the middle of the run.
    """
    config = replace(config_of(folder, "launched"), steps=12, save_every=4)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    for name in ("undisturbed", "killed"):
        configs.save(replace(config, folder=str(folder / name)), folder / name / "train.json")
        command = [
            sys.executable,
            "-m",
            "rorqual",
            "launch",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "1",
        ]
        command.append(str(folder / name))
        metrics = folder / name / "metrics.jsonl"
        with subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True
        ) as launcher:
            while name == "killed" and launcher.poll() is None:
                if metrics.is_file() and '"step": 6' in metrics.read_text():
                    os.kill(ranks_of(launcher.pid)[1], signal.SIGKILL)
                    break
                time.sleep(0.02)
            assert launcher.stderr is not None
            message = launcher.stderr.read()
        assert launcher.returncode == 0, message[-4000:]
        assert ("exitcode: -9" in message) == (name == "killed")
    assert len(losses(folder / "killed")) == 12
    assert losses(folder / "killed") == losses(folder / "undisturbed")
    ours, theirs = (
        checkpoint.load_model(folder / name).state_dict() for name in ("killed", "undisturbed")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_ranks_answer_the_exam_that_one_sets(folder):
    """Each rank draws its own training questions.

    The held-out questions are the same three batches, shared by two ranks.
    """
    config = config_of(folder, "two_needles")
    model = checkpoint.load_model(Path(config.folder)).eval()
    expected = needle_accuracy(
        model, exams(config.needles, config.batch_size, config.seq_len), torch.float32
    )
    result = found_in(Path(config.folder))
    assert len(result) > 10
    assert {name: value for name, value in expected.items() if name in result} == pytest.approx(
        result
    )


@pytest.mark.slow
def test_training_with_split_experts_is_training_with_whole_ones(folder):
    assert losses(folder / "two_experts") == pytest.approx(losses(folder / "two"), rel=1e-4)
    sent = [
        [
            line["bytes_exchanged"]
            for line in map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
            if "lr" in line
        ]
        for name in ("two", "two_experts")
    ]
    # Rows alone, and tokens besides.
    assert all(tokens > rows > 0 for rows, tokens in zip(*sent, strict=True))
    ours, theirs = (
        checkpoint.load_model(folder / name).state_dict() for name in ("two_experts", "two")
    )
    for name, tensor in theirs.items():
        if ROUNDING not in name:
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5)


NOISY = replace(CONFIG.moe, router=RouterConfig(noise=0.3))


@pytest.mark.parametrize("kind", ["block", "selective"])
@pytest.mark.parametrize("change", [{"moe": NOISY}, {"dsa": None, "moe": DENSE.moe}])
def test_recomputed_activations_change_no_bit(kind, change):
    """Noise of the router is drawn again alike; counts of experts and rows do not double."""
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for layout in (
        DistributedConfig(),
        DistributedConfig(activation_checkpointing=kind),
    ):
        model = LanguageModel(replace(CONFIG, **change), seed=1)
        distributed.parallelize(model, None, layout)
        torch.manual_seed(5)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((loss, gradients, torch.get_rng_state()))
    (loss, gradients, state), (again, ours, state_again) = results
    assert torch.equal(loss.total, again.total)
    assert torch.equal(loss.counts, again.counts)
    assert torch.equal(state, state_again)
    for name, gradient in gradients.items():
        assert (gradient is None) == (ours[name] is None), name
        assert gradient is None or torch.equal(gradient, ours[name]), name


def test_selective_checkpointing_stores_products_and_recomputes_the_rest():
    """Counts operators of a step; a block that is recomputed repeats its products, too."""
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    counts = {}
    for kind in ("none", "selective", "block"):
        model = LanguageModel(DENSE, seed=1)
        layout = DistributedConfig(activation_checkpointing=kind)
        distributed.parallelize(model, None, layout)
        with Counted() as counted:
            model.loss(ids[:, :-1], ids[:, 1:]).total.backward()
        counts[kind] = counted
    assert counts["none"].products == counts["selective"].products < counts["block"].products
    assert counts["none"].others < min(counts["selective"].others, counts["block"].others)


class Counted(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in distributed.STORED:
            self.products += 1
        else:
            self.others += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.compiled
@pytest.mark.slow
def test_compiled_blocks_compute_the_same(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call: compiled(call, backend="aot_eager"))
    config = replace(
        DENSE,
        layers=1,
        mtp=None,
        moe=replace(DENSE.moe, first_dense=0),
        engram=replace(DENSE.engram, layers=(0,)),
    )
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for kind in ("none", "block"):
        model = LanguageModel(config, seed=1)
        distributed.parallelize(model, None, DistributedConfig(compile=kind))
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.total.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (expected, gradients), (loss, ours) = results
    torch.testing.assert_close(loss.total, expected.total)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, msg=name, rtol=1e-4, atol=1e-6)


def test_a_module_that_another_thread_makes_meanwhile_has_its_values():
    """Only those of the model that is built are without memory at first."""
    others = []

    def make() -> LanguageModel:
        thread = threading.Thread(target=lambda: others.append(torch.nn.Linear(2, 2)))
        thread.start()
        thread.join()
        return LanguageModel(CONFIG, seed=None)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layout = DistributedConfig(rows="replicate")
        mesh = distributed.make_mesh(layout, "cpu")
        model = distributed.build(make, mesh, layout, torch.device("cpu"), seed=2)
        assert_same_weights(model, LanguageModel(CONFIG, seed=2))
    finally:
        dist.destroy_process_group()
    assert not others[0].weight.is_meta


def test_alone_nothing_is_exchanged():
    assert (distributed.rank(), distributed.world()) == (0, 1)
    tensor = torch.ones(3)
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    assert distributed.total(tensor) is tensor
    assert distributed.first(lambda: 5) == 5
    distributed.mean_rows(parameter)
    assert parameter.grad is None
    assert not distributed.join(torch.device("cpu"))
    distributed.leave()


if __name__ == "__main__":
    count, rank_work = PHASES[sys.argv[2]]
    fork_ranks(count, lambda: rank_work(Path(sys.argv[1])))
