"""Calls of several tables in -> their results in order, and no more on their way than there is room for."""

import threading

import pytest

from rorqual.storage.stream import Stream

pytestmark = pytest.mark.engram


def test_calls_are_made_in_order_and_their_errors_are_theirs() -> None:
    stream, seen = Stream(), []
    assert not stream.begun
    futures = [stream.put(seen.append, n) for n in range(50)]
    failed = stream.put(lambda: 1 // 0)
    after = stream.put(lambda: "on")
    assert after.result() == "on"
    with pytest.raises(ZeroDivisionError):
        failed.result()
    assert seen == list(range(50))
    assert all(future.done() for future in futures)
    stream.close()
    assert not stream.begun
    assert stream.put(lambda: 3).result() == 3
    stream.close()
    stream.close()


def test_one_more_than_there_is_room_for_waits() -> None:
    stream, gate, asked = Stream(2), threading.Event(), []

    def ask() -> None:
        for n in range(3):
            stream.put(gate.wait)
            asked.append(n)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(0.2)
    assert asked == [0, 1]
    gate.set()
    thread.join(5)
    assert asked == [0, 1, 2]
    stream.close()
