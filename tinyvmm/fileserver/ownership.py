"""Whose a write tree's files are: the guest's root may give files away, we may not.

As root, owner and mode of an upper file are simply the file's. Without that privilege every upper
file is ours, and readable and writable to us whatever its mode says; owner and mode as the guest
set them are recorded beside it, in the xattr `user.containers.override_stat` ("UID:GID:MODE", MODE
in octal) that rootless container tools use for the same purpose. Symlinks and special files take no
user xattrs, nor do some file systems: their owners are remembered as long as the tree is open.

Guarded by the lock of the union the write tree belongs to.
"""

import os
import stat
from errno import ENODATA, EOPNOTSUPP, EPERM
from typing import NamedTuple

from tinyvmm.fileserver.hostfile import fd_path, set_owner_and_mode
from tinyvmm.fileserver.tree import (
    NO_ID,
    SETATTR_GID,
    SETATTR_MODE,
    SETATTR_UID,
)
from tinyvmm.fileserver.whiteout import OWNER_XATTR

_TAKES_XATTRS = {stat.S_IFREG, stat.S_IFDIR}


class Owner(NamedTuple):
    """Owner and permissions of a file, as the guest sees them."""

    uid: int
    gid: int
    mode: int  # the lower 12 bits of st_mode


def parse_owner(value: bytes) -> Owner | None:
    """Parse a record, `UID:GID:MODE` and perhaps more; None for what is none of our making."""
    try:
        uid, gid, mode = value.split(b":")[:3]
        owner = Owner(int(uid), int(gid), int(mode, 8) & 0o7777)
    except ValueError:
        return None
    return owner if 0 <= owner.uid < NO_ID and 0 <= owner.gid < NO_ID else None


def must_pretend() -> bool:
    """Whether we lack the privilege to give files away."""
    return os.geteuid() != 0


class Owners:
    """The owners of one write tree's files."""

    def __init__(self) -> None:
        self.pretends = must_pretend()
        self._remembered: dict[tuple[int, int], Owner] = {}

    def give(self, fd: int, st: os.stat_result, mode: int, uid: int, gid: int) -> None:
        """Give the file just made behind O_PATH descriptor `fd`, of stat `st`, to its owner."""
        if not self.pretends:
            set_owner_and_mode(fd, st, mode, uid, gid)
            return
        owner = Owner(
            st.st_uid if uid == NO_ID else uid,
            st.st_gid if gid == NO_ID else gid,
            stat.S_IMODE(st.st_mode) if stat.S_ISLNK(st.st_mode) else mode & 0o7777,
        )
        self._record(fd, st, owner)

    def recorded(self, fd: int, st: os.stat_result) -> Owner | None:
        """The owner that differs from what `st` says, if one does."""
        owner = self._remembered.get((st.st_dev, st.st_ino))
        if owner is not None or stat.S_IFMT(st.st_mode) not in _TAKES_XATTRS:
            return owner
        try:
            return parse_owner(os.getxattr(fd_path(fd), OWNER_XATTR))
        except OSError as error:
            if error.errno not in {ENODATA, EOPNOTSUPP}:
                raise
        return None

    def change(self, fd: int, valid: int, mode: int, uid: int, gid: int) -> None:
        """Tsetattr's mode, uid and gid, as `valid` says, on what belongs to a pretended owner."""
        st = os.fstat(fd)
        owner = self.recorded(fd, st) or Owner(st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode))
        if valid & (SETATTR_UID | SETATTR_GID):
            owner = Owner(
                uid if valid & SETATTR_UID and uid != NO_ID else owner.uid,
                gid if valid & SETATTR_GID and gid != NO_ID else owner.gid,
                owner.mode & ~_lost_by_chown(st.st_mode, owner.mode),
            )
        if valid & SETATTR_MODE:
            if stat.S_ISLNK(st.st_mode):
                raise OSError(EOPNOTSUPP, os.strerror(EOPNOTSUPP))
            owner = owner._replace(mode=mode & 0o7777)
        self._record(fd, st, owner)

    def forget(self, st: os.stat_result) -> None:
        """Note that the inode of stat `st` is gone."""
        self._remembered.pop((st.st_dev, st.st_ino), None)

    def _record(self, fd: int, st: os.stat_result, owner: Owner) -> None:
        path = fd_path(fd)
        real = stat.S_IMODE(st.st_mode)
        if not stat.S_ISLNK(st.st_mode):
            # Ours to use, and without set-id bits, which would lend our own identity.
            ours = 0o700 if stat.S_ISDIR(st.st_mode) else 0o600
            real = owner.mode & 0o777 | ours
            os.chmod(path, real)
        self.forget(st)
        honest = owner == (st.st_uid, st.st_gid, real)
        try:
            if honest:
                os.removexattr(path, OWNER_XATTR)
            else:
                os.setxattr(path, OWNER_XATTR, b"%d:%d:%o" % owner)
        except OSError as error:
            if error.errno not in {ENODATA, EOPNOTSUPP, EPERM}:
                raise
            if not honest:
                self._remembered[st.st_dev, st.st_ino] = owner


def _lost_by_chown(st_mode: int, mode: int) -> int:
    """The bits that chown(2) clears."""
    if stat.S_ISDIR(st_mode):
        return 0
    return stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0)
