"""Tests that calls of tools are read from text in pieces, and that nothing else is."""

import json

import pytest

from rorqual.serve import tools

CALLS = {
    "hermes": 'So: <tool_call>\n{"name": "f", "arguments": {"a": "}"}}\n</tool_call>\n'
    '<tool_call>{"name": "f", "arguments": {"a": "é"}}</tool_call>',
    "deepseek": "So: <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
    '```json\n{"a": "}"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "é"}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "mistral": 'So: [TOOL_CALLS][{"name": "f", "arguments": {"a": "}"}}, '
    '{"name": "f", "arguments": "{\\"a\\": \\"é\\"}"}]',
    "json": '[{"name": "f", "parameters": {"a": "}"}}, {"name": "f", "arguments": {"a": "é"}}]',
}


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_read_from_text_in_pieces_of_any_size(name, size):
    text = CALLS[name]
    form = tools.format_of(text) if name != "json" else tools.JSON
    assert form.name == name
    stream = tools.ToolStream(form, ["f"])
    content = ""
    calls = []
    for start in range(0, len(text), size):
        piece, more = stream.push(text[start : start + size])
        content = content + piece
        calls = calls + more
    piece, more = stream.flush()
    content = content + piece
    calls = calls + more
    assert content.strip() == ("" if name == "json" else "So:")
    assert [call.name for call in calls] == ["f", "f"]
    assert [json.loads(call.arguments) for call in calls] == [{"a": "}"}, {"a": "é"}]
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize(
    "text",
    [
        "no call at all",
        "a < b and <tool_",
        "<tool_call>no json</tool_call>",
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        '{"name": "g"}',
        "",
    ],
)
@pytest.mark.parametrize("form", [tools.FORMATS[1], tools.JSON])
def test_what_is_no_call_stays_text(form, text):
    stream = tools.ToolStream(form, ["f"])
    pieces = [stream.push(letter)[0] for letter in text]
    content, calls = stream.flush()
    assert ("".join(pieces) + content, calls) == (text, [])


def test_a_forced_call_has_a_schema():
    function = {"name": "f", "parameters": {"type": "object"}}
    asked = [{"type": "function", "function": function}]
    assert tools.tool_schema(asked, "f") == {"type": "object"}
    (one,) = tools.tool_schema(asked, None)["items"]["anyOf"]
    assert one["properties"]["name"] == {"const": "f"}
    stream = tools.ToolStream(tools.JSON, ["f"], "f")
    assert stream.push('{"a":') == ("", [])
    stream.push(" 1}")
    content, (call,) = stream.flush()
    assert (content, call.name, call.arguments) == ("", "f", '{"a": 1}')
