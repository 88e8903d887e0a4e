"""Counts the n-grams of a text, to say beforehand from how many rows on a memory saturates.

    python benchmarks/ngrams.py                              WordNet, four vocabularies
    python benchmarks/ngrams.py --vocabularies 512 --tokens 1331200 --width 16

A row learns from the positions that look it up. An n-gram that occurs only once or twice in the
training text hardly trains its row, so that more rows than n-grams that recur separate nothing
that matters: from there on they gain little. The argument counts, for n-grams of canonical ids,

    recurring     n-grams that occur at least `--least` times in the first `--tokens` tokens of
                  training
    covered       share of held-out positions whose n-gram is one of these
    saturation    rows of all orders, one a recurring n-gram and hash head (four heads rarely all
                  collide at that load), times the numbers of a row: `--width` is of all heads

A curve of loss over the share of a budget that goes to memory can be a U only if the budget of the
inactive experts is larger than the saturation: below it every row still separates n-grams.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rorqual.data.tokenizer import Tokenizer, train
from rorqual.evaluate import texts

ORDERS = (2, 3)


class Counted(NamedTuple):
    """The n-grams of one order."""

    distinct: int
    recurring: int
    covered: float  # share of held-out positions


def ngrams(documents: list[list[int]], order: int) -> Iterator[tuple[int, ...]]:
    """Yields the n-grams of each document; none crosses its ends."""
    for ids in documents:
        yield from zip(*(ids[first:] for first in range(order)), strict=False)


def count(training: list[list[int]], held_out: list[list[int]], order: int, least: int) -> Counted:
    """Counts the n-grams of an order, and the held-out positions of those that recur."""
    counts = Counter(ngrams(training, order))
    asked = [counts[one] >= least for one in ngrams(held_out, order)]
    return Counted(len(counts), sum(n >= least for n in counts.values()), float(np.mean(asked)))


def encoded(tokenizer: Tokenizer, split: str, tokens: int | None) -> list[list[int]]:
    """Returns the canonical ids of documents, as many whole ones as have so many tokens."""
    canonical = tokenizer.canonical_map()
    documents = []
    total = 0
    for ids in tokenizer.encode_batch(list(texts("wordnet", split=split))):
        if tokens is not None and total + len(ids) > tokens:
            break
        total += len(ids)
        documents.append(canonical[ids].tolist())
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[300, 512, 1024, 4096])
    parser.add_argument("--tokens", type=int, help="of training; default: the whole text")
    parser.add_argument("--least", type=int, default=4, help="occurrences that train a row")
    parser.add_argument("--width", type=int, default=64, help="numbers of an n-gram's rows")
    options = parser.parse_args()
    print(
        f"| vocabulary | tokens | order | distinct | at least {options.least} times | covered "
        f"| saturation, parameters |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in options.vocabularies:
        tokenizer = train(texts("wordnet", split="train"), size)
        training = encoded(tokenizer, "train", options.tokens)
        held_out = encoded(tokenizer, "validation", None)
        tokens = sum(map(len, training))
        each = [count(training, held_out, order, options.least) for order in ORDERS]
        rows = sum(one.recurring for one in each)
        for order, one in zip(ORDERS, each, strict=True):
            saturation = f"{rows * options.width:,}" if order == ORDERS[-1] else ""
            print(
                f"| {size:,} | {tokens:,} | {order} | {one.distinct:,} | {one.recurring:,} "
                f"| {one.covered:.3f} | {saturation} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
