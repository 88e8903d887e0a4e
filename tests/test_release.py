"""Tests what a release needs: origin and licence of every file, citation, table of presets."""

import fnmatch
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import yaml

import rorqual

ROOT = Path(__file__).parents[1]
# What is written by hand, or drawn by a script, in this repository.
SOURCES = {
    *(".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".cff", ".css", ".js", ".svg", ".ipynb"),
    *(".gitignore", ".html"),
}
NAMES = {"LICENSE", "NOTICE", "Makefile", ".gitignore", ".ci/run"}


def tracked() -> list[str]:
    """The files of a checkout, or of a source archive where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    files = [path for path in ROOT.rglob("*") if path.is_file()]
    skipped = {".venv", "runs", "site", "dist", "__pycache__", ".cache"}
    return [
        path.relative_to(ROOT).as_posix()
        for path in files
        if not any(name in skipped or name.endswith("_cache") for name in path.parts)
    ]


def entries() -> list[tuple[list[str], str]]:
    """Patterns and text of every entry of NOTICE."""
    text = (ROOT / "NOTICE").read_text(encoding="utf-8")
    listed = []
    for block in text.split("\n\n")[2:]:
        lines = block.splitlines()
        patterns = [line for line in lines if not line.startswith(" ")]
        listed.append((patterns, "\n".join(line for line in lines if line.startswith(" "))))
    return listed


def test_every_file_that_is_no_source_has_its_origin_and_licence() -> None:
    patterns = [pattern for names, _ in entries() for pattern in names]
    names = tracked()
    bare = [
        name
        for name in names
        if Path(name).suffix not in SOURCES and name not in NAMES
        if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]
    assert not bare, "NOTICE has no entry for these"
    stale = [one for one in patterns if not any(fnmatch.fnmatch(name, one) for name in names)]
    assert not stale, "NOTICE has entries for what is not there"
    for names, text in entries():
        assert re.search(r"^    Source: \w", text, re.MULTILINE), names
        assert re.search(r"^    Licence: \w", text, re.MULTILINE), names


def test_the_archives_carry_the_licences() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    files = [path for glob in project["license-files"] for path in ROOT.glob(glob)]
    names = {path.name for path in files}
    assert names >= {"LICENSE", "NOTICE", "wordnet-3.0.LICENSE"}


def test_the_citation_is_of_this_version() -> None:
    """The fields that the schema of CFF 1.2.0 requires, and those that a reader needs."""
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    citation = yaml.safe_load(text)
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == rorqual.__version__ and citation["license"] == "MIT"
    assert citation["message"] and citation["title"] and citation["authors"]
    every = [
        *citation["authors"],
        *(one for ref in citation["references"] for one in ref["authors"]),
    ]
    assert all(set(author) == {"name"} for author in every), "an entity has a name alone here"
    assert all({"type", "title", "authors"} <= set(one) for one in citation["references"])


def test_the_package_names_the_repository_that_the_site_names() -> None:
    """Nowhere while it has no address; CONTRIBUTING.md says where it is written at a release."""
    settings = (ROOT / "docs/site/site.toml").read_text(encoding="utf-8")
    url = tomllib.loads(settings)["repo_url"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project.get("urls", {}).get("Repository", "") == url
    assert citation.get("repository-code", "") == url
    assert not url.endswith("/")


def test_how_to_report_a_vulnerability_is_said() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "do not open a public issue" in text and "no pickles" in text


def test_the_table_of_presets_is_todays() -> None:
    spec = importlib.util.spec_from_file_location("presets", ROOT / "scripts" / "list_presets.py")
    assert spec is not None and spec.loader is not None
    list_presets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(list_presets)
    for path, text in list_presets.pages().items():
        written = (ROOT / path).read_text(encoding="utf-8")
        assert written == text, f"{path}: python scripts/list_presets.py --write"
