"""What a machine's root may be made of, when it is not this computer's own directories.

    Machine(root={"hello.txt": b"hi", "bin": "/bin", "lib": Path("/lib"), "now": time.ctime})
    Machine(root=zipfile.ZipFile("site.zip"))
    Machine(root=tarfile.open("rootfs.tar.xz"))

Such a root is a tree of objects (fileserver/objects.py, docs/trees.md), under a file system of the
guest's own that takes what it writes. A dict is one thing more here than there: text is the path of
a directory or file of this computer, as it is for the command line, and contents are bytes.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, Union, cast

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.tree import Tree

if TYPE_CHECKING:
    from tarfile import TarFile
    from zipfile import ZipFile

Root: TypeAlias = Union[
    str, "os.PathLike[str]", "Mapping[str, object]", "ZipFile", "TarFile", Tree, None
]
"""None or a path for this computer's directory, else what `root_tree` takes."""


class Opened(NamedTuple):
    """A root: a directory of this computer, or a tree."""

    path: str
    tree: Tree | None
    cache: str | None
    """The cache policy; None for the one that fits a directory."""


def open_root(root: Root, cleanup: ExitStack) -> Opened:
    """Open what is to be the root, until `cleanup`; ConfigError for what cannot be."""
    if root is None:
        return Opened("/", None, None)
    if isinstance(root, str | os.PathLike):
        return Opened(os.path.abspath(os.fspath(root)), None, None)
    # A function's contents are new at each open, and their size is not known before.
    return Opened("/", root_tree(root, cleanup), "none")


def root_tree(root: "Mapping[str, object] | ZipFile | TarFile | Tree", cleanup: ExitStack) -> Tree:
    """Return the tree to serve: a tree as it is, of anything else one that is closed by `cleanup`.

    ConfigError for what cannot be served.
    """
    if hasattr(root, "root") and hasattr(root, "close"):
        return cast("Tree", root)
    from tinyvmm.fileserver.objects import ObjectTree

    files = _with_paths(root, "/") if isinstance(root, Mapping) else root
    tree = ObjectTree(files, uid=0, gid=0)
    cleanup.callback(tree.close)
    return tree


def _with_paths(files: Mapping[str, object], where: str) -> dict[str, object]:
    """The same with text as paths."""
    found: dict[str, object] = {}
    for name, value in files.items():
        if isinstance(value, str):
            if not value.startswith("/"):
                raise ConfigError(
                    f"{where}{name}: {value!r} is no absolute path; give contents as bytes"
                )
            found[name] = Path(value)
        elif isinstance(value, Mapping):
            found[name] = _with_paths(value, f"{where}{name}/")
        else:
            found[name] = value
    return found
