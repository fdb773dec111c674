"""Kernels from Debian: packages found and downloaded by apt, read and unpacked by ourselves.

A .deb is an `ar` archive of three members (deb(5)): `debian-binary`, `control.tar.*` and
`data.tar.*`. What of a kernel package is taken out, and what is not, package.py says.

apt checks what it downloads against the distribution's signatures; for a .deb from elsewhere the
user answers.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any, NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.images.package import PackageError, Unpacking, check_name, open_package
from tinyvmm.images.progress import Progress
from tinyvmm.kernel_files import zstd

AR_MAGIC = b"!<arch>\n"
AR_HEADER_LEN = 60
AR_HEADER_END = b"`\n"
PACKAGE_PREFIX = "linux-image-"
ARCHITECTURE = "amd64"
# Versioned images only; -dbg and -unsigned, which do not end so, hold none or the same.
PACKAGE = r"linux-image-(\d+\.\d+\.\d+[\w.+~-]*?)(?:-([a-z]+))?-amd64"
FLAVOURS = ("amd64", "cloud", "rt")
"""Debian's kernels: for everything, for clouds' machines (no 9p), for real time."""
POLL_SECONDS = 0.1


class ArMember(NamedTuple):
    """A file in an ar archive: `length` bytes at `offset`."""

    name: str
    offset: int
    length: int


# --- reading -------------------------------------------------------------------------------------


def ar_members(path: str, file: IO[bytes]) -> Iterator[ArMember]:
    """List an ar archive (ar(5), the common format); PackageError if it is none or is cut short."""
    file_len = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise PackageError(path, "is not a .deb; give one, a .rpm or a vmlinuz")
    offset = len(AR_MAGIC)
    while offset < file_len:
        file.seek(offset)
        header = file.read(AR_HEADER_LEN)
        digits = header[48:58].strip()
        if len(header) < AR_HEADER_LEN or header[58:] != AR_HEADER_END or not digits.isdigit():
            raise PackageError(path, "is damaged; download it again")
        offset += AR_HEADER_LEN
        length = int(digits)
        if offset + length > file_len:
            raise PackageError(path, "is cut short; download it again")
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


def unpack(path: str, into: Unpacking, progress: Progress) -> None:
    """Take out of a .deb what `into` wants of it; PackageError, or OSError if writing fails."""
    with open_package(path) as file:
        data = [m for m in ar_members(path, file) if m.name.startswith("data.tar")]
        if len(data) != 1:
            raise PackageError(path, "has no data.tar; is it a Debian package?")
        reader = _MemberReader(file, data[0], f"unpacking {os.path.basename(path)}", progress)
        try:
            _unpack_tar(path, reader, data[0].name.partition(".tar")[2], into)
        except OSError as error:
            if error.errno is not None:  # a real one, from writing
                raise
            raise PackageError(path, f"is damaged ({error}); download it again") from None


def _unpack_tar(path: str, reader: _MemberReader, suffix: str, into: Unpacking) -> None:
    import lzma
    import tarfile
    import zlib

    source: Any = reader
    mode = suffix[1:]
    if mode == "zst":
        source, mode = zstd.Reader(reader), ""
    try:
        tar: Any = tarfile.open  # for typeshed, a mode is a literal
        with tar(fileobj=source, mode=f"r|{mode}") as archive:
            for member in archive:
                if member.isreg():
                    into.take(path, member.name, member.size, partial(archive.extractfile, member))
                else:
                    check_name(path, member.name)
    except tarfile.CompressionError:
        raise PackageError(
            path,
            f"holds data.tar{suffix}, which this Python cannot unpack; "
            "run dpkg -x on it and import the vmlinuz with --modules",
        ) from None
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        raise PackageError(path, f"is damaged ({error}); download it again") from None
    finally:
        if isinstance(source, zstd.Reader):
            source.close()


# --- apt -----------------------------------------------------------------------------------------


def find_package(version: str | None = None, flavour: str = ARCHITECTURE) -> str:
    """Return the name of the package of the newest kernel that is wanted and that apt knows.

    `version` may be all of it, as `uname -r` says, or its beginning: 6.1, or 6.1.0-48. Without one
    it is what Debian means by its meta-package for `flavour`, one of FLAVOURS. Asks for fresh
    package lists if there is none at all and we may. ConfigError if apt is missing or knows none.
    """
    if version is not None:
        flavour, version = _split_flavour(version, flavour)
    if flavour not in FLAVOURS:
        raise ConfigError(f"kernel fetch: {flavour!r} is no flavour: give {', '.join(FLAVOURS)}")
    known = _known_packages(version, flavour)
    if not known and os.geteuid() == 0:
        _apt(["apt-get", "-q", "update"])
        known = _known_packages(version, flavour)
    if version is not None:
        wanted = [name for name in known if _is_version(name, version)]
        if known and not wanted:
            newest = ", ".join(name.removeprefix(PACKAGE_PREFIX) for name in known[:4])
            raise ConfigError(f"kernel fetch {version}: apt knows no such kernel, but {newest}")
        known = wanted
    if not known:
        raise ConfigError(
            "kernel fetch: apt knows no linux-image-*-amd64 package; refresh its lists "
            "(sudo apt-get update), or import a kernel: tinyvmm kernel import PATH"
        )
    return known[0]


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


def _split_flavour(version: str, flavour: str) -> tuple[str, str]:
    """Return the flavour that a version such as 6.1.0-48-cloud-amd64 names, and what is before."""
    version = version.removeprefix(PACKAGE_PREFIX)
    if not version.endswith(f"-{ARCHITECTURE}"):
        return flavour, version
    version = version.removesuffix(f"-{ARCHITECTURE}")
    for named in FLAVOURS[1:]:
        if version.endswith(f"-{named}"):
            return named, version.removesuffix(f"-{named}")
    return ARCHITECTURE, version


def _is_version(package: str, version: str) -> bool:
    """Whether a package's version is `version`, or begins with it, at the end of a part."""
    rest = package.removeprefix(PACKAGE_PREFIX)
    return rest.startswith(version) and rest[len(version) : len(version) + 1] in {"-", ".", "+"}


def _known_packages(version: str | None, flavour: str) -> list[str]:
    """Return apt's kernels of `flavour`, newest first: of the meta-package if it names any."""
    import re

    from tinyvmm.images.version import version_key

    middle = "" if flavour == ARCHITECTURE else f"{flavour}-"
    meta = ["depends", f"{PACKAGE_PREFIX}{middle}{ARCHITECTURE}"]
    line = re.compile(f"^[ |]*(?:Depends: )?({PACKAGE})(?: - .*)?$", re.MULTILINE)
    for question in (meta, ["search", "--names-only", "^linux-image-[0-9]"]):
        if question == meta and version is not None:
            continue
        # There may be no meta-package. A search that finds nothing is no failure of apt's.
        answer = _apt(["apt-cache", *question], may_fail=question == meta)
        found = {
            name for name, _, kind in line.findall(answer) if (kind or ARCHITECTURE) == flavour
        }
        if found:
            return sorted(found, key=version_key, reverse=True)
    return []


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
