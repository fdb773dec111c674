"""A raw disk: byte n of the disk is byte n of a file or block device, and that is all there is.

Writes go to the host's page cache, where they survive the end of this process but not a power cut;
`flush` is fdatasync(2). Discarded space is given back by punching holes. The image is locked as
files.py says. Not done: O_DIRECT, growing.

Threads: any, at once; the host's kernel orders what overlaps.
"""

import os
from collections.abc import Sequence

from tinyvmm.disks import files
from tinyvmm.errors import ConfigError


class RawDisk:
    """A file or block device as a disk, of `size` bytes."""

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        """Open and lock it; ConfigError if it cannot be had, or is no whole sectors."""
        self.path = path
        self.read_only = read_only
        self.fd = files.open_image(path, writable=not read_only)
        try:
            self.size = files.file_size(self.fd)
            check_size(path, self.size)
        except BaseException:
            self.close()
            raise

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from `offset` on."""
        files.read_all(self.fd, views, offset)

    def write_from(self, views: Sequence[memoryview], offset: int) -> None:
        """Write `views` to `offset` and on."""
        files.write_all(self.fd, views, offset)

    def flush(self) -> None:
        """Make everything written so far outlive a power cut."""
        os.fdatasync(self.fd)

    def discard(self, offset: int, length: int) -> None:
        """Give the space back, if the file system can."""
        files.punch_hole(self.fd, offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Have these bytes read as zeros."""
        files.zero_range(self.fd, offset, length, unmap=unmap)

    def close(self) -> None:
        """Close the file, and with it let go of the lock; harmless when done twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def check_size(path: str, size: int) -> None:
    """Raise ConfigError for a disk of no bytes, or with a part of a sector."""
    if not size or size % files.SECTOR:
        more = -size % files.SECTOR or 1 << 30
        raise ConfigError(
            f"disk {path} has {size} bytes, and a disk has whole sectors of {files.SECTOR}: "
            f"make it larger, e.g. truncate -s +{more} {path}"
        )
