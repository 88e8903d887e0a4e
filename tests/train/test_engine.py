"""engine.py under OLMo-core's own trainer: exact resume, one balance step, hostile checkpoints, signals."""

import json
import os
import pickle
import random
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from olmo_core.train.callbacks import Callback

from rorqual import checkpoint
from rorqual.data.stream import Stream, Tokens
from rorqual.layers.attention import GQAConfig, MLAConfig
from rorqual.layers.balance import BalanceConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moba import MoBA, MoBAConfig
from rorqual.layers.moe import MoE, MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.router import RouterConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.train import engine
from rorqual.train.config import OptimConfig
from rorqual.train.engine import Keeper, Loader, Module, Store, Written, fit, metrics_of, untouched_randomness
from rorqual.train.optim import Diverged, Optimizer
from rorqual.train.record import Recorder

CONFIG = ModelConfig(
    vocabulary=61,
    dim=16,
    layers=2,
    dense_width=24,
    mla=MLAConfig(heads=2, kv_lora_rank=8, nope_dim=8, rope_dim=4, value_dim=8),
    moe=MoEConfig(
        routed=4, active=2, width=8, first_dense=1, router=RouterConfig(noise=0.1), balance=BalanceConfig(sequence=0.01)
    ),
    engram=EngramConfig(layers=(1,), rows_per_head=(61, 61), heads=2, head_dim=4),
    mtp=MTPConfig(),
    init_std=0.02,
)
ROWS, LENGTH = 4, 12


def tokens(seed: int = 0) -> Tokens:
    """Forty documents of a language in which every word is followed by one of three."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(40):
        words = [int(rng.integers(1, 61))]
        for _ in range(int(rng.integers(4, 30))):
            words.append(1 + (words[-1] * 7 + int(rng.integers(3))) % 60)
        documents.append([0, *words])
    starts = np.cumsum([0, *map(len, documents)])
    ids = np.array([word for document in documents for word in document], dtype=np.uint16)
    return Tokens(ids, starts.astype(np.int64), np.array(list(map(len, documents))), 0, f"{seed}")


def parts(steps: int = 20, kind: str = "adamw", config: ModelConfig = CONFIG, **module) -> tuple[Module, Stream]:
    model = LanguageModel(config, seed=5)
    optimizer = Optimizer(model, OptimConfig(kind=kind, lr=5e-3, warmup=3))
    return Module(model, optimizer, steps=steps, **module), Stream(tokens(), ROWS, LENGTH, seed=3)


class At(Callback):
    """Does something when a step has been made."""

    def __init__(self, step: int, what) -> None:
        super().__init__()
        self.when, self.what = step, what

    def post_train_batch(self) -> None:
        if self.step == self.when:
            self.what(self.trainer)


def run(folder: Path, module: Module, stream: Stream, *, every: int = 100, keep: int = 2, **callbacks) -> int:
    folder.mkdir(exist_ok=True)
    recorder = Recorder(folder, ROWS * LENGTH, module.steps)
    keeper = Keeper(every, keep)
    loader = Loader(stream, folder, 61)
    return fit(module, loader, folder / "checkpoints", 1, {"recorder": recorder, "checkpointer": keeper, **callbacks})


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cancel(trainer) -> None:
    trainer.cancel_run("enough")


@pytest.mark.parametrize(("kind", "half"), [("adamw", 10), ("muon", 3)])
def test_ten_steps_and_ten_more_are_twenty_to_the_last_bit(tmp_path, kind, half):
    """Parameters, optimizer state and every loss; the noisy router draws random numbers all the while."""
    torch.manual_seed(1)
    straight, stream = parts(2 * half, kind)
    assert run(tmp_path / "straight", straight, stream) == 2 * half

    torch.manual_seed(1)
    assert run(tmp_path / "stopped", *parts(2 * half, kind), stop=At(half, cancel)) == half
    for draw in (torch.rand, np.random.rand):
        draw(17)
    random.seed(99)
    resumed, stream = parts(2 * half, kind)
    torch.nn.init.zeros_(resumed.model.head.weight)
    assert run(tmp_path / "stopped", resumed, stream) == 2 * half

    found, expected = resumed.state_dict(), straight.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    timing = {"tokens_per_second", "seconds", "seconds_left"}
    one, other = (
        [{k: v for k, v in line.items() if k not in timing} for line in lines(tmp_path / f)]
        for f in ("straight", "stopped")
    )
    assert one == other
    assert [line["step"] for line in one] == list(range(1, 2 * half + 1))
    assert one[-1]["loss"] < one[0]["loss"]


def test_a_checkpoint_written_beside_training_is_of_its_own_step(tmp_path):
    """Training goes on while it is written, on copies."""
    torch.manual_seed(1)
    run(tmp_path / "on", *parts(steps=6), every=3)
    found = parts(steps=6)[0].state_dict()
    checkpoint.load_state(tmp_path / "on" / "checkpoints" / "step3", found)
    torch.manual_seed(1)
    stopped, stream = parts(steps=6)
    run(tmp_path / "stopped", stopped, stream, stop=At(3, cancel))
    for name, tensor in stopped.state_dict().items():
        assert torch.equal(found[name], tensor), name


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_hostile_engine_checkpoints_are_never_opened(tmp_path):
    """The files that OLMo-core and DCP would unpickle, both beside our checkpoint and in it."""
    module, stream = parts(steps=4)
    run(tmp_path, module, stream, stop=At(2, cancel))
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    for step in ("step2", "step3", "step999", "."):
        for name in ("train/rank0.pt", "model_and_optim/.metadata", ".metadata", "rank0.pt"):
            path = tmp_path / "checkpoints" / step / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bomb)
        (tmp_path / "checkpoints" / step / ".metadata.json").write_text('{"version": "3.0.0"}')
    resumed, stream = parts(steps=4)
    assert run(tmp_path, resumed, stream) == 4
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert not marker.exists()
    assert not [
        path for path in (tmp_path / "checkpoints" / "step4").iterdir() if path.suffix not in (".json", ".safetensors")
    ]
    pickle.loads(bomb)
    assert marker.exists()  # the bomb was live


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    run(tmp_path, *parts(steps=9), every=3, keep=3)
    for victim in (tmp_path / "checkpoints" / "step9").glob("*.safetensors"):
        victim.write_bytes(victim.read_bytes()[:-9])
    module, stream = parts(steps=9)
    assert run(tmp_path, module, stream) == 9
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 10))
    checkpoint.verify(tmp_path / "checkpoints" / "step9")


def test_another_models_checkpoint_is_refused(tmp_path):
    run(tmp_path, *parts(steps=2))
    module, stream = parts(steps=4, kind="muon")
    with pytest.raises(ValueError, match="missing"):
        run(tmp_path, module, stream)
    module, stream = parts(steps=4)
    module.model.addresses.multipliers += 2
    with pytest.raises(ValueError, match=r"another model\.addresses\.multipliers"):
        run(tmp_path, module, stream)


def test_a_dry_run_leaves_no_trace():
    module, stream = parts()
    loader = Loader(stream, Path("."), 61)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), stream.state_dict()
    module.train_batch(loader.get_mock_batch(), dry_run=True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist(), stream.state_dict()) == states[1:]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in module.model.parameters())


def test_untouched_randomness_after_an_error_too():
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(ZeroDivisionError), untouched_randomness():
        _ = torch.rand(1), random.random(), 1 / 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def quiet(config: ModelConfig) -> ModelConfig:
    return replace(config, moe=replace(config.moe, router=RouterConfig()))


def test_micro_batches_add_up_to_the_batch_weighted_by_tokens():
    """Rows with fewer targets count for less: the mean is over tokens, not over micro-batches."""
    config = replace(
        quiet(CONFIG), mtp=None, moe=replace(CONFIG.moe, router=RouterConfig(), balance=BalanceConfig(sequence=0.0))
    )
    batch = next(parts()[1])
    batch["labels"][0, 3:] = -100
    batch["labels"][1] = -100
    batch = {"input_ids": batch["ids"], "labels": batch["labels"], "documents": batch["documents"]}
    found = []
    for rows in (None, 1, 3):
        module, _ = parts(config=config, micro_rows=rows)
        module.train_batch(batch)
        found.append(module)
    losses = [float(module.losses["train/CE loss"]) for module in found]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
    modules = found
    for module in modules[1:]:
        assert torch.equal(module.counts, modules[0].counts)
        for one, other in zip(modules[0].model.parameters(), module.model.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(other.grad.to_dense(), one.grad.to_dense(), rtol=1e-4, atol=1e-6)


def test_biases_move_once_a_step_by_the_counts_of_all_micro_batches(tmp_path):
    seen = []

    def look(trainer) -> None:
        module = trainer.train_module
        seen.append((module.counts.clone(), [m.router.e_score_correction_bias.clone() for m in module.mixtures]))

    module, stream = parts(steps=1, config=quiet(CONFIG), micro_rows=1)
    run(tmp_path, module, stream, look=At(1, look))
    ((counts, biases),) = seen
    assert len(module.mixtures) == 2  # the second block's and MTP's
    assert [type(m) for m in module.mixtures] == [MoE, MoE]
    assert counts.sum(1).tolist() == [ROWS * LENGTH * 2] * 2
    for count, bias in zip(counts.double(), biases, strict=True):
        torch.testing.assert_close(bias, 1e-3 * (count.mean() - count).sign().float())
    assert lines(tmp_path)[0]["max_violation"] == pytest.approx(
        float((counts.double().amax(1) / counts.double().mean(1)).max()) - 1
    )


@pytest.mark.parametrize("hyper", [HyperConfig(streams=3, iterations=4), HyperConfig(streams=2, kind="hc")], ids=str)
def test_streams_are_looked_at_now_and_then_and_not_touched(tmp_path, monkeypatch, hyper):
    config = replace(CONFIG, hyper=hyper)
    monkeypatch.setattr(engine, "LOOK", 3)
    torch.manual_seed(1)  # of the routers' noise
    module, stream = parts(steps=5, config=config)
    run(tmp_path / "seen", module, stream)
    seen = lines(tmp_path / "seen")
    assert [{"row_gain", "column_gain", "stream_spread"} <= line.keys() for line in seen] == [1, 0, 0, 1, 0]
    assert seen[0]["row_gain"] == pytest.approx(1, abs=0.1)
    assert seen[3]["stream_spread"] > 0
    monkeypatch.setattr(engine, "health", lambda *_: None)
    monkeypatch.setattr(engine, "STREAMS", ())
    torch.manual_seed(1)
    module, stream = parts(steps=5, config=config)
    run(tmp_path / "blind", module, stream)
    assert [line["loss"] for line in lines(tmp_path / "blind")] == [line["loss"] for line in seen]
    assert not any("row_gain" in line for line in lines(tmp_path / "blind"))


def test_biases_rest_late(tmp_path):
    module, stream = parts(steps=4, late=2)
    biases = []
    watch = {
        f"at{step}": At(
            step, lambda t: biases.append(t.train_module.mixtures[0].router.e_score_correction_bias.clone())
        )
        for step in (2, 4)
    }
    run(tmp_path, module, stream, **watch)
    assert biases[0].any()
    assert torch.equal(biases[0], biases[1])


def test_mtp_weighs_less_late(tmp_path):
    module, stream = parts(steps=6, mtp_late=0.1)
    run(tmp_path, module, stream)
    weight = CONFIG.mtp.weight
    batch = {name.replace("ids", "input_ids"): value for name, value in next(stream).items()}
    ids = (batch["input_ids"], batch["labels"])
    loss = module.model.loss(*ids, documents=batch["documents"])
    torch.testing.assert_close(module._minimised(loss), loss.total + (0.1 - weight) * loss.mtp)
    module.steps = 60
    assert module._minimised(loss) is loss.total


INDEXED = replace(CONFIG, dsa=DSAConfig(heads=2, dim=8, chosen=4, warmup=3))


def gradients(config: ModelConfig, **module) -> dict[str, torch.Tensor | None]:
    """Of every parameter after one batch."""
    trained, stream = parts(config=config, **module)
    trained._trainer = SimpleNamespace(global_step=1)
    batch = {name.replace("ids", "input_ids"): value for name, value in next(stream).items()}
    trained.model.train()
    trained._accumulate(batch)
    return {name: None if p.grad is None else p.grad.to_dense().clone() for name, p in trained.model.named_parameters()}


@pytest.mark.parametrize("rows", [None, 2])
def test_in_the_warm_up_the_indexers_loss_changes_no_bit_of_the_models_gradients(rows):
    without, found, sevenfold = (
        gradients(replace(quiet(INDEXED), dsa=replace(INDEXED.dsa, weight=weight)), micro_rows=rows)
        for weight in (0.0, 1.0, 7.0)
    )
    indexers = [name for name in found if ".inner." in name]
    assert len(indexers) == 3 * 5  # two blocks and MTP's
    for name, gradient in found.items():
        if name in indexers:
            assert gradient.isfinite().all() and gradient.any(), name
            torch.testing.assert_close(sevenfold[name], 7 * gradient, rtol=1e-4, atol=1e-8)
        else:
            assert torch.equal(gradient, without[name]), name


def test_indexers_learn_alone_in_their_warm_up_where_that_is_asked(tmp_path):
    module, stream = parts(steps=5, config=INDEXED, indexer_alone=True)
    states = [{name: tensor.clone() for name, tensor in module.model.state_dict().items()}]
    keep = {
        f"at{step}": At(
            step, lambda t: states.append({n: x.clone() for n, x in t.train_module.model.state_dict().items()})
        )
        for step in (3, 5)
    }
    run(tmp_path, module, stream, **keep)
    first, warmed, last = states
    for name, tensor in first.items():
        inner, buffer = ".inner." in name, not tensor.is_floating_point() or name.endswith("correction_bias")
        assert torch.equal(tensor, warmed[name]) == (not inner), name
        assert buffer or not torch.equal(warmed[name], last[name]), name
    assert any(not torch.equal(warmed[name], last[name]) for name in first if name.endswith("correction_bias"))


def test_the_phase_is_a_function_of_the_step_and_what_indexers_learn_is_recorded(tmp_path, monkeypatch):
    phases = []
    loss = LanguageModel.loss

    def spy(self, *args, warm=False, **known):
        phases.append(warm)
        return loss(self, *args, warm=warm, **known)

    monkeypatch.setattr(LanguageModel, "loss", spy)
    config = quiet(INDEXED)
    assert run(tmp_path, *parts(6, config=config), stop=At(2, cancel)) == 2
    begun = len(phases)
    assert run(tmp_path, *parts(6, config=config)) == 6
    assert phases[begun - 2 : begun] == [True, True]
    assert phases[-4:] == [True, False, False, False]
    for line in lines(tmp_path):
        assert 0 < line["indexer"] < 5
        assert 0.2 < line["indexer_recall"] <= 1
    straight = tmp_path / "straight"
    run(straight, *parts(6, config=config))
    for one, other in zip(lines(tmp_path), lines(straight), strict=True):
        assert [one[name] for name in ("loss", "indexer", "indexer_recall")] == [
            other[name] for name in ("loss", "indexer", "indexer_recall")
        ]


def test_moba_attends_fully_in_its_last_phase_after_a_resume_too(tmp_path, monkeypatch):
    attended = []
    forward = MoBA.forward
    monkeypatch.setattr(MoBA, "forward", lambda self, *a, **k: attended.append(self.full) or forward(self, *a, **k))
    gqa, moba = GQAConfig(heads=2, kv_heads=1, head_dim=8), MoBAConfig(block=4, chosen=2, full_from=0.5)
    config = replace(CONFIG, layers=1, mla=None, gqa=gqa, moba=moba, mtp=None, engram=None, hyper=None)
    assert run(tmp_path, *parts(6, config=config), stop=At(2, cancel)) == 2
    begun = len(attended)
    assert run(tmp_path, *parts(6, config=config)) == 6
    assert attended[begun - 2 : begun] == [False, False]
    assert attended[-4:] == [False, True, True, True]


def test_training_makes_indexers_find_what_attention_looks_at():
    """In both phases, of 40 steps each: against indexers that stay as they are, in a model that learns as much."""
    config = replace(CONFIG, moe=None, engram=None, mtp=None, init_std=0.3)
    found = {}
    for weight in (0.0, 1.0):
        indexed = replace(config, dsa=DSAConfig(heads=4, dim=16, chosen=4, weight=weight))
        model, stream, lessons = LanguageModel(indexed, seed=5).train(), Stream(tokens(), ROWS, 24, seed=3), []
        optimizer = Optimizer(model, OptimConfig(lr=1e-2, warmup=3))
        for step, batch in zip(range(80), stream, strict=False):
            loss = model.loss(batch["ids"], batch["labels"], documents=batch["documents"], warm=step < 40)
            loss.total.backward()
            optimizer.clip()
            optimizer.step()
            optimizer.zero_grad()
            lessons.append(torch.stack(loss.lesson).detach())
        found[weight] = [torch.stack(lessons[end - 10 : end]).mean(0) for end in (40, 80)]
    for (loss, recall), (idle_loss, idle_recall) in zip(found[1.0], found[0.0], strict=True):
        assert loss < 0.6 * idle_loss
        assert recall > idle_recall + 0.05


def test_every_part_of_the_model_learns(tmp_path):
    module, stream = parts(steps=3)
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    run(tmp_path, module, stream)
    still = [name for name, p in module.model.named_parameters() if torch.equal(p, before[name])]
    assert not still


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(tmp_path, number):
    handler = signal.getsignal(number)
    step = run(tmp_path, *parts(), kill=At(3, lambda trainer: os.kill(os.getpid(), number)))
    assert step == 3
    assert [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")] == [3]
    assert signal.getsignal(number) is handler


class Spoil(Callback):
    """Does something to what a step is about to be made of, in these steps."""

    def __init__(self, what, *steps: int) -> None:
        super().__init__()
        self.what, self.steps = what, steps

    def pre_optim_step(self) -> None:
        if self.step in self.steps:
            self.what(self.trainer.train_module)


def spoil_gradient(module: Module, value: float = torch.nan) -> None:
    module.model.blocks[0].ffn.down_proj.weight.grad.view(-1)[7] = value


def spoil_row(module: Module) -> None:
    gradient = module.model.tables[0].weight.grad
    gradient._values()[3, 1] = torch.inf


def spoil_loss(module: Module) -> None:
    module.losses["train/CE loss"] = module.losses["train/CE loss"] * torch.nan


SPOILS = {
    "nan": spoil_gradient,
    "infinite": lambda module: spoil_gradient(module, -torch.inf),
    "row": spoil_row,
    "loss": spoil_loss,
}


def strictly(line: str) -> dict:
    """JSON that any program reads: NaN and Infinity are none."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in {line}")

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("what", list(SPOILS))
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, what, kind, capsys):
    """Parameters, optimizer state, rows and router biases stay; the stream and the steps go on, and learning too."""
    module, stream = parts(steps=5, kind=kind, config=quiet(CONFIG))
    seen = {}

    def look(at: int) -> At:
        return At(at, lambda t: seen.update({at: {n: x.clone() for n, x in t.train_module.state_dict().items()}}))

    watch = {f"at{step}": look(step) for step in (2, 3, 4)}
    assert run(tmp_path, module, stream, spoil=Spoil(SPOILS[what], 3), **watch) == 5
    for name, tensor in seen[2].items():
        assert torch.equal(seen[3][name], tensor), name
    assert not all(torch.equal(seen[4][name], tensor) for name, tensor in seen[3].items())
    biases = [name for name in seen[2] if name.endswith("e_score_correction_bias")]
    assert any(not torch.equal(seen[4][name], seen[3][name]) for name in biases)
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values() if tensor.is_floating_point())
    found = [strictly(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    assert [line.get("skipped_steps", 0) for line in found] == [0, 0, 1, 1, 1]
    assert ("loss" in found[2], "grad_norm" in found[2]) == (what != "loss", what == "loss")
    assert "load" in found[3] and "load" not in found[2]
    assert stream.state_dict() == loaded(5)
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"step 3: got a {'loss' if what == 'loss' else 'gradient'} that is not finite, so nothing was" in said


def loaded(steps: int) -> dict:
    """Where the stream stands after so many batches."""
    stream = parts()[1]
    for _ in range(steps):
        next(stream)
    return stream.state_dict()


@pytest.mark.parametrize("part", ["mtp", "indexer", "one micro-batch"])
def test_nan_from_one_part_of_the_loss_skips_the_step(tmp_path, monkeypatch, part):
    """MTP's loss, the indexers', or one micro-batch of three: the forward itself gives NaN, in the third step."""
    loss, calls = LanguageModel.loss, []
    config = quiet(INDEXED if part == "indexer" else CONFIG)
    module, stream = parts(steps=4, config=config, micro_rows=2)

    def spoilt(self, *args, **known):
        found = loss(self, *args, **known)
        calls.append(module.trainer.global_step)
        # two micro-batches a step; the one that is whole has NaN in no place
        if calls[-1] != 3 or (part == "one micro-batch" and calls.count(3) == 2):
            return found
        extra = {"mtp": found.mtp, "indexer": found.lesson and found.lesson.loss}.get(part, found.next_token)
        nan = extra * torch.nan
        if part == "mtp":
            return found._replace(mtp=nan, total=found.total + nan)
        if part == "indexer":
            return found._replace(lesson=found.lesson._replace(loss=nan), total=found.total + nan)
        return found._replace(next_token=nan, total=nan)

    monkeypatch.setattr(LanguageModel, "loss", spoilt)
    states = {}
    watch = {
        f"at{step}": At(
            step, lambda t: states.update({t.global_step: {n: x.clone() for n, x in module.state_dict().items()}})
        )
        for step in (2, 3, 4)
    }
    assert run(tmp_path, module, stream, **watch) == 4
    assert all(torch.equal(states[3][name], tensor) for name, tensor in states[2].items())
    assert not torch.equal(states[4]["model.head.weight"], states[3]["model.head.weight"])
    found = [strictly(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped_steps", 0) for line in found] == [0, 0, 1, 1]


def test_a_resumed_run_repeats_its_skipped_steps_to_the_last_bit(tmp_path):
    def spoil() -> Spoil:
        return Spoil(spoil_gradient, 2, 3, 5)

    torch.manual_seed(1)
    straight, stream = parts(steps=6)
    run(tmp_path / "straight", straight, stream, spoil=spoil())
    torch.manual_seed(1)
    assert run(tmp_path / "stopped", *parts(steps=6), spoil=spoil(), stop=At(3, cancel)) == 3
    resumed, stream = parts(steps=6)
    assert run(tmp_path / "stopped", resumed, stream, spoil=spoil()) == 6
    assert (resumed.skipped, resumed.skipped_in_a_row) == (straight.skipped, straight.skipped_in_a_row) == (3, 0)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    timing = {"tokens_per_second", "seconds", "seconds_left"}
    one, other = (
        [{k: v for k, v in line.items() if k not in timing} for line in lines(tmp_path / f)]
        for f in ("straight", "stopped")
    )
    assert one == other


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_its_checkpoints_intact(tmp_path):
    """None is written while nothing is learnt, so none that was good is pushed out."""

    def poison(trainer) -> None:
        trainer.train_module.model.head.weight.data.fill_(torch.nan)

    with pytest.raises(Diverged, match=r"no finite loss in 4 steps in a row, the last of them 8.*lower --optim\.lr"):
        run(tmp_path, *parts(skip_limit=4), every=1, keep=2, poison=At(4, poison))
    found = checkpoint.steps(tmp_path / "checkpoints")
    assert [step for step, _ in found][-2:] == [3, 4]
    assert checkpoint.latest(tmp_path / "checkpoints") == found[-1][1]
    assert run(tmp_path, *parts(steps=5)) == 5


def test_a_row_of_skipped_steps_ends_with_the_first_good_one(tmp_path):
    spoil = Spoil(spoil_gradient, 2, 3, 5, 6, 8)
    module, stream = parts(steps=8, skip_limit=3)
    assert run(tmp_path, module, stream, every=2, keep=1, spoil=spoil) == 8
    assert (module.skipped, module.skipped_in_a_row) == (5, 1)
    # the last step saves, and leaves the one before it: what it holds is not known to be good
    assert [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")] == [4, 8]


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    """An update can make NaN of a finite gradient: the run ends, the checkpoints before it stay."""

    def poison(trainer) -> None:
        trainer.train_module.optimizer.state["embed.weight.exp_avg"].view(-1)[3] = torch.inf

    with pytest.raises(Diverged, match=r"step 6: got model\.embed\.weight that is not finite, so it was not saved"):
        run(tmp_path, *parts(), every=2, keep=1, poison=At(5, poison))
    # whether step 2 has given way to step 4 by then depends on how fast another thread writes
    assert checkpoint.steps(tmp_path / "checkpoints")[-1][0] == 4
    assert run(tmp_path, *parts(steps=6)) == 6


def test_a_checkpoint_that_is_not_finite_gives_way_to_the_one_before(tmp_path, capsys):
    run(tmp_path, *parts(steps=9), every=3, keep=3)
    folder = tmp_path / "checkpoints" / "step9"
    state = parts(steps=9)[0].state_dict()
    values = checkpoint.load_state(folder, state)
    state["optim.embed.weight.exp_avg_sq"].view(-1)[5] = torch.nan
    checkpoint.save_state(folder, state, values)
    module, stream = parts(steps=9)
    assert run(tmp_path, module, stream) == 9
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 10))
    assert checkpoint.latest(tmp_path / "checkpoints") == folder
    said = capsys.readouterr().err.replace("\n", " ")
    assert "got optim.embed.weight.exp_avg_sq with NaN or infinite numbers" in said
    assert "trying the checkpoint before it" in said


def test_the_newest_checkpoints_stay(tmp_path):
    run(tmp_path, *parts(steps=12), every=2, stop=At(5, cancel))
    assert [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")] == [4, 5]
    run(tmp_path, *parts(steps=12), every=2, stop=At(9, cancel))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step8", "step9"]


def test_a_full_disk_behind_training_ends_the_run_in_a_line(tmp_path, no_larger_file, capfd):
    """The checkpoint is written by another thread; the one before stays, and the run goes on once there is room."""

    def fill(trainer) -> None:
        while not (tmp_path / "checkpoints" / "step2").is_dir():
            time.sleep(0.01)
        no_larger_file(30_000)

    with pytest.raises(OSError, match=r"File too large: .*step4"):
        run(tmp_path, *parts(steps=9), every=2, full=At(3, fill))
    assert "Traceback" not in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step2"]
    no_larger_file(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert run(tmp_path, *parts(steps=5)) == 5
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_written_finishes_on_the_thread_that_asks():
    where, gate = [], threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = Written(pool.submit(gate.wait))
        future.add_done_callback(lambda _: where.append(threading.current_thread()))
        assert not future.done()
        gate.set()
        future.result()
        assert future.done()
        failed = Written(pool.submit(lambda: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            failed.result()
    assert where == [threading.current_thread()]


def test_the_store_takes_no_part_and_no_address(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="the whole"):
        store.load(tmp_path, parts()[0], load_optim_state=False)
    with pytest.raises(ValueError, match="local path"):
        store.dir_is_checkpoint("s3://bucket/run")
    with pytest.raises(FileNotFoundError):
        store.latest_checkpoint(tmp_path)


def test_metrics_are_named_by_us():
    assert metrics_of({"indexer_recall": 0.5, "indexer": 1.0}) == {"indexer": 1.0, "indexer_recall": 0.5}
    found = metrics_of(
        {"throughput/x": 1.0, "lr": 0.1, "train/CE loss": 2.0, "balance/sequence": 3.0, "max_violation": 4.0}
    )
    assert found == {"loss": 2.0, "lr": 0.1, "balance_sequence": 3.0, "max_violation": 4.0}
    assert next(iter(found)) == "loss"


def test_the_engine_leaves_the_number_of_threads_alone():
    assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())
