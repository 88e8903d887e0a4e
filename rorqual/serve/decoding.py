"""Prompt ids in -> the ids that follow out, step by step.

    prompts of different lengths stand side by side by left padding; `present` hides the padding from every layer
    draft = MTP(hidden of the last token, next id); one forward checks it, and it stands where it is the argmax

MTP drafts: DeepSeek-V3, arXiv:2412.19437, section 2.2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rorqual.layers.cache import Cache
from rorqual.layers.mtp import MTP
from rorqual.model import LanguageModel
from rorqual.serve.sampling import GREEDY, Sampling, sample


def pad_left(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"] | None]:
    """Prompts side by side, last tokens aligned; `present` is None where all are equally long."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("got an empty prompt, expected at least one token a prompt")
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return ids, None
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, torch.arange(longest, device=device) >= longest - lengths[:, None]


def saw(prompts: Sequence[Sequence[int]], vocabulary: int, device: torch.device | str) -> Bool[Tensor, "B V"]:
    """Which ids each prompt holds."""
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
    """Each step yields the new id of every prompt, None for one that has ended (its `end_id` is yielded first).

    `vocabulary`: ids from there on are never drawn (a model's table may be longer than its tokenizer).
    An ended row leaves the cache at once, so a batch grows cheaper as its rows end.
    """
    device = next(model.parameters()).device
    ids, present = pad_left(prompts, pad_id, device)
    vocabulary = vocabulary or model.config.vocabulary
    seen = saw(prompts, vocabulary, device) if sampling.repetition_penalty != 1.0 else None
    generators = [sampling.generator(row) for row in range(len(prompts))]
    cache = model.new_cache(len(prompts), capacity=ids.shape[1] + max_new_tokens)
    live = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        hidden = model.hidden(ids, present=present, cache=cache)[0]
        logits = model.logits(hidden[:, -1:])[:, 0, :vocabulary]
        drawn = sample(logits, sampling, [generators[row] for row in live], seen)
        said = dict(zip(live, drawn.tolist(), strict=True))
        yield [said.get(row) for row in range(len(prompts))]
        kept = [place for place, row in enumerate(live) if said[row] != end_id]
        if not kept:
            return
        index = torch.tensor(kept, device=device)
        if len(kept) < len(live):
            cache.select(index)
        ids, present, live = drawn[index, None], None, [live[place] for place in kept]
        seen = None if seen is None else seen[index].scatter(1, ids, True)


@dataclass(slots=True)
class Tally:
    """How many drafts were made, and how many of them the model itself would have said."""

    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


@torch.inference_mode()
def speculate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 64,
    end_id: int | None = None,
    vocabulary: int | None = None,
    tally: Tally | None = None,
) -> Iterator[int]:
    """Greedy decoding by drafts of the model's own first MTP module: the same ids as `decode`, in fewer forwards.

    Each round feeds the last id and a draft of the one after it. The draft stands where it equals the argmax, and
    the round gave two ids; else the cache forgets it, and the round gave one, the id the model says itself.
    """
    if not len(model.mtp):
        raise ValueError("speculative: got a model without MTP, expected one trained with it (--model.mtp.depth 1)")
    tally, vocabulary, given = Tally() if tally is None else tally, vocabulary or model.config.vocabulary, 0
    fed = pad_left([prompt], 0, next(model.parameters()).device)[0]
    cache = model.new_cache(1, capacity=fed.shape[1] + max_new_tokens + 1)
    hidden = model.hidden(fed, cache=cache)[0]
    best = _argmax(model.logits(hidden[:, -1:]), vocabulary)  # [1, 1]
    following = torch.cat([fed[:, 1:], best], 1)
    while True:
        for token in best[0].tolist():
            yield token
            given += 1
            if token == end_id or given == max_new_tokens:
                return
        draft = _draft(model, hidden, following, cache, vocabulary)
        hidden = model.hidden(torch.cat([best[:, -1:], draft], 1), cache=cache)[0]
        best = _argmax(model.logits(hidden), vocabulary)  # [1, 2]
        tally.drafted += 1
        if bool(best[0, 0] == draft[0, 0]):
            tally.accepted += 1
        else:
            cache.crop(1)
            hidden, best = hidden[:, :1], best[:, :1]
        following = best


def _draft(
    model: LanguageModel, hidden: Float[Tensor, "B T D"], following: Int[Tensor, "B T"], cache: Cache, vocabulary: int
) -> Int[Tensor, "B 1"]:
    """What the first MTP module would say two tokens after the last hidden state."""
    foretold = model.draft(hidden, following, cache=cache)[0]
    module = model.mtp[0]
    assert isinstance(module, MTP)
    return _argmax(model.head(module.norm(foretold[:, -1:])), vocabulary)


def _argmax(logits: Float[Tensor, "B T V"], vocabulary: int) -> Int[Tensor, "B T"]:
    return logits[..., :vocabulary].argmax(-1)
