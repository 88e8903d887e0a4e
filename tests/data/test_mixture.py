"""Tests mixture.py: exact shares, sequences as functions of their numbers, bad words."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data.mixture import Pattern, read_mixture


def test_words_and_their_weights() -> None:
    shares = {"wordnet": Fraction(7, 10), "notes/": Fraction(3, 10)}
    assert read_mixture(["wordnet:0.7,notes/:0.3"]) == shares
    assert read_mixture(["wordnet:7", "notes/:3"]) == shares
    named = read_mixture(["docstrings:numpy,rich:1,hf:a/b:c:d:1.5e0,C:/texts:0.5"])
    assert named == {
        "docstrings:numpy,rich": Fraction(1, 3),
        "hf:a/b:c:d": Fraction(1, 2),
        "C:/texts": Fraction(1, 6),
    }
    assert read_mixture(["wordnet:1/3", "gcide:2/3"])["wordnet"] == Fraction(1, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["wordnet"], "got 'wordnet', expected TEXT:WEIGHT"),
        ([""], "got '', expected TEXT:WEIGHT"),
        (["wordnet:0.7,notes/"], "expected TEXT:WEIGHT"),
        (["wordnet:0"], "expected a weight above 0"),
        (["wordnet:-1"], "expected a weight above 0"),
        (["wordnet:nan"], "expected TEXT:WEIGHT"),
        (["wordnet:1/0"], "expected a weight above 0"),
        (["wordnet:1,gcide:1,wordnet:2"], "got 'wordnet' twice"),
        (
            ["wordnet:0.123456789", "gcide:1"],
            "exact in .* sequences only, .*give them fewer digits",
        ),
    ],
)
def test_bad_words_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_mixture(words)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 30), min_size=1, max_size=5), start=st.integers(0, 10**12))
def test_a_period_has_the_exact_shares_wherever_it_begins(weights: list[int], start: int) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    pattern = Pattern(shares)
    parts = [pattern(start + n) for n in range(pattern.period)]
    for text, share in enumerate(shares):
        of_text = [number for index, number in parts if index == text]
        assert len(of_text) == share * pattern.period
        assert of_text == list(range(of_text[0], of_text[0] + len(of_text))), "none is left out"


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_no_text_is_ever_a_whole_sequence_ahead_or_much_behind(weights: list[int]) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    pattern = Pattern(shares)
    made = [0] * len(shares)
    for position in range(2 * pattern.period):
        text, number = pattern(position)
        assert number == made[text]
        made[text] += 1
        lags = [share * (position + 1) - n for share, n in zip(shares, made, strict=True)]
        assert all(-1 < lag < len(shares) for lag in lags)
