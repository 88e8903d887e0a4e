"""Reads the documents of a source: cleaned, deduplicated, and split into train and validation.

    clean       UTF-8 with "\\n" line ends, no bytes that text never holds,
                at most `longest` bytes, else cut
    alike       Jaccard(A, B) = |A and B| / |A or B| >= threshold, of the sets of 5-letter pieces;
                the first of two stays; of chats, which may share a long system message, only
                exact copies are alike
    side        validation where place(text) < 2%, place = hash of the text alone, in [0, 1);
                the pieces of a text that was cut go with the first; where that leaves a side
                empty, the smallest place alone validates

Jaccard is estimated from 128 minima of hashes (MinHash, Broder 1997), and only documents that share
a band of minima are compared, so two that are just over the threshold may both stay. Imports
`sources` and `files` beside it.
"""

import functools
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import rensa

from rorqual.data import chats, files, sources

VALIDATION = 0.02
# Letters of one piece: two words of Chinese, most of one of English.
_LETTERS = 5
_MINIMA = 128
# Counts up whenever a change of this file makes the same source give other documents.
_READING = 1

Side = Literal["train", "validation"]


def position_of(text: str) -> float:
    """Hashes a text to a number in [0, 1), the same on every machine and in every corpus."""
    return (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=6).digest(), "big") / 2**48
    )


def split(text: str) -> Side:
    """Returns the side of a whole text, which does not depend on the rest of the corpus.

    `Corpus.sided` also handles texts that were cut, and corpora too small to have both sides.
    """
    return "validation" if position_of(text) < VALIDATION else "train"


def open_corpus(
    source: str = "wordnet",
    *,
    column: str = "text",
    limit: int | None = None,
    longest: int = files.LONGEST,
    duplicate_threshold: float | None = 0.8,
) -> "Corpus":
    """Opens the corpus of a source; `sources` lists their names.

    Reads nothing yet but a folder's names or a dataset's header. column: of a jsonl file, parquet
    file or dataset. limit: how many documents at most. longest: bytes of one document.
    duplicate_threshold: drop a document whose Jaccard similarity with an earlier one reaches this;
    None drops exact copies alone, as does a column of chats. ValueError for a source that does not
    exist, and for numbers out of range.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"got limit {limit}, expected at least 1 document")
    if longest < 64:
        raise ValueError(f"got longest {longest}, expected at least 64 bytes")
    if duplicate_threshold is not None and not 0 < duplicate_threshold <= 1:
        raise ValueError(
            f"got duplicate_threshold {duplicate_threshold}, "
            "expected 0 < duplicate_threshold <= 1, or none"
        )
    return Corpus(
        sources.find(source, column=column, longest=longest),
        column,
        limit,
        longest,
        duplicate_threshold,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The text that a run was trained on, and its sequence length in tokens."""

    source: str
    column: str
    limit: int | None
    seq_len: int


def trained(folder: str | os.PathLike[str]) -> Trained | None:
    """Reads the text and sequence length of a run from FOLDER/train.json.

    Returns None if there is no such file. ValueError for a file without them.
    """
    path = Path(folder) / "train.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        data = config["data"]
        return Trained(
            source=",".join(data.get("mixture", ())) or data["source"],
            column=data["column"],
            limit=data["limit"],
            seq_len=config["seq_len"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: got {error!r}, expected the config of a training with data and length"
        ) from error


class Corpus:
    """Documents with a name, a licence and a size.

    name, license    str
    bytes            int | None, of the source as it is read; None where it is unknown
    skipped          Counter of the latest pass: by reason, the number of texts left out
    examples         reason -> the first place
    chats            whether the documents are chats, as `chats` writes them
    """

    def __init__(
        self,
        source: sources.Source,
        column: str,
        limit: int | None,
        longest: int,
        duplicate_threshold: float | None,
    ) -> None:
        self.name = source.name
        self.license = source.license
        self.bytes = source.bytes
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.chats = column == chats.COLUMN
        self._source = source
        self._column = column
        self._limit = limit
        self._longest = longest
        self._duplicate_threshold = None if self.chats else duplicate_threshold
        # The reason why a text is a copy, by the text's number; None until a whole pass is done.
        self._copies: dict[int, str] | None = None

    def __str__(self) -> str:
        return (
            f"{self.name} ({'size unknown' if self.bytes is None else f'{self.bytes / 1e6:.1f} MB'}"
            f"; {self.license})"
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which documents come out.

        Computing it reads local files whole.
        """
        settings = [
            self._column,
            self._limit,
            self._longest,
            self._duplicate_threshold,
            _READING,
            rensa.RMinHash.ALGORITHM_VERSION,
        ]
        settings_text = json.dumps([self._source.stamp(), *settings])
        return hashlib.blake2b(settings_text.encode(), digest_size=16).hexdigest()

    def documents(self) -> Iterator[str]:
        """Yields each document once, in the order of the source.

        ValueError at the end if there was none, with the reasons.
        """
        return (text for text, _ in self._positioned())

    def sided(self) -> Iterator[tuple[Side, str]]:
        """Yields (side, document) in the order of the source.

        Every training, tokenizer and evaluation uses this split.
        """
        together, bound = self._rule
        for text, position in self._positioned():
            yield (
                "validation" if (position if together else position_of(text)) < bound else "train",
                text,
            )

    @functools.cached_property
    def _rule(self) -> tuple[bool, float]:
        """Returns whether the pieces of a text stay together, and the bound of validation.

        A document whose place is below the bound validates. A corpus of one text has no other to
        validate on, so each of its pieces is assigned by itself. Reads until both sides have
        occurred; only small corpora are read far, or whole, for that.
        """
        lowest, highest = _span(position for _, position in self._positioned())
        together = lowest < highest
        if not together:
            lowest, highest = _span(position_of(text) for text, _ in self._positioned())
        return together, VALIDATION if lowest < VALIDATION <= highest else math.nextafter(lowest, 1)

    def _positioned(self) -> Iterator[tuple[str, float]]:
        """Yields (document, place of the text that it is part of)."""
        self.skipped = Counter()
        self.examples = {}
        count = 0
        copies = {} if self._copies is None else self._copies
        for text, position in islice(self._unlike(copies), self._limit):
            count += 1
            yield text, position
        self._copies = copies
        if not count:
            met = ", ".join(
                f"{count} x {why} ({self.examples[why]})"
                for why, count in self.skipped.most_common(4)
            )
            raise ValueError(
                f"{self.name}: got no documents: {met or 'nothing there'}; expected at least one"
            )

    def skip(self, reason: str, where: str) -> None:
        """Counts a text that is left out."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, where.encode("utf-8", "replace").decode("utf-8")[:400])

    def _unlike(self, copies: dict[int, str]) -> Iterator[tuple[str, float]]:
        """Yields texts that are no copies of earlier ones.

        The first pass fills `copies`; later passes use it as it is.
        """
        have_copies = self._copies is not None
        seen: set[bytes] = set()
        index = rensa.RMinHashDeduplicator(
            threshold=self._duplicate_threshold or 1.0, num_perm=_MINIMA, use_lsh=True
        )
        for number, (where, text, position) in enumerate(self._clean()):
            if not have_copies:
                mark = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
                if mark in seen:
                    copies[number] = "duplicate"
                elif (
                    self._duplicate_threshold is not None
                    and not index.add_pairs([(str(number), _pieces(text))])[0]
                ):
                    copies[number] = "near-duplicate"
                seen.add(mark)
            if number in copies:
                self.skip(copies[number], where)
            else:
                yield text, position

    def _clean(self) -> Iterator[tuple[str, str, float]]:
        """Yields (where it stands, text no longer than allowed, place of its first piece)."""
        raw = self._source.read(self.skip)
        return clean(self._only_chats(raw) if self.chats else raw, self._longest, self.skip)

    def _only_chats(self, raw: files.Raw) -> files.Raw:
        """Leaves out texts that are no chats, or longer than a document."""
        for where, text in raw:
            short = len(text) <= self._longest
            if short and chats.is_document(text):
                yield where, text
            else:
                self.skip("no chat" if short else "chat too long", where)


def clean(raw: files.Raw, longest: int, skip: files.Skip) -> Iterator[tuple[str, str, float]]:
    """Yields (where it stands, text of at most `longest` bytes, place of its first piece)."""
    position: float | None = None
    for where, whole in raw:
        pieces = (
            [(where, whole)]
            if len(whole) <= longest
            else files.cut(io.BytesIO(whole), where, longest, skip)
        )
        for _, piece in pieces:
            position = position if isinstance(piece, files.Rest) else None
            text = _decoded(piece, where, skip)
            if text is not None:
                position = position_of(text) if position is None else position
                yield where, text, position


def _decoded(piece: bytes, where: str, skip: files.Skip) -> str | None:
    """Returns the text of a piece, with "\n" line ends; None, counted by `skip`, if it is none."""
    if b"\0" in piece:
        skip("binary or UTF-16 (a NUL byte)", where)
        return None
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError as error:
        skip("not UTF-8", f"{where}: {piece[error.start : error.start + 4]!r}")
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff").strip()
    if not text:
        skip("empty", where)
    return text or None


def _span(places: Iterable[float]) -> tuple[float, float]:
    """Returns the smallest and the largest place, or stops as soon as the two lie on both sides."""
    lowest = 1.0
    highest = 0.0
    for position in places:
        lowest = min(lowest, position)
        highest = max(highest, position)
        if lowest < VALIDATION <= highest:
            break
    return lowest, highest


def _pieces(text: str) -> list[str]:
    """Returns all pieces of _LETTERS letters, a step of one letter apart; a shorter text whole."""
    return [text[i : i + _LETTERS] for i in range(max(1, len(text) - _LETTERS + 1))]
