"""Tests that ids which a grammar allows are JSON of its schema."""

import json

import pytest
import torch

pytest.importorskip("llguidance", reason="the extra [serve] is not installed")

from rorqual.serve.grammar import LARGEST_SCHEMA, Grammars

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["🐋", "x"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_any_ids_that_are_allowed_are_json_of_the_schema(run, seed):
    matcher = Grammars(run.tokenizer).compile(SCHEMA)
    ids = []
    draw = torch.Generator().manual_seed(seed)
    for _ in range(200):
        mask = matcher.mask()
        assert mask.shape == (run.tokenizer.vocab_size,)
        choices = mask.nonzero().flatten()
        token = int(choices[torch.randint(len(choices), (1,), generator=draw)])
        if token == run.tokenizer.end_id:
            break
        ids.append(token)
        if matcher.accept(token):
            break
    value = json.loads(run.tokenizer.decode(ids))
    assert set(value) == {"a", "b"}
    assert isinstance(value["a"], int) and value["b"] in ("x", "🐋")


def test_a_copy_goes_its_own_way(run):
    matcher = Grammars(run.tokenizer).compile({"enum": ["ab", "cd"]})
    copy = matcher.copy()
    for token in run.tokenizer.encode('"a'):
        matcher.accept(token)
    assert not torch.equal(matcher.mask(), copy.mask())


def test_what_is_no_schema_or_too_large_is_refused(run):
    grammars = Grammars(run.tokenizer)
    with pytest.raises(ValueError, match="got a schema that is refused"):
        grammars.compile({"type": "whale"})
    with pytest.raises(ValueError, match="expected at most"):
        grammars.compile({"enum": ["x" * LARGEST_SCHEMA]})
    matcher = grammars.compile({"type": "object"})
    with pytest.raises(ValueError, match="grammar"):
        matcher.accept(run.tokenizer.encode("x")[0])
