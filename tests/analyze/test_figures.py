"""Figures hold the numbers they were given."""

import io
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
    found = Gates(["a", " b", " "], (1, 4), torch.rand(2, 3, 4))
    image = figures.gate_map(found, "title").axes[0].images[0].get_array()
    assert image.shape == (8, 3)
    assert image[5, 2] == pytest.approx(float(found.values[1, 2, 1]))


def test_load_map_is_relative_to_uniform():
    by_token = torch.ones(2, 4, 3, dtype=torch.long)
    image = figures.load_map(Load((0, 2), by_token.sum(-1), by_token)).axes[0].images[0].get_array()
    assert np.allclose(image, 1.0)


def test_sweep_sorts_its_points():
    axes = figures.sweep({"validation": [(2.0, 1.0, 0.1), (1.0, 2.0, 0.1)]}, x="rho", y="loss", log=True).axes[0]
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


@pytest.mark.parametrize("words", [["$$", "$x_$", "a$^$"], ["中文", "词", "\U0001f40b"]], ids=["dollars", "no glyph"])
def test_tokens_are_drawn_as_they_are(words):
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.gate_map(Gates(words, (1,), torch.rand(1, 3, 1)), "costs $$ and $x_$")
        with figures.style():
            figure.savefig(buffer, format="svg")
    drawn = re.findall(r">([^<>]+)</(?:text|tspan)>", buffer.getvalue())
    assert [word for word in drawn if word in words] == words and "costs $$ and $x_$" in drawn
