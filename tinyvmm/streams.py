"""The ends of a command's streams: one way each, blocking, alike whatever carries them.

`PortInput` and `PortOutput` are over a port of our own virtio console; `SocketInput` and
`SocketOutput` over a stream socket whose other end QEMU holds for a port of its own. A session
(tinyvmm/session.py) reads and writes them from one thread per stream; `finish` and `release` come
from another thread and wake whoever is blocked. After `release` a machine may be taken apart while
such a thread is still busy with our side of the stream.
"""

import errno
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from fcntl import F_GETFL, fcntl
from queue import Empty, SimpleQueue
from time import sleep
from typing import TYPE_CHECKING, Protocol

from tinyvmm.views import Views

if TYPE_CHECKING:
    from socket import socket
    from typing import Self

CHUNK = 64 * 1024
LITTLE = 4096  # bytes that are not worth to wake a thread for
PATIENCE = 0.05  # seconds that a guest has to make room for more than one buffer
SHUT_WR = 1  # socket.SHUT_WR, without importing socket for a machine that has none


class Input(Protocol):
    """A stream into the guest."""

    def write(self, data: bytes) -> None:
        """Block until all of `data` is accepted, or the stream is finished."""

    def close(self) -> None:
        """Let the guest's reader see end of file after what was written."""

    def attend(self, receiver: "Receiver") -> bytes | None:
        """Have the machine itself take what comes, which wakes nobody else, while that is little.

        Return the first that it did not take; b"" at the end, or after `release`; None if whoever
        calls had better read by itself.
        """

    def release(self) -> None:
        """Drop what is not yet accepted; once this returns, the machine is not touched again."""


class Output(Protocol):
    """A stream out of the guest."""

    def read(self) -> bytes:
        """Block until there is data; b"" at the end."""

    def pass_to(self, send: Callable[[Views], int]) -> None:
        """Let `send`, which never waits, take what it can before `read` does."""

    def finish(self) -> None:
        """End the stream after what the guest has already sent."""

    def release(self) -> None:
        """End the stream here; once this returns, the machine is not touched again."""


class ConsolePort(Protocol):
    """What is used of devices.virtio.console.ConsolePort."""

    on_output: Callable[[], None]
    on_space: Callable[[], None]

    def take_output(self) -> bytes:
        """One buffer the guest sent, b"" when there is none."""

    def pass_to(self, send: Callable[[Views], int] | None) -> None:
        """Have `send` take what it can of each; None ends that."""

    def put_input(self, data: bytes | memoryview, *, patient: bool = False) -> int:
        """Hand over what fits, and return its length."""

    def close(self) -> None:
        """Let the guest's reader see end of file."""

    def watch(self, fd: int, call: Callable[[], None]) -> bool:
        """Have a thread of the device's `call` whenever `fd` can be read; False if it has none."""

    def unwatch(self, fd: int) -> None:
        """Do so no more."""


class Sender:
    """What writes to a descriptor without ever waiting, whatever others have made of it.

    Whether writes wait is a flag of the open file, which other programs may have as well, so it is
    left alone: a pipe is opened anew, and a socket told with each message.
    """

    def __init__(self, write: Callable[[Views], int], close: Callable[[], None]) -> None:
        self._write = write
        self.close = close
        """Let go of what is ours; the descriptor stays open."""

    @classmethod
    def of(cls, fd: int) -> "Self | None":
        """Return that for `fd`; None where `_opened` has none."""
        own = _opened(fd, (os.O_WRONLY, os.O_RDWR))
        if own is None:
            return None
        if isinstance(own, int):
            return cls(lambda views: os.writev(own, views), lambda: os.close(own))
        from socket import MSG_DONTWAIT

        return cls(lambda views: own.sendmsg(views, (), MSG_DONTWAIT), own.close)

    def send(self, views: Views) -> int:
        """Write as much as there is room for, and return how much; 0 also if nothing ever will."""
        try:
            return self._write(views)
        except OSError:  # whoever writes the rest is told why
            return 0


class Receiver:
    """What reads from a descriptor without ever waiting: a `Sender`, the other way."""

    def __init__(self, fd: int, read: Callable[[], bytes], close: Callable[[], None]) -> None:
        self.fd = fd
        """Ours: to wait for."""
        self.read = read
        """Return what there is, b"" at the end; BlockingIOError if there is nothing now."""
        self.close = close
        """Let go of what is ours; the descriptor stays open."""

    @classmethod
    def of(cls, fd: int) -> "Self | None":
        """Return that for `fd`; None where `_opened` has none."""
        own = _opened(fd, (os.O_RDONLY,))
        if own is None:
            return None
        if isinstance(own, int):
            return cls(own, lambda: os.read(own, CHUNK), lambda: os.close(own))
        from socket import MSG_DONTWAIT

        return cls(own.fileno(), lambda: own.recv(CHUNK, MSG_DONTWAIT), own.close)


def _opened(fd: int, modes: tuple[int, ...]) -> "int | socket | None":
    """Return what is at `fd`, for us alone: a descriptor that never waits, or a stream socket.

    The latter is told with each message not to wait. A descriptor is of a pipe that is open in one
    of `modes`, opened anew in the first of them. None where it may wait: a terminal, a file; or if
    it is closed, a pipe of another user's, or one that nobody reads.
    """
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind == stat.S_IFIFO and fcntl(fd, F_GETFL) & os.O_ACCMODE in modes:
            return os.open(f"/proc/self/fd/{fd}", modes[0] | os.O_NONBLOCK | os.O_CLOEXEC)
        if kind == stat.S_IFSOCK:
            from socket import SOCK_STREAM, socket

            sock = socket(fileno=os.dup(fd))
            if sock.type == SOCK_STREAM:
                return sock
            sock.close()
    except OSError:
        return None
    return None


class Wake:
    """What one thread waits for and others set, once for all of them: an Event that clears itself.

    It is lighter: an Event is made of locks in Python, this of one in C.
    """

    def __init__(self) -> None:
        self._words: SimpleQueue[None] = SimpleQueue()

    def wait(self, timeout: float | None = None) -> bool:
        """Return once it was set since the last time; False if not within `timeout` seconds."""
        try:
            self._words.get(timeout=timeout)
        except Empty:
            return False
        return True

    def set(self) -> None:
        """Have `wait` return. From any thread."""
        if self._words.empty():
            self._words.put(None)


class PortOutput:
    """Guest to host over a console port: `read` in one relay thread, the rest from any.

    `_lock` covers each use of the port, and `_port` is None once it is released.
    """

    def __init__(self, port: ConsolePort) -> None:
        self._port: ConsolePort | None = port
        self._lock = threading.Lock()
        self._wake = Wake()
        self._finished = False
        port.on_output = self._wake.set

    def read(self) -> bytes:
        """Return the next buffer; b"" once finished and empty."""
        while True:
            # In this order: what was queued before finish() must be seen by the take after it.
            finished = self._finished
            with self._lock:
                data = b"" if self._port is None else self._port.take_output()
            if data or finished:
                return data
            self._wake.wait()

    def pass_to(self, send: Callable[[Views], int]) -> None:
        """Have `send` take at once what it can; `read` has what it leaves."""
        with self._lock:
            if self._port is not None:
                self._port.pass_to(send)

    def finish(self) -> None:
        """End the stream once the port is empty."""
        self._finished = True
        self._wake.set()

    def release(self) -> None:
        """Let go of the port."""
        with self._lock:
            port, self._port = self._port, None
            if port is not None:
                port.pass_to(None)
        self.finish()


class PortInput:
    """Host to guest over a console port: all but `release` in one thread, and that from any.

    A few bytes at a time are put by the device's own thread (`attend`), which has passed on what
    they answer: two threads would meet at the interpreter's lock. For many, and where there is no
    room at once, it is worth to wake the other, which may wait.

    `_lock` covers each use of the port, and `_port` is None once it is released.
    """

    def __init__(self, port: ConsolePort) -> None:
        self._port: ConsolePort | None = port
        self._lock = threading.Lock()
        self._space = Wake()
        self._receiver: Receiver | None = None  # whose descriptor the device watches
        self._left: SimpleQueue[bytes] = SimpleQueue()
        self._much = False  # was written last
        port.on_space = self._space.set

    def attend(self, receiver: Receiver) -> bytes | None:
        """Have the device's thread take what comes; see Input."""
        if self._much:
            return None
        with self._lock:
            if self._port is None:
                return b""
            # Look first: of a named pipe that nobody writes to any more nothing is heard.
            with suppress(BlockingIOError):
                return _read(receiver)
            self._receiver = receiver
            if not self._port.watch(receiver.fd, self._take):
                self._receiver = None
                return None
        return self._left.get()

    def _take(self) -> None:
        """Put what there is to read, if it is little and there is room; on the device's thread."""
        with self._lock:
            port, receiver = self._port, self._receiver
            if port is None or receiver is None:
                return
            try:
                data = _read(receiver)
            except BlockingIOError:  # others have read it
                return
            if 0 < len(data) <= LITTLE:
                accepted = port.put_input(data)
                if accepted == len(data):
                    return
                data = data[accepted:]
            self._receiver = None
            port.unwatch(receiver.fd)
            self._left.put(data)

    def write(self, data: bytes) -> None:
        """Block until the guest has posted buffers for all of `data`."""
        self._much = len(data) > LITTLE
        rest = memoryview(data)
        patient = True
        while True:
            with self._lock:
                if self._port is None:
                    return
                accepted = self._port.put_input(rest, patient=patient)
            if accepted == len(rest):
                return
            rest = rest[accepted:]
            patient = self._space.wait(PATIENCE if patient else None)

    def close(self) -> None:
        """Close the port for the guest's reader."""
        with self._lock:
            if self._port is not None:
                self._port.close()

    def release(self) -> None:
        """Let go of the port."""
        with self._lock:
            port, self._port = self._port, None
            if port is not None and self._receiver is not None:
                port.unwatch(self._receiver.fd)
        self._left.put(b"")
        self._space.set()


def _read(receiver: Receiver) -> bytes:
    """Read; an input that fails is at its end. BlockingIOError if there is nothing now."""
    try:
        return receiver.read()
    except BlockingIOError:
        raise
    except OSError:
        return b""


class SocketOutput:
    """Guest to host over a stream socket whose other end closes when the machine is gone.

    `read` in one relay thread, `settle` in another. Nobody can see from here whether the machine
    still holds bytes, so whoever ends it first lets the stream settle, and reads on to its end.
    """

    def __init__(self, sock: "socket") -> None:
        self._sock = sock
        self._received = 0
        self._waiting = threading.Event()  # set while `read` waits for the other end, or after it

    def read(self) -> bytes:
        """Return the next bytes; b"" when the other end has closed."""
        self._waiting.set()
        try:
            data = self._sock.recv(CHUNK)
        except ConnectionError:
            return b""  # the machine was killed: the same end, less politely
        if data:
            self._waiting.clear()
            self._received += len(data)
        return data

    def pass_to(self, send: Callable[[Views], int]) -> None:
        """Do nothing: no machine of ours is at the other end."""

    def finish(self) -> None:
        """Do nothing: the end of this stream is the machine's."""

    def release(self) -> None:
        """Do nothing: the socket is ours, and its other end may go at any time."""

    def settle(self, quiet: float = 0.02) -> None:
        """Return once `read` has waited in vain for `quiet` seconds, however slow its caller is."""
        while True:
            self._waiting.wait()
            before = self._received
            sleep(quiet)
            if self._received == before and self._waiting.is_set():
                return


class SocketInput:
    """Host to guest over a stream socket, which stays open for reading after `close`."""

    def __init__(self, sock: "socket") -> None:
        self._sock = sock

    def write(self, data: bytes) -> None:
        """Block until the socket has taken all of `data`; it takes nothing once the end is gone."""
        try:
            self._sock.sendall(data)
        except ConnectionError:
            return  # the machine is gone; whoever watches it says so

    def close(self) -> None:
        """Send end of file. Only half is closed: a hang-up would overtake data in QEMU."""
        try:
            self._sock.shutdown(SHUT_WR)
        except OSError as error:
            if error.errno not in {errno.ENOTCONN, errno.EBADF}:  # its owner may have closed it
                raise

    def attend(self, receiver: Receiver) -> bytes | None:
        """Leave it to the caller."""
        del receiver
        return None

    def release(self) -> None:
        """Wake a blocked writer: to a machine that listens no more, the end is as good as any."""
        self.close()
