"""Writes answers as OpenAI does: a completion or a chat, whole or in chunks.

Answer     one request: its id, its choices, its counts of tokens
_Choice    one continuation: its text, log-probabilities, experts and memory, piece by piece
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from rorqual.data.tokenizer import Tokenizer
from rorqual.serve.sampling import TokenLogprobs
from rorqual.serve.schema import ChatRequest, CompletionRequest
from rorqual.serve.service import LONGEST_ERROR, Piece
from rorqual.serve.text import token_bytes
from rorqual.serve.worker import Handle

JsonDict = dict[str, Any]


def problem(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> JsonDict:
    """Returns an error as OpenAI formats it.

    The message is truncated, and characters that UTF-8 cannot encode are replaced.
    """
    if len(message) > LONGEST_ERROR:
        message = message[:LONGEST_ERROR] + "..."
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Answer:
    """Formats the answer to one request."""

    def __init__(
        self,
        request: CompletionRequest | ChatRequest,
        model: str,
        handles: Sequence[Handle],
        tokenizer: Tokenizer,
    ) -> None:
        self.request = request
        self.handles = handles
        self.chat = isinstance(request, ChatRequest)
        kind = _ChatChoice if self.chat else _CompletionChoice
        prompts = getattr(request, "prompt", [None])
        self.choices = [
            kind(request, index, handle, tokenizer, prompts[index // request.copies])
            for index, handle in enumerate(handles)
        ]
        self._head: JsonDict = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> JsonDict:
        """Returns the answer that is made of all pieces of every choice."""
        choices = [choice.whole(one) for choice, one in zip(self.choices, pieces, strict=True)]
        name = "chat.completion" if self.chat else "text_completion"
        return self._head | {"object": name, "choices": choices, "usage": self.usage()}

    def opening(self) -> Iterator[JsonDict]:
        """Yields the chunks before the first token: the role of a chat's message."""
        if self.chat:
            delta = {"role": "assistant", "content": ""}
            for choice in self.choices:
                one = {"index": choice.index, "delta": delta, "logprobs": None}
                yield self.chunk([one | {"finish_reason": None}])

    def piece(self, index: int, piece: Piece) -> JsonDict:
        """Returns the chunk of one piece of choice `index`."""
        return self.chunk([self.choices[index].piece(piece)])

    def chunk(self, choices: list[JsonDict]) -> JsonDict:
        """Returns a chunk of choices, with the counts of tokens where they are asked for."""
        name = "chat.completion.chunk" if self.chat else "text_completion"
        chunk = self._head | {"object": name, "choices": choices}
        if self.request.usage_always:
            chunk["usage"] = self.usage()
        elif self.request.usage_at_end:
            chunk["usage"] = None
        return chunk

    def closing(self) -> JsonDict:
        """Returns the chunk without choices that ends a stream whose usage is asked for."""
        return self.chunk([]) | {"usage": self.usage()}

    def usage(self) -> JsonDict:
        """Returns the counts of tokens until now; copies of a prompt count once."""
        copies = self.request.copies
        prompts = sum(len(handle.request.prompt) for handle in self.handles[::copies])
        made = sum(handle.taken for handle in self.handles)
        cached = sum(handle.request.prefix or 0 for handle in self.handles[::copies])
        return {
            "prompt_tokens": prompts,
            "completion_tokens": made,
            "total_tokens": prompts + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class _Choice:
    """Formats one of the continuations that a request asked for, as its subclasses say."""

    def __init__(
        self,
        request: CompletionRequest | ChatRequest,
        index: int,
        handle: Handle,
        tokenizer: Tokenizer,
        prompt: str | list[int] | None,
    ) -> None:
        self.request = request
        self.index = index
        self.handle = handle
        self.tokenizer = tokenizer
        self.prompt = prompt

    def observed(self, pieces: Sequence[Piece]) -> JsonDict:
        """Returns experts and memory of the tokens that were read, where they are asked for."""
        seen = [
            token.observed
            for piece in pieces
            for token in piece.tokens
            if token.observed is not None
        ]
        fields: JsonDict = {}
        if self.request.return_routed_experts:
            fields["routed_experts"] = [
                {str(layer): experts for layer, experts in token.items()}
                for one in seen
                for token in one.experts
            ]
        if self.request.return_memory:
            fields["memory"] = [_memory(token) for one in seen for token in one.memory]
        return fields

    def new_logprobs(self, pieces: Sequence[Piece]) -> list[tuple[int, TokenLogprobs]]:
        """Returns the new ids of pieces with their log-probabilities."""
        return [
            (token.id, token.logprobs)
            for piece in pieces
            for token in piece.tokens
            if token.id is not None and token.logprobs is not None
        ]


def _memory(token: dict[int, Any]) -> JsonDict:
    """Returns what one token read as JSON: its rows and gates, by the block as a text."""
    return {str(layer): {"rows": read.rows, "gates": read.gates} for layer, read in token.items()}


class _CompletionChoice(_Choice):
    """Formats a choice of /v1/completions; an echoed prompt stands before its first piece."""

    request: CompletionRequest

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.offset = 0
        self.echoed = not self.request.echo

    def whole(self, pieces: Sequence[Piece]) -> JsonDict:
        """Returns the choice made of these pieces; the reason that it ended is in the last."""
        text = "".join(piece.text for piece in pieces)
        choice = {
            "index": self.index,
            "text": text if self.echoed else self.prompt_text + text,
            "logprobs": self.logprobs(pieces),
            "finish_reason": pieces[-1].finish if pieces else None,
        }
        self.echoed = True
        return choice | self.observed(pieces)

    def piece(self, piece: Piece) -> JsonDict:
        """Returns the choice of one chunk of a stream, which has the same fields as a whole one."""
        return self.whole([piece])

    @property
    def prompt_text(self) -> str:
        """The prompt as it is echoed: the text of the request, or that of its ids."""
        if isinstance(self.prompt, str):
            return self.prompt
        return self.tokenizer.decode(self.handle.request.prompt)

    def logprobs(self, pieces: Sequence[Piece]) -> JsonDict | None:
        """Returns the lists of a completion; the first id of an echoed prompt has no value."""
        count = self.request.logprobs
        if count is None:
            return None
        answer: JsonDict = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        if not self.echoed:
            asked = self.handle.request
            # The id that begins a document stands before the text of the prompt.
            hidden = isinstance(self.prompt, str)
            self._add(answer, asked.prompt[0], None, "" if hidden else None)
            for token, values in zip(asked.prompt[1:], asked.prompt_logprobs, strict=True):
                self._add(answer, token, values)
        for token, values in self.new_logprobs(pieces):
            self._add(answer, token, values)
        return answer

    def _add(
        self, answer: JsonDict, token: int, values: TokenLogprobs | None, text: str | None = None
    ) -> None:
        """Appends a token to the lists; its offset is in characters of the whole text.

        `text` replaces the token's own text where that is not shown, so that it takes no space.
        `values` is None for the first id of a prompt.
        """
        spelt = self.tokenizer.token(token)
        answer["tokens"].append(spelt)
        answer["token_logprobs"].append(None if values is None else values.logprob)
        answer["top_logprobs"].append(None if values is None else self._top(token, values))
        answer["text_offset"].append(self.offset)
        self.offset += len(spelt if text is None else text)

    def _top(self, token: int, values: TokenLogprobs) -> dict[str, float]:
        """Returns the likeliest tokens; the id itself is among them, as everywhere."""
        top: dict[str, float] = {}
        for other, logprob in values.top:
            top.setdefault(self.tokenizer.token(other), logprob)
        if self.request.logprobs:
            top.setdefault(self.tokenizer.token(token), values.logprob)
        return top


class _ChatChoice(_Choice):
    """Formats a choice of /v1/chat/completions, with calls of tools beside the text."""

    request: ChatRequest

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls = 0

    def whole(self, pieces: Sequence[Piece]) -> JsonDict:
        """Returns the choice with its message; the content is null where there are only calls."""
        text = "".join(piece.text for piece in pieces)
        calls = [call.wire for piece in pieces for call in piece.calls]
        message: JsonDict = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        choice = {
            "index": self.index,
            "message": message,
            "logprobs": self.logprobs(pieces),
            "finish_reason": pieces[-1].finish if pieces else None,
        }
        return choice | self.observed(pieces)

    def piece(self, piece: Piece) -> JsonDict:
        """Returns the choice of one chunk: what is new. Calls are numbered over the stream."""
        delta: JsonDict = {"content": piece.text} if piece.text or not piece.calls else {}
        if piece.calls:
            delta["tool_calls"] = [
                {"index": self.calls + number} | call.wire
                for number, call in enumerate(piece.calls)
            ]
            self.calls += len(piece.calls)
        choice = {
            "index": self.index,
            "delta": delta,
            "logprobs": self.logprobs([piece]),
            "finish_reason": piece.finish,
        }
        return choice | self.observed([piece])

    def logprobs(self, pieces: Sequence[Piece]) -> JsonDict | None:
        """Returns the tokens of a message with their log-probabilities and likeliest tokens."""
        if not self.request.logprobs:
            return None
        content = [
            self._token(token, values.logprob)
            | {"top_logprobs": [self._token(*other) for other in values.top]}
            for token, values in self.new_logprobs(pieces)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> JsonDict:
        """Returns a token as chats list it; `bytes` is null where the tokenizer spells none."""
        return {
            "token": self.tokenizer.token(token),
            "logprob": logprob,
            "bytes": token_bytes(self.tokenizer, token),
        }
