"""Our model, batches and checkpoints in -> what OLMo-core's trainer drives out.

OLMo-core owns the loop, its callbacks and the signals. Here are the four parts it is given: `Module` (losses,
gradients, the optimizer, the routers' biases), `Loader` (our stream), `SafetensorsCheckpointer` (our checkpoints) and
`CheckpointCallback` (when to write them, which to drop). Its own checkpoints are pickles; `SafetensorsCheckpointer`
leaves no way to them.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from olmo_core.data import DataLoaderBase
from olmo_core.train import Checkpointer, Duration, ReduceType, Trainer
from olmo_core.train.callbacks import Callback, CheckpointerCallback
from olmo_core.train.train_module import EvalBatchSpec, TrainModule
from torch import Tensor, nn

from rorqual import checkpoint, parallel, runtime
from rorqual.data.needles import NeedleStream
from rorqual.data.stream import Stream
from rorqual.layers.balance import max_violation, update_bias
from rorqual.layers.hyper import health
from rorqual.layers.moba import switch
from rorqual.layers.moe import MoE
from rorqual.model import IGNORED, Loss
from rorqual.train.optim import Diverged, Optimizer, schedule

STREAM_INTERVAL = 50  # steps between two looks at the residual streams
STREAM_METRICS = ("row_gain", "column_gain", "stream_spread")  # what is seen


class Module(TrainModule):
    """One optimizer step: the loss of `model.loss` over micro-batches, clipping, updates, balance.

    micro_rows: rows a forward pass; None takes a batch whole. late: from this step on the routers' biases stay as they
    are. mtp_late: MTP's weight in the last third of the steps. indexer_alone: nothing else learns while DSA's indexers
    warm up. skip_limit: a step whose losses or gradients are not finite updates nothing, and so many in a row end the
    run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        steps: int,
        micro_rows: int | None = None,
        dtype: torch.dtype = torch.float32,
        late: int | None = None,
        mtp_late: float | None = None,
        indexer_alone: bool = False,
        skip_limit: int = 10,
    ) -> None:
        super().__init__()
        self.model, self.optimizer, self.steps = model, optimizer, steps
        self.micro_rows, self.dtype, self.late, self.mtp_late = micro_rows, dtype, late, mtp_late
        self.indexer_alone, self.device = indexer_alone, next(model.parameters()).device
        self.mixtures = [module for module in model.modules() if isinstance(module, MoE)]
        self.expert_counts: Tensor | None = None  # tokens each expert took since the last optimizer step
        self.expert_load: Tensor | None = None  # the same of the last step, over all ranks, [mixtures, E]
        self.losses: dict[str, Tensor] = {}  # of the batch whose gradients are waiting
        self.skip_limit = skip_limit
        # steps that updated nothing: of the whole run, and of those the last ones in a row
        self.skipped, self.skipped_in_a_row = 0, 0

    def train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None:
        """Gradients of one batch, weighted by tokens over micro-batches and ranks. A dry run leaves no trace."""
        self.model.train()
        if (moba := self.model.config.moba) is not None:  # type: ignore[union-attr]
            switch(self.model, self.trainer.global_step > moba.full_from * self.steps)  # type: ignore[operator, union-attr]
        if dry_run:
            with unchanged_random_state():
                self._accumulate(batch)
            self.zero_grads()
            return
        self._measure_streams(batch)
        self.losses = self._accumulate(batch)

    def _measure_streams(self, batch: dict[str, Any]) -> None:
        """Every so many steps, how the streams fare on one row, before it is learnt from."""
        if self.model.config.hyper is None or (self.trainer.global_step - 1) % STREAM_INTERVAL:  # type: ignore[union-attr]
            return
        ids, labels, documents = (batch[name][:1].to(self.device) for name in ("input_ids", "labels", "documents"))
        with unchanged_random_state(), autocast(self.device, self.dtype):
            found = health(self.model, lambda: self.model.loss(ids, labels, documents=documents))  # type: ignore[operator]
        for name, value in zip(STREAM_METRICS, found or (), strict=True):
            self.record_metric(name, value, ReduceType.max)

    def _accumulate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        ids, labels, documents = (batch[name].to(self.device) for name in ("input_ids", "labels", "documents"))
        rows = self.micro_rows or len(ids)
        tokens = parallel.total((labels != IGNORED).sum())
        sums: dict[str, Tensor] = {}
        self.expert_counts = None
        for at in range(0, len(ids), rows):
            part = slice(at, at + rows)
            with autocast(self.device, self.dtype):
                loss = self.model.loss(ids[part], labels[part], documents=documents[part], warm=self.indexer_warmup)  # type: ignore[operator]
            # ranks average their gradients, so a rank's share is counted against the mean of all
            share = loss.tokens * parallel.world() / tokens
            (self._training_loss(loss) * share).backward()
            for name, value in _losses(loss).items():
                sums[name] = sums.get(name, 0.0) + value.detach() * share
            if loss.counts is not None:
                self.expert_counts = loss.counts if self.expert_counts is None else self.expert_counts + loss.counts
        return sums

    def _training_loss(self, loss: Loss) -> Tensor:
        """The total, with MTP at its late weight once that time has come; the indexers' loss where they learn alone."""
        if self.indexers_alone and loss.lesson is not None:
            return self.model.config.dsa.weight * loss.lesson.loss  # type: ignore[operator, union-attr]
        if loss.mtp is None or self.mtp_late is None or 3 * self.trainer.global_step <= 2 * self.steps:
            return loss.total
        return loss.total + (self.mtp_late - self.model.config.mtp.weight) * loss.mtp  # type: ignore[operator, union-attr]

    @property
    def indexer_warmup(self) -> bool:
        """Whether DSA's indexers warm up in this step, which its number alone tells."""
        dsa = self.model.config.dsa  # type: ignore[union-attr]
        return dsa is not None and self.trainer.global_step <= dsa.warmup  # type: ignore[union-attr]

    @property
    def indexers_alone(self) -> bool:
        return self.indexer_alone and self.indexer_warmup

    def optim_step(self) -> None:
        """Update everything, unless a loss or a gradient of any rank is not finite: then nothing."""
        step = self.trainer.global_step - 1
        factor = schedule(step, self.steps, self.optimizer.config)
        for name in self.optimizer.rows:
            parallel.mean_rows(self.optimizer.parameters[name])
        norm = self.optimizer.clip()
        wrong = self._not_finite(self.losses | {"grad_norm": norm})
        # the engine takes a loss that is not finite for the end of the run
        for name in self.losses.keys() - wrong:
            self.record_metric(name, self.losses[name], ReduceType.mean)
        if "grad_norm" not in wrong:
            self.record_metric("grad_norm", norm)
        self.record_metric("lr", self.optimizer.config.lr * factor)
        if wrong:
            self._skip("loss" if wrong != {"grad_norm"} else "gradient")
        else:
            self._update(step, factor)
        if self.skipped:
            self.record_metric("skipped_steps", self.skipped)

    def _update(self, step: int, factor: float) -> None:
        self.skipped_in_a_row = 0
        self.optimizer.step(factor)
        if self.expert_counts is not None:
            late = self.late is not None and step >= self.late
            self._balance(parallel.total(self.expert_counts), resting=late or self.indexers_alone)

    def _not_finite(self, values: Mapping[str, Tensor]) -> set[str]:
        """The names of those that are NaN or infinite on any rank, so that all ranks decide alike."""
        finite = torch.stack([value.detach().to(self.device).isfinite() for value in values.values()])
        wrong = parallel.total((~finite).int()).tolist()
        return {name for name, count in zip(values, wrong, strict=True) if count}

    def _skip(self, what: str) -> None:
        """Leave everything as it is. Diverged where that happened too often in a row."""
        self.expert_load = None
        self.skipped += 1
        self.skipped_in_a_row += 1
        step, count = self.trainer.global_step, self.skipped_in_a_row
        runtime.log(
            f"step {step}: got a {what} that is not finite, so nothing was updated "
            f"({count} in a row, {self.skip_limit} stop the run)"
        )
        if count >= self.skip_limit:
            raise Diverged(
                f"got no finite {what} in {count} steps in a row, the last of them {step}, so the run has stopped; "
                "its last checkpoint is good: lower --optim.lr or raise --optim.warmup in another --folder"
            )

    def _balance(self, counts: Tensor, resting: bool) -> None:
        """Loss-free balancing: once a step, over all micro-batches and ranks."""
        self.expert_load, worst = counts, [max_violation(count) for count in counts]
        self.record_metric("max_violation", max(worst))
        for mixture, count in zip(self.mixtures, counts, strict=True):
            rate = 0.0 if resting else mixture.config.balance.bias_rate
            if rate:
                update_bias(mixture.router.e_score_correction_bias, count, rate)

    def zero_grads(self) -> None:
        self.optimizer.zero_grad()

    def state_dict(self, *, optim: bool | None = None) -> dict[str, Any]:
        """Flat name -> live tensor; filling these in place restores the module."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if optim is not False:
            state |= {f"optim.{name}": tensor for name, tensor in self.optimizer.state_dict().items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = self.state_dict(optim=None)
        for name, value in state_dict.items():
            own[name].copy_(value)

    def eval_batch(self, batch: dict[str, Any], labels: Any | None = None) -> Any:
        del labels
        self.model.eval()
        with torch.no_grad():
            return self.model(batch["input_ids"].to(self.device))

    @property
    def eval_batch_spec(self) -> EvalBatchSpec:
        return EvalBatchSpec(rank_batch_size=self.micro_rows or 1)

    def num_flops_per_token(self, seq_len: int) -> int | None:
        return None

    def global_num_flops_in_batch(self, batch: dict[str, Any]) -> int | None:
        return None


def _losses(loss: Loss) -> dict[str, Tensor]:
    """What is recorded of a loss."""
    found = {"train/CE loss": loss.next_token, "total": loss.total}
    if loss.mtp is not None:
        found["mtp"] = loss.mtp
    if loss.lesson is not None:
        found |= {"indexer": loss.lesson.loss, "indexer_recall": loss.lesson.recall}
    return found | {f"balance/{name}": value for name, value in loss.balance.items()}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; parameters and sums stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Whatever is drawn inside, the generators of Python, numpy and torch stand as before after it."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


class Loader(DataLoaderBase):
    """A stream as OLMo-core wants it. `vocabulary`: ids below it occur (the dry run's are made of them)."""

    def __init__(self, stream: Stream | NeedleStream, work_dir: Path, vocabulary: int) -> None:
        self.stream, self.vocabulary = stream, vocabulary
        size = stream.rows * stream.length * stream.world
        super().__init__(
            work_dir=str(work_dir), global_batch_size=size, dp_world_size=stream.world, dp_rank=stream.rank
        )

    @property
    def total_batches(self) -> int | None:
        return None  # the stream never ends, so the engine sees one epoch

    def reshuffle(self, epoch: int | None = None, **kwargs: Any) -> None:
        self._epoch = epoch or 1

    def _iter_batches(self) -> Iterable[dict[str, Any]]:
        for batch in self.stream:
            yield {"input_ids": batch["ids"], "labels": batch["labels"], "documents": batch["documents"]}

    def get_mock_batch(self) -> dict[str, Any]:
        rows, length = self.stream.rows, self.stream.length
        ids = (torch.arange(rows * length) % self.vocabulary).view(rows, length)
        return {"input_ids": ids, "labels": ids.roll(-1, 1), "documents": torch.zeros_like(ids)}

    def global_num_tokens_in_batch(self, batch: dict[str, Any]) -> int | None:
        return self.global_batch_size

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "batches_processed": self.batches_processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stream.load_state_dict(state_dict["stream"])
        self.batches_processed = state_dict["batches_processed"]


class WriteFuture(Future):
    """The future of work on another thread that completes only on the thread which asks, so callbacks run there."""

    def __init__(self, work: Future) -> None:
        super().__init__()
        self.work = work

    def add_done_callback(self, call: Any) -> None:
        """Called if the work succeeds; where it failed, whoever asks for the result learns that, and nobody before."""
        super().add_done_callback(lambda done: None if done.exception() else call(done))

    def _finish(self) -> None:
        if super().done():
            return
        if error := self.work.exception():
            self.set_exception(error)
        else:
            self.set_result(None)

    def done(self) -> bool:
        if self.work.done():
            self._finish()
        return super().done()

    def result(self, timeout: float | None = None) -> None:
        self._finish()
        return super().result(timeout)


class SafetensorsCheckpointer(Checkpointer):
    """Checkpoints by `rorqual.checkpoint` alone: every way of the base class to its pickles is overridden."""

    METADATA_FNAME: ClassVar[str] = checkpoint.DIGEST

    def __init__(self, folder: Path) -> None:
        super().__init__(work_dir=folder, save_overwrite=True)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, dir: Any, train_module: TrainModule, train_state: dict[str, Any], ephemeral: bool = False) -> None:
        tensors = _good_state(train_module, train_state["global_step"])
        train_module.optimizer.mark(train_state["global_step"])
        checkpoint.save_state(_folder(dir), tensors, train_state, group=self.process_group)

    def save_async(
        self, dir: Any, train_module: TrainModule, train_state: dict[str, Any], ephemeral: bool = False
    ) -> Future:
        """Copies everything now, writes it on another thread."""
        live = _good_state(train_module, train_state["global_step"])
        train_module.optimizer.mark(train_state["global_step"])
        tensors = {name: tensor.detach().clone() for name, tensor in live.items()}
        state = checkpoint.decode(checkpoint.encode(train_state))
        folder, group = _folder(dir), self.process_group
        return WriteFuture(self.writer.submit(checkpoint.save_state, folder, tensors, state, group=group))

    def load(
        self,
        dir: Any,
        train_module: TrainModule,
        *,
        load_trainer_state: bool | None = None,
        load_optim_state: bool | None = None,
        reset_optimizer_states_on_load: bool | None = None,
    ) -> dict[str, Any] | None:
        """Fills the module in place; the engine asks for everything, always."""
        if load_optim_state is False or load_trainer_state is False or reset_optimizer_states_on_load:
            raise ValueError("got a part of a checkpoint asked for, expected the whole: load_model reads weights alone")
        state = train_module.state_dict()
        fixed = {name: tensor.clone() for name, tensor in state.items() if _is_address(name, tensor)}
        values = checkpoint.load_state(_folder(dir), state, group=self.process_group)
        for name, tensor in fixed.items():
            if not torch.equal(tensor, state[name]):
                raise ValueError(f"{dir}: got another {name}, expected this model's: another tokenizer made it")
        return values

    @classmethod
    def dir_is_checkpoint(cls, dir: Any) -> bool:
        return checkpoint.is_checkpoint(_folder(dir))

    @classmethod
    def find_checkpoints(cls, dir: Any, ephemeral: bool | None = None) -> Iterator[tuple[int, str]]:
        yield from ((step, str(path)) for step, path in checkpoint.steps(_folder(dir)))

    @classmethod
    def latest_checkpoint(cls, dir: Any) -> str:
        """The newest that is good."""
        found = checkpoint.latest(_folder(dir))
        if found is None:
            raise FileNotFoundError(f"{dir}: got no checkpoint, expected stepN")
        return str(found)


def _good_state(module: TrainModule, step: int) -> dict[str, Tensor]:
    """What is to be saved. Diverged, on every rank, where a number in it is not finite: no checkpoint is better."""
    state = module.state_dict_to_save()
    wrong = checkpoint.not_finite(state)
    if int(parallel.total(torch.tensor(wrong is not None, device=module.device, dtype=torch.int))):
        raise Diverged(
            f"step {step}: got {wrong or 'a tensor of another rank'} that is not finite, so it was not saved; the "
            "checkpoint before it stays: lower --optim.lr or raise --optim.warmup in another --folder"
        )
    return state


def _is_address(name: str, tensor: Tensor) -> bool:
    """Whole numbers of a model are Engram's addresses: they are given, not learnt."""
    return name.startswith("model.") and not tensor.is_floating_point()


def _folder(dir: Any) -> Path:
    if "://" in str(dir):
        raise ValueError(f"got checkpoint folder {dir!r}, expected a local path")
    return Path(dir)


class CheckpointCallback(CheckpointerCallback):
    """Writes every so many steps, while training goes on, and at the end; keeps the newest, of earlier sessions too."""

    def __init__(self, every: int, keep: int) -> None:
        super().__init__(save_interval=every, max_checkpoints=keep, pre_train_checkpoint=False)

    def pre_train(self) -> None:
        super().pre_train()
        self.trainer.train_module.optimizer.rewind(self.step)
        if parallel.rank() == 0:
            found = self.checkpointer.find_checkpoints(self.save_folder)
            self._checkpoints = [path for step, path in found if step <= self.step]
        self._latest_checkpoint_step = self.step if self.trainer.checkpoint_loaded else -1

    def state_dict(self) -> dict[str, Any]:
        module = self.trainer.train_module
        return {"skipped": [module.skipped, module.skipped_in_a_row]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        module = self.trainer.train_module
        module.skipped, module.skipped_in_a_row = state_dict.get("skipped", (0, 0))

    def post_train_batch(self) -> None:
        """Not where the step updated nothing: what it would write is not known to be good, and old ones would go."""
        if not self.trainer.train_module.skipped_in_a_row:
            super().post_train_batch()

    def post_train(self) -> None:
        super().post_train()
        if not self.trainer.train_module.skipped_in_a_row:
            self._remove_old_checkpoints()

    def close(self) -> None:
        """The engine has waited for all writes by now."""
        writer = getattr(self.checkpointer, "writer", None)
        if writer is not None:
            writer.shutdown(wait=True)


def fit(module: Module, loader: Loader, folder: Path, collect: int, callbacks: dict[str, Callback]) -> int:
    """Run OLMo-core's trainer from the newest good checkpoint in `folder`; the step it ended at.

    `collect`: steps between two looks at the metrics. Fewer than the module's steps were made if it was asked to stop.
    """
    if parallel.rank() == 0:
        checkpoint.recover(folder)
    trainer = Trainer(
        work_dir=folder,
        save_folder=str(folder),
        train_module=module,
        data_loader=loader,
        device=module.device,
        checkpointer=SafetensorsCheckpointer(folder),
        callbacks=callbacks,
        max_duration=Duration.steps(module.steps),
        metrics_collect_interval=collect,
        cancel_check_interval=1 if parallel.world() == 1 else 10,
    )
    try:
        trainer.fit()
    except RuntimeError as error:
        # what failed on another thread of the engine
        if error.__cause__ is None or str(error) != "An error occurred":
            raise
        raise error.__cause__ from None
    return trainer.global_step


def metrics_of(found: Mapping[str, float]) -> dict[str, float]:
    """The engine's names of a step's metrics -> ours, in the order they are written."""
    plain = ("total", "mtp", "indexer", "indexer_recall", "lr", "grad_norm", *STREAM_METRICS)
    ours = {"loss": found["train/CE loss"]} if "train/CE loss" in found else {}
    ours |= {name: found[name] for name in plain if name in found}
    ours |= {name.replace("/", "_"): value for name, value in found.items() if name.startswith("balance/")}
    ours |= {"max_violation": found["max_violation"]} if "max_violation" in found else {}
    return ours | ({"skipped_steps": int(found["skipped_steps"])} if "skipped_steps" in found else {})
