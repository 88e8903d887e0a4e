"""Tests that figures show the numbers they were given."""

import io
import math
import re
import warnings

import numpy as np
import pytest
import torch

from rorqual.analyze import figures
from rorqual.analyze.measures import Gates, Load


def test_smooth_is_a_running_mean():
    values = np.array([1.0, 3.0, 5.0, 7.0])
    assert figures.smooth(values, 2).tolist() == [1.0, 2.0, 4.0, 6.0]


def test_curves_draw_every_run_and_name_every_arm_once():
    records = [{"step": n, "tokens": 10 * n, "loss": 5.0 / n} for n in range(1, 20)]
    records.append({"step": 19, "validation_loss": 0.4})
    axes = figures.curves([("moe", records), ("moe-2", records), ("engram", records)]).axes[0]
    assert len(axes.lines) == 6 and axes.lines[1].get_xdata().tolist() == [190.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["moe", "engram"]
    assert figures.curves([("empty", [])]).axes


def test_gate_map_has_a_row_for_each_stream():
    result = Gates(["a", " b", " "], (1, 4), torch.rand(2, 3, 4))
    image = figures.gate_map(result, "title").axes[0].images[0].get_array()
    assert image.shape == (8, 3)
    assert image[5, 2] == pytest.approx(float(result.values[1, 2, 1]))


def test_a_long_text_goes_on_below_as_large_as_before():
    short, long = (
        figures.gate_map(Gates([f"t{i}" for i in range(n)], (1,), torch.rand(1, n, 2)))
        for n in (figures.ACROSS, 73)
    )
    assert short.get_size_inches()[0] == long.get_size_inches()[0] < 12
    # The last axes are the colour scale.
    parts = long.axes[:-1]
    assert [axes.images[0].get_array().shape for axes in parts] == [(2, 30), (2, 30), (2, 13)]
    words = [tick.get_text() for axes in parts for tick in axes.get_xticklabels()]
    assert words == [f"t{i}" for i in range(73)] and len({axes.get_xlim() for axes in parts}) == 1


def test_load_map_is_relative_to_uniform():
    by_token = torch.ones(2, 4, 3, dtype=torch.long)
    image = figures.load_map(Load((0, 2), by_token.sum(-1), by_token)).axes[0].images[0].get_array()
    assert np.allclose(image, 1.0)


def test_sweep_sorts_its_points():
    axes = figures.sweep(
        {"validation": [(2.0, 1.0, 0.1), (1.0, 2.0, 0.1)]}, x="rho", y="loss", log=True
    ).axes[0]
    assert axes.lines[0].get_xdata().tolist() == [1.0, 2.0] and axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2"]


def test_sweep_draws_levels_across_and_names_apart():
    points = {"validation": [(0.0, 1.0, 0.1), (1.0, 2.0, 0.1)]}
    axes = figures.sweep(points, x="rho", y="loss", levels={"few rows": 1.5}).axes[0]
    assert axes.lines[0].get_linestyle() == "-" and list(axes.lines[-1].get_ydata()) == [1.5, 1.5]
    assert set(axes.get_legend_handles_labels()[1]) == {"validation", "few rows"}
    named = figures.sweep(points, x="", y="loss", names=["whole", "no gate"]).axes[0]
    assert [tick.get_text() for tick in named.get_xticklabels()] == ["whole", "no gate"]
    assert named.get_xticks().tolist() == [0, 1] and named.lines[0].get_linestyle() == "None"


def test_curves_of_any_name_and_of_runs_that_diverged():
    records = [{"step": n, "tokens": 10 * n, "loss": 5.0 / n} for n in range(1, 20)]
    broken = [
        *records[:12],
        {"step": 13, "tokens": 130, "loss": math.nan},
        {"step": 14, "tokens": 140, "loss": math.inf},
    ]
    broken.append({"step": 14, "validation_loss": math.nan})
    names = ["_hidden", "cost$x_$y", "$\\frac{", *(f"arm{c}" for c in "abcdef")]
    figure = figures.curves([*((name, records) for name in names), ("broken", broken)])
    buffer = io.StringIO()
    with figures.style():
        figure.savefig(buffer, format="svg")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [*names, "broken"]
    looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
    assert len(set(looks)) == len(looks) == 10, "no two arms look alike"
    assert len(axes.lines[-1].get_xdata()) == 12 and all(map(math.isfinite, axes.get_ylim()))


def test_bars_have_their_number_and_share():
    figure = figures.bars({"resident": 1280.0, "disk $x_$": 2.56}, x="tokens a second")
    axes = figure.axes[0]
    buffer = io.StringIO()
    with figures.style():
        figure.savefig(buffer, format="svg")
    assert [bar.get_width() for bar in axes.patches] == [1280.0, 2.56] and axes.get_ylim()[
        0
    ] > axes.get_ylim()[1]
    assert [text.get_text() for text in axes.texts] == ["1,280 (100%)", "2.56 (0%)"]
    assert "disk $x_$" in buffer.getvalue()
    assert [t.get_text() for t in figures.bars({"a": 0.0, "b": 1.0}, x="").axes[0].texts] == [
        "0",
        "1",
    ]


def test_a_sweep_without_points_is_an_empty_picture():
    assert figures.sweep({}, x="rho", y="loss", log=True).axes[0].get_legend() is None


@pytest.mark.parametrize(
    "words", [["$$", "$x_$", "a$^$"], ["中文", "词", "\U0001f40b"]], ids=["dollars", "no glyph"]
)
def test_tokens_are_drawn_as_they_are(words):
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.gate_map(Gates(words, (1,), torch.rand(1, 3, 1)), "costs $$ and $x_$")
        with figures.style():
            figure.savefig(buffer, format="svg")
    drawn = re.findall(r">([^<>]+)</(?:text|tspan)>", buffer.getvalue())
    assert [word for word in drawn if word in words] == words and "costs $$ and $x_$" in drawn
