"""Tests the whole model: cache, documents, training of every part, initial values and losses."""

import contextlib
import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from rorqual.layers.attention import GQAConfig, MLAConfig
from rorqual.layers.context import context
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig, Streams
from rorqual.layers.moba import MoBAConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.nsa import NSAConfig
from rorqual.layers.router import RouterConfig
from rorqual.model import IGNORED, LanguageModel, ModelConfig

BASE = ModelConfig(
    vocab_size=61,
    dim=16,
    layers=3,
    dense_width=20,
    mla=MLAConfig(heads=2, kv_lora_rank=8, nope_dim=4, rope_dim=4, value_dim=6),
    moe=MoEConfig(routed=6, active=2, shared=1, width=8, first_dense=1),
    engram=EngramConfig(layers=(0, 2), rows_per_head=(40, 50), heads=2, head_dim=4),
    hyper=HyperConfig(streams=3),
    mtp=MTPConfig(depth=2),
    init_std=0.3,
)
GQA = replace(BASE, mla=None, gqa=GQAConfig(heads=4, kv_heads=2, head_dim=4))
VARIANTS = {
    "everything": BASE,
    "plain": replace(BASE, moe=None, engram=None, hyper=None, mtp=None),
    "tied": replace(BASE, tied=True),
    "q-lora": replace(BASE, mla=replace(BASE.mla, q_lora_rank=6)),
    "single-pass": replace(BASE, hyper=HyperConfig(streams=2, kind="single_pass")),
    "hc": replace(BASE, hyper=HyperConfig(streams=2, kind="hc")),
    "gqa": GQA,
    "window": replace(GQA, gqa=replace(GQA.gqa, window=4, sinks=True)),
    "nsa": replace(GQA, nsa=NSAConfig(block=4, stride=2, select_block=4, top_k=3, window=5)),
    "moba": replace(GQA, moba=MoBAConfig(block=4, top_k=2)),
    "dsa": replace(BASE, dsa=DSAConfig(heads=2, dim=8, top_k=6)),
}


def _model(name: str) -> LanguageModel:
    model = LanguageModel(VARIANTS[name], seed=3).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".conv"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def _ids(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, BASE.vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="module", params=["everything", "plain", "single-pass", "hc"])
def precise(request):
    """Returns a model in float64; every attention is tested in layers/test_attention_kinds.py.

    In float32 logits are off by 2e-5 in one forward pass already, because norms of small vectors
    enlarge rounding errors; here the tolerance is for the rounding of the logits themselves.
    """
    return _model(request.param).double()


@torch.no_grad()
def test_token_by_token_equals_one_forward(precise):
    model = precise
    ids = _ids(2, 13)
    cache = model.new_cache(2, capacity=4)
    steps = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(13)], dim=1)
    assert torch.allclose(steps, model(ids), atol=2e-6)
    assert cache.length == 13


@torch.no_grad()
def test_chunks_crop_and_reorder_equal_one_forward(precise):
    model = precise
    ids = _ids(3, 15)
    cache = model.new_cache(3)
    model(ids[:, :5], cache=cache)
    model(_ids(3, 4, seed=9), cache=cache)
    cache.crop(4)
    cache.select(torch.tensor([2, 0]))
    rest = model(ids[[2, 0], 5:], cache=cache)
    assert torch.allclose(rest, model(ids[[2, 0]])[:, 5:], atol=2e-6)
    cache.reset()
    assert torch.allclose(model(ids[:2], cache=cache), model(ids[:2]), atol=2e-6)


@torch.no_grad()
def test_padding_is_invisible(precise):
    model = precise
    ids = _ids(1, 9)
    padded = torch.cat([ids[:, :5], torch.zeros(1, 4, dtype=torch.long)], 1)
    assert torch.allclose(model(padded, lengths=[5])[:, :5], model(ids[:, :5]), atol=2e-6)
    cache = model.new_cache(1)
    model(padded, lengths=[5], cache=cache)
    assert cache.lengths == (5,)
    assert torch.allclose(model(ids[:, 5:], cache=cache), model(ids)[:, 5:], atol=2e-6)


@pytest.mark.parametrize("lengths", [[-1, 3], [3], [4, 3], [3, 3, 3]])
def test_lengths_that_are_none_are_refused(lengths):
    model = LanguageModel(ModelConfig(vocab_size=WORDS, dim=8, layers=1, dense_width=8))
    with pytest.raises(ValueError, match=r"lengths: got .*, expected 2 numbers .* from 0 to 3"):
        model(torch.ones(2, 3, dtype=torch.long), lengths=lengths)


@torch.no_grad()
def test_the_last_position_alone_is_that_of_all(precise):
    model = precise
    ids = _ids(2, 11)
    cache = model.new_cache(2)
    whole = model.new_cache(2)
    for lengths in (None, [8, 11]):
        cache.reset()
        whole.reset()
        last = model.hidden(ids, cache=cache, last=True, lengths=lengths)[0]
        assert last.shape[1] == 1
        expected = model.hidden(ids, cache=whole, lengths=lengths)[0]
        places = torch.tensor(lengths or [11, 11]) - 1
        assert torch.allclose(last[:, 0], expected[torch.arange(2), places], atol=2e-6)
        assert torch.allclose(
            model(ids[:, :1], cache=cache), model(ids[:, :1], cache=whole), atol=2e-6
        )


@torch.no_grad()
def test_packed_documents_never_see_each_other(precise):
    model = precise
    first = _ids(1, 6)
    second = _ids(1, 8, seed=1)
    packed = torch.cat([first, second], 1)
    document_ids = torch.tensor([[4] * 6 + [5] * 8])
    together = model(packed, document_ids=document_ids)
    assert torch.allclose(together[:, :6], model(first), atol=2e-6)
    assert torch.allclose(together[:, 6:], model(second), atol=2e-6)


@torch.no_grad()
def test_the_future_is_unseen(precise):
    ids = _ids(1, 12)
    other = ids.clone()
    other[0, 8] = (other[0, 8] + 1) % BASE.vocab_size
    changed = (precise(ids) - precise(other)).abs().amax(-1)[0]
    assert (changed[:8] < 1e-6).all() and changed[8] > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_learns(name):
    model = LanguageModel(VARIANTS[name], seed=0).train()
    ids = _ids(4, 33)
    model.loss(ids[:, :-1], ids[:, 1:]).total.backward()
    silent = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad.to_dense()).all()
    ]
    assert silent == []


def test_the_same_seed_is_the_same_model_and_the_callers_randomness_is_untouched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (LanguageModel(BASE, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_initial_values_are_the_tables():
    model = LanguageModel(replace(BASE, vocab_size=500, init_std=0.02), seed=0)
    values = dict(model.named_parameters())
    assert values["embed.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert values["blocks.1.ffn.experts.gate_up"].std().item() == pytest.approx(0.02, rel=0.1)
    assert values["tables.0.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert all((p == 0).all() for n, p in values.items() if n.endswith(".conv"))
    assert all(
        (p == 1).all()
        for n, p in values.items()
        if n.endswith(("norm.weight", "_norm")) and "mixer" not in n
    )


def test_loss_is_the_mean_cross_entropy_of_the_labels_that_count():
    model = LanguageModel(VARIANTS["plain"], seed=3)
    ids = _ids(2, 11)
    labels = ids[:, 1:].clone()
    labels[0, 3] = IGNORED
    result = model.loss(ids[:, :-1], labels)
    expected = F.cross_entropy(
        model(ids[:, :-1]).flatten(0, 1), labels.flatten(), ignore_index=IGNORED
    )
    assert torch.allclose(result.next_token, expected, atol=1e-5)
    assert (
        result.tokens == 19 and result.mtp is None and torch.equal(result.total, result.next_token)
    )


def test_mtp_targets_stay_within_the_document():
    """Counts which labels matter to the MTP loss.

    Depth k of a token is trained only where the token k ahead is in its document.
    """
    model = LanguageModel(replace(VARIANTS["plain"], mtp=MTPConfig(depth=1)), seed=3)
    ids = _ids(1, 9)
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    base = model.loss(ids[:, :-1], ids[:, 1:], document_ids=document_ids).mtp
    counted = []
    for t in range(8):
        labels = ids[:, 1:].clone()
        labels[0, t] = IGNORED
        counted.append(
            not torch.equal(model.loss(ids[:, :-1], labels, document_ids=document_ids).mtp, base)
        )
    # Label t is the target of position t - 1 if both are in one document; a position reads the ids.
    assert counted == [False, True, True, False, True, True, True, True]
    loss = model.loss(ids[:, :-1], ids[:, 1:], document_ids=document_ids)
    hidden, _ = model.hidden(ids[:, :-1], document_ids=document_ids)
    drafted, _ = model.draft(hidden, ids[:, 1:], document_ids=document_ids)
    logits = model.head(model.mtp[0].norm(drafted))
    places = [0, 1, 3, 4, 5, 6]
    expected = F.cross_entropy(logits[0, places], ids[0, [p + 2 for p in places]])
    assert torch.allclose(loss.mtp, expected, atol=1e-5)


def _foretold(model: LanguageModel, ids: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Computes equations 21 to 25 of DeepSeek-V3 for one document alone.

    At depth k it uses only the first T - k positions.
    """
    hidden = model.hidden(ids[None])[0][0]
    result = []
    for k, module in enumerate(model.mtp, 1):
        hidden = hidden[: max(len(ids) - k, 0)]
        if len(hidden):
            text = ids[k:]
            joined = module.eh_proj(
                torch.cat([module.enorm(model.embed(text)), module.hnorm(hidden)], -1)
            )
            ctx = context(
                1, len(text), "cpu", rope=(model.config.rope, model.rope_dim), ids=text[None]
            )
            hidden = module.block(Streams(joined[None, :, None]), ctx)[0].values[0, :, 0]
        logits = model.head(module.norm(hidden))
        result.append(F.cross_entropy(logits, labels[k:], ignore_index=IGNORED, reduction="none"))
    return result


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), depth=st.integers(1, 3),
    seed=st.integers(0, 99),
    missing=st.floats(0, 0.6), name=st.sampled_from(["plain", "everything", "gqa"]),
)  # fmt: skip
def test_mtp_of_packed_documents_is_that_of_each_alone(lengths, depth, seed, missing, name):
    """Compares values and all gradients, with labels missing anywhere, as those of a question."""
    model = LanguageModel(replace(VARIANTS[name], mtp=MTPConfig(depth=depth)), seed=seed).double()
    ids = _ids(1, sum(lengths), seed)
    labels = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < missing] = (
        IGNORED
    )
    document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    result = model.loss(ids, labels, document_ids=document_ids).mtp
    alone = [
        _foretold(model, *pair)
        for pair in zip(ids[0].split(lengths), labels[0].split(lengths), strict=True)
    ]
    by_depth = [torch.cat(nats) for nats in zip(*alone, strict=True)]
    counted = [
        torch.cat([piece[k:] for piece in labels[0].split(lengths)]) != IGNORED
        for k in range(1, depth + 1)
    ]
    expected = (
        sum(
            nats.sum() / here.sum().clamp_min(1)
            for nats, here in zip(by_depth, counted, strict=True)
        )
        / depth
    )
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9)
    if expected.requires_grad and any(here.any() for here in counted):
        learning = [p for name, p in model.named_parameters() if "tables" not in name]
        one, other = (
            torch.autograd.grad(loss, learning, allow_unused=True) for loss in (result, expected)
        )
        for mine, theirs, parameter in zip(one, other, learning, strict=True):
            both = (
                torch.zeros_like(parameter) if grad is None else grad for grad in (mine, theirs)
            )
            torch.testing.assert_close(*both, rtol=1e-5, atol=1e-8)


def test_every_depth_of_mtp_learns_and_teaches_the_model():
    model = _model("everything")
    ids = _ids(2, 11)
    model.loss(ids[:, :-1], ids[:, 1:]).mtp.backward()
    still = {
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.to_dense().any()
    }
    # The model's own norm comes after the hidden state that MTP takes.
    assert still == {"norm.weight"}


def test_counts_and_balance_come_from_every_mixture():
    model = LanguageModel(BASE, seed=3)
    ids = _ids(2, 11)
    result = model.loss(ids[:, :-1], ids[:, 1:])
    assert result.counts.shape == (2 + 2, 6) and result.counts.sum(-1).tolist() == [40] * 4
    assert set(result.balance) == {"sequence"}
    weighted = result.next_token + BASE.mtp.weight * result.mtp + result.balance["sequence"]
    assert torch.allclose(result.total, weighted)


@functools.cache
def _everything() -> LanguageModel:
    return _model("everything")


def test_bfloat16_is_close_to_float32():
    model = _model("plain")
    ids = _ids(2, 9)
    with torch.no_grad():
        exact = model(ids).log_softmax(-1)
        rough = model.to(torch.bfloat16)(ids).log_softmax(-1)
    assert rough.dtype == torch.float32 and (exact - rough).abs().max() < 0.35


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mla": None}, "got none, expected exactly one of mla, gqa and csa"),
        ({"gqa": GQAConfig()}, "got mla and gqa"),
        ({"nsa": NSAConfig()}, "nsa: got attention mla, expected gqa"),
        ({"layers": 0}, "layers: got 0"),
        ({"layers": 2}, r"engram.layers: got \[2\], expected block indices 0..1"),
        ({"moe": MoEConfig(first_dense=4)}, "moe.first_dense: got 4"),
        (
            {"moe": MoEConfig(router=RouterConfig(other_token_id_layers=(-1, 9)))},
            r"other_token_id_layers: got \[-1, 9\]",
        ),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **change)


def test_cache_refuses_what_it_does_not_hold():
    cache = _everything().new_cache(1)
    with pytest.raises(ValueError, match="crop: got 1 tokens to remove, expected 0 to"):
        cache.crop(1)
    with pytest.raises(ValueError, match="got batch 0"):
        _everything().new_cache(0)


# The state of a whole model, end to end: whatever is done to a cache, its logits are those of one
# full forward.

WORDS = 41
VARIED: dict[str, dict] = {
    "usual": {},
    "one stream, bigrams": {"streams": 1, "rows_per_head": (31,), "heads": 3},
    "4-grams": {
        "rows_per_head": (31, 37, 41),
        "heads": 1,
        "kernel": 3,
        "dilation": 2,
        "sign": "copysign",
        "bias": True,
    },
    "no conv": {"conv": False, "dead_tokens": (3, 5)},
    "leaks": {"end_of_document": False, "dead_tokens": (7,)},
    "raw ids": {"streams": 1, "canonical": False, "kernel": 2, "dilation": 7, "pad_id": 4},
    "one tap": {"kernel": 1, "dilation": 1},
    "far": {"streams": 1, "kernel": 5, "dilation": 6, "dead_tokens": (0,)},
}


@functools.cache
def state_model(name: str, experts: bool = True) -> LanguageModel:
    options = {
        "layers": (0, 1),
        "rows_per_head": (29, 31),
        "heads": 2,
        "head_dim": 4,
        "streams": 4,
    } | VARIED[name]
    streams = options.pop("streams")
    config = ModelConfig(
        vocab_size=WORDS,
        dim=12,
        layers=2,
        dense_width=16,
        mla=MLAConfig(heads=2, kv_lora_rank=8, nope_dim=4, rope_dim=4, value_dim=6),
        moe=MoEConfig(routed=5, active=2, shared=1, width=8, first_dense=1) if experts else None,
        engram=EngramConfig(**options),
        hyper=HyperConfig(streams=streams, iterations=2),
        mtp=MTPConfig(depth=1),
        init_std=0.3,
    )
    model = LanguageModel(config, torch.arange(WORDS) // 2, seed=2).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for piece, parameter in model.named_parameters():
            if piece.endswith(".conv") or piece.startswith("tables"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def test_moba_knows_which_layers_are_the_last() -> None:
    config = ModelConfig(
        vocab_size=30, layers=3, mla=None, gqa=GQAConfig(), moba=MoBAConfig(full_layers=2)
    )
    assert [block.attention.full for block in LanguageModel(config).blocks] == [
        False,
        True,
        True,
    ]


class Scripted(RuleBasedStateMachine):
    """Runs any script of extend, select, crop and reset on sequences of different lengths.

    `rows` holds the sequences, as (id, document).
    """

    @initialize(
        name=st.sampled_from(sorted(VARIED)),
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    )
    def start(self, name: str, sizes: list[int]) -> None:
        self.model, self.draw = state_model(name), torch.Generator().manual_seed(sum(sizes))
        self.cache = self.model.new_cache(len(sizes), capacity=1 + sizes[0])
        self.fill(sizes)

    def fill(self, sizes: list[int]) -> None:
        self.rows: list[list[tuple[int, int]]] = [[] for _ in sizes]
        self.length = [0] * len(sizes)
        self.feed(max(sizes), None, None if min(sizes) == max(sizes) else sizes)

    @torch.no_grad()
    def feed(
        self, count: int, document_ids: torch.Tensor | None, lengths: list[int] | None = None
    ) -> None:
        ids = torch.randint(0, WORDS, (len(self.rows), count), generator=self.draw)
        got = self.model(ids, document_ids=document_ids, lengths=lengths, cache=self.cache)
        fresh = lengths or [count] * len(self.rows)
        for b, row in enumerate(self.rows):
            last = row[-1][1] if row else 0
            numbers = [last] * count if document_ids is None else document_ids[b].tolist()
            row += list(zip(ids[b].tolist(), numbers, strict=True))[: fresh[b]]
        self.length = [
            min(64, stored + new) for stored, new in zip(self.length, fresh, strict=True)
        ]
        longest = max(map(len, self.rows))
        # Padding on the right, which no token sees.
        filled = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in self.rows])
        whole = self.model(filled[..., 0], document_ids=filled[..., 1])
        for b, row in enumerate(self.rows):
            expected = whole[b, len(row) - fresh[b] : len(row)]
            torch.testing.assert_close(got[b, : fresh[b]], expected, rtol=0, atol=1e-5)
        assert self.cache.lengths == tuple(map(len, self.rows))

    @rule(count=st.sampled_from([1, 1, 2, 3, 7, 40, 150]))
    def extend(self, count: int) -> None:
        self.feed(count, None)

    @rule(data=st.data(), count=st.integers(2, 9))
    def extend_each(self, data: st.DataObject, count: int) -> None:
        """Extends each sequence by so many tokens of its own."""
        rows = len(self.rows)
        self.feed(
            count, None, data.draw(st.lists(st.integers(1, count), min_size=rows, max_size=rows))
        )

    @rule(steps=st.lists(st.integers(0, 1), min_size=2, max_size=7))
    def extend_by_documents(self, steps: list[int]) -> None:
        begins = torch.tensor(steps).cumsum(0)
        self.feed(len(steps), torch.stack([row[-1][1] + begins for row in self.rows]))

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        index = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=3))
        self.cache.select(torch.tensor(index))
        self.rows = [list(self.rows[i]) for i in index]
        self.length = [self.length[i] for i in index]

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        """Crops the cache; a refused crop, beyond what is stored, must change nothing.

        64 tokens are stored, and new ones again.
        """
        counts = [data.draw(st.integers(0, len(row) - 1)) for row in self.rows]
        if any(count > stored for count, stored in zip(counts, self.length, strict=True)):
            with contextlib.suppress(ValueError):
                self.cache.crop(counts)
            if self.cache.lengths == tuple(map(len, self.rows)):
                return
        else:
            assert self.cache.crop(counts) is None
        self.length = [
            max(0, stored - count) for stored, count in zip(self.length, counts, strict=True)
        ]
        self.rows = [row[: len(row) - n] for row, n in zip(self.rows, counts, strict=True)]

    @rule(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3))
    def reset(self, sizes: list[int]) -> None:
        self.cache.reset()
        self.fill(sizes)


SCRIPTS = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.engram
def test_state_of_any_script_gives_the_logits_of_one_forward() -> None:
    run_state_machine_as_test(
        Scripted, settings=settings(SCRIPTS, max_examples=10, stateful_step_count=5)
    )


@pytest.mark.engram
@pytest.mark.slow
def test_state_of_many_scripts_gives_the_logits_of_one_forward() -> None:
    run_state_machine_as_test(
        Scripted, settings=settings(SCRIPTS, max_examples=100, stateful_step_count=10)
    )


@pytest.mark.engram
@torch.no_grad()
def test_state_goes_back_as_far_as_it_was_asked_to_hold() -> None:
    model = state_model("usual")
    ids = torch.randint(0, WORDS, (2, 170))
    cache = model.new_cache(2)
    model(ids, cache=cache)
    with pytest.raises(
        ValueError,
        match=r"got 150 tokens to remove, expected 0 to 64, or all 170: reserve_slack\(150\)",
    ):
        cache.crop(150)
    with pytest.raises(ValueError, match="expected an empty one"):
        cache.reserve_slack(150)
    after = model(ids[:, :1], cache=cache)
    torch.testing.assert_close(after, model(ids[:, [*range(170), 0]])[:, -1:], rtol=0, atol=1e-5)
    cache.crop(171)
    assert cache.length == 0
    cache.reserve_slack(150)
    model(ids, cache=cache)
    cache.crop(150)
    torch.testing.assert_close(
        model(ids[:, 20:], cache=cache), model(ids)[:, 20:], rtol=0, atol=1e-5
    )


@pytest.mark.engram
@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name for name in VARIED if VARIED[name].get("end_of_document", True)]
)
def test_state_of_packed_documents_is_sealed_to_the_bit(name: str) -> None:
    """Other tokens in one document change nothing in the others.

    This holds in a whole forward and in cached pieces.
    """
    model = state_model(name, experts=False)
    ids = torch.randint(0, WORDS, (2, 24))
    document_ids = torch.tensor([[0] * 7 + [1] * 2 + [2] * 8 + [3] * 7] * 2)
    other = ids.clone()
    within = document_ids == 2
    other[within] = (ids[within] + 1 + torch.randint(0, WORDS - 1, (int(within.sum()),))) % WORDS
    for sizes in ([24], [5, 1, 9, 9]):
        results = []
        for text in (ids, other):
            cache = model.new_cache(2) if len(sizes) > 1 else None
            parts = zip(text.split(sizes, 1), document_ids.split(sizes, 1), strict=True)
            results.append(
                torch.cat(
                    [model(piece, document_ids=number, cache=cache) for piece, number in parts], 1
                )
            )
        assert torch.equal(results[0][~within], results[1][~within])
        assert not torch.equal(results[0][within], results[1][within])


def test_the_obvious_loop_trains_memory():
    """One torch optimizer takes all parameters of a model with Engram.

    Rows that were not read stay the same.
    """
    model = LanguageModel(replace(BASE, init_std=0.02)).train()
    before = [table.weight.detach().clone() for table in model.tables]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    ids = torch.randint(BASE.vocab_size, (2, 9))
    losses = []
    for _ in range(4):
        loss = model.loss(ids[:, :-1], ids[:, 1:]).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    read = model.addresses(ids[:, :-1], context(2, 8, "cpu"))
    for table, old, rows in zip(model.tables, before, read, strict=True):
        changed = (table.weight != old).any(1).nonzero()[:, 0]
        assert set(changed.tolist()) == set(rows.unique().tolist())
