"""Measures what the trainer adds to bare steps: forward, backward, clip and optimizer.

    python benchmarks/trainer.py --preset tiny --steps 60

Both train equal models on equal batches, by turns, a step each, in one process: a bare step runs
between two steps of the trainer, whose time is all that passes in its loop: data, metrics, checks,
tensorboard, signals. Validations and checkpoints are left out (`--validate-every`, `--save-every`
are a user's choice). The first steps are not counted.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

# OLMo-core sets the number of threads to 8 when it is imported without one.
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
os.environ.setdefault("OLMO_SHARED_FS", "1")

from olmo_core.train.callbacks import Callback

from rorqual import runtime
from rorqual.model import LanguageModel
from rorqual.presets import preset
from rorqual.train import engine, metrics
from rorqual.train.config import DataConfig, TrainConfig, recipe
from rorqual.train.optim import Optimizer
from rorqual.train.source import open_source
from rorqual.train.step import TrainStep

SKIPPED = 5  # steps at the start, in which memory is allocated and kernels are compiled


Seconds = tuple[float, float]


def clocks() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(before: Seconds) -> Seconds:
    now = clocks()
    return now[0] - before[0], now[1] - before[1]


class BareSteps(Callback):
    """Runs a bare step before each step of the trainer, and records the seconds of both.

    Seconds are pairs: by the clock, and of the CPU in all threads of this process.
    """

    def __init__(self, model: LanguageModel, optimizer: Optimizer, batches: Any) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.batches = batches
        self.bare: list[Seconds] = []
        self.trainer_seconds: list[Seconds] = []
        self._ended: Seconds | None = None

    def pre_load_batch(self) -> None:
        if self._ended is not None:
            self.trainer_seconds.append(since(self._ended))
        batch = next(self.batches)
        began = clocks()
        self.optimizer.begin_step()
        loss = self.model.loss(batch["ids"], batch["labels"], document_ids=batch["document_ids"])
        loss.total.backward()
        self.optimizer.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.bare.append(since(began))
        self._ended = clocks()


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads is not None:
        runtime.threads(options.threads)
    shape = preset(options.preset)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=shape,
            optim=recipe(shape.dim),
            data=DataConfig(cache="runs/cache"),
            folder=str(Path(folder) / "run"),
            steps=options.steps,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            save_every=10**6,
            device="cpu",
        )
        Path(config.folder).mkdir()
        source = open_source(config)
        canonical_map = None
        if shape.engram is not None and shape.engram.canonical:
            canonical_map = torch.from_numpy(source.canonical_map())
        made = []
        for _ in range(2):
            model = LanguageModel(shape, canonical_map, seed=0).train()
            made.append((model, Optimizer(model, config.optim)))
        writer = metrics.MetricsWriter(config)
        bare = BareSteps(*made[0], source.stream(config))
        loader = engine.Loader(source.stream(config), Path(config.folder), source.vocab_size)
        callbacks = {"metrics": engine.MetricsCallback(writer), "bare": bare}
        engine.fit(TrainStep(*made[1], config), loader, callbacks)
    alone = bare.bare[SKIPPED : len(bare.trainer_seconds)]
    whole = bare.trainer_seconds[SKIPPED:]
    result: dict[str, Any] = {"preset": options.preset, "steps": len(whole)}
    for index, kind in enumerate(("clock", "cpu")):
        bare_seconds, trainer_seconds = ([each[index] for each in one] for one in (alone, whole))
        ratios = [one / other for one, other in zip(trainer_seconds, bare_seconds, strict=True)]
        result |= {
            f"{kind}_bare_ms": round(1000 * statistics.median(bare_seconds), 2),
            f"{kind}_trainer_ms": round(1000 * statistics.median(trainer_seconds), 2),
            f"{kind}_ratio_of_medians": round(
                statistics.median(trainer_seconds) / statistics.median(bare_seconds), 4
            ),
            f"{kind}_median_of_ratios": round(statistics.median(ratios), 4),
        }
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:22} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
