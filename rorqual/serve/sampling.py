"""Samples the next ids of a batch, each sequence by its own parameters and generator.

    logits  = repetition penalty, presence and frequency penalty, logit bias,
              -inf where an end is not allowed yet or a grammar forbids the id,
              / temperature, top-k, top-p, min-p
              in this order, all off by default
    next id ~ softmax(logits)
              or argmax where temperature is below the smallest normal float32, 1.18e-38

Nothing overflows: the largest logit is subtracted before the division, so that the likeliest id
has logit 0 and the others become -inf at worst, and a penalty leaves a finite logit finite.

Top-p: arXiv:1904.09751. Min-p: arXiv:2407.01082. Repetition penalty: arXiv:1909.05858.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_BELOW_ONE = 1.0 - 2.0**-40  # times the sum of chances it stays below that sum


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Options of sampling, and of what a request wants to know about the ids.

    A filter is off where it is None; greedy decoding ignores temperature and filters.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0  # of the ids of the prompt and of the text
    presence_penalty: float = 0.0  # subtracted once from the logit of an id of the text
    frequency_penalty: float = 0.0  # subtracted for every time that the id is in the text
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit)
    seed: int | None = None
    min_tokens: int = 0  # the sequence does not end before so many new ids
    ignore_eos: bool = False  # the id that ends a document does not end the sequence
    stop_token_ids: tuple[int, ...] = ()  # ids that end the sequence, too
    logprobs: int | None = None  # log-probabilities of each new id and of so many of the likeliest
    prompt_logprobs: bool = False  # the same of the ids of the prompt

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_k", self.top_k, 1, 2**31),
            ("top_p", self.top_p, 1e-6, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 1e-3, 1e3),
            ("presence_penalty", self.presence_penalty, -100.0, 100.0),
            ("frequency_penalty", self.frequency_penalty, -100.0, 100.0),
            ("min_tokens", self.min_tokens, 0, 2**31),
            ("logprobs", self.logprobs, 0, 2**31),
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

    @property
    def counts_ids(self) -> bool:
        """Whether a penalty depends on how often an id is in the text."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def generator(self, index: int = 0) -> torch.Generator:
        """Returns the random generator of sequence `index` of a request.

        It is seeded with seed + index, so that the copies of one prompt differ. Its draws do not
        depend on the other sequences of the batch.
        """
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed((self.seed + index) % 2**63)
        return generator


GREEDY = Sampling(temperature=0.0)


@runtime_checkable
class Matcher(Protocol):
    """Says which ids may follow, as a grammar does."""

    def mask(self) -> Bool[Tensor, " V"]:
        """Returns which ids may follow. ValueError where the grammar fails."""

    def accept(self, token: int) -> bool:
        """Takes the id that was drawn, and returns whether the text is complete.

        ValueError where the grammar does not allow the id.
        """


class SequenceSampler:
    """What sampling keeps of one sequence: its parameters, its generator, what it has drawn."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        generator: torch.Generator,
        *,
        vocab_size: int,
        device: torch.device | str = "cpu",
        end_ids: Collection[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        self.sampling = sampling
        self.generator = generator
        self.matcher = matcher
        self.end_ids = frozenset(end_ids)
        self.made = 0
        self.seen: Tensor | None = None
        self.counts: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[[token for token in prompt if token < vocab_size]] = True
        if sampling.counts_ids:
            self.counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        # The difference to the logits that never changes.
        bias = sampling.logit_bias
        self.bias_ids = torch.tensor([token for token, _ in bias], dtype=torch.long, device=device)
        self.bias = torch.tensor([value for _, value in bias], device=device)
        self.ends = torch.tensor(sorted(self.end_ids), dtype=torch.long, device=device)

    def accept(self, token: int) -> bool:
        """Takes the id that was drawn, and returns whether it ends the sequence."""
        self.made += 1
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        complete = token in self.end_ids
        if self.matcher is not None and not complete:
            complete = self.matcher.accept(token)
        return complete


class Drawn(NamedTuple):
    """The id of each sequence, and why a sequence has none."""

    ids: list[int]  # -1 where there is an error
    errors: dict[int, str]  # by the slot of the sequence in the batch


def sample_batch(logits: Float[Tensor, "B V"], samplers: Sequence[SequenceSampler]) -> Drawn:
    """Samples one id for every sequence in one call; one that fails changes no other.

    A sequence fails where its logits hold NaN or inf or only -inf, or where its grammar fails.
    """
    logits = logits.float()
    errors: dict[int, str] = {}
    ids = _largest(logits, errors, "logits that are NaN, inf or all -inf")
    if errors:
        logits = logits.clone()
        logits[list(errors)] = 0.0
    unmasked = logits
    logits = _mask(_adjust(logits, samplers), samplers, errors)
    if logits is not unmasked:
        ids = _largest(logits, errors, "no id that is allowed")
    drawing = [
        slot for slot, one in enumerate(samplers) if not one.sampling.greedy and slot not in errors
    ]
    if drawing:
        index = torch.tensor(drawing, device=logits.device)
        subset = logits[index] if len(drawing) < len(samplers) else logits
        subset = subset - subset.amax(-1, keepdim=True)
        chances = narrow(subset, [samplers[slot].sampling for slot in drawing]).softmax(-1)
        drawn = draw(chances, [samplers[slot].generator for slot in drawing])
        for slot, one in zip(drawing, drawn.tolist(), strict=True):
            ids[slot] = one
    return Drawn([-1 if slot in errors else one for slot, one in enumerate(ids)], errors)


def _largest(logits: Tensor, errors: dict[int, str], what: str) -> list[int]:
    """Returns the id of each sequence's largest logit; notes in `errors` where it is not finite."""
    if logits.is_cpu:
        # numpy's is some 20 times as fast as torch's.
        ids = torch.from_numpy(logits.detach().numpy().argmax(-1))
    else:
        ids = logits.argmax(-1)
    values = logits.gather(-1, ids[:, None])[:, 0]
    for slot, value in enumerate(values.tolist()):
        if not math.isfinite(value):
            errors.setdefault(slot, what)
    return ids.tolist()


def _adjust(
    logits: Float[Tensor, "B V"], samplers: Sequence[SequenceSampler]
) -> Float[Tensor, "B V"]:
    """Applies penalties and biases to the sequences that have any."""
    changed = logits
    size = logits.shape[1]
    if index := [slot for slot, one in enumerate(samplers) if one.seen is not None]:
        penalties = logits.new_tensor(
            [samplers[slot].sampling.repetition_penalty for slot in index]
        )
        seen = torch.stack([one for slot in index if (one := samplers[slot].seen) is not None])[
            :, :size
        ]
        changed = changed.clone()
        changed[index] = penalise(logits[index], seen, penalties[:, None])
    if index := [slot for slot, one in enumerate(samplers) if one.counts is not None]:
        options = [samplers[slot].sampling for slot in index]
        presence = logits.new_tensor([one.presence_penalty for one in options])[:, None]
        frequency = logits.new_tensor([one.frequency_penalty for one in options])[:, None]
        counts = torch.stack([one for slot in index if (one := samplers[slot].counts) is not None])[
            :, :size
        ]
        changed = changed.clone()
        changed[index] = changed[index] - frequency * counts - presence * (counts > 0)
    if index := [slot for slot, one in enumerate(samplers) if one.bias_ids.numel()]:
        changed = changed.clone()
        for slot in index:
            changed[slot, samplers[slot].bias_ids] += samplers[slot].bias
    return changed


def _mask(
    logits: Float[Tensor, "B V"], samplers: Sequence[SequenceSampler], errors: dict[int, str]
) -> Float[Tensor, "B V"]:
    """Forbids ends that come too early, and what the grammars forbid."""
    early = [
        slot
        for slot, one in enumerate(samplers)
        if one.made < one.sampling.min_tokens and one.ends.numel()
    ]
    guided = [
        slot for slot, one in enumerate(samplers) if one.matcher is not None and slot not in errors
    ]
    if not early and not guided:
        return logits
    logits = logits.clone()
    for slot in early:
        logits[slot, samplers[slot].ends] = -torch.inf
    for slot in guided:
        matcher = samplers[slot].matcher
        assert matcher is not None
        try:
            mask = matcher.mask()
        except ValueError as error:
            errors[slot] = f"a grammar that failed: {error}"
        else:
            logits[slot].masked_fill_(~mask[: logits.shape[1]].to(logits.device), -torch.inf)
    return logits


def penalise(
    logits: Float[Tensor, "B V"],
    seen: Bool[Tensor, "B V"],
    penalty: float | Float[Tensor, "B 1"],
) -> Float[Tensor, "B V"]:
    """Applies the repetition penalty to the ids that are already in the text.

    logit / penalty where positive, logit * penalty where negative. A finite logit stays finite: a
    value that would overflow becomes the largest number of its dtype.
    """
    limit = torch.finfo(logits.dtype).max
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-limit, limit)
    return torch.where(seen & logits.isfinite(), penalised, logits)


def narrow(
    logits: Float[Tensor, "B V"], sampling: Sampling | Sequence[Sampling]
) -> Float[Tensor, "B V"]:
    """Applies temperature, then top-k, top-p and min-p; filtered ids get -inf.

    `sampling` is one for all sequences, or one for each. The likeliest id is always kept. top-p
    keeps the likeliest ids until their mass first reaches p; min-p keeps those that are at least p
    times as likely as the likeliest.
    """
    options = [sampling] * len(logits) if isinstance(sampling, Sampling) else sampling
    size = logits.shape[-1]
    logits = logits.float() / logits.new_tensor([one.temperature for one in options])[:, None]
    counts = [min(one.top_k or size, size) for one in options]
    if min(counts) < size:
        largest = max(count for count in counts if count < size)
        last = torch.tensor([min(count, largest) - 1 for count in counts], device=logits.device)
        worst = logits.topk(largest).values.gather(1, last[:, None])
        limited = torch.tensor([count < size for count in counts], device=logits.device)
        logits = logits.masked_fill((logits < worst) & limited[:, None], -torch.inf)
    if any((one.top_p or 1.0) < 1.0 for one in options):
        masses = logits.new_tensor(
            [2.0 if one.top_p in (None, 1.0) else one.top_p for one in options]
        )
        ordered, order = logits.sort(descending=True, stable=True)
        chance = ordered.softmax(-1)
        before = chance.cumsum(-1) - chance
        beyond = torch.zeros_like(before, dtype=torch.bool).scatter(
            1, order, before >= masses[:, None]
        )
        logits = logits.masked_fill(beyond, -torch.inf)
    if any(one.min_p is not None for one in options):
        chance = logits.softmax(-1)
        least = logits.new_tensor([one.min_p or 0.0 for one in options])[:, None]
        logits = logits.masked_fill(chance < least * chance.amax(-1, keepdim=True), -torch.inf)
    return logits


def draw(chances: Float[Tensor, "B V"], generators: Sequence[torch.Generator]) -> Int[Tensor, " B"]:
    """Draws an id for every sequence by one random number of its generator.

    It is the first id at which the sum of the chances exceeds the number times their sum.
    """
    numbers = torch.cat(
        [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    )
    cumulative = chances.double().cumsum(-1)
    limits = numbers.clamp_max(_BELOW_ONE).to(chances.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, limits, right=True).squeeze(1)


class TokenLogprobs(NamedTuple):
    """The log-probability of one id, and the likeliest ids with theirs, likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


LEAST_LOGPROB = -9999.0  # JSON has no minus infinity


def logprobs_of(
    logits: Float[Tensor, "N V"], ids: Int[Tensor, " N"], count: int, vocab_size: int
) -> list[TokenLogprobs]:
    """Returns log softmax(logits) of the ids, and of the `count` likeliest ids below `vocab_size`.

    They are the model's: no temperature, penalty or filter changes them.
    """
    values = logits.float().log_softmax(-1).nan_to_num(LEAST_LOGPROB, 0.0, LEAST_LOGPROB)
    ours = values.gather(1, ids[:, None])[:, 0].tolist()
    if not count:
        return [TokenLogprobs(one, ()) for one in ours]
    top = values[:, :vocab_size].topk(min(count, vocab_size))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprobs(one, tuple(zip(*pair, strict=True)))
        for one, pair in zip(ours, pairs, strict=True)
    ]
