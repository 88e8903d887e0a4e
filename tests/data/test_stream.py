"""Tests batches: nothing is lost or doubled, after any stop and on any number of ranks."""

import json
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data.stream import IGNORED, Mixture, Stream, validation_batches
from rorqual.data.tokens import Tokens

END_ID = 7


def tokens(*documents: list[int], dtype: type = np.uint16) -> Tokens:
    flat = [i for ids in documents for i in (END_ID, *ids)]
    starts = np.cumsum([0] + [len(ids) + 1 for ids in documents])
    return Tokens(
        np.array(flat, dtype=dtype),
        starts,
        np.array([len(ids) for ids in documents]),
        END_ID,
        "digest",
    )


def some(count: int, seed: int = 0) -> Tokens:
    """Makes documents of 0 to 12 ids.

    Document d has ids of 100 d + 100 and on, so each id identifies its position.
    """
    draw = np.random.default_rng(seed)
    return tokens(
        *[list(range(100 * d + 100, 100 * d + 100 + draw.integers(0, 13))) for d in range(count)]
    )


def flat(batches: list[dict[str, torch.Tensor]], name: str) -> list[int]:
    return torch.cat([batch[name].reshape(-1) for batch in batches]).tolist()


def take(arguments: Stream, count: int) -> list[dict[str, torch.Tensor]]:
    return [next(arguments) for _ in range(count)]


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x
    )


def windows(
    side: Tokens, seq_len: int, count: int, seed: int = 3
) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """Returns (ids, labels, documents) by number of the window, in the stream's own order."""
    arguments = Stream(side, 1, seq_len, seed)
    results = {}
    for row in range(count):
        number = int(arguments.reader.placed(np.array([row]))[0])
        batch = next(arguments)
        results[number] = tuple(
            batch[name][0].tolist() for name in ("ids", "labels", "document_ids")
        )
    return results


def endless(
    side: Tokens, seq_len: int, epochs: int, seed: int = 3
) -> tuple[list[int], list[int], list[int]]:
    """Returns (ids, labels, documents) of a bit more than `epochs` epochs, in the text's order."""
    count = -(-len(side) * (epochs + 1) // seq_len)
    group = -(-len(side) // seq_len)
    result = windows(side, seq_len, -(-count // group) * group, seed)
    assert sorted(result) == list(range(len(result)))
    return tuple(
        [i for number in sorted(result) for i in result[number][piece]] for piece in range(3)
    )


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 12), seq_len=st.integers(1, 40), seed=st.integers(0, 2**63 - 1))
def test_every_epoch_reads_and_foretells_every_token_once(
    count: int, seq_len: int, seed: int
) -> None:
    side = some(count, seed % 1000)
    ids, labels, document_ids = endless(side, seq_len, 2, seed)
    assert labels[:-1] == ids[1:], "a label is the next token, across sequences and epochs"
    for epoch in range(2):
        chunk = slice(epoch * len(side), (epoch + 1) * len(side))
        assert sorted(ids[chunk]) == sorted(side.ids.tolist())
        assert sorted(labels[chunk]) == sorted(side.ids.tolist())
        assert document_ids[chunk] == sorted(document_ids[chunk])
        assert set(document_ids[chunk]) == set(range(epoch * count, (epoch + 1) * count))
        whole = {
            d: [i for i, owner in zip(ids[chunk], document_ids[chunk], strict=True) if owner == d]
            for d in document_ids[chunk]
        }
        lengths = [
            side.ids[a:b].tolist() for a, b in zip(side.starts, side.starts[1:], strict=False)
        ]
        assert sorted(whole.values()) == sorted(lengths), "documents stay whole and in one piece"


def test_the_order_changes_with_epoch_and_seed() -> None:
    side = some(60)
    ids, _, _ = endless(side, 16, 2)
    first = ids[: len(side)]
    second = ids[len(side) : 2 * len(side)]
    other = endless(side, 16, 2, seed=4)[0][: len(side)]
    assert len({tuple(first), tuple(second), tuple(other), tuple(side.ids.tolist())}) == 4


def test_sequences_of_a_batch_come_from_all_over_the_text() -> None:
    """A long document does not fill a batch by itself."""
    side = tokens(*[list(range(d, d + 1000)) for d in range(10)])
    batch = next(Stream(side, 32, 16, seed=1))
    assert len(set(batch["document_ids"].reshape(-1).tolist())) > 5


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    world=st.integers(1, 4),
    seq_len=st.integers(1, 30),
    steps=st.integers(1, 6),
)
def test_ranks_share_what_one_would_read(
    count: int, batch_size: int, world: int, seq_len: int, steps: int
) -> None:
    side = some(count)
    alone = take(Stream(side, batch_size * world, seq_len, 5), steps)
    ranks = [
        take(Stream(side, batch_size, seq_len, 5, rank, world), steps) for rank in range(world)
    ]
    for step in range(steps):
        for name in ("ids", "labels", "document_ids"):
            together = torch.cat([batches[step][name] for batches in ranks])
            assert torch.equal(together, alone[step][name])


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    seq_len=st.integers(1, 30),
    offset=st.integers(0, 25),
)
def test_resume_goes_on_with_the_very_next_batch(
    count: int, batch_size: int, seq_len: int, offset: int
) -> None:
    side = some(count)
    whole = take(Stream(side, batch_size, seq_len, 9), offset + 10)
    stopped = Stream(side, batch_size, seq_len, 9)
    take(stopped, offset)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = Stream(side, batch_size, seq_len, 9)
    take(resumed, 3)
    resumed.load_state_dict(state)
    assert same(take(resumed, 10), whole[offset:])
    assert resumed.state_dict() == Stream.state_dict(resumed)


def test_a_state_fits_another_batch_size_and_number_of_ranks() -> None:
    side = some(40)
    alone = Stream(side, 6, 8, 1)
    take(alone, 4)
    others = [Stream(side, 1, 8, 1, rank, 3) for rank in range(3)]
    for other in others:
        other.load_state_dict(alone.state_dict())
    following = next(alone)["ids"]
    assert torch.equal(torch.cat([next(other)["ids"] for other in others]), following[:3])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Stream(some(9), 2, 8, 2), "got a state with seed 1, expected 2"),
        (lambda: Stream(some(9), 2, 9, 1), "got a state with seq_len 8, expected 9"),
        (
            lambda: Stream(
                Tokens(*[getattr(some(9), n) for n in ("ids", "starts", "sizes", "end_id")], "x"),
                2,
                8,
                1,
            ),
            "tokens",
        ),
    ],
)
def test_a_state_of_another_stream_is_refused(other: Callable[[], Stream], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        other().load_state_dict(Stream(some(9), 2, 8, 1).state_dict())


def test_a_stream_is_deterministic_and_pinned() -> None:
    side = some(9)
    assert same(take(Stream(side, 2, 8, 1), 9), take(Stream(side, 2, 8, 1), 9))
    batch = next(Stream(side, 1, 8, 1))
    assert batch["ids"].tolist() == [[7, 400, 401, 402, 7, 7, 300, 301]]


def test_batches_are_int64_tensors_of_one_shape() -> None:
    for dtype in (np.uint16, np.uint32):
        arguments = Stream(
            tokens([1, 2, 3], [4], [], [70_000 if dtype is np.uint32 else 5], dtype=dtype), 3, 5
        )
        for batch in take(arguments, 4):
            assert {(value.dtype, value.shape) for value in batch.values()} == {
                (torch.int64, (3, 5))
            }


def test_total_batches_cover_an_epoch() -> None:
    assert Stream(tokens(list(range(99))), 4, 10).total_batches == 3
    assert Stream(tokens(list(range(100))), 4, 10).total_batches == 3
    assert Stream(tokens(list(range(100))), 2, 10, 0, 1, 2).total_batches == 3
    assert Stream(tokens([]), 4, 10).total_batches == 1


@pytest.mark.parametrize(
    "arguments",
    [(0, 8), (2, 0), (2, 8, -1), (2, 8, 2**63), (2, 8, 0, 2, 2), (2, 8, 0, -1, 2), (2, 8, 0, 0, 0)],
)
def test_numbers_out_of_range(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"got .* expected"):
        Stream(some(3), *arguments)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    world=st.integers(1, 3),
    seq_len=st.integers(1, 30),
)
def test_validation_foretells_every_token_once(
    count: int, batch_size: int, world: int, seq_len: int
) -> None:
    side = some(count)
    ranks = [
        list(validation_batches(side, batch_size, seq_len, rank, world)) for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert all(
        value.shape == (batch_size, seq_len) for batch in batches for value in batch.values()
    )
    ids, labels, document_ids = (flat(batches, name) for name in ("ids", "labels", "document_ids"))
    real = [i for i, label in enumerate(labels) if label != IGNORED]
    assert real == list(range(len(side))), "padding comes last"
    assert sorted(labels[: len(side)]) == sorted(side.ids.tolist())
    assert labels[: len(side)] == [*ids[1 : len(side)], END_ID]
    assert set(document_ids[len(side) :]) <= {-1}
    assert set(ids[len(side) :]) <= {END_ID}
    read: dict[int, list[int]] = {}
    for i, owner in zip(ids[: len(side)], document_ids[: len(side)], strict=True):
        read.setdefault(owner, []).append(i)
    assert read == {d: side.ids[side.starts[d] : side.starts[d + 1]].tolist() for d in range(count)}


def test_validation_has_one_order_and_not_that_of_the_text() -> None:
    side = some(50)
    first = flat(list(validation_batches(side, 3, 16)), "document_ids")
    assert first == flat(list(validation_batches(side, 5, 16)), "document_ids")[: len(first)]
    assert first[: len(side)] != sorted(first[: len(side)])


BEGIN_ID = 8


def two_tokens(*documents: list[int]) -> Tokens:
    """Makes `tokens` for a tokenizer whose begin is not its end."""
    side = tokens(*documents)
    ids = side.ids.copy()
    ids[side.starts[:-1]] = BEGIN_ID
    return Tokens(ids, side.starts, side.sizes, END_ID, "digest")


@pytest.mark.parametrize("seq_len", [1, 3, 8])
def test_a_document_ends_with_end_whichever_begins_next(seq_len: int) -> None:
    documents = [[100, 101, 102], [200], [], [300, 301]]
    side = two_tokens(*documents)
    expected = sorted(
        (a, b) for ids in documents for a, b in zip([BEGIN_ID, *ids], [*ids, END_ID], strict=True)
    )
    read, labels, _ = endless(side, seq_len, 1)
    for epoch in range(2):
        chunk = slice(epoch * len(side), (epoch + 1) * len(side))
        assert sorted(zip(read[chunk], labels[chunk], strict=True)) == expected
    batches = list(validation_batches(side, 2, seq_len))
    pairs = zip(flat(batches, "ids"), flat(batches, "labels"), strict=True)
    assert sorted((a, b) for a, b in pairs if b != IGNORED) == expected


def mixed() -> Mixture:
    texts = (some(9), some(5, seed=1), some(14, seed=2))
    return Mixture(texts, (Fraction(1, 2), Fraction(1, 5), Fraction(3, 10)))


@pytest.mark.parametrize("text", [lambda: some(12), mixed])
def test_one_two_and_four_ranks_read_one_order_and_take_over_from_each_other(
    text: Callable[[], Tokens | Mixture],
) -> None:
    """The global batch is one, whatever the ranks, and whoever read before."""
    whole = take(Stream(text(), 4, 6, 3), 12)
    state: dict | None = None
    read: list[torch.Tensor] = []
    for world in (1, 2, 4, 1, 4, 2):
        ranks = [Stream(text(), 4 // world, 6, 3, rank, world) for rank in range(world)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        batches = [take(rank, 2) for rank in ranks]
        read += [torch.cat([batch[step]["labels"] for batch in batches]) for step in range(2)]
        states = [json.loads(json.dumps(rank.state_dict())) for rank in ranks]
        assert all(one == states[0] for one in states), "every rank saves the same state"
        state = states[0]
    assert all(
        torch.equal(labels, batch["labels"]) for labels, batch in zip(read, whole, strict=True)
    )


def test_a_mixture_has_exact_shares_of_each_text_in_its_own_order() -> None:
    mixture = mixed()
    stream = Stream(mixture, 10, 6, 3)
    alone = [Stream(text, 1, 6, 3 + n) for n, text in enumerate(mixture.texts)]
    for batch in take(stream, 3):
        texts = (batch["document_ids"] % 3).tolist()
        assert all(len(set(row)) == 1 for row in texts), "a sequence is of one text"
        assert [sum(row[0] == n for row in texts) for n in range(3)] == [5, 2, 3]
        for row, ids in zip(texts, batch["ids"], strict=True):
            assert torch.equal(ids, next(alone[row[0]])["ids"][0])


def test_a_state_of_another_mixture_is_refused() -> None:
    state = Stream(mixed(), 2, 8).state_dict()
    other = Mixture(mixed().texts, (Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)))
    with pytest.raises(ValueError, match="got a state with tokens"):
        Stream(other, 2, 8).load_state_dict(state)
