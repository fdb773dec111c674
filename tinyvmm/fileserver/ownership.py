"""Whose a write tree's files are: the guest's root may give files away, we may not.

As root, owner and mode of an upper file are simply the file's. Without that privilege every upper
file is ours, and readable and writable to us whatever its mode says; what it is in the guest is
recorded beside it (see beside): owner and mode, and what else the host would not let it be. So are
devices, fifos and sockets regular files, and symlinks, unless they are root's, as most are. A tree
written so says so, and is treated so by root, too.

Some file systems take no extended attributes: there owners are remembered as long as the tree is
open, and so is that of a symlink with several names.

Guarded by the lock of the union the write tree belongs to.
"""

import os
import stat
from errno import ENODATA, EOPNOTSUPP, EPERM

from tinyvmm.fileserver.beside import (
    LAYER_XATTR,
    Notes,
    Owner,
    notes_of,
    presented,
    record,
)
from tinyvmm.fileserver.hostfile import altered, fd_path, set_owner_and_mode
from tinyvmm.fileserver.tree import (
    NO_ID,
    SETATTR_GID,
    SETATTR_MODE,
    SETATTR_UID,
)
from tinyvmm.fileserver.whiteout import OWNER_XATTR

_LAYER_VALUE = b"-;0:0"
_NO_NOTES = Notes(None, None)
_STAND_INS = {stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFBLK, stat.S_IFCHR}


def must_pretend() -> bool:
    """Whether we lack the privilege to give files away."""
    return os.geteuid() != 0


def mark(fd: int) -> Notes | None:
    """Note that the write tree with root `fd` keeps things beside its files, if it must and can."""
    notes = notes_of(fd)
    if notes is not None or not must_pretend():
        return notes
    try:
        os.setxattr(fd_path(fd), LAYER_XATTR, _LAYER_VALUE)
    except OSError:
        return None  # then owners are remembered
    return notes_of(fd)


class Owners:
    """The owners of one write tree's files."""

    def __init__(self, notes: Notes | None) -> None:
        """Of the tree with these notes; None if it can keep nothing beside its files."""
        self.pretends = must_pretend() or (notes is not None and notes.links is not None)
        self.notes = notes if self.pretends else None
        self._remembered: dict[tuple[int, int], Owner] = {}

    def stands_in(self, kind: int, uid: int, gid: int) -> bool:
        """Whether something of S_IFMT `kind` and that owner has to be a file that stands for it."""
        if self.notes is None:
            return False
        return kind in _STAND_INS or (kind == stat.S_IFLNK and (uid, gid) != self._link_owner())

    def _link_owner(self) -> tuple[int, int]:
        links = None if self.notes is None else self.notes.links
        return (os.geteuid(), os.getegid()) if links is None else links

    def give(
        self,
        fd: int,
        st: os.stat_result,
        mode: int,
        uid: int,
        gid: int,
        stands_for: tuple[int, int] | None = None,
    ) -> None:
        """Give the file just made behind O_PATH descriptor `fd`, of stat `st`, to its owner.

        It may stand for another: an S_IFMT, and the number of a device.
        """
        if not self.pretends:
            set_owner_and_mode(fd, st, mode, uid, gid)
            return
        is_link = stat.S_IFLNK in {stat.S_IFMT(st.st_mode), *(stands_for or ())[:1]}
        owner = Owner(
            st.st_uid if uid == NO_ID else uid,
            st.st_gid if gid == NO_ID else gid,
            0o777 if is_link else mode & 0o7777,
        )
        self._record(fd, st, owner, stands_for)

    def presented(self, fd: int, st: os.stat_result) -> os.stat_result:
        """What the upper file behind `fd`, of stat `st` on the host, is in the guest."""
        if not self.pretends:
            return st
        owner = self._remembered.get((st.st_dev, st.st_ino))
        if owner is None:
            return presented(fd, st, self.notes or _NO_NOTES)
        return altered(st, mode=stat.S_IFMT(st.st_mode) | owner.mode, uid=owner.uid, gid=owner.gid)

    def change(self, fd: int, valid: int, mode: int, uid: int, gid: int) -> None:
        """Tsetattr's mode, uid and gid, as `valid` says, on what belongs to a pretended owner."""
        st = os.fstat(fd)
        now = self.presented(fd, st)
        owner = Owner(now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode))
        if valid & (SETATTR_UID | SETATTR_GID):
            owner = Owner(
                uid if valid & SETATTR_UID and uid != NO_ID else owner.uid,
                gid if valid & SETATTR_GID and gid != NO_ID else owner.gid,
                owner.mode & ~_lost_by_chown(now.st_mode, owner.mode),
            )
        kind = stat.S_IFMT(now.st_mode)
        if valid & SETATTR_MODE and kind != stat.S_IFLNK:
            owner = owner._replace(mode=mode & 0o7777)
        stands_for = None if kind == stat.S_IFMT(st.st_mode) else (kind, now.st_rdev)
        self._record(fd, st, owner, stands_for)
        if valid & SETATTR_MODE and kind == stat.S_IFLNK:
            raise OSError(EOPNOTSUPP, os.strerror(EOPNOTSUPP))

    def forget(self, st: os.stat_result) -> None:
        """Note that the inode of stat `st` is gone."""
        self._remembered.pop((st.st_dev, st.st_ino), None)

    def _record(
        self, fd: int, st: os.stat_result, owner: Owner, stands_for: tuple[int, int] | None
    ) -> None:
        path = fd_path(fd)
        is_link = stat.S_ISLNK(st.st_mode)
        real = stat.S_IMODE(st.st_mode)
        if not is_link:
            # Ours to use, and without set-id bits, which would lend our own identity.
            ours = 0o700 if stat.S_ISDIR(st.st_mode) else 0o600
            real = owner.mode & 0o777 | ours
            os.chmod(path, real)
        self.forget(st)
        notes = self.notes or _NO_NOTES
        whose = (notes.links if is_link else notes.owner) or (st.st_uid, st.st_gid)
        honest = stands_for is None and owner == (*whose, real)
        try:
            if honest:
                os.removexattr(path, OWNER_XATTR)
            else:
                os.setxattr(path, OWNER_XATTR, record(owner, *(stands_for or (stat.S_IFREG,))))
        except OSError as error:
            if stands_for is not None or error.errno not in {ENODATA, EOPNOTSUPP, EPERM}:
                raise
            if not honest:
                self._remembered[st.st_dev, st.st_ino] = owner


def _lost_by_chown(st_mode: int, mode: int) -> int:
    """The bits that chown(2) clears."""
    if stat.S_ISDIR(st_mode):
        return 0
    return stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0)
