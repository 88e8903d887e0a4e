"""Tests that the demo's verdict matches its numbers, and that the demo runs on any text."""

import io
import json

import pytest
import torch
from rich.console import Console

from rorqual.analyze.measures import Gates
from rorqual.experiments import demo
from rorqual.experiments.demo import DemoConfig, gate_line, main, verdict


@pytest.mark.parametrize(
    ("moe", "engram", "message"),
    [
        ([4.0], [3.9], "0.1000 nats a token less than the pure mixture of experts, with one seed"),
        ([4.0, 4.1], [3.9, 4.07], "0.0650 nats a token less .* over 2 seeds., not established"),
        ([4.0, 4.1], [3.9, 4.3], "0.0500 nats a token more .* not established at 95 %"),
        ([4.0, 4.1, 4.0], [3.9, 4.0, 3.91], r"0.0967 nats a token less .* seeds\), established"),
    ],
)
def test_the_verdict_says_no_more_than_the_seeds(moe, engram, message):
    import re

    assert re.search(message, verdict({"moe": moe, "engram": engram}))


def test_the_brightest_token_has_the_largest_gate():
    line = gate_line(Gates(["a", "b", "c"], (1,), torch.tensor([[[0.1], [0.9], [0.5]]])))
    colours = [int(str(span.style).rsplit(",", 1)[1].rstrip(")")) for span in line.spans[:3]]
    assert (
        colours[1] > colours[2] > colours[0]
        and line.plain.startswith("  abc")
        and "0.10 to 0.90" in line.plain
    )


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="got 0 seeds"):
        DemoConfig(seeds=0)


@pytest.mark.slow
def test_from_nothing_to_a_page_and_again(tmp_path, monkeypatch):
    words = ["whale", "river", "stone", "cloud", "engine", "harbour", "violet", "copper"]
    lines = [
        f"The {a} of the {b} is {c}, entry {n}."
        for n, (a, b, c) in enumerate((x, y, z) for x in words for y in words for z in words)
    ]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    config = DemoConfig(
        data=str(text),
        folder=str(tmp_path / "demo"),
        cache=str(tmp_path / "cache"),
        steps=6,
        batch_size=4,
        seq_len=32,
        seeds=2,
    )
    screen = io.StringIO()
    result = main(config, console=Console(file=screen, width=100))
    page = result.report.read_text(encoding="utf-8")
    assert result.report == tmp_path / "demo" / "report.html" and "engram, block 1" in page
    assert {arm: len(values) for arm, values in result.losses.items()} == {"moe": 2, "engram": 2}
    assert (tmp_path / "demo" / "gates.png").stat().st_size > 1000
    message = screen.getvalue()
    assert "rorqual generate" in message and "FLOPs differ" not in message and "whale" in message

    monkeypatch.setattr(
        demo,
        "run",
        lambda jobs, **_: [pytest.fail("ran again") for job in jobs if not job.finished()],
    )
    assert main(config, console=Console(file=io.StringIO())).losses == result.losses
