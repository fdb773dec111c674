r"""What a detached machine's command wrote, kept in a file: both streams in the order they came.

Each piece is a line of three words, the stream, the time in nanoseconds since 1970 and the length,
and then as many bytes, whatever they are:

    stdout 1700000000000000000 6\nhello\n

One process appends, any number read; a reader never sees half a piece, because it waits until as
many bytes are there as the line says.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

LINE_MAX = 64
STREAMS = ("stdout", "stderr")


class Piece(NamedTuple):
    """Bytes that were written at once; `when` in nanoseconds since 1970."""

    stream: str
    when: int
    data: bytes


class OutputLog:
    """The writing end."""

    def __init__(self, path: str) -> None:
        """Begin the file at `path`."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)
        self._lock = threading.Lock()
        self._failed = False

    def write(self, stream: str, data: bytes) -> None:
        """Append a piece; from the first failure on (a full disk, say) what comes is dropped."""
        piece = f"{stream} {time.time_ns()} {len(data)}\n".encode() + data
        with self._lock:
            if not self._failed:
                try:
                    self._failed = os.write(self._fd, piece) < len(piece)
                except OSError:
                    self._failed = True

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)


def read_pieces(
    path: str, *, follow: Callable[[], bool] | None = None, start: int = 0
) -> Iterator[Piece]:
    """Give the pieces from byte `start` on; with `follow` also those to come, while it says so."""
    while not os.path.exists(path):  # it is just being started, or forgotten
        if follow is None or not follow():
            return
        time.sleep(0.05)
    with open(path, "rb") as file:
        file.seek(start)
        going = True
        while going:
            going = follow is not None and follow()  # asked first: the last words come before it
            yield from _whole_pieces(file.fileno(), file.tell(), file.seek)
            if going:
                time.sleep(0.05)


def _whole_pieces(fd: int, at: int, seek: Callable[[int], int]) -> Iterator[Piece]:
    while True:
        line, newline, _ = os.pread(fd, LINE_MAX, at).partition(b"\n")
        if not newline:
            return
        stream, when, length = line.split()
        data_at = at + len(line) + 1
        data = os.pread(fd, int(length), data_at)
        if len(data) < int(length):
            return
        at = data_at + len(data)
        seek(at)
        yield Piece(stream.decode(), int(when), data)
