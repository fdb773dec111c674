"""What says "no longer there" in a layer: whiteouts and opaque directories.

The forms are overlayfs's (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque
directories"), so a write tree can be mounted as an upper layer and an upper layer can be read:

- a whiteout is a character device 0:0 in the place of what is gone; or an empty file with the xattr
  `{trusted,user}.overlay.whiteout`, in a directory whose `overlay.opaque` is "x";
- a directory whose `{trusted,user}.overlay.opaque` is "y" hides all that lower layers have there.

Linux lets everybody make the device since 5.8. Some file systems allow neither (overlayfs itself
keeps both forms to itself, 9p and vfat know no devices): a write tree on one of these uses names
instead, as AUFS and OCI layers do: an empty file `.wh.NAME`, and `.wh..wh..opq` for opaque. Such a
tree says so by a file `.wh..wh.tinyvmm` in its root; elsewhere these names mean nothing.
"""

import os
import stat
from errno import EINVAL, ENODATA, ENODEV, ENOSYS, ENXIO, EOPNOTSUPP, EPERM

OWNER_XATTR = b"user.containers.override_stat"
PRIVATE_XATTRS = (b"user.overlay.", b"trusted.overlay.", b"user.tinyvmm.", OWNER_XATTR)
"""Prefixes of our own xattrs, which a guest neither sees nor sets."""

NAME_PREFIX = b".wh."
NAME_OPAQUE = b".wh..wh..opq"
NAME_MARK = b".wh..wh.tinyvmm"

_PREFIXES = (b"trusted.overlay.", b"user.overlay.") if os.geteuid() == 0 else (b"user.overlay.",)
_REFUSED = {EPERM, EOPNOTSUPP}
# A network file system whose server opens what it has just made says ENXIO: no such device.
_NO_DEVICES = _REFUSED | {ENXIO, ENODEV, EINVAL, ENOSYS}


def layer_xattr(path: bytes, name: bytes) -> bytes | None:
    """The value of the overlay xattr `name` (`opaque`, `whiteout`) of the file `path` leads to."""
    for prefix in _PREFIXES:
        try:
            return os.getxattr(path, prefix + name)
        except OSError as error:
            if error.errno != ENODATA and error.errno not in _REFUSED:
                raise
    return None


def set_layer_xattr(path: bytes, name: bytes, value: bytes) -> bool:
    """Set the overlay xattr `name`; False if the file system or our privilege does not let us."""
    for prefix in _PREFIXES:
        try:
            os.setxattr(path, prefix + name, value)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
        else:
            return True
    return False


def is_whiteout(fd_path: bytes, st: os.stat_result) -> bool:
    """Whether the file that `fd_path` leads to, of stat `st`, is a whiteout."""
    if stat.S_ISCHR(st.st_mode):
        return st.st_rdev == 0
    if st.st_size or not stat.S_ISREG(st.st_mode):
        return False
    return layer_xattr(fd_path, b"whiteout") is not None


def make_device_whiteout(name: bytes, dir_fd: int) -> bool:
    """Make a whiteout in the device form; False if that cannot be done here."""
    try:
        os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=dir_fd)
    except OSError as error:
        if error.errno in _NO_DEVICES:
            return False
        raise
    return True


def make_xattr_whiteout(name: bytes, dir_fd: int) -> bool:
    """Make a whiteout in the xattr form; False if that cannot be done here."""
    fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    try:
        done = set_layer_xattr(b"/proc/self/fd/%d" % fd, b"whiteout", b"y")
    finally:
        os.close(fd)
    if not done:
        os.unlink(name, dir_fd=dir_fd)
    return done
