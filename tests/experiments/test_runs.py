"""Jobs know whether they are finished or only begun; a failing process is reported with the end of its log."""

import io
import json

import pytest
from rich.console import Console

from rorqual import config as configs
from rorqual.experiments.runs import Job, last, main, make_room, records, run
from rorqual.train.trainer import TrainConfig


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
