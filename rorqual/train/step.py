"""One training step, from a batch to updated parameters.

`TrainStep` is all that training does to a model. OLMo-core's loop calls it (engine.py), and it
also works without that loop, called with one batch after another.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rorqual import distributed, runtime
from rorqual.layers import dsa
from rorqual.layers.balance import max_violation, update_bias
from rorqual.layers.engram import Engram
from rorqual.layers.hyper import health
from rorqual.layers.moba import switch
from rorqual.layers.moe import MoE
from rorqual.model import IGNORED, LanguageModel, Loss
from rorqual.model_config import DSAConfig
from rorqual.train.config import TrainConfig
from rorqual.train.optim import Optimizer, schedule
from rorqual.train.spikes import SpikeDetector

STREAM_INTERVAL = 50  # steps between two measurements of the residual streams and of the gates
STREAM_METRICS = ("row_gain", "column_gain", "stream_spread")

Batch = Mapping[str, Tensor]  # "ids", "labels" and "document_ids", each [batch_size, seq_len]


class Diverged(RuntimeError):
    """Losses, gradients or weights stay NaN or infinite, and training cannot continue.

    `problem` says what was not finite, `advice` what follows; the text is both.
    """

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(problem + advice)
        self.problem = problem
        self.advice = advice


class Problem(NamedTuple):
    """Why a step is skipped."""

    got: str  # what there was: "loss that is not finite"
    wanted: str  # what there was not: "finite loss"


class StepResult(NamedTuple):
    """The measurements of a step."""

    means: dict[str, Tensor]  # this rank's part; the batch's value is the mean over ranks
    largest: dict[str, float]  # of this rank; the largest over ranks counts
    values: dict[str, float | Tensor]  # the same on every rank
    expert_counts: Tensor | None  # [layers, E] tokens of all ranks that were routed to each expert


class TrainStep:
    """Trains a model on one batch a call.

    A step whose losses or gradients are NaN or infinite on any rank changes nothing, nor does one
    with a spike where `config.skip_spikes` is set. `config.skip_limit` such steps in a row raise
    Diverged. `stop_requested` says whether this rank was asked to stop; the ranks agree on it in
    each step, and `stopping` is what they agreed on.
    """

    def __init__(self, model: LanguageModel, optimizer: Optimizer, config: TrainConfig) -> None:
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.device = next(model.parameters()).device
        self.dtype = runtime.dtype(config.dtype)
        self.mixtures = [module for module in model.modules() if isinstance(module, MoE)]
        self.exchanges = distributed.exchanges(model)
        self.spikes = None if config.skip_spikes is None else SpikeDetector(config.skip_spikes)
        self.skipped = 0  # steps of the whole run that changed nothing
        self.skipped_in_a_row = 0
        self.stop_requested: Callable[[], bool] = lambda: False
        self.stopping = False

    def __call__(self, batch: Batch, step: int) -> StepResult:
        """Trains on one batch of this rank. `step` counts from 1 over the whole run."""
        config = self.config
        self.prepare_model(step)
        stream_metrics, gate_means = self.measure_inside(batch, step)
        sent_before = self.bytes_sent()

        # Forward and backward, one micro-batch at a time.
        losses, expert_counts = self.forward_backward(batch, step)

        # The gradients of other parameters and of sharded rows are means over ranks already.
        for name in self.optimizer.replicated_rows:
            distributed.mean_rows(self.optimizer.parameters[name])
        grad_norm = self.optimizer.clip()

        # Update, or skip the step.
        problem = self.find_problem(losses | {"grad_norm": grad_norm})
        rate = schedule(step - 1, config.steps, config.optim)
        values: dict[str, float | Tensor] = {"grad_norm": grad_norm, "lr": config.optim.lr * rate}
        if self.optimizer.rows:
            values["rows_touched"] = self.count_touched_rows()
        if problem is not None:
            self.skip(step, problem)
            expert_counts = None
        elif not grad_norm:
            # A batch of chats without any label: no decay, no momentum, no loss.
            self.skipped_in_a_row = 0
            losses = {}
            expert_counts = None
        else:
            self.skipped_in_a_row = 0
            self.optimizer.step(rate)
            if expert_counts is not None:
                expert_counts = distributed.total(expert_counts)
                self.balance_experts(expert_counts, step)
                values["max_violation"] = max(max_violation(counts) for counts in expert_counts)
        if self.skipped:
            values["skipped_steps"] = self.skipped
        if self.exchanges:
            values["bytes_exchanged"] = self.bytes_sent() - sent_before
        return StepResult(losses | gate_means, stream_metrics, values, expert_counts)

    def forward_backward(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Accumulates the gradients of all micro-batches; returns the losses and expert counts.

        A micro-batch is weighted by its share of the labels of all ranks.
        """
        self.optimizer.begin_step()
        losses: dict[str, Tensor] = {}
        expert_counts = None
        on_device = [batch[name].to(self.device) for name in ("ids", "labels", "document_ids")]
        # A batch of chats may have no label.
        label_count = distributed.total((on_device[1] != IGNORED).sum()).clamp_min(1)
        size = self.config.micro_batch_size or len(on_device[0])
        micro_batches = list(zip(*(t.split(size) for t in on_device), strict=True))
        for number, (ids, labels, document_ids) in enumerate(micro_batches, start=1):
            distributed.average_over_replicas(self.model, number == len(micro_batches))
            with autocast(self.device, self.dtype):
                indexer_warmup = self.indexer_warmup(step)
                loss = self.model.loss(
                    ids, labels, document_ids=document_ids, indexer_warmup=indexer_warmup
                )
            # Ranks average their gradients, so the share is that of the mean rank's labels.
            share = loss.tokens * distributed.world() / label_count
            (self.minimised(loss, step) * share).backward()
            for name, value in named_losses(loss).items():
                losses[name] = losses.get(name, 0.0) + value.detach() * share
            if loss.counts is not None:
                expert_counts = loss.counts + (0 if expert_counts is None else expert_counts)
        return losses, expert_counts

    def minimised(self, loss: Loss, step: int) -> Tensor:
        """Returns the weighted sum of losses that this step minimises."""
        config = self.model.config
        if loss.indexer_loss is not None and self.only_indexers_learn(step):
            assert config.indexer is not None
            return config.indexer.weight * loss.indexer_loss.loss
        late = 3 * step > 2 * self.config.steps
        if loss.mtp is not None and self.config.mtp_late is not None and late:
            assert config.mtp is not None
            return loss.total + (self.config.mtp_late - config.mtp.weight) * loss.mtp
        return loss.total

    def indexer_warmup(self, step: int) -> bool:
        """Returns whether the indexers warm up in this step, after those of dense attention."""
        indexer = self.model.config.indexer
        if indexer is None:
            return False
        # DSA alone can begin with steps of dense attention.
        dense = indexer.dense if isinstance(indexer, DSAConfig) else 0
        return dense < step <= dense + indexer.warmup

    def only_indexers_learn(self, step: int) -> bool:
        """Returns whether only the indexers are trained, during their warm-up."""
        return self.config.indexer_alone and self.indexer_warmup(step)

    def find_problem(self, values: Mapping[str, Tensor]) -> Problem | None:
        """Returns why this step must be skipped, None if it need not; all ranks agree.

        A sum over ranks is not finite if a rank's value is not. The same sum tells every rank
        whether one of them was asked to stop, and whether the rows of one could not be written,
        which all raise.
        """
        error = self.optimizer.failed_write()
        flags = torch.tensor([self.stop_requested(), error is not None], dtype=torch.float32)
        stacked = torch.stack([value.detach().to(self.device).float() for value in values.values()])
        *sums, stops, failed = distributed.total(
            torch.cat([stacked, flags.to(self.device)])
        ).tolist()
        self.stopping = stops > 0
        if failed:
            distributed.raise_together(error)
        means = {
            name: total / distributed.world() for name, total in zip(values, sums, strict=True)
        }
        not_finite = {name for name, mean in means.items() if not math.isfinite(mean)}
        if not_finite:
            what = "gradient" if not_finite == {"grad_norm"} else "loss"
            return Problem(f"{what} that is not finite", f"finite {what}")
        # A batch of chats without any label says nothing about the next ones.
        if self.spikes is None or not means["grad_norm"]:
            return None
        spike = self.spikes.find(means["loss"], means["grad_norm"])
        if spike is None:
            return None
        value = means["loss" if spike == "loss" else "grad_norm"]
        return Problem(
            f"{spike} of {value:.4g}, more than {self.spikes.factor:g} deviations above the "
            "last steps'",
            f"{spike} without a spike",
        )

    def asked_to_stop(self) -> bool:
        """Returns whether any rank was asked to stop.

        All ranks call it together, outside of a step.
        """
        stop = torch.tensor(float(self.stop_requested()), device=self.device)
        self.stopping = bool(distributed.total(stop))
        return self.stopping

    def skip(self, step: int, problem: Problem) -> None:
        """Counts a step that changes nothing, and raises Diverged after too many in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        count = self.skipped_in_a_row
        limit = self.config.skip_limit
        runtime.log(
            f"step {step}: got a {problem.got}, so nothing was updated "
            f"({count} in a row; with {limit} the run has diverged)"
        )
        if count >= limit:
            raise Diverged(
                f"got no {problem.wanted} in {count} steps in a row, the last of them {step}",
                ", so the run has stopped; its last checkpoint is good: lower --optim.lr or raise "
                "--optim.warmup in another --folder",
            )

    def bytes_sent(self) -> int:
        """Returns the bytes that this rank has sent for rows and for tokens of split experts."""
        return sum(exchange.bytes_sent for exchange in self.exchanges)

    def count_touched_rows(self) -> int:
        """Returns the number of distinct rows of all tables that this step's gradients touch."""
        touched = {}
        for name in self.optimizer.rows:
            gradient = self.optimizer.parameters[name].grad
            if gradient is None:
                touched[name] = 0
            elif gradient.is_sparse:
                touched[name] = gradient._indices().shape[1]
            else:
                touched[name] = int(gradient.any(1).sum())
        sharded = sum(touched.pop(name) for name in self.optimizer.sharded_rows)
        if self.optimizer.sharded_rows:
            # Each rank has the gradients of its own rows.
            sharded = int(distributed.total(torch.tensor(sharded, device=self.device)))
        return sharded + sum(touched.values())

    def balance_experts(self, expert_counts: Tensor, step: int) -> None:
        """Updates the routers' biases by the number of tokens of the whole batch at each expert."""
        resting = step > round(self.config.steps * (1 - self.config.bias_rest))
        if resting or self.only_indexers_learn(step):
            return
        for mixture, counts in zip(self.mixtures, expert_counts, strict=True):
            rate = mixture.config.balance.bias_rate
            bias = mixture.router.e_score_correction_bias
            # A router without one selects by token id.
            if rate and bias is not None:
                update_bias(bias, counts, rate)

    def prepare_model(self, step: int) -> None:
        """Sets the model to training mode, and MoBA and DSA to the phase that the step is in.

        MoBA attends fully in its last phase, DSA in its first.
        """
        self.model.train()
        if self.model.config.dsa is not None:
            dsa.switch(self.model, step <= self.model.config.dsa.dense)
        moba = self.model.config.moba
        if moba is not None:
            switch(self.model, step > moba.full_from * self.config.steps)

    def measure_inside(self, batch: Batch, step: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Measures streams and Engram's gates on a sequence before the update, every 50 steps.

        Returns the streams' gains and spread, and the mean of the gates of each block.
        """
        config = self.model.config
        if (config.hyper is None and config.engram is None) or (step - 1) % STREAM_INTERVAL:
            return {}, {}
        names = ("ids", "labels", "document_ids")
        ids, labels, document_ids = (batch[name][:1].to(self.device) for name in names)
        with (
            unchanged_random_state(),
            autocast(self.device, self.dtype),
            record_gates(self.model) as gates,
        ):
            measured = health(
                self.model, lambda: self.model.loss(ids, labels, document_ids=document_ids)
            )
        streams = {} if measured is None else dict(zip(STREAM_METRICS, measured, strict=True))
        return streams, gates

    def dry_run(self, batch: Batch, step: int) -> None:
        """Runs forward and backward, which allocates and compiles, without lasting effects."""
        self.prepare_model(step)
        with unchanged_random_state():
            self.forward_backward(batch, step)
        self.optimizer.zero_grad()


def named_losses(loss: Loss) -> dict[str, Tensor]:
    """Returns the parts of a loss under their names in metrics.jsonl."""
    losses = {"loss": loss.next_token, "total": loss.total}
    if loss.mtp is not None:
        losses["mtp"] = loss.mtp
    if loss.indexer_loss is not None:
        losses["indexer_kl"] = loss.indexer_loss.loss
        losses["indexer_kl_uniform"] = loss.indexer_loss.uniform
        losses["indexer_recall"] = loss.indexer_loss.recall
    return losses | {f"balance_{name}": value for name, value in loss.balance.items()}


@contextmanager
def record_gates(model: LanguageModel) -> Iterator[dict[str, Tensor]]:
    """Yields a dictionary that the calls within fill: "gate_mean_BLOCK", the mean of its gates."""
    means: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_gate: nn.Module, _inputs: Any, gates: Tensor) -> None:
            means[name] = gates.detach().float().mean()

        return hook

    hooks = [
        module.gate.register_forward_hook(record(f"gate_mean_{name.split('.')[1]}"))
        for name, module in model.named_modules()
        if isinstance(module, Engram)
    ]
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Computes matrix products in `dtype`; parameters and sums stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Restores the generators of Python, numpy and torch when the block ends."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
