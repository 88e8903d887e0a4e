"""Tests that the models of tests/golden/frozen compute what they computed when they were frozen.

scripts/freeze_runs.py has the runs and writes the files.

There are two modes. By default the committed files are compared within the tolerances below, which
another processor needs. With RORQUAL_FROZEN=FOLDER, a folder that `scripts/freeze_runs.py --exact
FOLDER` wrote on this machine before a change, every number is compared bit for bit.

The reason for these tolerances: the files were run again on this machine with SSE instructions
alone in torch, MKL and oneDNN (in place of AVX2), and with kernels in place of the reference.
Losses differed by at most 6e-6 in 20 steps, values of gradients by at most 8e-5 of the gradient's
norm. Models with a mixture of experts are the exception: rounding changes which of two equally good
experts a token takes, and from then on the runs diverge (`tiny` by up to 0.014 nats). Their later
steps are compared within LATER; in the exact mode every step counts.
"""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rorqual.kernels import VARIABLE

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "tests" / "golden" / "frozen"
EXACT = os.environ.get("RORQUAL_FROZEN")
NAMES = sorted(path.stem for path in COMMITTED.glob("*.json"))
MODELS = [name for name in NAMES if name != "tiny"]
KERNELS = ["memory", "nsa", "moba", "dsa"]  # models that kernels are made for

LOSS = 2e-4  # nats
LATER = {"memory": (10, 0.02), "tiny": (4, 0.05)}  # from this step on, nats
GRADIENT = 5e-4  # of the gradient's norm
NOISE = 1e-4  # of the norm of all gradients together: below it, a gradient is rounding
MARGIN = 1e-4  # logits; an id may differ where the best two are closer

spec = importlib.util.spec_from_file_location("freeze_runs", ROOT / "scripts" / "freeze_runs.py")
assert spec is not None and spec.loader is not None
freeze_runs: ModuleType = importlib.util.module_from_spec(spec)
spec.loader.exec_module(freeze_runs)


def frozen(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the configuration of a run, and what it computed."""
    arguments = json.loads((COMMITTED / f"{name}.json").read_text(encoding="utf-8"))["given"]
    folder = COMMITTED if EXACT is None else Path(EXACT)
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    hint = "write it again at the old commit"
    assert content["given"] == arguments, f"{folder} froze another configuration: {hint}"
    return freeze_runs.translated(arguments), content["found"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns all kernels off."""
    monkeypatch.setenv(VARIABLE, "reference")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns kernels on wherever they can run."""
    monkeypatch.delenv(VARIABLE, raising=False)


def same_losses(name: str, got: list[str], expected: list[str], *, exact: bool) -> None:
    if exact:
        assert got == expected
        return
    assert len(got) == len(expected)
    start, later = LATER.get(name, (len(got), LOSS))
    for step, pair in enumerate(zip(got, expected, strict=True)):
        loss, before = map(float.fromhex, pair)
        allowed = LOSS if step < start else later
        assert abs(loss - before) <= allowed, f"step {step + 1}: got {loss:.7f}, was {before:.7f}"


def same_gradients(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(got) == {freeze_runs.renamed(name) for name in expected}
    noise = NOISE * sum(gradient["norm"] ** 2 for gradient in expected.values()) ** 0.5
    for committed, before in expected.items():
        name = freeze_runs.renamed(committed)
        now = got[name]
        if EXACT is not None:
            assert now["sha256"] == before["sha256"], name
            continue
        assert (now["sha256"] is None) == (before["sha256"] is None), name
        allowed = GRADIENT * (before["norm"] + noise)
        assert abs(now["norm"] - before["norm"]) <= allowed, name
        # a sum of many values rounds more
        assert abs(now["sum"] - before["sum"]) <= 20 * allowed, name
        for value, old in zip(now["values"], before["values"], strict=True):
            assert abs(value - old) <= allowed, name


def same_ids(got: list[list[int]], expected: list[list[int]], margins: list[list[float]]) -> None:
    """Compares ids up to the first one whose choice was nearly a tie.

    Behind it a sequence may go on with other ids.
    """
    for row, (ids, before, gaps) in enumerate(zip(got, expected, margins, strict=True)):
        assert len(ids) == len(before)
        index = next(
            (n for n, (new, old) in enumerate(zip(ids, before, strict=True)) if new != old),
            None,
        )
        if index is not None:
            text = f"prompt {row}, id {index}: got {ids[index]}, was {before[index]}"
            assert EXACT is None and gaps[index] < MARGIN, text


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_that_were_frozen(name: str) -> None:
    arguments, before = frozen(name)
    same_losses(name, freeze_runs.losses(arguments), before["losses"], exact=EXACT is not None)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_give_the_frozen_losses(name: str) -> None:
    arguments, before = frozen(name)
    same_losses(name, freeze_runs.losses(arguments), before["losses"], exact=False)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_that_were_frozen(name: str) -> None:
    """Covers packed documents, and plain sequences, where DSA's indexers are in warm-up."""
    arguments, before = frozen(name)
    same_gradients(freeze_runs.gradients(arguments, 0), before["gradients"]["documents"])
    same_gradients(
        freeze_runs.gradients(arguments, 1, indexer_warmup=True), before["gradients"]["plain"]
    )


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_are_those_that_were_frozen(name: str) -> None:
    arguments, before = frozen(name)
    now = freeze_runs.continuations(arguments)
    was = before["greedy"]
    for kind in ("batched", "alone"):
        same_ids(now[kind], was[kind], was["margins"])


@pytest.mark.usefixtures("reference")
def test_the_trainer_gives_the_frozen_losses(tmp_path: Path) -> None:
    arguments, before = frozen("tiny")
    now = freeze_runs.trained(arguments, tmp_path)
    same_losses("tiny", now["losses"], before["losses"], exact=EXACT is not None)
    if EXACT is not None:
        assert now["validation_loss"] == before["validation_loss"]
    else:
        pair = now["validation_loss"], before["validation_loss"]
        assert abs(float.fromhex(pair[0]) - float.fromhex(pair[1])) <= LATER["tiny"][1]


def test_a_frozen_file_commits_every_option(tmp_path: Path) -> None:
    """A later change of a default must not change what was frozen."""
    arguments, _ = frozen("dense_mla")
    del arguments["model"]["mla"]["eps"]
    with pytest.raises(ValueError, match=r"mla\.eps"):
        freeze_runs.build(arguments)


def test_renamed_options_and_parameters_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"model.hyper": "model.hyper_connections", "model.eps": "model.norm_eps", "steps": None}
    monkeypatch.setattr(freeze_runs, "OPTIONS", names)
    monkeypatch.setattr(freeze_runs, "PARAMETERS", {"attention_site": "attention_residual"})
    arguments = {"steps": 3, "model": {"eps": 1e-6, "hyper": {"kind": "mhc"}, "gqa": None}}
    assert freeze_runs.translated(arguments) == {
        "model": {"norm_eps": 1e-6, "hyper_connections": {"kind": "mhc"}, "gqa": None}
    }
    assert freeze_runs.renamed("blocks.0.attention_site.phi") == "blocks.0.attention_residual.phi"
