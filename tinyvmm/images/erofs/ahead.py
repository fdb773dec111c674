"""Planning ahead of the guest, on a thread of its own, so that it seldom waits for a plan.

From the start of the machine, while the guest's kernel boots and needs us little, directories are
planned from the root downwards; and again whenever the guest has read one that was not planned yet,
what is below that. Each time only so much: a tree may have millions of files, of which a guest
looks at few. What may keep us waiting (file systems of other computers and programs) or takes long
(directories of thousands of names) is left until it is read.

Threads: any may call; `_main` and what it calls are the thread's own. It holds the image's lock
while it plans one directory, and then lets readers go first.
"""

import threading
from threading import Lock
from time import sleep

from tinyvmm.fileserver.stalling import waiting_places
from tinyvmm.images.erofs.plan import Plan

AT_FIRST = 1 << 14  # inodes
EACH_TIME = 1 << 11
_GIVE_WAY = 0.001  # seconds


class Ahead:
    """Plans what may be read next, from now on."""

    def __init__(self, plan: Plan, lock: Lock) -> None:
        """Plan further in `plan`, which `lock` guards."""
        self.give_way = False
        """Set by a reader that wants the lock, until it has it."""
        self._plan = plan
        self._lock = lock
        self._limit = plan.inodes + AT_FIRST
        self._newest = False
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="plan", daemon=True)
        self._thread.start()

    def more(self) -> None:
        """Plan what is below the last that was planned; the lock is held."""
        self._limit = max(self._limit, self._plan.inodes + EACH_TIME)
        self._newest = True
        self._wake.set()

    def close(self) -> None:
        """End the thread."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _main(self) -> None:
        left_out = waiting_places()
        while not self._closing:
            self._wake.clear()
            while self._step(left_out):
                while self.give_way:
                    sleep(_GIVE_WAY)
            self._wake.wait()

    def _step(self, left_out: frozenset[tuple[int, int]]) -> bool:
        """Plan one directory; whether there may be another."""
        with self._lock:
            if self._closing or self._plan.inodes >= self._limit:
                return False
            return self._plan.plan_one(left_out, newest=self._newest)
