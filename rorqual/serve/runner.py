"""Runs the model on what a scheduler has planned, and keeps the cache of the batch.

    outputs = runner.run(plan)

A request reads its prompt into a cache of its own, which joins the cache of the batch at the step
after: one row is written, and those of the other requests stay where they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rorqual import runtime
from rorqual.layers.cache import Cache
from rorqual.model import Aux, LanguageModel
from rorqual.serve.decoding import pad
from rorqual.serve.prefixes import SPARE, Prefixes
from rorqual.serve.scheduler import Plan, Read, Request
from rorqual.serve.step import Decoder
from rorqual.serve.trace import Trace, traced


class Output(NamedTuple):
    """What a forward showed of its requests."""

    requests: Sequence[Request]
    counts: Sequence[int]  # tokens that each has read
    logits: Float[Tensor, "B V"] | None  # None if none of them is to get an id
    hidden: Float[Tensor, "B T D"] | None = None  # of all tokens; None if nobody wants them
    auxes: Sequence[Aux] = ()
    trace: Trace | None = None


class Runner:
    """The model and the cache of the requests that decode; `rows` are they, in its order."""

    def __init__(self, model: LanguageModel, prefixes: Prefixes) -> None:
        self.model, self.prefixes = model, prefixes
        self.cache: Cache | None = None
        self.rows: list[Request] = []
        # Requests whose prompt has just been read, and its cache.
        self._joining: list[tuple[list[Request], Cache]] = []
        self._decoder = Decoder(model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def drop(self) -> None:
        """Forgets all requests."""
        self.cache, self.rows, self._joining = None, [], []

    def run(self, plan: Plan) -> list[Output]:
        """Returns the output of each forward."""
        self._arrange(set(plan.decode))
        outputs = [self._decode()] if self.rows else []
        for read in plan.reads:
            outputs += self._attempt(read)
        return outputs

    def _attempt(self, read: Read) -> list[Output]:
        """Reads tokens of prompts; a prompt that cannot be read ends its own request alone."""
        try:
            return [self._read(read)]
        # Whatever fails here must not end the requests that run.
        except Exception as error:
            if len(read.requests) > 1:
                pairs = zip(*read, strict=True)
                alone = [Read([request], [count]) for request, count in pairs]
                return [output for one in alone for output in self._attempt(one)]
            runtime.log(f"serve: a prompt cannot be read, its request ends: {error!r}", "red")
            (request,) = read.requests
            request.finish = request.finish or "error"
            return [Output(*read, logits=None)]

    def _arrange(self, requests: set[Request]) -> None:
        """Removes the rows of requests that have left, and joins those of new ones."""
        self.rows, self.cache = self._keep(self.rows, self.cache, requests)
        joining, self._joining = self._joining, []
        for group, cache in joining:
            rows, selected = self._keep(group, cache, requests)
            if selected is None:
                continue
            if self.cache is None:
                self.cache = selected
            else:
                self.cache.join(selected)
            self.rows += rows

    def _keep(
        self, rows: list[Request], cache: Cache | None, requests: set[Request]
    ) -> tuple[list[Request], Cache | None]:
        """Selects the rows of a cache whose requests are among `requests`."""
        staying = [row for row, request in enumerate(rows) if request in requests]
        if not staying or cache is None:
            return [], None
        if len(staying) < len(rows):
            # The last rows fill the holes, so that no other is copied.
            holes = sorted(set(range(len(staying))) - set(staying))
            moved = staying[len(staying) - len(holes) :]
            order = list(range(len(staying)))
            for hole, row in zip(holes, moved, strict=True):
                order[hole] = row
            cache.select(torch.tensor(order, device=self.device))
            rows = [rows[row] for row in order]
        return rows, cache

    def _decode(self) -> Output:
        assert self.cache is not None
        rows = list(self.rows)
        last = torch.tensor([[request.ids[-1]] for request in rows], device=self.device)
        if any(request.watch.experts or request.watch.memory for request in rows):
            return self._forward(rows, last, [1] * len(rows), self.cache)
        return Output(rows, [1] * len(rows), self._decoder(last, self.cache))

    def _read(self, read: Read) -> Output:
        """Reads tokens of prompts into caches of their own."""
        requests, counts = read
        cache = requests[0].cache
        chunks = [
            request.sequence[request.cached : request.cached + count]
            for request, count in zip(requests, counts, strict=True)
        ]
        ids, _ = pad(chunks, 0, self.device)
        if cache is None:
            cache = self.model.new_cache(len(requests), capacity=ids.shape[1] + SPARE)
        output = self._forward(requests, ids, counts, cache)
        if output.logits is not None:
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
        self, requests: list[Request], ids: Tensor, counts: list[int], cache: Cache
    ) -> Output:
        """Runs the model on new ids."""
        whole = any(request.reads_prompt for request in requests)
        memory = any(request.watch.memory for request in requests)
        starts = cache.lengths
        with traced(self.model, memory=memory) as trace:
            lengths = counts if min(counts) < ids.shape[1] else None
            hidden, auxes = self.model.hidden(ids, lengths=lengths, cache=cache, last=not whole)
        trace.keep_last(starts, ids.shape[1])
        every = hidden if whole else None
        if hidden.shape[1] > 1:
            last = torch.tensor(counts, device=hidden.device) - 1
            hidden = hidden[torch.arange(len(counts), device=hidden.device), last][:, None]
        wanted = all(
            request.cached + count == request.tokens
            for request, count in zip(requests, counts, strict=True)
        )
        logits = self.model.logits(hidden)[:, 0] if wanted else None
        return Output(requests, counts, logits, every, auxes, trace)
