"""Zstandard (RFC 8878) unpacked: by the standard library, or else by the program `zstd`.

Python has it from 3.14 on; distributions compress kernels' modules and packages with it.
"""

import importlib
import os
import threading
from typing import Any, Protocol

from tinyvmm.errors import ConfigError

_COPY_LEN = 1 << 16


class Readable(Protocol):
    """Compressed bytes, read forwards."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, none at the end."""


class Reader:
    """A stream of decompressed bytes; `read` raises ValueError where it is damaged."""

    def __init__(self, source: Readable) -> None:
        """Decompress what `source` gives; ConfigError if nothing here can."""
        self._source = source
        self._process: Any = None
        module = _module()
        if module is not None:
            self._error: type[Exception] = module.ZstdError
            self._file: Any = module.ZstdFile(source)
            return
        import subprocess

        self._error = ValueError
        self._process = subprocess.Popen(
            _command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._file = self._process.stdout
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        """On a thread: hand the program its input, until either has had enough."""
        stdin = self._process.stdin
        try:
            while data := self._source.read(_COPY_LEN):
                stdin.write(data)
            stdin.close()
        except BrokenPipeError:
            pass  # its end, or ours: `read` tells
        except Exception as error:  # noqa: BLE001 (raised again by `read`, whose caller it concerns)
            self._failed.append(error)
            self._process.kill()

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, fewer only at the end."""
        try:
            data = bytes(self._file.read(size))
        except self._error as error:
            raise ValueError(str(error)) from None
        if self._process is not None and (size < 0 or len(data) < size) and self._process.wait():
            self._thread.join()
            raise self._failed[0] if self._failed else ValueError("zstd cannot unpack it")
        return data

    def close(self) -> None:
        """Let go of it, read or not."""
        if self._process is None:
            self._file.close()
            return
        self._process.kill()
        self._process.wait()
        self._thread.join()
        self._process.stdout.close()
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            return  # what was still buffered for it

    def __enter__(self) -> "Reader":
        """Be closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def _module() -> Any:
    try:
        return importlib.import_module("compression.zstd")
    except ImportError:
        return None


def _command() -> list[str]:
    from shutil import which

    program = which("zstd", path=os.environ.get("PATH"))
    if program is None:
        raise ConfigError(
            "it is compressed with zstd, which neither this Python (3.14 can) nor this computer "
            "has; install the package zstd"
        )
    return [program, "-dcq"]
