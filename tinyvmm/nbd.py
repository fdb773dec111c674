"""A disk for NBD clients: the Network Block Device protocol, proto.md of the nbd project.

"Fixed newstyle" negotiation with EXPORT_NAME, LIST, INFO, GO and ABORT; one export, which also has
the empty name; then READ, FLUSH, CACHE and DISC, with simple replies. The export is read-only:
what would write is EPERM. Any byte range can be read, of 32 MiB at most. Not done: TLS, structured
replies, and with them block status.

What a client can cost us is bounded: options of 4 KiB, a hundred of them, 10 seconds for all; one
request at a time, and its data's room. What is no NBD at all, or cannot be answered so that the
client understands, ends the connection.

Threads: each connection has one; the disk is asked by all of them, one at a time each.
"""

import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from tinyvmm.fileserver.address import Address
from tinyvmm.fileserver.server import Conversation, Listener

PORT = 10809
GREETING = 10.0  # seconds for the negotiation
OPTION_MAX = 4096 + 256  # bytes: an export's name has 4096 at most
OPTIONS_MAX = 100
READ_MAX = 32 << 20  # what a client may ask for that has not asked for limits
_KEPT = 1 << 20  # a buffer of this size is used again

_greeting = struct.Struct(">8s8sH")  # NBDMAGIC, IHAVEOPT, flags
_option = struct.Struct(">QII")  # IHAVEOPT, option, length
_option_reply = struct.Struct(">QIII")  # magic, option, type, length
_request = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
_reply = struct.Struct(">IIQ")  # magic, error, cookie
_MAGIC, _IHAVEOPT = b"NBDMAGIC", b"IHAVEOPT"
_OPTION_MAGIC = int.from_bytes(_IHAVEOPT, "big")
_OPTION_REPLY_MAGIC = 0x3_E889_0455_65A9
_REQUEST_MAGIC, _REPLY_MAGIC = 0x2560_9513, 0x6744_6698

FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1 << 0, 1 << 1
# NBD_FLAG_HAS_FLAGS, READ_ONLY, SEND_FLUSH, CAN_MULTI_CONN, SEND_CACHE
TRANSMISSION_FLAGS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 8 | 1 << 10

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO = 1, 2, 3, 6, 7
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
REP_ERR_UNSUP, REP_ERR_INVALID, REP_ERR_UNKNOWN, REP_ERR_TOO_BIG = (
    1 << 31 | number for number in (1, 3, 6, 9)
)
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES = range(7)
EPERM, EIO, EINVAL = 1, 5, 22


class ReadDisk(Protocol):
    """What is served: `size` bytes, any of which may be read, from any thread."""

    size: int

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from `offset` on; OSError if that cannot be."""


class Export(NamedTuple):
    """A disk under the name that clients ask for."""

    name: bytes
    description: bytes
    disk: ReadDisk


class NbdServer(Listener):
    """Serves one export at `addresses`, which afterwards say where exactly; see Listener."""

    what = "NBD"

    def __init__(
        self,
        export: Export,
        addresses: Sequence[Address],
        *,
        connections_max: int = 16,
        idle: int = 0,
        socket_mode: int = 0o600,
    ) -> None:
        """Serve `export`, whose disk stays the caller's; ConfigError for an address not to be had.

        No more than `connections_max` clients are served at once; one that is silent for `idle`
        seconds, if that is not 0, is hung up on.
        """
        self._export = export
        self._idle = idle
        super().__init__(addresses, connections_max=connections_max, socket_mode=socket_mode)

    def converse(self, sock: socket.socket, number: int) -> Conversation:
        """Return a client's conversation."""
        return NbdConnection(sock, self._export, self._idle, lambda what: self.say(number, what))


class _Ended(Exception):  # noqa: N818 (no error: an end)
    """The conversation is over; the text, if any, says what was wrong with it."""


class NbdConnection:
    """One client."""

    def __init__(
        self, sock: socket.socket, export: Export, idle: int, say: Callable[[str], None]
    ) -> None:
        """Take over `sock`, a blocking stream; `say` takes what was wrong with the client."""
        self._sock = sock
        self._export = export
        self._idle = idle
        self._say = say
        self._room = bytearray()
        self._deadline: float | None = None  # of the negotiation

    def serve(self) -> None:
        """Answer until the client leaves, or `end` is called."""
        try:
            self._deadline = time.monotonic() + GREETING
            self._negotiate()
            self._deadline = None
            self._sock.settimeout(self._idle or None)
            while True:
                self._serve_request(*_request.unpack(self._receive(_request.size)))
        except _Ended as ended:
            if ended.args:
                self._say(f"no NBD: {ended}")
        except TimeoutError:
            self._say("nothing heard for too long")
        except OSError:
            return  # the client has gone
        finally:
            self._sock.close()

    def end(self) -> None:
        """Have `serve` return soon, whatever it is waiting for; any thread may call."""
        with suppress(OSError):  # the client was quicker
            self._sock.shutdown(socket.SHUT_RDWR)

    def _receive(self, count: int) -> bytearray:
        """Return the next `count` bytes."""
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            if self._deadline is not None:  # a byte now and then is not enough
                self._sock.settimeout(max(self._deadline - time.monotonic(), 0.001))
            got = self._sock.recv_into(view[done:])
            if not got:
                raise _Ended
            done += got
        return data

    def _skip(self, count: int) -> None:
        while count:
            count -= len(self._receive(min(count, _KEPT)))

    # --- negotiation ------------------------------------------------------------------------------

    def _negotiate(self) -> None:
        """Come to an understanding about the export."""
        ours = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES
        self._sock.sendall(_greeting.pack(_MAGIC, _IHAVEOPT, ours))
        flags = int.from_bytes(self._receive(4), "big")
        if flags & ~ours:
            raise _Ended(f"unknown client flags {flags:#x}")
        for _ in range(OPTIONS_MAX):
            magic, option, length = _option.unpack(self._receive(_option.size))
            if magic != _OPTION_MAGIC:
                raise _Ended(f"an option that begins with {magic:#x}")
            if length > OPTION_MAX:
                if option == OPT_EXPORT_NAME or length > READ_MAX:
                    raise _Ended(f"an option of {length} bytes")
                self._skip(length)
                self._answer(option, REP_ERR_TOO_BIG)
                continue
            if self._option(option, bytes(self._receive(length)), flags):
                return
        raise _Ended(f"more than {OPTIONS_MAX} options")

    def _option(self, option: int, data: bytes, flags: int) -> bool:
        """Answer one option; whether requests follow."""
        if option == OPT_EXPORT_NAME:
            if not self._is_ours(data):
                raise _Ended(f"no export {data!r}")  # this option knows no other answer
            zeroes = b"" if flags & FLAG_NO_ZEROES else bytes(124)
            self._sock.sendall(self._size_and_flags() + zeroes)
            return True
        if option in {OPT_INFO, OPT_GO}:
            return self._info(option, data)
        if option == OPT_ABORT:
            self._answer(option, REP_ACK)
            raise _Ended
        if option != OPT_LIST:
            self._answer(option, REP_ERR_UNSUP)
        elif data:
            self._answer(option, REP_ERR_INVALID)
        else:
            name = self._export.name
            self._answer(option, REP_SERVER, struct.pack(">I", len(name)) + name)
            self._answer(option, REP_ACK)
        return False

    def _info(self, option: int, data: bytes) -> bool:
        """INFO and GO: tell about an export, and with GO begin."""
        name_len = int.from_bytes(data[:4], "big")
        name, rest = data[4 : 4 + name_len], data[4 + name_len :]
        count = int.from_bytes(rest[:2], "big")
        if len(data) < 6 or len(name) < name_len or len(rest) != 2 + 2 * count:
            self._answer(option, REP_ERR_INVALID)
            return False
        if not self._is_ours(name):
            self._answer(option, REP_ERR_UNKNOWN)
            return False
        told = {
            INFO_EXPORT: self._size_and_flags(),
            INFO_NAME: self._export.name,
            INFO_DESCRIPTION: self._export.description,
            INFO_BLOCK_SIZE: struct.pack(">III", 1, 4096, READ_MAX),
        }
        asked = set(struct.unpack(f">{count}H", rest[2:]))
        for kind, value in told.items():
            if kind == INFO_EXPORT or kind in asked:
                self._answer(option, REP_INFO, struct.pack(">H", kind) + value)
        self._answer(option, REP_ACK)
        return option == OPT_GO

    def _is_ours(self, name: bytes) -> bool:
        return name in {b"", self._export.name}

    def _size_and_flags(self) -> bytes:
        return struct.pack(">QH", self._export.disk.size, TRANSMISSION_FLAGS)

    def _answer(self, option: int, kind: int, data: bytes = b"") -> None:
        header = _option_reply.pack(_OPTION_REPLY_MAGIC, option, kind, len(data))
        self._sock.sendall(header + data)

    # --- requests ---------------------------------------------------------------------------------

    def _serve_request(
        self, magic: int, flags: int, kind: int, cookie: int, offset: int, length: int
    ) -> None:
        del flags  # FUA and the like say how to write
        if magic != _REQUEST_MAGIC:
            raise _Ended(f"a request that begins with {magic:#x}")
        if kind == CMD_DISC:
            raise _Ended
        if kind == CMD_READ:
            self._read(cookie, offset, length)
            return
        error = EINVAL
        if kind in {CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES}:
            error = EPERM
            if kind == CMD_WRITE:
                if length > READ_MAX:
                    raise _Ended(f"{length} bytes to write")
                self._skip(length)
        elif kind in {CMD_FLUSH, CMD_CACHE}:
            error = 0
        self._sock.sendall(_reply.pack(_REPLY_MAGIC, error, cookie))

    def _read(self, cookie: int, offset: int, length: int) -> None:
        disk = self._export.disk
        error = 0 if 0 < length <= READ_MAX and offset + length <= disk.size else EINVAL
        if not error:
            if len(self._room) < length:
                self._room = bytearray(length)
            try:
                disk.read_into([memoryview(self._room)[:length]], offset)
            except OSError:
                error = EIO
        self._sock.sendall(_reply.pack(_REPLY_MAGIC, error, cookie))
        if not error:
            self._sock.sendall(memoryview(self._room)[:length])
        if len(self._room) > _KEPT:
            self._room = bytearray()
