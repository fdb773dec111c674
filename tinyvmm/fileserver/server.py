"""A 9P server on sockets: one tree, any number of clients, one session and one thread for each.

`Server(tree, addresses)` listens; `serve` accepts clients until `stop`. Every client sees the
same tree and the same locks. Nobody is asked who he is: whoever may connect may do, within the
tree, what this process may. That is why a Unix socket is its owner's alone unless `socket_mode`
says otherwise. What is not 9P's about it is `Listener`'s, which NBD has too.

A socket file that nobody listens at any more is replaced; one somebody does listen at, or what is
no socket, is left alone. `close` removes ours.

Threads: `serve` and `close` belong to one thread. `stop` may be called from any, and from a signal
handler.
"""

import os
import select
import socket
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from errno import EADDRINUSE, ECONNREFUSED, EMFILE, ENFILE
from typing import Protocol, Self

from tinyvmm import trace
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.address import Address
from tinyvmm.fileserver.connection import Connection
from tinyvmm.fileserver.locks import Lock, LockTable
from tinyvmm.fileserver.session import MSIZE_MAX, Session
from tinyvmm.fileserver.tree import Tree

CONNECTIONS_MAX = 64
BACKLOG = 64
FAREWELL = 5.0  # seconds for the threads of connections to end


class Conversation(Protocol):
    """One client's connection."""

    def serve(self) -> None:
        """Answer until the client leaves, or `end` is called; then close its socket."""

    def end(self) -> None:
        """Have `serve` return soon, whatever it is waiting for; any thread may call."""


class Listener:
    """Listens at `addresses`, which afterwards say where exactly, and has clients served."""

    what = "stream"
    """What is spoken: for the names of threads, and in traces."""

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        connections_max: int = CONNECTIONS_MAX,
        socket_mode: int = 0o600,
    ) -> None:
        """Listen; ConfigError if an address cannot be had.

        No more than `connections_max` clients are served at once.
        """
        self._connections_max = connections_max
        self._files: list[tuple[str, int, int]] = []  # socket files: path, st_dev, st_ino
        self._listeners: list[socket.socket] = []
        self._guard = threading.Lock()  # over the next
        self._connections: dict[Conversation, threading.Thread] = {}
        self._count = 0
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopped = False
        self.addresses: list[Address] = []
        try:
            for address in addresses:
                self._listen(address, socket_mode)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def converse(self, sock: socket.socket, number: int) -> Conversation:
        """Return the conversation with client `number` over `sock`, for it to own."""
        raise NotImplementedError

    # --- listening --------------------------------------------------------------------------------

    def _listen(self, address: Address, mode: int) -> None:
        family, where = address.resolve()[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        self._listeners.append(sock)
        try:
            if address.path:
                self._bind_unix(sock, address.path, mode)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(where)
                address = Address("", *sock.getsockname()[:2])
            sock.listen(BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {address}: {error.strerror}; {_remedy(address, error)}"
            ) from None
        sock.setblocking(False)
        self.addresses.append(address)

    def _bind_unix(self, sock: socket.socket, path: str, mode: int) -> None:
        os.fchmod(sock.fileno(), mode)  # what bind(2) makes has no more than this, from the start
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        st = os.lstat(path)
        self._files.append((path, st.st_dev, st.st_ino))
        os.chmod(path, mode)  # nor less, whatever the umask

    # --- serving ----------------------------------------------------------------------------------

    def serve(self) -> None:
        """Accept clients until `stop`."""
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        listeners = {listener.fileno(): listener for listener in self._listeners}
        accepting = False
        while not self._stopped:
            if accepting != self._has_room():
                accepting = not accepting
                for fd in listeners:
                    if accepting:
                        poll.register(fd, select.POLLIN)
                    else:
                        poll.unregister(fd)
            for fd, _ in poll.poll():
                if fd in listeners:
                    self._accept(listeners[fd])
                else:
                    with suppress(BlockingIOError):
                        os.eventfd_read(fd)

    def stop(self) -> None:
        """Have `serve` return soon; any thread or signal handler may call."""
        self._stopped = True
        self._wake()

    def close(self) -> None:
        """Hang up on everybody, and leave no socket file."""
        self._stopped = True
        for path, dev, ino in self._files:
            with suppress(OSError):
                st = os.lstat(path)
                if (st.st_dev, st.st_ino) == (dev, ino):
                    os.unlink(path)
        self._files.clear()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        with self._guard:
            connections = list(self._connections.items())
        for connection, _ in connections:
            connection.end()
        for _, thread in connections:
            thread.join(FAREWELL)
        with self._guard:
            wakeup, self._wakeup = self._wakeup, -1
        if wakeup >= 0:
            os.close(wakeup)

    def _has_room(self) -> bool:
        with self._guard:
            return len(self._connections) < self._connections_max

    def _wake(self) -> None:
        if self._wakeup >= 0:
            os.eventfd_write(self._wakeup, 1)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno in {EMFILE, ENFILE}:
                self.say(0, f"cannot take another client: {error.strerror}")
                threading.Event().wait(0.1)  # until somebody leaves; the client waits meanwhile
            return  # else the client left before we looked
        sock.setblocking(True)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._count += 1
        connection = self.converse(sock, self._count)
        name = f"{self.what} client {self._count}"
        thread = threading.Thread(target=self._run, args=(connection,), name=name, daemon=True)
        with self._guard:
            self._connections[connection] = thread
        try:
            thread.start()
        except RuntimeError:
            with self._guard:
                del self._connections[connection]
            self.say(self._count, "hung up on: this computer can start no more threads")
            sock.close()

    def _run(self, connection: Conversation) -> None:
        try:
            connection.serve()
        finally:
            with self._guard:
                del self._connections[connection]
                self._wake()

    def say(self, number: int, what: str) -> None:
        """Leave a trace about client `number`, or about all if that is 0."""
        if trace.hook is not None:
            who = f"client {number}" if number else "server"
            trace.hook(trace.Message(f"{self.what} {who}", what))


class Server(Listener):
    """Serves a tree at `addresses`, which afterwards say where exactly."""

    what = "9P"

    def __init__(
        self,
        tree: Tree,
        addresses: Sequence[Address],
        *,
        connections_max: int = CONNECTIONS_MAX,
        idle: int = 0,
        socket_mode: int = 0o600,
        msize_max: int = MSIZE_MAX,
    ) -> None:
        """Serve `tree`, which stays the caller's; ConfigError if an address cannot be had.

        No more than `connections_max` clients are served at once; one that is silent for `idle`
        seconds, if that is not 0, is hung up on.
        """
        self._tree = tree
        self._idle = idle
        self._msize_max = msize_max
        self._locks = SharedLockTable()
        super().__init__(addresses, connections_max=connections_max, socket_mode=socket_mode)

    def converse(self, sock: socket.socket, number: int) -> Conversation:
        """Return a client's conversation: a session of its own."""
        session = Session(
            self._tree,
            msize_max=self._msize_max,
            lock_table=self._locks,
            name=f"client {number}",
        )
        return Connection(sock, session, self._idle)


class SharedLockTable(LockTable):
    """A LockTable for sessions on several threads."""

    def __init__(self) -> None:
        super().__init__()
        self._guard = threading.RLock()  # one method may use another

    def set(self, path: int, lock: Lock) -> int:
        """As LockTable's."""
        with self._guard:
            return super().set(path, lock)

    def test(self, path: int, lock: Lock) -> Lock | None:
        """As LockTable's."""
        with self._guard:
            return super().test(path, lock)

    def drop(self, path: int, fid: object) -> None:
        """As LockTable's."""
        with self._guard:
            super().drop(path, fid)


def _is_stale(path: str) -> bool:
    """Whether `path` is a socket at which nobody listens any more."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno == ECONNREFUSED
        return False


def _remedy(address: Address, error: OSError) -> str:
    if not address.path:
        if error.errno == EADDRINUSE:
            return "stop who listens there, or give another port"
        return "give an address of this computer, and a port above 1023 if you are not root"
    if error.errno == EADDRINUSE:
        return "another server or another file is there: stop or remove it, or give another path"
    return "give a path where you may make a file"
