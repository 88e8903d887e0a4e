"""Tests that every example runs from anywhere, in seconds, prints its steps, and fits on a page.

`retrofit.py` alone needs a model and most of an hour; here it runs with a tiny model, and fits on
four pages.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLASSROOM = ROOT / "examples" / "deepseek_v3.py"
RETROFIT = ROOT / "examples" / "retrofit.py"
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path != RETROFIT)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error:::rorqual"}


def test_there_are_examples() -> None:
    assert {path.name for path in EXAMPLES} >= {"moe.py", "engram.py", "deepseek_v3.py"}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_example_runs(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not done.stderr.strip()
    steps = re.findall(r"^(\d)\. ", done.stdout, re.MULTILINE)
    assert steps == [str(n) for n in range(1, len(steps) + 1)]
    assert len(steps) >= 4
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_classroom_model_draws_its_flow_and_compares_its_switches(tmp_path: Path) -> None:
    words = ["--draw", "flow.png", "--compare", "--steps", "40"]
    command = [sys.executable, CLASSROOM, *words]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    shapes = re.findall(r"^   ([\w.]+) +\[([\d, ]+)\]", done.stdout, re.MULTILINE)
    assert [name for name, _ in shapes][::11] == ["embed", "mtp.0"]
    row = r"^   ([\w() -]+?) +([\d.]+) bit +([\d.]+) +([\d.]+) +([\d.]+) nats$"
    rows = re.findall(row, done.stdout, re.MULTILINE)
    table = {name: [float(number) for number in numbers] for name, *numbers in rows}
    names = ["none", "bias (loss-free)", "balance loss", "noisy gate", "adaptive k"]
    assert list(table) == names
    for name in ("bias (loss-free)", "balance loss"):
        # What balances raises the entropy of the load and lowers MaxVio.
        assert table[name][0] > table["none"][0]
        assert table[name][1] < table["none"][1]
    assert [table[name][2] for name in names[:4]] == [2.0] * 4
    assert 1 <= table["adaptive k"][2] < 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "got --steps 0, expected at least 1"),
        (["--noise", "-1"], "router.noise: got -1.0"),
        (
            ["--adaptive-mass", "2"],
            "router.adaptive_mass: got 2.0, expected more than 0, at most 1",
        ),
    ],
)
def test_the_classroom_model_refuses_what_it_cannot_do(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(CLASSROOM))
    with pytest.raises(SystemExit, match="2"):
        example["options_of"](words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_example_says_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"python examples/{path.name}" in text


@pytest.mark.slow
def test_retrofit_learns_with_both_arms_and_takes_them_off_again(tmp_path: Path) -> None:
    command = [sys.executable, RETROFIT, "--smoke", "--json", "found.json"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.findall(r"^(\d)\. ", done.stdout, re.MULTILINE) == ["1", "2", "3", "4"]
    assert "both taken off again: +0.0000 nats" in done.stdout
    content = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert {run["arm"] for run in content["runs"]} == set(content["best"]) == {"memory", "lora"}
    assert len({(run["arm"], run["rate"]) for run in content["runs"]}) == 6
    for run in content["runs"]:
        assert run["steps"] >= 1 and 0 < run["touched"] <= run["trained"]
        assert all(0 <= run[name] <= 1 for name in ("choosing", "held_out", "trained_forms"))
        assert abs(run["other_text"] - content["before"]["other_text"] - run["forgot"]) < 1e-9
    for arm, rate in content["best"].items():
        runs = [run for run in content["runs"] if run["arm"] == arm]
        assert max(runs, key=lambda run: run["choosing"])["rate"] == rate


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--smoke", "--facts", "0"], "--facts: got 0, expected 1 to 17576"),
        (["--smoke", "--facts", "17577"], "--facts: got 17577, expected 1 to 17576"),
        (["--smoke", "--minutes", "0"], "got --minutes 0, expected more than 0"),
        (["absent.gguf"], "got model absent.gguf, expected a .gguf file"),
    ],
)
def test_retrofit_refuses_what_it_cannot_do(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [RETROFIT.name, *words])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(RETROFIT), run_name="__main__")
    assert message in capsys.readouterr().err


def test_retrofit_has_more_invented_airports_than_it_is_asked_for_by_default() -> None:
    example = runpy.run_path(str(RETROFIT))
    facts = example["invented"](500)
    assert len({code for code, _ in facts}) == 500
    assert all(re.fullmatch("[A-Z]{3}", code) for code, _ in facts)
