"""Samples the next id from logits.

    logits  = repetition penalty, / temperature, top-k, top-p, min-p
              in this order, all off by default
    next id ~ softmax(logits)
              or argmax where temperature is below the smallest normal float32, 1.18e-38

Nothing overflows: the largest logit is subtracted before the division, so that the likeliest id
has logit 0 and the others become -inf at worst, and a penalty leaves a finite logit finite.

Top-p: arXiv:1904.09751. Min-p: arXiv:2407.01082. Repetition penalty: arXiv:1909.05858.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Options of sampling. A filter is off where it is None; greedy decoding ignores them all."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_k", self.top_k, 1, 2**31),
            ("top_p", self.top_p, 1e-6, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 1e-3, 1e3),
        ):
            if value is not None and not low <= value <= high:
                raise ValueError(
                    f"got {name}={value!r}, expected a number from {low:g} to {high:g}"
                )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(
                f"got seed={self.seed!r}, expected None or an integer from 0 to 2**63 - 1"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest id is chosen.

        So it is at temperature 0, or at one too small for a float32 division.
        """
        return self.temperature < torch.finfo(torch.float32).tiny

    def generator(self, row: int = 0) -> torch.Generator:
        """Returns the random generator of one sequence.

        Its draws do not depend on the other sequences of the batch.
        """
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed((self.seed + row) % 2**63)
        return generator


GREEDY = Sampling(temperature=0.0)


def penalise(
    logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"], penalty: float
) -> Float[Tensor, "B V"]:
    """Applies the repetition penalty to the ids that are already in the text.

    logit / penalty where positive, logit * penalty where negative. A finite logit stays finite: a
    value that would overflow becomes the largest number of its dtype.
    """
    limit = torch.finfo(logits.dtype).max
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-limit, limit)
    return torch.where(seen & logits.isfinite(), penalised, logits)


def narrow(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Applies temperature, then top-k, top-p and min-p; filtered ids get -inf.

    The likeliest id is always kept. top-p keeps the likeliest ids until their mass first reaches p;
    min-p keeps those that are at least p times as likely as the likeliest.
    """
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        worst = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        ordered, order = logits.sort(descending=True, stable=True)
        chance = ordered.softmax(-1)
        before = chance.cumsum(-1) - chance
        beyond = torch.zeros_like(before, dtype=torch.bool).scatter(
            1, order, before >= sampling.top_p
        )
        logits = logits.masked_fill(beyond, -torch.inf)
    if sampling.min_p is not None:
        chance = logits.softmax(-1)
        logits = logits.masked_fill(
            chance < sampling.min_p * chance.amax(-1, keepdim=True), -torch.inf
        )
    return logits


def sample(
    logits: Float[Tensor, "B V"],
    sampling: Sampling,
    generators: Sequence[torch.Generator] = (),
    seen: Bool[Tensor, "B V"] | None = None,
) -> Int[Tensor, " B"]:
    """Samples one id a sequence.

    `generators`: one a sequence (needed unless greedy); `seen`: the ids that the penalty applies
    to. ValueError where a sequence has no finite largest logit: it contains NaN or inf, or only
    -inf.
    """
    logits = logits.float()
    usable = logits.amax(-1).isfinite()
    if not usable.all():
        bad = (~usable).nonzero().flatten().tolist()
        raise ValueError(
            f"got logits that are NaN, inf or all -inf in rows {bad}, "
            "expected a finite largest logit in each: "
            "weights that are not finite, or a dtype too narrow for them (float32 holds more)"
        )
    if seen is not None and sampling.repetition_penalty != 1.0:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits.argmax(-1)
    chances = narrow(logits - logits.amax(-1, keepdim=True), sampling).softmax(-1).cpu()
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(chances, generators, strict=True)
    ]
    return torch.cat(drawn).to(logits.device)
