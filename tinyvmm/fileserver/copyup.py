"""Copying one lower file or directory into a write tree's work area, as it is.

Kept: type, contents with their holes, owner and mode (see ownership), times to the nanosecond,
extended attributes the file system takes.
"""

import os
import stat
from errno import EACCES, EINVAL, ENOSYS, ENXIO, EOPNOTSUPP, EPERM, EXDEV

from tinyvmm.fileserver.beside import read_link
from tinyvmm.fileserver.hostfile import fd_path, open_contents, open_path
from tinyvmm.fileserver.ownership import Owners
from tinyvmm.fileserver.whiteout import PRIVATE_XATTRS

_CHUNK = 1 << 30
_BUFFER = 1 << 20
_CANNOT = {EXDEV, EINVAL, ENOSYS, EOPNOTSUPP, EPERM}


def copy_file(
    fd: int, st: os.stat_result, name: bytes, dir_fd: int, owners: Owners, *, data: bool
) -> int:
    """Copy the file behind O_PATH descriptor `fd` to the new entry `name`; gives its descriptor.

    Without `data` a regular file is copied empty, for who is about to truncate it.
    """
    kind = stat.S_IFMT(st.st_mode)
    if kind == stat.S_IFREG:
        target = os.open(
            name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=dir_fd
        )
        try:
            if data and st.st_size:
                _copy_contents(fd, target, st.st_size)
        finally:
            os.close(target)
    elif kind == stat.S_IFLNK:
        os.symlink(read_link(fd), name, dir_fd=dir_fd)
    elif kind == stat.S_IFDIR:
        os.mkdir(name, 0o700, dir_fd=dir_fd)
    else:
        os.mknod(name, kind | 0o600, st.st_rdev, dir_fd=dir_fd)
    copy = open_path(name, dir_fd)
    try:
        copy_attributes(fd, st, copy, owners)
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


def copy_attributes(fd: int, st: os.stat_result, copy: int, owners: Owners) -> None:
    """Give the file behind `copy` the attributes of `fd`, whose stat is `st`; times last."""
    path = fd_path(copy)
    owners.give(copy, os.fstat(copy), st.st_mode, st.st_uid, st.st_gid)
    _copy_xattrs(fd_path(fd), path)
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def _copy_xattrs(source: bytes, target: bytes) -> None:
    try:
        names = [os.fsencode(name) for name in os.listxattr(source)]
    except OSError as error:
        if error.errno != EOPNOTSUPP:
            raise
        return
    for name in names:
        if name.startswith(PRIVATE_XATTRS):
            continue
        try:
            os.setxattr(target, name, os.getxattr(source, name))
        except OSError as error:
            # security.* and trusted.* take privilege, and not every file system takes every kind.
            if error.errno not in {EPERM, EACCES, EOPNOTSUPP}:
                raise
