"""One tree of files into a guest, or out of it: what `tinyvmm cp` and Machine.put and get do.

As cp(1): a directory becomes the destination if that is not there, and a directory in it if it is
one; with /. at its end, what is in it is copied. A file becomes the destination, or a file in it.
"""

import os
from collections.abc import Callable

from tinyvmm.errors import ConfigError
from tinyvmm.inside.guest_calls import Guest
from tinyvmm.inside.guest_files import look, put, walk
from tinyvmm.tree_entries import save, walk_host


def check_source(source: str) -> None:
    """ConfigError if there is no such file here."""
    if not os.path.lexists(source):
        raise ConfigError(f"there is no {source}")


def copy_in(guest: Guest, source: str, dest: str) -> None:
    """Copy from here to `dest`, an absolute path of the guest. ConfigError names what failed."""
    check_source(source)
    found = look(guest, dest)
    there = None if found is None else found.is_directory
    directory = os.path.isdir(source) and (source.endswith("/") or not os.path.islink(source))
    put(guest, walk_host(source), _place(source, dest, directory=directory, there=there))


def copy_out(guest: Guest, source: str, dest: str, warn: Callable[[str], None]) -> None:
    """Copy from `source`, an absolute path of the guest, to here. ConfigError names what failed.

    `warn` takes a line for each thing that is left out.
    """
    found = look(guest, source)
    there = os.path.isdir(dest) if os.path.lexists(dest) else None
    directory = found is not None and found.is_directory
    save(walk(guest, source), _place(source, dest, directory=directory, there=there), warn)


def _place(source: str, dest: str, *, directory: bool, there: bool | None) -> str:
    """Return what a source becomes; `there` says if `dest` is a directory, None if nothing is."""
    name = os.path.basename(source.rstrip("/"))
    if there and name not in {".", "..", ""}:
        return os.path.join(dest, name)
    if there is None and dest.endswith("/") and not directory:
        raise ConfigError(f"{dest} is no directory that is there")
    if directory and there is False:
        raise ConfigError(f"{dest} is a file, and {source} is a directory")
    return dest.rstrip("/") or "/"
