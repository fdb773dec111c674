"""Threads for what may have to wait: a disk, a network, another program.

A `Pool` starts a thread when there is work and no thread is idle, up to its limit; beyond that work
waits its turn, as it does where this computer can start no more of them. Threads are daemons: one
that waits for a stalled file system for ever does not keep the process alive. A session has a pool
of its own, so a client can fill nobody else's.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from errno import ENOMEM

THREADS_MAX = 16


class Pool:
    """At most `threads_max` threads and the work they have yet to do."""

    def __init__(self, name: str, threads_max: int = THREADS_MAX) -> None:
        """Make a pool, still without threads, which will be called `name`."""
        self._name = name
        self._threads_max = threads_max
        self._changed = threading.Condition()  # guards what follows
        self._work: deque[Callable[[], None]] = deque()
        self._threads = 0
        self._idle = 0
        self._closed = False

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work`, which must not raise, done on some thread; any thread may call.

        OSError (ENOMEM) if there is no thread, and none can be started.
        """
        with self._changed:
            self._work.append(work)
            if self._idle >= len(self._work):
                self._changed.notify()
            elif self._threads < self._threads_max:
                try:
                    self._start()
                except RuntimeError:
                    if not self._threads:
                        self._work.pop()
                        raise OSError(ENOMEM, os.strerror(ENOMEM)) from None

    def close(self) -> None:
        """Let the threads end once the work there is has been done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _start(self) -> None:
        """Start a thread; RuntimeError if there are too many, in this process or its cgroup."""
        threading.Thread(target=self._run, name=self._name, daemon=True).start()
        self._threads += 1

    def _run(self) -> None:
        try:
            while (work := self._next()) is not None:
                work()
                del work  # it holds files and buffers, and the next may be long in coming
        finally:
            with self._changed:
                self._threads -= 1
                if self._work:  # it raised after all, and so may have all the others
                    with suppress(RuntimeError):  # then it is the next `submit` that may start one
                        self._start()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            self._idle += 1
            while not self._work and not self._closed:
                self._changed.wait()
            self._idle -= 1
            return self._work.popleft() if self._work else None
