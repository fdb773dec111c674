"""Fids, and answers that take their time.

A fid is a number the client chose for a file; a `Fid` is what it stands for. An answer that may
have to wait is described as a `Slow`, for the session to have done on a thread that may wait.
"""

import os
import stat
from collections.abc import Callable, Iterable
from errno import EINVAL
from typing import Any

from tinyvmm.fileserver.tree import NO_ID, SETATTR_MODE, Node, OpenFile
from tinyvmm.ninep import Message

OFFSET_MAX = (1 << 63) - 1  # loff_t
NO_NAMES = (b"", b".", b"..")


def failure(number: int) -> OSError:
    """The OSError that is answered as errno `number`."""
    return OSError(number, os.strerror(number))


def entry_name(name: bytes) -> bytes:
    """The name of a directory entry to make, move or remove; EINVAL if it can be none."""
    if name in NO_NAMES or b"/" in name or b"\0" in name:
        raise failure(EINVAL)
    return name


def offset_of(number: int) -> int:
    """A place or size in a file, as system calls take it; EINVAL beyond."""
    if number > OFFSET_MAX:
        raise failure(EINVAL)
    return number


class Fid:
    """A client's file. Owns one reference to `node` and one to `parent`."""

    __slots__ = (
        "busy", "doomed", "file", "flags", "gone", "locked", "name", "node", "parent", "set_id",
        "uid",
    )  # fmt: skip

    def __init__(self, node: Node, uid: int, parent: Node | None, name: bytes) -> None:
        self.node = node
        self.uid = uid  # who attached: the owner of what is created
        self.parent = parent  # the directory it was found in, as `name`; Tremove needs both
        self.name = name
        self.file: OpenFile | None = None
        self.flags = 0  # it was opened with
        self.locked = False  # may hold locks
        self.busy = 0  # requests that use it on other threads
        self.doomed = False  # to be removed when clunked (Tremove, ORCLOSE)
        self.gone = False  # clunked; the last of those requests closes it
        self.set_id = False  # open for writing, and a write clears set-id bits

    def opened(self, file: OpenFile, flags: int) -> None:
        """Take over `file`, the node opened with `flags` of open(2)."""
        self.file, self.flags = file, flags
        self.set_id = bool(flags & os.O_ACCMODE)
        if flags & os.O_TRUNC:
            self.clear_set_id()

    def move(self, node: Node, name: bytes, file: OpenFile | None, flags: int) -> None:
        """Stand for a file made in the directory it stood for, and opened; takes what it is given.

        Set-id bits that it was made with stay until the first write, whether `flags` truncate.
        """
        if self.parent is not None:
            self.parent.close()
        self.parent, self.node, self.name, self.file = self.node, node, name, file
        self.flags = flags
        self.set_id = bool(flags & os.O_ACCMODE)

    def clear_set_id(self) -> None:
        """Have a user's write clear set-id bits, as Linux does (file_remove_privs in fs/inode.c).

        The host does it for us where we are that user; as root we may write and keep them.
        """
        self.set_id = False  # until somebody sets one: watch_set_id
        if self.uid in {0, NO_ID}:
            return
        mode = self.node.stat().st_mode
        bits = stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0)
        if stat.S_ISREG(mode) and mode & bits:
            self.node.setattr(SETATTR_MODE, mode=stat.S_IMODE(mode) & ~bits)

    def close(self) -> None:
        """Give everything back; raises what closing the file has to say."""
        self.gone = True
        if self.busy:
            return
        try:
            if self.file is not None:
                self.file.close()
        finally:
            self.node.close()
            if self.parent is not None:
                self.parent.close()


def watch_set_id(fids: Iterable[Fid], node: Node) -> None:
    """Have the next write by any of `fids` to this file, which got set-id bits, clear them."""
    path = node.qid().path
    for fid in fids:
        if fid.file is not None and fid.node.qid().path == path:
            fid.set_id = True


class Slow:
    """An answer that may have to wait.

    `work` is called on another thread, touches nothing of the session, and gives a result; `finish`
    turns the result into the reply where the session may be touched again; `drop` takes the result
    if nobody wants the reply any more. `fid` and what it holds stay open until then.
    """

    __slots__ = ("drop", "fid", "finish", "work")

    def __init__(
        self,
        fid: Fid,
        work: Callable[[], Any],
        finish: Callable[[Any], Message],
        drop: Callable[[Any], None] | None = None,
    ) -> None:
        self.fid = fid
        self.work = work
        self.finish = finish
        self.drop = drop


Answer = Message | Slow
