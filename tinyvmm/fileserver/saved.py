"""A client's fids as plain JSON types, and fids made of them: on the same tree, by another server.

A fid stands for a file that was found by names, so what is saved is where the file is now, and its
qid, by which it is known again. Places are a list, each the number of the directory's place and a
name in it; place 0, which is not in the list, is the root:

    [[0, "srv"], [1, "data"], [0, "etc"]]            /srv, /srv/data, /etc

Only what every tree can do is asked of it, as getcwd(3) once did: `..` leads up, and the entry
there that is this directory has its name. Other files are in the directory they were found in, or
have been renamed into another that the client has a fid of.

A file that no such name leads to, because it was removed while open, cannot be found again; nor is
it the same file if its qid is another. Such a fid is *stale*: whatever is asked of it is answered
with ESTALE until it is clunked. A directory that is being read goes on at the number of the entry
the client asks for; if entries came or went meanwhile, some are told twice or not at all.

The session calls this with its transport's lock held and no request in flight.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from errno import ESTALE
from typing import Any

from tinyvmm import ninep
from tinyvmm.fileserver.fid import Fid, failure
from tinyvmm.fileserver.locks import Lock, LockTable
from tinyvmm.fileserver.plan9_stat import Directory
from tinyvmm.fileserver.tree import Node, OpenFile, Tree
from tinyvmm.fileserver.xattr import XattrReader, XattrWriter
from tinyvmm.ninep import Dialect

_FOR_ONCE = os.O_CREAT | os.O_EXCL | os.O_TRUNC  # flags that have had their effect
_ROOT = 0


def save(
    tree: Tree, fids: Mapping[int, Fid], stale: Iterable[int], locks: LockTable
) -> dict[str, Any]:
    """Return what the `fids` of `tree` stand for, with their locks, and which are `stale`."""
    places = _Places(tree, fids.values())
    saved = []
    lost = set(stale)
    for number, fid in fids.items():
        named = _is_named(fid)
        place = places.find(fid, named=named)
        if place is None:
            lost.add(number)
        else:
            saved.append({"fid": number, "place": place, "named": named} | _saved(fid, locks))
    return {"places": places.list, "fids": saved, "stale": sorted(lost)}


def load(
    tree: Tree, state: dict[str, Any], locks: LockTable, dialect: Dialect
) -> tuple[dict[int, Fid], set[int]]:
    """Return the fids that `save` described, opened and locked again, and the stale ones."""
    fids: dict[int, Fid] = {}
    stale = set(state["stale"])
    nodes: list[Node | None] = [tree.root()]
    try:
        for above, name in state["places"]:
            nodes.append(_walk(nodes[above], _bytes(name)))
        for saved in state["fids"]:
            number, place = saved["fid"], saved["place"]
            node = nodes[place]
            try:
                if node is None or node.qid().path != saved["qid"]:
                    raise failure(ESTALE)
                has_name = saved["named"] and place != _ROOT
                above, name = state["places"][place - 1] if has_name else (None, "")
                parent = None if above is None else nodes[above]
                fids[number] = _loaded(saved, node, parent, _bytes(name), dialect)
            except OSError:
                stale.add(number)
                continue
            for start, end, kind, client_id, proc_id in saved["locks"]:
                fids[number].locked = True
                owner = _bytes(client_id), proc_id
                locks.set(saved["qid"], Lock(start, end, kind, owner, fids[number]))
    finally:
        for node in nodes:
            if node is not None:
                node.close()
    return fids, stale


# --- one fid --------------------------------------------------------------------------------


def _saved(fid: Fid, locks: LockTable) -> dict[str, Any]:
    """What there is to say of a fid beside its place."""
    file = fid.file
    path = fid.node.qid().path
    held = locks.held(path, fid) if fid.locked else []
    return {
        "qid": path,
        "uid": fid.uid,
        "flags": None if file is None else fid.flags,
        "set_id": fid.set_id,
        "doomed": fid.doomed,
        "xattr": _saved_xattr(file) if isinstance(file, XattrReader) else None,
        "position": list(file.position) if isinstance(file, Directory) else None,
        "locks": [[x.start, x.end, x.type, _text(x.owner[0]), x.owner[1]] for x in held],
    }


def _loaded(
    saved: dict[str, Any], node: Node, parent: Node | None, name: bytes, dialect: Dialect
) -> Fid:
    """The fid of a file that was found again; OSError if it cannot be opened."""
    file: OpenFile | None = None
    if saved["xattr"] is not None:
        file = _loaded_xattr(saved["xattr"], node)
    elif saved["flags"] is not None:
        file = node.open(saved["flags"] & ~_FOR_ONCE)
        if saved["position"] is not None:
            file = Directory(node, file, dialect)
            file.position = saved["position"]
    fid = Fid(node.retain(), saved["uid"], None if parent is None else parent.retain(), name)
    fid.file = file
    fid.flags = saved["flags"] or 0
    fid.set_id, fid.doomed = saved["set_id"], saved["doomed"]
    return fid


def _saved_xattr(file: XattrReader) -> dict[str, Any]:
    if not isinstance(file, XattrWriter):
        return {"value": file.value.hex()}
    written = file.written.hex()
    return {"name": _text(file.name), "size": file.size, "flags": file.flags, "written": written}


def _loaded_xattr(saved: dict[str, Any], node: Node) -> XattrReader:
    if "value" in saved:
        return XattrReader(bytes.fromhex(saved["value"]))
    file = XattrWriter(node, _bytes(saved["name"]), saved["size"], saved["flags"])
    file.written += bytes.fromhex(saved["written"])
    return file


# --- where files are ------------------------------------------------------------------------


class _Places:
    """Where the files of a tree are, as far as the directories that a client knows tell."""

    def __init__(self, tree: Tree, fids: Iterable[Fid]) -> None:
        self.list: list[list[Any]] = []
        root = tree.root()
        self._numbers = {root.qid().path: _ROOT}  # of directories
        root.close()
        self._added: dict[tuple[int, bytes], int] = {}
        self._nodes = [node for fid in fids for node in (fid.parent, fid.node) if node is not None]
        self._others: dict[int, int] | None = None

    def find(self, fid: Fid, *, named: bool) -> int | None:
        """The place of a fid's file; None if there is none."""
        node = fid.node
        try:
            if fid.parent is not None and named:
                number = self._add(self._directory(fid.parent), fid.name)
                if _is_directory(node):
                    return self._numbers.setdefault(node.qid().path, number)
                return number
            if _is_directory(node):
                return self._directory(node)
        except OSError:
            return None
        if self._others is None:
            self._others = self._look()
        return self._others.get(node.qid().path)

    def _add(self, above: int, name: bytes) -> int:
        number = self._added.get((above, name))
        if number is None:
            self.list.append([above, _text(name)])
            number = self._added[above, name] = len(self.list)
        return number

    def _directory(self, node: Node) -> int:
        """The place of a directory; ESTALE if the way up does not lead to the root."""
        below: dict[int, bytes] = {}  # names on the way, by qid path
        here = node.retain()
        try:
            while (path := here.qid().path) not in self._numbers:
                if path in below:
                    raise failure(ESTALE)  # the host has put one into the other
                above = here.walk(b"..")
                below[path] = _name_in(above, here)
                here.close()
                here = above
            number = self._numbers[path]
        finally:
            here.close()
        for path, name in reversed(below.items()):
            number = self._numbers[path] = self._add(number, name)
        return number

    def _look(self) -> dict[int, int]:
        """The places of the client's files in all directories that it knows, by qid path."""
        directories = {node.qid().path: node for node in self._nodes if _is_directory(node)}
        files = {node.qid().path for node in self._nodes} - directories.keys()
        found: dict[int, int] = {}
        for node in directories.values():
            try:
                number = self._directory(node)
                for path, _, name in _entries(node):
                    if path in files and path not in found:
                        found[path] = self._add(number, name)
            except OSError:
                continue  # who cannot be read tells nothing
        return found


def _entries(directory: Node) -> Iterator[tuple[int, int, bytes]]:
    """The entries of a directory but `.` and `..`: qid path, DT_* type, name."""
    file = directory.open(os.O_RDONLY)
    try:
        for qid, _, dtype, name in file.readdir(0):
            if name not in {b".", b".."}:
                yield qid.path, dtype, name
    finally:
        file.close()


def _name_in(above: Node, node: Node) -> bytes:
    """The name of the directory `node` in the one above; ESTALE if it has none."""
    path = node.qid().path
    names = []
    for entry, dtype, name in _entries(above):
        if entry == path:
            return name
        if dtype == stat.S_IFDIR >> 12:
            names.append(name)
    for name in names:  # where something is mounted, an entry tells of what is below
        if _is_entry(above, name, node):
            return name
    raise failure(ESTALE)


def _is_entry(directory: Node, name: bytes, node: Node) -> bool:
    """Whether `name` leads to this very file."""
    found = _walk(directory, name)
    if found is None:
        return False
    try:
        return found.qid().path == node.qid().path
    finally:
        found.close()


def _walk(directory: Node | None, name: bytes) -> Node | None:
    try:
        return None if directory is None else directory.walk(name)
    except OSError:
        return None


def _is_named(fid: Fid) -> bool:
    """Whether it is where it was found, by the name that Tremove and Trename go by."""
    if fid.parent is None or fid.name == b"..":
        return False
    return _is_entry(fid.parent, fid.name, fid.node)


def _is_directory(node: Node) -> bool:
    return bool(node.qid().type & ninep.QTDIR)


def _text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
