"""A `tinyvmm run`, as far as others can ask about it: what it has, and who answers.

A `Supervised` belongs to one run and outlives a reboot: each machine that this makes is given to
`attach`. Most runs are never asked anything: so the Supervisor that answers (supervisor.py), with
all that it needs, is made when somebody first asks, and finds here what it answers about.

Threads: the run's calls `begin`, `attach`, `detach`, `on_record` and `end`; the rest is for any.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tinyvmm.errors import ConfigError
from tinyvmm.guest.protocol import STARTED
from tinyvmm.named import NamedTuple

if TYPE_CHECKING:
    from tinyvmm.devices.virtio.device import VirtioDevice
    from tinyvmm.fileserver.tree import Tree
    from tinyvmm.guest.relay import User
    from tinyvmm.inside.executor import Executor
    from tinyvmm.machine import Machine
    from tinyvmm.methods.exec_streams import ExecStreams
    from tinyvmm.methods.supervisor import Supervisor
    from tinyvmm.session import Result, Session
    from tinyvmm.vsock_host import VsockHost


class Context(NamedTuple):
    """What every machine of one run has in common."""

    env: Sequence[str]
    cwd: str
    root: "Tree"
    modules: Callable[[Sequence[str]], Sequence[tuple[str, bytes]]]
    """What these kernel modules and theirs need that was not inserted at boot."""
    account: "User | None" = None
    """Whom a command runs as that names nobody; None for root."""


class Way:
    """How a program in the guest connects to us: by a vsock of ours."""

    def __init__(self, vsock: "VirtioDevice", host: "VsockHost") -> None:
        self.vsock = vsock
        self.host = host
        self._lock = threading.Lock()  # guards the two below
        self._streams: ExecStreams | None = None
        self._closed = False

    @property
    def streams(self) -> "ExecStreams":
        """Commands whose streams run over the control socket; made with the first."""
        with self._lock:
            if self._streams is None:
                from tinyvmm.methods.exec_streams import ExecStreams

                self._streams = ExecStreams(self.host)
                if self._closed:
                    self._streams.close()
            return self._streams

    def close(self) -> None:
        """Let go of all such commands, and take no more."""
        with self._lock:
            self._closed = True
            streams = self._streams
        if streams is not None:
            streams.close()


class Turn(NamedTuple):
    """One machine of the run's."""

    machine: "Machine"
    session: "Session"
    executor: "Executor"
    console: Callable[[], bytes]
    way: Way | None


class Supervised:
    """One run; `vsock_path` is where its vsock socket is."""

    def __init__(self, vsock_path: str, *, keep_stdin: bool = False) -> None:
        self.vsock_path = vsock_path
        self.on_started: Callable[[], None] = _nothing
        """Called in the session's thread when the command runs."""
        self.last_console = b""
        """The last that the kernel printed, once the machine has ended."""
        self.stop_signal = int(signal.SIGTERM)
        self.began = time.monotonic()
        self.context: Context | None = None
        self.turn: Turn | None = None
        """The machine of now, if one runs."""
        self.changed = threading.Condition()  # guards turn, result
        self.result: Result | None = None
        """How the run ended, once it has."""
        self._closing: Result | None = None
        self._making = threading.Lock()  # guards the one below
        self._supervisor: Supervisor | None = None
        self.input_lock = threading.Lock()  # guards `input`
        self.stdin: int | None = None
        self.input: int | None = None
        """What is written here the command reads, from `stdin`; None if that is not kept open."""
        if keep_stdin:
            self.stdin, self.input = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self.input, False)

    # --- the run's side ---------------------------------------------------------------------

    def begin(self, context: Context) -> None:
        """Take what all machines of the run have in common."""
        self.context = context

    def attach(
        self,
        machine: "Machine",
        session: "Session",
        executor: "Executor",
        console: Callable[[], bytes],
        vsock: "tuple[VirtioDevice, VsockHost] | None",
    ) -> None:
        """Answer for this machine from now on; without a vsock of ours, for less of it."""
        way = None if vsock is None else Way(*vsock)
        with self.changed:
            self.turn = Turn(machine, session, executor, console, way)
            self.changed.notify_all()
            if self._closing is not None:
                session.end(self._closing)

    def detach(self) -> None:
        """Answer for no machine; return once nobody uses it any more."""
        with self.changed:
            turn, self.turn = self.turn, None
        if turn is not None:
            turn.executor.close()
            if turn.way is not None:
                turn.way.close()
            supervisor = self._made()
            if supervisor is not None:
                supervisor.detach()
            self.last_console = turn.console()

    def on_record(self, kind: int, _value: int) -> None:
        """See a record of the guest's."""
        if kind == STARTED:
            self.on_started()

    def end(self, result: "Result") -> None:
        """Tell everybody who waits how the run ended."""
        with self.changed:
            self.result = result
            self.changed.notify_all()
        supervisor = self._made()
        if supervisor is not None:
            supervisor.close()
        self.close_input()

    # --- the side of whoever asks -----------------------------------------------------------

    def supervisor(self) -> "Supervisor":
        """Return who answers, for as long as the run lasts and after."""
        with self._making:
            if self._supervisor is None:
                from tinyvmm.methods.supervisor import Supervisor

                self._supervisor = Supervisor(self)
                if self.result is not None:
                    self._supervisor.close()
            return self._supervisor

    def _made(self) -> "Supervisor | None":
        """Return who answers, if anybody has asked."""
        with self._making:
            return self._supervisor

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Return every method by its name on the wire."""
        return self.supervisor().methods()

    def now(self) -> Turn:
        """Return the machine of now and what belongs to it; ConfigError if none runs."""
        turn = self.turn
        if turn is None:
            raise ConfigError("the machine does not run")
        return turn

    @property
    def machine(self) -> "Machine":
        """The machine of now; ConfigError if none runs."""
        return self.now().machine

    def shut(self, result: "Result") -> None:
        """End the machine with `result` now, or as soon as there is one."""
        with self.changed:
            self._closing = result
            if self.turn is not None:
                self.turn.session.end(result)

    def close_input(self) -> None:
        """Let the command see the end of its stdin."""
        with self.input_lock:
            if self.input is not None:
                os.close(self.input)
                self.input = None


def _nothing() -> None:
    """Do nothing when the command runs."""
