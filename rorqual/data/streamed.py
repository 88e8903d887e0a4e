"""Reads a Hugging Face dataset while a model trains on it: nothing is written before.

    document d   begin t1 .. tn, in the order of the dataset, without those that validate; the
                 dataset is read again from its beginning when it ends
    window w     the ids at w * length .. (w + 1) * length of that endless text
    sequence n   window G k + draw(seed, k)[n mod G],  k = n // G: windows are shuffled within
                 groups of G
    state of k   where group k begins: the dataset's own state before a record, and how many ids of
                 that record came before

A group is read whole, so any sequence can be given out in any order, and what a rank reads does not
depend on the number of ranks: each of them encodes the whole stream, and takes its sequences. That
is right for one machine. For many, tokenise first (`tokens`), which costs each token once.
Documents are cleaned and split as in `corpus`, but copies are not left out: there is no index of
all that came before. Imports `corpus`, `sources`, `tokenizer` and `tokens` beside it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from rorqual.data import chats, files, sources
from rorqual.data.corpus import VALIDATION, clean
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tokens import WINDOWS, Tokens, draw

TOGETHER = 64  # records that are encoded together
GROUP = 1024  # windows that are shuffled together
HELD_OUT = 200  # documents that validate, the first of the stream


class Record(NamedTuple):
    """A record of the dataset, as ids."""

    ids: np.ndarray  # of its documents, each after `begin`
    document_ids: np.ndarray  # their numbers within the record


class Position(NamedTuple):
    """A position in the endless text, as JSON values."""

    epoch: int
    source: Any  # the dataset's state before the record; None at its beginning
    skipped: int  # ids of the record that came before
    documents: int  # documents that began before the record


class StreamedText:
    """A dataset that is encoded as it is read.

    name, license, validation, skipped: as a TokenFolder has them.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, *, column: str = "text") -> None:
        """Takes a dataset's NAME[:CONFIG[:SPLIT]], and reads its first documents that validate.

        ValueError for a dataset that does not exist or has no such text.
        """
        if column == chats.COLUMN:
            raise ValueError(
                f"data.streaming: got a column of chats ({column}), expected texts; chats are "
                "tokenised before the training"
            )
        self._dataset = sources.hub_dataset(name, column)
        builder = self._dataset.builder
        self.name = f"hf:{name}"
        self.license = builder.info.license or f"see the card of {name.partition(':')[0]}"
        self.tokenizer = tokenizer
        self.skipped: Counter[str] = Counter()
        self._column = column
        self._bound = VALIDATION
        self.validation = self._held_out()
        described = [self.name, column, str(builder.hash), tokenizer.backend.to_str()]
        described += [str(tokenizer.begin_id), str(tokenizer.end_id), str(self._bound)]
        self.digest = hashlib.blake2b("\n".join(described).encode(), digest_size=16).hexdigest()

    def reader(self, seq_len: int, seed: int) -> "StreamedReader":
        """Returns a reader that begins with the first group of windows."""
        return StreamedReader(self, seq_len, seed)

    def _held_out(self) -> Tokens:
        """Returns the first documents of the stream that validate.

        A short dataset without any holds out the document with the smallest place.
        """
        texts: list[str] = []
        lowest = 1.0
        lowest_text = ""
        count = 0
        for text, position in self._texts(iter(self._dataset.rows()), self.skipped):
            count += 1
            if position < VALIDATION:
                texts.append(text)
                if len(texts) == HELD_OUT:
                    break
            elif position < lowest:
                lowest = position
                lowest_text = text
        if count < 2:
            raise ValueError(f"{self.name}: got {count} documents, expected at least two")
        if not texts:
            self._bound = float(np.nextafter(lowest, 1))
            texts = [lowest_text]
        begin_id = self.tokenizer.begin_id
        encoded = [[begin_id, *ids] for ids in self.tokenizer.encode_batch(texts)]
        flat = np.array([i for ids in encoded for i in ids], dtype=np.int64)
        starts = np.cumsum([0, *map(len, encoded)])
        sizes = np.array([len(text.encode("utf-8")) for text in texts])
        digest = hashlib.blake2b(flat.tobytes(), digest_size=16).hexdigest()
        return Tokens(flat, starts, sizes, self.tokenizer.end_id, digest)

    def _texts(self, rows: Iterator[Any], skipped: Counter[str]) -> Iterator[tuple[str, float]]:
        """Yields (document, place) of records."""

        def skip(reason: str, where: str) -> None:
            skipped[reason] += 1

        number = 0
        try:
            for number, row in enumerate(rows, 1):
                cells = files.cell(row, self._column, f"row {number}", skip)
                for _, text, position in clean(cells, files.LONGEST, skip):
                    yield text, position
        except Exception as error:  # whatever a hub, a network or a dataset's files may raise
            raise ValueError(
                f"{self.name}: broke off after row {number}: {files.first_line(error)}"
            ) from error

    def records(self, start: Position) -> Iterator[tuple[Position, Record]]:
        """Yields records from a place on without end, each with the place before it."""
        epoch = start.epoch
        source = start.source
        documents = start.documents
        while True:
            before = documents
            is_whole = source is None
            rows = self._rows_from(source)
            while several := list(islice(rows, TOGETHER)):
                for state, record in self._encoded(several):
                    yield Position(epoch, state, 0, documents), record
                    documents += int(record.document_ids[-1]) + 1
            if is_whole and documents == before:
                raise ValueError(f"{self.name}: got no documents to train on")
            epoch += 1
            source = None

    def _rows_from(self, source: Any) -> Iterator[tuple[Any, Any]]:
        """Yields (the dataset's state before a record, the record), to the dataset's end."""
        rows = self._dataset.rows()
        if source is not None:
            rows.load_state_dict(source)
        try:
            for row in rows:
                yield source, row
                source = json.loads(json.dumps(rows.state_dict()))
        except Exception as error:
            raise ValueError(f"{self.name}: broke off: {files.first_line(error)}") from error

    def _encoded(self, rows: list[tuple[Any, Any]]) -> Iterator[tuple[Any, Record]]:
        """Yields (state, record) of the rows that have a text to train on."""
        texts = [
            [
                text
                for text, position in self._texts(iter([row]), Counter())
                if position >= self._bound
            ]
            for _, row in rows
        ]
        begin_id = self.tokenizer.begin_id
        encoded = iter(self.tokenizer.encode_batch([text for several in texts for text in several]))
        for (state, _), several in zip(rows, texts, strict=True):
            if several:
                documents = [[begin_id, *ids] for ids in islice(encoded, len(several))]
                ids = np.array([i for one in documents for i in one], dtype=np.int64)
                numbers = np.repeat(np.arange(len(documents)), [len(one) for one in documents])
                yield state, Record(ids, numbers)


class StreamedReader:
    """Reads a StreamedText; numbers rise from call to call, but for those of a group."""

    def __init__(self, text: StreamedText, seq_len: int, seed: int) -> None:
        self.text = text
        self.digest = text.digest
        self.windows = GROUP
        self.seq_len = seq_len
        self.seed = seed
        # Where groups begin, as far as they are read, the oldest first.
        self._places: dict[int, Position] = {0: Position(0, None, 0, 0)}
        self._groups: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns ids, labels and document ids, int64 [B, seq_len] each."""
        arrays = np.empty((3, len(numbers), self.seq_len), dtype=np.int64)
        groups = numbers // self.windows
        for group in np.unique(groups):
            flat_ids, flat_documents = self._group(int(group))
            mine = np.flatnonzero(groups == group)
            drawn = draw(self.seed, WINDOWS, int(group), self.windows)
            starts = drawn[numbers[mine] % self.windows] * self.seq_len
            positions = starts[:, None] + np.arange(self.seq_len + 1)
            ids = flat_ids[positions]
            document_ids = flat_documents[positions]
            goes_on = document_ids[:, 1:] == document_ids[:, :-1]
            arrays[0, mine] = ids[:, :-1]
            arrays[1, mine] = np.where(goes_on, ids[:, 1:], self.text.tokenizer.end_id)
            arrays[2, mine] = document_ids[:, :-1]
        ids, labels, document_ids = arrays
        return ids, labels, document_ids

    def state(self, number: int) -> list[Any]:
        """Returns where the group of a sequence begins."""
        group = number // self.windows
        while group not in self._places:
            self._group(max(self._places))
        return list(self._places[group])

    def restore(self, number: int, state: list[Any]) -> None:
        """Forgets all groups, and goes on where that of the sequence begins."""
        self._places = {number // self.windows: Position(*state)}
        self._groups = {}

    def _group(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and document ids of a group, int64 [GROUP * seq_len + 1], and reads it first.

        Two groups are cached, since the sequences of a batch may be in two.
        """
        while group not in self._groups:
            following = max(self._places) if group not in self._places else group
            self._groups[following] = self._read_group(following)
            for name in sorted(self._groups)[:-2]:
                del self._groups[name]
            for name in sorted(self._places)[:-3]:
                del self._places[name]
        return self._groups[group]

    def _read_group(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads a group, and notes where the next one begins."""
        wanted = self.windows * self.seq_len
        first = self._places[group]
        skipped = first.skipped
        ids: list[np.ndarray] = []
        document_ids: list[np.ndarray] = []
        count = 0
        for before, record in self.text.records(first):
            ids.append(record.ids[skipped:])
            document_ids.append(record.document_ids[skipped:] + before.documents)
            if count <= wanted < count + len(ids[-1]):
                # The window's last label is the id that the next group begins with.
                self._places[group + 1] = before._replace(skipped=skipped + wanted - count)
                break
            count += len(ids[-1])
            skipped = 0
        return (
            np.concatenate(ids)[: wanted + 1],
            np.concatenate(document_ids)[: wanted + 1],
        )
