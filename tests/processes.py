"""Runs a test file as the ranks of a gloo group, which are forked from one process.

run_script     in a test: runs its file as a script, which calls `fork_ranks`
fork_ranks     in the script: runs a function as every rank
"""

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed import TCPStore

from rorqual import distributed


def write_text(folder: Path) -> Path:
    """Writes FOLDER/text.jsonl, 300 short documents."""
    lines = (
        json.dumps({"text": f"The {n}th whale met {n % 7} seals and {n % 5} boats."})
        for n in range(300)
    )
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run_script(file: str, *arguments: object, shapes: bool = True) -> None:
    """Runs a file with arguments; AssertionError, with what it wrote last, where it fails.

    Without `shapes`, shapes are not checked, which takes longer than small models do.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    if not shapes:
        environment["RORQUAL_SHAPES"] = "0"
    done = subprocess.run(
        [sys.executable, file, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]


def fork_ranks(ranks: int, work: Callable[[], object], seconds: int = 300) -> None:
    """Runs `work` as each of so many ranks; SystemExit where one fails.

    It fails after `seconds`, too.
    """
    # The ranks are clients of a store of this process, as under torchrun. A port that was free a
    # moment ago may be taken when rank 0 opens it. The store has a thread, so it starts behind the
    # forks: a lock that a thread holds in a fork stays locked in the child. Until then the ranks
    # wait in the queue of the socket.
    listener = socket.create_server(("127.0.0.1", 0), backlog=ranks)
    port = listener.getsockname()[1]
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "GLOO_SOCKET_IFNAME": "lo",
            }
            _be_rank(work, seconds)
        children.append(child)
    store = TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    codes = [os.waitpid(child, 0)[1] for child in children]
    del store
    if any(codes):
        raise SystemExit(1)


def _be_rank(work: Callable[[], object], seconds: int) -> None:
    """Exits without cleanup; a rank that fails ends the others, which would wait for it."""
    try:
        # It writes where every thread waits.
        faulthandler.dump_traceback_later(seconds, exit=True)
        distributed.join(torch.device("cpu"))
        work()
        distributed.leave()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os.killpg(0, signal.SIGKILL)
    os._exit(0)
