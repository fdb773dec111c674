"""What goes wrong with a store's own directory, told with what helps."""

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC

from tinyvmm.errors import ConfigError


@contextmanager
def storing(what: str, path: str, room: str = "make room there") -> Iterator[None]:
    """Have an OSError be a ConfigError that names the store; `room` says how to make some."""
    try:
        yield
    except OSError as error:
        remedy = "set XDG_DATA_HOME to a directory you can write"
        if error.errno in {ENOSPC, EDQUOT}:
            remedy = f"{room}, or set XDG_DATA_HOME to a directory on another disk"
        where = error.filename or path
        raise ConfigError(f"{what} store {where}: {error.strerror or error}; {remedy}") from None
