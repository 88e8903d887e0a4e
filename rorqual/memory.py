"""Inspects and edits the Engram memory of a model.

    reads(text)          the rows that each token reads, and the gate of each stream
    rows_of(n-gram)      the heads of that order at its last token: the only rows that depend on
                         all of it
    popular, collisions  the rows that a corpus reads most, and those that its n-grams share
    Editor               suppress, overwrite or transplant the rows of an n-gram; undo reverts the
                         last edit
    difference           KL(p || q) = sum p ln(p / q) of two next-token distributions, and the
                         tokens that moved most

A model is ours, or one of transformers that `attach` gave a memory. A row is shared by every n-gram
that hashes to it. Conditional Memory via Scalable Lookup, section 6, arXiv:2601.07372.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rorqual.data.tokenizer import Tokenizer
from rorqual.io import atomic_write
from rorqual.layers.context import context
from rorqual.layers.engram import Addresses, Engram
from rorqual.model import LanguageModel
from rorqual.model_config import EngramConfig
from rorqual.tables import Table

Ngram = str | Sequence[int]  # a text of 2 to N tokens, or their ids
FORMAT = "rorqual-edits-1"
# The attribute in which `attach` stores a memory. Its module is not imported, since it loads
# transformers, which is not needed here.
_ATTACHED = "rorqual_memory"
MAX_NGRAMS = 2**18  # distinct n-grams counted per order; beyond twice that the rarest are dropped
_STORED = ("rows", "before", "after")
_BATCH = 4096  # n-grams hashed at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """What one token reads: its rows, and their gates.

    By block: rows [R] (order-major, then head) and gates [S], one per stream. ngrams: the text that
    addressed each order's rows, order 2 first; shorter at the beginning of a document.
    """

    token: str
    id: int
    ngrams: list[str]
    rows: dict[int, list[int]]
    gates: dict[int, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """One edit: the values before and after it; `layer` is a block's index."""

    what: str
    layer: int
    rows: Int[Tensor, " J"]
    before: Float[Tensor, "J width"]
    after: Float[Tensor, "J width"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Difference of two next-token distributions.

    KL(before || after) in nats, and (token, before, after), most moved first.
    """

    kl: float
    movers: list[tuple[str, float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Collisions:
    """N-grams of a corpus that share rows in one layer.

    Two n-grams that read alike (one canonical n-gram) count as one.
    """

    ngrams: int  # distinct n-grams
    rows: int  # rows that they read
    shared: int  # rows that more than one of them reads
    worst: list[tuple[int, list[str]]]  # (row, the n-grams that read it), most n-grams first


class _Parts(NamedTuple):
    """What a memory consists of, in our own model or attached to one of transformers."""

    config: EngramConfig
    addresses: Addresses
    tables: Sequence[nn.Module]
    engrams: list[Engram]
    device: torch.device


def _parts(model: nn.Module) -> _Parts:
    """Returns the parts of a model's memory. ValueError for a model without one."""
    device = next(model.parameters()).device
    attached: Any = getattr(model, _ATTACHED, None)
    if attached is not None:
        if not isinstance(attached.config, EngramConfig):
            raise ValueError(
                "memory: got a memory of facts, expected Engram: `rorqual teach` changes facts"
            )
        return _Parts(
            attached.config, attached.addresses, attached.tables, list(attached.engrams), device
        )
    if (
        not isinstance(model, LanguageModel)
        or model.config.engram is None
        or model.addresses is None
    ):
        hint = "(--model.engram.layers 1), or that `attach` gave one"
        raise ValueError(f"memory: got a model without Engram, expected one that has it {hint}")
    engrams: list[Any] = [model.blocks[layer].engram for layer in model.config.engram.layers]
    return _Parts(model.config.engram, model.addresses, list(model.tables), engrams, device)


def _table_index(config: EngramConfig, layer: int) -> int:
    """Returns the number of a block among those with memory. ValueError for any other block."""
    if layer not in config.layers:
        raise ValueError(
            f"layer: got {layer}, "
            f"expected a block with Engram: {', '.join(map(str, config.layers))}"
        )
    return config.layers.index(layer)


def _prompt(model: nn.Module, tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text that begins a document.

    A transformers model gets the special ids that its own tokenizer adds.
    """
    if isinstance(model, LanguageModel):
        return [tokenizer.begin_id, *tokenizer.encode(text)]
    return tokenizer.backend.encode(text).ids


@torch.inference_mode()
def rows(model: nn.Module, ids: Int[Tensor, "B T"]) -> Int[Tensor, "Lm B T R"]:
    """Returns the row ids that a whole sequence reads in every Engram layer."""
    return _parts(model).addresses(ids, context(ids.shape[0], ids.shape[1], ids.device))


@torch.inference_mode()
def reads(model: nn.Module, tokenizer: Tokenizer, text: str) -> list[Read]:
    """Returns the rows and gates of each token of a document, its begin id first.

    Gates of dead tokens are 0.
    """
    config, addresses, _, engrams, device = _parts(model)
    ids = torch.tensor([_prompt(model, tokenizer, text)], device=device)
    if not ids.numel():
        raise ValueError("text: got no tokens, expected at least one")
    gates_of: dict[int, Tensor] = {}
    hooks = []
    for layer, engram in zip(config.layers, engrams, strict=True):

        def keep(module, args, gates: Tensor, layer: int = layer) -> None:
            gates_of[layer] = gates[0].float().cpu()  # [T, S]

        hooks.append(engram.gate.register_forward_hook(keep))
    try:
        model.hidden(ids) if isinstance(model, LanguageModel) else model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    alive = addresses.lookup_mask(ids, context(ids.shape[0], ids.shape[1], device))
    for gates in gates_of.values():
        if alive is not None:
            gates[~alive[0].cpu()] = 0.0
    read, tokens = rows(model, ids)[:, 0].tolist(), ids[0].tolist()  # [Lm, T, R]
    return [
        Read(
            token=tokenizer.token(token),
            id=token,
            ngrams=[
                tokenizer.decode(tokens[max(0, t + 1 - n) : t + 1])
                for n in range(2, config.ngram + 1)
            ],
            rows={layer: read[table_index][t] for table_index, layer in enumerate(config.layers)},
            gates={layer: gates_of[layer][t].tolist() for layer in config.layers},
        )
        for t, token in enumerate(tokens)
    ]


def ids_of(model: nn.Module, tokenizer: Tokenizer, ngram: Ngram) -> list[int]:
    """Returns the 2 to N token ids of an n-gram, which may be a text or ids.

    ValueError where they are not 2 to N, or where one is a dead token, which n-grams do not span.
    """
    ids = tokenizer.encode(ngram) if isinstance(ngram, str) else list(ngram)
    config = _parts(model).config
    parts = " ".join(repr(tokenizer.token(token)) for token in ids[:8])
    if not 2 <= len(ids) <= config.ngram:
        raise ValueError(f"n-gram: got {len(ids)} tokens ({parts}), expected 2 to {config.ngram}")
    if dead := set(ids) & set(config.dead_tokens):
        raise ValueError(
            f"n-gram: got {parts}, expected none of the dead tokens, as {min(dead)} is"
        )
    return ids


def rows_of(model: nn.Module, tokenizer: Tokenizer, ngram: Ngram, layer: int) -> list[int]:
    """Returns the rows, one per head, that depend on the whole n-gram.

    They are those of its own order at its last token.
    """
    ids = ids_of(model, tokenizer, ngram)
    table_index = _table_index(_parts(model).config, layer)
    return _rows_of_many(model, np.array([ids]), table_index)[0].tolist()


def _rows_of_many(model: nn.Module, ngrams: np.ndarray, table_index: int) -> np.ndarray:
    """Returns the rows of M n-grams of one order, int64 [M, J].

    They are the rows of that order at the last tokens.
    """
    config, _, _, _, device = _parts(model)
    columns = slice((ngrams.shape[1] - 2) * config.heads, (ngrams.shape[1] - 1) * config.heads)
    parts = [
        torch.from_numpy(ngrams[start : start + _BATCH]).to(device)
        for start in range(0, len(ngrams), _BATCH)
    ]
    return np.concatenate(
        [rows(model, piece)[table_index, :, -1, columns].cpu().numpy() for piece in parts]
    )


@torch.inference_mode()
def distribution(model: Any, tokenizer: Tokenizer, text: str) -> Float[Tensor, " V"]:
    """Returns the probabilities of the token after a text that begins a document.

    They are float32, over the tokenizer's ids.
    """
    ids = torch.tensor([_prompt(model, tokenizer, text)], device=next(model.parameters()).device)
    if isinstance(model, LanguageModel):
        logits = model.logits(model.hidden(ids)[0][:, -1:])[0, 0]
    else:
        logits = model(ids, use_cache=False).logits[0, -1].float()
    return logits[: tokenizer.vocab_size].softmax(-1).cpu()


def next_tokens(
    model: nn.Module, tokenizer: Tokenizer, text: str, count: int = 10
) -> list[tuple[str, float]]:
    """Returns the likeliest tokens after a text that begins a document, with probabilities."""
    return likeliest(distribution(model, tokenizer, text), tokenizer, count)


def likeliest(
    chances: Float[Tensor, " V"], tokenizer: Tokenizer, count: int = 10
) -> list[tuple[str, float]]:
    """Returns the likeliest tokens of a distribution, with their probabilities."""
    best = chances.topk(min(count, len(chances)))
    return [
        (tokenizer.token(i), p)
        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def difference(
    before: Float[Tensor, " V"], after: Float[Tensor, " V"], tokenizer: Tokenizer, count: int = 10
) -> Difference:
    """Returns the KL from `before` to `after`, and the `count` tokens that moved most.

    The KL is summed in float64; tokens move by the change of their probability.
    """
    p = before.double()
    q = after.double()
    terms = torch.where(p > 0, p * (p.log() - q.clamp_min(1e-300).log()), 0.0)
    moved = (q - p).abs().topk(min(count, len(p))).indices.tolist()
    return Difference(
        kl=float(terms.sum()),
        movers=[(tokenizer.token(i), float(p[i]), float(q[i])) for i in moved],
    )


class _Counts:
    """Counts the n-grams of a corpus by order as its documents are added.

    Of each order the rarest are dropped when there are more than twice `MAX_NGRAMS` distinct ones.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, _parts(model).config
        self.of: dict[int, Counter[tuple[int, ...]]] = {
            n: Counter() for n in range(2, self.config.ngram + 1)
        }

    def add(self, text: str) -> list[int]:
        """Counts the n-grams of a document that contain no dead token, and returns its ids."""
        ids = _prompt(self.model, self.tokenizer, text)
        dead = set(self.config.dead_tokens)
        for order, counter in self.of.items():
            whole = zip(*(ids[k:] for k in range(order)), strict=False)
            counter.update(ngram for ngram in whole if not dead.intersection(ngram))
            if len(counter) > 2 * MAX_NGRAMS:
                self.of[order] = Counter(dict(counter.most_common(MAX_NGRAMS)))
        return ids


def popular(
    model: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], layer: int, count: int = 10
) -> list[tuple[int, int, str]]:
    """Returns the rows that a corpus reads most in one layer.

    Each is (row, reads, the n-gram that reads it most). Reads are counted for n-grams wholly within
    their document. There is a count for each row, and for up to 2^18 n-grams of each order.
    """
    config, addresses, _, _, device = _parts(model)
    table_index = _table_index(config, layer)
    counts = _Counts(model, tokenizer)
    dead = torch.tensor(config.dead_tokens, dtype=torch.long)
    number = np.zeros(int(addresses.primes[table_index].sum()), dtype=np.int64)
    for text in texts:
        ids = torch.tensor([counts.add(text)])
        read = (
            rows(model, ids.to(device))[table_index, 0]
            .cpu()
            .unflatten(-1, (-1, config.heads))
            .numpy()
        )
        clear = ~torch.isin(ids[0], dead).numpy()
        for order in range(2, min(config.ngram, ids.shape[1]) + 1):
            whole = np.lib.stride_tricks.sliding_window_view(clear, order).all(1)
            np.add.at(number, read[order - 1 :, order - 2][whole], 1)
    top = sorted(np.flatnonzero(number).tolist(), key=lambda row: (-number[row], row))[:count]
    named = dict.fromkeys(top, ("", 0))
    for counter in counts.of.values():
        for ngram, times, row_ids in _addressed(model, counter, table_index):
            for row in named.keys() & row_ids:
                if times > named[row][1]:
                    named[row] = (tokenizer.decode(ngram), times)
    return [(row, int(number[row]), named[row][0]) for row in top]


def _addressed(model: nn.Module, counter: Counter[tuple[int, ...]], table_index: int):
    """Yields (n-gram, count, its rows) of all n-grams of one order, hashed in batches."""
    if counter:
        read = _rows_of_many(model, np.array(list(counter)), table_index)
        for (ngram, times), row_ids in zip(counter.items(), read.tolist(), strict=True):
            yield ngram, times, row_ids


def _readers(model: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], table_index: int):
    """Yields (n-gram in its first form, its rows) for every canonical n-gram of a corpus."""
    counts = _Counts(model, tokenizer)
    canonical = _parts(model).addresses.canonical_map.tolist()
    for text in texts:
        counts.add(text)
    for counter in counts.of.values():
        different = {
            tuple(canonical[token] for token in ngram): ngram for ngram in reversed(list(counter))
        }
        for ngram, _, row_ids in _addressed(model, Counter(list(different.values())), table_index):
            yield ngram, row_ids


def collisions(
    model: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], layer: int, count: int = 10
) -> Collisions:
    """Returns which n-grams of a corpus share a row in one layer, and how many rows they share."""
    readers: dict[int, list[tuple[int, ...]]] = {}
    addressed = list(_readers(model, tokenizer, texts, _table_index(_parts(model).config, layer)))
    for ngram, row_ids in addressed:
        for row in row_ids:
            readers.setdefault(row, []).append(ngram)
    crowded = sorted(
        (row for row, addressed in readers.items() if len(addressed) > 1),
        key=lambda r: (-len(readers[r]), r),
    )
    worst = [(row, [tokenizer.decode(ngram) for ngram in readers[row]]) for row in crowded[:count]]
    return Collisions(ngrams=len(addressed), rows=len(readers), shared=len(crowded), worst=worst)


def sharing(
    model: nn.Module, tokenizer: Tokenizer, ngram: Ngram, texts: Iterable[str], layer: int
) -> dict[str, int]:
    """Returns the other n-grams of a corpus that read some of this n-gram's rows.

    The values are the numbers of shared rows, most first.
    """
    mine = set(rows_of(model, tokenizer, ngram, layer))
    ids = ids_of(model, tokenizer, ngram)
    canonical = _parts(model).addresses.canonical_map.tolist()
    itself = [canonical[token] for token in ids]
    counts: Counter[str] = Counter()
    for other, row_ids in _readers(
        model, tokenizer, texts, _table_index(_parts(model).config, layer)
    ):
        if mine & set(row_ids) and [canonical[token] for token in other] != itself:
            counts[tokenizer.decode(other)] = len(mine & set(row_ids))
    return dict(counts.most_common())


class Editor:
    """Edits a model's rows in place, and stores the values to undo the edits in, last first."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        _parts(model)
        self.model = model
        self.tokenizer = tokenizer
        self.edits: list[Edit] = []

    def suppress(self, ngram: Ngram, layer: int) -> Edit:
        """Sets the n-gram's rows to zero, so that its lookup returns nothing."""
        read = self.lookup(ngram, layer)
        return self._write(f"suppress {ngram!r}", ngram, layer, torch.zeros_like(read))

    def overwrite(self, ngram: Ngram, layer: int, values: Float[Tensor, "J width"]) -> Edit:
        """Sets the n-gram's rows to these values, one row per head.

        ValueError for another shape, or for numbers that are not finite.
        """
        return self._write(f"overwrite {ngram!r}", ngram, layer, values)

    def transplant(self, source: Ngram, target: Ngram, layer: int) -> Edit:
        """Copies the source's rows to the target's, head by head.

        Both must be n-grams of one order.
        """
        orders = [len(ids_of(self.model, self.tokenizer, ngram)) for ngram in (source, target)]
        if orders[0] != orders[1]:
            raise ValueError(
                f"transplant: got n-grams of {orders[0]} and {orders[1]} tokens, "
                "expected equally many"
            )
        return self._write(
            f"transplant {source!r} to {target!r}", target, layer, self.lookup(source, layer)
        )

    def lookup(self, ngram: Ngram, layer: int) -> Float[Tensor, "J width"]:
        """Returns a copy of the n-gram's rows as they are now."""
        row_ids = rows_of(self.model, self.tokenizer, ngram, layer)
        return self._table(layer).weight.detach()[row_ids].clone()

    def undo(self) -> Edit:
        """Reverts the last edit, bit for bit; ValueError where there is none."""
        if not self.edits:
            raise ValueError("undo: got no edit to take back")
        edit = self.edits.pop()
        weight = self._table(edit.layer).weight
        with torch.no_grad():
            weight[edit.rows.to(weight.device)] = edit.before.to(weight)
        return edit

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the edits as one safetensors file, whole or not at all.

        Another process can undo them with it.
        """
        path = Path(path)
        about = {
            "edits": [[e.what, e.layer] for e in self.edits],
            "addresses": _parts(self.model).addresses.fingerprint(),
        }
        tensors = {
            f"{n}.{name}": getattr(edit, name).cpu()
            for n, edit in enumerate(self.edits)
            for name in _STORED
        }
        with atomic_write(path) as beside:
            save_file(tensors, beside, metadata={"format": FORMAT, "about": json.dumps(about)})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads what `save` wrote, apart from the last edits that the model does not contain.

        ValueError for edits of another model, or for rows that were changed since.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                about = json.loads(header["about"]) if header.get("format") == FORMAT else None
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} cannot be read as safetensors that an Editor saved: {error}"
            ) from error
        if about is None or about.get("addresses") != _parts(self.model).addresses.fingerprint():
            raise ValueError(f"{path}: got no edits of this model, expected what its Editor saved")
        self.edits = [
            Edit(what=what, layer=layer, **{name: tensors[f"{n}.{name}"] for name in _STORED})
            for n, (what, layer) in enumerate(about["edits"])
        ]
        while self.edits:
            last = self.edits[-1]
            now = self._table(last.layer).weight.detach().cpu()[last.rows]
            if torch.equal(now, last.after):
                break
            if not torch.equal(now, last.before):
                raise ValueError(
                    f"{path}: got other rows than {last.what} left, expected them unchanged"
                )
            self.edits.pop()

    def _table(self, layer: int) -> Table:
        """Returns the table of a block. ValueError unless its rows are floats on the device."""
        table = _parts(self.model).tables[_table_index(_parts(self.model).config, layer)]
        if (
            not isinstance(table, Table)
            or table.file is not None
            or table.dtype == torch.float8_e4m3fn
        ):
            raise ValueError(
                f"memory: got rows in {table}, expected them on the device, as floats, to be edited"
            )
        return table

    def _write(self, what: str, ngram: Ngram, layer: int, values: Tensor) -> Edit:
        """Writes `values` to the n-gram's rows, and records what was there; `what` names the edit.

        ValueError for another shape, and for numbers that are not finite.
        """
        row_ids = torch.tensor(rows_of(self.model, self.tokenizer, ngram, layer))
        weight = self._table(layer).weight
        if values.shape != (len(row_ids), weight.shape[1]) or not values.isfinite().all():
            expected = f"expected finite numbers of shape {(len(row_ids), weight.shape[1])}"
            raise ValueError(f"values: got shape {tuple(values.shape)}, {expected}")
        after = values.detach().to(weight)
        where = row_ids.to(weight.device)
        edit = Edit(
            what=what,
            layer=layer,
            rows=where,
            before=self.lookup(ngram, layer),
            after=after.clone(),
        )
        with torch.no_grad():
            weight[where] = after
        self.edits.append(edit)
        return edit
