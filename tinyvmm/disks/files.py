"""One image file or block device of the host: opening, locking, and moving bytes to and from it.

Bytes go straight between the file and the views given, which are the guest's RAM: `preadv` and
`pwritev`, as many calls as it takes. Beyond the end of a file there are zeros.

The lock is QEMU's (block/file-posix.c), so that neither QEMU nor qemu-img writes to an image we
have open, nor we to one of theirs: open-file-description locks on single bytes, all shared ones.
Byte 100 + n says "I do n", byte 200 + n "nobody else shall do n", for n = 0 to read, 1 to write
and 3 to resize. Having taken ours we ask whether somebody holds one that contradicts; two who come
at once may both be refused, but never both let in. The locks go when the descriptor does, even if
the process is killed. A file system without such locks has none.

Threads: any; nothing here is kept but the descriptor.
"""

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Sequence

from tinyvmm.errors import ConfigError
from tinyvmm.views import cut, size_of

SECTOR = 512
_IOV_MAX = 1024
_ZEROS_LEN = 1 << 20
_BLKGETSIZE64 = 0x8008_1272  # <linux/fs.h>

# <linux/falloc.h>
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE, _FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10

_READ, _WRITE, _RESIZE = 0, 1, 3
_USED, _REFUSED = 100, 200
_flock = struct.Struct("hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def open_image(path: str, *, writable: bool) -> int:
    """Open and lock an image; ConfigError, saying what to do, if it is not there to be had."""
    try:
        # O_NONBLOCK: not to wait for a FIFO's other end.
        flags = os.O_RDWR if writable else os.O_RDONLY
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except IsADirectoryError:
        raise ConfigError(f"disk {path} is a directory: name an image in it") from None
    except OSError as error:
        remedy = {
            errno.ENOENT: f"make one, e.g. truncate -s 1G {path}",
            errno.EACCES: "have it made readable" + (" and writable, or add ,ro" * writable),
            errno.EROFS: "add ,ro or ,ephemeral",
        }.get(error.errno or 0, "name a file or a block device")
        raise ConfigError(f"cannot open the disk {path}: {error.strerror}; {remedy}") from None
    problem = _problem(fd, writable=writable)
    if problem is not None:
        os.close(fd)
        raise ConfigError(f"disk {path} is {problem}")
    return fd


def _problem(fd: int, *, writable: bool) -> str | None:
    """What keeps an open file from being a disk of ours, and the remedy."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        return "a directory: name an image in it"
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        return "neither a file nor a block device: name one"
    if not lock(fd, writable=writable):
        way_out = ", or add overlay=FILE or ephemeral" if writable else ""
        return f"in use by another machine, or named twice: stop that{way_out}"
    return None


def lock(fd: int, *, writable: bool) -> bool:
    """Take the locks of a reader or a writer; whether nobody else's contradict."""
    used = (_READ, _WRITE, _RESIZE) if writable else (_READ,)
    own = [*(_USED + n for n in used), _REFUSED + _WRITE, _REFUSED + _RESIZE]
    others = [*(_REFUSED + n for n in used), _USED + _WRITE, _USED + _RESIZE]
    try:
        for byte in own:
            request = _flock.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
        for byte in others:
            request = _flock.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            (kind, *_) = _flock.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request))
            if kind != fcntl.F_UNLCK:
                return False
    except OSError as error:
        return error.errno not in {errno.EAGAIN, errno.EACCES}
    return True


def file_size(fd: int) -> int:
    """Return the bytes in a file or block device."""
    st = os.fstat(fd)
    if stat.S_ISBLK(st.st_mode):
        (size,) = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))
        return int(size)
    return st.st_size


# --- bytes ------------------------------------------------------------------------------------


def read_all(fd: int, views: Sequence[memoryview], offset: int) -> int:
    """Fill `views` from the file at `offset`: how many bytes were there, not beyond its end."""
    done, wanted = 0, size_of(views)
    while wanted:
        got = os.preadv(fd, views[:_IOV_MAX], offset)
        done += got
        if got == wanted:
            break
        if not got:
            fill_zeros(views)
            break
        wanted -= got
        offset += got
        views = cut(views, got)
    return done


def write_all(fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Write `views` to the file at `offset`."""
    wanted = size_of(views)
    while wanted:
        put = os.pwritev(fd, views[:_IOV_MAX], offset)
        if put == wanted:
            return
        wanted -= put
        offset += put
        views = cut(views, put)


def fill_zeros(views: Sequence[memoryview]) -> None:
    """Zero `views`."""
    for view in views:
        view[:] = bytes(len(view))


# --- space ------------------------------------------------------------------------------------


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give the space up, which then reads as zeros; False if that cannot be done here."""
    return _fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int, *, unmap: bool) -> None:
    """Make these bytes read as zeros: without their space if `unmap`, else if possible with it."""
    if unmap and punch_hole(fd, offset, length):
        return
    if _fallocate(fd, _FALLOC_FL_ZERO_RANGE | _FALLOC_FL_KEEP_SIZE, offset, length):
        return
    zeros = memoryview(bytes(min(length, _ZEROS_LEN)))
    while length:
        piece = zeros[:length]
        write_all(fd, [piece], offset)
        offset += len(piece)
        length -= len(piece)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Call fallocate(2); False if file or file system has no such thing."""
    while length and _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        # EINVAL: a block device, asked for less than its own blocks
        if number in {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
