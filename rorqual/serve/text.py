"""Writes single ids as text and as bytes, as answers with log-probabilities have them."""

import functools
import re

from rorqual.data.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the ids of special tokens, whose text is not a part of an answer."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


@functools.cache
def _letters() -> dict[str, int]:
    """Maps the letters with which a byte-level tokenizer spells bytes to these bytes.

    Bytes that have a visible letter are that letter; the others are the letters from 256 on.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    shifted = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in visible} | shifted


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int] | None:
    """Returns the bytes of an id, also of one that is a piece of a character.

    None where the tokenizer does not spell bytes.
    """
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return list(text.encode())
    spelt = tokenizer.backend.id_to_token(token) or ""
    if match := _BYTE.fullmatch(spelt):
        return [int(match[1], 16)]
    letters = _letters()
    return [letters[one] for one in spelt] if all(one in letters for one in spelt) else None
