"""What a kernel can do, as far as its modules and its configuration tell.

    modules.dep, modules.builtin    what can be inserted, and what is built in (depmod(8))
    config                          what it was built with: beside it, or inside (CONFIG_IKCONFIG)

Where there is neither, nothing is known, and the kernel has the benefit of the doubt. In the store
the answers stand in a file of their own, written when the kernel is put in, or when somebody asks
and it is not there: a line each, `+`, `-` or `?` and the feature's name.
"""

import os
from contextlib import suppress

from tinyvmm.named import NamedTuple

FEATURES = {
    # feature: (modules, configuration options)
    "9p": (("9p", "9pnet_virtio"), ("9P_FS", "NET_9P_VIRTIO")),
    "erofs": (("erofs",), ("EROFS_FS",)),
    "overlay": (("overlay",), ("OVERLAY_FS",)),
    "ext4": (("ext4",), ("EXT4_FS",)),
    "virtio-pci": (("virtio_pci",), ("VIRTIO_PCI",)),
    "virtio-mmio": (("virtio_mmio",), ("VIRTIO_MMIO",)),
    "virtio-console": (("virtio_console",), ("VIRTIO_CONSOLE",)),
    "virtio-blk": (("virtio_blk",), ("VIRTIO_BLK",)),
    "virtio-net": (("virtio_net",), ("VIRTIO_NET",)),
    "virtio-rng": (("virtio_rng",), ("HW_RANDOM_VIRTIO",)),
    "virtio-balloon": (("virtio_balloon",), ("VIRTIO_BALLOON",)),
    "kvm-amd": (("kvm", "kvm_amd"), ("KVM", "KVM_AMD")),
    "vsock": (("vmw_vsock_virtio_transport",), ("VIRTIO_VSOCKETS",)),
}
FILE = "features"
_MARKS = {"+": True, "-": False, "?": None}
_IKCONFIG_BEGIN, _IKCONFIG_END = b"IKCFG_ST", b"IKCFG_ED"  # kernel/configs.c

Features = dict[str, bool | None]


class Files(NamedTuple):
    """Where to look: the kernel's version, its file, its modules' directory (None for none)."""

    version: str
    vmlinuz: str
    modules: str | None


def features(kernel: Files, *, stored: bool) -> Features:
    """Return which of FEATURES a kernel has, None for what cannot be told.

    Of one that is `stored` it is written down, should it not be: every run asks several times, and
    to look takes long, in the lab a second.
    """
    found = _noted(os.path.dirname(kernel.vmlinuz))
    if found is not None:
        return found
    found = look(kernel)
    if stored:
        with suppress(OSError):  # the next one looks again
            _write(kernel, found)
    return found


def look(kernel: Files) -> Features:
    """As `features`, but of the kernel's own files."""
    modules = b""
    if kernel.modules:
        modules = read_all(kernel.modules, ("modules.dep", "modules.builtin")).replace(b"-", b"_")
    directory = os.path.dirname(kernel.vmlinuz)
    config = b"\n" + read_all(directory, ("config", f"config-{kernel.version}"))
    unknown = kernel.modules is None and config == b"\n"
    found: Features = {}
    for feature, (names, options) in FEATURES.items():
        loadable = all(b"/%s.ko" % name.encode() in modules for name in names)
        builtin = all(b"\nCONFIG_%s=y\n" % option.encode() in config for option in options)
        found[feature] = True if loadable or builtin else None if unknown else False
    return found


def note(kernel: Files) -> None:
    """Write down what the kernel's files tell, beside it; OSError if that fails."""
    _write(kernel, look(kernel))


def _write(kernel: Files, found: Features) -> None:
    marks = {has: mark for mark, has in _MARKS.items()}
    lines = [f"{marks[has]}{feature}\n" for feature, has in found.items()]
    path = os.path.join(os.path.dirname(kernel.vmlinuz), FILE)
    with open(path, "w", encoding="ascii") as file:
        file.writelines(lines)


def _noted(directory: str) -> Features | None:
    """Return what was noted; None if nothing was, or of other features than today's."""
    lines = read_all(directory, (FILE,)).decode("ascii", "replace").splitlines()
    found = {line[1:]: _MARKS[line[0]] for line in lines if line[:1] in _MARKS}
    return found if list(found) == list(FEATURES) else None


def embedded_config(vmlinuz: str) -> bytes | None:
    """Return the configuration that is inside a kernel (CONFIG_IKCONFIG), None if there is none.

    Takes as long as unpacking the kernel does. ConfigError if it is no kernel.
    """
    import zlib

    from tinyvmm.kernel_files.kernel_image import open_image, open_kernel
    from tinyvmm.kernel_files.kernel_payload import PayloadError, unpack

    fd, status = open_kernel(vmlinuz)
    try:
        payload = open_image(vmlinuz, fd, status.st_size).payload
        vmlinux = unpack(payload) if payload else os.pread(fd, status.st_size, 0)
    except PayloadError:
        return None  # whoever boots it will hear why
    finally:
        os.close(fd)
    begin = vmlinux.find(_IKCONFIG_BEGIN + b"\x1f\x8b")
    end = vmlinux.find(_IKCONFIG_END, begin)
    if begin < 0 or end < 0:
        return None
    packed = vmlinux[begin + len(_IKCONFIG_BEGIN) : end]
    try:
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(packed, 8 << 20)
    except zlib.error:
        return None


def read_all(directory: str, names: tuple[str, ...]) -> bytes:
    """Return the text of those files of `directory` that there are."""
    texts = []
    for name in names:
        try:
            with open(os.path.join(directory, name), "rb") as file:
                texts.append(file.read())
        except OSError:
            continue
    return b"".join(texts)
