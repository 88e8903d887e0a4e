"""Kills a process that writes checkpoints at random moments, and counts what is lost (nothing).

    python benchmarks/kills.py --kills 100

After every kill the newest good checkpoint must be at least the last one reported as saved, and all
of one step.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from rorqual.checkpoint import latest, load_state, recover, save_state, steps

NAMES = [f"layer{i}.weight" for i in range(8)]


def tensors(step: int) -> dict[str, torch.Tensor]:
    """Returns 8 tensors of 128 KiB, filled with the number of the step."""
    return {name: torch.full((128, 256), float(step)) for name in NAMES}


def write_forever(folder: str, step: int, reports: Connection) -> None:
    """Saves one step after the other and reports each once it is safe."""
    recover(folder)
    while True:
        step += 1
        save_state(Path(folder) / f"step{step}", tensors(step), {"step": step})
        reports.send(step)
        for _, old in steps(folder)[:-3]:
            _drop(old)


def _drop(folder: Path) -> None:
    """Deletes a checkpoint, its digest first, as the trainer does.

    Without its digest a half deleted folder is no checkpoint.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name != "digest.json"):
        path.unlink()
    folder.rmdir()


def one_kill(context, folder: str, step: int, rng: random.Random) -> tuple[int, bool]:
    """Starts a writer and kills it.

    Returns the last step that it reported, and whether the kill interrupted a write.
    """
    reports, sink = context.Pipe(duplex=False)
    process = context.Process(target=write_forever, args=(folder, step, sink))
    process.start()
    sink.close()
    # The first report shows that the writer is at work.
    reported = reports.recv()
    time.sleep(rng.uniform(0.0, 0.1))
    process.kill()
    process.join()
    try:
        while True:
            reported = reports.recv()
    except (EOFError, OSError):
        return reported, bool(list(Path(folder).glob("*.partial")))


def check(folder: str, reported: int) -> int:
    """Returns the step of the newest checkpoint.

    AssertionError if anything that was reported is lost or mixed.
    """
    result = latest(folder)
    assert result is not None, "no checkpoint survived"
    state = {name: torch.zeros(128, 256) for name in NAMES}
    step = load_state(result, state)["step"]
    assert step >= reported, f"step {reported} was reported, {step} is the newest"
    assert all(bool((tensor == step).all()) for tensor in state.values()), f"{result} mixes steps"
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rorqual.checkpoint"])
    rng = random.Random(options.seed)
    step = 0
    lost = 0
    mid_write = 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.kills):
            reported, during = one_kill(context, folder, step, rng)
            mid_write += during
            try:
                step = check(folder, reported)
            except (AssertionError, ValueError) as error:
                lost = lost + 1
                step = reported
                print(f"lost: {error}")
    seconds = time.perf_counter() - began
    result = {
        "kills": options.kills,
        "mid_write": mid_write,
        "saved": step,
        "lost": lost,
        "seconds": round(seconds, 1),
    }
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:10} {value}" for name, value in result.items()))
    raise SystemExit(lost > 0)


if __name__ == "__main__":
    main()
