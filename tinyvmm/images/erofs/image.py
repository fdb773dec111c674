"""An EROFS image made of host directories, as a disk: every read is answered when it comes.

There are two arrangements of the same parts. For a guest the places are fixed before anything is
planned, so that planning can wait until something is read:

    0            the superblock
    1 MiB        the metadata, as far as it has been planned
    64 GiB       data
    16 TiB - 4K  the end

and for a file, or a client that may read it from end to end, everything is planned first:

    0            the superblock
    4 KiB        data, each file in the blocks behind the one before
    behind that  the metadata, and the end

In the first, metadata that has not been planned is an error to read: a file system never does, as
nothing leads there, and zeros that a guest's kernel then kept would be wrong once there is more.

Threads: any, one at a time: `read_into` holds the image's lock, and so does what plans ahead.
"""

import os
from collections.abc import Callable, Sequence
from errno import EIO, EROFS
from threading import Lock

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.maps import Path
from tinyvmm.images.erofs import format as erofs
from tinyvmm.images.erofs.ahead import Ahead
from tinyvmm.images.erofs.contents import Contents
from tinyvmm.images.erofs.files import MEMORY
from tinyvmm.images.erofs.format import BLOCK, BLOCKS_MAX
from tinyvmm.images.erofs.plan import Plan
from tinyvmm.views import cut, scatter, size_of

_META_BLOCK = (1 << 20) // BLOCK  # behind what programs look at to see what a disk holds
_DATA_BLOCK = (64 << 30) // BLOCK
_LAST_BLOCK = BLOCKS_MAX - 1


class ErofsImage:
    """The union of `reads` as a read-only disk of `size` bytes."""

    read_only = True

    def __init__(
        self,
        reads: Sequence[tuple[Path, Path]],
        warn: Callable[[str], None],
        *,
        whole: bool = False,
        name: bytes = b"",
        veiled: frozenset[tuple[int, int]] = frozenset(),
        keep: Callable[[bytes], bool] | None = None,
    ) -> None:
        """Open the trees, (guest path, host directory) each; ConfigError for what cannot be had.

        `whole` plans everything now, and then what cannot be read is a ConfigError; without, the
        guest gets an error for it, and `warn` a line. `name` is the volume's, of 16 bytes at most.
        Directories whose (st_dev, st_ino) is in `veiled` appear empty; `keep` is as for
        `Plan`.
        """
        self._lock = Lock()
        self._whole = whole
        self.plan = Plan(
            reads,
            warn,
            first_block=1 if whole else _DATA_BLOCK,
            end_block=_LAST_BLOCK,
            strict=whole,
            veiled=veiled,
            keep=keep,
        )
        self.contents = Contents(self.plan, warn)
        self._ahead: Ahead | None = None
        self.meta_block = _META_BLOCK
        blocks = _LAST_BLOCK
        if whole:
            try:
                self.plan.plan_all()
            except BaseException:
                self.close()
                raise
            self.meta_block = self.plan.next_block
            blocks = self.meta_block + -(-len(self.plan.meta) // BLOCK)
            if blocks > _LAST_BLOCK:
                self.close()
                raise ConfigError(
                    "an EROFS image has 16 TiB at most: take some of the trees out of it"
                )
        self.size = blocks * BLOCK
        self.superblock = erofs.superblock(
            root_nid=self.plan.root_nid,
            inodes=self.plan.inodes,
            blocks=blocks,
            meta_block=self.meta_block,
            uuid=os.urandom(16),
            name=name,
        )

    def plan_ahead(self) -> None:
        """Have a thread plan what may be read next, from now until `close`."""
        if self._ahead is None:
            self._ahead = Ahead(self.plan, self._lock)

    def close(self) -> None:
        """Close every descriptor."""
        if self._ahead is not None:
            self._ahead.close()
        with self._lock:
            self.contents.close()
            self.plan.close()

    # --- a disk's methods: see devices/virtio/blk.py ----------------------------------------------

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from `offset` on; OSError (EIO) for what the host does not have any more.

        Or for what lies beyond the end.
        """
        if offset + size_of(views) > self.size:
            raise OSError(EIO, "beyond the end of the image")
        ahead = self._ahead
        if ahead is None:
            with self._lock:
                self._read(views, offset)
            return
        ahead.give_way = True
        with self._lock:
            ahead.give_way = False
            planned = self.plan.planned
            self._read(views, offset)
            if self.plan.planned != planned:
                ahead.more()

    def _read(self, views: Sequence[memoryview], offset: int) -> None:
        left = size_of(views)
        while left:
            done = self._read_some(views, left, offset)
            left -= done
            offset += done
            if left:
                views = cut(views, done)

    def write_from(self, views: Sequence[memoryview], offset: int) -> None:
        """Refuse."""
        del views, offset
        raise OSError(EROFS, os.strerror(EROFS))

    def flush(self) -> None:
        """Nothing was written."""

    def discard(self, offset: int, length: int) -> None:
        """Refuse."""
        self.write_from((), offset + length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Refuse."""
        self.write_from((), offset + length + unmap)

    # --- where it comes from ----------------------------------------------------------------------

    def _read_some(self, views: Sequence[memoryview], wanted: int, offset: int) -> int:
        """Fill the first bytes of `views`, which lie in one thing: how many."""
        block = offset // BLOCK
        meta_end = self.meta_block + -(-len(self.plan.meta) // BLOCK)
        if self.meta_block <= block < (meta_end if self._whole else _DATA_BLOCK):
            return self._read_meta(views, wanted, offset - self.meta_block * BLOCK)
        files = self.plan.files
        row = files.find(block)
        if row >= 0:
            start = offset - files.starts[row] * BLOCK
            room = -(-files.sizes[row] // BLOCK) * BLOCK - start
            if room > 0:
                count = min(wanted, room)
                part = views if count == wanted else cut(views, 0, count)
                if files.directories[row] == MEMORY:
                    data = memoryview(self.plan.blocks_at(files.starts[row]))
                    scatter(part, data[start : start + count])
                else:
                    self.contents.read(row, part, start)
                return count
        if not block:
            return scatter(views, self.superblock[offset:])
        limit = self.size
        if row + 1 < len(files):
            limit = files.starts[row + 1] * BLOCK
        for edge in (self.meta_block * BLOCK, self.size):
            if offset < edge:
                limit = min(limit, edge)
        return _fill_zeros(cut(views, 0, min(wanted, limit - offset)))

    def _read_meta(self, views: Sequence[memoryview], wanted: int, at: int) -> int:
        plan = self.plan
        if at >= len(plan.meta) + -len(plan.meta) % BLOCK:
            raise OSError(EIO, "metadata that has not been planned")
        if self._whole:
            last = -(-len(plan.meta) // BLOCK) * BLOCK
            count = min(wanted, last - at)
            done = scatter(cut(views, 0, count), memoryview(plan.meta)[at : at + count])
            return done + _fill_zeros(cut(views, done, count - done))
        count = min(wanted, BLOCK - at % BLOCK)
        plan.of_block(at // BLOCK)
        return scatter(cut(views, 0, count), bytes(plan.meta[at : at + count]))


def _fill_zeros(views: Sequence[memoryview]) -> int:
    """Zero `views`: how many bytes that were."""
    for view in views:
        view[:] = bytes(len(view))
    return size_of(views)
