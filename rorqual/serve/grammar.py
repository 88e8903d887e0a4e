"""Compiles JSON schemas to grammars over the ids of a tokenizer.

A grammar says at each step which ids may follow, so that the text is JSON of that schema. The work
is llguidance's (https://github.com/guidance-ai/llguidance).
"""

import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from rorqual.data.tokenizer import Tokenizer

LARGEST_SCHEMA = 2**16  # characters


class JsonMatcher:
    """Follows one text through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def mask(self) -> Bool[Tensor, " V"]:
        """Returns which ids may follow. ValueError where the grammar fails."""
        bits = self._matcher.compute_bitmask()
        self._check()
        unpacked = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        return torch.from_numpy(unpacked[: self._vocab_size].astype(np.bool_))

    def accept(self, token: int) -> bool:
        """Takes the id that was drawn, and returns whether the text is complete.

        ValueError where the grammar does not allow the id.
        """
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def copy(self) -> "JsonMatcher":
        """Returns a matcher of another text, at the same point of the grammar."""
        return JsonMatcher(self._matcher.deep_copy(), self._vocab_size)

    def _check(self) -> None:
        """Raises a ValueError if the grammar failed, with at most 300 characters of why."""
        if self._matcher.is_error():
            raise ValueError(f"grammar: {str(self._matcher.get_error())[:300]}")


class Grammars:
    """Compiles grammars for one tokenizer, which is read when the first one is compiled."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, schema: Mapping[str, Any]) -> JsonMatcher:
        """Compiles a JSON schema. ValueError for one that is not valid or is not supported."""
        text = json.dumps(schema)
        if len(text) > LARGEST_SCHEMA:
            raise ValueError(
                f"got a schema of {len(text)} characters, expected at most {LARGEST_SCHEMA}"
            )
        size = self._tokenizer.vocab_size
        with self._lock:
            if self._tokens is None:
                self._tokens = LLTokenizer(
                    self._tokenizer.backend.to_str(),
                    n_vocab=size,
                    eos_token=self._tokenizer.end_id,
                )
        # Free white space would let a model go on with it for ever.
        grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        matcher = LLMatcher(self._tokens, grammar)
        if matcher.is_error():
            raise ValueError(f"got a schema that is refused: {str(matcher.get_error())[:300]}")
        return JsonMatcher(matcher, size)
