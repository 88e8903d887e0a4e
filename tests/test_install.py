"""Tests what is installed, and how: few packages for a user, wheels alone for everybody."""

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCREEN = 50  # lines of a terminal
# Packages that the index has as source archives alone.
SOURCE_ONLY = {"rouge-score", "word2number", "sqlitedict"}
GPU = re.compile(r"nvidia-|cuda-|triton$")  # what torch brings for a GPU


def needed(requirements: list[str]) -> set[str]:
    """Returns every package that these requirements bring, as far as it is installed here."""
    results: set[str] = set()
    waiting = [(Requirement(line), frozenset[str]()) for line in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        name = canonicalize_name(requirement.name)
        if name in results or GPU.match(name):
            continue
        results.add(name)
        inside = frozenset(requirement.extras)
        waiting += [(Requirement(line), inside) for line in metadata.requires(name) or []]
    return results


def test_a_plain_install_fits_one_screen() -> None:
    brought = needed(PROJECT["dependencies"])
    assert {"torch", "transformers", "numpy"} <= brought
    assert len(brought) < SCREEN, sorted(brought)


def test_no_extra_brings_what_has_to_be_built() -> None:
    """Neither directly nor through another package; the harness that needs these is an exception.

    It is installed without them.
    """
    ours = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    others = [line for line in ours if not line.startswith("rorqual")]
    assert not needed(PROJECT["dependencies"] + others) & (SOURCE_ONLY | {"lm-eval"})


def test_what_has_to_be_built_is_not_pinned() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not SOURCE_ONLY & {canonicalize_name(line.split("==")[0]) for line in text.splitlines()}


def made(target: str) -> list[str]:
    """Returns the pip commands that a target would run, as if nothing were installed."""
    command = ["make", "--dry-run", "--always-make", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [
        line for line in re.split(r"[;\n]", done.stdout) if " pip " in line and " install " in line
    ]


def test_the_demo_installs_only_what_it_needs() -> None:
    assert any("[train,report]" in line for line in made("demo"))
    assert not [line for line in made("demo") if "[dev]" in line or "lm-eval" in line]
    assert any("[dev]" in line for line in made("venv"))


def test_only_wheels_are_installed() -> None:
    assert made("venv")
    assert not [line for line in made("venv") if "--only-binary=:all:" not in line]
    (harness,) = [line for line in made("venv") if line.rstrip(" \\").endswith("lm-eval")]
    assert "--no-deps" in harness
