"""Tests step.py: micro-batches, balance, phases of a training, and steps that are not finite."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from rorqual.data.stream import Stream
from rorqual.layers.attention import GQAConfig
from rorqual.layers.balance import BalanceConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moba import MoBA, MoBAConfig
from rorqual.layers.moe import MoE
from rorqual.layers.router import RouterConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.presets import preset
from rorqual.train import step as step_module
from rorqual.train.config import OptimConfig
from rorqual.train.optim import Optimizer
from rorqual.train.step import Diverged, StepResult, TrainStep, unchanged_random_state


def run(
    step: TrainStep, stream: Stream, first: int = 1, last: int | None = None
) -> list[StepResult]:
    """Runs the steps `first` to `last` (of all)."""
    return [step(next(stream), number) for number in range(first, (last or step.config.steps) + 1)]


def state_of(step: TrainStep) -> dict[str, torch.Tensor]:
    state = {**step.model.state_dict(), **step.optimizer.state_dict()}
    return {name: tensor.clone() for name, tensor in state.items()}


def test_a_dry_run_leaves_no_trace(small):
    step = small.step()
    stream = small.stream()
    before = state_of(step)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    step.dry_run(next(stream), 1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    for name, tensor in state_of(step).items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_a_dry_run_makes_no_gradient_as_large_as_a_table(small):
    step = small.step()
    seen = []
    table = step.model.tables[0].weight
    table.register_post_accumulate_grad_hook(
        lambda parameter: seen.append(parameter.grad.is_sparse)
    )
    step.dry_run(next(small.stream()), 1)
    assert seen and all(seen)


def test_random_states_are_restored_after_an_error_too():
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(ZeroDivisionError), unchanged_random_state():
        _ = torch.rand(1), random.random(), 1 / 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_micro_batches_add_up_to_the_batch_weighted_by_tokens(small):
    """Sequences with fewer targets have less weight.

    The mean is over tokens, not over micro-batches.
    """
    moe = replace(small.config.moe, router=RouterConfig(), balance=BalanceConfig(sequence=0.0))
    config = replace(small.config, mtp=None, moe=moe)
    batch = next(small.stream())
    batch["labels"][0, 3:] = -100
    batch["labels"][1] = -100
    results = []
    for rows in (None, 1, 3):
        step = small.step(config=config, micro_batch_size=rows)
        losses, counts = step.forward_backward(batch, 1)
        results.append((step.model, losses["loss"], counts))
    (whole, loss, counts), *others = results
    for model, other_loss, other_counts in others:
        assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
        assert torch.equal(other_counts, counts)
        for one, other in zip(whole.parameters(), model.parameters(), strict=True):
            if one.grad is not None:
                expected = one.grad.to_dense()
                torch.testing.assert_close(other.grad.to_dense(), expected, rtol=1e-4, atol=1e-6)


def test_biases_move_once_a_step_by_the_counts_of_all_micro_batches(small):
    step = small.step(steps=1, config=small.without_noise(small.config), micro_batch_size=1)
    (result,) = run(step, small.stream())
    mixtures = [module for module in step.model.modules() if isinstance(module, MoE)]
    assert len(mixtures) == 2  # the second block's and MTP's
    assert result.expert_counts.sum(1).tolist() == [small.batch_size * small.seq_len * 2] * 2
    counts = result.expert_counts.double()
    for count, mixture in zip(counts, mixtures, strict=True):
        expected = 1e-3 * (count.mean() - count).sign().float()
        torch.testing.assert_close(mixture.router.e_score_correction_bias, expected)
    worst = float((counts.amax(1) / counts.mean(1)).max()) - 1
    assert result.values["max_violation"] == pytest.approx(worst)


def test_biases_rest_late(small):
    step = small.step(steps=4, bias_rest=0.5)
    stream = small.stream()
    bias = step.model.blocks[1].ffn.router.e_score_correction_bias
    run(step, stream, 1, 2)
    before = bias.clone()
    assert before.any()
    run(step, stream, 3, 4)
    assert torch.equal(bias, before)


@pytest.mark.parametrize(
    "hyper", [HyperConfig(streams=3, iterations=4), HyperConfig(streams=2, kind="hc")], ids=str
)
def test_streams_are_measured_now_and_then_and_change_nothing(small, monkeypatch, hyper):
    config = replace(small.config, hyper=hyper)
    monkeypatch.setattr(step_module, "STREAM_INTERVAL", 3)
    torch.manual_seed(1)  # of the routers' noise
    measured = run(small.step(steps=5, config=config), small.stream())
    names = {"row_gain", "column_gain", "stream_spread"}
    assert [result.largest.keys() == names for result in measured] == [1, 0, 0, 1, 0]
    assert measured[0].largest["row_gain"] == pytest.approx(1, abs=0.1)
    assert measured[3].largest["stream_spread"] > 0
    monkeypatch.setattr(step_module, "health", lambda *_: None)
    torch.manual_seed(1)
    blind = run(small.step(steps=5, config=config), small.stream())
    assert not any(result.largest for result in blind)
    assert [r.means["loss"] for r in blind] == [r.means["loss"] for r in measured]


def test_mtp_weighs_less_late(small):
    step = small.step(steps=6, mtp_late=0.1)
    batch = next(small.stream())
    loss = step.model.loss(batch["ids"], batch["labels"], document_ids=batch["document_ids"])
    weight = small.config.mtp.weight
    assert step.minimised(loss, 4) is loss.total
    torch.testing.assert_close(step.minimised(loss, 5), loss.total + (0.1 - weight) * loss.mtp)


@pytest.fixture
def indexed(small) -> ModelConfig:
    return replace(small.config, dsa=DSAConfig(heads=2, dim=8, top_k=4, warmup=3))


@pytest.mark.parametrize("rows", [None, 2])
def test_in_the_warm_up_the_indexers_loss_changes_no_bit_of_the_models_gradients(
    small, indexed, rows
):
    results = []
    for weight in (0.0, 1.0, 7.0):
        config = replace(small.without_noise(indexed), dsa=replace(indexed.dsa, weight=weight))
        step = small.step(config=config, micro_batch_size=rows)
        step.forward_backward(next(small.stream()), 1)
        parameters = step.model.named_parameters()
        results.append(
            {n: None if p.grad is None else p.grad.to_dense().clone() for n, p in parameters}
        )
    without, once, sevenfold = results
    indexers = [name for name in once if ".indexer." in name]
    assert len(indexers) == 3 * 5  # two blocks and MTP's
    for name, gradient in once.items():
        if name in indexers:
            assert gradient.isfinite().all() and gradient.any(), name
            torch.testing.assert_close(sevenfold[name], 7 * gradient, rtol=1e-4, atol=1e-8)
        else:
            assert torch.equal(gradient, without[name]), name


def test_indexers_learn_alone_in_their_warm_up_where_that_is_asked(small, indexed):
    step = small.step(steps=5, config=indexed, indexer_alone=True)
    stream = small.stream()
    first = state_of(step)
    run(step, stream, 1, 3)
    warmed = state_of(step)
    run(step, stream, 4, 5)
    last = state_of(step)
    for name in step.model.state_dict():
        assert torch.equal(first[name], warmed[name]) == (".indexer." not in name), name
        is_buffer = not first[name].is_floating_point() or name.endswith("correction_bias")
        assert is_buffer or not torch.equal(warmed[name], last[name]), name
    biases = [name for name in first if name.endswith("correction_bias")]
    assert any(not torch.equal(warmed[name], last[name]) for name in biases)


def test_three_stages_train_the_model_then_the_indexers_then_both(small, indexed):
    """In the first every key is attended to, and nothing is measured of the indexers."""
    staged = small.without_noise(replace(indexed, dsa=replace(indexed.dsa, dense=2)))
    step = small.step(steps=9, config=staged, indexer_alone=True)
    stream = small.stream()
    plain = small.step(steps=9, config=replace(staged, dsa=None))
    plain.model.load_state_dict(
        {name: v for name, v in step.model.state_dict().items() if ".indexer." not in name}
    )
    first = state_of(step)
    dense = run(step, stream, 1, 2)
    for result, expected in zip(dense, run(plain, small.stream(), 1, 2), strict=True):
        assert not [name for name in result.means if name.startswith("indexer")]
        assert torch.equal(result.means["loss"], expected.means["loss"])
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(step.model.state_dict()[name], tensor), name
    second = state_of(step)
    alone = run(step, stream, 3, 5)
    third = state_of(step)
    joint = run(step, stream, 6, 9)
    for result in (*alone, *joint):
        assert 0 < result.means["indexer_kl"] < 5
        assert result.means["indexer_kl_uniform"] > 0
    names = [name for name in step.model.state_dict() if ".indexer." in name]
    for name in names:
        assert torch.equal(first[name], second[name]), name
        assert not torch.equal(second[name], third[name]), name
    for name in step.model.state_dict().keys() - set(names):
        assert torch.equal(second[name], third[name]), name
    assert not torch.equal(third["head.weight"], state_of(step)["head.weight"])


def test_the_indexers_warm_up_is_given_by_the_number_of_the_step(small, indexed, monkeypatch):
    phases = []
    loss = LanguageModel.loss

    def spy(self, *args, indexer_warmup=False, **options):
        phases.append(indexer_warmup)
        return loss(self, *args, indexer_warmup=indexer_warmup, **options)

    monkeypatch.setattr(LanguageModel, "loss", spy)
    results = run(small.step(6, config=small.without_noise(indexed)), small.stream(), 2, 5)
    assert phases == [True, True, False, False]
    for result in results:
        assert 0 < result.means["indexer_kl"] < result.means["indexer_kl_uniform"] + 1 < 5
        assert 0.2 < result.means["indexer_recall"] <= 1


PRODUCTION = ("v3.2", "v4-tiny", "v4.1-tiny", "qwen4-tiny")


@pytest.fixture(params=PRODUCTION)
def production(request, small) -> ModelConfig:
    """A production model whose attention selects a few of the tokens of a short text."""
    if request.param == "v3.2":
        dsa = DSAConfig(heads=2, dim=8, top_k=4, warmup=2, ties="topk")
        return replace(small.without_noise(small.config), dsa=dsa)
    config = replace(preset(request.param), vocab_size=61, dim=16, init_std=0.1)
    if config.csa is not None:
        csa = replace(config.csa, window=3, ratio=2, heavy_ratio=3, top_k=3, warmup=2)
        config = replace(config, csa=csa)
    if config.csa2 is not None:
        blocks = {"candidate_block": 2, "candidate_blocks": 2}
        config = replace(config, csa2=replace(config.csa2, **blocks))
    if config.qsa is not None:
        config = replace(config, qsa=replace(config.qsa, block=2, budget=4))
    return config


@pytest.mark.slow
def test_production_models_learn_in_every_part(small, production):
    """Losses fall, biases move, and indexers learn alone while they warm up, if they have a loss.

    The indexer of Qwen4-Exp has none: as in transformers, what it selects is not learnt.
    """
    alone = production.indexer is not None
    step = small.step(steps=24, config=production, indexer_alone=alone)
    stream = small.stream()
    first = state_of(step)
    early = run(step, stream, 1, 2)
    warmed = state_of(step)
    joint = run(step, stream, 3)
    last = state_of(step)
    for name, _ in step.model.named_parameters():
        indexer = ".indexer." in name
        still = indexer != alone if alone or indexer else False
        assert torch.equal(first[name], warmed[name]) == still, name
        assert torch.equal(warmed[name], last[name]) == (indexer and not alone), name
    means = [float(result.means["loss"]) for result in joint]
    assert sum(means[-4:]) < sum(means[:4]) - 0.2
    for result in (*early, *joint):
        assert ("indexer_kl" in result.means) == alone
    if alone:
        assert 0 < joint[-1].means["indexer_recall"] <= 1
    biases = [
        mixture.router.e_score_correction_bias
        for mixture in step.mixtures
        if mixture.config.balance.bias_rate
    ]
    learnt = [bias for bias in biases if bias is not None]
    assert bool(learnt) == (production.qsa is None)
    assert all(bias.any() for bias in learnt)


def test_micro_batches_of_production_models_add_up(small, production):
    """Losses that are means of a batch, of experts and of sequences, are of micro-batches."""
    balance = replace(production.moe.balance, sequence=0.0, expert=0.0)
    config = replace(production, mtp=None, moe=replace(production.moe, balance=balance))
    if config.csa2 is not None:  # values that are rounded differ in whole steps
        config = replace(config, csa2=replace(config.csa2, cache_formats="none"))
    batch = next(small.stream())
    results = []
    for rows in (None, 1):
        step = small.step(config=config, micro_batch_size=rows)
        losses, counts = step.forward_backward(batch, 1)
        results.append((step.model, losses["loss"], counts))
    (whole, loss, counts), (other, other_loss, other_counts) = results
    assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
    assert torch.equal(other_counts, counts)
    largest = max(
        float(p.grad.to_dense().abs().max()) for p in whole.parameters() if p.grad is not None
    )
    for (name, one), two in zip(whole.named_parameters(), other.parameters(), strict=True):
        # The indexers' losses are means over the tokens of a micro-batch.
        if one.grad is not None and ".indexer." not in name:
            expected = one.grad.to_dense()
            torch.testing.assert_close(
                two.grad.to_dense(), expected, rtol=1e-4, atol=1e-5 * largest
            )


def test_moba_attends_fully_in_its_last_phase(small, monkeypatch):
    attended = []
    forward = MoBA.forward

    def spy(self, *args, **options):
        attended.append(self.full)
        return forward(self, *args, **options)

    monkeypatch.setattr(MoBA, "forward", spy)
    gqa = GQAConfig(heads=2, kv_heads=1, head_dim=8)
    moba = MoBAConfig(block=4, top_k=2, full_from=0.5)
    config = replace(small.config, layers=1, mla=None, mtp=None, engram=None, gqa=gqa, moba=moba)
    run(small.step(6, config=config), small.stream(), 2, 6)
    assert attended == [False, False, True, True, True]


@pytest.mark.slow
def test_training_makes_indexers_find_what_attention_looks_at(small):
    """Compares trained indexers with untrained ones in a model that is trained as long.

    Each of the two phases has 40 steps.
    """
    config = replace(small.config, moe=None, engram=None, mtp=None, init_std=0.3)
    results = {}
    for weight in (0.0, 1.0):
        indexed = replace(config, dsa=DSAConfig(heads=4, dim=16, top_k=4, weight=weight))
        model = LanguageModel(indexed, seed=5).train()
        stream = Stream(small.tokens(), small.batch_size, 24, seed=3)
        measured = []
        optimizer = Optimizer(model, OptimConfig(lr=1e-2, warmup=3))
        for step, batch in zip(range(80), stream, strict=False):
            optimizer.begin_step()
            loss = model.loss(
                batch["ids"],
                batch["labels"],
                document_ids=batch["document_ids"],
                indexer_warmup=step < 40,
            )
            loss.total.backward()
            optimizer.clip()
            optimizer.step()
            measured.append(torch.stack(loss.indexer_loss).detach())
        results[weight] = [torch.stack(measured[end - 10 : end]).mean(0) for end in (40, 80)]
    for trained, idle in zip(results[1.0], results[0.0], strict=True):
        (loss, recall, uniform), (idle_loss, idle_lookup, _) = trained, idle
        assert loss < uniform
        assert loss < 0.6 * idle_loss
        assert recall > idle_lookup + 0.05


def test_every_part_of_the_model_learns(small):
    step = small.step(steps=3)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    run(step, small.stream())
    still = [name for name, p in step.model.named_parameters() if torch.equal(p, before[name])]
    assert not still


def spoil_row(step: TrainStep, losses: dict) -> None:
    step.model.tables[0].weight.grad._values()[3, 1] = torch.inf


def spoil_loss(step: TrainStep, losses: dict) -> None:
    losses["loss"] = losses["loss"] * torch.nan


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("what", ["nan", "infinite", "row", "loss"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(small, what, kind, capsys):
    """Parameters, optimizer state, rows and router biases do not change.

    The next step trains again.
    """
    spoils = {
        "nan": small.nan_gradient,
        "infinite": lambda step, losses: small.nan_gradient(step, losses, -torch.inf),
        "row": spoil_row,
        "loss": spoil_loss,
    }
    step = small.step(steps=5, kind=kind, config=small.without_noise(small.config))
    stream = small.stream()
    small.spoil(step, spoils[what], 3)
    run(step, stream, 1, 2)
    before = state_of(step)
    (skipped,) = run(step, stream, 3, 3)
    for name, tensor in state_of(step).items():
        assert torch.equal(tensor, before[name]), name
    assert skipped.values["skipped_steps"] == 1
    assert skipped.expert_counts is None
    finite = skipped.means["loss"].isfinite(), skipped.values["grad_norm"].isfinite()
    assert finite == (what != "loss", what == "loss")
    message = capsys.readouterr().err.replace("\n", " ")
    assert (
        f"step 3: got a {'loss' if what == 'loss' else 'gradient'} "
        "that is not finite, so nothing was" in message
    )

    (after,) = run(step, stream, 4, 4)
    state = state_of(step)
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert any(not torch.equal(state[name], before[name]) for name in biases)
    assert not torch.equal(state["head.weight"], before["head.weight"])
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())
    assert after.values["skipped_steps"] == 1 and after.expert_counts is not None


@pytest.mark.parametrize("piece", ["mtp", "indexer", "one micro-batch"])
def test_nan_from_one_part_of_the_loss_skips_the_step(small, indexed, monkeypatch, piece):
    """The forward gives NaN in MTP's loss, the indexers', or the second of two micro-batches."""
    config = small.without_noise(indexed if piece == "indexer" else small.config)
    step = small.step(steps=4, config=config, micro_batch_size=2)
    stream = small.stream()
    run(step, stream, 1, 2)
    before = state_of(step)
    loss = LanguageModel.loss
    calls = []

    def spoilt(self, *args, **options):
        result = loss(self, *args, **options)
        calls.append(result)
        if piece == "mtp":
            return result._replace(
                mtp=result.mtp * torch.nan, total=result.total + result.mtp * torch.nan
            )
        if piece == "indexer":
            nan = result.indexer_loss.loss * torch.nan
            return result._replace(
                indexer_loss=result.indexer_loss._replace(loss=nan), total=result.total + nan
            )
        if len(calls) == 1:
            return result
        return result._replace(
            next_token=result.next_token * torch.nan, total=result.total * torch.nan
        )

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "loss", spoilt)
        (skipped,) = run(step, stream, 3, 3)
    assert len(calls) == 2
    assert skipped.values["skipped_steps"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(step).items())
    run(step, stream, 4, 4)
    assert not torch.equal(step.model.head.weight, before["head.weight"])


def test_too_many_skipped_steps_in_a_row_raise(small):
    step = small.spoil(small.step(steps=8, skip_limit=3), small.nan_gradient, 2, 3, 5, 6, 7)
    with pytest.raises(
        Diverged,
        match=r"no finite gradient in 3 steps in a row, the last of them 7.*lower --optim\.lr",
    ):
        run(step, small.stream())
    assert (step.skipped, step.skipped_in_a_row) == (5, 3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_batch_without_any_label_changes_nothing(small, kind):
    """As one of chats may be: no loss is measured, and neither decay nor momentum moves weights."""
    step = small.step(kind=kind)
    stream = small.stream()
    run(step, stream, 1, 2)
    before = state_of(step)
    optimizer = step.optimizer.state_dict()
    optimizer = {name: tensor.clone() for name, tensor in optimizer.items()}
    batch = next(stream)
    result = step(batch | {"labels": torch.full_like(batch["labels"], -100)}, 3)
    assert not result.means and result.expert_counts is None
    assert float(result.values["grad_norm"]) == 0
    for parameter in step.optimizer.parameters.values():
        gradient = parameter.grad
        assert gradient is None or not gradient.to_dense().any()
    assert step.skipped == 0
    for name, tensor in state_of(step).items():
        assert torch.equal(before[name], tensor), name
    for name, tensor in step.optimizer.state_dict().items():
        assert torch.equal(optimizer[name], tensor), name
    assert 0 < float(step(next(stream), 4).means["loss"]) < 6


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_spike_is_skipped_where_that_is_asked(small, what, capsys):
    """A loss of twice its size, or a gradient of a hundred times, changes nothing."""

    def spoil(step: TrainStep, losses: dict) -> None:
        if what == "loss":
            losses["loss"] = losses["loss"] * 2
        else:
            for parameter in step.optimizer.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(100)

    results = []
    for factor in (None, 6.0):
        step = small.spoil(small.step(steps=12, skip_spikes=factor), spoil, 9)
        if step.spikes is not None:
            step.spikes.least = 8
        stream = small.stream()
        run(step, stream, 1, 8)
        before = state_of(step)
        (result,) = run(step, stream, 9, 9)
        same = all(torch.equal(tensor, before[name]) for name, tensor in state_of(step).items())
        results.append((result.values.get("skipped_steps"), same))
        run(step, stream, 10, 12)
        assert step.skipped == (0 if factor is None else 1)
    assert results == [(None, False), (1, True)]
    message = " ".join(capsys.readouterr().err.split())
    assert f"step 9: got a {what} of " in message
    assert "more than 6 deviations above the last steps', so nothing was updated" in message


def test_gates_and_touched_rows_are_measured(small, monkeypatch):
    """The mean of the gates is that of the module, and the rows are those of the gradient."""
    monkeypatch.setattr(step_module, "STREAM_INTERVAL", 2)
    step = small.step(steps=3, config=small.without_noise(small.config))
    gates = []
    step.model.blocks[1].engram.gate.register_forward_hook(
        lambda _module, _inputs, made: gates.append(made)
    )
    batch = next(small.stream())
    means = []
    for number in (1, 2, 3):
        result = step(batch, number)
        means.append(result.means.get("gate_mean_1"))
        if number == 1:
            # Of a sequence alone, before the batch.
            torch.testing.assert_close(means[0], gates[0].mean())
            assert gates[0].shape[0] == 1 and gates[1].shape[0] == small.batch_size
        rows = step.model.tables[0].weight.grad
        assert result.values["rows_touched"] == len(set(rows.coalesce().indices()[0].tolist()))
    assert [mean is None for mean in means] == [False, True, False]


def test_a_step_tells_whether_the_run_was_asked_to_stop(small):
    step = small.step()
    stream = small.stream()
    run(step, stream, 1, 1)
    assert not step.stopping and not step.asked_to_stop()
    step.stop_requested = lambda: True
    run(step, stream, 2, 2)
    assert step.stopping and step.asked_to_stop()
