r"""Compares presets at equal parameters and FLOPs, each with several seeds on one text.

    OMP_NUM_THREADS=1 python benchmarks/tiny.py --folder runs/tiny
    OMP_NUM_THREADS=1 python benchmarks/tiny.py --folder runs/tiny --as-they-are

Every preset keeps its backbone and its memory. Its experts become as many and as wide as the
parameters (tables included) and the FLOPs a token of the preset --like ask for
(experiments/budget.py); with --as-they-are nothing is changed. FLOPs are those of rorqual/costs.py
for sequences of --seq-len tokens: the loss that trains indexers is not among them. All see the
same tokens in the same order. Runs are made one after another with one thread; finished ones are
not repeated, and an interrupted one resumes, so the same command may be stopped and typed again.

It prints a table, with standard errors, and the paired difference of every preset to the first.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from rorqual.costs import costs
from rorqual.experiments.budget import Budget, fit
from rorqual.experiments.paired import compared, mean_and_error
from rorqual.experiments.runs import Job, last, seeded
from rorqual.model_config import ModelConfig
from rorqual.presets import preset
from rorqual.train.config import DataConfig, TrainConfig, recipe
from rorqual.train.source import prepare
from rorqual.train.trainer import train

COLUMNS = (
    "preset", "experts", "parameters", "of them rows", "FLOPs a token", "nats a token",
    "bits a byte", "tokens/s",
)  # fmt: skip


def models(options: argparse.Namespace, vocab_size: int) -> dict[str, ModelConfig]:
    """Returns the model of each preset."""
    configs = {name: replace(preset(name), vocab_size=vocab_size) for name in options.presets}
    if options.as_they_are:
        return configs
    like = costs(replace(preset(options.like), vocab_size=vocab_size), options.seq_len)
    budget = Budget(total=like.total, flops=like.flops_per_token)
    return {name: fit(model, budget, context=options.seq_len) for name, model in configs.items()}


def row(name: str, model: ModelConfig, jobs: list[Job], options: argparse.Namespace) -> str:
    """Returns the table's line of one preset."""
    counted = costs(model, options.seq_len)
    moe = model.moe
    assert moe is not None
    figures = []
    for key in ("validation_loss", "bits_per_byte"):
        mean, error = mean_and_error([last(job.folder, key)[key] for job in jobs])
        figures.append(f"{mean:.4f} +- {error:.4f}")
    tokens = options.steps * options.batch_size * options.seq_len
    speed = statistics.median(tokens / last(job.folder)["seconds"] for job in jobs)
    cells = (
        name,
        f"{moe.active} of {moe.routed} x {moe.width}, shared {moe.shared_hidden}",
        f"{counted.total:,}",
        f"{counted.memory:,}",
        f"{counted.flops_per_token:,}",
        *figures,
        f"{speed:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--presets", nargs="+", default=["tiny", "v4-tiny", "v4.1-tiny"])
    parser.add_argument("--like", default="v4.1-tiny", help="the preset whose budget all get")
    parser.add_argument("--as-they-are", action="store_true")
    parser.add_argument("--data", default="wordnet")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    data = DataConfig(
        source=options.data,
        vocab_size=preset(options.like).vocab_size,
        cache=str(options.folder / "cache"),
    )
    configs = models(options, prepare(data).vocab_size)
    suffix = "-as-it-is" if options.as_they_are else ""
    jobs = {
        name: seeded(
            options.folder,
            f"{name}{suffix}-{options.steps}",
            TrainConfig(
                model=model,
                data=data,
                optim=recipe(model.dim),
                steps=options.steps,
                batch_size=options.batch_size,
                seq_len=options.seq_len,
                threads=1,
                validate_every=0,
            ),
            options.seeds,
        )
        for name, model in configs.items()
    }
    # Seed by seed, so that a stopped benchmark has compared all presets.
    for seed in range(options.seeds):
        for name in configs:
            job = jobs[name][seed]
            train(job.config)
            loss = last(job.folder, "validation_loss")["validation_loss"]
            print(f"{job.name}: {loss:.4f} nats a token", flush=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for name, model in configs.items():
        print(row(name, model, jobs[name], options))
    losses = {
        name: [last(job.folder, "validation_loss")["validation_loss"] for job in jobs[name]]
        for name in configs
    }
    first, *others = configs
    for name in others:
        print(compared(name, first, losses[name], losses[first]))


if __name__ == "__main__":
    main()
