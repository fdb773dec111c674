"""Which kernel to boot, and the store that fetched and imported ones live in.

    $XDG_DATA_HOME/tinyvmm/kernels/VERSION/   vmlinuz   modules/   config   source

VERSION is what `uname -r` says in the guest. A version appears in the store by rename, complete or
not at all; `.lock` is held while something is put in, so two processes that fetch at once fetch
once. Looking a kernel up takes no lock and imports next to nothing: it is part of every start.

A kernel serves if it can mount 9P and talk over virtio-mmio, by modules or built in. Debian's cloud
flavour, for one, cannot, and is refused when it is chosen.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.images.version import version_key
from tinyvmm.kernel_image import kernel_version

Progress = Callable[[str, int, int], None]

FEATURES = {
    # feature: (modules, configuration options)
    "9p": (("9p", "9pnet_virtio"), ("9P_FS", "NET_9P_VIRTIO")),
    "virtio-mmio": (("virtio_mmio",), ("VIRTIO_MMIO",)),
    "virtio-console": (("virtio_console",), ("VIRTIO_CONSOLE",)),
    "overlay": (("overlay",), ("OVERLAY_FS",)),
}
REQUIRED = ("9p", "virtio-mmio", "virtio-console")
BOOT_DIR = "/boot"
DRAFT_PREFIX = ".draft-"
FETCH = "get Debian's with: tinyvmm kernel fetch"


class InstalledKernel(NamedTuple):
    """A kernel to boot: its release, its file, its modules (None if it has none), its origin."""

    version: str
    vmlinuz: str
    modules: str | None
    source: str


# --- choosing ------------------------------------------------------------------------------------


def find(kernel: str | None = None, progress: Progress | None = None) -> InstalledKernel:
    """Return the kernel called `kernel`: a version in the store, or the path of a file.

    With None: the newest in the store, else this computer's own, else Debian's, fetched now.
    ConfigError if there is none, or it cannot serve.
    """
    if kernel is None:
        return default() or fetch(progress)
    if os.sep not in kernel and (stored := _stored(kernel)):
        return stored
    if os.sep not in kernel and not os.path.exists(kernel):
        known = ", ".join(k.version for k in list_()) or "none yet"
        raise ConfigError(f"kernel {kernel}: neither a file nor a version here ({known}); {FETCH}")
    found = _beside(kernel)
    check(found)
    return found


def default() -> InstalledKernel | None:
    """Return what `find` chooses by itself if it need not fetch anything, else None."""
    stored = _versions()
    if stored:
        newest = _stored(max(stored, key=version_key))
        if newest:
            return newest
    return _running()


def list_() -> list[InstalledKernel]:
    """Return the kernels of the store, newest first, then this computer's own if it can serve."""
    versions = sorted(_versions(), key=version_key, reverse=True)
    found = [kernel for version in versions if (kernel := _stored(version))]
    running = _running()
    return [*found, running] if running else found


def features(kernel: InstalledKernel) -> dict[str, bool | None]:
    """Return which of FEATURES a kernel has; None where neither modules nor config tell."""
    modules = (
        _read_all(kernel.modules, ("modules.dep", "modules.builtin")) if kernel.modules else b""
    )
    directory = os.path.dirname(kernel.vmlinuz)
    config = _read_all(directory, ("config", f"config-{kernel.version}"))
    unknown = kernel.modules is None and not config
    found: dict[str, bool | None] = {}
    for feature, (names, options) in FEATURES.items():
        loadable = all(b"/%s.ko" % name.encode() in modules for name in names)
        builtin = all(b"\nCONFIG_%s=y\n" % option.encode() in config for option in options)
        found[feature] = True if loadable or builtin else None if unknown else False
    return found


def check(kernel: InstalledKernel) -> None:
    """Raise ConfigError if `kernel` is known to lack what we need of it."""
    if kernel.modules and not os.path.exists(os.path.join(kernel.modules, "modules.dep")):
        raise ConfigError(
            f"kernel {kernel.vmlinuz}: its modules in {kernel.modules} have no modules.dep; "
            f"run depmod, or: tinyvmm kernel import {kernel.vmlinuz}"
        )
    has = features(kernel)
    missing = [feature for feature in REQUIRED if has[feature] is False]
    if missing:
        lack = f"kernel {kernel.version} ({kernel.source}): has no {' and no '.join(missing)}"
        if kernel.modules:
            raise ConfigError(f"{lack}, as cloud kernels have not; {FETCH}")
        raise ConfigError(
            f"{lack} built in, and no modules beside it; "
            "give them: tinyvmm kernel import PATH --modules DIR"
        )


# --- putting in ----------------------------------------------------------------------------------


def fetch(progress: Progress | None = None) -> InstalledKernel:
    """Put the newest Debian kernel that apt knows into the store, unless it is there."""
    from tinyvmm.images import debian

    package = debian.newest_package()
    version = package.removeprefix("linux-image-")

    def fill(draft: str, tell: Progress) -> str:
        file = debian.download(package, draft, tell)
        debian.unpack_kernel(file, draft, tell)
        os.unlink(file)
        return package

    return _stored(version) or _install(fill, progress, fetched=version)


def import_(
    path: str, modules: str | None = None, progress: Progress | None = None
) -> InstalledKernel:
    """Put a kernel of the user's into the store: a .deb, or a vmlinuz or vmlinux and its modules.

    `modules` is the modules' directory; by default the one that belongs to where the file is.
    What is in the store under the same version is replaced.
    """
    path = os.path.abspath(path)

    def fill_from_package(draft: str, tell: Progress) -> str:
        from tinyvmm.images import debian

        debian.unpack_kernel(path, draft, tell)
        return f"imported from {path}"

    def fill_from_file(draft: str, tell: Progress) -> str:
        import shutil

        found = _beside(path, modules)
        tell(f"importing {path}", 0, 0)
        shutil.copyfile(path, os.path.join(draft, "vmlinuz"))
        config = os.path.join(os.path.dirname(path), f"config-{found.version}")
        if os.path.exists(config):
            shutil.copyfile(config, os.path.join(draft, "config"))
        if found.modules:
            links = shutil.ignore_patterns("build", "source")  # to the kernel's source, if anywhere
            shutil.copytree(
                found.modules,
                os.path.join(draft, "modules"),
                ignore=links,
                ignore_dangling_symlinks=True,
            )
        return f"imported from {path}"

    if not _is_package(path):
        return _install(fill_from_file, progress)
    if modules is not None:
        raise ConfigError(
            f"kernel import {path}: a package has its own modules; leave out --modules"
        )
    return _install(fill_from_package, progress)


def _install(
    fill: Callable[[str, Progress], str], progress: Progress | None, *, fetched: str = ""
) -> InstalledKernel:
    """Let `fill` put a kernel into a draft directory and say its source; check and store it.

    If another process stores the version `fetched` while we wait for it, that is the answer.
    """
    import fcntl
    import shutil
    import tempfile

    from tinyvmm.images.progress import TerminalProgress

    terminal = TerminalProgress()
    store = store_dir()
    try:
        os.makedirs(store, exist_ok=True)
        lock = os.open(os.path.join(store, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _store_error(store, error) from None
    draft = ""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if fetched and (stored := _stored(fetched)):
            return stored
        for name in os.listdir(store):  # left by a process that was killed: we hold the lock
            if name.startswith(DRAFT_PREFIX):
                shutil.rmtree(os.path.join(store, name))
        draft = tempfile.mkdtemp(dir=store, prefix=DRAFT_PREFIX)
        source = fill(draft, progress or terminal)
        return _store(draft, source)
    except OSError as error:
        raise _store_error(store, error) from None
    finally:
        terminal.finish()
        if draft and os.path.exists(draft):
            shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def _store(draft: str, source: str) -> InstalledKernel:
    """Check what is in `draft` and move it into place."""
    import shutil

    vmlinuz = os.path.join(draft, "vmlinuz")
    version = kernel_version(vmlinuz)
    modules: str | None = os.path.join(draft, "modules")
    if modules and not os.path.isdir(modules):
        modules = None
    if modules and not os.path.exists(os.path.join(modules, "modules.dep")):
        from tinyvmm.guest.modules import write_modules_dep

        write_modules_dep(modules)
    check(InstalledKernel(version, vmlinuz, modules, source))
    with open(os.path.join(draft, "source"), "w", encoding="utf-8") as file:
        file.write(source + "\n")
    os.chmod(draft, 0o755)
    target = os.path.join(store_dir(), version)
    if os.path.exists(target):
        shutil.rmtree(draft + "-old", ignore_errors=True)
        os.rename(target, draft + "-old")
    os.rename(draft, target)
    shutil.rmtree(draft + "-old", ignore_errors=True)
    stored = _stored(version)
    if stored is None:
        raise ConfigError(f"kernel {version}: vanished from {store_dir()} as it was stored")
    return stored


def _store_error(store: str, error: OSError) -> ConfigError:
    import errno

    remedy = "set XDG_DATA_HOME to a directory you can write"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "a kernel with its modules takes 0.5 GB; free some, or set XDG_DATA_HOME elsewhere"
    where = error.filename or store
    return ConfigError(f"kernel store {where}: {error.strerror or error}; {remedy}")


# --- where things are ----------------------------------------------------------------------------


def store_dir() -> str:
    """Return the store: XDG_DATA_HOME/tinyvmm/kernels (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.local/share")
    return os.path.join(base, "tinyvmm", "kernels")


def _versions() -> list[str]:
    try:
        return [name for name in os.listdir(store_dir()) if not name.startswith(".")]
    except OSError:
        return []


def _stored(version: str) -> InstalledKernel | None:
    directory = os.path.join(store_dir(), version)
    vmlinuz = os.path.join(directory, "vmlinuz")
    if version.startswith(".") or not os.path.isfile(vmlinuz):
        return None
    modules = os.path.join(directory, "modules")
    source = _read_all(directory, ("source",)).decode("utf-8", "replace").strip()
    return InstalledKernel(version, vmlinuz, modules if os.path.isdir(modules) else None, source)


def _running() -> InstalledKernel | None:
    """Return the kernel this computer runs, if its file can be read and it can serve."""
    version = os.uname().release
    vmlinuz = os.path.join(BOOT_DIR, f"vmlinuz-{version}")
    if not os.access(vmlinuz, os.R_OK):
        return None
    try:
        kernel = _beside(vmlinuz)._replace(source="this computer's own")
        check(kernel)
    except ConfigError:
        return None
    return kernel


def _beside(path: str, modules: str | None = None) -> InstalledKernel:
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


def _is_package(path: str) -> bool:
    from tinyvmm.images.debian import AR_MAGIC

    try:
        with open(path, "rb") as file:
            return file.read(len(AR_MAGIC)) == AR_MAGIC
    except OSError:
        return False  # the kernel's reader has the words for it


def _read_all(directory: str, names: tuple[str, ...]) -> bytes:
    """Return the text of those files of `directory` that there are."""
    texts = []
    for name in names:
        try:
            with open(os.path.join(directory, name), "rb") as file:
                texts.append(file.read())
        except OSError:
            continue
    return b"".join(texts)
