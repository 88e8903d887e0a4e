"""Tests reading files of every kind and state, and the reason for all that is left out."""

import io
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data import files


def read(
    path: Path, column: str = "text", longest: int = files.LONGEST
) -> tuple[list[str], Counter[str], list[str]]:
    """Returns texts, reasons, and places of what was left out."""
    reasons: Counter[str] = Counter()
    places: list[str] = []

    def skip(reason: str, where: str) -> None:
        reasons[reason] += 1
        places.append(where)

    texts = [
        text.decode("utf-8", "replace")
        for _, text in files.listed(path).read(column, longest, skip)
    ]
    return texts, reasons, places


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_kind_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.MD").write_text("# three")
    jsonl(tmp_path / "c.jsonl", {"text": "four", "n": 1}, {"text": "five"})
    (tmp_path / "deeper").mkdir()
    parquet.write_table(
        arrow.table({"n": [1, 2], "text": ["six", "seven"]}), tmp_path / "deeper" / "d.parquet"
    )
    texts, reasons, _ = read(tmp_path)
    assert texts == ["one\n\ntwo\n", "# three", "four", "five", "six", "seven"]
    assert not reasons


def test_what_a_folder_holds_besides_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.py").write_text("code")
    (tmp_path / "Makefile").write_text("all:")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "linked").symlink_to(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round.txt").symlink_to(tmp_path / "round.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    texts, reasons, _ = read(tmp_path)
    assert texts == ["text"]
    assert reasons == {
        ".py file": 1,
        "extensionless file": 1,
        "hidden file": 1,
        "hidden or linked folder": 2,
        "empty file": 1,
        "unreadable (FileNotFoundError)": 1,
        "unreadable (OSError)": 1,
        "no regular file": 1,
    }


def test_a_file_name_need_not_be_text(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.txt"))
    odd.write_text("text")
    assert read(tmp_path)[0] == ["text"]
    assert files.listed(tmp_path).stamp()
    files.printable(odd).encode("utf-8")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: folder,
            "got an empty folder, expected .txt, .md, .jsonl, .parquet files in it",
        ),
        (lambda folder: (folder / "a.csv").write_text("x") and folder, "got 1 .csv file, expected"),
        (
            lambda folder: (folder / "a.csv").write_text("x") and folder / "a.csv",
            "got .csv, expected",
        ),
        (
            lambda folder: (folder / "README").write_text("x") and folder / "README",
            "got no extension, expected",
        ),
    ],
)
def test_nothing_to_read_is_an_error_at_once(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        files.listed(make(tmp_path))


BAD_LINES = {
    b"{": "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"text": ' + b"9" * 5000 + b"}": "not JSON",
    b"\xff\xfe{": "not UTF-8",
    b'["a"]': "no JSON object",
    b'"a"': "no JSON object",
    b'{"body": "a"}': "no column 'text'",
    b'{"text": 3}': "column 'text' is no text",
    b'{"text": {"a": "b"}}': "column 'text' is no text",
    b'{"text": null}': "empty",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_costs_itself_alone(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "first"}\r\n\n' + line + b'\n{"text": "last"}')
    texts, reasons, places = read(path)
    assert texts == ["first", "last"]
    assert reasons == {BAD_LINES[line]: 1}
    assert places[0].startswith(f"{path} line 3")


def test_a_giant_line_is_counted_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    texts, reasons, _ = read(
        jsonl(tmp_path / "a.jsonl", {"text": "first"}, {"text": "x" * 950}, {"text": "last"})
    )
    assert texts == ["first", "last"]
    assert reasons == {"giant line": 1}


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("extra", range(-2, 3))
def test_a_line_about_as_long_as_allowed_never_joins_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int, end: bytes
) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (88 + extra) + b'"}\n{"text": "last"}' + end)
    texts, reasons, _ = read(path)
    assert texts[-1] == "last"
    assert len(texts) + reasons.total() == 2


def test_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"title": ["a"], "body": ["b"]}), path)
    texts, reasons, places = read(path)
    assert (texts, reasons) == ([], {"no column 'text'": 1})
    assert places == [f"{path}: has title, body"]
    assert read(path, column="body")[0] == ["b"]


@pytest.mark.parametrize(
    ("column", "texts", "reasons"),
    [
        (arrow.array(["a", None, "b"]), ["a", "b"], {"empty": 1}),
        (arrow.array(["a", "b"]).dictionary_encode(), ["a", "b"], {}),
        (arrow.array(["a"], arrow.large_string()), ["a"], {}),
        (arrow.array([1, 2]), [], {"column 'text' is no text": 2}),
        (arrow.array([b"a"]), [], {"column 'text' is no text": 1}),
        (arrow.array([], arrow.string()), [], {}),
        (arrow.array([{"text": "a"}]), [], {"column 'text' is no text": 1}),
    ],
    ids=range(7),
)
def test_parquet_columns(
    tmp_path: Path, column: arrow.Array, texts: list[str], reasons: dict[str, int]
) -> None:
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[:2] == (texts, reasons)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_torn_parquet_is_counted(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": [f"text {i}" for i in range(999)]}), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    texts, reasons, _ = read(path)
    assert (texts, reasons) == ([], {"broken parquet": 1})


@settings(max_examples=60, deadline=None)
@given(offset=st.integers(0, 3000), byte=st.integers(0, 255))
def test_a_parquet_with_one_byte_changed_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, offset: int, byte: int
) -> None:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    parquet.write_table(arrow.table({"text": [f"text {i}" for i in range(300)]}), path)
    content = bytearray(path.read_bytes())
    content[offset % len(content)] = byte
    path.write_bytes(content)
    texts, reasons, _ = read(path)
    assert texts or reasons


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab \n\n.。é"), max_size=600), longest=st.integers(8, 100))
def test_pieces_are_short_enough_and_lose_nothing_that_has_white_space(
    text: str, longest: int
) -> None:
    left: list[str] = []
    raw = text.encode()
    pieces = [
        piece
        for _, piece in files.cut(
            io.BytesIO(raw), "x", longest, lambda reason, where: left.append(reason)
        )
    ]
    assert all(0 < len(piece) <= longest for piece in pieces)
    assert all(piece.decode() for piece in pieces), "cut inside a character"
    if left:
        assert len(b"".join(pieces)) < len(raw)
    else:
        assert b"".join(pieces) == raw


def test_a_piece_ends_at_the_best_place() -> None:
    def pieces(text: str) -> list[str]:
        return [
            piece.decode()
            for _, piece in files.cut(io.BytesIO(text.encode()), "x", 20, lambda *_: None)
        ]

    assert pieces("one two three\n\nfour\nfive six") == ["one two three\n\n", "four\nfive six"]
    assert pieces("one two three\nfour five six") == ["one two three\n", "four five six"]
    assert pieces("one two three four five six") == ["one two three four ", "five six"]
    assert pieces("一二三四。五六七八") == ["一二三四。", "五六七八"]
    assert pieces("x" * 45 + " end") == ["end"]
    assert pieces("one " + "x" * 45 + " end " + "y" * 45) == ["one ", "end "]


def test_the_stamp_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    first = files.listed(tmp_path).stamp()
    assert files.listed(tmp_path).stamp() == first
    os.utime(tmp_path / "a.txt", (0, 0))
    assert files.listed(tmp_path).stamp() == first
    (tmp_path / "a.txt").write_text("two")
    second = files.listed(tmp_path).stamp()
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    third = files.listed(tmp_path).stamp()
    assert len({first, second, third}) == 3
