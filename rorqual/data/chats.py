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
SPELLED = "a chat that spells a special token"  # which `ChatEncoder` leaves out
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
    """What ChatEncoder needs of a tokenizer, whose class is above this file."""

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
    """Returns whether a text is the document of a chat; a source without columns has any text."""
    try:
        return bool(read(json.loads(raw)))
    except (ValueError, RecursionError):
        return False


def plain(document: str) -> str:
    """Returns the text of a document without special tokens, a message a paragraph."""
    return "\n\n".join(f"{one['role']}\n{one['content'].strip()}" for one in messages_of(document))


def answers_size(document: str) -> int:
    """Returns the UTF-8 bytes of the assistant's contents."""
    answers = (one["content"] for one in messages_of(document) if one["role"] == "assistant")
    return sum(len(answer.strip().encode("utf-8")) for answer in answers)


class ChatEncoder:
    """Encodes documents of chats, as `apply_chat_template` of TEMPLATE and the tokenizer would."""

    def __init__(self, tokenizer: HasSpecialTokens) -> None:
        """Copies the tokenizer. ValueError if it does not read its begin and end in a text."""
        # A copy, in which the text of a special token is the token.
        self.backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self.backend.encode_special_tokens = False
        self.begin_id = tokenizer.begin_id
        self.end_id = tokenizer.end_id
        self.begin_token = str(self.backend.id_to_token(self.begin_id))
        self.end_token = str(self.backend.id_to_token(self.end_id))
        added = self.backend.get_added_tokens_decoder().items()
        self.special_ids = {i for i, token in added if token.special} | {self.begin_id, self.end_id}
        ids = self.backend.encode(self.begin_token + self.end_token, add_special_tokens=False).ids
        if ids != [self.begin_id, self.end_id]:
            raise ValueError(
                f"tokenizer: got one that reads {self.begin_token}{self.end_token} as {len(ids)} "
                "other ids, expected one whose begin and end are special tokens, which chats need"
            )

    def encode(self, document: str) -> tuple[list[int], list[bool]]:
        """Returns the ids between a document's begin and its end, and which of them are targets.

        The end itself is always a target. ValueError for a chat that spells a special token, which
        would end a message in the middle.
        """
        (encoded,) = self.encode_batch([document])
        if encoded is None:
            raise ValueError(SPELLED)
        return encoded

    def encode_batch(self, documents: Sequence[str]) -> list[tuple[list[int], list[bool]] | None]:
        """Encodes each document on all cores; None stands for one that `encode` refuses."""
        chats = [messages_of(document) for document in documents]
        texts = [self._text(messages) for messages in chats]
        encodings = self.backend.encode_batch([text for text, _ in texts], add_special_tokens=False)
        return [
            self._encoded(encoding, len(messages), spans)
            for encoding, messages, (_, spans) in zip(encodings, chats, texts, strict=True)
        ]

    def _text(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text of a chat, and where its targets begin and end in it."""
        text = self.begin_token
        spans = []
        for message in messages:
            content = message["content"].strip()
            header = f"{message['role']}\n"
            if message["role"] == "assistant":
                first = len(text) + len(header)
                spans.append((first, first + len(content) + len(self.end_token)))
            text += header + content + self.end_token
        return text, spans

    def _encoded(
        self, encoding: tokenizers.Encoding, messages: int, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[bool]] | None:
        """Returns the ids between begin and end, and which are targets.

        `spans` are where the targets begin and end in the text. None where there are not exactly
        the special tokens that the `messages` have: a content then spells one.
        """
        ids = encoding.ids
        special = [i for i in ids if i in self.special_ids]
        if special != [self.begin_id, *[self.end_id] * messages]:
            return None
        # Offsets may leave white space out of a token; where it ends is where its text does.
        targets = []
        span = 0
        for _, stop in encoding.offsets:
            while span < len(spans) and stop > spans[span][1]:
                span += 1
            targets.append(span < len(spans) and spans[span][0] < stop)
        return ids[1:-1], targets[1:-1]
