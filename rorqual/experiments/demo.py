"""Trains two models of one budget, experts alone and experts with memory, and writes a report.

The text is tokenized into token files, which are kept for the next time. Each arm is then trained
once per seed, both arms side by side. The demo prints the losses, a continuation of the prompt by
each arm and a sentence coloured by its gates, and writes gates.png and report.html.
"""

import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rorqual.analyze.figures import gate_map
from rorqual.analyze.measures import Gates, gates
from rorqual.analyze.report import write_report
from rorqual.experiments.paired import established, mean_and_error
from rorqual.experiments.plan import Plan, agreement, split_budget
from rorqual.experiments.runs import Job, last, run
from rorqual.presets import preset
from rorqual.serve.generate import load
from rorqual.train.config import DataConfig, OptimConfig, TrainConfig, recipe
from rorqual.train.source import prepare

SENTENCE = (
    "The blue whale is the largest mammal; "
    "Alexander the Great was king of Macedon, in northern Greece."
)
PROMPT = "oak tree:"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What the demo trains and for how long."""

    preset: str = "tiny"
    rho: float = 0.7  # share of the inactive experts that stay experts
    data: str = "wordnet"
    folder: str = "runs/demo"
    cache: str = "runs/cache"
    steps: int = 1300
    batch_size: int = 8  # sequences per step
    seq_len: int = 128  # sequence length in tokens
    optim: OptimConfig = field(default_factory=lambda: recipe(preset("tiny").dim))
    seeds: int = 1  # runs per arm
    minutes: float = 7.0  # further seeds are skipped when they would not end by then
    sentence: str = SENTENCE
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.steps < 2:
            raise ValueError(
                f"got {self.seeds} seeds and {self.steps} steps, expected at least 1 and 2"
            )


class Result(NamedTuple):
    """What the demo measured."""

    losses: dict[str, list[float]]  # by arm: validation nats per token, one per seed
    bits: dict[str, list[float]]  # by arm: bits per byte, one per seed
    report: Path
    seconds: float


def main(config: DemoConfig, *, console: Console | None = None) -> Result:
    """Runs the whole demo; see the module.

    Finished runs of the same config are not repeated, and interrupted ones resume.
    """
    console = console or Console()
    began = time.monotonic()
    base = replace(preset(config.preset), engram=None)
    data = DataConfig(source=config.data, vocab_size=base.vocab_size, cache=config.cache)
    console.print(
        f"[bold]1. text[/bold] {config.data}; tokenizer and token files are kept in {data.cache}"
    )
    tokens = prepare(data)
    console.print(f"   {tokens}", highlight=False)
    plan = split_budget(
        replace(base, vocab_size=tokens.vocab_size), config.rho, context=config.seq_len
    )
    console.print(f"[bold]2. two models of one budget[/bold], rho {plan.rho:.2f}")
    console.print(_plan_table(plan))
    console.print("[bold]3. training[/bold], a process an arm")
    jobs = _train(config, data, plan, began, console)
    console.print("[bold]4. what came out[/bold]")
    losses = {
        arm: [last(job.folder, "validation_loss")["validation_loss"] for job in arm_jobs]
        for arm, arm_jobs in jobs.items()
    }
    bits = {
        arm: [last(job.folder, "bits_per_byte")["bits_per_byte"] for job in arm_jobs]
        for arm, arm_jobs in jobs.items()
    }
    sentence = verdict(losses)
    console.print(_score_table(losses, bits))
    console.print(sentence, highlight=False)
    report = _show(config, jobs, sentence, console)
    seconds = time.monotonic() - began
    _next(config, report, seconds, console)
    return Result(losses, bits, report, seconds)


def _jobs(config: DemoConfig, data: DataConfig, plan: Plan, seed: int) -> dict[str, Job]:
    """Returns the training of each arm with one seed, each in a folder of its own."""
    jobs = {}
    for arm in (plan.moe, plan.engram):
        name = arm.name if seed == 0 else f"{arm.name}-{seed + 1}"
        folder = str(Path(config.folder) / name)
        jobs[arm.name] = Job(
            name,
            TrainConfig(
                model=arm.config,
                data=data,
                optim=config.optim,
                steps=config.steps,
                batch_size=config.batch_size,
                seq_len=config.seq_len,
                seed=seed,
                folder=folder,
                # The arms are compared by their final validation loss.
                validate_every=0,
            ),
        )
    return jobs


def _train(
    config: DemoConfig, data: DataConfig, plan: Plan, began: float, console: Console
) -> dict[str, list[Job]]:
    """Trains both arms one seed after the other, while the next pair is likely to end in time."""
    done: dict[str, list[Job]] = {"moe": [], "engram": []}
    for seed in range(config.seeds):
        jobs = _jobs(config, data, plan, seed)
        start = time.monotonic()
        run(list(jobs.values()), workers=2, console=console)
        for arm, job in jobs.items():
            done[arm].append(job)
        took = time.monotonic() - start
        spent = time.monotonic() - began
        if seed + 1 < config.seeds and spent + took > 60 * config.minutes:
            console.print(
                f"   {seed + 1} of {config.seeds} seeds: "
                f"a further one would pass {config.minutes:g} minutes"
            )
            break
    return done


def verdict(losses: dict[str, list[float]]) -> str:
    """Summarises the difference between the arms in one sentence.

    With one seed it claims nothing.
    """
    gaps = [a - b for a, b in zip(losses["moe"], losses["engram"], strict=True)]
    gap = statistics.fmean(gaps)
    winner = "less" if gap > 0 else "more"
    verdict = f"Engram: {abs(gap):.4f} nats a token {winner} than the pure mixture of experts"
    if len(gaps) < 2:
        return f"{verdict}, with one seed: a difference, not a finding."
    spread = f"{min(gaps):+.4f} to {max(gaps):+.4f}"
    significant = established(*mean_and_error(gaps), len(gaps))
    return (
        f"{verdict} ({spread} over {len(gaps)} seeds), "
        f"{'established' if significant else 'not established'} at 95 %."
    )


def _show(config: DemoConfig, jobs: dict[str, list[Job]], verdict: str, console: Console) -> Path:
    """Prints a continuation by each arm and the gates of a sentence.

    It writes gates.png and report.html, and returns the path of the report.
    """
    folder = Path(config.folder)
    for arm, arm_jobs in jobs.items():
        text = load(arm_jobs[0].folder).generate(
            config.prompt, max_new_tokens=40, temperature=0.5, seed=0
        )
        console.print(Text.assemble((f"{arm}: ", "bold"), (config.prompt, "dim"), text))
    memory = load(jobs["engram"][0].folder)
    gates_of_memory = gates(memory.model, memory.tokenizer, config.sentence)
    console.print("gates, mean over the streams (brighter: the token trusts what it looked up)")
    console.print(gate_line(gates_of_memory))
    gate_map(gates_of_memory).savefig(folder / "gates.png", dpi=160)
    runs = [job.folder for arm_jobs in jobs.values() for job in arm_jobs]
    title = "Experts alone, or experts and memory: one budget, two models"
    out = folder / "report.html"
    return write_report(
        runs, out, title=title, sentence=config.sentence, note=verdict, asked=[folder]
    )


def gate_line(gates: Gates) -> Text:
    """Formats the sentence with each token on a background as bright as its gate."""
    means = gates.values.mean((0, 2)).tolist()
    low = min(means)
    high = max(means)
    line = Text("  ")
    for word, value in zip(gates.tokens, means, strict=True):
        level = round(40 + 190 * (value - low) / max(high - low, 1e-6))
        ink = "black" if level > 130 else "white"
        line.append(word, style=f"{ink} on rgb({level // 3},{level * 2 // 3},{level})")
    return line.append(f"   {low:.2f} to {high:.2f}", style="dim")


def _plan_table(plan: Plan) -> Table:
    """Formats the sizes of both arms, and how far they differ, for the terminal."""
    table = Table(
        "arm",
        "total parameters",
        "memory",
        "activated",
        "FLOPs a token",
        "routed experts",
        box=None,
    )
    for arm in (plan.moe, plan.engram):
        c = arm.costs
        moe = arm.config.moe
        experts = str(moe.routed) if moe is not None else ""
        table.add_row(
            arm.name,
            *(f"{v:,}" for v in (c.total, c.memory, c.activated, c.flops_per_token)),
            experts,
        )
    total, flops = agreement(plan)
    table.caption = f"totals differ by {total:+.2%}, FLOPs by {flops:+.2%}"
    return table


def _score_table(losses: dict[str, list[float]], bits: dict[str, list[float]]) -> Table:
    """Formats the mean loss and bits of each arm, and the loss of every seed."""
    table = Table("arm", "validation loss, nats a token", "bits a byte", "each seed", box=None)
    for arm, values in losses.items():
        each = ", ".join(f"{value:.4f}" for value in values)
        table.add_row(
            arm, f"{statistics.fmean(values):.4f}", f"{statistics.fmean(bits[arm]):.4f}", each
        )
    return table


def _next(config: DemoConfig, report: Path, seconds: float, console: Console) -> None:
    """Prints commands that go on from here, with the paths that the demo used."""
    engram = Path(config.folder) / "engram"
    console.print(f"[bold]5. next[/bold] ({seconds:.0f} seconds so far)")
    activate = Path(sys.prefix) / "bin" / "activate"
    for line in (
        *(
            [f". {os.path.relpath(activate)}"]
            if shutil.which("rorqual") is None and activate.is_file()
            else []
        ),
        f"xdg-open {report}",
        f'rorqual generate {engram} "{config.prompt}"',
        f"rorqual explore {engram}",
        "rorqual train small --data PATH_TO_YOUR_TEXT",
        "rorqual sweep allocation",
    ):
        console.print(f"   {line}", highlight=False, markup=False)
