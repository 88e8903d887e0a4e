"""Builds the documentation site, English and Chinese, and checks its links.

    python scripts/build_site.py          writes site/; needs what [docs] in pyproject.toml lists
    python scripts/build_site.py --check  checks the links of a site that was built

The pages are Markdown files that read well in the repository, too, and the notebooks with their
outputs. A copy of them goes to build/site, where links to source files become links to pages that
show them, each page without a Chinese version gets its English text under a Chinese note, and the
pages of the API reference are written. Figures are put into the pages, so that they follow the
switch between light and dark. Then zensical builds both languages with warnings as errors, and
every link, anchor and picture of the result must exist. Nothing is loaded from another host.
"""

import argparse
import ast
import base64
import html.parser
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "docs" / "site"
WORK = ROOT / "build" / "site"
SITE = ROOT / "site"
LANGUAGES = {"en": "English", "zh": "中文"}
# Of the Chinese site, as seen from the English one, and the other way round.
OTHER = {"en": "zh/", "zh": "../"}
NO_CHINESE = '!!! note "本页尚无中文版"\n    以下为英文原文。\n\n'
ENGLISH_TITLE = "{}（英文）"
DESCRIPTION = {
    "en": "Sparse language models, one paper a file: train, study and serve them.",
    "zh": "稀疏语言模型：一篇论文一个文件，可训练、可研究、可部署。",
}
LINK = re.compile(r"(?P<before>!?\[[^\]]*\]\()(?P<target>[^)\s]+)(?P<after>\))")
# A line that begins with a code span is none.
FENCE = re.compile(r"^\s*(```[^`]*$|~~~)")
ITEM = re.compile(r"^ *(?:[-*]|\d+\.) ")
HAN = r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
WRAPPED = re.compile(rf"(?<={HAN})\n *(?={HAN})")
FORMULA_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Not within a longer code span, which shows how a formula is written.
FORMULA = re.compile(r"(?<!`)\$`([^`\n]+)`\$(?!`)")
DISPLAYED = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
DOLLARS = re.compile(r"(?<![\\$`])\$([^$`]+)\$(?![$`])")
# Copied to the site as they are.
FILES = (".png", ".svg", ".jpg", ".ipynb")
# A line that is a figure of scripts/draw_figures.py and nothing else, and its dark colours.
FIGURE = re.compile(r"^!\[[^\]]*\]\((?P<target>[^)\s]+\.svg)\)$")
DARK = re.compile(r"@media \(prefers-color-scheme: dark\) \{ (?P<rule>\.figure \{[^}]*\}) \}")


@dataclass(frozen=True)
class Page:
    """A page of the site: a file of the repository, its name on the site, and its titles."""

    file: str
    name: str
    titles: dict[str, str]
    english: bool = False

    def source(self, language: str) -> str:
        """Returns the file that has the page's text in a language."""
        if language == "en" or self.english:
            return self.file
        if self.file.startswith("notebooks/"):
            return "notebooks/zh/" + posixpath.basename(self.file)
        return "docs/zh/" + posixpath.basename(self.file)

    def title(self, language: str) -> str:
        """Returns the title in a language."""
        return self.marked(self.titles[language], language)

    def marked(self, title: str, language: str) -> str:
        """Returns a title that says, in Chinese, that the page is in English if it is."""
        return ENGLISH_TITLE.format(title) if language == "zh" and self.english else title


@dataclass(frozen=True)
class Section:
    """A heading of the navigation with its pages; `api` marks the generated ones."""

    titles: dict[str, str]
    pages: tuple[Page, ...]
    api: bool


def settings() -> dict[str, Any]:
    return tomllib.loads((SETTINGS / "site.toml").read_text(encoding="utf-8"))


def sections() -> list[Section]:
    """Returns the navigation of docs/site/site.toml."""
    result = []
    for section in settings()["section"]:
        pages = tuple(
            Page(page["file"], page_name(page["file"]), titles(page), page.get("english", False))
            for page in section["pages"]
        )
        if section.get("notebooks", False):
            pages += notebook_pages()
        result.append(Section(titles(section), pages, section.get("api", False)))
    return result


def titles(entry: dict[str, Any]) -> dict[str, str]:
    return {language: entry[language] for language in LANGUAGES}


def page_name(file: str) -> str:
    """Returns the name of a page on the site. A README is a page like others, not an index."""
    if file == "README.md":
        return "commands.md"
    return posixpath.basename(file).lower()


# Links


class Links:
    """Rewrites the links of pages from the repository's folders to the site's.

    Source files that pages link to are collected in `sources`.
    """

    def __init__(self, pages: list[Page], repo_url: str, branch: str) -> None:
        self.repo_url = repo_url
        self.branch = branch
        self.sources: set[str] = set()
        # Pictures, and notebooks without a page.
        self.files: set[str] = set()
        # (language, name) of the page that a file's text is on.
        self.names: dict[str, tuple[str, str]] = {}
        for page in pages:
            if not page.english:
                self.names[page.source("zh")] = ("zh", page.name)
            self.names[page.file] = ("en", page.name)

    def rewrite(self, text: str, file: str, language: str, name: str) -> str:
        """Returns the text of `file` with links for the page `name` of a language's site."""
        lines = []
        fenced = False
        for line in text.splitlines():
            fenced ^= bool(FENCE.match(line))
            figure = FIGURE.match(line)
            if figure and not fenced:
                line = with_switch(self.path(figure["target"], file))
            elif not fenced:
                line = LINK.sub(
                    lambda match: (
                        match["before"]
                        + self.target(match["target"], file, language, name)
                        + match["after"]
                    ),
                    line,
                )
            lines.append(line)
        return "\n".join(lines) + "\n"

    def target(self, target: str, file: str, language: str, name: str) -> str:
        """Returns what a link in `file` leads to on the site."""
        split = urlsplit(target)
        if split.scheme or target.startswith("#"):
            return target
        path = self.path(target, file)
        anchor = f"#{split.fragment}" if split.fragment else ""
        here = posixpath.dirname(name) or "."
        if path in self.names:
            of, page = self.names[path]
            # A Chinese page leads to the Chinese site, where English pages are, too.
            if of == "zh" and language == "en":
                return outside("en", here, html_name(page)) + anchor
            return posixpath.relpath(page, here) + anchor
        if path.endswith(FILES):
            self.files.add(path)
            # The anchor of a picture names the colour scheme in which GitHub and the theme show it.
            return posixpath.relpath(path.removeprefix("docs/"), here) + anchor
        return self.source(path, language, here) + self.line(path, split.fragment)

    def path(self, target: str, file: str) -> str:
        """Returns the file of the repository that a link in `file` leads to."""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), urlsplit(target).path))
        if not (ROOT / path).is_file():
            raise ValueError(f"{file}: got a link to {target}, expected a file of the repository")
        return path

    def source(self, path: str, language: str, here: str) -> str:
        """Returns the address of a source file: the repository's, or a page that shows it."""
        if self.repo_url:
            return f"{self.repo_url}/blob/{self.branch}/{path}"
        self.sources.add(path)
        if language == "en":
            return posixpath.relpath(source_name(path), here)
        return outside(language, here, html_name(source_name(path)))

    def line(self, path: str, fragment: str) -> str:
        """Returns the anchor of a line of a source file.

        fragment: `L12` as GitHub names it, or the name of what the line defines, `MoE.forward`.
        """
        if path.endswith(".py") and fragment and not re.fullmatch(r"L\d+", fragment):
            fragment = f"L{defined(path, fragment)}"
        if self.repo_url or not fragment:
            return f"#{fragment}" if fragment else ""
        return "#__codelineno-0-" + fragment.removeprefix("L")


def outside(language: str, here: str, page: str) -> str:
    """Returns the way from a folder of one language's site to a page of the other's."""
    return posixpath.normpath(posixpath.join(posixpath.relpath(".", here), OTHER[language], page))


def defined(path: str, name: str) -> int:
    """Returns the line of a source file that defines a name, as `losses` or `MoE.forward`."""
    lines = []
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for piece in name.split("."):
        named = [
            node
            for node in body
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == piece
        ]
        if not named:
            raise ValueError(f"got a link to {path}#{name}, expected what that file defines")
        # The last one is what Python uses, too; those before it are overloads.
        body = named[-1].body
        lines.append(named[-1].lineno)
    return lines[-1]


def with_switch(path: str) -> str:
    """Returns a figure as a part of a page, whose dark colours follow the switch of the site."""
    svg = (ROOT / path).read_text(encoding="utf-8")
    dark = DARK.sub(r'[data-md-color-scheme="slate"] \g<rule>', svg)
    if dark == svg:
        raise ValueError(f"got {path} alone on a line, expected a figure of draw_figures.py")
    # A blank line would end the HTML in Markdown.
    return f"<figure>\n{dark.strip()}\n</figure>"


def source_name(path: str) -> str:
    return f"source/{path}.md"


def html_name(name: str) -> str:
    return name.removesuffix(".md") + ".html"


# Lists


def with_lists(text: str) -> str:
    """Writes lists as the builder reads them, so that they show as on GitHub.

    It wants a blank line before a list that follows a paragraph, and four spaces before what
    belongs to an item, where GitHub takes two. A block of code in an item moves as its fence does.
    """
    lines: list[str] = []
    shift = ""  # of the block of code that a line is in
    # Whether the last line is in code, in a list, in a paragraph that is not an item's first.
    fenced = in_list = in_paragraph = False
    for line in text.splitlines():
        if fenced:
            fenced = not FENCE.match(line)
            lines.append(shift + line if line.strip() else line)
            continue
        fenced = bool(FENCE.match(line))
        blank_before = not lines or not lines[-1].strip()
        item = ITEM.match(line)
        if line.strip():
            if item and not blank_before and (in_paragraph or not in_list):
                lines.append("")
            if not item and blank_before:
                in_list &= line.startswith(" ")
                in_paragraph = in_list
            if item:
                in_list = True
                in_paragraph = False
            indent = re.match(r"( {2}| {4})(?! )", line) if in_list else None
            shift = indent[0] if indent else ""
            line = shift + line
        lines.append(line)
    return "\n".join(lines) + "\n"


# Formulas


def with_formulas(text: str) -> str:
    """Replaces ```math blocks and $`inline formulas`$, both as GitHub shows them, by MathML."""
    text = FORMULA_BLOCK.sub(lambda match: f"<div>{mathml(match[1], 'block')}</div>", text)
    # Markdown would take a formula at the start of a line for a block, but not a span.
    return FORMULA.sub(lambda match: f"<span>{mathml(match[1], 'inline')}</span>", text)


def mathml(latex: str, display: str) -> str:
    """Returns MathML, which browsers draw without a script."""
    # Only pages with formulas need the package.
    from latex2mathml.converter import convert

    result = convert(latex.strip(), display=display)
    # Markdown reads the text between tags, too.
    return result.replace("*", "&#42;").replace("_", "&#95;")


# Notebooks


def notebook_pages() -> tuple[Page, ...]:
    """Returns a page for every stored notebook; its titles are what the notebook begins with."""
    result = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        titles = {}
        for language, folder in (("en", path.parent), ("zh", path.parent / "zh")):
            title = cells_of(folder / path.name)[0]["source"][0]
            titles[language] = re.split("[:：]", title.strip().removeprefix("# "))[0]
        file = path.relative_to(ROOT).as_posix()
        result.append(Page(file, f"notebooks/{path.stem}.md", titles))
    return tuple(result)


def cells_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def page_text(file: str) -> tuple[str, dict[str, bytes]]:
    """Returns the Markdown of a page and its pictures by name; a notebook is turned into both."""
    if not file.endswith(".ipynb"):
        return (ROOT / file).read_text(encoding="utf-8"), {}
    pieces = []
    pictures: dict[str, bytes] = {}
    for cell in cells_of(ROOT / file):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = DISPLAYED.sub(r"\n```math\n\1\n```\n", source)
            pieces.append(DOLLARS.sub(lambda match: f"$`{' '.join(match[1].split())}`$", source))
            continue
        # Readers of the site install nothing.
        if "%pip install" in source:
            continue
        pieces.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{Path(file).stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                pieces.append(f'<p><img src="{name}" alt="{name}"></p>')
            else:
                text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
                pieces.append(f"```text\n{text}\n```")
    return "\n\n".join(pieces) + "\n", pictures


# The API reference


def public_names() -> dict[str, list[str]]:
    """Returns the public names of each module, by its dotted name; those of `rorqual.__all__`.

    A module that is public itself has the names that tests/golden/public.json lists.
    """
    tree = ast.parse((ROOT / "rorqual/__init__.py").read_text(encoding="utf-8"))
    (listed,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULES"
    ]
    golden = ROOT / "tests/golden/public.json"
    members = json.loads(golden.read_text(encoding="utf-8"))["python"]
    result: dict[str, list[str]] = {}
    for name, target in listed.items():
        module, _, attribute = target.partition(":")
        names = result.setdefault(module, [])
        names += [n for n in ([attribute] if attribute else members[name]) if n not in names]
    return dict(sorted(result.items()))


def module_file(module: str) -> str:
    return module.replace(".", "/") + ".py"


def summaries(module: str) -> dict[str, str]:
    """Returns the first line of the docstring of each class and function of a module."""
    tree = ast.parse((ROOT / module_file(module)).read_text(encoding="utf-8"))
    kinds = (ast.ClassDef, ast.FunctionDef)
    result = {
        node.name: (ast.get_docstring(node) or "").partition("\n")[0]
        for node in tree.body
        if isinstance(node, kinds)
    }
    return result | {"": (ast.get_docstring(tree) or "").partition("\n")[0]}


API_INDEX = {
    "en": "# API reference\n\nEvery public name of `rorqual`, by the module that defines it. "
    "`import rorqual as rq` gives them all; each is loaded on its first use.\n",
    "zh": "# API 参考\n\n`rorqual` 的全部公开名字，按定义它的模块排列。`import rorqual as rq` "
    "即可使用，首次用到时才加载。说明取自源码中的英文文档字符串。\n",
}
API_HEADER = {
    "en": "| name | what it is |\n| --- | --- |\n",
    "zh": "| 名字 | 说明 |\n| --- | --- |\n",
}


def api_pages(language: str) -> dict[str, str]:
    """Returns the generated pages, an index and one for each module, with links as in docs/."""
    index = API_INDEX[language]
    result = {}
    for module, names in public_names().items():
        summary = summaries(module)
        name = f"api/{module}.md"
        source = f"[{module_file(module)}](../{module_file(module)})"
        options = {"members": names, "heading_level": 2}
        result[name] = (
            f"# {module}\n\n{source}\n\n::: {module}\n    options: {json.dumps(options)}\n"
        )
        index += f"\n## [{module}]({module}.md)\n\n{summary['']}\n\n{API_HEADER[language]}"
        for public in names:
            line = summary.get(public, "").replace("|", "\\|")
            index += f"| [`{public}`]({module}.md#{module}.{public}) | {line} |\n"
    return {"api/index.md": index} | result


# Staging and building


def stage(language: str, links: Links) -> None:
    """Writes the pages of a language to build/site, and the configuration that builds them."""
    folder = WORK / language / "docs"
    for section in sections():
        for page in section.pages:
            file = page.source(language)
            text, pictures = page_text(file)
            for picture, content in pictures.items():
                (folder / page.name).parent.mkdir(parents=True, exist_ok=True)
                (folder / page.name).with_name(picture).write_bytes(content)
            text = with_formulas(links.rewrite(text, file, language, page.name))
            # Between Chinese characters a browser would show the end of a line as a space.
            text = WRAPPED.sub("", with_lists(text))
            if language == "zh" and page.english:
                title, _, rest = text.partition("\n")
                text = f"{title}\n\n{NO_CHINESE}{rest}"
            write(folder / page.name, text)
    for name, text in api_pages(language).items():
        # The generated pages link to each other as they stand, and to source files.
        text = re.sub(
            r"\]\(\.\./(rorqual/[^)]*)\)",
            lambda match: f"]({links.source(match[1], language, 'api')})",
            text,
        )
        write(folder / name, text)
    shutil.copytree(SETTINGS / "overrides", WORK / language / "overrides")
    shutil.copy(SETTINGS / "extra.css", folder)
    options = configuration(language, links.repo_url)
    config = yaml.safe_dump(options, allow_unicode=True, sort_keys=False)
    write(WORK / language / "mkdocs.yml", config)


def stage_files(links: Links) -> None:
    """Writes what pages link to: files in both languages, source files in the English one."""
    for path in sorted(links.files):
        for language in LANGUAGES:
            copy = WORK / language / "docs" / path.removeprefix("docs/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, copy)
    for path in sorted(links.sources):
        code = (ROOT / path).read_text(encoding="utf-8")
        kind = "python" if path.endswith(".py") else "text"
        text = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
        text += f'`````` {{.{kind} linenums="1"}}\n{code}``````\n'
        write(WORK / "en" / "docs" / source_name(path), text)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def navigation(language: str) -> list[dict[str, Any]]:
    """Returns the navigation as the builder wants it; a section of one page is that page."""
    result: list[dict[str, Any]] = []
    for section in sections():
        title = section.titles[language]
        pages: list[Any] = [{page.title(language): page.name} for page in section.pages]
        if section.api:
            overview = {"en": "All names", "zh": "全部名字"}[language]
            pages = [{overview: "api/index.md"}]
            pages += [{module: f"api/{module}.md"} for module in public_names()]
        if len(pages) == 1:
            (page,) = section.pages
            result.append({page.marked(title, language): page.name})
        else:
            result.append({title: pages})
    return result


def configuration(language: str, repo_url: str) -> dict[str, Any]:
    """Returns the builder's configuration of a language.

    Where the repository has an address, the header of each page leads to it.
    """
    (other,) = LANGUAGES.keys() - {language}
    palette = [
        {
            "media": f"(prefers-color-scheme: {kind})",
            "scheme": scheme,
            "toggle": {"icon": icon, "name": name},
        }
        for kind, scheme, icon, name in (
            ("light", "default", "lucide/sun", {"en": "Dark", "zh": "深色"}[language]),
            ("dark", "slate", "lucide/moon", {"en": "Light", "zh": "浅色"}[language]),
        )
    ]
    return {
        "site_name": "rorqual",
        "site_description": DESCRIPTION[language],
        "site_dir": "out",
        **({"repo_url": repo_url, "repo_name": "rorqual"} if repo_url else {}),
        "use_directory_urls": False,
        "theme": {
            "variant": "modern",
            "language": language,
            "font": False,
            "custom_dir": "overrides",
            "palette": palette,
            "features": [
                "content.code.copy",
                "navigation.footer",
                "navigation.tabs",
                "navigation.top",
                "search.highlight",
                "toc.follow",
            ],
        },
        "extra": {
            "generator": False,
            # The theme shows its switch where there are alternates; ours, in docs/site/overrides,
            # leads to the same page.
            "alternate": [
                {"name": LANGUAGES[other], "link": OTHER[language] + "index.html", "lang": other}
            ],
            "languages": [{"name": LANGUAGES[other], "link": OTHER[language], "lang": other}],
        },
        "extra_css": ["extra.css"],
        "nav": navigation(language),
        "markdown_extensions": [
            "admonition",
            "attr_list",
            "md_in_html",
            "tables",
            {"toc": {"permalink": True}},
            {"pymdownx.highlight": {"anchor_linenums": True}},
            "pymdownx.superfences",
        ],
        "plugins": ["search", {"mkdocstrings": {"handlers": {"python": handler()}}}],
    }


def handler() -> dict[str, Any]:
    """Returns how docstrings are read: plain text in our own form, from files, without imports."""
    return {
        "paths": [str(ROOT)],
        "options": {
            "allow_inspection": False,
            "docstring_style": None,
            "extensions": [str(ROOT / "scripts/docstrings.py")],
            "filters": ["!^_"],
            "members_order": "source",
            "separate_signature": True,
            "show_if_no_docstring": True,
            "show_labels": False,
            "show_root_heading": False,
            "show_root_toc_entry": False,
            "show_signature_annotations": True,
            "show_source": False,
        },
    }


def build() -> None:
    """Builds both languages into site/."""
    shutil.rmtree(WORK, ignore_errors=True)
    options = settings()
    pages = [page for section in sections() for page in section.pages]
    links = Links(pages, options["repo_url"], options["branch"])
    for language in LANGUAGES:
        stage(language, links)
    stage_files(links)
    for language in LANGUAGES:
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
        done = subprocess.run(
            [*command, "--config-file", "mkdocs.yml"],
            cwd=WORK / language,
            env=os.environ | {"NO_COLOR": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise ValueError(f"zensical ({language}):\n{done.stdout}")
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(WORK / "en/out", SITE)
    shutil.copytree(WORK / "zh/out", SITE / "zh")


# Checking


class Document(html.parser.HTMLParser):
    """What a page of HTML offers and wants: ids, links, and files that a browser loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") != "canonical" and "href" in values:
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])


def problems(site: Path) -> Iterator[str]:
    """Yields what is wrong: links into nothing, missing anchors, files from other hosts."""
    documents = {path: Document(path) for path in sorted(site.rglob("*.html"))}
    for path, document in documents.items():
        # It is shown for any address, so that its relative links lead nowhere.
        if path.name == "404.html":
            continue
        here = path.relative_to(site)
        for address in document.loaded:
            if urlsplit(address).netloc:
                yield f"{here}: loads {address} from another host"
        for address in {*document.links, *document.loaded}:
            split = urlsplit(address)
            if split.scheme or split.netloc:
                continue
            target = (path.parent / unquote(split.path)).resolve() if split.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_relative_to(site.resolve()) or not target.is_file():
                yield f"{here}: {address} leads to no file"
                continue
            anchor = unquote(split.fragment)
            if anchor and target.suffix == ".html" and anchor not in documents[target].ids:
                yield f"{here}: {address} has no such anchor"
    for path in sorted(site.rglob("*.css")):
        for address in re.findall(
            r"(?:url\(|@import)\s*[\"']?(https?://[^\"')]+)", path.read_text()
        ):
            yield f"{path.relative_to(site)}: loads {address} from another host"


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--check", action="store_true", help="check links only")
    options = parser.parse_args()
    try:
        if not options.check:
            build()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    wrong = list(problems(SITE.resolve()))
    for line in wrong:
        print(line, file=sys.stderr)
    pages = len(list(SITE.rglob("*.html")))
    print(f"{pages} pages in {SITE.relative_to(ROOT)}/, {len(wrong)} broken links")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
