"""zstd (RFC 8878) through Python's own module, from 3.14 on, or the program `zstd`."""

import os
import shutil
import subprocess
from importlib import import_module
from typing import IO, cast

from tinyvmm.errors import ConfigError


class _Piped:
    """What the program writes, for reading; an error of it is an error of the last read."""

    def __init__(self, program: str, file: IO[bytes]) -> None:
        os.lseek(file.fileno(), 0, os.SEEK_SET)  # whatever has been read ahead
        self._process = subprocess.Popen(
            [program, "-dcq"],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def read(self, size: int) -> bytes:
        if self._process.stdout is None:
            return b""
        data = self._process.stdout.read(size)
        if not data and self._process.wait():
            raise EOFError("zstd cannot decompress it")
        return data

    def close(self) -> None:
        self._process.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait()


def open_zstd(file: IO[bytes]) -> IO[bytes]:
    """Return the decompressed bytes of `file`, which is at its beginning and has a descriptor.

    Raises ConfigError if neither module nor program is there.
    """
    try:
        module = import_module("compression.zstd")  # PEP 784
    except ImportError:
        program = shutil.which("zstd")
        if program is None:
            raise ConfigError(
                "a layer is compressed with zstd, which this Python cannot read: install the "
                "program zstd, or use Python 3.14"
            ) from None
        return cast("IO[bytes]", _Piped(program, file))
    return cast("IO[bytes]", module.open(file))
