"""What is in the store of kernels, changed: fetched, imported, built, removed, chosen.

A version appears in the store by rename, complete or not at all, and leaves it so; `.lock` is held
while something is put in or taken out, so two processes that fetch at once fetch once.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tinyvmm.errors import ConfigError
from tinyvmm.images import kernels
from tinyvmm.images.features import Files, embedded_config, note
from tinyvmm.images.holding import is_held
from tinyvmm.images.kernels import InstalledKernel, Progress, stored_kernel
from tinyvmm.images.storing import storing
from tinyvmm.kernel_files.kernel_image import kernel_version
from tinyvmm.regular import regular

DRAFT_PREFIX = ".draft-"
NEWEST = "newest"

Fill = Callable[[str, Progress], str]
"""Puts a kernel into a draft directory, vmlinuz at least, and says where it is from."""


def fetch(
    progress: Progress | None = None, version: str | None = None, flavour: str | None = None
) -> InstalledKernel:
    """Put Debian's newest kernel, of that version and flavour, into the store, unless it is there.

    `version` and `flavour` are as `debian.find_package` takes them; ConfigError as it says.
    """
    from tinyvmm.images import debian
    from tinyvmm.images.package import Unpacking

    package = debian.find_package(version, flavour or debian.ARCHITECTURE)
    found = package.removeprefix(debian.PACKAGE_PREFIX)

    def fill(draft: str, tell: Progress) -> str:
        file = debian.download(package, draft, tell)
        into = Unpacking(draft)
        debian.unpack(file, into, tell)
        into.finish(file, "tell whoever made it")
        os.unlink(file)
        return package

    return stored_kernel(found) or install(fill, progress, fetched=found)


def import_(
    paths: Sequence[str], modules: str | None = None, progress: Progress | None = None
) -> InstalledKernel:
    """Put a kernel of the user's into the store: packages, or a vmlinuz or vmlinux and its modules.

    Packages are .deb or .rpm, as many as one kernel is made of. `modules` is the modules'
    directory; by default the one that belongs to where the file is. What is in the store under the
    same version is replaced.
    """
    paths = [os.path.abspath(path) for path in paths]
    unpackers = [_unpacker(path) for path in paths]
    shown = " ".join(paths)

    def fill_from_packages(draft: str, tell: Progress) -> str:
        from tinyvmm.images.package import Unpacking

        into = Unpacking(draft)
        for path, unpack in zip(paths, unpackers, strict=True):
            if unpack is not None:
                unpack(path, into, tell)
        into.finish(
            paths[0],
            "give the packages of one kernel: Debian's linux-image-VERSION-amd64 (neither "
            "meta-package nor -dbg), Fedora's kernel-core, kernel-modules-core and kernel-modules",
        )
        return f"imported from {shown}"

    def fill_from_file(draft: str, tell: Progress) -> str:
        _copy(kernels.beside(paths[0], modules), draft, tell)
        return f"imported from {paths[0]}"

    if not any(unpackers):
        if len(paths) > 1:
            raise ConfigError(f"kernel import {shown}: give one kernel, or packages of one")
        return install(fill_from_file, progress)
    if not all(unpackers):
        odd = paths[unpackers.index(None)]
        raise ConfigError(f"kernel import {odd}: is no package, as the others are; give it alone")
    if modules is not None:
        raise ConfigError(
            f"kernel import {shown}: a package has its own modules; leave out --modules"
        )
    return install(fill_from_packages, progress)


def remove(versions: Sequence[str]) -> None:
    """Take kernels out of the store; ConfigError if one is not there or runs, and none is gone."""
    import shutil

    store = kernels.store_dir()
    with _locked(store):
        for version in versions:
            found = stored_kernel(version)
            if found is None:
                known = ", ".join(sorted(kernels.versions())) or "none"
                raise ConfigError(f"kernel rm {version}: no such version in the store ({known})")
            if is_held(os.path.dirname(found.vmlinuz)):
                raise ConfigError(
                    f"kernel rm {version}: a machine runs it (tinyvmm ps): stop that first"
                )
        for version in dict.fromkeys(versions):
            gone = os.path.join(store, f"{DRAFT_PREFIX}{version}-gone")
            shutil.rmtree(gone, ignore_errors=True)
            os.rename(os.path.join(store, version), gone)
            shutil.rmtree(gone)
        if kernels.chosen_version() in versions:
            os.unlink(os.path.join(store, kernels.DEFAULT_FILE))


def use(version: str) -> InstalledKernel | None:
    """Make `version` what `run` boots by itself; with NEWEST that is the newest again.

    Return what it will boot. ConfigError if it is not in the store.
    """
    store = kernels.store_dir()
    path = os.path.join(store, kernels.DEFAULT_FILE)
    with _locked(store):
        if version == NEWEST:
            if os.path.exists(path):
                os.unlink(path)
            return kernels.default()
        found = stored_kernel(version)
        if found is None:
            known = ", ".join(sorted(kernels.versions())) or "none yet"
            raise ConfigError(
                f"kernel use {version}: no such version in the store ({known}); "
                "tinyvmm kernel fetch or import it, or use newest"
            )
        draft = os.path.join(store, DRAFT_PREFIX + kernels.DEFAULT_FILE)
        with open(draft, "w", encoding="utf-8") as file:
            file.write(version + "\n")
        os.rename(draft, path)
        return found


# --- putting in ----------------------------------------------------------------------------------


def install(fill: Fill, progress: Progress | None = None, *, fetched: str = "") -> InstalledKernel:
    """Let `fill` put a kernel into a draft directory; check and store it.

    If another process stores the version `fetched` while we wait for it, that is the answer.
    """
    import shutil
    import tempfile

    from tinyvmm.images.progress import TerminalProgress

    terminal = TerminalProgress()
    store = kernels.store_dir()
    with _locked(store):
        if fetched and (stored := stored_kernel(fetched)):
            return stored
        draft = tempfile.mkdtemp(dir=store, prefix=DRAFT_PREFIX)
        try:
            source = fill(draft, progress or terminal)
            return _store(draft, source)
        finally:
            terminal.finish()
            if os.path.exists(draft):
                shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _locked(store: str) -> Iterator[None]:
    """Hold the store's lock, and clear away what a process left that was killed holding it."""
    import fcntl
    import shutil

    with storing("kernel", store, "free 0.5 GB, which a kernel with its modules takes"):
        os.makedirs(store, exist_ok=True)
        lock = os.open(os.path.join(store, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in os.listdir(store):
                path = os.path.join(store, name)
                if name.startswith(DRAFT_PREFIX) and os.path.isdir(path):
                    shutil.rmtree(path)
            yield
        finally:
            os.close(lock)


def _store(draft: str, source: str) -> InstalledKernel:
    """Check what is in `draft` and move it into place."""
    import shutil

    vmlinuz = os.path.join(draft, "vmlinuz")
    version = kernel_version(vmlinuz)
    if version == kernels.DEFAULT_FILE or version.startswith(".") or "/" in version:
        raise ConfigError(f"kernel {source}: calls itself {version!r}, which is no version")
    modules: str | None = os.path.join(draft, "modules")
    if modules and not os.path.isdir(modules):
        modules = None
    if modules and not os.path.exists(os.path.join(modules, "modules.dep")):
        from tinyvmm.guest.modules import write_modules_dep

        write_modules_dep(modules)
    config = os.path.join(draft, "config")
    if modules is None and not os.path.exists(config):
        inside = embedded_config(vmlinuz)
        if inside is not None:
            with open(config, "wb") as file:
                file.write(inside)
    note(Files(version, vmlinuz, modules))
    kernels.check(InstalledKernel(version, vmlinuz, modules, source), root=None)
    with open(os.path.join(draft, "source"), "w", encoding="utf-8") as text:
        text.write(source + "\n")
    os.chmod(draft, 0o755)
    target = os.path.join(kernels.store_dir(), version)
    if os.path.exists(target):
        shutil.rmtree(draft + "-old", ignore_errors=True)
        os.rename(target, draft + "-old")
    os.rename(draft, target)
    shutil.rmtree(draft + "-old", ignore_errors=True)
    stored = stored_kernel(version)
    if stored is None:
        raise ConfigError(f"kernel {version}: vanished from {target} as it was stored")
    return stored


def _copy(found: InstalledKernel, draft: str, tell: Progress) -> None:
    """Copy a kernel file with what belongs to it."""
    import shutil

    tell(f"importing {found.vmlinuz}", 0, 0)
    shutil.copyfile(found.vmlinuz, os.path.join(draft, "vmlinuz"))
    config = os.path.join(os.path.dirname(found.vmlinuz), f"config-{found.version}")
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


def _unpacker(path: str) -> Callable[..., None] | None:
    """Return what unpacks the package at `path`, by its first bytes; None if it is none."""
    from tinyvmm.images import debian, rpm

    try:
        with open(path, "rb", opener=regular) as file:
            magic = file.read(len(debian.AR_MAGIC))
    except OSError:
        return None  # the kernel's reader has the words for it
    if magic == debian.AR_MAGIC:
        return debian.unpack
    return rpm.unpack if magic.startswith(rpm.LEAD_MAGIC) else None
