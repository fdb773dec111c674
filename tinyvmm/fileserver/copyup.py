"""Copying one lower file or directory into a write tree's work area, as it is.

Kept: type, contents with their holes, owner and mode (see ownership), times to the nanosecond,
extended attributes the file system takes.
"""

import os
import stat
from collections.abc import Iterator
from errno import EACCES, EINVAL, ENOSYS, ENXIO, EOPNOTSUPP, EPERM, EXDEV

from tinyvmm.fileserver import beside
from tinyvmm.fileserver.beside import read_link, stand_in
from tinyvmm.fileserver.hostfile import fd_path, open_contents, open_path
from tinyvmm.fileserver.ownership import Owners
from tinyvmm.fileserver.whiteout import PRIVATE_XATTRS

_CHUNK = 1 << 30
_BUFFER = 1 << 20
_CANNOT = {EXDEV, EINVAL, ENOSYS, EOPNOTSUPP, EPERM}


def copy_file(
    fd: int,
    st: os.stat_result,
    name: bytes,
    dir_fd: int,
    owners: Owners,
    *,
    data: bool,
    noted: bool,
) -> int:
    """Copy the file behind O_PATH descriptor `fd` to the new entry `name`; gives its descriptor.

    Without `data` a regular file is copied empty, for who is about to truncate it. `noted` says
    that the file's tree keeps things beside its files (see beside).
    """
    kind = stat.S_IFMT(st.st_mode)
    stands_for = None
    if kind == stat.S_IFREG:
        target = os.open(
            name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=dir_fd
        )
        try:
            if data and st.st_size:
                _copy_contents(fd, target, st.st_size)
        finally:
            os.close(target)
    elif owners.stands_in(kind, st.st_uid, st.st_gid):
        stands_for = (kind, st.st_rdev)
        stand_in(name, dir_fd, 0o600, read_link(fd) if kind == stat.S_IFLNK else b"")
    elif kind == stat.S_IFLNK:
        os.symlink(read_link(fd), name, dir_fd=dir_fd)
    elif kind == stat.S_IFDIR:
        os.mkdir(name, 0o700, dir_fd=dir_fd)
    else:
        os.mknod(name, kind | 0o600, st.st_rdev, dir_fd=dir_fd)
    copy = open_path(name, dir_fd)
    try:
        copy_attributes(fd, st, copy, owners, stands_for, noted=noted)
    except OSError:
        os.close(copy)
        raise
    return copy


def _copy_contents(fd: int, target: int, size: int) -> None:
    source = open_contents(fd, stat.S_IFREG, os.O_RDONLY, ours=False)
    try:
        end = 0
        while end < size:
            try:
                start = os.lseek(source, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == ENXIO:  # a hole to the end
                    break
                if error.errno != EINVAL:
                    raise
                start, end = end, size  # no SEEK_DATA here
            else:
                end = os.lseek(source, start, os.SEEK_HOLE)
            _copy_range(source, target, start, end - start)
        os.ftruncate(target, size)
    finally:
        os.close(source)


def _copy_range(source: int, target: int, offset: int, count: int) -> None:
    """Copy within the kernel where it can, else through a buffer."""
    while count > 0:
        try:
            done = os.copy_file_range(source, target, min(count, _CHUNK), offset, offset)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            break
        if done == 0:  # some file systems answer so for what they cannot do
            break
        offset += done
        count -= done
    while count > 0:
        piece = os.pread(source, min(count, _BUFFER), offset)
        if not piece:
            return  # shorter than it was: the rest is a hole
        view = memoryview(piece)
        while view:
            done = os.pwrite(target, view, offset)
            view = view[done:]
            offset += done
            count -= done


def copy_attributes(
    fd: int,
    st: os.stat_result,
    copy: int,
    owners: Owners,
    stands_for: tuple[int, int] | None = None,
    *,
    noted: bool,
) -> None:
    """Give the file behind `copy` the attributes of `fd`, whose stat is `st`; times last.

    `stands_for` is as for `Owners.give`, `noted` as for `copy_file`.
    """
    owners.give(copy, os.fstat(copy), st.st_mode, st.st_uid, st.st_gid, stands_for)
    set_xattr = beside.set_xattr if owners.notes is not None else _set_xattr
    for name, value in _xattrs(fd_path(fd), noted=noted):
        try:
            set_xattr(copy, name, value)
        except OSError as error:
            # security.* and trusted.* take privilege, and not every file system takes every kind.
            if error.errno not in {EPERM, EACCES, EOPNOTSUPP}:
                raise
    os.utime(fd_path(copy), ns=(st.st_atime_ns, st.st_mtime_ns))


def _set_xattr(fd: int, name: bytes, value: bytes) -> None:
    os.setxattr(fd_path(fd), name, value)


def _xattrs(source: bytes, *, noted: bool) -> Iterator[tuple[bytes, bytes]]:
    """The attributes that a guest sees of the file at `source`, whichever way it has them."""
    try:
        names = [os.fsencode(name) for name in os.listxattr(source)]
    except OSError as error:
        if error.errno != EOPNOTSUPP:
            raise
        return
    kept = beside.XATTR_PREFIX
    for name in names:
        if noted and name.startswith(kept):
            yield name[len(kept) :], os.getxattr(source, name)
        elif not name.startswith(PRIVATE_XATTRS) and not (noted and kept + name in names):
            yield name, os.getxattr(source, name)
