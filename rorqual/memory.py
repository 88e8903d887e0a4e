"""A model that remembers, and a text or an n-gram -> what it reads, what the gates said, and edits that can be undone.

    reads(text)          the rows that each token reads, and how far each stream trusts them
    rows_of(n-gram)      the heads of that order at its last token: the only rows that depend on it all
    Editor               suppress, overwrite or transplant the rows of an n-gram; undo takes back the last edit

A row is shared by every n-gram that hashes to it: `sharing` tells which of a corpus are touched too.
Conditional Memory via Scalable Lookup, section 6, arXiv:2601.07372.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rorqual.data.tokenizer import Tokenizer
from rorqual.layers.basics import layout
from rorqual.layers.engram import Engram, EngramConfig
from rorqual.model import LanguageModel
from rorqual.storage import DeviceTable

Ngram = str | Sequence[int]  # text that is 2 to N tokens long, or their ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """What one token read. By block: rows [R] (order-major, then head) and gates [S], one a stream."""

    token: str
    id: int
    rows: dict[int, list[int]]
    gates: dict[int, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """One change, and what stood there before. `layer` is a block's index."""

    what: str
    layer: int
    rows: Int[Tensor, " J"]
    before: Float[Tensor, "J width"]


def _config(model: LanguageModel) -> EngramConfig:
    if model.config.engram is None:
        raise ValueError("memory: got a model without Engram, expected one that has it (--model.engram.layers 1)")
    return model.config.engram


@torch.inference_mode()
def rows(model: LanguageModel, ids: Int[Tensor, "B T"]) -> Int[Tensor, "Lm B T R"]:
    """Row ids that a whole sequence reads in every Engram layer."""
    _config(model)
    assert model.addresses is not None
    return model.addresses(ids, layout(ids.shape[0], ids.shape[1], ids.device))


@torch.inference_mode()
def reads(model: LanguageModel, tokenizer: Tokenizer, text: str) -> list[Read]:
    """For each token of a document (its begin id first): what it read, and what the gates said."""
    layers = _config(model).layers
    device = next(model.parameters()).device
    ids = torch.tensor([[tokenizer.begin_id, *tokenizer.encode(text)]], device=device)
    said: dict[int, Tensor] = {}
    hooks = []
    for layer in layers:
        engram = model.blocks[layer].engram
        assert isinstance(engram, Engram)

        def keep(module, args, gates: Tensor, layer: int = layer) -> None:
            said[layer] = gates[0].float().cpu()  # [T, S]

        hooks.append(engram.gate.register_forward_hook(keep))
    try:
        model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    read = rows(model, ids)[:, 0].tolist()  # [Lm, T, R]
    return [
        Read(
            token=tokenizer.token(token),
            id=token,
            rows={layer: read[place][t] for place, layer in enumerate(layers)},
            gates={layer: said[layer][t].tolist() for layer in layers},
        )
        for t, token in enumerate(ids[0].tolist())
    ]


def ids_of(model: LanguageModel, tokenizer: Tokenizer, ngram: Ngram) -> list[int]:
    """The tokens of an n-gram. ValueError where they are not 2 to N."""
    ids = tokenizer.encode(ngram) if isinstance(ngram, str) else list(ngram)
    most = _config(model).ngram
    if not 2 <= len(ids) <= most:
        parts = " ".join(repr(tokenizer.token(token)) for token in ids[:8])
        raise ValueError(f"n-gram: got {len(ids)} tokens ({parts}), expected 2 to {most}")
    return ids


def rows_of(model: LanguageModel, tokenizer: Tokenizer, ngram: Ngram, layer: int) -> list[int]:
    """The rows, one a head, that depend on the whole n-gram: those of its own order at its last token."""
    config, ids = _config(model), ids_of(model, tokenizer, ngram)
    if layer not in config.layers:
        raise ValueError(f"layer: got {layer}, expected a block that remembers: {', '.join(map(str, config.layers))}")
    device = next(model.parameters()).device
    own = rows(model, torch.tensor([ids], device=device))[config.layers.index(layer), 0, -1]
    first = (len(ids) - 2) * config.heads
    return own[first : first + config.heads].tolist()


def next_tokens(model: LanguageModel, tokenizer: Tokenizer, text: str, count: int = 10) -> list[tuple[str, float]]:
    """The likeliest tokens after a text that begins a document, with their probabilities."""
    ids = torch.tensor([[tokenizer.begin_id, *tokenizer.encode(text)]], device=next(model.parameters()).device)
    with torch.inference_mode():
        chances = model.logits(model.hidden(ids)[0][:, -1:])[0, 0, : tokenizer.vocabulary].softmax(-1)
    best = chances.topk(min(count, len(chances)))
    return [(tokenizer.token(i), p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def _ngrams(
    model: LanguageModel, tokenizer: Tokenizer, texts: Iterable[str], layer: int
) -> Iterator[tuple[int, list[int]]]:
    """Every (row, n-gram ids) that a corpus reads in one layer, document by document."""
    config = _config(model)
    device = next(model.parameters()).device
    for text in texts:
        ids = [tokenizer.begin_id, *tokenizer.encode(text)]
        read = rows(model, torch.tensor([ids], device=device))[config.layers.index(layer), 0].tolist()
        for t in range(len(ids)):
            for order in range(2, min(config.ngram, t + 1) + 1):
                for row in read[t][(order - 2) * config.heads : (order - 1) * config.heads]:
                    yield row, ids[t + 1 - order : t + 1]


def popular(
    model: LanguageModel, tokenizer: Tokenizer, texts: Iterable[str], layer: int, count: int = 10
) -> list[tuple[int, int, str]]:
    """The rows that a corpus reads most in one layer: (row, reads, the n-gram that reads it most)."""
    reads_of: Counter[int] = Counter()
    readers: dict[int, Counter[tuple[int, ...]]] = {}
    for row, ids in _ngrams(model, tokenizer, texts, layer):
        reads_of[row] += 1
        readers.setdefault(row, Counter())[tuple(ids)] += 1
    return [
        (row, number, tokenizer.decode(readers[row].most_common(1)[0][0]))
        for row, number in reads_of.most_common(count)
    ]


def sharing(
    model: LanguageModel, tokenizer: Tokenizer, ngram: Ngram, texts: Iterable[str], layer: int
) -> dict[str, int]:
    """Other n-grams of a corpus that read some of this one's rows: how many rows each shares, most first."""
    own, ids = set(rows_of(model, tokenizer, ngram, layer)), ids_of(model, tokenizer, ngram)
    assert model.addresses is not None
    canonical = model.addresses.canonical_map.tolist()
    itself = [canonical[token] for token in ids]
    shared: dict[tuple[int, ...], set[int]] = {}
    for row, other in _ngrams(model, tokenizer, texts, layer):
        if row in own and [canonical[token] for token in other] != itself:
            shared.setdefault(tuple(other), set()).add(row)
    ranked = sorted(shared.items(), key=lambda item: -len(item[1]))
    return {tokenizer.decode(other): len(found) for other, found in ranked}


class Editor:
    """Edits a model's rows in place and remembers how to take each edit back, last first."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        _config(model)
        self.model, self.tokenizer = model, tokenizer
        self.edits: list[Edit] = []

    def suppress(self, ngram: Ngram, layer: int) -> Edit:
        """Its rows become zero: recalled, they say nothing."""
        read = self.look(ngram, layer)
        return self._write(f"suppress {ngram!r}", ngram, layer, torch.zeros_like(read))

    def overwrite(self, ngram: Ngram, layer: int, values: Float[Tensor, "J width"]) -> Edit:
        """Its rows become these, one a head. ValueError for another shape."""
        return self._write(f"overwrite {ngram!r}", ngram, layer, values)

    def transplant(self, source: Ngram, target: Ngram, layer: int) -> Edit:
        """The target's rows become the source's, head by head. Both must be n-grams of one order."""
        orders = [len(ids_of(self.model, self.tokenizer, ngram)) for ngram in (source, target)]
        if orders[0] != orders[1]:
            raise ValueError(f"transplant: got n-grams of {orders[0]} and {orders[1]} tokens, expected equally many")
        return self._write(f"transplant {source!r} to {target!r}", target, layer, self.look(source, layer))

    def look(self, ngram: Ngram, layer: int) -> Float[Tensor, "J width"]:
        """A copy of the n-gram's rows as they are now."""
        own = rows_of(self.model, self.tokenizer, ngram, layer)
        return self._table(layer).weight.detach()[own].clone()

    def undo(self) -> Edit:
        """Take back the last edit, bit for bit. ValueError where there is none."""
        if not self.edits:
            raise ValueError("undo: got no edit to take back")
        edit = self.edits.pop()
        with torch.no_grad():
            self._table(edit.layer).weight[edit.rows] = edit.before
        return edit

    def _table(self, layer: int) -> DeviceTable:
        table = self.model.tables[_config(self.model).layers.index(layer)]
        if not isinstance(table, DeviceTable):
            raise ValueError(f"memory: got rows in a {type(table).__name__}, expected them on the device to edit them")
        return table

    def _write(self, what: str, ngram: Ngram, layer: int, values: Tensor) -> Edit:
        own = torch.tensor(rows_of(self.model, self.tokenizer, ngram, layer))
        weight = self._table(layer).weight
        if values.shape != (len(own), weight.shape[1]):
            raise ValueError(f"values: got shape {tuple(values.shape)}, expected {(len(own), weight.shape[1])}")
        edit = Edit(what=what, layer=layer, rows=own.to(weight.device), before=self.look(ngram, layer))
        with torch.no_grad():
            weight[edit.rows] = values.to(weight)
        self.edits.append(edit)
        return edit
