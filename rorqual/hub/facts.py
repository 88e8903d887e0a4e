"""Finds the subjects of facts in token ids by exact longest match, and adds their rows.

    row(t)   = the row of the longest subject whose token ids are the last ones up to t; 0 if none
    hidden_t <- hidden_t + scale table[row(t)]         before every block with a table; row 0 is 0

A text that names no subject keeps its hidden states, bit for bit, and no two subjects share a row:
to teach, change or remove one fact touches no other. Nothing is hashed to an address: a hash only
finds the candidate, whose ids are then compared. Exact longest match instead of hashed n-grams is
the idea of Memory Grafting, arXiv:2605.20948; facts of a user as rows that leave all else as it
was, of User as Engram, arXiv:2606.19172.
"""

import dataclasses
import hashlib
import itertools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from rorqual.data.tokenizer import Tokenizer
from rorqual.io import atomic_write, replace_file
from rorqual.layers.cache import Appended
from rorqual.layers.context import Context
from rorqual.tensor_file import read_tensors

FORMAT = "rorqual-facts-1"
FILE = "memory.safetensors"  # the memory, in its folder
PREVIOUS = "previous.safetensors"  # the memory before the last change, which undo restores
UNDONE = "undone.safetensors"  # the memory that an undo replaces, until that is done
NO_TOKEN = -1  # before the beginning of a text, and padding
# What may stand around a subject; the tokens of the subject differ between them.
_AROUND = ("{}", " {}", "a {},", "a {}.", "({})", "\n{}\n", '"{}"', "{}'s", "= {};")
# Letters of scripts that write words in upper and lower case, and digits.
_OF_WORDS = ("Lu", "Ll", "Lt", "Nd")


@dataclass(frozen=True, kw_only=True, slots=True)
class FactConfig:
    """What a host needs to know about a memory of facts."""

    layers: tuple[int, ...]  # blocks before which a row is added, ascending
    ngram: int  # tokens of the longest subject, and the one before it
    missing_id: int = NO_TOKEN
    halo: int = 0  # there is no convolution

    def __post_init__(self) -> None:
        layers = list(self.layers)
        if not layers or layers != sorted(set(layers)) or layers[0] < 0:
            raise ValueError(f"layers: got {layers}, expected indices of blocks, ascending")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A subject with its row: the facts that the row holds, and the token ids it is found by."""

    subject: str
    aliases: tuple[str, ...] = ()  # other names of the same subject
    facts: tuple[Mapping[str, Any], ...] = ()  # JSON objects, as rorqual.train.teach reads them
    spellings: tuple[tuple[int, ...], ...]  # see `spellings`


def spellings(
    tokenizer: Tokenizer, names: Sequence[str], wordings: Sequence[str] = ()
) -> tuple[tuple[int, ...], ...]:
    """Returns the token ids by which names are found: those they have in different surroundings.

    A tokenizer writes " LAX" and "(LAX" with other tokens. `wordings` are further surroundings, in
    which {} stands for the name. Case counts; a name that is also written in another case is to be
    given both ways.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for name in names:
        for around in dict.fromkeys((*_AROUND, *wordings)):
            pieces = around.split("{}")
            encoding = tokenizer.backend.encode(name.join(pieces), add_special_tokens=False)
            tokens = list(zip(encoding.ids, encoding.offsets, strict=True))
            start = 0
            for piece in pieces[:-1]:
                start += len(piece)
                end = start + len(name)
                inside = [
                    (token, last) for token, (first, last) in tokens if last > start and first < end
                ]
                # A token that goes on behind the name is read when the name is over.
                if inside and inside[-1][1] <= end:
                    sequences[tuple(token for token, _ in inside)] = None
                start = end
    if not sequences:
        raise ValueError(f"subject: got {names[0]!r}, expected a name that tokens end with")
    return tuple(sequences)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Returns a digest of the tokenizer's vocabulary, which says what each id stands for."""
    vocab = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(vocab).encode()).hexdigest()


def _of_word(character: str) -> bool:
    """Returns whether a character is a letter or digit of a script that separates its words."""
    return unicodedata.category(character) in _OF_WORDS


def _word_edges(tokenizer: Tokenizer) -> tuple[Bool[Tensor, " V"], Bool[Tensor, " V"]]:
    """Returns for each id whether its text begins, and ends, with a letter or digit of a word."""
    size = tokenizer.vocab_size
    texts = tokenizer.backend.decode_batch([[i] for i in range(size)], skip_special_tokens=False)
    begins = torch.zeros(size, dtype=torch.bool)
    ends = torch.zeros(size, dtype=torch.bool)
    for i, text in enumerate(texts):
        if not text:
            continue
        # Decoders of SentencePiece drop the blank that a text begins with.
        blank = (tokenizer.backend.id_to_token(i) or "").startswith("\u2581")
        begins[i] = _of_word(text[0]) and not blank
        ends[i] = _of_word(text[-1])
    return begins, ends


class Subjects(nn.Module):
    """Computes which row each token reads; takes the part that Addresses has in an Engram.

    `focus` [B] is for training: the only row of each sequence that learns from it; None: all.
    While it is `silent` no token reads a row.
    """

    def __init__(self, entries: Sequence[Entry], tokenizer: Tokenizer, tables: int = 1) -> None:
        super().__init__()
        self.tables = tables
        sequences: dict[tuple[int, ...], int] = {}
        for row, entry in enumerate(entries, 1):
            for sequence in entry.spellings:
                other = sequences.setdefault(sequence, row)
                if other != row:
                    raise ValueError(
                        f"subject: got {entry.subject!r}, which reads the same tokens as "
                        f"{entries[other - 1].subject!r}, expected one entry for both"
                    )
        by_length: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for sequence, row in sequences.items():
            by_length.setdefault(len(sequence), []).append((sequence, row))
        self.lengths = sorted(by_length)
        self.longest = self.lengths[-1] if self.lengths else 0
        self.silent = False
        self.focus: Int[Tensor, " B"] | None = None
        self._rows: Int[Tensor, "B T"] | None = None
        begins, ends = _word_edges(tokenizer)
        self.register_buffer("ends_word", ends, persistent=False)
        self._register(by_length, begins)

    def _register(
        self, by_length: Mapping[int, list[tuple[tuple[int, ...], int]]], begins: Tensor
    ) -> None:
        """Registers the sequences of each length, sorted by a hash that differs for all of them."""
        generator = torch.Generator().manual_seed(0)
        while True:
            numbers = torch.randint(1, 2**62, (max(1, self.longest),), generator=generator)
            ids = {
                n: torch.tensor([sequence for sequence, _ in by_length[n]]) for n in self.lengths
            }
            hashes = {n: (ids[n] * numbers[:n]).sum(-1) for n in self.lengths}
            if all(len(each.unique()) == len(each) for each in hashes.values()):
                break
        self.register_buffer("numbers", numbers, persistent=False)
        for n in self.lengths:
            order = hashes[n].argsort()
            owners = torch.tensor([row for _, row in by_length[n]])
            first = ids[n][order, 0]
            tables = {
                "hashes": hashes[n][order],
                "ids": ids[n][order],
                "owners": owners[order],
                # Such a sequence may also be the end of a longer word.
                "inside": begins[first],
            }
            for name, tensor in tables.items():
                self.register_buffer(f"{name}_{n}", tensor, persistent=False)

    def match(self, window: Int[Tensor, "B W"]) -> Int[Tensor, "B T"]:
        """Returns the rows of the last T = W - longest tokens of a window of ids.

        It begins `longest` tokens earlier: a subject of so many tokens has one before it, which may
        be of the same word, and then it is another word.
        """
        buffers: dict[str, Any] = self._buffers
        time = window.shape[1] - self.longest
        rows = window.new_zeros(len(window), time)
        for n in self.lengths:
            first = self.longest - n + 1
            ngrams = window.unfold(1, n, 1)[:, first : first + time]  # [B, T, n]
            hashes = (ngrams * buffers["numbers"][:n]).sum(-1)
            index = torch.searchsorted(buffers[f"hashes_{n}"], hashes)
            index = index.clamp_max(len(buffers[f"hashes_{n}"]) - 1)
            same = (buffers[f"ids_{n}"][index] == ngrams).all(-1)
            earlier = window[:, first - 1 : first - 1 + time]
            # A model may have more ids than its tokenizer; those are of no word.
            size = len(buffers["ends_word"])
            of_tokenizer = (earlier >= 0) & (earlier < size)
            goes_on = buffers["ends_word"][earlier.clamp(0, size - 1)] & of_tokenizer
            same &= ~(buffers[f"inside_{n}"][index] & goes_on)
            # Lengths ascend, so that the longest subject is the one that remains.
            rows = torch.where(same, buffers[f"owners_{n}"][index], rows)
        return rows

    def rows_of(self, sequences: Sequence[Sequence[int]]) -> list[set[int]]:
        """Returns the rows that each sequence of ids reads, without 0."""
        result: list[set[int]] = []
        buffers: dict[str, Any] = self._buffers
        device = buffers["ends_word"].device
        for start in range(0, len(sequences), 1024):
            group = sequences[start : start + 1024]
            longest = max(map(len, group))
            window = torch.full((len(group), self.longest + longest), NO_TOKEN)
            for index, sequence in enumerate(group):
                window[index, self.longest : self.longest + len(sequence)] = torch.tensor(sequence)
            result += [set(rows) - {0} for rows in self.match(window.to(device)).tolist()]
        return result

    def lookup_mask(self, ids: Int[Tensor, "B T"], ctx: Context) -> Bool[Tensor, "B T"] | None:
        """Returns the tokens whose rows learn; None where nothing does. Row 0 never learns."""
        if self._rows is None or not torch.is_grad_enabled():
            return None
        return self._rows > 0 if self.focus is None else self._rows == self.focus[:, None]

    def forward(
        self, ids: Int[Tensor, "B T"], ctx: Context, history: Appended | None = None
    ) -> Int[Tensor, "Lm B T 1"]:
        """Computes the row of each token, the same for all tables, and appends ids to `history`.

        A subject does not reach over the beginning of a document or over padding.
        """
        ids = ids.long()
        if ctx.valid is not None:
            ids = torch.where(ctx.valid, ids, NO_TOKEN)
        if history is None:
            window = F.pad(ids, (self.longest, 0), value=NO_TOKEN)
        else:
            history.append(ids, ctx)
            window = history.window(ctx, ids.shape[1])
        document_ids = ctx.documents_before(self.longest)
        if document_ids is not None:
            rows = self._within_documents(window, document_ids)
        else:
            rows = self.match(window)
        if self.silent:
            rows = torch.zeros_like(rows)
        self._rows = rows
        return rows[None, :, :, None].expand(self.tables, -1, -1, -1)

    def _within_documents(
        self, window: Int[Tensor, "B W"], document_ids: Int[Tensor, "B W"]
    ) -> Int[Tensor, "B T"]:
        """Matches each document of a window by itself."""
        rows = window.new_zeros(len(window), window.shape[1] - self.longest)
        for document in document_ids[:, self.longest :].unique():
            inside = document_ids == document
            matched = self.match(torch.where(inside, window, NO_TOKEN))
            rows = torch.where(inside[:, self.longest :], matched, rows)
        return rows


class AddRows(nn.Module):
    """Returns the rows that tokens read, for all residual streams: the Engram of a fact."""

    scale: Tensor

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(scale)), persistent=False)

    def forward(self, hidden: Float[Tensor, "B T S D"], ctx: Context) -> Float[Tensor, "B T S D"]:
        """Computes scale * row; the rows where `ctx.lookup_mask` is False get no gradient."""
        rows = ctx.rows.wait()[:, :, 0]  # [B, T, D]
        if ctx.lookup_mask is not None:
            rows = torch.where(ctx.lookup_mask[..., None], rows, rows.detach())
        return (rows * self.scale)[:, :, None].expand(hidden.shape).contiguous()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """What the file of a memory of facts holds."""

    layers: tuple[int, ...]
    width: int
    tokenizer: str  # sha-256 of its vocabulary
    entries: tuple[Entry, ...]
    rows: Float[Tensor, "E Lm D"]  # of each entry, for each of `layers`


def write_facts(folder: str | Path, stored: Stored, *, undo: bool = True) -> None:
    """Writes a memory of facts into its folder, whole or not at all.

    The memory that was there stays beside it for `undo_facts`, unless `undo` is False.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    about = {
        "layers": stored.layers,
        "width": stored.width,
        "tokenizer": stored.tokenizer,
        "entries": [
            {"subject": entry.subject, "aliases": entry.aliases, "facts": entry.facts}
            for entry in stored.entries
        ],
    }
    sequences = [
        (row, sequence) for row, entry in enumerate(stored.entries) for sequence in entry.spellings
    ]
    tensors = {
        "rows": stored.rows.detach().cpu().contiguous(),
        "ids": torch.tensor([token for _, ids in sequences for token in ids], dtype=torch.int32),
        "lengths": torch.tensor([len(ids) for _, ids in sequences], dtype=torch.int32),
        "owners": torch.tensor([row for row, _ in sequences], dtype=torch.int32),
    }
    metadata = {"format": FORMAT, "memory": json.dumps(about, ensure_ascii=False)}
    with atomic_write(file) as beside:
        save_file(tensors, beside, metadata=metadata)
        # The earlier memory is given up only once the new one is whole.
        if undo and file.is_file():
            before = file.read_bytes()
            with atomic_write(folder / PREVIOUS) as copy:
                copy.write_bytes(before)


def read_facts(folder: str | Path) -> Stored:
    """Reads the memory of facts in a folder; ValueError where there is none, or a damaged one."""
    file = Path(folder) / FILE
    if not file.is_file():
        raise ValueError(
            f"got {str(folder)!r}, expected a folder that `rorqual teach` wrote, with {FILE}"
        )
    return _read(file)


def _read(file: Path) -> Stored:
    """Reads the file of a memory; ValueError for a damaged one."""
    header, tensors = read_tensors(file)
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{file} is no memory of facts: got format {header.get('format')!r}, "
            f"expected {FORMAT!r}"
        )
    try:
        about = json.loads(header["memory"])
        _check_about(about)
        if any(tensors[name].is_floating_point() for name in ("ids", "lengths", "owners")):
            raise ValueError("got ids, lengths or owners that are no integers")
        rows = tensors["rows"]
        lengths = tensors["lengths"].tolist()
        owners = tensors["owners"].tolist()
        flat = tensors["ids"].tolist()
        shape = (len(about["entries"]), len(about["layers"]), int(about["width"]))
        if tuple(rows.shape) != shape or not rows.isfinite().all():
            raise ValueError(f"got rows {tuple(rows.shape)}, expected finite ones {shape}")
        if sum(lengths) != len(flat) or len(lengths) != len(owners):
            raise ValueError(f"got {len(flat)} ids, expected {sum(lengths)}")
        if min(lengths, default=1) < 1 or min(flat, default=0) < 0:
            raise ValueError("got a length below 1 or an id below 0")
        if set(owners) != set(range(len(about["entries"]))):
            raise ValueError("got ids of other entries, expected some of each")
        sequences: list[list[tuple[int, ...]]] = [[] for _ in about["entries"]]
        tokens = iter(flat)
        for owner, length in zip(owners, lengths, strict=True):
            sequences[owner].append(tuple(itertools.islice(tokens, length)))
        entries = tuple(
            Entry(
                subject=entry["subject"],
                aliases=tuple(entry["aliases"]),
                facts=tuple(entry["facts"]),
                spellings=tuple(ids),
            )
            for entry, ids in zip(about["entries"], sequences, strict=True)
        )
        return Stored(
            layers=tuple(about["layers"]),
            width=int(about["width"]),
            tokenizer=str(about["tokenizer"]),
            entries=entries,
            rows=rows,
        )
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ValueError(f"{file} is no memory that `rorqual teach` wrote: {error!r}") from error


def _check_about(about: Any) -> None:
    """Raises a ValueError or TypeError where a memory's description has other types."""
    layers = about["layers"]
    if not all(type(layer) is int for layer in (*layers, about["width"])):
        raise ValueError(f"got layers {layers!r} and width {about['width']!r}, expected integers")
    FactConfig(layers=tuple(layers), ngram=1)
    for entry in about["entries"]:
        texts = [entry["subject"]]
        lists = [entry["aliases"]]
        for fact in entry["facts"]:
            texts += [fact["answer"], fact["relation"]]
            lists += [fact["prompts"], fact["held_out"]]
        if not all(isinstance(each, list) for each in lists) or not all(
            isinstance(text, str) for text in itertools.chain(texts, *lists)
        ):
            raise ValueError(f"got an entry {repr(entry)[:80]}, expected texts and lists of texts")


def without(stored: Stored, subjects: Sequence[str]) -> Stored:
    """Returns the memory without these subjects; the rows of the others are the same.

    ValueError for a subject that it does not have.
    """
    names = {name: entry.subject for entry in stored.entries for name in entry.aliases}
    names |= {entry.subject: entry.subject for entry in stored.entries}
    if unknown := [subject for subject in subjects if subject not in names]:
        raise ValueError(
            f"got subject {unknown[0]!r}, expected one of the {len(stored.entries)} of this memory"
        )
    removed = {names[subject] for subject in subjects}
    rest = [row for row, entry in enumerate(stored.entries) if entry.subject not in removed]
    entries = tuple(stored.entries[row] for row in rest)
    return dataclasses.replace(stored, entries=entries, rows=stored.rows[rest])


def undo_facts(folder: str | Path) -> Stored:
    """Restores the memory before the last change; undone twice, the change is there again.

    ValueError where there is no earlier memory, or a damaged one; nothing is changed then. The
    memory that is undone may be damaged. Both files are moved, so that one that is stopped between
    loses neither; the next undo ends it.
    """
    folder = Path(folder)
    previous = folder / PREVIOUS
    undone = folder / UNDONE
    if undone.is_file() and not previous.is_file():
        replace_file(undone, previous)
        return read_facts(folder)
    if not previous.is_file():
        raise ValueError(
            f"{folder}: got no earlier memory to go back to, expected {PREVIOUS}, "
            "which the second change writes"
        )
    stored = _read(previous)
    if (folder / FILE).is_file():
        with atomic_write(undone) as beside:
            beside.write_bytes((folder / FILE).read_bytes())
    # Each move is on the disk before the next begins.
    replace_file(previous, folder / FILE)
    if undone.is_file():
        replace_file(undone, previous)
    return stored
