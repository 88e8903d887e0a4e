"""Calls -> the same calls, one after another, by a thread behind the caller's back: one for all tables of a model.

At most `room` calls are asked for and not yet done; asking for one more waits.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_ROOM = 16


class BackgroundThread:
    """One thread, begun by the first call, ended by `close` and begun anew by the next, and in a process's fork."""

    def __init__(self, room: int = _ROOM) -> None:
        self._size = room
        self._begin()

    def _begin(self) -> None:
        self._room = threading.BoundedSemaphore(self._size)
        self._lock = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    @property
    def started(self) -> bool:
        """Whether there is a thread."""
        return self._worker is not None

    def submit(self, work: Callable[..., Any], *given: Any) -> "Future[Any]":
        """Asks for a call; waits while there is no room."""
        if self._process != os.getpid():
            self._begin()  # the thread did not come along, nor what it had to do
        self._room.acquire()
        try:
            with self._lock:
                if self._worker is None:
                    self._worker = ThreadPoolExecutor(1, thread_name_prefix="rows")
                future = self._worker.submit(work, *given)
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return future

    def close(self) -> None:
        """Waits for what was asked for and ends the thread; who asks meanwhile waits, so there are never two."""
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            worker, self._worker = self._worker, None
            if worker is not None:
                worker.shutdown()
