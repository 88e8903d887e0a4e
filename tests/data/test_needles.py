"""Tests that each question can be answered from its text, and that seed and number fix a batch."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data.needles import (
    DEPTHS,
    IGNORED,
    QUESTION,
    TASKS,
    NeedleConfig,
    NeedleStream,
    chance,
    column,
    exams,
    grade,
    held_out,
    write,
)

pytestmark = pytest.mark.nsa

SMALL = NeedleConfig(
    keys=9,
    values=11,
    filler=3,
    needles=5,
    asked=3,
    drill=9,
    shortest=32,
    alone=1,
    grow=2,
    questions=6,
)


def pairs(text: list[int], config: NeedleConfig) -> list[tuple[int, int]]:
    """Reads key and value of every pair in a text."""
    first_key = 1 + config.filler
    first_value = 1 + config.filler + config.keys
    return [
        (a, b) for a, b in zip(text, text[1:], strict=False) if first_key <= a < first_value <= b
    ]


@st.composite
def asks(draw):
    keys = draw(st.integers(2, 12))
    values = draw(st.integers(2, 12))
    needles = draw(st.integers(1, min(keys, values)))
    asked = draw(st.integers(1, needles))
    drill = draw(st.integers(0, 9))
    config = NeedleConfig(
        keys=keys,
        values=values,
        filler=draw(st.integers(1, 5)),
        needles=needles,
        asked=asked,
        drill=drill,
    )
    return (
        config,
        draw(st.integers(0, 40)) + config.least_tokens,
        draw(st.integers(1, 7)),
        draw(st.integers(0, 2**31)),
    )


@settings(deadline=None)
@given(asks(), st.sampled_from(TASKS), st.booleans())
def test_every_question_is_answered_by_its_text(question_needles, task, drilled):
    config, length, rows, seed = question_needles
    drill = config.drill if drilled else 0
    made = write(task, rows, length, config, np.random.default_rng(seed), drill)
    assert made.ids.shape == made.answers.shape == made.places.shape == (rows, length + 1)
    assert made.ids.min() >= 0 and made.ids.max() < config.vocab_size
    for row, answers, places in zip(
        made.ids.tolist(), made.answers.tolist(), made.places.tolist(), strict=True
    ):
        text = row[: made.text]
        question = row[made.text :]
        assert question[0] == QUESTION and QUESTION not in text + question[1:]
        hidden = pairs(text, config)
        assert len(hidden) == (1 if task == "single" else config.needles)
        assert len({value for _, value in hidden}) == len(hidden), "no two pairs share a value"
        assert not any(answers[: made.text + 2]), "no answer before the first key"
        message = [row[i] for i in range(length + 1) if answers[i]]
        key = question[1]
        if task == "multi-value":
            assert (
                message == question[2:] == [value for k, value in hidden if k == key]
                and len(message) == config.asked
            )
            assert len({k for k, _ in hidden}) == config.needles - config.asked + 1
        else:
            assert message == question[2::2] == [dict(hidden)[k] for k in question[1::2]]
            assert len({k for k, _ in hidden}) == len(hidden)
            times = [question[1::2].count(k) for k, _ in hidden]
            assert sum(times) == {"multi-query": drill or config.asked}.get(task, 1)
            assert max(times) == 1 or (task == "multi-query" and drill > 1)
        for i in range(length + 1):
            assert answers[i] == (places[i] >= 0)
            assert not answers[i] or row[places[i] + 1] == row[i] < config.vocab_size


def test_needles_stand_everywhere_alike():
    config = NeedleConfig(needles=4, asked=2)
    made = write("multi-key", 8000, 41, config, np.random.default_rng(0))
    count = np.bincount(made.places[made.answers], minlength=made.text)
    assert made.text == 39 and count[-1] == 0, "a pair takes two ids"
    inner = count[1:37] / 8000 * 38
    assert inner.min() > 0.6 and inner.max() < 1.5


def test_a_batch_labels_answers_alone_and_tells_where_their_needles_stand():
    for task in TASKS:
        batch = next(held_out(SMALL, task, 40, batch_size=6))
        assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(batch, (6, 40))
        asked = batch["labels"] != IGNORED
        assert asked.sum(1).tolist() == [3 if task in ("multi-value", "multi-query") else 1] * 6
        assert (batch["labels"][asked] >= 1 + SMALL.filler + SMALL.keys).all()
        inner = asked[:, :-1]
        assert torch.equal(batch["labels"][:, :-1][inner], batch["ids"][:, 1:][inner])
        assert (batch["depths"][~asked] == -1).all() and not batch["document_ids"].any()
        assert ((batch["depths"][asked] >= 0) & (batch["depths"][asked] < DEPTHS)).all()
        assert (batch["tasks"] == TASKS.index(task)).all()


def test_texts_grow_while_batches_keep_their_size():
    stream = NeedleStream(SMALL, 4, 128)
    shapes = [tuple(next(stream)["ids"].shape) for _ in range(8)]
    assert shapes == [(16, 32)] * 3 + [(8, 64)] * 2 + [(4, 128)] * 3
    stream = NeedleStream(SMALL, 3, 100)
    assert [tuple(next(stream)["ids"].shape) for _ in range(6)] == [(9, 32)] * 3 + [(4, 64)] * 2 + [
        (3, 100)
    ]


def test_sequences_are_shared_among_the_tasks():
    stream = NeedleStream(SMALL, 8, 32)
    assert (next(stream)["tasks"] == TASKS.index("multi-query")).all(), (
        "the first is multi-query alone"
    )
    assert all(
        torch.bincount(next(stream)["tasks"][:, 0]).tolist() == [2, 2, 2, 2] for _ in range(3)
    )
    stream = NeedleStream(SMALL, 1, 32)
    seen = [next(stream)["tasks"][0, 0].item() for _ in range(5)][1:]
    assert sorted(seen) == [0, 1, 2, 3], "one sequence a batch: the tasks take turns"


def test_a_stream_goes_on_where_it_stood_and_no_two_are_alike():
    one = NeedleStream(SMALL, 4, 64, seed=3)
    other = NeedleStream(SMALL, 4, 64, seed=3)
    batches = [next(one) for _ in range(5)]
    other.load_state_dict({"number": 3})
    assert other.state_dict() == {"number": 3}
    again = next(other)
    assert all(torch.equal(again[name], batches[3][name]) for name in again)
    texts = [batch["ids"][:, :30].tolist() for batch in batches]
    texts += [next(NeedleStream(SMALL, 4, 64, seed=4))["ids"][:, :30].tolist()]
    assert len({str(row) for rows in texts for row in rows}) == sum(map(len, texts))
    ranks = [
        next(NeedleStream(SMALL, 4, 64, seed=3, rank=rank, world=2))["ids"].tolist()
        for rank in (0, 1)
    ]
    assert not [row for row in ranks[0] if row in ranks[1]]


def test_held_out_questions_are_the_same_for_all_and_never_trained_on():
    once, again = (
        [b["ids"] for b in held_out(SMALL, "multi-key", 40, batch_size=4)] for _ in range(2)
    )
    assert [len(ids) for ids in once] == [4, 2] and all(map(torch.equal, once, again))
    for rows, world in ((2, 2), (4, 2), (6, 4), (1, 4)):
        shares = [
            list(held_out(SMALL, "multi-key", 40, rows, rank, world)) for rank in range(world)
        ]
        assert len({len(share) for share in shares}) == 1, "ranks answer together"
        asked = [
            row
            for share in shares
            for b in share
            for row in b["ids"][(b["labels"] != IGNORED).any(1)].tolist()
        ]
        assert sorted(asked) == sorted(torch.cat(once).tolist())
        assert all(
            (b["depths"] >= 0).equal(b["labels"] != IGNORED) for share in shares for b in share
        )
    stored = {str(row) for b in held_out(SMALL, "multi-key", 64) for row in b["ids"].tolist()}
    batches = islice(NeedleStream(SMALL, 4, 64), 40)
    trained = {str(row) for b in batches for row in b["ids"].tolist()}
    assert len(stored) == 6 and not stored & trained


def test_exams_are_of_all_tasks_at_lengths_that_have_room():
    assert set(exams(SMALL, 4, 128)) == {(task, n) for task in TASKS for n in (64, 128, 256)}
    assert {n for _, n in exams(SMALL, 4, 32)} == {32, 64}


def test_grades_count_by_the_part_of_the_text():
    labels = torch.tensor([[IGNORED, 5, 6, IGNORED], [IGNORED, IGNORED, 7, 8]])
    depths = torch.tensor([[-1, 0, 3, -1], [-1, -1, 3, 1]])
    predicted = torch.tensor([[9, 5, 9, 5], [9, 9, 7, 9]])
    result = grade(predicted, {"labels": labels, "depths": depths})
    assert result.tolist() == [[1, 1], [0, 1], [0, 0], [1, 2]]
    assert grade(labels, {"labels": labels, "depths": depths}).tolist() == [
        [1, 1],
        [1, 1],
        [0, 0],
        [2, 2],
    ]


def test_any_value_of_the_text_scores_what_chance_says():
    """Compares `chance` with a reader that finds values and no keys, on the generator's texts."""
    config = NeedleConfig(questions=400)
    generator = torch.Generator().manual_seed(0)
    for task, expected in chance(config).items():
        right = asked = 0
        for batch in held_out(config, task, 64, batch_size=400):
            texts = (row[: row.index(QUESTION)] for row in batch["ids"].tolist())
            hidden = torch.tensor([[value for _, value in pairs(text, config)] for text in texts])
            picked = torch.randint(0, hidden.shape[1], (len(hidden), 64), generator=generator)
            counts = grade(hidden.gather(1, picked), batch).sum(0)
            right = right + int(counts[0])
            asked = asked + int(counts[1])
        assert abs(right / asked - expected) < 0.05


def test_names_of_accuracies():
    assert (
        column("single", 128) == "accuracy_single_128"
        and column("single", 128, 2) == "accuracy_single_128_part_2"
    )


def test_texts_without_room_are_refused():
    generator = np.random.default_rng(0)
    write("multi-key", 1, 12, SMALL, generator)
    with pytest.raises(
        ValueError, match=r"seq_len: got 11, expected at least 12 for 5 needles: multi-key"
    ):
        write("multi-key", 1, 11, SMALL, generator)
    with pytest.raises(ValueError, match=r"task: got 'double', expected one of single"):
        write("double", 1, 20, SMALL, generator)
    with pytest.raises(ValueError, match=r"needles\.shortest: got 27, expected at least 28"):
        NeedleStream(SMALL, 1, 27)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        NeedleStream(SMALL, 0, 64)
