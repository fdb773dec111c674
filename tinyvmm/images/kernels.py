"""Which kernel to boot, and the store that fetched, imported and built ones live in.

    $XDG_DATA_HOME/tinyvmm/kernels/VERSION/   vmlinuz   modules/   config   source   features
                                   default    the VERSION that `kernel use` chose

VERSION is what `uname -r` says in the guest. What is in the store changes in kernel_store.py.
Looking a kernel up takes no lock and imports next to nothing: it is part of every start.

A kernel serves if it has what its root and the command's streams need, by modules or built in.
Debian's cloud flavour, for one, has no 9P: it is refused where the root is one of 9P.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from tinyvmm.errors import ConfigError
from tinyvmm.images.features import Features, Files, features, read_all
from tinyvmm.images.version import version_key
from tinyvmm.kernel_files.kernel_image import kernel_version
from tinyvmm.named import NamedTuple

if TYPE_CHECKING:
    from contextlib import ExitStack

Progress = Callable[[str, int, int], None]

ROOTS = {
    "9p": ("virtio-console", "9p"),
    "erofs": ("virtio-console", "virtio-blk", "erofs", "overlay"),
}
"""What a kernel needs for each kind of root."""
LAB = "lab"
_NEEDS = {**ROOTS, LAB: ("9p", "overlay", "kvm-amd")}
OWN_SUFFIX = "-tinyvmm"  # of kernels that `kernel build` made: CONFIG_LOCALVERSION
TRANSPORTS = ("virtio-pci", "virtio-mmio")  # one of them will do
BOOT_DIR = "/boot"
DEFAULT_FILE = "default"
FETCH = "get Debian's with: tinyvmm kernel fetch"


class InstalledKernel(NamedTuple):
    """A kernel to boot: its release, its file, its modules (None if it has none), its origin."""

    version: str
    vmlinuz: str
    modules: str | None
    source: str


# --- choosing ------------------------------------------------------------------------------------


def find(
    kernel: str | None = None, progress: Progress | None = None, root: str = "9p"
) -> InstalledKernel:
    """Return the kernel called `kernel`: a version in the store, or the path of a file.

    With None: the one that `kernel use` chose, else the newest in the store that serves for a root
    over 9P, if it does for such a root (a key of ROOTS, or LAB) as well, else the newest that does,
    else this computer's own, else Debian's, fetched now. Those that were built here have to be
    chosen, unless there is no other, and so have those that do not tell what they can do.
    ConfigError if there is none, or it cannot serve.
    """
    found = default(root) if kernel is None else look_up(kernel)
    if found is None:
        from tinyvmm.images import kernel_store

        found = kernel_store.fetch(progress)
    check(found, root)
    return found


def hold(kernel: InstalledKernel, cleanup: "ExitStack") -> None:
    """Keep a kernel in the store until `cleanup`: a machine may want more of its modules."""
    from tinyvmm.images import holding

    directory = os.path.dirname(kernel.vmlinuz)
    if os.path.dirname(directory) == store_dir():
        with suppress(FileNotFoundError):  # removed just now: who reads it will say so
            holding.hold(directory, cleanup)


def look_up(kernel: str) -> InstalledKernel:
    """Return the kernel of that version in the store, or of that file; ConfigError for neither."""
    if os.sep not in kernel and (stored := stored_kernel(kernel)):
        return stored
    if os.sep not in kernel and not os.path.exists(kernel):
        known = ", ".join(k.version for k in list_()) or "none yet"
        raise ConfigError(f"kernel {kernel}: neither a file nor a version here ({known}); {FETCH}")
    return beside(kernel)


def default(root: str = "9p") -> InstalledKernel | None:
    """Return what `find` chooses by itself if it need not fetch anything, else None."""
    chosen = stored_kernel(chosen_version())
    if chosen is not None and (root != LAB or not missing(chosen, root)):
        return chosen
    if root == "erofs":
        usual = default()  # one kernel for all roots, where that can be
        if usual is not None and not missing(usual, root):
            return usual
    newest_first = sorted(versions(), key=version_key, reverse=True)
    doubtful = None
    for version in sorted(newest_first, key=lambda version: version.endswith(OWN_SUFFIX)):
        newest = stored_kernel(version)
        if newest and not missing(newest, root):
            if None not in able(newest).values():
                return newest
            doubtful = doubtful or newest
    return doubtful or _running(root)


def chosen_version() -> str:
    """Return the version that `kernel use` chose, or nothing."""
    try:
        with open(os.path.join(store_dir(), DEFAULT_FILE), encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""


def list_() -> list[InstalledKernel]:
    """Return the kernels of the store, newest first, then this computer's own if it can serve."""
    newest_first = sorted(versions(), key=version_key, reverse=True)
    found = [kernel for version in newest_first if (kernel := stored_kernel(version))]
    running = _running("9p")
    return [*found, running] if running else found


def able(kernel: InstalledKernel) -> Features:
    """Return what a kernel can do: which of FEATURES it has, None for what cannot be told."""
    stored = os.path.dirname(os.path.dirname(kernel.vmlinuz)) == store_dir()
    return features(Files(kernel.version, kernel.vmlinuz, kernel.modules), stored=stored)


def size(kernel: InstalledKernel) -> int:
    """Return the bytes its file has."""
    return os.stat(kernel.vmlinuz).st_size


def missing(kernel: InstalledKernel, root: str) -> list[str]:
    """Return what `kernel` is known to lack of what a root of that kind needs."""
    has = able(kernel)
    lacks = [feature for feature in _NEEDS[root] if has[feature] is False]
    if all(has[transport] is False for transport in TRANSPORTS):
        lacks.append(" or ".join(TRANSPORTS))
    return lacks


def check(kernel: InstalledKernel, root: str | None = "9p") -> None:
    """Raise ConfigError if `kernel` is known to lack what that root (with None, any) needs."""
    if kernel.modules and not os.path.exists(os.path.join(kernel.modules, "modules.dep")):
        raise ConfigError(
            f"kernel {kernel.vmlinuz}: its modules in {kernel.modules} have no modules.dep; "
            f"run depmod, or: tinyvmm kernel import {kernel.vmlinuz}"
        )
    lacks = min((missing(kernel, kind) for kind in (ROOTS if root is None else (root,))), key=len)
    if lacks:
        lack = f"kernel {kernel.version} ({kernel.source}): has no {' and no '.join(lacks)}"
        if kernel.modules:
            cloud = ", as cloud kernels have not" if "9p" in lacks else ""
            raise ConfigError(f"{lack}{cloud}; {FETCH}")
        raise ConfigError(
            f"{lack} built in, and no modules beside it; "
            "give them: tinyvmm kernel import PATH --modules DIR"
        )


# --- where things are ----------------------------------------------------------------------------


def store_dir() -> str:
    """Return the store: XDG_DATA_HOME/tinyvmm/kernels (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.local/share")
    return os.path.join(base, "tinyvmm", "kernels")


def versions() -> list[str]:
    """Return the versions that the store may have."""
    try:
        names = os.listdir(store_dir())
        return [name for name in names if not name.startswith(".") and name != DEFAULT_FILE]
    except OSError:
        return []


def stored_kernel(version: str) -> InstalledKernel | None:
    """Return the kernel of that version in the store, None if there is none."""
    directory = os.path.join(store_dir(), version)
    vmlinuz = os.path.join(directory, "vmlinuz")
    if not version or version.startswith(".") or not os.path.isfile(vmlinuz):
        return None
    modules = os.path.join(directory, "modules")
    source = read_all(directory, ("source",)).decode("utf-8", "replace").strip()
    return InstalledKernel(version, vmlinuz, modules if os.path.isdir(modules) else None, source)


def _running(root: str) -> InstalledKernel | None:
    """Return the kernel this computer runs, if its file can be read and it can serve."""
    vmlinuz = running_vmlinuz()
    if not os.access(vmlinuz, os.R_OK):
        return None
    try:
        kernel = beside(vmlinuz)._replace(source="this computer's own")
        check(kernel, root)
    except ConfigError:
        return None
    return kernel


def running_vmlinuz() -> str:
    """Return where the file of the kernel is that this computer runs."""
    return os.path.join(BOOT_DIR, f"vmlinuz-{os.uname().release}")


def beside(path: str, modules: str | None = None) -> InstalledKernel:
    """Return the kernel file at `path` with its modules: those given, or where they belong."""
    version = kernel_version(path)
    directory = os.path.dirname(os.path.abspath(path))
    above = os.path.dirname(directory)
    if modules is not None:
        if not os.path.isdir(os.path.join(modules, "kernel")):
            raise ConfigError(
                f"--modules {modules}: holds no kernel modules; give a directory like "
                f"/lib/modules/{version}"
            )
        return InstalledKernel(version, path, os.path.abspath(modules), path)
    places = (
        os.path.join(directory, "modules"),
        os.path.join(above, "lib", "modules", version),
        os.path.join(above, "usr", "lib", "modules", version),
        directory,  # as in /lib/modules/VERSION/vmlinuz
        os.path.join("/lib/modules", version),
    )
    for place in places:
        if os.path.isdir(os.path.join(place, "kernel")):
            return InstalledKernel(version, path, place, path)
    return InstalledKernel(version, path, None, path)
