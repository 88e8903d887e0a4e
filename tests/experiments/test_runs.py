"""Tests the state of jobs, resuming killed runs, and the log of a failing run."""

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rorqual import config as configs
from rorqual.experiments import runs
from rorqual.experiments.runs import Job, last, main, make_room, records, run, seeded
from rorqual.layers.attention import MLAConfig
from rorqual.model import ModelConfig
from rorqual.train.config import DataConfig, OptimConfig, TrainConfig
from rorqual.train.step import Diverged


def _job(folder, **changes):
    return Job("one", TrainConfig(folder=str(folder), **changes))


def test_records_leave_out_a_line_that_is_being_written(tmp_path):
    lines = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.0},
        {"step": 2, "validation_loss": 4.5},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo'
    )
    assert records(tmp_path) == lines
    assert (
        last(tmp_path)["step"] == 2 and last(tmp_path, "validation_loss")["validation_loss"] == 4.5
    )
    assert last(tmp_path, "nothing") == {} and records(tmp_path / "none") == []


def test_begun_means_this_very_config(tmp_path):
    job = _job(tmp_path)
    assert not job.begun() and not job.finished()
    configs.save(job.config, tmp_path / "train.json")
    assert job.begun() and not job.finished()
    assert not _job(tmp_path, seed=1).begun()


def test_a_run_that_was_killed_before_it_wrote_anything_is_begun(tmp_path):
    job = _job(tmp_path / "run")
    other = _job(tmp_path / "run", seed=1)
    configs.save(job.config, job.folder / "wanted.json")
    (job.folder / "log.txt").touch()
    assert job.begun() and not other.begun()
    make_room(job)
    assert (job.folder / "log.txt").is_file(), "nothing is moved aside"
    make_room(other)
    assert (tmp_path / "run.before-1" / "log.txt").is_file()


def _locked(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def test_two_that_make_runs_do_not_share_a_folder(tmp_path):
    job = _job(tmp_path / "runs" / "one")
    with (
        _locked(tmp_path / "runs" / ".lock"),
        pytest.raises(ValueError, match="another process makes runs here; wait"),
    ):
        run([job], console=Console(file=io.StringIO()))
    assert not job.folder.exists()


def test_a_folder_in_which_somebody_trains_is_waited_for_and_left_alone(tmp_path, monkeypatch):
    """If the folder were moved aside, two processes would write into one file."""
    monkeypatch.setattr(runs, "PATIENCE", 0.0)
    job = _job(tmp_path / "one")
    configs.save(_job(tmp_path / "one", seed=1).config, job.folder / "train.json")
    with (
        _locked(job.folder / ".lock"),
        pytest.raises(ValueError, match="another process trains here; wait"),
    ):
        run([job], console=Console(file=io.StringIO()))
    assert (job.folder / "train.json").is_file() and not (tmp_path / "one.before-1").exists()


def test_a_loss_that_is_no_number_is_given_by_its_own_code(tmp_path, monkeypatch):
    job = _job(tmp_path / "one")
    text = [Diverged("got no finite loss in 10 steps in a row"), RuntimeError("out of memory")]
    configs.save(job.config, job.folder / "train.json")

    def broken(config):
        raise text[0]

    monkeypatch.setattr(runs, "train", broken)
    assert not job.diverged()
    assert main(str(job.folder / "train.json")) == runs.DIVERGED_CODE and job.diverged()
    assert (job.folder / runs.DIVERGED).read_text() == f"{text.pop(0)}\n"
    assert not _job(tmp_path / "one", seed=1).diverged(), "it was another run's loss"
    with pytest.raises(RuntimeError, match="out of memory"):
        main(str(job.folder / "train.json"))


def test_seeds_differ_in_seed_and_folder_alone(tmp_path):
    config = TrainConfig(steps=7, folder="elsewhere")
    jobs = seeded(tmp_path, "arm", config, 3)
    assert [(job.name, job.folder) for job in jobs] == [
        (f"arm-seed-{n}", tmp_path / f"arm-seed-{n}") for n in range(3)
    ]
    assert [replace(job.config, seed=0, folder="elsewhere") for job in jobs] == [config] * 3
    assert [job.config.seed for job in jobs] == [0, 1, 2]


def test_nothing_is_lost_where_another_run_stands(tmp_path):
    mine = _job(tmp_path / "run")
    other = _job(tmp_path / "run", seed=1)
    make_room(mine)
    configs.save(mine.config, tmp_path / "run" / "train.json")
    make_room(mine)
    assert (tmp_path / "run" / "train.json").is_file(), "its own folder is gone on in"
    make_room(other)
    assert (
        list((tmp_path / "run").iterdir()) == []
        and (tmp_path / "run.before-1" / "train.json").is_file()
    )
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="choose another --folder"):
        make_room(other)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_a_failing_run_shows_the_end_of_its_log(tmp_path):
    job = _job(
        tmp_path / "run",
        data=configs.from_dict(TrainConfig, {"data": {"source": str(tmp_path / "no-such")}}).data,
    )
    with pytest.raises(RuntimeError, match=r"run one ended with code 1(.|\n)*no-such"):
        run([job], console=Console(file=io.StringIO()))


def test_a_bad_config_file_is_named(tmp_path):
    path = tmp_path / "wanted.json"
    path.write_text('{"stepz": 3}')
    with pytest.raises(ValueError, match=r"wanted\.json.*stepz"):
        main(str(path))


SMALL = ModelConfig(
    vocab_size=300,
    dim=16,
    layers=1,
    dense_width=16,
    mla=MLAConfig(heads=1, kv_lora_rank=8, nope_dim=8, rope_dim=8, value_dim=8),
)


def _data(tmp_path):
    (tmp_path / "text").mkdir()
    for n in range(60):
        (tmp_path / "text" / f"{n}.txt").write_text(
            f"Entry {n} tells of {n * n} whales, {n % 7} rivers. " * 4
        )
    return DataConfig(source=str(tmp_path / "text"), cache=str(tmp_path / "cache"))


# It starts two processes.
@pytest.mark.slow
def test_a_run_that_diverges_leaves_the_others_and_is_not_repeated(tmp_path):
    config = TrainConfig(
        model=SMALL, data=_data(tmp_path), steps=4, batch_size=2, seq_len=32, skip_limit=2
    )
    fast = replace(
        config, optim=OptimConfig(kind="adamw", lr=1e30), folder=str(tmp_path / "runs" / "fast")
    )
    jobs = [Job("fast", fast), Job("slow", replace(config, folder=str(tmp_path / "runs" / "slow")))]
    text = Console(file=io.StringIO())
    run(jobs, workers=1, console=text, diverging=True)
    assert [(job.diverged(), job.finished()) for job in jobs] == [(True, False), (False, True)]
    assert last(jobs[0].folder, "validation_loss") == {} != last(jobs[1].folder, "validation_loss")
    assert (
        "no finite gradient in 2 steps in a row, the last of them 3"
        in (jobs[0].folder / runs.DIVERGED).read_text()
    )
    mark = (jobs[0].folder / "log.txt").stat().st_mtime_ns
    run(jobs, console=text, diverging=True)
    assert (jobs[0].folder / "log.txt").stat().st_mtime_ns == mark
    with pytest.raises(RuntimeError, match=r"run fast ended with code 3(.|\n)*no finite gradient"):
        run(jobs, console=text)


# It starts four processes, each of which takes seconds.
@pytest.mark.slow
@pytest.mark.parametrize("hit", [os.killpg, os.kill], ids=["all", "the sweep alone"])
def test_killed_in_the_middle_it_goes_on_and_repeats_nothing(tmp_path, hit):
    """Kills everything, or the parent alone, while the second of two runs trains.

    The runs are one at a time. Finished work stays as it is, and no process trains on during the
    next call.
    """
    data = _data(tmp_path)
    config = TrainConfig(model=SMALL, data=data, steps=100, batch_size=2, seq_len=32, save_every=10)
    jobs = seeded(tmp_path / "runs", "arm", config, 2)
    configs.save(config, tmp_path / "config.json")
    (tmp_path / "sweep.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom rorqual import config\n"
        "from rorqual.experiments.runs import run, seeded\n"
        "from rorqual.train.config import TrainConfig\n"
        "run(seeded(Path(sys.argv[1]), 'arm', config.load(TrainConfig, Path(sys.argv[2])), 2), "
        "workers=1)\n"
    )
    words = [
        sys.executable,
        str(tmp_path / "sweep.py"),
        str(tmp_path / "runs"),
        str(tmp_path / "config.json"),
    ]
    process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        while last(jobs[1].folder).get("step", 0) < 25:
            assert process.poll() is None, "ended before it was hit"
            time.sleep(0.02)
    finally:
        hit(process.pid, signal.SIGKILL)
        process.wait()
    # Wait until the operating system has ended the run, too.
    while hit is os.killpg and not _free(jobs[1].folder / ".lock"):
        time.sleep(0.02)
    assert jobs[0].finished() and jobs[1].begun() and not jobs[1].finished()
    mark = (jobs[0].folder / "model.safetensors").stat().st_mtime_ns
    seen = records(jobs[0].folder)
    run(jobs, workers=2, console=Console(file=io.StringIO()))
    assert (jobs[0].folder / "model.safetensors").stat().st_mtime_ns == mark and records(
        jobs[0].folder
    ) == seen
    assert jobs[1].finished()
    assert [line["step"] for line in records(jobs[1].folder) if "loss" in line] == list(
        range(1, 101)
    ), "each step once"


def _free(lock: Path) -> bool:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
