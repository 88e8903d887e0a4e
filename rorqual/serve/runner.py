"""Runs the model on what a scheduler has planned, and keeps the cache of the batch.

    for output in runner.run(plan): give ids to output.requests

A request reads its prompt into a cache of its own, which joins the cache of the batch at the step
after: its sequence is copied there, and those of the other requests stay where they are. Beside
requests that decode, a read of a long prompt pauses behind a block of the model, so that they wait
for a few blocks at a time, and goes on in the next step. A decoding forward reads drafts, too, if
the model drafts; wrong ones are cropped from the cache.
"""

import math
import time
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rorqual.layers.addresses import WORTH_KEEPING
from rorqual.layers.cache import Cache
from rorqual.model import Aux, LanguageModel
from rorqual.serve.drafts import Drafter
from rorqual.serve.prefixes import SPARE, Prefixes
from rorqual.serve.scheduler import Plan, Read, Request
from rorqual.serve.step import Decoder
from rorqual.serve.trace import Trace, traced
from rorqual.tables import Table

# Beside requests that decode, a prompt is read for so many times as long as their step took: they
# then wait for at most 3 steps, or for a single block where that takes longer.
READING = 2.0


class Output(NamedTuple):
    """What a forward showed of its requests."""

    requests: list[Request]
    counts: list[int]  # tokens that each has read
    # Of the last token, or with drafts of each; None if none of the requests is to get an id.
    logits: Sequence[Float[Tensor, "B V"]] | None
    hidden: Float[Tensor, "B T *N D"] | None = None  # of all tokens; None if nobody wants them
    auxes: Sequence[Aux] = ()
    trace: Trace | None = None
    drafts: list[list[int]] | None = None  # read behind the last id of each request


class Runner:
    """The model and the cache of the batch; `requests` are those that decode, in its order."""

    def __init__(
        self, model: LanguageModel, prefixes: Prefixes, drafter: Drafter | None = None
    ) -> None:
        self.model = model
        self.prefixes = prefixes
        self.drafter = drafter
        self.cache: Cache | None = None
        self.requests: list[Request] = []
        # Requests whose prompt has just been read, and its cache.
        self._joining: list[tuple[list[Request], Cache]] = []
        self.paused: Read | None = None  # a read that goes on if it is in the next plan
        self._paused_outputs: Iterator[Output | None] = iter(())
        self._decoder = Decoder(model)
        self.device = next(model.parameters()).device
        self._announces = any(cast(Table, table).placement != "device" for table in model.tables)

    @property
    def compiled(self) -> bool:
        """Whether the batch decodes by the compiled step alone."""
        step = self._decoder.compiled
        return self.drafter is None and step is not None and step.attends

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the cache of the batch, and of those that join it; from any thread.

        The batch has as much for each request as for the longest of them, so that these are not
        bounded by the pages of the scheduler.
        """
        caches = [cache for _, cache in list(self._joining)]
        batch = self.cache
        if batch is not None:
            caches.append(batch)
        return sum(cache.allocated_bytes for cache in caches)

    def wait_until_built(self) -> None:
        """Waits for the machine code of the decoding step, where batches decode by it."""
        if self.drafter is None:
            self._decoder.wait_until_built()

    def drop(self) -> None:
        """Drops the caches of all requests, those that were just read included."""
        self.cache = None
        self.requests = []
        self._joining = []
        self._unpause()

    def _unpause(self) -> None:
        """Forgets the read that has paused, and its cache."""
        self.paused = None
        self._paused_outputs = iter(())

    def run(self, plan: Plan) -> Iterator[Output]:
        """Yields the output of each forward; its requests get their ids before the next one.

        Where requests decode, a read may pause; then those behind it are left to later plans.
        """
        start = time.perf_counter()
        deadline = math.inf
        self._arrange(set(plan.decode))
        if self.requests:
            before = [len(request.ids) for request in self.requests]
            output, proposed = self._decode()
            yield output
            pairs = zip(self.requests, before, strict=True)
            self._accept(output, [len(request.ids) - count for request, count in pairs], proposed)
            now = time.perf_counter()
            deadline = now + READING * (now - start)
        paused = self.paused
        goes_on = self._paused_outputs
        self._unpause()
        for read in plan.reads:
            outputs = goes_on
            if read is not paused:
                outputs = self._attempt(read, may_pause=deadline < math.inf)
            last = time.perf_counter()
            for ended in outputs:
                if ended is not None:
                    yield ended
                    continue
                now = time.perf_counter()
                # The next block takes about as long as the last one.
                if now + (now - last) > deadline:
                    self.paused = read
                    self._paused_outputs = outputs
                    return
                last = now

    def _attempt(self, read: Read, *, may_pause: bool) -> Iterator[Output | None]:
        """Reads tokens of prompts; a prompt that cannot be read ends its own request alone.

        With `may_pause` None is where the read of a long prompt can pause.
        """
        try:
            output = yield from self._read(read, may_pause)
        # Whatever fails here must not end the requests that run.
        except Exception as error:
            if len(read.requests) > 1:
                for request, count in zip(*read, strict=True):
                    yield from self._attempt(Read([request], [count]), may_pause=False)
                return
            read.requests[0].fail(error)
            output = Output(*read, logits=None)
        yield output

    def _arrange(self, requests: set[Request]) -> None:
        """Removes the sequences of requests that have left, and joins those of new ones."""
        self.requests, self.cache = self._keep(self.requests, self.cache, requests)
        joining = self._joining
        self._joining = []
        for group, cache in joining:
            staying, selected = self._keep(group, cache, requests)
            if selected is None:
                continue
            if self.cache is None:
                self.cache = selected
            else:
                self.cache.join(selected)
            self.requests += staying

    def _keep(
        self, batch: list[Request], cache: Cache | None, requests: set[Request]
    ) -> tuple[list[Request], Cache | None]:
        """Selects the sequences of a cache whose requests are among `requests`; None for none."""
        staying = [slot for slot, request in enumerate(batch) if request in requests]
        if not staying or cache is None:
            return [], None
        if len(staying) < len(batch):
            # The last sequences fill the holes, so that no other is copied.
            holes = sorted(set(range(len(staying))) - set(staying))
            moved = staying[len(staying) - len(holes) :]
            order = list(range(len(staying)))
            for hole, slot in zip(holes, moved, strict=True):
                order[hole] = slot
            cache.select(torch.tensor(order, device=self.device))
            batch = [batch[slot] for slot in order]
        return batch, cache

    def _decode(self) -> tuple[Output, bool]:
        """Reads the last id of each request, and drafts; returns whether there were any."""
        requests = list(self.requests)
        cache = self.cache
        drafter = self.drafter
        assert cache is not None
        last = torch.tensor([[request.ids[-1]] for request in requests], device=self.device)
        # How many ids each may get besides the next one.
        left = [request.max_new_tokens - len(request.ids) - 1 for request in requests]
        ones = [1] * len(requests)
        proposed = False
        if drafter is not None and max(left):
            counts = [1 + min(drafter.depths, more) for more in left]
            # Where drafts would change the logits before them, there are none.
            if not self.model.cache_is_outdated(cache, last, [1 + drafter.depths] * len(requests)):
                proposed = True
                if not cache.announced:
                    self.model.announce(last, cache)
                drafts = drafter.propose(requests, cache)
                ids = torch.cat([last, drafts], 1)
                output = self._forward(requests, ids, counts, cache, drafts=drafts.tolist())
                if not cache.tied:
                    return output, True
                cache.crop(counts)
        elif not any(request.watch.experts or request.watch.memory for request in requests):
            return Output(requests, ones, [self._decoder(last, cache)]), False
        return self._forward(requests, last, ones, cache), proposed

    def _accept(self, output: Output, accepted: list[int], proposed: bool) -> None:
        """Forgets the drafts after the ids that were given, and removes the requests that ended.

        The rows of tables that the next step reads are fetched from now on.
        """
        cache = self.cache
        requests = output.requests
        assert cache is not None
        if output.drafts is not None:
            pairs = zip(output.counts, accepted, strict=True)
            cache.crop([read - count for read, count in pairs])
        if self.drafter is not None and output.hidden is not None:
            self.drafter.accept(requests, accepted, output.hidden, cache, proposed=proposed)
        going = {request for request in requests if request.finish is None}
        self.requests, self.cache = self._keep(self.requests, cache, going)
        if self.cache is not None and self._announces:
            last = [[request.ids[-1]] for request in self.requests]
            self.model.announce(torch.tensor(last, device=self.device), self.cache)

    def _read(self, read: Read, may_pause: bool) -> Generator[None, None, Output]:
        """Reads tokens of prompts into caches of their own; None is where the read can pause.

        Only a request with a cache pauses, since its cache is counted.
        """
        requests, counts = read
        cache = requests[0].cache
        chunks = [
            request.sequence[request.cached : request.cached + count]
            for request, count in zip(requests, counts, strict=True)
        ]
        padded = pad_sequence([torch.tensor(chunk) for chunk in chunks], batch_first=True)
        ids = padded.to(self.device)
        # Rows that are recorded are those of one call, and a large call's memory is used again.
        whole_call = requests[0].watch.memory or ids.numel() >= WORTH_KEEPING
        may_pause = may_pause and cache is not None and not whole_call
        if cache is None:
            cache = self.model.new_cache(len(requests), capacity=ids.shape[1] + SPARE)
        if not may_pause:
            output = self._forward(requests, ids, counts, cache)
        else:
            whole = self._wants_all(requests)
            hidden, auxes = yield from self.model.hidden_by_block(
                ids, cache, last=not whole, for_mtp=self.drafter is not None
            )
            output = self._output(requests, counts, hidden, auxes, whole=whole)
        if self.drafter is not None and any(request.max_new_tokens for request in requests):
            assert output.hidden is not None
            self.drafter.read(requests, counts, output.hidden, cache)
        if output.logits is not None and any(request.max_new_tokens for request in requests):
            (request, *more) = requests
            if request.cache is not None and not more:
                request.cache = None
                if self.prefixes.keeps:
                    # The batch gets a copy: this one stays as it is.
                    self.prefixes.add(request.sequence, cache)
                    copy = self.model.new_cache(1, capacity=cache.length + SPARE)
                    copy.load(cache, cache.length)
                    cache = copy
            self._joining.append((requests, cache))
        return output

    def _forward(
        self,
        requests: list[Request],
        ids: Int[Tensor, "B T"],
        counts: list[int],
        cache: Cache,
        drafts: list[list[int]] | None = None,
    ) -> Output:
        """Runs the model on new ids."""
        whole = self._wants_all(requests)
        memory = any(request.watch.memory for request in requests)
        if memory:
            # The rows that are hashed in this call are those that are recorded.
            cache.announced = []
        starts = cache.lengths
        with traced(self.model, memory=memory) as trace:
            hidden, auxes = self.model.hidden(
                ids,
                lengths=counts if min(counts) < ids.shape[1] else None,
                cache=cache,
                last=not whole,
                for_mtp=self.drafter is not None,
            )
        trace.keep_last(starts, ids.shape[1])
        output = self._output(requests, counts, hidden, auxes, whole=whole, drafts=drafts)
        return output._replace(trace=trace)

    def _wants_all(self, requests: list[Request]) -> bool:
        """Returns whether the output of every token is used, not of the last alone."""
        return self.drafter is not None or any(request.reads_prompt for request in requests)

    def _output(
        self,
        requests: list[Request],
        counts: list[int],
        hidden: Float[Tensor, "B T *N D"],
        auxes: Sequence[Aux],
        *,
        whole: bool,
        drafts: list[list[int]] | None = None,
    ) -> Output:
        """Returns the output of a forward, with logits if its requests get ids."""
        every = hidden if whole else None
        if drafts is None and hidden.shape[1] > 1:
            last = torch.tensor(counts, device=hidden.device) - 1
            hidden = hidden[torch.arange(len(counts), device=hidden.device), last][:, None]
        wanted = all(
            request.cached + count >= request.tokens
            for request, count in zip(requests, counts, strict=True)
        )
        logits = self.model.logits(hidden).unbind(1) if wanted else None
        return Output(requests, counts, logits, every, auxes, Trace(), drafts)
