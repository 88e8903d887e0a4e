"""Shares of several texts in one stream: which sequence comes from which text.

    counts c_s   whole numbers that are to each other as the weights; P = sum of c_s, the period
    order        within a period the text that lags most behind its share comes next
    sequence n   of text s = order[n mod P], its number  c_s (n // P) + (s among order[: n mod P])

So P sequences on end, wherever they begin, have exactly c_s of text s, and what was read is a
function of one number: nothing is drawn and nothing is counted on the way.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import lcm

LONGEST_PERIOD = 1 << 16  # sequences
# A name may have colons and commas in it.
_ITEM = re.compile(r"(.+?):\s*([-+]?[\d./]+(?:[eE][-+]?\d+)?)\s*(?:,|$)")


def read_mixture(words: Iterable[str]) -> dict[str, Fraction]:
    """Returns the share of each text of ("wordnet:0.7", "notes/:0.3"); the shares sum to 1.

    A word may hold several, with commas between them. ValueError for a weight that is no positive
    number, a text that is named twice, and weights of too many digits.
    """
    weights: dict[str, Fraction] = {}
    for word in words:
        end = 0
        for match in _ITEM.finditer(word):
            if match.start() != end:
                break
            name = match[1].strip()
            if name in weights:
                raise ValueError(f"mixture: got {name!r} twice, expected every text once")
            weights[name] = _weight(match[2], word)
            end = match.end()
        if end != len(word) or not word:
            raise ValueError(
                f"mixture: got {word!r}, expected TEXT:WEIGHT, such as wordnet:0.7,notes/:0.3"
            )
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    period = lcm(*(share.denominator for share in shares.values()))
    if period > LONGEST_PERIOD:
        raise ValueError(
            f"mixture: got weights that are exact in {period:,} sequences only, expected at most "
            f"{LONGEST_PERIOD:,}; give them fewer digits"
        )
    return shares


def _weight(text: str, word: str) -> Fraction:
    """Reads a weight such as 0.7 or 7/10 exactly. ValueError unless it is above 0."""
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if weight <= 0:
        raise ValueError(f"mixture: got {word!r}, expected a weight above 0 behind each text")
    return weight


class Pattern:
    """The order in which sequences of several texts follow each other, from their shares."""

    def __init__(self, shares: Mapping[str, Fraction] | Sequence[Fraction]) -> None:
        exact = list(shares.values() if isinstance(shares, Mapping) else shares)
        self.period = lcm(*(share.denominator for share in exact))
        self.counts = [int(share * self.period) for share in exact]
        self.order: list[int] = []
        self.before: list[int] = []  # sequences of the same text before each one of the order
        made = [0] * len(exact)
        for number in range(self.period):
            lags = [
                count * (number + 1) - n * self.period
                for count, n in zip(self.counts, made, strict=True)
            ]
            text = lags.index(max(lags))
            self.order.append(text)
            self.before.append(made[text])
            made[text] += 1

    def __call__(self, number: int) -> tuple[int, int]:
        """Returns the text of a sequence of the stream, and its number within that text."""
        periods, rest = divmod(number, self.period)
        text = self.order[rest]
        return text, periods * self.counts[text] + self.before[rest]
