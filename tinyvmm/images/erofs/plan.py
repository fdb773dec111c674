"""Where everything of an image lies: a walk of names and metadata that reads no file.

A directory is planned when it is first needed. To plan it is to give its entries their places: each
one's inode is made, complete, at the end of the metadata, and then the directory's own content,
which names them by those places. How long that content is must be known one level before: it stands
in the directory's inode, and the content itself behind that, where it fits. So planning a directory
lists the names in each directory below it, and no more.

`plan_all` plans everything, as an image in a file needs it. For a guest `of_block` plans what a
block holds just before it is read, so its first read of a huge tree is answered at once, and
`plan_one` (ahead.py) plans meanwhile what it may read next; of what that finds no word is said
before the guest looks there. A block that has been read is the guest's to keep: from then on
nothing is added to it.

What an inode of the host takes here: its 64 bytes and its entry (12 bytes and the name) in `meta`,
and 46 bytes and the name again in `files` (files.py), for a regular file that is not empty.

Not thread-safe: guarded by the lock of the image.
"""

import os
import stat
from collections import deque
from collections.abc import Callable, Container, Sequence
from errno import ENOENT, ENOTDIR, ESTALE
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver import beside
from tinyvmm.fileserver.hostfile import fd_path
from tinyvmm.fileserver.maps import MapPoint, Path, build_map
from tinyvmm.fileserver.stalling import is_kernels_own, may_stall
from tinyvmm.images.erofs import format as erofs
from tinyvmm.images.erofs.files import Files
from tinyvmm.images.erofs.format import BLOCK, INLINE_FORMAT, INODE, INODE_LEN, PLAIN_FORMAT, SLOT
from tinyvmm.images.erofs.sources import (
    DT_DIR,
    HostDirectories,
    Listing,
    list_directory,
    point_listing,
)
from tinyvmm.images.erofs.xattrs import Xattrs

_NEXT_MAX = 1 << 14
_SOON_MAX = 1000  # names; a reader waits while a directory is planned
_DIRECTORY_TYPE = erofs.FILE_TYPES[stat.S_IFDIR]
_ROOT_ATTRIBUTES = stat.S_IFDIR | 0o755


class _Directory(NamedTuple):
    """A directory whose inode has its place, and whose content has not been made yet."""

    nid: int
    parent_nid: int
    layers: Sequence[int]
    point: MapPoint | None
    listing: Listing
    counts: list[int]
    """How many names are in each block."""
    whole_start: int
    """Where the blocks begin that lie outside the metadata."""
    inline_at: int
    """Where in the metadata the rest is to be put; 0 if all of it is in whole blocks."""


class Plan:
    """The places in the image of the union of `reads`, (guest path, host directory) each."""

    def __init__(
        self,
        reads: Sequence[tuple[Path, Path]],
        warn: Callable[[str], None],
        *,
        first_block: int,
        end_block: int,
        strict: bool = False,
        veiled: frozenset[tuple[int, int]] = frozenset(),
        keep: Callable[[bytes], bool] | None = None,
    ) -> None:
        """Open the trees and plan the root; ConfigError for what cannot be had.

        Data gets blocks from `first_block` on, before `end_block`. `strict` makes an error of what
        cannot be read; else the guest gets EIO for it. Directories whose (st_dev, st_ino) is in
        `veiled` appear empty. `keep` says of a path of this computer whether it is to be in it;
        then whiteouts and overlayfs's mark of an opaque directory can be, too.
        """
        self.meta = bytearray(INODE_LEN)  # no inode is number 0
        self.files = Files()
        self.memory: dict[int, bytes | int] = {}
        """What begins at a block: bytes, or the nid of the directory whose content that is."""
        self.inodes = 0
        self.planned = 0
        """How many directories were planned because they were read."""
        self.next_block = first_block
        self.directories = HostDirectories()
        self._warn = warn
        self._end_block = end_block
        self._gap = 0 if strict else 1  # so that no request of a kernel has two files' data
        self._strict = strict
        self._veiled = veiled
        self._keep = keep
        self._links: dict[tuple[int, int], int] = {}
        self._mapped: dict[int, list[int]] = {}  # what is mapped at each point, by its id
        self._pending: dict[int, _Directory] = {}
        self._pending_in: dict[int, list[int]] = {}  # by the block of metadata they are put into
        self._whole: dict[int, bytes] = {}  # the blocks of directories that have been planned
        self._untold: dict[int, list[str]] = {}  # what to say of a directory when it is read
        # What to plan ahead; the oldest are forgotten, as by then the guest is elsewhere.
        self._next: deque[int] = deque(maxlen=0 if strict else _NEXT_MAX)
        self._xattrs = Xattrs(self._cannot, opaque=keep is not None)
        try:
            self.root_nid = self._plan_root(build_map(reads, []))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every descriptor."""
        self.directories.close()

    # --- what is planned when -----------------------------------------------------------------

    def plan_all(self) -> None:
        """Plan everything there is."""
        while self._pending:
            nid = next(reversed(self._pending))
            self._plan(nid)
        self._pending_in.clear()
        # fsck.erofs 1.5 reads the header of extended attributes behind each inode, without any too.
        self.meta += bytes(SLOT)

    def of_block(self, block: int) -> None:
        """Plan what lies in this block of the metadata, and add nothing more to it.

        The block has to be there, if only its beginning.
        """
        if len(self.meta) < (block + 1) * BLOCK:
            self.meta += bytes((block + 1) * BLOCK - len(self.meta))
        for nid in self._pending_in.get(block, ()):
            self._plan(nid)
        self._pending_in.pop(block, None)  # not before: what fails may be asked for again

    def blocks_at(self, start: int) -> bytes:
        """Return the content of the blocks of our own that begin at `start`."""
        held = self.memory[start]
        if isinstance(held, bytes):
            return held
        self._plan(held)
        return self._whole.get(held, b"")

    def _plan(self, nid: int) -> None:
        for line in self._untold.pop(nid, ()):
            self._warn(line)
        directory = self._pending.get(nid)
        if directory is not None:
            self.planned += 1
            self._place_entries(directory)
            del self._pending[nid]

    def plan_one(self, left_out: Container[tuple[int, int]], *, newest: bool) -> bool:
        """Plan one directory before it is asked for; False if there is none.

        That is the `newest` or the oldest of those whose inodes have their place. Directories
        whose (st_dev, st_ino) is in `left_out` or that may stall are left to whoever reads them.
        """
        while self._next:
            nid = self._next.pop() if newest else self._next.popleft()
            directory = self._pending.get(nid)
            if directory is None or not self._soon_planned(directory, left_out):
                continue
            lines: list[str] = []
            warn, self._warn = self._warn, lines.append
            try:
                self._place_entries(directory)
            except OSError:
                return True  # still pending: whoever reads it will hear
            finally:
                self._warn = warn
            del self._pending[nid]
            if lines:
                self._untold[nid] = lines
            return True
        return False

    def _soon_planned(self, directory: _Directory, left_out: Container[tuple[int, int]]) -> bool:
        if len(directory.listing.names) > _SOON_MAX:
            return False
        inodes = [self.directories.inode(layer) for layer in directory.layers]
        return not any(inode in left_out or may_stall(inode[0]) for inode in inodes)

    # --- directories --------------------------------------------------------------------------

    def _plan_root(self, root: MapPoint) -> int:
        for point in root.walk():
            reads, point.reads = point.reads, []
            self._mapped[id(point)] = [
                self.directories.add_root(fd, os.readlink(fd_path(fd)), notes)
                for fd, notes in reads
            ]
        layers = self._mapped[id(root)]
        if not layers:
            return self._place_directory((_ROOT_ATTRIBUTES, 0, 0, 0), 1, layers, root, None)
        st = self.directories.stat(layers[0])
        attributes = (st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns)
        links = 1 if root.below or len(layers) > 1 else st.st_nlink
        return self._place_directory(attributes, links, layers, root, None)

    def _place_child(self, parent: _Directory, name: bytes) -> int:
        """Give the directory `name` of `parent` its inode; its nid."""
        point = parent.point.below.get(name) if parent.point is not None else None
        try:
            layers, st = self._child_layers(parent, name, point)
        except OSError as error:
            return self._place_lost(parent, name, error)
        if st is None:
            return self._place_directory((_ROOT_ATTRIBUTES, 0, 0, 0), 1, [], point, parent.nid)
        attributes = (st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns)
        links = 1 if point and (point.below or len(layers) > 1) else st.st_nlink
        files = not is_kernels_own(st.st_dev)
        return self._place_directory(attributes, links, layers, point, parent.nid, files=files)

    def _child_layers(
        self, parent: _Directory, name: bytes, point: MapPoint | None
    ) -> tuple[list[int], os.stat_result | None]:
        """Return the layers of a child directory, and the stat of the first."""
        if point is not None and self._mapped[id(point)]:
            layers = self._mapped[id(point)]
            return layers, self.directories.stat(layers[0])
        having = parent.listing.layers
        if point is not None:
            among: Sequence[int] = range(len(parent.layers))
        elif having is None:
            among = (0,)
        else:
            among = having[name]
        layers = []
        first: os.stat_result | None = None
        for index in among:
            try:
                number, st = self.directories.add(parent.layers[index], name)
            except OSError:
                if point is None:
                    raise
                continue  # a map's place needs nothing below it
            layers.append(number)
            first = first or st
            if self._veiled and (st.st_dev, st.st_ino) in self._veiled:
                break
        return layers, first

    def _place_directory(
        self,
        attributes: tuple[int, int, int, int],
        links: int,
        layers: Sequence[int],
        point: MapPoint | None,
        parent_nid: int | None,
        *,
        files: bool = True,
    ) -> int:
        """Give a directory its inode, and its content room; its nid. It is pending afterwards.

        Without `files` it appears empty: what is in it are functions of the host's kernel.
        """
        readable = True
        listing = Listing([], {}, None)
        xattrs = b""
        try:
            xattrs = self._directory_xattrs(layers)
        except OSError as error:
            if error.errno not in {ENOENT, ESTALE}:
                raise  # another time it may be read
            readable = False  # it is gone, which is nothing to its neighbours
            self._lost(self.directories.path(layers[0]), error)
        if layers and files and readable:
            try:
                verbatim = self._keep is not None
                listing = list_directory(
                    self.directories, self._unveiled(layers), verbatim=verbatim
                )
            except OSError as error:
                readable = False
                self._lost(self.directories.path(layers[0]), error)
            if self._keep is not None:
                top = self.directories.path(layers[0])
                kept = {n: t for n, t in listing.types.items() if self._keep(os.path.join(top, n))}
                listing = listing._replace(names=list(kept), types=kept)
        listing = point_listing(listing, point)
        listing = listing._replace(names=sorted([b".", b"..", *listing.names]))
        counts, tail = erofs.split_names(listing.names)
        size = (len(counts) - 1) * BLOCK + tail
        inline = INODE_LEN + len(xattrs) + tail <= BLOCK and readable
        whole = (len(counts) - 1 if inline else len(counts)) if readable else 0
        start = self._blocks(whole, layers[0] if layers else None) if whole else 0
        if start is None or not readable:
            start, size, inline, readable = self._end_block, BLOCK, False, False  # beyond: EIO
        at = self._room(INODE_LEN + len(xattrs), tail if inline else 0)
        mode, uid, gid, mtime_ns = attributes
        self._put_inode(
            INLINE_FORMAT if inline else PLAIN_FORMAT,
            (mode, uid, gid, mtime_ns, links),
            size,
            start,
            xattrs,
        )
        nid = at // SLOT
        if readable:
            inline_at = len(self.meta) if inline else 0
            if inline:
                self.meta += bytes(tail)
                self._pending_in.setdefault(inline_at // BLOCK, []).append(nid)
            if whole:
                self.files.add_memory(start, whole * BLOCK)
                self.memory[start] = nid
            above = nid if parent_nid is None else parent_nid
            self._pending[nid] = _Directory(
                nid, above, layers, point, listing, counts, start, inline_at
            )
            self._next.append(nid)
        return nid

    def _unveiled(self, layers: Sequence[int]) -> Sequence[int]:
        """Leave out the directory that is to appear empty: the last, if it is any."""
        if not self._veiled:
            return layers
        st = os.fstat(self.directories.fd(layers[-1]))
        return layers[:-1] if (st.st_dev, st.st_ino) in self._veiled else layers

    def _directory_xattrs(self, layers: Sequence[int]) -> bytes:
        if not layers:
            return b""
        path = fd_path(self.directories.fd(layers[0]))
        noted = self.directories.notes(layers[0]) is not None
        return self._xattrs.body(path, os.stat(path).st_dev, follow=True, noted=noted)

    def _place_entries(self, directory: _Directory) -> None:
        """Make the inodes of a directory's entries, and then its content."""
        listing = directory.listing
        nids: dict[bytes, int] = {b".": directory.nid, b"..": directory.parent_nid}
        kinds = {b".": _DIRECTORY_TYPE, b"..": _DIRECTORY_TYPE}
        below = [name for name, kind in listing.types.items() if kind == DT_DIR]
        below.sort()
        for name in below:
            nids[name] = self._place_child(directory, name)
            kinds[name] = _DIRECTORY_TYPE
        others = [name for name in listing.names if name not in nids]
        self._place_files(directory, others, nids, kinds)
        names = listing.names
        data = erofs.directory_data(
            names, [nids[name] for name in names], [kinds[name] for name in names], directory.counts
        )
        whole = len(data)
        if directory.inline_at:
            whole = (len(directory.counts) - 1) * BLOCK
            self.meta[directory.inline_at : directory.inline_at + len(data) - whole] = data[whole:]
        if whole:
            self._whole[directory.nid] = data[:whole].ljust(-(-whole // BLOCK) * BLOCK, b"\0")

    # --- everything but directories -----------------------------------------------------------

    def _place_files(
        self,
        directory: _Directory,
        names: Sequence[bytes],
        nids: dict[bytes, int],
        kinds: dict[bytes, int],
    ) -> None:
        if not names:
            return
        having = directory.listing.layers
        number, fd = -1, -1
        notes = None
        for name in names:
            wanted = directory.layers[0 if having is None else having[name][0]]
            try:
                if wanted != number:
                    fd = self.directories.fd(wanted)
                    number, prefix = wanted, fd_path(fd) + b"/"
                    notes = self.directories.notes(wanted)
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if notes is not None:
                    st = beside.presented_at(prefix + name, st, notes)
                kinds[name] = erofs.FILE_TYPES[stat.S_IFMT(st.st_mode)]
                noted = notes is not None
                nids[name] = self._place_file(number, name, prefix + name, st, noted=noted)
            except OSError as error:
                kinds[name] = erofs.FILE_TYPES.get(directory.listing.types[name] << 12, 1)
                nids[name] = self._place_lost(directory, name, error)

    def _place_file(
        self, directory: int, name: bytes, path: bytes, st: os.stat_result, *, noted: bool
    ) -> int:
        """Make the inode of one file, unless it has one by another name; its nid.

        `noted` says that the tree keeps things beside its files.
        """
        mode = st.st_mode
        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFDIR:
            raise FileNotFoundError(ENOENT, "it is a directory now")
        if st.st_nlink > 1:
            known = self._links.get((st.st_dev, st.st_ino))
            if known is not None:
                return known
        size = where = 0
        layout = PLAIN_FORMAT
        target = b""
        xattrs = self._xattrs.body(path, st.st_dev, follow=False, noted=noted)
        if kind == stat.S_IFREG:
            size = st.st_size
            where = self._place_data(directory, name, st) if size else 0
        elif kind == stat.S_IFLNK:
            target = (
                beside.read_link_at(name, self.directories.fd(directory))
                if noted
                else os.readlink(path)
            )
            size = len(target)
            if INODE_LEN + len(xattrs) + size <= BLOCK:
                layout = INLINE_FORMAT
            else:
                where, target = self._place_target(directory, name, target), b""
        elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
            where = erofs.device_number(os.major(st.st_rdev), os.minor(st.st_rdev))
        at = self._room(INODE_LEN + len(xattrs), len(target))
        attributes = (mode, st.st_uid, st.st_gid, st.st_mtime_ns, st.st_nlink)
        self._put_inode(layout, attributes, size, where, xattrs)
        self.meta += target
        nid = at // SLOT
        if st.st_nlink > 1:
            self._links[st.st_dev, st.st_ino] = nid
        return nid

    def _place_data(self, directory: int, name: bytes, st: os.stat_result) -> int:
        """Give a file's data its blocks: the first of them."""
        start = self._blocks(-(-st.st_size // BLOCK), directory, name)
        if start is None:
            return self._end_block
        self.files.add(start, directory, name, st)
        return start

    def _place_target(self, directory: int, name: bytes, data: bytes) -> int:
        """Give a symlink's target blocks: the first of them."""
        count = -(-len(data) // BLOCK)
        start = self._blocks(count, directory, name)
        if start is None:
            return self._end_block
        self.files.add_memory(start, count * BLOCK)
        self.memory[start] = data.ljust(count * BLOCK, b"\0")
        return start

    def _place_lost(self, directory: _Directory, name: bytes, error: OSError) -> int:
        """Make what stands for an entry that could not be looked at: an inode that is none."""
        layers = directory.layers
        where = self.directories.path(layers[0]) if layers else b"/"
        self._lost(os.path.join(where, name), error)
        at = self._room(INODE_LEN, 0)
        self.meta += bytes(INODE_LEN)
        self.inodes += 1
        return at // SLOT

    # --- room -------------------------------------------------------------------------------------

    def _blocks(self, count: int, directory: int | None, name: bytes = b"") -> int | None:
        """Return the first of so many new blocks for what has this name; None if none are left."""
        start = self.next_block
        after = start + count + self._gap
        if after > self._end_block:
            top = b"/" if directory is None else self.directories.path(directory)
            path = os.path.join(top, name) if name else top
            self._cannot(path, "more than 16 TiB in all do not fit into an EROFS image")
            return None
        self.next_block = after
        return start

    def _room(self, head: int, tail: int) -> int:
        """Move on to where an inode can be: its 64 bytes in one block, and its tail in one."""
        at = -(-len(self.meta) // SLOT) * SLOT
        begin = at % BLOCK
        if begin + INODE_LEN > BLOCK or (tail and (begin + head) % BLOCK + tail > BLOCK):
            at += BLOCK - begin
        self.meta += bytes(at - len(self.meta))
        return at

    def _put_inode(
        self,
        layout: int,
        attributes: tuple[int, int, int, int, int],
        size: int,
        where: int,
        xattrs: bytes,
    ) -> None:
        self.inodes += 1
        mode, uid, gid, mtime_ns, links = attributes
        count = erofs.xattr_count(len(xattrs))
        seconds, nanoseconds = divmod(mtime_ns, 10**9)
        number = self.inodes & 0xFFFF_FFFF
        self.meta += INODE.pack(
            layout, count, mode, size, where, number, uid, gid, seconds, nanoseconds, links
        )
        if xattrs:
            self.meta += xattrs

    def _lost(self, path: bytes, error: OSError) -> None:
        """Say that something cannot be looked at; but what is gone from a tree nobody misses."""
        if self._strict or error.errno not in {ENOENT, ENOTDIR}:
            self._cannot(path, error)

    def _cannot(self, path: bytes, why: OSError | str) -> None:
        """Say that something cannot be had; ConfigError if that is not to be."""
        shown = os.fsdecode(path)
        reason = why if isinstance(why, str) else why.strerror
        if self._strict:
            raise ConfigError(f"cannot put {shown} into the image: {reason}")
        self._warn(f"{shown}: {reason}; the guest gets an error for it")
