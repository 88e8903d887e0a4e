"""Tests devices, dtypes, seeds, ranks, threads, the clock and the log line."""

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual import runtime


def test_device_by_name() -> None:
    assert runtime.device("cpu") == torch.device("cpu")
    assert runtime.device("meta") == torch.device("meta")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert runtime.device().type == (accelerator.type if accelerator is not None else "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpu please", "expected auto, cpu"), ("xpu", "expected one that is here")],
)
def test_device_that_is_not_here(name: str, message: str) -> None:
    if name == "xpu" and torch.xpu.is_available():
        name = "hpu"
    with pytest.raises(ValueError, match=message):
        runtime.device(name)


def test_dtype_by_name() -> None:
    assert runtime.dtype("float32") is torch.float32
    assert runtime.dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="expected float32 or bfloat16"):
        runtime.dtype("bfloat")


def test_a_seed_repeats_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    runtime.seed_everything(7)
    first = draw()
    runtime.seed_everything(7)
    assert draw() == first
    runtime.seed_everything(8)
    assert draw() != first
    for bad in (-1, 2**32):
        with pytest.raises(ValueError, match=r"expected 0 <= seed < 2\*\*32"):
            runtime.seed_everything(bad)


def test_ranks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert runtime.ranks() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert runtime.ranks() == (1, 4)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ValueError, match="expected 0 <= RANK < WORLD_SIZE"):
        runtime.ranks()


def test_threads_reach_torch_and_children(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runtime.threads(2)
    assert torch.get_num_threads() == 2
    assert os.environ["OMP_NUM_THREADS"] == "2"
    torch.set_num_threads(before)
    with pytest.raises(ValueError, match="expected at least 1"):
        runtime.threads(0)


def test_one_thread_ends_also_where_something_fails() -> None:
    before = torch.get_num_threads()

    @runtime.one_thread()
    def failing() -> None:
        assert torch.get_num_threads() == 1
        raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert torch.get_num_threads() == before


def test_one_thread_is_given_back_by_whoever_leaves_last() -> None:
    before = torch.get_num_threads()
    started = threading.Event()
    ended = threading.Event()

    def other() -> None:
        with runtime.one_thread():
            started.set()
            ended.wait(10)

    thread = threading.Thread(target=other)
    with runtime.one_thread():
        thread.start()
        started.wait(10)
    assert torch.get_num_threads() == before
    with runtime.one_thread():
        ended.set()
        thread.join()
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_the_clock_only_goes_on() -> None:
    clock = runtime.Clock()
    laps = [clock.lap() for _ in range(3)]
    assert all(lap >= 0 for lap in laps)
    assert clock.seconds >= sum(laps) * (1 - 1e-9)


def test_log_is_one_plain_line_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "loss [bold]3.2[/bold] " + "x" * 200
    runtime.log(line)
    caught = capsys.readouterr()
    assert caught.err == line + "\n"
    assert caught.out == ""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    runtime.log(line)
    assert capsys.readouterr().err == ""


def test_cores_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert runtime.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert runtime.cores() == 1


ELSEWHERE = """
import contextlib, os, sys
with contextlib.suppress(ImportError):
    import psutil  # another library's code for this very system
sys.path.insert(0, sys.argv[1])
for module in ("fcntl", "resource", "grp", "pwd"):
    sys.modules[module] = None
absent = ("pread", "pwrite", "posix_fadvise", "sched_", "fork", "getuid", "nice", "RWF_")
for name in dir(os):
    if name.startswith((*absent, "O_NONBLOCK")):
        delattr(os, name)
stat = os.stat

def without_shm(path, *rest, **options):
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith("/dev/"):
        raise FileNotFoundError(2, "No such file or directory", path)
    return stat(path, *rest, **options)

os.stat = without_shm
"""
EXTRAS = {
    "datasets",
    "fastapi",
    "llguidance",
    "lm_eval",
    "matplotlib",
    "olmo_core",
    "peft",
    "prometheus_client",
    "pyarrow",
    "starlette",
    "tensorboard",
    "triton",
}


def elsewhere(code: str, *words: str) -> str:
    """Runs Python code without the functions that Windows and macOS lack.

    Returns what the code prints.
    """
    root = str(Path(runtime.__file__).parents[1])
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "RORQUAL_KERNELS": "row_adam=reference"}
    command = [sys.executable, "-c", ELSEWHERE + code, root, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_every_module_imports_on_systems_without_posix() -> None:
    code = f"""
import importlib, pkgutil, rorqual
for found in pkgutil.walk_packages(rorqual.__path__, "rorqual."):
    try:
        importlib.import_module(found.name)
        print(found.name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {EXTRAS!r}:
            raise
"""
    text = elsewhere(code).split()
    assert {"rorqual.train.trainer", "rorqual.tables.placement", "rorqual.experiments.runs"} <= set(
        text
    )


@pytest.mark.slow
def test_a_model_trains_and_generates_on_systems_without_posix(tmp_path: Path) -> None:
    text = tmp_path / "notes.jsonl"
    lines = [
        json.dumps({"text": f"The whale number {n} sings {n * n} songs below the sea."})
        for n in range(200)
    ]
    text.write_text("\n".join(lines), encoding="utf-8")
    code = """
from rorqual.cli.main import main
folder, notes = sys.argv[2:]
size = ["--batch-size", "2", "--seq-len", "16", "--model.vocab-size", "300"]
size += ["--data.cache", folder + "/cache"]
assert main(["--help"]) == 0
assert main(["doctor"]) in (0, 1)
run = folder + "/run"
words = ["train", "tiny", "--data", notes, "--steps", "2", "--folder", run]
words += ["--placement", "disk", "--model.engram.layers", "1"]
assert main([*words, *size]) == 0
assert main(["generate", run, "The whale", "--max-new-tokens", "3", "--placement", "disk"]) == 0
print("well")
"""
    assert elsewhere(code, str(tmp_path), str(text)).endswith("well\n")
