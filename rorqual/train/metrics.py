"""Writes the metrics of a training run, and validates the model during it.

metrics.jsonl has a line for every step and for every validation:

    {"step", "loss", "total", ..., "tokens", "tokens_per_second", "seconds", "seconds_left"}
    {"step", "validation_loss", "bits_per_byte", "prompt", "sample", "seconds"}
    {"step", "accuracy", "accuracy_TASK_LENGTH", ..., "seconds"}                       of needles
    {"step", "task_NAME_METRIC", ..., "seconds"}                                       of lm-eval

Losses are nats a token. "sample" is the model's continuation of "prompt", the beginning of a
held-out document. Further fields of a step:

    indexer_kl, indexer_recall  with DSA: the indexers' loss in nats a query, and the share of the
                                attention on the selected keys; means over layers
    indexer_kl_uniform          the loss of equal scores for the keys that the loss is over
    indexer_kl_captured         the share of it that the indexers remove, 1 - kl / uniform
    load, max_violation         with experts: the tokens routed to each expert, a list for every
                                layer of experts (MTP's last), and the worst layer's violation
    row_gain, column_gain,      with residual streams, in step 1 and every 50 steps after it: gains
    stream_spread               of the product of all H_res; the worst rank's, on one sequence
    gate_mean_BLOCK             with Engram, in the same steps: the mean of the block's gates
    rows_touched                with Engram: distinct rows of all tables that the step updates
    skipped_steps               how many steps so far were skipped: not finite, or with a spike;
                                such a step has no load, and lacks what was not finite
    data_wait                   seconds that the step waited for its batch, on rank 0
    mfu                         FLOPs of the model, forward and backward, over those that the
                                devices could do: published for a GPU in bfloat16, measured for a
                                CPU; missing for other devices
    memory                      bytes: the peak of the GPU's, else this process's resident memory
    bytes_exchanged             bytes that rank 0 sent to others for sharded rows and for tokens of
                                split experts, exactly; FSDP's parameters and gradients, context
                                parallelism and sums over ranks do not count

A resumed run first drops the lines of the steps that it repeats.
"""

import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn

from rorqual import checkpoint, distributed, runtime
from rorqual.costs import train_flops_per_token
from rorqual.hardware import peak_flops
from rorqual.io import write_text
from rorqual.model import LanguageModel
from rorqual.train.config import TrainConfig
from rorqual.train.scores import Interrupted, evaluation_mode, interruptible
from rorqual.train.source import Source

METRICS = "metrics.jsonl"
FIRST_STEPS = 5  # after which the log says how long the run will take
WINDOW = 20  # steps over which the speed is averaged
COUNTED = ("skipped_steps", "rows_touched", "bytes_exchanged")  # whole numbers
VALIDATIONS = 10  # of a run, where the config names no interval
LEAST_INTERVAL = 10  # steps between two validations
# Fields of a line that no two runs share, however equal.
MEASURED = ("seconds", "seconds_left", "tokens_per_second", "data_wait", "mfu", "memory")


class StepTime(NamedTuple):
    """The time of a step's end and the data available before its metrics are collected."""

    seconds: float  # of training since the run began
    mean_seconds: float  # of the last steps
    data_wait: float  # seconds until the batch was there
    expert_counts: Tensor | None


class MetricsWriter:
    """Writes metrics.jsonl and tensorboard's events, and passes every line to `on_metrics`.

    Only rank 0 writes. `estimate` returns the estimated seconds of a step before the first one.
    `seconds` are those of training steps, over all sessions of the run. `senders` get every line
    that rank 0 writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        on_metrics: Callable[[dict[str, Any]], None] | None = None,
        estimate: Callable[[], float] | None = None,
    ) -> None:
        self.folder = Path(config.folder)
        self.tokens_per_step = config.batch_size * config.seq_len
        self.steps = config.steps
        self.on_metrics = on_metrics
        self.estimate = estimate
        self.senders: list[Callable[[Mapping[str, Any]], None]] = []
        self.seconds = 0.0
        self.device = runtime.device(config.device)
        self._dtype = runtime.dtype(config.dtype)
        self._step_flops = (
            train_flops_per_token(config.model, config.seq_len) * self.tokens_per_step
        )
        self._peak_flops: float | None = None  # of all ranks, a second
        self._data_wait = 0.0
        self._step_began = 0.0
        self._second_step_began = 0.0
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._times: dict[int, StepTime] = {}
        self._events: EventFile | None = None

    def start(self, step: int) -> None:
        """Opens the files for the steps after `step`."""
        if step:
            runtime.log(f"{self.folder}: resuming at step {step:,} of {self.steps:,}")
        if self.estimate is not None and self.steps - step > FIRST_STEPS:
            self._log_time_left(step, self.estimate(), "a forward pass")
        # After a rollback the speed is known.
        self.estimate = None
        if distributed.rank() == 0:
            peak = peak_flops(self.device, self._dtype)
            self._peak_flops = None if peak is None else peak * distributed.world()
            trim_metrics(self.folder / METRICS, step, last=step == self.steps)
            self._events = EventFile(self.folder / "tensorboard", step + 1)

    def start_step(self) -> None:
        """Starts the clock of a step, before its batch is read."""
        self._step_began = time.perf_counter()

    def end_loading(self) -> None:
        """Notes how long the step waited for its batch."""
        self._data_wait = time.perf_counter() - self._step_began

    def end_step(self, step: int, expert_counts: Tensor | None) -> None:
        """Records how long a step took; its line is written by `write_step`, perhaps later."""
        now = time.perf_counter()
        self.seconds += now - self._step_began
        self._recent.append(now - self._step_began)
        if len(self._recent) == 1:
            self._second_step_began = now
        elif len(self._recent) == FIRST_STEPS:
            # By the wall clock: a device may still be computing when a step's call returns.
            each = (now - self._second_step_began) / (FIRST_STEPS - 1)
            self._log_time_left(step, each, f"the first {FIRST_STEPS}")
        mean_seconds = sum(self._recent) / len(self._recent)
        self._times[step] = StepTime(self.seconds, mean_seconds, self._data_wait, expert_counts)

    def write_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the line of a step of this session."""
        if step not in self._times or not metrics:
            return
        seconds, mean_seconds, data_wait, expert_counts = self._times.pop(step)
        line: dict[str, Any] = {"step": step, **metrics}
        if expert_counts is not None:
            line["load"] = expert_counts.tolist()
        if line.get("indexer_kl_uniform"):
            line["indexer_kl_captured"] = 1 - line["indexer_kl"] / line["indexer_kl_uniform"]
        for name in COUNTED:
            if name in line:
                line[name] = int(line[name])
        line["tokens"] = step * self.tokens_per_step
        line["tokens_per_second"] = round(self.tokens_per_step / mean_seconds, 1)
        line["seconds"] = round(seconds, 3)
        line["seconds_left"] = round((self.steps - step) * mean_seconds, 1)
        line["data_wait"] = round(data_wait, 6)
        if self._peak_flops is not None:
            line["mfu"] = round(self._step_flops / mean_seconds / self._peak_flops, 4)
        memory = runtime.memory_used(self.device)
        if memory is not None:
            line["memory"] = memory
        self.write(line)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line, without numbers that are not finite: JSON has none."""
        line = {
            name: value
            for name, value in line.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        if distributed.rank() == 0:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self._events is not None:
                scalars = {
                    name: value
                    for name, value in line.items()
                    if name not in ("step", "load") and not isinstance(value, str)
                }
                self._events.write(scalars, line["step"])
            for send in self.senders:
                send(line)
        if self.on_metrics is not None:
            self.on_metrics(dict(line))

    def close(self) -> None:
        """Closes the event file; metrics.jsonl is closed after every line."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _log_time_left(self, step: int, seconds_a_step: float, by: str) -> None:
        """Logs how long the steps after `step` take; `by` says what the estimate is from."""
        left = self.steps - step
        lasting = format_duration(seconds_a_step * left)
        runtime.log(f"the {left:,} steps ahead take about {lasting}, by {by}")


class EventFile:
    """An event file of tensorboard, which hides older events of the step `first` and later.

    tensorboard's own writer is not used: it has a thread, whose traceback appears in the log when
    the disk is full.
    """

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Writes numbers as the scalars of a step."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def _write(self, event: Event) -> None:
        """Writes an event with the time of now, and flushes it."""
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        """Closes the file, without an error where the disk is full."""
        # An error was raised when the event was written.
        with suppress(OSError):
            self._file.close()


def format_duration(seconds: float) -> str:
    """Formats seconds in the unit that suits them: "119 seconds", "2 minutes", "3 hours"."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"


def trim_metrics(path: Path, step: int, *, last: bool = False) -> None:
    """Keeps the lines of a metrics file up to `step`, without a last line that a kill cut short.

    last: `step` is the run's last one, whose validation is made again: its lines go, too.
    """
    if not path.is_file():
        return
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]

    def stays(line: str) -> bool:
        values = json.loads(line)
        is_again = last and values["step"] == step and "lr" not in values
        return values["step"] <= step and not is_again

    write_text(path, "".join(line + "\n" for line in filter(stays, whole)))


class Validation:
    """Scores held-out data at intervals and at the end of a run, and keeps the best weights.

    Validations within the run read a sample, on which the weights are compared. They end early
    where `stop` says so, which all ranks call together; what was not scored then is scored when the
    run is resumed. Tasks of lm-eval are run at an interval of their own.
    """

    def __init__(
        self,
        model: LanguageModel,
        source: Source,
        config: TrainConfig,
        writer: MetricsWriter,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self.model = model
        self.source = source
        self.config = config
        self.writer = writer
        self.stop = stop
        self.interval = validation_interval(config)
        self.task_interval = 0
        if config.lm_eval is not None:
            self.task_interval = config.lm_eval.every or self.interval
        # With only one validation the best weights are the final ones.
        best = Path(config.folder) / "checkpoints" / checkpoint.BEST
        self.best = BestCheckpoint(best, model) if self.interval else None

    def after_step(self, step: int, *, missing_alone: bool = False) -> bool:
        """Validates on the sample if it is due; the last step is left to `run`.

        Returns False where a stop interrupted it. With `missing_alone`, what metrics.jsonl has of
        this step is not due.
        """
        if not 0 < step < self.config.steps:
            return True
        try:
            with interruptible(self.model, self.stop):
                due = self.interval and step % self.interval == 0
                if due and not (missing_alone and self._has(step, "validation_loss", "accuracy")):
                    self.run(step, whole=False)
                due = self.task_interval and step % self.task_interval == 0
                if due and not (missing_alone and self._has(step, "task_")):
                    self.run_tasks(step)
        except Interrupted:
            return False
        return True

    def _has(self, step: int, *prefixes: str) -> bool:
        """Returns whether metrics.jsonl has a line of this step with such a field, on all ranks."""
        path = self.writer.folder / METRICS
        has = False
        if distributed.rank() == 0 and path.is_file():
            lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            has = any(
                line["step"] == step and any(name.startswith(prefixes) for name in line)
                for line in lines
            )
        return bool(distributed.total(torch.tensor(int(has), device=self.writer.device)))

    def run(self, step: int, *, whole: bool) -> dict[str, float]:
        """Validates now, on all held-out data or on the sample, and returns the scores."""
        scores = self.source.score(self.model, self.config, whole=whole)
        # Each token takes a small part of a step's time, so a short run samples few tokens.
        steps = self.interval or self.config.steps
        sample = self.source.sample(self.model, self.config, max(4, steps // 4))
        compared = scores
        if self.best is not None and whole and "validation_loss" in scores:
            compared = self.source.score(self.model, self.config, whole=False)
        seconds = round(self.writer.seconds, 3)
        self.writer.write({"step": step, **scores, **sample, "seconds": seconds})
        if self.best is not None and "validation_loss" in scores:
            self.best.offer(step, compared["validation_loss"])
        return scores

    def run_tasks(self, step: int) -> None:
        """Runs the tasks of lm-eval, if there are any, and writes a line of their metrics."""
        if self.config.lm_eval is None or self.source.tokenizer is None:
            return
        # It loads transformers, which takes longer than the first steps of a small model.
        from rorqual import evaluate

        with evaluation_mode(self.model, runtime.dtype(self.config.dtype)):
            results = evaluate.tasks(
                self.model,
                self.source.tokenizer,
                list(self.config.lm_eval.tasks),
                limit=self.config.lm_eval.limit,
            )
        line: dict[str, Any] = {"step": step}
        for task, metrics in results.items():
            for metric, value in metrics.items():
                if isinstance(value, float):
                    line[f"task_{task}_{metric.removesuffix(',none')}"] = value
        self.writer.write({**line, "seconds": round(self.writer.seconds, 3)})


def validation_interval(config: TrainConfig) -> int:
    """Returns the steps between two validations, or 0 if there is only the one at the end."""
    if config.validate_every is not None:
        return config.validate_every
    # All questions about needles are evaluated each time, which takes long in a short run.
    if config.needles is not None:
        return 0
    return max(LEAST_INTERVAL, -(-config.steps // VALIDATIONS))


class BestCheckpoint:
    """Keeps the weights of the lowest validation loss, as a checkpoint without optimizer state."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder = folder
        self.model = model
        self._lowest: float | None = None

    def offer(self, step: int, loss: float) -> None:
        """Saves the weights if this loss is the lowest so far. Every rank calls it."""
        if self._lowest is None:
            self._lowest = self._saved_loss()
        if not loss < self._lowest:
            return
        self._lowest = loss
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        checkpoint.save_state(self.folder, tensors, {"step": step, "validation_loss": loss})

    def _saved_loss(self) -> float:
        """Returns the loss of the saved checkpoint, infinity if there is no good one."""
        try:
            checkpoint.verify(self.folder)
        except checkpoint.Damaged:
            return math.inf
        values = json.loads((self.folder / "rank0.json").read_text(encoding="utf-8"))
        return float(checkpoint.decode(values)["validation_loss"])
