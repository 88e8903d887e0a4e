"""Keeps a conversation with a model: messages by its chat template, or one text that both continue.

A model without a chat template has no turns. What the user writes is then a part of the document,
and the model goes on from there.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from rorqual.serve.generate import Run, TextStream, template_text
from rorqual.serve.sampling import Sampling
from rorqual.serve.text import special_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """How many tokens the last answer had, and how long it took."""

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the answer a second, the time to read the prompt included."""
        return self.tokens / max(self.seconds, 1e-9)


class Conversation:
    """A conversation with one model; `ask` adds a turn of the user and yields the answer."""

    def __init__(
        self,
        run: Run,
        sampling: Sampling,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        context: int = 4096,
    ) -> None:
        if not 0 < max_new_tokens < context:
            raise ValueError(
                f"got max_new_tokens={max_new_tokens}, expected 1 to {context - 1}, "
                "since prompt and answer share the context"
            )
        self.run = run
        self.sampling = sampling
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.context = context
        self.templated = run.folder is not None and bool(template_text(run.folder))
        self.speed: Speed | None = None
        self.dropped = 0  # turns that no longer fit
        self._messages: list[dict[str, str]] = []
        self._text = ""
        self._hidden = special_ids(run.tokenizer)
        self.reset()

    @property
    def turns(self) -> int:
        """The number of messages, or 1 where there is text."""
        return len(self._messages) if self.templated else int(bool(self._text))

    @property
    def messages(self) -> list[dict[str, str]]:
        """A copy of the messages, the system's first."""
        return [dict(message) for message in self._messages]

    def reset(self) -> None:
        """Removes all turns except for the system's message."""
        self._text = ""
        self._messages = [{"role": "system", "content": self.system}] if self.system else []
        self.dropped = 0

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer piece by piece. An answer that is not read to its end stays as it is.

        ValueError where the turn alone does not fit into the context.
        """
        if self.templated:
            self._messages.append({"role": "user", "content": text})
        else:
            self._text += text
        pieces: list[str] = []
        try:
            ids = self._prompt()
        except ValueError:
            self._take_back(text)
            raise
        started = time.perf_counter()
        count = 0
        stream = TextStream(self.run.tokenizer, (), self._hidden)
        try:
            for token in self._ids(ids):
                count += 1
                if piece := stream.push(token):
                    pieces.append(piece)
                    yield piece
            if piece := stream.flush():
                pieces.append(piece)
                yield piece
        finally:
            self.speed = Speed(tokens=count, seconds=time.perf_counter() - started)
            answer = "".join(pieces)
            if self.templated:
                self._messages.append({"role": "assistant", "content": answer})
            else:
                self._text += answer

    def _take_back(self, text: str) -> None:
        """Removes the user's turn that did not fit, so that the conversation is as before."""
        if self.templated:
            self._messages.pop()
        else:
            self._text = self._text[: len(self._text) - len(text)]

    def _ids(self, prompt: list[int]) -> Iterator[int]:
        """Yields the ids of an answer without the id that ends it."""
        steps = self.run.steps([prompt], self.max_new_tokens, self.sampling)
        for (token,) in steps:
            if token is None or token == self.run.tokenizer.end_id:
                return
            yield token

    def _prompt(self) -> list[int]:
        """Returns the ids of the conversation; the oldest turns go where they do not fit."""
        limit = self.context - self.max_new_tokens
        if not self.templated:
            ids = self.run.prompt(self._text)
            self.dropped = max(len(ids) - limit, 0)
            return [ids[0], *ids[1 + self.dropped :]]
        while len(ids := self.run.chat(self._messages)) > limit:
            first = int(self._messages[0]["role"] == "system")
            if len(self._messages) - first < 3:
                raise ValueError(
                    f"got a message of {len(ids)} tokens, expected at most {limit}: "
                    "the context is full"
                )
            del self._messages[first : first + 2]
            self.dropped += 2
        return ids
