r"""Compares optimizers for a new user's first training, each with several seeds on one text.

    OMP_NUM_THREADS=1 python benchmarks/recipe.py --folder runs/recipe
    OMP_NUM_THREADS=1 python benchmarks/recipe.py --folder runs/recipe --dim 256 --steps 200 \
        --seeds 1 --arms muon:5e-3 muon:1e-2 muon:2e-2 muon:4e-2

The text is what every Python has: the topics of its language reference and the docstrings of its
library. An arm is KIND:RATE. Runs are made one after another with one thread; finished ones are not
repeated, and an interrupted one resumes, so the same command may be stopped and typed again. It
prints the losses on held-out documents and the paired difference of every arm to the first.
"""

import argparse
import ast
import json
import sysconfig
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

from rorqual.experiments.paired import compared, mean_and_error
from rorqual.experiments.runs import last
from rorqual.presets import preset
from rorqual.train.config import DataConfig, OptimConfig, TrainConfig
from rorqual.train.trainer import train

ARMS = ("adamw:3e-3", "muon:2e-2", "adamw:1e-2")
VOCAB_SIZE = 4096  # the smallest vocabulary of a model
NOT_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}


def docstrings(path: Path) -> dict[str, str]:
    """Returns the docstrings of a module by name.

    They are the module's own, and those of each of its classes and functions with everything in
    them.
    """
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    results = {"": ast.get_docstring(tree) or ""}
    for piece in tree.body:
        if isinstance(piece, holders):
            texts = [
                ast.get_docstring(node) for node in ast.walk(piece) if isinstance(node, holders)
            ]
            results[piece.name] = "\n\n".join(text for text in texts if text)
    return {name: text for name, text in results.items() if text}


def write_text(folder: Path) -> None:
    """Writes Python's own documentation into the folder.

    There is a .txt for every topic, module, class and function.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in topics.items():
        (folder / f"topic-{name}.txt").write_text(text, encoding="utf-8")
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if not NOT_DOCUMENTATION & set(parts):
            for name, text in docstrings(path).items():
                (folder / f"{'.'.join((*parts, name))}.txt").write_text(text, encoding="utf-8")


def configs(options: argparse.Namespace) -> dict[str, list[TrainConfig]]:
    """Returns the trainings of each arm, one per seed."""
    model = preset(options.preset)
    if options.dim is not None:
        model = replace(model, dim=options.dim)
    if model.vocab_size < VOCAB_SIZE:
        # The classroom model's own vocabulary is too small for text.
        model = replace(model, vocab_size=VOCAB_SIZE)
    data = DataConfig(source=str(options.folder / "text"), cache=str(options.folder / "cache"))
    results: dict[str, list[TrainConfig]] = {}
    for arm in options.arms:
        kind, rate = arm.split(":")
        optim = OptimConfig(kind=kind, lr=float(rate))
        name = f"{options.preset}-{model.dim}-{arm.replace(':', '-')}-{options.steps}"
        results[arm] = [
            TrainConfig(
                model=model,
                data=data,
                optim=optim,
                steps=options.steps,
                batch_size=options.batch_size,
                seq_len=options.seq_len,
                seed=seed,
                threads=1,
                folder=str(options.folder / f"{name}-seed-{seed}"),
            )
            for seed in range(options.seeds)
        ]
    return results


def report(losses: dict[str, list[float]]) -> None:
    """Prints one line per arm, and its comparison with the first where both have several seeds."""
    first = next(iter(losses))
    for arm, arm_jobs in losses.items():
        mean, error = mean_and_error(arm_jobs)
        each = ", ".join(f"{loss:.4f}" for loss in arm_jobs)
        print(f"{arm:12} {mean:.4f} +- {error:.4f} nats a token ({each})")
        if arm != first and len(arm_jobs) == len(losses[first]) > 1:
            print(f"{'':12} {compared(arm, first, arm_jobs, losses[first])}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--dim", type=int, help="another width than the preset's")
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.folder / "text").is_dir():
        write_text(options.folder / "text")
    arms = configs(options)
    losses: dict[str, list[float]] = {arm: [] for arm in arms}
    # The first two arms come first, seed by seed, so that a stopped benchmark has compared two.
    names = list(arms)
    for group in (names[:2], names[2:]):
        for seed in range(options.seeds):
            for arm in group:
                folder = train(arms[arm][seed])
                losses[arm].append(last(folder, "validation_loss")["validation_loss"])
                print(f"{arm} seed {seed}: {losses[arm][-1]:.4f} nats a token", flush=True)
    report(losses)
    if options.json is not None:
        options.json.write_text(json.dumps(losses, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
