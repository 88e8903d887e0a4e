"""The rules of docs/architecture.md: imports, names, mirrors."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rorqual"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BANNED = {"utils", "util", "common", "base", "helpers", "helper", "misc", "core"}
OPTIONAL = {  # what an extra or the user brings, and what takes long to load and is seldom needed
    "accelerate", "datasets", "filelock", "huggingface_hub", "lm_eval", "matplotlib", "olmo_core",
    "peft", "pyarrow", "starlette", "tensorboard", "transformers", "triton", "uvicorn",
}  # fmt: skip
MAY_DISTRIBUTE = {
    "ranks.py",
    "distributed.py",
    "context_parallel.py",
    "sharded_rows.py",
    "checkpoint.py",
    "train",
}  # nothing else may know that there are other ranks
PRIVATE_IN_TESTS = {
    # torch's name for the values of a sparse gradient, which these tests spoil in place
    "tests/train/test_step.py": {"_values"},
    "tests/train/test_trainer.py": {"_values"},
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked() -> list[Path]:
    """The files that a checkout holds; outside of one, those that an archive does."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return [
            path
            for folder in ("rorqual", "tests", "docs")
            for path in (ROOT / folder).rglob("*")
            if path.is_file()
        ]
    return [path for word in listed.stdout.split("\0") if word and (path := ROOT / word).is_file()]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        node
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def imports(tree: ast.AST) -> list[tuple[str, ast.stmt]]:
    """(module, statement) of every import, `from a import b` as a.b."""
    results: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            results += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            results += [(f"{node.module}.{alias.name}", node) for alias in node.names]
    return results


def optional(module: str) -> bool:
    """Whether a module is brought by an extra, or is ours and imports one that is at its top."""
    for end in (module, module.rpartition(".")[0]):
        ours = ROOT / (end.replace(".", "/") + ".py")
        if end.startswith("rorqual.") and ours.is_file():
            top = [
                node
                for node in tree_of(ours).body
                if isinstance(node, (ast.Import, ast.ImportFrom))
            ]
            return any(optional(item) for node in top for item, _ in imports(node))
    return module.partition(".")[0] in OPTIONAL


def test_every_file_says_what_it_does() -> None:
    missing = [name(path) for path in FILES if not (ast.get_docstring(tree_of(path)) or "").strip()]
    assert not missing


def test_every_file_has_a_name_that_says_something() -> None:
    parts = [
        (path, piece.removesuffix(".py"))
        for path in FILES
        for piece in path.relative_to(PACKAGE).parts
    ]
    assert not [name(path) for path, piece in parts if piece in BANNED]


def test_no_file_keeps_state() -> None:
    """No `global`, and no list, dict or set at the top of a file but constants."""
    wrong = []
    for path in FILES:
        wrong += [
            f"{name(path)}:{node.lineno}"
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Global)
        ]
        for node in tree_of(path).body:
            value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
            if isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                words = [target.id for target in targets if isinstance(target, ast.Name)]
                wrong += [
                    f"{name(path)}: {word}"
                    for word in words
                    if not word.isupper() and word != "__all__"
                ]
    assert not wrong


def test_files_import_at_their_top() -> None:
    """Except for what is optional or needs it. Each command loads what it needs."""
    wrong = []
    for path in FILES:
        if path.is_relative_to(PACKAGE / "cli") or path == PACKAGE / "__init__.py":
            continue
        for function in functions(path):
            modules = [module for module, _ in imports(function)]
            if modules and not any(optional(module) for module in modules):
                wrong.append(f"{name(path)}:{function.lineno} {function.name} imports {modules}")
    assert not wrong


def test_few_files_are_distributed() -> None:
    files = [path for path in FILES if path.relative_to(PACKAGE).parts[0] not in MAY_DISTRIBUTE]
    assert not [
        name(path) for path in files if "torch.distributed" in path.read_text(encoding="utf-8")
    ]


def test_one_file_knows_how_caches_store() -> None:
    """Layers call a cache's methods, so that its memory can change without them."""
    cache = PACKAGE / "layers" / "cache.py"
    readers = [
        name(path)
        for path in FILES
        if path != cache
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and node.attr == "buffer"
    ]
    assert not readers


def test_one_file_names_the_engine() -> None:
    files = [path for path in FILES if path != PACKAGE / "train" / "engine.py"]
    named = [
        (path, module.partition(".")[0]) for path in files for module, _ in imports(tree_of(path))
    ]
    assert not [name(path) for path, module in named if module == "olmo_core"]


def test_no_file_imports_the_public_names() -> None:
    """`from rorqual import x` takes a module, never a name that is offered to users."""
    wrong = []
    for path in FILES:
        for module, _ in imports(tree_of(path)):
            if (
                module.startswith("rorqual.")
                and module.count(".") == 1
                and module != "rorqual.__version__"
            ):
                target = PACKAGE / module.removeprefix("rorqual.")
                if not target.is_dir() and not target.with_suffix(".py").is_file():
                    wrong.append(f"{name(path)}: {module}")
    assert not wrong


def is_private(word: str) -> bool:
    return word.startswith("_") and not word.startswith("__") and word != "_"


def private_names(tree: ast.Module) -> set[str]:
    """Private functions, classes and attributes that a file defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and not isinstance(node.ctx, ast.Load):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {word for word in names if is_private(word)}


def used_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields (name, line) of attributes, imports from rorqual, and what is patched by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rorqual"):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
            if called in ("getattr", "setattr", "delattr", "hasattr"):
                words = [each.value for each in node.args if isinstance(each, ast.Constant)]
                yield from (
                    (word.rpartition(".")[2], node.lineno)
                    for word in words
                    if isinstance(word, str)
                )


def test_tests_use_public_names() -> None:
    """A test calls what users call, so that a private function may change without it."""
    ours = set().union(*(private_names(tree_of(path)) for path in FILES))
    wrong = []
    for path in TESTS:
        names = ours - private_names(tree_of(path)) - PRIVATE_IN_TESTS.get(name(path), set())
        wrong += [
            f"{name(path)}:{line} {word}"
            for word, line in used_names(tree_of(path))
            if word in names
        ]
    assert not wrong


def test_every_file_has_its_mirror() -> None:
    """layers/moe.py has tests/layers/test_moe.py; kernels are tested with their references."""
    lonely = []
    for path in FILES:
        inside = path.relative_to(PACKAGE)
        if inside.name in ("__init__.py", "__main__.py") or inside.parts[0] == "kernels":
            continue
        if not (ROOT / "tests" / inside.parent / f"test_{inside.name}").is_file():
            lonely.append(name(path))
    assert not lonely


def test_imports_point_down() -> None:
    """import-linter's contracts in pyproject.toml: strictly lower groups, every file named."""
    lint = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_layers_kernels_and_tables_know_no_text() -> None:
    files = [
        path
        for path in FILES
        if path.relative_to(PACKAGE).parts[0] in ("layers", "kernels", "tables")
    ]
    assert files
    for path in files:
        for module, _ in imports(tree_of(path)):
            assert module.partition(".")[0] not in ("tokenizers", "datasets"), name(path)
            assert not module.startswith("rorqual.data"), name(path)


def listed() -> set[str]:
    """The files and folders of the tree in docs/architecture.md, as paths below rorqual/."""
    tree = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("```")[1]
    folder = ""
    result = set()
    for line in tree.splitlines():
        match = re.match(r"( +)([\w.]+(?:/|\.py)(?:, [\w.]+\.py)*)(?= )", line)
        if match is None:
            continue
        indent, names = match.groups()
        if names.endswith("/"):
            folder = names
            result.add(names)
        else:
            inside = folder if len(indent) == 4 else ""
            result |= {inside + word for word in names.split(", ")}
    return result


def test_every_file_has_its_line_in_the_architecture() -> None:
    """Each file under its own folder, so that two of one name are both there; none is gone."""
    files = set()
    for inside in (path.relative_to(PACKAGE) for path in FILES):
        if len(inside.parts) == 2:
            files.add(f"{inside.parts[0]}/")
        if len(inside.parts) == 1 or inside.name != "__init__.py":
            files.add(inside.as_posix())
    assert files - listed() == set(), "docs/architecture.md has no line for these"
    assert listed() - files == set(), "docs/architecture.md has a line for what is not there"


def test_tests_mirror_a_file_each() -> None:
    # test_soak runs benchmarks/, test_golden tests/golden/check.py, test_dispatch and
    # test_kernels are for kernels/, test_frozen, test_public, test_site, test_figures,
    # test_docstrings and test_notebooks for scripts/, test_release for the files of a release,
    # test_random_families runs benchmarks/,
    # test_attention_kinds is for all attentions, test_depth for layers/ and model.py,
    # test_deepseek_v4_mtp for layers/mtp.py in folders of DeepSeek-V4
    standing = {
        "test_architecture.py",
        "test_install.py",
        "test_words.py",
        "test_depth.py",
        "layers/test_attention_kinds.py",
        "test_readme.py",
        "test_examples.py",
        "test_soak.py",
        "test_golden.py",
        "hub/test_deepseek_v4_mtp.py",
        "hub/test_random_families.py",
        "kernels/test_dispatch.py",
        "kernels/test_kernels.py",
        "test_frozen.py",
        "test_public.py",
        "test_site.py",
        "test_figures.py",
        "test_release.py",
        "test_docstrings.py",
        "test_notebooks.py",
    }
    tests = {
        path.relative_to(ROOT / "tests").as_posix(): path
        for path in TESTS
        if path.name.startswith("test_")
    }
    assert standing <= tests.keys()
    for inside in tests.keys() - standing:
        mirrored = PACKAGE / inside.replace("test_", "", 1)
        assert mirrored.is_file(), f"tests/{inside} mirrors nothing"


def test_nothing_is_left_to_do() -> None:
    """No TODO without an issue, no banner, no path of somebody's machine."""
    machine = re.compile(r"(?<![\w.}])/(?:work|root|home|tmp|Users)/[A-Za-z]")
    for path in tracked():
        if path.suffix not in (".py", ".md", ".toml", ".yaml", ".txt", "") or path == Path(
            __file__
        ):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{name(path)}:{number}"
            assert not re.search(r"\b(TODO|FIXME|XXX)\b(?!.*#\d)", line), where
            assert not re.match(r"\s*#\s*([-=*#~])\1{5,}", line), f"{where}: a banner"
            assert not machine.search(line), f"{where}: a path of a machine"


def test_every_dependency_has_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = .*?^\[project\.scripts\]", text, re.DOTALL | re.MULTILINE)
    assert listed
    reasons = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    for word in re.findall(r'"([A-Za-z][\w.-]*)(?:\[[\w,]+\])?(?:[<>=~!][^"]*)?"', listed[0]):
        assert word == "rorqual" or f"`{word}`" in reasons, (
            f"docs/dependencies.md gives no reason for {word}"
        )


def test_what_is_installed_is_pinned_once() -> None:
    """pyproject.toml holds ranges, constraints.txt one exact version of everything."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"[\w.-]+==[\w.!]+|#.*|", line), line


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs/index.md"
    reached = {
        (index.parent / target).resolve()
        for target in re.findall(r"\]\(([^)#]+)", index.read_text(encoding="utf-8"))
    }
    assert not [
        name(page)
        for page in (ROOT / "docs").rglob("*.md")
        if page.resolve() not in reached | {index}
    ]
