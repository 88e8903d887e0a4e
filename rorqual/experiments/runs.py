"""Training configs -> finished run folders: several at a time, each in a process of its own, with live progress.

A run whose folder already holds the finished model of the same config is not run again; an interrupted one goes on
where it stopped. Each process has its share of the cores, and its output goes to `log.txt` in its folder.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rorqual import config as configs
from rorqual import runtime
from rorqual.train.trainer import Stopped, TrainConfig, finished, train

POLL = 0.5  # seconds between two looks at the metrics
LINE_EVERY = 15.0  # seconds between two lines where there is no terminal


class Job(NamedTuple):
    """A run to be made; its folder is the config's."""

    name: str
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.folder)

    def finished(self) -> bool:
        """Whether the folder holds this very run, finished."""
        return finished(self.config)

    def begun(self) -> bool:
        """Whether the folder was made by this very config, so that an interrupted run can go on."""
        try:
            return configs.load(TrainConfig, self.folder / "train.json") == self.config
        except (OSError, ValueError):
            return False


def seeded(folder: Path, name: str, config: TrainConfig, seeds: int) -> list[Job]:
    """The same training with the seeds 0 to `seeds` - 1, each in its own folder."""
    names = [f"{name}-seed-{seed}" for seed in range(seeds)]
    return [Job(n, replace(config, seed=seed, folder=str(folder / n))) for seed, n in enumerate(names)]


def last(folder: Path, key: str = "loss") -> dict[str, Any]:
    """The newest metrics of a run that hold `key`; empty when there are none yet."""
    found: dict[str, Any] = {}
    for line in records(folder):
        if key in line:
            found = line
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl; a line still being written is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines if line.strip()]


def run(jobs: Sequence[Job], *, workers: int | None = None, console: Console | None = None) -> None:
    """Runs what is not finished, `workers` at a time (default: one a core); RuntimeError with a log's end if one fails.

    Ctrl-C stops the processes, which save first; the next call goes on.
    """
    console = console or Console(stderr=True)
    workers = max(1, min(workers or runtime.cores(), len(jobs)))
    waiting = [job for job in jobs if not job.finished()]
    running: dict[Job, subprocess.Popen] = {}
    screen = Live(console=console, refresh_per_second=2, transient=False) if console.is_terminal else None
    shown = time.monotonic()
    try:
        if screen is not None:
            screen.start()
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[job] = _start(job, max(1, runtime.cores() // workers))
            time.sleep(POLL)
            if screen is not None:
                screen.update(_table(jobs))
            elif time.monotonic() - shown > LINE_EVERY:
                shown = time.monotonic()
                console.print(" | ".join(_line(job) for job in running), highlight=False)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                _check(job, running.pop(job))
        if screen is not None:
            screen.update(_table(jobs))
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        if screen is not None:
            screen.stop()


def _start(job: Job, threads: int) -> subprocess.Popen:
    make_room(job)
    wanted = job.folder / "wanted.json"
    configs.save(job.config, wanted)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "rorqual.experiments.runs", str(wanted)]
    with (job.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def make_room(job: Job) -> None:
    """An empty folder, or the job's own to go on in. Another run there is moved aside, to NAME.before-1 and so on.

    ValueError for a folder that is not empty and holds no run: it is somebody's.
    """
    folder = job.folder
    if folder.is_dir() and any(folder.iterdir()) and not job.begun():
        if not (folder / "train.json").is_file() and not (folder / "wanted.json").is_file():
            raise ValueError(
                f"{folder}: got a folder with other files, expected none or a run; choose another --folder"
            )
        names = (folder.with_name(f"{folder.name}.before-{n}") for n in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))
    folder.mkdir(parents=True, exist_ok=True)


def _check(job: Job, process: subprocess.Popen) -> None:
    if process.returncode == 0 and job.finished():
        return
    log = (job.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
    raise RuntimeError(f"run {job.name} ended with code {process.returncode}; the end of its log:\n" + "\n".join(log))


def _line(job: Job) -> str:
    now = last(job.folder)
    if not now:
        return f"{job.name}: starting"
    return (
        f"{job.name}: step {now['step']:.0f}/{job.config.steps} loss {now['loss']:.3f} "
        f"{now['tokens_per_second']:,.0f} tokens/s {now['seconds_left']:.0f} s left"
    )


def _table(jobs: Sequence[Job]) -> Table:
    table = Table("run", "step", "loss", "validation", "tokens/s", "left", box=None)
    for job in jobs:
        now, scored = last(job.folder), last(job.folder, "validation_loss")
        validation = f"{scored['validation_loss']:.4f}" if scored else ""
        if job.finished():
            table.add_row(job.name, "done", f"{now.get('loss', float('nan')):.3f}", validation, "", "")
        elif now:
            step, left = f"{now['step']:.0f}/{job.config.steps}", f"{now['seconds_left']:.0f} s"
            table.add_row(job.name, step, f"{now['loss']:.3f}", validation, f"{now['tokens_per_second']:,.0f}", left)
        else:
            table.add_row(job.name, "starting" if job.folder.exists() else "waiting", "", "", "", "")
    return table


def main(path: str) -> int:
    """Trains what the config at `path` says; 130 after ctrl-C or SIGTERM, when everything is saved."""
    try:
        train(configs.load(TrainConfig, Path(path)))
    except Stopped:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
