"""Tests metrics.py: the trimmed metrics file, tensorboard, and the best weights."""

import json
import math
import resource

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from rorqual import checkpoint
from rorqual.data.needle_config import NeedleConfig
from rorqual.train.config import TrainConfig
from rorqual.train.metrics import (
    BestCheckpoint,
    EventFile,
    MetricsWriter,
    format_duration,
    trim_metrics,
    validation_interval,
)


def test_trim_keeps_the_steps_made_and_drops_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    trim_metrics(path, 3)
    assert not path.exists()
    whole = [{"step": step, "loss": 0.1 * step} for step in range(1, 6)] + [
        {"step": 3, "validation_loss": 1.0}
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in whole) + '{"step": 2, "lo')
    trim_metrics(path, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        whole[0],
        whole[1],
        whole[2],
        whole[5],
    ]


def test_the_last_validation_is_not_there_twice(tmp_path):
    """A run is killed behind it, before its model is written, and goes on."""
    path = tmp_path / "metrics.jsonl"
    whole = [
        {"step": 2, "validation_loss": 1.0},
        {"step": 3, "loss": 0.3, "lr": 0.1},
        {"step": 3, "validation_loss": 0.9},
        {"step": 3, "task_piqa_acc": 0.5},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in whole))
    trim_metrics(path, 3)
    assert len(path.read_text().splitlines()) == 4
    trim_metrics(path, 3, last=True)
    assert [json.loads(line) for line in path.read_text().splitlines()] == whole[:2]


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path):
    """Repeated steps appear once, with the later value."""
    for first, values in ((1, (5.0, 4.0, 3.0)), (3, (2.5, 2.0))):
        events = EventFile(tmp_path, first)
        for step, value in enumerate(values, first):
            events.write({"loss": value, "balance_sequence": value / 7}, step)
        events.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [
        (1, 5.0),
        (2, 4.0),
        (3, 2.5),
        (4, 2.0),
    ]
    assert shown.Scalars("balance_sequence")[-1].value == pytest.approx(2 / 7)


def test_a_full_disk_under_tensorboard_is_an_error_where_it_happens(
    tmp_path, no_larger_file, capfd
):
    events = EventFile(tmp_path, 1)
    (path,) = tmp_path.iterdir()
    no_larger_file(path.stat().st_size)
    with pytest.raises(OSError, match="File too large"):
        events.write({"loss": 1.0}, 1)
    events.close()
    del events
    # pytest's own output may be a larger file than the limit.
    no_larger_file(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert capfd.readouterr().err == ""


def test_the_best_weights_are_those_of_the_lowest_loss_after_a_resume_too(tmp_path):
    model = nn.Linear(1, 1, bias=False)

    def best_of(best: BestCheckpoint, losses: dict[int, float]) -> tuple[int, float]:
        """Offers weights equal to their step's number; returns the kept step and its weight."""
        for step, loss in losses.items():
            with torch.no_grad():
                model.weight.fill_(step)
            best.offer(step, loss)
        cached = {"model.weight": torch.zeros(1, 1)}
        return checkpoint.load_state(tmp_path / "best", cached)["step"], cached[
            "model.weight"
        ].item()

    assert best_of(
        BestCheckpoint(tmp_path / "best", model), {1: 3.0, 2: 1.0, 3: 2.0, 4: math.nan}
    ) == (2, 2.0)
    resumed = BestCheckpoint(tmp_path / "best", model)
    assert best_of(resumed, {5: 1.5}) == (2, 2.0)
    assert best_of(resumed, {6: 0.5, 7: 0.7}) == (6, 6.0)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        (0.2, "0 seconds"),
        (119, "119 seconds"),
        (121, "2 minutes"),
        (7199, "120 minutes"),
        (7201, "2 hours"),
        (1e7, "2,778 hours"),
    ],
)
def test_a_duration_is_given_in_the_unit_that_suits_it(seconds, message):
    assert format_duration(seconds) == message


def test_numbers_that_are_not_finite_are_left_out_of_a_line(tmp_path):
    passed_on = []
    writer = MetricsWriter(TrainConfig(folder=str(tmp_path)), passed_on.append)
    writer.write({"step": 1, "loss": math.nan, "lr": 0.5, "grad_norm": math.inf})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "lr": 0.5}\n'
    assert passed_on == [{"step": 1, "lr": 0.5}]


@pytest.mark.parametrize(
    ("options", "interval"),
    [
        ({"steps": 1000}, 100),
        ({"steps": 1001}, 101),
        ({"steps": 30}, 10),
        ({"steps": 30, "validate_every": 3}, 3),
        ({"steps": 30, "validate_every": 0}, 0),
        ({"steps": 1000, "needles": NeedleConfig()}, 0),
    ],
)
def test_a_run_is_validated_ten_times_unless_it_is_short_or_of_needles(options, interval):
    assert validation_interval(TrainConfig(**options)) == interval
