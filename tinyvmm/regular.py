"""Files that are read to and fro, or to their end: regular ones, and nothing else."""

import errno
import os
import stat


def regular(path: str, flags: int) -> int:
    """Open a regular file: the `opener` of open(). OSError for anything else, and says so.

    A fifo may never begin and a device never end, and neither can be sought.
    """
    fd = os.open(path, flags | os.O_NONBLOCK)  # which waits for no fifo
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "no regular file; name one", path)
