"""Tests that every attention gives a token the same result however it reaches the model.

The expected result of a token is that of its document alone, in one call without a cache. Documents
may be packed and padded, and tokens may come in pieces, in rows of different lengths, and after the
rows of a cache were cropped, reordered or joined.

What one kind computes is tested in the file that is named after it.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rorqual import kernels
from rorqual.layers import delta_net, sparse, tiles
from rorqual.layers.attention import GQAConfig, MLAConfig
from rorqual.layers.csa import CSAConfig
from rorqual.layers.csa2 import CSA2Config
from rorqual.layers.delta_net import DeltaNetConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.moba import MoBAConfig
from rorqual.layers.nsa import NSAConfig
from rorqual.layers.qsa import QSAConfig
from rorqual.layers.rope import RopeConfig, YarnConfig
from rorqual.model import LanguageModel, ModelConfig

VOCAB_SIZE = 40
TILE = 20  # more than the few new tokens that are read in place, so that both ways are met
EXACTNESS = {torch.float64: 1e-10, torch.float32: 2e-5}

GQA = GQAConfig(heads=4, kv_heads=2, head_dim=8, value_dim=6)
NSA = NSAConfig(block=4, stride=2, select_block=4, top_k=3, window=5)
# Small latents are absorbed and gathered as soon as there is a cache; large ones are expanded and
# masked, until there are many keys.
SMALL_LATENT = MLAConfig(heads=3, kv_lora_rank=4, nope_dim=8, rope_dim=4, value_dim=13)
LARGE_LATENT = MLAConfig(
    heads=3, q_lora_rank=10, kv_lora_rank=32, nope_dim=4, rope_dim=4, value_dim=6
)
DSA = DSAConfig(heads=3, dim=8, top_k=5)
CSA = CSAConfig(
    heads=4,
    head_dim=8,
    rope_dim=4,
    q_lora_rank=10,
    groups=2,
    o_lora_rank=5,
    window=6,
    ratio=3,
    heavy_ratio=5,
    index_heads=3,
    index_dim=6,
    top_k=3,
    compress_rope=RopeConfig(base=80.0, yarn=YarnConfig(factor=4.0, original_length=16)),
)
# A source of each ratio, blocks that select anew and that reuse, one of coarse blocks, a window.
CSA2 = CSA2Config(
    ratios=(2, 1, 1, 0),
    kv_sources=(0, 1),
    index_sources=(0, 1, 2),
    candidate_source=1,
    candidate_block=2,
    candidate_blocks=3,
)
GATED = GQAConfig(
    heads=4, kv_heads=2, head_dim=8, value_dim=6, qk_norm=True, centred=True, rope_dim=4,
    output_gate=True,
)  # fmt: skip
DELTA = DeltaNetConfig(key_heads=2, value_heads=4, key_dim=6, value_dim=5, kernel=3, layers=(0,))
KINDS = {
    "mla": {"mla": SMALL_LATENT},
    "mla-large": {"mla": LARGE_LATENT},
    "gqa": {"gqa": GQA},
    "gqa-window": {"gqa": dataclasses.replace(GQA, window=6, sinks=True, qk_norm=True)},
    "gqa-sinks": {"gqa": dataclasses.replace(GQA, sinks=True)},
    "nsa": {"gqa": GQA, "nsa": NSA},
    "nsa-pieces": {
        "gqa": dataclasses.replace(GQA, kv_heads=1),
        "nsa": NSAConfig(block=6, stride=3, select_block=3, top_k=4, window=2),
    },
    "nsa-tile": {"gqa": GQA, "nsa": dataclasses.replace(NSA, choice="tile")},
    "moba": {"gqa": GQA, "moba": MoBAConfig(block=4, top_k=2)},
    "moba-tile": {"gqa": GQA, "moba": MoBAConfig(block=8, top_k=2, choice="tile")},
    "moba-full-last": {
        "gqa": dataclasses.replace(GQA, kv_heads=4),
        "moba": MoBAConfig(block=5, top_k=3, choice="tile", full_layers=1),
        "layers": 2,
    },
    "dsa": {"mla": SMALL_LATENT, "dsa": DSA},
    "dsa-large": {"mla": LARGE_LATENT, "dsa": dataclasses.replace(DSA, top_k=7)},
    "csa-window": {"csa": CSA},
    "csa": {"csa": dataclasses.replace(CSA, kinds=("csa",))},
    "csa-overlap": {"csa": dataclasses.replace(CSA, kinds=("csa",), ratio=1, top_k=7, window=1)},
    "hca": {"csa": dataclasses.replace(CSA, kinds=("hca",))},
    "csa2": {"csa": CSA, "csa2": CSA2, "layers": 4},
    "csa2-reuse": {
        "csa": dataclasses.replace(CSA, top_k=5, window=1),
        "csa2": CSA2Config(ratios=(3, 3), kv_sources=(0,), index_sources=(0,)),
        "layers": 2,
    },
    "csa2-rounded": {
        "csa": CSA,
        "csa2": CSA2Config(
            ratios=(2,), kv_sources=(0,), index_sources=(0,), cache_formats="published"
        ),
    },
    "dsa-shared": {
        "mla": SMALL_LATENT,
        "dsa": dataclasses.replace(DSA, interleaved=True, shared=(1, 2)),
        "layers": 3,
    },
    "dsa-shared-large": {
        "mla": LARGE_LATENT,
        "dsa": dataclasses.replace(DSA, top_k=7, shared=(1,)),
        "layers": 2,
    },
    # So many heads that no key scores 0: which of equal keys are selected depends on the call.
    "dsa-topk": {
        "mla": SMALL_LATENT,
        "dsa": dataclasses.replace(DSA, heads=24, ties="topk", shared=(1,)),
        "layers": 2,
    },
    "gqa-gated": {"gqa": GATED},
    "qsa": {"gqa": GATED, "qsa": QSAConfig(heads=3, dim=8, block=4, budget=12)},
    "qsa-odd": {
        "gqa": dataclasses.replace(GATED, kv_heads=1, rope_dim=None, centred=False, bias=True),
        "qsa": QSAConfig(heads=1, dim=10, block=3, budget=9),
    },
    "delta": {"gqa": GQA, "delta": DELTA},
    "delta-chunks": {
        "gqa": GQA,
        "delta": dataclasses.replace(DELTA, key_heads=1, value_heads=3, kernel=1, gate="sigmoid"),
    },
}
# One index head scores half of all keys 0, and of equal ones those of torch.topk are selected.
TIED = {
    "dsa": {"mla": SMALL_LATENT, "dsa": DSAConfig(heads=1, dim=8, top_k=4, ties="topk")},
    "csa": {
        "csa": dataclasses.replace(
            CSA, kinds=("csa", "csa"), ratio=2, index_heads=1, top_k=3, ties="topk"
        )
    },
    "csa2": {
        "csa": dataclasses.replace(CSA, index_heads=1, top_k=4, ties="topk"),
        "csa2": CSA2Config(ratios=(2, 2), kv_sources=(0,), index_sources=(0, 1)),
    },
    "csa2-coarse": {
        "csa": dataclasses.replace(CSA, index_heads=1, top_k=3, ties="topk"),
        "csa2": CSA2Config(
            ratios=(1, 1),
            kv_sources=(0,),
            index_sources=(0, 1),
            candidate_source=0,
            candidate_block=2,
            candidate_blocks=4,
        ),
    },
    "qsa": {"gqa": GATED, "qsa": QSAConfig(heads=1, dim=8, block=2, budget=6)},
}
# How a model computes: its dtype, and RORQUAL_KERNELS. Every kernel computes in float32.
MODES = {
    "float64": (torch.float64, ""),
    "kernels": (torch.float32, ""),
    "reference": (torch.float32, "reference"),
}
SPARSE = [
    kind for kind, parts in KINDS.items() if not {"nsa", "moba", "dsa", "qsa"}.isdisjoint(parts)
]

pytestmark = [pytest.mark.nsa, pytest.mark.dsa]
every_kind = pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param(kind, mode, marks=pytest.mark.slow if mode != quick else ())
        for kind in KINDS
        for quick in ["kernels" if kind in SPARSE else "float64"]
        for mode in (MODES if kind in SPARSE else [quick])
    ],
    indirect=["mode"],
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes tiles and chunks small, so that a few tokens fill several."""
    for module in (sparse, tiles):
        monkeypatch.setattr(module, "TILE", TILE)
    monkeypatch.setattr(delta_net, "CHUNK", 8)


@pytest.fixture
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of the model, after the choice of kernels was set."""
    dtype, wanted = MODES[request.param]
    monkeypatch.setenv(kernels.VARIABLE, wanted)
    return dtype


@functools.cache
def build(kind: str, dtype: torch.dtype) -> LanguageModel:
    """Returns a small model whose attention changes its results much."""
    parts = {**KINDS, **{f"tied {name}": {"layers": 2, **of} for name, of in TIED.items()}}[kind]
    sizes = {"vocab_size": VOCAB_SIZE, "dim": 16, "layers": 1, "dense_width": 12, "mla": None}
    model = LanguageModel(ModelConfig(rope=RopeConfig(base=50.0), **sizes | parts))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model.to(dtype).requires_grad_(False)


def close(result: Tensor, expected: Tensor) -> None:
    scale = max(1.0, expected.abs().max().item())
    tolerance = EXACTNESS[expected.dtype] * scale
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=0)


@functools.lru_cache(maxsize=64)
def alone(model: LanguageModel, ids: tuple[int, ...]) -> Tensor:
    """Returns the hidden states [T, D] of one document in one call."""
    return model.hidden(torch.tensor([ids]))[0][0]


def drawn(*shape: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, shape)


class Rows:
    """The sequences of one cache, and the results that their tokens had.

    `check` compares these with the results of each document alone, as removing tokens does.
    """

    def __init__(self, model: LanguageModel, batch: int):
        self.model, self.cache = model, model.new_cache(batch, capacity=8)
        self.ids: list[list[int]] = [[] for _ in range(batch)]
        self.document_ids: list[list[int]] = [[] for _ in range(batch)]
        self.results: list[dict[int, Tensor]] = [{} for _ in range(batch)]

    def append(
        self, *counts: int, begins: Sequence[Sequence[int]] | None = None, last: bool = False
    ) -> Tensor:
        """Gives each row so many new tokens, or all of them as many; returns their results.

        `begins` are the new tokens of each row that begin a document; without it no documents are
        given, so that the last ones go on.
        """
        batch = len(self.ids)
        counts = counts * batch if len(counts) == 1 else counts
        ids = drawn(batch, max(counts))
        document_ids = torch.zeros_like(ids)
        for row, ours in enumerate(self.document_ids):
            document = ours[-1] if ours else 0
            for t in range(ids.shape[1]):
                document += begins is not None and t in begins[row] and (t > 0 or bool(ours))
                document_ids[row, t] = document
        result, _ = self.model.hidden(
            ids,
            document_ids=None if begins is None else document_ids,
            lengths=None if min(counts) == max(counts) else counts,
            cache=self.cache,
            last=last,
        )
        assert result.isfinite().all()
        for row, count in enumerate(counts):
            self.ids[row] += ids[row, :count].tolist()
            self.document_ids[row] += document_ids[row, :count].tolist()
            wanted = range(count - 1, count) if last else range(count)
            start = len(self.ids[row]) - count
            self.results[row] |= {start + t: result[row, 0 if last else t] for t in wanted}
        assert self.cache.lengths == tuple(map(len, self.ids))
        return torch.cat([result[row, : 1 if last else count] for row, count in enumerate(counts)])

    def check(self) -> None:
        for ids, document_ids, results in zip(
            self.ids, self.document_ids, self.results, strict=True
        ):
            if results:
                close(
                    torch.stack(list(results.values())),
                    self.expected(ids, document_ids)[list(results)],
                )

    def expected(self, ids: list[int], document_ids: list[int]) -> Tensor:
        ends = [t for t in range(1, len(ids)) if document_ids[t] != document_ids[t - 1]]
        spans = zip([0, *ends], [*ends, len(ids)], strict=True)
        return torch.cat([alone(self.model, tuple(ids[start:end])) for start, end in spans])

    def crop(self, *counts: int) -> None:
        self.check()
        self.cache.crop(counts[0] if len(counts) == 1 else counts)
        counts = counts * len(self.ids) if len(counts) == 1 else counts
        for row, count in enumerate(counts):
            length = len(self.ids[row]) - count
            del self.ids[row][length:], self.document_ids[row][length:]
            self.results[row] = {t: x for t, x in self.results[row].items() if t < length}

    def select(self, *index: int) -> None:
        missing = set(range(len(self.ids))) - set(index)
        if missing:
            self.check()
        self.cache.select(torch.tensor(index))
        self.ids = [list(self.ids[row]) for row in index]
        self.document_ids = [list(self.document_ids[row]) for row in index]
        self.results = [dict(self.results[row]) for row in index]

    def join(self, other: "Rows") -> None:
        self.cache.join(other.cache)
        self.ids += other.ids
        self.document_ids += other.document_ids
        self.results += other.results


@every_kind
def test_no_token_sees_what_comes_after_it(kind: str, mode: torch.dtype) -> None:
    """Row t has other tokens from t on, and a result of its own from there."""
    model = build(kind, mode)
    time = 2 * TILE + 3
    ids = drawn(1, time).expand(time, -1)
    later = torch.arange(time) >= torch.arange(time)[:, None]
    before = model.hidden(ids)[0]
    after = model.hidden((ids + later) % VOCAB_SIZE)[0]
    for t in range(1, time):
        close(after[t, :t], before[t, :t])
        assert (after[t, t] - before[t, t]).abs().max() > 1e-2


PACKED = ([7, 1, 19, 4, 24], [2, 30, 3, 20], [TILE, TILE, 15])


def packed(lengths: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Returns ids and documents [B, T] of rows that are packed differently."""
    document_ids = [
        torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths
    ]
    return drawn(len(lengths), sum(lengths[0])), torch.stack(document_ids)


@every_kind
def test_packed_documents_are_as_if_alone(kind: str, mode: torch.dtype) -> None:
    model, (ids, document_ids) = build(kind, mode), packed(PACKED)
    result = model.hidden(ids, document_ids=document_ids)[0]
    for row, lengths in enumerate(PACKED):
        parts = [alone(model, tuple(piece.tolist())) for piece in ids[row].split(lengths)]
        close(result[row], torch.cat(parts))


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("way", ["packed", "padded", "cached"])
def test_equal_scores_are_resolved_as_if_alone(way: str, kind: str) -> None:
    """Which of them torch.topk takes depends on how many there are: a document's alone count."""
    model = build(f"tied {kind}", torch.float64)
    if way == "packed":
        ids = drawn(2, 33)
        document_ids = torch.arange(33).expand(2, -1) // 13
        result = model.hidden(ids, document_ids=document_ids)[0]
        for run in (slice(13), slice(13, 26), slice(26, 33)):
            close(result[:, run], model.hidden(ids[:, run])[0])
        return
    texts: list[list[int]] = [[], []]
    cache = model.new_cache(2) if way == "cached" else None
    for counts in [(19, 33)] if cache is None else [(9, 17), (10, 16), (1, 1), (1, 1)]:
        ids = drawn(2, max(counts))
        result = model.hidden(ids, lengths=counts, cache=cache)[0]
        for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
            text += ids[row, :count].tolist()
            expected = model.hidden(torch.tensor([text]))[0][0, -count:]
            close(result[row, :count], expected)


@every_kind
def test_padding_changes_nothing(kind: str, mode: torch.dtype, poisoned: None) -> None:
    """Rows are padded at the end, with and without documents."""
    model = build(kind, mode)
    lengths = [55, 1, 18, 40]
    ids, document_ids = packed([*PACKED, PACKED[0]])
    for expected in ({}, {"document_ids": document_ids}):
        result = model.hidden(ids, lengths=torch.tensor(lengths), **expected)[0]
        assert result.isfinite().all()
        for row, length in enumerate(lengths):
            some = {name: x[row : row + 1, :length] for name, x in expected.items()}
            close(result[row, :length], model.hidden(ids[row : row + 1, :length], **some)[0][0])


@every_kind
@pytest.mark.parametrize(
    "pieces",
    [[13] + [1] * 11, [5, 17, 1, 3, 16, 2, TILE], [TILE, TILE - 1, 2, 1, 45]],
    ids=str,
)
def test_pieces_are_one_call(kind: str, mode: torch.dtype, pieces: list[int]) -> None:
    model = build(kind, mode)
    ids = drawn(2, sum(pieces))
    cache = model.new_cache(2, capacity=8)
    item = [model.hidden(piece, cache=cache)[0] for piece in ids.split(pieces, dim=1)]
    close(torch.cat(item, dim=1), model.hidden(ids)[0])


def grow(rows: Rows) -> Tensor:
    """Appends few and many tokens to three rows of different lengths; returns all results."""
    prompt = 9, 4, TILE + 2
    later = (1,), (1,), (3,), (1, 3, 2), (1,), (16,), (2, 17, 5), (1,), (25,), (1, 40, 9), (1,)
    return torch.cat([rows.append(*counts) for counts in (prompt, *later)])


@every_kind
def test_sequences_of_any_length_are_as_if_alone(
    kind: str, mode: torch.dtype, poisoned: None
) -> None:
    rows = Rows(build(kind, mode), 3)
    grow(rows)
    rows.check()


@every_kind
def test_many_tokens_come_after_sequences_of_any_length(
    kind: str, mode: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a tile of 128 tokens, and more queries than are processed at a time."""
    for module in (sparse, tiles):
        monkeypatch.setattr(module, "TILE", 128)
    monkeypatch.setattr(sparse, "QUERIES", 100)
    rows = Rows(build(kind, mode), 2)
    rows.append(3, 130)
    rows.append(1)
    rows.append(131)
    rows.append(150, 20)
    rows.append(2)
    rows.check()


@every_kind
def test_sequences_become_equally_long_and_unequal_again(kind: str, mode: torch.dtype) -> None:
    rows = Rows(build(kind, mode), 2)
    rows.append(11, 5)
    rows.append(2, 8)
    rows.append(1)
    rows.append(18)
    rows.append(TILE + 1)
    rows.append(1, 5)
    rows.append(1)
    rows.crop(0, 4)
    rows.append(3)
    rows.check()


@every_kind
def test_beams(kind: str, mode: torch.dtype) -> None:
    """Rows are repeated, reordered and left out."""
    rows = Rows(build(kind, mode), 2)
    rows.append(19, 6)
    for index in ((1, 0, 1), (0, 2, 0, 1), (3,), (0, 0)):
        rows.select(*index)
        rows.append(1)
        rows.append(*range(1, len(index) + 1))
        rows.append(17)
    rows.check()


@every_kind
def test_batches_join(kind: str, mode: torch.dtype) -> None:
    """Rows of one cache go on beside those of another, which was longer or shorter."""
    model = build(kind, mode)
    rows = Rows(model, 2)
    rows.append(12)
    for prompt in ((5,), (30,), (1, TILE + 7)):
        other = Rows(model, len(prompt))
        other.append(*prompt)
        other.append(1)
        rows.join(other)
        rows.append(1)
        rows.append(3)
        rows.append(*range(1, len(rows.ids) + 1))
    rows.check()


def test_a_join_that_would_lose_tokens_changes_nothing() -> None:
    """An empty cache has no keys yet, and documents of two caches have the same numbers."""
    model = build("nsa-tile", torch.float64)
    rows = Rows(model, 1)
    packed_rows = Rows(model, 1)
    rows.append(7)
    packed_rows.append(5, begins=[[2]])
    for other, reason in ((packed_rows, "packed documents"), (Rows(model, 1), "7 and 0 tokens")):
        with pytest.raises(ValueError, match=reason):
            rows.cache.join(other.cache)
    with pytest.raises(ValueError, match="0 and 7 tokens"):
        Rows(model, 1).cache.join(rows.cache)
    rows.append(3)
    rows.check()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_emptied_cache_takes_another_batch(kind: str, rows: int) -> None:
    """A short prompt, of which no block is complete, comes after a longer one of other rows.

    Nothing of the rows before is read, not even multiplied by 0.
    """
    model = build(kind, torch.float32)
    ids = torch.arange(1, 31).expand(3, -1) % 7 + torch.arange(3)[:, None]
    calls = (ids[:rows, :2], [1, 2, 2][:rows]), (ids[:rows, :1], None)
    for crops, (prompts, lengths) in itertools.product((False, True), calls):
        cache = model.new_cache(2)
        with torch.no_grad():
            model.hidden(ids[:2], cache=cache)
            if crops:
                cache.crop(cache.lengths)
            else:
                cache.reset()
            first = model.hidden(prompts, lengths=lengths, cache=cache)[0][:, :1]
            second = model.hidden(ids[:rows, 1:2], cache=cache)[0]
            expected = model.hidden(ids[:rows, :2])[0]
        close(first, expected[:, :1])
        close(second[0], expected[0, 1:])


@every_kind
def test_forgotten_tokens_leave_nothing_behind(kind: str, mode: torch.dtype) -> None:
    """Other tokens follow where some were removed, of all rows or of each."""
    rows = Rows(build(kind, mode), 3)
    rows.append(8, 23, 15)
    rows.append(4)
    rows.crop(4)
    rows.append(1)
    rows.append(17, 2, 6)
    rows.crop(19, 0, 7)
    rows.append(2)
    rows.crop(5)
    rows.append(TILE)
    rows.crop(*map(len, rows.ids[:1]), 20, 1)
    rows.append(1)
    rows.append(5)
    rows.cache.reset()
    rows.ids = [[], [], []]
    rows.document_ids = [[], [], []]
    rows.results = [{}, {}, {}]
    rows.append(6)
    rows.append(1)
    rows.check()


@every_kind
def test_the_last_token_alone_gets_what_it_gets_among_all(kind: str, mode: torch.dtype) -> None:
    """A prompt may end with `last`, padded and behind a cache, and the rows go on."""
    for before, prompt in (
        ((), (33,)),
        ((), (2, 18, 7)),
        ((6,), (1,)),
        ((6,), (2, 18, 7)),
        ((6, 31, 2), (19,)),
        ((6, 31, 2), (2, 18, 7)),
    ):
        rows = Rows(build(kind, mode), 3)
        if before:
            rows.append(*before)
        rows.append(*prompt, last=True)
        rows.append(1)
        rows.check()


@every_kind
def test_packed_documents_go_on_behind_a_cache(kind: str, mode: torch.dtype) -> None:
    """Documents begin in any call, also when none were given at first; without ids they go on."""
    for first in ([[0, 3], [], [5, 12, 13]], None):
        rows = Rows(build(kind, mode), 3)
        rows.append(14, begins=first)
        rows.append(1)
        rows.append(4, begins=[[], [0], [2]])
        rows.append(1, begins=[[0], [], []])
        rows.append(1)
        rows.append(26, begins=[[20, 25], [], [1]])
        rows.append(3)
        rows.append(2, last=True)
        rows.check()


@every_kind
def test_packed_sequences_may_have_any_length(kind: str, mode: torch.dtype) -> None:
    rows = Rows(build(kind, mode), 3)
    rows.append(5, 19, 11, begins=[[3], [7, 8], []])
    rows.append(1)
    rows.append(3, 1, 2, begins=[[1], [0], []])
    rows.append(22, begins=[[], [2], [21]])
    rows.crop(3, 0, 15)
    rows.select(2, 0, 2)
    rows.append(6, 2, 18, begins=[[0], [1], []])
    rows.append(4, 1, 2, last=True)
    rows.append(1)
    rows.check()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_packed_sequences_are_those_of_the_parts(kind: str, poisoned: None) -> None:
    model = copy.deepcopy(build(kind, torch.float64)).requires_grad_()
    lengths = [50, 55, 31]
    ids, document_ids = packed(PACKED)
    pull = torch.randn(*ids.shape, model.config.dim, dtype=torch.float64)
    pull[torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None]] = 0.0
    whole = (model.hidden(ids, document_ids=document_ids, lengths=lengths)[0] * pull).sum()
    parts = torch.zeros((), dtype=torch.float64)
    for row, sizes in enumerate(PACKED):
        for piece, ours in zip(ids[row].split(sizes), pull[row].split(sizes), strict=True):
            parts = parts + (model.hidden(piece[None])[0][0] * ours).sum()
    close(whole, parts)
    names, leaves = zip(*model.named_parameters(), strict=True)
    item, expected = (torch.autograd.grad(x, leaves, allow_unused=True) for x in (whole, parts))
    for name, one, other in zip(names, item, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            close(one, other)


@pytest.mark.parametrize("kind", SPARSE)
def test_kernels_and_references_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for wanted in ("", "reference"):
        monkeypatch.setenv(kernels.VARIABLE, wanted)
        torch.manual_seed(1)
        results.append(grow(Rows(build(kind, torch.float32), 3)))
    close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near(kind: str) -> None:
    """In bfloat16 all through and under autocast, with rows that grow in one cache."""
    expected = grow(Rows(build(kind, torch.float64), 3))
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = grow(Rows(build(kind, dtype), 3))
        # A few tokens select other keys than in float64.
        errors = (result - expected).norm(dim=-1) / expected.norm(dim=-1)
        # and every block adds to the error.
        assert errors.median() < 0.05 * KINDS[kind].get("layers", 1)


def follow(model: LanguageModel, data: st.DataObject) -> None:
    """Rows grow, shrink, are reordered and joined in any order, at most four of 60 tokens."""
    torch.manual_seed(0)
    rows = Rows(model, data.draw(st.integers(1, 3)))
    for _ in range(data.draw(st.integers(3, 7))):
        lengths = [len(ids) for ids in rows.ids]
        step = data.draw(st.sampled_from(["append", "append", "crop", "select", "join"]))
        if step == "append" and max(lengths) < 60:
            largest = data.draw(st.sampled_from([1, 4, 30]))
            rows.append(*(data.draw(st.integers(1, min(largest, 60 - n))) for n in lengths))
        elif step == "crop":
            rows.crop(*(data.draw(st.integers(0, n)) for n in lengths))
        elif step == "select":
            index = st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4)
            rows.select(*data.draw(index))
        elif step == "join" and len(lengths) < 4 and any(lengths):
            other = Rows(model, 1)
            other.append(data.draw(st.integers(1, 30)))
            rows.join(other)
    rows.check()


@every_kind
@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    # `mode` is the same for all examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_schedule_is_as_if_alone(kind: str, mode: torch.dtype, data: st.DataObject) -> None:
    follow(build(kind, mode), data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_many_schedules_are_as_if_alone(kind: str, data: st.DataObject) -> None:
    follow(build(kind, torch.float32 if kind in SPARSE else torch.float64), data)


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nsa", "moba", "csa", "hca", "csa2", "qsa", "tied qsa", "delta"])
def test_a_whole_attention_compiles_as_one_graph(kind):
    """Logits of sequences, and the loss of packed documents with its gradients, are as without.

    Packed documents have as many compressed entries as their lengths say, which a compiler does not
    know: csa and hca are one graph for whole sequences only.
    """
    model = copy.deepcopy(build(kind, torch.float32)).requires_grad_()
    ids = drawn(2, 23)
    document_ids = None if kind in ("csa", "hca") else torch.arange(23).expand(2, -1) // 11

    def loss(ids):
        return model.loss(ids, ids, document_ids=document_ids).total

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda ids: model(ids), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids), model(ids), atol=2e-5, rtol=2e-5)
    model.train()
    torch._dynamo.reset()
    results = []
    # aot_eager expects other strides of softplus_backward, which this decomposes as inductor does.
    backend = "aot_eager_decomp_partition" if kind == "delta" else "aot_eager"
    for function in (torch.compile(loss, fullgraph=True, backend=backend), loss):
        model.zero_grad()
        total = function(ids)
        total.backward()
        results.append((total, {name: each.grad for name, each in model.named_parameters()}))
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)
