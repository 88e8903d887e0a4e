"""Does to a training what machines do to it, and counts what is lost (nothing).

A trial whose run had ended before the kill, the failure or the signal came is no event: as many
events are made as are asked for.

    python benchmarks/survive.py                      everything, in full
    python benchmarks/survive.py nans --nans 5        one kind, fewer times

    kills     kill -9 at random moments, of a process that only writes checkpoints (kills.py) and of
              a training; what was reported as saved is there, and the runs that are finished at
              last are, to the last bit, those of a run that nobody killed
    writes    failed writes, a third each: a full disk, a short write, a folder that became
              read-only; the exit code is not 0, the message names a path in the run's folder, what
              was saved is there, and the same command goes on. A full disk and a read-only folder
              are mounts in a namespace of their own; where that is not allowed, all are short
    resumes   stops and resumes of one run; at each stop the SHA-256 of the whole state, tensors,
              random generators and the place in the data, is that of a run without stops
    sigterms  SIGTERM at random moments, in steps and in validations; the process ends with its
              last step saved, in how many seconds
    nans      NaN or infinity in a loss or a gradient of a random step, which alone is skipped, and
              changes no bit of the state

The trainings are those of a tiny model with experts, Engram and streams; every process is forked
from one that has loaded everything.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import kills
import torch
from safetensors import safe_open
from workers import write_whales

from rorqual import checkpoint
from rorqual import config as configs
from rorqual.cli.main import main as command_line
from rorqual.data.stream import Stream
from rorqual.layers.balance import BalanceConfig
from rorqual.model import LanguageModel
from rorqual.model_config import (
    EngramConfig,
    HyperConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RouterConfig,
)
from rorqual.train.config import DataConfig, OptimConfig, TrainConfig
from rorqual.train.metrics import MEASURED
from rorqual.train.optim import Optimizer
from rorqual.train.source import prepare
from rorqual.train.step import TrainStep

MODEL = ModelConfig(
    vocab_size=300,
    dim=16,
    layers=2,
    dense_width=24,
    mla=MLAConfig(heads=2, kv_lora_rank=8, nope_dim=8, rope_dim=4, value_dim=8),
    moe=MoEConfig(
        routed=4,
        active=2,
        width=8,
        first_dense=1,
        router=RouterConfig(noise=0.1),
        balance=BalanceConfig(sequence=0.01),
    ),
    engram=EngramConfig(layers=(1,), rows_per_head=(97, 97), heads=2, head_dim=4),
    hyper=HyperConfig(streams=2, iterations=3),
    mtp=MTPConfig(),
)
STEPS = 60  # of a run
LIMIT = 10.0  # seconds in which SIGTERM saves
DISK = 4 << 20  # bytes of the disk that becomes full
CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    *(0x20000, 1, 32, 4096, 16384, 1 << 18),
)
MNT_DETACH = 2


def run_config(folder: Path, name: str, **options: Any) -> TrainConfig:
    """Returns the config of a run in `folder`, whose text is there."""
    data = DataConfig(
        source=str(folder / "text.jsonl"), vocab_size=300, cache=str(folder / "cache")
    )
    config = TrainConfig(
        model=MODEL,
        optim=OptimConfig(lr=1e-2, warmup=5),
        data=data,
        folder=str(folder / name),
        steps=STEPS,
        batch_size=4,
        seq_len=32,
        threads=1,
        save_every=2,
        validate_every=20,
        skip_spikes=6.0,
    )
    return replace(config, **options)


def write_text(folder: Path) -> None:
    write_whales(folder, 400)
    prepare(run_config(folder, "none").data)


def digest(folder: Path) -> str:
    """Returns the SHA-256 of a checkpoint's state, but for the seconds that it took."""
    sha = hashlib.sha256()
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensors[name] = file.get_tensor(name)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    values = checkpoint.decode(json.loads((folder / "rank0.json").read_text(encoding="utf-8")))
    values["callbacks"]["metrics"] = None
    sha.update(json.dumps(checkpoint.encode(values), sort_keys=True).encode())
    return sha.hexdigest()


def saved_steps(config: TrainConfig) -> list[int]:
    return [step for step, _ in checkpoint.steps(Path(config.folder) / "checkpoints")]


def metrics_of(config: TrainConfig) -> list[dict[str, Any]]:
    """Returns the lines of a run that two equal runs share, in the order of their steps."""
    text = (Path(config.folder) / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    lines = [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]
    return sorted(lines, key=lambda line: (line["step"], "loss" in line))


def train_in_child(
    config: TrainConfig, reports: Connection | None, errors: str, largest_file: int | None
) -> None:
    """Trains by the command line, as `rorqual train RUN` does; reports each step that is saved."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(file, 2)
    os.dup2(file, 1)
    if reports is not None:
        save_state = checkpoint.save_state

        def reporting(folder, tensors, values, *, group=None):
            save_state(folder, tensors, values, group=group)
            reports.send(values.get("global_step", -1))

        checkpoint.save_state = reporting
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    code = command_line(["train", config.folder])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Training:
    """A training in a process of its own."""

    def __init__(self, context, config: TrainConfig, largest_file: int | None = None) -> None:
        self.config = config
        path = Path(config.folder) / "train.json"
        if not path.is_file():
            configs.save(config, path)
        self.errors = Path(config.folder).with_suffix(".log")
        self.reports, sink = context.Pipe(duplex=False)
        self.process = context.Process(
            target=train_in_child, args=(config, sink, str(self.errors), largest_file)
        )
        self.process.start()
        sink.close()
        self.saved = -1

    def wait_for_save(self) -> bool:
        """Waits until the process has saved a step; returns False if it ended first."""
        try:
            self.saved = max(self.saved, self.reports.recv())
            return True
        except (EOFError, OSError):
            return False

    def end(self, number: int | None = None) -> int:
        """Sends a signal, if one is named, and waits; returns the exit code."""
        if number is not None and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)
        while self.wait_for_save():
            pass
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def check_saved(self) -> None:
        """AssertionError if a step that was reported as saved is lost."""
        newest = checkpoint.latest(Path(self.config.folder) / "checkpoints")
        step = -1 if newest is None else checkpoint.step_of(newest)
        assert step >= self.saved, f"step {self.saved} was reported, {step} is the newest"

    @property
    def message(self) -> str:
        return self.errors.read_text(encoding="utf-8")


class Kind:
    """Counts the events of a kind and what was lost in them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: dict[str, Any] = {"events": 0, "lost": 0}
        self.began = time.perf_counter()

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        try:
            yield
        except (AssertionError, ValueError) as error:
            self.counts["lost"] += 1
            print(f"{self.name}, after {self.counts['events']} events: {error}", file=sys.stderr)

    def event(self, landed: bool = True) -> None:
        """Counts what was done to a run, if it had not ended before."""
        self.add("events" if landed else "ended before")

    def add(self, name: str, value: float = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + value

    def result(self) -> dict[str, Any]:
        return self.counts | {"seconds": round(time.perf_counter() - self.began, 1)}


def finished_run(context, folder: Path) -> TrainConfig:
    """Returns a run that nobody disturbed, with all of its checkpoints."""
    config = run_config(folder, "undisturbed", save_every=1, keep_every=1)
    if not checkpoint.is_finished(config.folder):
        training = Training(context, config)
        code = training.end()
        assert code == 0, training.message
    return config


def same_as(config: TrainConfig, undisturbed: TrainConfig) -> None:
    """AssertionError unless a finished run is the undisturbed one, to the last bit."""
    ours, theirs = (
        digest(Path(each.folder) / "checkpoints" / f"step{STEPS}") for each in (config, undisturbed)
    )
    assert ours == theirs, f"{config.folder} has ended in another state"
    assert metrics_of(config) == metrics_of(undisturbed), f"{config.folder} has other metrics"


def kill_writers(count: int, rng: random.Random, context, kind: Kind, folder: Path) -> None:
    step = 0
    (folder / "written").mkdir()
    for _ in range(count):
        reported, during = kills.one_kill(context, str(folder / "written"), step, rng)
        kind.event()
        kind.add("during a write", during)
        with kind.trial():
            step = reported
            step = kills.check(str(folder / "written"), reported)


def survive_kills(count: int, rng: random.Random, context, folder: Path) -> dict[str, Any]:
    kind = Kind("kills")
    kill_writers(count // 2, rng, context, kind, folder)
    undisturbed = finished_run(context, folder)
    number = 0
    while kind.counts["events"] < count:
        config = run_config(folder, f"killed{number}")
        training = Training(context, config)
        if rng.random() < 0.8:
            training.wait_for_save()
        time.sleep(rng.uniform(0.0, 0.3))
        code = training.end(signal.SIGKILL)
        kind.event(code == -signal.SIGKILL)
        kind.add("during a write", bool(list(Path(config.folder).glob("checkpoints/*.partial"))))
        with kind.trial():
            training.check_saved()
            if code == 0:
                number += 1
                same_as(config, undisturbed)
    with kind.trial():
        config = run_config(folder, f"killed{number}")
        training = Training(context, config)
        assert training.end() == 0, training.message
        same_as(config, undisturbed)
    return kind.result()


class Disk:
    """A folder that can be made full or read-only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.libc = ctypes.CDLL(None, use_errno=True)
        folder.mkdir()
        self._call("mount", b"tmpfs", self._path, b"tmpfs", 0, f"size={DISK}".encode())

    @property
    def _path(self) -> bytes:
        return os.fspath(self.folder).encode()

    def _call(self, name: str, *arguments: object) -> None:
        if getattr(self.libc, name)(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name)

    def fill(self, free: int) -> None:
        """Leaves so many bytes free."""
        space = os.statvfs(self.folder)
        size = space.f_bavail * space.f_frsize - free
        with (self.folder / "filler").open("wb") as file:
            file.write(b"\0" * max(0, size))

    def empty(self) -> None:
        (self.folder / "filler").unlink()

    def lock(self) -> None:
        """Makes what is opened from now on read-only."""
        self._call("mount", self._path, self._path, None, MS_BIND, None)
        self._call("mount", None, self._path, None, MS_REMOUNT | MS_BIND | MS_RDONLY, None)

    def unlock(self) -> None:
        self._call("umount2", self._path, MNT_DETACH)

    def close(self) -> None:
        self._call("umount2", self._path, MNT_DETACH)


def own_mounts() -> bool:
    """Gives this process and its children mounts of their own; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(CLONE_NEWNS):
        return False
    return not libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)


def survive_failed_writes(count: int, rng: random.Random, context, folder: Path) -> dict[str, Any]:
    kind = Kind("writes")
    undisturbed = finished_run(context, folder)
    disk = None
    with contextlib.suppress(OSError):
        disk = Disk(folder / "disk")
    number = 0
    while (landed := kind.counts["events"]) < count:
        what = ("short write", "full disk", "read-only")[landed % 3 if disk is not None else 0]
        config = run_config(folder / "disk" if disk is not None else folder, f"run{number}")
        config = replace(config, data=run_config(folder, "none").data)
        limit = rng.randrange(4000, 60_000) if what == "short write" else None
        training = Training(context, config, limit)
        if what != "short write":
            training.wait_for_save()
            time.sleep(rng.uniform(0.0, 0.2))
            assert disk is not None
            if what == "full disk":
                disk.fill(rng.randrange(0, 150_000))
            else:
                disk.lock()
        code = training.end()
        if what == "full disk" and disk is not None:
            disk.empty()
        elif what == "read-only" and disk is not None:
            disk.unlock()
        kind.event(code != 0)
        if code:
            kind.add(what)
        with kind.trial():
            training.check_saved()
            if code == 0:
                number += 1
                same_as(config, undisturbed)
                shutil.rmtree(config.folder)
            else:
                line = training.message.strip().splitlines()[-1]
                assert code == 1, f"{what}: exit code {code}"
                assert config.folder in line, f"{what}: the message names no path: {line}"
                assert "Traceback" not in training.message, training.message
    with kind.trial():
        config = run_config(folder / "disk" if disk is not None else folder, f"run{number}")
        config = replace(config, data=run_config(folder, "none").data)
        training = Training(context, config)
        assert training.end() == 0, training.message
        same_as(config, undisturbed)
    if disk is not None:
        disk.close()
    return kind.result()


def survive_resumes(count: int, rng: random.Random, context, folder: Path) -> dict[str, Any]:
    kind = Kind("resumes")
    undisturbed = finished_run(context, folder)
    number = 0
    while kind.counts["events"] < count:
        config = run_config(folder, f"resumed{number}", save_every=1000, validate_every=20)
        training = Training(context, config)
        path = Path(config.folder) / "metrics.jsonl"
        last = max(saved_steps(config), default=0)
        target = rng.randrange(last + 1, last + 12)
        while training.process.is_alive():
            if path.is_file() and f'"step": {target},' in path.read_text(encoding="utf-8"):
                break
            time.sleep(0.005)
        code = training.end(signal.SIGINT)
        kind.event(code != 0)
        with kind.trial():
            step = max(saved_steps(config))
            ours, theirs = (
                digest(Path(each.folder) / "checkpoints" / f"step{step}")
                for each in (config, undisturbed)
            )
            assert ours == theirs, f"step {step} has another state"
            assert code in (0, 130), training.message
        if code == 0:
            with kind.trial():
                same_as(config, undisturbed)
            number += 1
    return kind.result()


def survive_sigterms(count: int, rng: random.Random, context, folder: Path) -> dict[str, Any]:
    kind = Kind("sigterms")
    number = 0
    longest = 0.0
    while kind.counts["events"] < count:
        # Most of the time is that of validations.
        config = run_config(
            folder, f"ended{number}", validate_every=2, validation_tokens=10**6, save_every=1000
        )
        training = Training(context, config)
        path = Path(config.folder) / "metrics.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        while training.process.is_alive():
            if path.is_file() and path.stat().st_size > size:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.3))
        began = time.perf_counter()
        code = training.end(signal.SIGTERM)
        seconds = time.perf_counter() - began
        # It may have been ahead of the signal, and saved its last step.
        ended = code in (0, -signal.SIGTERM)
        kind.event(not ended)
        number += ended
        with kind.trial():
            last = max(line["step"] for line in metrics_of(config))
            assert max(saved_steps(config)) == last, f"step {last} was not saved"
            assert seconds < LIMIT, f"took {seconds:.1f} s"
            assert code in (0, 130, -signal.SIGTERM), training.message
        longest = max(longest, seconds)
    kind.counts["longest_seconds"] = round(longest, 2)
    return kind.result()


def spoil_gradient(step: TrainStep, losses: dict, rng: random.Random, value: float) -> None:
    """Puts a number that is not finite into a gradient."""
    named = [(n, p.grad) for n, p in step.optimizer.parameters.items() if p.grad is not None]
    _, gradient = rng.choice(named)
    flat = (gradient._values() if gradient.is_sparse else gradient).view(-1)
    flat[rng.randrange(len(flat))] = value


def spoil_loss(step: TrainStep, losses: dict, rng: random.Random, value: float) -> None:
    name = rng.choice(sorted(losses))
    losses[name] = losses[name] * value


def spoil_step(step: TrainStep, target: int, spoil: Callable[[TrainStep, dict], None]) -> None:
    """Spoils losses or gradients of one step before they are used."""
    forward_backward = step.forward_backward

    def spoilt(batch, number):
        losses, counts = forward_backward(batch, number)
        if number == target:
            spoil(step, losses)
        return losses, counts

    step.forward_backward = spoilt  # type: ignore[method-assign]


def state_of(step: TrainStep) -> str:
    """Returns the SHA-256 of parameters, buffers and optimizer state."""
    sha = hashlib.sha256()
    for state in (step.model.state_dict(), step.optimizer.state_dict()):
        for name, tensor in state.items():
            sha.update(name.encode())
            sha.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def survive_nans(count: int, rng: random.Random, context, folder: Path) -> dict[str, Any]:
    kind = Kind("nans")
    config = run_config(folder, "nans")
    source = prepare(config.data)
    for _ in range(count):
        kind.event()
        what = rng.choice((spoil_gradient, spoil_loss))
        value = rng.choice((math.nan, math.inf, -math.inf))
        target = rng.randrange(2, 9)
        options = replace(config, optim=replace(config.optim, kind=rng.choice(("adamw", "muon"))))
        torch.manual_seed(rng.randrange(1000))
        model = LanguageModel(MODEL, torch.from_numpy(source.canonical_map()), seed=0)
        step = TrainStep(model, Optimizer(model, options.optim), options)
        stream = Stream(source.tokens.train, 4, 32, seed=rng.randrange(1000))
        spoil_step(step, target, partial(what, rng=rng, value=value))
        with kind.trial():
            for number in range(1, target + 3):
                before = state_of(step)
                step(next(stream), number)
                assert step.skipped == int(number >= target), f"step {number} of {target}"
                assert (state_of(step) == before) == (number == target), f"step {number}"
    return kind.result()


KINDS: dict[str, tuple[int, Callable[..., dict[str, Any]]]] = {
    "kills": (100, survive_kills),
    "writes": (50, survive_failed_writes),
    "resumes": (10, survive_resumes),
    "sigterms": (50, survive_sigterms),
    "nans": (20, survive_nans),
}


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    for name, (count, _) in KINDS.items():
        parser.add_argument(f"--{name}", type=int, default=count, metavar="TIMES")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    unknown = [name for name in options.kinds if name not in KINDS]
    if unknown:
        parser.error(f"got {unknown[0]!r}, expected one of {', '.join(KINDS)}")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    own_mounts()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rorqual.train.trainer", "rorqual.train.engine", "kills"])
    results = {}
    for name in options.kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            write_text(Path(folder))
            run = partial(KINDS[name][1], getattr(options, name), random.Random(options.seed))
            results[name] = run(context, Path(folder))
        if not options.json:
            counts = "  ".join(f"{value} {key}" for key, value in results[name].items())
            print(f"{name:10} {counts}", flush=True)
    if options.json:
        print(json.dumps(results))
    raise SystemExit(any(result["lost"] for result in results.values()))


if __name__ == "__main__":
    main()
