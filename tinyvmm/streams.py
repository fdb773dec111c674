"""The ends of a command's streams: one way each, blocking, alike whatever carries them.

`PortInput` and `PortOutput` are over a port of our own virtio console; `SocketInput` and
`SocketOutput` over a stream socket whose other end QEMU holds for a port of its own. A session
(tinyvmm/session.py) reads and writes them from one thread per stream; `finish` comes from
another thread and releases whoever is blocked.
"""

import errno
import threading
from collections.abc import Callable
from time import sleep
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from socket import socket

CHUNK = 64 * 1024


class Input(Protocol):
    """A stream into the guest."""

    def write(self, data: bytes) -> None:
        """Block until all of `data` is accepted, or the stream is finished."""

    def close(self) -> None:
        """Let the guest's reader see end of file after what was written."""

    def finish(self) -> None:
        """Release a blocked writer: nobody will read any more."""


class Output(Protocol):
    """A stream out of the guest."""

    def read(self) -> bytes:
        """Block until there is data; b"" at the end."""

    def finish(self) -> None:
        """End the stream after what the guest has already sent."""


class ConsolePort(Protocol):
    """What is used of devices.virtio.console.ConsolePort."""

    on_output: Callable[[], None]
    on_space: Callable[[], None]

    def take_output(self) -> bytes:
        """One buffer the guest sent, b"" when there is none."""

    def put_input(self, data: bytes | memoryview) -> int:
        """Hand over what fits, and return its length."""

    def close(self) -> None:
        """Let the guest's reader see end of file."""


class PortOutput:
    """Guest to host over a console port: `read` in one relay thread, the rest from any."""

    def __init__(self, port: ConsolePort) -> None:
        self._port = port
        self._ready = threading.Event()
        self._finished = False
        port.on_output = self._ready.set

    def read(self) -> bytes:
        """Return the next buffer; b"" once finished and empty."""
        while True:
            self._ready.clear()
            # In this order: what was queued before finish() must be seen by the take after it.
            finished = self._finished
            data = self._port.take_output()
            if data or finished:
                return data
            self._ready.wait()

    def finish(self) -> None:
        """End the stream once the port is empty."""
        self._finished = True
        self._ready.set()


class PortInput:
    """Host to guest over a console port: `write` and `close` in one thread, `finish` from any."""

    def __init__(self, port: ConsolePort) -> None:
        self._port = port
        self._space = threading.Event()
        self._finished = False
        port.on_space = self._space.set

    def write(self, data: bytes) -> None:
        """Block until the guest has posted buffers for all of `data`."""
        rest = memoryview(data)
        while rest and not self._finished:
            self._space.clear()
            accepted = self._port.put_input(rest)
            rest = rest[accepted:]
            if not accepted and not self._finished:
                self._space.wait()

    def close(self) -> None:
        """Close the port for the guest's reader."""
        self._port.close()

    def finish(self) -> None:
        """Drop what is not yet accepted."""
        self._finished = True
        self._space.set()


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

    def finish(self) -> None:
        """Do nothing: the end of this stream is the machine's."""

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
        self._shutdown(1)  # SHUT_WR

    def finish(self) -> None:
        """Release a blocked writer."""
        self._shutdown(1)

    def _shutdown(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
