"""What is taken out of a distribution's kernel packages, whatever their format.

Of a package the kernel, its configuration and its modules are taken:

    boot/vmlinuz-V  boot/config-V  lib/modules/V/...         Debian, Ubuntu
    lib/modules/V/vmlinuz  lib/modules/V/config  ...         Fedora, SUSE

(below usr/ in newer releases), and nothing else is so much as created: no link, no device, no name
from the archive that is not below them. A package that tries to leave its directory is refused
altogether. Several packages may make one kernel: Fedora has the modules in packages of their own.
"""

import os
from collections.abc import Callable
from typing import IO, Protocol

from tinyvmm.errors import ConfigError
from tinyvmm.regular import regular

FILE_LEN_MAX = 1 << 30
COPY_LEN = 1 << 20
_MODULES = "modules.of"


class PackageError(ConfigError):
    """A package that is damaged, hostile, or of another kind."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"package {path}: {why}")


def open_package(path: str) -> IO[bytes]:
    """Open the package at `path`; PackageError if it cannot be read."""
    try:
        return open(path, "rb", opener=regular)
    except OSError as error:
        raise PackageError(path, f"cannot be read ({error.strerror})") from None


class Source(Protocol):
    """A member's contents, read forwards."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, none at the end."""


class Unpacking:
    """The kernel that packages are unpacked into: `directory` must be empty at first.

    It may be left with anything in it after an error: PackageError, or OSError if writing fails.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._versions: set[str] = set()

    def take(
        self, package: str, name: str, length: int, source: Callable[[], Source | None]
    ) -> None:
        """Write a regular file of `package` if it is wanted; `source` gives its contents."""
        target = self._target(check_name(package, name))
        if target is None:
            return
        if length > FILE_LEN_MAX:
            raise PackageError(package, f"holds {name!r} of {length >> 30} GiB; no kernel does")
        opened = source()
        if opened is None:
            raise PackageError(package, f"holds no data for {name!r}")
        try:
            _write(os.path.join(self.directory, *target), opened)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise PackageError(package, f"holds {name!r} twice; do not trust it") from None

    def finish(self, package: str, hint: str) -> str:
        """Return the version of the one kernel that was in all; `hint` says what to give else."""
        found = len(self._versions)
        if found != 1 or not os.path.exists(os.path.join(self.directory, "vmlinuz")):
            raise PackageError(package, f"holds {found or 'no'} kernels; {hint}")
        version = next(iter(self._versions))
        unpacked = os.path.join(self.directory, _MODULES)
        if os.path.isdir(unpacked):
            if os.listdir(unpacked) != [version]:
                raise PackageError(package, f"holds modules of another kernel; {hint}")
            os.rename(os.path.join(unpacked, version), os.path.join(self.directory, "modules"))
            os.rmdir(unpacked)
        return version

    def _target(self, parts: list[str]) -> list[str] | None:
        """Return where a member of a kernel package goes, None for nowhere."""
        if parts[:1] == ["usr"]:
            parts = parts[1:]
        if len(parts) == 2 and parts[0] == "boot":
            for kind in ("vmlinuz", "config"):
                if parts[1].startswith(kind + "-"):
                    return self._kernel(kind, parts[1].removeprefix(kind + "-"))
        if (
            len(parts) == 4
            and parts[:2] == ["lib", "modules"]
            and parts[3] in {"vmlinuz", "config"}
        ):
            return self._kernel(parts[3], parts[2])
        if len(parts) > 3 and parts[:2] == ["lib", "modules"]:
            return [_MODULES, *parts[2:]]
        return None

    def _kernel(self, kind: str, version: str) -> list[str]:
        if kind == "vmlinuz":
            self._versions.add(version)
            if len(self._versions) > 1:
                return [f"vmlinuz-{version}"]  # `finish` refuses both
        return [kind]


def check_name(package: str, name: str) -> list[str]:
    """Return the steps of a member's path; PackageError if it leads out."""
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if name.startswith("/") or ".." in parts:
        raise PackageError(package, f"holds {name!r}, a path out of it; do not trust it")
    return parts


def _write(target: str, source: Source) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with open(fd, "wb") as copy:
        while data := source.read(COPY_LEN):
            copy.write(data)
