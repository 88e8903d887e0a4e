"""Runs requests with continuous batching: one batched step for all of them.

    step:  admit (prefill waiting requests into a cache of their own), decode one id for every
           running request, join the caches, evict finished requests

A cache has a length for every sequence, so that sequences of different ages form a batch and the
ids of a sequence do not depend on its neighbours. Prompts are prefilled only with others of similar
length (`by_length`).
A request that no id can be sampled for ends without affecting the others.

What a server needs of an engine: `submit`, `cancel`, `step`, `drop`, `stats`, `idle`, and of a
request: `ids`, `logprobs`, `observed` that grow by one a step, and `finish`.
Continuous batching: Orca, OSDI 2022.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rorqual import runtime
from rorqual.layers.cache import Cache
from rorqual.model import Aux, LanguageModel
from rorqual.serve.decoding import pad
from rorqual.serve.sampling import (
    GREEDY,
    Matcher,
    SamplerRow,
    Sampling,
    TokenLogprobs,
    logprobs_of,
    sample_rows,
)
from rorqual.serve.step import Decoder
from rorqual.serve.trace import MemoryRead, Trace, experts_of, traced

# A forward over 2 to 8 short prompts costs little more than one over the longest; padding costs
# more the longer it is.
PADDED_LENGTH = 256  # longer prompts are prefilled only with prompts of the same length
CHUNK = 512  # positions of a prompt whose logits are computed at a time
PADDING = 128  # tokens of padding that cost about as much as one more forward


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """What a request wants to know of the forward passes, besides ids and log-probabilities."""

    experts: bool = False  # the experts of every token
    memory: bool = False  # the rows and gates of every token
    embedding: bool = False  # the mean of the final hidden states of the prompt

    @property
    def reads_prompt(self) -> bool:
        """Whether the output of every token of the prompt is needed, not of the last alone."""
        return self.experts or self.memory or self.embedding


NOTHING = Watch()


@dataclass(slots=True, eq=False)
class Observed:
    """What one forward pass of a request showed: of its whole prompt, or of one more token."""

    experts: list[dict[int, list[int]]] = field(default_factory=list)
    memory: list[dict[int, MemoryRead]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Request:
    """One prompt that is being completed; `ids` grows by one a step until `finish` is set.

    `finish` is "stop", "length", "cancelled", or "error" where no id could be sampled from its
    logits. `logprobs` and `observed` grow with `ids` where they are asked for; the first of
    `observed` is of the whole prompt. `prompt_logprobs` has no entry for the first id.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    sampler: SamplerRow
    watch: Watch = NOTHING
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    observed: list[Observed] = field(default_factory=list)
    embedding: list[float] | None = None
    finish: str | None = None

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.ids)

    @property
    def reads_prompt(self) -> bool:
        return self.sampling.prompt_logprobs or self.watch.reads_prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """The load of an engine."""

    running: int
    waiting: int
    cached_tokens: int  # tokens of the requests that run
    capacity: int  # tokens that requests may have in all


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
        watch: Watch = NOTHING,
        matcher: Matcher | None = None,
    ) -> Request:
        """Puts a prompt in the queue.

        `row` makes equal seeds differ, as in `Sampling.generator`. `matcher` is a grammar that the
        new ids follow. With max_new_tokens 0 the prompt is only read, for its log-probabilities,
        experts, memory or embedding. ValueError where the prompt is empty, too long, or contains
        ids that the model or its tokenizer does not have.
        """
        if not prompt or not all(0 <= token < self.vocab_size for token in prompt):
            raise ValueError(
                f"prompt: expected at least one id, each from 0 to {self.vocab_size - 1}"
            )
        least = 0 if watch.reads_prompt or sampling.prompt_logprobs else 1
        if max_new_tokens < least or len(prompt) + max_new_tokens > self.context:
            raise ValueError(
                f"got a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens}, "
                f"expected at least {least} new tokens and at most {self.context} tokens in all"
            )
        if any(not 0 <= token < self.vocab_size for token, _ in sampling.logit_bias):
            raise ValueError(f"logit_bias: expected ids from 0 to {self.vocab_size - 1}")
        ends = set() if sampling.ignore_eos or self.end_id is None else {self.end_id}
        sampler = SamplerRow(
            prompt,
            sampling,
            sampling.generator(row),
            vocab_size=self.model.config.vocab_size,
            device=self._device,
            end_ids={
                token for token in (*ends, *sampling.stop_token_ids) if token < self.vocab_size
            },
            matcher=matcher,
        )
        request = Request(tuple(prompt), max_new_tokens, sampling, sampler, watch)
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

    def stats(self) -> Stats:
        """Returns the load; it may be read from any thread."""
        running = list(self.running)
        return Stats(
            running=len(running),
            waiting=self.waiting,
            cached_tokens=sum(request.tokens for request in running),
            capacity=self.max_batch_size * self.context,
        )

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
            if any(request.watch.experts or request.watch.memory for request in self.running):
                self._give(self.running, last, None, self._cache)
            else:
                self._sample(self.running, self._decoder(last, self._cache))
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
        self._give(requests, ids, lengths, cache)
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

    def _give(
        self, requests: list[Request], ids: Tensor, lengths: list[int] | None, cache: Cache
    ) -> None:
        """Runs the model on new ids and gives every request its next id."""
        prompts = lengths is not None
        whole = prompts and any(request.reads_prompt for request in requests)
        memory = any(request.watch.memory for request in requests)
        with traced(self.model, memory=memory) as trace:
            hidden, auxes = self.model.hidden(ids, lengths=lengths, cache=cache, last=not whole)
        counts = lengths if lengths is not None else [1] * len(requests)
        for row, request in enumerate(requests):
            self._observe(request, row, counts[row], trace, auxes)
            if prompts and request.reads_prompt:
                self._read_prompt(request, hidden[row : row + 1, : counts[row]])
        if hidden.shape[1] > 1:
            last = torch.tensor(counts, device=hidden.device) - 1
            hidden = hidden[torch.arange(len(requests), device=hidden.device), last][:, None]
        rows = [row for row, request in enumerate(requests) if request.max_new_tokens]
        if rows:
            logits = self.model.logits(hidden)[:, 0]
            self._sample(
                [requests[row] for row in rows],
                logits if len(rows) == len(requests) else logits[rows],
            )
        for request in requests:
            if not request.max_new_tokens:
                request.finish = request.finish or "length"

    def _sample(self, requests: list[Request], logits: Tensor) -> None:
        """Samples one id for every request; one that fails ends alone."""
        drawn = sample_rows(logits[:, : self.vocab_size], [request.sampler for request in requests])
        for row, (request, token) in enumerate(zip(requests, drawn.ids, strict=True)):
            try:
                if row in drawn.errors:
                    raise ValueError(f"got {drawn.errors[row]}")
                ended = request.sampler.accept(token)
            except ValueError as error:
                request.finish = request.finish or "error"
                runtime.log(
                    f"serve: a request of {len(request.prompt)} tokens ends: {error}", style="red"
                )
                continue
            request.ids.append(token)
            if request.sampling.logprobs is not None:
                request.logprobs += logprobs_of(
                    logits[row : row + 1],
                    torch.tensor([token], device=logits.device),
                    request.sampling.logprobs,
                    self.vocab_size,
                )
            if request.finish is None and ended:
                request.finish = "stop"
            elif request.finish is None and len(request.ids) == request.max_new_tokens:
                request.finish = "length"

    def _observe(
        self, request: Request, row: int, count: int, trace: Trace, auxes: Sequence[Aux]
    ) -> None:
        """Notes the experts and the memory of the tokens that were read."""
        if not (request.watch.experts or request.watch.memory):
            return
        observed = Observed()
        if request.watch.experts:
            observed.experts = experts_of(auxes, row, count)
        if request.watch.memory:
            observed.memory = trace.memory(row, count)
        request.observed.append(observed)

    def _read_prompt(self, request: Request, hidden: Float[Tensor, "1 T D"]) -> None:
        """Computes the log-probabilities and the embedding of a prompt."""
        if request.watch.embedding:
            mean = self.model.norm(hidden).float().mean(1)[0]
            if not mean.isfinite().all():
                request.finish = request.finish or "error"
                return
            request.embedding = mean.tolist()
        if not request.sampling.prompt_logprobs:
            return
        following = torch.tensor(request.prompt[1:], device=hidden.device)
        for start in range(0, len(following), CHUNK):
            logits = self.model.logits(hidden[:, start : start + CHUNK])[0]
            targets = following[start : start + CHUNK]
            request.prompt_logprobs += logprobs_of(
                logits[: len(targets)], targets, request.sampling.logprobs or 0, self.vocab_size
            )


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
