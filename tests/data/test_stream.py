"""Tests token files and batches: nothing is lost or doubled.

Batches are the same after any stop and on any number of ranks.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data import stream, tokenizer
from rorqual.data.corpus import Corpus, open_corpus, position_of, split
from rorqual.data.stream import IGNORED, Stream, Tokens, open_tokens, tokenise, validation_batches
from rorqual.data.tokenizer import Tokenizer

END = 7


def tokens(*documents: list[int], dtype: type = np.uint16) -> Tokens:
    flat = [i for ids in documents for i in (END, *ids)]
    starts = np.cumsum([0] + [len(ids) + 1 for ids in documents])
    return Tokens(
        np.array(flat, dtype=dtype),
        starts,
        np.array([len(ids) for ids in documents]),
        END,
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
        number = int(arguments._placed(np.array([row]))[0])
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
    assert labels[:-1] == ids[1:], "a label is the next token, across rows and epochs"
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


def test_rows_of_a_batch_come_from_all_over_the_text() -> None:
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


def test_a_state_fits_another_number_of_rows_and_ranks() -> None:
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
    assert labels[: len(side)] == [*ids[1 : len(side)], END]
    assert set(document_ids[len(side) :]) <= {-1}
    assert set(ids[len(side) :]) <= {END}
    read: dict[int, list[int]] = {}
    for i, owner in zip(ids[: len(side)], document_ids[: len(side)], strict=True):
        read.setdefault(owner, []).append(i)
    assert read == {d: side.ids[side.starts[d] : side.starts[d + 1]].tolist() for d in range(count)}


def test_validation_has_one_order_and_not_that_of_the_text() -> None:
    side = some(50)
    first = flat(list(validation_batches(side, 3, 16)), "document_ids")
    assert first == flat(list(validation_batches(side, 5, 16)), "document_ids")[: len(first)]
    assert first[: len(side)] != sorted(first[: len(side)])


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return tokenizer.train(open_corpus(limit=400).documents(), 400)


def local(folder: Path, texts: list[str], **options: Any) -> Corpus:
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return open_corpus(str(folder), duplicate_threshold=None, **options)


def test_tokenise_keeps_every_document_on_its_side(tmp_path: Path, small: Tokenizer) -> None:
    corpus = open_corpus(limit=400)
    result = tokenise(corpus, small, tmp_path)
    texts = {"train": [], "validation": []}
    for text in corpus.documents():
        texts[split(text)].append(text)
    for name, side in (("train", result.train), ("validation", result.validation)):
        read = [side.ids[a:b].tolist() for a, b in zip(side.starts, side.starts[1:], strict=False)]
        assert {ids[0] for ids in read} == {small.end_id}
        assert Counter(small.decode(ids[1:]) for ids in read) == Counter(texts[name])
        assert side.bytes == sum(len(text.encode()) for text in texts[name])
        assert side.sizes.tolist() == [len(small.decode(ids[1:]).encode()) for ids in read]
        assert (side.documents, side.ids.dtype) == (len(texts[name]), np.uint16)
    assert (result.vocab_size, result.end_id) == (small.vocab_size, small.end_id)
    assert result.about["name"] == "WordNet 3.0"
    assert "Princeton" in result.about["license"]


def test_a_large_vocab_size_takes_four_bytes(
    tmp_path: Path, small: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "vocab_size", 70_000)
    monkeypatch.setattr(
        small, "encode_batch", lambda texts: [[69_999, len(text)] for text in texts]
    )
    result = tokenise(local(tmp_path / "text", ["one", "two", "three"]), small, tmp_path / "tokens")
    assert result.train.ids.dtype == np.uint32
    assert 69_999 in result.train.ids


def test_what_is_there_is_opened_and_not_made_again(
    tmp_path: Path, small: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenise(open_corpus(limit=50), small, tmp_path)
    monkeypatch.setattr(small, "encode_batch", None)
    again = tokenise(open_corpus(limit=50), small, tmp_path)
    assert again.path == first.path
    assert again.train.digest == first.train.digest == open_tokens(first.path).train.digest
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]


def test_another_corpus_or_tokenizer_gets_another_folder(tmp_path: Path, small: Tokenizer) -> None:
    other = tokenizer.train(["something else"], 260)
    paths = {
        tokenise(open_corpus(limit=limit), used, tmp_path / "tokens").path
        for limit in (40, 50)
        for used in (small, other)
    }
    texts = [[f"{word} {i}" for i in range(9)] for word in ("one", "two")]
    paths |= {
        tokenise(local(tmp_path / "text", text), small, tmp_path / "tokens").path for text in texts
    }
    assert len(paths) == 6


@pytest.mark.parametrize(
    "spoil",
    ["train.bin", "validation.bin", "train.starts.npy", "validation.sizes.npy", "meta.json"],
)
@pytest.mark.parametrize("how", ["gone", "torn", "empty"])
def test_a_damaged_folder_is_made_anew(
    tmp_path: Path, small: Tokenizer, spoil: str, how: str
) -> None:
    corpus = local(tmp_path / "text", [f"text {i}" for i in range(60)])
    first = tokenise(corpus, small, tmp_path / "tokens")
    digest = first.train.digest
    content = (first.path / spoil).read_bytes()
    (first.path / spoil).unlink()
    if how != "gone":
        (first.path / spoil).write_bytes(content[: -9 if how == "torn" else 0])
    with pytest.raises(ValueError, match="got no whole token folder"):
        open_tokens(first.path)
    again = tokenise(corpus, small, tmp_path / "tokens")
    assert (again.path, again.train.digest) == (first.path, digest)
    assert (first.path / spoil).read_bytes() == content


def test_a_stop_halfway_leaves_nothing(
    tmp_path: Path, small: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenise(open_corpus(limit=50), small, tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == []
    text: list[int] = []
    monkeypatch.setattr(stream, "_BATCH_BYTES", 500)
    result = tokenise(open_corpus(limit=50), small, tmp_path, progress=text.append)
    assert text == sorted(text)
    assert len(text) > 3
    assert text[-1] == result.train.bytes + result.validation.bytes


def test_two_at_once_agree(tmp_path: Path, small: Tokenizer) -> None:
    """If another process finishes first, its folder stays."""

    def other(done: int) -> None:
        tokenise(open_corpus(limit=50), small, tmp_path)

    result = tokenise(open_corpus(limit=50), small, tmp_path, progress=other)
    assert [path.name for path in tmp_path.iterdir()] == [result.path.name]


def test_the_nearest_document_validates_where_none_would(tmp_path: Path, small: Tokenizer) -> None:
    texts = [text for text in (f"text {i}" for i in range(30)) if split(text) == "train"]
    result = tokenise(local(tmp_path / "text", texts), small, tmp_path / "tokens")
    assert small.decode(result.validation.ids[1:].tolist()) == min(texts, key=position_of)
    assert result.train.documents == len(texts) - 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400).map(lambda i: f"text {i}"), unique=True))
def test_ordering_keeps_every_document_on_its_side(texts: list[str]) -> None:
    sided = [(split(text), text) for text in texts]
    ordered = list(stream._ordered(iter(sided)))
    assert sorted(ordered) == sorted(sided)


BEGIN = 8


def two_tokens(*documents: list[int]) -> Tokens:
    """Makes `tokens` for a tokenizer whose begin is not its end."""
    side = tokens(*documents)
    ids = side.ids.copy()
    ids[side.starts[:-1]] = BEGIN
    return Tokens(ids, side.starts, side.sizes, END, "digest")


@pytest.mark.parametrize("seq_len", [1, 3, 8])
def test_a_document_ends_with_end_whichever_begins_next(seq_len: int) -> None:
    documents = [[100, 101, 102], [200], [], [300, 301]]
    side = two_tokens(*documents)
    expected = sorted(
        (a, b) for ids in documents for a, b in zip([BEGIN, *ids], [*ids, END], strict=True)
    )
    read, labels, _ = endless(side, seq_len, 1)
    for epoch in range(2):
        chunk = slice(epoch * len(side), (epoch + 1) * len(side))
        assert sorted(zip(read[chunk], labels[chunk], strict=True)) == expected
    batches = list(validation_batches(side, 2, seq_len))
    pairs = zip(flat(batches, "ids"), flat(batches, "labels"), strict=True)
    assert sorted((a, b) for a, b in pairs if b != IGNORED) == expected


def test_documents_are_stored_with_begin(tmp_path: Path) -> None:
    trained = tokenizer.train(["the sea"] * 9, 270)
    backend = type(trained.backend).from_str(trained.backend.to_str())
    backend.add_special_tokens(["<begin>"])
    both = Tokenizer(backend, trained.settings)
    other = Tokenizer(backend, trained.settings | {"bos_token": "<begin>"})
    assert other.begin_id != other.end_id == both.begin_id
    item, plain = (
        tokenise(local(tmp_path / "text", list("abcd")), t, tmp_path / "tokens")
        for t in (other, both)
    )
    assert item.path != plain.path
    for side in (item.train, item.validation):
        assert set(side.ids[side.starts[:-1]].tolist()) == {other.begin_id}
        labels = flat(list(validation_batches(side, 1, 4)), "labels")
        assert labels.count(other.end_id) == side.documents
        assert other.begin_id not in labels


def test_too_small_a_corpus_is_an_error(tmp_path: Path, small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="got one document, expected at least two"):
        tokenise(local(tmp_path / "text", ["alone"]), small, tmp_path / "tokens")
    with pytest.raises(ValueError, match="got no documents"):
        tokenise(local(tmp_path / "text", [""]), small, tmp_path / "tokens")
    assert os.listdir(tmp_path / "tokens") == []


def test_no_file_is_ever_executed(tmp_path: Path, small: Tokenizer) -> None:
    """A pickle in place of an array is refused."""
    result = tokenise(open_corpus(limit=50), small, tmp_path)
    np.save(result.path / "train.starts.npy", np.array([Path], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="got no whole token folder"):
        open_tokens(result.path)
