"""passt: the guest's connections as sockets of an ordinary program of this user's.

Debian's package passt. We are its QEMU: a stream socket on which each frame follows its length,
four bytes, big-endian (QEMU's `-netdev stream`). passt makes of the guest's TCP, UDP and ICMP what
a program here would do, so no privilege is needed; the gateway's address is this computer's
loopback.
"""

import socket
import struct
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress

from tinyvmm.errors import ConfigError
from tinyvmm.net.pump import Pump
from tinyvmm.views import scatter, size_of

_CHUNK = 128 * 1024
_length = struct.Struct(">I")


class Frames:
    """Frames over a connected stream socket; `Backend` of a VirtioNet."""

    vnet_header = False

    def __init__(self, sock: socket.socket, on_end: Callable[[], None]) -> None:
        """Take over `sock`; `on_end` is called once, when the other end is gone."""
        sock.setblocking(False)
        self.sock = sock
        self._on_end = on_end
        self._ended = False
        self._unsent = b""  # the rest of a frame that was taken
        self._received = bytearray()
        self.pump = Pump(sock.fileno())

    def send(self, views: Sequence[memoryview]) -> bool:
        """Send a frame, or what remains of the last one first."""
        if self._ended:
            return True
        with suppress(BlockingIOError):
            return self._send(views)
        self.pump.want_write()
        return False

    def _send(self, views: Sequence[memoryview]) -> bool:
        """Send the rest of the last frame, then this one; False if there is still a rest."""
        try:
            if self._unsent:
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
            if self._unsent:
                self.pump.want_write()
                return False
            head = _length.pack(size_of(views))
            sent = self.sock.sendmsg([head, *views])
        except BlockingIOError:
            raise
        except OSError:
            self._end()
            return True
        if sent < len(head) + size_of(views):
            self._unsent = b"".join([head, *views])[sent:]
            self.pump.want_write()
        return True

    def receive(self, views: Sequence[memoryview]) -> int | None:
        """Give the next frame that has come whole."""
        room = size_of(views)
        while True:
            if len(self._received) >= _length.size:
                (length,) = _length.unpack_from(self._received)
                end = _length.size + length
                if len(self._received) >= end:
                    frame = bytes(memoryview(self._received)[_length.size : end])
                    del self._received[:end]
                    if length > room:
                        continue
                    return scatter(views, frame)
                if length > _CHUNK:
                    self._end()  # no frame is that long: it talks of something else
                    return None
            try:
                data = self.sock.recv(_CHUNK)
            except BlockingIOError:
                return None
            except OSError:
                data = b""
            if not data:
                self._end()
                return None
            self._received += data

    def _end(self) -> None:
        self.pump.want_read(False)
        if not self._ended:
            self._ended = True
            self._on_end()

    def watch(self, *, readable: bool) -> None:
        """See Backend.watch."""
        self.pump.want_read(readable and not self._ended)

    def use(self, features: int) -> None:
        """There is nothing to agree on."""

    def close(self) -> None:
        """Stop, and close the socket."""
        self.pump.close()
        self.sock.close()


class Passt:
    """A passt of our own; `frames` is the backend."""

    def __init__(self, options: Sequence[str], warn: Callable[[str], None]) -> None:
        """Start it with these command-line options; ConfigError if it cannot be had."""
        ours, its = socket.socketpair()
        command = ["passt", "--foreground", "--quiet", "--fd", str(its.fileno()), *options]
        try:
            with its:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[its.fileno()],
                )
        except OSError as error:
            ours.close()
            raise ConfigError(
                f"--net user: cannot run passt ({error.strerror}); apt-get install passt"
            ) from None
        self.frames = Frames(ours, lambda: warn("passt has ended: the guest's network is gone"))

    def close(self) -> None:
        """End it."""
        self.frames.close()
        self._process.terminate()
        self._process.communicate()
