"""What the engine measured in -> metrics.jsonl, tensorboard and the caller's function out; validation among it.

    {"step", "loss", "total", ..., "tokens", "tokens_per_second", "seconds", "seconds_left"}      every step
    {"step", "validation_loss", "bits_per_byte", "prompt", "sample", "seconds"}                   every validation
    {"step", "accuracy", "accuracy_TASK_LENGTH", .., "seconds"}                                   of needles

Losses are nats a token. "sample" is what the model writes after "prompt", the beginning of a held-out document.

With DSA a step also has "indexer", the indexers' loss in nats a query, and "indexer_recall",
the share of the attention that their choice carries, means over the layers. With experts a step also has
"max_violation", of the mixture that is worst balanced, and "load": for every mixture, in the order of the blocks and
MTP's last, the tokens that each of its experts took. A step whose loss or gradient was not finite updates nothing: it
lacks what was not finite and its load, and from then on every step has "skipped_steps", how many there were. With
residual streams the first step and every fiftieth after it
have "row_gain" and "column_gain", of the product of all H_res, and "stream_spread", each the worst rank's on one row. A
resumed run first drops the lines of steps that it is about to repeat.
"""

import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from olmo_core.train.callbacks import Callback, ConsoleLoggerCallback
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn

from rorqual import checkpoint, parallel, runtime
from rorqual.data.needles import DEPTHS, column, grade
from rorqual.io import write_text
from rorqual.train.engine import Module, autocast, metrics_of, unchanged_random_state

METRICS = "metrics.jsonl"
STEP_OVER_FORWARD = 2.5  # time of a training step over a forward pass's, about (docs/log.md)
FIRST = 5  # steps after which it is said how long the run will take
WINDOW = 20  # steps that the speed is a mean of
PROMPT_TOKENS = 8  # tokens of a held-out document that are continued
SAMPLE_TOKENS = 32  # tokens of the continuation at most
TEMPERATURE = 0.8  # the temperature at which they are drawn


class MetricsCallback(ConsoleLoggerCallback):
    """Stands where the engine's own console log would; writes on rank 0 only.

    tokens: of one step, over all ranks. steps: of the whole run. `seconds`: of training steps, over all sessions.
    """

    priority: ClassVar[int] = 2  # before the checkpointer, whose time is not the step's

    def __init__(
        self,
        folder: Path,
        tokens: int,
        steps: int,
        on_metrics: Callable[[dict[str, Any]], None] | None = None,
        trial: Callable[[], float] | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.tokens, self.steps, self.on_metrics = folder, tokens, steps, on_metrics
        self.trial = trial
        self.seconds = self._began = self._second = 0.0
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._at: dict[
            int, tuple[float, float, Tensor | None]
        ] = {}  # step -> seconds, seconds a step, load, at its end
        self._board: EventFile | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]

    def pre_train(self) -> None:
        if self.step:
            runtime.log(f"{self.folder}: resuming at step {self.step:,} of {self.steps:,}")
        ahead = self.steps - self.step
        if self.trial is not None and ahead > FIRST:
            runtime.log(
                f"the {ahead:,} steps ahead take about {format_duration(self.trial() * ahead)}, by a forward pass"
            )
        if parallel.rank() == 0:
            trim_metrics(self.folder / METRICS, self.step)
            self._board = EventFile(self.folder / "tensorboard", self.step + 1)

    def pre_load_batch(self) -> None:
        self._began = time.perf_counter()

    def post_train_batch(self) -> None:
        took = time.perf_counter() - self._began
        self.seconds += took
        self._recent.append(took)
        if len(self._recent) == 1:
            self._second = time.perf_counter()
        elif len(self._recent) == FIRST:
            # By the wall clock: a device may still be computing when a step's call returns.
            each = (time.perf_counter() - self._second) / (FIRST - 1)
            ahead = self.steps - self.step
            runtime.log(f"the {ahead:,} steps ahead take about {format_duration(each * ahead)}, by the first {FIRST}")
        load = cast(Module, self.trainer.train_module).expert_load
        self._at[self.step] = (self.seconds, sum(self._recent) / len(self._recent), load)

    def post_step(self) -> None:
        """Nothing to say before the metrics have been collected."""

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        ours: dict[str, Any] = metrics_of(metrics)
        if step not in self._at or not ours:
            return
        seconds, each, load = self._at.pop(step)
        ours |= {} if load is None else {"load": load.tolist()}
        ours |= {"tokens": step * self.tokens, "tokens_per_second": round(self.tokens / each, 1)}
        ours |= {"seconds": round(seconds, 3), "seconds_left": round((self.steps - step) * each, 1)}
        self.write({"step": step, **ours})

    def write(self, line: dict[str, Any]) -> None:
        """One line more, whole when it is there. Figures that are not finite are left out: JSON has none."""
        line = {name: value for name, value in line.items() if not isinstance(value, float) or math.isfinite(value)}
        if parallel.rank() == 0:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self._board is not None:
                scalars = {
                    name: value
                    for name, value in line.items()
                    if name not in ("step", "load") and not isinstance(value, str)
                }
                self._board.write(scalars, line["step"])
        if self.on_metrics is not None:
            self.on_metrics(dict(line))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


class EventFile:
    """An event file for tensorboard, on which what was written before for the step `first` and later is hidden.

    tensorboard's own writer has a thread, whose traceback stands in the log when the disk is full.
    """

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._put(Event(file_version="brain.Event:2"))
        self._put(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def write(self, values: Mapping[str, float], step: int) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._put(Event(step=step, summary=Summary(value=scalars)))

    def _put(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        # what could not be written was said when it was
        with suppress(OSError):
            self._file.close()


def format_duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    size, unit = next(((n, word) for n, word in ((3600, "hours"), (60, "minutes")) if seconds >= 2 * n), (1, "seconds"))
    return f"{seconds / size:,.0f} {unit}"


def trim_metrics(path: Path, step: int) -> None:
    """Keep the lines of a metrics file up to `step`; a last line that a kill cut short goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        if json.loads(line)["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


class BestCheckpoint:
    """Keeps the weights of the lowest validation loss in `folder`, a checkpoint without the optimizer's state."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder = folder
        self.model = model
        self._lowest: float | None = None

    def offer(self, step: int, loss: float) -> None:
        """Writes them where this loss is below that of every validation before it. Every rank calls it."""
        if self._lowest is None:
            self._lowest = self._before()
        if not loss < self._lowest:
            return
        self._lowest = loss
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        checkpoint.save_state(self.folder, tensors, {"step": step, "validation_loss": loss})

    def _before(self) -> float:
        """The loss of the checkpoint that is there, infinity where there is none that is good."""
        try:
            checkpoint.verify(self.folder)
        except checkpoint.Damaged:
            return math.inf
        values = checkpoint.decode(json.loads((self.folder / "rank0.json").read_text(encoding="utf-8")))
        return float(values["validation_loss"])


class ValidationCallback(Callback):
    """Scores held-out documents every `every` steps but the last, whose score `write` is asked for; 0: there alone.

    `score(whole)`: over all of them, or over a sample, by which steps are compared; `best` keeps the best of these.
    `continued`: a prompt and what the model writes after it.
    """

    def __init__(
        self,
        score: Callable[[bool], dict[str, float]],
        recorder: MetricsCallback,
        every: int = 0,
        continued: Callable[[], dict[str, str]] = dict,
        best: BestCheckpoint | None = None,
    ) -> None:
        super().__init__()
        self.score, self.recorder, self.every = score, recorder, every
        self.continued, self.best = continued, best

    def post_step(self) -> None:
        if self.every and self.step % self.every == 0 and self.step < self.recorder.steps:
            self.write(whole=False)

    def write(self, *, whole: bool = True) -> dict[str, float]:
        """Scores now; what was found."""
        found = self.score(whole)
        text = self.continued()
        self.recorder.write({"step": self.step, **found, **text, "seconds": round(self.recorder.seconds, 3)})
        if self.best is not None and "validation_loss" in found:
            compared = self.score(False) if whole and self.every else found
            self.best.offer(self.step, compared["validation_loss"])
        return found


def validate(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], bytes_per_token: float, dtype: torch.dtype
) -> dict[str, float]:
    """{"validation_loss": nats a token, "bits_per_byte": the same nats in bits over the bytes of the text}.

    `batches` are this rank's share. Training goes on as if it had not been asked: mode and random numbers stay.
    """
    with evaluation_mode(model, dtype) as device:
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
        for batch in batches:
            ids, labels, documents = (batch[name].to(device) for name in ("ids", "labels", "documents"))
            loss = model.loss(ids, labels, documents=documents)  # type: ignore[operator]
            sums += torch.stack([loss.next_token.double() * loss.tokens, loss.tokens.double()])
    nats, tokens = parallel.total(sums).tolist()
    if not tokens:
        raise ValueError("got no validation documents, expected some: use a larger corpus, or no limit")
    return {"validation_loss": nats / tokens, "bits_per_byte": nats / math.log(2) / (tokens * bytes_per_token)}


def estimate_step_seconds(
    model: nn.Module, vocabulary: int, rows: int, micro_rows: int, length: int, dtype: torch.dtype
) -> float:
    """Estimates the seconds of one training step from the time of one forward pass, before anything is trained.

    The first of two passes is not counted: it allocates and compiles. Documents are packed, four to a row, and
    gradients are on, so that the pass is that of training, and nothing is made of it. `rows` are this rank's, read
    `micro_rows` at a time. docs/log.md has how far off it was.
    """
    with evaluation_mode(model, dtype) as device, torch.enable_grad():
        ids = torch.arange(micro_rows * length, device=device).view(micro_rows, length) % vocabulary
        documents = (torch.arange(length, device=device) * 4 // length).expand(micro_rows, -1)
        for _ in range(2):
            began = time.perf_counter()
            # to read the number waits for the device to have finished
            model.loss(ids, ids, documents=documents).next_token.item()  # type: ignore[operator]
            took = time.perf_counter() - began
    return took * STEP_OVER_FORWARD * math.ceil(rows / micro_rows)


def needle_accuracy(
    model: nn.Module,
    exams: Mapping[tuple[str, int], Iterable[Mapping[str, Tensor]]],
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Shares of the answers whose most likely id is right, the answers before it given, under `column`'s names; all
    tasks' and lengths' mean as "accuracy".

    `exams`: this rank's batches by task and length, as `needles.exams` makes them. Training goes on as if it had not
    been asked. A part of the text in which no needle stood is left out.
    """
    found: dict[str, float] = {"accuracy": 0.0}
    with evaluation_mode(model, dtype) as device:
        for (task, length), batches in exams.items():
            counts = torch.zeros(DEPTHS, 2, dtype=torch.long, device=device)
            for batch in batches:
                logits = model(batch["ids"].to(device), documents=batch["documents"].to(device))
                counts += grade(logits.argmax(-1).cpu(), batch).to(device)
            right, asked = parallel.total(counts).T.tolist()
            found[column(task, length)] = sum(right) / sum(asked)
            found["accuracy"] += found[column(task, length)] / len(exams)
            found |= {column(task, length, i): right[i] / asked[i] for i in range(DEPTHS) if asked[i]}
    return found


def sample_continuation(
    model: nn.Module, ids: Tensor, count: int, vocabulary: int, dtype: torch.dtype
) -> tuple[list[int], list[int]]:
    """The ids, and `count` more that the model draws after them, each below `vocabulary`; always the same ones.

    Every rank calls it. Training goes on as if it had not been asked.
    """
    with evaluation_mode(model, dtype) as device:
        written = ids.tolist()
        drawn = torch.Generator().manual_seed(0)
        for _ in range(count):
            logits = model(torch.tensor([written], device=device))[0, -1, :vocabulary]
            chances = (logits.float().cpu() / TEMPERATURE).softmax(-1).nan_to_num(0.0)
            if not chances.any():
                # a model whose numbers are not finite says nothing
                break
            written.append(int(chances.multinomial(1, generator=drawn)))
    return ids.tolist(), written[len(ids) :]


@contextmanager
def evaluation_mode(model: nn.Module, dtype: torch.dtype) -> Iterator[torch.device]:
    """In evaluation mode, without gradients; every module's mode and random numbers stay as they were."""
    device, training = next(model.parameters()).device, [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), unchanged_random_state(), autocast(device, dtype):
            yield device
    finally:
        for module in training:
            module.training = True
