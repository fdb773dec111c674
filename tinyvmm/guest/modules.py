"""Which kernel modules a guest needs, in the order to insert them, and their bytes.

A kernel's modules live in a directory lib/modules/VERSION. Three of its files matter here
(depmod(8), kernel/module/main.c):

    modules.builtin   modules compiled into the kernel itself: nothing to insert
    modules.dep       path: paths of all modules it depends on, nearest first
    modules.softdep   wished-for companions; ignored, since the caller names what it wants

A kernel unpacked from its package has no modules.dep, which is made at installation by depmod;
`write_modules_dep` makes it from each module's `.modinfo` section (`depends=a,b`), reading only
the headers of each file. Names are compared as the kernel does, with `-` and `_` alike.
"""

import importlib
import io
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tinyvmm.errors import ConfigError

SUFFIXES = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")


class Module(NamedTuple):
    """A module to insert: its name, and its file on this computer."""

    name: str
    path: str

    def read(self) -> bytes:
        """The module, decompressed. Raises ConfigError if it can't be read or decompressed."""
        try:
            with open(self.path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise ConfigError(
                f"cannot read the kernel module {self.path}: {error.strerror}"
            ) from None
        return _decompress(self.path, data)


def module_name(path: str) -> str:
    """The name of a module from its name or path: no directory, no suffix, `-` as `_`."""
    name = os.path.basename(path)
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name.replace("-", "_")


def closure(modules_dir: str, wanted: Iterable[str]) -> tuple[Module, ...]:
    """The modules named and all they depend on, each after what it needs; built-in ones left out.

    A name with a ? behind it is of a module that not every kernel has. Raises ConfigError for
    another name that is neither a module nor built in, or without modules.dep.
    """
    kernel = os.path.basename(os.path.normpath(modules_dir))
    depends = read_modules_dep(modules_dir)
    builtin = _read_builtin(modules_dir)
    paths = {module_name(path): path for path in depends}
    chosen: dict[str, None] = {}  # an ordered set of paths
    for entry in wanted:
        name = entry.removesuffix("?")
        path = paths.get(module_name(name))
        if path is not None:
            # modules.dep lists everything a module needs, such that the last must be first.
            chosen.update(dict.fromkeys((*reversed(depends[path]), path)))
        elif name == entry and module_name(name) not in builtin:
            raise ConfigError(
                f"kernel {kernel} has no module {name!r}; choose another kernel with --kernel"
            )
    return tuple(Module(module_name(path), os.path.join(modules_dir, path)) for path in chosen)


def read_modules_dep(modules_dir: str) -> dict[str, tuple[str, ...]]:
    """modules.dep: path in the directory -> paths of all it depends on, nearest first."""
    try:
        with open(os.path.join(modules_dir, "modules.dep"), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise ConfigError(
            f"cannot read {modules_dir}/modules.dep: {error.strerror}; run depmod, or import the "
            "kernel with `tinyvmm kernel import`"
        ) from None
    split = (line.partition(":") for line in lines if line and not line.startswith("#"))
    return {path: tuple(depends.split()) for path, _, depends in split}


def _read_builtin(modules_dir: str) -> set[str]:
    try:
        with open(os.path.join(modules_dir, "modules.builtin"), encoding="utf-8") as file:
            return {module_name(line) for line in file.read().split()}
    except FileNotFoundError:
        return set()


# --- making modules.dep --------------------------------------------------------------------
def write_modules_dep(modules_dir: str) -> None:
    """Write modules.dep for every module below `modules_dir`, as depmod would.

    Raises ConfigError if a module isn't one, depends on none that is there, or on itself.
    """
    paths = {module_name(path): path for path in sorted(_find(modules_dir))}
    direct = {name: _read_dependencies(modules_dir, path) for name, path in paths.items()}
    temporary = os.path.join(modules_dir, f"modules.dep.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        for name, path in paths.items():
            needed = reversed(_in_order(name, direct))
            file.write(" ".join((f"{path}:", *(paths[other] for other in needed))) + "\n")
    os.replace(temporary, os.path.join(modules_dir, "modules.dep"))


def dependencies(module: bytes | memoryview) -> tuple[str, ...]:
    """The names of the modules that a module (an ELF file) says it depends on.

    Raises ValueError if it is not a kernel module.
    """
    try:
        info = bytes(_modinfo(module))
    except (struct.error, OverflowError):  # a table that would lie beyond the end
        raise ValueError("it is cut off or damaged") from None
    for entry in info.split(b"\0"):
        key, _, value = entry.partition(b"=")
        if key == b"depends":
            return tuple(module_name(name) for name in value.decode().split(",") if name)
    return ()


def _find(modules_dir: str) -> Iterator[str]:
    """Paths of all modules, relative to the directory."""
    for directory, _, files in os.walk(modules_dir):
        for file in files:
            if file.endswith(SUFFIXES):
                yield os.path.relpath(os.path.join(directory, file), modules_dir)


def _read_dependencies(modules_dir: str, path: str) -> tuple[str, ...]:
    import mmap

    module = Module(module_name(path), os.path.join(modules_dir, path))
    try:
        if not path.endswith(".ko"):
            return dependencies(module.read())
        with (
            open(module.path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
            memoryview(view) as data,
        ):
            return dependencies(data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{module.path} is not a whole kernel module: {error}") from None


def _in_order(name: str, direct: Mapping[str, Sequence[str]]) -> list[str]:
    """All that `name` depends on, each after what it depends on itself."""
    order: dict[str, None] = {}

    def visit(current: str, on_the_way: tuple[str, ...]) -> None:
        if current in on_the_way:
            raise ConfigError(f"kernel module {current} depends on itself; the kernel is damaged")
        for needed in direct.get(current, ()):
            if needed not in direct:
                raise ConfigError(
                    f"kernel module {current} needs {needed}, which is missing; "
                    "unpack the whole kernel package"
                )
            if needed not in order:
                visit(needed, (*on_the_way, current))
        if current != name:
            order[current] = None

    visit(name, ())
    return list(order)


def _modinfo(module: bytes | memoryview) -> bytes | memoryview:
    """The `.modinfo` section of a 64-bit little-endian ELF file (Elf64_Ehdr, Elf64_Shdr)."""
    if bytes(module[:6]) != b"\x7fELF\2\1":
        raise ValueError("not a 64-bit ELF file")
    (table_offset,) = struct.unpack_from("<Q", module, 0x28)  # e_shoff
    entry_len, count, names_index = struct.unpack_from("<HHH", module, 0x3A)

    def section(index: int) -> tuple[int, bytes | memoryview]:
        at = table_offset + index * entry_len
        name, _type, _flags, _addr, offset, length = struct.unpack_from("<IIQQQQ", module, at)
        return name, module[offset : offset + length]

    names = bytes(section(names_index)[1])
    for index in range(count):
        name, content = section(index)
        if names[name:].startswith(b".modinfo\0"):
            return content
    raise ValueError("it has no .modinfo section")


DECOMPRESSORS = {
    ".xz": ("lzma", "open"),
    ".gz": ("gzip", "open"),
    ".zst": ("tinyvmm.kernel_files.zstd", "Reader"),
}
_PIECE_LEN = 1 << 20
MODULE_MAX = 1 << 30  # bytes: ten times what the largest has, with all that a debugger wants


def _decompress(path: str, data: bytes) -> bytes:
    """By suffix; the module for it is imported only when it is needed."""
    suffix = os.path.splitext(path)[1]
    if suffix not in DECOMPRESSORS:
        return data
    module, opener = DECOMPRESSORS[suffix]
    unpacked = bytearray()
    try:
        with getattr(importlib.import_module(module), opener)(io.BytesIO(data)) as file:
            while len(unpacked) <= MODULE_MAX and (piece := file.read(_PIECE_LEN)):
                unpacked += piece
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001 - each decompressor has an error of its own
        raise ConfigError(f"{path} is damaged: {error}; unpack the kernel again") from None
    if len(unpacked) > MODULE_MAX:
        raise ConfigError(f"{path} unpacks to more than {MODULE_MAX >> 30} GiB: no module does")
    return bytes(unpacked)
