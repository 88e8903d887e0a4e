"""Builds the wheel and tests it without the checkout, in an environment of its own.

    python scripts/check_wheel.py

`python -m build` makes the archives, `twine check` reads them as an index would, and both have to
hold the trained checkpoints and every licence. `rorqual[all]` is installed from the wheel with
nothing but wheels; then the command line runs, every module that needs no other extra is imported,
a checkpoint of the package continues a text and is exported for transformers, and `tiny` trains, is
scored, continues a text and gets its report.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEED_A_GPU = "triton_"  # modules of Triton's kernels: the extra `triton` is not in `all`
IMPORT_ALL = f"""
import importlib, pkgutil, rorqual
for module in pkgutil.walk_packages(rorqual.__path__, "rorqual."):
    short = module.name.rpartition(".")[2]
    if not short.startswith({NEED_A_GPU!r}) and short != "__main__":
        importlib.import_module(module.name)
"""

IN_BOTH = (
    *("rorqual/data/texts/wordnet-3.0.txt.bz2", "rorqual/data/texts/wordnet-3.0.LICENSE"),
    *("rorqual/weights/*/model.safetensors", "rorqual/weights/*/README.md"),
)
IN_SOURCE = ("LICENSE", "NOTICE", "CITATION.cff", "SECURITY.md", "tests/golden/pretrained.json")
FROM_PRETRAINED = """
import rorqual, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("exported")
print(type(model).__name__, model(torch.tensor([[1, 2, 3]])).logits.shape)
"""
COMPILE_STEP = "from rorqual.kernels.step import Step; Step.keep(); assert Step.is_cached()"


def run(*command: str | os.PathLike[str], cwd: Path) -> str:
    """Runs a command outside the checkout and returns its output; ends this script if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = " ".join(map(str, command))
        raise SystemExit(f"{words}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def pip_install(python: Path) -> list[str]:
    """Returns the command that installs packages from wheels alone."""
    quiet = ["--disable-pip-version-check", "-qq"]
    return [str(python), "-m", "pip", *quiet, "install", "--only-binary=:all:"]


def install(python: Path, wheel: Path, cwd: Path) -> None:
    """Installs the wheel with its extra `all`, at the versions of constraints.txt.

    Everything is installed from wheels alone. A torch that pip was given locally is taken first, as
    the Makefile does.
    """
    pip = pip_install(python)
    local = [*pip, "--no-index", "--no-deps", "torch==2.13.*"]
    subprocess.run(local, cwd=cwd, capture_output=True, check=False)
    run(*pip, "-c", ROOT / "constraints.txt", f"rorqual[all] @ {wheel.as_uri()}", cwd=cwd)


def check_archives(folder: Path, cwd: Path) -> None:
    """Ends this script unless the wheel and the sdist are what an index and a user expect."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = archive.namelist()
    with tarfile.open(sdist) as archive:
        in_sdist = [name.partition("/")[2] for name in archive.getnames()]
    here = [path.relative_to(ROOT).as_posix() for one in IN_BOTH for path in ROOT.glob(one)]
    expect("wheel", in_wheel, here)
    expect("sdist", in_sdist, [*here, *IN_SOURCE])
    licences = {Path(name).name for name in in_wheel if "dist-info/licenses/" in name}
    expect("wheel", licences, ["LICENSE", "NOTICE", "wordnet-3.0.LICENSE"])
    # twine brings many packages, which nothing else here needs: an environment of its own.
    tools = folder.parent / "tools"
    venv.create(tools, with_pip=True, symlinks=os.name != "nt")
    python = tools / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(*pip_install(python), "-c", ROOT / "constraints.txt", "twine", cwd=cwd)
    print(run(python, "-m", "twine", "check", "--strict", wheel, sdist, cwd=cwd).strip())


def expect(archive: str, names: Iterable[str], wanted: Iterable[str]) -> None:
    missing = sorted(set(wanted) - set(names))
    if missing:
        raise SystemExit(f"the {archive} lacks {', '.join(missing)}")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkout = shutil.copytree(
            ROOT,
            folder / "checkout",
            ignore=shutil.ignore_patterns(".git", ".venv", "runs", ".*_cache", ".cache"),
        )
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", checkout, cwd=folder)
        check_archives(folder / "dist", folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        venv.create(folder / "venv", with_pip=True, symlinks=os.name != "nt")
        scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        install(scripts / "python", wheel, folder)
        rorqual = scripts / "rorqual"
        print(run(rorqual, "--version", cwd=folder).strip(), "from", wheel.name)
        run(scripts / "python", "-c", IMPORT_ALL, cwd=folder)
        run(rorqual, "doctor", cwd=folder)
        # A generation would start this compilation in a process that outlives it, and so this
        # folder.
        run(scripts / "python", "-c", COMPILE_STEP, cwd=folder)
        words = ["tiny-engram", "A whale is", "--max-new-tokens", "8", "--temperature", "0"]
        print(run(rorqual, "generate", *words, cwd=folder).strip())
        run(rorqual, "export", "tiny-engram", "exported", cwd=folder)
        print(run(scripts / "python", "-c", FROM_PRETRAINED, cwd=folder).strip())
        small = [
            "--steps",
            "4",
            "--batch-size",
            "2",
            "--seq-len",
            "32",
            "--data.vocab-size",
            "300",
            "--data.limit",
            "200",
        ]
        run(
            rorqual,
            "train",
            "tiny",
            "--folder",
            "run",
            "--model.engram.layers",
            "1",
            *small,
            cwd=folder,
        )
        run(rorqual, "eval", "run", "--data", "wordnet", "--limit", "5", cwd=folder)
        print(
            run(
                rorqual, "generate", "run", "A whale is", "--max-new-tokens", "8", cwd=folder
            ).strip()[:60]
        )
        run(rorqual, "report", "run", cwd=folder)
        print("the wheel installs, trains, scores, generates and reports by itself")


if __name__ == "__main__":
    main()
