"""Runs requests with continuous batching: one batched step for all of them.

    step:  admit (prefill waiting requests into a cache of their own), decode one id for every
           running request, join the caches, evict finished requests

Sequences of different ages form a left-padded batch: `join` aligns the last tokens of two caches
and marks the positions before a shorter one as padding, so that the ids of a sequence do not
depend on its neighbours. Prompts are prefilled only with others of similar length (`by_length`).
A request that no id can be sampled for ends without affecting the others.
Continuous batching: Orca, OSDI 2022.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual import runtime
from rorqual.layers.cache import Appended, Bundle, Cache, Past, Recent
from rorqual.layers.selection import Blocks
from rorqual.model import LanguageModel
from rorqual.serve.decoding import pad_left, saw
from rorqual.serve.sampling import GREEDY, Sampling, sample

# A forward over 2 to 8 short prompts costs little more than one over the longest. Padding costs
# more the longer it is, and it disables the causal, windowed and sparse fast paths of attention.
PADDED_LENGTH = 256  # longer prompts are prefilled only with prompts of the same length
PADDING = 128  # tokens of padding that cost about as much as one more forward


@dataclass(slots=True, eq=False)
class Request:
    """One prompt that is being completed; `ids` grows by one a step until `finish` is set.

    `finish` is "stop", "length", "cancelled", or "error" where no id could be sampled from its
    logits.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    finish: str | None = None

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.ids)


class Engine:
    """Runs at most `rows` requests at once over one cache.

    Each has at most `context` tokens, prompt and answer. `submit` and `cancel` may be called from
    any thread, `step` and `run` from one.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        rows: int = 8,
        context: int = 4096,
        end_id: int | None = None,
        pad_id: int = 0,
        vocabulary: int | None = None,
    ) -> None:
        if rows < 1 or context < 2:
            raise ValueError(
                f"got rows={rows} and context={context}, expected at least 1 row of 2 tokens"
            )
        self.model, self.rows, self.context, self.end_id, self.pad_id = (
            model,
            rows,
            context,
            end_id,
            pad_id,
        )
        self.vocabulary = min(vocabulary or model.config.vocabulary, model.config.vocabulary)
        self.running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._lock = threading.Lock()
        self._admitted: list[Request] = []
        self._cache: Cache | None = None

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        row: int = 0,
    ) -> Request:
        """Puts a prompt in the queue.

        `row` makes equal seeds differ, as in `Sampling.generator`. ValueError where the prompt is
        empty, too long, or contains ids that the model or its tokenizer does not have.
        """
        if not prompt or not all(0 <= token < self.vocabulary for token in prompt):
            raise ValueError(
                f"prompt: expected at least one id, each from 0 to {self.vocabulary - 1}"
            )
        if max_new_tokens < 1 or len(prompt) + max_new_tokens > self.context:
            raise ValueError(
                f"got a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens}, "
                f"expected at least 1 new token and at most {self.context} tokens in all"
            )
        request = Request(tuple(prompt), max_new_tokens, sampling, sampling.generator(row))
        with self._lock:
            self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Removes a request from the queue at once, or from the batch at the next step.

        A finished request is not changed.
        """
        if request.finish is not None:
            return
        request.finish = "cancelled"
        with self._lock, contextlib.suppress(ValueError):
            self._waiting.remove(request)

    def drop(self) -> list[Request]:
        """Drops and returns all running requests, after a step that failed."""
        dropped = [*self.running, *self._admitted]
        for request in dropped:
            request.finish = request.finish or "error"
        self.running, self._admitted, self._cache = [], [], None
        return dropped

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self._waiting

    def run(self, prompts: Sequence[Sequence[int]], **options) -> list[list[int]]:
        """Completes all prompts; returns the new ids of each, in order."""
        requests = [self.submit(prompt, **options) for prompt in prompts]
        while not self.idle:
            self.step()
        return [request.ids for request in requests]

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Decodes one id for every running and every newly admitted request.

        Returns these requests. One whose logits no id can be sampled from gets none, and its
        `finish` becomes "error".
        """
        self._evict()
        admitted = self._admitted = self._admit()
        if self.running:
            assert self._cache is not None
            last = torch.tensor(
                [[request.ids[-1]] for request in self.running], device=self._device
            )
            self._give(self.running, last, None, self._cache)
        filled = [(requests, self._prefill(requests)) for requests in by_length(admitted)]
        for requests, cache in filled:
            if self.running and self._cache is not None:
                cache = join((self._cache, cache), (len(self.running), len(requests)))
            self._cache = cache
            self.running = self.running + requests
        self._admitted = []
        return list(self.running)

    def _prefill(self, requests: list[Request]) -> Cache:
        """Decodes the first id of each request; returns the cache of their prompts."""
        ids, present = pad_left([request.prompt for request in requests], self.pad_id, self._device)
        cache = self.model.new_cache(len(requests), capacity=ids.shape[1] + 64)
        self._give(requests, ids, present, cache)
        return cache

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _admit(self) -> list[Request]:
        admitted: list[Request] = []
        with self._lock:
            while self._waiting and len(self.running) + len(admitted) < self.rows:
                request = self._waiting.popleft()
                if request.finish is None:
                    admitted.append(request)
        return admitted

    def _evict(self) -> None:
        kept = [row for row, request in enumerate(self.running) if request.finish is None]
        if len(kept) == len(self.running):
            return
        self.running = [self.running[row] for row in kept]
        if not kept:
            self._cache = None
        elif self._cache is not None:
            self._cache.select(torch.tensor(kept, device=self._device))

    def _give(
        self, requests: list[Request], ids: Tensor, present: Tensor | None, cache: Cache
    ) -> None:
        hidden = self.model.hidden(ids, present=present, cache=cache, last=True)[0]
        logits = self.model.logits(hidden)[:, 0, : self.vocabulary]
        for row, request in enumerate(requests):
            seen = None
            if request.sampling.repetition_penalty != 1.0:
                seen = saw([[*request.prompt, *request.ids]], self.vocabulary, self._device)
            try:
                token = int(
                    sample(logits[row : row + 1], request.sampling, [request.generator], seen)
                )
            except ValueError as error:
                request.finish = request.finish or "error"
                runtime.log(
                    f"serve: a request of {len(request.prompt)} tokens ends: {error}", style="red"
                )
                continue
            request.ids.append(token)
            if request.finish is None and token == self.end_id:
                request.finish = "stop"
            elif request.finish is None and len(request.ids) == request.max_new_tokens:
                request.finish = "length"


def by_length(requests: Sequence[Request]) -> list[list[Request]]:
    """Groups requests that are prefilled together, shortest first.

    Prompts of equal length are always grouped. A longer one of at most PADDED_LENGTH tokens joins
    the group before it where this adds at most PADDING tokens of padding in all.
    """
    groups: list[list[Request]] = []
    for request in sorted(requests, key=lambda request: len(request.prompt)):
        length = len(request.prompt)
        longer = length - len(groups[-1][-1].prompt) if groups else length
        if groups and (
            not longer or (length <= PADDED_LENGTH and longer * len(groups[-1]) <= PADDING)
        ):
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def join(caches: tuple[Cache, Cache], rows: tuple[int, int]) -> Cache:
    """Joins the sequences of two caches into one, with their last tokens aligned.

    Positions before the first token of every sequence are dropped.
    """
    left, right = caches
    size = max(_held(left.past), _held(right.past))
    layers = [
        _join(a, b, left.past, right.past, size)
        for a, b in zip(left.layers, right.layers, strict=True)
    ]
    ids = _join(left.ids, right.ids, left.past, right.past, size)
    device = next(_tensors(left)).device
    return Cache(layers, _join_past((left.past, right.past), rows, size, device), ids, [])


def _tensors(cache: Cache):
    """Yields the buffers of a cache, in order."""
    stack: list = [*cache.layers]
    while stack:
        part = stack.pop()
        stack += part.states() if isinstance(part, Bundle) else []
        if getattr(part, "buffer", None) is not None:
            yield part.buffer


def _held(past: Past) -> int:
    """Returns the number of positions from the first that is valid in any sequence."""
    present = past.present
    if not present.length or present.buffer is None:
        return past.length
    anywhere = present.buffer[:, : present.length].any(0)
    return past.length - int(anywhere.int().argmax())


def _join(a, b, left: Past, right: Past, size: int):
    if a is None:
        return None
    if isinstance(a, Bundle):
        return type(a)(
            **{
                name: _join(part, b.parts[name], left, right, size)
                for name, part in a.parts.items()
            }
        )
    if isinstance(a, Recent):
        return _join_recent(a, b)
    if isinstance(a, Blocks):
        current = a.tokens == left.length and b.tokens == right.length
        return _join_blocks(a, b, size, current)
    if isinstance(a, Appended) and a.length == left.length and b.length == right.length:
        return _stack(_tail(a, size), _tail(b, size), size)
    raise ValueError(
        f"join: got a layer that keeps {type(a).__name__}, expected one that keeps tokens or blocks"
    )


def _tail(kept: Appended, size: int) -> Tensor:
    """Returns the last `size` tokens, preceded by zeros where fewer are cached."""
    assert kept.buffer is not None
    held = kept.buffer[:, max(0, kept.length - size) : kept.length]
    if held.shape[1] == size:
        return held
    return torch.cat(
        [held.new_zeros(held.shape[0], size - held.shape[1], *held.shape[2:]), held], 1
    )


def _stack(a: Tensor, b: Tensor, size: int) -> Appended:
    joined = Appended(size + 64)
    joined.append(torch.cat([a, b]))
    return joined


def _join_recent(a: Recent, b: Recent) -> Recent:
    """Joins two windows of recent tokens, which hold the same count.

    A joined sequence cannot be cropped further than the younger of the two.
    """
    joined = Recent(a.count, a.slack, a.fill)
    if a.buffer is None or b.buffer is None:
        return joined
    keep, buffers = a.count + a.slack, ((a.buffer, a.end), (b.buffer, b.end))
    joined.extend(torch.cat([buffer[:, end - keep : end] for buffer, end in buffers]))
    joined.length, joined.known = max(a.length, b.length), min(a.known, b.known)
    return joined


def _join_blocks(a: Blocks, b: Blocks, size: int, current: bool) -> Blocks:
    """Joins compressed blocks; zeros follow those of the sequence with fewer.

    Blocks are counted from a sequence's own first token, so that they need no alignment. Unless
    both are `current`, the joined one is empty and computes all blocks from the keys at the next
    step: a padded prompt computes none.
    """
    joined = Blocks(a.block, a.stride, size + 64)
    if current and a.made.buffer is not None and b.made.buffer is not None:
        # Sequences that had more blocks may have been removed.
        most = min(max(a.made.length, b.made.length), joined.count(size))
        joined.made.append(torch.cat([_head(a.made, most), _head(b.made, most)]))
        joined.tokens = size
    return joined


def _head(kept: Appended, size: int) -> Tensor:
    """Returns the first `size` entries, followed by zeros where fewer are cached."""
    assert kept.buffer is not None
    held = kept.buffer[:, : min(kept.length, size)]
    return torch.cat(
        [held, held.new_zeros(held.shape[0], size - held.shape[1], *held.shape[2:])], 1
    )


def _join_past(
    pasts: tuple[Past, Past], rows: tuple[int, int], size: int, device: torch.device
) -> Past:
    """Joins the pasts of two caches, with a validity mask for every token.

    The mask is omitted where all positions are valid.
    """
    joined, present = Past(size + 64), []
    for past, batch in zip(pasts, rows, strict=True):
        known = past.present
        if not known.length:
            known = Appended()
            known.append(torch.ones(batch, past.length, dtype=torch.bool, device=device))
        present.append(_tail(known, size))
    everyone = torch.cat(present)
    joined.append(len(everyone), size, None, None if bool(everyone.all()) else everyone)
    return joined
