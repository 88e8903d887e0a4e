"""The JSON body of a request in -> what was asked for, or what is wrong with it, out.

The words are OpenAI's, of /v1/completions and /v1/chat/completions, and top_k, min_p and repetition_penalty.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from rorqual.serve.sampling import Sampling

# Accepted at these values only: they ask for something that is not done here.
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
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
}
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "model"})
KNOWN = (
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One request; `prompts` are texts or ids, `messages` are set for a chat and then there are no prompts."""

    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    max_new_tokens: int | None = None
    sampling: Sampling
    stop: tuple[str, ...] = ()
    copies: int = 1
    stream: bool = False
    usage: bool = False


async def body(http: Request, largest: int) -> Any:
    """What a request carries; ValueError for another content type, more than `largest` bytes, or no JSON."""
    kind = http.headers.get("content-type", "").split(";")[0].strip()
    if kind != "application/json":
        raise ValueError(f"content-type: got {kind or 'none'}, expected application/json")
    content = bytearray()
    async for chunk in http.stream():
        content += chunk
        if len(content) > largest:
            raise ValueError(f"body: got more than {largest} bytes, expected a smaller request")
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"body is not JSON: {error}") from error
    except RecursionError as error:  # json reads by recursion
        raise ValueError("body is not JSON for us: lists or objects too deep in one another") from error


def parse(body: Any, *, chat: bool, most: int = 64) -> Ask:
    """ValueError, in a sentence that names the field, for anything that cannot be done as asked.

    `most`: continuations that one request may ask for.
    """
    if not isinstance(body, Mapping):
        raise ValueError(f"body: got {type(body).__name__}, expected a JSON object")
    _refuse(body, "prompt" if chat else "messages")
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise ValueError("stream_options: expected an object")
    prompts = () if chat else _prompts(body.get("prompt"))
    copies = _number(body, "n", int, 1, 1, most)
    if copies * max(len(prompts), 1) > most:
        raise ValueError(f"n: got {copies} for each of {len(prompts)} prompts, expected at most {most} in all")
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return Ask(
        prompts=prompts,
        messages=_messages(body.get("messages")) if chat else (),
        max_new_tokens=_number(body, limit, int, None, 1, 2**31),
        sampling=_sampling(body),
        stop=_stop(body.get("stop")),
        copies=copies,
        stream=_flag(body, "stream"),
        usage=_flag(options, "include_usage"),
    )


def _refuse(body: Mapping[str, Any], misplaced: str) -> None:
    for name, value in body.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise ValueError(f"{name}: got {value!r}, which this server does not do; leave it out")
        elif name not in IGNORED and (name not in KNOWN or name == misplaced):
            near = difflib.get_close_matches(name, [known for known in KNOWN if known != misplaced], 1)
            raise ValueError(f"{name}: unknown field" + (f", did you mean {near[0]}?" if near else ""))


def _number(body: Mapping[str, Any], name: str, kind: type, default, low, high):
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
        raise ValueError(
            f"{name}: got {value!r}, expected {'an integer' if kind is int else 'a number'} of at least {low}"
        )
    return kind(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected true or false")
    return bool(value)


def _sampling(body: Mapping[str, Any]) -> Sampling:
    return Sampling(
        temperature=_number(body, "temperature", float, 1.0, 0, 100),
        top_p=_number(body, "top_p", float, None, 0, 1),
        top_k=_number(body, "top_k", int, None, 1, 2**31),
        min_p=_number(body, "min_p", float, None, 0, 1),
        repetition_penalty=_number(body, "repetition_penalty", float, 1.0, 1e-3, 1e3),
        seed=_number(body, "seed", int, None, 0, 2**63 - 1),
    )


def _stop(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words) or len(words) > 16:
        raise ValueError(f"stop: got {value!r}, expected a text or at most 16 texts, none of them empty")
    return tuple(words)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(part, str) for part in value):
            return tuple(value)
        if _ids(value):
            return (tuple(value),)
        if all(_ids(part) for part in value):
            return tuple(tuple(part) for part in value)
    raise ValueError("prompt: expected a text, a list of texts, a list of token ids, or a list of such lists")


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _messages(value: Any) -> tuple[Mapping[str, str], ...]:
    good = isinstance(value, list) and bool(value)
    for message in value if good else []:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            good = False
    if not good:
        raise ValueError("messages: expected a list of objects with the texts role and content")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)
