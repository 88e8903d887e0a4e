"""A model that remembers, and a text or an n-gram -> what it reads, what the gates said, and edits that can be undone.

    reads(text)          the rows that each token reads, and how far each stream trusts them
    rows_of(n-gram)      the heads of that order at its last token: the only rows that depend on it all
    popular, collisions  what a corpus reads most, and which of its n-grams must share a row
    Editor               suppress, overwrite or transplant the rows of an n-gram; undo takes back the last edit
    difference           two next-token distributions -> KL(p || q) = sum p ln(p / q), and who moved most

A model is ours, or one of transformers that `attach` gave a memory. A row is shared by every n-gram that hashes to it.
Conditional Memory via Scalable Lookup, section 6, arXiv:2601.07372.
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

Ngram = str | Sequence[int]  # text that is 2 to N tokens long, or their ids
FORMAT = "rorqual-edits-1"
_ATTACHED = "rorqual_memory"  # where `attach` puts a memory; its room loads transformers, which is not needed here
_KEPT = 2**18  # different n-grams of a corpus that are counted; beyond, the rarer are forgotten
_STORED = ("rows", "before", "after")
_BATCH = 4096  # n-grams hashed at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """What one token read. By block: rows [R] (order-major, then head) and gates [S], one a stream.

    ngrams: the text that addressed each order's rows, 2 first; shorter where the document had just begun.
    """

    token: str
    id: int
    ngrams: list[str]
    rows: dict[int, list[int]]
    gates: dict[int, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """One change: what stood there before, and what stands there since. `layer` is a block's index."""

    what: str
    layer: int
    rows: Int[Tensor, " J"]
    before: Float[Tensor, "J width"]
    after: Float[Tensor, "J width"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Of two next-token distributions: KL(before || after), nats; (token, before, after), most moved first."""

    kl: float
    movers: list[tuple[str, float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Collisions:
    """Which n-grams of a corpus share rows in one layer. Two that read alike (one canonical n-gram) count as one."""

    ngrams: int  # different ones
    rows: int  # that they read
    shared: int  # of those, read by more than one
    worst: list[tuple[int, list[str]]]  # (row, its readers), most readers first


class _Parts(NamedTuple):
    config: EngramConfig
    addresses: Addresses
    tables: Sequence[nn.Module]
    engrams: list[Engram]
    device: torch.device


def _parts(model: nn.Module) -> _Parts:
    device = next(model.parameters()).device
    held: Any = getattr(model, _ATTACHED, None)
    if held is not None:
        return _Parts(held.config, held.addresses, held.tables, list(held.engrams), device)
    if (
        not isinstance(model, LanguageModel)
        or model.config.engram is None
        or model.addresses is None
    ):
        mend = "(--model.engram.layers 1), or that `attach` gave one"
        raise ValueError(f"memory: got a model without Engram, expected one that has it {mend}")
    engrams: list[Any] = [model.blocks[layer].engram for layer in model.config.engram.layers]
    return _Parts(model.config.engram, model.addresses, list(model.tables), engrams, device)


def _place(config: EngramConfig, layer: int) -> int:
    if layer not in config.layers:
        raise ValueError(
            f"layer: got {layer}, expected a block that remembers: {', '.join(map(str, config.layers))}"
        )
    return config.layers.index(layer)


def _prompt(model: nn.Module, tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that begins a document; a transformers model gets what its own tokenizer puts around it."""
    if isinstance(model, LanguageModel):
        return [tokenizer.begin_id, *tokenizer.encode(text)]
    return tokenizer.backend.encode(text).ids


@torch.inference_mode()
def rows(model: nn.Module, ids: Int[Tensor, "B T"]) -> Int[Tensor, "Lm B T R"]:
    """Row ids that a whole sequence reads in every Engram layer."""
    return _parts(model).addresses(ids, context(ids.shape[0], ids.shape[1], ids.device))


@torch.inference_mode()
def reads(model: nn.Module, tokenizer: Tokenizer, text: str) -> list[Read]:
    """For each token of a document (its begin id first): what it read, and what the gates said (0 where dead)."""
    config, addresses, _, engrams, device = _parts(model)
    ids = torch.tensor([_prompt(model, tokenizer, text)], device=device)
    if not ids.numel():
        raise ValueError("text: got no tokens, expected at least one")
    said: dict[int, Tensor] = {}
    hooks = []
    for layer, engram in zip(config.layers, engrams, strict=True):

        def keep(module, args, gates: Tensor, layer: int = layer) -> None:
            said[layer] = gates[0].float().cpu()  # [T, S]

        hooks.append(engram.gate.register_forward_hook(keep))
    try:
        model.hidden(ids) if isinstance(model, LanguageModel) else model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    alive = addresses.live(ids, context(ids.shape[0], ids.shape[1], device))
    for gates in said.values():
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
            rows={layer: read[place][t] for place, layer in enumerate(config.layers)},
            gates={layer: said[layer][t].tolist() for layer in config.layers},
        )
        for t, token in enumerate(tokens)
    ]


def ids_of(model: nn.Module, tokenizer: Tokenizer, ngram: Ngram) -> list[int]:
    """The tokens of an n-gram. ValueError where they are not 2 to N, or no look-back passes them."""
    ids, config = (
        tokenizer.encode(ngram) if isinstance(ngram, str) else list(ngram),
        _parts(model).config,
    )
    parts = " ".join(repr(tokenizer.token(token)) for token in ids[:8])
    if not 2 <= len(ids) <= config.ngram:
        raise ValueError(f"n-gram: got {len(ids)} tokens ({parts}), expected 2 to {config.ngram}")
    if dead := set(ids) & set(config.dead_tokens):
        raise ValueError(
            f"n-gram: got {parts}, expected none of the dead tokens, as {min(dead)} is"
        )
    return ids


def rows_of(model: nn.Module, tokenizer: Tokenizer, ngram: Ngram, layer: int) -> list[int]:
    """The rows, one a head, that depend on the whole n-gram: those of its own order at its last token."""
    ids, place = ids_of(model, tokenizer, ngram), _place(_parts(model).config, layer)
    return _rows_of_many(model, np.array([ids]), place)[0].tolist()


def _rows_of_many(model: nn.Module, ngrams: np.ndarray, place: int) -> np.ndarray:
    """int64 [M, J]: the rows of the own order of M n-grams of one order, at their last tokens."""
    config, _, _, _, device = _parts(model)
    own = slice((ngrams.shape[1] - 2) * config.heads, (ngrams.shape[1] - 1) * config.heads)
    parts = [
        torch.from_numpy(ngrams[at : at + _BATCH]).to(device)
        for at in range(0, len(ngrams), _BATCH)
    ]
    return np.concatenate([rows(model, part)[place, :, -1, own].cpu().numpy() for part in parts])


@torch.inference_mode()
def distribution(model: Any, tokenizer: Tokenizer, text: str) -> Float[Tensor, " V"]:
    """Probabilities of the token after a text that begins a document, over the tokenizer's ids; float32."""
    ids = torch.tensor([_prompt(model, tokenizer, text)], device=next(model.parameters()).device)
    if isinstance(model, LanguageModel):
        logits = model.logits(model.hidden(ids)[0][:, -1:])[0, 0]
    else:
        logits = model(ids, use_cache=False).logits[0, -1].float()
    return logits[: tokenizer.vocabulary].softmax(-1).cpu()


def next_tokens(
    model: nn.Module, tokenizer: Tokenizer, text: str, count: int = 10
) -> list[tuple[str, float]]:
    """The likeliest tokens after a text that begins a document, with their probabilities."""
    return likeliest(distribution(model, tokenizer, text), tokenizer, count)


def likeliest(
    chances: Float[Tensor, " V"], tokenizer: Tokenizer, count: int = 10
) -> list[tuple[str, float]]:
    """The likeliest tokens of a distribution, with their probabilities."""
    best = chances.topk(min(count, len(chances)))
    return [
        (tokenizer.token(i), p)
        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def difference(
    before: Float[Tensor, " V"], after: Float[Tensor, " V"], tokenizer: Tokenizer, count: int = 10
) -> Difference:
    """How far `after` is from `before`, summed in float64; the `count` tokens whose probability changed most."""
    p, q = before.double(), after.double()
    terms = torch.where(p > 0, p * (p.log() - q.clamp_min(1e-300).log()), 0.0)
    moved = (q - p).abs().topk(min(count, len(p))).indices.tolist()
    return Difference(
        kl=float(terms.sum()),
        movers=[(tokenizer.token(i), float(p[i]), float(q[i])) for i in moved],
    )


class _Counts:
    """The n-grams of a corpus as it streams by, by order; the rarest are forgotten beyond `_KEPT` different ones."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, _parts(model).config
        self.of: dict[int, Counter[tuple[int, ...]]] = {
            n: Counter() for n in range(2, self.config.ngram + 1)
        }

    def add(self, text: str) -> list[int]:
        """Counts a document's n-grams that no dead token is part of; its ids."""
        ids, dead = _prompt(self.model, self.tokenizer, text), set(self.config.dead_tokens)
        for order, counter in self.of.items():
            whole = zip(*(ids[k:] for k in range(order)), strict=False)
            counter.update(ngram for ngram in whole if not dead.intersection(ngram))
            if len(counter) > 2 * _KEPT:
                self.of[order] = Counter(dict(counter.most_common(_KEPT)))
        return ids


def popular(
    model: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], layer: int, count: int = 10
) -> list[tuple[int, int, str]]:
    """The rows that a corpus reads most in one layer: (row, reads, the n-gram that reads it most).

    Reads by n-grams wholly within their document. It holds a count for each row; n-grams up to 2^18 of each order.
    """
    config, addresses, _, _, device = _parts(model)
    place, counts = _place(config, layer), _Counts(model, tokenizer)
    dead = torch.tensor(config.dead_tokens, dtype=torch.long)
    number = np.zeros(int(addresses.primes[place].sum()), dtype=np.int64)
    for text in texts:
        ids = torch.tensor([counts.add(text)])
        read = rows(model, ids.to(device))[place, 0].cpu().unflatten(-1, (-1, config.heads)).numpy()
        clear = ~torch.isin(ids[0], dead).numpy()
        for order in range(2, min(config.ngram, ids.shape[1]) + 1):
            whole = np.lib.stride_tricks.sliding_window_view(clear, order).all(1)
            np.add.at(number, read[order - 1 :, order - 2][whole], 1)
    top = sorted(np.flatnonzero(number).tolist(), key=lambda row: (-number[row], row))[:count]
    named = dict.fromkeys(top, ("", 0))
    for counter in counts.of.values():
        for ngram, times, own in _addressed(model, counter, place):
            for row in named.keys() & own:
                if times > named[row][1]:
                    named[row] = (tokenizer.decode(ngram), times)
    return [(row, int(number[row]), named[row][0]) for row in top]


def _addressed(model: nn.Module, counter: Counter[tuple[int, ...]], place: int):
    """(n-gram, how often, its rows) of each."""
    if counter:
        read = _rows_of_many(model, np.array(list(counter)), place)
        for (ngram, times), own in zip(counter.items(), read.tolist(), strict=True):
            yield ngram, times, own


def _readers(model: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], place: int):
    """(n-gram as it first came, its rows) for every canonical n-gram of a corpus."""
    counts, canonical = _Counts(model, tokenizer), _parts(model).addresses.canonical_map.tolist()
    for text in texts:
        counts.add(text)
    for counter in counts.of.values():
        different = {
            tuple(canonical[token] for token in ngram): ngram for ngram in reversed(list(counter))
        }
        for ngram, _, own in _addressed(model, Counter(list(different.values())), place):
            yield ngram, own


def collisions(
    model: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], layer: int, count: int = 10
) -> Collisions:
    """Which n-grams of a corpus share a row in one layer, and how many rows are shared."""
    readers: dict[int, list[tuple[int, ...]]] = {}
    found = list(_readers(model, tokenizer, texts, _place(_parts(model).config, layer)))
    for ngram, own in found:
        for row in own:
            readers.setdefault(row, []).append(ngram)
    crowded = sorted(
        (row for row, found in readers.items() if len(found) > 1),
        key=lambda r: (-len(readers[r]), r),
    )
    worst = [(row, [tokenizer.decode(ngram) for ngram in readers[row]]) for row in crowded[:count]]
    return Collisions(ngrams=len(found), rows=len(readers), shared=len(crowded), worst=worst)


def sharing(
    model: nn.Module, tokenizer: Tokenizer, ngram: Ngram, texts: Iterable[str], layer: int
) -> dict[str, int]:
    """Other n-grams of a corpus that read some of this one's rows: how many rows each shares, most first."""
    mine, ids = set(rows_of(model, tokenizer, ngram, layer)), ids_of(model, tokenizer, ngram)
    canonical = _parts(model).addresses.canonical_map.tolist()
    itself = [canonical[token] for token in ids]
    found: Counter[str] = Counter()
    for other, own in _readers(model, tokenizer, texts, _place(_parts(model).config, layer)):
        if mine & set(own) and [canonical[token] for token in other] != itself:
            found[tokenizer.decode(other)] = len(mine & set(own))
    return dict(found.most_common())


class Editor:
    """Edits a model's rows in place and remembers how to take each edit back, last first."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        _parts(model)
        self.model, self.tokenizer = model, tokenizer
        self.edits: list[Edit] = []

    def suppress(self, ngram: Ngram, layer: int) -> Edit:
        """Its rows become zero: recalled, they say nothing."""
        read = self.look(ngram, layer)
        return self._write(f"suppress {ngram!r}", ngram, layer, torch.zeros_like(read))

    def overwrite(self, ngram: Ngram, layer: int, values: Float[Tensor, "J width"]) -> Edit:
        """Its rows become these, one a head. ValueError for another shape, or numbers that are none."""
        return self._write(f"overwrite {ngram!r}", ngram, layer, values)

    def transplant(self, source: Ngram, target: Ngram, layer: int) -> Edit:
        """The target's rows become the source's, head by head. Both must be n-grams of one order."""
        orders = [len(ids_of(self.model, self.tokenizer, ngram)) for ngram in (source, target)]
        if orders[0] != orders[1]:
            raise ValueError(
                f"transplant: got n-grams of {orders[0]} and {orders[1]} tokens, expected equally many"
            )
        return self._write(
            f"transplant {source!r} to {target!r}", target, layer, self.look(source, layer)
        )

    def look(self, ngram: Ngram, layer: int) -> Float[Tensor, "J width"]:
        """A copy of the n-gram's rows as they are now."""
        own = rows_of(self.model, self.tokenizer, ngram, layer)
        return self._table(layer).weight.detach()[own].clone()

    def undo(self) -> Edit:
        """Take back the last edit, bit for bit. ValueError where there is none."""
        if not self.edits:
            raise ValueError("undo: got no edit to take back")
        edit = self.edits.pop()
        weight = self._table(edit.layer).weight
        with torch.no_grad():
            weight[edit.rows.to(weight.device)] = edit.before.to(weight)
        return edit

    def save(self, path: str | os.PathLike[str]) -> None:
        """The edits as one safetensors file, so that another process can undo them; whole or not at all."""
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
        """What `save` wrote, but for edits the model does not hold. ValueError for another model's, or changed rows."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                about = json.loads(header["about"]) if header.get("format") == FORMAT else None
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} cannot be read as safetensors that an Editor saved: {error}"
            ) from error
        if about is None or about.get("addresses") != _parts(self.model).addresses.fingerprint():
            raise ValueError(f"{path}: got no edits of this model, expected what its Editor saved")
        self.edits = [
            Edit(what=what, layer=layer, **{name: held[f"{n}.{name}"] for name in _STORED})
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
        table = _parts(self.model).tables[_place(_parts(self.model).config, layer)]
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
        own = torch.tensor(rows_of(self.model, self.tokenizer, ngram, layer))
        weight = self._table(layer).weight
        if values.shape != (len(own), weight.shape[1]) or not values.isfinite().all():
            expected = f"expected finite numbers of shape {(len(own), weight.shape[1])}"
            raise ValueError(f"values: got shape {tuple(values.shape)}, {expected}")
        after, place = values.detach().to(weight), own.to(weight.device)
        edit = Edit(
            what=what, layer=layer, rows=place, before=self.look(ngram, layer), after=after.clone()
        )
        with torch.no_grad():
            weight[place] = after
        self.edits.append(edit)
        return edit
