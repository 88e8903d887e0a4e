"""Decides what one step of an engine runs.

    plan = scheduler.schedule()      who decodes, and who reads how many tokens of a prompt
    scheduler.postprocess(read)      what one of its forwards has read

First come, first served: a request waits until there is a place in the batch and there are pages
for its tokens. A long prompt is read in chunks beside the requests that decode, so that these wait
for a chunk at a time. Where pages run out, caches of earlier prompts are dropped first, then the
request that came last goes back to the queue; its tokens are read again later. Continuous batching:
Orca, OSDI 2022; chunks: Sarathi-Serve, OSDI 2024.
"""

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from rorqual.layers.cache import Cache
from rorqual.serve.prefixes import PAGE, Prefixes, pages_of
from rorqual.serve.sampling import Sampling, SequenceSampler, TokenLogprobs
from rorqual.serve.trace import MemoryRead

SHORT = 8 * PAGE  # tokens; shorter prompts are read together, and not kept for later prompts
ALONE = 2048  # tokens of prompts that a step reads while nobody decodes
# A forward over 2 to 8 short prompts costs little more than one over the longest; padding costs
# more the longer it is.
PADDED_LENGTH = 256  # longer ones, read whole, are read only with others of the same length
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
    """One prompt that is being completed; `ids` grows with each step until `finish` is set.

    `finish` is "stop", "length", "cancelled", or "error" where no id could be sampled from its
    logits or its prompt could not be read; `error` says why. `logprobs` and `observed` grow with
    `ids` where they are asked for; the first of `observed` is of the whole prompt.
    `prompt_logprobs` has no entry for the first id.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    sampler: SequenceSampler
    watch: Watch = NOTHING
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    observed: list[Observed] = field(default_factory=list)
    # Tokens of the prompt whose output has been used for what is wanted of the whole prompt.
    observed_tokens: int = 0
    embedding_sum: Float[Tensor, " D"] | None = None  # over these tokens
    embedding: list[float] | None = None
    finish: str | None = None
    error: Exception | None = None
    number: int = 0  # in the order of arrival
    # Tokens of the prompt that were found in the cache of an earlier one; None before it is read.
    prefix: int | None = None
    cached: int = 0  # tokens of `sequence` that are in a cache
    cache: Cache | None = None  # its own, until all of `sequence` but the last id has been read
    # The hidden states of the last cached tokens, those that the MTP modules have not read.
    unread: Float[Tensor, "S *N D"] | None = None

    @property
    def sequence(self) -> tuple[int, ...]:
        """The prompt and the new ids."""
        return (*self.prompt, *self.ids)

    @property
    def tokens(self) -> int:
        """The number of tokens of the prompt and of the new ids."""
        return len(self.prompt) + len(self.ids)

    def last(self, count: int) -> Sequence[int]:
        """Returns the last `count` ids of the sequence."""
        return self.ids[-count:] if count <= len(self.ids) else self.sequence[-count:]

    def fail(self, error: Exception) -> None:
        """Ends the request because of an error."""
        self.finish = self.finish or "error"
        self.error = error

    def clear(self) -> None:
        """Frees the cache and the hidden states; all tokens of the request are unread again."""
        self.cached = 0
        self.cache = None
        self.unread = None

    @property
    def reads_prompt(self) -> bool:
        """Whether every token's output is needed, for log-probabilities or what is watched."""
        return self.sampling.prompt_logprobs or self.watch.reads_prompt

    @property
    def observes_prompt(self) -> bool:
        """Whether the output of a token of the prompt is still needed, so that it must be read."""
        return self.reads_prompt and self.observed_tokens < len(self.prompt)


class Read(NamedTuple):
    """Requests that read tokens in one forward, so many each."""

    requests: list[Request]
    counts: list[int]


class Plan(NamedTuple):
    """What one step runs."""

    decode: list[Request]  # they read their last id
    reads: list[Read]


class Scheduler:
    """The queue and the batch. `add` and `cancel` may be called from any thread."""

    def __init__(
        self, *, max_batch_size: int, pages: int, chunk: int, prefixes: Prefixes, step: int = 1
    ) -> None:
        """Makes an empty queue and batch, with space for `pages` pages.

        Beside requests that decode a step reads `chunk` tokens of long prompts; a request gets at
        most `step` ids in one step.
        """
        self.max_batch_size = max_batch_size
        self.pages = pages
        self.chunk = chunk
        self.tokens_per_step = step
        self.running: list[Request] = []  # all of their tokens but the last have been read
        self.reading: list[Request] = []
        self.prompt_tokens = 0  # of the requests that were admitted
        self.prefix_tokens = 0  # of these, those found in the cache of an earlier prompt
        self.preemptions = 0
        self._prefixes = prefixes
        self._waiting: deque[Request] = deque()
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """The number of requests in the queue, cancelled ones not counted."""
        return len(self._waiting)

    @property
    def admitted(self) -> list[Request]:
        """The requests that hold pages: those that decode, then those whose prompt is read."""
        return [*self.running, *self.reading]

    @property
    def pages_used(self) -> int:
        """Pages of the requests that were admitted, and of their next tokens."""
        return sum(self._needs(request) for request in self.admitted)

    def _needs(self, request: Request) -> int:
        """Returns the pages of a request, of all its tokens to come if it cannot be sent back."""
        if self._prefixes.divisible:
            return pages_of(request.tokens + self.tokens_per_step)
        return pages_of(len(request.prompt) + request.max_new_tokens + self.tokens_per_step)

    def add(self, request: Request) -> None:
        """Appends a request to the queue; its number says how early it came."""
        with self._lock:
            request.number = next(self._numbers)
            self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Removes a request from the queue at once, or from the batch at the next step."""
        with self._lock, contextlib.suppress(ValueError):
            if request.finish is None:
                request.finish = "cancelled"
                self._waiting.remove(request)

    def drop(self) -> list[Request]:
        """Removes and returns all requests that were admitted."""
        dropped = self.admitted
        self.running = []
        self.reading = []
        return dropped

    def schedule(self, paused: Read | None = None) -> Plan:
        """Returns what the next step runs, after requests have left, been sent back and come.

        A read that has `paused` goes on before others begin.
        """
        self.leave()
        self._preempt()
        self._admit()
        # What no request uses is left to the caches of earlier prompts.
        self._prefixes.shrink(self.pages - self.pages_used)
        # A request that was sent back has no cache any more.
        if paused is not None and all(
            request in self.reading and request.cache is not None for request in paused.requests
        ):
            return Plan(list(self.running), [paused])
        return Plan(list(self.running), self._reads())

    def leave(self) -> list[Request]:
        """Removes and returns the requests that have ended."""
        ended = [request for request in self.admitted if request.finish is not None]
        for request in ended:
            (self.running if request in self.running else self.reading).remove(request)
            request.clear()
        return ended

    def postprocess(self, read: Read) -> None:
        """Counts the tokens that a forward has read; those who have read all of theirs decode."""
        for request, count in zip(*read, strict=True):
            request.cached += count
            if request.cached == request.tokens and request in self.reading:
                self.reading.remove(request)
                self.running.append(request)

    def _preempt(self) -> None:
        """Sends back the requests that came last while there are too few pages."""
        while self.pages_used > self.pages:
            last = max(self.admitted, key=lambda request: request.number)
            group = self.running if last in self.running else self.reading
            group.remove(last)
            last.clear()
            self.preemptions += 1
            with self._lock:
                self._waiting.appendleft(last)

    def _admit(self) -> None:
        """Moves requests from the queue to the batch, in order, while there is space."""
        while self._waiting and len(self.admitted) < self.max_batch_size:
            # Those that run may need a page each before one of them ends.
            free = self.pages - self.pages_used - len(self.running)
            with self._lock:
                while self._waiting and self._waiting[0].finish is not None:
                    self._waiting.popleft()
                if not self._waiting:
                    break
                if self._needs(self._waiting[0]) > free and self.admitted:
                    break
                self.reading.append(self._waiting.popleft())

    def _reads(self) -> list[Read]:
        """Shares out the tokens of prompts that the next step reads, in order of arrival."""
        budget = self.chunk if self.running else max(self.chunk, ALONE)
        whole = list[Request]()
        reads = list[Read]()
        starts: set[tuple[int, ...]] = set()
        for request in self.reading:
            if budget <= 0:
                break
            # Where no prompt is kept, and nobody waits for a token, whole ones are read together.
            together = not (self._prefixes.keeps or self.running or request.cached)
            # What is wanted of a whole prompt has, in one piece, the bits of the model's forward.
            exact = request.observes_prompt and not (self.running or request.cached)
            undivided = exact or not self._prefixes.divisible
            if request.tokens < SHORT or undivided or (together and request.tokens <= budget):
                self._count(request, 0)
                whole.append(request)
                budget -= request.tokens
                continue
            # What begins alike waits for the first of them, and need not be read then. A header
            # that all share is not worth the wait.
            start = request.sequence[:SHORT]
            observes = request.observes_prompt
            if self._prefixes.keeps and start in starts and not observes:
                continue
            if request.cache is None:
                request.cache, request.cached = self._prefixes.start(
                    request.sequence, find=not observes
                )
                self._count(request, request.cached)
            if (request.prefix or 0) < SHORT:
                starts.add(start)
            count = request.tokens - request.cached
            # Where a selection was tied each call reads all tokens again: one call does.
            if not request.cache.tied and count > budget:
                # A state of a delta net is kept where a chunk ends with a page.
                paged = (request.cached + budget) // PAGE * PAGE - request.cached
                count = paged if paged > 0 else budget
            reads.append(Read([request], [count]))
            budget -= count
        groups = [Read(group, [one.tokens for one in group]) for group in by_length(whole)]
        return groups + reads

    def _count(self, request: Request, prefix: int) -> None:
        """Counts the tokens of a prompt when it is read for the first time."""
        if request.prefix is None:
            request.prefix = prefix
            self.prompt_tokens += len(request.prompt)
            self.prefix_tokens += prefix


def by_length(requests: Sequence[Request]) -> list[list[Request]]:
    """Groups requests that are read together, shortest first.

    Those of equal length are always grouped. A longer one of at most PADDED_LENGTH tokens joins the
    group before it where this adds at most PADDING tokens of padding in all.
    """
    groups: list[list[Request]] = []
    for request in sorted(requests, key=lambda request: request.tokens):
        length = request.tokens
        longer = length - groups[-1][-1].tokens if groups else length
        if groups and (
            not longer or (length <= PADDED_LENGTH and longer * len(groups[-1]) <= PADDING)
        ):
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups
