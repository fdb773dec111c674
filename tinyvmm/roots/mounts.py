"""Which host directories a guest sees: how each is served, and how the guest mounts it.

The root is a union of read and write trees, the guest's own; shared directories are the host's,
live. Each is a 9P device of its own, so each has its own mount tag and its own cache policy, one of
v9fs's (Documentation/filesystems/9p.rst), chosen by who else may change the files:

    loose   names, attributes and contents are kept and never asked for again: nobody else writes
    mmap    nothing is kept but what is mapped into memory: both sides see each other's changes
    none    as mmap, and a file cannot be mapped both shared and writable

docs/decisions/0003-caching-policy.md has the figures behind the defaults.
"""

import os
from collections.abc import Sequence

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.union import UnionTree, open_tree
from tinyvmm.guest import abi
from tinyvmm.guest.init import (
    NEW_ROOT,
    ROOT_TAG,
    Filesystem,
    Mkdir,
    Mount,
    lower_9p,
    overlay_root,
    v9fs_options,
)
from tinyvmm.named import NamedTuple

CACHES = ("loose", "mmap", "none")
PRIVATE_WRITES = ("server", "guest")


class Shared(NamedTuple):
    """A host directory that the guest sees at the path `guest`, live on both sides."""

    guest: str
    host: str
    readonly: bool = False
    cache: str | None = None
    """One of CACHES; None for mmap, or loose where it is read-only."""


def root_mounts(
    cache: str | None, private_writes: str | None, over: Sequence[str] = ()
) -> Sequence[Filesystem]:
    """How PID 1 mounts the root; ConfigError for a policy there is none of.

    With `private_writes` "guest" the root is read-only, under an overlay in the guest's RAM, and
    the directories `over` lie between them.
    """
    options = v9fs_options(_known(cache or "loose", CACHES, "cache policy"))
    if _known(private_writes or "server", PRIVATE_WRITES, "place for private writes") == "guest":
        return overlay_root(lower_9p(ROOT_TAG, options), over=over)
    return (Mount(ROOT_TAG, NEW_ROOT, "9p", data=options),)


def _known(name: str, names: Sequence[str], what: str) -> str:
    if name not in names:
        raise ConfigError(f"{name!r} is no {what}: give {' or '.join(names)}")
    return name


def arrange(shared: Sequence[Shared]) -> list[Shared]:
    """Return the shared directories in the order to mount them, outer ones first.

    Raises ConfigError for what cannot be shared: paths are made absolute and plain.
    """
    found: dict[str, Shared] = {}
    for item in shared:
        guest = os.path.normpath(item.guest).replace("//", "/")
        if not item.guest.startswith("/"):
            raise ConfigError(
                f"shared directory at {item.guest!r}: a path in the guest starts with a slash"
            )
        if guest == "/":
            raise ConfigError(
                f"cannot share {item.host} as the guest's /, which is private: name a directory "
                "in it, or keep what the guest writes with --write"
            )
        if guest in found:
            raise ConfigError(f"two shared directories at {guest}: give each its own place")
        if item.cache is not None:
            _known(item.cache, CACHES, "cache policy")
        host = os.path.abspath(item.host)
        if not os.path.isdir(host):
            why = "not a directory" if os.path.lexists(host) else "there is no such directory"
            raise ConfigError(f"cannot share {item.host}: {why}; name a directory you can read")
        found[guest] = item._replace(guest=guest, host=host)
    return sorted(found.values(), key=lambda item: item.guest.count("/"))


def shared_tag(number: int) -> str:
    """Return the mount tag of the shared directory `number` of those arranged."""
    return f"shared{number}"


def shared_mounts(shared: Sequence[Shared]) -> list[Filesystem]:
    """How PID 1 mounts the shared directories `arrange` gave; mount points are made if missing."""
    mounts: list[Filesystem] = []
    for number, item in enumerate(shared):
        above = item.guest.split("/")[1:-1]
        mounts += [Mkdir("/" + "/".join(above[:end])) for end in range(1, len(above) + 1)]
        cache = item.cache or ("loose" if item.readonly else "mmap")
        flags = abi.MS_RDONLY if item.readonly else 0
        mounts.append(Mount(shared_tag(number), item.guest, "9p", flags, v9fs_options(cache)))
    return mounts


def open_shared(item: Shared) -> HostTree | UnionTree:
    """Return the tree to serve; a read-only one refuses writes whatever the guest mounts it as."""
    if item.readonly:
        return open_tree([("/", item.host)], [])
    try:
        return HostTree(item.host)
    except OSError as error:
        raise ConfigError(
            f"cannot share {item.host}: {error.strerror}; name a directory you can read"
        ) from None
