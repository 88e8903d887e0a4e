"""Draws the figures of docs/: docs/images/NAME.svg in English, NAME.zh.svg in Chinese.

    python scripts/draw_figures.py          writes every figure
    python scripts/draw_figures.py --check  says which files differ from what would be drawn

A figure is a function of a file in scripts/figures/, one file a paper; its name is the figure's. It
draws on the `figures.svg.Figure` that it gets, and writes its words by `figure.say`, in English and
in Chinese.
"""

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from figures.svg import START, Figure

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "scripts" / "figures"
IMAGES = ROOT / "docs" / "images"
LANGUAGES = {"en": "", "zh": ".zh"}


def drawings() -> dict[str, Callable[[Figure], None]]:
    """Returns the functions that draw, by the names of their figures."""
    result: dict[str, Callable[[Figure], None]] = {}
    for path in sorted(SOURCES.glob("*.py")):
        if path.stem in ("__init__", "svg"):
            continue
        module = importlib.import_module(f"figures.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ != module.__name__ or name.startswith("_"):
                continue
            if name in result:
                raise ValueError(f"got two figures {name}, expected one: {path.name} has another")
            result[name] = function
    return result


def drawn(draw: Callable[[Figure], None], language: str) -> Figure:
    """Returns a figure in a language."""
    figure = Figure(language)
    draw(figure)
    return figure


def files() -> dict[Path, str]:
    """Returns what every file should hold. Raises ValueError where a figure has a problem."""
    result = {}
    wrong = []
    for name, draw in drawings().items():
        for language, ending in LANGUAGES.items():
            figure = drawn(draw, language)
            wrong += [f"{name} ({language}): {problem}" for problem in figure.problems()]
            result[IMAGES / f"{name}{ending}.svg"] = figure.svg()
    if wrong:
        raise ValueError("\n".join(wrong))
    return result


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--check", action="store_true", help="write nothing, compare the files")
    options = parser.parse_args()
    try:
        expected = files()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    # A figure that is drawn no longer has no file either; other pictures are left alone.
    stale = [
        path
        for path in sorted(IMAGES.glob("*.svg"))
        if path not in expected and path.read_text(encoding="utf-8").startswith(START)
    ]
    stale += [
        path
        for path, text in expected.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if options.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what is drawn: run this without --check")
        return int(bool(stale))
    for path in stale:
        if path in expected:
            path.write_text(expected[path], encoding="utf-8")
        else:
            path.unlink()
    print(f"{len(expected)} figures in {IMAGES.relative_to(ROOT)}/, {len(stale)} files changed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
