"""Where an image comes from, as pull sees it: manifests, small blobs, and layers as files."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import IO, Protocol

from tinyvmm.errors import ConfigError
from tinyvmm.images.oci.spec import Descriptor

CHUNK = 1 << 18


class Source(Protocol):
    """An image that is somewhere else; what it gives has been verified."""

    names: list[str]
    """What the store is to call it."""
    parallel: int
    """How many layers may be asked for at once."""

    def manifest(self, digest: str = "") -> tuple[bytes, str]:
        """Return the image's manifest or index, or the one called `digest`, and its media type."""

    def small(self, descriptor: Descriptor, limit: int) -> bytes:
        """Return a blob of `limit` bytes at most."""

    def layer(
        self, descriptor: Descriptor, partial: str, tell: Callable[[int], None]
    ) -> AbstractContextManager[IO[bytes]]:
        """Open a layer's blob at its beginning, once all of it is here; it can be sought.

        `partial` is a file for its bytes, which may have some of a download that was cut;
        `tell` is called with how many bytes have come, and raises to break it off.
        """

    def close(self) -> None:
        """Let go of it."""


def verify_file(
    file: IO[bytes], descriptor: Descriptor, tell: Callable[[int], None] = lambda _: None
) -> None:
    """Raise ConfigError unless what follows in `file` has the descriptor's length and digest."""
    algorithm = descriptor.digest.partition(":")[0]
    hashed, size = hashlib.new(algorithm), 0
    while data := file.read(CHUNK):
        hashed.update(data)
        size += len(data)
        tell(len(data))
    if size != descriptor.size or f"{algorithm}:{hashed.hexdigest()}" != descriptor.digest:
        raise ConfigError(
            f"blob {descriptor.digest[:19]} is corrupted: it is not what its digest says; "
            "get the image anew"
        )
