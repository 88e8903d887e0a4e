"""Runs requests with continuous batching: one batched step for all of them.

    step:  scheduler.schedule() -> runner.run(plan) -> scheduler.postprocess(read), and an id is
           drawn for every request whose tokens have all been read

With drafts a forward reads the last id of a request and the drafts after it. Ids are drawn from its
logits one after the other, as without drafts, as long as each is the draft that was read: the
drafts change no id, only how many a step gives.

A cache has a length for every sequence, so that sequences of different ages form a batch and the
ids of a sequence do not depend on its neighbours. A request that no id can be sampled for ends
without affecting the others.

What a server needs of an engine: `submit`, `cancel`, `step`, `drop`, `stats`, `idle`, and of a
request: `ids`, `logprobs`, `observed` that grow with each step, and `finish`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rorqual import runtime
from rorqual.model import LanguageModel
from rorqual.serve.drafts import AcceptanceStats, Drafter
from rorqual.serve.prefixes import PAGE, Prefixes, pages_of
from rorqual.serve.runner import Output, Runner
from rorqual.serve.sampling import (
    GREEDY,
    Matcher,
    Sampling,
    SequenceSampler,
    logprobs_of,
    sample_batch,
)
from rorqual.serve.scheduler import NOTHING, Observed, Read, Request, Scheduler, Watch
from rorqual.serve.trace import experts_of

WARMUP_TOKENS = 600  # tokens of the longest prompt that is read before the first request
CHUNK = 512  # positions of a prompt whose logits are computed at a time


class NoIdError(ValueError):
    """No id can be sampled from the logits of a request; the message is what they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """The load of an engine."""

    running: int
    waiting: int
    cached_tokens: int  # tokens of the requests that run
    capacity: int  # tokens that requests may have in all
    pages: int = 0  # of the requests that run, and of their next tokens; see prefixes.PAGE
    allocated_bytes: int = 0  # of all caches: the batch, prompts that are read, earlier prompts
    prompt_tokens: int = 0  # of all requests so far
    prefix_tokens: int = 0  # of these, those that did not have to be read again
    preemptions: int = 0  # how often a request was sent back to the queue
    drafted: int = 0  # drafts that forwards have verified
    accepted: int = 0  # of these, those that were the ids that were drawn


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
        cache_tokens: int | None = None,
        prefill_chunk: int = 64,
        prefix_cache: bool = True,
        drafts: bool = False,
        end_id: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Makes an engine with an empty cache.

        The cache has space for `cache_tokens` tokens of all requests, None for as many as they may
        have; what they do not use holds the prompts that were read last. Beside requests that
        decode, at most `prefill_chunk` tokens of longer prompts are read in a step. Without
        `prefix_cache` each prompt is read, whatever was read before it. With `drafts` the model's
        MTP modules draft ids that the next forward verifies, module by module, which pays where no
        compiled step runs and enough of them are accepted; ValueError for a model that has none.
        Where the rotary frequencies depend on the length (dynamic, LongRoPE), one request runs at
        a time.
        """
        if max_batch_size < 1 or context < 2:
            raise ValueError(
                f"got max_batch_size={max_batch_size} and context={context}, "
                "expected at least 1 sequence of 2 tokens"
            )
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk: got {prefill_chunk}, expected at least 1 token")
        if model.config.rope.varies:
            # The longest sequence of a batch would change the keys of all others.
            max_batch_size = 1
        # A token more than the context: pages are taken before the next token is known.
        least = (pages_of(context) + 1) * PAGE
        cache_tokens = max_batch_size * least if cache_tokens is None else cache_tokens
        if cache_tokens < least:
            raise ValueError(
                f"cache_tokens: got {cache_tokens}, expected at least {least}: "
                f"a request may have {context} tokens"
            )
        self.model = model
        self.context = context
        self.end_id = end_id
        self.vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        drafter = Drafter(model, self.vocab_size) if drafts else None
        depths = drafter.depths if drafter is not None else 0
        self.acceptance_stats = AcceptanceStats()
        self._prefixes = Prefixes(model, keep=prefix_cache, before=depths)
        self._scheduler = Scheduler(
            max_batch_size=max_batch_size,
            pages=cache_tokens // PAGE,
            chunk=prefill_chunk,
            prefixes=self._prefixes,
            step=1 + depths,
        )
        self._runner = Runner(model, self._prefixes, drafter)

    @property
    def max_batch_size(self) -> int:
        """How many requests run at once; 1 where the rotary frequencies depend on the length."""
        return self._scheduler.max_batch_size

    @property
    def running(self) -> list[Request]:
        """The requests that have been admitted and have not ended."""
        return self._scheduler.admitted

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        index: int = 0,
        watch: Watch = NOTHING,
        matcher: Matcher | None = None,
    ) -> Request:
        """Puts a prompt in the queue.

        `index` makes equal seeds differ, as in `Sampling.generator`. `matcher` is a grammar that
        the new ids follow. With max_new_tokens 0 the prompt is only read, for its
        log-probabilities, experts, memory or embedding. ValueError where the prompt is empty, too
        long, or contains ids that the model or its tokenizer does not have.
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
        sampler = SequenceSampler(
            prompt,
            sampling,
            sampling.generator(index),
            vocab_size=self.model.config.vocab_size,
            device=self._runner.device,
            end_ids={
                token for token in (*ends, *sampling.stop_token_ids) if token < self.vocab_size
            },
            matcher=matcher,
        )
        request = Request(tuple(prompt), max_new_tokens, sampling, sampler, watch)
        self._scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Removes a request from the queue at once, or from the batch at the next step.

        A finished request is not changed.
        """
        self._scheduler.cancel(request)

    def drop(self) -> list[Request]:
        """Drops and returns all requests that were admitted, after a step that failed."""
        dropped = self._scheduler.drop()
        self._runner.drop()
        self._prefixes.shrink(0)
        for request in dropped:
            request.finish = request.finish or "error"
            request.clear()
        return dropped

    @property
    def waiting(self) -> int:
        """The number of requests in the queue; it may be read from any thread."""
        return self._scheduler.waiting

    def stats(self) -> Stats:
        """Returns the load; it may be read from any thread."""
        scheduler = self._scheduler
        admitted = scheduler.admitted
        unjoined = [cache for request in admitted if (cache := request.cache) is not None]
        return Stats(
            running=len(admitted),
            waiting=scheduler.waiting,
            cached_tokens=sum(request.cached for request in admitted),
            capacity=scheduler.pages * PAGE,
            pages=scheduler.pages_used,
            allocated_bytes=self._runner.allocated_bytes
            + self._prefixes.allocated_bytes
            + sum(cache.allocated_bytes for cache in unjoined),
            prompt_tokens=scheduler.prompt_tokens,
            prefix_tokens=scheduler.prefix_tokens,
            preemptions=scheduler.preemptions,
            drafted=self.acceptance_stats.drafted,
            accepted=self.acceptance_stats.accepted,
        )

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits, so that a step would do nothing."""
        return not self.running and not self.waiting

    def run(self, prompts: Sequence[Sequence[int]], **options) -> list[list[int]]:
        """Completes all prompts; returns the new ids of each, in order."""
        requests = [self.submit(prompt, **options) for prompt in prompts]
        while not self.idle:
            self.step()
        return [request.ids for request in requests]

    def warm_up(self) -> None:
        """Runs the model once, so that no request waits for machine code or weights.

        The compiled step is waited for, where it fits the model. Then so many prompts of a few
        tokens are read together as requests may, and one of at most WARMUP_TOKENS tokens in
        chunks beside a request that decodes: kernels that select are compiled once there is a
        choice. Nothing of it stays in the cache or the counts.
        """
        self._runner.wait_until_built()
        # Drafts are made for the third id at the earliest.
        size = max(1, min(4, self.context - 2))
        new = min(3, self.context - size)
        ids = [token % self.vocab_size for token in range(WARMUP_TOKENS)]
        for count in (1, 2, min(self.max_batch_size, 4)):
            self.run([ids[:size]] * count, max_new_tokens=new)
        # With an end no id would be left to decode beside the chunks.
        sampling = replace(GREEDY, ignore_eos=True)
        long = ids[: max(1, self.context - new)]
        beside = min(64, self.context - size)
        self.submit(ids[:size], max_new_tokens=beside, sampling=sampling)
        self.step()
        self.run([long], max_new_tokens=new, sampling=sampling)
        # The second time its prefix is found in the cache.
        self.run([long], max_new_tokens=new)
        self.drop()
        self._scheduler.prompt_tokens = 0
        self._scheduler.prefix_tokens = 0
        self._scheduler.preemptions = 0
        self.acceptance_stats = AcceptanceStats()

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Runs one plan of the scheduler; returns the requests that it gave ids, or ended.

        One whose logits no id can be sampled from gets none, and its `finish` becomes "error".
        """
        changed: list[Request] = []
        # Whoever decodes has its ids before prompts are read: rows for them are fetched meanwhile.
        for output in self._runner.run(self._scheduler.schedule(self._runner.paused)):
            self._scheduler.postprocess(Read(output.requests, output.counts))
            self._observe_prompts(output)
            if output.logits is not None:
                self._give(output)
            for request in output.requests:
                # Drafts that were not accepted have been read in vain.
                request.cached = min(request.cached, request.tokens - 1)
                if output.logits is not None or request.finish == "error":
                    changed.append(request)
        # One that was cancelled while its prompt is read had no output.
        changed += [request for request in self._scheduler.leave() if request not in changed]
        return changed

    def _give(self, output: Output) -> None:
        """Gives every request of a forward its next ids, and what it wants to know besides."""
        requests = output.requests
        drafts = output.drafts
        stats = self.acceptance_stats
        assert output.logits is not None
        if drafts is not None:
            stats.rounds += 1
            stats.drafted += sum(output.counts) - len(requests)
        slots = list(range(len(requests)))
        for position, logits in enumerate(output.logits):
            for slot in slots:
                self._observe(requests[slot], slot, position, output)
            slots = [slot for slot in slots if requests[slot].max_new_tokens]
            if not slots:
                break
            # A pool that still waits would slow the compiled step that comes next.
            with runtime.one_thread() if self._runner.compiled else nullcontext():
                self._sample(
                    [requests[slot] for slot in slots],
                    logits if len(slots) == len(requests) else logits[slots],
                )
            # The logits after a draft count where it is the id that was drawn.
            accepted = [
                slot
                for slot in slots
                if drafts is not None
                and position + 1 < output.counts[slot]
                and requests[slot].finish != "error"
                and requests[slot].ids[-1] == drafts[slot][position]
            ]
            stats.accepted += len(accepted)
            slots = [slot for slot in accepted if requests[slot].finish is None]
        for request in requests:
            if not request.max_new_tokens:
                request.finish = request.finish or "length"

    def _sample(self, requests: list[Request], logits: Float[Tensor, "B V"]) -> None:
        """Samples one id for every request; one that fails ends alone."""
        drawn = sample_batch(
            logits[:, : self.vocab_size], [request.sampler for request in requests]
        )
        for slot, (request, token) in enumerate(zip(requests, drawn.ids, strict=True)):
            try:
                if slot in drawn.errors:
                    raise NoIdError(drawn.errors[slot])
                ended = request.sampler.accept(token)
            except ValueError as error:
                request.fail(error)
                continue
            request.ids.append(token)
            if request.sampling.logprobs is not None:
                request.logprobs += logprobs_of(
                    logits[slot : slot + 1],
                    torch.tensor([token], device=logits.device),
                    request.sampling.logprobs,
                    self.vocab_size,
                )
            if request.finish is None and ended:
                request.finish = "stop"
            elif request.finish is None and len(request.ids) == request.max_new_tokens:
                request.finish = "length"

    def _observe(self, request: Request, slot: int, position: int, output: Output) -> None:
        """Notes the experts and the memory of the last token of a request that has ids.

        With drafts that is the one whose logits at `position` are wanted.
        """
        # All but the last id of a request that came back have been seen before.
        last = position if output.drafts is not None else output.counts[slot] - 1
        if request.ids and (observed := _observed(request, slot, slice(last, last + 1), output)):
            request.observed.append(observed)

    def _observe_prompts(self, output: Output) -> None:
        """Notes what is wanted of the tokens of prompts that were read for the first time."""
        for slot, (request, count) in enumerate(zip(output.requests, output.counts, strict=True)):
            if output.hidden is None or not request.observes_prompt:
                continue
            start = request.cached - count
            # A request that was sent back while its prompt was read reads some tokens again.
            tokens = slice(request.observed_tokens - start, len(request.prompt) - start)
            hidden = output.hidden[slot : slot + 1, :count][:, tokens]
            if observed := _observed(request, slot, tokens, output):
                if not request.observed:
                    request.observed.append(Observed())
                request.observed[0].experts += observed.experts
                request.observed[0].memory += observed.memory
            self._read_prompt(request, hidden)

    def _read_prompt(self, request: Request, hidden: Float[Tensor, "1 T *N D"]) -> None:
        """Computes the log-probabilities and the embedding of the next tokens of a prompt."""
        before = request.observed_tokens
        request.observed_tokens += hidden.shape[1]
        if request.watch.embedding:
            summed = self.model.head_input(hidden).float().sum(1)[0]
            if request.embedding_sum is not None:
                summed += request.embedding_sum
            request.embedding_sum = summed
            if not request.observes_prompt:
                mean = summed / len(request.prompt)
                if not mean.isfinite().all():
                    request.fail(ValueError("got an embedding that is not finite"))
                    return
                request.embedding = mean.tolist()
        if not request.sampling.prompt_logprobs:
            return
        ids = request.prompt[before + 1 : request.observed_tokens + 1]
        following = torch.tensor(ids, device=hidden.device)
        for start in range(0, len(following), CHUNK):
            logits = self.model.logits(hidden[:, start : start + CHUNK])[0]
            targets = following[start : start + CHUNK]
            request.prompt_logprobs += logprobs_of(
                logits[: len(targets)], targets, request.sampling.logprobs or 0, self.vocab_size
            )


def _observed(request: Request, slot: int, tokens: slice, output: Output) -> Observed | None:
    """Returns the experts and the memory of some tokens of a forward; None if nobody wants them."""
    watch = request.watch
    count = output.counts[slot]
    if output.trace is None or not (watch.experts or watch.memory):
        return None
    observed = Observed()
    if watch.experts:
        observed.experts = experts_of(output.auxes, slot, count)[tokens]
    if watch.memory:
        observed.memory = output.trace.memory(slot, count)[tokens]
    return observed
