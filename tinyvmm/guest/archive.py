"""The two parts of a guest's initramfs: the kernel's modules, cached, and PID 1, new for each run.

Linux unpacks archives that lie one behind the other, so what only depends on the kernel is made
once and kept in the cache directory, ready to be copied into RAM. A cached file is one line of
names, in the order of insertion, and then the archive. It is written under another name and
renamed, so a reader sees all of it or none; a cache that cannot be written is done without.
"""

import os
import zlib
from collections.abc import Sequence

from tinyvmm.guest.init import InitConfig, build_init
from tinyvmm.guest.initramfs import Archive
from tinyvmm.named import NamedTuple

_MAGIC = b"tinyvmm modules 1:"
_SUFFIX = ".cpio"
_KEPT = 32


class ModuleArchive(NamedTuple):
    """Paths of the modules inside the guest, in the order to insert them, and the archive."""

    paths: Sequence[str]
    archive: bytes | memoryview


def module_archive(modules_dir: str, wanted: Sequence[str], cache_dir: str) -> ModuleArchive:
    """Return the archive of `wanted` and all they depend on; ConfigError as `closure` does."""
    key = _key(modules_dir, wanted)
    cached = os.path.join(cache_dir, f"modules-{key:08x}{_SUFFIX}")
    found = _read(cached)
    if found is not None:
        return found
    from tinyvmm.guest.modules import closure

    archive = Archive()
    paths = []
    for module in closure(modules_dir, wanted):
        path = f"/modules/{module.name}.ko"
        archive.add_file(path, module.read())
        paths.append(path)
    made = ModuleArchive(paths, archive.finish())
    _write(cached, made)
    return made


def init_archive(config: InitConfig) -> bytes:
    """Return the archive that holds PID 1, where the kernel looks for it."""
    return Archive().add_file("/init", build_init(config), mode=0o755).finish()


def _key(modules_dir: str, wanted: Sequence[str]) -> int:
    """Identify a kernel's modules by where and when they were put there."""
    try:
        when = os.stat(os.path.join(modules_dir, "modules.dep")).st_mtime_ns
    except OSError:
        when = 0  # `closure` will say what is wrong
    return zlib.crc32(repr((os.path.abspath(modules_dir), when, tuple(wanted))).encode())


def _read(path: str) -> ModuleArchive | None:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        return None
    end = data.find(b"\n")
    head = data[: max(end, 0)]
    length, _, names = head.removeprefix(_MAGIC).partition(b":")
    if not head.startswith(_MAGIC) or length != b"%d" % (len(data) - end - 1):
        return None  # not ours, or cut short: make it anew
    return ModuleArchive(names.decode().split(), memoryview(data)[end + 1 :])


def _write(path: str, made: ModuleArchive) -> None:
    head = _MAGIC + b"%d:" % len(made.archive) + " ".join(made.paths).encode() + b"\n"
    temporary = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(head)
            file.write(made.archive)
        os.replace(temporary, path)
        _prune(os.path.dirname(path))
    except OSError:
        return  # no cache: the next run makes it again


def _prune(directory: str) -> None:
    """Remove all but the newest: kernels go, and their modules with them."""
    with os.scandir(directory) as found:
        made = [(e.stat().st_mtime_ns, e.path) for e in found if e.name.endswith(_SUFFIX)]
    for _, path in sorted(made)[:-_KEPT]:
        os.unlink(path)
