"""What benchmarks of several processes share: starting ranks, and a text to train on."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import TCPStore


def start_ranks(
    file: str, ranks: int, arguments: Sequence[str], threads: int = 1
) -> list[subprocess.Popen]:
    """Starts a file as so many gloo ranks, which talk to this process by their pipes.

    `distributed.join` finds the others at a store of this process, as under torchrun.
    """
    # The ranks' store lives as long as this process, and its port is taken by it alone.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _STORES.append(store)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return [
        subprocess.Popen(
            [sys.executable, file, *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


_STORES: list[TCPStore] = []


def run_ranks(file: str, ranks: int, *arguments: str) -> list:
    """Runs a file as so many ranks, and returns what each printed as JSON."""
    processes = start_ranks(file, ranks, arguments)
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed; what it said stands above")
    return [json.loads(output) for output in outputs]


def write_whales(folder: Path, documents: int) -> Path:
    """Writes FOLDER/text.jsonl, so many short documents."""
    lines = (
        json.dumps({"text": f"The {n}th whale met {n % 97} seals, {n % 5} boats and a {n % 11}."})
        for n in range(documents)
    )
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
