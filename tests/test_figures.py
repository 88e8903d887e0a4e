"""Tests how figures are drawn, scripts/figures/svg.py, and that docs/images holds them."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]

# Figures are modules of a folder of scripts, which is no package.
sys.path.insert(0, str(ROOT / "scripts"))
draw: ModuleType = importlib.import_module("draw_figures")
svg: ModuleType = importlib.import_module("figures.svg")
sys.path.pop(0)

DRAWINGS = draw.drawings()
EACH = [(name, language) for name in DRAWINGS for language in draw.LANGUAGES]


@pytest.mark.parametrize("name, language", EACH)
def test_the_file_is_what_is_drawn_and_readable(name: str, language: str) -> None:
    figure = draw.drawn(DRAWINGS[name], language)
    assert not list(figure.problems())
    path = draw.IMAGES / f"{name}{draw.LANGUAGES[language]}.svg"
    assert path.is_file(), "run python scripts/draw_figures.py"
    assert path.read_text(encoding="utf-8") == figure.svg(), "run python scripts/draw_figures.py"


@pytest.mark.parametrize("name, language", EACH)
def test_a_figure_has_an_outline_for_those_who_cannot_see_it(name: str, language: str) -> None:
    figure = draw.drawn(DRAWINGS[name], language)
    root = ElementTree.fromstring(figure.svg())
    assert root.get("aria-label") == figure.alt
    assert len(figure.alt) > 20
    chinese = re.search("[\u4e00-\u9fff]", figure.alt)
    assert bool(chinese) == (language == "zh")
    if language == "en":
        assert not re.search("[\u4e00-\u9fff]", figure.svg())


def test_every_figure_is_on_a_page_of_its_language() -> None:
    for language, ending in draw.LANGUAGES.items():
        folder = ROOT / "docs" / ("zh" if language == "zh" else "")
        text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.md"))
        shown = set(
            re.findall(
                r"^!\[[^\]]{10,}\]\((?:\.\./)?images/(\w+)" + ending + r"\.svg\)$",
                text,
                re.MULTILINE,
            )
        )
        assert shown >= DRAWINGS.keys(), f"{language}: {DRAWINGS.keys() - shown} on no page"


def test_text_is_measured_and_broken_to_fit() -> None:
    assert svg.text_width("iii", 10) < svg.text_width("mmm", 10)
    assert svg.text_width("专家", 10) == 20
    assert svg.text_width("x_{i}", 10) == pytest.approx(svg.text_width("x", 10) + 0.78 * 2.8)
    assert svg.wrapped("one two", svg.text_width("one two"), 13) == ["one two"]
    assert svg.wrapped("one two", svg.text_width("one tw"), 13) == ["one", "two"]
    # A comma does not begin a line.
    assert svg.wrapped("专家，路由", 26, 13) == ["专", "家，", "路由"]
    with pytest.raises(ValueError, match="got 'toolongword'"):
        svg.wrapped("a toolongword", 40, 13)
    with pytest.raises(ValueError, match="expected at least"):
        svg.Figure().text(0, 0, "tiny", size=8)


def drawn_with_problem(problem: str) -> "svg.Figure":
    figure = svg.Figure()
    figure.alt = "A figure with a fault."
    if problem == "overlaps":
        figure.text(100, 10, "first")
        figure.text(110, 12, "second")
    elif problem == "sticks out":
        figure.box(300, 10, 100, "too wide")
    elif problem == "crosses the edge":
        figure.box(10, 10, 40, height=30)
        figure.text(50, 15, "half inside")
    elif problem == "a line crosses 'word'":
        figure.text(100, 20, "word")
        figure.line((100, 0), (100, 60))
    elif problem == "a line crosses the box":
        figure.box(50, 50, 40, height=20)
        figure.connect((10, 60), (120, 60))
    elif problem == "overlap":
        figure.box(10, 10, 40, height=30)
        figure.box(30, 20, 40, height=30)
    elif problem == "no alt text":
        figure.alt = ""
        figure.box(10, 10, 40, height=30)
    return figure


@pytest.mark.parametrize(
    "problem",
    [
        "overlaps",
        "sticks out",
        "crosses the edge",
        "a line crosses 'word'",
        "a line crosses the box",
        "overlap",
        "no alt text",
    ],
)
def test_a_fault_is_reported(problem: str) -> None:
    problems = list(drawn_with_problem(problem).problems())
    assert any(problem in text for text in problems), problems


def test_a_figure_without_a_fault_has_none() -> None:
    figure = svg.Figure()
    figure.alt = "Two boxes."
    first = figure.box(20, 40, 80, "first")
    second = figure.box(20, 100, 80, "second")
    figure.connect(first.south(), second.north())
    figure.frame([first, second], "both")
    assert not list(figure.problems())


def test_every_kind_of_drawing_is_in_the_file() -> None:
    figure = svg.Figure()
    figure.alt = "One of everything."
    grid = figure.cells(
        60, 40, [[0.0, 1.0], [0.5, None]], rows=["a", "b"], columns=["c", "d"], show="{:.1f}".format
    )
    figure.bracket(grid, "right", "two rows")
    figure.bracket(grid, "below", "two columns")
    box = figure.box(220, 40, 80, "x_{i}^{2}", kind="memory")
    sign = figure.circle(260, 110, "+")
    figure.connect(box.south(), sign.north(), kind="chosen", dashed=True)
    figure.line((10, 150), (100, 150))
    assert not list(figure.problems())
    drawn = ElementTree.fromstring(figure.svg())
    space = "{http://www.w3.org/2000/svg}"
    # Four cells, colours on three of them, and the box.
    assert len(drawn.findall(f"{space}rect")) == 8
    assert len(drawn.findall(f"{space}polygon")) == 1
    assert len(drawn.findall(f"{space}circle")) == 1
    words = ["".join(text.itertext()) for text in drawn.findall(f"{space}text")]
    assert {"0.0", "0.5", "a", "d", "two rows", "two columns", "xi2", "+"} <= set(words)
    moved = [span.get("dy") for span in drawn.iter(f"{space}tspan") if span.get("dy")]
    # Down to the index, and from there up to the power.
    assert float(moved[0]) > 0 > float(moved[1])


def test_colours_follow_light_and_dark() -> None:
    assert svg.LIGHT.keys() == svg.DARK.keys()

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colours, page in ((svg.LIGHT, "#ffffff"), (svg.DARK, "#0d1117")):
        for name in ("plain", "learned", "state", "memory", "chosen"):
            pair = sorted((luminance(colours["ink"]), luminance(colours[name])))
            # What the guidelines for accessible pages ask of text.
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 7, name
        pair = sorted((luminance(colours["soft"]), luminance(page)))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5
