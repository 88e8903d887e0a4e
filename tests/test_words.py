"""The vocabulary: names and prose use the words of the field, one word for one thing.

The left column of each table is what an earlier version said, the right column what to write.
"""

import ast
import fnmatch
import functools
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual import config as configs
from rorqual.cli.main import COMMANDS
from rorqual.cli.parse import parse
from rorqual.experiments.allocation import SweepConfig
from rorqual.experiments.demo import DemoConfig
from rorqual.experiments.needle import NeedleSweep
from rorqual.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]

# Whole identifiers: functions, classes, arguments, keywords, fields, attributes, locals, imports.
WORDS = {
    "twin twins Twin TWINS": "kernel; the plain one is the reference",
    "home homes HOMES": "placement, or the folder or module that it is",
    "recall recalled remembers": "lookup, looked_up, has_engram",
    "micro_rows": "micro_batch_size",
    "vocabulary": "vocab_size",
    "present live lead leads": "attention_mask, valid; there is no left padding",
    "chosen most few near": "topk_indices, top_k, small_batch, window",
    "lesson taught warm Look Lesson": "indexer_loss, indexer_warmup, IndexerSelection",
    "told said sure Front front Tally tally": "next_ids, accepted_ids, DraftState, AcceptanceStats",
    "kept held hold claim settle forget": "cached, length, reserve, allocate, free",
    "carried enter Exit collapse wide": "handed_on, expand, StreamReduction, pre_mapping, float32",
    "Keeper Store Written Ask Words Asked": "the class's name in the field: CompletionRequest",
    "mend": "hint",
    "house room door": "architecture, module, public API",
    "arrow floor": "summary line, layer of the architecture",
    "found own at part given known place begin": "the thing's name",
}
# The same as parts of a longer name.
PARTS = {
    "twin twins": "kernel",
    "lesson lessons taught": "indexer_loss, trained",
    "keeper tally mend mends mended remembers homes": "see WORDS",
}
# Words that a file must not use, while others may.
WORDS_IN = {
    "documents": (
        "rorqual/layers/* rorqual/model.py rorqual/kernels/* rorqual/serve/* rorqual/hub/*",
        "document_ids",
    ),
    "rows length": ("rorqual/train/config.py", "batch_size, seq_len"),
}
# The same as parts of a longer name.
PARTS_IN = {
    "row rows": (
        "rorqual/serve/* rorqual/data/mixture.py rorqual/data/needles.py rorqual/data/stream.py "
        "rorqual/layers/att*.py rorqual/layers/ca*.py rorqual/layers/cs*.py rorqual/layers/ds*.py "
        "rorqual/layers/moba.py rorqual/layers/nsa.py rorqual/layers/qsa.py rorqual/layers/r*.py "
        "rorqual/layers/sparse.py",
        "sequence, request or slot; rows are those of a table",
    ),
}
# (word, files): why it may stand there
ALLOWED = {
    ("rows", "rorqual/serve/answer.py"): "rows of a table that a token has read",
    ("rows", "rorqual/serve/schema.py"): "rows of a table that a token has read",
    ("rows", "rorqual/serve/trace.py"): "rows of a table that a token has read",
    ("given", "tests/*"): "hypothesis names its decorator so",
    ("arrow", "rorqual/data/files.py"): "pyarrow is imported under its own name",
    ("arrow", "tests/data/test_files.py"): "pyarrow is imported under its own name",
    ("floor", "rorqual/experiments/budget.py"): "math.floor",
    ("floor", "rorqual/layers/rope.py"): "math.floor",
    ("floor", "tests/layers/test_rope.py"): "math.floor",
    ("floor", "rorqual/kernels/*"): "numpy.floor, and the smallest value of a denominator",
    (
        "recall",
        "rorqual/layers/context.py",
    ): "of the indexer: the share of probability that it selects",
    ("recall", "rorqual/train/step.py"): "of the indexer",
    ("recall", "tests/layers/test_dsa.py"): "of the indexer",
    ("recall", "tests/train/test_step.py"): "of the indexer",
    ("live", "rorqual/experiments/runs.py"): "rich.live",
    ("at", "rorqual/memory.py"): "numpy.add.at",
    ("part", "rorqual/cli/parse.py"): "the part of a config that an option switches on",
    ("part", "rorqual/config.py"): "the part of a config that an option switches on",
    ("part", "scripts/list_public.py"): "the part of a config that an option switches on",
}
PROSE = {
    "twin twins": "kernel",
    "lesson lessons": "indexer loss",
    "floor floors": "layer of the architecture",
    "arrow arrows": "summary line",
    "keeper keepers": "checkpoint callback",
    "house": "architecture",
}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

# What is left out of prose: keys of a keyboard, signs of a chart, the library, the function.
PLAIN = re.compile(
    r"arrow keys|pyarrow|apache arrow|arrows? (of|in) (the|a) (chart|figure)"
    r"|(math|np|numpy)\.floor",
    re.IGNORECASE,
)


@functools.cache
def tracked() -> tuple[Path, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = listed.stdout.split("\0")
    return tuple(ROOT / name for name in names if name and (ROOT / name).is_file())


def sources() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, name) of everything that a file names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, node.arg
        elif isinstance(node, DEFINITIONS) or (isinstance(node, ast.ExceptHandler) and node.name):
            yield node.lineno, node.name
        elif isinstance(node, ast.alias):
            yield node.lineno, node.asname or node.name.rpartition(".")[2]


def by_word(table: dict[str, str]) -> dict[str, str]:
    return {word: instead for words, instead in table.items() for word in words.split()}


def in_file(table: dict[str, tuple[str, str]], path: str) -> dict[str, str]:
    """Returns the words of a table that this file must not use, with what to write instead."""
    return {
        word: instead
        for listed, (files, instead) in table.items()
        for word in listed.split()
        if any(fnmatch.fnmatch(path, pattern) for pattern in files.split())
    }


def allowed(word: str, path: str) -> bool:
    return any(word == w and fnmatch.fnmatch(path, files) for w, files in ALLOWED)


def plain_name(identifier: str) -> str:
    """Returns a name in lower case without the underscores around it; Python's own as they are."""
    if identifier.startswith("__") and identifier.endswith("__"):
        return identifier
    return identifier.strip("_").lower()


def wrong_names(path: str, tree: ast.AST) -> Iterator[str]:
    words = by_word(WORDS)
    parts = by_word(PARTS) | in_file(PARTS_IN, path)
    here = in_file(WORDS_IN, path)
    for identifier, line in {name: line for line, name in identifiers(tree)}.items():
        # A word of lower case is also that of a private name, a constant and a class.
        plain = plain_name(identifier)
        instead = words.get(identifier) or words.get(plain) or here.get(identifier)
        if instead is not None and not allowed(plain, path) and not allowed(identifier, path):
            yield f"{path}:{line}: {identifier}, write {instead}"
        for piece in re.findall(r"[A-Z]?[a-z]+", identifier):
            if piece.lower() in parts and identifier not in words and not allowed(identifier, path):
                yield f"{path}:{line}: {identifier}, write {parts[piece.lower()]} for {piece}"


def test_names_are_those_of_the_field() -> None:
    wrong = []
    for path in sources():
        wrong += wrong_names(name(path), tree_of(path))
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_used() -> None:
    used = set()
    for path in sources():
        names = {identifier for _, identifier in identifiers(tree_of(path))}
        names |= {plain_name(identifier) for identifier in names}
        used |= {
            (word, files)
            for word, files in ALLOWED
            if word in names and fnmatch.fnmatch(name(path), files)
        }
    assert ALLOWED.keys() == used, "exceptions that nothing needs"


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("def f(warm): pass", "warm"),
        ("f(micro_rows=1)", "micro_rows"),
        ("class Tally: pass", "Tally"),
        ("x.kept = 1", "kept"),
        ("from a import twin as kernel, Front", "Front"),
        ("for at in range(3): pass", "at"),
        ("x._kept = 1", "_kept"),
        ("KNOWN = 1", "KNOWN"),
        ("class Chosen: pass", "Chosen"),
        ("def test_the_twin_is_exact(): pass", "twin"),
    ],
)
def test_a_wrong_name_is_seen(code: str, word: str) -> None:
    (message,) = set(wrong_names("rorqual/x.py", ast.parse(code)))
    assert word in message


@pytest.mark.parametrize("code", ["class SamplerRow: pass", "def sample_rows(x): pass", "f(row=1)"])
def test_a_sequence_of_a_batch_is_not_called_a_row(code: str) -> None:
    assert set(wrong_names("rorqual/serve/sampling.py", ast.parse(code)))
    assert not set(wrong_names("rorqual/tables/table.py", ast.parse(code)))


def test_options_are_called_as_elsewhere() -> None:
    old = {"rows", "length", "micro_rows", "tables", "vocabulary", "chosen"}
    for cls in (TrainConfig, DemoConfig, SweepConfig, NeedleSweep):
        options = {option.name for option in configs.options(cls)} - {"distributed.rows"}
        names = {name.rpartition(".")[2] for name in options}
        assert {"batch_size", "seq_len"} <= names
        assert not names & old


def test_an_earlier_name_is_answered_with_todays() -> None:
    for earlier, now in (("rows", "batch_size"), ("length", "seq_len"), ("tables", "placement")):
        with pytest.raises(ValueError, match=f"'{earlier}', expected '{now}'"):
            configs.from_dict(TrainConfig, {earlier: 1})
        with pytest.raises(ValueError, match=f"calls --{now.replace('_', '-')}"):
            parse(TrainConfig(), [f"--{earlier}", "1"], "train")
    with pytest.raises(ValueError, match="'vocabulary', expected 'vocab_size'"):
        configs.from_dict(TrainConfig, {"model": {"vocabulary": 1}})
    with pytest.raises(ValueError, match=r"calls --model\.dsa\.top-k"):
        parse(TrainConfig(), ["--model.dsa.chosen", "1"], "train")


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of comments, docstrings and pages; code in pages is left out."""
    if path.suffix == ".md":
        inside = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            inside ^= line.lstrip().startswith("```")
            if not inside:
                yield number, re.sub(r"`[^`]*`", "", line)
        return
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield getattr(node, "lineno", 1), ast.get_docstring(node) or ""


def test_prose_is_plain() -> None:
    words = by_word(PROSE)
    pages = [path for path in tracked() if path.suffix == ".md"]
    # CHANGELOG.md says what was called how before, and Chinese pages have no such words.
    pages = [p for p in pages if p.name != "CHANGELOG.md" and "zh" not in p.parts]
    wrong = []
    for path in [*sources(), *pages]:
        # To find the comments of a file takes longer than to see that it has none of the words.
        if not any(word in path.read_text(encoding="utf-8").lower() for word in words):
            continue
        for line, text in prose(path):
            for word in re.findall(r"[A-Za-z]+", PLAIN.sub("", text)):
                if word.lower() in words:
                    wrong.append(f"{name(path)}:{line}: {word}, write {words[word.lower()]}")
    assert not wrong, "\n".join(wrong)


def test_summaries_are_sentences() -> None:
    """No docstring or help begins with what goes in and comes out, with a sign between them."""
    wrong = []
    for path in sources():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                if "->" in summary:
                    wrong.append(f"{name(path)}:{getattr(node, 'lineno', 1)}: {summary}")
    wrong += [f"{word}: {each.what}" for word, each in COMMANDS.items() if "->" in each.what]
    assert not wrong, "\n".join(wrong)
