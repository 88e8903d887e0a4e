"""Tries the wheel with other versions of Python and of torch, each in an environment of its own.

    python scripts/try_versions.py python3.12 python3.13 python3.11=2.10

Each word is an interpreter on this machine, and after = a version of torch; without one it is the
version of constraints.txt, which holds for everything else. Wheels alone are installed. On Linux an
index gives torch with the libraries of a GPU, some gigabytes a version, unless pip was given a
smaller build locally; they are removed again afterwards (--folder keeps them).

In each environment the modules are imported, a checkpoint of the package is described and continues
a text, `tiny` trains for five steps with a memory, and TESTS are run. A line a version is printed
at the end; the exit code is 1 if one of them failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from check_wheel import IMPORT_ALL, ROOT, pip_install

# What the tests below import besides what the package installs.
FOR_TESTS = ("beartype", "hypothesis", "pytest", "pytest-xdist")
TESTS = (
    "tests/layers",
    "tests/tables",
    "tests/test_costs.py",
    "tests/test_model.py",
    "tests/test_pretrained.py",
    "tests/test_presets.py",
    "tests/train/test_optim.py",
    "tests/train/test_step.py",
)
GENERATE = ("generate", "tiny-engram", "A whale is", "--max-new-tokens", "8", "--temperature", "0")
SIZES = ("batch_size=2", "seq_len=32", "data.vocab_size=300", "data.limit=200")
TRAIN = ("train", "tiny", "steps=5", "folder=run", "model.engram.layers=1", *SIZES)
VERSIONS = "import platform, torch; print(platform.python_version(), torch.__version__)"
# Pinned for one version of torch.
OF_TORCH = re.compile(r"^(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==.*\n", re.MULTILINE)
PASSED = re.compile(r"\d+ (?:passed|failed).*?(?= in )")


class Failed(Exception):
    """A command that failed; the message is the command and the end of what it printed."""


def run(*command: str | os.PathLike[str], cwd: Path) -> str:
    """Runs a command without this checkout and returns what it prints; raises Failed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "RORQUAL_KERNELS": "decode_step=reference"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        words = " ".join(map(os.fspath, command))
        raise Failed(f"{words}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """Builds the wheel of this checkout's files into a folder and returns it."""
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "site", "build", ".*_cache", ".cache")
    checkout = shutil.copytree(ROOT, folder / "checkout", ignore=ignored)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", checkout, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def environment(interpreter: str, torch: str | None, wheel: Path, folder: Path) -> Path:
    """Makes an environment with the wheel in it; returns its Python."""
    run(interpreter, "-m", "venv", "--clear", folder / "venv", cwd=folder)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if torch is not None:
        pins = OF_TORCH.sub("", pins) + f"torch=={torch}.*\n"
    constraints = folder / "constraints.txt"
    constraints.write_text(pins, encoding="utf-8")
    install = [*pip_install(python), "-c", constraints]
    run(*install, f"rorqual[all] @ {wheel.as_uri()}", *FOR_TESTS, cwd=folder)
    return python


def smoke(python: Path, folder: Path, checkout: Path) -> str:
    """Runs what every version has to do; returns the last line of the tests; raises Failed."""
    run(python, "-c", IMPORT_ALL, cwd=folder)
    for words in (("params", "tiny-engram", "moe-27b"), ("doctor",), GENERATE, TRAIN):
        printed = run(python, "-m", "rorqual", *words, cwd=folder)
        if words == GENERATE:
            print("   ", printed.strip(), flush=True)
    # Those that belong to the wheel, and what they read around them; the package itself is the
    # installed one.
    ignored = shutil.ignore_patterns("rorqual")
    tests = shutil.copytree(checkout, folder / "tests", ignore=ignored, dirs_exist_ok=True)
    printed = run(python, "-m", "pytest", "-q", "-n", "2", *TESTS, cwd=tests)
    return PASSED.findall(printed)[-1]


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("pairs", nargs="+", metavar="PYTHON[=TORCH]")
    parser.add_argument("--folder", type=Path, help="keep the environments here")
    options = parser.parse_args()
    lines = []
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build_wheel(Path(scratch))
        for pair in options.pairs:
            interpreter, _, torch = pair.partition("=")
            folder = (options.folder or Path(scratch)).resolve() / pair.replace(os.sep, "_")
            folder.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            print(pair, flush=True)
            try:
                python = environment(interpreter, torch or None, wheel, folder)
                versions = run(python, "-c", VERSIONS, cwd=folder).strip()
                result = smoke(python, folder, Path(scratch) / "checkout")
            except (Failed, OSError) as error:
                failed = True
                versions = pair
                result = f"failed: {error}"
            lines.append(f"{versions}: {result} ({time.monotonic() - began:.0f} s)")
            print("   ", lines[-1], flush=True)
            if options.folder is None:
                shutil.rmtree(folder)
    print(*(line.partition("\n")[0] for line in lines), sep="\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
