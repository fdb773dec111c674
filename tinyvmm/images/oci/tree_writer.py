"""A directory being filled with a layer's files, whoever wrote the layer.

Nothing is ever opened by a path: every component is opened by itself, below a descriptor of the
directory it is in, and never through a symlink; so no entry leads out, whatever was unpacked before
it. Names with `..` are refused. What the host does not let us make (somebody else's files, devices,
privileged attributes) is kept beside the file, as tinyvmm.fileserver.beside says.
"""

import os
import stat
from collections.abc import Iterable, Mapping
from errno import EACCES, EEXIST, EINVAL, ENOTDIR, EOPNOTSUPP, EPERM, ERANGE
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.beside import (
    LAYER_XATTR,
    OVERLAY_OPAQUE,
    SPECIAL_XATTR,
    XATTR_PREFIX,
    Owner,
    record,
)
from tinyvmm.fileserver.hostfile import fd_path, open_path
from tinyvmm.fileserver.ownership import must_pretend
from tinyvmm.fileserver.removal import remove_whole
from tinyvmm.fileserver.whiteout import (
    OWNER_XATTR,
    PRIVATE_XATTRS,
    is_whiteout,
    make_device_whiteout,
)

DEPTH_MAX = 256  # directories; each on the way is an open descriptor
SHOWN_MAX = 100  # characters of a path in a message
_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TIME_MAX = (1 << 63) - 1  # nanoseconds
OPAQUE_XATTR = b"user.overlay.opaque"
_WHITEOUT_XATTR = b"user.overlay.whiteout"
_SPECIAL = {stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFBLK, stat.S_IFCHR}


class LayerError(ConfigError):
    """A layer that is not as a layer should be; the text names the entry."""


class Attributes(NamedTuple):
    """What a layer says of a file."""

    owner: Owner
    mtime_ns: int = 0
    xattrs: Mapping[bytes, bytes] = {}


class TreeWriter:
    """Fills the empty directory `path`; `pretend` keeps owners beside the files (None: if we must).

    Every method takes the path of an entry as the layer writes it and raises LayerError for one
    that cannot be, OSError for what the host refuses.
    """

    def __init__(self, path: str, *, pretend: bool | None = None) -> None:
        self.pretends = must_pretend() if pretend is None else pretend
        self._marked = False
        self._open: list[tuple[bytes, int]] = [(b"", os.open(path, _DIR_FLAGS))]
        self._times: dict[bytes, int] = {}
        if self.pretends:
            try:
                self._mark(b"0:0")
            except OSError as error:
                if error.errno != EOPNOTSUPP:
                    raise
                raise ConfigError(
                    f"{path}: this file system keeps no extended attributes, which say whose the "
                    "image's files are: set XDG_DATA_HOME to a directory on one that does"
                ) from None

    def close(self) -> None:
        """Close what is open."""
        while self._open:
            os.close(self._open.pop()[1])

    def __enter__(self) -> "TreeWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- finding the way --------------------------------------------------------------------------
    def _enter(self, names: list[bytes], whole: bytes) -> int:
        """The descriptor of the directory `names` lead to, made where it is missing."""
        same = 0
        for (held, _), name in zip(self._open[1:], names, strict=False):
            if held != name:
                break
            same += 1
        while len(self._open) > same + 1:
            os.close(self._open.pop()[1])
        for name in names[same:]:
            self._open.append((name, self._enter_one(name, self._open[-1][1], whole)))
        return self._open[-1][1]

    def _enter_one(self, name: bytes, dir_fd: int, whole: bytes) -> int:
        try:
            return os.open(name, _DIR_FLAGS, dir_fd=dir_fd)
        except FileNotFoundError:
            self._make_directory(name, dir_fd)
            return os.open(name, _DIR_FLAGS, dir_fd=dir_fd)
        except OSError as error:
            if error.errno != ENOTDIR:  # ELOOP is ENOTDIR with O_DIRECTORY
                raise
        if _is_whiteout(name, dir_fd):
            self._make_directory(name, dir_fd)
            return os.open(name, _DIR_FLAGS, dir_fd=dir_fd)
        raise LayerError(f"entry {shown(whole)} leads through {shown(name)}, which is no directory")

    def _make_directory(self, name: bytes, dir_fd: int) -> None:
        """Make a directory that nobody described, in the place of a whiteout if there is one."""
        hidden = _is_whiteout(name, dir_fd)
        if hidden:
            os.unlink(name, dir_fd=dir_fd)
        os.mkdir(name, 0o700, dir_fd=dir_fd)
        fd = os.open(name, _DIR_FLAGS, dir_fd=dir_fd)
        try:
            self._give(fd, stat.S_IFDIR, Attributes(Owner(0, 0, 0o755)))
            if hidden:
                os.setxattr(fd, OPAQUE_XATTR, b"y")
        finally:
            os.close(fd)

    def _place(self, path: bytes) -> tuple[int, bytes]:
        """The directory to make the entry `path` in, and its name there; b"" for the root."""
        names = split(path)
        if not names:
            return self._enter([], path), b""
        return self._enter(names[:-1], path), names[-1]

    def _clear(self, name: bytes, dir_fd: int, path: bytes) -> None:
        """Remove what an earlier entry of this name has made: the later one counts."""
        if not name:
            raise LayerError(f"entry {shown(path)} would replace the root")
        there = _lstat(name, dir_fd)
        if there is None:
            return
        remove_whole(name, dir_fd)
        if not stat.S_ISDIR(there.st_mode):
            return
        prefix = b"/".join(split(path))
        for known in [k for k in self._times if k == prefix or k.startswith(prefix + b"/")]:
            del self._times[known]

    # --- entries ----------------------------------------------------------------------------------
    def directory(self, path: bytes, attributes: Attributes) -> None:
        """Make a directory, or give one that is there these attributes."""
        dir_fd, name = self._place(path)
        if name and not _is_directory(name, dir_fd):
            hidden = _is_whiteout(name, dir_fd)
            if not hidden:
                self._clear(name, dir_fd, path)
            self._make_directory(name, dir_fd)
        fd = self._enter(split(path), path)
        self._give(fd, stat.S_IFDIR, attributes)
        self._times[b"/".join(split(path))] = attributes.mtime_ns

    def file(
        self,
        path: bytes,
        attributes: Attributes,
        pieces: Iterable[tuple[int, bytes]],
        size: int,
    ) -> None:
        """Make a regular file of `size` bytes of (offset, data) pieces, the rest a hole."""
        dir_fd, name = self._place(path)
        self._clear(name, dir_fd, path)
        fd = os.open(name, _NEW_FLAGS, 0o600, dir_fd=dir_fd)
        try:
            for offset, data in pieces:
                done = 0
                while done < len(data):
                    done += os.pwrite(fd, memoryview(data)[done:], offset + done)
            os.ftruncate(fd, size)
            self._give(fd, stat.S_IFREG, attributes)
            os.utime(fd, ns=(attributes.mtime_ns, attributes.mtime_ns))
        finally:
            os.close(fd)

    def symlink(self, path: bytes, attributes: Attributes, target: bytes) -> None:
        """Make a symlink; where it leads is the guest's business."""
        dir_fd, name = self._place(path)
        if not target or b"\0" in target:
            raise LayerError(f"symlink {shown(path)} has no target that could be one")
        self._clear(name, dir_fd, path)
        if self.pretends and attributes.owner[:2] != (0, 0):
            as_links_are = attributes._replace(owner=attributes.owner._replace(mode=0o777))
            self._stand_in(name, dir_fd, stat.S_IFLNK, 0, as_links_are, target)
            return
        os.symlink(target, name, dir_fd=dir_fd)
        if not self.pretends:
            os.chown(
                name,
                attributes.owner.uid,
                attributes.owner.gid,
                dir_fd=dir_fd,
                follow_symlinks=False,
            )
        ns = (attributes.mtime_ns, attributes.mtime_ns)
        os.utime(name, ns=ns, dir_fd=dir_fd, follow_symlinks=False)

    def special(self, path: bytes, kind: int, attributes: Attributes, rdev: int) -> None:
        """Make a device of number `rdev`, a fifo or a socket, as S_IFMT `kind` says."""
        if kind not in _SPECIAL:
            raise LayerError(f"entry {shown(path)} is of a kind that no file is")
        dir_fd, name = self._place(path)
        self._clear(name, dir_fd, path)
        if not self.pretends:
            try:
                os.mknod(name, kind | 0o600, rdev, dir_fd=dir_fd)
            except PermissionError:
                pass  # root of a container of its own; then as everybody else
            else:
                fd = open_path(name, dir_fd)
                try:
                    self._give(fd, kind, attributes)
                    os.utime(fd_path(fd), ns=(attributes.mtime_ns, attributes.mtime_ns))
                finally:
                    os.close(fd)
                return
        self._stand_in(name, dir_fd, kind, rdev, attributes, b"")

    def link(self, path: bytes, target: bytes) -> None:
        """Make a further name of what an earlier entry of the layer has made."""
        names = split(target)
        fd = self._existing(names)
        if fd < 0:
            raise LayerError(
                f"hard link {shown(path)} leads to {shown(target)}, which is no file of the layer"
            )
        try:
            dir_fd, name = self._place(path)
            if names != split(path):
                self._clear(name, dir_fd, path)
                # /proc's link to the inode is followed, and nothing else
                os.link(fd_path(fd), name, dst_dir_fd=dir_fd, follow_symlinks=True)
        finally:
            os.close(fd)

    def whiteout(self, path: bytes) -> None:
        """Hide what lower layers have at `path`, but nothing that this one has."""
        dir_fd, name = self._place(path)
        if not name:
            raise LayerError(f"whiteout of {shown(path)}, the root")
        if _is_directory(name, dir_fd):
            self.opaque(path)
        elif not _exists(name, dir_fd) and not make_device_whiteout(name, dir_fd):
            fd = os.open(name, _NEW_FLAGS, 0o600, dir_fd=dir_fd)
            try:
                os.setxattr(fd, _WHITEOUT_XATTR, b"y")
                _set_if_missing(dir_fd, OPAQUE_XATTR, b"x")
            finally:
                os.close(fd)

    def opaque(self, path: bytes) -> None:
        """Hide everything that lower layers have in the directory `path`."""
        os.setxattr(self._enter(split(path), path), OPAQUE_XATTR, b"y")

    def gone(self, path: bytes) -> None:
        """Have an image of this tree say that `path` is gone: a whiteout of overlayfs's."""
        dir_fd, name = self._place(path)
        if not make_device_whiteout(name, dir_fd):
            self._stand_in(name, dir_fd, stat.S_IFCHR, 0, Attributes(Owner(0, 0, 0)), b"")

    def hides(self, path: bytes) -> None:
        """As `gone`, of all that was in the directory `path`."""
        fd = self._enter(split(path), path)
        try:
            os.setxattr(fd, OVERLAY_OPAQUE, b"y")  # root's; tmpfs has no others
        except OSError as error:
            if error.errno not in {EPERM, EOPNOTSUPP}:
                raise
            os.setxattr(fd, XATTR_PREFIX + OVERLAY_OPAQUE, b"y")
            if not self.pretends:
                self._mark(b"-")

    def finish(self) -> None:
        """Give directories their times, which filling them has changed."""
        for path, mtime_ns in self._times.items():
            os.utime(self._enter(split(path), path), ns=(mtime_ns, mtime_ns))

    # --- attributes -------------------------------------------------------------------------------
    def _existing(self, names: list[bytes]) -> int:
        """A descriptor of the file that `names` lead to; -1 if there is none that can be linked."""
        if not names:
            return -1
        fd = os.dup(self._open[0][1])
        try:
            for name in names[:-1]:
                inner = os.open(name, _DIR_FLAGS, dir_fd=fd)
                os.close(fd)
                fd = inner
            found = open_path(names[-1], fd)
        except OSError:
            return -1
        finally:
            os.close(fd)
        st = os.fstat(found)
        if stat.S_ISDIR(st.st_mode) or is_whiteout(fd_path(found), st):
            os.close(found)
            return -1
        return found

    def _stand_in(
        self, name: bytes, dir_fd: int, kind: int, rdev: int, attributes: Attributes, data: bytes
    ) -> None:
        """Make a regular file that is something else in the guest."""
        fd = os.open(name, _NEW_FLAGS, 0o600, dir_fd=dir_fd)
        try:
            os.write(fd, data)
            os.setxattr(fd, OWNER_XATTR, record(attributes.owner, kind, rdev))
            os.utime(fd, ns=(attributes.mtime_ns, attributes.mtime_ns))
        finally:
            os.close(fd)
        os.setxattr(dir_fd, SPECIAL_XATTR, b"y")
        if not self.pretends:
            self._mark(b"-")

    def _give(self, fd: int, kind: int, attributes: Attributes) -> None:
        """Give the file behind `fd` its owner, mode and extended attributes."""
        owner, path = attributes.owner, fd_path(fd)
        if self.pretends:
            ours = 0o700 if kind == stat.S_IFDIR else 0o600
            os.chmod(path, owner.mode & 0o777 | ours)
            os.setxattr(path, OWNER_XATTR, record(owner, kind))
        else:
            os.chown(path, owner.uid, owner.gid)
            os.chmod(path, owner.mode)
        for name, value in attributes.xattrs.items():
            if not name.startswith(PRIVATE_XATTRS):
                self._set_xattr(path, name, value)

    def _set_xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        try:
            os.setxattr(path, name, value)
        except OSError as error:
            if error.errno not in {EPERM, EACCES, EOPNOTSUPP, EINVAL, ERANGE}:
                raise
        else:
            return
        try:
            os.setxattr(path, XATTR_PREFIX + name, value)
        except OSError as error:
            if error.errno not in {EPERM, EOPNOTSUPP, EINVAL, ERANGE}:
                raise  # a special file takes none, and of a name that is none nothing is lost
            return
        if not self.pretends:
            self._mark(b"-")

    def _mark(self, value: bytes) -> None:
        if not self._marked:
            os.setxattr(self._open[0][1], LAYER_XATTR, value)
            self._marked = True


def split(path: bytes) -> list[bytes]:
    """The components of an entry's path; LayerError for one that leads elsewhere."""
    names = [name for name in path.split(b"/") if name not in {b"", b"."}]
    if b".." in names:
        raise LayerError(f"entry {shown(path)} leads out of the layer by ..")
    if len(names) > DEPTH_MAX:
        raise LayerError(f"entry {shown(path)} is deeper than {DEPTH_MAX} directories")
    if b"\0" in path or any(len(name) > 255 for name in names):
        raise LayerError(f"entry {shown(path)} has a name that no file can have")
    return names


def clamp_time(mtime_ns: int) -> int:
    """A time that the host can take."""
    return max(-_TIME_MAX, min(_TIME_MAX, mtime_ns))


def shown(path: bytes) -> str:
    """A path for people: one line, and not too long."""
    text = ascii(os.fsdecode(path))[1:-1]
    return text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + "..."


def _lstat(name: bytes, dir_fd: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _exists(name: bytes, dir_fd: int) -> bool:
    return _lstat(name, dir_fd) is not None


def _is_directory(name: bytes, dir_fd: int) -> bool:
    st = _lstat(name, dir_fd)
    return st is not None and stat.S_ISDIR(st.st_mode)


def _is_whiteout(name: bytes, dir_fd: int) -> bool:
    st = _lstat(name, dir_fd)
    if st is None or stat.S_ISDIR(st.st_mode) or stat.S_ISLNK(st.st_mode):
        return False
    fd = open_path(name, dir_fd)
    try:
        return is_whiteout(fd_path(fd), st)
    finally:
        os.close(fd)


def _set_if_missing(fd: int, name: bytes, value: bytes) -> None:
    try:
        os.setxattr(fd, name, value, os.XATTR_CREATE)
    except OSError as error:
        if error.errno != EEXIST:
            raise
