"""Writes an initramfs: a cpio archive in "newc" form, which the kernel unpacks as its first root.

The format is Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's source. An
archive is entries, each a header of hexadecimal numbers, a name and data, then a trailer; the
kernel takes several one after the other, so parts that never change (modules) can be kept as they
are and the rest appended:

    initrd = modules.finish() + Archive().add_file("init", program, mode=0o755).finish()

Entries must come after the directories they are in. Everything belongs to root and has no date, so
equal content gives equal bytes.
"""

import os
import stat

TRAILER = "TRAILER!!!"
_ZEROS = b"\0\0\0\0"


class Archive:
    """One cpio archive being written; the add methods return it, so that calls can be chained."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._directories: set[str] = set()

    def add_directory(self, path: str, mode: int = 0o755) -> "Archive":
        """Add a directory, and before it those it is in."""
        path = path.strip("/")
        if path and path not in self._directories:
            self._add_parents(path)
            self._directories.add(path)
            self._entry(path, stat.S_IFDIR | mode, nlink=2)
        return self

    def add_file(self, path: str, data: bytes, mode: int = 0o644) -> "Archive":
        """Add a regular file, and the directories it is in."""
        self._add_parents(path)
        self._entry(path, stat.S_IFREG | mode, data)
        return self

    def add_symlink(self, path: str, target: str) -> "Archive":
        """Add a symbolic link, and the directories it is in."""
        self._add_parents(path)
        self._entry(path, stat.S_IFLNK | 0o777, os.fsencode(target))
        return self

    def add_device(self, path: str, mode: int, major: int, minor: int) -> "Archive":
        """Add a device node; `mode` holds S_IFCHR or S_IFBLK and the permissions."""
        if not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
            raise ValueError(f"mode {mode:#o} is not a device's: it lacks S_IFCHR or S_IFBLK")
        self._add_parents(path)
        self._entry(path, mode, device=(major, minor))
        return self

    def finish(self) -> bytes:
        """The archive with its trailer. It can be added to and finished again."""
        return b"".join((*self._parts, *_entry(0, TRAILER, 0)))

    def _add_parents(self, path: str) -> None:
        parent = os.path.dirname(path.strip("/"))
        if parent:
            self.add_directory(parent)

    def _entry(
        self,
        path: str,
        mode: int,
        data: bytes = b"",
        nlink: int = 1,
        device: tuple[int, int] = (0, 0),
    ) -> None:
        name = path.strip("/")
        if not name or name == TRAILER or "\0" in name:
            raise ValueError(f"{path!r} cannot be the name of an entry")
        self._inode += 1
        self._parts += _entry(self._inode, name, mode, data, nlink, device)


def _entry(
    inode: int,
    name: str,
    mode: int,
    data: bytes = b"",
    nlink: int = 1,
    device: tuple[int, int] = (0, 0),
) -> tuple[bytes, ...]:
    """One cpio_file: header, name, data; name and data are each padded to four bytes."""
    encoded = os.fsencode(name) + b"\0"
    uid = gid = mtime = dev_major = dev_minor = checksum = 0
    numbers = [inode, mode, uid, gid, nlink, mtime, len(data), dev_major, dev_minor]
    numbers += [*device, len(encoded), checksum]
    header = b"070701" + b"".join(b"%08x" % number for number in numbers)
    name_padding = _ZEROS[: -(len(header) + len(encoded)) % 4]
    return header, encoded, name_padding, data, _ZEROS[: -len(data) % 4]
