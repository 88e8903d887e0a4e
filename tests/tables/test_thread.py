"""Tests that a background thread runs calls in order, and bounds the calls in flight."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rorqual.tables.thread import BackgroundThread

pytestmark = pytest.mark.engram


def test_calls_are_made_in_order_and_their_errors_are_theirs() -> None:
    thread = BackgroundThread()
    seen = []
    assert not thread.started
    futures = [thread.submit(seen.append, n) for n in range(50)]
    failed = thread.submit(lambda: 1 // 0)
    after = thread.submit(lambda: "on")
    assert after.result() == "on"
    with pytest.raises(ZeroDivisionError):
        failed.result()
    assert seen == list(range(50))
    assert all(future.done() for future in futures)
    thread.close()
    assert not thread.started
    assert thread.submit(lambda: 3).result() == 3
    thread.close()
    thread.close()


def test_one_more_than_there_is_room_for_waits() -> None:
    thread = BackgroundThread(2)
    gate = threading.Event()
    asked = []

    def submit_all() -> None:
        for n in range(3):
            thread.submit(gate.wait)
            asked.append(n)

    asking = threading.Thread(target=submit_all)
    asking.start()
    asking.join(0.2)
    assert asked == [0, 1]
    gate.set()
    asking.join(5)
    assert asked == [0, 1, 2]
    thread.close()


def test_a_call_that_cannot_be_asked_for_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a thread, or after ctrl-C, each call raises an error and none waits forever."""
    thread = BackgroundThread(2)
    with monkeypatch.context() as patch:
        patch.setattr(
            ThreadPoolExecutor,
            "submit",
            lambda *_: (_ for _ in ()).throw(RuntimeError("no thread")),
        )
        for _ in range(3):
            with pytest.raises(RuntimeError, match="no thread"):
                thread.submit(print)
    assert thread.submit(lambda: 3).result() == 3
    thread.close()


def test_who_asks_while_it_closes_has_no_second_thread() -> None:
    thread = BackgroundThread()
    gate = threading.Event()
    seen = []
    thread.submit(gate.wait)
    thread.submit(seen.append, 1)
    closing = threading.Thread(target=thread.close)
    closing.start()
    asking = threading.Thread(target=lambda: thread.submit(seen.append, 2).result())
    asking.start()
    asking.join(0.2)
    assert seen == []
    gate.set()
    for each in (closing, asking):
        each.join(5)
    assert seen == [1, 2]
    thread.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_fork_has_a_thread_of_its_own() -> None:
    """Tests in a process without torch's threads, which a fork may not survive."""
    code = (
        "import os, signal; from rorqual.tables.thread import BackgroundThread; "
        "thread = BackgroundThread(1)\n"
        "thread.submit(int).result(); child = os.fork(); signal.alarm(20)\n"
        "assert [thread.submit(pow, 2, n).result() for n in range(3)] == [1, 2, 4]; "
        "thread.close()\n"
        "assert child == 0 or os.waitpid(child, 0)[1] == 0; os._exit(0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
