"""ObjectTree: files and directories made of Python objects.

A directory is a dict (or an archive, or another tree), a file is bytes, text, a function, an
iterator; `_Builder` says what becomes of what, and docs/trees.md shows it at work. The dicts
are looked at once, when the tree is made. With `writable`, what a client changes is changed in them
too, as it happens: files written become bytearrays, directories made become dicts. The memory
clients use is limited.

What such a tree has not, it says as Linux's file systems do: hard links and special files cannot be
made (EPERM), extended attributes not set (EOPNOTSUPP); beyond `limit` no space is left (ENOSPC);
without `writable`, and in archives, every change is EROFS; what a function or an iterator gives
cannot be written at all (EACCES); where another tree is mounted, the name is busy (EBUSY).

Threads: any may call. `lock` guards names, attributes and contents in memory. No code of the tree's
maker is run under it, nor anything that waits.
"""

import os
import stat
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from errno import ENOSPC
from threading import RLock
from typing import cast

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.contents import Called, Member, Streamed, as_bytes
from tinyvmm.fileserver.entry import TARGET_MAX, Entry, Special, Symlink
from tinyvmm.fileserver.hostfile import check_name, os_error
from tinyvmm.fileserver.mounted import Mount
from tinyvmm.fileserver.object_node import BLOCK, NODE_COST, ObjectNode
from tinyvmm.fileserver.qids import QidPaths
from tinyvmm.fileserver.tree import NO_ID, Tree
from tinyvmm.ninep import Qid

LIMIT = 64 << 20  # bytes that clients may store, unless the tree's maker says otherwise


class ObjectTree:
    """The directory `files`: a dict, a zip or a tar."""

    def __init__(
        self,
        files: object,
        *,
        writable: bool = False,
        sized: bool = False,
        limit: int = LIMIT,
        uid: int | None = None,
        gid: int | None = None,
    ) -> None:
        """Serve `files`; ConfigError if they hold what cannot be served, saying where.

        `sized`: functions are called to tell a file's size too, for clients that read no further.
        `limit`: as many bytes clients may store. `uid`, `gid`: the owner, else who runs this.
        """
        self.lock = RLock()
        self.sized = sized
        self.limit = limit
        self.used = 0
        self._qid_paths = QidPaths()
        self._paths = 0
        self._owned: list[Tree] = []  # opened here for host paths
        self.nodes = 0
        builder = _Builder(
            self,
            writable=writable,
            uid=os.getuid() if uid is None else uid,
            gid=os.getgid() if gid is None else gid,
        )
        try:
            self._root = builder.build(files)
        except BaseException:
            self.close()
            raise

    def root(self) -> ObjectNode:
        """The root directory."""
        return self._root.retain()

    def close(self) -> None:
        """Close what was opened for this tree: not the trees and archives it was given."""
        owned, self._owned = self._owned, []
        for tree in owned:
            tree.close()

    # --- for nodes --------------------------------------------------------------------------------

    def new_path(self) -> int:
        """A qid path nobody has, in the space of our own nodes."""
        with self.lock:
            self._paths += 1
            return self._qid_paths.path(0, 0, self._paths)

    def inner_qid(self, space: int, qid: Qid) -> Qid:
        """The qid here of a file of the mounted tree numbered `space`."""
        with self.lock:
            return qid._replace(path=self._qid_paths.path(space, 0, qid.path))

    def charge(self, size: int) -> None:
        """Count memory used by clients."""
        if size > 0 and self.used + size > self.limit:
            raise os_error(ENOSPC)
        self.used += size

    def statfs(self) -> os.statvfs_result:
        """What may be stored, and what of it is left."""
        with self.lock:
            free = max(self.limit - self.used, 0)
        total, left = self.limit // BLOCK, free // BLOCK
        files, unused = self.limit // NODE_COST, free // NODE_COST
        return os.statvfs_result(
            (BLOCK, BLOCK, total, left, left, files, unused, unused, 0, 255, 0)
        )

    def own(self, tree: Tree) -> None:
        """Close `tree`, which was opened for this one, with this one."""
        self._owned.append(tree)


def open_path(path: os.PathLike[str] | os.PathLike[bytes], *, writable: bool) -> tuple[Tree, bytes]:
    """A tree with the host's file `path`, and its name there; empty if `path` is its root."""
    from tinyvmm.fileserver.host import HostTree
    from tinyvmm.fileserver.union import open_tree

    real = os.path.realpath(os.fsdecode(path))
    directory, name = (real, "") if os.path.isdir(real) else os.path.split(real)
    if not os.path.exists(real):
        raise ConfigError(f"cannot serve {os.fsdecode(path)}: it is not there; give a path that is")
    if not writable:
        return open_tree([("/", directory)], []), os.fsencode(name)
    try:
        return HostTree(directory), os.fsencode(name)
    except OSError as error:
        raise ConfigError(
            f"cannot serve {directory}: {error.strerror}; give a directory you can read"
        ) from None


class _Builder:
    """Makes nodes of what a tree's maker gave, level by level: no nesting is too deep."""

    def __init__(self, tree: ObjectTree, *, writable: bool, uid: int, gid: int) -> None:
        self._tree = tree
        self._writable = writable
        self._uid = uid
        self._gid = gid
        self._todo: list[tuple[ObjectNode, Mapping[object, object], str]] = []
        self._seen: set[int] = set()  # the dicts by identity: each may be at one place only
        self._linked: dict[int, ObjectNode] = {}  # the Entries that are files
        self._spaces = 0

    def build(self, files: object) -> ObjectNode:
        """The root; ConfigError if `files` is no directory or holds what cannot be served."""
        root = self._node(files, "/")
        if root.entries is None:
            raise ConfigError("the root of a tree is a directory: give a dict, a zip or a tar")
        root.nlink = 1
        while self._todo:
            directory, content, where = self._todo.pop()
            for key, value in content.items():
                self._add(directory, key, value, where)
        return root

    def _add(self, directory: ObjectNode, key: object, value: object, where: str) -> None:
        if not isinstance(key, str | bytes):
            raise ConfigError(f"{where}: a name is str or bytes, which {key!r} is not")
        place = f"{where}{key if isinstance(key, str) else os.fsdecode(key)}"
        try:
            name = os.fsencode(key)
            check_name(name)
        except UnicodeEncodeError:
            raise ConfigError(
                f"{place!r} cannot be a name: it has no bytes; give another"
            ) from None
        except OSError as error:
            problem = error.strerror or "no name"
            raise ConfigError(f"{place!r} cannot be a name: {problem}; give another") from None
        if directory.entries is None or name in directory.entries:
            raise ConfigError(f"{place} is there twice, as str and as bytes: leave one out")
        mount = self._mount(value, directory, place)
        if mount is not None:
            directory.entries[name] = mount
            return
        node = self._node(value, place)
        node.nlink += 1
        directory.put(name, node, key=key)

    def _mount(self, value: object, parent: ObjectNode, place: str) -> Mount | None:
        """What appears of another tree, or of the host's files."""
        tree, name = value, b""
        if isinstance(value, os.PathLike):
            tree, name = open_path(value, writable=self._writable)
            self._tree.own(tree)
        elif not (hasattr(value, "root") and hasattr(value, "close")):
            return None
        self._spaces += 1
        try:
            return Mount(self._tree, parent, cast("Tree", tree), name, self._spaces)
        except OSError as error:
            raise ConfigError(
                f"{place}: {error.strerror}; give a tree or a path that can be read"
            ) from None

    def _node(self, value: object, place: str) -> ObjectNode:
        """The node of anything but a mount, without a name yet."""
        entry = value if isinstance(value, Entry) else None
        if entry is not None and id(entry) in self._linked:
            return self._linked[id(entry)]
        content = _unpacked(entry.content if entry is not None else value)
        attributes = Entry(content) if entry is None else entry
        readonly = not self._writable
        if isinstance(content, Entry):  # an archive, which cannot be written
            readonly = True
            attributes, content = content, content.content
        kind, mode = _kind(content)
        for number in (attributes.uid, attributes.gid):
            if number is not None and not 0 <= number < NO_ID:
                raise ConfigError(f"{place}: there can be no owner {number}; give one of 32 bits")
        node = ObjectNode(
            self._tree,
            kind,
            mode if attributes.mode is None else attributes.mode,
            self._uid if attributes.uid is None else attributes.uid,
            self._gid if attributes.gid is None else attributes.gid,
            readonly=readonly,
        )
        if attributes.mtime_ns is not None:
            node.atime_ns = node.mtime_ns = node.ctime_ns = attributes.mtime_ns
        node.value = value
        self._fill(node, content, place)
        if entry is not None and kind != stat.S_IFDIR:
            self._linked[id(entry)] = node
        return node

    def _fill(self, node: ObjectNode, content: object, place: str) -> None:
        try:
            data = as_bytes(content)
        except ValueError as error:
            raise ConfigError(f"{place}: no bytes can be had of it: {error}; give bytes") from None
        if data is not None:
            # A bytearray is the maker's to change as well; all else is copied once it is written.
            node.data = content if isinstance(content, bytearray) else data
        elif isinstance(content, Mapping):
            self._fill_directory(node, content, place)
        elif isinstance(content, Symlink):
            if len(content.target) > TARGET_MAX or b"\0" in content.target:
                raise ConfigError(
                    f"{place}: a symbolic link holds at most {TARGET_MAX} bytes and no NUL; "
                    "give another target"
                )
            node.target = content.target
        elif isinstance(content, Special):
            node.rdev = content.rdev
        elif isinstance(content, Member):
            node.given = content
            node.readonly = True
        elif callable(content):
            node.given = Called(place, content)
        elif isinstance(content, Iterator):
            node.given = Streamed(place, content)
        else:
            raise ConfigError(
                f"{place}: {type(content).__name__} cannot be served; give a dict, bytes, str, a "
                "function, an iterator, a path, a zip, a tar or a tree"
            )

    def _fill_directory(
        self, node: ObjectNode, content: Mapping[object, object], place: str
    ) -> None:
        if id(content) in self._seen:
            raise ConfigError(f"{place}: one dict is at two places; a directory has but one name")
        self._seen.add(id(content))
        node.entries = {}
        if isinstance(content, MutableMapping) and not node.readonly:
            node.mapping = content
        self._todo.append((node, content, place if place == "/" else f"{place}/"))


def _unpacked(content: object) -> object:
    """An archive's root directory; anything else as it is."""
    # An archive can only be given by who has imported its module.
    zipfile, tarfile = sys.modules.get("zipfile"), sys.modules.get("tarfile")
    if zipfile is not None and isinstance(content, zipfile.ZipFile):
        from tinyvmm.fileserver.archives import of_zip

        return of_zip(content)
    if tarfile is not None and isinstance(content, tarfile.TarFile):
        from tinyvmm.fileserver.archives import of_tar

        return of_tar(content)
    return content


def _kind(content: object) -> tuple[int, int]:
    """The S_IFMT kind of what `content` becomes, and its mode unless an Entry says more."""
    if isinstance(content, Mapping):
        return stat.S_IFDIR, 0o755
    if isinstance(content, Symlink):
        return stat.S_IFLNK, 0o777
    if isinstance(content, Special):
        return content.kind, 0o644
    if isinstance(content, bytes | bytearray | memoryview | str | Member):
        return stat.S_IFREG, 0o644
    return stat.S_IFREG, 0o444
