"""Tests token files that `tokenise` writes: nothing is lost, and nothing is left half-written."""

import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data import tokenizer, tokens
from rorqual.data.corpus import Corpus, open_corpus, position_of, split
from rorqual.data.stream import validation_batches
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tokens import JoinedIds, Tokens, joined, open_tokens, tokenise


def flat(batches: list[dict[str, torch.Tensor]], name: str) -> list[int]:
    return torch.cat([batch[name].reshape(-1) for batch in batches]).tolist()


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
    monkeypatch.setattr(tokens, "BATCH_LETTERS", 500)
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


def documents(side: Tokens, tokenizer: Tokenizer) -> list[str]:
    return [
        tokenizer.decode(side.ids[start + 1 : end].tolist())
        for start, end in itertools.pairwise(side.starts.tolist())
    ]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 400).map(lambda i: f"text {i}"), min_size=2, unique=True).filter(
        lambda texts: len(set(map(split, texts))) == 2
    )
)
def test_every_document_stays_on_its_side(
    tmp_path_factory: pytest.TempPathFactory, small: Tokenizer, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("sides")
    result = tokenise(local(folder / "text", texts), small, folder / "tokens")
    for name, side in (("train", result.train), ("validation", result.validation)):
        expected = sorted(text for text in texts if split(text) == name)
        assert sorted(documents(side, small)) == expected


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


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_processes_writes_the_same_bytes(
    tmp_path: Path, small: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small batches, so that processes finish in another order than they begin."""
    monkeypatch.setattr(tokens, "BATCH_LETTERS", 300)
    notes = [f"text {i} " * (1 + i % 17) for i in range(200)]
    chats = [
        json.dumps({"messages": [{"role": "user", "content": note}, reply]})
        for note in notes
        for reply in [{"role": "assistant", "content": f"{note} <|end|>" * (len(note) % 2)}]
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    opened = {
        "texts": lambda: local(tmp_path / "text", notes),
        "chats": lambda: open_corpus(str(tmp_path / "chats.jsonl"), column="messages"),
    }
    for name, corpus in opened.items():
        done: dict[int, list[int]] = {1: [], 2: []}
        one, two = (
            tokenise(corpus(), small, tmp_path / f"{name}{n}", processes=n, progress=done[n].append)
            for n in (1, 2)
        )
        assert content(one.path) == content(two.path)
        assert done[1] == done[2]
        assert len(done[1]) > 4
    assert one.about["skipped"], "a chat that spells the end is counted whoever encodes it"
    with pytest.raises(ValueError, match="processes: got 0, expected at least 1"):
        tokenise(opened["texts"](), small, tmp_path, processes=0)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), data=st.data())
def test_joined_ids_are_those_of_the_arrays_one_after_another(
    lengths: list[int], data: st.DataObject
) -> None:
    arrays = [np.arange(100 * n, 100 * n + length) for n, length in enumerate(lengths)]
    whole = np.concatenate(arrays)
    ids = JoinedIds(arrays)
    assert len(ids) == len(whole)
    assert ids[2:7].tolist() == whole[2:7].tolist()
    if len(whole):
        index = (
            np.array(
                data.draw(
                    st.lists(st.lists(st.integers(0, len(whole) - 1), min_size=3, max_size=3))
                )
            )
            .reshape(-1, 3)
            .astype(np.int64)
        )
        assert ids[index].tolist() == whole[index].tolist()


def test_joined_folders_have_the_documents_of_all(tmp_path: Path, small: Tokenizer) -> None:
    folders = [
        tokenise(
            local(tmp_path / word, [f"{word} {i}" for i in range(count)]), small, tmp_path / "t"
        )
        for word, count in (("one", 60), ("two", 90))
    ]
    both = joined(folders)
    for name in ("train", "validation"):
        side: Tokens = getattr(both, name)
        sides = [getattr(folder, name) for folder in folders]
        assert side.ids[:].tolist() == [i for one in sides for i in one.ids.tolist()]
        read = [side.ids[a:b].tolist() for a, b in zip(side.starts, side.starts[1:], strict=False)]
        assert {ids[0] for ids in read} == {small.end_id}
        assert (side.documents, side.bytes, side.labels) == tuple(
            sum(getattr(one, what) for one in sides) for what in ("documents", "bytes", "labels")
        )
    assert joined(folders[:1]) is folders[0]
