"""Tests that any source gives clean, distinct documents, and that all else is counted."""

import json
import random
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data.corpus import (
    VALIDATION,
    Corpus,
    Trained,
    open_corpus,
    position_of,
    split,
    trained,
)

GOOD = "The rorqual swims in every ocean and sings below the ice."

HOSTILE = {
    "empty.txt": (b"", "empty file"),
    "blank.txt": (b" \n\t\r\n \xc2\xa0", "empty"),
    "bom.txt": (b"\xef\xbb\xbf", "empty"),
    "null.txt": (b"text\0text", "binary or UTF-16 (a NUL byte)"),
    "zip.txt": (
        b"PK\x03\x04\x14\0\0\0\x08\0" + bytes(range(256)) * 9,
        "binary or UTF-16 (a NUL byte)",
    ),
    "png.md": (b"\x89PNG\r\n\x1a\n" + bytes(range(1, 256)), "not UTF-8"),
    "latin.txt": ("Café crème brûlée".encode("latin-1"), "not UTF-8"),
    "utf16.txt": ("Plain text in UTF-16".encode("utf-16"), "binary or UTF-16 (a NUL byte)"),
    "utf32.md": ("Plain text in UTF-32".encode("utf-32"), "binary or UTF-16 (a NUL byte)"),
    "shift.txt": ("日本語のテキスト".encode("shift-jis"), "not UTF-8"),
    "torn.txt": (("é" * 99).encode()[:-1], "not UTF-8"),
    "overlong.txt": (b"\xc0\xaf overlong", "not UTF-8"),
    "surrogate.txt": (b"\xed\xa0\x80 half a pair", "not UTF-8"),
    "line.txt": (b"x" * 200_000, "word too long"),
    "nothing.jsonl": (b"\n\n\n", None),
    "broken.jsonl": (b"{'text': 'single quotes'}\n", "not JSON"),
    "array.jsonl": (b'[{"text": "an array of objects"}]', "no JSON object"),
    "column.jsonl": (b'{"body": "no text"}', "no column 'text'"),
    "typed.jsonl": (b'{"text": 12}', "column 'text' is no text"),
    "half.jsonl": (b'{"text": "\\ud83d half a pair"}', "not UTF-8"),
    "nul.jsonl": (b'{"text": "a\\u0000b"}', "binary or UTF-16 (a NUL byte)"),
    "void.jsonl": (b'{"text": ""}', "empty"),
    "wide.jsonl": (b'{"text": "' + b"x" * 200_000 + b'"}', "word too long"),
    "nested.jsonl": (b"[" * 99_999 + b"]" * 99_999, "not JSON"),
    "text.parquet": (b"plain text under a wrong name", "broken parquet"),
    "empty.parquet": (b"PAR1PAR1", "broken parquet"),
    "header.parquet": (b"PAR1" + b"\xff" * 40 + b"PAR1", "broken parquet"),
}


def hostile(folder: Path) -> Path:
    for name, (content, _) in HOSTILE.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_alone_is_an_error_that_says_why(tmp_path: Path, name: str) -> None:
    content, reason = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    corpus = open_corpus(str(tmp_path / name))
    with pytest.raises(ValueError) as error:
        list(corpus.documents())
    assert set(corpus.skipped) == ({reason} if reason else set())
    assert (reason or "nothing there") in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1000


def test_hostile_files_beside_a_good_one_are_counted(tmp_path: Path) -> None:
    (hostile(tmp_path) / "good.txt").write_text(GOOD)
    corpus = open_corpus(str(tmp_path))
    assert list(corpus.documents()) == [GOOD]
    assert {reason for _, reason in HOSTILE.values() if reason} == set(corpus.skipped)
    assert set(corpus.examples) == set(corpus.skipped)
    assert all(str(tmp_path) in where for where in corpus.examples.values())


def one_file(folder: Path, suffix: str, content: bytes, **options) -> tuple[Corpus, list[str]]:
    path = folder / f"a{suffix}"
    path.write_bytes(content)
    corpus = open_corpus(str(path), **options)
    documents: list[str] = []
    try:
        documents.extend(corpus.documents())
    except ValueError:
        assert not documents
    return corpus, documents


def check(documents: list[str], longest: int) -> None:
    assert len(set(documents)) == len(documents)
    for text in documents:
        assert text == text.strip() != ""
        assert "\0" not in text
        assert "\r" not in text
        assert len(text.encode("utf-8")) <= longest


@settings(max_examples=150, deadline=None)
@given(
    suffix=st.sampled_from([".txt", ".md", ".jsonl", ".parquet"]),
    content=st.one_of(
        st.binary(max_size=500),
        st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace")),
    ),
)
def test_no_bytes_crash_or_vanish(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes
) -> None:
    corpus, documents = one_file(tmp_path_factory.mktemp("any"), suffix, content, longest=64)
    check(documents, 64)
    assert documents or corpus.skipped or not content.strip(b" \t\r\n\x0b\x0c")


TEXTS = st.none() | st.booleans() | st.text(max_size=20)
ROWS = (
    TEXTS
    | st.lists(TEXTS, max_size=2)
    | st.dictionaries(st.just("text") | st.text(max_size=3), TEXTS, max_size=2)
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=8))
def test_every_line_is_a_document_or_counted(
    tmp_path_factory: pytest.TempPathFactory, rows: list
) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    corpus, documents = one_file(tmp_path_factory.mktemp("rows"), ".jsonl", lines.encode())
    check(documents, 2**16)
    assert len(documents) + corpus.skipped.total() == len(rows)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("abcdefgh \n.é字"), max_size=2000))
def test_good_text_arrives_whole(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    corpus, documents = one_file(
        tmp_path_factory.mktemp("text"),
        ".txt",
        text.encode(),
        longest=4096,
        duplicate_threshold=None,
    )
    assert "".join("".join(documents).split()) == "".join(text.split())
    assert set(corpus.skipped) <= {"empty", "empty file"}


def test_line_ends_and_a_mark_at_the_start_are_no_text(tmp_path: Path) -> None:
    _, documents = one_file(tmp_path, ".txt", "\ufeffone\r\ntwo\rthree\n".encode())
    assert documents == ["one\ntwo\nthree"]


def test_a_long_record_and_a_long_file_are_cut_at_the_same_places(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {i}. " + "word " * (i % 40) for i in range(300))
    _, whole = one_file(tmp_path, ".txt", text.encode(), longest=1000, duplicate_threshold=None)
    _, record = one_file(
        tmp_path,
        ".jsonl",
        json.dumps({"text": text}).encode(),
        longest=1000,
        duplicate_threshold=None,
    )
    check(whole, 1000)
    assert whole == record
    assert len(whole) > 20


def sentence(draw: random.Random, words: int) -> list[str]:
    return ["".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(words)]


def test_near_duplicates_go_and_others_stay(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = []
    expected = []
    for _ in range(60):
        words = sentence(draw, 60)
        first = " ".join(words)
        words[30] = "other"
        rows += [first, " ".join(words), " ".join(words[:30] + sentence(draw, 30)), first]
        expected += [rows[-4], rows[-2]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    corpus = open_corpus(str(path))
    assert list(corpus.documents()) == expected
    assert corpus.skipped == {"near-duplicate": 60, "duplicate": 60}
    exact = open_corpus(str(path), duplicate_threshold=None)
    assert len(list(exact.documents())) == 180
    assert exact.skipped == {"duplicate": 60}
    assert exact.fingerprint != corpus.fingerprint


def jaccard(a: str, b: str) -> float:
    first, second = ({text[i : i + 5] for i in range(max(1, len(text) - 4))} for text in (a, b))
    return len(first & second) / len(first | second)


def test_the_threshold_is_a_jaccard_similarity(tmp_path: Path) -> None:
    """Decisions are right wherever the true similarity is well off the threshold.

    Well off means 5 standard errors of 128 minima.
    """
    draw = random.Random(1)
    for trial in range(120):
        words = sentence(draw, 80)
        changed = [
            word if draw.random() > trial / 240 else "".join(draw.choices("xyz", k=6))
            for word in words
        ]
        pair = [" ".join(words), " ".join(changed)]
        true = jaccard(*pair)
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in pair))
        cached = len(list(open_corpus(str(path), duplicate_threshold=0.6).documents()))
        if abs(true - 0.6) > 5 * (0.6 * 0.4 / 128) ** 0.5:
            assert cached == (1 if true > 0.6 else 2), (true, pair)


def test_a_second_pass_is_the_first_again(tmp_path: Path) -> None:
    hostile(tmp_path)
    jsonl = "".join(json.dumps({"text": f"{GOOD} {i // 2}"}) + "\n" for i in range(50))
    (tmp_path / "good.jsonl").write_text(jsonl)
    corpus = open_corpus(str(tmp_path), duplicate_threshold=0.99)
    first = list(corpus.documents())
    counted = dict(corpus.skipped)
    assert list(corpus.documents()) == first
    assert corpus.skipped == counted
    assert counted["duplicate"] == 25


def test_a_pass_left_early_spoils_no_later_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("a", "b", "a", "c", "b"))
    )
    corpus = open_corpus(str(path))
    assert next(corpus.documents()) == "a"
    assert list(corpus.documents()) == ["a", "b", "c"]
    assert list(open_corpus(str(path), limit=2).documents()) == ["a", "b"]


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 0},
        {"limit": -1},
        {"longest": 10},
        {"duplicate_threshold": 0.0},
        {"duplicate_threshold": 1.5},
    ],
)
def test_numbers_out_of_range(options: dict) -> None:
    with pytest.raises(ValueError, match=r"got .* expected"):
        open_corpus("wordnet", **options)


def test_every_corpus_states_its_licence_and_size(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(GOOD)
    corpus = open_corpus("wordnet")
    assert (corpus.name, corpus.bytes) == ("WordNet 3.0", 11_494_709)
    assert "Princeton University" in corpus.license
    assert "11.5 MB" in str(corpus)
    corpus = open_corpus(str(tmp_path))
    assert (corpus.name, corpus.bytes) == (str(tmp_path), len(GOOD))
    assert "unstated" in corpus.license


def test_the_fingerprint_follows_the_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(GOOD)
    marks = {
        open_corpus(str(path), **options).fingerprint
        for options in ({}, {"limit": 3}, {"longest": 99})
    }
    path.write_text(GOOD.upper())
    assert len(marks | {open_corpus(str(path)).fingerprint}) == 4
    assert open_corpus(str(path)).fingerprint == open_corpus(str(path)).fingerprint


def test_the_split_is_by_text_alone_and_never_changes() -> None:
    assert (position_of(""), position_of("rorqual")) == (0.8666040914613156, 0.7384485302846997)
    assert [i for i in range(200) if split(str(i)) == "validation"] == [2, 44, 56, 157]
    share = sum(split(f"document {i}") == "validation" for i in range(20_000)) / 20_000
    assert abs(share - VALIDATION) < 0.005


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_every_text_has_a_place(text: str) -> None:
    assert 0 <= position_of(text) < 1


def test_wordnet_starts_with_entity() -> None:
    documents = list(open_corpus(limit=300).documents())
    assert len(documents) == 300
    assert documents[0].startswith("entity: that which is perceived or known")


@pytest.mark.slow
def test_all_of_wordnet() -> None:
    corpus = open_corpus()
    documents = list(corpus.documents())
    assert len(documents) + corpus.skipped.total() == 117_659
    assert corpus.skipped == {"near-duplicate": 75}
    assert sum(split(text) == "validation" for text in documents) == 2360


def records(folder: Path, texts: list[str], **options) -> Corpus:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return open_corpus(str(path), duplicate_threshold=None, **options)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400).map(lambda i: f"text {i}"), unique=True, min_size=1))
def test_both_sides_of_the_smallest_corpus(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    """`split` decides, unless that leaves a side empty: then the smallest place alone validates."""
    sided = list(records(tmp_path_factory.mktemp("few"), texts).sided())
    assert [text for _, text in sided] == texts
    plainly = [text for text in texts if split(text) == "validation"]
    expected = plainly if 0 < len(plainly) < len(texts) else [min(texts, key=position_of)]
    assert [text for side, text in sided if side == "validation"] == expected


def paragraphs(name: str, count: int) -> str:
    return "\n\n".join(f"{name} paragraph {i}. " + "word " * 20 for i in range(count))


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_text_that_is_cut_stays_on_one_side(tmp_path: Path, kind: str) -> None:
    texts = {f"book{i}": paragraphs(f"book{i}", 60) for i in range(30)}
    if kind == "jsonl":
        corpus = records(tmp_path, list(texts.values()), longest=1000)
    else:
        for name, text in texts.items():
            (tmp_path / f"{name}.txt").write_text(text)
        corpus = open_corpus(str(tmp_path), duplicate_threshold=None, longest=1000)
    sides: dict[str, set[str]] = {}
    sided = list(corpus.sided())
    for side, text in sided:
        sides.setdefault(text.partition(" ")[0], set()).add(side)
    assert len(sided) > 150
    assert any(split(text) != side for side, text in sided), "pieces alone would lie on both sides"
    assert {len(item) for item in sides.values()} == {1}
    assert set.union(*sides.values()) == {"train", "validation"}


def test_one_book_alone_has_both_sides(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(paragraphs("book", 60))
    sided = list(
        open_corpus(str(tmp_path / "book.txt"), duplicate_threshold=None, longest=1000).sided()
    )
    assert 1 <= sum(side == "validation" for side, _ in sided) < len(sided)


def test_a_run_tells_its_text(tmp_path: Path) -> None:
    assert trained(tmp_path) is None
    (tmp_path / "train.json").write_text(
        json.dumps({"data": {"source": "notes", "column": "body", "limit": 9}, "seq_len": 64})
    )
    assert trained(tmp_path) == Trained(source="notes", column="body", limit=9, seq_len=64)
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(ValueError, match=r"train.json: got .* expected the config of a training"):
        trained(tmp_path)
