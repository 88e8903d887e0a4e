"""Tests the commands that train, plan and compare models."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rorqual import checkpoint
from rorqual import config as configs
from rorqual.cli import train as training
from rorqual.cli.main import main
from rorqual.cli.parse import parse
from rorqual.costs import costs
from rorqual.experiments.allocation import SweepConfig
from rorqual.experiments.devices import Machine
from rorqual.model import ModelConfig
from rorqual.model_config import EngramConfig
from rorqual.presets import PRESETS, preset
from rorqual.train.config import OptimConfig, TrainConfig, recipe


def test_params_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "tiny", "classroom", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["tiny"]["total"] == costs(preset("tiny")).total
    assert content["classroom"]["activated"] == costs(preset("classroom")).activated
    assert main(["params", "tiny", "classroom"]) == 0
    message = capsys.readouterr().out
    assert f"{content['tiny']['total']:,}" in message
    assert f"{content['classroom']['flops_per_token']:,}" in message


@pytest.mark.parametrize(
    "words",
    [
        ["tiny"],
        ["tiny", "deepseek-v3", "--json"],
        ["tiny", "--context", "64"],
        ["--base", "10000"],
        ["--help"],
    ],
)
def test_params_loads_no_torch(words: list[str]) -> None:
    """Loading torch alone takes longer than the command should."""
    code = (
        f"import sys; from rorqual.cli.main import main; assert main(['params', *{words}]) == 0;"
        "print(sorted({'torch', 'numpy', 'transformers', 'jaxtyping'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_params_of_what_flags_change(capsys: pytest.CaptureFixture[str], small_run: Path) -> None:
    words = [
        "params",
        "tiny",
        "--model.engram.rows-per-head",
        "50",
        "60",
        "--context",
        "64",
        "--json",
    ]
    assert main(words) == 0
    content = json.loads(capsys.readouterr().out)["tiny"]
    counted = costs(configs.replace(preset("tiny"), "engram.rows_per_head", (50, 60)), 64)
    assert content == counted._asdict() | {"table_rows": list(counted.table_rows)}
    assert main(["params", str(small_run), "--model.engram", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[str(small_run)]["memory"] == 0


def test_params_tells_how_long_a_context_a_base_carries(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "--base", "10000"]) == 0
    assert "tells 31,415 tokens apart" in capsys.readouterr().out
    assert main(["params", "--base", "10000", "--factor", "40", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "base": 10000.0,
        "factor": 40.0,
        "longest_context": 1_256_637,
    }
    assert main(["params", "tiny", "--model.rope.base", "500000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tiny"]["longest_context"] == 1_570_796


def test_params_prints_every_digit_of_the_models_that_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [
        "deepseek-v3",
        "deepseek-v2",
        "deepseek-v2-lite",
        "deepseekmoe-16b",
        "classroom",
        "engram-27b",
    ]
    assert main(["params", *names, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content) == names
    # A terminal too narrow for the whole table.
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["params", *names]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == names
    lines: list[tuple[str, list[int]]] = []
    for figure, words in training.ROWS:
        values = [content[name][figure] for name in names]
        if figure == "table_rows":
            # Only the last model has tables, two of them.
            lines += [(f"{words} {i + 1}", [0] * 5 + [values[-1][i]]) for i in range(2)]
        else:
            lines.append((words, values))
    for row, (words, values) in zip(rows, lines, strict=True):
        assert row.strip().startswith(words)
        assert row.split()[-len(names) :] == [f"{value:,}" for value in values]
    assert content["classroom"]["total"] == 52_296
    assert content["engram-27b"]["memory"] > 5e9


def test_params_prints_the_published_figures_of_this_years_models(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Parameters and rows are the published ones, rounded as published where those are."""
    names = [
        "deepseek-v3.2",
        "deepseek-v4-flash",
        "deepseek-v4-pro",
        "deepseek-v4.1-flash",
        "qwen3.8-flash-next",
    ]
    assert main(["params", *names, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["deepseek-v4.1-flash"]["table_rows"] == [384_006_168, 384_016_682]
    assert [round(content[name]["total"] / 1e9) for name in names[:2]] == [672, 284]
    assert round(content["deepseek-v4-pro"]["total"] / 1e11) == 16
    active = [content[name]["activated"] / 1e9 for name in names[:3]]
    assert [round(each) for each in active] == [37, 13, 49]
    # docs/csa.md's caches at 1M tokens, beside DeepSeek-V3.2's latents and index keys.
    assert content["deepseek-v3.2"]["cache_bytes_1m"] == 61 * 2 * (512 + 64 + 128) * 10**6
    assert [round(content[name]["cache_bytes_1m"] / 1e8) for name in names[1:4]] == [69, 99, 32]
    assert main(["params", *names, "--context", "1000000"]) == 0
    output = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line.split()[-len(names) :] for line in output.split("\n")}
    assert rows["rows of Engram's table 1"][3] == "384,006,168"
    assert rows["rows of Engram's table 2"][3] == "384,016,682"
    assert rows["bytes of Engram's tables, fp8"][3] == f"{264 * (384_006_168 + 384_016_682):,}"
    of_context = rows["cache bytes of a sequence of --context tokens"]
    assert rows["cache bytes of a sequence of 1,000,000 tokens"] == of_context
    assert "not counted of deepseek-v4.1-flash, as published: DSpark's draft layers" in output
    assert main(["params", "v4.1-tiny"]) == 0
    assert "not counted of" not in capsys.readouterr().out


def test_named_knows_presets_and_runs(small_run: Path) -> None:
    assert training.named("tiny") is preset("tiny")
    assert training.named(str(small_run)) == checkpoint.read_config(small_run)
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        training.named("tinny")


def test_plan_says_when_no_expert_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--like", "tiny", "--rho", "1.0"]) == 0
    assert "No expert is given up" in capsys.readouterr().out
    assert main(["plan", "--like", "tiny", "--rho", "0.6"]) == 0
    assert "No expert" not in capsys.readouterr().out


def test_planned_commands_train_in_a_folder_each(
    capsys: pytest.CaptureFixture[str], small_run: Path
) -> None:
    for like in ("tiny", str(small_run)):
        assert main(["plan", "--like", like, "--rho", "0.6"]) == 0
        commands = [
            line.split("rorqual train ")[1]
            for line in capsys.readouterr().out.splitlines()
            if " train " in line
        ]
        folders = [command.partition(" folder=")[2] for command in commands]
        name = Path(like).name
        assert folders == [f"runs/{name}-moe", f"runs/{name}-engram", f"runs/{name}-dense"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rho", "2"], "--rho 2: got 2.0, expected 0..1"),
        (
            ["--total", "1e5"],
            "--total 1e5: got 1e+05 parameters beside 3.225e+06 FLOPs a token, expected",
        ),
        (
            ["--activated=1e5", "--flops", "1e6"],
            "--activated 1e5 --flops 1e6: got activated parameters and FLOPs,",
        ),
        (["--flops", "-3"], "--flops -3: got -3, expected a finite number above 0"),
        (["--like", "dense-4b"], "--like dense-4b: got a model without experts"),
    ],
)
def test_a_plan_that_is_refused_names_what_was_typed(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--like", "tiny", *words]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "flops_per_token" not in printed


def test_plan_spends_one_budget(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--like=tiny", "--rho", "0.6", "--total", "3e6", "--activated", "6e5"]
    assert main([*words, "--devices", "3", "--placement", "host", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["moe"]["costs"]["total"] == pytest.approx(3e6, rel=0.005)
    assert content["engram"]["costs"]["total"] == pytest.approx(3e6, rel=0.01)
    model = configs.from_dict(ModelConfig, content["engram"]["config"])
    assert model.engram is not None
    assert model.moe is not None
    assert content["routed_experts"] == model.moe.routed < content["moe"]["config"]["moe"]["routed"]
    assert content["memory"] == content["engram"]["costs"]["memory"] == costs(model).memory
    cached = content["engram"]["estimate"]["roles"]["rows"]
    assert (cached["parameters"], content["machine"]["devices"]) == (content["memory"], 3)
    assert (
        content["engram"]["estimate"]["host_bytes"]
        == cached["weights"] + cached["gradients"] + cached["state"]
    )
    # The printed flags give the planned config.
    for arm in ("moe", "engram", "dense"):
        planned = configs.from_dict(ModelConfig, content[arm]["config"])
        assert (
            parse(TrainConfig(model=preset("tiny")), content[arm]["flags"], "train").model
            == planned
        )
    assert main([*words, "--devices", "3"]) == 0
    message = capsys.readouterr().out
    assert f"engram  rorqual train tiny {' '.join(content['engram']['flags'])}" in message
    assert "on each of 3 h100" in message
    assert "in the memory of the hosts" not in message


def test_a_small_model_is_planned_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--like", "tiny", "--rho", "0.6"]
    assert main(words) == 0
    message = capsys.readouterr().out
    assert "on this machine" in message and "h100" not in message
    assert "a step of 4,096 tokens" in message, "the batch that train takes where nobody says"
    assert main([*words, "--device", "a100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["device"] == "a100"
    assert main([*words, "--total", "1E+10", "--activated", "1e9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"] == asdict(Machine())
    assert main([*words, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["devices"] == 1
    assert main([*words, "--total", "1.2.3"]) == 2
    assert "total: got '1.2.3', expected float" in capsys.readouterr().err


@pytest.mark.slow
def test_plan_makes_the_papers_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--like", "moe-27b", "--rho", "0.743", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["routed_experts"] == 55
    assert content["memory"] == pytest.approx(5.75e9, rel=0.01)
    assert main(["plan", "--like", "engram-40b", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["routed_experts"] == 55
    assert content["memory"] == pytest.approx(18.5e9, rel=0.005)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (4_190_000, "4.19 MB"),
        (61e9, "61 GB"),
        (2.5e12, "2.5 TB"),
        (4.2e15, "4,200 TB"),
    ],
)
def test_sizes_have_three_digits(count: float, message: str) -> None:
    assert training.size(count) == message


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["params"], 2, "expected presets or run folders first"),
        (["params", "tinny"], 2, "did you mean 'tiny'"),
        (["params", "tiny", "--base", "10000"], 2, "--base: got names too"),
        (["params", "tiny", "--context", "0"], 1, "context: got 0, expected at least 1"),
        (
            ["plan", "--like", "tiny", "--context", "-5"],
            1,
            "--context -5: got -5, expected at least 1",
        ),
        (["sweep", "slots", "--steps", "0"], 2, "steps: got 0, expected at least 1"),
        (["sweep", "slots", "--seq-len", "0"], 2, "seq_len: got 0, expected at least 1"),
        (["sweep", "slots", "--workers", "0"], 2, "workers: got 0, expected at least 1"),
        (["params", "--base", "1"], 1, "got rope base 1.0, expected more than 1"),
        (["params", "--base", "10000", "--factor", "0.5"], 1, "got factor 0.5"),
        (["params", "tiny", "--model.dim", "0"], 2, "dim: got 0, expected at least 1"),
        (["params", "tiny", "--model.engram.layers", "7"], 2, "expected block indices 0..2"),
        (["plan", "tiny", "--rho", "0.6"], 2, "got '--rho', expected an option"),
        (["plan", "--like", "tinny"], 2, "did you mean 'tiny'"),
        (["plan", "--like", "tiny", "--device", "h10"], 2, "did you mean 'h100'"),
        (
            ["plan", "--like", "tiny", "--activated", "1e5", "--flops", "1e6"],
            1,
            "expected one of them",
        ),
        (["plan", "--like", "tiny", "--rho", "2"], 1, "expected 0..1"),
        (["plan", "--like", "dense-4b"], 1, "expected moe to be on"),
        (["train"], 2, "expected a preset's name, a YAML file or a run folder first"),
        (
            ["launch", "--nproc-per-node", "2"],
            2,
            "got flags alone, expected a preset's name or a run folder behind",
        ),
        (
            ["launch", "--nproc-per-node"],
            2,
            "expected one argument: rorqual launch --nproc-per-node 2 tiny",
        ),
        (["launch", "--nprocs", "2", "tiny"], 2, "unrecognized arguments: --nprocs"),
        (["launch", "--nproc-per-node", "2", "tinny", "--json"], 2, "did you mean 'tiny'"),
        (["launch", "--nproc-per-node", "2", "tiny", "--stepz", "3"], 2, "did you mean --steps"),
        (["train", "tinny"], 2, "did you mean 'tiny'"),
        (["sweep", "rows"], 2, "expected one of allocation"),
        (["demo", "--seeds", "0"], 2, "expected at least 1"),
    ],
)
def test_mistakes_are_a_line(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) <= 2


def test_a_dry_run_prints_what_a_rank_holds_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even a model that is too large for this machine is built."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", "--dry-run", "--batch-size", "4"]) == 0
    message = capsys.readouterr().out
    assert "blocks.*.attention.o_proj.weight" in message and "64 x 64" in message
    assert re.search(r"tokens a step +1,024 *\n", message)
    assert "memory of a rank" in message and "activations of a micro-batch" in message
    words = ["launch", "--nnodes", "128", "--nproc-per-node", "8", "engram-27b", "--dry-run"]
    words += ["--batch-size", "1024", "--json"]
    assert main(words) == 0
    content = json.loads(capsys.readouterr().out)
    counted = costs(preset("engram-27b"), 256)
    assert content["ranks"] == 1024
    assert content["costs"]["total"] == counted.total
    assert content["roles"]["rows"]["parameters"] == -(-counted.memory // content["ranks"])
    assert content["wire"]["gradients, reduced"] > 0
    assert main(["launch", "--nproc-per-node", "3", "tiny", "--dry-run"]) == 1
    assert "expected a multiple of the 3 ranks" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_moved_run_is_trained_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TrainConfig] = []
    monkeypatch.setattr(
        "rorqual.train.trainer.train",
        lambda config, on_metrics: asked.append(config) or config.folder,
    )
    configs.save(TrainConfig(folder="runs/before", seed=3), tmp_path / "after" / "train.json")
    assert main(["train", str(tmp_path / "after"), "--steps", "5"]) == 0
    assert main(["train", str(tmp_path / "after"), "--folder", "elsewhere"]) == 0
    assert asked == [
        TrainConfig(folder=str(tmp_path / "after"), seed=3, steps=5),
        TrainConfig(folder="elsewhere", seed=3),
    ]


def test_train_help_teaches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--help"]) == 0
    message = capsys.readouterr().out.partition("examples:\n")[2]
    for word in (
        "--data notes/",
        "goes on where it was stopped",
        "model.engram=none",
        "naming one of its fields",
    ):
        assert word in message
    parts = re.search(r"A part that is off \((.*?)\)", message)
    assert parts is not None
    for name in parts[1].split(", "):
        assert type(None) in get_args(ModelConfig.__annotations__[name])
    asked: list[TrainConfig] = []
    monkeypatch.setattr(
        "rorqual.train.trainer.train",
        lambda config, on_metrics: asked.append(config) or config.folder,
    )
    lines = [
        line.split("     ")[0].split()[1:]
        for line in message.splitlines()
        if "  rorqual train" in line
    ]
    presets = [line for line in lines if line[1] == "tiny"]
    assert len(presets) == 6
    for line in presets:
        assert main(line) == 0
    assert asked[0].data.source == "notes/"
    assert asked[1] == asked[0]
    assert asked[2].model.mtp is not None
    assert asked[2].model.hyper is not None
    assert asked[3].model.engram is None
    assert asked[4].needles is not None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[TrainConfig]:
    """Collects the configs that `rorqual train` would train, in an empty folder."""
    results: list[TrainConfig] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rorqual.cli.train.refuse_too_large", lambda config: None)
    monkeypatch.setattr(
        "rorqual.train.trainer.train",
        lambda config, on_metrics: results.append(config) or config.folder,
    )
    return results


@pytest.mark.parametrize("name", PRESETS)
def test_train_takes_what_config_prints_unchanged(
    name: str, asked: list[TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", name]) == 0
    printed = capsys.readouterr().out
    Path("any.yaml").write_text(printed, encoding="utf-8")
    assert main(["train", "any.yaml"]) == 0
    assert main(["train", name]) == 0
    assert asked[0] == asked[1]
    assert asked[0].folder == f"runs/{name}" and asked[0].model == preset(name)
    capsys.readouterr()
    assert main(["config", "any.yaml"]) == 0
    assert capsys.readouterr().out == printed


OVERRIDES = {
    "steps": st.integers(1, 10**9),
    "micro_batch_size": st.none() | st.integers(1, 99),
    "mtp_late": st.none() | st.floats(0, 1),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "indexer_alone": st.just(False),
    "folder": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    "needles": st.sampled_from(["none", "default"]),
    "needles.grow": st.integers(1, 99),
    "data.tokenizer": st.none() | st.sampled_from(["a b", "1e3", "no", "x: y"]),
    "optim.lr": st.floats(1e-9, 1),
    "optim.kind": st.sampled_from(["adamw", "muon"]),
    "optim.betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    "model.dim": st.integers(1, 9999),
    "model.tied": st.booleans(),
    "model.engram": st.sampled_from(["none", "default"]),
    "model.engram.rows_per_head": st.lists(st.integers(2, 10**12), min_size=1, max_size=4).map(
        tuple
    ),
    "model.engram.dead_tokens": st.lists(st.integers(0, 99), max_size=3).map(tuple),
    "model.engram.generator": st.sampled_from(["numpy", "splitmix64"]),
    "model.moe": st.sampled_from(["none", "default"]),
    "model.moe.router.noise": st.floats(0, 1),
    "model.rope.yarn.factor": st.floats(1, 99),
    "model.mtp.depth": st.integers(1, 4),
}


@given(
    st.lists(
        st.sampled_from(sorted(OVERRIDES)).flatmap(
            lambda name: st.tuples(st.just(name), OVERRIDES[name])
        )
    )
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_asked_for_survives_yaml(
    capsys: pytest.CaptureFixture[str], overrides: list[tuple[str, Any]]
) -> None:
    """Each typed value survives, too, but for those that later ones replace."""
    words = [f"{name}={_typed(value)}" for name, value in overrides]
    wanted = training.train_options(["tiny", *words])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "asked.yaml"
        capsys.readouterr()
        assert main(["config", "tiny", *words]) == 0
        path.write_text(capsys.readouterr().out, encoding="utf-8")
        assert training.train_options([str(path)]) == wanted
    for number, (name, value) in enumerate(overrides):
        if not any(
            name.startswith(later) or later.startswith(name) for later, _ in overrides[number + 1 :]
        ):
            result: Any = wanted
            for piece in name.split("."):
                result = getattr(result, piece)
            assert (result is None) == (value in (None, "none")) and (
                value in (None, "none", "default") or result == value
            )


def _typed(value: Any) -> str:
    return (
        ",".join(map(str, value))
        if isinstance(value, tuple)
        else "none"
        if value is None
        else str(value)
    )


def test_a_file_and_overrides_are_one_config(
    asked: list[TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("whale.yaml").write_text(
        "steps: 7\nmodel:\n  dim: 128\n  engram: {heads: 8}\n", encoding="utf-8"
    )
    assert main(["train", "whale.yaml"]) == 0
    model = ModelConfig(dim=128, engram=EngramConfig(heads=8))
    assert asked[0] == TrainConfig(folder="runs/whale", steps=7, model=model, optim=recipe(128))
    assert (
        main(
            [
                "train",
                "whale.yaml",
                "steps=9",
                "--model.engram.heads",
                "4",
                "data=notes/",
                "model.dim=64",
            ]
        )
        == 0
    )
    assert (asked[1].steps, asked[1].data.source, asked[1].optim) == (9, "notes/", recipe(64))
    assert asked[1].model == ModelConfig(engram=EngramConfig(heads=4))
    Path("whale.yaml").write_text(
        "folder: runs/whale\noptim: {kind: adamw, clip: 0.5}\n", encoding="utf-8"
    )
    assert main(["train", "whale.yaml"]) == 0
    assert asked[2].optim == OptimConfig(clip=0.5)
    configs.save(replace(asked[2], steps=9), "runs/whale/train.json")
    assert main(["config", "runs/whale", "keep=3"]) == 0
    assert (
        "steps: 9  # updates of the parameters\n" in (message := capsys.readouterr().out)
        and "keep: 3  # checkpoints\n" in message
    )


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("stepz: 3", 1, "bad.yaml: got TrainConfig key 'stepz', expected one of model, "),
        (
            "model: {engram: {headz: 8}}",
            1,
            "bad.yaml: got model.engram key 'headz', expected one of layers",
        ),
        ("model: {engram: {heads: x}}", 1, "bad.yaml: model.engram.heads: got 'x', expected int"),
        ("model: {engram: {heads: 0}}", 1, "bad.yaml: engram.heads: got 0, expected at least 1"),
        (
            "model: {gqa: {heads: 4}}",
            1,
            "bad.yaml: attention: got mla and gqa, expected exactly one",
        ),
        ("model: [", 1, "bad.yaml: line 1, column 9: expected the node content"),
        ("- steps", 1, "bad.yaml: got ['steps'], expected a mapping of fields"),
        (None, 1, "got 'bad.yaml', expected a file or folder that exists"),
    ],
)
def test_a_wrong_file_is_a_line(
    text: str | None,
    code: int,
    message: str,
    asked: list[TrainConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if text is not None:
        Path("bad.yaml").write_text(text)
    for command in ("train", "config"):
        assert main([command, "bad.yaml"]) == code
        printed = capsys.readouterr().err
        assert message in printed and len(printed.splitlines()) == 1
    assert not asked


@pytest.mark.parametrize(
    "words", [["train", "--help"], ["train", "tiny", "--steps", "x"], ["config", "small"]]
)
def test_options_are_read_without_torch(words: list[str]) -> None:
    code = (
        f"import sys; from rorqual.cli.main import main; main({words});"
        "print(sorted({'torch', 'numpy', 'transformers', 'filelock', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_train_demo_and_sweep_begin_with_one_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "rorqual.train.trainer.train", lambda config, on_metrics: asked.append(config) or tmp_path
    )
    monkeypatch.setattr(
        "rorqual.experiments.demo.main", lambda config, console: asked.append(config)
    )
    monkeypatch.setattr(
        "rorqual.experiments.allocation.main",
        lambda config, console: asked.append(config) or tmp_path,
    )
    for words in (
        ["train", "{}"],
        ["demo", "--preset", "{}"],
        ["sweep", "experts", "--preset", "{}"],
    ):
        for name in ("tiny", "small"):
            assert main([word.format(name) for word in words]) == 0
            assert asked.pop().optim == recipe(preset(name).dim)
    assert recipe(64) != recipe(256)
    for words in (["train", "tiny"], ["sweep", "experts"]):
        # The recipe is that of the width on the command line.
        assert main([*words, "--model.dim", "128", "--optim.clip", "0.5"]) == 0
        assert asked.pop().optim == replace(recipe(128), clip=0.5)
    assert main(["train", "tiny", "--needles", "default"]) == 0
    assert asked.pop().optim == recipe(64, needles=True) != recipe(64)
    assert (
        main(
            ["train", "tiny", "--model.dim", "128", "--optim.kind", "adamw", "--optim.lr", "0.002"]
        )
        == 0
    )
    assert (asked[-1].optim.kind, asked.pop().optim.lr) == ("adamw", 0.002)
    assert main(["train", "engram-demo"]) == 0
    assert asked.pop().optim == OptimConfig()


def test_a_run_that_goes_on_keeps_its_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_run: Path
) -> None:
    """Runs started when another optimizer was the default can still be resumed."""
    asked: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "rorqual.train.trainer.train", lambda config, on_metrics: asked.append(config) or tmp_path
    )
    old = TrainConfig(model=preset("tiny"), optim=OptimConfig(lr=4e-3), folder="runs/tiny")
    configs.save(old, "runs/tiny/train.json")
    assert main(["train", "tiny"]) == 0
    # There is no checkpoint to resume from.
    assert asked.pop().optim == recipe(64)
    assert main(["train", "runs/tiny"]) == 0
    assert asked.pop() == old
    shutil.copy(small_run / "model.safetensors", "runs/tiny")
    assert main(["train", "tiny"]) == 0
    assert asked.pop() == old
    shutil.move("runs/tiny", "elsewhere")
    assert main(["train", "tiny", "--folder", "elsewhere", "--steps", "9"]) == 0
    assert asked.pop() == replace(old, folder="elsewhere", steps=9)


def test_launch_hands_everything_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[list[str], list[str]]] = []
    monkeypatch.setattr(
        "rorqual.distributed.torchrun", lambda flags, command: asked.append((flags, command))
    )
    words = ["tiny", "--steps", "3", "--data", "wordnet", "--json"]
    assert (
        main(["launch", "--nproc-per-node", "2", "--max-restarts=5", "--log-dir", "logs", *words])
        == 0
    )
    ((flags, command),) = asked
    assert flags[-5:] == ["--nproc-per-node", "2", "--max-restarts=5", "--log-dir", "logs"]
    assert command == ["rorqual", "train", *words]
    assert main(["launch", "tiny", "--data", "no/such/text"]) == 1, "before any process is started"
    assert "no/such/text" in capsys.readouterr().err
    four = ["--nproc-per-node", "4", "train", "tiny", "--distributed.expert"]
    assert main(["launch", *four, "3"]) == 1
    assert "got 4 ranks" in capsys.readouterr().err
    assert len(asked) == 1
    assert main(["launch", *four, "4"]) == 0
    assert asked[1][1] == ["rorqual", "train", "tiny", "--distributed.expert", "4"]
    assert main(["launch", "--nproc-per-node", "gpu", *four[2:], "4"]) == 0, "as many as there are"
    for help in ([], ["--help"]):
        assert main(["launch", *help]) == 0
        assert "rorqual launch --nproc-per-node 2 tiny" in capsys.readouterr().out


def test_demo_and_sweep_pass_their_options_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conclusion.txt").write_text("nothing is established\n")
    monkeypatch.setattr("rorqual.experiments.demo.main", lambda config, console: config.steps)
    monkeypatch.setattr(
        "rorqual.experiments.allocation.main", lambda config, console: tmp_path / config.kind / ".."
    )
    monkeypatch.setattr(
        "rorqual.experiments.needle.main", lambda config, console: tmp_path / str(config.nsa.top_k)
    )
    (tmp_path / "slots").mkdir()
    (tmp_path / "6").mkdir()
    (tmp_path / "6" / "conclusion.txt").write_text("moba found most\n")
    assert main(["demo", "--steps", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == 7
    assert main(["sweep", "slots", "--data", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conclusion"] == "nothing is established"
    assert main(["sweep", "needle", "--nsa.top-k", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conclusion"] == "moba found most"


def test_a_sweep_follows_the_preset_and_its_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SweepConfig] = []
    monkeypatch.setattr(
        "rorqual.experiments.allocation.main",
        lambda config, console: asked.append(config) or tmp_path,
    )
    assert (
        main(
            [
                "sweep",
                "ablation",
                "--model.engram.heads",
                "2",
                "--preset",
                "small",
                "--rates",
                "1",
                "0.5",
            ]
        )
        == 0
    )
    small = preset("small")
    assert asked[0].kind == "ablation" and asked[0].rates == (1.0, 0.5)
    assert asked[0].model == replace(small, engram=replace(small.engram, heads=2))
    assert main(["sweep", "experts", "--experts", "2", "4"]) == 0
    assert asked[1].model == preset("tiny") and asked[1].experts == (2, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ablation", "--preset", "tinny"], "did you mean 'tiny'?"),
        (["needles"], "did you mean 'needle'?"),
        (["needle", "--kinds", "linear"], "linear"),
        (["needle", "--seeds", "0"], "seeds: got 0"),
        (["needle", "--needles.asked", "9"], "got 4 pairs, expected 9..12"),
        (["needle", "--data", "notes/"], "--data"),
    ],
)
def test_a_wrong_sweep_is_given_so(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *words]) != 0
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("memory", [8 << 30, 1 << 50], ids=["memory", "disk"])
def test_a_model_that_fits_nowhere_is_refused_before_text_is_read(
    memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rorqual.doctor.memory", lambda: memory)
    monkeypatch.setattr(
        "rorqual.train.trainer.train", lambda config, on_metrics: pytest.fail("it began")
    )
    assert main(["train", "deepseek-v3", "--device", "cpu"]) == 1
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert re.search(
        r"got [\d.,]+ [GT]B (of memory|free for) .*expected at least \d[\d.,]* TB", printed
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_train_tells_a_machine_how_it_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "notes.jsonl"
    lines = [
        json.dumps({"text": f"The whale number {n} sings {n * n} songs below the sea."})
        for n in range(200)
    ]
    text.write_text("\n".join(lines), encoding="utf-8")
    size = [
        "--batch-size",
        "2",
        "--seq-len",
        "16",
        "--model.vocab-size",
        "300",
        "--data.cache",
        str(tmp_path / "cache"),
    ]
    words = [
        "train",
        "tiny",
        "--data",
        str(text),
        "--folder",
        str(tmp_path / "run"),
        "--steps",
        "2",
        *size,
        "--json",
    ]
    assert main(words) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["folder"], content["steps"]) == (str(tmp_path / "run"), 2)
    assert 0 < content["loss"] < 10
    assert 0 < content["bits_per_byte"] < 20
    assert content["validation_loss"] > 0
    assert content["seconds"] > 0
    assert main([*words[:7], "1", *words[8:]]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2, (
        "what is there, and not what was asked for"
    )


def test_a_sweep_says_where_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rorqual.experiments.allocation.main", lambda config, console: tmp_path)
    assert main(["sweep", "slots"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}: ")
