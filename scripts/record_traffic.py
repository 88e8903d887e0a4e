"""Records what `rorqual plan --simulate` replays: expert loads and distinct n-grams of a run.

    rorqual train tiny model.engram=default --folder runs/traffic --steps 300 --batch-size 8
    python scripts/record_traffic.py runs/traffic rorqual/experiments/traffic.json

Loads are those of held-out batches, each block and batch by itself: the shares of its experts over
the even share, sorted. N-grams are those of the run's training text in canonical ids, counted in
windows of 256 tokens and on, each twice as long as the one before.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from rorqual import config as configs
from rorqual.analyze.measures import expert_load
from rorqual.data.stream import validation_batches
from rorqual.io import write_text
from rorqual.serve.generate import load
from rorqual.train.config import TrainConfig
from rorqual.train.source import prepare

BATCHES = 12
BATCH = (16, 256)  # sequences, tokens
FIRST = 256  # tokens of the shortest window
SAMPLES = 6  # windows of each length
ORDERS = (2, 3, 4)


def distinct(ids: np.ndarray, order: int) -> int:
    """Counts the distinct n-grams of a sequence of ids."""
    grams = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64), order)
    keys = np.zeros(len(grams), dtype=np.int64)
    for column in range(order):
        keys = keys * (int(ids.max()) + 1) + grams[:, column]
    return len(np.unique(keys))


def main(run: str, out: str) -> None:
    model = load(run).model
    config = configs.load(TrainConfig, Path(run) / "train.json")
    source = prepare(configs.replace(config.data, "tokenizer", run))
    loads = []
    batches = validation_batches(source.tokens.validation, *BATCH)
    for batch, _ in zip(batches, range(BATCHES), strict=False):
        with torch.no_grad():
            counts = expert_load(model, [batch["ids"]]).counts.double()
        for shares in (counts / counts.mean(1, keepdim=True)).tolist():
            loads.append([round(share, 3) for share in sorted(shares, reverse=True)])
    ids = source.canonical_map()[np.asarray(source.tokens.train.ids[:])]
    lengths = [FIRST << n for n in range(40) if SAMPLES * (FIRST << n) <= len(ids)]
    starts = np.linspace(0, len(ids) - lengths[-1], SAMPLES).astype(int)
    curves = [
        [[distinct(ids[start : start + length], order) for length in lengths] for start in starts]
        for order in ORDERS
    ]
    about = (
        f"{len(loads)} batches of expert loads ({counts.shape[1]} experts, step "
        f"{config.steps:,}) and n-grams of {source.tokens.about['name']} "
        f"(vocabulary {source.vocab_size:,})"
    )
    content = {"about": about, "loads": loads, "tokens": lengths, "distinct": curves}
    write_text(Path(out), json.dumps(content) + "\n")
    print(f"{out}: {about}, {Path(out).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
