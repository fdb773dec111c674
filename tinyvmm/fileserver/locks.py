"""Byte-range locks of one server, as Tlock and Tgetlock ask for them.

A lock belongs to a client's process (`client_id`, `proc_id`) and to the fid it came by. Two locks
conflict if they overlap, one of them is for writing, and neither process nor fid is the same: a
Linux client has settled with its own processes before it asks, and turns flock(2), which follows
the open file, into these locks, which follow the process. So an unlock takes away what the process
or the fid holds, and a clunked fid takes its locks with it. Nothing ever waits here: a client that
wants to wait is told P9_LOCK_BLOCKED and asks again.

A table is used by one thread at a time.
"""

from tinyvmm.named import NamedTuple
from tinyvmm.ninep import (
    P9_LOCK_BLOCKED,
    P9_LOCK_ERROR,
    P9_LOCK_SUCCESS,
    P9_LOCK_TYPE_UNLCK,
    P9_LOCK_TYPE_WRLCK,
)

END = 1 << 64  # a length of 0 reaches here
LOCKS_MAX = 1 << 16

Owner = tuple[bytes, int]
"""client_id and proc_id."""


class Lock(NamedTuple):
    """Bytes `start` up to, not including, `end`."""

    start: int
    end: int
    type: int
    owner: Owner
    fid: object

    def stands_against(self, other: "Lock") -> bool:
        """Whether the two cannot both be held."""
        return (
            self.start < other.end
            and other.start < self.end
            and P9_LOCK_TYPE_WRLCK in (self.type, other.type)
            and self.owner != other.owner
            and self.fid is not other.fid
        )


class LockTable:
    """The locks of every file, by qid.path."""

    def __init__(self) -> None:
        """Begin with none."""
        self._files: dict[int, list[Lock]] = {}
        self._count = 0

    def set(self, path: int, lock: Lock) -> int:
        """Set or, with P9_LOCK_TYPE_UNLCK, remove; gives a P9_LOCK_* status, at once."""
        held = self._files.get(path, [])
        if self.test(path, lock) is not None:
            return P9_LOCK_BLOCKED
        kept = []
        for other in held:
            if other.owner != lock.owner and other.fid is not lock.fid:
                kept.append(other)
                continue
            if other.start < lock.start:
                kept.append(other._replace(end=min(other.end, lock.start)))
            if other.end > lock.end:
                kept.append(other._replace(start=max(other.start, lock.end)))
        if lock.type != P9_LOCK_TYPE_UNLCK:
            kept.append(lock)
        more = len(kept) - len(held)  # an unlock in the middle of a lock leaves two
        if more > 0 and self._count + more > LOCKS_MAX:
            return P9_LOCK_ERROR
        self._put(path, kept)
        return P9_LOCK_SUCCESS

    def test(self, path: int, lock: Lock) -> Lock | None:
        """The first lock that stands against this one, if any does."""
        if lock.type == P9_LOCK_TYPE_UNLCK:
            return None
        held = self._files.get(path, [])
        return next((other for other in held if other.stands_against(lock)), None)

    def held(self, path: int, fid: object) -> list[Lock]:
        """The locks a fid brought."""
        return [lock for lock in self._files.get(path, ()) if lock.fid is fid]

    def drop(self, path: int, fid: object) -> None:
        """Remove the locks a fid brought."""
        if path in self._files:
            self._put(path, [lock for lock in self._files[path] if lock.fid is not fid])

    def _put(self, path: int, locks: list[Lock]) -> None:
        self._count += len(locks) - len(self._files.get(path, []))
        if locks:
            self._files[path] = locks
        else:
            self._files.pop(path, None)
