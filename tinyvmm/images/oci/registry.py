"""A registry as a source: OCI distribution-spec, "Pulling".

A layer is downloaded into a file that outlives us: what is cut off, by the network or by a user, is
gone on with by Range (RFC 9110, section 14), and what turns out not to have its digest is begun
again, once.
"""

import http.client
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import IO

from tinyvmm.errors import ConfigError
from tinyvmm.images.oci import spec
from tinyvmm.images.oci.reference import Reference
from tinyvmm.images.oci.source import CHUNK, verify_file
from tinyvmm.images.oci.spec import Descriptor
from tinyvmm.images.oci.transport import AnswerError, TransientError, Transport

PARALLEL = 4  # layers at once


class RegistrySource:
    """The image `wanted` in its registry."""

    parallel = PARALLEL

    def __init__(self, wanted: Reference, *, insecure: bool = False) -> None:
        self.names = [str(wanted)]
        self._wanted = wanted
        self._transport = Transport(wanted, insecure=insecure)

    def close(self) -> None:
        """Nothing is open."""

    def manifest(self, digest: str = "") -> tuple[bytes, str]:
        """Return the image's manifest or index, or the one called `digest`, and its media type."""
        target = digest or self._wanted.target
        path = f"{self._wanted.name}/manifests/{target}"
        headers = {"Accept": ", ".join(spec.ACCEPTED)}

        def attempt() -> tuple[bytes, str]:
            with self._transport.get(path, headers) as answer:
                data = _whole(answer, spec.MANIFEST_MAX, "the manifest")
                return data, answer.headers.get("Content-Type", "")

        try:
            found = self._transport.retried("the manifest", attempt)
        except AnswerError as error:
            if error.status == 404:
                raise ConfigError(f"there is no such image: {error}") from None
            raise
        if ":" in target:
            spec.verify(found[0], target, "the manifest")
        return found

    def small(self, descriptor: Descriptor, limit: int) -> bytes:
        """Return a small blob."""

        def attempt() -> bytes:
            with self._transport.get(self._blob(descriptor), {}) as answer:
                return _whole(answer, limit, "the image's configuration")

        data = self._transport.retried("the image's configuration", attempt)
        spec.verify(data, descriptor.digest, "the image's configuration")
        return data

    def _blob(self, descriptor: Descriptor) -> str:
        return f"{self._wanted.name}/blobs/{descriptor.digest}"

    @contextmanager
    def layer(
        self, descriptor: Descriptor, partial: str, tell: Callable[[int], None]
    ) -> Iterator[IO[bytes]]:
        """Download a layer, and open it; its file goes when it is done with."""
        # What has come of a download may be another's work, and wrong from the beginning.
        fresh = not os.path.exists(partial)
        try:
            self._download(descriptor, partial, tell)
        except ConfigError:
            if fresh or os.path.exists(partial):
                raise
            self._download(descriptor, partial, tell)
        with open(partial, "rb") as file:
            yield file
        os.unlink(partial)

    def _download(self, descriptor: Descriptor, partial: str, tell: Callable[[int], None]) -> None:
        """Have all of the blob in `partial`, verified; without the file if it is not what it is."""
        told = 0

        def attempt() -> None:
            nonlocal told
            with open(partial, "ab") as file:
                if file.tell() > descriptor.size:
                    file.truncate(0)
                tell(file.tell() - told)
                told = file.tell()
                if told == descriptor.size:
                    return
                path, start = self._blob(descriptor), told
                headers = {"Range": f"bytes={start}-"} if start else {}
                with self._transport.get(path, headers) as answer:
                    if start and not _goes_on(answer, start):
                        file.truncate(0)  # then it is all of it
                        file.seek(0)
                        tell(-told)
                        told = 0
                    while told < descriptor.size and (data := _read(answer, CHUNK)):
                        file.write(data)
                        told += len(data)
                        tell(len(data))
            if told < descriptor.size:
                raise TransientError(f"it ended after {told} of {descriptor.size} bytes")

        what = f"layer {descriptor.digest[:19]}"
        self._retried_while_it_comes(what, attempt, partial, tell)
        with open(partial, "rb") as file:
            try:
                verify_file(file, descriptor)
            except ConfigError:
                os.unlink(partial)
                raise

    def _retried_while_it_comes(
        self, what: str, attempt: Callable[[], None], partial: str, tell: Callable[[int], None]
    ) -> None:
        """Try again as `retried` does, but count only tries that brought nothing."""
        again = True
        while True:
            before = os.path.getsize(partial) if os.path.exists(partial) else 0
            try:
                self._transport.retried(what, attempt, lambda: tell(0))
            except AnswerError as error:
                if error.status == 416 and before and again:  # a beginning that is none
                    again = False  # or a registry could have us begin for ever
                    os.unlink(partial)
                    continue
                raise
            except ConfigError:
                if os.path.exists(partial) and os.path.getsize(partial) > before:
                    continue
                raise
            return


def _goes_on(answer: HTTPResponse, start: int) -> bool:
    """Whether an answer is what was asked for from `start` on, and not all from the beginning."""
    content_range: str = answer.headers.get("Content-Range", "")
    return answer.status == 206 and content_range.startswith(f"bytes {start}-")


def _read(answer: HTTPResponse, size: int) -> bytes:
    try:
        return answer.read1(size)
    except (OSError, http.client.HTTPException) as error:
        raise TransientError(str(error) or type(error).__name__) from error


def _whole(answer: HTTPResponse, limit: int, what: str) -> bytes:
    data = bytearray()
    while piece := _read(answer, CHUNK):
        data += piece
        if len(data) > limit:
            raise ConfigError(f"{what} is larger than {limit} bytes")
    length = answer.headers.get("Content-Length")
    if length is not None and length.isdigit() and len(data) < int(length):
        raise TransientError(f"{what} ended after {len(data)} of {length} bytes")
    return bytes(data)
