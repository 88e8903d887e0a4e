"""Trains several configs, a few at a time, each in a process of its own, with live progress.

A run whose folder already holds the finished model of the same config is not run again; an
interrupted one resumes where it stopped. Each process has its share of the cores, and its output
goes to `log.txt` in its folder. The process that starts the others holds a lock on the folder that
contains theirs; when it ends, killed or not, each of them saves and ends.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rorqual import config as configs
from rorqual import runtime
from rorqual.io import lock, write_text
from rorqual.train.config import TrainConfig
from rorqual.train.run_folder import finished
from rorqual.train.step import Diverged
from rorqual.train.trainer import Stopped, train

POLL = 0.5  # seconds between two reads of the metrics
LINE_EVERY = 15.0  # seconds between two progress lines without a terminal
PATIENCE = 60.0  # seconds to save and end for a process whose parent is gone
WANTED = "wanted.json"  # in a run's folder: the config that its process trains
DIVERGED = "diverged.txt"  # in the folder of a run whose loss was not finite: at which step
DIVERGED_CODE = 3  # exit status of a process whose run diverged


class Job(NamedTuple):
    """A run to be made; its folder is the config's."""

    name: str
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.config.folder)

    def finished(self) -> bool:
        """Returns whether the folder holds this run, finished."""
        return finished(self.config)

    def begun(self) -> bool:
        """Returns whether the folder was made for this config, so that its run can resume."""
        paths = [path for name in ("train.json", WANTED) if (path := self.folder / name).is_file()]
        try:
            return bool(paths) and configs.load(TrainConfig, paths[0]) == self.config
        except (OSError, ValueError):
            return False

    def diverged(self) -> bool:
        """Returns whether this run ended because its loss was not finite."""
        return (self.folder / DIVERGED).is_file() and self.begun() and not self.finished()


def seeded(folder: Path, name: str, config: TrainConfig, seeds: int) -> list[Job]:
    """Returns the same training with the seeds 0 to `seeds` - 1, each in its own folder."""
    names = [f"{name}-seed-{seed}" for seed in range(seeds)]
    return [
        Job(n, replace(config, seed=seed, folder=str(folder / n))) for seed, n in enumerate(names)
    ]


def last(folder: Path, key: str = "loss") -> dict[str, Any]:
    """Reads the newest metrics of a run that have `key`; empty when there are none yet."""
    for line in reversed(_lines(folder)):
        # Only lines that contain the key are parsed, since this runs twice a second.
        if f'"{key}"' in line and key in (metrics := json.loads(line)):
            return metrics
    return {}


def records(folder: Path) -> list[dict[str, Any]]:
    """Reads every line of metrics.jsonl; a line still being written is left out."""
    return [json.loads(line) for line in _lines(folder)]


def _lines(folder: Path) -> list[str]:
    """Reads the whole lines of metrics.jsonl; none where there is no such file yet."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [line for line in lines if line.strip()]


def run(
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    console: Console | None = None,
    diverging: bool = False,
) -> None:
    """Runs the jobs that are not finished, `workers` at a time (default: one per core).

    diverging: a run whose loss is not finite counts as done, and has no validation loss. Ctrl-C
    stops the processes, which save first; the next call resumes them. RuntimeError with the end of
    its log if a run fails. ValueError where another process makes runs in these folders.
    """
    console = console or Console(stderr=True)
    workers = max(1, min(workers or runtime.cores(), len(jobs)))
    with _alone({job.folder.parent for job in jobs}):
        waiting = [job for job in jobs if not (job.finished() or (diverging and job.diverged()))]
        _run(jobs, waiting, workers, console, diverging)


def _run(
    jobs: Sequence[Job], waiting: list[Job], workers: int, console: Console, diverging: bool
) -> None:
    """Runs the `waiting` jobs, and shows all of them every POLL seconds until they have ended.

    What still runs when it is left, by an error or Ctrl-C, is asked to save, and waited for.
    """
    running: dict[Job, subprocess.Popen] = {}
    screen = (
        Live(console=console, refresh_per_second=2, transient=False)
        if console.is_terminal
        else None
    )
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
                _check(job, running.pop(job), diverging)
        if screen is not None:
            screen.update(_table(jobs))
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        if screen is not None:
            screen.stop()


@contextmanager
def _alone(folders: set[Path]) -> Iterator[None]:
    """Locks the folders, so that only one process makes runs in each.

    The locks end with the process, even when it is killed.
    """
    with ExitStack() as stack:
        for folder in sorted(folders):
            folder.mkdir(parents=True, exist_ok=True)
            refusal = f"{folder}: another process makes runs here; wait, or choose another --folder"
            stack.enter_context(lock(folder / ".lock", refusal))
        yield


def _wait(folder: Path) -> None:
    """Waits until no process trains in the folder.

    A process whose parent was killed takes a moment to save.
    """
    if not (folder / ".lock").is_file():
        return
    refusal = f"{folder}: another process trains here; wait, or choose another --folder"
    with lock(folder / ".lock", refusal, timeout=PATIENCE):
        return


def _start(job: Job, threads: int) -> subprocess.Popen:
    """Starts the process of a run, with so many threads; its output goes to log.txt."""
    _wait(job.folder)
    make_room(job)
    wanted = job.folder / WANTED
    configs.save(job.config, wanted)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "rorqual.experiments.runs", str(wanted), str(os.getpid())]
    with (job.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def make_room(job: Job) -> None:
    """Prepares the job's folder: an empty one, or the job's own to resume in.

    Another run there is moved aside, to NAME.before-1 and so on. ValueError for a folder that is
    not empty and holds no run, since it has someone's files.
    """
    folder = job.folder
    if folder.is_dir() and any(folder.iterdir()) and not job.begun():
        if not (folder / "train.json").is_file() and not (folder / WANTED).is_file():
            raise ValueError(
                f"{folder}: got a folder with other files, expected none or a run; "
                "choose another --folder"
            )
        names = (folder.with_name(f"{folder.name}.before-{n}") for n in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))
    folder.mkdir(parents=True, exist_ok=True)


def _check(job: Job, process: subprocess.Popen, diverging: bool) -> None:
    """Raises RuntimeError with the end of the log for a process that did not finish its run."""
    if (process.returncode == 0 and job.finished()) or (
        diverging and process.returncode == DIVERGED_CODE
    ):
        return
    log = (
        (job.folder / "log.txt")
        .read_text(encoding="utf-8", errors="replace")
        .strip()
        .splitlines()[-12:]
    )
    raise RuntimeError(
        f"run {job.name} ended with code {process.returncode}; the end of its log:\n"
        + "\n".join(log)
    )


def _line(job: Job) -> str:
    """Formats a run's progress for a log without a terminal."""
    now = last(job.folder)
    if not now:
        return f"{job.name}: starting"
    return (
        f"{job.name}: step {now['step']:.0f}/{job.config.steps} loss {now['loss']:.3f} "
        f"{now['tokens_per_second']:,.0f} tokens/s {now['seconds_left']:.0f} s left"
    )


def _table(jobs: Sequence[Job]) -> Table:
    """Formats the progress of all runs for the terminal."""
    table = Table("run", "step", "loss", "validation", "tokens/s", "left", box=None)
    for job in jobs:
        now = last(job.folder)
        scored = last(job.folder, "validation_loss")
        validation = f"{scored['validation_loss']:.4f}" if scored else ""
        if job.finished():
            table.add_row(
                job.name, "done", f"{now.get('loss', float('nan')):.3f}", validation, "", ""
            )
        elif job.diverged():
            table.add_row(job.name, "diverged", "", "", "", "")
        elif now:
            step = f"{now['step']:.0f}/{job.config.steps}"
            left = f"{now['seconds_left']:.0f} s"
            table.add_row(
                job.name,
                step,
                f"{now['loss']:.3f}",
                validation,
                f"{now['tokens_per_second']:,.0f}",
                left,
            )
        else:
            table.add_row(
                job.name, "starting" if job.folder.exists() else "waiting", "", "", "", ""
            )
    return table


def main(path: str) -> int:
    """Trains the config at `path`, and returns the exit status of the process.

    It is 130 after ctrl-C or SIGTERM, when everything is saved, and DIVERGED_CODE where the loss
    was not finite, which is then written into the run's folder.
    """
    config = configs.load(TrainConfig, Path(path))
    try:
        train(config)
    except Stopped:
        return 130
    except Diverged as error:
        write_text(Path(config.folder) / DIVERGED, f"{error}\n")
        print(error, file=sys.stderr)
        return DIVERGED_CODE
    return 0


def follow(parent: int) -> None:
    """Watches the process that started this one, and ends this one after it.

    The SIGTERM that it sends makes the run save first.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    follow(int(sys.argv[2]))
    sys.exit(main(sys.argv[1]))
