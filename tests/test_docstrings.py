"""Tests what docstrings say, and how scripts/docstrings.py prepares them for the API reference."""

import ast
import functools
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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


# What docstrings say. A test sees whether the words are there, a reader whether they are right.

ROOT = Path(__file__).parents[1]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SENTENCE = re.compile(r"[A-Z`\"'(\[].*[.:]", re.DOTALL)
PAPER = re.compile(r"\d{4}[.:]\d{4,5}|DeepSeek-V4")
# Files of layers/ that hold no paper's idea.
NO_PAPER = {
    "__init__",
    "attend",
    "cache",
    "context",
    "convolution",
    "cross_entropy",
    "sparse",
    "tiles",
    "top_k",
}


def site() -> ModuleType:
    script = ROOT / "scripts" / "build_site.py"
    spec = importlib.util.spec_from_file_location("build_site", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["build_site"] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the public classes and functions of a body, with their names."""
    for node in body:
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and not node.name.startswith("_"):
            yield prefix + node.name, node


def reference() -> Iterator[tuple[str, Any]]:
    """Yields every class, function, method and property on the pages of the API reference."""
    builder = site()
    for module, names in builder.public_names().items():
        for name, node in definitions(tree_of(ROOT / builder.module_file(module)).body):
            if name not in names:
                continue
            yield f"{module}.{name}", node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{module}.{name}.")


# What torch calls, and describes; what they compute is in the docstring of their class.
OF_TORCH = {"forward", "backward"}
# The first word of what a function does, in the third person.
VERB = re.compile(r"(?!(As|Is|Its|This)\b)[A-Z][a-z]+s\b")

Classes = dict[str, list[ast.ClassDef]]


def owned(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Any, ast.ClassDef | None]]:
    """Yields (name, definition, its class) of all that stands outside of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, *FUNCTIONS)):
            yield prefix + child.name, child, node if isinstance(node, ast.ClassDef) else None
        if isinstance(child, ast.ClassDef):
            yield from owned(child, f"{prefix}{child.name}.")
        elif not isinstance(child, FUNCTIONS):
            yield from owned(child, prefix)


def classes_of(trees: Iterable[ast.Module]) -> Classes:
    """Returns the classes of all files by name; several files may have one of a name."""
    named: Classes = {}
    for tree in trees:
        for _, node, _ in owned(tree):
            if isinstance(node, ast.ClassDef):
                named.setdefault(node.name, []).append(node)
    return named


def is_described(method: str, cls: ast.ClassDef, classes: Classes) -> bool:
    """Returns whether a base class, which is one of these, has a docstring of the method."""
    bases = (re.sub(r"\[.*", "", ast.unparse(base)) for base in cls.bases)
    for base in (each for name in bases for each in classes.get(name.rpartition(".")[2], [])):
        methods = (each for each in base.body if isinstance(each, FUNCTIONS))
        if any(each.name == method and ast.get_docstring(each) for each in methods):
            return True
        if base is not cls and is_described(method, base, classes):
            return True
    return False


def unclear(tree: ast.Module, classes: Classes) -> Iterator[str]:
    """Yields the definitions of a file that do not begin with a sentence, as CONTRIBUTING asks."""
    for name, node, cls in owned(tree):
        text = ast.get_docstring(node)
        summary = (text or "").partition("\n\n")[0]
        decorators = {ast.unparse(each) for each in getattr(node, "decorator_list", [])}
        if decorators & {"overload", "typing.overload"} or any(".setter" in d for d in decorators):
            continue
        if text is None and isinstance(node, FUNCTIONS):
            dunder = node.name.startswith("__") and node.name.endswith("__")
            of_torch = cls is not None and node.name in OF_TORCH
            if dunder or of_torch or (cls is not None and is_described(node.name, cls, classes)):
                continue
        if not SENTENCE.fullmatch(summary):
            yield f"{node.lineno}: {name}: {summary!r} is no sentence"
            continue
        acts = isinstance(node, FUNCTIONS) and not any("property" in d for d in decorators)
        if acts and not VERB.match(summary):
            yield f"{node.lineno}: {name}: {summary!r} begins with no verb such as Returns"


def test_every_class_and_function_says_what_it_does_in_a_sentence() -> None:
    trees = {path: tree_of(path) for path in sorted((ROOT / "rorqual").rglob("*.py"))}
    classes = classes_of(trees.values())
    wrong = []
    for path, tree in trees.items():
        if not SENTENCE.fullmatch((ast.get_docstring(tree) or "").partition("\n\n")[0]):
            wrong.append(f"{path.relative_to(ROOT)}: the file has no sentence")
        wrong += [f"{path.relative_to(ROOT)}:{each}" for each in unclear(tree, classes)]
    assert not wrong, "\n".join(wrong)


SAMPLE = '''
class Base:
    """Bases of others."""

    def load(self):
        """Loads nothing."""

    def forward(self):
        return 1

class Derived(Base):
    """{class_text}"""

    def load(self):
        return 1

    def __len__(self):
        return 1

    def _private(self):
        {text}

def _function():
    """Returns a closure."""
    def closure():
        return 1
    return closure
'''


@pytest.mark.parametrize(
    ("text", "class_text", "seen"),
    [
        ('"""Returns 1."""', "A class.", ""),
        ("return 1", "A class.", "_private"),
        ('"""returns 1."""', "A class.", "_private"),
        ('"""Whether it is 1."""', "A class.", "_private"),
        ('"""Returns 1"""', "A class.", "_private"),
        ('"""Returns 1."""', "in -> out", "Derived"),
    ],
)
def test_a_definition_without_a_sentence_is_seen(text: str, class_text: str, seen: str) -> None:
    tree = ast.parse(SAMPLE.format(text=text, class_text=class_text))
    wrong = list(unclear(tree, classes_of([tree])))
    assert len(wrong) == bool(seen) and all(seen in each for each in wrong)


def test_every_member_in_the_reference_has_a_docstring_that_begins_with_a_sentence() -> None:
    wrong = []
    for name, node in reference():
        # The overloads of a function have its docstring.
        if "overload" in map(ast.unparse, getattr(node, "decorator_list", [])):
            continue
        summary = (ast.get_docstring(node) or "").partition("\n\n")[0]
        if not SENTENCE.fullmatch(summary):
            wrong.append(f"{name}: {summary!r}")
    assert not wrong, "\n".join(wrong)


def test_errors_that_a_function_in_the_reference_raises_are_in_its_docstring() -> None:
    wrong = []
    for name, node in reference():
        if not isinstance(node, FUNCTIONS):
            continue
        text = ast.get_docstring(node) or ""
        for raised in ast.walk(node):
            if isinstance(raised, ast.Raise) and isinstance(raised.exc, ast.Call):
                error = ast.unparse(raised.exc.func)
                if error not in text and not re.search(r"[Rr]efuse", text):
                    wrong.append(f"{name} raises {error}")
    assert not wrong, "\n".join(wrong)


def test_tensors_in_the_reference_have_their_shapes() -> None:
    """A tensor's annotation names its axes, or the docstring shows them in brackets."""
    wrong = []
    for name, node in reference():
        if not isinstance(node, FUNCTIONS):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            annotation = ast.unparse(argument.annotation) if argument.annotation else ""
            plain = re.sub(r"\w+\[Tensor, '[^']*'\]", "", annotation)
            if re.search(r"\bTensor\b", plain) and "[" not in (ast.get_docstring(node) or ""):
                wrong.append(f"{name}: {argument.arg}: {annotation}")
    assert not wrong, "\n".join(wrong)


def test_numbers_among_the_fields_of_the_reference_say_what_they_count() -> None:
    """By a comment, which `rorqual config` and the API reference show, or in the docstring."""
    builder = site()
    wrong = []
    for module, names in builder.public_names().items():
        path = ROOT / builder.module_file(module)
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in tree_of(path).body:
            if not isinstance(node, ast.ClassDef) or node.name not in names:
                continue
            text = ast.get_docstring(node) or ""
            for field in node.body:
                if not isinstance(field, ast.AnnAssign):
                    continue
                name = ast.unparse(field.target)
                number = re.search(r"\b(int|float)\b", ast.unparse(field.annotation))
                comment = docstrings.field_comment(lines, field.lineno, field.end_lineno or 0)
                if number and not comment and name not in text:
                    wrong.append(f"{module}.{node.name}.{name}")
    assert not wrong, "\n".join(wrong)


def test_every_file_of_a_paper_names_it() -> None:
    files = [path for path in (ROOT / "rorqual/layers").glob("*.py") if path.stem not in NO_PAPER]
    wrong = [
        path.name for path in files if not PAPER.search(ast.get_docstring(tree_of(path)) or "")
    ]
    assert not wrong
