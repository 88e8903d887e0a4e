"""Tests `rorqual plan MODEL`: the figures of `plan_costs` as text and as JSON."""

import json

import pytest

from rorqual.cli.main import main
from rorqual.plan_costs import Cluster, Layout, bytes_sent, memory, step_seconds
from rorqual.presets import preset

WORDS = ["plan", "small", "--devices", "4", "--expert", "2", "seq_len=512", "recompute=false"]
LAYOUT = Layout(expert=2, seq_len=512, recompute=False)


def test_a_plan_prints_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    planned = preset("small"), Cluster(devices=4), LAYOUT, answer["distinct_ids"]
    assert answer["bytes"] == bytes_sent(*planned)
    assert answer["seconds"] == step_seconds(*planned)._asdict()
    assert answer["memory"]["device"] == memory(*planned).device
    assert answer["simulated"] == {}
    assert main(WORDS) == 0
    text = capsys.readouterr().out
    assert "small on 4 x h100, 2 expert ranks, 2,048 tokens a step" in text
    assert "formulas, not measurements" in text


def test_a_simulation_stands_beside_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--simulate", "--device", "h200", "--steps", "1", "--json"]) == 0
    simulated = json.loads(capsys.readouterr().out)["simulated"]
    assert list(simulated) == ["overlapped", "rows in line", "mapping in line", "both in line"]
    for result in simulated.values():
        assert 0.9 < result["seconds"] / result["formula"] < 3
    assert main([*WORDS, "--simulate", "--steps", "1"]) == 0
    assert "of the formula's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["plan", "tinny"], 2, "did you mean 'tiny'"),
        (["plan", "tiny", "--device", "h10"], 1, "did you mean 'h100'"),
        (["plan", "tiny", "--devices", "0"], 2, "devices: got 0"),
        (["plan", "tiny", "--devices", "8", "--expert", "3"], 1, "expert: got 3, expected a div"),
        (["plan", "tiny", "--machine", "8"], 2, "got '--machine'"),
        (["plan", "tiny", "--traffic", "nowhere.json"], 1, "expected a recording"),
    ],
)
def test_wrong_plans_are_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert main(words) == code
    assert message in capsys.readouterr().err
