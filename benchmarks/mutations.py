"""Puts one realistic bug at a time into a copy of the library and runs the tests that catch it.

    python benchmarks/mutations.py                     every mutation: name, caught or SURVIVED
    python benchmarks/mutations.py --only clip-enlarges --show
    python benchmarks/mutations.py --list

The mutations are in mutations.toml: a name, the defect that a user would meet, the file, the
exact old text, the new text, and the tests that catch it (one that fails is enough). First all of
these tests must pass without a mutation. Status 1 if a mutation survived; 2 if the data do not fit
the code or the tests fail as they are. It forks, so it runs on Linux and macOS alone.

When code or tests move, `file`, `old`, `new` and `tests` are pointed at their new place by hand.
The names stay, so that runs before and after a redesign can be compared name by name; a mutation
goes only with the feature that it breaks.
"""

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).with_suffix(".toml")
COPIED = ("rorqual", "tests", "pyproject.toml")
TIMEOUT = 1200  # seconds
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Twice as fast, and a bug is to be caught by its numbers, not by a shape.
    "RORQUAL_SHAPES": "0",
}
PRELOADED = ("torch", "numba", "transformers.modeling_utils", "olmo_core.train")
RAN = 64  # added to pytest's exit status, since Python's own after an error is 1, too
ENDINGS = {RAN: "passed", RAN + 1: "failed"}  # with any other status the tests did not run


@dataclass(frozen=True)
class Mutation:
    """One bug: `old`, which occurs once in `file`, is replaced by `new`."""

    name: str
    defect: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_mutations(path: Path) -> list[Mutation]:
    """Reads the file of mutations; ValueError for a doubled name, a missing or unknown field."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    mutations = []
    for entry in entries:
        wanted = set(Mutation.__dataclass_fields__)
        if set(entry) != wanted:
            differing = ", ".join(sorted(set(entry) ^ wanted))
            raise ValueError(f"{path}: {entry.get('name')}: missing or unknown: {differing}")
        mutations.append(Mutation(**{**entry, "tests": tuple(entry["tests"])}))
    names = [mutation.name for mutation in mutations]
    if len(set(names)) < len(names):
        doubled = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{path}: got {', '.join(doubled)} twice, expected each name once")
    return mutations


def mutated(mutation: Mutation, root: Path) -> str:
    """Returns the file's text with the bug; ValueError unless the old text occurs there once."""
    text = (root / mutation.file).read_text(encoding="utf-8")
    count = text.count(mutation.old)
    if count != 1 or mutation.old == mutation.new:
        raise ValueError(
            f"{mutation.name}: got its old text {count} times in {mutation.file}, expected "
            f"it once, and another new text: point it at the code again in {DATA.name}"
        )
    return text.replace(mutation.old, mutation.new)


def prepare_process() -> None:
    """Imports what takes seconds, once for all forks, in the environment that the tests expect."""
    for name in [name for name in os.environ if name.startswith("RORQUAL_")]:
        del os.environ[name]
    os.environ |= ENVIRONMENT
    for name in PRELOADED:
        importlib.import_module(name)


def copy_tree(folder: Path) -> None:
    """Copies the package and its tests, with the machine code that numba keeps beside them."""
    for name in COPIED:
        source = ROOT / name
        target = folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.pyc"))
        else:
            shutil.copy2(source, target)


def run_tests(folder: Path, tests: list[str]) -> tuple[str, str]:
    """Runs tests of the copy until one fails; returns how that ended, and what pytest printed.

    The tests run in a fork of this process, which has already imported the large libraries.
    """
    output = folder / "output.txt"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=run_in_fork, args=(folder, tests, output))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        ending = "TIMED OUT"
    else:
        ending = ENDINGS.get(process.exitcode or 0, "DID NOT RUN")
    return ending, output.read_text(encoding="utf-8", errors="replace")


def run_in_fork(folder: Path, tests: list[str], output: Path) -> None:
    """Runs pytest on the copy, prints to `output`, and exits with pytest's status + RAN."""
    with output.open("w", encoding="utf-8") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[0] = str(folder)
    result = importlib.util.find_spec("rorqual")
    if result is None or not str(result.origin).startswith(str(folder)):
        raise RuntimeError(f"got rorqual from {result}, expected the copy in {folder}")
    # Failures are not shrunk.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutations", phases=phases, database=None)
    hypothesis.settings.load_profile("mutations")
    # Tests that are marked slow run, too.
    options = ["-x", "-q", "--tb=short", "--hypothesis-seed=0", "-m", ""]
    no_plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    sys.exit(RAN + pytest.main([*options, *no_plugins, *tests]))


def try_all(mutations: list[Mutation], *, show: bool) -> int:
    """Prints a line for each mutation; returns the exit status."""
    texts = {mutation.name: mutated(mutation, ROOT) for mutation in mutations}
    every_test = sorted({test for mutation in mutations for test in mutation.tests})
    width = max(len(mutation.name) for mutation in mutations)
    uncaught = []
    started = time.perf_counter()
    prepare_process()
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        folder = Path(name)
        copy_tree(folder)
        ending, output = run_tests(folder, every_test)
        if ending != "passed":
            print(output[-6000:])
            print("the tests fail without a mutation, expected them to pass")
            return 2
        seconds = time.perf_counter() - started
        print(f"{'no mutation':{width}}  passed    {seconds:5.1f} s", flush=True)
        for number, mutation in enumerate(mutations, 1):
            start = time.perf_counter()
            file = folder / mutation.file
            file.write_text(texts[mutation.name], encoding="utf-8")
            # A distinct time, since bytecode of another text from the same second would be run.
            os.utime(file, (number, number))
            ending, output = run_tests(folder, list(mutation.tests))
            shutil.copy2(ROOT / mutation.file, file)
            verdict = {"failed": "caught", "passed": "SURVIVED"}.get(ending, ending)
            seconds = time.perf_counter() - start
            print(f"{mutation.name:{width}}  {verdict:8}  {seconds:5.1f} s", flush=True)
            if verdict != "caught":
                uncaught.append(mutation.name)
            if show or ending not in ("passed", "failed"):
                print(output[-3000:])
    caught = len(mutations) - len(uncaught)
    print(f"{caught} of {len(mutations)} caught in {time.perf_counter() - started:.0f} s")
    return 1 if uncaught else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    only = "this mutation alone; may be repeated"
    parser.add_argument("--only", metavar="NAME", action="append", help=only)
    parser.add_argument("--list", action="store_true", help="names and defects; nothing is run")
    parser.add_argument("--show", action="store_true", help="print how the tests failed, too")
    options = parser.parse_args()
    try:
        mutations = read_mutations(DATA)
        names = [mutation.name for mutation in mutations]
        if unknown := sorted(set(options.only or ()) - set(names)):
            raise ValueError(f"got {', '.join(unknown)}, expected one of {', '.join(names)}")
        wanted = set(options.only or names)
        selected = [mutation for mutation in mutations if mutation.name in wanted]
        if options.list:
            for mutation in selected:
                mutated(mutation, ROOT)
                print(f"{mutation.name}: {mutation.defect}")
            return 0
        return try_all(selected, show=options.show)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
