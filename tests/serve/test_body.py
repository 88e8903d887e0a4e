"""Tests that bodies are read as JSON, with U+FFFD for half a character."""

import pytest

pytest.importorskip("starlette", reason="the extra [serve] is not installed")

from rorqual.serve.body import loads


@pytest.mark.parametrize(
    "content", [b"{", b"[" * 100_000, b"\xff", b'"' + b"9" * 5000, b"9" * 5000]
)
def test_what_is_no_json_is_a_value_error(content):
    with pytest.raises(ValueError, match="body is not JSON"):
        loads(content)


def test_half_a_character_is_a_replacement_where_that_is_wanted():
    content = rb'{"a\ud83d": ["\ud83d\udc0b", "\udc0b", 1, null]}'
    assert loads(content, replace_halves=True) == {"a\ufffd": ["\U0001f40b", "\ufffd", 1, None]}
    assert loads(content)["a\ud83d"][1] == "\udc0b"
