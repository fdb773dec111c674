"""Removing a directory with all that a guest has put into it, however deep.

A guest makes directories in directories by the thousand; to follow them down would take as many
descriptors and stack frames, and no path is long enough. So whatever directory is found in another
is first moved up to the top, where each is emptied in its turn.
"""

import os
from errno import EEXIST, EISDIR, ENOTDIR, ENOTEMPTY

_TAKEN = {EEXIST, EISDIR, ENOTDIR, ENOTEMPTY}


def remove_whole(name: bytes, dir_fd: int) -> None:
    """Remove a file, or a directory with all that is in it, following no symlink."""
    if _unlinked(name, dir_fd):
        return
    top = _open(name, dir_fd)
    try:
        serial = 0
        while names := os.listdir(b"/proc/self/fd/%d" % top):
            for inner in names:
                if not _unlinked(inner, top):
                    serial = _empty(inner, top, serial)
                    os.rmdir(inner, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=dir_fd)


def _empty(name: bytes, top: int, serial: int) -> int:
    """Empty the directory `name` of `top`, moving its directories there; numbers them on."""
    fd = _open(name, top)
    try:
        for inner in os.listdir(b"/proc/self/fd/%d" % fd):
            while not _unlinked(inner, fd):
                serial += 1
                try:
                    os.rename(inner, b".removed-%d" % serial, src_dir_fd=fd, dst_dir_fd=top)
                except OSError as error:
                    if error.errno not in _TAKEN:
                        raise
                else:
                    break
    finally:
        os.close(fd)
    return serial


def _unlinked(name: bytes, dir_fd: int) -> bool:
    """Remove what is no directory; False if it is one."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except IsADirectoryError:
        return False
    return True


def _open(name: bytes, dir_fd: int) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=dir_fd)
