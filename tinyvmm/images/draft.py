"""A file that appears under its name when it is complete, and not before."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tinyvmm.errors import ConfigError


@contextmanager
def drafted(path: str) -> Iterator[str]:
    """Give the name of a file to be made beside `path`, which it becomes at the end.

    If anything is raised, there is no such file and `path` is what it was. A link stays one: what
    it leads to is replaced. ConfigError if `path` is there and no regular file, which to replace
    would be to lose a device, and OSError if it cannot be.
    """
    target = os.path.realpath(path)
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(target).st_mode):
            raise ConfigError(f"cannot write {path}: it is there, and no regular file: name a file")
    draft = f"{target}.{os.getpid()}.tmp"
    try:
        yield draft
        os.replace(draft, target)
    finally:
        with suppress(FileNotFoundError):  # it has its name
            os.unlink(draft)
