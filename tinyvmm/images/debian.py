"""Kernels from Debian: packages found and downloaded by apt, read and unpacked by ourselves.

A .deb is an `ar` archive of three members (deb(5)): `debian-binary`, `control.tar.*` and
`data.tar.*`. A kernel package's data holds boot/vmlinuz-V, boot/config-V and lib/modules/V (below
usr/ in newer releases). Those three are taken out, and nothing else is so much as created: no link,
no device, no name from the archive that is not below them. An archive that tries to leave its
directory is refused altogether.

apt checks what it downloads against the distribution's signatures; for a .deb from elsewhere the
user answers.
"""

import os
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.images.progress import Progress

if TYPE_CHECKING:
    import tarfile

AR_MAGIC = b"!<arch>\n"
AR_HEADER_LEN = 60
AR_HEADER_END = b"`\n"
META_PACKAGE = "linux-image-amd64"
# Versioned images only; -cloud lacks 9p, -rt is another kernel, -dbg and -unsigned hold none or
# the same.
PACKAGE = r"linux-image-\d+\.\d+\.\d+[\w.+~-]*-amd64"
UNWANTED = ("-cloud-", "-rt-", "-dbg", "-unsigned")
FILE_LEN_MAX = 1 << 30
COPY_LEN = 1 << 20
POLL_SECONDS = 0.1


class ArMember(NamedTuple):
    """A file in an ar archive: `length` bytes at `offset`."""

    name: str
    offset: int
    length: int


class DebError(ConfigError):
    """A .deb that is damaged, hostile, or of another kind."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"package {path}: {why}")


# --- reading -------------------------------------------------------------------------------------


def ar_members(path: str, file: IO[bytes]) -> Iterator[ArMember]:
    """List an ar archive (ar(5), the common format); DebError if it is none or is cut short."""
    file_len = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise DebError(path, "is not a .deb; give one, or a vmlinuz")
    offset = len(AR_MAGIC)
    while offset < file_len:
        file.seek(offset)
        header = file.read(AR_HEADER_LEN)
        digits = header[48:58].strip()
        if len(header) < AR_HEADER_LEN or header[58:] != AR_HEADER_END or not digits.isdigit():
            raise DebError(path, "is damaged; download it again")
        offset += AR_HEADER_LEN
        length = int(digits)
        if offset + length > file_len:
            raise DebError(path, "is cut short; download it again")
        yield ArMember(header[:16].decode("latin-1").strip().rstrip("/"), offset, length)
        offset += length + length % 2


class _MemberReader:
    """The file object tarfile reads a member through, forwards only, telling how far it is."""

    def __init__(self, file: IO[bytes], member: ArMember, what: str, progress: Progress) -> None:
        file.seek(member.offset)
        self.file = file
        self.length = self.left = member.length
        self.what = what
        self.progress = progress

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, none at the member's end."""
        data = self.file.read(min(size, self.left))
        self.left -= len(data)
        self.progress(self.what, self.length - self.left, self.length)
        return data


def unpack_kernel(path: str, directory: str, progress: Progress) -> str:
    """Unpack a kernel package's vmlinuz, config and modules/; return the version it is named after.

    `directory` must be empty, and may be left with anything in it after an error: DebError for a
    package that is damaged, hostile or holds no kernel; OSError if writing fails.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; its errors are of another kind
    except OSError as error:
        raise DebError(path, f"cannot be read ({error.strerror})") from None
    with file:
        data = [m for m in ar_members(path, file) if m.name.startswith("data.tar")]
        if len(data) != 1:
            raise DebError(path, "has no data.tar; is it a Debian package?")
        reader = _MemberReader(file, data[0], f"unpacking {os.path.basename(path)}", progress)
        try:
            return _take_kernel(path, reader, data[0].name.partition(".tar")[2], directory)
        except OSError as error:
            if error.errno is not None:  # a real one, from writing
                raise
            raise DebError(path, f"is damaged ({error}); download it again") from None


def _take_kernel(path: str, reader: _MemberReader, suffix: str, directory: str) -> str:
    """Write what is wanted of a data.tar; return the version of the one kernel in it."""
    import lzma
    import tarfile
    import zlib

    try:
        tar: Any = tarfile.open  # for typeshed, a mode is a literal
        with tar(fileobj=reader, mode=f"r|{suffix[1:]}") as archive:
            names = [_take(path, archive, member, directory) for member in archive]
    except tarfile.CompressionError:
        raise DebError(
            path,
            f"holds data.tar{suffix}, which this Python cannot unpack; "
            "run dpkg -x on it and import the vmlinuz with --modules",
        ) from None
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        raise DebError(path, f"is damaged ({error}); download it again") from None
    versions = [name.removeprefix("vmlinuz-") for name in names if name.startswith("vmlinuz-")]
    if len(versions) != 1:
        raise DebError(
            path,
            f"holds {len(versions) or 'no'} kernels; give a linux-image-VERSION-amd64 package "
            "(neither meta-package nor -dbg)",
        )
    unpacked = os.path.join(directory, "modules.of")
    if os.path.isdir(unpacked):
        if os.listdir(unpacked) != versions:
            raise DebError(path, "holds modules of another kernel; give a linux-image package")
        os.rename(os.path.join(unpacked, versions[0]), os.path.join(directory, "modules"))
        os.rmdir(unpacked)
    return versions[0]


def _take(path: str, archive: "tarfile.TarFile", member: "tarfile.TarInfo", directory: str) -> str:
    """Write one member if it is wanted; return the last part of its name if so, else ""."""
    parts = [part for part in member.name.split("/") if part not in {"", "."}]
    if member.name.startswith("/") or ".." in parts:
        raise DebError(path, f"holds {member.name!r}, a path out of it; do not trust it")
    target = _target(parts)
    if target is None or not member.isreg():
        return ""
    if member.size > FILE_LEN_MAX:
        raise DebError(path, f"holds {member.name!r} of {member.size >> 30} GiB; no kernel does")
    source = archive.extractfile(member)
    if source is None:
        raise DebError(path, f"holds no data for {member.name!r}")
    try:
        _write(os.path.join(directory, *target), source)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise DebError(path, f"holds {member.name!r} twice; do not trust it") from None
    return parts[-1]


def _target(parts: list[str]) -> list[str] | None:
    """Return where a member of a kernel package goes, None for nowhere."""
    if parts[:1] == ["usr"]:
        parts = parts[1:]
    if len(parts) == 2 and parts[0] == "boot":
        for kind in ("vmlinuz", "config"):
            if parts[1].startswith(kind + "-"):
                return [kind]
    if len(parts) > 3 and parts[:2] == ["lib", "modules"]:
        return ["modules.of", *parts[2:]]
    return None


def _write(target: str, source: IO[bytes]) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with open(fd, "wb") as copy:
        while data := source.read(COPY_LEN):
            copy.write(data)


# --- apt -----------------------------------------------------------------------------------------


def newest_package() -> str:
    """Return the name of the kernel package that Debian means by linux-image-amd64.

    Where there is no such meta-package, the newest versioned image. Asks for fresh package lists if
    there is none at all and we may. ConfigError if apt is missing or knows no kernel.
    """
    package = _known_package()
    if package is None and os.geteuid() == 0:
        _apt(["apt-get", "-q", "update"])
        package = _known_package()
    if package is None:
        raise ConfigError(
            "kernel fetch: apt knows no linux-image-*-amd64 package; refresh its lists "
            "(sudo apt-get update), or import a kernel: tinyvmm kernel import PATH"
        )
    return package


def download(package: str, directory: str, progress: Progress) -> str:
    """Download a package into `directory`; return its path. ConfigError says why if it fails."""
    # Answers 'URI' FILE SIZE HASH
    words = _apt(["apt-get", "-q", "download", "--print-uris", package]).split()
    if len(words) < 3 or not words[2].isdigit():
        raise ConfigError(f"kernel fetch: apt-get does not say where {package} is to be had")
    file, total = os.path.basename(words[1]), int(words[2])
    target = os.path.join(directory, file)

    def tell() -> None:
        done = os.stat(target).st_size if os.path.exists(target) else 0
        progress(f"downloading {package}", done, total)

    tell()
    _apt(["apt-get", "-q", "download", package], directory, tell)
    if not os.path.exists(target):
        raise ConfigError(f"kernel fetch: apt-get downloaded no {file}; try again")
    return target


def _known_package() -> str | None:
    import re

    from tinyvmm.images.version import version_key

    wanted = re.compile(f"^[ |]*(?:Depends: )?({PACKAGE})(?: - .*)?$", re.MULTILINE)
    for question in (["depends", META_PACKAGE], ["search", "--names-only", "^linux-image-[0-9]"]):
        answer = _apt(["apt-cache", *question], may_fail=True)
        found = [p for p in wanted.findall(answer) if not any(u in p for u in UNWANTED)]
        if found:
            return str(max(found, key=version_key))
    return None


def _apt(
    command: list[str],
    directory: str | None = None,
    tell: Callable[[], None] | None = None,
    *,
    may_fail: bool = False,
) -> str:
    """Run an apt command, calling `tell` while it lasts; return what it printed."""
    import subprocess

    what = " ".join(command[:1] + [w for w in command[1:] if not w.startswith("-")])
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise ConfigError(
            f"kernel fetch: {command[0]} is not on this computer, which is needed to get Debian's "
            "kernel; import one instead: tinyvmm kernel import PATH"
        ) from None
    with process:
        try:
            while True:
                try:
                    output, errors = process.communicate(timeout=POLL_SECONDS if tell else None)
                    break
                except subprocess.TimeoutExpired:
                    if tell:
                        tell()
        except BaseException:
            process.kill()
            raise
    if process.returncode and not may_fail:
        said = [line for line in errors.splitlines() if line.startswith("E:")] or [errors.strip()]
        raise ConfigError(
            f"kernel fetch: {what}: {said[0].removeprefix('E: ') or 'failed'}; "
            "check the network, sudo apt-get update, or: tinyvmm kernel import PATH"
        )
    return output
