"""Runs requests with continuous batching: one batched step for all of them.

    step:  admit (prefill waiting requests into a cache of their own), decode one id for every
           running request, join the caches, evict finished requests

A cache has a length for every sequence, so that sequences of different ages form a batch and the
ids of a sequence do not depend on its neighbours. Prompts are prefilled only with others of similar
length (`by_length`).
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
from rorqual.layers.cache import Cache
from rorqual.model import LanguageModel
from rorqual.serve.decoding import occurred, pad
from rorqual.serve.sampling import GREEDY, Sampling, sample
from rorqual.serve.step import Decoder

# A forward over 2 to 8 short prompts costs little more than one over the longest; padding costs
# more the longer it is.
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
    """Runs at most `max_batch_size` requests at once over one cache.

    Each has at most `context` tokens, prompt and answer. `submit` and `cancel` may be called from
    any thread, `step` and `run` from one.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_batch_size: int = 8,
        context: int = 4096,
        end_id: int | None = None,
        pad_id: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        if max_batch_size < 1 or context < 2:
            raise ValueError(
                f"got max_batch_size={max_batch_size} and context={context}, "
                "expected at least 1 sequence of 2 tokens"
            )
        self.model, self.max_batch_size, self.context, self.end_id, self.pad_id = (
            model,
            max_batch_size,
            context,
            end_id,
            pad_id,
        )
        self.vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        self.running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._lock = threading.Lock()
        self._admitted: list[Request] = []
        self._cache: Cache | None = None
        self._decoder = Decoder(model)

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
        if not prompt or not all(0 <= token < self.vocab_size for token in prompt):
            raise ValueError(
                f"prompt: expected at least one id, each from 0 to {self.vocab_size - 1}"
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
            self._give(self.running, self._decoder(last, self._cache))
        filled = [(requests, self._prefill(requests)) for requests in by_length(admitted)]
        for requests, cache in filled:
            if self.running and self._cache is not None:
                self._cache.join(cache)
            else:
                self._cache = cache
            self.running = self.running + requests
        self._admitted = []
        return list(self.running)

    def _prefill(self, requests: list[Request]) -> Cache:
        """Decodes the first id of each request; returns the cache of their prompts."""
        ids, lengths = pad([request.prompt for request in requests], self.pad_id, self._device)
        cache = self.model.new_cache(len(requests), capacity=ids.shape[1] + 64)
        hidden = self.model.hidden(ids, lengths=lengths, cache=cache, last=True)[0]
        self._give(requests, self.model.logits(hidden)[:, 0])
        return cache

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _admit(self) -> list[Request]:
        admitted: list[Request] = []
        with self._lock:
            while self._waiting and len(self.running) + len(admitted) < self.max_batch_size:
                request = self._waiting.popleft()
                if request.finish is None:
                    admitted.append(request)
        return admitted

    def _evict(self) -> None:
        remaining = [row for row, request in enumerate(self.running) if request.finish is None]
        if len(remaining) == len(self.running):
            return
        self.running = [self.running[row] for row in remaining]
        if not remaining:
            self._cache = None
        elif self._cache is not None:
            self._cache.select(torch.tensor(remaining, device=self._device))

    def _give(self, requests: list[Request], logits: Tensor) -> None:
        logits = logits[:, : self.vocab_size]
        for row, request in enumerate(requests):
            seen = None
            if request.sampling.repetition_penalty != 1.0:
                seen = occurred([[*request.prompt, *request.ids]], self.vocab_size, self._device)
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
