"""An image in a file: the same bytes as a disk of it gives, with holes where the files have some.

The file appears under its name when it is complete, and not before.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from errno import EINVAL, EIO, ENOSYS, ENXIO, EOPNOTSUPP, EXDEV
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.hostfile import os_error
from tinyvmm.fileserver.maps import Path
from tinyvmm.images.draft import drafted
from tinyvmm.images.erofs.files import MEMORY, identity
from tinyvmm.images.erofs.format import BLOCK
from tinyvmm.images.erofs.image import ErofsImage

_PIECE = 64 << 20  # copied by one system call
_BUFFER = 1 << 20
_NO_SHORT_CUT = {EXDEV, EINVAL, EOPNOTSUPP, ENOSYS}  # of copy_file_range(2), between these files
Progress = Callable[[int, int], None]


class Written(NamedTuple):
    """What an image holds that was written."""

    size: int
    inodes: int


def write_image(
    reads: Sequence[tuple[Path, Path]],
    output: str,
    *,
    name: bytes = b"",
    progress: Progress | None = None,
    keep: Callable[[bytes], bool] | None = None,
) -> Written:
    """Write an EROFS image of the union of `reads`, (guest path, host directory) each, to `output`.

    `name` is the volume's, of 16 bytes at most; `keep` says of a path of this computer whether it
    is to be in the image, and with it whiteouts can be. `progress` takes the bytes done, and all
    there are.
    ConfigError for what cannot be read or written: then `output` is what it was.
    """

    def warn(line: str) -> None:
        raise ConfigError(line)

    image = ErofsImage(reads, warn, whole=True, name=name, keep=keep)
    try:
        with drafted(output) as draft:
            # Only now, or it would be in an image of the directory it is in.
            fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(fd, image.size)
                _write_data(image, fd, progress)
                _write_metadata(image, fd)
            finally:
                os.close(fd)
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}") from None
    finally:
        image.close()
    return Written(image.size, image.plan.inodes)


def _write_data(image: ErofsImage, output: int, progress: Progress | None) -> None:
    files = image.plan.files
    for row, (start, directory) in enumerate(zip(files.starts, files.directories, strict=True)):
        if directory == MEMORY:
            os.pwrite(output, image.plan.blocks_at(start), start * BLOCK)
            continue
        try:
            fd = image.contents.fd(row)
        except OSError as error:
            raise _not_read(image, row, error) from None
        for at, length in _data(fd, files.sizes[row]):
            try:
                _copy(fd, output, at, start * BLOCK + at, length)
            except EOFError:
                raise _not_read(image, row, os_error(EIO)) from None
        if identity(os.fstat(fd)) != files.identity(row):
            raise _not_read(image, row, os_error(EIO))
        if progress is not None:
            progress(start * BLOCK, image.size)


def _write_metadata(image: ErofsImage, output: int) -> None:
    os.pwrite(output, image.superblock, 0)
    at = image.meta_block * BLOCK
    with memoryview(image.plan.meta) as meta:
        for begin in range(0, len(meta), _PIECE):
            piece = meta[begin : begin + _PIECE]
            while piece:
                done = os.pwrite(output, piece, at)
                at += done
                piece = piece[done:]


def _not_read(image: ErofsImage, row: int, error: OSError) -> ConfigError:
    reason = "it changed meanwhile" if error.errno == EIO else error.strerror
    return ConfigError(f"cannot put {image.contents.path(row)} into the image: {reason}")


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Give the stretches of a file that are no holes."""
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
            end = min(os.lseek(fd, at, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == ENXIO:
                return  # nothing but a hole from here on
            end = size  # a file system that does not tell
        if at >= size:
            return
        yield at, end - at
        at = end


def _copy(source: int, output: int, at: int, to: int, length: int) -> None:
    """Copy `length` bytes, by the kernel alone if it can; EOFError if there are fewer."""
    while length:
        try:
            done = os.copy_file_range(source, output, min(length, _PIECE), at, to)
        except OSError as error:
            if error.errno not in _NO_SHORT_CUT:
                raise
            done = os.pwrite(output, os.pread(source, min(length, _BUFFER), at), to)
        if not done:
            raise EOFError
        at, to, length = at + done, to + done, length - done
