"""UnionTree: read trees under write trees, as one file system for one guest.

Reads come from host directories that are never changed; everything the guest changes goes to write
trees. It is overlayfs's model, done in the server: docs/decisions/0002-union-in-the-server.md says
why. How to read it: maps (what is mapped where), union_node (files, and how they are copied up),
union_view (directories, and how they are merged), union_directory (changing them), writetree and
whiteout (what it looks like on the host), copyup.

What holds, and what does not, of the host underneath: read trees may be seen changing, file by
file, as on any network file system; write trees must be left alone while a union has them. A lower
file with several names appears as so many files; names the guest gives by link(2) are one file.
"""

import os
import time
from collections.abc import Callable, Sequence
from errno import ENOSYS
from stat import S_IFDIR, S_IFMT, S_ISDIR
from threading import RLock

from tinyvmm.fileserver.descriptors import Descriptors
from tinyvmm.fileserver.hostfile import Mutation, os_error
from tinyvmm.fileserver.maps import Layers, MapPoint, Path, build_map
from tinyvmm.fileserver.qids import QID_TYPES, QidPaths, place_path, version_of
from tinyvmm.fileserver.union_directory import UnionDirectory
from tinyvmm.fileserver.union_node import UnionNode
from tinyvmm.fileserver.writetree import WriteTree
from tinyvmm.ninep import Qid

_Inode = tuple[int, int, int]  # space, st_dev, st_ino


class UnionTree:
    """The union described by a tree of map points, which it takes over."""

    def __init__(self, point: MapPoint) -> None:
        """Serve what is mapped at and below `point`."""
        self.lock = RLock()
        self.mutation = Mutation(self.lock, self.no_space)
        self.descriptors = Descriptors()
        self.qid_paths = QidPaths()
        self.on_no_space: Callable[[bytes], None] | None = None
        now = time.time_ns()
        self.synthetic_stat = os.stat_result(
            (S_IFDIR | 0o755, 0, 0, 1, 0, 0, 0, *[now // 10**9] * 3),
            {f"st_{which}time_ns": now for which in "amc"}
            | {"st_blksize": 4096, "st_blocks": 0, "st_rdev": 0},
        )
        self._point = point
        self._closed = False
        self.write_roots = {write.inode for write in point.writes()}
        self._identities: dict[_Inode, Qid] = {}  # of what was copied up: what it was before
        self._generations: dict[_Inode, int] = {}  # of upper inode numbers used more than once
        self._copied: set[int] = set()  # the paths in _identities
        self._taken: set[int] = set()  # those, and the paths of live lower nodes
        layers = Layers()
        point.add_layers(layers)
        identity = Qid(QID_TYPES[S_IFDIR], 1, self.qid_paths.path(0, 0, 0))
        self._root = UnionDirectory(
            self, None, b"", identity, layers, point.space, point.write, point
        )

    def root(self) -> UnionDirectory:
        """The root directory."""
        self._root.retain()
        return self._root

    def close(self) -> None:
        """Close every descriptor still held, and leave the write trees clean."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            self.descriptors.close_all()
            self._point.close()

    def any_fd(self) -> int:
        """A descriptor of some host directory, for what has none of its own."""
        for point in self._point.walk():
            if point.write is not None:
                return point.write.fd
            if point.reads:
                return point.reads[0][0]
        raise os_error(ENOSYS)

    def no_space(self) -> None:
        """Tell the host's side, once, that a write tree is full."""
        hook, self.on_no_space = self.on_no_space, None
        if hook is not None:
            hook(min((write.path for write in self._point.writes()), key=_free_bytes))

    # --- identities -------------------------------------------------------------------------------
    def lower_qid(self, space: int, st: os.stat_result, place: int) -> Qid:
        """A qid for a lower file about to get a node.

        Its path is the inode's, unless the inode appears at several places (hard links, bind
        mounts): those must not share what will come apart when one of them is copied up.
        """
        path = self.qid_paths.path(space, st.st_dev, st.st_ino)
        if path in self._taken or (st.st_nlink > 1 and not S_ISDIR(st.st_mode)):
            path = place
        self._taken.add(path)
        version = version_of(st.st_mtime_ns, st.st_ctime_ns, st.st_size)
        return Qid(QID_TYPES.get(S_IFMT(st.st_mode), 0), version, path)

    def upper_qid(self, write: WriteTree, st: os.stat_result) -> Qid:
        """The qid of an upper file: the one it had before it was copied up, or its own."""
        qid_type = QID_TYPES.get(S_IFMT(st.st_mode), 0)
        return self.upper_entry_qid(write, st.st_dev, st.st_ino, qid_type)

    def upper_entry_qid(self, write: WriteTree, dev: int, ino: int, qid_type: int) -> Qid:
        """As `upper_qid`, of what is known of a directory's entry."""
        inode = (write.space, dev, ino)
        identity = self._identities.get(inode)
        if identity is not None:
            return identity
        path, generation = self.qid_paths.path(*inode), self._generations.get(inode, 1)
        if path in self._copied:  # what had this inode goes on as another
            path = place_path(path, b"%d" % generation)
        return Qid(qid_type, generation, path)

    def remember(self, write: WriteTree, st: os.stat_result, identity: Qid) -> None:
        """Note that the upper file of stat `st` is a copy of what had `identity`."""
        self._identities[write.space, st.st_dev, st.st_ino] = identity
        self._copied.add(identity.path)
        self._taken.add(identity.path)

    def forget(self, write: WriteTree, st: os.stat_result) -> None:
        """Note that the upper inode of stat `st` is gone: its number may come back as another."""
        inode = (write.space, st.st_dev, st.st_ino)
        identity = self._identities.pop(inode, None)
        if identity is not None:
            self._copied.discard(identity.path)
        write.owners.forget(st)
        self._generations[inode] = self._generations.get(inode, 1) % 0xFFFF_FFFF + 1

    def release_path(self, node: UnionNode) -> None:
        """Note that `node` is closing."""
        if node.identity.path not in self._copied:
            self._taken.discard(node.identity.path)


def _free_bytes(path: bytes) -> int:
    st = os.statvfs(path)
    return st.f_bavail * st.f_frsize


def open_tree(reads: Sequence[tuple[Path, Path]], writes: Sequence[tuple[Path, Path]]) -> UnionTree:
    """The union of `(guest path, host path)` maps; raises ConfigError with the reason in one line.

    At one guest path later read trees win over earlier ones; a deeper map hides the one above. Each
    write tree takes the changes at and below its guest path; what none covers is read-only.
    """
    return UnionTree(build_map(reads, writes))
