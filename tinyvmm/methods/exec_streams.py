"""Commands whose streams run over the control socket: the side of the machine's process.

    client             this process                           guest
    "exec" ─────────>  program ── control port ───────────>   PID 1 starts it
                       four streams <── vsock device <──────  it connects (guest/execution.py)
    exec_output <────  stdout, stderr
    "exec_stdin" ───>  stdin
    exec_exited <────  EXITED, once both outputs are at their end

`tinyvmm exec` does without (exec_client.py): there the streams go past this process's Python. This
way costs more for each byte, but one connection is enough, for any number of commands at once.

Threads: one of its own, asleep in epoll, reads what commands say and passes it on; it stops reading
those of a client that does not keep up, so its commands wait and nobody else. `exec_stdin` waits on
a thread of its client's. `take` is called by the vsock device with its lock held. `_lock` guards
which commands there are and their sockets; it is taken last and held for a moment only.
"""

import os
import select
import socket
import threading
from base64 import b64encode
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypedDict

from tinyvmm.errors import ConfigError
from tinyvmm.guest.protocol import RECORD, STREAMS
from tinyvmm.session import STATUS_MACHINE_FAILED, Result, result_of

if TYPE_CHECKING:
    from tinyvmm.instances.control import Client
    from tinyvmm.vsock_host import VsockHost

CHUNK = 32 << 10
COMMANDS_MAX = 512  # whose streams are here
CONNECT_TIMEOUT = 60.0  # seconds
FIRST_PORT, PORTS = 1 << 29, 1 << 29  # exec_client.py has those above
POLL_MS = 200
NO_WAY_BACK = "the guest could not connect back: its kernel needs vsock over virtio"


class ExecOutput(TypedDict):
    """The command that `exec` gave this `stream` wrote `data` (base64) to its `fd`, 1 or 2."""

    stream: str
    fd: int
    data: str


class ExecExited(TypedDict):
    """The command has ended, and all that it wrote was told: an exit status as a shell's."""

    stream: str
    status: int
    message: str | None


class Command:
    """One command and its four sockets."""

    def __init__(self, client: "Client | None", stream: str, name: str, port: int) -> None:
        self.client = client
        self.stream = stream
        self.name = name
        self.port = port
        self.steps: list[str] = []
        self.sockets: dict[str, socket.socket] = {}
        self.connected = threading.Event()  # or it is over
        self.over = False
        self.result: Result | None = None
        self.records = b""
        self.heard: set[str] = set()  # streams that are not at their end
        self.held: deque[tuple[str, Any]] = deque()
        """What its client had no room for."""

    def step(self, number: int) -> str:
        """Say what the program was about to do."""
        return self.steps[number] if number < len(self.steps) else f"step {number}"


class ExecStreams:
    """All such commands of one machine."""

    def __init__(self, host: "VsockHost") -> None:
        self._host = host
        self._lock = threading.Lock()
        self._commands: dict[tuple[Client | None, str], Command] = {}
        self._clients: set[Client | None] = set()
        self._by_fd: dict[int, tuple[Command, str]] = {}
        self._epoll: select.epoll | None = None
        self._wake = -1
        self._work: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False

    # --- for the supervisor -----------------------------------------------------------------

    def open(self, client: "Client | None", stream: str, name: str) -> Command:
        """Expect a command's program at the `port` of what this returns.

        Without a client nobody hears what it writes, and it has nothing to read.
        """
        with self._lock:
            if self._closed:
                raise ConfigError("the machine has ended")
            if (client, stream) in self._commands:
                raise ConfigError(f"stream {stream!r} is in use: give each command its own")
            if len(self._commands) >= COMMANDS_MAX:
                raise ConfigError(f"{COMMANDS_MAX} commands are under way already")
            if self._thread is None:
                self._begin()
            taken = {command.port for command in self._commands.values()}
            port = FIRST_PORT
            while port in taken or port == FIRST_PORT:
                port = FIRST_PORT + int.from_bytes(os.urandom(4), "little") % PORTS
            command = Command(client, stream, name, port)
            self._commands[client, stream] = command
            new = client not in self._clients
            self._clients.add(client)
        self._host.offer(port, lambda sock: self._take(command, sock))
        if new and client is not None:
            client.when_gone(self._gone)
        return command

    def forget(self, command: Command) -> None:
        """Give up a command whose program could not be started."""
        self._post(lambda: self._end(command, None))

    def ended(self, command: Command) -> None:
        """Know that the program has ended: if it never connected, it could not."""

        def look() -> None:
            if len(command.sockets) < len(STREAMS):
                self._end(command, Result(STATUS_MACHINE_FAILED, "setup", NO_WAY_BACK))

        self._post(look)

    def find(self, client: "Client | None", stream: str) -> Command:
        """Return a command; ConfigError if there is none."""
        with self._lock:
            command = self._commands.get((client, stream))
        if command is None:
            raise ConfigError(f"no command of this client has the stream {stream!r}")
        return command

    def write(self, command: Command, data: bytes, *, eof: bool) -> None:
        """Write to a command's stdin, and perhaps end it; wait until it is taken, or over."""
        self._await(command)
        rest = memoryview(data)
        poller = select.poll()
        while rest:
            with self._lock:
                if command.over:
                    return
                sock = command.sockets["stdin"]
                try:
                    rest = rest[sock.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
                    continue
                except BlockingIOError:
                    poller.register(sock.fileno(), select.POLLOUT)
                except OSError:
                    return  # it wants no more
            poller.poll(POLL_MS)
        if eof:
            with self._lock, suppress(OSError):
                if not command.over:
                    command.sockets["stdin"].shutdown(socket.SHUT_WR)

    def tell(self, command: Command, kind: int, value: int) -> None:
        """Send a record to what runs the command."""
        self._await(command)
        with self._lock:
            if command.over:
                raise ConfigError("the command has ended")
            record = RECORD.pack(kind, value)
            try:
                sent = command.sockets["control"].send(record, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                raise ConfigError("the command has ended") from None
        if sent != len(record):
            raise ConfigError("the guest takes no more: it has not answered to so many before")

    def close(self) -> None:
        """End them all: the machine has ended."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None:
            self._post(_nothing)
            thread.join()

    # --- the device's side ------------------------------------------------------------------

    def _take(self, command: Command, sock: socket.socket) -> None:
        """The program has connected another stream."""
        with self._lock:
            if command.over or len(command.sockets) == len(STREAMS):
                sock.close()
                return
            command.sockets[STREAMS[len(command.sockets)]] = sock
            complete = len(command.sockets) == len(STREAMS)
        if complete:
            self._host.withdraw(command.port)
            self._post(lambda: self._connected(command))

    # --- the thread -------------------------------------------------------------------------

    def _begin(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._main, name="exec", daemon=True)
        self._thread.start()

    def _post(self, work: Callable[[], None]) -> None:
        self._work.append(work)
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _main(self) -> None:
        epoll = self._epoll
        if epoll is None:
            raise AssertionError("no epoll")
        while True:
            for fd, _ in epoll.poll():
                if fd == self._wake:
                    os.eventfd_read(fd)
                    while self._work:
                        self._work.popleft()()
                elif fd in self._by_fd:
                    self._read(*self._by_fd[fd])
            if self._closed:
                break
        over = Result(STATUS_MACHINE_FAILED, "machine", "the machine ended before the command did")
        for command in list(self._commands.values()):
            self._end(command, command.result or over)
        with self._lock:
            os.close(self._wake)
            self._wake = -1
        epoll.close()

    def _connected(self, command: Command) -> None:
        """All four are there: listen to three."""
        if command.over:
            return
        command.heard = {"control", "stdout", "stderr"}
        for name in command.heard:
            self._by_fd[command.sockets[name].fileno()] = command, name
        if command.client is None:
            command.sockets["stdin"].shutdown(socket.SHUT_WR)
        command.connected.set()
        self._listen(command, outputs=True)

    def _listen(self, command: Command, *, outputs: bool) -> None:
        """Have epoll tell of what the command says, and of its `outputs` if they are wanted."""
        if self._epoll is None:
            return
        for name in command.heard:
            fd = command.sockets[name].fileno()
            wanted = select.EPOLLIN if outputs or name == "control" else 0
            try:
                self._epoll.modify(fd, wanted)
            except FileNotFoundError:
                self._epoll.register(fd, wanted)

    def _ignore(self, fd: int) -> None:
        """Hear no more of a descriptor."""
        if self._by_fd.pop(fd, None) is not None and self._epoll is not None:
            self._epoll.unregister(fd)

    def _read(self, command: Command, name: str) -> None:
        sock = command.sockets[name]
        client = command.client
        try:
            data = sock.recv(CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            command.heard.discard(name)
            self._ignore(sock.fileno())
        elif name == "control":
            self._record(command, data)
        elif client is not None:
            told: ExecOutput = {
                "stream": command.stream,
                "fd": 1 if name == "stdout" else 2,
                "data": b64encode(data).decode(),
            }
            self._tell(command, "exec_output", told)
        if not command.heard:
            lost = Result(STATUS_MACHINE_FAILED, "machine", "the command's end was not told")
            self._end(command, command.result or lost)

    def _record(self, command: Command, data: bytes) -> None:
        data = command.records + data
        whole = len(data) - len(data) % RECORD.size
        command.records = data[whole:]
        for kind, value in RECORD.iter_unpack(data[:whole]):
            if command.result is None:
                command.result = result_of(kind, value, command.name, command.step)

    def _tell(self, command: Command, method: str, params: Any) -> None:
        """Notify its client; what that has no room for is held, and the command with it."""
        client = command.client
        if client is None or client.gone:
            return
        if command.held or not client.notify(method, params):
            command.held.append((method, params))
        if command.held or not client.has_room:
            if not command.over:
                self._listen(command, outputs=False)
            client.when_room(lambda: self._post(lambda: self._go_on(command)))

    def _go_on(self, command: Command) -> None:
        """Its client has room again, or is gone."""
        client = command.client
        while command.held and client is not None:
            if not client.notify(*command.held[0]):
                if not client.gone:
                    client.when_room(lambda: self._post(lambda: self._go_on(command)))
                    return
                command.held.clear()
                break
            command.held.popleft()
        if not command.over:
            self._listen(command, outputs=True)

    def _gone(self, client: "Client") -> None:
        self._post(lambda: self._desert(client))

    def _desert(self, client: "Client") -> None:
        """A client is gone; its commands go on."""
        with self._lock:
            self._clients.discard(client)
            commands = [command for command in self._commands.values() if command.client is client]
        for command in commands:
            self._end(command, None)

    def _end(self, command: Command, result: Result | None) -> None:
        """Let go of a command; its client is told the result, if there is one."""
        if command.over:
            return
        with self._lock:
            command.over = True
            self._commands.pop((command.client, command.stream), None)
        self._host.withdraw(command.port)
        for sock in command.sockets.values():
            self._ignore(sock.fileno())
            sock.close()
        command.connected.set()
        if result is not None:
            told: ExecExited = {
                "stream": command.stream,
                "status": result.status,
                "message": result.message,
            }
            self._tell(command, "exec_exited", told)

    def _await(self, command: Command) -> None:
        if not command.connected.wait(CONNECT_TIMEOUT):
            raise ConfigError(NO_WAY_BACK)


def _nothing() -> None:
    """Wake the thread up."""
