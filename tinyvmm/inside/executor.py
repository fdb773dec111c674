"""Sends PID 1 the programs that it is to start beside its command, and keeps how each ended.

`Executor` stands between the session, whose thread brings the guest's records, and the threads of
the control socket's clients, who wait for what they asked. What a guest says is not believed
beyond its meaning: a record nobody waits for is passed over, and what is kept is bounded.
"""

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from tinyvmm.errors import ConfigError
from tinyvmm.guest.protocol import ENDED, ENDED_STATUS, EXECUTE, EXECUTED, STARTED

PATIENCE = 60.0  # seconds for a guest to start a program, and for it to come up itself
KEPT = 1024  # ends that are remembered
_ERRNO_MAX = 4095


class Executor:
    """`send` sends a record and what follows it, from any thread."""

    def __init__(self, send: Callable[[int, int, bytes], None]) -> None:
        self._send = send
        self._changed = threading.Condition()  # guards all below
        self._up = False
        self._over = False
        self._asked = 0  # how many programs were sent
        self._answered = 0
        self._answers: dict[int, int] = {}  # to those whose caller still waits
        self._waiting: deque[int] = deque()
        self._running: set[int] = set()
        self._ended: OrderedDict[int, int] = OrderedDict()
        self._ending = 0
        self._acts: dict[int, Callable[[], None]] = {}

    def on_record(self, kind: int, value: int) -> None:
        """Take a record of the guest's. The session's thread."""
        with self._changed:
            if kind == STARTED:
                self._up = True
            elif kind == EXECUTED and self._answered < self._asked:
                self._answered += 1
                if value < 1 << 31 and len(self._running) < KEPT:
                    self._running.add(value)
                    self._ended.pop(value, None)  # process ids come again
                if self._answered in self._waiting:
                    self._answers[self._answered] = value
            elif kind == ENDED:
                self._ending = value
            elif kind == ENDED_STATUS and self._ending in self._running:
                self._running.discard(self._ending)
                act = self._acts.pop(self._ending, None)
                if act is not None:
                    act()
                self._ended[self._ending] = value
                if len(self._ended) > KEPT:
                    self._ended.popitem(last=False)
            self._changed.notify_all()

    def close(self) -> None:
        """Tell whoever waits that nothing more will come."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def start(self, program: bytes) -> int:
        """Start a program; its process id. ConfigError if the guest cannot, or does not answer."""
        with self._changed:
            self._await(lambda: self._up, "the guest is not up yet")
            self._asked += 1
            number = self._asked
            self._waiting.append(number)
            self._send(EXECUTE, len(program), program)  # in the order of the numbers
            try:
                self._await(lambda: number in self._answers, "the guest does not answer")
            finally:
                self._waiting.remove(number)
            value = self._answers.pop(number)
        if 0 < (1 << 32) - value <= _ERRNO_MAX:
            reason = os.strerror((1 << 32) - value)
            raise ConfigError(f"the guest cannot start a program: {reason}")
        return value

    def wait(
        self, pid: int, timeout: float | None, given_up: Callable[[], bool] = bool
    ) -> int | None:
        """Wait for the end of a program: its status as from wait4(2), None if it takes longer.

        Also None once `given_up`, for which `look` has it looked at.
        """
        with self._changed:
            if pid not in self._running and pid not in self._ended:
                raise ConfigError(f"no program that was started has process id {pid}")
            self._changed.wait_for(lambda: pid in self._ended or self._over or given_up(), timeout)
            return self._ended.get(pid)

    def when_ended(self, pid: int, act: Callable[[], None]) -> None:
        """Call `act` when a program ends; at once if it has. It must not wait."""
        with self._changed:
            if pid in self._running:
                self._acts[pid] = act
            else:
                act()

    def look(self) -> None:
        """Have whoever waits look whether it still does."""
        with self._changed:
            self._changed.notify_all()

    def ends(self) -> dict[int, int]:
        """Return the ends that are remembered, by process id: statuses as from wait4(2)."""
        with self._changed:
            return dict(self._ended)

    def running(self) -> list[int]:
        """Return the process ids of programs that have not ended."""
        with self._changed:
            return sorted(self._running)

    def _await(self, condition: Callable[[], bool], failing: str) -> None:
        if not self._changed.wait_for(lambda: condition() or self._over, PATIENCE):
            raise ConfigError(failing)
        if self._over:
            raise ConfigError("the machine has ended")
