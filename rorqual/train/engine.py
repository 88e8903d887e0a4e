"""Adapters to OLMo-core, which owns the training loop, its callbacks and the signals.

    Module                    TrainModule           calls TrainStep
    Loader                    DataLoaderBase        yields the batches of a stream
    SafetensorsCheckpointer   Checkpointer          writes and reads by rorqual.checkpoint
    CheckpointCallback        CheckpointerCallback  when to write, and which to remove
    MetricsCallback           ConsoleLogger...      passes metrics to a MetricsWriter
    ValidationCallback        Callback              calls a Validation
    ProfileCallback           Callback              writes the trace of a step
    WeightsAndBiases          WandBCallback         sends every line of metrics

OLMo-core's own checkpoints are pickles; SafetensorsCheckpointer never reads or writes them.
"""

import math
import netrc
import os
import secrets
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from olmo_core.data import DataLoaderBase
from olmo_core.train import Checkpointer, Duration, LoadStrategy, ReduceType, Trainer
from olmo_core.train.callbacks import (
    Callback,
    CheckpointerCallback,
    ConsoleLoggerCallback,
    WandBCallback,
)
from olmo_core.train.callbacks.wandb import WANDB_API_KEY_ENV_VAR
from olmo_core.train.train_module import EvalBatchSpec, TrainModule
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rorqual import checkpoint, distributed, ranks, runtime
from rorqual import config as configs
from rorqual.data.needles import NeedleStream
from rorqual.data.stream import Stream
from rorqual.io import write_text
from rorqual.train import run_folder
from rorqual.train.config import TrainConfig
from rorqual.train.metrics import MetricsWriter, Validation
from rorqual.train.run_folder import Rollback
from rorqual.train.step import Diverged, TrainStep


class Module(TrainModule):
    """Runs the steps of OLMo-core's loop with a TrainStep, and records their metrics."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__()
        self.step = step
        self.expert_counts: Tensor | None = None  # of the last step; see StepResult

    def on_attach(self) -> None:
        """Lets the step see whether OLMo-core was asked to stop the run."""
        self.step.stop_requested = lambda: self.trainer._cancel_reason is not None

    def train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None:
        """Runs a whole step, so that nothing is left for `optim_step`."""
        number = self.trainer.global_step
        if dry_run:
            self.step.dry_run(batch, number + 1)
            return
        result = self.step(batch, number)
        if self.step.stopping:
            cancel(self.trainer)
        self.expert_counts = result.expert_counts
        for name, mean in result.means.items():
            self.record_metric(name, mean, ReduceType.mean)
        for name, largest in result.largest.items():
            self.record_metric(name, largest, ReduceType.max)
        for name, value in result.values.items():
            self.record_metric(name, value)

    def optim_step(self) -> None:
        """Does nothing: `train_batch` has updated the parameters."""

    def zero_grads(self) -> None:
        """Removes the gradients of all parameters, rows of tables included."""
        self.step.optimizer.zero_grad()

    def state_dict(self, *, optim: bool | None = None) -> dict[str, Any]:
        """Returns the live tensors by name; filling them in place restores the module."""
        step = self.step
        state = {f"model.{name}": tensor for name, tensor in step.model.state_dict().items()}
        if optim is not False:
            optimizer = step.optimizer.state_dict()
            state |= {f"optim.{name}": tensor for name, tensor in optimizer.items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies values into the live tensors of these names; others stay as they are."""
        state = self.state_dict()
        for name, value in state_dict.items():
            state[name].copy_(value)

    def eval_batch(self, batch: dict[str, Any], labels: Any | None = None) -> Any:
        """Returns the logits of a batch, without a gradient."""
        del labels
        self.step.model.eval()
        with torch.no_grad():
            return self.step.model(batch["input_ids"].to(self.step.device))

    @property
    def eval_batch_spec(self) -> EvalBatchSpec:
        """How many sequences OLMo-core's own evaluators, which are not used, may pass at once."""
        return EvalBatchSpec(rank_batch_size=self.step.config.micro_batch_size or 1)

    def num_flops_per_token(self, seq_len: int) -> int | None:
        """Returns None, since MetricsWriter counts the FLOPs."""
        return None

    def global_num_flops_in_batch(self, batch: dict[str, Any]) -> int | None:
        """Returns None, since MetricsWriter counts the FLOPs."""
        return None


def cancel(trainer: Trainer) -> None:
    """Ends the run after this step on all ranks, which have agreed on it."""
    trainer.cancel_run(trainer._cancel_reason or "another rank was asked to stop", no_sync=True)


class Loader(DataLoaderBase):
    """Yields the batches of a stream, which is one endless epoch.

    The ids have their own name and OLMo-core's. `vocab_size` bounds those of the dry run.
    """

    def __init__(self, stream: Stream | NeedleStream, work_dir: Path, vocab_size: int) -> None:
        self.stream = stream
        self.vocab_size = vocab_size
        super().__init__(
            work_dir=str(work_dir),
            global_batch_size=stream.batch_size * stream.seq_len * stream.world,
            # Ranks that share sequences count too: each has a part of their tokens.
            dp_world_size=distributed.world(),
            dp_rank=distributed.rank(),
        )

    @property
    def total_batches(self) -> int | None:
        """None: the stream has no end."""
        return None

    def reshuffle(self, epoch: int | None = None, **kwargs: Any) -> None:
        """Notes the epoch; the stream draws its own order."""
        self._epoch = epoch or 1

    def _iter_batches(self) -> Iterable[dict[str, Any]]:
        """Yields the stream's batches, with the ids under OLMo-core's name, too.

        An error of one rank, whose file cannot be read, is raised on all.
        """
        while True:
            with distributed.together():
                batch = next(self.stream)
            yield {**batch, "input_ids": batch["ids"]}

    def get_mock_batch(self) -> dict[str, Any]:
        """Returns a batch of the usual shape for the dry run, one document a sequence."""
        shape = self.stream.batch_size, self.stream.seq_len
        ids = (torch.arange(math.prod(shape)) % self.vocab_size).view(shape)
        document_ids = torch.zeros_like(ids)
        return {
            "ids": ids,
            "input_ids": ids,
            "labels": ids.roll(-1, 1),
            "document_ids": document_ids,
        }

    def global_num_tokens_in_batch(self, batch: dict[str, Any]) -> int | None:
        """Returns the tokens of a batch over all ranks, padding included."""
        return self.global_batch_size

    def skip(self, count: int) -> None:
        """Leaves out the next batches."""
        with distributed.together():
            for _ in range(count):
                next(self.stream)

    def state_dict(self) -> dict[str, Any]:
        """Returns the stream's position and the count of batches as JSON values."""
        return {"stream": self.stream.state_dict(), "batches_processed": self.batches_processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the batch after those that the saved state had read."""
        self.stream.load_state_dict(state_dict["stream"])
        self.batches_processed = state_dict["batches_processed"]


class WriteFuture(Future):
    """The future of a write on another thread, completed by the thread that polls it.

    OLMo-core's callbacks thus run on the training thread. They are called only if the write has
    succeeded; if it failed, `result` raises its error. Every rank polls it in the same steps: it is
    done when the writes of all ranks are, so that all see its error in one step.
    """

    def __init__(self, write: Future) -> None:
        super().__init__()
        self.write = write

    def add_done_callback(self, call: Callable[[Future], Any]) -> None:
        """Calls `call` when the write is done, unless it failed."""
        super().add_done_callback(lambda done: None if done.exception() else call(done))

    def done(self) -> bool:
        """Returns whether the writes of all ranks are done; every rank asks in the same steps."""
        if not super().done():
            finished = distributed.total(torch.tensor(int(self.write.done())))
            if finished == distributed.world():
                self._complete()
        return super().done()

    def result(self, timeout: float | None = None) -> None:
        """Waits for this rank's write, however long, and raises its error."""
        self._complete()
        return super().result(timeout)

    def _complete(self) -> None:
        """Waits for the write and copies its outcome, once."""
        if super().done():
            return
        error = self.write.exception()
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(None)


class SafetensorsCheckpointer(Checkpointer):
    """Writes and reads checkpoints by rorqual.checkpoint.

    It overrides every method of the base class that reads or writes pickles.
    """

    METADATA_FNAME: ClassVar[str] = checkpoint.DIGEST

    def __init__(self, folder: Path, verified: Path | None = None) -> None:
        """Starts the thread that writes.

        `verified` is a checkpoint that was found good just now, so that it need not be read twice.
        """
        super().__init__(work_dir=folder, save_overwrite=True)
        self.verified = verified
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(
        self,
        dir: Any,
        train_module: TrainModule,
        train_state: dict[str, Any],
        ephemeral: bool = False,
    ) -> None:
        """Writes a checkpoint on this thread; every rank calls it."""
        tensors = _state_to_save(train_module, train_state)
        checkpoint.save_state(_folder(dir), tensors, train_state, group=self.process_group)

    def save_async(
        self,
        dir: Any,
        train_module: TrainModule,
        train_state: dict[str, Any],
        ephemeral: bool = False,
    ) -> Future:
        """Copies everything now, and writes it on another thread.

        Of tables of rows and their optimizer state, which may fill the memory, only the rows that
        change meanwhile are copied, before they do (`RowSnapshot`).
        """
        current = _state_to_save(train_module, train_state)
        state_write = checkpoint.StateWrite(_folder(dir), group=self.process_group)
        rows = {name: tensor for name, tensor in current.items() if ".tables." in name}
        copies = {
            name: tensor.detach().clone() for name, tensor in current.items() if name not in rows
        }
        values = checkpoint.decode(checkpoint.encode(train_state))
        # Last, since it copies rows from here on until the write ends, which nothing may prevent.
        optimizer = cast(Module, train_module).step.optimizer
        reads = optimizer.snapshot()
        pieces = {
            f"{of}.{name}": read
            for name, read in reads.items()
            for of in ("model", "optim")
            if f"{of}.{name}" in current
        }

        def write_all() -> None:
            try:
                if rows:
                    state_write.add("rows", rows, pieces)
                state_write.add("rest", copies)
                state_write.complete(values)
            finally:
                optimizer.close_snapshot()

        return WriteFuture(self.writer.submit(write_all))

    def load(
        self,
        dir: Any,
        train_module: TrainModule,
        *,
        load_trainer_state: bool | None = None,
        load_optim_state: bool | None = None,
        reset_optimizer_states_on_load: bool | None = None,
    ) -> dict[str, Any] | None:
        """Fills the module in place, with a whole checkpoint or not at all."""
        partial = load_optim_state is False or load_trainer_state is False
        if partial or reset_optimizer_states_on_load:
            raise ValueError(
                "got a part of a checkpoint asked for, "
                "expected the whole: load_model reads weights alone"
            )
        state = train_module.state_dict()
        # The integer tensors of a model are Engram's addresses, which are not trained.
        addresses = {
            name: tensor.clone()
            for name, tensor in state.items()
            if name.startswith("model.") and not tensor.is_floating_point()
        }
        folder = _folder(dir)
        values = checkpoint.load_state(
            folder, state, verified=folder == self.verified, group=self.process_group
        )
        for name, tensor in addresses.items():
            if not torch.equal(tensor, state[name]):
                raise ValueError(
                    f"{dir}: got another {name}, expected this model's: another tokenizer made it"
                )
        return values

    @classmethod
    def dir_is_checkpoint(cls, dir: Any) -> bool:
        """Returns whether a folder is a whole checkpoint of ours."""
        return checkpoint.is_checkpoint(_folder(dir))

    @classmethod
    def find_checkpoints(cls, dir: Any, ephemeral: bool | None = None) -> Iterator[tuple[int, str]]:
        """Yields the step and the path of every whole checkpoint in a folder, oldest first."""
        for step, path in checkpoint.steps(_folder(dir)):
            yield step, str(path)

    @classmethod
    def latest_checkpoint(cls, dir: Any) -> str:
        """Returns the newest checkpoint that is good."""
        newest = checkpoint.latest(_folder(dir))
        if newest is None:
            raise FileNotFoundError(f"{dir}: got no checkpoint, expected stepN")
        return str(newest)


def _state_to_save(train_module: TrainModule, train_state: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the module's live tensors, and marks the step for the tables on disk.

    Those can be rewound to it from now on. Diverged, on every rank, where a number is not finite:
    no checkpoint is better than that one.
    """
    module = cast(Module, train_module)
    step = train_state["global_step"]
    state = module.state_dict_to_save()
    wrong = checkpoint.not_finite(state)
    is_wrong = torch.tensor(wrong is not None, device=module.step.device, dtype=torch.int)
    if distributed.total(is_wrong).item():
        raise Diverged(
            f"step {step}: got {wrong or 'a tensor of another rank'} that is not finite",
            ", so it was not saved; the checkpoint before it stays: lower --optim.lr or raise "
            "--optim.warmup in another --folder",
        )
    module.step.optimizer.mark(step)
    return state


def _folder(dir: Any) -> Path:
    """Returns a path of OLMo-core as ours. ValueError for a URL: checkpoints are local."""
    if "://" in str(dir):
        raise ValueError(f"got checkpoint folder {dir!r}, expected a local path")
    return Path(dir)


class CheckpointCallback(CheckpointerCallback):
    """Saves every `every` steps, while training continues, and at the end; keeps the newest `keep`.

    Those of earlier sessions count; those of multiples of `keep_every` are never removed, and do
    not count. None is written or removed after a step that changed nothing: it is not known
    whether its state is good. One that was due then is written after the next good step. After a
    rollback the batches that led to it are left out.
    """

    def __init__(
        self, every: int, keep: int, keep_every: int | None, rollbacks: Sequence[Rollback]
    ) -> None:
        super().__init__(save_interval=every, max_checkpoints=keep, pre_train_checkpoint=False)
        self.keep_every = keep_every
        self.rollbacks = rollbacks
        # Whether another number of ranks may have left rows on disk, and the step of the checkpoint
        # after which that was looked at.
        self._former_ranks = False
        self._looked_at = 0
        self._overdue = False

    @property
    def train_step(self) -> TrainStep:
        """The step that the trainer runs."""
        return cast(Module, self.trainer.train_module).step

    def pre_train(self) -> None:
        """Brings tables, the list of checkpoints and the stream to where the run resumes.

        Batches that led to a divergence after this checkpoint are left out.
        """
        super().pre_train()
        self.train_step.optimizer.rewind(self.step)
        # All ranks see one folder, and remove the same ones together.
        saved = self.checkpointer.find_checkpoints(self.save_folder)
        self._checkpoints = [path for step, path in saved if step <= self.step]
        self._latest_checkpoint_step = self.step if self.trainer.checkpoint_loaded else -1
        self._former_ranks = bool(self.train_step.optimizer.tables_on_disk)
        self._looked_at = self.step
        cast(Loader, self.trainer.data_loader).skip(
            sum(
                each.step - each.checkpoint
                for each in self.rollbacks
                if each.checkpoint == self.step
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts of skipped steps and the window of spikes as JSON values."""
        step = self.train_step
        state: dict[str, Any] = {"skipped": [step.skipped, step.skipped_in_a_row]}
        if step.spikes is not None:
            state["spikes"] = step.spikes.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the counts of skipped steps and the window of spikes."""
        step = self.train_step
        step.skipped, step.skipped_in_a_row = state_dict["skipped"]
        if step.spikes is not None and "spikes" in state_dict:
            step.spikes.load_state_dict(state_dict["spikes"])

    def post_train_batch(self) -> None:
        """Saves where a checkpoint is due, or was due in a step that changed nothing."""
        assert self.save_interval is not None
        is_due = self.step % self.save_interval == 0
        if self.train_step.skipped_in_a_row:
            self._overdue = self._overdue or is_due
            return
        if self._overdue and not is_due:
            self._checkpoints.append(self._save_checkpoint())
            self._trim_checkpoints()
        else:
            super().post_train_batch()
        self._overdue = False

    def post_train(self) -> None:
        """Saves the last step; after one that changed nothing, earlier checkpoints stay, too."""
        super().post_train()
        if not self.train_step.skipped_in_a_row:
            self._remove_old_checkpoints()

    def _remove_old_checkpoints(self) -> None:
        """Removes what is scheduled, and rows on disk of another number of ranks before this one.

        An error of one rank is raised on all.
        """
        if self._checkpoints_to_remove:
            with distributed.together():
                super()._remove_old_checkpoints()
        if self._former_ranks and self._latest_checkpoint_step > self._looked_at:
            self._looked_at = self._latest_checkpoint_step
            gone = True
            with distributed.together():
                if distributed.rank() == 0:
                    saved = [step for step, _ in checkpoint.steps(self.save_folder)]
                    # Older ones, which somebody has put there, are of steps without a mark.
                    newest = saved[-(self.max_checkpoints or 0) :]
                    gone = self.train_step.optimizer.forget_former_ranks(newest)
            self._former_ranks = bool(distributed.total(torch.tensor(int(not gone))))

    def _trim_checkpoints(self) -> None:
        """Schedules the removal of all but the newest checkpoints, and those that stay for good."""
        if self.keep_every is not None:
            number = checkpoint.step_of
            self._checkpoints = [
                path for path in self._checkpoints if number(path) % self.keep_every
            ]
        super()._trim_checkpoints()

    def finish_writes(self) -> None:
        """Waits for the checkpoint that is being written, and raises the error of its write."""
        self._await_last_checkpoint()

    def close(self) -> None:
        """Ends the writing thread. OLMo-core has waited for all writes before."""
        writer = getattr(self.checkpointer, "writer", None)
        if writer is not None:
            writer.shutdown(wait=True)


class MetricsCallback(ConsoleLoggerCallback):
    """Passes the metrics that OLMo-core collects to a MetricsWriter, instead of its console log."""

    # Runs before the checkpoint callback, whose time does not count as the step's.
    priority: ClassVar[int] = 2

    def __init__(self, writer: MetricsWriter) -> None:
        super().__init__()
        self.writer = writer

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds of training so far."""
        return {"seconds": self.writer.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the seconds of training before this session."""
        self.writer.seconds = state_dict["seconds"]

    def pre_train(self) -> None:
        """Opens the files of metrics for the steps to come."""
        self.writer.start(self.step)

    def pre_load_batch(self) -> None:
        """Starts the clock of a step."""
        self.writer.start_step()

    def pre_step(self, batch: dict[str, Any]) -> None:
        """Notes how long the batch took to arrive."""
        del batch
        self.writer.end_loading()

    def post_train_batch(self) -> None:
        """Notes how long the step took, and the tokens of each expert."""
        module = cast(Module, self.trainer.train_module)
        self.writer.end_step(self.step, module.expert_counts)

    def post_step(self) -> None:
        """Does nothing: the base class would log its progress."""

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a step's line; OLMo-core collects metrics some steps later."""
        # OLMo-core's own metrics have a slash in their names.
        of_step = {name: value for name, value in metrics.items() if "/" not in name}
        self.writer.write_step(step, of_step)

    def close(self) -> None:
        """Closes the event file of tensorboard."""
        self.writer.close()


class ValidationCallback(Callback):
    """Runs a Validation after the steps at which it is due."""

    def __init__(self, validation: Validation) -> None:
        super().__init__()
        self.validation = validation

    def pre_train(self) -> None:
        """Runs what a stop of the run interrupted."""
        if self.trainer.checkpoint_loaded:
            self._run(missing_alone=True)

    def post_step(self) -> None:
        """Validates after a step at which it is due."""
        self._run()

    def _run(self, missing_alone: bool = False) -> None:
        """Runs the validation, and ends the run where a stop interrupted it."""
        if not self.validation.after_step(self.step, missing_alone=missing_alone):
            cancel(self.trainer)


class ProfileCallback(Callback):
    """Writes a trace of one step to FOLDER/profile, for chrome://tracing or Perfetto.

    OLMo-core's ProfilerCallback counts the steps of a session, not of the run, and writes nothing
    where the profiled step is the last.
    """

    def __init__(self, folder: Path, number: int) -> None:
        super().__init__()
        self.folder = folder
        self.number = number
        self._profile: profile | None = None

    def pre_load_batch(self) -> None:
        """Starts to record before the batch of the profiled step is read."""
        if self.step + 1 == self.number:
            activities = [ProfilerActivity.CPU]
            if self.trainer.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def post_step(self) -> None:
        """Writes the trace of the profiled step, a file a rank."""
        if self._profile is None:
            return
        self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step{self.step}-rank{distributed.rank()}.json.gz"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        runtime.log(f"the trace of step {self.step} is in {path}")

    def close(self) -> None:
        """Ends a profile whose step did not."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None


def _has_wandb_key() -> bool:
    """Returns whether the environment, or the file of `wandb login`, has an API key."""
    if WANDB_API_KEY_ENV_VAR in os.environ:
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WeightsAndBiases(WandBCallback):
    """Sends every line of metrics to a project of Weights & Biases, from rank 0.

    A resumed run goes on as the same run there. Without an API key runs are written to
    FOLDER/wandb alone, as with WANDB_MODE=offline, and `wandb sync` sends them.
    """

    def __init__(self, project: str, folder: Path, config: TrainConfig) -> None:
        super().__init__(
            project=project, name=folder.name, config=configs.to_dict(config), cancel_tags=None
        )
        self.folder = folder

    def pre_train(self) -> None:
        """Begins the run on rank 0, or goes on with that of FOLDER/wandb/run_id."""
        if distributed.rank() != 0 or self.run is not None:
            return
        folder = self.folder / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / "run_id"
        if not name.is_file():
            write_text(name, secrets.token_hex(4))
        offline = not _has_wandb_key() and "WANDB_MODE" not in os.environ
        if offline:
            runtime.log(
                f"no API key of Weights & Biases: the run is written to {folder}, and "
                "`wandb sync` sends it later"
            )
        self.wandb.init(
            dir=self.folder,
            project=self.project,
            name=self.name,
            config=self.config,
            id=name.read_text(encoding="utf-8"),
            resume="allow",
            mode="offline" if offline else None,
        )
        # Lines come late and repeat steps, which a step of wandb's own would refuse.
        self.wandb.define_metric("*", step_metric="step")

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Does nothing: `send` is called with every line, those of validations too."""

    def send(self, line: Mapping[str, Any]) -> None:
        """Sends the numbers of a line; texts and lists stay out."""
        if self.run is not None:
            self.wandb.log(
                {name: value for name, value in line.items() if not isinstance(value, (str, list))}
            )

    def on_error(self, exc: BaseException) -> None:
        """Does nothing: a rollback goes on after an error."""

    def close(self) -> None:
        """Does nothing: the last validation comes after the training."""

    def finish(self, kind: object, error: object, trace: object) -> None:
        """Ends the run, as the exit of a `with` block; an error marks it as failed."""
        del kind, trace
        if distributed.rank() == 0 and self.run is not None:
            self.wandb.finish(exit_code=int(error is not None))


def fit(step: TrainStep, loader: Loader, callbacks: dict[str, Callback]) -> int:
    """Trains from the newest good checkpoint to the last step; returns the step it ended at.

    That is less than `config.steps` if training was interrupted. Where it diverges it goes back to
    that checkpoint, if `config.on_diverged` says so, and on with the batches after those that led
    there, as PaLM was trained (arXiv 2204.02311, 5.1): the same would lead there again.
    """
    config = step.config
    folder = Path(config.folder) / "checkpoints"
    with distributed.together():
        if distributed.rank() == 0:
            checkpoint.recover(folder)
    rollbacks = run_folder.read_rollbacks(Path(config.folder))
    while True:
        newest = checkpoint.latest(folder, shared=True)
        saving = CheckpointCallback(config.save_every, config.keep, config.keep_every, rollbacks)
        trainer = Trainer(
            work_dir=folder,
            save_folder=str(folder),
            train_module=Module(step),
            data_loader=loader,
            device=step.device,
            checkpointer=SafetensorsCheckpointer(folder, verified=newest),
            # It would look for the newest checkpoint by rank 0 alone.
            load_strategy=LoadStrategy.never,
            callbacks={**callbacks, "checkpointer": saving},
            max_duration=Duration.steps(config.steps),
            metrics_collect_interval=config.log_every,
            # Several ranks agree on a stop in each step (TrainStep.find_problem). OLMo-core's
            # check runs beside training: two ranks may learn its result in different steps.
            cancel_check_interval=1 if distributed.world() == 1 else config.steps + 1,
        )
        try:
            if newest is not None:
                trainer.load_checkpoint(newest, load_trainer_state=True, load_optim_state=True)
            with _saved_first(trainer):
                trainer.fit()
            return trainer.global_step
        except Diverged as error:
            if config.on_diverged == "stop":
                raise
            trainer._join_bookkeeping_ops()
            saving.finish_writes()
            rollbacks = [*rollbacks, roll_back(config, trainer.global_step, rollbacks, error)]
            with distributed.together():
                if distributed.rank() == 0:
                    run_folder.write_rollbacks(Path(config.folder), rollbacks)
            # A new trainer would not know that this one was asked to stop.
            if step.stopping or trainer._canceled:
                return rollbacks[-1].checkpoint
        except RuntimeError as error:
            if error.__cause__ is None or not _raised_by_trainer(error):
                raise
            # The trainer reports an error on one of its threads as the cause of its own error.
            raise error.__cause__ from None


@contextmanager
def _saved_first(trainer: Trainer) -> Iterator[None]:
    """Lets SIGTERM and ctrl-C wait until the steps of the block are saved.

    The trainer handles both while it trains, and gives them back before it writes its last
    checkpoint. Then the first one waits for that, and a second one does not.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first_step = trainer.global_step
    numbers = (signal.SIGTERM, signal.SIGINT)
    arrived: list[int] = []

    def give_back() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def wait(number: int, frame: Any) -> None:
        if arrived or trainer.global_step == first_step:
            arrived.clear()
            give_back()
            signal.raise_signal(number)
        else:
            arrived.append(number)

    handlers = {number: signal.signal(number, wait) for number in numbers}
    try:
        yield
    finally:
        give_back()
        if arrived:
            signal.raise_signal(arrived[0])


def _last_sound(folder: Path) -> int:
    """Returns the step of the newest good checkpoint that no skipped step came before; -1 for none.

    Newer ones, of runs that were stopped in a streak of skipped steps, are removed: their state led
    to more of these. Every rank calls it.
    """
    while (path := checkpoint.latest(folder, shared=True)) is not None:
        # Rank 0 reads it for all: it may remove the folder before another rank opens a file there.
        values = ranks.from_first(partial(checkpoint.read_values, path))
        if not values["callbacks"]["checkpointer"]["skipped"][1]:
            return checkpoint.step_of(path)
        with distributed.together():
            if distributed.rank() == 0:
                shutil.rmtree(path)
    return -1


def roll_back(
    config: TrainConfig, step: int, before: Sequence[Rollback], error: Diverged
) -> Rollback:
    """Returns where a run that diverged goes back to.

    Raises its error where there is no checkpoint, or if there were too many rollbacks.
    """
    saved = _last_sound(Path(config.folder) / "checkpoints")
    if saved < 0:
        hint = f"{error.advice}; there is no checkpoint to roll back to yet"
        raise Diverged(error.problem, hint) from error
    if len(before) >= config.rollbacks:
        hint = f"{error.advice} (there were {len(before)} rollbacks before)"
        raise Diverged(error.problem, hint) from error
    runtime.log(
        f"step {step}: the run diverged and goes back to step {saved} (rollback {len(before) + 1} "
        f"of {config.rollbacks}); the {step - saved} batches in between are left out",
        style="bold",
    )
    return Rollback(step, saved, error.problem)


def _raised_by_trainer(error: BaseException) -> bool:
    """Returns whether OLMo-core's trainer itself raised an error, and not code that it called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"] == Trainer.__module__
