"""Tests scripts/build_notebooks.py, and that what is stored in notebooks/ is what its sources make.

Executing the notebooks is `make notebooks`, which `.ci/run` calls; here a small one is executed.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

for needed in ("jupytext", "nbformat", "nbclient", "ipykernel"):
    pytest.importorskip(needed, reason="the extra [notebooks] is not installed")

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location(
    "build_notebooks", ROOT / "scripts" / "build_notebooks.py"
)
assert spec is not None and spec.loader is not None
notebooks: ModuleType = importlib.util.module_from_spec(spec)
# Named tuples look their module up.
sys.modules["build_notebooks"] = notebooks
spec.loader.exec_module(notebooks)

NAMES = notebooks.names()
TEXT = (
    '# %% [markdown] lang="en"\n# # Title\n# %% [markdown] lang="zh"\n# # 题目\n#\n# 两行\n# 合一\n'
)
EXERCISE = '''\
# %% tags=["exercise"]
def twice(x):
    """Doubles."""
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION


# %% tags=["wrong"]
def twice(x):
    return x{wrong}


# %% tags=["gate"]
assert twice(3) == 6

# %% tags=["exact"]
print(twice(1))
print(twice(2))
'''


def source(folder: Path, code: str) -> Path:
    path = folder / "00_sample.py"
    path.write_text(TEXT + code, encoding="utf-8")
    return path


def test_there_are_notebooks_and_nothing_else() -> None:
    assert len(NAMES) >= 6
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", name) for name in NAMES)
    stored = {path.relative_to(notebooks.FOLDER).as_posix() for path in files()}
    expected = {
        notebooks.file_of(f"{name}.ipynb", language, exercises)
        for name in NAMES
        for language in ("en", "zh")
        for exercises in (False, True)
    }
    assert stored == expected


def files() -> list[Path]:
    return sorted(notebooks.FOLDER.rglob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_what_the_source_makes(name: str) -> None:
    cells = notebooks.read(notebooks.SOURCES / f"{name}.py")
    built = notebooks.with_stored_outputs(name, cells)
    assert not notebooks.stale(built)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_teaches(name: str) -> None:
    """Ten cells or more, exercises, something exact, a picture, a title with its number."""
    cells = notebooks.read(notebooks.SOURCES / f"{name}.py")
    assert len(cells) >= 10
    tags = [tag for cell in cells for tag in cell.tags]
    assert tags.count("exercise") >= 1
    assert "exact" in tags
    for language in ("en", "zh"):
        assert cells[0].text[language].startswith(f"# {int(name[:2])}. ")
    han = re.compile(notebooks.HAN)
    for cell in cells:
        if cell.kind == "markdown":
            assert han.search(cell.text["zh"]) and not han.search(cell.text["en"])
    stored = notebooks.stored(f"{name}.ipynb")
    kinds = {
        kind
        for cell in stored.cells
        for out in cell.get("outputs", ())
        for kind in out.get("data", ())
    }
    assert "image/png" in kinds


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_stored_notebook_is_small_and_clean(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) <= notebooks.BYTES
    assert not re.search(r"/(tmp|home|root|work|Users)/", text)
    assert "traceback" not in text
    if "exercises" in path.parts:
        assert "SOLUTION" not in text and '"outputs": [{' not in text
        assert "raise NotImplementedError" in text


def test_a_source_becomes_four_notebooks(tmp_path: Path) -> None:
    cells = notebooks.read(source(tmp_path, EXERCISE.format(wrong="")))
    code = [c for c in cells if c.kind == "code" and "wrong" not in c.tags]
    built = notebooks.versions("00_sample", cells, [[] for _ in code])
    assert set(built) == {
        "00_sample.ipynb",
        "exercises/00_sample.ipynb",
        "zh/00_sample.ipynb",
        "zh/exercises/00_sample.ipynb",
    }
    english, chinese = built["00_sample.ipynb"], built["zh/00_sample.ipynb"]
    assert english.cells[0].source.startswith("# Title\n\n[中文](zh/00_sample.ipynb)")
    assert chinese.cells[0].source.startswith("# 题目\n\n两行合一\n\n[English](../00_sample.ipynb)")
    assert [c.id for c in english.cells] == [c.id for c in chinese.cells]
    assert "pip install" in english.cells[1].source
    solution, blank = (
        built[file].cells[2].source for file in ("00_sample.ipynb", "exercises/00_sample.ipynb")
    )
    assert solution == 'def twice(x):\n    """Doubles."""\n    return 2 * x'
    assert blank.endswith('"""Doubles."""\n    # YOUR CODE HERE\n    raise NotImplementedError')


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('# %% [markdown] lang="en"\n# one language\n# %%\n1\n', "in both languages"),
        ('# %% [markdown] lang="zh"\n# 中文\n', 'lang="en"'),
        ('# %% tags=["gate"]\nassert True\n', "each exercise"),
        ('# %% tags=["exercise"]\ndef f():\n    pass\n', "each exercise"),
        ('# %% tags=["typo"]\n1\n', "expected one of"),
        ("# %%\n### BEGIN SOLUTION\nx = 1\n### END SOLUTION\n", "in exercises alone"),
    ],
)
def test_a_source_that_is_not_one_is_refused(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(notebooks.Broken, match=message):
        notebooks.read(source(tmp_path, code))


def test_a_repository_adds_links_that_open_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebooks, "site", lambda: ("https://github.com/who/what", "main"))
    line = notebooks.links("01_a", "zh", True)
    colab = "https://colab.research.google.com/github/who/what/blob/main"
    assert f"{colab}/notebooks/zh/exercises/01_a.ipynb" in line
    assert "[English](../../exercises/01_a.ipynb)" in line
    assert "[含答案与输出的版本](../01_a.ipynb)" in line
    assert '"rorqual[report] @ git+https://github.com/who/what@main"' in notebooks.install("01_a")
    training = notebooks.install("10_train_and_compare")
    assert '"rorqual[report,train] @ git+https://github.com/who/what@main"' in training


@pytest.mark.parametrize("url", ["", "https://example.org/who/what"])
def test_no_link_to_colab_without_a_repository_that_it_opens(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr(notebooks, "site", lambda: (url, "main"))
    assert "colab" not in notebooks.links("01_a", "en", False)


def installed_by(cell: str, missing: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the cell that installs, and returns what pip would have been given."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if missing else name)
    wanted: list[str] = []
    line = '%pip install --quiet "{address}"'
    assert line in cell
    exec(cell.replace(line, "wanted.append(address)"), {"wanted": wanted})
    return wanted


def test_the_first_cell_installs_from_the_repository_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an address it says what to write: an index may have a stranger's package."""
    monkeypatch.setattr(notebooks, "site", lambda: ("", "main"))
    cell = notebooks.install("01_a")
    with pytest.raises(ModuleNotFoundError, match="set address in this cell"):
        installed_by(cell, True, monkeypatch)
    assert installed_by(cell, False, monkeypatch) == []
    filled = cell.replace('address = ""', 'address = "/content/rorqual[report]"')
    assert installed_by(filled, True, monkeypatch) == ["/content/rorqual[report]"]
    monkeypatch.setattr(notebooks, "site", lambda: ("https://github.com/who/what", "v1"))
    expected = "rorqual[report] @ git+https://github.com/who/what@v1"
    assert installed_by(notebooks.install("01_a"), True, monkeypatch) == [expected]


def test_a_new_address_needs_no_new_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a release does it: set repo_url, then build_notebooks.py --text."""
    monkeypatch.setattr(notebooks, "site", lambda: ("https://github.com/who/what", "main"))
    cells = notebooks.read(notebooks.SOURCES / f"{NAMES[0]}.py")
    built = notebooks.with_stored_outputs(NAMES[0], cells)
    assert notebooks.stale(built) == [
        f"{file}: is not what notebooks/src makes; run scripts/build_notebooks.py {NAMES[0]}"
        for file in built
    ]
    for notebook in built.values():
        assert "colab.research.google.com/github/who/what" in notebook.cells[0].source
        assert "git+https://github.com/who/what@main" in notebook.cells[1].source


@pytest.mark.slow
def test_a_gate_passes_with_the_solution_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = notebooks.read(source(tmp_path, EXERCISE.format(wrong=" + 2")))
    outputs = notebooks.execute("00_sample", cells)
    assert [out.text for cell in outputs for out in cell] == ["2\n4\n"]
    cells = notebooks.read(source(tmp_path, EXERCISE.format(wrong=" + x")))
    with pytest.raises(notebooks.Broken, match="got a gate that passes"):
        notebooks.execute("00_sample", cells)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import sys\nprint('a', file=sys.stderr)", "stderr"),
        ("import tempfile\nprint(tempfile.mkdtemp())", "names the folder"),
    ],
)
def test_what_must_not_be_stored_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = notebooks.read(source(tmp_path, f"# %%\n{code}\n"))
    with pytest.raises(notebooks.Broken, match=message):
        notebooks.execute("00_sample", cells)


def test_only_exact_text_is_compared() -> None:
    from nbformat import v4

    def version(exact: str, other: str) -> dict:
        cells = [
            notebooks.Cell("markdown", {"en": "# T", "zh": "# 题"}),
            notebooks.Cell.code("print(1)", ["exact"]),
            notebooks.Cell.code("print(2)"),
        ]
        outputs = [[v4.new_output("stream", text=text)] for text in (exact, other)]
        return notebooks.versions("00_sample", cells, outputs)

    stored = version("1", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebooks, "stored", stored.__getitem__)
        assert not notebooks.differences("00_sample", version("1", "another"))
        (message,) = notebooks.differences("00_sample", version("one", "2"))
    assert "-1" in message and "+one" in message
