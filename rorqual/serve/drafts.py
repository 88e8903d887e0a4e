"""Drafts ids with the MTP modules of a model, for requests whose next forward verifies them.

    drafts = MTP(hidden of the last token, next id), each depth on the output of the one before

A module reads a token once the ids after it are certain. The hidden states of those that are still
to be read, at most 2 D of a request that drafts with D depths, are its `unread`; their last ids may
be drafts, which is why D - 1 tokens are read again in the next round. A prompt is read in the same
pieces as by the model.

MTP drafts: DeepSeek-V3, arXiv:2412.19437, section 2.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rorqual.layers.cache import Cache
from rorqual.layers.mtp import MTP
from rorqual.model import LanguageModel
from rorqual.serve.scheduler import Request


@dataclass(slots=True)
class AcceptanceStats:
    """Counts drafts, accepted drafts and the forwards that verified them.

    A draft after one that was rejected counts as drafted and not accepted.
    """

    drafted: int = 0
    accepted: int = 0
    rounds: int = 0

    @property
    def acceptance(self) -> float:
        """The share of the drafts that were accepted; 0 before any draft."""
        return self.accepted / self.drafted if self.drafted else 0.0


def check_draftable(model: LanguageModel) -> None:
    """Raises a ValueError for a model that has no drafts, or whose drafts cannot be verified."""
    if not len(model.mtp):
        raise ValueError(
            "drafts: got a model without MTP, expected one trained with it (--model.mtp.depth 1)"
        )
    if model.config.moba is not None and model.config.moba.decode == "full":
        raise ValueError(
            'drafts: got moba.decode "full", expected "sparse": drafts are checked several at once'
        )


class Drafter:
    """The MTP modules of a model; ids from `vocab_size` on are never drafted."""

    def __init__(self, model: LanguageModel, vocab_size: int) -> None:
        check_draftable(model)
        self.model, self.vocab_size, self.depths = model, vocab_size, len(model.mtp)

    def read(
        self,
        requests: Sequence[Request],
        counts: Sequence[int],
        hidden: Float[Tensor, "B T *N D"],
        cache: Cache,
    ) -> None:
        """Reads what the model has just read of prompts, `counts` tokens each.

        The last D tokens wait, since ids after them are not known to all depths.
        """
        unread = []
        lengths = []
        firsts = []
        for slot, (request, count) in enumerate(zip(requests, counts, strict=True)):
            new = hidden[slot, :count]
            end = request.cached + count
            unread.append(new if request.unread is None else torch.cat([request.unread, new]))
            firsts.append(end - len(unread[-1]))
            certain = request.tokens - self.depths - firsts[-1]
            lengths.append(max(0, min(len(unread[-1]), certain)))
        # Where nothing is read there is one column, so that the cache begins with the others'.
        pieces = [states[: max(1, length)] for states, length in zip(unread, lengths, strict=True)]
        inputs = pad_sequence(pieces, batch_first=True)
        for depth in range(self.depths):
            following = torch.zeros(inputs.shape[:2], dtype=torch.long)
            for slot, (request, length) in enumerate(zip(requests, lengths, strict=True)):
                first = firsts[slot] + 1 + depth
                following[slot, :length] = torch.tensor(request.sequence[first : first + length])
            inputs = self.model.draft(
                inputs, following.to(inputs.device), depth=depth, lengths=lengths, cache=cache
            )[0]
        for request, states, length in zip(requests, unread, lengths, strict=True):
            # A copy, since a view would keep the states of the whole prompt.
            request.unread = states[length:].clone()

    def propose(self, requests: Sequence[Request], cache: Cache) -> Int[Tensor, "B D"]:
        """Returns the drafts of the ids after the last one of each request."""
        states = [cast(Tensor, request.unread) for request in requests]
        lengths = [len(each) for each in states]
        hidden = pad_sequence(states, batch_first=True)
        device = hidden.device
        pairs = zip(requests, lengths, strict=True)
        last_ids = [torch.tensor(request.last(length)) for request, length in pairs]
        following = pad_sequence(last_ids, batch_first=True).to(device)
        slots = torch.arange(len(states), device=device)[:, None]
        last = torch.tensor(lengths, device=device)[:, None] - 1
        drafts: list[Tensor] = []
        for depth, module in enumerate(self.model.mtp):
            if drafts:
                following = F.pad(following[:, 1:], (0, 1)).scatter(1, last, drafts[-1])
            hidden = self.model.draft(hidden, following, depth=depth, lengths=lengths, cache=cache)[
                0
            ]
            logits = self.model.head(cast(MTP, module).head_input(hidden[slots, last]))
            drafts.append(logits[..., : self.vocab_size].argmax(-1))
            self.model.announce(drafts[-1], cache)
        return torch.cat(drafts, 1)

    def accept(
        self,
        requests: Sequence[Request],
        counts: Sequence[int],
        hidden: Float[Tensor, "B T *N D"],
        cache: Cache,
        *,
        proposed: bool,
    ) -> None:
        """Keeps the hidden states of the first `counts` tokens that a decoding forward has read.

        If drafts were `proposed` before it, the modules have read all that was `unread`, the last
        D - 1 tokens of it with drafts for ids.
        """
        again = [len(cast(Tensor, request.unread)) for request in requests]
        if proposed:
            again = [min(length, self.depths - 1) for length in again]
            cache.crop_drafts(again)
        for slot, (request, count) in enumerate(zip(requests, counts, strict=True)):
            states = cast(Tensor, request.unread)
            states = states[len(states) - again[slot] :]
            request.unread = torch.cat([states, hidden[slot, :count]])
