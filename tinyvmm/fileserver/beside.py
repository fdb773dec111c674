"""What is kept beside the files of a tree, where the host would not let a file have it itself.

A tree of somebody who may not give files away, make devices or set privileged attributes, unpacked
by them or written by their guest, holds files of their own, and what each should be in its extended
attributes (the host's own copy of the file then has no set-id bits, and a device of the guest's is
none of the host's):

    user.containers.override_stat   UID:GID:MODE[:TYPE], MODE in octal, as rootless container tools
                                    write it; TYPE is file, dir, symlink, pipe, socket,
                                    block-MAJOR-MINOR or char-MAJOR-MINOR, and a file of the last
                                    five is a regular one on the host: empty, or the link's target
    user.tinyvmm.xattr.NAME         the attribute NAME

Two more save asking: the tree's root has `user.tinyvmm.layer`, or nothing here holds in it, with
whose files without a record are (`UID:GID`, or `-` for the host's owner; and `;UID:GID` behind it,
if symlinks without one are somebody else's); and a directory with regular files that are something
else has `user.tinyvmm.special`. A symlink of those whose record it needs not is one on the host.
"""

import os
import stat
from errno import EACCES, EINVAL, ENODATA, EOPNOTSUPP, EPERM

from tinyvmm.fileserver.hostfile import altered, fd_path, open_contents, open_path
from tinyvmm.fileserver.tree import NO_ID
from tinyvmm.fileserver.whiteout import OWNER_XATTR
from tinyvmm.named import NamedTuple

LAYER_XATTR = b"user.tinyvmm.layer"
SPECIAL_XATTR = b"user.tinyvmm.special"
XATTR_PREFIX = b"user.tinyvmm.xattr."
OVERLAY_OPAQUE = b"trusted.overlay.opaque"
"""With XATTR_PREFIX, of a tree that an image is made of: which is to have that attribute."""
_PRIVILEGED = (b"security.", b"trusted.")
_TARGET_MAX = 4096  # PATH_MAX

_TYPES = {stat.S_IFLNK: b"symlink", stat.S_IFIFO: b"pipe", stat.S_IFSOCK: b"socket"}
_DEVICES = {stat.S_IFBLK: b"block", stat.S_IFCHR: b"char"}
_KINDS = {name: kind for kind, name in (_TYPES | _DEVICES).items()}


class Owner(NamedTuple):
    """Owner and permissions of a file, as the guest sees them."""

    uid: int
    gid: int
    mode: int  # the lower 12 bits of st_mode


def parse_owner(value: bytes) -> Owner | None:
    """Parse a record, `UID:GID:MODE` and perhaps more; None for what is none of our making."""
    try:
        uid, gid, mode = value.split(b":")[:3]
        owner = Owner(int(uid), int(gid), int(mode, 8) & 0o7777)
    except ValueError:
        return None
    return owner if 0 <= owner.uid < NO_ID and 0 <= owner.gid < NO_ID else None


class Notes(NamedTuple):
    """That a tree keeps things beside its files, and the owner of a file without a record."""

    owner: tuple[int, int] | None
    """None for whoever owns it on the host."""
    links: tuple[int, int] | None
    """As `owner`, of a symlink."""


def notes_of(fd: int) -> Notes | None:
    """Whether the read tree with root `fd` keeps things beside its files."""
    value = _getxattr(fd_path(fd), LAYER_XATTR)
    if value is None:
        return None
    files, _, links = value.partition(b";")
    owner = parse_owner(files + b":0")
    if owner is None and files != b"-":
        return None
    whose = None if owner is None else (owner.uid, owner.gid)
    link_owner = parse_owner(links + b":0")
    return Notes(whose, whose if link_owner is None else (link_owner.uid, link_owner.gid))


def presented(fd: int, st: os.stat_result, notes: Notes) -> os.stat_result:
    """What the file behind O_PATH descriptor `fd`, of stat `st` on the host, is in the guest."""
    return presented_at(fd_path(fd), st, notes, follow=True)


def presented_at(
    path: bytes, st: os.stat_result, notes: Notes, *, follow: bool = False
) -> os.stat_result:
    """As `presented`, of the file at `path`: no link, unless `follow` says it is /proc's to it."""
    if stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode):
        value = _getxattr(path, OWNER_XATTR, follow=follow)
        owner = None if value is None else parse_owner(value)
        if value is not None and owner is not None:
            kind, rdev = stat.S_IFMT(st.st_mode), None
            if stat.S_ISREG(st.st_mode):
                kind, rdev = _kind(value)
            return altered(st, mode=kind | owner.mode, uid=owner.uid, gid=owner.gid, rdev=rdev)
    whose = notes.links if stat.S_ISLNK(st.st_mode) else notes.owner
    return st if whose is None else altered(st, uid=whose[0], gid=whose[1])


def read_link(fd: int) -> bytes:
    """The target of a symlink, whether it is one on the host or a file that stands for one."""
    if stat.S_ISLNK(os.fstat(fd).st_mode):
        return os.readlink(b"", dir_fd=fd)
    contents = open_contents(fd, stat.S_IFREG, os.O_RDONLY, ours=False)
    try:
        return os.pread(contents, _TARGET_MAX, 0)
    finally:
        os.close(contents)


def read_link_at(name: bytes, dir_fd: int) -> bytes:
    """As `read_link`, of the entry `name`."""
    fd = open_path(name, dir_fd)
    try:
        return read_link(fd)
    finally:
        os.close(fd)


def has_special(fd: int) -> bool:
    """Whether some regular files of the directory `fd` are something else in the guest."""
    return _getxattr(fd_path(fd), SPECIAL_XATTR) is not None


def kind_of(path: bytes) -> int:
    """The S_IFMT in the guest of the regular file at `path`."""
    value = _getxattr(path, OWNER_XATTR)
    return stat.S_IFREG if value is None else _kind(value)[0]


def stand_in(name: bytes, dir_fd: int, mode: int, target: bytes = b"") -> None:
    """Make the file that is to be something else, with the target of a symlink in it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, mode, dir_fd=dir_fd)
    try:
        os.write(fd, target)
    finally:
        os.close(fd)


def record(owner: Owner, kind: int, rdev: int = 0) -> bytes:
    """The record of a file of S_IFMT `kind`, a device's with its number."""
    text = b"%d:%d:%o" % owner
    if kind in _DEVICES:
        return text + b":%s-%d-%d" % (_DEVICES[kind], os.major(rdev), os.minor(rdev))
    return text + b":" + _TYPES[kind] if kind in _TYPES else text


def _kind(value: bytes) -> tuple[int, int | None]:
    """The S_IFMT and device number that the record of a regular file gives it."""
    fields = value.split(b":")
    name, *numbers = fields[3].split(b"-") if len(fields) > 3 else [b"file"]
    kind = _KINDS.get(name, stat.S_IFREG)
    if kind not in _DEVICES:
        return kind, None
    try:
        major, minor = map(int, numbers)
        return kind, os.makedev(major, minor)
    except (ValueError, OverflowError):
        return stat.S_IFREG, None  # not of our making


def get_xattr(fd: int, name: bytes) -> bytes | None:
    """The attribute `name` that is kept beside the file, if it is."""
    return _getxattr(fd_path(fd), XATTR_PREFIX + name)


def set_xattr(fd: int, name: bytes, value: bytes, flags: int = 0) -> None:
    """Set the attribute `name` of a file in a tree with notes: beside it, where it must be.

    So it is with capabilities whoever we are: a file of the guest's shall have none of this host's.
    """
    if not name.startswith(_PRIVILEGED) and get_xattr(fd, name) is None:
        try:
            os.setxattr(fd_path(fd), name, value, flags)
        except OSError as error:
            if error.errno not in {EPERM, EACCES, EOPNOTSUPP}:
                raise
        else:
            return
    os.setxattr(fd_path(fd), XATTR_PREFIX + name, value, flags)


def remove_xattr(fd: int, name: bytes) -> None:
    """Remove the attribute `name`, wherever it is."""
    kept = XATTR_PREFIX + name
    os.removexattr(fd_path(fd), name if get_xattr(fd, name) is None else kept)


def _getxattr(path: bytes, name: bytes, *, follow: bool = True) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=follow)
    except OSError as error:
        if error.errno not in {ENODATA, EOPNOTSUPP, EINVAL}:
            raise
        return None
