"""Fills chat templates, in a process of its own: a template is a program of the model's author.

    python -P template.py FOLDER SECONDS BYTES

It reads a line of JSON for each chat, {"messages", "options", "largest", "parse_special"}, and
writes one: {"ids"}, {"size"} in bytes where the text has more than `largest`, or {"error"}. jinja
renders in a sandbox; faulthandler's timer ends the process whatever it does and whoever started it,
since one operation of Python can take hours. It imports nothing of rorqual, so that it starts soon.

A chat is rendered as one text, in which the special tokens of the template and a message that
spells `<|im_end|>` look alike. `SpecialTokens` tells them apart:

    marked    messages in which a character, the mark, stands inside each special token's text
    rendered  the template's own tokens have no mark: they get names that nobody can spell
    ids       of the text without marks, in which these names alone are special tokens

So a message cannot end its turn and begin another one, and its ids are those of the plain text,
unless the template changes a text, or makes a token of pieces of several, which nothing here sees.
A tokenizer that would read a text as a special token all the same is refused. A token that looks
like `<|im_start|>` counts as special whatever the tokenizer's file says of it: DeepSeek's does not
mark `<｜User｜>`. Other added tokens, as `</think>`, are what models and clients write in messages.
llama.cpp calls this special token injection (its issue 24382, "input marking"); transformers
discusses it in issue 29279.
"""

import faulthandler
import json
import os
import re
import secrets
import signal
import sys
from collections.abc import Iterable
from typing import Any

import tokenizers

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

# Not white space, not escaped in JSON, the same in upper and lower case; then private characters.
MARKS = ("\x7f", *map(chr, range(0xE000, 0xF900)))
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
LONGEST_ERROR = 500  # characters
MAX_STRINGS = 100_000  # of a chat: each costs some microseconds
NOT_WORD = re.compile(r"\W")
CONTROL = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


def ids_of_plain_text(backend: Any) -> set[int | None]:
    """Returns the ids of a tokenizers.Tokenizer that any text may have: unknown, and lone bytes."""
    model = json.loads(backend.to_str())["model"]
    ids = {model.get("unk_id"), backend.token_to_id(model.get("unk_token") or "")}
    if model.get("byte_fallback"):
        ids |= {backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    return ids


class SpecialTokens:
    """The special tokens of a tokenizer, as text in messages and as tokens in their template."""

    def __init__(self, backend: Any) -> None:
        """Adds to the tokenizers.Tokenizer a name for each special token."""
        self._backend = backend
        self.normalizes = backend.normalizer is not None
        added = backend.get_added_tokens_decoder()
        unmarked = [
            token.content
            for token in added.values()
            if not token.special and CONTROL.fullmatch(token.content)
        ]
        # Without this the backend would read their texts as tokens wherever it finds them.
        backend.add_special_tokens(unmarked)
        special = {
            i: token
            for i, token in added.items()
            if token.content and (token.special or token.content in unmarked)
        }
        texts = sorted((token.content for token in special.values()), key=len, reverse=True)
        self._texts = texts
        self._longest = max(map(len, texts), default=0)
        # A pattern of no alternatives would match everywhere.
        self._pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        self._starts = re.compile(f"(?={self._pattern.pattern})(.)", re.DOTALL)
        # A text without any of these has no special token, and joins to none: each piece has a
        # character other than letters and digits, if its token has one.
        self._edges = {char for text in texts for char in NOT_WORD.findall(text)}
        self._edges |= {text[0] for text in texts if not NOT_WORD.search(text)}
        # What joins a neighbour to a special token; plain words would be marked too often.
        self._prefixes = set(_pieces(texts, lambda text, size: text[:size]))
        self._suffixes = set(_pieces(texts, lambda text, size: text[-size:]))
        prefix = secrets.token_hex(16)
        self._names = {token.content: f"-{prefix}-{i}-" for i, token in special.items()}
        backend.add_tokens(
            [
                tokenizers.AddedToken(
                    self._names[token.content],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,
                )
                for token in special.values()
            ]
        )
        self._ids = {
            backend.token_to_id(self._names[token.content]): i for i, token in special.items()
        }
        self._special = set(special) - ids_of_plain_text(backend)
        self._whole_words = {token.content for token in special.values() if token.single_word}

    def marked(self, value: Any, mark: str) -> Any:
        """Returns a message, or a value in it, with the mark inside of all special tokens' texts.

        A text gets it at an end, too, where it could make a special token with what the template
        writes there, as "|im_end|" in angle brackets. The role is not marked in this way: some
        templates make a token of it.
        """
        if isinstance(value, str):
            if self._edges.isdisjoint(value):
                return value
            return self._joined(self._starts.sub(rf"\g<1>{mark}", value), mark)
        if isinstance(value, list):
            return [self.marked(one, mark) for one in value]
        if isinstance(value, dict):
            return {
                self.marked(name, mark): one
                if name == "role" and isinstance(one, str) and one in ROLES
                else self.marked(one, mark)
                for name, one in value.items()
            }
        return value

    def _joined(self, text: str, mark: str) -> str:
        """Puts the mark at the ends of a text that could be a part of a special token."""
        core = text.strip()
        sizes = range(1, min(self._longest, len(core) + 1))
        inside = (
            bool(core)
            and len(core) < self._longest
            and NOT_WORD.search(core) is not None
            and any(core in special for special in self._texts)
        )
        first = inside or any(core[:size] in self._suffixes for size in sizes)
        last = inside or any(core[-size:] in self._prefixes for size in sizes)
        if not first and not last:
            return text
        start = text.index(core)
        before, after = text[:start], text[start + len(core) :]
        return f"{before}{mark if first else ''}{core}{mark if last else ''}{after}"

    def ids(self, rendered: str, mark: str) -> list[int]:
        """Returns the ids of a text in which texts of special tokens with a mark are text."""

        def in_word(match: re.Match[str]) -> bool:
            before = rendered[max(0, match.start() - 2) : match.start()].replace(mark, "")[-1:]
            after = rendered[match.end() : match.end() + 2].replace(mark, "")[:1]
            return re.match(r"\w", before) is not None or re.match(r"\w", after) is not None

        def named(match: re.Match[str]) -> str:
            # Inside of a token of one character there is no space for a mark: it follows.
            marked = len(match[0]) == 1 and rendered.startswith(mark, match.end())
            if marked or (match[0] in self._whole_words and in_word(match)):
                return match[0]
            return self._names[match[0]]

        text = self._pattern.sub(named, rendered).replace(mark, "")
        self._backend.encode_special_tokens = True
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        finally:
            self._backend.encode_special_tokens = False
        if not self._special.isdisjoint(ids):
            raise ValueError(
                "messages: got a text that this tokenizer reads as a special token, expected "
                "another one, or parse_special"
            )
        return [self._ids.get(i, i) for i in ids]


def _pieces(texts: Iterable[str], piece: Any) -> Iterable[str]:
    """Yields the proper prefixes or suffixes of texts that hold more than letters and digits."""
    for text in texts:
        for size in range(1, len(text)):
            if NOT_WORD.search(piece(text, size)):
                yield piece(text, size)


def _strings(value: Any) -> int:
    """Returns how many strings are in a value of JSON, with the names of fields."""
    if isinstance(value, dict):
        return len(value) + sum(map(_strings, value.values()))
    return sum(map(_strings, value)) if isinstance(value, list) else int(isinstance(value, str))


class Template:
    """The chat template of a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special: SpecialTokens | None = None

    def fill(
        self,
        messages: list[Any],
        options: dict[str, Any],
        *,
        largest: int | None = None,
        parse_special: bool = False,
    ) -> dict[str, Any]:
        """Returns the ids of messages, or the size of their text where it is more than `largest`.

        With `parse_special` the text of a special token in a message is the token. ValueError for
        messages that hold every mark or more than MAX_STRINGS strings, and for a text that the
        tokenizer reads as a special token although it is text.
        """
        options = {"add_generation_prompt": True} | options
        mark = ""
        if not parse_special:
            whole = json.dumps([messages, options], ensure_ascii=False)
            mark = next((one for one in MARKS if one not in whole), "")
            if not mark:
                raise ValueError("got every private character of Unicode, expected some unused")
            count = _strings([messages, options])
            if count > MAX_STRINGS:
                raise ValueError(f"messages: got {count} strings, expected at most {MAX_STRINGS}")
            changed = self._tokens().marked([messages, options], mark)
            # Where texts are normalised, another text than the token's can become the token.
            if changed == [messages, options] and not self._tokens().normalizes:
                mark = ""
            messages, options = changed
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        size = len((text.replace(mark, "") if mark else text).encode())
        if largest is not None and size > largest:
            return {"size": size}
        if mark:
            return {"ids": self._tokens().ids(text, mark)}
        return {"ids": list(self._tokenizer(text, add_special_tokens=False)["input_ids"])}

    def _tokens(self) -> SpecialTokens:
        """Returns the special tokens of the tokenizer, read when they are first needed."""
        if self._special is None:
            self._special = SpecialTokens(self._tokenizer.backend_tokenizer)
        return self._special


def bound_memory(memory: int) -> None:
    """Limits the memory of this process to so many bytes more than it uses.

    It does nothing where the system does not say how much that is, or keeps to no limit.
    """
    if resource is None:
        return
    try:
        with open("/proc/self/statm") as pages:
            used = int(pages.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = used + memory if hard == resource.RLIM_INFINITY else min(used + memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main(folder: str, seconds: float, memory: int) -> None:
    """Answers the lines of standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from transformers import AutoTokenizer

    template: Template | None = None
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if template is None:
                    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                    template = Template(tokenizer)
                    bound_memory(memory)
                faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
                answer = template.fill(**request)
            except Exception as error:
                answer = {"error": (str(error) or type(error).__name__)[:LONGEST_ERROR]}
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
