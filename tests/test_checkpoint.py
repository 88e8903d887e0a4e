"""Tests checkpoint.py: exact round trips, named damage, no executed code, no loss after a kill."""

import functools
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual import config as configs
from rorqual.checkpoint import (
    DIGEST,
    Damaged,
    decode,
    describe_model,
    encode,
    is_run,
    latest,
    load_model,
    load_state,
    read_config,
    recover,
    save_model,
    save_state,
    steps,
    verify,
)
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.tables import TableConfig


def some_tensors() -> dict[str, torch.Tensor]:
    tied = torch.randn(7, 5)
    return {
        "model.weight": tied,
        "model.tied": tied,
        "model.view": torch.zeros(()).view(1),
        "model.transposed": torch.randn(6, 4).t(),
        "model.count": torch.arange(9, dtype=torch.int32),
        "optim.step": torch.tensor([3.0]),
        "half": torch.randn(3, 3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 99) for name, tensor in tensors.items()}


def test_tensors_and_values_come_back_to_the_last_bit(tmp_path):
    tensors = some_tensors()
    values = {
        "step": 10,
        "rng": {"python": random.getstate(), "numpy": np.random.get_state()},
        "loss": [0.1, 1e-300],
    }
    save_state(tmp_path / "step10", tensors, values)
    result = blank(tensors)
    assert encode(load_state(tmp_path / "step10", result)) == encode(values)
    for name, tensor in tensors.items():
        assert torch.equal(result[name], tensor), name
        assert result[name].dtype == tensor.dtype


def test_nothing_pickled_is_written_and_no_debris_stays(tmp_path):
    save_state(tmp_path / "step1", some_tensors(), {})
    suffixes = {path.suffix for path in (tmp_path / "step1").iterdir()}
    assert suffixes == {".json", ".safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["step1"]


def test_saving_again_replaces(tmp_path):
    save_state(tmp_path / "step1", {"a": torch.zeros(3)}, 1)
    save_state(tmp_path / "step1", {"a": torch.ones(3)}, 2)
    results = {"a": torch.zeros(3)}
    assert load_state(tmp_path / "step1", results) == 2
    assert torch.equal(results["a"], torch.ones(3))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_hostile_pickles_in_the_folder_are_never_executed(tmp_path):
    marker = tmp_path / "executed"
    folder = tmp_path / "run" / "step1"
    tensors = some_tensors()
    save_state(folder, tensors, {"step": 1})
    bomb = pickle.dumps(Bomb(marker))
    for name in (
        ".metadata",
        "model_and_optim/.metadata",
        "train/rank0.pt",
        "rank0.pt",
        "model.pt",
        "__0_0.distcp",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bomb)
    assert latest(tmp_path / "run") == folder
    assert load_state(folder, blank(tensors)) == {"step": 1}
    save_state(folder, tensors, {"step": 2})
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()  # the bomb works


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, Path.unlink])
@pytest.mark.parametrize("kind", ["*.safetensors", "rank0.json", DIGEST])
def test_a_damaged_file_is_refused_by_name_and_the_one_before_is_used(
    tmp_path, damage, kind, capsys
):
    for step in (5, 10, 15):
        save_state(tmp_path / f"step{step}", {"a": torch.full((64,), float(step))}, {"step": step})
    victim = next((tmp_path / "step15").glob(kind))
    damage(victim)
    with pytest.raises(Damaged, match=victim.name.replace(".", r"\.")):
        load_state(tmp_path / "step15", {"a": torch.zeros(64)})
    assert latest(tmp_path) == tmp_path / "step10"
    if kind != DIGEST or damage is not Path.unlink:
        assert victim.name in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.weight", "optim.weight.exp_avg_sq", "optim.half"])
def test_latest_passes_over_what_is_not_finite(tmp_path, name, number, capsys):
    for step in (5, 10, 15):
        tensors = {"model.weight": torch.randn(7, 3), "optim.weight.exp_avg_sq": torch.rand(7, 3)}
        tensors |= {
            "optim.half": torch.zeros(5).bfloat16(),
            "optim.updates": torch.arange(4),
            "none": torch.zeros(0),
        }
        if step == 15:
            tensors[name].view(-1)[-1] = number
        save_state(tmp_path / f"step{step}", tensors, {"step": step})
    assert latest(tmp_path) == tmp_path / "step10"
    message = capsys.readouterr().err.replace("\n", " ")
    assert (
        f"got {name} with NaN or infinite numbers" in message
        and "trying the checkpoint before it" in message
    )


def test_when_none_is_finite_training_does_not_silently_start_again(tmp_path):
    save_state(tmp_path / "step1", {"a": torch.tensor([1.0, torch.nan])}, {})
    with pytest.raises(Damaged, match="every checkpoint is damaged"):
        latest(tmp_path)


def test_a_full_disk_is_an_oserror_and_leaves_the_checkpoint_before(tmp_path, no_larger_file):
    """Also of the same name: a checkpoint is replaced by a complete one, or not at all."""
    tensors = {"a": torch.randn(40_000), "b": torch.zeros(3)}
    save_state(tmp_path / "step1", tensors, {"step": 1})
    no_larger_file(100_000)
    for name in ("step1", "step2"):
        with pytest.raises(OSError, match=rf"File too large: .*{name}") as caught:
            save_state(
                tmp_path / name, {"a": torch.zeros(40_000), "b": torch.zeros(3)}, {"step": 2}
            )
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step1"]
    result = blank(tensors)
    assert load_state(latest(tmp_path), result) == {"step": 1}
    assert torch.equal(result["a"], tensors["a"])


def test_a_model_that_does_not_fit_leaves_the_one_before(tmp_path, no_larger_file):
    model = LanguageModel(tiny(), seed=1)
    save_model(tmp_path, model)
    no_larger_file(2000)
    with pytest.raises(OSError, match=r"File too large: .*model\.safetensors") as caught:
        save_model(tmp_path, LanguageModel(tiny(), seed=2))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_model(tmp_path).head.weight, model.head.weight)


def test_a_flip_anywhere_in_the_digest_is_noticed_or_harmless(tmp_path):
    save_state(tmp_path / "step1", {"a": torch.ones(4)}, {"step": 1})
    path = tmp_path / "step1" / DIGEST
    whole = path.read_bytes()
    for start in range(0, len(whole), 7):
        data = bytearray(whole)
        data[start] ^= 1
        path.write_bytes(data)
        try:
            verify(tmp_path / "step1")
        except Damaged:
            continue
        assert json.loads(data)["files"] == json.loads(whole)["files"]


def test_when_all_are_damaged_training_does_not_silently_start_again(tmp_path):
    assert latest(tmp_path) is None
    save_state(tmp_path / "step1", {"a": torch.ones(4)}, {})
    damage_truncate(next((tmp_path / "step1").glob("*.safetensors")))
    with pytest.raises(Damaged, match="every checkpoint is damaged"):
        latest(tmp_path)


def test_a_stranger_among_the_tensors_is_refused(tmp_path):
    save_state(tmp_path / "step1", {"a": torch.ones(4)}, {})
    source = next((tmp_path / "step1").glob("*.safetensors"))
    (tmp_path / "step1" / "more.safetensors").write_bytes(source.read_bytes())
    with pytest.raises(Damaged, match=r"more\.safetensors"):
        verify(tmp_path / "step1")


def test_other_names_or_shapes_are_refused_before_anything_is_read(tmp_path):
    save_state(tmp_path / "step1", {"a": torch.ones(4), "b": torch.ones(2)}, {})
    for asked, text in (
        ({"a": torch.zeros(4)}, "'b'"),
        ({"a": torch.zeros(4), "c": torch.zeros(2)}, "'c'"),
    ):
        with pytest.raises(ValueError, match=text):
            load_state(tmp_path / "step1", asked)
        assert not asked["a"].any()
    with pytest.raises(ValueError, match=r"'b' of shape \(2,\), expected \(3,\)"):
        load_state(tmp_path / "step1", {"a": torch.zeros(4), "b": torch.zeros(3)})


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 100, 20):
        save_state(tmp_path / f"step{step}", {"a": torch.ones(1)}, {})
    (tmp_path / "step7").mkdir()
    (tmp_path / "stepping").mkdir()
    assert [step for step, _ in steps(tmp_path)] == [9, 20, 100]


def test_recover_puts_back_what_a_kill_left_between_two_renames(tmp_path):
    save_state(tmp_path / "step1", {"a": torch.ones(1)}, 1)
    (tmp_path / "step1").rename(tmp_path / "step1.replaced")
    (tmp_path / "step2.partial").mkdir()
    recover(tmp_path)
    assert load_state(tmp_path / "step1", {"a": torch.zeros(1)}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step1"]


def test_a_stop_before_any_rename_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """During a replacement the old one or the new one exists, whichever rename did not happen."""
    for renames in itertools.count():
        folder = tmp_path / str(renames) / "step1"
        stopped = False
        save_state(folder, {"a": torch.full((3,), 1.0)}, 1)
        with monkeypatch.context() as patch:
            stop_before_rename(renames, patch)
            try:
                save_state(folder, {"a": torch.full((3,), 2.0)}, 2)
            except KeyboardInterrupt:
                stopped = True
        recover(folder.parent)
        stored = {"a": torch.zeros(3)}
        value = load_state(folder, stored)
        assert stored["a"].tolist() == [value] * 3
        if not stopped:
            break
    assert renames > 0
    assert value == 2


def stop_before_rename(number: int, patch: pytest.MonkeyPatch) -> None:
    """Prevents rename `number`, counted from 0, and everything after it."""
    made = []

    def rename(source, target, *, real) -> None:
        if len(made) == number:
            raise KeyboardInterrupt
        made.append(target)
        real(source, target)

    for name in ("rename", "replace"):
        patch.setattr(os, name, functools.partial(rename, real=getattr(os, name)))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=12,
)


@given(plain)
@settings(max_examples=60, deadline=None)
def test_encode_survives_json(value):
    assert decode(json.loads(json.dumps(encode(value)))) == value


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "uint32"])
def test_encode_keeps_arrays_and_tensors(dtype):
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    content = decode(json.loads(json.dumps(encode({"a": array}))))["a"]
    assert content.dtype == array.dtype
    assert np.array_equal(content, array)
    state = decode(encode(torch.get_rng_state()))
    assert torch.equal(state, torch.get_rng_state())


def test_encode_refuses_objects_and_decode_makes_none():
    with pytest.raises(ValueError, match="object"):
        encode({"a": object()})
    with pytest.raises(ValueError, match="expected map"):
        decode({"": "pickle", "value": ""})
    with pytest.raises(ValueError, match="OBJECT"):
        decode({"": "array", "dtype": "O", "shape": [1], "data": "AAAAAAAAAAA="})


def tiny(**changes) -> ModelConfig:
    return ModelConfig(vocab_size=50, dim=16, layers=1, dense_width=24, **changes)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_folder_comes_back(tmp_path, tied):
    model = LanguageModel(tiny(tied=tied), seed=3).eval()
    save_model(tmp_path, model)
    result = load_model(tmp_path)
    ids = torch.arange(12).view(2, 6)
    assert result.config == model.config
    assert not result.training
    assert torch.equal(result(ids), model(ids))
    assert (result.head.weight is result.embed.weight) == tied
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json and no model\.safetensors"):
        load_model(tmp_path)
    save_model(tmp_path, LanguageModel(tiny()))
    config = json.loads((tmp_path / "config.json").read_text()) | {"dim": 24}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "where", [{"placement": "host"}, {"placement": "disk"}, {"folder": "rows"}]
)
def test_tables_elsewhere_are_refused_for_a_model_without_any(tmp_path, where):
    save_model(tmp_path, LanguageModel(tiny()))
    with pytest.raises(ValueError, match="for a model without Engram, expected none"):
        load_model(tmp_path, tables=TableConfig(**where))
    assert load_model(tmp_path, tables=TableConfig()).config == tiny()


SIZES = {
    "layers": (10_000_000, "layers: got 10000000, expected 2"),
    "mtp.depth": (10_000_000, r"mtp\.depth: got 10000000, expected 1"),
    "vocab_size": (10**9, "vocab_size: got 1000000000, expected 50"),
    "dim": (10**7, "dim: got 10000000, expected 16"),
    "dense_width": (10**12, "dense_width: got 1000000000000, expected 24"),
    "moe.routed": (10**9, r"moe\.routed: got 1000000000, expected 4"),
    "moe.width": (10**12, r"moe\.width: got 1000000000000, expected 8"),
    "moe.shared": (10**9, r"moe\.shared.* got 8000000000, expected 8"),
    "mla.heads": (10**9, r"mla\.heads .* got 16000000000, expected 64"),
    "hyper.streams": (10**9, r"hyper\.streams .* got 16000000000, expected 32"),
    "engram.heads": (10**6, r"engram\.heads: got 1000000, expected 2"),
    "engram.rows_per_head": ((11, 10**15), r"engram\.rows_per_head: got .* expected 60"),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_not_the_weights_is_refused_before_anything_is_built(
    name, tmp_path, monkeypatch
):
    """Without the check, `layers: 10000000` took 45 s and 8 GB."""
    parts = {
        "moe": MoEConfig(routed=4, active=2, width=8, first_dense=1),
        "engram": EngramConfig(layers=(0,), rows_per_head=(11, 11), heads=2, head_dim=4),
        "hyper": HyperConfig(streams=2, iterations=1),
        "mtp": MTPConfig(),
    }
    save_model(tmp_path, LanguageModel(replace(tiny(), layers=2, **parts)))
    load_model(tmp_path)
    monkeypatch.setattr(LanguageModel, "__init__", lambda *_, **__: pytest.fail("a model is built"))
    size, words = SIZES[name]
    description = json.loads((tmp_path / "config.json").read_text())
    offset, *fields = description, *name.split(".")
    for field in fields[:-1]:
        offset = offset[field]
    offset[fields[-1]] = size
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=words) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_held_against_its_config_too(tmp_path, monkeypatch):
    model = LanguageModel(tiny())
    describe_model(tmp_path, model.config)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_state(tmp_path / "checkpoints" / "step5", state, {})
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(load_model(tmp_path)(ids), model.eval()(ids))
    description = json.loads((tmp_path / "config.json").read_text()) | {"layers": 10_000_000}
    (tmp_path / "config.json").write_text(json.dumps(description))
    monkeypatch.setattr(LanguageModel, "__init__", lambda *_, **__: pytest.fail("a model is built"))
    with pytest.raises(ValueError, match="layers: got 10000000, expected 1"):
        load_model(tmp_path)


def test_the_best_weights_are_read_where_no_other_checkpoint_is_good(tmp_path, capsys):
    model = LanguageModel(tiny())
    describe_model(tmp_path, model.config)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_state(tmp_path / "checkpoints" / "best", state, {"step": 3, "validation_loss": 2.5})
    save_state(
        tmp_path / "checkpoints" / "step5", {**state, "optim": torch.tensor([torch.nan])}, {}
    )
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(load_model(tmp_path)(ids), model.eval()(ids))
    assert "the best checkpoint, read at step 3" in capsys.readouterr().err.replace("\n", " ")


def test_torn_weights_are_named(tmp_path):
    save_model(tmp_path, LanguageModel(tiny()))
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(Damaged, match=r"model\.safetensors: got a torn file"):
            load_model(tmp_path)


def test_the_weights_are_as_open_as_other_files(tmp_path):
    for mask in (0o022, 0o007, 0o077):
        before = os.umask(mask)
        try:
            save_model(tmp_path, LanguageModel(tiny()))
        finally:
            os.umask(before)
        assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_only_the_expected_warning_is_kept_back(tmp_path, monkeypatch, recwarn):
    save_state(tmp_path / "step1", {"a": torch.ones(2)}, {})
    load_state(tmp_path / "step1", {"a": torch.ones(2)})
    assert not recwarn.list
    monkeypatch.setattr(
        "rorqual.checkpoint.save",
        lambda *args, **options: warnings.warn("precision is lost", stacklevel=1),
    )
    with pytest.warns(UserWarning, match="precision is lost"):
        save_state(tmp_path / "step2", {"a": torch.ones(2)}, {})


@pytest.mark.slow
def test_kills_lose_nothing():
    """Runs a tenth of the soak in benchmarks/kills.py.

    Every checkpoint that was reported as saved is complete.
    """
    script = Path(__file__).parents[1] / "benchmarks" / "kills.py"
    command = [sys.executable, script, "--kills", "10", "--json"]
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["kills"] == 10
    assert result["lost"] == 0
    assert result["mid_write"] >= 1, (
        "no kill met a checkpoint being written: the test would prove nothing"
    )


def test_a_run_says_what_it_is_and_older_ones_are_read(tmp_path: Path) -> None:
    model = LanguageModel(tiny())
    save_model(tmp_path, model)
    message = json.loads((tmp_path / "config.json").read_text())
    assert (message.pop("model_type"), message.pop("architectures")) == (
        "rorqual",
        ["RorqualForCausalLM"],
    )
    assert is_run(tmp_path) and read_config(tmp_path) == model.config
    assert message == configs.to_dict(model.config)
    configs.save(model.config, tmp_path / "config.json")  # the format of older runs
    assert is_run(tmp_path) and load_model(tmp_path).config == model.config
    for text, reason in (
        ({"model_type": "deepseek_v3"}, "got model_type 'deepseek_v3', expected a rorqual run"),
        (message | {"layer": 3}, "did you mean 'layers'"),
        ([], "got list, expected a JSON object"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(text))
        with pytest.raises(ValueError, match=f"config.json: .*{reason}"):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rorqual", "shape": message}))
    assert not is_run(tmp_path) and read_config(tmp_path) == model.config
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    assert not is_run(tmp_path)
