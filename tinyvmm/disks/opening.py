"""From what the user said of a disk to the disk."""

import os
from typing import NamedTuple

from tinyvmm.disks import files, qcow2
from tinyvmm.disks.overlay import open_ephemeral, open_overlay
from tinyvmm.disks.qcow2 import Qcow2Image
from tinyvmm.disks.raw import RawDisk
from tinyvmm.errors import ConfigError

FORMATS = ("raw", "qcow2")
CHAIN_MAX = 32  # images that stand on each other
# How images begin that are no raw ones: what a guest wrote into them as such would be their end.
_MAGIC = {
    qcow2.MAGIC: "qcow2",
    b"KDMV": "VMDK",
    b"# Disk DescriptorFile": "VMDK",
    b"vhdxfile": "VHDX",
    b"conectix": "VHD",
    b"<<< ": "VDI",
    b"QED\0": "QED",
}


class DiskOptions(NamedTuple):
    """One disk of a machine."""

    path: str
    read_only: bool = False
    overlay: str | None = None
    """The file that keeps what the guest writes, where the image itself is not to change."""
    ephemeral: bool = False
    """Nothing is to keep what the guest writes."""
    format: str | None = None
    """One of FORMATS; None for raw, unless it looks like something else."""
    serial: str | None = None
    """What the guest finds in /sys/block/vda/serial; None for `disk0`, by its number."""
    queues: int = 1

    @property
    def written(self) -> str | None:
        """The file that keeps what the guest writes, if one does."""
        if self.read_only or self.ephemeral:
            return None
        return self.overlay or self.path


def open_disk(options: DiskOptions) -> RawDisk | Qcow2Image:
    """Open and lock everything that a disk consists of; ConfigError for what cannot be."""
    path = options.path
    _check_path(path)
    if options.read_only + options.ephemeral + (options.overlay is not None) > 1:
        raise ConfigError(f"disk {path}: give one of ro, overlay=FILE and ephemeral")
    if options.overlay is None and not options.ephemeral:
        if options.format == "qcow2" and not options.read_only:
            raise ConfigError(
                f"disk {path}: a qcow2 image is only read; add overlay=FILE, ephemeral or ro"
            )
        return _open(path, options.format, writable=not options.read_only)
    if options.overlay is not None and _is_same(options.overlay, path):
        raise ConfigError(f"disk {path}: an image is no overlay over itself: name another file")
    base = _open(path, options.format, writable=False)
    base_format = "qcow2" if isinstance(base, Qcow2Image) else "raw"
    try:
        if options.overlay is None:
            return open_ephemeral(base, path, base_format)
        return open_overlay(options.overlay, base, path, base_format)
    except BaseException:
        base.close()
        raise


def _is_same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False  # what is wrong shows when it is opened


def _check_path(path: str) -> None:
    """Raise ConfigError for a last comma that seems to begin an option, of which there is none."""
    at = -1
    while not os.path.exists(path) and (at := path.find(",", at + 1)) >= 0:
        if os.path.isfile(path[:at]):
            raise ConfigError(
                f"disk {path[:at]}: {path.rpartition(',')[2]!r} is no option; there are ro, "
                "ephemeral, overlay=FILE, format=raw|qcow2, serial=ID and queues=N"
            )


def _open(
    path: str, given: str | None, *, writable: bool, above: tuple[tuple[int, int], ...] = ()
) -> RawDisk | Qcow2Image:
    """Open an image and what it stands on; `above` are the files that stand on it."""
    if given not in {None, *FORMATS}:
        raise ConfigError(f"disk {path}: no format {given!r}; give {' or '.join(FORMATS)}")
    if given == "qcow2":
        return _open_qcow2(path, above)
    # A guest can write what it likes to the start of its raw disk. Whoever then took it for what it
    # looks like would open the files that the guest names.
    if given is None and (kind := _looks_like(path)):
        remedy = "say format=qcow2, or format=raw if a guest wrote that"
        if kind != "qcow2":
            remedy = "qemu-img convert -O raw makes a raw one; or say format=raw if it is one"
        elif above:
            remedy = f"say so in the image above: qemu-img rebase -u -F qcow2 -b {path} IMAGE"
        raise ConfigError(f"disk {path} begins like a {kind} image: {remedy}")
    return RawDisk(path, read_only=not writable)


def _looks_like(path: str) -> str | None:
    """Name the format of an image file that is not raw, by how it begins."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            head = os.pread(fd, max(map(len, _MAGIC)), 0)
        finally:
            os.close(fd)
    except OSError:
        return None  # what is wrong shows when it is opened
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def _open_qcow2(path: str, above: tuple[tuple[int, int], ...]) -> Qcow2Image:
    fd = files.open_image(path, writable=False)
    try:
        return _stand(fd, path, above)
    except BaseException:
        os.close(fd)
        raise


def _stand(fd: int, path: str, above: tuple[tuple[int, int], ...]) -> Qcow2Image:
    """Put the qcow2 image in `fd` on what it says that it stands on."""
    st = os.fstat(fd)
    own = (st.st_dev, st.st_ino)
    if own in above:
        raise ConfigError(f"disk {path} stands on itself: qemu-img rebase gives it a base")
    if len(above) >= CHAIN_MAX:
        raise ConfigError(
            f"disk {path}: more than {CHAIN_MAX} images stand on each other; "
            "qemu-img convert makes one of them"
        )
    header = qcow2.read_header(fd, path)
    if header.backing is None:
        return Qcow2Image(fd, path, header, None)
    if ":" in header.backing.split("/")[0]:
        raise ConfigError(
            f"disk {path} stands on {header.backing!r}, which is no file; qemu-img convert "
            "makes an image of both"
        )
    kind = header.extensions.get(qcow2.BACKING_FORMAT)
    where = os.path.join(os.path.dirname(path), header.backing)
    if not os.path.exists(where):
        raise ConfigError(
            f"disk {path} stands on {where}, which is not there: put it back, or name another "
            f"with qemu-img rebase -u -b FILE -F FORMAT {path}"
        )
    backing = _open(
        where,
        None if kind is None else kind.decode(errors="replace"),
        writable=False,
        above=(*above, own),
    )
    return Qcow2Image(fd, path, header, backing)


def parse_disk(text: str) -> DiskOptions:
    """Parse `PATH[,OPTION]...`; ConfigError for anything else.

    A comma that begins no option is part of the path, of the image or the overlay.
    """
    rest = text
    given: dict[str, str | bool | int] = {}
    while True:
        head, comma, option = rest.rpartition(",")
        name, equals, value = option.partition("=")
        if not comma:
            break
        if option in {"ro", "ephemeral"}:
            given["read_only" if option == "ro" else option] = True
        elif name in {"overlay", "format", "serial"} and equals:
            if not value and name != "serial":
                raise ConfigError(f"disk {text!r}: give a value behind {name}=")
            given[name] = value
        elif name == "queues" and equals:
            if not value.isascii() or not value.isdigit():
                raise ConfigError(f"disk {text!r}: queues={value} is no number: give e.g. queues=2")
            given[name] = int(value)
        else:
            break
        rest = head
    if not rest:
        raise ConfigError(f"disk {text!r} names no image: give PATH[,OPTION]...")
    return DiskOptions(rest, **given)  # type: ignore[arg-type]  # by the names above
