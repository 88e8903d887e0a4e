"""Finds the calls of tools in the text of a model.

    hermes     <tool_call>{"name": .., "arguments": ..}</tool_call>, of Hermes and Qwen
    deepseek   <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>, V3 and V3.1
    mistral    [TOOL_CALLS][{"name": .., "arguments": ..}]
    json       the whole text is such an object, or a list of them, of Llama 3

The chat template of the tokenizer tells which of them a model writes.
"""

import json
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple


class ToolCall(NamedTuple):
    """One call; `arguments` is JSON, as OpenAI has it."""

    id: str
    name: str
    arguments: str

    @property
    def wire(self) -> dict[str, Any]:
        """The call as it stands in an answer."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFormat:
    """How a model writes calls.

    `begin_mark` begins calls, and text before it is content. `call` matches one whole call; without
    it, everything after the mark is JSON. `end_mark` may follow the calls.
    """

    name: str
    begin_mark: str
    call: re.Pattern[str] | None = None
    end_mark: str = ""


FORMATS = (
    ToolFormat(
        name="deepseek",
        begin_mark="<｜tool▁calls▁begin｜>",
        call=re.compile(
            r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^\n<]+?)"
            r"(?:<｜tool▁sep｜>|\n```json\n)(?P<arguments>.*?)(?:\n```)?<｜tool▁call▁end｜>",
            re.DOTALL,
        ),
        end_mark="<｜tool▁calls▁end｜>",
    ),
    ToolFormat(
        name="hermes",
        begin_mark="<tool_call>",
        call=re.compile(r"\s*(?:<tool_call>)?\s*(?P<json>\{.*?\})\s*</tool_call>\s*", re.DOTALL),
    ),
    ToolFormat(name="mistral", begin_mark="[TOOL_CALLS]"),
)
JSON = ToolFormat(name="json", begin_mark="")


def format_of(template: str) -> ToolFormat:
    """Returns how the model of a chat template writes calls."""
    for one in FORMATS:
        if one.begin_mark in template:
            return one
    return JSON


def tool_schema(tools: list[dict[str, Any]], only: str | None) -> dict[str, Any]:
    """Returns the JSON schema that forces a call: of the tool `only`, or of at least one of all.

    With `only` it is the schema of the arguments alone.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if only is not None:
        return functions[only].get("parameters") or {"type": "object"}
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, function in functions.items()
    ]
    return {"type": "array", "minItems": 1, "items": {"anyOf": calls}}


class ToolStream:
    """Splits text that arrives in pieces into content and calls.

    Text that may begin a call is held back until it cannot. What looks like a call and is none is
    content, at the end. Only tools of `names` are called.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], only: str | None = None) -> None:
        """Begins a text. With `only` all of it is the arguments of that tool."""
        self.form, self.names, self.only = form, frozenset(names), only
        self.calls: list[ToolCall] = []
        self._text = ""
        self._calling = only is not None
        self._begun = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Returns the content and the calls that are complete after a piece of text."""
        self._text += text
        content = ""
        if not self._calling:
            content = self._content()
        return content, self._complete() if self._calling else []

    def flush(self) -> tuple[str, list[ToolCall]]:
        """Returns what was held back, at the end."""
        content = ""
        calls = []
        if self._calling:
            calls = self._complete() or self._rest()
        if not calls and not self.calls:
            content = (self.form.begin_mark if self._calling else "") + self._text
        self._text = ""
        self.calls += calls
        return content, calls

    def _content(self) -> str:
        """Returns the text before the first call, and notes where that begins."""
        mark = self.form.begin_mark
        if not mark:
            # The whole text is JSON, or none of it.
            stripped = self._text.lstrip()
            if not self._begun and (not stripped or stripped[0] in "{["):
                self._calling = bool(stripped)
                return ""
            self._begun = True
            content = self._text
            self._text = ""
            return content
        start = self._text.find(mark)
        if start >= 0:
            content = self._text[:start]
            self._text = self._text[start + len(mark) :]
            self._calling = True
            return content.rstrip() if not content.strip() else content
        overlap = next((n for n in range(len(mark) - 1, 0, -1) if self._text.endswith(mark[:n])), 0)
        size = len(self._text) - overlap
        content = self._text[:size]
        self._text = self._text[size:]
        return content

    def _complete(self) -> list[ToolCall]:
        """Returns the calls that are whole by now, and removes them from the text."""
        calls = []
        while self.form.call is not None and self.only is None:
            match = self.form.call.match(self._text)
            if match is None:
                break
            groups = match.groupdict()
            call = (
                self._call(_loads(groups["json"]))
                if "json" in groups
                else self._call({"name": groups["name"], "arguments": _loads(groups["arguments"])})
            )
            # An object that ends in `}` may be a part of a larger one.
            if call is None:
                break
            calls.append(call)
            self.calls.append(call)
            self._text = self._text[match.end() :]
        if self.calls and self.form.end_mark:
            self._text = self._text.removeprefix(self.form.end_mark)
        return calls

    def _rest(self) -> list[ToolCall]:
        """Reads what is left as JSON: one call, a list of them, or arguments."""
        value = _loads(self._text)
        if self.only is not None:
            # Arguments that were cut off are still the text of this call.
            return [ToolCall(_new_id(), self.only, self._text)]
        values = value if isinstance(value, list) else [value]
        calls = [call for one in values if (call := self._call(one)) is not None]
        return calls if len(calls) == len(values) else []

    def _call(self, value: Any) -> ToolCall | None:
        """Returns the call that an object is, if it is one of a known tool."""
        if not isinstance(value, dict) or value.get("name") not in self.names:
            return None
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(arguments, str):
            arguments = _loads(arguments)
        if not isinstance(arguments, dict):
            return None
        return ToolCall(_new_id(), value["name"], json.dumps(arguments, ensure_ascii=False))


def _new_id() -> str:
    """Returns a random id of a call, which the message with the tool's result repeats."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _loads(text: str) -> Any:
    """Returns the JSON value of a text, or None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
