"""Whom `--user` names: looked up in the guest's own /etc/passwd and /etc/group, from outside.

passwd(5) and group(5) are read through the tree that is the guest's root. What a guest keeps to
itself (--private-writes guest) is not in there.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.tree import Tree
from tinyvmm.guest.relay import User

FILE_MAX = 4 << 20
_ID_MAX = (1 << 32) - 2  # -1 means "leave it as it is"


class Account(NamedTuple):
    """A user of the guest, and where it is at home."""

    user: User
    home: str


def resolve(text: str, root: Tree) -> Account:
    """Look up `USER[:GROUP]`, names or numbers; ConfigError if there is no such name.

    As podman does: a number need not be in the files, and then has no home but /, and group 0.
    """
    name, colon, group = text.partition(":")
    entry = next((e for e in _entries(root, b"passwd", 7) if name in {e[0], e[2]}), None)
    if entry is not None:
        uid, gid, home, known = _number(entry[2]), _number(entry[3]), entry[5] or "/", entry[0]
    else:
        uid, gid, home, known = _number(name), 0, "/", ""
    if uid is None or gid is None:
        raise ConfigError(f"no user is named {name!r} in the guest's /etc/passwd; give a number")
    groups: list[int] = []
    lines = list(_entries(root, b"group", 4))
    if colon:
        found = next((_number(e[2]) for e in lines if group in {e[0], e[2]}), _number(group))
        if found is None:
            raise ConfigError(f"no group is named {group!r} in the guest's /etc/group")
        gid = found
    elif known:
        members = (e for e in lines if known in e[3].split(","))
        groups = [number for e in members if (number := _number(e[2])) is not None]
    return Account(User(uid, gid, tuple(dict.fromkeys([gid, *groups]))), home)


def _number(text: str) -> int | None:
    if not text.isascii() or not text.isdigit() or int(text) > _ID_MAX:
        return None
    return int(text)


def _entries(root: Tree, name: bytes, fields: int) -> Iterator[list[str]]:
    for line in _read(root, name).decode("utf-8", "surrogateescape").splitlines():
        entry = line.split(":")
        if len(entry) == fields:
            yield entry


def _read(root: Tree, name: bytes) -> bytes:
    """Return the content of a file of /etc; nothing if it cannot be read."""
    nodes = [root.root()]
    try:
        nodes.append(nodes[-1].walk(b"etc"))
        nodes.append(nodes[-1].walk(name))
        file = nodes[-1].open(os.O_RDONLY)
        try:
            buffer = bytearray(FILE_MAX)
            count = file.readv([memoryview(buffer)], 0)
        finally:
            file.close()
        return bytes(memoryview(buffer)[:count])
    except OSError:
        return b""
    finally:
        for node in reversed(nodes):
            node.close()
