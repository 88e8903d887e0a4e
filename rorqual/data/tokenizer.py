"""Encodes text to token ids, and maps ids that read alike to one canonical id.

    key(i)       = vocabulary string of i                           if its text holds U+FFFD,
                                                                    a piece of a character
                 = strip(lower(no_accents(NFD(NFKC(text of i)))))   else; a lone blank stays
                                                                    one space
                 = the text itself                                  if nothing is left
    canonical(i) = how many different keys came before key(i) first came

Engram addresses its rows with canonical ids, so that "Apple", " apple" and "APPLE" look up the same
rows: tokenizer compression, section 2.2 of Conditional Memory via Scalable Lookup,
arXiv:2601.07372.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rorqual.data.files import hub_reason
from rorqual.io import write_json, write_text

END = "<|end|>"
_ENDS = (END, "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
_BYTES = 256
_BLANK = "\ue000"  # stands for the single space while the others are stripped


def _normalizer() -> normalizers.Normalizer:
    """Returns what makes the key of a text: no accents, lower case, single spaces, stripped."""
    steps = [
        normalizers.NFKC(),
        normalizers.NFD(),
        # categories Mn, Mc and Me; Mn alone gives 99,045 keys for DeepSeek-V3, not 98,627
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), _BLANK),
        normalizers.Strip(),
        normalizers.Replace(_BLANK, " "),
    ]
    return normalizers.Sequence(steps)


def canonical_ids(backend: tokenizers.Tokenizer) -> np.ndarray:
    """Returns int32[V], from raw to canonical id.

    Takes any Hugging Face fast tokenizer (`fast.backend_tokenizer`). Canonical ids number the keys
    in order of first appearance over all raw ids, added tokens included. About two seconds for
    129,000 ids.
    """
    size = _size(backend)
    texts = backend.decode_batch([[i] for i in range(size)], skip_special_tokens=False)
    normal = _normalizer()
    numbers: dict[str, int] = {}
    canonical = np.empty(size, dtype=np.int32)
    for i, text in enumerate(texts):
        key = (backend.id_to_token(i) if "\ufffd" in text else normal.normalize_str(text)) or text
        canonical[i] = numbers.setdefault(key, len(numbers))
    return canonical


def _size(backend: tokenizers.Tokenizer) -> int:
    """Returns one more than the largest id; an unused id below it decodes to nothing."""
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


class Tokenizer:
    """A fast tokenizer with `begin_id`, `end_id` and `pad_id`, the ids that a language model needs.

    The text of a special token inside a document is text, not the token: no document ends because
    it contains that text.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any] | None = None
    ) -> None:
        """Takes the content of a tokenizer_config.json as `settings`.

        ValueError if it names tokens that do not exist.
        """
        self.backend = backend
        self.settings = dict(settings or {})
        self.vocab_size = _size(backend)
        self.end_id = self._special("eos_token", None)
        self.begin_id = self._special("bos_token", self.end_id)
        self.pad_id = self._special("pad_token", self.end_id)
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()

    def _special(self, name: str, otherwise: int | None) -> int:
        """Returns the id of a special token that the settings name.

        Without a name it is `otherwise`, or the first of _ENDS that the vocabulary has. ValueError
        where there is none, or the named token does not exist.
        """
        named = self.settings.get(name)
        text = named.get("content") if isinstance(named, Mapping) else named
        if text is None and otherwise is not None:
            return otherwise
        special_ids = [
            token_id for word in _ENDS if (token_id := self.backend.token_to_id(word)) is not None
        ]
        token_id = (
            special_ids[0] if text is None and special_ids else self.backend.token_to_id(text or "")
        )
        if token_id is None:
            what = (
                f"{name} {text!r}, which is no token of it"
                if text
                else f"no {name} and none of {', '.join(_ENDS)}"
            )
            raise ValueError(
                f"tokenizer: got {what}, expected tokenizer_config.json to name {name}"
            )
        return token_id

    @cached_property
    def longest(self) -> int | None:
        """Bytes of the longest token: a text of n * longest + 1 bytes has more than n tokens.

        None where there is no such bound: the tokenizer does not spell bytes, or drops some of a
        text.
        """
        settings = json.loads(self.backend.to_str())
        parts = [*_parts(settings["normalizer"]), *_parts(settings["pre_tokenizer"])]
        kinds = {piece["type"] for piece in parts}
        removes = any(piece.get("behavior") == "Removed" for piece in parts)
        # such a token includes all spaces beside it
        removes |= any(token["lstrip"] or token["rstrip"] for token in settings["added_tokens"])
        if (
            removes
            or "ByteLevel" not in kinds
            or not kinds <= {"ByteLevel", "Split", "Digits", "Punctuation", "NFC"}
        ):
            return None
        # A letter of the vocabulary stands for a byte; an added token is its text itself.
        spelt = max(map(len, self.backend.get_vocab(with_added_tokens=False)), default=1)
        added = max(
            (len(token["content"].encode()) for token in settings["added_tokens"]), default=1
        )
        # NFC makes three bytes of at most nine: a syllable of Hangul
        return max(spelt, added) * (3 if "NFC" in kinds else 1)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text, with no special token before or after."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        """Returns the ids of each text, on all cores.

        With `parse_special` the text of a special token is the token.
        """
        backend = self._parsing if parse_special else self.backend
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def refuse_special(self, ids: Iterable[int]) -> None:
        """Raises ValueError where a text has become a special token.

        Unigram's model reads it so where its vocabulary has the token's text, whatever
        `encode_special_tokens` says.
        """
        if not self._never_text.isdisjoint(ids):
            raise ValueError(
                "text: got one that this tokenizer reads as a special token, expected another one, "
                "or parse_special"
            )

    @cached_property
    def _never_text(self) -> set[int]:
        """The ids of special tokens but those of any text: the unknown token, and lone bytes."""
        model = json.loads(self.backend.to_str())["model"]
        usual = {model.get("unk_id"), self.backend.token_to_id(model.get("unk_token") or "")}
        if model.get("byte_fallback"):
            usual |= {self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        added = self.backend.get_added_tokens_decoder()
        return {i for i, token in added.items() if token.special} - usual

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """A copy of the backend that reads the text of a special token as the token."""
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.encode_special_tokens = False
        return copy

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids, with special tokens written out.

        A piece of a character becomes U+FFFD.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token(self, i: int) -> str:
        """Returns the text of one id, or its vocabulary string if it is a piece of a character.

        ValueError for an id that the tokenizer does not have.
        """
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"got id {i}, expected 0 to {self.vocab_size - 1}")
        text = self.decode([i])
        return (self.backend.id_to_token(i) if "\ufffd" in text else text) or text

    def templated(self) -> tokenizers.Tokenizer:
        """Copies the backend; the copy begins a text with `begin_id` if it adds special tokens."""
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        begin_token = copy.id_to_token(self.begin_id)
        copy.post_processor = processors.TemplateProcessing(
            single=[begin_token, "$A"],
            pair=[begin_token, "$A", "$B"],
            special_tokens=[(begin_token, self.begin_id)],
        )
        return copy

    def canonical_map(self) -> np.ndarray:
        """Returns int32[V]: see `canonical_ids`."""
        return canonical_ids(self.backend)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, for `transformers.AutoTokenizer` too.

        A text that it encodes there begins with `begin_id`, as every text does in training.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {"bos_token": self.begin_id, "eos_token": self.end_id, "pad_token": self.pad_id}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        settings |= self.settings | {name: self.backend.id_to_token(i) for name, i in names.items()}
        write_text(folder / "tokenizer.json", self.templated().to_str())
        write_json(folder / "tokenizer_config.json", settings)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Loads a folder, a tokenizer.json, or a Hugging Face hub id.

        A tokenizer.json may have tokenizer_config.json beside it. ValueError, naming the file, for
        one that is missing or is no tokenizer.
        """
        file = _find(path, "tokenizer.json")
        if file is None:
            raise ValueError(
                f"got {os.fspath(path)!r}, "
                "expected a folder with tokenizer.json, that file, or a hub id"
            )
        beside = file.parent if Path(path).exists() else path
        config = _find(beside, "tokenizer_config.json")
        try:
            settings = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
            if not isinstance(settings, dict):
                raise ValueError(f"{config}: got {type(settings).__name__}, expected a JSON object")
            return cls(tokenizers.Tokenizer.from_file(str(file)), settings)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def of(cls, fast: Any) -> "Tokenizer":
        """Copies a transformers fast tokenizer, which keeps its own state.

        ValueError for one that is not fast.
        """
        backend = getattr(fast, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"got {type(fast).__name__}, "
                "expected a fast tokenizer (one with a backend_tokenizer)"
            )
        names = {
            name: getattr(fast, name, None) for name in ("bos_token", "eos_token", "pad_token")
        }
        return cls(
            tokenizers.Tokenizer.from_str(backend.to_str()),
            {k: str(v) for k, v in names.items() if v},
        )


def _parts(settings: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Lists the steps of a normalizer or a pre-tokenizer, with sequences flattened in place."""
    if settings is None:
        return []
    if settings["type"] != "Sequence":
        return [settings]
    inner = settings.get("normalizers", settings.get("pretokenizers", []))
    return [step for piece in inner for step in _parts(piece)]


def _find(path: str | os.PathLike[str], name: str) -> Path | None:
    """Returns the local file, fetched from the hub if `path` is the id of a repository there."""
    here = Path(path)
    if here.exists():
        file = here / name if here.is_dir() else here
        return file if file.is_file() else None
    if os.fspath(path).count("/") > 1 or os.path.isabs(path):
        return None
    import huggingface_hub  # optional: only for a name that is no path here
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(huggingface_hub.hf_hub_download(os.fspath(path), name))
    except HFValidationError:
        return None
    except (EntryNotFoundError, OSError) as error:
        # The repository has no such file, or is out of reach and its files are not cached. The
        # optional tokenizer_config.json may be missing in either case.
        said_so = isinstance(error, EntryNotFoundError) and not isinstance(
            error, LocalEntryNotFoundError
        )
        if said_so or name == "tokenizer_config.json":
            return None
        raise ValueError(
            f"got {os.fspath(path)!r}, which is no path here: {hub_reason(error)}"
        ) from error


def train(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE with one special token, "<|end|>" = id 0.

    That token is beginning, end and padding of a document. Lossless: decode(encode(text)) == text.
    The vocabulary is smaller than requested if the documents hold too few pairs, so read
    `.vocab_size`. ValueError below 257 (256 bytes and the special token), and for no documents.
    """
    if vocab_size < _BYTES + 1:
        raise ValueError(
            f"got a vocabulary of {vocab_size}, expected at least {_BYTES + 1}: the bytes and {END}"
        )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for document in documents:
            seen += 1
            yield document

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(counted(), trainer)
    if not seen:
        raise ValueError("got no documents to train a tokenizer on, expected at least one")
    return Tokenizer(backend, {"bos_token": END, "eos_token": END, "pad_token": END})


def token_sizes(backend: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray:
    """Returns int64[vocab_size], the UTF-8 bytes of the text that each id stands for.

    Exact for tokenizers that spell bytes, and for those with a piece a byte or a word; for others
    it is the length of the id decoded by itself.
    """
    settings = json.loads(backend.to_str())
    decoder = settings["decoder"] or {}
    kinds = {piece["type"] for piece in (decoder, *decoder.get("decoders", ()))}
    added = backend.get_added_tokens_decoder()
    sizes = np.zeros(vocab_size, dtype=np.int64)
    for i in range(vocab_size):
        piece = backend.id_to_token(i)
        if piece is None:
            continue
        if i in added:
            sizes[i] = len(piece.encode("utf-8"))
        elif "ByteLevel" in kinds:
            sizes[i] = len(piece)  # a letter a byte
        elif "ByteFallback" in kinds or "Metaspace" in kinds:
            is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
            sizes[i] = 1 if is_byte else len(piece.replace("\u2581", " ").encode("utf-8"))
        else:
            sizes[i] = len(backend.decode([i], skip_special_tokens=False).encode("utf-8"))
    return sizes
