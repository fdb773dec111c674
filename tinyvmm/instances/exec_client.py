"""Run one more command in a machine that runs: the side of whoever asks, what `tinyvmm exec` does.

    this process                     the machine's process              its guest
    control socket:  "exec" ──────>  program ── control port ────────>  PID 1 starts it
    vsock_PORT:      four streams <── vsock device <──────────────────  it connects

The streams come straight from the guest, over Unix sockets that its vsock device connects to
(vsock_host.py); the machine's process only passes them on, and a `Session` does the rest, as for
the machine's own command. So a client that stalls holds up nobody but its command.
"""

import errno
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Protocol

from tinyvmm.errors import ConfigError
from tinyvmm.guest.protocol import STREAMS
from tinyvmm.instances import registry
from tinyvmm.instances.control import ControlClient
from tinyvmm.session import STATUS_MACHINE_FAILED, HostFiles, Ports, Result, Session
from tinyvmm.streams import SocketInput, SocketOutput

if TYPE_CHECKING:
    from tinyvmm.terminal import Terminal

CONNECT_TIMEOUT = 60.0  # seconds, for a guest that has much else to do
FIRST_PORT, PORTS = 1 << 30, 1 << 30
FORWARDED = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
"""Signals that go to the command; SIGINT does too, but a second one ends this side."""


class Caller(Protocol):
    """What is used of control.ControlClient, or of a machine in this process."""

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the machine's and return its result; ConfigError if it fails."""


def connect(name: str) -> ControlClient:
    """Connect to a machine's control socket; ConfigError if it does not run."""
    state = registry.find(name)
    if not state.running:
        raise ConfigError(f"machine {name} has ended, with status {state.status}")
    return ControlClient(registry.path_of(name, "control"))


def execute(
    name: str,
    argv: Sequence[str],
    *,
    env: Sequence[str] = (),
    cwd: str | None = None,
    user: str | None = None,
    terminal: "Terminal | None" = None,
    size: tuple[int, int] | None = None,
    timeout: float | None = None,
    files: HostFiles | None = None,
    sinks: Mapping[str, Callable[[bytes], None]] | None = None,
) -> Result:
    """Run a command in machine `name` and return how it ended, as `execute_with`."""
    with connect(name) as client:
        return execute_with(
            client,
            argv,
            env=env,
            cwd=cwd,
            user=user,
            terminal=terminal,
            size=size,
            timeout=timeout,
            files=files,
            sinks=sinks,
            # The socket has room for some clients only: it is let go before the command runs.
            on_session=lambda _: client.close(),
        )


def execute_with(
    client: Caller,
    argv: Sequence[str],
    *,
    env: Sequence[str] = (),
    cwd: str | None = None,
    user: str | None = None,
    merged: bool = False,
    terminal: "Terminal | None" = None,
    size: tuple[int, int] | None = None,
    timeout: float | None = None,
    files: HostFiles | None = None,
    sinks: Mapping[str, Callable[[bytes], None]] | None = None,
    on_session: Callable[[Session], None] | None = None,
) -> Result:
    """Run a command in the machine that `client` reaches and return how it ended.

    With `terminal` (ours) or `size` (rows, columns) it has a terminal; if `merged`, its stderr is
    its stdout. `files` and `sinks` are as for `Session`, which `on_session` is given before it
    runs. ConfigError if the command cannot be started.
    """
    if terminal is not None:
        size = terminal.size()
    with ExitStack() as cleanup:
        with ExitStack() as until_connected:
            port, listener = listen(client.call("status")["vsock"], until_connected)
            asked = client.call(
                "exec",
                argv=list(argv),
                port=port,
                env=list(env),
                cwd=cwd,
                user=user,
                terminal=None if size is None else list(size),
                **({"merged": True} if merged else {}),
            )
            accepted = accept(client, listener, asked["pid"], len(STREAMS), cleanup)
        sockets = dict(zip(STREAMS, accepted, strict=True))
        for sock in accepted:
            cleanup.callback(_hang_up, sock)
        control = sockets["control"]
        session = Session(
            Ports(
                SocketInput(sockets["stdin"]),
                SocketOutput(sockets["stdout"]),
                SocketOutput(sockets["stderr"]),
                SocketOutput(control),
                SocketInput(control),
            ),
            command=argv[0],
            timeout=timeout,
            terminal=terminal,
            describe_step=lambda step: _step(asked, step),
            files=files,
            sinks=sinks,
            forward=FORWARDED,
        )
        if on_session is not None:
            on_session(session)
        # What counts if control ends without a word.
        session.stopped(STATUS_MACHINE_FAILED, "the machine ended before the command did")
        return session.run()


def _step(asked: Mapping[str, Any], step: int) -> str:
    steps = asked["steps"]
    return str(steps[step]) if step < len(steps) else f"step {step}"


def listen(vsock: str, cleanup: ExitStack) -> tuple[int, socket.socket]:
    """Listen, until `cleanup`, where a vsock port of the host leads to; the port."""
    listener = cleanup.enter_context(socket.socket(socket.AF_UNIX))
    while True:
        port = FIRST_PORT + int.from_bytes(os.urandom(4), "little") % PORTS
        path = f"{vsock}_{port}"
        os.fchmod(listener.fileno(), 0o600)  # and so of the file: a umask is the whole process's
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise ConfigError(f"cannot listen at {path}: {error.strerror or error}") from None
        listener.listen(len(STREAMS))
        cleanup.callback(_unlink, path)
        return port, listener


def _hang_up(sock: socket.socket) -> None:
    """Wake whoever still reads: closing alone does not, and it would keep the guest's end open."""
    with suppress(OSError):  # the other end has gone
        sock.shutdown(socket.SHUT_RDWR)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def accept(
    client: Caller, listener: socket.socket, pid: int, count: int, cleanup: ExitStack
) -> list[socket.socket]:
    """Wait until program `pid` has connected `count` streams; ConfigError if it ends before."""
    sockets: list[socket.socket] = []
    listener.settimeout(1.0)
    ended, tries = False, 0
    while len(sockets) < count:
        try:
            accepted, _ = listener.accept()
        except (TimeoutError, BlockingIOError):
            if ended or tries > CONNECT_TIMEOUT:
                raise ConfigError(
                    "the guest could not connect back: its kernel needs vsock over virtio"
                ) from None
            tries += 1
            ended = client.call("exec_wait", pid=pid, timeout=0) is not None
            if ended:
                listener.setblocking(False)  # what it connected before is here by now
            continue
        accepted.settimeout(None)
        sockets.append(cleanup.enter_context(accepted))
    return sockets
