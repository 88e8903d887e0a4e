r"""Chats: how messages become the text and the ids of a document, and which ids are targets.

    text     begin  role_1 "\n" content_1 end  role_2 "\n" content_2 end  ...
    prompt   the same, and then "assistant\n"
    targets  the ids of the assistant's contents, and the end after each of them

That is ChatML with the tokenizer's own special tokens in place of two new ones: a model needs no
rows for them, and stops at the end that it was pretrained with. TEMPLATE is the same for
transformers' `apply_chat_template`, which a server fills; both give the same ids. A record is a
list of {"role": "system", "user" or "assistant", "content": text}, in the column "messages". Its
document is that list as JSON.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import tokenizers

COLUMN = "messages"  # a column of this name holds chats
ROLES = ("system", "user", "assistant")
TEMPLATE = """{%- if tools %}{{ raise_exception('this model was trained on chats without tools') }}\
{% endif -%}
{{- bos_token -}}
{%- for message in messages -%}
{{- message.role + '\\n' + (message.content or '') | trim + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant\\n' -}}{%- endif -%}
"""

Messages = Sequence[Mapping[str, str]]


@runtime_checkable
class HasSpecialTokens(Protocol):
    """What `tokenizer.Tokenizer` has, which is above this file."""

    backend: tokenizers.Tokenizer
    begin_id: int
    end_id: int


def read(record: Any) -> list[dict[str, str]]:
    """Returns the messages of a record, up to the assistant's last; ValueError with the reason.

    What follows the last answer is no target, nor does a target depend on it.
    """
    if not isinstance(record, list) or not all(isinstance(one, dict) for one in record):
        raise ValueError("no list of messages")
    messages = []
    for one in record:
        if one.get("tool_calls") or one.get("role") == "tool":
            raise ValueError("a chat with tools")
        if one.get("role") not in ROLES:
            raise ValueError(f"a role other than {', '.join(ROLES)}")
        if not isinstance(one.get("content"), str):
            raise ValueError("a content that is no text")
        messages.append({"role": one["role"], "content": one["content"]})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("a chat without an answer")
    return messages


def document(messages: Messages) -> str:
    """Returns the document of a chat, which `messages_of` reads."""
    return json.dumps(messages, ensure_ascii=False)


def messages_of(document: str) -> list[dict[str, str]]:
    """Returns the messages of a document."""
    return json.loads(document)


def is_document(raw: bytes) -> bool:
    """Whether a text is the document of a chat: a source without columns has other texts."""
    try:
        return bool(read(json.loads(raw)))
    except (ValueError, RecursionError):
        return False


def plain(document: str) -> str:
    """Returns the text of a document without special tokens, a message a paragraph."""
    return "\n\n".join(f"{one['role']}\n{one['content'].strip()}" for one in messages_of(document))


def contents(document: str) -> str:
    """Returns the contents of the messages, a line each."""
    return "\n".join(one["content"] for one in messages_of(document))


def answers_size(document: str) -> int:
    """Returns the UTF-8 bytes of the assistant's contents."""
    answers = (one["content"] for one in messages_of(document) if one["role"] == "assistant")
    return sum(len(answer.strip().encode("utf-8")) for answer in answers)


class ChatEncoder:
    """Encodes documents of chats, as `apply_chat_template` of TEMPLATE and the tokenizer would."""

    def __init__(self, tokenizer: HasSpecialTokens) -> None:
        # A copy, in which the text of a special token is the token.
        self.backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self.backend.encode_special_tokens = False
        self.begin_id, self.end_id = tokenizer.begin_id, tokenizer.end_id
        self.begin_token = str(self.backend.id_to_token(self.begin_id))
        self.end_token = str(self.backend.id_to_token(self.end_id))

    def takes(self, document: str) -> bool:
        """Whether a document can be encoded."""
        try:
            return bool(self.encode(document))
        except ValueError:
            return False

    def encode(self, document: str) -> tuple[list[int], list[bool]]:
        """Returns the ids between a document's begin and its end, and which of them are targets.

        The end itself is always a target. ValueError for a chat that spells a special token, which
        would end a message in the middle, and for a tokenizer that does not read its special
        tokens in a text.
        """
        text, spans = self.begin_token, []
        for message in messages_of(document):
            content = message["content"].strip()
            header = f"{message['role']}\n"
            if message["role"] == "assistant":
                first = len(text) + len(header)
                spans.append((first, first + len(content) + len(self.end_token)))
            text += header + content + self.end_token
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids = encoding.ids
        special = sum(i in (self.begin_id, self.end_id) for i in ids)
        if special != 1 + len(messages_of(document)) or (ids[0], ids[-1]) != (
            self.begin_id,
            self.end_id,
        ):
            raise ValueError("a chat that spells a special token")
        # Offsets may leave white space out of a token; where it ends is where its text does.
        targets, span = [], 0
        for _, stop in encoding.offsets:
            while span < len(spans) and stop > spans[span][1]:
                span += 1
            targets.append(span < len(spans) and spans[span][0] < stop)
        return ids[1:-1], targets[1:-1]
