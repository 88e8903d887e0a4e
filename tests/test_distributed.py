"""Tests distributed.py: two gloo processes compute the numbers of one process with both batches.

Run as a script, this file is the two processes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorqual import checkpoint, distributed
from rorqual import config as configs
from rorqual.data.needle_config import NeedleConfig
from rorqual.data.needles import exams
from rorqual.layers.attention import MLAConfig
from rorqual.layers.balance import BalanceConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.experts import Experts
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.presets import preset
from rorqual.train.config import DataConfig, OptimConfig, TrainConfig
from rorqual.train.optim import Optimizer
from rorqual.train.run_folder import losses
from rorqual.train.scores import needle_accuracy
from rorqual.train.step import TrainStep
from rorqual.train.trainer import train

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


def one_of_two(folder: Path) -> None:
    """Runs one of the two processes; rank 0 writes the results to compare."""
    distributed.join(torch.device("cpu"))
    for name, (of, kind, experts) in CASES.items():
        model, optimizer, norms = steps(
            of, kind, lambda model, experts=experts: distributed.shard(model, experts=experts)
        )
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
        distributed.shard(uneven, experts=True)
    for name in ("two", "two_bfloat16", "two_needles"):
        train(config_of(folder, name))
    with spoilt_third_step(rank=1):
        train(config_of(folder, "two_skips"))
    distributed.leave()


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
    result = distributed.Exchange()(rows, counts, ours)
    torch.testing.assert_close(result, expected)
    weight = torch.arange(30.0).view(5, 6)
    (grad,) = torch.autograd.grad((expected * weight).sum(), rows, retain_graph=True)
    (result * weight).sum().backward()
    torch.testing.assert_close(rows.grad, grad)
    for name, parameter in experts.named_parameters():
        (both,) = torch.autograd.grad((expected * weight).sum(), parameter, retain_graph=True)
        both = distributed.total(both)[mine] / 2
        torch.testing.assert_close(dict(ours.named_parameters())[name].grad, both)
    (folder / f"exchanged{distributed.rank()}").touch()


def _end_with(work: Callable) -> None:
    """Exits without cleanup; a process that fails ends the other, which would wait for it."""
    try:
        work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def main(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
            }
            _end_with(lambda: one_of_two(folder))
        children.append(child)
    raise SystemExit(any(os.waitpid(child, 0)[1] for child in children))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder with the results of the two processes."""
    folder = tmp_path_factory.mktemp("two")
    lines = (
        json.dumps({"text": f"The {n}th whale met {n % 7} seals and {n % 5} boats."})
        for n in range(300)
    )
    (folder / "text.jsonl").write_text("\n".join(lines))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, start_new_session=True
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks_make_the_steps_of_one(folder, name):
    """Compares parameters, optimizer state and gradient norms.

    One process reads the checkpoint of two.
    """
    model, optimizer, norms = steps(*CASES[name][:2])
    expected = {f"model.{key}": value for key, value in model.state_dict().items()}
    expected |= {f"optim.{key}": value for key, value in optimizer.state_dict().items()}
    for written in (name, f"{name}_again"):
        item = {key: torch.zeros_like(value) for key, value in expected.items()}
        values = checkpoint.load_state(folder / written, item)
        for key, value in expected.items():
            if ROUNDING not in key:
                torch.testing.assert_close(
                    item[key], value, rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
                )
        assert values.get("norms", norms) == pytest.approx(norms, rel=1e-4)
    whole = checkpoint.load_model(folder / f"{name}_model").state_dict()
    for key, value in model.state_dict().items():
        if ROUNDING not in key:
            torch.testing.assert_close(whole[key], value, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_exchange_carries_rows_and_gradients(folder):
    assert (folder / "exchanged0").exists()
    assert (folder / "exchanged1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "close"), [("", 1e-4), ("_bfloat16", 1e-2)])
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
    main(Path(sys.argv[1]))
