"""record.py: what is kept of a metrics file, and the arithmetic of validation."""

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from rorqual import checkpoint
from rorqual.data.needle_config import NeedleConfig
from rorqual.data.needles import DEPTHS, TASKS, column, exams
from rorqual.model import LanguageModel, ModelConfig
from rorqual.train.record import Best, Board, answer, duration, trim, validate


def test_trim_keeps_the_steps_made_and_drops_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    trim(path, 3)
    assert not path.exists()
    whole = [{"step": step, "loss": 0.1 * step} for step in range(1, 6)] + [{"step": 3, "validation_loss": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in whole) + '{"step": 2, "lo')
    trim(path, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [whole[0], whole[1], whole[2], whole[5]]


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path):
    """Steps that are repeated stand once, with the later value."""
    for first, values in ((1, (5.0, 4.0, 3.0)), (3, (2.5, 2.0))):
        board = Board(tmp_path, first)
        for step, value in enumerate(values, first):
            board.write({"loss": value, "balance_sequence": value / 7}, step)
        board.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [(1, 5.0), (2, 4.0), (3, 2.5), (4, 2.0)]
    assert shown.Scalars("balance_sequence")[-1].value == pytest.approx(2 / 7)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_tensorboard_is_an_error_where_it_happens(tmp_path, monkeypatch, capfd):
    board = Board(tmp_path, 1)
    board._file.close()
    board._records._writer = board._file = Path("/dev/full").open("wb")  # noqa: SIM115 (the board closes it)
    with pytest.raises(OSError, match="No space left"):
        board.write({"loss": 1.0}, 1)
    board.close()
    del board
    assert capfd.readouterr().err == ""


def test_the_best_weights_are_those_of_the_lowest_loss_after_a_resume_too(tmp_path):
    model = nn.Linear(1, 1, bias=False)

    def best_of(best: Best, losses: dict[int, float]) -> tuple[int, float]:
        """Offers weights that are all the number of their step; the step that is kept, and its weight."""
        for step, loss in losses.items():
            with torch.no_grad():
                model.weight.fill_(step)
            best.offer(step, loss)
        kept = {"model.weight": torch.zeros(1, 1)}
        return checkpoint.load_state(tmp_path / "best", kept)["step"], kept["model.weight"].item()

    assert best_of(Best(tmp_path / "best", model), {1: 3.0, 2: 1.0, 3: 2.0, 4: math.nan}) == (2, 2.0)
    resumed = Best(tmp_path / "best", model)
    assert best_of(resumed, {5: 1.5}) == (2, 2.0)
    assert best_of(resumed, {6: 0.5, 7: 0.7}) == (6, 6.0)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "0 seconds"),
        (119, "119 seconds"),
        (121, "2 minutes"),
        (7199, "120 minutes"),
        (7201, "2 hours"),
        (1e7, "2,778 hours"),
    ],
)
def test_a_duration_is_told_in_the_unit_that_suits_it(seconds, said):
    assert duration(seconds) == said


def batches(ids: torch.Tensor, labels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    whole = {"ids": ids, "labels": labels, "documents": torch.zeros_like(ids)}
    return [{name: tensor[at : at + 1] for name, tensor in whole.items()} for at in range(len(ids))]


def test_validation_is_a_mean_over_tokens_whatever_the_batches():
    model = LanguageModel(ModelConfig(vocabulary=20, dim=16, layers=1, dense_width=24, init_std=0.5))
    ids = torch.randint(0, 20, (3, 9))
    labels = torch.randint(0, 20, (3, 9))
    labels[0, 2:] = -100
    labels[2] = -100
    model.train()
    model.blocks[0].eval()  # a frozen part
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    found = validate(model, batches(ids, labels), 2.5, torch.float32)
    expected = nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert found["validation_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(expected.item() / math.log(2) / 2.5, rel=1e-5)
    assert [module.training for module in model.modules()] == modes and model.training
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="no validation documents"):
        validate(model, [], 1.0, torch.float32)


NEEDLES = NeedleConfig(questions=96)


class Reader(nn.Module):
    """Answers with what `choose` makes of the ids, whatever it was trained on."""

    def __init__(self, choose) -> None:
        super().__init__()
        self.choose, self.unused = choose, nn.Parameter(torch.zeros(1))

    def forward(self, ids: torch.Tensor, *, documents: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(self.choose(ids), NEEDLES.vocabulary).float()


def looked_up(ids: torch.Tensor) -> torch.Tensor:
    """A reader of the language: what first followed the key, or of one key's values those that come next."""
    first, out = 1 + NEEDLES.filler, torch.zeros_like(ids)
    for row, line in enumerate(ids.tolist()):
        text, question = line[: line.index(0)], line[line.index(0) :]
        hidden = [pair for pair in zip(text, text[1:], strict=False) if first <= pair[0] < first + NEEDLES.keys]
        values, key = [], 0
        for place, token in enumerate(question):
            if first <= token < first + NEEDLES.keys:
                key, values = token, [value for k, value in hidden if k == token]
            if values:
                out[row, len(text) + place] = values.pop(0)
        assert key
    return out


def test_a_perfect_reader_finds_everything_and_a_blind_one_what_chance_gives():
    model = Reader(looked_up).train()
    state = torch.get_rng_state()
    found = answer(model, exams(NEEDLES, 16, 64))
    lengths = (32, 64, 128)
    assert {column(task, n) for task in TASKS for n in lengths} | {"accuracy"} == {n for n in found if "part" not in n}
    assert set(found.values()) == {1.0} and {column(t, 64, p) for t in TASKS for p in range(DEPTHS)} <= found.keys()
    assert model.training and torch.equal(torch.get_rng_state(), state)

    generator = torch.Generator().manual_seed(1)
    first = 1 + NEEDLES.filler + NEEDLES.keys
    blind = Reader(lambda ids: torch.randint(first, first + NEEDLES.values, ids.shape, generator=generator))
    found = answer(blind, exams(NEEDLES, 16, 64))
    assert 0.5 / NEEDLES.values < found["accuracy"] < 2 / NEEDLES.values
    assert answer(Reader(torch.zeros_like), exams(NEEDLES, 16, 64))["accuracy"] == 0


def test_a_needle_that_is_found_only_in_the_beginning_shows_in_the_parts():
    def near_the_beginning(ids: torch.Tensor) -> torch.Tensor:
        text = (ids == 0).long().argmax(1, keepdim=True)
        kept = torch.where(torch.arange(ids.shape[1]) * DEPTHS >= text + DEPTHS, ids.clamp_max(1), ids)
        return looked_up(torch.where(torch.arange(ids.shape[1]) >= text, ids, kept))

    singles = {key: made for key, made in exams(NEEDLES, 16, 64).items() if key[0] == "single"}
    found = answer(Reader(near_the_beginning), singles)
    assert found[column("single", 64, 0)] > 0.9 and found[column("single", 64, 3)] == 0
    assert 0 < found[column("single", 64)] < 0.5
