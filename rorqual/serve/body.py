"""Reads the JSON body of a request, with limits on its size and on the time that it may take."""

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

LONGEST_VALUE = 200  # characters of a value, or of a name, that an error repeats
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # a surrogate, in JSON


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


async def body(
    http: Request, largest: int, seconds: float = 30, *, replace_halves: bool = False
) -> Any:
    """Reads and parses the JSON body of a request; `replace_halves` as in `loads`.

    ValueError for another content type, more than `largest` bytes, no JSON, or where it has not all
    arrived within `seconds` (status 408).
    """
    kind = http.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ValueError(
            f"content-type: got {kind[:LONGEST_VALUE] or 'none'}, expected application/json"
        )
    coding = http.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        message = f"content-encoding: got {coding[:LONGEST_VALUE]}, expected a plain body"
        raise Refusal(message, status=415)
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
    return loads(bytes(content), replace_halves=replace_halves)


def loads(content: bytes, *, replace_halves: bool = False) -> Any:
    """Returns the value of a JSON text. ValueError where it is none.

    JSON can contain half a character, as from a client that cut a text in the middle of one. With
    `replace_halves` it becomes U+FFFD; otherwise it stays, and is no text that can be encoded.
    """
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text)
        return _whole(value) if replace_halves and _HALF.search(text) else value
    except ValueError as error:
        raise ValueError(f"body is not JSON: {str(error)[:LONGEST_VALUE]}") from error
    # The json module parses recursively.
    except RecursionError as error:
        raise ValueError(
            "body is not JSON for us: lists or objects too deep in one another"
        ) from error


def _whole(value: Any) -> Any:
    """Replaces halves of characters by U+FFFD in all texts of a JSON value, also in its keys."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(one) for key, one in value.items()}
    return value
