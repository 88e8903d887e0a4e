"""Tests engine.py in OLMo-core's trainer: exact resume, hostile files, signals, thread failures."""

import gzip
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from olmo_core.train.callbacks import Callback

from rorqual import checkpoint
from rorqual.layers.dsa import DSAConfig
from rorqual.train.engine import (
    Loader,
    MetricsCallback,
    Module,
    ProfileCallback,
    SafetensorsCheckpointer,
    WeightsAndBiases,
    WriteFuture,
    fit,
)
from rorqual.train.metrics import MEASURED, MetricsWriter
from rorqual.train.run_folder import read_rollbacks
from rorqual.train.step import Diverged, TrainStep


class AtStep(Callback):
    """Calls a function after one step."""

    def __init__(self, step: int, what) -> None:
        super().__init__()
        self.when = step
        self.what = what

    def post_train_batch(self) -> None:
        if self.step == self.when:
            self.what(self.trainer)


@pytest.fixture
def run(small) -> Callable[..., int]:
    """Trains in a folder, as far as the callbacks let it; returns the last step."""

    def run(
        folder: Path, step: TrainStep, *, every: int = 100, keep: int = 2, stream=None, **callbacks
    ) -> int:
        folder.mkdir(exist_ok=True)
        # keep_every is a multiple of the default of save_every only.
        options = {"keep_every": callbacks.pop("keep_every", None)}
        options |= {"folder": str(folder), "save_every": every, "keep": keep}
        step.config = replace(step.config, **options)
        metrics = MetricsCallback(MetricsWriter(step.config))
        loader = Loader(stream or small.stream(), folder, small.config.vocab_size)
        return fit(step, loader, {"metrics": metrics, **callbacks})

    return run


def state_of(step: TrainStep) -> dict[str, torch.Tensor]:
    return Module(step).state_dict()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cancel(trainer) -> None:
    trainer.cancel_run("enough")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "half"), [("adamw", 10), ("muon", 3)])
def test_ten_steps_and_ten_more_are_twenty_to_the_last_bit(small, run, tmp_path, kind, half):
    """Compares parameters, optimizer state and every loss; the router's noise is random."""
    torch.manual_seed(1)
    straight = small.step(2 * half, kind)
    assert run(tmp_path / "straight", straight) == 2 * half

    torch.manual_seed(1)
    assert run(tmp_path / "stopped", small.step(2 * half, kind), stop=AtStep(half, cancel)) == half
    for draw in (torch.rand, np.random.rand):
        draw(17)
    random.seed(99)
    resumed = small.step(2 * half, kind)
    torch.nn.init.zeros_(resumed.model.head.weight)
    assert run(tmp_path / "stopped", resumed) == 2 * half

    result = state_of(resumed)
    expected = state_of(straight)
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(result[name], tensor), name
    one, other = (
        [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(tmp_path / f)]
        for f in ("straight", "stopped")
    )
    assert one == other
    assert [line["step"] for line in one] == list(range(1, 2 * half + 1))
    assert one[-1]["loss"] < one[0]["loss"]


@pytest.mark.parametrize("boundary", [2, 5])
def test_a_run_stopped_between_two_stages_of_dsa_is_one_run_to_the_last_bit(
    small, run, tmp_path, boundary
):
    """The stages are dense attention, indexers alone and both; metrics are compared too."""
    dsa = DSAConfig(heads=2, dim=8, top_k=3, dense=2, warmup=3)
    options = {"config": replace(small.config, dsa=dsa), "indexer_alone": True}
    torch.manual_seed(1)
    straight = small.step(8, **options)
    assert run(tmp_path / "straight", straight) == 8
    torch.manual_seed(1)
    stopped = small.step(8, **options)
    assert run(tmp_path / "stopped", stopped, stop=AtStep(boundary, cancel)) == boundary
    torch.rand(17)
    resumed = small.step(8, **options)
    assert run(tmp_path / "stopped", resumed) == 8
    for name, tensor in state_of(straight).items():
        assert torch.equal(state_of(resumed)[name], tensor), name
    one, other = (
        [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(tmp_path / f)]
        for f in ("straight", "stopped")
    )
    assert one == other
    for line in one:
        assert ("indexer_kl" in line) == (line["step"] > 2)
        if "indexer_kl" in line:
            share = 1 - line["indexer_kl"] / line["indexer_kl_uniform"]
            assert line["indexer_kl_captured"] == pytest.approx(share)


def test_a_checkpoint_written_beside_training_is_of_its_own_step(small, run, tmp_path):
    """Training continues while copies are written."""
    torch.manual_seed(1)
    run(tmp_path / "on", small.step(steps=6), every=3)
    result = state_of(small.step(steps=6))
    checkpoint.load_state(tmp_path / "on" / "checkpoints" / "step3", result)
    torch.manual_seed(1)
    stopped = small.step(steps=6)
    run(tmp_path / "stopped", stopped, stop=AtStep(3, cancel))
    for name, tensor in state_of(stopped).items():
        assert torch.equal(result[name], tensor), name


def test_rows_that_change_while_they_are_written_are_those_of_the_checkpoints_step(
    small, run, tmp_path, monkeypatch
):
    """The write of step 3 goes on when step 5 is done."""
    go_on = threading.Event()
    write = checkpoint.write_tensors

    def slow(path: Path, *arguments) -> None:
        if "step3" in str(path):
            assert go_on.wait(30)
        write(path, *arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    torch.manual_seed(1)
    release = AtStep(5, lambda trainer: go_on.set())
    run(tmp_path / "on", small.step(steps=6), every=3, keep=3, release=release)
    result = state_of(small.step(steps=6))
    checkpoint.load_state(tmp_path / "on" / "checkpoints" / "step3", result)
    monkeypatch.undo()
    torch.manual_seed(1)
    stopped = small.step(steps=6)
    run(tmp_path / "stopped", stopped, stop=AtStep(3, cancel))
    for name, tensor in state_of(stopped).items():
        assert torch.equal(result[name], tensor), name


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_hostile_engine_checkpoints_are_never_opened(small, run, tmp_path):
    """The files that OLMo-core and DCP would unpickle are beside our checkpoint and in it."""
    step = small.step(steps=4)
    run(tmp_path, step, stop=AtStep(2, cancel))
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    for step in ("step2", "step3", "step999", "."):
        for name in ("train/rank0.pt", "model_and_optim/.metadata", ".metadata", "rank0.pt"):
            path = tmp_path / "checkpoints" / step / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bomb)
        (tmp_path / "checkpoints" / step / ".metadata.json").write_text('{"version": "3.0.0"}')
    resumed = small.step(steps=4)
    assert run(tmp_path, resumed) == 4
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert not marker.exists()
    assert not [
        path
        for path in (tmp_path / "checkpoints" / "step4").iterdir()
        if path.suffix not in (".json", ".safetensors")
    ]
    pickle.loads(bomb)
    assert marker.exists()  # the bomb works


def test_a_damaged_checkpoint_gives_way_to_the_one_before(small, run, tmp_path):
    run(tmp_path, small.step(steps=9), every=3, keep=3)
    for victim in (tmp_path / "checkpoints" / "step9").glob("*.safetensors"):
        victim.write_bytes(victim.read_bytes()[:-9])
    step = small.step(steps=9)
    assert run(tmp_path, step) == 9
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 10))
    checkpoint.verify(tmp_path / "checkpoints" / "step9")


def test_another_models_checkpoint_is_refused(small, run, tmp_path):
    run(tmp_path, small.step(steps=2))
    step = small.step(steps=4, kind="muon")
    with pytest.raises(ValueError, match="missing"):
        run(tmp_path, step)
    step = small.step(steps=4)
    step.model.addresses.multipliers += 2
    with pytest.raises(ValueError, match=r"another model\.addresses\.multipliers"):
        run(tmp_path, step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(small, run, tmp_path, number):
    handler = signal.getsignal(number)
    last = run(tmp_path, small.step(), kill=AtStep(3, lambda trainer: os.kill(os.getpid(), number)))
    assert last == 3
    assert [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")] == [3]
    assert signal.getsignal(number) is handler


def test_a_skipped_step_has_a_line_without_its_load_and_the_stream_goes_on(small, run, tmp_path):
    stream = small.stream()
    read = small.stream()
    step = small.spoil(small.step(steps=5), small.nan_gradient, 3)
    assert run(tmp_path, step, stream=stream) == 5
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    result = lines(tmp_path)
    assert [line["step"] for line in result] == [1, 2, 3, 4, 5]
    assert [line.get("skipped_steps", 0) for line in result] == [0, 0, 1, 1, 1]
    assert ["load" in line for line in result] == [True, True, False, True, True]
    assert "loss" in result[2] and "grad_norm" not in result[2]
    for _ in range(5):
        next(read)
    assert stream.state_dict() == read.state_dict()


def test_metrics_have_the_names_of_the_step_and_none_of_the_engine(small, run, tmp_path):
    run(tmp_path, small.step(steps=2))
    assert len(lines(tmp_path)) == 2
    for line in lines(tmp_path):
        assert {"loss", "total", "mtp", "balance_sequence", "grad_norm", "lr"} <= line.keys()
        assert not [name for name in line if "/" in name]


def test_an_error_with_a_cause_is_raised_as_it_is(small, run, tmp_path):
    """Only errors that OLMo-core wraps are unwrapped."""
    step = small.step(steps=2)

    def fail(batch, number):
        raise RuntimeError("out of memory") from ValueError("its cause")

    step.forward_backward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, step)


def test_an_error_on_a_thread_of_the_engine_is_raised_itself(small, run, tmp_path):
    def refuse(line: dict) -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    step = small.step(steps=4)
    writer = MetricsWriter(replace(step.config, folder=str(tmp_path)), refuse)
    with pytest.raises(OSError, match=r"No space left on device: 'metrics\.jsonl'"):
        run(tmp_path, step, metrics=MetricsCallback(writer))


def test_a_resumed_run_repeats_its_skipped_steps_to_the_last_bit(small, run, tmp_path):
    def spoilt() -> TrainStep:
        return small.spoil(small.step(steps=6), small.nan_gradient, 2, 3, 5)

    torch.manual_seed(1)
    straight = spoilt()
    run(tmp_path / "straight", straight)
    torch.manual_seed(1)
    assert run(tmp_path / "stopped", spoilt(), stop=AtStep(3, cancel)) == 3
    resumed = spoilt()
    assert run(tmp_path / "stopped", resumed) == 6
    assert (
        (resumed.skipped, resumed.skipped_in_a_row)
        == (straight.skipped, straight.skipped_in_a_row)
        == (3, 0)
    )
    for name, tensor in state_of(straight).items():
        assert torch.equal(state_of(resumed)[name], tensor), name
    one, other = (
        [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(tmp_path / f)]
        for f in ("straight", "stopped")
    )
    assert one == other


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_its_checkpoints_intact(
    small, run, tmp_path
):
    """No checkpoint is written while steps are skipped, so that no good one is removed."""

    def poison(trainer) -> None:
        trainer.train_module.step.model.head.weight.data.fill_(torch.nan)

    with pytest.raises(
        Diverged, match=r"no finite loss in 4 steps in a row, the last of them 8.*lower --optim\.lr"
    ):
        run(tmp_path, small.step(skip_limit=4), every=1, keep=2, poison=AtStep(4, poison))
    result = checkpoint.steps(tmp_path / "checkpoints")
    assert [step for step, _ in result][-2:] == [3, 4]
    assert checkpoint.latest(tmp_path / "checkpoints") == result[-1][1]
    assert run(tmp_path, small.step(steps=5)) == 5


def test_a_row_of_skipped_steps_ends_with_the_first_good_one(small, run, tmp_path):
    step = small.spoil(small.step(steps=8, skip_limit=3), small.nan_gradient, 2, 3, 5, 6, 8)
    assert run(tmp_path, step, every=2, keep=1) == 8
    assert (step.skipped, step.skipped_in_a_row) == (5, 1)
    # Step 6, which was skipped, is made up for by step 7. The last step saves and removes nothing:
    # it is not known to be good.
    assert [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")] == [4, 7, 8]


def test_a_state_that_is_not_finite_is_never_saved(small, run, tmp_path):
    """An update can make NaN of a finite gradient.

    The run then ends, and the checkpoints before it stay.
    """

    def poison(trainer) -> None:
        trainer.train_module.step.optimizer.state["embed.weight.exp_avg"].view(-1)[3] = torch.inf

    with pytest.raises(
        Diverged, match=r"step 6: got model\.embed\.weight that is not finite, so it was not saved"
    ):
        run(tmp_path, small.step(), every=2, keep=1, poison=AtStep(5, poison))
    # Whether step 4 has replaced step 2 by then depends on how fast another thread writes.
    assert checkpoint.steps(tmp_path / "checkpoints")[-1][0] == 4
    assert run(tmp_path, small.step(steps=6)) == 6


def test_a_checkpoint_that_is_not_finite_gives_way_to_the_one_before(small, run, tmp_path, capsys):
    run(tmp_path, small.step(steps=9), every=3, keep=3)
    folder = tmp_path / "checkpoints" / "step9"
    state = state_of(small.step(steps=9))
    values = checkpoint.load_state(folder, state)
    state["optim.embed.weight.exp_avg_sq"].view(-1)[5] = torch.nan
    checkpoint.save_state(folder, state, values)
    step = small.step(steps=9)
    assert run(tmp_path, step) == 9
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 10))
    assert checkpoint.latest(tmp_path / "checkpoints") == folder
    message = capsys.readouterr().err.replace("\n", " ")
    assert "got optim.embed.weight.exp_avg_sq with NaN or infinite numbers" in message
    assert "trying the checkpoint before it" in message


def test_the_newest_checkpoints_stay(small, run, tmp_path):
    run(tmp_path, small.step(steps=12), every=2, stop=AtStep(5, cancel))
    assert [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")] == [4, 5]
    run(tmp_path, small.step(steps=12), every=2, stop=AtStep(9, cancel))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step8", "step9"]


def test_a_full_disk_behind_training_ends_the_run_in_a_line(
    small, run, tmp_path, no_larger_file, capfd
):
    """The checkpoint is written by another thread; the one before stays.

    The run resumes once there is space.
    """

    def fill(trainer) -> None:
        while not (tmp_path / "checkpoints" / "step2").is_dir():
            time.sleep(0.01)
        no_larger_file(30_000)

    with pytest.raises(OSError, match=r"File too large: .*step4"):
        run(tmp_path, small.step(steps=9), every=2, full=AtStep(3, fill))
    assert "Traceback" not in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step2"]
    no_larger_file(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert run(tmp_path, small.step(steps=5)) == 5
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


class AtEnd(Callback):
    """Calls a function behind the last step, before the last checkpoint is written."""

    priority = 1000

    def __init__(self, what) -> None:
        super().__init__()
        self.what = what

    def post_train(self) -> None:
        self.what()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_behind_the_last_step_waits_until_it_is_saved(small, run, tmp_path, number):
    """A second one does not."""
    checkpoints = tmp_path / "checkpoints"
    saved = []

    class Ended(Exception):
        pass

    def end(number: int, frame: object) -> None:
        saved.append(checkpoint.latest(checkpoints))
        raise Ended

    before = signal.signal(number, end)
    try:
        once = AtEnd(lambda: signal.raise_signal(number))
        with pytest.raises(Ended):
            run(tmp_path, small.step(steps=3), ended=once)
        twice = AtEnd(lambda: [signal.raise_signal(number) for _ in range(2)])
        with pytest.raises(Ended):
            run(tmp_path / "twice", small.step(steps=3), ended=twice)
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)
    assert saved == [checkpoints / "step3", checkpoints / "step3"]
    assert checkpoint.latest(tmp_path / "twice" / "checkpoints") is None


def test_a_write_future_finishes_on_the_thread_that_asks():
    where = []
    gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = WriteFuture(pool.submit(gate.wait))
        future.add_done_callback(lambda _: where.append(threading.current_thread()))
        assert not future.done()
        gate.set()
        future.result()
        assert future.done()
        failed = WriteFuture(pool.submit(lambda: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            failed.result()
    assert where == [threading.current_thread()]


def test_the_checkpointer_takes_no_part_and_no_address(small, tmp_path):
    checkpointer = SafetensorsCheckpointer(tmp_path)
    with pytest.raises(ValueError, match="the whole"):
        checkpointer.load(tmp_path, Module(small.step()), load_optim_state=False)
    with pytest.raises(ValueError, match="local path"):
        checkpointer.dir_is_checkpoint("s3://bucket/run")
    with pytest.raises(FileNotFoundError):
        checkpointer.latest_checkpoint(tmp_path)


def test_the_engine_leaves_the_number_of_threads_alone():
    assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())


def test_multiples_of_keep_every_stay_for_good(small, run, tmp_path):
    for steps in (6, 13):
        run(tmp_path, small.step(steps=steps), every=1, keep=2, keep_every=5)
    assert [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")] == [5, 10, 12, 13]


def test_a_run_that_diverged_goes_back_and_leaves_the_batches_out(small, run, tmp_path, capsys):
    """Its numbers are those of a run whose stream never had these batches.

    Batches 6 to 8 have NaN gradients: the run diverges in step 8, goes back to step 4, and takes
    batch 9 as its fifth. Interrupted after that, it comes to the same end.
    """
    bad = {6, 7, 8}

    def spoiled(numbers: set[int], stream) -> TrainStep:
        """Spoils the gradients of batches by their number in the stream."""
        step = small.step(steps=9, skip_limit=3, on_diverged="rollback")
        forward_backward = step.forward_backward

        def spoilt(batch, number):
            result = forward_backward(batch, number)
            if stream.state_dict()["row"] // small.batch_size in numbers:
                small.nan_gradient(step, {})
            return result

        step.forward_backward = spoilt
        return step

    def trained(name: str, **callbacks) -> TrainStep:
        torch.manual_seed(1)
        stream = small.stream()
        step = spoiled(bad, stream)
        run(tmp_path / name, step, every=2, stream=stream, **callbacks)
        return step

    straight = trained("straight")
    message = " ".join(capsys.readouterr().err.split())
    assert "step 8: the run diverged and goes back to step 4 (rollback 1 of 3)" in message
    assert "the 4 batches in between are left out" in message
    (record,) = read_rollbacks(tmp_path / "straight")
    assert (record.step, record.checkpoint) == (8, 4)
    assert record.reason == "got no finite gradient in 3 steps in a row, the last of them 8"
    assert straight.skipped == 0

    class Without(type(small.stream())):
        """The same stream without batches 5 to 8."""

        def __next__(self):
            if self.state_dict()["row"] == 4 * self.batch_size:
                for _ in range(4):
                    super().__next__()
            return super().__next__()

    torch.manual_seed(1)
    without = small.stream()
    without.__class__ = Without
    clean = small.step(steps=9)
    run(tmp_path / "clean", clean, every=2, stream=without)
    for name, tensor in state_of(clean).items():
        assert torch.equal(state_of(straight)[name], tensor), name
    assert [line["loss"] for line in lines(tmp_path / "clean")] == [
        line["loss"] for line in lines(tmp_path / "straight")
    ]

    # What is saved in a streak of skipped steps is nothing to go back to.
    trained("streak", stop=AtStep(7, cancel))
    trained("stopped", stop=Once(7, cancel))
    with pytest.raises(RuntimeError, match="killed"):
        trained("killed", stop=Once(5, kill))
    for folder in ("streak", "stopped", "killed"):
        resumed = trained(folder)
        for name, tensor in state_of(straight).items():
            assert torch.equal(state_of(resumed)[name], tensor), name
        assert len(read_rollbacks(tmp_path / folder)) == 1


def kill(trainer) -> None:
    raise RuntimeError("killed")


class Once(AtStep):
    """Calls a function after one step, when the run comes there again after a rollback."""

    passed = 0

    def post_train_batch(self) -> None:
        self.passed += self.step == self.when
        if self.passed == 2:
            super().post_train_batch()


def test_rollbacks_are_counted_over_the_whole_run(small, run, tmp_path):
    """A run whose every batch diverges goes back as often as it may, then stops for good."""

    def diverging() -> TrainStep:
        step = small.step(steps=9, skip_limit=2, on_diverged="rollback", rollbacks=2)
        return small.spoil(step, small.nan_gradient, *range(3, 10))

    for _ in range(2):
        with pytest.raises(Diverged, match=r"in 2 steps in a row.*there were 2 rollbacks before"):
            run(tmp_path, diverging(), every=2)
        assert [each.checkpoint for each in read_rollbacks(tmp_path)] == [2, 2]
    early = small.spoil(diverging(), small.nan_gradient, 1, 2)
    with pytest.raises(Diverged, match="there is no checkpoint to roll back to yet"):
        run(tmp_path / "early", early, every=2)


def test_a_trace_of_the_last_step_too_is_written(small, run, tmp_path):
    step = small.step(steps=3)
    run(tmp_path, step, profile=ProfileCallback(tmp_path / "profile", 3))
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "step3-rank0.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names


class FakeWandB(ModuleType):
    """Records what a run sends, in place of the package."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.run = None
        self.calls = []

    def init(self, **options) -> None:
        self.run = SimpleNamespace(path="run")
        self.calls.append(("init", options))

    def define_metric(self, *names, **options) -> None:
        self.calls.append(("define", names, options))

    def log(self, line: dict) -> None:
        self.calls.append(("log", line))

    def finish(self, **options) -> None:
        self.run = None
        self.calls.append(("finish", options))


def test_weights_and_biases_gets_every_line_of_one_run(small, run, tmp_path, monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for steps in (2, 4):
        step = small.step(steps=steps)
        writer = MetricsWriter(replace(step.config, folder=str(tmp_path)))
        sender = WeightsAndBiases("whales", tmp_path, step.config)
        writer.senders.append(sender.send)
        run(tmp_path, step, metrics=MetricsCallback(writer), wandb=sender)
        writer.write({"step": steps, "validation_loss": 1.0, "prompt": "a whale"})
        sender.finish(None, None, None)
    inits = [call[1] for call in fake.calls if call[0] == "init"]
    assert [options["project"] for options in inits] == ["whales"] * 2
    assert inits[0]["id"] == inits[1]["id"] and inits[0]["resume"] == "allow"
    assert inits[0]["mode"] == "offline", "there is no key"
    assert inits[0]["config"]["steps"] == 2
    sent = [call[1] for call in fake.calls if call[0] == "log"]
    assert [line["step"] for line in sent] == [1, 2, 2, 3, 4, 4]
    assert sent[2] == {"step": 2, "validation_loss": 1.0}
    assert {"loss", "lr", "memory", "mfu"} <= sent[0].keys() and "load" not in sent[0]
    ends = [call[1]["exit_code"] for call in fake.calls if call[0] == "finish"]
    assert ends == [0, 0]


@pytest.mark.slow
def test_a_trainer_that_is_imported_says_nothing_of_what_is_not_installed():
    code = "import rorqual.train.trainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
