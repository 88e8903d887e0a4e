"""Draws matplotlib figures: loss curves, the gate map, expert load, sweeps with error bars."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

from rorqual.analyze.measures import Gates, Load

# The colours are legible on white and on black.
COLOURS = (
    "#2f7fd1",
    "#e07b39",
    "#3a9d5d",
    "#b65fc2",
    "#c94f4f",
    "#8a8a2e",
)
DASHES = ("-", "--", ":", "-.")  # tell arms apart once the colours repeat
ACROSS = 30  # tokens per line of a gate map: more would be too small to read on a page
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "rorqual",
    "legend.frameon": False,
}


# Fallback fonts in this order, for glyphs that the default font lacks. Only installed ones are
# used, since matplotlib warns about others.
_MORE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "SimHei",
)


@contextmanager
def style() -> Iterator[None]:
    """Applies the style of rorqual's figures in a `with` block around drawing and saving."""
    installed = set(font_manager.get_font_names())
    families = ["sans-serif", *(name for name in _MORE_FONTS if name in installed)]
    with matplotlib.rc_context({**_STYLE, "font.family": families}), warnings.catch_warnings():
        # Text stays text in an SVG: the reader's fonts draw what the fonts here lack, and only its
        # width is a guess.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield


def _figure(width: float, height: float) -> Figure:
    """Returns an empty figure of so many inches, in rorqual's style."""
    with style():
        return Figure(figsize=(width, height), layout="constrained")


def curves(runs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> Figure:
    """Draws training loss (thin, smoothed) and validation loss (dots) over tokens.

    Seeds of an arm share a colour. A loss that is not finite is left out.
    """
    with style():
        figure = _figure(7.5, 3.4)
        axes = figure.subplots()
        arms = list(dict.fromkeys(_arm(name) for name, _ in runs))
        named: dict[str, Any] = {}
        for name, records in runs:
            arm = _arm(name)
            turn, shade = divmod(arms.index(arm), len(COLOURS))
            colour = COLOURS[shade]
            dash = DASHES[turn % len(DASHES)]
            steps = _points(records, "loss")
            checks = _points(records, "validation_loss")
            if steps:
                tokens, losses = np.array(steps).T
                (line,) = axes.plot(tokens, smooth(losses), color=colour, lw=1, ls=dash, alpha=0.8)
                named.setdefault(arm, line)
            if checks:
                axes.plot(*np.array(checks).T, "o", color=colour, ms=4)
        axes.set_xlabel("tokens trained on")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylabel("loss, nats a token")
        axes.grid(alpha=0.2)
        if named:
            # The labels are given here, since a label such as "_x" on the line would be left out.
            legend = axes.legend(named.values(), named)
            # A name with dollar signs is not a formula.
            for text in legend.get_texts():
                text.set_parse_math(False)
        _zoom(axes, runs)
        return figure


def _points(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Returns (tokens, value) of every finite value; a validation is at the tokens of its step."""
    tokens = {r["step"]: r["tokens"] for r in records if "tokens" in r}
    return [
        (tokens[r["step"]], r[key])
        for r in records
        if math.isfinite(r.get(key, math.nan)) and r["step"] in tokens
    ]


def _zoom(axes: Any, runs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> None:
    """Leaves the first tenth out of the y axis, since it would flatten everything after it."""
    later = [
        r["loss"] for _, records in runs for r in list(records)[len(records) // 10 :] if "loss" in r
    ]
    if later := [loss for loss in later if math.isfinite(loss)]:
        margin = 0.05 * (max(later) - min(later)) + 1e-3
        axes.set_ylim(min(later) - margin, max(later) + margin)


def _arm(name: str) -> str:
    """Returns the name of a run without its seed: "engram-3" is a run of "engram"."""
    head, _, tail = name.rpartition("-")
    return head if head and tail.isdigit() else name


def smooth(values: np.ndarray, span: int = 8) -> np.ndarray:
    """Averages the last `span` values at every point, or as many as there are so far."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - span)
    return (sums[ends] - sums[starts]) / (ends - starts)


def gate_map(gates: Gates, title: str = "") -> Figure:
    """Draws the gates: tokens across, one line per layer and stream.

    A long text continues below.
    """
    with style():
        layers, time, streams = gates.values.shape
        lines = -(-time // ACROSS)
        width = min(time, ACROSS)
        figure = _figure(
            max(5.0, 0.3 * width + 1.6), 0.25 + lines * (1.0 + 0.24 * layers * streams)
        )
        parts = figure.subplots(lines, squeeze=False)[:, 0]
        rows = gates.values.permute(0, 2, 1).reshape(layers * streams, time).numpy()
        words = [word.strip() or "␣" for word in gates.tokens]
        names = [
            f"block {layer}" + (f", stream {s}" if streams > 1 else "")
            for layer in gates.layers
            for s in range(streams)
        ]
        for n, axes in enumerate(parts):
            chunk = slice(n * ACROSS, (n + 1) * ACROSS)
            image = axes.imshow(
                rows[:, chunk],
                aspect="auto",
                cmap="viridis",
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            # The cells of a shorter last line are as wide as the others.
            axes.set_xlim(-0.5, width - 0.5)
            # A token with dollar signs is not a formula.
            axes.set_xticks(
                range(len(words[chunk])), words[chunk], rotation=60, ha="right", parse_math=False
            )
            axes.set_yticks(range(layers * streams), names)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=list(parts), label="gate", fraction=0.03, pad=0.01)
        if title:
            parts[0].set_title(title, loc="left", parse_math=False)
        return figure


def load_map(load: Load) -> Figure:
    """Draws each expert's share of its layer's tokens over the uniform share; 1 is balance."""
    with style():
        layers, experts = load.counts.shape
        figure = _figure(7.5, 0.9 + 0.32 * layers)
        axes = figure.subplots()
        over = (load.shares * experts).numpy()
        image = axes.imshow(
            over, aspect="auto", cmap="cividis", vmin=0.0, vmax=max(2.0, float(over.max()))
        )
        axes.set_yticks(range(layers), [f"block {layer}" for layer in load.layers])
        axes.set_xlabel("routed expert")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, label="load / uniform", fraction=0.03, pad=0.01)
        return figure


def sweep(
    points: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    x: str,
    y: str,
    log: bool = False,
    levels: Mapping[str, float] | None = None,
    names: Sequence[str] = (),
) -> Figure:
    """Draws lines of (x, mean, standard error) with error bars.

    levels: values that are drawn as horizontal lines. names: labels of x = 0, 1, ..; with names, no
    line joins the points.
    """
    with style():
        figure = _figure(6.5, 3.6)
        axes = figure.subplots()
        for (name, rows), colour in zip(points.items(), COLOURS * 4, strict=False):
            xs, means, errors = np.array(sorted(rows)).T
            axes.errorbar(
                xs,
                means,
                yerr=errors,
                fmt="o" if names else "o-",
                color=colour,
                capsize=3,
                lw=1.2,
                ms=4,
                label=name,
            )
        for (name, level), colour in zip(
            (levels or {}).items(), COLOURS[len(points) :] * 4, strict=False
        ):
            axes.axhline(level, color=colour, lw=1, ls="--", label=name)
        if names:
            axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
        if log:
            places = sorted({x for rows in points.values() for x, _, _ in rows})
            axes.set_xscale("log")
            axes.set_xticks(places, [f"{x:,g}" for x in places])
            axes.minorticks_off()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.2)
        if points or levels:
            axes.legend()
        return figure


def bars(values: Mapping[str, float], *, x: str) -> Figure:
    """Draws one horizontal bar per name, the first at the top.

    Each has its number and its share of the first.
    """
    with style():
        figure = _figure(7.5, 0.8 + 0.3 * len(values))
        axes = figure.subplots()
        first = next(iter(values.values()))
        shares = ["" if not first else f" ({value / first:.0%})" for value in values.values()]
        numbers = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values.values()]
        drawn = axes.barh(range(len(values)), list(values.values()), color=COLOURS[0])
        axes.bar_label(
            drawn, [n + share for n, share in zip(numbers, shares, strict=True)], padding=3
        )
        axes.set_yticks(range(len(values)), list(values), parse_math=False)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlabel(x)
        return figure
