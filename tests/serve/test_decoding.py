"""Tests decoding against a loop of whole forwards: batches, padding, ends, bounds, drafts."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.layers.attention import GQAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moba import MoBAConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.serve.decoding import decode, speculate
from rorqual.serve.drafts import AcceptanceStats
from rorqual.serve.sampling import Sampling

ENGRAM = EngramConfig(layers=(0,), rows_per_head=(97, 97), heads=2, head_dim=8)
CONFIGS = {
    "mla": ModelConfig(
        vocab_size=61, dim=32, layers=2, dense_width=32, mtp=MTPConfig(), init_std=0.2
    ),
    "all": ModelConfig(
        vocab_size=61,
        dim=32,
        layers=2,
        moe=MoEConfig(routed=6, active=2, width=16),
        engram=ENGRAM,
        hyper=HyperConfig(streams=2, iterations=2),
        mtp=MTPConfig(),
        init_std=0.2,
    ),
    "gqa": ModelConfig(
        vocab_size=61,
        dim=32,
        layers=2,
        dense_width=32,
        mla=None,
        gqa=GQAConfig(head_dim=8),
        init_std=0.2,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return LanguageModel(CONFIGS[request.param], seed=3).eval()


@torch.no_grad()
def plainly(model, prompt, count: int, end_id=None, vocab_size=None) -> list[int]:
    """Decodes greedily with one whole forward a token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1, :vocab_size].argmax()))
        if ids[-1] == end_id:
            break
    return ids[len(prompt) :]


def together(model, prompts, **options) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]
    for step in decode(model, prompts, **options):
        for index, token in enumerate(step):
            if token is not None:
                out[index].append(token)
    return out


PROMPTS = [[5, 6, 7, 8, 9, 10], [1], [2, 3, 2]]


def test_a_batch_says_what_each_says_alone(model):
    assert together(model, PROMPTS, max_new_tokens=6) == [plainly(model, p, 6) for p in PROMPTS]


def test_rows_end_by_themselves_and_the_others_go_on(model):
    free = [plainly(model, p, 6) for p in PROMPTS]
    end = free[0][3]
    ended = together(model, PROMPTS, max_new_tokens=6, end_id=end)
    assert ended == [plainly(model, p, 6, end_id=end) for p in PROMPTS]
    assert ended[0][-1] == end
    assert len(ended[0]) <= 4


def test_ids_beyond_the_tokenizer_are_never_drawn(model):
    assert together(model, PROMPTS, max_new_tokens=6, vocab_size=11) == [
        plainly(model, p, 6, vocab_size=11) for p in PROMPTS
    ]
    sampling = Sampling(temperature=50.0, seed=0)
    drawn = together(model, [[1, 2], [0]], max_new_tokens=10, vocab_size=3, sampling=sampling)
    assert {token for row in drawn for token in row} == {0, 1, 2}


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(seed=1)])
def test_logits_that_are_nan_are_an_error_and_no_text(model, sampling):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.embed.weight[7] = torch.nan
    with pytest.raises(ValueError, match=r"NaN, inf or all -inf in sequences \[1\], expected"):
        list(decode(broken, [[1, 2], [7], [3]], sampling=sampling))


def test_a_seed_repeats_and_rows_do_not_depend_on_neighbours(model):
    sampling = Sampling(temperature=1.0, seed=11, repetition_penalty=1.2)
    both = together(model, PROMPTS[:2], max_new_tokens=8, sampling=sampling)
    assert both == together(model, PROMPTS[:2], max_new_tokens=8, sampling=sampling)
    assert both[0] == together(model, PROMPTS[:1], max_new_tokens=8, sampling=sampling)[0]


def test_the_penalty_counts_prompt_and_answer(model):
    strong = Sampling(temperature=0.0, repetition_penalty=1000.0)
    text = together(model, [[1, 2, 3]], max_new_tokens=25, sampling=strong)[0]
    assert len(set(text)) == len(text)
    assert not {1, 2, 3} & set(text)


def drafted(model, prompts, **options) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]
    for step in speculate(model, prompts, **options):
        assert len(step) == len(prompts)
        for index, token in enumerate(step):
            if token is not None:
                out[index].append(token)
    return out


DRAFTING = [
    ("mla", 1),
    ("mla", 3),
    ("all", 2),
    *(pytest.param(("all", n), marks=pytest.mark.slow) for n in (1, 3)),
]


@pytest.fixture(scope="module", params=DRAFTING, ids=str)
def drafting(request):
    """Every kind of model with one to three depths, trained on a cycle with errors.

    So some drafts are accepted and some rejected.
    """
    name, depth = request.param
    model = LanguageModel(replace(CONFIGS[name], mtp=MTPConfig(depth=depth), init_std=0.1), seed=3)
    ids = (torch.arange(25)[None] * 5 + torch.arange(4)[:, None]) % 12
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.1] = 13
    optimizer = torch.optim.AdamW(
        [p for name, p in model.named_parameters() if "tables" not in name], lr=1e-2
    )
    for _ in range(12):
        model.loss(ids[:, :-1], ids[:, 1:]).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@settings(max_examples=5, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 13), min_size=1, max_size=6), min_size=1, max_size=4),
    count=st.integers(1, 14),
    ending=st.integers(0, 13),
)
def test_drafts_change_nothing(drafting, prompts, count, ending):
    """Holds for any depth and any batch of different lengths, whichever sequence ends where."""
    acceptance_stats = AcceptanceStats()
    depth = len(drafting.mtp)
    text = drafted(drafting, prompts, max_new_tokens=count, acceptance_stats=acceptance_stats)
    assert text == together(drafting, prompts, max_new_tokens=count)
    assert (
        0
        <= acceptance_stats.accepted
        <= acceptance_stats.drafted
        <= acceptance_stats.rounds * depth * len(prompts)
    )
    assert acceptance_stats.rounds < count
    end = text[ending % len(text)][ending % count]
    ended = drafted(drafting, prompts, max_new_tokens=count, end_id=end, vocab_size=40)
    assert ended == together(drafting, prompts, max_new_tokens=count, end_id=end, vocab_size=40)


def test_some_drafts_stand_and_some_fall(drafting):
    """Otherwise the test above would cover only one of two cases."""
    acceptance_stats = AcceptanceStats()
    text = drafted(drafting, PROMPTS, max_new_tokens=14, acceptance_stats=acceptance_stats)
    assert text == [plainly(drafting, prompt, 14) for prompt in PROMPTS]
    assert 0 < acceptance_stats.accepted < acceptance_stats.drafted


def test_a_trained_model_accepts_its_own_drafts():
    config = ModelConfig(
        vocab_size=12, dim=32, layers=1, dense_width=64, mtp=MTPConfig(depth=2), init_std=0.1
    )
    model = LanguageModel(config)
    ids = (torch.arange(25)[None] * 5 + torch.arange(4)[:, None]) % 12
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        model.loss(ids[:, :-1], ids[:, 1:]).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    for batch in (1, 3):
        acceptance_stats = AcceptanceStats()
        prompts = [one[: 4 + n].tolist() for n, one in enumerate(ids[:batch])]
        text = drafted(model.eval(), prompts, max_new_tokens=16, acceptance_stats=acceptance_stats)
        assert text == [one[4 + n : 20 + n].tolist() for n, one in enumerate(ids[:batch])]
        assert text == [plainly(model, prompt, 16) for prompt in prompts]
        # 1 id, then 3 a round.
        assert acceptance_stats == AcceptanceStats(
            drafted=2 * 5 * batch, accepted=2 * 5 * batch, rounds=5
        )
        assert acceptance_stats.acceptance == 1


@torch.no_grad()
def test_a_depth_is_given_in_decoding_what_it_is_given_in_training(drafting, monkeypatch):
    """Each depth's outputs in the rounds are those of one call over all the text, as in a loss.

    A cache that kept the ids of a rejected draft, or a neighbour's padding, would not show in the
    ids, and would only cost drafts.
    """
    # Depth, its last input id and its output.
    made: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    plain = LanguageModel.draft

    def watched(self, hidden, message, *, depth, lengths, **options):
        result = plain(self, hidden, message, depth=depth, lengths=lengths, **options)
        # A prompt of one token is not read before the first draft.
        if lengths[0]:
            last = slice(lengths[0] - 1, lengths[0])
            made.append((depth, message[:1, last], result[0][:1, last]))
        return result

    monkeypatch.setattr(LanguageModel, "draft", watched)
    text = drafted(drafting, [[3], [5, 10, 3, 8]], max_new_tokens=9)[0]
    monkeypatch.undo()
    ids = torch.tensor([[3, *text]])
    depths = len(drafting.mtp)
    beginning = 1
    for index in range(0, len(made), depths):
        while not torch.allclose(
            _chain(drafting, ids[:, :beginning], made[index : index + 1])[0], made[index][2], 1e-3
        ):
            beginning += 1
            assert beginning < ids.shape[1], "says what no beginning of the text would"
        rounds = made[index : index + depths]
        for one, (_, _, other) in zip(
            _chain(drafting, ids[:, :beginning], rounds), rounds, strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert len(made) >= 2 * depths


def _chain(model, ids, rounds) -> list[torch.Tensor]:
    """Returns every depth's output after `ids`, if it reads all of them and last the given id."""
    hidden = model.hidden(ids)[0]
    text = ids
    result = []
    for depth, last, _ in rounds:
        text = torch.cat([text[:, 1:], last], 1)
        hidden = model.draft(hidden, text, depth=depth)[0]
        result.append(hidden[:, -1:])
    return result


def test_drafts_build_no_graph(drafting, monkeypatch):
    """Neither the drafts nor the verification build one, also where a sequence ends.

    The caller's own grad mode does not change.
    """
    seen = {"hidden": [], "draft": []}

    def watched(name):
        plain = getattr(LanguageModel, name)

        def call(self, *args, **options):
            out = plain(self, *args, **options)
            seen[name].append(out[0].requires_grad or torch.is_grad_enabled())
            return out

        return call

    for name in seen:
        monkeypatch.setattr(LanguageModel, name, watched(name))
    assert all(parameter.requires_grad for parameter in drafting.parameters())
    end = plainly(drafting, PROMPTS[0], 3)[-1]
    for _ in speculate(drafting, PROMPTS, max_new_tokens=9, end_id=end):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert len(seen["draft"]) >= len(drafting.mtp)
    assert seen == {name: [False] * len(calls) for name, calls in seen.items()}


def test_a_model_without_mtp_is_given_so():
    with pytest.raises(ValueError, match="got a model without MTP"):
        list(speculate(LanguageModel(CONFIGS["gqa"]), [[1]]))


def test_single_tokens_that_attend_otherwise_are_not_drafted():
    config = replace(CONFIGS["gqa"], moba=MoBAConfig(decode="full"), mtp=MTPConfig())
    with pytest.raises(ValueError, match=r'drafts: got moba\.decode "full", expected "sparse"'):
        list(speculate(LanguageModel(config), [[1]]))


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="empty prompt"):
        next(decode(LanguageModel(CONFIGS["gqa"]), prompts))
