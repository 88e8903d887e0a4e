"""Decodes token ids after a prompt, one by one or by speculative decoding.

    Prompts of different lengths form a batch with padding behind the shorter ones; the cache has a
    length for every sequence. drafts = MTP(hidden of the last token, next id), each depth on the
    output of the one before; one forward verifies them, and they are accepted up to the first that
    is not the argmax.

MTP drafts: DeepSeek-V3, arXiv:2412.19437, section 2.2.
"""

from collections import deque
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
from rorqual.serve.step import Decoder


def pad(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "B T"], list[int]]:
    """Batches prompts, with padding behind the shorter ones; returns the ids and the lengths.

    ValueError for an empty prompt.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("got an empty prompt, expected at least one token a prompt")
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([list(p) + [pad_id] * (longest - len(p)) for p in prompts], device=device)
    return ids, [len(prompt) for prompt in prompts]


def occurred(
    prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str
) -> Bool[Tensor, "B V"]:
    """Marks the ids that occur in each prompt."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, [token for token in prompt if token < vocab_size]] = True
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
    vocab_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Yields the new id of every prompt at each step, and None for a sequence that has ended.

    The `end_id` of a sequence is yielded before it ends. `vocab_size`: ids from there on are never
    sampled (a model's table may be longer than its tokenizer). A sequence that has ended is removed
    from the cache at once, so that each step costs less as sequences end.
    """
    device = next(model.parameters()).device
    ids, lengths = pad(prompts, pad_id, device)
    vocab_size = vocab_size or model.config.vocab_size
    seen = occurred(prompts, vocab_size, device) if sampling.repetition_penalty != 1.0 else None
    generators = [sampling.generator(row) for row in range(len(prompts))]
    cache = model.new_cache(len(prompts), capacity=ids.shape[1] + max_new_tokens)
    active = list(range(len(prompts)))
    logits = model.logits(model.hidden(ids, lengths=lengths, cache=cache, last=True)[0])[:, 0]
    step = Decoder(model)
    for turn in range(max_new_tokens):
        logits = (step(ids, cache) if turn else logits)[:, :vocab_size]
        drawn = sample(logits, sampling, [generators[row] for row in active], seen)
        drawn_ids = dict(zip(active, drawn.tolist(), strict=True))
        yield [drawn_ids.get(row) for row in range(len(prompts))]
        remaining = [index for index, row in enumerate(active) if drawn_ids[row] != end_id]
        if not remaining:
            return
        index = torch.tensor(remaining, device=device)
        if len(remaining) < len(active):
            cache.select(index)
        ids, active = drawn[index, None], [active[position] for position in remaining]
        seen = None if seen is None else seen[index].scatter(1, ids, True)


@dataclass(slots=True)
class AcceptanceStats:
    """Acceptance statistics of speculative decoding: drafts, accepted drafts, verifying forwards.

    A draft after one that was rejected counts as drafted and not accepted.
    """

    drafted: int = 0
    accepted: int = 0
    rounds: int = 0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


class DraftState(NamedTuple):
    """State of speculative decoding: the positions that were read last, and the ids after them."""

    # of the last positions that were read; with streams, if MTP works on them
    hidden: Float[Tensor, "B S *N D"]
    next_ids: Int[Tensor, "B S"]  # the id after each of them
    lengths: Int[Tensor, " B"]  # how many of the S positions of each sequence are valid, the first
    accepted_ids: Int[
        Tensor, "B 1"
    ]  # the accepted id of each sequence that is not in the cache yet

    def select(self, index: Int[Tensor, " B2"]) -> "DraftState":
        """Keeps the sequences `index`, in that order."""
        return DraftState(*(piece[index] for piece in self))


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
    vocab_size: int | None = None,
    acceptance_stats: AcceptanceStats | None = None,
) -> Iterator[list[int | None]]:
    """Decodes greedily with drafts of the model's own MTP modules, one a depth.

    Yields what `decode` yields, in fewer forwards. ValueError for a model without MTP.

    One forward verifies all drafts of a round. Those before the first that is not the argmax are
    accepted, the id that the model predicts after them needs no further forward, and the rest is
    cropped from the cache. Each sequence of a batch advances by as many ids as it accepts; an id is
    yielded once all sequences that go on have one.
    """
    _draftable(model)
    # inference_mode decorates the three functions below that compute: around a `yield` it would
    # stay on in the caller.
    acceptance_stats, vocab_size = (
        AcceptanceStats() if acceptance_stats is None else acceptance_stats,
        vocab_size or model.config.vocab_size,
    )
    ids, lengths = pad(prompts, pad_id, next(model.parameters()).device)
    cache = model.new_cache(
        len(prompts), capacity=ids.shape[1] + max_new_tokens + len(model.mtp) + 1
    )
    queues: list[deque[int]] = [deque() for _ in prompts]
    counts, active = [0] * len(prompts), list(range(len(prompts)))
    state, fresh = _read(model, ids, lengths, cache, vocab_size)
    while active:
        going = []
        for index, (row, new) in enumerate(zip(active, fresh, strict=True)):
            new = new[: max_new_tokens - counts[row]]
            ended = False
            if end_id is not None and end_id in new:
                new, ended = new[: new.index(end_id) + 1], True
            queues[row].extend(new)
            counts[row] += len(new)
            if not ended and counts[row] < max_new_tokens:
                going.append(index)
        rows = [active[position] for position in going]
        while any(queues) and all(queues[row] for row in rows):
            yield [queue.popleft() if queue else None for queue in queues]
        if going and len(going) < len(active):
            state = _select(state, cache, going)
        active = rows
        if active:
            state, fresh = _round(model, state, cache, vocab_size, acceptance_stats)


@torch.inference_mode()
def _select(state: DraftState, cache: Cache, places: list[int]) -> DraftState:
    """Keeps the sequences that go on, in the cache and in the state that is returned."""
    index = torch.tensor(places, device=state.accepted_ids.device)
    cache.select(index)
    return state.select(index)


@torch.inference_mode()
def _read(
    model: LanguageModel, ids: Tensor, lengths: list[int], cache: Cache, vocab_size: int
) -> tuple[DraftState, list[list[int]]]:
    """Runs the prompts; returns the first state, and the id that the model predicts after each."""
    hidden = model.hidden(ids, lengths=lengths, cache=cache, for_mtp=True)[0]
    count = torch.tensor(lengths, device=ids.device)
    accepted_ids = _argmax(model.logits(_last(hidden, count)), vocab_size)
    return DraftState(
        hidden, _shifted(ids, accepted_ids, count), count, accepted_ids
    ), accepted_ids.tolist()


@torch.inference_mode()
def _round(
    model: LanguageModel,
    draft_state: DraftState,
    cache: Cache,
    vocab_size: int,
    acceptance_stats: AcceptanceStats,
) -> tuple[DraftState, list[list[int]]]:
    """Drafts, verifies and accepts; returns the new state and the accepted ids of each sequence."""
    drafts = _drafts(model, draft_state, cache, vocab_size)
    read_ids = torch.cat([draft_state.accepted_ids, drafts], 1)
    hidden = model.hidden(read_ids, cache=cache, for_mtp=True)[0]
    best = _argmax(model.logits(hidden), vocab_size)  # [B, depths + 1]
    stood = (best[:, :-1] == drafts).long().cumprod(1)
    acceptance_stats.rounds += 1
    acceptance_stats.drafted += stood.numel()
    acceptance_stats.accepted += int(stood.sum())
    # Of the ids that were read, the first one and the drafts that stood stay in the cache.
    accepted_count = stood.sum(1) + 1
    cache.crop((best.shape[1] - accepted_count).tolist())
    # Positions whose deeper modules read drafts are read again.
    again = draft_state.lengths.clamp_max(len(model.mtp) - 1)
    cache.crop_drafts(again.tolist())
    lengths = again + accepted_count
    steps = torch.arange(int(lengths.max()), device=best.device)
    before = draft_state.lengths[:, None] - again[:, None] + steps
    after = draft_state.hidden.shape[1] + steps - again[:, None]
    columns = torch.where(steps < again[:, None], before, after)
    columns = columns.clamp_max(draft_state.hidden.shape[1] + best.shape[1] - 1)
    rows = torch.arange(len(best), device=best.device)[:, None]
    state = DraftState(
        torch.cat([draft_state.hidden, hidden], 1)[rows, columns],
        torch.cat([draft_state.next_ids, best], 1)[rows, columns],
        lengths,
        best.gather(1, accepted_count[:, None] - 1),
    )
    accepted = zip(best.tolist(), accepted_count.tolist(), strict=True)
    return state, [ids[:count] for ids, count in accepted]


def _drafts(
    model: LanguageModel, state: DraftState, cache: Cache, vocab_size: int
) -> Int[Tensor, "B depths"]:
    """Returns MTP's drafts of the ids after the accepted one.

    Each depth of MTP reads the ids of the depths before it.
    """
    hidden, next_ids, drafts = state.hidden, state.next_ids, []
    for depth, module in enumerate(model.mtp):
        hidden = model.draft(hidden, next_ids, depth=depth, lengths=state.lengths, cache=cache)[0]
        last = cast(MTP, module).head_input(_last(hidden, state.lengths))
        drafts.append(_argmax(model.head(last), vocab_size))
        next_ids = _shifted(next_ids, drafts[-1], state.lengths)
    return torch.cat(drafts, 1)


def _last(x: Float[Tensor, "B T *S D"], lengths: Int[Tensor, " B"]) -> Float[Tensor, "B 1 *S D"]:
    """Returns the last valid value of each sequence."""
    return x[torch.arange(len(x), device=x.device)[:, None], lengths[:, None] - 1]


def _shifted(
    ids: Int[Tensor, "B T"], last: Int[Tensor, "B 1"], lengths: Int[Tensor, " B"]
) -> Int[Tensor, "B T"]:
    """Returns the id after each position: the ids shifted by one, with `last` at the end."""
    return F.pad(ids[:, 1:], (0, 1)).scatter(1, lengths[:, None] - 1, last)


def _argmax(logits: Float[Tensor, "B T V"], vocab_size: int) -> Int[Tensor, "B T"]:
    return logits[..., :vocab_size].argmax(-1)
