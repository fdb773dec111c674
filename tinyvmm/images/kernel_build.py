"""A kernel of our own: built of Debian's source, everything in it, nothing to insert.

    unpack the source  ->  make allnoconfig, but kernel.config  ->  make bzImage  ->  the store

`kernel.config` (beside this file) says what is in it; KCONFIG_ALLCONFIG (the kernel's
Documentation/kbuild/kconfig.rst) makes everything else what `allnoconfig` makes it. The source and
what is made of it are kept in a directory of the cache, so that a second build, with another
configuration, makes anew only what changed. Builders' names and times are fixed: the same source,
configuration and compiler give the same kernel.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.images.kernels import InstalledKernel, Progress
from tinyvmm.images.version import version_key
from tinyvmm.kernel_files.kernel_cache import default_dir

CONFIG = os.path.join(os.path.dirname(__file__), "kernel.config")
SOURCES = "/usr/src/linux-source-*.tar.*"
SOURCE_PACKAGE = "linux-source"
PROGRAMS = {
    # what the build runs: the package that has it
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "perl": "perl-base",
    "xz": "xz-utils",
    "tar": "tar",
}
HEADERS = {"gelf.h": "libelf-dev"}  # for objtool
HEADER_DIRS = ("/usr/include", "/usr/local/include")
BZIMAGE = "arch/x86/boot/bzImage"
REPRODUCIBLE = {
    "KBUILD_BUILD_USER": "tinyvmm",
    "KBUILD_BUILD_HOST": "tinyvmm",
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
}
_LOG_LINES = 3


class Option(NamedTuple):
    """A line of a configuration: CONFIG_`name`=`value`."""

    name: str
    value: str


def build(
    source: str | None = None,
    config: str | None = None,
    jobs: int | None = None,
    directory: str | None = None,
    progress: Progress | None = None,
) -> InstalledKernel:
    """Build a kernel, put it into the store and return it.

    `source` is a kernel's source: a directory, or a tarball, by default Debian's newest. `config`
    is a file with more options, which count before ours. `directory` keeps what is made, by default
    one of the cache. ConfigError, in one line, for what is missing, or what make said went wrong.
    """
    from tinyvmm.images import kernel_store
    from tinyvmm.images.progress import TerminalProgress

    wanted = read_options(CONFIG) | (read_options(config) if config else {})
    source = source or _debians_source()
    _check_tools()
    where = os.path.abspath(directory or os.path.join(default_dir(), "kernel-build"))
    terminal = TerminalProgress()
    tell = progress or terminal
    try:
        os.makedirs(where, exist_ok=True)
        with _alone(where):
            made = _make(os.path.abspath(source), where, wanted, jobs or os.cpu_count() or 1, tell)
    except OSError as error:
        raise ConfigError(
            f"kernel build in {where}: {error.strerror or error}; give another --directory"
        ) from None
    finally:
        terminal.finish()

    def fill(draft: str, _tell: Progress) -> str:
        import shutil

        shutil.copyfile(os.path.join(made, BZIMAGE), os.path.join(draft, "vmlinuz"))
        shutil.copyfile(os.path.join(made, ".config"), os.path.join(draft, "config"))
        return f"built of {source}"

    return kernel_store.install(fill, progress)


def read_options(path: str) -> dict[str, str]:
    """Return the options of a configuration: name, without CONFIG_, to value."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"kernel build: cannot read the options in {path}: {error}") from None
    options = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        name, equals, value = text.partition("=")
        if text.startswith("# CONFIG_") and text.endswith(" is not set"):
            name, equals, value = text[2 : -len(" is not set")], "=", "n"
        elif not text or text.startswith("#"):
            continue
        if not equals or not name.startswith("CONFIG_"):
            raise ConfigError(f"kernel build: {path}:{number}: give CONFIG_NAME=value")
        options[name.removeprefix("CONFIG_")] = value
    return options


def lost_options(wanted: dict[str, str], config: str) -> list[Option]:
    """Return the options that the kernel's configuration did not take, of a file `config`."""
    taken = read_options(config)
    return [Option(n, v) for n, v in wanted.items() if taken.get(n, "n") != v]


@contextmanager
def _alone(where: str) -> Iterator[None]:
    """Keep other builds out of the directory; ConfigError if one is at it."""
    import fcntl

    lock = os.open(os.path.join(where, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(
            f"kernel build: another is at work in {where}; wait for it, or give --directory"
        ) from None
    finally:
        os.close(lock)


def _debians_source() -> str:
    found = glob.glob(SOURCES)
    if not found:
        raise ConfigError(
            f"kernel build: no {SOURCES} here; install the package {SOURCE_PACKAGE} (sudo apt-get "
            f"install {SOURCE_PACKAGE}), or give --source"
        )
    return max(found, key=lambda path: version_key(os.path.basename(path)))


def _check_tools() -> None:
    from shutil import which

    missing = [package for program, package in PROGRAMS.items() if which(program) is None]
    for header, package in HEADERS.items():
        if not any(os.path.exists(os.path.join(place, header)) for place in HEADER_DIRS):
            missing.append(package)
    if missing:
        raise ConfigError(
            f"kernel build: {', '.join(missing)} missing: sudo apt-get install {' '.join(missing)}"
        )


def _make(source: str, where: str, wanted: dict[str, str], jobs: int, tell: Progress) -> str:
    """Make the kernel; return the directory it is in."""
    tree = _source_tree(source, where, tell)
    made = os.path.join(where, "made")
    os.makedirs(made, exist_ok=True)
    allconfig = os.path.join(where, "wanted.config")
    with open(allconfig, "w", encoding="utf-8") as file:
        file.writelines(f"CONFIG_{name}={value}\n" for name, value in wanted.items())
    log = os.path.join(where, "log")
    with suppress(FileNotFoundError):
        os.unlink(log)
    make = ["make", "-C", tree, f"O={made}", f"-j{jobs}"]
    tell("configuring the kernel", 0, 0)
    _run([*make, f"KCONFIG_ALLCONFIG={allconfig}", "allnoconfig"], log, None)
    lost = lost_options(wanted, os.path.join(made, ".config"))
    if lost:
        import sys

        names = ", ".join(f"{name}={value}" for name, value in lost)
        sys.stderr.write(f"tinyvmm: this source has no, or otherwise decides, {names}\n")
    _run([*make, "bzImage"], log, tell)
    return made


def _source_tree(source: str, where: str, tell: Progress) -> str:
    """Return the directory of the source, unpacked below `where` if it is a tarball."""
    import shutil

    if os.path.isdir(source):
        if not os.path.exists(os.path.join(source, "Kbuild")):
            raise ConfigError(f"kernel build: {source} holds no kernel's source; give its top")
        return source
    if not os.path.isfile(source):
        what = "no regular file" if os.path.exists(source) else "no such file"
        raise ConfigError(f"kernel build: {source}: {what}; give a kernel's source")
    status = os.stat(source)
    name = f"{os.path.basename(source).partition('.tar')[0]}-{status.st_size}-{status.st_mtime_ns}"
    tree = os.path.join(where, name)
    if not os.path.isdir(tree):
        draft = f"{tree}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        os.makedirs(draft)
        tell(f"unpacking {source}", 0, 0)
        # Of the packaged source there is nothing to fear, and tar is quicker than we are.
        _run(["tar", "-C", draft, "--strip-components=1", "-xf", source], "", None)
        os.rename(draft, tree)
    return tree


def _run(command: Sequence[str], log: str, tell: Progress | None) -> None:
    """Run a command, its output into the file `log`; ConfigError with its last words."""
    import subprocess

    environment = {**os.environ, **REPRODUCIBLE, "LC_ALL": "C"}
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        lines: list[str] = []
        steps = 0
        try:
            for line in process.stdout or ():
                steps += 1
                lines = [*lines[-200:], line]
                if log:
                    with open(log, "a", encoding="utf-8") as file:
                        file.write(line)
                if tell is not None:
                    tell(f"building the kernel: {steps} steps", 0, 0)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        errors = [line.strip() for line in lines if "error" in line.lower()]
        said = errors or [line.strip() for line in lines if line.strip()][-_LOG_LINES:]
        about = f"; all it said is in {log}" if log else ""
        what = said[0] if said else f"status {process.returncode}"
        raise ConfigError(f"kernel build: {command[0]} failed: {what}{about}")
