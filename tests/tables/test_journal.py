"""Tests that a journal restores the rows of any mark, or refuses, after any interruption."""

import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.tables import TableError, journal
from rorqual.tables.journal import Journal

pytestmark = pytest.mark.engram

ROWS = 20
SIZE = 12


class Memory:
    """A table of bytes that records rows in the journal before it overwrites them."""

    def __init__(self, folder: pathlib.Path, keep: int = 3) -> None:
        self.folder = folder
        self.keep = keep
        self.rows = np.zeros((ROWS, SIZE), np.uint8)
        self.journal = Journal(folder, ROWS, SIZE, keep)

    def write(self, ids: np.ndarray, records: np.ndarray) -> None:
        self.rows[ids] = records

    def change(self, ids: np.ndarray, records: np.ndarray) -> None:
        self.journal.record(ids, self.rows[ids])
        self.write(ids, records)

    def rewind(self, step: int) -> None:
        self.journal.rewind(step, self.write, lambda: None)

    def killed(self) -> None:
        """Opens the journal again, as another process would."""
        self.journal = Journal(self.folder, ROWS, SIZE, self.keep)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_course_goes_back_to_any_mark_that_is_kept(
    data: st.DataObject, tmp_path_factory
) -> None:
    """Compares changes, marks, rewinds and kills in any order with copies of the whole table."""
    table = Memory(tmp_path_factory.mktemp("undo"), keep=data.draw(st.integers(1, 4)))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    table.journal.mark(0)
    cached = {0: table.rows.copy()}
    step = 0
    for what in data.draw(
        st.lists(st.sampled_from(["change", "change", "mark", "rewind", "die"]), max_size=14)
    ):
        if what == "change":
            ids = np.flatnonzero(draw.random(ROWS) < 0.4)
            table.change(ids, draw.integers(256, size=(len(ids), SIZE), dtype=np.uint8))
        elif what == "mark":
            step += int(draw.integers(1, 9))
            table.journal.mark(step)
            cached[step] = table.rows.copy()
        else:
            # A process that opens the journal after a kill rewinds before anything else.
            if what == "die":
                table.killed()
            back = table.journal.marks[int(draw.integers(len(table.journal.marks)))]
            table.rewind(back)
            assert np.array_equal(table.rows, cached[back])
            step = back
        assert len(table.journal.marks) <= table.keep
        assert table.journal.marks == sorted(set(table.journal.marks))
        notes = {int(path.name.removeprefix("undo-")) for path in table.folder.glob("undo-*")}
        assert notes <= set(table.journal.marks)


def test_a_return_that_was_stopped_is_made_again(tmp_path: pathlib.Path) -> None:
    table = Memory(tmp_path)
    ids = np.arange(ROWS)
    table.journal.mark(0)
    for step in (1, 2, 3):
        table.change(ids[: 5 * step], np.full((5 * step, SIZE), step, np.uint8))
        if step < 3:
            table.journal.mark(step)

    def stop(ids: np.ndarray, records: np.ndarray) -> None:
        table.write(ids[:2], records[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.journal.rewind(0, stop, lambda: None)
    table.killed()
    table.rewind(0)
    assert not table.rows.any()
    assert table.journal.marks == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["marks.json"]


def test_notes_of_a_process_that_ended_are_not_written_over(tmp_path: pathlib.Path) -> None:
    table = Memory(tmp_path)
    one = np.ones((1, SIZE), np.uint8)
    table.journal.mark(0)
    table.change(np.array([3]), one)
    table.killed()
    with pytest.raises(TableError, match="expected the table rewound first"):
        table.change(np.array([4]), one)
    assert not table.rows[4].any()
    table.rewind(0)
    assert not table.rows.any()
    table.change(np.array([4]), one)
    # Marking the same step again replaces the mark by the present rows.
    table.journal.mark(0)
    table.change(np.array([4]), one + 1)
    table.rewind(0)
    assert np.array_equal(table.rows[4:5], one)


def test_damaged_notes_are_refused_and_a_cut_last_one_is_not(tmp_path: pathlib.Path) -> None:
    """Flips every bit of three entries, and cuts off every byte of the last.

    The result is a refusal, or the rows from before.
    """
    table = Memory(tmp_path)
    one = np.ones((1, SIZE), np.uint8)
    table.journal.mark(0)
    for row in (3, 4, 5):
        table.change(np.array([row]), one)
    notes = tmp_path / "undo-0"
    whole = notes.read_bytes()
    size = 24 + 8 + SIZE
    assert len(whole) == 40 + 3 * size
    for index in range(40, len(whole)):
        notes.write_bytes(
            whole[:index] + bytes([whole[index] ^ 1 << index % 8]) + whole[index + 1 :]
        )
        with pytest.raises(TableError, match="undo-0: got a damaged note before byte"):
            table.rewind(0)
    for cut in range(1, size + 1):
        notes.write_bytes(whole[:-cut])
        table.rows[3:6] = 1
        table.rewind(0)
        assert not table.rows[3:5].any()
        assert (table.rows[5] == 1).all()
    (tmp_path / "marks.json").write_text('{"a": 1}')
    with pytest.raises(TableError, match=r"marks.json: got \{'a': 1\}, expected a list of steps"):
        table.killed()


def test_a_disk_that_is_full_loses_no_later_note(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an entry is written when the disk is full.

    Entries that are recorded afterwards are still found.
    """
    table = Memory(tmp_path)
    one = np.ones((1, SIZE), np.uint8)
    write = os.pwrite
    table.journal.mark(0)
    table.change(np.array([1]), one)

    def full(file: int, raw: memoryview, offset: int) -> int:
        if len(raw) < 10:
            raise OSError(28, "No space left on device")
        return write(file, raw[:9], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(
            TableError, match="got No space left on device, expected room for notes of 1 rows"
        ):
            table.change(np.array([2]), one)
    assert not table.rows[2].any()
    table.change(np.array([2]), one)
    table.change(np.array([3]), one)
    table.rewind(0)
    assert not table.rows.any()


def test_rows_without_a_mark_are_not_overwritten(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TableError, match="got no mark, expected a table that was filled"):
        Memory(tmp_path).change(np.array([3]), np.ones((1, SIZE), np.uint8))


def test_a_step_that_is_no_mark_and_another_boot_are_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Memory(tmp_path)
    table.journal.mark(4)
    with pytest.raises(TableError, match=r"got no mark of step 3, expected one of \[4\]"):
        table.rewind(3)
    boot = tmp_path / "boot"
    boot.write_text("another start")
    monkeypatch.setattr(journal, "BOOT_ID", boot)
    # Nothing was written since the mark, so nothing can be lost.
    table.rewind(4)
    table.change(np.array([3]), np.ones((1, SIZE), np.uint8))
    table.rewind(4)
    table.change(np.array([3]), np.ones((1, SIZE), np.uint8))
    boot.write_text("and another")
    with pytest.raises(
        TableError, match="undo-4: the machine has stopped since these rows were trained"
    ):
        table.rewind(4)


def test_notes_of_an_earlier_mark_that_are_cut_are_refused(tmp_path: pathlib.Path) -> None:
    """The rows of a cut entry of an earlier mark have been overwritten.

    Only behind the newest mark can a cut entry be one that was being written.
    """
    table = Memory(tmp_path)
    one = np.ones((1, SIZE), np.uint8)
    table.journal.mark(0)
    for row in (3, 4):
        table.change(np.array([row]), one)
    table.journal.mark(1)
    table.change(np.array([5]), one)
    notes = tmp_path / "undo-0"
    whole = notes.read_bytes()
    size = 24 + 8 + SIZE
    for cut in range(1, size):
        notes.write_bytes(whole[:-cut])
        with pytest.raises(
            TableError, match=f"undo-0: got a note cut behind byte {40 + size}, expected it as"
        ):
            table.rewind(0)
    notes.write_bytes(whole)
    table.rewind(0)
    assert not table.rows.any()
