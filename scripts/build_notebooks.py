"""Builds the notebooks, English and Chinese, from one source each, and executes them.

    python scripts/build_notebooks.py [NAME ...]           executes, and writes what is stored
    python scripts/build_notebooks.py --text [NAME ...]    writes new text, keeps the outputs
    python scripts/build_notebooks.py --check [NAME ...]   executes, writes nothing, compares

A source, notebooks/src/NN_name.py, is a notebook in jupytext's percent format. It holds the code
once and each text twice, which follow each other:

    # %% [markdown] lang="en"             # %% [markdown] lang="zh"

Code is executed once for both languages, so labels of figures are English. Cells of code may have
tags:

    # %% tags=["exact"]      its printed text is the same on every machine; --check compares it
    # %% tags=["exercise"]   holds a solution between ### BEGIN SOLUTION and ### END SOLUTION
    # %% tags=["wrong"]      a typical wrong answer, in no notebook; one or more follow an exercise
    # %% tags=["gate"]       asserts that the solution passes, the blank and the wrong ones do not

Four notebooks are written for a source: notebooks/NN_name.ipynb, the same in exercises/ with blanks
in place of solutions and no outputs, and both of them in zh/. A cell that installs rorqual where it
is missing, and links to the other versions, are put in here.
"""

import argparse
import difflib
import os
import re
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode, v4

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
SOURCES = FOLDER / "src"
TAGS = {"exact", "exercise", "wrong", "gate"}
SECONDS = 300  # the time limit of a cell, and of a kernel's start
BYTES = 300_000  # the limit of a stored notebook
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION$", re.DOTALL | re.MULTILINE)
MARKERS = re.compile(r"^ *### (BEGIN|END) SOLUTION\n?", re.MULTILINE)
HAN = r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
# Between Chinese characters a browser would show the end of a line as a space.
WRAPPED = re.compile(rf"(?<={HAN})\n(?=[*\[]*{HAN})")
WORDS = {
    "en": {
        "other": "中文",
        "blank": "exercises without solutions",
        "solved": "with solutions and outputs",
        "colab": "open in Colab",
        "github": "on GitHub",
    },
    "zh": {
        "other": "English",
        "blank": "不含答案的练习版",
        "solved": "含答案与输出的版本",
        "colab": "在 Colab 中打开",
        "github": "在 GitHub 上查看",
    },
}
OTHER = {"en": "zh", "zh": "en"}
GITHUB = "https://github.com/"
COLAB = "https://colab.research.google.com/github/"
INSTALL = '''\
import importlib.util

# Where rorqual is missing, as on Colab, this installs it; elsewhere it does nothing.
# A folder with a checkout will do as well as an address: "/content/rorqual[{extras}]"
address = "{address}"
if importlib.util.find_spec("rorqual") is None:
    %pip install --quiet "{{address}}"'''
# While the repository has no address: pip would take any package of that name from an index.
ASK = '''\
import importlib.util

# Where rorqual is missing, write here where its source is, and this installs it: a folder with a
# checkout, "/content/rorqual[{extras}]", or "rorqual[{extras}] @ git+" and an address.
address = ""
if importlib.util.find_spec("rorqual") is None:
    if not address:
        raise ModuleNotFoundError("rorqual is not installed: set address in this cell")
    %pip install --quiet "{{address}}"'''
# What a notebook needs installed besides rorqual itself; `report` brings matplotlib.
EXTRAS = {"10_train_and_compare": "report,train"}


class Cell(NamedTuple):
    """A cell of a source: code, or a text in both languages."""

    kind: str  # code or markdown
    text: dict[str, str]  # by language; the same for code
    tags: tuple[str, ...] = ()

    @classmethod
    def code(cls, text: str, tags: Sequence[str] = ()) -> "Cell":
        return cls("code", {"en": text, "zh": text}, tuple(tags))


class Broken(Exception):
    """A source or its execution is not as it must be; the message says where and what."""


# Reading


def read(path: Path) -> list[Cell]:
    """Returns the cells of a source, with the one that installs rorqual; Broken, with a hint."""
    name = path.stem
    cells: list[Cell] = []
    english: str | None = None
    for raw in jupytext.read(path, fmt="py:percent").cells:
        language = raw.metadata.get("lang")
        if raw.cell_type == "markdown":
            if language not in WORDS or (language == "zh") != (english is not None):
                start = raw.source.partition("\n")[0]
                raise Broken(
                    f'{name}: got a text with lang {language!r}: {start!r}, expected lang="en", '
                    'then lang="zh"'
                )
            if english is None:
                english = raw.source
            else:
                chinese = WRAPPED.sub("", raw.source)
                cells.append(Cell("markdown", {"en": english, "zh": chinese}))
                english = None
            continue
        tags = raw.metadata.get("tags", [])
        if english is not None or set(tags) - TAGS or len(tags) > 1:
            start = raw.source.partition("\n")[0]
            raise Broken(
                f"{name}: got tags {tags} at {start!r}, expected one of {sorted(TAGS)}, after a "
                "text in both languages"
            )
        cells.append(Cell.code(raw.source, tags))
    if not cells or cells[0].kind != "markdown" or english is not None:
        raise Broken(f"{name}: expected a title first, and each text in both languages")
    check_exercises(name, cells)
    return [cells[0], Cell.code(install(name)), *cells[1:]]


def check_exercises(name: str, cells: Sequence[Cell]) -> None:
    """Refuses an exercise without a solution, a wrong answer or a gate, and these without it."""
    marks = "".join(
        {"exercise": "e", "wrong": "w", "gate": "g"}.get("".join(cell.tags), "-") for cell in cells
    )
    if re.sub("ew+g", "", marks).strip("-").replace("-", ""):
        raise Broken(f"{name}: expected each exercise before its wrong answers and its gate")
    for cell in cells:
        if ("exercise" in cell.tags) != bool(SOLUTION.search(cell.text["en"])):
            start = cell.text["en"].partition("\n")[0]
            raise Broken(f"{name}: expected ### BEGIN SOLUTION in exercises alone, got {start!r}")


def site() -> tuple[str, str]:
    """Returns the repository's address and branch, from the settings of the site."""
    settings = tomllib.loads((ROOT / "docs/site/site.toml").read_text(encoding="utf-8"))
    return settings["repo_url"], settings["branch"]


def install(name: str) -> str:
    """Returns the cell that installs rorqual where it is missing; it prints nothing elsewhere."""
    url, branch = site()
    extras = EXTRAS.get(name, "report")
    if not url:
        return ASK.format(extras=extras)
    return INSTALL.format(extras=extras, address=f"rorqual[{extras}] @ git+{url}@{branch}")


# Writing


def blank(code: str) -> str:
    return SOLUTION.sub(r"\1# YOUR CODE HERE\n\1raise NotImplementedError", code)


def solved(code: str) -> str:
    return MARKERS.sub("", code).rstrip("\n")


def file_of(name: str, language: str, exercises: bool) -> str:
    """Returns where a version is stored, below notebooks/."""
    return ("zh/" if language == "zh" else "") + ("exercises/" if exercises else "") + name


def links(name: str, language: str, exercises: bool) -> str:
    """Returns the line of links below the title."""
    words = WORDS[language]
    file = f"{name}.ipynb"
    here = file_of(file, language, exercises)

    def link(label: str, target: str) -> str:
        return f"[{label}]({os.path.relpath(target, Path(here).parent.as_posix() or '.')})"

    line = [
        link(words["other"], file_of(file, OTHER[language], exercises)),
        link(words["solved" if exercises else "blank"], file_of(file, language, not exercises)),
    ]
    url, branch = site()
    # Colab opens what is on GitHub, and nothing of another host by its address.
    if url.startswith(GITHUB):
        colab = f"{COLAB}{url.removeprefix(GITHUB)}/blob/{branch}"
        line.append(f"[{words['colab']}]({colab}/notebooks/{here})")
        line.append(f"[{words['github']}]({url}/blob/{branch}/notebooks/{here})")
    return " · ".join(line)


def document(
    name: str,
    cells: Sequence[Cell],
    language: str,
    outputs: Sequence[list[NotebookNode]] | None = None,
) -> NotebookNode:
    """Returns a notebook; without outputs it is the one for exercises, with blanks."""
    exercises = outputs is None
    result = []
    counter = 0
    for number, cell in enumerate(cells):
        text = cell.text[language]
        if "wrong" in cell.tags:
            continue
        if cell.kind == "markdown":
            if number == 0:
                text += "\n\n" + links(name, language, exercises)
            new = v4.new_markdown_cell(text)
        else:
            new = v4.new_code_cell(blank(text) if exercises else solved(text))
            if cell.tags:
                new.metadata["tags"] = list(cell.tags)
            if outputs is not None:
                new.outputs = outputs[counter]
                counter += 1
                new.execution_count = counter
                for output in new.outputs:
                    if output.output_type == "execute_result":
                        output.execution_count = counter
        new.id = f"cell-{number:02d}"
        result.append(new)
    return v4.new_notebook(cells=result, metadata=METADATA)


def versions(
    name: str, cells: Sequence[Cell], outputs: Sequence[list[NotebookNode]]
) -> dict[str, NotebookNode]:
    """Returns the four notebooks of a source by their files below notebooks/."""
    return {
        file_of(f"{name}.ipynb", language, exercises): document(
            name, cells, language, None if exercises else outputs
        )
        for language in WORDS
        for exercises in (False, True)
    }


def write(files: dict[str, NotebookNode]) -> None:
    for file, notebook in files.items():
        nbformat.validate(notebook)
        text = nbformat.writes(notebook) + "\n"
        if len(text) > BYTES:
            raise Broken(f"{file}: got {len(text):,} bytes, expected at most {BYTES:,}")
        path = FOLDER / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def stored(file: str) -> NotebookNode:
    path = FOLDER / file
    if not path.is_file():
        raise Broken(f"{file}: is not stored; run scripts/build_notebooks.py {path.stem}")
    return nbformat.read(path, as_version=4)


# Executing


class Probe(NamedTuple):
    """A run of a cell: of the notebook, or of a gate that must fail on what ran before it."""

    code: str
    cell: int | None = None  # the cell of the notebook
    fails_with: str | None = None  # a regular expression of the error's name


def plan(cells: Sequence[Cell]) -> list[Probe]:
    """Returns what to run: every cell, and before a solution the blank and the wrong answers.

    After each of these the gate must fail.
    """
    probes = []
    for number, cell in enumerate(cells):
        if cell.kind != "code" or "wrong" in cell.tags:
            continue
        code = solved(cell.text["en"])
        if "exercise" in cell.tags:
            gate = next(later.text["en"] for later in cells[number:] if "gate" in later.tags)
            probes += [Probe(blank(cell.text["en"])), Probe(gate, fails_with=".*")]
            for later in cells[number + 1 :]:
                if "wrong" not in later.tags:
                    break
                probes += [Probe(later.text["en"]), Probe(gate, fails_with="AssertionError")]
        probes.append(Probe(code, number))
    return probes


def execute(name: str, cells: Sequence[Cell]) -> list[list[NotebookNode]]:
    """Executes a notebook in a folder of its own and returns the outputs of its cells of code.

    Broken if a cell fails or writes to stderr, if a gate passes that must not, or if an output
    names a folder of this machine.
    """
    probes = plan(cells)
    runs = []
    for probe in probes:
        run = v4.new_code_cell(probe.code)
        if probe.fails_with:
            run.metadata["tags"] = ["raises-exception"]
        runs.append(run)
    notebook = v4.new_notebook(cells=runs, metadata=METADATA)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            startup_timeout=SECONDS,
            resources={"metadata": {"path": folder}},
            # That messages within this machine are not encrypted is no news.
            extra_arguments=["--log-level=ERROR"],
        )
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError, RuntimeError) as error:
            # A RuntimeError is a kernel that does not start, or died.
            raise Broken(f"{name}: {error}") from None
    outputs = []
    for probe, run in zip(probes, notebook.cells, strict=True):
        if probe.fails_with is not None:
            errors = [output.ename for output in run.outputs if output.output_type == "error"]
            if not errors or not re.fullmatch(probe.fails_with, errors[0]):
                got = errors[0] if errors else "a gate that passes"
                expected = "an error" if probe.fails_with == ".*" else probe.fails_with
                raise Broken(
                    f"{name}: got {got}, expected {expected}, for a blank or a wrong answer at\n"
                    f"{probe.code}"
                )
        elif probe.cell is not None:
            outputs.append(cleaned(name, run))
    return outputs


def cleaned(name: str, cell: NotebookNode) -> list[NotebookNode]:
    """Returns the outputs of a cell as they are stored."""
    result: list[NotebookNode] = []
    for output in cell.outputs:
        text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        if output.output_type == "stream" and output.name == "stderr":
            raise Broken(f"{name}: got on stderr, expected nothing there:\n{text}\n{cell.source}")
        folders = (str(ROOT), os.path.expanduser("~"), tempfile.gettempdir())
        if bad := [folder for folder in folders if folder in text]:
            raise Broken(f"{name}: an output names the folder {bad[0]}:\n{cell.source}")
        if output.output_type == "stream" and result and result[-1].output_type == "stream":
            result[-1].text += output.text
            continue
        if "metadata" in output:
            output.metadata = {}
        result.append(output)
    return result


def printed(cell: NotebookNode) -> str:
    """Returns the text that a cell's outputs show."""
    return "\n".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for output in cell.get("outputs", [])
    )


def differences(name: str, built: dict[str, NotebookNode]) -> list[str]:
    """Returns what differs from the stored notebooks: text, code, and outputs that are exact."""
    result = stale(built)
    if result:
        return result
    file = f"{name}.ipynb"
    for old, new in zip(stored(file).cells, built[file].cells, strict=True):
        if "exact" in new.metadata.get("tags", []) and printed(old) != printed(new):
            lines = difflib.unified_diff(
                printed(old).splitlines(), printed(new).splitlines(), "stored", "now", lineterm=""
            )
            result.append(f"{file}: {new.id} prints something else\n" + "\n".join(lines))
    return result


def stale(built: dict[str, NotebookNode]) -> list[str]:
    """Returns the files whose cells are not those that their source makes."""

    def content(notebook: NotebookNode) -> list[tuple[str, str, dict]]:
        return [(cell.id, cell.source, cell.metadata) for cell in notebook.cells]

    return [
        f"{file}: is not what notebooks/src makes; run scripts/build_notebooks.py {Path(file).stem}"
        for file, notebook in built.items()
        if content(stored(file)) != content(notebook)
    ]


def with_stored_outputs(name: str, cells: Sequence[Cell]) -> dict[str, NotebookNode]:
    """Returns the notebooks with the outputs that are stored; Broken if the code has changed."""
    old = [cell for cell in stored(f"{name}.ipynb").cells if cell.cell_type == "code"]
    code = [solved(c.text["en"]) for c in cells if c.kind == "code" and "wrong" not in c.tags]
    # The first one installs rorqual and prints nothing: it follows the address of the repository.
    if [cell.source for cell in old][1:] != code[1:]:
        raise Broken(f"{name}: the code has changed; run scripts/build_notebooks.py {name}")
    return versions(name, cells, [cell.outputs for cell in old])


def names() -> list[str]:
    return sorted(path.stem for path in SOURCES.glob("*.py"))


def build(name: str, mode: str) -> tuple[list[str], float]:
    """Builds the notebooks of a source; returns what is wrong, and the seconds it took."""
    begun = time.monotonic()
    try:
        cells = read(SOURCES / f"{name}.py")
        if mode == "text":
            write(with_stored_outputs(name, cells))
            return [], time.monotonic() - begun
        built = versions(name, cells, execute(name, cells))
        wrong = differences(name, built) if mode == "check" else []
        if mode == "write":
            write(built)
        return wrong, time.monotonic() - begun
    except Broken as error:
        return [str(error)], time.monotonic() - begun


def environment(folder: str) -> None:
    """Sets what kernels inherit: this checkout's rorqual, one thread, no network, no traces."""
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["PYTHONWARNINGS"] = "error:::rorqual,ignore:IProgress not found"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Compiling a decoding step would take longer than a notebook generates.
    os.environ["RORQUAL_KERNELS"] = "decode_step=reference"
    os.environ["IPYTHONDIR"] = folder
    os.environ["JUPYTER_RUNTIME_DIR"] = folder
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a source; default: all")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true", help="execute and compare, write nothing")
    modes.add_argument("--text", action="store_true", help="write new text, keep the outputs")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names())):
        parser.error(f"got {unknown[0]}, expected one of {', '.join(names())}")
    mode = "check" if options.check else "text" if options.text else "write"
    failed = False
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        environment(folder)
        selected = options.names or names()
        for name, (wrong, seconds) in zip(
            selected, pool.map(lambda name: build(name, mode), selected), strict=True
        ):
            failed |= bool(wrong)
            print(
                f"{name}: {'failed' if wrong else 'as stored' if options.check else 'written'}"
                f" after {seconds:.0f} s",
                flush=True,
            )
            for message in wrong:
                print(message, file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
