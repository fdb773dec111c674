"""Unpacked kernels, kept: what there is of one to load, in one file, to be read in a few calls.

    vmlinuz ──stat──▶ memo ──names──▶ entry: header page | bytes of segment 0 | segment 1 | ...

An entry is named by the hash of the kernel it was made of. A memo says which entry a file had, for
as long as its path, size, mtime and ctime stay what they were, so that a later start neither hashes
nor unpacks. Both appear by rename, whole or not at all; several processes may write the same one.
A file here that is not what it should be is as good as absent and gets written anew; a cache that
cannot be read or written makes a start slower, and nothing else.
"""

import os
import struct

from tinyvmm.kernel_files.kernel_image import Kernel, Layout, Segment
from tinyvmm.layout import PAGE_SIZE

MAGIC = b"TVMMKRN1"
# magic, CRC-32 of the header from here on, segments, file_len, memory_end, entry, lengths of the
# setup header and version; then the segments as (gpa, offset, length), and those two strings
HEADER = struct.Struct("<8sIIQQQII")
CRC_END = 12
SEGMENT = struct.Struct("<QQQ")
STRINGS_LEN_MAX = 1024
SEGMENTS_MAX = (PAGE_SIZE - HEADER.size - STRINGS_LEN_MAX) // SEGMENT.size
ENTRIES_KEPT = 4
MEMOS_KEPT = 32


def default_dir() -> str:
    """Return XDG_CACHE_HOME/tinyvmm (XDG Base Directory Specification: ~/.cache if unset)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return os.path.join(base, "tinyvmm")


def digest_of(payload: bytes, setup_header: bytes, version: str) -> str:
    """Return the name of the entry for a kernel with these contents."""
    from hashlib import sha256

    hashed = sha256(setup_header + b"\0" + version.encode() + b"\0")
    hashed.update(payload)
    return hashed.hexdigest()[:40]


class KernelCache:
    """The cache in `directory`, which is made when there is something to keep."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.join(directory, "kernels")

    def recall(self, path: str, status: os.stat_result) -> Kernel | None:
        """Return the kernel that the file at `path` was found to be when it had this status."""
        try:
            fd = os.open(self._memo(path, status), os.O_RDONLY | os.O_CLOEXEC)
            try:
                memo = os.read(fd, PAGE_SIZE)
            finally:
                os.close(fd)
        except OSError:
            return None
        digest, _, identity = memo.partition(b"\n")
        if identity != _identity(path, status) or not digest.isalnum():
            return None
        return self.find(path, digest.decode("ascii", "replace"))

    def remember(self, path: str, status: os.stat_result, digest: str) -> None:
        """Note that the file at `path`, while it has this status, is the kernel `digest`."""
        self._write(self._memo(path, status), [digest.encode() + b"\n" + _identity(path, status)])
        self._prune(".memo", MEMOS_KEPT)

    def find(self, path: str, digest: str) -> Kernel | None:
        """Open the entry `digest`, as the kernel at `path`; None if it is absent or damaged."""
        try:
            fd = os.open(self._entry(digest), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            kernel = _decode(path, fd)
        except BaseException:
            os.close(fd)
            raise
        if kernel is None:
            os.close(fd)
        return kernel

    def store(self, kernel: Kernel, digest: str) -> Kernel:
        """Keep an unpacked `kernel`; return it as opened from the cache, or as it is."""
        if not isinstance(kernel.source, bytes):
            raise TypeError("a kernel that is loaded from its own file needs no cache")
        data = memoryview(kernel.source)
        header, segments = _encode(kernel)
        parts: list[bytes | memoryview] = [header]
        for kept, segment in zip(segments, kernel.segments, strict=True):
            parts += (data[segment.offset : segment.offset + segment.length], _padding(kept))
        if not self._write(self._entry(digest), parts):
            return kernel
        self._prune(".kernel", ENTRIES_KEPT)
        return self.find(kernel.path, digest) or kernel

    def _entry(self, digest: str) -> str:
        return os.path.join(self.directory, digest + ".kernel")

    def _memo(self, path: str, status: os.stat_result) -> str:
        name = os.path.basename(path)[:64]
        return os.path.join(
            self.directory, f"{name}-{status.st_size:x}-{status.st_mtime_ns:x}.memo"
        )

    def _write(self, target: str, parts: list[bytes | memoryview]) -> bool:
        """Put a file in place whole, or leave everything as it was and return False."""
        draft = f"{target}.{os.getpid()}.tmp"
        try:
            os.makedirs(self.directory, 0o700, exist_ok=True)
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError:
            return False
        try:
            try:
                for part in parts:
                    rest = memoryview(part)
                    while rest:
                        rest = rest[os.write(fd, rest) :]
                os.fsync(fd)  # or a power cut could leave the name on an empty file
            finally:
                os.close(fd)
            os.rename(draft, target)
        except OSError:
            os.unlink(draft)
            return False
        except BaseException:
            os.unlink(draft)
            raise
        return True

    def _prune(self, suffix: str, kept: int) -> None:
        """Remove all but the newest files; one that another process removes first is no matter."""
        try:
            with os.scandir(self.directory) as found:
                files = [(e.stat().st_mtime_ns, e.path) for e in found if e.name.endswith(suffix)]
            for _, path in sorted(files)[:-kept]:
                os.unlink(path)
        except OSError:
            return


def _identity(path: str, status: os.stat_result) -> bytes:
    """Return what must be unchanged for a file to be taken as the same."""
    where = os.fsencode(os.path.abspath(path))
    return b"%d %d %d %s" % (status.st_size, status.st_mtime_ns, status.st_ctime_ns, where)


def _padding(segment: Segment) -> bytes:
    return bytes(-segment.length % PAGE_SIZE)


def _encode(kernel: Kernel) -> tuple[bytes, list[Segment]]:
    """Return an entry's header page, and the kernel's segments at their offsets in the entry."""
    from zlib import crc32

    segments = []
    offset = PAGE_SIZE
    for gpa, _, length in kernel.segments:
        segments.append(Segment(gpa, offset, length))
        offset += length + len(_padding(segments[-1]))
    version = kernel.version.encode()
    header = HEADER.pack(
        *(MAGIC, 0, len(segments), offset, kernel.memory_end, kernel.entry),
        *(len(kernel.setup_header), len(version)),
    )
    header += b"".join(SEGMENT.pack(*segment) for segment in segments)
    header += kernel.setup_header + version
    if len(header) > PAGE_SIZE:
        raise ValueError(f"{len(segments)} segments do not fit an entry's header")
    header = header.ljust(PAGE_SIZE, b"\0")
    crc = crc32(header[CRC_END:])
    return MAGIC + crc.to_bytes(4, "little") + header[CRC_END:], segments


def _decode(path: str, fd: int) -> Kernel | None:
    """Return the kernel in the entry `fd`, None unless the header is whole and the file as long."""
    from zlib import crc32

    try:
        page = os.pread(fd, PAGE_SIZE, 0)
        fields = HEADER.unpack_from(page)
    except (OSError, struct.error):
        return None
    magic, crc, count, file_len, memory_end, entry, setup_len, version_len = fields
    if magic != MAGIC or crc != crc32(page[CRC_END:]) or os.fstat(fd).st_size != file_len:
        return None
    strings = HEADER.size + SEGMENT.size * count
    segments = tuple(map(Segment._make, SEGMENT.iter_unpack(page[HEADER.size : strings])))
    setup_header = page[strings : strings + setup_len]
    version = page[strings + setup_len : strings + setup_len + version_len].decode()
    return Kernel(path, fd, Layout(segments, memory_end, entry), setup_header, version)
