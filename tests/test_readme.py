"""What the READMEs tell a reader to type, typed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs/zh/README.md"]
SHORTER = {  # flags that let a long command end soon, as typed otherwise
    "train": ["--steps", "2", "--rows", "2", "--length", "32", "--data.vocabulary", "300", "--data.cache", "cache"],
    "demo": ["--steps", "4", "--rows", "2", "--length", "32", "--seeds", "1"],
    "eval": ["--split", "all", "--limit", "20"],
    "data": ["--limit", "200"],
}
SLOW = {"train", "demo", "report", "params"}


def blocks(page: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [body for named, body in fenced if named == language]


def commands() -> list[str]:
    lines = {line: None for page in PAGES for block in blocks(page, "sh") for line in block.splitlines() if line}
    return list(lines)


@pytest.fixture
def place(small_run: Path, tmp_path: Path) -> Path:
    """A folder in which what the pages take for granted is there: a finished demo, and notes."""
    for arm in ("moe", "engram"):
        shutil.copytree(small_run, tmp_path / "runs/demo" / arm)
    (tmp_path / "notes").mkdir()
    for i in range(120):
        (tmp_path / "notes" / f"{i}.txt").write_text(f"Note {i}: whale number {i * 7919 % 101} of {i % 17} sang.\n" * 3)
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=[pytest.mark.slow] if SLOW & set(line.split()) else []) for line in commands()],
)
def test_the_command_runs(line: str, place: Path) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    assert words[0] == "rorqual"
    command = [sys.executable, "-m", "rorqual", *words[1:], *SHORTER.get(words[1], [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error:::rorqual"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip()


@pytest.mark.parametrize("page", PAGES, ids=["en", "zh"])
def test_the_python_runs(
    page: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(place)
    (code,) = blocks(page, "python")
    exec(compile(code, page.name, "exec"), {"__name__": "readme"})
    assert len(capsys.readouterr().out.splitlines()) >= 1
    assert "optimizer.step()" in code


def test_the_demo_of_the_page_is_the_demo_of_the_makefile() -> None:
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert "-m rorqual demo" in done.stdout


def test_the_tree_is_that_of_the_house() -> None:
    trees = [
        next(block for block in blocks(page, "") if "rorqual/" in block) for page in (PAGES[0], ROOT / "docs/house.md")
    ]
    assert trees[0] == trees[1]


def test_the_pages_name_the_same_commands() -> None:
    first, second = (blocks(page, "sh") for page in PAGES)
    assert first == second


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
