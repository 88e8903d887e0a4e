"""Tests that an option of another tool gets our name, which exists."""

import dataclasses
import inspect

import pytest

from rorqual import config
from rorqual.cli import bench, infer, table, train
from rorqual.cli import inspect as cli_inspect
from rorqual.cli.other_names import COUNTED_OTHERWISE, ELSEWHERE, NOTES
from rorqual.cli.parse import UsageError, parse
from rorqual.experiments.plan import PlanConfig
from rorqual.train.config import TrainConfig


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "32"], "got --rows, which rorqual train calls --batch-size"),
        (
            ["--train_batch_size=32"],
            "got --train-batch-size, which rorqual train calls --batch-size",
        ),
        (["rows=32"], "got --rows, which rorqual train calls --batch-size"),
        (
            ["--epochs", "3"],
            "calls --steps; steps = epochs * tokens of the text / (--batch-size * --seq-len)",
        ),
        (
            ["--gradient-accumulation-steps", "4"],
            "calls --micro-batch-size; steps of accumulation = --batch-size / (ranks",
        ),
        (["--learning-rate", "1e-3"], "calls --optim.lr"),
        (["--lr", "1e-3"], "calls --optim.lr"),
        (["--max-steps", "5"], "calls --steps"),
        (["--block-size", "64"], "calls --seq-len"),
        (["--max-length", "64"], "calls --seq-len"),
        (["--output-dir", "y"], "calls --folder"),
    ],
)
def test_a_flag_of_another_tool_gets_ours(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(TrainConfig(), words, "train PRESET")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_name_of_ours_is_an_option_of_a_command() -> None:
    classes = [TrainConfig, PlanConfig] + [
        value
        for module in (bench, cli_inspect, infer, table, train)
        for value in vars(module).values()
        if inspect.isclass(value) and dataclasses.is_dataclass(value)
    ]
    names = {option.name.replace("_", "-") for each in classes for option in config.options(each)}
    assert {name for ours in ELSEWHERE.values() for name in ours} <= names | {"data"}
    assert NOTES.keys() == {ELSEWHERE[flag][0] for flag in COUNTED_OTHERWISE}
