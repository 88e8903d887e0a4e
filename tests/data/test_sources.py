"""Tests reading raw texts: WordNet, docstrings, gcide, and a dataset of the hub's library."""

import bz2
import gzip
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rorqual.data import sources
from rorqual.data.corpus import open_corpus

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_wordnet.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_wordnet", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wordnet() -> bytes:
    return bz2.decompress(sources.WORDNET.read_bytes())


def test_the_bundled_text_is_the_one_its_script_pins(wordnet: bytes, script: ModuleType) -> None:
    assert hashlib.sha256(wordnet).hexdigest() == script.TEXT
    assert len(wordnet) == sources.find("wordnet").bytes
    assert wordnet.count(b"\n") == 117_659
    assert sources.WORDNET.stat().st_size < 3_200_000


@pytest.mark.slow
def test_compressing_it_again_gives_the_same_file(wordnet: bytes) -> None:
    assert bz2.compress(wordnet, 9) == sources.WORDNET.read_bytes()


def test_wordnet_reads_as_english(wordnet: bytes) -> None:
    first = (
        "entity: that which is perceived or known or inferred to have its own distinct existence "
        "(living or nonliving)"
    )
    assert wordnet.decode().splitlines()[0] == first
    assert b"\ndog, domestic dog, Canis familiaris: a member of the genus Canis" in wordnet
    assert b'; "the dog barked all night"\n' in wordnet
    assert b"_" not in wordnet.replace(b"__", b"")[:100_000]


def test_the_licence_of_wordnet_lies_beside_it() -> None:
    licence = sources.WORDNET.with_name("wordnet-3.0.LICENSE").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in licence
    assert "Permission to use, copy, modify and distribute" in licence


@pytest.mark.parametrize(
    ("line", "document"),
    [
        (
            "00004258 03 n 02 living_thing 0 animate_thing 0 000 | a living  (or once living) "
            "entity ",
            "living thing, animate thing: a living (or once living) entity",
        ),
        (
            '00003131 00 a 02 first(a) 0 1st(ip) 0 000 | before all; "the first man"',
            'first, 1st: before all; "the first man"',
        ),
        ("13742840 23 n 03 T 0 thymine 0 T 1 000 | a | b", "T, thymine: a | b"),
        (
            "00001740 03 n 0a a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 000 | ten",
            "a, b, c, d, e, f, g, h, i, j: ten",
        ),
    ],
)
def test_a_synset_becomes_a_sentence(script: ModuleType, line: str, document: str) -> None:
    assert script.document(line) == document


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "",
            "got data '', expected wordnet, docstrings, gcide, hf:NAME, "
            "or a file or folder that exists",
        ),
        ("wordnett", "got data 'wordnett', expected wordnet"),
        ("no/such/file.txt", "expected wordnet"),
        ("x" * 5000, "expected wordnet"),
        ("a\0b", "expected wordnet"),
        (
            "docstrings:no-such-package",
            "got docstrings of no-such-package, expected installed packages",
        ),
        ("hf:", "expected hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT"),
        ("hf:a:b:c:d", "expected hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT"),
    ],
)
def test_a_source_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources.find(name)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes an installed package that must not be imported, with files that do not parse."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    code = [
        '"""The module."""',
        "raise SystemExit('imported')",
        "class A:",
        '    """The class."""',
        "    def f(self):",
        '        """The method."""',
        "    g = lambda: 'no docstring'",
        "if True:",
        "    async def h():",
        "        '''Inside an if, with an \\escape.'''",
    ]
    (folder / "__init__.py").write_text("\n".join(code))
    (folder / "broken.py").write_text("def f(:")
    (folder / "binary.py").write_bytes(b"\0\xff\0")
    (folder / "deep.py").write_text("(" * 9999 + ")" * 9999)
    (folder / "surrogate.py").write_text('"""\\ud800"""')
    (folder / "accents.py").write_bytes(b'# coding: latin-1\n"""\xc9t\xe9."""')
    names = ["__init__", "broken", "binary", "deep", "surrogate", "accents", "gone"]
    info = tmp_path / "hostile-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: Hostile\nVersion: 1.0\nLicense-Expression: MIT\n"
    )
    (info / "RECORD").write_text(
        "".join(f"hostile/{name}.py,,\n" for name in names) + "../../../etc/x.py,,\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_docstrings_are_parsed_and_never_imported(package: Path) -> None:
    corpus = open_corpus("docstrings:hostile")
    assert list(corpus.documents()) == [
        "hostile\n\nThe module.",
        "hostile.A\n\nThe class.",
        "hostile.A.f\n\nThe method.",
        "hostile.h\n\nInside an if, with an \\escape.",
        "hostile.accents\n\nÉté.",
    ]
    assert corpus.skipped == {
        "no Python that parses": 3,
        "not UTF-8": 1,
        "unreadable (FileNotFoundError)": 1,
    }
    assert (corpus.name, corpus.license) == (
        "docstrings of Hostile==1.0",
        "each package's own: MIT (1)",
    )
    assert corpus.bytes == sum(path.stat().st_size for path in package.iterdir())
    assert "hostile" not in sys.modules


@pytest.mark.slow
def test_docstrings_of_all_that_is_installed() -> None:
    source = sources.find("docstrings")
    assert source.bytes is not None
    assert source.bytes > 1e6
    assert "MIT" in source.license
    assert "pytest==" in source.stamp()


DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def number(value: int) -> str:
    digits = ""
    while value or not digits:
        value, digit = divmod(value, 64)
        digits = DIGITS[digit] + digits
    return digits


@pytest.fixture
def dictd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes a dictionary of three entries, one of them under two headwords."""
    entries = [
        "00-database-info\n   About.\n",
        "Calx \\Calx\\, n.; pl. {Calxes}. [L.]\n   1. Quick-\n   lime.    --Ure.\n"
        "   [1913 Webster]\n\n   2. Ash.\n"
        "      [PJC] Cam\n",
        "it\x92s\n   Bad.\n",
        "Dog \\Dog\\, n.\n   A friend.\n",
    ]
    content = b""
    index = []
    for word, entry in zip(["00-database-info", "calx", "its", "dog"], entries, strict=True):
        raw = entry.encode("latin-1")
        index.append(f"{word}\t{number(len(content))}\t{number(len(raw))}")
        content += raw
    index.append("hound\t" + index[-1].partition("\t")[2])
    (tmp_path / "gcide.index").write_text("\n".join([*index, "broken", "worse\t!\tA", ""]))
    (tmp_path / "gcide.dict.dz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(sources, "DICTD", tmp_path)
    return tmp_path


def test_gcide_gives_each_entry_once(dictd: Path) -> None:
    corpus = open_corpus("gcide")
    assert list(corpus.documents()) == [
        "Calx \\Calx\\, n.; pl. Calxes. [L.] 1. Quick- lime. --Ure.\n2. Ash.",
        "Dog \\Dog\\, n. A friend.",
    ]
    assert corpus.skipped == {"broken line of the index": 2, "not UTF-8": 1}
    assert corpus.license == "GPL-2.0-or-later"
    assert corpus.bytes == len(gzip.decompress((dictd / "gcide.dict.dz").read_bytes()))


def test_gcide_that_is_not_installed_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "DICTD", tmp_path)
    with pytest.raises(ValueError, match="apt install dict-gcide"):
        open_corpus("gcide")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip at all",
        gzip.compress(b"x" * 99, mtime=0)[:-9],
        b"\x1f\x8b\x08\0" + b"\xff" * 40,
    ],
)
def test_a_torn_gcide_is_an_error(dictd: Path, content: bytes) -> None:
    (dictd / "gcide.dict.dz").write_bytes(content)
    with pytest.raises(ValueError, match=r"gcide|got no documents"):
        list(open_corpus("gcide").documents())


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"text": f"text {i}", "body": None if i == 1 else f"body {i}"} for i in range(3)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_dataset_streams(dataset: Path) -> None:
    corpus = open_corpus(f"hf:{dataset}", duplicate_threshold=None)
    assert list(corpus.documents()) == ["text 0", "text 1", "text 2"]
    assert str(dataset) in corpus.name
    assert corpus.license
    corpus = open_corpus(f"hf:{dataset}:default:test", column="body", duplicate_threshold=None)
    assert list(corpus.documents()) == ["body 0", "body 2"]
    assert corpus.skipped == {"empty": 1}
    assert (
        corpus.fingerprint
        != open_corpus(f"hf:{dataset}", column="body", duplicate_threshold=None).fingerprint
    )


@pytest.mark.parametrize(
    ("more", "column", "message"),
    [
        ("", "title", "got column 'title', expected one of text, body"),
        ("::nope", "text", "nope"),
        (":nope", "text", "nope"),
        ("/missing", "text", "missing"),
    ],
)
def test_a_dataset_that_is_not_there(dataset: Path, more: str, column: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_corpus(f"hf:{dataset}{more}", column=column)
    assert len(str(error.value).splitlines()) == 1


def test_a_dataset_that_breaks_off_is_an_error_and_no_short_corpus(dataset: Path) -> None:
    with open(dataset / "train.jsonl", "a") as file:
        file.write("{broken\n")
    with pytest.raises(ValueError, match="hf:"):
        list(open_corpus(f"hf:{dataset}", duplicate_threshold=None).documents())


def test_without_the_library_a_dataset_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the library datasets: pip install .*\[hub\]"):
        open_corpus("hf:some/thing")
