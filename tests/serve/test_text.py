"""Tests the bytes of single ids."""

from rorqual.serve.text import special_ids, token_bytes


def test_the_bytes_of_all_ids_are_those_of_the_text(run):
    text = "A whale 🐋 é\x00\t א"
    ids = run.tokenizer.encode(text)
    assert b"".join(bytes(token_bytes(run.tokenizer, token)) for token in ids) == text.encode()
    assert all(token_bytes(run.tokenizer, token) for token in range(run.tokenizer.vocab_size))


def test_special_ids_are_those_of_no_text(run):
    assert special_ids(run.tokenizer) == {run.tokenizer.end_id}
