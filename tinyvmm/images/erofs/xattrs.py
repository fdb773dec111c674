"""Extended attributes of the host's files, as an image has them behind an inode.

What trees keep beside their files (fileserver/beside.py) is read from there; what is a matter of
the host's alone stays here.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from errno import ENODATA, EOPNOTSUPP

from tinyvmm.fileserver import beside
from tinyvmm.fileserver.whiteout import PRIVATE_XATTRS
from tinyvmm.images.erofs import format as erofs


class Xattrs:
    """Reads them; `cannot` takes a path and why one cannot be had.

    With `opaque` overlayfs's mark of an opaque directory is one of them.
    """

    def __init__(self, cannot: Callable[[bytes, str], None], *, opaque: bool) -> None:
        self._cannot = cannot
        self._opaque = opaque
        self._without: set[int] = set()  # st_dev of file systems that have none

    def body(self, path: bytes, dev: int, *, follow: bool, noted: bool) -> bytes:
        """Return those of the file at `path`, as they are put behind an inode.

        `noted` says that the tree keeps things beside its files. OSError if they cannot be read.
        """
        if dev in self._without:
            return b""
        try:
            names = os.listxattr(path, follow_symlinks=follow)
        except OSError as error:
            if error.errno != EOPNOTSUPP:
                raise
            self._without.add(dev)
            return b""
        if not names:
            return b""
        return erofs.xattr_body(self._read(path, names, follow=follow, noted=noted))

    def _read(
        self, path: bytes, names: Sequence[str], *, follow: bool, noted: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        for shown in sorted(names):
            kept = os.fsencode(shown)
            name = kept.removeprefix(beside.XATTR_PREFIX) if noted else kept
            opaque = self._opaque and name == beside.OVERLAY_OPAQUE
            ours = name.startswith(PRIVATE_XATTRS) and not opaque
            if ours or erofs.xattr_index(name) is None:
                continue
            try:
                value = os.getxattr(path, kept, follow_symlinks=follow)
            except OSError as error:
                if error.errno not in {ENODATA, EOPNOTSUPP}:
                    raise
                continue
            if opaque and value != b"y":
                continue
            if len(value) <= erofs.XATTR_VALUE_MAX:
                yield name, value
            else:
                self._cannot(os.path.realpath(path), f"its xattr {shown} is too long for EROFS")
