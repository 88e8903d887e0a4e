"""Tests the plan of the documentation site, and scripts/build_site.py, without building anything.

`make docs`, which `.ci/run` calls, builds it with warnings as errors and checks every link.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("build_site", ROOT / "scripts" / "build_site.py")
assert spec is not None and spec.loader is not None
site: ModuleType = importlib.util.module_from_spec(spec)
# Dataclasses look their module up.
sys.modules["build_site"] = site
spec.loader.exec_module(site)

PAGES = [page for section in site.sections() for page in section.pages]


def links() -> "site.Links":
    return site.Links(PAGES, "", "main")


def test_the_navigation_names_every_page_once() -> None:
    files = [page.file for page in PAGES]
    assert len(set(files)) == len(files)
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert {file for file in files if file.startswith("docs/")} == pages
    names = [page.name for page in PAGES]
    assert len(set(names)) == len(names)


def test_every_page_has_a_title() -> None:
    for page in PAGES:
        for language in site.LANGUAGES:
            file = page.source(language)
            first = site.page_text(file)[0].partition("\n")[0]
            assert first.startswith("# "), file
            assert page.titles[language].strip(), file


def test_chinese_pages_exist_where_the_navigation_says_so() -> None:
    chinese = {path.name for path in (ROOT / "docs/zh").glob("*.md")}
    pages = [page for page in PAGES if not page.file.startswith("notebooks/")]
    translated = {page.file.rpartition("/")[2] for page in pages if not page.english}
    assert chinese == translated
    for page in PAGES:
        assert page.title("zh").endswith("（英文）") == page.english, page.file


def outline(file: str) -> tuple[int, int, int]:
    """Counts the headings, the lines of tables and the pictures of a page."""
    text = (ROOT / file).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings, lines, pictures = (
        len(re.findall(sign, prose, re.MULTILINE)) for sign in (r"^#+ ", r"^\|", r"^!\[")
    )
    return headings, lines, pictures


@pytest.mark.parametrize(
    "page",
    [
        page
        for section in site.sections()
        if section.titles["en"] in ("Guides", "Results", "Architecture", "Contributing")
        for page in section.pages
        if not page.english
    ],
    ids=lambda page: page.name,
)
def test_a_chinese_guide_has_the_sections_and_tables_of_the_english_one(page: "site.Page") -> None:
    assert outline(page.source("zh")) == outline(page.file)


def test_the_chinese_tree_of_files_is_the_english_one() -> None:
    english, chinese = (
        re.findall(r"^ *([\w./]+)", (ROOT / file).read_text("utf-8").split("```")[1], re.MULTILINE)
        for file in ("docs/architecture.md", "docs/zh/architecture.md")
    )
    assert english == chinese


def test_every_public_name_is_on_a_page_of_the_reference() -> None:
    listed = site.public_names()
    names = {name for names in listed.values() for name in names}
    assert {"LanguageModel", "Run", "Costs", "PRESETS"} <= names
    for module, offered in listed.items():
        assert (ROOT / site.module_file(module)).is_file(), module
        missing = [
            name for name in offered if not name.isupper() and name not in site.summaries(module)
        ]
        assert not missing, f"{module} defines no {missing}"
    pages = site.api_pages("en")
    assert pages.keys() == {"api/index.md"} | {f"api/{module}.md" for module in listed}
    for module, offered in listed.items():
        assert all(f"({module}.md#{module}.{name})" in pages["api/index.md"] for name in offered)


@pytest.mark.parametrize(
    ("target", "file", "language", "name", "result"),
    [
        ("train.md#chats", "docs/index.md", "en", "index.md", "train.md#chats"),
        ("docs/train.md", "README.md", "en", "commands.md", "train.md"),
        ("zh/moe.md", "docs/index.md", "en", "index.md", "zh/moe.html"),
        ("docs/zh/README.md", "README.md", "en", "commands.md", "zh/commands.html"),
        # A Chinese page stays on the Chinese site, which has the English pages, too.
        ("../train.md", "docs/zh/README.md", "zh", "commands.md", "train.md"),
        ("../engram.md", "docs/zh/README.md", "zh", "commands.md", "engram.md"),
        ("../images/gates.png", "docs/zh/README.md", "zh", "commands.md", "images/gates.png"),
        (
            "../images/explore-dark.png#gh-dark-mode-only",
            "docs/zh/explore.md",
            "zh",
            "explore.md",
            "images/explore-dark.png#gh-dark-mode-only",
        ),
        ("../CONTRIBUTING.md", "docs/index.md", "en", "index.md", "contributing.md"),
        ("#words", "docs/glossary.md", "en", "glossary.md", "#words"),
        ("https://example.org/a.md", "docs/hub.md", "en", "hub.md", "https://example.org/a.md"),
        (
            "../rorqual/model.py#L3",
            "docs/learn.md",
            "en",
            "learn.md",
            "source/rorqual/model.py.md#__codelineno-0-3",
        ),
        (
            "../../rorqual/model.py",
            "docs/zh/learn.md",
            "zh",
            "learn.md",
            "../source/rorqual/model.py.html",
        ),
    ],
)
def test_links_lead_to_pages_of_the_site(
    target: str, file: str, language: str, name: str, result: str
) -> None:
    assert links().target(target, file, language, name) == result


def test_links_to_source_files_lead_to_the_repository_where_it_has_an_address() -> None:
    hosted = site.Links(PAGES, "https://example.org/rorqual", "main")
    result = hosted.target("../rorqual/model.py#L3", "docs/learn.md", "en", "learn.md")
    assert result == "https://example.org/rorqual/blob/main/rorqual/model.py#L3"
    assert not hosted.sources


def test_a_link_to_a_definition_leads_to_its_line() -> None:
    lines = (ROOT / "scripts/build_site.py").read_text(encoding="utf-8").splitlines()
    assert lines[site.defined("scripts/build_site.py", "Links.line") - 1].startswith(
        "    def line("
    )
    assert lines[site.defined("scripts/build_site.py", "main") - 1].startswith("def main(")
    result = links().target("../scripts/build_site.py#main", "docs/hub.md", "en", "hub.md")
    number = site.defined("scripts/build_site.py", "main")
    assert result == f"source/scripts/build_site.py.md#__codelineno-0-{number}"
    hosted = site.Links(PAGES, "https://example.org/rorqual", "main")
    result = hosted.target("../scripts/build_site.py#main", "docs/hub.md", "en", "hub.md")
    assert result == f"https://example.org/rorqual/blob/main/scripts/build_site.py#L{number}"
    with pytest.raises(ValueError, match=r"build_site\.py#Links\.none"):
        site.defined("scripts/build_site.py", "Links.none")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: "site.Page") -> None:
    for language in site.LANGUAGES:
        file = page.source(language)
        text = (ROOT / file).read_text(encoding="utf-8")
        assert links().rewrite(text, file, language, page.name)


def test_a_figure_becomes_a_part_of_the_page() -> None:
    line = "![A token, a router and experts.](images/moe_layer.svg)\n"
    result = links().rewrite(line, "docs/moe.md", "en", "moe.md")
    assert result.startswith("<figure>\n<svg ")
    assert '[data-md-color-scheme="slate"] .figure {' in result
    assert "@media" not in result and "\n\n" not in result
    within = "see ![it](images/moe_layer.svg) here\n"
    assert links().rewrite(within, "docs/moe.md", "en", "moe.md") == within


def test_a_link_into_nothing_is_refused_and_code_is_left_alone() -> None:
    with pytest.raises(ValueError, match=r"docs/index\.md: got a link to none\.md"):
        links().rewrite("[a](none.md)\n", "docs/index.md", "en", "index.md")
    code = "```\n[a](none.md)\n```\n"
    assert links().rewrite(code, "docs/index.md", "en", "index.md") == code
    span = "```` ```math ```` begins a line\n[a](none.md)\n"
    with pytest.raises(ValueError, match=r"none\.md"):
        links().rewrite(span, "docs/index.md", "en", "index.md")


def test_a_notebook_is_a_page_with_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# 1. Title: more\n", "\n", "$a_i$ and $$b$$"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["1\n"]},
                {"output_type": "display_data", "data": {"image/png": "YWJj\n", "text/plain": []}},
            ],
        },
    ]
    for folder in ("notebooks", "notebooks/zh"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "01_x.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(site, "ROOT", tmp_path)
    (page,) = site.notebook_pages()
    assert page.source("zh") == "notebooks/zh/01_x.ipynb"
    assert page.titles == {"en": "1. Title", "zh": "1. Title"}
    text, pictures = site.page_text(page.file)
    assert "$`a_i`$ and \n```math\nb\n```" in text
    assert "```python\nprint(1)\n```\n\n```text\n1\n```" in text
    assert pictures == {"01_x-1.png": b"abc"} and 'src="01_x-1.png"' in text


def test_chinese_lines_join_without_a_space() -> None:
    text = "一行，\n  两行\n\n- 三\n- 四 a\n五\n"
    assert site.WRAPPED.sub("", text) == "一行，两行\n\n- 三\n- 四 a\n五\n"


def test_lists_are_written_as_the_builder_reads_them() -> None:
    """As GitHub shows them: without a blank line before, and with two spaces inside."""
    text = "A paragraph:\n- one\n  more\n  - inner\n\n  a paragraph\n- two\n\nText\n  on.\n"
    expected = (
        "A paragraph:\n\n- one\n    more\n    - inner\n\n    a paragraph\n\n- two\n\nText\n  on.\n"
    )
    assert site.with_lists(text) == expected
    code = "```\nx:\n- one\n  more\n```\n"
    assert site.with_lists(code) == code
    code = "- one\n\n  ```python\n  x = 1\n\n      - y\n  ```\n  more\n"
    expected = "- one\n\n    ```python\n    x = 1\n\n        - y\n    ```\n    more\n"
    assert site.with_lists(code) == expected


def test_formulas_become_mathml() -> None:
    pytest.importorskip("latex2mathml", reason="the extra [docs] is not installed")
    text = site.with_formulas("x $`a_i * b`$\n\n```math\n\\frac{a}{b}\n```\n")
    assert "<msub><mi>a</mi><mi>i</mi></msub>" in text
    assert "*" not in text and "_" not in text
    assert "x <span><math" in text
    assert '<div><math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in text
    assert "<mfrac>" in text
    code = "written ``$`x`$``"
    assert site.with_formulas(code) == code


def test_pictures_are_small() -> None:
    pictures = sorted((ROOT / "docs/images").glob("*.png"))
    large = {path.name: path.stat().st_size for path in pictures if path.stat().st_size > 150_000}
    assert pictures and not large, "scripts/take_screenshots.py reduces the colours of a picture"


def test_broken_links_and_other_hosts_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top">a</h1><a href="b.html#here">b</a><a href="b.html#gone">b</a>'
        '<a href="c.html">c</a><a href="#top">a</a><a href="https://example.org">out</a>'
        '<a href="../outside.html">o</a><script src="https://example.org/x.js"></script>'
    )
    (tmp_path / "b.html").write_text('<p id="here"></p><img src="none.png">')
    (tmp_path / "a.css").write_text("@import url(https://example.org/x.css);")
    (tmp_path.parent / "outside.html").write_text("")
    assert sorted(site.problems(tmp_path)) == [
        "a.css: loads https://example.org/x.css from another host",
        "a.html: ../outside.html leads to no file",
        "a.html: b.html#gone has no such anchor",
        "a.html: c.html leads to no file",
        "a.html: loads https://example.org/x.js from another host",
        "b.html: none.png leads to no file",
    ]


def test_chinese_pages_lead_to_chinese_pages() -> None:
    """A link from docs/zh to an English page is of a page that has no Chinese version."""
    wrong = []
    for page in sorted((ROOT / "docs" / "zh").glob("*.md")):
        for target in re.findall(r"\]\(\.\./([a-z0-9_]+\.md)\)", page.read_text(encoding="utf-8")):
            if page.name != target and (page.parent / target).is_file():
                wrong.append(f"{page.name}: ../{target}")
    assert not wrong, "\n".join(wrong)
