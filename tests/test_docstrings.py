"""Tests how scripts/docstrings.py prepares docstrings for the API reference."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

griffe = pytest.importorskip("griffe", reason="the extra [docs] is not installed")

SCRIPT = Path(__file__).parents[1] / "scripts" / "docstrings.py"
spec = importlib.util.spec_from_file_location("docstrings", SCRIPT)
assert spec is not None and spec.loader is not None
docstrings: ModuleType = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docstrings)

MODULE = '''
class Config:
    """A config. rows [B][T], a*b."""

    # of the batch,
    # in sequences
    size: int = 1
    width: int = 2  # of a [head]
    plain: int = 3

    def __init__(self):
        self.private = 1
'''


def test_brackets_and_stars_are_text_outside_of_code() -> None:
    text = "Rows [B, T] of `ids[0]`, a_i * b.\n\n    x[0] * y_1\n"
    expected = "Rows \\[B, T\\] of `ids[0]`, a\\_i \\* b.\n\n    x[0] * y_1"
    assert docstrings.to_markdown(text) == expected


def test_comments_of_fields_become_their_docstrings(tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text(MODULE)
    loader = griffe.GriffeLoader(
        search_paths=[tmp_path], extensions=griffe.load_extensions(docstrings.PlainDocstrings)
    )
    config = loader.load("sample")["Config"]
    assert config.docstring.value == "A config. rows \\[B\\]\\[T\\], a\\*b."
    assert config["size"].docstring.value == "of the batch, in sequences"
    assert config["width"].docstring.value == "of a \\[head\\]"
    assert config["plain"].docstring is None
    assert "private" not in config.members
