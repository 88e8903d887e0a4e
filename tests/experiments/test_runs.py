"""Jobs know whether they are finished or only begun; what is killed goes on; a failing run shows the end of its log."""

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
from rorqual.experiments.runs import Job, last, main, make_room, records, run, seeded
from rorqual.layers.attention import MLAConfig
from rorqual.model import ModelConfig
from rorqual.train.trainer import DataConfig, TrainConfig


def _job(folder, **changes):
    return Job("one", TrainConfig(folder=str(folder), **changes))


def test_records_leave_out_a_line_that_is_being_written(tmp_path):
    lines = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "validation_loss": 4.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert records(tmp_path) == lines
    assert last(tmp_path)["step"] == 2 and last(tmp_path, "validation_loss")["validation_loss"] == 4.5
    assert last(tmp_path, "nothing") == {} and records(tmp_path / "none") == []


def test_begun_means_this_very_config(tmp_path):
    job = _job(tmp_path)
    assert not job.begun() and not job.finished()
    configs.save(job.config, tmp_path / "train.json")
    assert job.begun() and not job.finished()
    assert not _job(tmp_path, seed=1).begun()


def test_seeds_differ_in_seed_and_folder_alone(tmp_path):
    config = TrainConfig(steps=7, folder="elsewhere")
    jobs = seeded(tmp_path, "arm", config, 3)
    assert [(job.name, job.folder) for job in jobs] == [(f"arm-seed-{n}", tmp_path / f"arm-seed-{n}") for n in range(3)]
    assert [replace(job.config, seed=0, folder="elsewhere") for job in jobs] == [config] * 3
    assert [job.config.seed for job in jobs] == [0, 1, 2]


def test_nothing_is_lost_where_another_run_stands(tmp_path):
    mine, other = _job(tmp_path / "run"), _job(tmp_path / "run", seed=1)
    make_room(mine)
    configs.save(mine.config, tmp_path / "run" / "train.json")
    make_room(mine)
    assert (tmp_path / "run" / "train.json").is_file(), "its own folder is gone on in"
    make_room(other)
    assert list((tmp_path / "run").iterdir()) == [] and (tmp_path / "run.before-1" / "train.json").is_file()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="choose another --folder"):
        make_room(other)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_a_failing_run_shows_the_end_of_its_log(tmp_path):
    job = _job(
        tmp_path / "run", data=configs.from_dict(TrainConfig, {"data": {"source": str(tmp_path / "no-such")}}).data
    )
    with pytest.raises(RuntimeError, match=r"run one ended with code 1(.|\n)*no-such"):
        run([job], console=Console(file=io.StringIO()))


def test_a_bad_config_file_is_named(tmp_path):
    path = tmp_path / "wanted.json"
    path.write_text('{"stepz": 3}')
    with pytest.raises(ValueError, match=r"wanted\.json.*stepz"):
        main(str(path))


SMALL = ModelConfig(
    vocabulary=300,
    dim=16,
    layers=1,
    dense_width=16,
    mla=MLAConfig(heads=1, kv_lora_rank=8, nope_dim=8, rope_dim=8, value_dim=8),
)


@pytest.mark.slow  # four processes, each of which takes seconds to start
def test_killed_in_the_middle_it_goes_on_and_repeats_nothing(tmp_path):
    """Two runs, one at a time; everything is killed while the second trains. What is finished stays as it is."""
    (tmp_path / "text").mkdir()
    for n in range(60):
        (tmp_path / "text" / f"{n}.txt").write_text(f"Entry {n} tells of {n * n} whales, {n % 7} rivers. " * 4)
    data = DataConfig(source=str(tmp_path / "text"), cache=str(tmp_path / "cache"))
    config = TrainConfig(model=SMALL, data=data, steps=100, rows=2, length=32, save_every=10)
    jobs = seeded(tmp_path / "runs", "arm", config, 2)
    configs.save(config, tmp_path / "config.json")
    (tmp_path / "sweep.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom rorqual import config\n"
        "from rorqual.experiments.runs import run, seeded\nfrom rorqual.train.trainer import TrainConfig\n"
        "run(seeded(Path(sys.argv[1]), 'arm', config.load(TrainConfig, Path(sys.argv[2])), 2), workers=1)\n"
    )
    words = [sys.executable, str(tmp_path / "sweep.py"), str(tmp_path / "runs"), str(tmp_path / "config.json")]
    process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        while last(jobs[1].folder).get("step", 0) < 25:
            assert process.poll() is None, "ended before it was hit"
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    while not _free(jobs[1].folder / ".lock"):  # until the kernel has ended the run, too
        time.sleep(0.02)
    assert jobs[0].finished() and jobs[1].begun() and not jobs[1].finished()
    mark, seen = (jobs[0].folder / "model.safetensors").stat().st_mtime_ns, records(jobs[0].folder)
    run(jobs, workers=2, console=Console(file=io.StringIO()))
    assert (jobs[0].folder / "model.safetensors").stat().st_mtime_ns == mark and records(jobs[0].folder) == seen
    assert jobs[1].finished()
    assert [line["step"] for line in records(jobs[1].folder) if "loss" in line] == list(range(1, 101)), "each step once"


def _free(lock: Path) -> bool:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
