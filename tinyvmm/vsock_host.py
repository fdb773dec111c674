r"""The host's side of virtio-vsock: Unix sockets, in Firecracker's convention.

To reach what listens at a port of the guest, a program connects to the Unix socket PATH, sends
`CONNECT 1024\n`, and once the guest has accepted gets `OK 1073741824\n`, the number being the port
at this end; from there on it is the connection. If the guest refuses, the socket is closed. What a
program of the guest connects to, port N of CID 2, is the Unix socket PATH_N.

Threads: one of its own, asleep in epoll until there is somebody to accept. Where the device has a
thread for its doorbells, that one hears of what can be read and written, so that a byte there and
back wakes nobody else; where it has none, the one here does. Either calls the device, which takes
its lock. A `HostStream` is called by the device with that lock held. `_lock` guards which streams
there are, and what epoll looks for; it is taken last.
"""

import errno
import os
import select
import socket
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from tinyvmm.errors import ConfigError

if TYPE_CHECKING:
    from tinyvmm.devices.virtio.device import Watcher

_REQUEST_MAX = 32  # of a line "CONNECT port\n"
_STREAMS_MAX = 2048  # accepted or connected, the device's limit and as many that have not asked yet
_BACKLOG = 128
_LOOK_AGAIN = 0.1  # seconds, for descriptors where there were none left


class Device(Protocol):
    """What is used of devices.virtio.vsock.VirtioVsock."""

    @property
    def watcher(self) -> "Watcher | None":
        """Its thread, if it has one."""

    def connect(self, peer: "HostStream", port: int) -> object | None:
        """Open a connection to a port of the guest."""

    def readable(self, peer: "HostStream") -> None:
        """There are bytes to receive."""

    def writable(self, peer: "HostStream") -> None:
        """There is room to send."""


class HostStream:
    """One Unix stream socket; what devices/virtio/vsock.py calls a Peer."""

    def __init__(self, host: "VsockHost", sock: socket.socket, *, asks: bool) -> None:
        self._host = host
        self.sock = sock
        self.asks = asks  # has yet to say where it wants to connect to
        self.events = 0  # that epoll looks for; for none at all it does not know the socket

    def ready(self) -> None:
        """Pass on what can be; on the thread that heard of it."""
        events, device = self.events, self._host.device
        if device is None:
            return
        if events & select.EPOLLOUT:
            device.writable(self)
        if events & select.EPOLLIN:
            device.readable(self)

    def accepted(self, host_port: int) -> None:
        """Tell the program that it is connected."""
        if self.asks:
            self.asks = False
            with suppress(OSError):  # it has gone meanwhile, which reading it will show
                self.sock.send(f"OK {host_port}\n".encode())

    def send(self, views: Sequence[memoryview]) -> int:
        """Take as much as the socket has room for."""
        try:
            return self.sock.sendmsg(views)
        except BlockingIOError:
            return 0

    def receive(self, views: Sequence[memoryview]) -> int | None:
        """Fill `views` with what is there."""
        try:
            return self.sock.recvmsg_into(views)[0]
        except BlockingIOError:
            return None

    def end_output(self) -> None:
        """Let the program see end of file."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def watch(self, *, readable: bool, writable: bool) -> None:
        """Have the thread look for these; a hang-up is readable, and shows when it is read."""
        events = (select.EPOLLIN if readable else 0) | (select.EPOLLOUT if writable else 0)
        self._host.watch(self, events)

    def close(self) -> None:
        """Close the socket."""
        self._host.forget(self)


class VsockHost:
    """The sockets of one device: PATH, what is connected to it, and to PATH_N."""

    def __init__(self, path: str) -> None:
        """Listen at `path`, for this user alone; ConfigError if that cannot be."""
        self.path = path
        self.device: Device | None = None
        self._streams: dict[int, HostStream] = {}
        self._offers: dict[int, Callable[[socket.socket], None]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._listener = _listen(path)
        self._deaf = False  # the listener is not looked at for a moment
        self._epoll = select.epoll()
        self._end = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._end, select.EPOLLIN)

    def start(self, device: Device, on_error: Callable[[BaseException], None]) -> None:
        """Serve `device` from now on; `on_error` takes a bug of ours."""
        self.device = device
        self._on_error = on_error
        self._epoll.register(self._listener, select.EPOLLIN)
        self._thread = threading.Thread(target=self._main, name="vsock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, close every socket and remove PATH."""
        os.eventfd_write(self._end, 1)
        if self._thread is not None:
            self._thread.join()
        for stream in list(self._streams.values()):
            self.forget(stream)
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        self._listener.close()
        self._epoll.close()
        os.close(self._end)

    def offer(self, port: int, take: Callable[[socket.socket], None]) -> None:
        """Have `take` get this end of what the guest connects to `port`, in place of PATH_port.

        A blocking socket; `take` must not wait, as the device's lock is held.
        """
        self._offers[port] = take

    def withdraw(self, port: int) -> None:
        """End an offer; harmless if there is none."""
        self._offers.pop(port, None)

    def tidy(self, ports: range) -> None:
        """Remove PATH_N, N of `ports`, of every listener that died before it could do so itself."""
        directory, base = os.path.split(self.path)
        try:
            names = os.listdir(directory or ".")
        except OSError:
            return  # it has gone, or is not for us to look into
        for name in names:
            start, _, number = name.rpartition("_")
            if start == base and number.isascii() and number.isdecimal() and int(number) in ports:
                path = os.path.join(directory, name)
                if _is_abandoned(path):
                    with suppress(OSError):  # gone meanwhile, or not ours to remove
                        os.unlink(path)

    # --- what the device asks for -----------------------------------------------------------

    def dial(self, port: int) -> HostStream | None:
        """Connect to PATH_port, or take up what is offered there."""
        take = self._offers.get(port)
        try:
            if take is not None:
                theirs, ours = socket.socketpair()
            else:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:  # the guest may have taken our last descriptor
            return None
        if take is not None:
            ours.setblocking(False)
            stream = self._add(ours, asks=False)
            if stream is None:
                theirs.close()
            else:
                take(theirs)
            return stream
        try:
            sock.connect(f"{self.path}_{port}")
        except OSError:  # nobody, or nobody who has time
            sock.close()
            return None
        return self._add(sock, asks=False)

    def watch(self, stream: HostStream, events: int) -> None:
        """See HostStream.watch."""
        if events == stream.events:
            return
        fd = stream.sock.fileno()
        with self._lock:
            if self._streams.get(fd) is stream:
                self._look(stream, fd, events)
                stream.events = events

    def _look(self, stream: HostStream, fd: int, events: int) -> None:
        watcher = self.device.watcher if self.device is not None else None
        if watcher is not None and not stream.asks:
            if not events:
                watcher.unwatch(fd)
            elif not watcher.watch(fd, stream.ready, events):
                raise OSError(errno.ENOSPC, "epoll takes no more sockets")
        elif not stream.events:
            self._epoll.register(fd, events)
        elif not events:
            self._epoll.unregister(fd)
        else:
            self._epoll.modify(fd, events)

    def forget(self, stream: HostStream) -> None:
        """Close a stream's socket; harmless when done twice."""
        fd = stream.sock.fileno()
        with self._lock:
            if self._streams.get(fd) is stream:
                del self._streams[fd]
                if stream.events:
                    self._look(stream, fd, 0)
                stream.sock.close()

    def _add(self, sock: socket.socket, *, asks: bool) -> HostStream | None:
        stream = HostStream(self, sock, asks=asks)
        with self._lock:
            if len(self._streams) >= _STREAMS_MAX:
                sock.close()
                return None
            self._streams[sock.fileno()] = stream
        return stream

    # --- the thread -------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while True:
                ready = self._epoll.poll(_LOOK_AGAIN if self._deaf else None)
                self._hear(True)
                for fd, _ in ready:
                    if fd == self._end:
                        return
                    if fd == self._listener.fileno():
                        self._accept()
                    else:
                        self._serve(fd)
        except BaseException as error:  # noqa: BLE001 (a thread's end must reach the machine)
            self._on_error(error)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # it has gone
        except OSError:
            self._hear(False)  # no descriptors are left: it waits, and must not wake us again
            return
        sock.setblocking(False)
        stream = self._add(sock, asks=True)
        if stream is not None:
            self.watch(stream, select.EPOLLIN | select.EPOLLET)  # once for each piece that comes

    def _hear(self, wanted: bool) -> None:
        """Have epoll tell of programs that connect, or not."""
        if wanted == self._deaf:
            self._epoll.modify(self._listener, select.EPOLLIN if wanted else 0)
            self._deaf = not wanted

    def _serve(self, fd: int) -> None:
        with self._lock:
            stream = self._streams.get(fd)
        if stream is None or self.device is None:
            return
        if stream.asks:
            self._asked(stream, self.device)
        else:
            stream.ready()

    def _asked(self, stream: HostStream, device: Device) -> None:
        """Read where a program wants to connect to, no byte further than the line goes."""
        try:
            seen = stream.sock.recv(_REQUEST_MAX, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            seen = b""
        line, newline, _ = seen.partition(b"\n")
        if not newline and 0 < len(seen) < _REQUEST_MAX:
            return  # the rest is to come
        word, _, number = line.strip().partition(b" ")
        if not newline or word != b"CONNECT" or not number.isdigit() or int(number) >> 32:
            self.forget(stream)
            return
        stream.sock.recv(len(line) + 1)
        self.watch(stream, 0)
        if device.connect(stream, int(number)) is None:
            self.forget(stream)


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    os.fchmod(listener.fileno(), 0o600)  # and so of the file: a umask is the whole process's
    try:
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--vsock {path}: cannot listen there ({error.strerror or error}); give another path"
        ) from None
    return listener


def _is_abandoned(path: str) -> bool:
    """Whether a socket was bound to this file, and is no more.

    A socket of the other type is told so by one that is there (EPROTOTYPE), and reaches nobody.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                return False
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
