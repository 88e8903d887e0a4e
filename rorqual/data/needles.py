"""Generates needle-in-a-haystack batches: questions about pairs hidden in a text of token ids.

    id            0: the question mark; then `filler` ids that mean nothing,
                  `keys` keys and `values` values
    text          filler, with pairs  key value  at random places
    single        one pair in the text                        ? key value
    multi-key     `needles` pairs                             ? key value
    multi-value   `needles` pairs, `asked` of them of one     ? key value value ..
                  key                                         in the order of the text
    multi-query   `needles` pairs                             ? key value key value ..

The question ends the sequence; its values are the only labels. Keys, values, places and filler are
drawn anew for every sequence, no two pairs of a sequence share a value. The four tasks of RULER
(arXiv 2404.06654) in the smallest language that has them. The same seed gives the same batches.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rorqual.data.needle_config import NeedleConfig

TASKS = ("single", "multi-key", "multi-value", "multi-query")
DEPTHS = 4  # equal parts of a text in which a needle may stand
IGNORED = -100  # the label of ids that are no answers
QUESTION = 0  # the id that ends a text
_TRAINED, _HELD_OUT = 0, 1  # the two purposes of a draw


class Sequences(NamedTuple):
    """Texts with their questions, one id longer than a batch, since labels are shifted by one."""

    ids: Int[np.ndarray, "B L"]
    answers: Bool[np.ndarray, "B L"]  # where an id is a value that was asked for
    # at each answer: where in the text its pair begins; -1 elsewhere
    places: Int[np.ndarray, "B L"]
    text: int  # ids before the question mark


def write(
    task: str,
    batch_size: int,
    seq_len: int,
    config: NeedleConfig,
    generator: np.random.Generator,
    drill=0,
) -> Sequences:
    """Draws sequences of `seq_len` + 1 ids for one task.

    `drill`: keys that a multi-query asks for, drawn with repetition; 0: `asked` keys once.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(TASKS)}")
    many = 1 if task == "single" else config.needles
    asked = _asked(task, batch_size, config, generator, drill)  # numbers of needles
    words = asked.shape[1] + 1 if task == "multi-value" else 2 * asked.shape[1]
    text = seq_len - words
    if text < 2 * many:
        raise ValueError(
            f"seq_len: got {seq_len}, "
            f"expected at least {2 * many + words} for {many} needles: {task}"
        )
    keys = _distinct(batch_size, config.keys, many, generator)
    if task == "multi-value":
        keys[:, : config.asked] = keys[:, :1]
    values = _distinct(batch_size, config.values, many, generator)
    places = _places(batch_size, many, text, generator)
    if task == "multi-value":
        places[:, : config.asked].sort(axis=1)
    first = 1 + config.filler
    keys = keys + first
    values = values + first + config.keys
    ids = generator.integers(1, first, (batch_size, seq_len + 1))
    np.put_along_axis(ids, places, keys, 1)
    np.put_along_axis(ids, places + 1, values, 1)
    ids[:, text] = QUESTION
    columns = np.arange(
        text + 2, seq_len + 1, 1 if task == "multi-value" else 2
    )  # positions of the answers
    ids[:, text + 1] = keys[:, 0]
    ids[:, columns - 1] = (
        np.take_along_axis(keys, asked, 1) if task != "multi-value" else ids[:, columns - 1]
    )
    ids[:, columns] = np.take_along_axis(values, asked, 1)
    whence = np.full_like(ids, -1)
    whence[:, columns] = np.take_along_axis(places, asked, 1)
    return Sequences(ids, whence >= 0, whence, text)


def _asked(
    task: str, batch_size: int, config: NeedleConfig, generator: np.random.Generator, drill: int
) -> np.ndarray:
    """Returns which needles each sequence asks for, in order.

    Needles are numbered at random, so the first are as good as any.
    """
    if task == "multi-query" and drill:
        # Without repetition the last answers would follow from the others.
        return generator.integers(0, config.needles, (batch_size, drill))
    many = {"multi-value": config.asked, "multi-query": config.asked}.get(task, 1)
    return np.tile(np.arange(many), (batch_size, 1))


def _distinct(batch_size: int, of: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Returns int64 [batch_size, count]: `count` different numbers below `of`, in random order."""
    return np.argsort(generator.random((batch_size, of)), axis=1)[:, :count]


def _places(batch_size: int, many: int, text: int, generator: np.random.Generator) -> np.ndarray:
    """Returns int64 [batch_size, many]: where pairs begin in a text of `text` ids.

    No two pairs overlap, and their order is random.
    """
    before = np.sort(
        generator.integers(0, text - 2 * many + 1, (batch_size, many)), axis=1
    ) + 2 * np.arange(many)
    return np.take_along_axis(before, _distinct(batch_size, many, many, generator), 1)


def _batch(written: Sequences, task: int) -> dict[str, Tensor]:
    """Returns ids, labels (shifted), document_ids, depths and tasks, int64 [B, L] each."""
    labels = np.where(written.answers, written.ids, IGNORED)[:, 1:]
    depths = np.where(written.answers, written.places * DEPTHS // written.text, -1)[:, 1:]
    arrays = {
        "ids": written.ids[:, :-1],
        "labels": labels,
        "document_ids": np.zeros_like(labels),
        "depths": depths,
    }
    arrays["tasks"] = np.full_like(labels, task)
    return {
        name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
        for name, array in arrays.items()
    }


def _generator(seed: int, number: int, side: int) -> np.random.Generator:
    """Returns the generator of draw `number`; those of training and of held-out texts differ."""
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, 2 * number + side], dtype=np.uint64))
    )


class NeedleStream:
    """Yields endless training batches of one rank, with the interface of `Stream`.

    Batch n depends on the seed, n, the rank and the number of ranks alone. The first `alone`
    batches are multi-query, with sequences of `shortest` tokens. From then on all tasks have
    equally many sequences, but for what does not divide, and after every `grow` batches the
    sequence length doubles, up to `seq_len`. A batch has as many sequences as fit into batch_size *
    seq_len tokens.
    """

    def __init__(
        self,
        config: NeedleConfig,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        shortest = min(config.shortest, seq_len)
        if shortest < config.least_tokens:
            raise ValueError(
                f"needles.shortest: got {shortest}, "
                f"expected at least {config.least_tokens} for the needles"
            )
        self.config = config
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.rank = rank
        self.world = world
        self.number = 0

    def __iter__(self) -> "NeedleStream":
        return self

    def __next__(self) -> dict[str, Tensor]:
        generator = _generator(self.seed, self.number * self.world + self.rank, _TRAINED)
        grown = max(0, self.number - self.config.alone) // self.config.grow
        seq_len = min(self.seq_len, min(self.config.shortest, self.seq_len) << min(grown, 40))
        batch_size = self.batch_size * self.seq_len // seq_len
        parts = []
        for task, share in self._shares(batch_size).items():
            written = write(task, share, seq_len, self.config, generator, self.config.drill)
            parts.append(_batch(written, TASKS.index(task)))
        self.number += 1
        return {name: torch.cat([piece[name] for piece in parts]) for name in parts[0]}

    def _shares(self, batch_size: int) -> dict[str, int]:
        """Returns the number of sequences of each task in this batch."""
        if self.number < self.config.alone:
            return {"multi-query": batch_size}
        shares = (
            (batch_size + (self.number + offset) % len(TASKS)) // len(TASKS)
            for offset in range(len(TASKS))
        )
        return {task: share for task, share in zip(TASKS, shares, strict=True) if share}

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the stream as JSON values."""
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the batch that `state_dict` named."""
        self.number = int(state["number"])


def held_out(
    config: NeedleConfig,
    task: str,
    seq_len: int,
    batch_size: int = 16,
    rank: int = 0,
    world: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """Yields a rank's share of the `questions` sequences of one task and length.

    They do not depend on the training or its seed. Beside ids, labels and documents: `depths`, the
    part of the text in which the needle of each label stands, -1 where there is no label, and
    `tasks`, the place in TASKS. Every rank gets equally many batches, since ranks evaluate
    together: a surplus one has no label.
    """
    number = TASKS.index(task)
    whole = write(task, config.questions, seq_len, config, _generator(seq_len, number, _HELD_OUT))
    batches = -(-config.questions // batch_size)
    for start in range(rank, -(-batches // world) * world, world):
        selection = (
            slice(start * batch_size, (start + 1) * batch_size) if start < batches else slice(1)
        )
        answers = whole.answers[selection] & (start < batches)
        yield _batch(
            Sequences(whole.ids[selection], answers, whole.places[selection], whole.text), number
        )


def chance(config: NeedleConfig) -> dict[str, float]:
    """Returns the accuracy of answering with any value of the text.

    It is 1 over the number of values in the text, and 1 for `single`.
    """
    return {task: 1.0 if task == "single" else 1 / config.needles for task in TASKS}


def exams(
    config: NeedleConfig, batch_size: int, seq_len: int, rank: int = 0, world: int = 1
) -> dict[tuple[str, int], Iterator[dict[str, Tensor]]]:
    """Returns held-out batches of every task at every one of `exam_lengths`."""
    share = max(1, batch_size // world)
    lengths = exam_lengths(config, seq_len)
    return {
        (task, n): held_out(config, task, n, share, rank, world) for n in lengths for task in TASKS
    }


def exam_lengths(config: NeedleConfig, seq_len: int) -> tuple[int, ...]:
    """Returns half the trained length, if the needles fit into it, the whole, and twice that.

    Twice the trained length never occurs in training.
    """
    return (
        (seq_len // 2, seq_len, 2 * seq_len)
        if seq_len // 2 >= config.least_tokens
        else (seq_len, 2 * seq_len)
    )


def grade(predicted: Int[Tensor, "B T"], batch: Mapping[str, Tensor]) -> Int[Tensor, "parts 2"]:
    """Counts right answers and all answers for each part of the text.

    An answer belongs to the part of the text in which its needle stands.
    """
    asked = batch["labels"] != IGNORED
    right = (predicted == batch["labels"])[asked].long()
    counts = torch.stack([right, torch.ones_like(right)], 1)
    return counts.new_zeros(DEPTHS, 2).index_add_(0, batch["depths"][asked], counts)


def column(task: str, seq_len: int, side: int | None = None) -> str:
    """Returns the name of an accuracy in the metrics of a run.

    `side` is a part of the text, counted from 0; None for all of it.
    """
    name = f"accuracy_{task}_{seq_len}"
    return name if side is None else f"{name}_part_{side}"
