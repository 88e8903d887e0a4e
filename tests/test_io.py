"""Tests atomic files after errors, kills and refusals of the system; locks; positions."""

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rorqual import io
from rorqual.tables import TableError


def test_a_file_is_replaced_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    io.write_json(path, {"whale": "鯨"})
    io.write_text(path, "one\r\ntwo\n")
    assert path.read_bytes() == b"one\r\ntwo\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    io.write_text(path, "before")
    with pytest.raises(FileNotFoundError), io.atomic_write(path) as beside:
        beside.write_bytes(Path(f"{path}.nowhere").read_bytes())
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_is_moved_over_another(tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.write_text("after")
    path = tmp_path / "a.txt"
    path.write_text("before")
    io.replace_file(new, path)
    assert path.read_text() == "after"
    assert not new.exists()


def test_a_new_folder_replaces_a_damaged_one_and_leaves_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def is_whole(folder: Path) -> bool:
        return (folder / "end").exists()

    path.mkdir()
    (path / "damaged").touch()
    for text in ("first", "second"):
        with io.new_folder(path, is_whole) as beside:
            (beside / "end").write_text(text)
        assert [file.name for file in path.iterdir()] == ["end"]
        assert (path / "end").read_text() == "first"
    with pytest.raises(ValueError, match="why"), io.new_folder(tmp_path / "b", is_whole):
        raise ValueError("why")
    assert [folder.name for folder in tmp_path.iterdir()] == ["a"]


def test_a_kill_leaves_the_old_file_and_the_next_writer_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    io.write_text(path, "before")
    code = (
        "import os, signal, sys; from rorqual import io\n"
        "with io.atomic_write(sys.argv[1]) as beside:\n"
        "    beside.write_text('aft'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2
    io.remove_partial(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_threads_that_write_one_file_leave_one_of_their_texts(tmp_path: Path) -> None:
    path = tmp_path / f"{'鯨' * 80}.txt"
    texts = [str(number) * 5000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            list(pool.map(lambda text: io.write_text(path, text), texts))
    assert path.read_text() in texts
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_partial_files_go_when_they_are_old_and_no_others_do(tmp_path: Path) -> None:
    io.write_text(tmp_path / "a.txt", "")
    others = [".alien.partial", ".a.txt.0123456789abcdez.partial"]
    for name in (*others, ".a.txt.0123456789abcdef.partial", ".b.txt.0123456789abcdef.partial"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".c.0123456789abcdef.partial").mkdir()
    io.remove_partial(tmp_path, age=60)
    assert len(list(tmp_path.iterdir())) == 6
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    # The next writer of the same file deletes its own, the owner of the folder any.
    io.write_text(tmp_path / "a.txt", "")
    left = [*others, ".b.txt.0123456789abcdef.partial", ".c.0123456789abcdef.partial", "a.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left)
    io.remove_partial(tmp_path, age=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(left) - {left[2]})


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "a.txt"
    with pytest.raises(FileNotFoundError) as raised:
        io.write_text(path, "")
    assert raised.value.filename == str(path)


def test_tensors_are_as_open_as_any_file_made_here(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0).view(2, 3)}
    before = os.umask(0o022)
    try:
        with io.atomic_write(tmp_path / "w.safetensors") as beside:
            save_file(tensors, beside)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == 0o644
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], tensors["w"])


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no limit on the size of a process's files"
)
def test_a_full_disk_is_an_os_error_with_its_number(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "w.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as raised, io.atomic_write(path) as beside:
            save_file({"w": torch.zeros(100_000)}, beside)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_a_lock_is_held_by_one_and_released_with_the_block(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with io.lock(path, "first"):
        with pytest.raises(io.Locked, match="taken"), io.lock(path, "taken"):
            pass
        code = (
            "from pathlib import Path\nfrom rorqual import io\n"
            f"with io.lock(Path({str(path)!r}), 'taken'): pass"
        )
        other = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True
        )
        assert other.returncode and "taken" in other.stderr
    with io.lock(path, "again", timeout=1.0):
        pass
    stored = io.acquired(path, "taken")
    stored.release()
    assert not stored.is_locked
    with pytest.raises(TableError, match="taken"), io.lock(path, "first"):
        io.acquired(path, "taken", error=TableError)


def test_a_folder_is_replaced_and_a_stop_in_between_is_undone(tmp_path: Path, monkeypatch) -> None:
    for name, text in (("step1", "old"), ("new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(text)
    flushed = []
    with monkeypatch.context() as patch:
        patch.setattr(io, "flush", flushed.append)
        io.replace_folder(tmp_path / "new", tmp_path / "step1")
    assert flushed[:2] == [tmp_path / "new" / "a", tmp_path / "new"] and flushed[-1] == tmp_path
    assert (tmp_path / "step1" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["step1"]
    # Killed after the old folder was moved away, and then after the new one was in its place.
    (tmp_path / "step1").rename(tmp_path / "step1.replaced")
    io.restore_folders(tmp_path)
    assert (tmp_path / "step1" / "a").read_text() == "new"
    (tmp_path / "step1.replaced").mkdir()
    io.restore_folders(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step1"]


def test_a_new_name_is_flushed_after_the_rename(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "new").write_text("rows")
    names = []
    monkeypatch.setattr(
        io, "flush", lambda path: names.append(sorted(p.name for p in path.iterdir()))
    )
    io.rename(tmp_path / "new", tmp_path / "table")
    assert names == [["table"]]


def test_files_keep_their_checksums() -> None:
    """XXH3's published values, which tables and journals on disks hold."""
    assert io.Checksum(b"").hexdigest() == "2d06800538d394c2"
    pieces = io.Checksum()
    for piece in (b"a", b"bc"):
        pieces.update(piece)
    assert pieces.intdigest() == io.Checksum(b"abc").intdigest() == 0x78AF5F94892F3950


@pytest.mark.parametrize("portable", [False, True])
@given(first=st.binary(min_size=1, max_size=40), offset=st.integers(0, 50), size=st.integers(0, 60))
def test_positions(
    tmp_path_factory: pytest.TempPathFactory, portable: bool, first: bytes, offset: int, size: int
):
    """Tests with and without the calls that only POSIX has."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tmp_path_factory.getbasetemp().joinpath("at").open("w+b") as file,
    ):
        for name in ("preadv", "pwrite"):
            if portable:
                patch.delattr(os, name, raising=False)
        io.write_all_at(file.fileno(), first, offset)
        expected = (bytes(offset) + first)[offset // 2 :][:size]
        into = bytearray(size)
        assert io.read_at(file.fileno(), memoryview(into), offset // 2) == len(expected)
        assert bytes(into[: len(expected)]) == expected


def test_size_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"whale" * 1000)
    expected = {"bytes": 5000, "sha256": hashlib.sha256(b"whale" * 1000).hexdigest()}
    assert io.size_and_sha256(tmp_path / "a") == expected
