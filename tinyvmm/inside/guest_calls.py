"""The kernel of a guest that runs, called from here: files, mounts and processes without an agent.

    with open_guest(client) as guest:                     # `client` is a machine's control socket
        fd = guest.do(openat("/etc/hostname", os.O_RDONLY)).result
        text = guest.do(read(fd, 100)).data
        for answer in guest.each([mkdirat("/a", 0o755), mkdirat("/a/b", 0o755)]): ...

Each function in the second half describes one system call, by its own name and arguments; a
`Guest` has it made and returns the `Answer`. A round trip costs what a few exits cost, so `each`
sends on without waiting; `Slot(N)` stands for the result of an earlier call with `into=N`, so that
what depends on it needs no round trip either: opening, reading and closing a file is one.

The other side is guest/calls.py, a program of the guest as root: it needs nothing of the guest's
image. What comes back is never believed: no answer is longer than was asked for, none keeps us
waiting beyond `timeout`, and one that breaks the rules ends the connection with a ConfigError.
Threads: a Guest is for one at a time.
"""

import os
import select
import socket
import stat
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from time import monotonic
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.guest import abi
from tinyvmm.guest.calls import ANSWER, ARENA, ARENA_LEN, OUT_IS_RESULT, REQUEST, SLOTS
from tinyvmm.instances.exec_client import Caller, accept, listen

PIECE = 1 << 17
"""Bytes of a file in one call; a call's data and what it returns fit the arena with it."""
ENTRIES_MAX = 1 << 20
"""Of one directory."""
PATIENCE = 60.0  # seconds for each answer; a byte now and then is not enough
_CALLS_AHEAD, _BYTES_AHEAD = 64, 1 << 20  # that are sent before their answers are there
_ERRNO_MAX = 4095
NO_ID = 0xFFFF_FFFF


class Slot(int):
    """An argument that is the result of an earlier call with `into` this number, 1 to 63."""

    __slots__ = ()


class Out(int):
    """An argument that points to so many bytes, which come back."""

    __slots__ = ()


class Call(NamedTuple):
    """One system call as it is sent."""

    request: bytes
    data: bytes
    out_max: int
    what: str
    """For an error's message: a path, or the call's name."""


class Answer(NamedTuple):
    """What a call came to: its result or -errno, and the bytes it returned."""

    result: int
    data: bytes
    what: str

    def check(self) -> "Answer":
        """Return itself; OSError if the call failed."""
        if self.result < 0:
            raise OSError(-self.result, os.strerror(-self.result), self.what)
        return self


def call(
    number: int,
    *arguments: int | str | bytes,
    into: int = 0,
    out_is_result: bool = False,
    what: str = "",
) -> Call:
    """Describe any system call. A str is passed as a C string, bytes by their address.

    `out_is_result` says that only so many bytes of its `Out` come back. ValueError if it is too
    long, or a string holds a NUL.
    """
    if not 0 <= into < SLOTS:
        raise ValueError(f"there is no slot {into}")
    data = bytearray()
    values = [0] * 6
    flags = OUT_IS_RESULT if out_is_result else 0
    out: tuple[int, int] | None = None
    for index, argument in enumerate(arguments):
        if isinstance(argument, str | bytes):
            if isinstance(argument, str) and "\0" in argument:
                raise ValueError(f"{argument!r} holds a NUL")
            values[index] = ARENA + len(data)
            data += os.fsencode(argument) + b"\0" if isinstance(argument, str) else argument
            data += bytes(-len(data) % 8)
        elif isinstance(argument, Out):
            out = index, int(argument)
        else:
            flags |= isinstance(argument, Slot) << index
            values[index] = int(argument) & (1 << 64) - 1
    index, out_max = out or (0, 0)
    out_offset = len(data)
    if out is not None:
        values[index] = ARENA + out_offset
    if out_offset + out_max > ARENA_LEN:
        raise ValueError(f"{out_offset + out_max} bytes at once: {ARENA_LEN} at most")
    request = REQUEST.pack(number, *values, len(data), out_offset, out_max, flags, into)
    return Call(request, bytes(data), out_max, what or f"system call {number}")


def open_guest(client: Caller, timeout: float = PATIENCE) -> "Guest":
    """Start the program in a guest that runs; ConfigError if it cannot, or cannot connect back."""
    with ExitStack() as cleanup:
        port, listener = listen(client.call("status")["vsock"], cleanup)
        pid = client.call("calls", port=port)["pid"]
        (sock,) = accept(client, listener, pid, 1, cleanup)
        return Guest(sock.dup(), timeout)


class Guest:
    """A connection to guest/calls.py; `sock` is its own from now on."""

    def __init__(self, sock: socket.socket, timeout: float = PATIENCE) -> None:
        self._sock = sock
        self._sock.setblocking(False)
        self._timeout = timeout
        self._received = bytearray()
        self._poll = select.poll()

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up: the program ends, and what it had open is closed."""
        self._sock.close()

    def give_up(self) -> None:
        """Have who waits for an answer wait no more; any thread."""
        with suppress(OSError):  # it is hung up already
            self._sock.shutdown(socket.SHUT_RDWR)

    def do(self, wanted: Call) -> Answer:
        """Make one call; OSError if it fails."""
        (answer,) = self.all([wanted])
        return answer.check()

    def all(self, wanted: Iterable[Call]) -> list[Answer]:
        """Make calls, and return their answers once all are there, failed ones too."""
        return list(self.each(wanted))

    def each(self, wanted: Iterable[Call]) -> Iterator[Answer]:
        """Make calls one after another and yield their answers, in order, failed ones too.

        Calls are taken from `wanted` ahead of the answers, as many as may be on their way. Whoever
        leaves the loop before its end closes the connection, where answers would be out of step.
        """
        source = iter(wanted)
        more = True
        waiting: deque[Call] = deque()
        ahead = 0  # bytes of what is waited for
        sending = bytearray()
        deadline = monotonic() + self._timeout
        try:
            while True:
                while more and len(waiting) < _CALLS_AHEAD and ahead < _BYTES_AHEAD:
                    following = next(source, None)
                    if following is None:
                        more = False
                        break
                    waiting.append(following)
                    ahead += len(following.data) + following.out_max
                    sending += following.request + following.data
                if not waiting:
                    return
                self._move(sending, deadline)
                while waiting and (answer := self._answer(waiting[0])) is not None:
                    done = waiting.popleft()
                    ahead -= len(done.data) + done.out_max
                    yield answer
                    deadline = monotonic() + self._timeout  # whoever took it may have been slow
                if self._received and not waiting:  # nothing is said unasked, or it would pile up
                    raise ConfigError("the guest answered what was not asked")
        finally:
            if waiting:
                self.close()

    def _move(self, sending: bytearray, deadline: float) -> None:
        """Wait until bytes can be received or sent, and do so."""
        if self._sock.fileno() < 0:
            raise ConfigError("the connection to the guest is closed")
        self._poll.register(self._sock, select.POLLIN | (select.POLLOUT if sending else 0))
        found = self._poll.poll(max(0.0, deadline - monotonic()) * 1000)
        if not found or monotonic() > deadline:
            raise ConfigError(f"the guest did not answer for {self._timeout:g} s")
        try:
            if found[0][1] & select.POLLOUT:
                with memoryview(sending) as view:
                    sent = self._sock.send(view)
                del sending[:sent]
            if found[0][1] & ~select.POLLOUT:
                piece = self._sock.recv(PIECE)
                if not piece:
                    raise ConfigError("the guest hung up")
                self._received += piece
        except BlockingIOError:
            return
        except OSError as error:
            raise ConfigError(f"the guest hung up: {error.strerror}") from None

    def _answer(self, asked: Call) -> Answer | None:
        """Take the next answer, if all of it is there."""
        received = self._received
        if len(received) < ANSWER.size:
            return None
        result, length = ANSWER.unpack_from(received)
        if length > asked.out_max or result < -_ERRNO_MAX:
            raise ConfigError("the guest answered what was not asked")
        end = ANSWER.size + length
        if len(received) < end:
            return None
        data = bytes(received[ANSWER.size : end])
        del received[:end]
        return Answer(result, data, asked.what)


# --- the calls, each as section 2 of the manual has it ----------------------------------------
def openat(path: str, flags: int, mode: int = 0, *, into: int = 0) -> Call:
    """The result is a descriptor of the program's."""
    wanted = flags | os.O_CLOEXEC
    return call(abi.SYS_OPENAT, abi.AT_FDCWD, path, wanted, mode, into=into, what=path)


def close(fd: int) -> Call:
    """Close a descriptor."""
    return call(abi.SYS_CLOSE, fd, what="close")


def read(fd: int, length: int) -> Call:
    """Read `PIECE` bytes at most; the answer's data is what was read."""
    return call(abi.SYS_READ, fd, Out(length), length, out_is_result=True, what="read")


def pread64(fd: int, length: int, offset: int) -> Call:
    """As `read`, at an offset."""
    return call(abi.SYS_PREAD64, fd, Out(length), length, offset, out_is_result=True, what="pread")


def write(fd: int, data: bytes) -> Call:
    """Write `PIECE` bytes at most; the result says how many were."""
    return call(abi.SYS_WRITE, fd, data, len(data), what="write")


def pwrite64(fd: int, data: bytes, offset: int) -> Call:
    """As `write`, at an offset."""
    return call(abi.SYS_PWRITE64, fd, data, len(data), offset, what="pwrite")


def lseek(fd: int, offset: int, whence: int) -> Call:
    """The result is the offset."""
    return call(abi.SYS_LSEEK, fd, offset, whence, what="lseek")


def ftruncate(fd: int, length: int) -> Call:
    """Set a file's length."""
    return call(abi.SYS_FTRUNCATE, fd, length, what="ftruncate")


def getdents64(fd: int, length: int = PIECE) -> Call:
    """Some entries of a directory: see `parse_entries`; none at its end."""
    return call(abi.SYS_GETDENTS64, fd, Out(length), length, out_is_result=True, what="getdents")


def readlinkat(path: str) -> Call:
    """The answer's data is the target."""
    length = 4096  # PATH_MAX
    arguments = abi.AT_FDCWD, path, Out(length), length
    return call(abi.SYS_READLINKAT, *arguments, out_is_result=True, what=path)


def newfstatat(path: str, flags: int = abi.AT_SYMLINK_NOFOLLOW) -> Call:
    """The answer's data is a struct stat: see `parse_stat`."""
    out = Out(STAT.size)
    return call(abi.SYS_NEWFSTATAT, abi.AT_FDCWD, path, out, flags, what=path)


def fstat(fd: int) -> Call:
    """As `newfstatat`, of a descriptor."""
    out = Out(STAT.size)
    return call(abi.SYS_NEWFSTATAT, fd, "", out, abi.AT_EMPTY_PATH, what="fstat")


def mkdirat(path: str, mode: int) -> Call:
    """Make a directory; there is no umask."""
    return call(abi.SYS_MKDIRAT, abi.AT_FDCWD, path, mode, what=path)


def symlinkat(target: str, path: str) -> Call:
    """Make a symbolic link."""
    return call(abi.SYS_SYMLINKAT, target, abi.AT_FDCWD, path, what=path)


def linkat(old: str, path: str) -> Call:
    """Give a file a further name."""
    return call(abi.SYS_LINKAT, abi.AT_FDCWD, old, abi.AT_FDCWD, path, 0, what=path)


def mknodat(path: str, mode: int, device: int = 0) -> Call:
    """Make a FIFO, a socket's name or a device: makedev(3)'s number of it."""
    return call(abi.SYS_MKNODAT, abi.AT_FDCWD, path, mode, device, what=path)


def unlinkat(path: str, flags: int = 0) -> Call:
    """Remove a name; of a directory with AT_REMOVEDIR."""
    return call(abi.SYS_UNLINKAT, abi.AT_FDCWD, path, flags, what=path)


def renameat2(old: str, new: str, flags: int = 0) -> Call:
    """Rename."""
    return call(abi.SYS_RENAMEAT2, abi.AT_FDCWD, old, abi.AT_FDCWD, new, flags, what=new)


def fchownat(path: str, uid: int, gid: int) -> Call:
    """Change the owner, of a symbolic link itself."""
    flags = abi.AT_SYMLINK_NOFOLLOW
    return call(abi.SYS_FCHOWNAT, abi.AT_FDCWD, path, uid, gid, flags, what=path)


def fchmodat(path: str, mode: int) -> Call:
    """Change the mode, of what a symbolic link leads to."""
    return call(abi.SYS_FCHMODAT, abi.AT_FDCWD, path, mode, what=path)


def utimensat(path: str, atime_ns: int, mtime_ns: int) -> Call:
    """Change the times, of a symbolic link itself; in nanoseconds since 1970."""
    times = struct.pack("<4q", *divmod(atime_ns, 10**9), *divmod(mtime_ns, 10**9))
    flags = abi.AT_SYMLINK_NOFOLLOW
    return call(abi.SYS_UTIMENSAT, abi.AT_FDCWD, path, times, flags, what=path)


def lsetxattr(path: str, name: str, value: bytes) -> Call:
    """Set an extended attribute."""
    return call(abi.SYS_LSETXATTR, path, name, value, len(value), 0, what=path)


def lgetxattr(path: str, name: str) -> Call:
    """The answer's data is the value."""
    length = 1 << 16  # XATTR_SIZE_MAX
    arguments = path, name, Out(length), length
    return call(abi.SYS_LGETXATTR, *arguments, out_is_result=True, what=path)


def llistxattr(path: str) -> Call:
    """The answer's data is the names, each with a NUL."""
    length = 1 << 16  # XATTR_LIST_MAX
    return call(abi.SYS_LLISTXATTR, path, Out(length), length, out_is_result=True, what=path)


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> Call:
    """Mount a file system."""
    return call(abi.SYS_MOUNT, source, target, fstype, flags, data, what=target)


def umount2(target: str, flags: int = 0) -> Call:
    """Take a mount away."""
    return call(abi.SYS_UMOUNT2, target, flags, what=target)


def kill(pid: int, number: int) -> Call:
    """Send a signal."""
    return call(abi.SYS_KILL, pid, number, what=f"process {pid}")


def sync() -> Call:
    """Have the guest write out what it holds in memory."""
    return call(abi.SYS_SYNC, what="sync")


def make_socket(family: int, kind: int, protocol: int = 0, *, into: int = 0) -> Call:
    """The result is a descriptor of the program's."""
    return call(abi.SYS_SOCKET, family, kind, protocol, into=into, what="socket")


def connect(fd: int, address: bytes) -> Call:
    """Connect a socket: `guest.execution.vsock_address` is a port of the host."""
    return call(abi.SYS_CONNECT, fd, address, len(address), what="connect")


# --- what they return -------------------------------------------------------------------------
STAT = struct.Struct("<QQQIII4xQqqq6q24x")  # struct stat, <asm/stat.h>


class Stat(NamedTuple):
    """What is used of struct stat; times in nanoseconds since 1970."""

    dev: int
    ino: int
    nlink: int
    mode: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int

    @property
    def is_directory(self) -> bool:
        """Whether it is one."""
        return stat.S_ISDIR(self.mode)


def parse_stat(data: bytes) -> Stat:
    """Read a struct stat; ConfigError if it is none."""
    if len(data) != STAT.size:
        raise ConfigError("the guest answered with no struct stat")
    dev, ino, nlink, mode, uid, gid, rdev, size, _, blocks, *times = STAT.unpack(data)
    # A device's number has 32 bits (new_encode_dev(), <linux/kdev_t.h>), and nobody is -1.
    right = size >= 0 and rdev < 1 << 32 and NO_ID not in {uid, gid}
    if not right or not all(0 <= nanoseconds < 10**9 for nanoseconds in times[1::2]):
        raise ConfigError("the guest answered with no struct stat")
    atime, mtime = (times[n] * 10**9 + times[n + 1] for n in (0, 2))
    return Stat(dev, ino, nlink, mode, uid, gid, rdev, size, blocks, atime, mtime)


def parse_entries(data: bytes) -> list[str]:
    """Return the names of struct linux_dirent64s, without . and ..; ConfigError if one is none."""
    names = []
    offset = 0
    while offset < len(data):
        if len(data) - offset < 20:
            raise ConfigError("the guest answered with no directory")
        length = struct.unpack_from("<16xH", data, offset)[0]
        raw, nul, _ = data[offset + 19 : offset + length].partition(b"\0")
        if length < 20 or offset + length > len(data) or not nul:
            raise ConfigError("the guest answered with no directory")
        offset += length
        if raw not in {b".", b".."}:
            if not raw or b"/" in raw or len(raw) > 255:
                raise ConfigError(f"the guest named a file {os.fsdecode(raw)!r}")
            names.append(os.fsdecode(raw))
    return names


def entries(guest: Guest, path: str) -> Iterator[str]:
    """Yield the names in a directory. OSError if it is none, ConfigError if it has no end.

    Whoever leaves the loop before its end leaves it open in the guest until the connection ends.
    """
    fd = guest.do(openat(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)).result
    count = 0
    while found := guest.do(getdents64(fd)).data:
        names = parse_entries(found)
        count += len(names) or 1  # a piece may hold . and .. only
        if count > ENTRIES_MAX:
            raise ConfigError(f"more than {ENTRIES_MAX} files in the guest: given up at {path}")
        yield from names
    guest.do(close(fd))


def read_file(guest: Guest, path: str, limit: int = PIECE) -> bytes:
    """Return the first bytes of a file, in one round trip. OSError if it cannot be read."""
    flags = os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK
    pieces: Sequence[Call] = [
        read(Slot(1), min(PIECE, limit - done)) for done in range(0, limit, PIECE)
    ]
    opened, *found = guest.all([openat(path, flags, into=1), *pieces, close(Slot(1))])
    opened.check()
    return b"".join(answer.check().data for answer in found[:-1])
