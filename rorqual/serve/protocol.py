"""Parses the JSON body of a request; errors name what is wrong with it.

The fields are OpenAI's, of /v1/completions and /v1/chat/completions, and top_k, min_p and
repetition_penalty.
"""

import asyncio
import difflib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from rorqual.serve.sampling import Sampling

# These fields would change the answer and are not supported, so they are accepted only at values
# without effect. The first group is OpenAI's, the second that of other servers.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "echo": (None, False),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "reasoning_effort": (None, "none"),
    "web_search_options": (None,),
    #
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "stop_token_ids": (None, []),
    "include_stop_str_in_output": (None, False),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "typical_p": (None, 1),
    "repeat_penalty": (None, 1),
    "prompt_logprobs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "grammar": (None, ""),
    "json_schema": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
}
# OpenAI and other servers accept these fields; they would not change an answer of this server.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "verbosity",
        "request_id",
        "priority",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "detokenize",
        "cache_prompt",
        "cache_salt",
        "keep_alive",
    }
)
KNOWN = (
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "n",
    "stream",
    "stream_options",
)
_LONGEST = 200  # characters of a value, or of a name, that an error repeats


class Refusal(ValueError):
    """An error with a status other than 400, OpenAI's code for it, or headers of the answer."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRequest:
    """One request; `prompts` are texts or ids, a chat has `messages` and no prompts.

    `model` is None where the request leaves it out; `ignored` are its fields that have no effect
    here.
    """

    model: str | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    max_new_tokens: int | None = None
    sampling: Sampling
    stop: tuple[str, ...] = ()
    copies: int = 1
    stream: bool = False
    usage: bool = False
    ignored: tuple[str, ...] = ()


async def body(http: Request, largest: int, seconds: float = 30) -> Any:
    """Reads and parses the body of a request.

    ValueError for another content type, more than `largest` bytes, no JSON, or where it has not all
    arrived within `seconds`.
    """
    kind = http.headers.get("content-type", "").split(";")[0].strip()
    if kind != "application/json":
        raise ValueError(
            f"content-type: got {kind[:_LONGEST] or 'none'}, expected application/json"
        )
    content = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in http.stream():
                content += chunk
                if len(content) > largest:
                    raise ValueError(
                        f"body: got more than {largest} bytes, expected a smaller request"
                    )
    except TimeoutError as error:
        got = f"got {len(content)} bytes in {seconds:g} s"
        raise Refusal(f"body: {got}, expected the whole request", status=408) from error
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"body is not JSON: {error}") from error
    # The json module parses recursively.
    except RecursionError as error:
        raise ValueError(
            "body is not JSON for us: lists or objects too deep in one another"
        ) from error


def parse(body: Any, *, chat: bool, maximum: int = 64) -> CompletionRequest:
    """Parses the body of a request into an Ask.

    ValueError, in a sentence that names the field, for anything that is invalid or not supported.
    `maximum`: continuations that one request may ask for.
    """
    if not isinstance(body, Mapping):
        raise ValueError(f"body: got {type(body).__name__}, expected a JSON object")
    ignored = _refuse(body, "prompt" if chat else "messages")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise ValueError(f"model: got {_short(model)}, expected a text")
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise ValueError("stream_options: expected an object")
    prompts = () if chat else _prompts(body.get("prompt"))
    copies = _number(body, "n", int, 1, 1, maximum)
    if copies * max(len(prompts), 1) > maximum:
        raise ValueError(
            f"n: got {copies} for each of {len(prompts)} prompts, expected at most {maximum} in all"
        )
    limit = (
        "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    )
    return CompletionRequest(
        model=model,
        prompts=prompts,
        messages=_messages(body.get("messages")) if chat else (),
        max_new_tokens=_number(body, limit, int, None, 1, 2**31),
        sampling=_sampling(body),
        stop=_stop(body.get("stop")),
        copies=copies,
        stream=_flag(body, "stream"),
        usage=_flag(options, "include_usage"),
        ignored=ignored,
    )


def _refuse(body: Mapping[str, Any], misplaced: str) -> tuple[str, ...]:
    """Returns the fields that are ignored.

    ValueError for one that is unknown, or whose value is not supported.
    """
    ignored = []
    for name, value in body.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise ValueError(
                    f"{name}: got {_short(value)}, which this server does not do; leave it out"
                )
        elif name in IGNORED:
            ignored.append(name)
        elif name not in KNOWN or name == misplaced:
            name = name[:_LONGEST]
            similar = difflib.get_close_matches(
                name, [names for names in KNOWN if names != misplaced], 1
            )
            raise ValueError(
                f"{name}: unknown field" + (f", did you mean {similar[0]}?" if similar else "")
            )
    return tuple(ignored)


def _short(value: Any) -> str:
    """Formats a value for an error message, at most one line of it."""
    text = reprlib.repr(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _whole(text: str) -> str:
    """Joins surrogates to characters; one without its other half becomes U+FFFD.

    JSON can contain half a character, as from a client that cut a text in the middle of one.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _number(body: Mapping[str, Any], name: str, kind: type, default, low, high):
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
        what = "an integer" if kind is int else "a number"
        raise ValueError(f"{name}: got {_short(value)}, expected {what} from {low} to {high}")
    return kind(value)


def _seed(body: Mapping[str, Any]) -> int | None:
    """Returns the seed, any 64-bit integer; -1 means a random seed, as in other servers."""
    seed = _number(body, "seed", int, None, -(2**63), 2**63 - 1)
    return None if seed in (None, -1) else seed % 2**63


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}: got {_short(value)}, expected true or false")
    return bool(value)


def _sampling(body: Mapping[str, Any]) -> Sampling:
    top_p = _number(body, "top_p", float, None, 0, 1)
    top_k = _number(body, "top_k", int, None, -1, 2**31)
    return Sampling(
        temperature=_number(body, "temperature", float, 1.0, 0, 100),
        # 0 keeps only the likeliest token, as does the smallest probability that Sampling accepts.
        top_p=None if top_p is None else max(top_p, 1e-6),
        # Other servers use -1 or 0 for no limit.
        top_k=None if top_k in (-1, 0) else top_k,
        min_p=_number(body, "min_p", float, None, 0, 1),
        repetition_penalty=_number(body, "repetition_penalty", float, 1.0, 1e-3, 1e3),
        seed=_seed(body),
    )


def _stop(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(words, list)
        or not all(isinstance(word, str) and word for word in words)
        or len(words) > 16
    ):
        raise ValueError(
            f"stop: got {_short(value)}, expected a text or at most 16 texts, none of them empty"
        )
    return tuple(map(_whole, words))


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        return (_whole(value),)
    if isinstance(value, list) and value:
        if all(isinstance(piece, str) for piece in value):
            return tuple(map(_whole, value))
        if _ids(value):
            return (tuple(value),)
        if all(_ids(piece) for piece in value):
            return tuple(tuple(piece) for piece in value)
    raise ValueError(
        "prompt: expected a text, a list of texts, a list of token ids, or a list of such lists"
    )


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _messages(value: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages: expected a list of objects with the texts role and content")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(value))


def _message(message: Any, where: str) -> Mapping[str, str]:
    """Returns the role of a message and its content as one text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"{where}: got {_short(message)}, expected an object with the texts role and content"
        )
    role = message["role"]
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise ValueError(f"{where}.{name}: this server does not do tools; leave it out")
    content = message.get("content")
    # The content is null where an assistant only called a tool, or declined.
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "\n".join(
            _part(piece, f"{where}.content[{index}]") for index, piece in enumerate(content)
        )
    if not isinstance(content, str):
        got = "null" if content is None else _short(content)
        raise ValueError(f"{where}.content: got {got}, expected a text or a list of text parts")
    return {"role": _whole(role), "content": _whole(content)}


def _part(piece: Any, where: str) -> str:
    """Returns the text of one part of a message. ValueError for an image, a sound or a file."""
    kind = piece.get("type") if isinstance(piece, Mapping) else None
    if kind not in ("text", "refusal"):
        got = f"a part of type {_short(kind)}" if kind is not None else _short(piece)
        raise ValueError(
            f'{where}: got {got}, expected {{"type": "text", "text": ...}}: '
            "this model reads text only"
        )
    text = piece.get(kind)
    if not isinstance(text, str):
        raise ValueError(f"{where}.{kind}: got {_short(text)}, expected a text")
    return text
