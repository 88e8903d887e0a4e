"""Decodes token ids after a prompt, one by one or by speculative decoding.

    Prompts of different lengths form a batch by left padding; `present` masks the padding in every
    layer. drafts = MTP(hidden of the last token, next id), each depth on the output of the one
    before; one forward verifies them, and they are accepted up to the first that is not the
    argmax.

MTP drafts: DeepSeek-V3, arXiv:2412.19437, section 2.2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rorqual.layers.cache import Cache
from rorqual.layers.mtp import MTP
from rorqual.model import LanguageModel
from rorqual.serve.sampling import GREEDY, Sampling, sample
from rorqual.serve.step import decoder


def pad_left(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"] | None]:
    """Batches prompts with left padding, so that their last tokens are aligned.

    `present` is None where all prompts are equally long. ValueError for an empty prompt.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("got an empty prompt, expected at least one token a prompt")
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return ids, None
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, torch.arange(longest, device=device) >= longest - lengths[:, None]


def saw(
    prompts: Sequence[Sequence[int]], vocabulary: int, device: torch.device | str
) -> Bool[Tensor, "B V"]:
    """Marks the ids that occur in each prompt."""
    seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, [token for token in prompt if token < vocabulary]] = True
    return seen


@torch.inference_mode()
def decode(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    end_id: int | None = None,
    pad_id: int = 0,
    vocabulary: int | None = None,
) -> Iterator[list[int | None]]:
    """Yields the new id of every prompt at each step, and None for a sequence that has ended.

    The `end_id` of a sequence is yielded before it ends. `vocabulary`: ids from there on are never
    sampled (a model's table may be longer than its tokenizer). A sequence that has ended is removed
    from the cache at once, so that each step costs less as sequences end.
    """
    device = next(model.parameters()).device
    ids, present = pad_left(prompts, pad_id, device)
    vocabulary = vocabulary or model.config.vocabulary
    seen = saw(prompts, vocabulary, device) if sampling.repetition_penalty != 1.0 else None
    generators = [sampling.generator(row) for row in range(len(prompts))]
    cache = model.new_cache(len(prompts), capacity=ids.shape[1] + max_new_tokens)
    live = list(range(len(prompts)))
    logits = model.logits(model.hidden(ids, present=present, cache=cache, last=True)[0])[:, 0]
    step = decoder(model, cache, len(prompts))
    for turn in range(max_new_tokens):
        logits = (step(ids) if turn else logits)[:, :vocabulary]
        drawn = sample(logits, sampling, [generators[row] for row in live], seen)
        said = dict(zip(live, drawn.tolist(), strict=True))
        yield [said.get(row) for row in range(len(prompts))]
        kept = [place for place, row in enumerate(live) if said[row] != end_id]
        if not kept:
            return
        index = torch.tensor(kept, device=device)
        if len(kept) < len(live):
            cache.select(index)
        ids, live = drawn[index, None], [live[place] for place in kept]
        seen = None if seen is None else seen[index].scatter(1, ids, True)


@dataclass(slots=True)
class Tally:
    """Acceptance statistics of speculative decoding: drafts, accepted drafts, verifying forwards.

    A draft after one that was rejected counts as drafted and not accepted.
    """

    drafted: int = 0
    accepted: int = 0
    rounds: int = 0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


class Front(NamedTuple):
    """State of speculative decoding: the positions that were read last, and the ids after them."""

    hidden: Float[Tensor, "B S D"]  # of the last positions that were read
    told: Int[Tensor, "B S"]  # the id after each of them
    present: Bool[Tensor, "B S"] | None
    sure: Int[
        Tensor, "B N"
    ]  # accepted ids that are not in the cache yet, at least one a sequence; -1 pads

    def select(self, index: Int[Tensor, " B2"]) -> "Front":
        """Keeps the sequences `index`, in that order."""
        present = None if self.present is None else self.present[index]
        return Front(self.hidden[index], self.told[index], present, self.sure[index])


def _draftable(model: LanguageModel) -> None:
    if not len(model.mtp):
        raise ValueError(
            "speculative: got a model without MTP, "
            "expected one trained with it (--model.mtp.depth 1)"
        )
    if model.config.moba is not None and model.config.moba.decode == "full":
        raise ValueError(
            'speculative: got moba.decode "full", expected "sparse": '
            "drafts are checked several at once"
        )


def speculate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    end_id: int | None = None,
    pad_id: int = 0,
    vocabulary: int | None = None,
    tally: Tally | None = None,
) -> Iterator[list[int | None]]:
    """Decodes greedily with drafts of the model's own MTP modules, one a depth.

    Yields what `decode` yields, in fewer forwards. ValueError for a model without MTP.

    One forward verifies all drafts of a round. Those before the first that is not the argmax are
    accepted, the id that the model predicts after them needs no further forward, and the rest is
    cropped from the cache. The sequences of a batch advance together, as far as the slowest; ids
    that were accepted in another sequence beyond that are not drafted again.
    """
    _draftable(model)
    # inference_mode decorates the three functions below that compute: around a `yield` it would
    # stay on in the caller.
    tally, vocabulary = Tally() if tally is None else tally, vocabulary or model.config.vocabulary
    ids, present = pad_left(prompts, pad_id, next(model.parameters()).device)
    cache = model.new_cache(
        len(prompts), capacity=ids.shape[1] + max_new_tokens + len(model.mtp) + 1
    )
    front, fresh = _read(model, ids, present, cache, vocabulary)
    live, given = list(range(len(prompts))), 0
    while True:
        going = set(live)
        for column in fresh[:, : max_new_tokens - given].T.tolist():
            said = {row: token for row, token in zip(live, column, strict=True) if row in going}
            yield [said.get(row) for row in range(len(prompts))]
            going -= {row for row, token in said.items() if token == end_id}
            if not going:
                return
        given += fresh.shape[1]
        if given >= max_new_tokens:
            return
        if len(going) < len(live):
            front, live = _without_ended(front, cache, live, going)
        front, fresh = _round(model, front, cache, vocabulary, tally)


@torch.inference_mode()
def _without_ended(
    front: Front, cache: Cache, live: list[int], going: set[int]
) -> tuple[Front, list[int]]:
    """Returns the state of the sequences that continue, and removes the others from the cache."""
    places = [place for place, row in enumerate(live) if row in going]
    index = torch.tensor(places, device=front.sure.device)
    cache.select(index)
    return front.select(index), [live[place] for place in places]


@torch.inference_mode()
def _read(
    model: LanguageModel, ids: Tensor, present: Tensor | None, cache: Cache, vocabulary: int
) -> tuple[Front, Int[Tensor, "B 1"]]:
    """Runs the prompts; returns the first state, and the id that the model predicts after each."""
    hidden = model.hidden(ids, present=present, cache=cache)[0]
    fresh = _argmax(model.logits(hidden[:, -1:]), vocabulary)
    told = torch.cat([ids[:, 1:], fresh], 1)
    return Front(hidden, told, present, F.pad(fresh, (0, len(model.mtp)), value=-1)), fresh


@torch.inference_mode()
def _round(
    model: LanguageModel, front: Front, cache: Cache, vocabulary: int, tally: Tally
) -> tuple[Front, Int[Tensor, "B N"]]:
    """Drafts, verifies, and accepts what every sequence agrees on.

    Returns the new state, and the ids that all sequences accepted.
    """
    drafts = _drafts(model, front, cache, vocabulary)
    hidden = model.hidden(torch.cat([front.sure[:, :1], drafts], 1), cache=cache)[0]
    best = _argmax(model.logits(hidden), vocabulary)  # [B, depths + 1]
    stood, guessed = (best[:, :-1] == drafts).long().cumprod(1), front.sure[:, 1:] < 0
    tally.rounds += 1
    tally.drafted += int(guessed.sum())
    tally.accepted += int((guessed & (stood == 1)).sum())
    lengths = stood.sum(1, keepdim=True)
    kept = int(lengths.min()) + 1
    cache.crop(best.shape[1] - kept)
    # Positions whose deeper modules read drafts.
    again = min(len(model.mtp) - 1, front.told.shape[1])
    cache.crop_drafts(again)

    def moved(before: Tensor, new: Tensor) -> Tensor:
        return torch.cat([before[:, before.shape[1] - again :], new[:, :kept]], 1)

    present = (
        None
        if front.present is None
        else moved(front.present, torch.ones_like(best, dtype=torch.bool))
    )
    sure = best.masked_fill(torch.arange(best.shape[1], device=best.device) > lengths, -1)
    sure = F.pad(sure[:, kept - 1 :], (0, kept - 1), value=-1)
    return Front(moved(front.hidden, hidden), moved(front.told, best), present, sure), best[
        :, :kept
    ]


def _drafts(
    model: LanguageModel, front: Front, cache: Cache, vocabulary: int
) -> Int[Tensor, "B depths"]:
    """Returns the candidates after the first accepted id: other accepted ids, else MTP's drafts.

    Each depth of MTP reads the ids of the depths before it.
    """
    hidden, told, drafts = front.hidden, front.told, []
    for depth, module in enumerate(model.mtp):
        hidden = model.draft(hidden, told, depth=depth, present=front.present, cache=cache)[0]
        said = _argmax(model.head(cast(MTP, module).norm(hidden[:, -1:])), vocabulary)
        sure = front.sure[:, depth + 1, None]
        drafts.append(torch.where(sure < 0, said, sure))
        told = torch.cat([told[:, 1:], drafts[-1]], 1)
    return torch.cat(drafts, 1)


def _argmax(logits: Float[Tensor, "B T V"], vocabulary: int) -> Int[Tensor, "B T"]:
    return logits[..., :vocabulary].argmax(-1)
