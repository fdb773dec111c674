"""Names of users and groups, which 9P2000 has where Unix has numbers.

A name is what this host calls the number, or the number itself in decimal; both are understood.
Looking one up may read files or, as nsswitch.conf(5) says, ask a network: so a number is looked up
once, and is called the same for as long as the process lives. Any thread may call.
"""

from functools import lru_cache

from tinyvmm.fileserver.tree import NO_ID

_KNOWN_MAX = 4096


@lru_cache(_KNOWN_MAX)
def name_of_user(uid: int) -> bytes:
    """What this host calls a user."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name.encode(errors="surrogateescape")
    except KeyError:
        return b"%d" % uid


@lru_cache(_KNOWN_MAX)
def name_of_group(gid: int) -> bytes:
    """What this host calls a group."""
    import grp

    try:
        return grp.getgrgid(gid).gr_name.encode(errors="surrogateescape")
    except KeyError:
        return b"%d" % gid


def user_of(name: bytes) -> int:
    """The user of this name or number; NO_ID if there is none."""
    import pwd

    try:
        return pwd.getpwnam(name.decode()).pw_uid
    except (KeyError, ValueError):  # ValueError: NUL, or no UTF-8
        return _number(name)


def group_of(name: bytes) -> int:
    """The group of this name or number; NO_ID if there is none."""
    import grp

    try:
        return grp.getgrnam(name.decode()).gr_gid
    except (KeyError, ValueError):
        return _number(name)


def _number(name: bytes) -> int:
    return min(int(name), NO_ID) if name.isdigit() and len(name) <= 10 else NO_ID
