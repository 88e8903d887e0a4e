"""Runs calls in order on one background thread, which all tables of a model share."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_PENDING = 16


class BackgroundThread:
    """Runs calls in order on one thread; `submit` waits while `pending` calls are not done yet.

    The first call starts the thread. The next one after `close`, or in a forked process, starts
    another.
    """

    def __init__(self, pending: int = _PENDING) -> None:
        self._pending = pending
        self._reset()

    def _reset(self) -> None:
        """Starts anew without a thread, as in a process that was forked from another."""
        self._slots = threading.BoundedSemaphore(self._pending)
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    @property
    def started(self) -> bool:
        """Whether there is a thread."""
        return self._executor is not None

    def submit(self, call: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Queues a call behind those before it and returns its future."""
        if self._process != os.getpid():
            self._reset()
        self._slots.acquire()
        try:
            with self._lock:
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(1, thread_name_prefix="rows")
                future = self._executor.submit(call, *arguments)
        except BaseException:
            self._slots.release()
            raise
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def close(self) -> None:
        """Waits for queued calls and ends the thread; calls of other threads wait until then."""
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            executor = self._executor
            self._executor = None
            if executor is not None:
                executor.shutdown()
