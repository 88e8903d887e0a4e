"""Tests trainer.py, from text to a finished folder: files, numbers, stops, resumption, refusals."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rorqual import checkpoint
from rorqual import config as configs
from rorqual.checkpoint import load_model, steps
from rorqual.cli.main import main
from rorqual.data.needle_config import NeedleConfig
from rorqual.data.needles import exams
from rorqual.data.stream import validation_batches
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tokenizer import train as train_tokenizer
from rorqual.layers.balance import BalanceConfig, max_violation
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.router import RouterConfig
from rorqual.model import LanguageModel
from rorqual.presets import preset
from rorqual.serve.generate import load
from rorqual.tables import TableConfig
from rorqual.train import trainer
from rorqual.train.config import DataConfig, OptimConfig, TaskConfig, TrainConfig
from rorqual.train.metrics import MEASURED
from rorqual.train.optim import Optimizer
from rorqual.train.run_folder import finished, losses, read_rollbacks
from rorqual.train.scores import needle_accuracy, validate
from rorqual.train.source import prepare
from rorqual.train.step import Diverged
from rorqual.train.trainer import Stopped, train


def stop_at(step: int):
    """Returns a callback that interrupts training after this step, as ctrl-C does."""

    def stop(line: dict) -> None:
        if line["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return stop


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_from_text_to_a_finished_folder(config, text):
    config = replace(config, validate_every=4)
    message: list[dict] = []
    folder = train(config, on_metrics=message.append)
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "train.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert lines(folder) == message
    assert configs.load(TrainConfig, folder / "train.json") == config
    assert [step for step, _ in steps(folder / "checkpoints")] == [6, 8]

    training = [line for line in message if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 9))
    assert {"loss", "total", "lr", "grad_norm", "max_violation", "balance_sequence"} <= training[
        0
    ].keys()
    assert {"tokens", "tokens_per_second", "seconds", "seconds_left"} <= training[0].keys()
    assert training[-1]["tokens"] == 8 * 4 * 24
    assert training[-1]["seconds_left"] == 0
    assert training[-1]["loss"] < training[0]["loss"] - 0.3
    assert losses(folder) == [line["loss"] for line in training]

    stored = [line for line in message if "validation_loss" in line]
    assert [line["step"] for line in stored] == [4, 8]
    tokens = prepare(config.data).tokens.validation
    again = validate(
        load_model(folder),
        validation_batches(tokens, 3, 24),
        tokens.bytes / len(tokens),
        torch.float32,
    )
    assert again["validation_loss"] == pytest.approx(stored[-1]["validation_loss"], rel=1e-5)
    assert again["bits_per_byte"] == pytest.approx(stored[-1]["bits_per_byte"], rel=1e-5)
    assert Tokenizer.load(folder).vocab_size == prepare(config.data).vocab_size

    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert finished(config)
    assert train(config) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


REMEDIES = ("sequence", "expert", "device", "communication", "z_loss")


def balanced(config: TrainConfig, balance: BalanceConfig, folder: str) -> TrainConfig:
    """Returns a config with two MoE layers, MTP's among them, without noise, with this balance."""
    moe = replace(config.model.moe, balance=replace(balance, devices=2), router=RouterConfig())
    model = replace(config.model, moe=moe, mtp=MTPConfig(), engram=None)
    return replace(
        config, model=model, folder=str(Path(config.folder).parent / folder), bias_rest=0.0, steps=3
    )


def test_load_and_every_loss_are_reported(config):
    """A step's load counts all tokens of all micro-batches.

    The losses that are minimised are those that are reported.
    """
    coefficients = dict(zip(REMEDIES, (0.01, 0.02, 0.03, 0.04, 0.05), strict=True))
    asked = balanced(config, BalanceConfig(**coefficients), "all")
    folder = train(replace(asked, micro_batch_size=1, log_every=2))
    training = [line for line in lines(folder) if "loss" in line]
    assert len(training) == 3
    for line in training:
        load = torch.tensor(line["load"])
        assert load.shape == (2, 4)
        assert load.sum(1).tolist() == [4 * 24 * 2] * 2
        assert line["max_violation"] == pytest.approx(max(map(max_violation, load)))
        assert line["max_violation"] > 0
        parts = {name: line[f"balance_{name}"] for name in REMEDIES}
        for name, value in parts.items():
            least = {"z_loss": 0.0, "communication": 0.5}.get(name, 0.9)
            assert value > least * coefficients[name]
        assert line["total"] == pytest.approx(
            line["loss"] + 0.3 * line["mtp"] + sum(parts.values()), rel=1e-5
        )
    model = load_model(folder)
    # Each load is that of its own MoE layer.
    for index, mixture in enumerate((model.blocks[1].ffn, model.mtp[0].block.ffn)):
        loads = torch.tensor([line["load"][index] for line in training], dtype=torch.float32)
        moved = 1e-3 * (loads.mean(1, keepdim=True) - loads).sign().sum(0)
        torch.testing.assert_close(mixture.router.e_score_correction_bias, moved)
    bare = train(
        replace(
            asked, model=replace(config.model, moe=None), folder=asked.folder + "_bare", steps=1
        )
    )
    assert not [line for line in lines(bare) if "load" in line]


@pytest.mark.slow
def test_every_remedy_moves_weights(config):
    """A loss that is configured and never added would leave the bits of a training without it.

    There are three steps, so that the bias cannot return to its start.
    """
    results = {}
    for name in ("none", "bias_rate", *REMEDIES):
        remedy = {} if name == "none" else {name: 0.5}
        model = load_model(
            train(
                balanced(
                    config, BalanceConfig(**{"bias_rate": 0.0, "sequence": 0.0} | remedy), name
                )
            )
        )
        mixtures = [model.blocks[1].ffn, model.mtp[0].block.ffn]
        results[name] = [
            (m.router.weight.detach(), m.router.e_score_correction_bias) for m in mixtures
        ]
    for name, mixtures in results.items():
        for (weight, bias), (plain, _) in zip(mixtures, results["none"], strict=True):
            assert bias.any() == (name == "bias_rate")
            assert torch.equal(weight, plain) == (name == "none")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_does_not(config, tmp_path):
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = train(replace(config, folder=str(tmp_path / name), seed=seed, steps=4))
        results.append((losses(folder), (folder / "model.safetensors").read_bytes()))
    assert results[0] == results[1]
    assert results[0][0][0] != results[2][0][0]


def test_another_seed_draws_other_weights(config, tmp_path):
    """The rate changes nothing, so that only initial values differ."""
    still = replace(config.optim, lr=1e-12)
    drawn = []
    for seed in (1, 2):
        folder = train(
            replace(config, folder=str(tmp_path / str(seed)), seed=seed, steps=1, optim=still)
        )
        drawn.append(load_model(folder).state_dict())
    for name in ("embed.weight", "blocks.0.attention.o_proj.weight", "tables.0.weight"):
        one = drawn[0][name].flatten()
        other = drawn[1][name].flatten()
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.5, name


@pytest.mark.slow
@pytest.mark.parametrize("tables", ["device", "host", "disk"])
def test_the_trial_of_a_step_changes_nothing(config, tables, tmp_path, monkeypatch):
    """Neither losses nor weights of a run that stops and resumes change."""
    results = []
    for name, trial in (("a", trainer.estimate_step_seconds), ("b", lambda *_: 1.0)):
        calls = []

        def counted(*arguments, calls=calls, trial=trial):
            calls.append(1)
            return trial(*arguments)

        monkeypatch.setattr(trainer, "estimate_step_seconds", counted)
        options = replace(
            config, folder=str(tmp_path / name), placement=tables, steps=16, save_every=2
        )
        with pytest.raises(Stopped):
            train(options, on_metrics=stop_at(4))
        folder = train(options)
        assert len(calls) == 2
        results.append((losses(folder), (folder / "model.safetensors").read_bytes()))
    assert results[0] == results[1]


def test_a_run_says_what_is_ahead_before_it_starts(config, capsys):
    tokens = len(prepare(config.data).tokens.train)
    small = 4 * tokens // (4 * 24)
    with pytest.raises(Stopped):
        train(replace(config, steps=small + 1), on_metrics=stop_at(6))
    message = capsys.readouterr().err.splitlines()
    total = (small + 1) * 4 * 24
    (ahead,) = [
        line
        for line in message
        if line.startswith(f"{small + 1} steps of 4 x 24 tokens: {total:,} tokens")
    ]
    assert ahead.endswith("4 epochs of the text")
    (warning,) = [line for line in message if "more than 4 times" in line]
    assert warning.endswith(f"try --steps {small}")
    lasting = [line for line in message if "steps ahead take about" in line]
    estimate = r"the {} steps ahead take about \d+ (seconds|minutes|hours), by {}"
    assert len(lasting) == 2
    assert re.fullmatch(estimate.format(small + 1, "a forward pass"), lasting[0])
    assert re.fullmatch(estimate.format(small - 4, "the first 5"), lasting[1])

    train(replace(config, steps=3, folder=f"{config.folder}-short"))
    message = capsys.readouterr().err
    assert f"3 steps of 4 x 24 tokens: 288 tokens, {288 / tokens:.2g} epochs of the text" in message
    assert "more than 4 times" not in message
    assert "steps ahead" not in message


@pytest.mark.parametrize("tables", ["host", "disk"])
def test_tables_elsewhere_are_refused_for_a_model_without_any(config, tables):
    with pytest.raises(
        ValueError, match=f"got {tables} for a model without Engram.*--model.engram default"
    ):
        train(replace(config, placement=tables, model=replace(config.model, engram=None)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4-tiny", "v4.1-tiny", "qwen4-tiny"])
def test_production_models_train_from_text_stop_and_go_on(config, tmp_path, name):
    """A run that was stopped ends with the bits of one that was not; its folder generates."""
    model = replace(preset(name), vocab_size=300, dim=32)
    config = replace(config, model=model, validate_every=4)
    straight = train(replace(config, folder=str(tmp_path / "straight")))
    with pytest.raises(Stopped):
        train(config, on_metrics=stop_at(5))
    folder = train(config)
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == (straight / "model.safetensors").read_bytes()
    assert losses(folder)[-1] < losses(folder)[0]
    run = load(folder, device="cpu")
    assert run.config == model
    text = run.generate("The whale", max_new_tokens=12, temperature=0.0)
    assert text == load(straight, device="cpu").generate(
        "The whale", max_new_tokens=12, temperature=0.0
    )
    assert f"{config.steps}" in str(lines(folder)[-1]["step"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_called_again_is_as_if_never_stopped(config, tmp_path, number, capsys):
    straight = train(replace(config, folder=str(tmp_path / "straight"), validate_every=3))

    def stop(line: dict) -> None:
        if line["step"] == 5:
            os.kill(os.getpid(), number)

    config = replace(config, validate_every=3)
    with pytest.raises(Stopped, match=r"stopped at step 5 of 8.*the same command goes on"):
        train(config, on_metrics=stop)
    assert "the same command goes on" in capsys.readouterr().err.replace("\n", " ")
    assert not finished(config)
    assert not (Path(config.folder) / "model.safetensors").exists()
    folder = train(config)
    assert (folder / "model.safetensors").read_bytes() == (
        straight / "model.safetensors"
    ).read_bytes()
    one, other = (
        [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(f)]
        for f in (straight, folder)
    )
    assert one == other


def test_rows_that_learn_on_the_disk_are_those_of_the_device(config, tmp_path):
    """The run stops between two checkpoints and resumes.

    Every bit is that of a run with rows on the device.
    """
    straight = train(replace(config, folder=str(tmp_path / "straight"), steps=10))

    def stop(line: dict) -> None:
        if line["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    config = replace(config, placement="disk", micro_batch_size=4)
    with pytest.raises(Stopped):
        train(replace(config, steps=10), on_metrics=stop)
    with pytest.raises(ValueError, match="placement differ"):
        train(replace(config, steps=10, placement="device"))
    folder = train(replace(config, steps=10))
    assert losses(folder) == losses(straight)
    ours = load_model(folder).state_dict()
    theirs = load_model(straight).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    elsewhere = load_model(folder, tables=TableConfig(placement="disk"))
    rows = torch.arange(elsewhere.tables[0].rows)
    assert torch.equal(elsewhere.tables[0].prefetch(rows).wait(), theirs["tables.0.weight"])
    assert not any(name.startswith("tables.") for name in elsewhere.state_dict())


@pytest.mark.parametrize("where", ["row", "loss"])
def test_wherever_rows_learn_a_step_that_is_not_finite_leaves_them(
    config, tmp_path, monkeypatch, where
):
    """In device memory, host memory and on a disk the run is the same.

    Its third and fourth step update nothing.
    """
    clip = Optimizer.clip
    loss = LanguageModel.loss
    batches = []  # the first is that of the engine's dry run

    def spoilt_clip(self):
        gradient = self.parameters["tables.0.weight"].grad
        if where == "row" and len(batches) in (4, 5):
            gradient._values()[2, 3] = torch.nan
        return clip(self)

    def spoilt_loss(self, *args, **expected):
        result = loss(self, *args, **expected)
        if self.training and torch.is_grad_enabled():
            batches.append(result)
        spoilt = where == "loss" and len(batches) in (4, 5)
        return result._replace(total=result.total * torch.nan) if spoilt else result

    monkeypatch.setattr(Optimizer, "clip", spoilt_clip)
    monkeypatch.setattr(LanguageModel, "loss", spoilt_loss)
    results = []
    for tables in ("device", "host", "disk"):
        batches.clear()
        folder = train(replace(config, placement=tables, folder=str(tmp_path / tables)))
        metrics = [
            (line.get("loss"), line.get("skipped_steps")) for line in lines(folder) if "lr" in line
        ]
        assert [skipped for _, skipped in metrics] == [None, None, 1, 2, 2, 2, 2, 2]
        results.append((metrics, load_model(folder).state_dict()))
    (first, state), *others = results
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())
    for metrics, other in others:
        assert metrics == first
        assert all(torch.equal(other[name], value) for name, value in state.items())


def test_a_model_whose_validation_is_not_finite_is_not_finished(config, monkeypatch):
    """At a rate of 1e30 only the first update happens.

    Fewer steps are left than would end the run.
    """
    config = replace(config, optim=OptimConfig(lr=1e30, warmup=0), steps=4, placement="disk")
    for _ in range(2):
        with pytest.raises(
            Diverged, match=r"validation loss that is not finite after step 4.*lower --optim\.lr"
        ):
            train(config)
        assert not finished(config)
        assert not (Path(config.folder) / "model.safetensors").exists()
    metrics = (Path(config.folder) / "metrics.jsonl").read_text()
    assert "NaN" not in metrics and "Infinity" not in metrics
    with pytest.raises(Diverged, match="in 3 steps in a row"):
        train(replace(config, skip_limit=3, folder=config.folder + "_3"))


def test_rows_that_learn_in_host_memory_are_those_of_the_device(config, tmp_path):
    """The run stops and resumes.

    Its weights' file is that of a run with rows on the device, byte for byte.
    """
    straight = train(replace(config, folder=str(tmp_path / "straight"), steps=6))

    def stop(line: dict) -> None:
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    config = replace(config, placement="host", steps=6)
    with pytest.raises(Stopped):
        train(config, on_metrics=stop)
    folder = train(config)
    assert losses(folder) == losses(straight)
    assert (folder / "model.safetensors").read_bytes() == (
        straight / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_longer_run_that_was_killed_is_not_finished(config, tmp_path, monkeypatch):
    """The shorter run's model exists all the time.

    It also exists between the last checkpoint and the new model.
    """
    config = replace(config, placement="disk")
    folder = train(replace(config, steps=3))
    straight = shutil.copytree(folder, tmp_path / "straight")
    config = replace(config, steps=6)
    save = checkpoint.save_model

    def stop(line: dict) -> None:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(config, on_metrics=stop)
    assert not finished(config)
    monkeypatch.setattr(checkpoint, "save_model", lambda *_: stop({}))
    with pytest.raises(RuntimeError, match="killed"):
        train(config)
    assert not finished(config)
    monkeypatch.setattr(checkpoint, "save_model", save)
    assert train(config) == folder
    assert finished(config)
    train(replace(config, folder=str(straight)))
    ours, theirs = (load_model(each).state_dict() for each in (folder, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


NO_SPACE = (
    "expected room to write; checkpoints written before are good, "
    "and the same command goes on once there is room"
)


def test_tokenising_on_a_full_disk_is_reported_in_a_line(config, tmp_path, no_larger_file):
    data = replace(config.data, cache=str(tmp_path / "cache"))
    prepare(data)
    shutil.rmtree(tmp_path / "cache" / "tokens")
    no_larger_file(4096)
    with pytest.raises(OSError, match=f"got file too large, {NO_SPACE}") as caught:
        train(replace(config, data=data))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    no_larger_file(2**40)
    assert len(losses(train(replace(config, data=data, steps=2)))) == 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_metrics_on_a_full_disk_are_reported_in_a_line(config):
    folder = train(replace(config, steps=2))
    (folder / "metrics.jsonl").rename(folder / "kept.jsonl")
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"got no space left on device, {NO_SPACE}") as caught:
        train(replace(config, steps=4))
    assert "\n" not in str(caught.value)
    assert [step for step, _ in steps(folder / "checkpoints")] == [2]
    (folder / "metrics.jsonl").unlink()
    (folder / "kept.jsonl").rename(folder / "metrics.jsonl")
    assert len(losses(train(replace(config, steps=4)))) == 4


@pytest.mark.slow
def test_a_full_disk_is_one_line_on_the_command_line(config, tmp_path):
    """The checkpoint at step 3 does not fit; before it, the text and the first step are logged."""
    configs.save(config, Path(config.folder) / "train.json")
    prepare(config.data)
    command = f"ulimit -f 40; exec {sys.executable} -m rorqual train {config.folder}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    *before, last = done.stderr.splitlines()
    assert last.startswith("rorqual: error: ") and NO_SPACE in last
    assert re.search(r"step3[^:]*: got file too large", last)
    assert "Traceback" not in done.stderr and len(before) <= 9


def test_engram_stands_on_the_padding_of_the_tokenizer_it_is_given(config, tmp_path):
    ours = prepare(config.data).tokenizer
    ours.save(tmp_path / "foreign")
    named = json.loads((tmp_path / "foreign" / "tokenizer_config.json").read_text()) | {
        "pad_token": ours.token(40)
    }
    (tmp_path / "foreign" / "tokenizer_config.json").write_text(json.dumps(named))
    ended = configs.replace(config.model, "engram.eos_id", 7)
    data = replace(config.data, tokenizer=str(tmp_path / "foreign"))
    config = replace(config, data=data, model=ended, steps=2)
    folder = train(config)
    assert Tokenizer.load(tmp_path / "foreign").pad_id == 40
    expected = configs.replace(configs.replace(ended, "engram.pad_id", 40), "engram.eos_id", 0)
    assert load_model(folder).config == expected
    assert configs.load(TrainConfig, folder / "train.json") == config
    assert finished(config)
    train(replace(config, steps=3))
    assert len(losses(folder)) == 3


def test_bfloat16_and_muon_train_too(config):
    folder = train(
        replace(config, dtype="bfloat16", optim=replace(config.optim, kind="muon"), steps=6)
    )
    assert losses(folder)[-1] < losses(folder)[0] - 0.2


@pytest.mark.slow
@pytest.mark.parametrize("tables", ["device", "disk"])
def test_killed_and_called_again_is_as_if_never_killed(config, tmp_path, tables):
    """The whole process gets kill -9, wherever it is; then the same command runs again."""
    config = replace(config, steps=60, save_every=10)
    straight = train(replace(config, folder=str(tmp_path / "straight")))
    config = replace(config, placement=tables)
    configs.save(config, tmp_path / "wanted.json")
    code = (
        "import sys; from rorqual import config; from rorqual.train.config import TrainConfig\n"
        "from rorqual.train.trainer import train\n"
        "train(config.load(TrainConfig, sys.argv[1]), "
        "on_metrics=lambda line: print(line['step'], flush=True))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "wanted.json")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for offset in ("25", "47"):
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            next(line for line in process.stdout if line.strip() == offset)
            process.kill()
    assert {step for step, _ in steps(Path(config.folder) / "checkpoints")} <= {20, 30, 40}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("31", "41")
    folder = Path(config.folder)
    assert losses(folder) == losses(straight)
    ours = load_model(folder).state_dict()
    theirs = load_model(straight).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


NEEDLES = NeedleConfig(
    keys=4,
    values=4,
    filler=2,
    needles=2,
    asked=2,
    drill=4,
    shortest=16,
    alone=1,
    grow=2,
    questions=4,
)


@pytest.mark.slow
def test_questions_in_place_of_a_text_stop_and_go_on_too(config, tmp_path):
    """Texts grow during training, and the stop comes after they grew; Engram addresses raw ids."""
    config = replace(
        config, needles=NEEDLES, seq_len=32, validate_every=4, data=DataConfig(source="nowhere")
    )
    straight = train(replace(config, folder=str(tmp_path / "straight")))

    def stop(line: dict) -> None:
        if line["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped):
        train(config, on_metrics=stop)
    folder = train(config)
    assert (folder / "model.safetensors").read_bytes() == (
        straight / "model.safetensors"
    ).read_bytes()
    stored = [line for line in lines(folder) if "accuracy" in line]
    assert [line["step"] for line in stored] == [4, 8]
    other = [line for line in lines(straight) if "accuracy" in line]
    assert [line | {"seconds": 0} for line in stored] == [line | {"seconds": 0} for line in other]
    again = needle_accuracy(load_model(folder), exams(NEEDLES, 4, 32))
    assert {name: stored[-1][name] for name in again} == again
    assert not (folder / "tokenizer.json").exists()
    with pytest.raises(ValueError, match=r"another run \(needles\.filler differ\)"):
        train(replace(config, needles=replace(NEEDLES, filler=3)))
    with pytest.raises(
        ValueError, match=r"model\.vocab_size: got 10, expected at least the needles' 11"
    ):
        train(
            replace(
                config, model=replace(config.model, vocab_size=10), folder=str(tmp_path / "narrow")
            )
        )


def stopping(offset: int):
    def stop(line: dict) -> None:
        if line["step"] == offset:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


@pytest.mark.parametrize("tables", ["device", pytest.param("host", marks=pytest.mark.slow)])
def test_a_stopped_run_is_read_at_its_newest_step(config, tables, capsys):
    """It is read by its folder or by a checkpoint's, from Python and from the command line.

    A finished run is its final model.
    """
    config = replace(config, placement=tables)
    with pytest.raises(Stopped):
        train(config, on_metrics=stopping(5))
    folder = Path(config.folder)
    assert not (folder / "model.safetensors").exists()
    capsys.readouterr()
    text = load(folder).generate("1. A whale", max_new_tokens=6, temperature=0)
    assert f"{folder}: not finished, read at step 5 of 8" in capsys.readouterr().err.replace(
        "\n", " "
    )
    assert (
        load(folder / "checkpoints" / "step5").generate(
            "1. A whale", max_new_tokens=6, temperature=0
        )
        == text
    )
    earlier = load(folder / "checkpoints" / "step3")
    assert "read at step 3 of 8" in capsys.readouterr().err.replace("\n", " ")
    saved = {}
    for path in (folder / "checkpoints" / "step3").glob("*.safetensors"):
        saved |= load_file(path)
    for name, tensor in earlier.model.state_dict().items():
        assert torch.equal(tensor, saved[f"model.{name}"])

    for words in (["generate", "{}", "1. A"], ["eval", "{}", "--seq-len", "24"], ["report", "{}"]):
        assert main([words[0], words[1].format(folder), *words[2:]]) == 0
        assert "not finished, read at step 5 of 8" in capsys.readouterr().err.replace("\n", " ")
    assert main(["eval", str(folder / "checkpoints" / "step3"), "--json"]) == 0
    capsys.readouterr()
    assert main(["memory", str(folder), "1. A", "--suppress", " whale", "--save"]) == 1
    assert "edits are saved in a run that is finished" in capsys.readouterr().err
    assert not (folder / "model.safetensors").exists()

    train(config)
    assert "resuming at step 5 of 8" in capsys.readouterr().err.replace("\n", " ")
    final = load(folder).model.state_dict()
    assert "not finished" not in capsys.readouterr().err
    last = load(folder / "checkpoints" / "step8").model.state_dict()
    assert all(torch.equal(last[name], final[name]) for name in final)
    assert (
        main(
            [
                "memory",
                str(folder / "checkpoints" / "step8"),
                "1. A",
                "--suppress",
                " whale",
                "--save",
            ]
        )
        == 1
    )
    with pytest.raises(Stopped):
        train(replace(config, steps=12), on_metrics=stopping(10))
    capsys.readouterr()
    load(folder)
    assert "not finished, read at step 10 of 12" in capsys.readouterr().err.replace("\n", " ")


def test_a_run_that_cannot_be_read_yet_says_what_to_do(config, tmp_path, capsys):
    def stop(line: dict) -> None:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(config, on_metrics=stop)
    folder = Path(config.folder)
    capsys.readouterr()
    for command in ("generate", "eval", "report"):
        assert main([command, str(folder), *(["1. A"] if command == "generate" else [])]) == 1
        message = capsys.readouterr().err
        assert f"go on: rorqual train {folder}" in message
        assert len(message.splitlines()) == 1
    config = replace(config, placement="disk", folder=str(tmp_path / "disk"))
    with pytest.raises(Stopped):
        train(config, on_metrics=stopping(5))
    with pytest.raises(ValueError, match="rows learn on the disk"):
        load(config.folder)
    alone = shutil.copytree(
        Path(config.folder) / "checkpoints" / "step5", tmp_path / "alone" / "there" / "step5"
    )
    with pytest.raises(ValueError, match="expected it inside its run"):
        load(alone)
    with pytest.raises(FileNotFoundError, match=f"did you mean {config.folder}"):
        load(Path(config.folder) / "checkpoints")


@pytest.mark.slow
def test_reading_while_training_writes_sees_whole_checkpoints_only(config, tmp_path):
    """Each checkpoint is removed when the next exists; a read always gets one step's values."""
    config = replace(config, steps=20, save_every=1, keep=1, validate_every=0)
    folder = Path(config.folder)
    read = []
    failed = []
    stop = threading.Event()

    def reader() -> None:
        while not stop.is_set():
            try:
                if steps(folder / "checkpoints"):
                    read.append(load_model(folder).state_dict()["head.weight"])
            except Exception as error:
                failed.append(error)
                return

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        train(config)
    finally:
        stop.set()
        thread.join()
    assert not failed, failed
    assert len(read) > 1
    assert all(tensor.isfinite().all() for tensor in read)


@pytest.mark.slow
def test_validation_and_samples_change_no_number_of_training(config, tmp_path):
    quiet = train(replace(config, folder=str(tmp_path / "quiet"), validate_every=0))
    loud = train(replace(config, validate_every=1))
    assert losses(quiet) == losses(loud)
    assert (quiet / "model.safetensors").read_bytes() == (loud / "model.safetensors").read_bytes()
    stored = [line for line in lines(loud) if "validation_loss" in line]
    assert [line["step"] for line in stored] == list(range(1, 9))
    assert all(isinstance(line["sample"], str) and line["prompt"] for line in stored)
    assert len({line["prompt"] for line in stored}) == 1
    assert [line["step"] for line in lines(quiet) if "validation_loss" in line] == [8]


def test_a_run_is_validated_ten_times_and_its_best_weights_are_kept(config, capsys):
    """The best has the lowest validation loss over the same sample, wherever the run was stopped.

    It is not a step to resume from.
    """
    config = replace(config, steps=30, optim=replace(config.optim, lr=0.05), save_every=12)
    with pytest.raises(Stopped):
        train(config, on_metrics=stopping(15))
    folder = train(config)
    stored = {
        line["step"]: line["validation_loss"] for line in lines(folder) if "validation_loss" in line
    }
    assert list(stored) == [10, 20, 30]
    assert [step for step, _ in steps(folder / "checkpoints")] == [24, 30]
    capsys.readouterr()
    best = load(folder / "checkpoints" / "best")
    message = capsys.readouterr().err.replace("\n", " ")
    tokens = prepare(config.data).tokens.validation
    sample = [next(iter(validation_batches(tokens, 4, 24)))]
    result = validate(best.model, sample, tokens.bytes / len(tokens), torch.float32)[
        "validation_loss"
    ]
    final = validate(load_model(folder), sample, tokens.bytes / len(tokens), torch.float32)[
        "validation_loss"
    ]
    lowest = min([*(loss for step, loss in stored.items() if step < 30), final])
    assert result == pytest.approx(lowest, rel=1e-5)
    assert f"(validation loss {result:.4f})" in message


def chats_file(path: Path) -> Path:
    """Writes chats whose answers are one of two words, by the question."""
    lines = []
    for n in range(60):
        word, answer = ("whale", "sea") if n % 2 else ("eagle", "sky")
        question = {"role": "user", "content": f"Where does {word} {n * 7919 % 1000} live?"}
        chat = [question, {"role": "assistant", "content": f"In the {answer}."}]
        lines.append(json.dumps({"messages": chat}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_run_is_tuned_on_chats_and_answers_by_its_template(config, tmp_path):
    """The weights begin as the first run's; the folder has the template that serving fills."""
    first = train(config)
    file = chats_file(tmp_path / "chats.jsonl")
    tuned = replace(
        config,
        init_from=str(first),
        folder=str(tmp_path / "tuned"),
        data=replace(config.data, source=str(file), column="messages"),
        seq_len=64,
        steps=2,
    )
    still = train(replace(tuned, folder=str(tmp_path / "still"), optim=OptimConfig(lr=1e-30)))
    before, after = (load_file(path / "model.safetensors") for path in (first, still))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not {name for name in moved if "e_score_correction_bias" not in name}
    folder = train(replace(tuned, steps=12))
    made = losses(folder)
    assert len(made) == 12 and min(made) > 0
    assert sum(made[-3:]) < sum(made[:3]) - 1
    assert scores_of(folder) < scores_of(still) - 0.5
    run = load(folder, device="cpu")
    assert run.tokenizer.backend.to_str() == load(first, device="cpu").tokenizer.backend.to_str()
    messages = [{"role": "user", "content": "Where does whale 7 live?"}]
    ids = run.chat(messages)
    assert run.tokenizer.decode(ids) == "<|end|>user\nWhere does whale 7 live?<|end|>assistant\n"
    held_out = prepare(replace(tuned.data, tokenizer=str(first))).tokens.validation
    assert 0 < held_out.labels < len(held_out)
    loss = validate(run.model, validation_batches(held_out, 2, 64), 1.0, torch.float32)
    assert loss["validation_loss"] == pytest.approx(scores_of(folder), rel=1e-5)


def scores_of(folder: Path) -> float:
    return next(
        line["validation_loss"] for line in lines(folder)[::-1] if "validation_loss" in line
    )


def test_weights_of_another_model_are_refused(config, tmp_path):
    first = train(replace(config, steps=1))
    other = replace(config, folder=str(tmp_path / "other"), init_from=str(first))
    train_tokenizer(["a text of other words"] * 9, 270).save(tmp_path / "tokenizer")
    for wrong, message in (
        (replace(other, model=replace(other.model, dense_width=40)), "another dense_width"),
        (replace(other, init_from=str(tmp_path / "none")), "expected a run folder"),
        (replace(other, folder=str(first), steps=2), "init_from differ"),
        (replace(other, placement="host"), "expected --placement device"),
        (
            replace(other, data=replace(other.data, tokenizer=str(tmp_path / "tokenizer"))),
            "expected its tokenizer",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(wrong)
    shutil.rmtree(first / "checkpoints")
    with pytest.raises(ValueError, match="another folder"):
        train(replace(other, folder=str(first), steps=2))


def test_a_tuned_run_is_resumed_without_the_run_it_began_with(config, tmp_path, monkeypatch):
    """Nor does the folder matter from which a relative path was given."""
    monkeypatch.chdir(tmp_path)
    train(config)
    tuned = replace(config, init_from="run", folder=str(tmp_path / "tuned"), steps=4, save_every=2)
    straight = losses(train(replace(tuned, folder=str(tmp_path / "straight"))))
    folder = train(replace(tuned, steps=2))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.rmtree(config.folder)
    with pytest.raises(ValueError, match="init_from differ"):
        train(tuned)
    train(replace(tuned, init_from="../run"))
    assert len(losses(folder)) == len(straight) == 4
    with pytest.raises(ValueError, match="expected a run folder"):
        train(replace(tuned, folder=str(tmp_path / "new")))


def test_the_best_weights_of_a_run_are_trained_on(config, tmp_path):
    first = train(replace(config, validate_every=2))
    best = first / "checkpoints" / "best"
    tuned = replace(config, init_from=str(best), folder=str(tmp_path / "tuned"), steps=1)
    folder = train(replace(tuned, optim=OptimConfig(lr=1e-30)))
    expected = load_model(best).state_dict()
    after = load_model(folder).state_dict()
    for name in expected.keys() - {n for n in expected if "e_score_correction_bias" in n}:
        assert torch.equal(expected[name], after[name]), name
    texts = {Tokenizer.load(path).backend.to_str() for path in (first, folder)}
    assert len(texts) == 1


def test_how_a_model_is_trained_on_may_differ_from_how_it_was(config, tmp_path, capsys):
    """Its indexers warm up again, which the log says, unless their phases are set to 0."""
    dsa = DSAConfig(heads=2, dim=16, top_k=4, warmup=2, dense=1)
    model = replace(config.model, dsa=dsa, mtp=MTPConfig())
    first = train(replace(config, model=model, steps=5, indexer_alone=True))
    capsys.readouterr()
    tuned = replace(config, model=model, init_from=str(first), indexer_alone=True, steps=1)
    train(replace(tuned, folder=str(tmp_path / "again")))
    message = " ".join(capsys.readouterr().err.split())
    assert "warm up again and alone are trained, until step 3 of 1" in message
    assert "--model.dsa.dense 0 --model.dsa.warmup 0 trains on as they are" in message
    moe = replace(model.moe, balance=BalanceConfig(bias_rate=0.0), router=RouterConfig())
    other = replace(
        model, dsa=replace(dsa, warmup=0, dense=0), mtp=MTPConfig(weight=0.1), moe=moe, init_std=0.5
    )
    folder = train(replace(tuned, model=other, folder=str(tmp_path / "on")))
    assert "warm up again" not in capsys.readouterr().err
    before, after = (load_file(path / "model.safetensors") for path in (first, folder))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "head.weight" in moved and any(".indexer." in name for name in moved)
    wrong = replace(tuned, model=replace(model, dsa=replace(dsa, top_k=8)))
    with pytest.raises(ValueError, match=r"another dsa\.top_k"):
        train(replace(wrong, folder=str(tmp_path / "wrong")))


def test_a_stop_during_a_validation_ends_it_and_it_is_made_up_for(config, tmp_path, monkeypatch):
    """SIGTERM comes in the first of many batches; the resumed run has every line."""
    config = replace(config, validate_every=3, validation_tokens=10**6)
    straight = train(replace(config, folder=str(tmp_path / "straight")))
    loss = LanguageModel.loss
    calls = []

    def stopped(self, *args, **options):
        if not (self.training or torch.is_grad_enabled()):
            calls.append(1)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "loss", stopped)
        with pytest.raises(Stopped, match="stopped at step 3 of 8"):
            train(config)
    assert len(calls) == 1
    assert not [line for line in lines(Path(config.folder)) if "validation_loss" in line]
    folder = train(config)
    one, other = (
        sorted(
            ({k: v for k, v in line.items() if k not in MEASURED} for line in lines(f)),
            key=lambda line: (line["step"], "loss" in line),
        )
        for f in (straight, folder)
    )
    assert one == other
    assert (folder / "model.safetensors").read_bytes() == (
        straight / "model.safetensors"
    ).read_bytes()


def test_engram_is_added_to_a_trained_run_and_changes_nothing_at_first(config, tmp_path, capsys):
    """Every output of the first run is that of the new model; then rows and projections learn."""
    bare = replace(config.model, engram=None)
    first = train(replace(config, model=bare))
    capsys.readouterr()
    added = replace(config, init_from=str(first), folder=str(tmp_path / "added"), steps=4)
    still = train(replace(added, folder=str(tmp_path / "still"), optim=OptimConfig(lr=1e-30)))
    assert "it is added, and changes no output at first" in " ".join(
        capsys.readouterr().err.split()
    )
    ids = torch.arange(2 * 24).view(2, 24) % 300
    base, model = load_model(first), load_model(still)
    for index in range(len(base.blocks)):
        if (router := getattr(base.blocks[index].ffn, "router", None)) is not None:
            model.blocks[index].ffn.router.load_state_dict(router.state_dict())
    with torch.no_grad():
        assert torch.equal(base(ids), model(ids))
    # Three updates at a rate of 1e-30.
    assert model.blocks[1].engram.value_proj.weight.abs().max() < 1e-29

    folder = train(replace(added, placement="host"))
    learnt = load_model(folder).state_dict()
    before = load_model(still).state_dict()
    for name in ("tables.0.weight", "blocks.1.engram.value_proj.weight", "head.weight"):
        assert not torch.equal(learnt[name], before[name]), name
    wrong = replace(added, model=replace(config.model, dense_width=40))
    with pytest.raises(ValueError, match="whose model has another dense_width; expected"):
        train(replace(wrong, folder=str(tmp_path / "wrong")))
    with pytest.raises(ValueError, match="another engram"):
        train(replace(added, model=bare, init_from=str(folder), folder=str(tmp_path / "less")))


@pytest.mark.slow
def test_tasks_of_the_harness_are_run_while_training(config, tmp_path, monkeypatch):
    """They change no number of the training."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [
        {"q": "A whale lives in", "c": [" the sea", " a wood"], "a": number % 2}
        for number in range(6)
    ]
    (tmp_path / "whales.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "whales",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "whales.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "a",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "whales.yaml").write_text(json.dumps(task), encoding="utf-8")
    quiet = train(replace(config, folder=str(tmp_path / "quiet"), steps=4))
    tasks = TaskConfig(tasks=(str(tmp_path / "whales.yaml"),), every=2)
    folder = train(replace(config, steps=4, lm_eval=tasks))
    scored = [line for line in lines(folder) if "task_whales_acc" in line]
    assert [line["step"] for line in scored] == [2, 4]
    assert {line["task_whales_acc"] for line in scored} == {0.5}
    assert losses(quiet) == losses(folder)
    assert (quiet / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="tasks with needles"):
        train(replace(config, needles=NEEDLES, lm_eval=tasks))


def test_what_is_not_installed_is_refused_before_anything_is_written(config, monkeypatch):
    find = importlib.util.find_spec
    absent = {"wandb", "lm_eval"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    with pytest.raises(ValueError, match="wandb: got 'whales' without the package"):
        train(replace(config, wandb="whales"))
    with pytest.raises(ValueError, match="lm_eval: got tasks without the harness"):
        train(replace(config, lm_eval=TaskConfig(tasks=("piqa",))))
    assert not Path(config.folder).exists()


def test_rows_on_a_disk_go_back_too_where_a_run_diverged(config, tmp_path, monkeypatch):
    """Wherever the rows are, the run that went back is the same."""
    clip = Optimizer.clip
    calls = []

    def spoilt(self):
        calls.append(1)
        if len(calls) in (6, 7):
            self.parameters["tables.0.weight"].grad._values()[2, 3] = torch.nan
        return clip(self)

    monkeypatch.setattr(Optimizer, "clip", spoilt)
    results = []
    for placement in ("device", "disk"):
        calls.clear()
        asked = replace(config, placement=placement, folder=str(tmp_path / placement))
        folder = train(replace(asked, skip_limit=2, on_diverged="rollback"))
        assert len(calls) == 7 + 5, "seven steps, and five after the third"
        results.append((losses(folder), load_model(folder).state_dict()))
    (first, state), (second, other) = results
    assert first == second
    assert all(torch.equal(other[name], value) for name, value in state.items())


TWO_RANKS = """
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from rorqual import config as configs
from rorqual import distributed
from rorqual.model import LanguageModel
from rorqual.train.config import TrainConfig
from rorqual.train.step import TrainStep
from rorqual.train.trainer import Stopped, train

base = configs.load(TrainConfig, sys.argv[1])
distributed.join(torch.device("cpu"))
rank = distributed.rank()
forward_backward = TrainStep.forward_backward
loss = LanguageModel.loss
calls = []


def spoilt(self, batch, number):
    losses, counts = forward_backward(self, batch, number)
    calls.append(number)
    # The first call is that of the dry run.
    if rank == 1 and calls.count(number) == 1 + (number == 1) and number in (5, 6):
        losses["loss"] = losses["loss"] * torch.nan
    return losses, counts


def interrupted_step(self, batch, number):
    calls.append(number)
    if rank == 1 and calls.count(number) == 1 and number == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return forward_backward(self, batch, number)


def interrupted_validation(self, *args, **options):
    if not torch.is_grad_enabled():
        calls.append(0)
        if rank == 1 and len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    return loss(self, *args, **options)


def run(name, **options):
    calls.clear()
    config = replace(base, folder=str(Path(base.folder) / name), **options)
    try:
        train(config)
    except Stopped as stopped:
        Path(config.folder, f"stopped{rank}").write_text(str(stopped))
        calls.clear()
        calls.extend([1] * 1000)
        train(config)


TrainStep.measure_inside = lambda *_: ({}, {})
run("plain")
TrainStep.forward_backward = spoilt
run("back", skip_limit=2, on_diverged="rollback", skip_spikes=50.0)
TrainStep.forward_backward = interrupted_step
run("step")
TrainStep.forward_backward = forward_backward
LanguageModel.loss = interrupted_validation
run("validation")
os._exit(0)
"""


@pytest.mark.slow
def test_two_ranks_stop_and_go_back_together(config, tmp_path):
    """Whichever rank has the NaN or gets the signal, in a step or in a validation."""
    config = replace(config, validate_every=4, validation_tokens=10**6)
    prepare(config.data)
    configs.save(replace(config, folder=str(tmp_path / "two")), tmp_path / "config.json")
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    words = ["torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "two_ranks.py")]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        [sys.executable, "-m", *words, str(tmp_path / "config.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    plain = tmp_path / "two" / "plain"
    for name, step in (("step", (3, 4)), ("validation", (4,))):
        folder = tmp_path / "two" / name
        (message,) = {(folder / f"stopped{rank}").read_text() for rank in range(2)}
        assert any(f"stopped at step {number} of 8" in message for number in step)
        assert losses(folder) == losses(plain)
        one, other = (
            [line["step"] for line in lines(each) if "validation_loss" in line]
            for each in (folder, plain)
        )
        assert one == other == [4, 8]
        assert (folder / "model.safetensors").read_bytes() == (
            plain / "model.safetensors"
        ).read_bytes()
    back = tmp_path / "two" / "back"
    (record,) = read_rollbacks(back)
    assert (record.step, record.checkpoint) == (6, 3)
    assert losses(back)[:3] == losses(plain)[:3]
    assert len(losses(back)) == 8 and losses(back)[3] != losses(plain)[3]
