"""A write tree: the host directory that takes a union's changes, and how it is changed.

What the guest creates lies there under its own name, as plain files; what it removes from below is
covered by a whiteout (whiteout.py). Whatever must appear at once and complete is made in a work
area inside the same file system and then renamed into place. The work area is a directory in the
root of the write tree, made when first needed, never shown to the guest, removed at the end; if we
are killed, the next one to use the tree removes it.

A write tree has one user at a time, held to by flock(2): the union remembers what it contains.
Guarded by the lock of the union it belongs to.
"""

import fcntl
import os
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import EAGAIN

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.beside import SPECIAL_XATTR
from tinyvmm.fileserver.hostfile import DEFAULT_ACL, default_acl, fd_path, open_path
from tinyvmm.fileserver.ownership import Owners, mark
from tinyvmm.fileserver.removal import remove_whole
from tinyvmm.fileserver.whiteout import (
    NAME_MARK,
    NAME_OPAQUE,
    NAME_PREFIX,
    is_whiteout,
    layer_xattr,
    make_device_whiteout,
    make_xattr_whiteout,
    set_layer_xattr,
)

WORK_NAME = b".tinyvmm-work"


class WrittenNames:
    """What the names in a write tree mean: what is there, what is gone, what is ours."""

    def __init__(self, fd: int) -> None:
        """Of the tree whose root `fd` is."""
        self.by_name = _exists(NAME_MARK, fd)

    def index(self, fd: int) -> tuple[set[bytes], set[bytes]]:
        """The names in the upper directory `fd`: what is there, and what is gone."""
        there: set[bytes] = set()
        gone: set[bytes] = set()
        path = fd_path(fd)
        xattrs = layer_xattr(path, b"opaque") is not None
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if self.hides(name):
                    if self.by_name and name not in {NAME_MARK, NAME_OPAQUE, WORK_NAME}:
                        gone.add(name[len(NAME_PREFIX) :])
                elif _may_be_whiteout(entry, xattrs) and _entry_is_whiteout(name, fd):
                    gone.add(name)
                else:
                    there.add(name)
        return there, gone - there

    def hides(self, name: bytes) -> bool:
        """Whether a name in the write tree is ours, not the guest's."""
        return name == WORK_NAME or (self.by_name and name.startswith(NAME_PREFIX))

    def is_opaque(self, fd: int) -> bool:
        """Whether the directory `fd` hides everything below it."""
        if layer_xattr(fd_path(fd), b"opaque") == b"y":
            return True
        return self.by_name and _exists(NAME_OPAQUE, fd)


class Copying:
    """What is being made in the work area under `name`; `fds` are open for as long as it works."""

    __slots__ = ("fds", "name")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.fds: list[int] = []

    def keep(self, fd: int) -> int:
        """Have `fd` closed if the copy fails."""
        self.fds.append(fd)
        return fd


class WriteTree(WrittenNames):
    """One host directory that takes changes; `space` tells its inodes from other trees'."""

    def __init__(self, path: bytes, space: int) -> None:
        """Open and lock `path`; raises ConfigError if it cannot take writes."""
        shown = os.fsdecode(path)
        self.path = path
        self.space = space
        try:
            self._lock_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(
                f"write tree {shown}: {error.strerror}; name a directory you can write to"
            ) from None
        if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
            os.close(self._lock_fd)
            raise ConfigError(
                f"write tree {shown}: not writable; name a directory you can write to"
            )
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == EAGAIN:  # others: a file system without locks; then we trust
                os.close(self._lock_fd)
                raise ConfigError(
                    f"write tree {shown}: in use by another machine; give each its own"
                ) from None
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        st = os.fstat(self.fd)
        self.inode = (st.st_dev, st.st_ino)
        super().__init__(self.fd)
        self.owners = Owners(mark(self.fd))
        self._work_fd = -1
        self._serial = 0
        if _exists(WORK_NAME, self.fd):  # somebody was killed
            self._remove_work()

    def close(self) -> None:
        """Remove the work area and let go of the directory."""
        if self._work_fd >= 0:
            os.close(self._work_fd)
            self._work_fd = -1
            self._remove_work()
        os.close(self.fd)
        os.close(self._lock_fd)

    def _remove_work(self) -> None:
        remove_whole(WORK_NAME, self.fd)

    # --- the work area --------------------------------------------------------------------------
    def work(self) -> int:
        """The work area's descriptor."""
        if self._work_fd < 0:
            os.mkdir(WORK_NAME, 0o700, dir_fd=self.fd)
            self._work_fd = os.open(
                WORK_NAME, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd
            )
            if default_acl(self._work_fd) is not None:  # nothing may inherit it by way of here
                os.removexattr(fd_path(self._work_fd), DEFAULT_ACL)
        return self._work_fd

    def temporary(self) -> bytes:
        """A name that is free in the work area."""
        self._serial += 1
        return b"%d" % self._serial

    @contextmanager
    def copying(self) -> "Generator[Copying, None, None]":
        """A copy to be made in the work area and placed; if that fails, nothing is left of it."""
        copying = Copying(self.temporary())
        try:
            yield copying
        except BaseException:
            for fd in copying.fds:
                os.close(fd)
            self.discard(copying.name)
            raise

    def make(self, make: Callable[[bytes, int], None], dir_fd: int) -> bytes:
        """Have `make(name, dir_fd)` work in the work area; it inherits as in directory `dir_fd`."""
        temporary, work = self.temporary(), self.work()
        acl = default_acl(dir_fd)
        if acl is None:
            make(temporary, work)
            return temporary
        os.setxattr(fd_path(work), DEFAULT_ACL, acl)
        try:
            make(temporary, work)
        finally:
            os.removexattr(fd_path(work), DEFAULT_ACL)
        return temporary

    def discard(self, temporary: bytes) -> None:
        """Remove whatever is in the work area under that name, if anything is."""
        try:
            remove_whole(temporary, self.work())
        except FileNotFoundError:
            return

    def place(self, temporary: bytes, name: bytes, dir_fd: int, *, covered: bool) -> None:
        """Move what was made in the work area to its place, over a whiteout if `covered`."""
        if covered and not self.by_name:
            st = os.stat(temporary, dir_fd=self.work(), follow_symlinks=False)
            if stat.S_ISDIR(st.st_mode):  # rename(2) puts no directory over another file
                self.remove_whiteout(name, dir_fd)
        os.rename(temporary, name, src_dir_fd=self.work(), dst_dir_fd=dir_fd)
        if covered and self.by_name:
            self.remove_whiteout(name, dir_fd)

    def note_special(self, dir_fd: int) -> None:
        """Note that the directory is to have a file that stands for another."""
        os.setxattr(fd_path(dir_fd), SPECIAL_XATTR, b"y")

    # --- whiteouts ------------------------------------------------------------------------------
    def whiteout(self, name: bytes, dir_fd: int) -> None:
        """Make `name` gone, atomically replacing the upper file of that name if there is one."""
        prepared = self.prepare_whiteout(dir_fd)
        if prepared is None:
            _touch(NAME_PREFIX + name, dir_fd)
            if _exists(name, dir_fd):
                os.unlink(name, dir_fd=dir_fd)
        else:
            os.rename(prepared, name, src_dir_fd=self.work(), dst_dir_fd=dir_fd)

    def prepare_whiteout(self, dir_fd: int) -> bytes | None:
        """A whiteout in the work area, good for any name in `dir_fd`; None where names are used."""
        if self.by_name:
            return None
        temporary = self.temporary()
        if make_device_whiteout(temporary, self.work()):
            return temporary
        self.discard(temporary)  # a server may have made what it then failed to give us
        if make_xattr_whiteout(temporary, self.work()):
            if self._note_xattr_whiteouts(dir_fd):
                return temporary
            self.discard(temporary)
        self._use_names()
        return None

    def _use_names(self) -> None:
        _touch(NAME_MARK, self.fd)
        self.by_name = True

    def remove_whiteout(self, name: bytes, dir_fd: int) -> None:
        """Remove the whiteout of `name`, in whichever form."""
        if self.by_name:
            try:
                os.unlink(NAME_PREFIX + name, dir_fd=dir_fd)
            except FileNotFoundError:
                pass  # made in another form before this tree came to where only names work
            else:
                return
        os.unlink(name, dir_fd=dir_fd)

    @staticmethod
    def _note_xattr_whiteouts(dir_fd: int) -> bool:
        path = fd_path(dir_fd)
        return layer_xattr(path, b"opaque") is not None or set_layer_xattr(path, b"opaque", b"x")

    def make_opaque(self, fd: int) -> None:
        """Make the directory `fd` hide everything below it."""
        if self.by_name or not set_layer_xattr(fd_path(fd), b"opaque", b"y"):
            self._use_names()
            _touch(NAME_OPAQUE, fd)


def _may_be_whiteout(entry: os.DirEntry[bytes], xattrs: bool) -> bool:
    if entry.is_file(follow_symlinks=False):
        return xattrs
    return not (entry.is_dir(follow_symlinks=False) or entry.is_symlink())


def _entry_is_whiteout(name: bytes, dir_fd: int) -> bool:
    fd = open_path(name, dir_fd)
    try:
        return is_whiteout(fd_path(fd), os.fstat(fd))
    finally:
        os.close(fd)


def _exists(name: bytes, dir_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _touch(name: bytes, dir_fd: int) -> None:
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=dir_fd))
