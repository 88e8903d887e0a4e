"""Tests streamed.py, with a local folder as the dataset: the same sequences after any stop."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual.data import streamed, tokenizer
from rorqual.data.corpus import split
from rorqual.data.stream import Stream
from rorqual.data.streamed import StreamedText
from rorqual.data.tokenizer import Tokenizer

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer.train(["the sea is deep"] * 9, 270)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files, so that the dataset has a state of several numbers."""
    monkeypatch.setattr(streamed, "GROUP", 5)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    path = tmp_path / "texts"
    path.mkdir()
    for name, numbers in (("a", range(40)), ("b", range(40, 70))):
        # Of these numbers three texts validate.
        rows = [{"text": f"the sea is deep {2100 + i} " * (1 + i % 5)} for i in numbers]
        rows[3] = {"text": None}
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(path: Path) -> list[str]:
    rows = [
        json.loads(line)["text"]
        for name in ("a", "b")
        for line in (path / f"{name}.jsonl").read_text().splitlines()
    ]
    return [row.strip() for row in rows if row is not None]


def test_every_epoch_has_every_training_text_once(folder: Path, words: Tokenizer) -> None:
    """Windows of groups in their order are the texts one after another, again and again."""
    text = StreamedText(str(folder), words)
    trained = [one for one in documents(folder) if split(one) == "train"]
    held_out = [one for one in documents(folder) if split(one) == "validation"]
    assert [
        words.decode(text.validation.ids[a + 1 : b].tolist())
        for a, b in zip(text.validation.starts, text.validation.starts[1:], strict=False)
    ] == held_out
    assert text.validation.bytes == sum(len(one.encode()) for one in held_out)
    assert text.skipped == {"empty": 2}
    expected = [i for one in trained for i in (words.begin_id, *words.encode(one))] * 2
    length = 7
    rows = len(expected) // length // streamed.GROUP * streamed.GROUP
    reader = text.reader(length, 3)
    windows: dict[int, tuple[list[int], list[int]]] = {}
    for row in range(rows):
        ids, labels, _ = reader.read(np.array([row]))
        group, rest = divmod(row, streamed.GROUP)
        drawn = streamed.draw(3, streamed.WINDOWS, group, streamed.GROUP)
        windows[group * streamed.GROUP + int(drawn[rest])] = ids[0].tolist(), labels[0].tolist()
    flat = [i for n in range(rows) for i in windows[n][0]]
    labels = [i for n in range(rows) for i in windows[n][1]]
    assert flat == expected[: len(flat)]
    # begin and end are one token here, so that a label is always what follows
    assert labels == expected[1 : len(flat) + 1]
    assert rows * length > len(expected) // 2, "more than an epoch"


def test_one_two_and_four_ranks_read_one_order_and_take_over(
    folder: Path, words: Tokenizer
) -> None:
    text = StreamedText(str(folder), words)
    stream = Stream(text, 4, 6, 3)
    whole = [next(stream) for _ in range(12)]
    state: dict | None = None
    read: list[torch.Tensor] = []
    for world in (1, 2, 4, 1, 4, 2):
        ranks = [Stream(text, 4 // world, 6, 3, rank, world) for rank in range(world)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        batches = [[next(rank) for _ in range(2)] for rank in ranks]
        read += [torch.cat([batch[step]["labels"] for batch in batches]) for step in range(2)]
        states = [json.loads(json.dumps(rank.state_dict())) for rank in ranks]
        assert all(one == states[0] for one in states), "every rank saves the same state"
        state = states[0]
    assert all(
        torch.equal(labels, batch["labels"]) for labels, batch in zip(read, whole, strict=True)
    )
    assert len({tuple(batch["ids"].reshape(-1).tolist()) for batch in whole}) == len(whole)


def test_a_dataset_without_a_validating_text_holds_out_one(
    tmp_path: Path, folder: Path, words: Tokenizer
) -> None:
    texts = [one for one in documents(folder) if split(one) == "train"][:5]
    path = tmp_path / "few"
    path.mkdir()
    (path / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    text = StreamedText(str(path), words)
    assert text.validation.documents == 1
    reader = text.reader(8, 0)
    ids, _, _ = reader.read(np.arange(5))
    held_out = words.decode(text.validation.ids[1:].tolist())
    assert held_out in texts
    assert held_out not in words.decode(ids.reshape(-1).tolist())
    (path / "a.jsonl").write_text(json.dumps({"text": texts[0]}) + "\n")
    with pytest.raises(ValueError, match="got 1 documents, expected at least two"):
        StreamedText(str(path), words)


def test_bad_datasets_are_refused(folder: Path, words: Tokenizer) -> None:
    with pytest.raises(ValueError, match="got column 'body', expected one of text"):
        StreamedText(str(folder), words, column="body")
    with pytest.raises(ValueError, match="got a column of chats"):
        StreamedText(str(folder), words, column="messages")
    text = StreamedText(str(folder), words)
    (folder / "b.jsonl").write_text('{"text": "cut')
    with pytest.raises(ValueError, match=r"hf:.*: broke off"):
        text.reader(8, 0).read(np.arange(60))
