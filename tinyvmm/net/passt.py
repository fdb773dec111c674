"""passt: the guest's connections as sockets of an ordinary program of this user's.

Debian's package passt. We are its QEMU: a stream socket on which each frame follows its length,
four bytes, big-endian (QEMU's `-netdev stream`). passt makes of the guest's TCP, UDP and ICMP what
a program here would do, so no privilege is needed; the gateway's address is this computer's
loopback.

passt throws away what it finds no room for in that socket, and then waits two seconds or more
before it sends again. So frames are taken from it as they come, and wait here for the guest's
buffers: 16 MiB of them, more than the windows of a few TCP connections.

Threads: the pump's calls `drain`; all else is called with the device's lock held. Frames pass from
one to the other in a deque; of the two counts each side writes one.
"""

import fcntl
import socket
import struct
import subprocess
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from tinyvmm.errors import ConfigError
from tinyvmm.net.handshake import acknowledgement
from tinyvmm.net.pump import Pump
from tinyvmm.views import scatter, size_of

BACKLOG_MAX = 16 << 20  # bytes
_KEPT_COST = 256  # what keeping a frame takes besides its bytes
_CHUNK = 256 * 1024
_CHUNKS = 4  # read before the device is told
_FRAME_MAX = 128 * 1024
_BUFFER = 4 << 20  # bytes, asked for in the socket; the kernel's limit for users is less
_ANSWER_TIMEOUT = 30.0  # seconds
_READ_TIMEOUT = 1.0
_READ_INTERVAL = 0.0002
_END_TIMEOUT = 1.0
_length = struct.Struct(">I")


class Frames:
    """Frames over a connected stream socket; `Backend` of a VirtioNet."""

    vnet_header = False

    def __init__(
        self, sock: socket.socket, on_end: Callable[[], None], *, published: bool = False
    ) -> None:
        """Take over `sock`; `on_end` is called once, when the other end is gone.

        `published`: the other end connects to the guest, see handshake.py.
        """
        sock.setblocking(False)
        self.sock = sock
        self._on_end = on_end
        self._published = published
        self._ended = False
        self._end_lock = threading.Lock()
        self._unsent = b""  # the rest of a frame that was taken
        self._partial = b""  # the beginning of a frame that has not come whole
        self._frames: deque[memoryview] = deque()
        self._came = self._gone = 0  # bytes: the pump's count, and the device's
        self._full = False
        self._answer: bytes | None = None  # to the SYN,ACK that was sent last
        self._answer_due = False  # the other end has read that
        self.pump = Pump(sock.fileno(), self.drain, self.settle)
        self.pump.want_read(True)

    def send(self, views: Sequence[memoryview]) -> bool:
        """Send a frame, or what remains of the last one first."""
        if self._ended:
            return True
        if self._answer is not None:
            return False  # `writable` is called when that has been given
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
        if self._published and (answer := acknowledgement(views)) is not None:
            self._answer = answer
            self.pump.wake()
        return True

    def settle(self) -> None:
        """Wait until a SYN,ACK that is to be answered has been read; the pump's thread.

        Were the guest's first data in the same batch, passt of Debian 12 would count that batch for
        ever (tap4_handler: tcp_tap_handler takes its first frame, and then all of them).
        """
        if self._answer is None:
            return
        end = time.monotonic() + _READ_TIMEOUT
        with suppress(OSError):
            while not self._ended and time.monotonic() < end and self._unread():
                self.drain()  # it may wait for us
                time.sleep(_READ_INTERVAL)
        self._answer_due = True

    def drain(self) -> None:
        """Take what has come from the socket; the pump's thread."""
        for _ in range(_CHUNKS):
            if self._came - self._gone >= BACKLOG_MAX:
                self._full = True
                self.pump.want_read(False)
                self._resume()
                return
            try:
                data = self.sock.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data or not self._cut(self._partial + data if self._partial else data):
                self._end()
                return

    def _cut(self, data: bytes) -> bool:
        """Keep the frames in `data`; False if it talks of something else."""
        view, at, end = memoryview(data), 0, len(data)
        while end - at >= _length.size:
            (length,) = _length.unpack_from(data, at)
            if length > _FRAME_MAX:
                return False
            following = at + _length.size + length
            if following > end:
                break
            self._frames.append(view[at + _length.size : following])
            self._came += length + _KEPT_COST
            at = following
        self._partial = data[at:]
        return True

    def _resume(self) -> None:
        # Both sides come here after they have changed what the other looks at: one of them sees it.
        if self._full and self._came - self._gone < BACKLOG_MAX // 2:
            self._full = False
            self.pump.want_read(not self._ended)

    def receive(self, views: Sequence[memoryview]) -> int | None:
        """Give the next frame that has come whole."""
        if self._answer_due and self._answer is not None:
            answer, self._answer, self._answer_due = self._answer, None, False
            self.pump.want_write()
            return scatter(views, answer)
        room = size_of(views)
        while self._frames:
            frame = self._frames.popleft()
            self._gone += len(frame) + _KEPT_COST
            self._resume()
            if len(frame) <= room:
                return scatter(views, frame)
        return None

    def _end(self) -> None:
        self.pump.want_read(False)
        with self._end_lock:
            first, self._ended = not self._ended, True
        if first:
            self._on_end()

    def watch(self, *, readable: bool) -> None:
        """See Backend.watch: it is told of every frame, and what it does not take waits here."""

    def use(self, features: int) -> None:
        """There is nothing to agree on."""

    def enable(self, *, on: bool) -> None:
        """It is the only one."""

    def end_output(self) -> None:
        """Let the other end see what was sent, and then that there will be no more."""
        end = time.monotonic() + _END_TIMEOUT
        with suppress(OSError):
            while not self._ended and time.monotonic() < end and self._unread():
                time.sleep(_READ_INTERVAL)
            self.sock.shutdown(socket.SHUT_WR)

    def _unread(self) -> bool:
        """Whether the other end has yet to read something (unix(7), SIOCOUTQ)."""
        return fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)) != bytes(4)

    def close(self) -> None:
        """Stop, and close the socket."""
        self.pump.close()
        self.sock.close()


class Passt:
    """A passt of our own; `frames` is the backend."""

    def __init__(
        self,
        options: Sequence[str],
        warn: Callable[[str], None],
        *,
        mac: bytes,
        gateway: bytes,
        published: bool = False,
    ) -> None:
        """Start it with these command-line options, and wait until it answers for `gateway`.

        `mac` is the guest's: passt sends to who was heard last. `published` as for Frames.
        ConfigError if it cannot be had, with what it says itself.
        """
        ours, its = socket.socketpair()
        its.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
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
        if not _answers(ours, mac, gateway):
            ours.close()
            self._process.kill()
            _, said = self._process.communicate()
            words = _last_words(said)
            if "interface" in words:  # that there is no interface; its versions have several ways
                words += "; it stands for one with a route out (ip route): have one, or a --net tap"
            raise ConfigError(f"--net user: passt: {words}")
        self._warn = warn
        self._closing = False
        self.frames = Frames(ours, self._ended, published=published)

    def _ended(self) -> None:
        if not self._closing:
            self._warn("passt has ended: the guest's network is gone")

    def close(self) -> None:
        """End it, once it has passed on what the guest sent."""
        self._closing = True
        self.frames.end_output()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT)
        self._process.kill()
        self.frames.close()
        self._process.communicate()


def _answers(sock: socket.socket, mac: bytes, address: bytes) -> bool:
    """Ask who has `address` (RFC 826): passt answers as soon as it has done all it was told to."""
    question = b"\xff" * 6 + mac + struct.pack(">HHHBBH", 0x806, 1, 0x800, 6, 4, 1)
    question += mac + bytes(4) + bytes(6) + address
    sock.settimeout(_ANSWER_TIMEOUT)
    try:
        sock.sendall(_length.pack(len(question)) + question)
        (length,) = _length.unpack(sock.recv(_length.size, socket.MSG_WAITALL))
        return bool(sock.recv(length, socket.MSG_WAITALL))
    except (OSError, struct.error):
        return False


def _last_words(said: bytes) -> str:
    """Return what passt gave as the reason: the last line that is not about its log."""
    lines = [line.strip() for line in said.decode(errors="replace").splitlines()]
    reasons = [line for line in lines if line and not line.startswith("Failed to send")]
    return reasons[-1] if reasons else "it does not answer"
