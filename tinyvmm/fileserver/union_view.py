"""A directory of a union as it is seen: merged from the layers that have it.

Lookup, in order: what the write tree has, or says is gone (both known by name after one reading of
the upper directory, so a name that is not there costs no system call); then the read trees, the
first searched first. A directory is merged with the directories of its name further down, until a
layer says whiteout, opaque or has another kind of file there. A map point (see maps) takes the
place of whatever the layers have at its name. A write tree that lies inside a read tree is an empty
directory there: shown, it would contain itself.

Invariants, under the union's lock:
- `names` and `gone` say exactly what the upper directory holds, once they have been read;
- a directory that has been renamed is opaque and has no lower layers any more;
- `children` holds the live nodes, each by its name here.
"""

import os
import stat
from collections.abc import Generator
from errno import EISDIR, EMFILE, ENOENT, EROFS, ESTALE
from typing import TYPE_CHECKING

from tinyvmm.fileserver import beside
from tinyvmm.fileserver.copyup import copy_attributes, copy_file
from tinyvmm.fileserver.hostfile import (
    OpenDirectory,
    altered,
    check_name,
    dtype_of,
    fd_path,
    open_contents,
    open_path,
    os_error,
)
from tinyvmm.fileserver.maps import UPPER, Layers, MapPoint
from tinyvmm.fileserver.qids import QID_TYPES, place_path
from tinyvmm.fileserver.tree import NO_ID, OpenFile
from tinyvmm.fileserver.union_node import UnionFile, UnionNode
from tinyvmm.fileserver.whiteout import is_whiteout, layer_xattr
from tinyvmm.fileserver.writetree import WriteTree
from tinyvmm.ninep import Qid

if TYPE_CHECKING:
    from tinyvmm.fileserver.union import UnionTree

_DIR_DTYPE = stat.S_IFDIR >> 12
_CHR_DTYPE = stat.S_IFCHR >> 12
_REG_DTYPE = stat.S_IFREG >> 12
_ROOT_XATTR = b"user.tinyvmm.root"


class MergedDirectory(UnionNode):
    """One directory, as far as looking and copying up go; changes are in union_directory."""

    __slots__ = (
        "_gone",
        "_layers",
        "_names",
        "_open",
        "_root_of_write",
        "children",
        "point",
        "space",
        "write",
    )

    def __init__(
        self,
        tree: "UnionTree",
        parent: "MergedDirectory | None",
        name: bytes,
        identity: Qid,
        layers: Layers,
        space: int,
        write: WriteTree | None,
        point: MapPoint | None,
    ) -> None:
        """Be the directory of `layers` (taken over), with maps below `point` if there are any."""
        super().__init__(tree, parent, name, stat.S_IFDIR, identity)
        self.children: dict[bytes, UnionNode] = {}
        self.space = space
        self.write = write
        self.point = point
        self._layers = layers
        self._open = True
        self._names: set[bytes] | None = None
        self._gone: set[bytes] = set()
        # The root of a write tree is the user's directory: until the guest changes the attributes,
        # owner and mode are those of the directory it covers.
        self._root_of_write = (
            point is not None
            and point.write is not None
            and bool(layers.lowers)
            and not _has_own_attributes(layers.upper)
        )

    # --- layers -----------------------------------------------------------------------------------
    def close_descriptors(self) -> None:
        """Close every layer."""
        self._layers.close()
        self._open = False

    def give_up(self) -> bool:
        """Close every layer, unless the place does not lead to them."""
        if self.dead or self.point is not None or not self._layers.found:
            return False
        self.close_descriptors()
        return True

    def layers(self) -> Layers:
        """The layers, opened again if they were given up."""
        if not self._open:
            closed = [self]  # and those above: a guest may dig deeper than our stack is
            while (above := closed[-1].parent) is not None and not above.is_open():
                closed.append(above)
            for directory in reversed(closed):
                directory.reopen()
        return self._layers

    def is_open(self) -> bool:
        """Whether the layers have their descriptors."""
        return self._open

    def reopen(self) -> None:
        """Open the layers again; the parent's are open."""
        parent = self.parent
        if parent is None or self.refs <= 0:
            raise os_error(ESTALE)  # the tree is closed
        layers = self._layers
        fds: list[int] = []
        try:
            for layer, dev, ino in layers.found:
                fds.append(open_path(self.name, parent.layer_fd(layer)))
                st = os.fstat(fds[-1])
                if (st.st_dev, st.st_ino) != (dev, ino):
                    raise os_error(ESTALE)  # the host replaced it
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        if layers.found[0][0] == UPPER:
            layers.upper = fds.pop(0)
        layers.lowers = fds
        self._open = True
        self.tree.descriptors.hold(self)

    def layer_fd(self, layer: int) -> int:
        """The descriptor of one layer, by its number."""
        layers = self.layers()
        return layers.upper if layer == UPPER else layers.lowers[layer]

    def layer_notes(self, layer: int) -> beside.Notes | None:
        """What the lower layer of that number keeps beside its files."""
        return self._layers.notes[layer]

    def notes(self) -> beside.Notes | None:
        """Those of the uppermost layer."""
        layers = self._layers
        if layers.found and layers.found[0][0] == UPPER:
            return None if self.write is None else self.write.owners.notes
        return layers.notes[0] if layers.notes else None

    def _below(self) -> os.stat_result:
        """What the first read tree says of this directory; the layers are open."""
        fd, notes = self._layers.lowers[0], self._layers.notes[0]
        st = os.fstat(fd)
        return st if notes is None else beside.presented(fd, st, notes)

    def path_fd(self) -> int:
        """The uppermost layer's descriptor; -1 for a directory that only leads to a map point."""
        layers = self.layers()
        if layers.upper >= 0:
            return layers.upper
        return layers.lowers[0] if layers.lowers else -1

    def index(self) -> tuple[set[bytes], set[bytes]]:
        """What the upper layer has, and what it says is gone."""
        if self._names is None:
            upper = self.layers().upper
            if upper < 0 or self.write is None:
                self._names = set()
            else:
                self._names, self._gone = self.write.index(upper)
        return self._names, self._gone

    # --- looking ----------------------------------------------------------------------------------
    def stat(self) -> os.stat_result:
        """The uppermost layer's attributes; one link, as overlayfs says of merged directories."""
        with self.tree.lock:
            fd = self.path_fd()
            if fd < 0:
                return self.tree.synthetic_stat
            st = os.fstat(fd)
            layers = self._layers
            if self._root_of_write:
                below = self._below()
                return altered(st, mode=below.st_mode, nlink=1, uid=below.st_uid, gid=below.st_gid)
            st = self.with_owner(st, fd) if layers.upper >= 0 else self._below()
            if self.point is not None or (layers.upper >= 0 and layers.lowers):
                return altered(st, nlink=1)
            return st

    def walk(self, name: bytes) -> UnionNode:
        """The entry `name`; `..` is the parent, and the root its own."""
        tree = self.tree
        with tree.lock:
            node = self.children.get(name)
            if node is not None:
                node.refs += 1
                return node
            if name == b"..":
                return (self.parent or self).retain()
            check_name(name)
            tree.descriptors.make_room()
            try:
                node = self.find(name)
            except OSError as error:
                if error.errno != EMFILE:
                    raise
                tree.descriptors.give_up_half()
                node = self.find(name)
            if node is None:
                raise FileNotFoundError(ENOENT, os.strerror(ENOENT), name)
            return node

    def find(self, name: bytes) -> UnionNode | None:
        """The node of the entry `name`, with a reference for the caller; None if there is none."""
        node = self.children.get(name)
        if node is not None:
            node.refs += 1
            return node
        if self.dead:
            return None
        if self.point is not None and name in self.point.below:
            return self._find_point(name, self.point.below[name])
        layers = self.layers()
        found = Layers()
        lowers: list[int] = layers.lowers
        if layers.upper >= 0:
            names, gone = self.index()
            if name in gone:
                return None
            if name in names:
                fd = open_path(name, layers.upper)
                st = os.fstat(fd)
                if not stat.S_ISDIR(st.st_mode):
                    st = self.with_owner(st, fd)
                    return UnionFile(self, name, self._upper_qid(st), fd, st, UPPER)
                found.add_upper(fd, st)
        try:
            if lowers:
                file = self._find_below(name, found)
                if file is not None:
                    return file
                if found.upper >= 0 and found.lowers and self._is_opaque(found.upper):
                    found.drop_lowers()
            if not found.found and found.veiled is None:
                return None
            return self._directory(name, found)
        except BaseException:
            found.close()
            raise

    def _find_below(self, name: bytes, found: Layers) -> UnionFile | None:
        """Add to `found` what the lower layers have as `name`, or make a node if it is a file."""
        lowers = self._layers.lowers
        for layer, lower in enumerate(lowers):
            try:
                fd = open_path(name, lower)
            except FileNotFoundError:
                continue
            st = os.fstat(fd)
            notes = self._layers.notes[layer]
            if stat.S_ISDIR(st.st_mode):
                if (st.st_dev, st.st_ino) in self.tree.write_roots:
                    os.close(fd)
                    found.veiled = st
                    break
                found.add_lower(fd, st, layer, notes)
                if layer + 1 < len(lowers) and layer_xattr(fd_path(fd), b"opaque") == b"y":
                    break
                continue
            if notes is not None:
                st = beside.presented(fd, st, notes)
            if found.found or is_whiteout(fd_path(fd), st):
                os.close(fd)
                break
            return UnionFile(self, name, self._lower_qid(name, st), fd, st, layer)
        return None

    def _directory(self, name: bytes, found: Layers) -> "MergedDirectory":
        if found.upper >= 0:
            identity = self._upper_qid(os.fstat(found.upper))
        else:
            st = os.fstat(found.lowers[0]) if found.lowers else found.veiled
            identity = self._point_qid(name) if st is None else self._lower_qid(name, st)
        return type(self)(self.tree, self, name, identity, found, self.space, self.write, None)

    def _find_point(self, name: bytes, point: MapPoint) -> "MergedDirectory":
        """The directory at a map point: its own trees where it has some, else ours."""
        layers = self.layers()
        found = Layers()
        if point.write is None and layers.upper >= 0 and name in self.index()[0]:
            _add_directory(found, name, layers.upper, UPPER)
        if not point.reads and name not in self.index()[1]:
            for layer, lower in enumerate(layers.lowers):
                _add_directory(found, name, lower, layer, layers.notes[layer])
        point.add_layers(found)
        identity = self._point_qid(name)
        space = point.space if point.reads else self.space
        write = point.write or self.write
        return type(self)(self.tree, self, name, identity, found, space, write, point)

    def _is_opaque(self, fd: int) -> bool:
        return self.write is not None and self.write.is_opaque(fd)

    def _upper_qid(self, st: os.stat_result) -> Qid:
        if self.write is None:
            raise os_error(EROFS)
        return self.tree.upper_qid(self.write, st)

    def _lower_qid(self, name: bytes, st: os.stat_result) -> Qid:
        return self.tree.lower_qid(self.space, st, place_path(self.identity.path, name))

    def has_below(self, name: bytes) -> bool:
        """Whether a lower layer would show an entry `name` if nothing above covered it."""
        for lower in self.layers().lowers:
            try:
                fd = open_path(name, lower)
            except FileNotFoundError:
                continue
            try:
                return not is_whiteout(fd_path(fd), os.fstat(fd))
            finally:
                os.close(fd)
        return False

    # --- reading entries --------------------------------------------------------------------------
    def open(self, flags: int) -> OpenFile:
        """Open for reading entries."""
        with self.tree.lock:
            self.tree.descriptors.make_room()
            if flags & (os.O_ACCMODE | os.O_TRUNC):
                raise os_error(EISDIR)
            fd = self.path_fd()
            if fd >= 0:
                fd = open_contents(fd, stat.S_IFDIR, flags, ours=self._layers.upper >= 0)
            return OpenDirectory(fd if fd >= 0 else None, self.tree.lock, self._scan)

    def _scan(self) -> Generator[tuple[Qid, int, bytes], None, None]:
        """Every visible entry once; all layers are opened before the first is given."""
        if self.dead:
            return
        gone = self.index()[1]
        layers = self.layers()
        scans: list[_Scan] = []
        try:
            uppers = [self.notes()] * (layers.upper >= 0)
            for fd, (layer, dev, _), notes in zip(
                layers.fds(), layers.found, [*uppers, *layers.notes], strict=True
            ):
                scans.append(_Scan(fd, dev, notes, upper=layer == UPPER))
            yield self.identity, _DIR_DTYPE, b"."
            yield (self.parent or self).identity, _DIR_DTYPE, b".."
            seen: set[bytes] = set()
            if self.point is not None:
                for name in self.point.below:
                    seen.add(name)
                    yield self._point_qid(name), _DIR_DTYPE, name
            for scan in scans:
                for entry in scan.entries:
                    name = entry.name
                    if name in seen or name in gone:
                        continue
                    if scan is not scans[-1]:
                        seen.add(name)
                    dtype = dtype_of(entry)
                    if scan.upper:
                        if self.write is not None and self.write.hides(name):
                            continue
                    elif scan.is_whiteout(entry, dtype):
                        continue
                    if scan.special and dtype == _REG_DTYPE:
                        dtype = beside.kind_of(entry.path) >> 12
                    yield self._entry_qid(entry, dtype, scan), dtype, name
        finally:
            for scan in scans:
                scan.entries.close()

    def _point_qid(self, name: bytes) -> Qid:
        return Qid(QID_TYPES[stat.S_IFDIR], 1, place_path(self.identity.path, name))

    def _entry_qid(self, entry: os.DirEntry[bytes], dtype: int, scan: "_Scan") -> Qid:
        child = self.children.get(entry.name)
        if child is not None:
            return child.identity
        qid_type = QID_TYPES.get(dtype << 12, 0)
        if scan.upper and self.write is not None:
            return self.tree.upper_entry_qid(self.write, scan.dev, entry.inode(), qid_type)
        return Qid(qid_type, 1, self.tree.qid_paths.path(self.space, scan.dev, entry.inode()))

    def is_empty(self) -> bool:
        """Whether nothing but `.` and `..` is visible."""
        scan = self._scan()
        try:
            return all(name in {b".", b".."} for _, _, name in scan)
        finally:
            scan.close()

    # --- the write tree and this directory --------------------------------------------------------
    def write_tree(self) -> WriteTree | None:
        """The write tree that takes changes here."""
        return self.write

    def setattr(
        self,
        valid: int,
        mode: int = 0,
        uid: int = NO_ID,
        gid: int = NO_ID,
        size: int = 0,
        atime_ns: int = 0,
        mtime_ns: int = 0,
    ) -> None:
        """Change owner, mode and times."""
        with self.tree.mutation:
            if self._root_of_write and self.write is not None:
                self._root_of_write = False
                layers = self.layers()
                below = self._below()
                copy_attributes(
                    layers.lowers[0],
                    below,
                    layers.upper,
                    self.write.owners,
                    noted=layers.notes[0] is not None,
                )
                _note_own_attributes(layers.upper)
            super().setattr(valid, mode, uid, gid, size, atime_ns, mtime_ns)

    # --- copying up -------------------------------------------------------------------------------
    def copy_up(self, *, data: bool = True) -> None:  # noqa: ARG002  a directory has no data
        """Be in the write tree, and so every directory on the way here."""
        missing: list[MergedDirectory] = []
        node: MergedDirectory | None = self
        while node is not None and node.layers().upper < 0:
            if node.dead:
                raise os_error(ENOENT)
            if node.write is None:
                raise os_error(EROFS)
            missing.append(node)
            node = node.parent
        for directory in reversed(missing):
            directory.copy_up_here()

    def copy_up_here(self) -> None:
        """Be in the write tree; the parent is."""
        parent, write, layers = self.parent, self.write, self.layers()
        if parent is None or write is None:
            raise os_error(EROFS)
        with write.copying() as copying:
            name, work = copying.name, write.work()
            if layers.lowers:
                fd = copying.keep(
                    copy_file(
                        layers.lowers[0],
                        self._below(),
                        name,
                        work,
                        write.owners,
                        data=False,
                        noted=layers.notes[0] is not None,
                    )
                )
            else:
                os.mkdir(name, 0o755, dir_fd=work)
                fd = copying.keep(open_path(name, work))
                os.chmod(fd_path(fd), 0o755)
            parent.place_copy(name, self.name)
        st = os.fstat(fd)
        layers.add_upper(fd, st)
        self.index()  # of what was no upper layer: both empty, as the new directory is
        self.tree.remember(write, st, self.identity)

    def copy_up_whole(self) -> None:
        """Be in the write tree with all that is in here, and need the lower layers no more."""
        pending: list[MergedDirectory] = [self]
        visited: list[MergedDirectory] = []
        self.refs += 1
        try:
            while pending:
                directory = pending.pop()
                visited.append(directory)
                directory.copy_up()
                if directory.layers().lowers:
                    directory.copy_up_entries(pending)
            for directory in visited:
                directory.become_opaque()
        finally:
            for directory in (*pending, *visited):
                directory.close()

    def copy_up_entries(self, pending: "list[MergedDirectory]") -> None:
        """Copy up what is in here, but directories, which are added (referred to) to `pending`."""
        for name in [name for _, _, name in self._scan() if name not in {b".", b".."}]:
            child = self.find(name)
            if isinstance(child, MergedDirectory):
                pending.append(child)
            elif child is not None:
                try:
                    child.copy_up()
                finally:
                    child.close()

    def become_opaque(self) -> None:
        """Let go of the lower layers, everything in which is in the upper one."""
        layers = self.layers()
        if layers.lowers and self.write is not None:
            self.write.make_opaque(layers.upper)
            layers.drop_lowers()

    def place_copy(self, temporary: bytes, name: bytes) -> None:
        """Move a copy from the work area into this directory, whose times stay as they were."""
        upper = self.layers().upper
        if self.write is None:
            raise os_error(EROFS)
        names, gone = self.index()
        before = os.fstat(upper)
        self.write.place(temporary, name, upper, covered=name in gone)
        names.add(name)
        gone.discard(name)
        os.utime(fd_path(upper), ns=(before.st_atime_ns, before.st_mtime_ns))


class _Scan:
    """One layer of a directory being read."""

    __slots__ = ("_marked", "dev", "entries", "special", "upper")

    def __init__(self, fd: int, dev: int, notes: beside.Notes | None, *, upper: bool) -> None:
        path = fd_path(fd)
        self.dev = dev
        self.upper = upper
        self._marked = not upper and layer_xattr(path, b"opaque") is not None
        self.special = notes is not None and beside.has_special(fd)
        self.entries = os.scandir(path)

    def is_whiteout(self, entry: os.DirEntry[bytes], dtype: int) -> bool:
        """Whether an entry of a read tree says that its name is gone."""
        if dtype == _CHR_DTYPE or (self._marked and dtype == _REG_DTYPE):
            return is_whiteout(entry.path, entry.stat(follow_symlinks=False))
        return False


def _add_directory(
    found: Layers, name: bytes, dir_fd: int, layer: int, notes: beside.Notes | None = None
) -> None:
    """Add the entry `name` to `found`, if there is one and it is a directory."""
    try:
        fd = open_path(name, dir_fd)
    except FileNotFoundError:
        return
    st = os.fstat(fd)
    if not stat.S_ISDIR(st.st_mode):
        os.close(fd)
    elif layer == UPPER:
        found.add_upper(fd, st)
    else:
        found.add_lower(fd, st, layer, notes)


def _note_own_attributes(fd: int) -> None:
    try:
        os.setxattr(fd_path(fd), _ROOT_XATTR, b"y")
    except OSError:
        return  # then it holds for this union's life only


def _has_own_attributes(fd: int) -> bool:
    try:
        os.getxattr(fd_path(fd), _ROOT_XATTR)
    except OSError:
        return False
    return True
