"""Tests each measure against a closed form or a brute force."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch

from rorqual.analyze import measures
from rorqual.analyze.states import block_states
from rorqual.data.tokenizer import train as train_tokenizer
from rorqual.layers.engram import EngramConfig
from rorqual.model import LanguageModel
from rorqual.presets import preset


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the whale swims in the sea", "a river runs to the sea"] * 20, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = replace(
        preset("tiny"),
        vocab_size=tokenizer.vocab_size,
        engram=EngramConfig(layers=(0, 2), rows_per_head=(50, 60)),
    )
    return LanguageModel(config, tokenizer.canonical_map(), seed=1)


PRODUCTION = ("v4-tiny", "v4.1-tiny", "qwen4-tiny")


@pytest.fixture(scope="module", params=["tiny", *PRODUCTION])
def each(request, model, tokenizer):
    """The model of the other tests, and those of the presets of production models."""
    if request.param == "tiny":
        return model
    config = replace(preset(request.param), vocab_size=tokenizer.vocab_size, init_std=0.2)
    canonical = tokenizer.canonical_map() if request.param == "v4.1-tiny" else None
    return LanguageModel(config, canonical, seed=1)


def test_hsic_equals_the_sum_over_distinct_samples():
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    y = torch.randn(6, 2)
    k = (x @ x.T).double()
    l = (y @ y.T).double()
    four = list(itertools.permutations(range(6), 4))
    brute = sum(k[a, b] * (l[a, b] + l[c, d] - 2 * l[a, c]) for a, b, c, d in four) / len(four)
    assert float(measures.hsic(x, y)) == pytest.approx(float(brute), rel=1e-6)


def test_cka_of_equal_rotated_and_unrelated():
    torch.manual_seed(0)
    x = torch.randn(400, 8)
    q = torch.linalg.qr(torch.randn(8, 8)).Q
    batches = x.split(100)
    assert measures.cka((b, 3 * b @ q) for b in batches) == pytest.approx(1, abs=1e-5)
    assert abs(measures.cka((b, torch.randn(100, 8)) for b in batches)) < 0.1


def test_cka_refuses_what_it_cannot_estimate():
    with pytest.raises(ValueError, match="at least 4"):
        measures.hsic(torch.randn(3, 2), torch.randn(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_what_is_alike_for_every_sample_resembles_nothing(dtype, value):
    """Rounding alone would give anything between -1 and 1, or 1e130."""
    same = torch.full((7, 3), value, dtype=dtype)
    other = torch.randn(7, 5)
    assert float(measures.hsic(same, same)) == float(measures.hsic(same, other)) == 0
    assert measures.cka([(same, other)]) == measures.cka([(same, same)]) == 0


def test_a_large_mean_changes_nothing():
    x = torch.randn(9, 3, dtype=torch.float64)
    y = torch.randn(9, 2, dtype=torch.float64)
    assert float(measures.hsic(x + 1e6, y - 1e6)) == pytest.approx(
        float(measures.hsic(x, y)), rel=1e-7
    )
    assert measures.cka([(x + 1e6, x)]) == pytest.approx(1, abs=1e-9)


def test_cka_of_half_precision_is_that_of_its_numbers():
    x = torch.randn(11, 4).bfloat16()
    y = torch.randn(11, 4).bfloat16()
    assert measures.cka([(x, y)]) == pytest.approx(
        measures.cka([(x.double(), y.double())]), rel=1e-12
    )


def test_no_layer_resembles_a_column_without_similarity():
    result = measures.alignment(torch.tensor([[0.5, 0.0], [0.5, -0.2]]))
    assert float(result[0]) == 0.5 and math.isnan(float(result[1]))
    with pytest.raises(ValueError, match="k 0, expected at least 1"):
        measures.alignment(torch.ones(2, 2), k=0)


def test_alignment_of_a_shifted_diagonal():
    table = torch.zeros(6, 4)
    for j in range(4):
        table[j + 2, j] = 1.0
    assert torch.allclose(measures.alignment(table, k=1), torch.tensor([2.0, 3.0, 4.0, 5.0]))
    table = torch.tensor([[0.5], [0.0], [0.5]])
    assert float(measures.alignment(table, k=2)) == pytest.approx(1.0)


def test_logit_lens_by_hand(each):
    """The lens agrees with the same model cut off after each block."""
    model = each
    ids = torch.randint(
        0, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0)
    )
    lens = measures.logit_lens(model, ids)
    assert lens.shape == (model.config.layers,) and float(lens[-1]) == pytest.approx(0, abs=1e-5)
    final = model.eval()(ids).detach().double().softmax(-1)
    for layer in range(model.config.layers - 1):
        short = copy.deepcopy(each)
        short.blocks = short.blocks[: layer + 1]
        early = short(ids).detach().double().softmax(-1)
        kl = (
            sum(
                (p * (p / q).log()).sum()
                for p, q in zip(final.flatten(0, 1), early.flatten(0, 1), strict=True)
            )
            / 14
        )
        assert float(lens[layer]) == pytest.approx(float(kl), rel=1e-4)


def test_gates_are_those_of_the_layer(each, tokenizer):
    if each.config.engram is None:
        with pytest.raises(ValueError, match="without Engram"):
            measures.gates(each, tokenizer, "the")
        return
    layers = each.config.engram.layers
    result = measures.gates(each, tokenizer, "the whale swims")
    assert "".join(result.tokens) == "the whale swims"
    assert result.layers == layers
    assert result.values.shape == (len(layers), len(result.tokens), 4)
    assert ((result.values > 0) & (result.values < 1)).all()
    with pytest.raises(ValueError, match="empty text"):
        measures.gates(each, tokenizer, "")


def test_expert_load_counts_every_choice(each):
    config = each.config
    batches = [torch.randint(0, config.vocab_size, (2, 9)) for _ in range(3)]
    load = measures.expert_load(each, iter(batches))
    assert load.counts.shape == (config.layers, config.moe.routed)
    assert load.counts.sum(-1).tolist() == [3 * 2 * 9 * 2] * config.layers
    assert torch.allclose(load.shares.sum(-1), torch.ones(config.layers))
    seen = torch.stack(batches).flatten().bincount(minlength=config.vocab_size) * 2
    assert torch.equal(load.by_token[0].sum(0), seen)


def test_a_slot_that_is_not_taken_is_not_counted(tokenizer):
    base = preset("tiny")
    moe = replace(
        base.moe, active=4, router=replace(base.moe.router, adaptive_mass=0.1, min_active=1)
    )
    model = LanguageModel(
        replace(base, vocab_size=tokenizer.vocab_size, moe=moe, engram=None), seed=1
    )
    ids = torch.randint(0, tokenizer.vocab_size, (2, 9))
    with torch.no_grad():
        auxes = model.eval().hidden(ids)[1]
        taken = [int((aux.routing.weights != 0).sum()) for aux in auxes if aux.routing is not None]
    assert (
        measures.expert_load(model, [ids]).counts.sum(-1).tolist() == taken
        and min(taken) < 2 * 9 * 4
    )
    with pytest.raises(ValueError, match="no batches"):
        measures.expert_load(model, [])


def test_favourites_put_the_over_represented_first():
    by_token = torch.zeros(1, 2, 5, dtype=torch.long)
    by_token[0, 0] = torch.tensor([10, 10, 0, 0, 0])
    by_token[0, 1] = torch.tensor([10, 0, 5, 0, 0])
    load = measures.Load((0,), by_token.sum(-1), by_token)
    (first, lift), *_ = load.favourites(0, 0)
    assert first == 1 and lift == pytest.approx((10 / 20) / (10 / 35))


def test_specialisation_is_what_the_expert_tells_of_the_token():
    def load(*experts):
        by_token = torch.tensor([experts])
        return measures.Load((0,), by_token.sum(-1), by_token)

    assert float(load([5, 0, 3, 0], [0, 7, 0, 1]).specialisation) == pytest.approx(math.log(2)), (
        "each takes its own"
    )
    assert float(load([4, 2, 6], [2, 1, 3]).specialisation) == pytest.approx(0, abs=1e-7), (
        "all alike"
    )
    joint = torch.tensor([[0.3, 0.2], [0.1, 0.4]])
    brute = sum(
        joint[e, v] * math.log(joint[e, v] / joint[e].sum() / joint[:, v].sum())
        for e in (0, 1)
        for v in (0, 1)
    )
    assert float(load([30, 20], [10, 40]).specialisation) == pytest.approx(float(brute))
    assert float(load([0, 0], [0, 0]).specialisation) == 0


def test_suppressed_scores_every_task_both_ways(model):
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    tasks = {
        "nats": lambda: model.loss(ids, ids.roll(-1, 1)).next_token,
        "one": lambda: 1.0,
        "none": lambda: 0.0,
    }
    result = measures.suppressed(model, tasks)
    assert (result["nats"].whole, result["nats"].without) == measures.suppression(
        model, ids, ids.roll(-1, 1)
    )
    assert result["nats"].share == result["nats"].without / result["nats"].whole != 1
    assert result["one"].share == 1 and math.isnan(result["none"].share)
    with pytest.raises(ValueError, match="without Engram"):
        measures.suppressed(LanguageModel(replace(model.config, engram=None)), tasks)


def test_suppression_equals_a_model_whose_memory_says_nothing(each):
    model = each
    if model.config.engram is None:
        with pytest.raises(ValueError, match="without Engram"):
            measures.suppression(model, torch.ones(1, 4).long(), torch.ones(1, 4).long())
        return
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    labels = ids.roll(-1, 1)
    whole, without = measures.suppression(model, ids, labels)
    silent = LanguageModel(model.config, getattr(model.addresses, "canonical_map", None), seed=None)
    silent.load_state_dict(model.state_dict())
    for block in silent.blocks:
        if block.engram is not None:
            torch.nn.init.zeros_(block.engram.value_proj.weight)
    assert without == pytest.approx(silent.eval().loss(ids, labels).next_token.item(), abs=1e-6)
    assert whole == pytest.approx(model.eval().loss(ids, labels).next_token.item(), abs=1e-6)
    assert not math.isclose(whole, without, abs_tol=1e-9)


def test_similarity_of_a_model_with_itself(each):
    batches = [torch.randint(0, each.config.vocab_size, (4, 16)) for _ in range(2)]
    table = measures.similarity(each, each, batches)
    assert torch.allclose(table.diagonal(), torch.ones(each.config.layers), atol=1e-4)


def test_similarity_is_cka_of_every_pair_of_layers(model):
    other = LanguageModel(replace(preset("classroom"), vocab_size=model.config.vocab_size), seed=3)
    # The batches are of unequal size.
    batches = [torch.randint(0, model.config.vocab_size, (2, t)) for t in (9, 14)]
    table = measures.similarity(model, other, iter(batches))
    states = [[block_states(m, ids) for ids in batches] for m in (model, other)]
    for i in range(3):
        for j in range(2):
            pairs = [(states[0][n][i], states[1][n][j]) for n in range(2)]
            assert float(table[i, j]) == pytest.approx(measures.cka(iter(pairs)), abs=1e-5)
    with pytest.raises(ValueError, match="at least 4"):
        measures.similarity(model, other, [batches[0][:1, :3]])
    with pytest.raises(ValueError, match="no batches"):
        measures.similarity(model, other, [])


@pytest.mark.parametrize("n", [4, 5, 33])
def test_centred_kernels_multiply_to_hsic(n):
    x = torch.randn(n, 3)
    y = torch.randn(n, 2) + 1
    product = (measures.centred(x) * measures.centred(y)).sum() / (n * (n - 3))
    assert float(product) == pytest.approx(float(measures.hsic(x, y)), rel=1e-9)
    assert measures.centred(x).sum(0).abs().max() < 1e-9


def test_a_text_begins_as_a_document_does(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "begin_id", tokenizer.end_id + 5)
    seen = []
    handle = model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    measures.gates(model, tokenizer, "the whale")
    handle.remove()
    assert seen[0][0].tolist() == [tokenizer.begin_id, *tokenizer.encode("the whale")]
