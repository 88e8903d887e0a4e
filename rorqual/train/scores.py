"""Evaluates a model during training.

Mode, gradients and random numbers are restored afterwards, so that training continues bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rorqual import distributed
from rorqual.data.needles import DEPTHS, column, grade
from rorqual.train.step import autocast, unchanged_random_state

STEP_OVER_FORWARD = 2.5  # time of a training step over a forward pass, about (docs/log.md)
TEMPERATURE = 0.8  # of samples


def validate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    bytes_per_token: float,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Returns "validation_loss" in nats a token, and the same as "bits_per_byte" of the text.

    `batches` are this rank's share.
    """
    with evaluation_mode(model, dtype) as device:
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
        for batch in batches:
            ids, labels, document_ids = (
                batch[n].to(device) for n in ("ids", "labels", "document_ids")
            )
            loss = model.loss(ids, labels, document_ids=document_ids)  # type: ignore[operator]
            sums += torch.stack([loss.next_token.double() * loss.tokens, loss.tokens.double()])
    nats, tokens = distributed.total(sums).tolist()
    if not tokens:
        raise ValueError(
            "got no validation documents, expected some: use a larger corpus, or no limit"
        )
    bits_per_byte = nats / math.log(2) / (tokens * bytes_per_token)
    return {"validation_loss": nats / tokens, "bits_per_byte": bits_per_byte}


def needle_accuracy(
    model: nn.Module,
    exams: Mapping[tuple[str, int], Iterable[Mapping[str, Tensor]]],
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Returns the share of right answers by task, length and part of the text.

    `column` names them. An answer is right if its id is the most likely one after the answers
    before it; "accuracy" is the mean over tasks and lengths. `exams` are this rank's batches by
    task and length, as `needles.exams` makes them. A part of the text without any needle is left
    out.
    """
    accuracies: dict[str, float] = {"accuracy": 0.0}
    with evaluation_mode(model, dtype) as device:
        for (task, seq_len), batches in exams.items():
            counts = torch.zeros(DEPTHS, 2, dtype=torch.long, device=device)
            for batch in batches:
                logits = model(
                    batch["ids"].to(device), document_ids=batch["document_ids"].to(device)
                )
                counts += grade(logits.argmax(-1).cpu(), batch).to(device)
            right, questions = distributed.total(counts).T.tolist()
            accuracies[column(task, seq_len)] = sum(right) / sum(questions)
            accuracies["accuracy"] += accuracies[column(task, seq_len)] / len(exams)
            for depth in range(DEPTHS):
                if questions[depth]:
                    accuracies[column(task, seq_len, depth)] = right[depth] / questions[depth]
    return accuracies


def sample_continuation(
    model: nn.Module, prompt: Tensor, count: int, vocab_size: int, dtype: torch.dtype
) -> list[int]:
    """Samples `count` ids below `vocab_size` after a prompt, always with the same random numbers.

    Every rank calls it. There are fewer ids where the model's numbers are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    ids = prompt.tolist()
    with evaluation_mode(model, dtype) as device:
        for _ in range(count):
            logits = model(torch.tensor([ids], device=device))[0, -1, :vocab_size]
            chances = (logits.float().cpu() / TEMPERATURE).softmax(-1).nan_to_num(0.0)
            if not chances.any():
                break
            ids.append(int(chances.multinomial(1, generator=generator)))
    return ids[len(prompt) :]


def estimate_step_seconds(
    model: nn.Module,
    vocab_size: int,
    batch_size: int,
    micro_batch_size: int,
    seq_len: int,
    dtype: torch.dtype,
) -> float:
    """Estimates the seconds of a training step from the time of a forward pass.

    The first of two passes is not counted: it allocates and compiles. Documents are packed, four to
    a sequence, and gradients are on, so that the pass is that of training. `batch_size` are this
    rank's sequences, `micro_batch_size` of them a pass. docs/log.md has the error of the estimate.
    """
    with evaluation_mode(model, dtype) as device, torch.enable_grad():
        ids = (
            torch.arange(micro_batch_size * seq_len, device=device).view(micro_batch_size, seq_len)
            % vocab_size
        )
        document_ids = (torch.arange(seq_len, device=device) * 4 // seq_len).expand(
            micro_batch_size, -1
        )
        for _ in range(2):
            began = time.perf_counter()
            loss = model.loss(ids, ids, document_ids=document_ids)  # type: ignore[operator]
            # Reading the value waits until the device has finished.
            loss.next_token.item()
            seconds = time.perf_counter() - began
    return seconds * STEP_OVER_FORWARD * math.ceil(batch_size / micro_batch_size)


class Interrupted(Exception):
    """An evaluation was ended early, since the run was asked to stop."""


@contextmanager
def interruptible(model: nn.Module, stop: Callable[[], bool] | None) -> Iterator[None]:
    """Raises Interrupted in the block before a pass through the model if `stop` returns True.

    It is asked before every pass, on every rank, whatever calls the model.
    """
    if stop is None:
        yield
        return

    def ask(*_: object) -> None:
        if stop():
            raise Interrupted

    first_block = next(iter(model.blocks))  # type: ignore[arg-type]
    hook = first_block.register_forward_pre_hook(ask)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def evaluation_mode(model: nn.Module, dtype: torch.dtype) -> Iterator[torch.device]:
    """Turns off training mode and gradients in the block; yields the model's device."""
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), unchanged_random_state(), autocast(device, dtype):
            yield device
    finally:
        for module in training:
            module.training = True
