"""What files of Python objects contain, and what reading them calls.

`Called` and `Streamed` run code of the tree's maker, which may wait as long as it likes and raise
what it likes. It is run where waiting is allowed only: `open` and `size` of contents that `wait`,
and `OpenFile.readv`, but never `readv_now`. An OSError out of it is the answer to the client; for
anything else the client gets EIO and the trace a record.

A result that comes in pieces is a stream: each reader gets it from its beginning, in order. The
latest piece is kept, so that a read can be asked again; what is before that is gone (ESPIPE).

Threads: an open file has a lock of its own, held while its maker's code runs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from errno import EBADF, EIO, ENOTDIR, ESPIPE
from threading import Lock
from typing import IO, Protocol, TypeVar

from tinyvmm import trace
from tinyvmm.fileserver.hostfile import os_error
from tinyvmm.fileserver.tree import DirEntry, OpenFile

T = TypeVar("T")
ERRNO_MAX = 4095  # MAX_ERRNO of <linux/err.h>: what a system call can say
MEMBER_KEPT = 256 * 1024  # bytes of an archive's member that are unpacked when it is opened

_END = object()


class Contents(Protocol):
    """What is in a regular file that nobody can write."""

    waits: bool
    """Whether `open` and `size` may have to wait."""

    fresh: bool
    """Whether it is made when it is asked for, and so is always new."""

    def size(self, *, ask: bool) -> int:
        """How long it is, as far as that is known; if `ask`, find out."""

    def open(self, *, wait: bool) -> OpenFile:
        """Open it for reading; what has to be asked is asked at first read if it may not `wait`."""


def guarded(what: str, call: Callable[[], T]) -> T:
    """The result of `call`, code of the tree's maker, in which only an OSError can go wrong."""
    try:
        return call()
    except OSError as error:
        if error.errno is not None and 0 < error.errno <= ERRNO_MAX:
            raise
        problem: BaseException = error
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the client is told, and the trace
        problem = error
    complain(what, f"{type(problem).__name__}: {problem}")
    raise os_error(EIO)


def complain(what: str, problem: str) -> None:
    """Leave a trace record: file `what` has a problem that only its maker can mend."""
    if trace.hook is not None:
        trace.hook(trace.Message("object tree", f"{what}: {problem}"))


def as_bytes(value: object) -> bytes | None:
    """The bytes of what is bytes or text, else None."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    return value.encode() if isinstance(value, str) else None


def fill(buffers: Sequence[memoryview], data: bytes | bytearray, start: int) -> int:
    """Copy from `data`, from `start` on, into `buffers`; gives the count of bytes."""
    first = start
    for buffer in buffers:
        piece = data[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        start += len(piece)
    return start - first


class Called:
    """A function's result, of a call for every open file."""

    waits = True
    fresh = True

    def __init__(self, what: str, function: Callable[[], object]) -> None:
        self._what = what
        self._function = function

    def size(self, *, ask: bool) -> int:
        """What a call gives now, if it gives all at once."""
        if not ask:
            return 0
        data = guarded(self._what, lambda: as_bytes(self._function()))
        return 0 if data is None else len(data)

    def open(self, *, wait: bool) -> OpenFile:
        """Call it."""
        file = StreamFile(self._what, self._function)
        if wait:
            file.begin()
        return file


class Streamed:
    """What an iterator gives: each piece to one reader, as out of a pipe."""

    waits = False
    fresh = True

    def __init__(self, what: str, pieces: Iterator[object]) -> None:
        self._what = what
        self._pieces = _Shared(pieces)

    def size(self, *, ask: bool) -> int:  # noqa: ARG002
        """Nobody can know."""
        return 0

    def open(self, *, wait: bool) -> OpenFile:  # noqa: ARG002
        """Become one of its readers."""
        return StreamFile(self._what, lambda: self._pieces)


class _Shared:
    """An iterator for several readers at once, of which a generator by itself allows but one."""

    def __init__(self, pieces: Iterator[object]) -> None:
        self._pieces = pieces
        self._lock = Lock()

    def __iter__(self) -> Iterator[object]:
        return self

    def __next__(self) -> object:
        with self._lock:
            return next(self._pieces)


class Member:
    """A file in an archive."""

    waits = True
    fresh = False

    def __init__(self, what: str, length: int, unpack: Callable[[], IO[bytes]], lock: Lock) -> None:
        """A file of `length` bytes, which `unpack` opens; `lock` guards reading."""
        self._what = what
        self._length = length
        self._unpack = unpack
        self._lock = lock

    def size(self, *, ask: bool) -> int:  # noqa: ARG002
        """As the archive says."""
        return self._length

    def open(self, *, wait: bool) -> OpenFile:  # noqa: ARG002
        """Open it; what is small is unpacked at once."""

        def unpack() -> IO[bytes]:
            with self._lock:
                return self._unpack()

        file = MemberFile(self._what, guarded(self._what, unpack), self._lock)
        if self._length > MEMBER_KEPT:
            return file
        data = bytearray(self._length)
        del data[file.readv([memoryview(data)], 0) :]
        file.close()
        return BytesFile(data)


class ReadOnlyFile:
    """What all open files here that can only be read have in common."""

    fd: int | None = None

    def writev(self, buffers: Sequence[memoryview], offset: int) -> int:  # noqa: ARG002
        """EBADF: it is open for reading."""
        raise os_error(EBADF)

    writev_now = writev

    def readdir(self, cookie: int) -> Iterator[DirEntry]:  # noqa: ARG002
        """ENOTDIR."""
        raise os_error(ENOTDIR)

    def fsync(self, datasync: bool) -> None:
        """It is on no disk."""


class BytesFile(ReadOnlyFile):
    """Bytes open for reading."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = data

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Copy out what there is from `offset` on."""
        return fill(buffers, self._data, offset)

    readv_now = readv

    def close(self) -> None:
        """Nothing to release."""


class MemberFile(ReadOnlyFile):
    """A large file of an archive, unpacked as it is read; going back may unpack it once more."""

    def __init__(self, what: str, opened: IO[bytes], lock: Lock) -> None:
        self._what = what
        self._opened = opened
        self._lock = lock

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Unpack what is there."""
        with self._lock:
            return guarded(self._what, lambda: self._read(buffers, offset))

    def _read(self, buffers: Sequence[memoryview], offset: int) -> int:
        done = 0
        if self._opened.tell() != offset:
            self._opened.seek(offset)
        for buffer in buffers:
            start = 0
            while start < len(buffer) and (data := self._opened.read(len(buffer) - start)):
                buffer[start : start + len(data)] = data
                start += len(data)
            done += start
            if start < len(buffer):
                break
        return done

    def readv_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:  # noqa: ARG002
        """Unpacking takes a while."""
        return None

    def close(self) -> None:
        """Let go of it."""
        with self._lock:
            self._opened.close()


class StreamFile(ReadOnlyFile):
    """The result of a call, open for reading: bytes, text, or pieces of these as they come."""

    def __init__(self, what: str, function: Callable[[], object]) -> None:
        self._what = what
        self._function: Callable[[], object] | None = function  # None once it was called
        self._lock = Lock()  # guards the next
        self._pieces: Iterator[object] | None = None  # None if no more will come
        self._kept = b""  # the latest piece
        self._base = 0  # where that begins
        self._closed = False

    def begin(self) -> None:
        """Call the function, if that was not done yet."""
        with self._lock:
            self._begin()

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, waiting for what has to come first."""
        with self._lock:
            try:
                self._begin()
                while self._pieces is not None and offset >= self._base + len(self._kept):
                    self._take(self._pieces)
                return self._give(buffers, offset)
            finally:
                if self._closed:
                    self._stop()

    def readv_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Read what has come already."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            if self._function is not None:
                return None
            if self._pieces is not None and offset >= self._base + len(self._kept):
                return None
            return self._give(buffers, offset)
        finally:
            self._lock.release()

    def close(self) -> None:
        """End a generator begun for this reader."""
        self._closed = True
        if self._lock.acquire(blocking=False):  # else who reads does it
            try:
                self._stop()
            finally:
                self._lock.release()

    def _begin(self) -> None:
        function = self._function
        if function is None:
            return
        result = guarded(self._what, function)
        data = guarded(self._what, lambda: as_bytes(result))  # not all text can be encoded
        if data is not None:
            self._kept = data
        elif isinstance(result, Iterable) and not isinstance(result, Mapping):
            self._pieces = guarded(self._what, lambda: iter(result))
        else:
            complain(self._what, f"gave {type(result).__name__}, not bytes, str or pieces of these")
            raise os_error(EIO)
        self._function = None

    def _take(self, pieces: Iterator[object]) -> None:
        """Wait for the next piece, which takes the latest one's place."""
        piece = guarded(self._what, lambda: next(pieces, _END))
        if piece is _END:
            self._pieces = None
            return
        data = guarded(self._what, lambda: as_bytes(piece))
        if data is None:
            complain(self._what, f"gave a piece of {type(piece).__name__}, not bytes or str")
            raise os_error(EIO)
        if data:  # no bytes would be taken for the end
            self._base += len(self._kept)
            self._kept = data

    def _give(self, buffers: Sequence[memoryview], offset: int) -> int:
        if offset < self._base:
            raise os_error(ESPIPE)
        return fill(buffers, self._kept, offset - self._base)

    def _stop(self) -> None:
        pieces, self._pieces = self._pieces, None
        close = getattr(pieces, "close", None)
        if close is not None:
            guarded(self._what, close)
