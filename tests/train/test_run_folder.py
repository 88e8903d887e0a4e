"""Tests run_folder.py: which run a folder has, which process may train in it, what is refused."""

import fcntl
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from rorqual.train.run_folder import losses
from rorqual.train.trainer import Stopped, train


def test_longer_is_allowed_and_other_is_not(config):
    folder = train(replace(config, steps=3))
    with pytest.raises(ValueError, match=r"another run \(model\.dim differ\)"):
        train(replace(config, model=replace(config.model, dim=24)))
    with pytest.raises(ValueError, match=r"optim\.lr"):
        train(replace(config, optim=replace(config.optim, lr=0.5)))
    for name, value in (("bias_rest", 0.5), ("mtp_late", 0.1)):
        with pytest.raises(ValueError, match=f"{name} differ"):
            train(replace(config, **{name: value}))
    # As many processes as there are give the same tokens.
    data = replace(config.data, processes=2)
    train(replace(config, steps=5, log_every=2, keep=1, data=data))
    assert len(losses(folder)) == 5


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_fewer_steps_than_a_finished_run_has_change_nothing_and_say_so(config, capsys):
    folder = train(replace(config, steps=6))
    before = bytes_of(folder)
    assert train(replace(config, steps=2)) == folder
    assert bytes_of(folder) == before
    message = capsys.readouterr().err.replace("\n", " ")
    assert "holds this run with 6 steps, 2 were asked for: nothing to do" in message
    with pytest.raises(ValueError, match=r"another run \(model\.dim differ\)"):
        train(replace(config, steps=2, model=replace(config.model, dim=24)))
    assert bytes_of(folder) == before
    train(replace(config, steps=7))
    assert len(losses(folder)) == 7


def test_fewer_steps_than_an_unfinished_run_has_made_are_refused(config):
    def stop(line: dict) -> None:
        if line["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(config, on_metrics=stop)
    before = bytes_of(Path(config.folder))
    with pytest.raises(
        ValueError, match=r"got --steps 3, expected at least the 5 that are made already \(of 8\)"
    ):
        train(replace(config, steps=3))
    assert bytes_of(Path(config.folder)) == before
    assert len(losses(train(replace(config, steps=6)))) == 6


def test_one_training_a_folder(config):
    folder = Path(config.folder)
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process trains here"):
            train(config)


def test_a_folder_that_held_no_run_keeps_what_is_called_learning(config):
    cached = Path(config.folder) / "learning" / "notes.txt"
    cached.parent.mkdir(parents=True)
    cached.write_text("somebody's")
    train(replace(config, steps=1))
    assert cached.read_text() == "somebody's"


def test_rows_of_another_run_that_has_no_checkpoint_are_not_taken(config, tmp_path):
    """A run stops before its first checkpoint.

    Another seed in the same folder then draws its own rows.
    """

    def stop(line: dict) -> None:
        raise RuntimeError("killed")

    config = replace(config, placement="disk", steps=2)
    with pytest.raises(RuntimeError, match="killed"):
        train(config, on_metrics=stop)
    assert (Path(config.folder) / "learning" / "0" / "marks.json").is_file()
    folder = train(replace(config, seed=1))
    straight = train(replace(config, seed=1, folder=str(tmp_path / "straight")))
    assert losses(folder) == losses(straight)


def test_a_folder_of_runs_is_no_place_to_train(config, capsys):
    folder = train(replace(config, steps=1))
    with pytest.raises(
        ValueError, match=f"{folder.parent}: got a folder of runs .*run.*expected one for this run"
    ):
        train(replace(config, folder=str(folder.parent)))
    assert not (folder.parent / "train.json").exists()
