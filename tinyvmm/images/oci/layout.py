"""Images in files: OCI layouts (image-layout.md), and archives that `docker save` wrote.

Either is a set of named files, in a directory or in a tar; `open_source` looks which it is. What is
in a tar is read where it lies.
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

from tinyvmm.errors import ConfigError
from tinyvmm.images.oci import reference, spec
from tinyvmm.images.oci.source import Source, verify_file
from tinyvmm.images.oci.spec import Descriptor
from tinyvmm.regular import regular


class Files(Protocol):
    """Named files; names have slashes, and are relative."""

    def open(self, name: str) -> IO[bytes]:
        """Open one for reading; FileNotFoundError if there is none."""

    def close(self) -> None:
        """Let go of them."""


class DirectoryFiles:
    """The files of a directory."""

    def __init__(self, path: str) -> None:
        self._path = path

    def open(self, name: str) -> IO[bytes]:
        """Open one; an archive's own list may name any file, but gets none of another's."""
        if os.path.isabs(name) or os.path.normpath(name).split("/")[0] == "..":
            raise FileNotFoundError(2, "it leads out of the image", name)
        return open(os.path.join(self._path, name), "rb", opener=regular)

    def close(self) -> None:
        """Nothing is open."""


class TarFiles:
    """The files of a tar archive, compressed or not."""

    def __init__(self, path: str) -> None:
        try:
            self._tar = tarfile.open(path)  # noqa: SIM115 - closed by `close`
            self._members = {os.path.normpath(m.name): m for m in self._tar}
        except (tarfile.TarError, EOFError, ValueError) as error:
            why = str(error).partition(":")[0]
            if "\n" in str(error):  # a line for every compression there is
                why = "no tar, compressed or not"
            raise ConfigError(f"{path} is no archive of an image: {why}") from None
        self._path = path

    def open(self, name: str) -> IO[bytes]:
        """Open one; a link is what it leads to (old archives have them for layers alike)."""
        member = self._members.get(os.path.normpath(name))
        for _ in range(8):
            if member is None or not (member.issym() or member.islnk()):
                break
            above = os.path.dirname(member.name) if member.issym() else ""
            member = self._members.get(os.path.normpath(os.path.join(above, member.linkname)))
        contents = None if member is None else self._tar.extractfile(member)
        if contents is None:
            raise FileNotFoundError(2, "no such file in the archive", name)
        return contents

    def close(self) -> None:
        """Close the archive."""
        self._tar.close()


class _FileSource:
    """What layouts and archives have in common."""

    parallel = 1  # a tar has one position

    def __init__(self, files: Files, shown: str) -> None:
        self.names: list[str] = []
        self._files = files
        self._shown = shown

    def _read(self, name: str, limit: int) -> bytes:
        try:
            with self._files.open(name) as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise ConfigError(f"{self._shown}: {name}: {error.strerror}") from None
        except (tarfile.TarError, EOFError) as error:
            raise ConfigError(f"{self._shown}: {name}: {error}") from None
        if len(data) > limit:
            raise ConfigError(f"{self._shown}: {name} is larger than {limit} bytes")
        return data

    @contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        try:
            file = self._files.open(name)
        except OSError as error:
            raise ConfigError(f"{self._shown}: {name}: {error.strerror}") from None
        with file:
            yield file

    def close(self) -> None:
        self._files.close()


class OciLayout(_FileSource):
    """An OCI layout; `which` is a tag or a digest, "" for the only image."""

    def __init__(self, files: Files, shown: str, which: str, base: str) -> None:
        super().__init__(files, shown)
        self._index = self._read("index.json", spec.MANIFEST_MAX)
        found = spec.parse_index(self._index)
        tags = {entry.annotations.get(spec.REF_NAME, "") for entry in found}
        if which:
            tag = which.removeprefix("@")
            found = [e for e in found if tag in {e.annotations.get(spec.REF_NAME), e.digest}]
        elif len(tags) > 1:
            names = ", ".join(sorted(tags - {""}))
            raise ConfigError(f"{shown} has several images: name one of {names}")
        if not found:
            names = ", ".join(sorted(tags - {""})) or "none with a name"
            raise ConfigError(f"{shown} has no image {which or 'at all'}; it has {names}")
        self._found = found
        tag = found[0].annotations.get(spec.REF_NAME, "")
        if tag:
            self.names = [str(_named(tag, base))]

    def manifest(self, digest: str = "") -> tuple[bytes, str]:
        """Return a manifest of the layout."""
        if not digest:
            entry = self._found[0] if len(self._found) == 1 else spec.choose(self._found)
        else:
            entry = Descriptor(digest, spec.MANIFEST_MAX)
        data = self._read(_blob(entry.digest), spec.MANIFEST_MAX)
        spec.verify(data, entry.digest, "the manifest")
        return data, entry.media_type

    def small(self, descriptor: Descriptor, limit: int) -> bytes:
        """Return a small blob."""
        data = self._read(_blob(descriptor.digest), limit)
        spec.verify(data, descriptor.digest, "the image's configuration")
        return data

    @contextmanager
    def layer(
        self,
        descriptor: Descriptor,
        partial: str,  # noqa: ARG002 - it is all here
        tell: Callable[[int], None],
    ) -> Iterator[IO[bytes]]:
        """Open a layer, once it has been verified."""
        with self._opened(_blob(descriptor.digest)) as file:
            verify_file(file, descriptor, tell)
            file.seek(0)
            yield file


class DockerArchive(_FileSource):
    """An archive that `docker save` or `podman save` wrote; `which` is a name in it."""

    def __init__(self, files: Files, shown: str, which: str) -> None:
        super().__init__(files, shown)
        if not _has(files, "manifest.json"):
            raise ConfigError(f"{shown} is no image: it has neither index.json nor manifest.json")
        entry = self._entry(spec.parse_json(b'{"": %s}' % self._read_list(), shown)[""], which)
        config = self._read(str(entry.get("Config", "")), spec.CONFIG_MAX)
        self.names = [str(reference.parse_name(name)) for name in _words(entry.get("RepoTags"))]
        self._config = config
        members = _words(entry.get("Layers"))
        rootfs = spec.parse_json(config, "the image's configuration").get("rootfs")
        diff_ids = _words(rootfs.get("diff_ids")) if isinstance(rootfs, dict) else []
        if len(members) != len(diff_ids):
            raise ConfigError(f"{shown}: it has {len(members)} layers for {len(diff_ids)} diff_ids")
        # A layer is known by its diff_id here, and verified by that when it is unpacked.
        self._members = dict(zip(diff_ids, members, strict=True))

    def _read_list(self) -> bytes:
        return self._read("manifest.json", spec.MANIFEST_MAX)

    def _entry(self, found: Any, which: str) -> dict[str, Any]:
        entries = [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []
        if which:
            wanted = str(reference.parse_name(which))
            fitting = [
                e
                for e in entries
                if wanted in [str(reference.parse_name(n)) for n in _words(e.get("RepoTags"))]
            ]
        else:
            fitting = entries
        if len(fitting) != 1:
            names = ", ".join(n for e in entries for n in _words(e.get("RepoTags"))) or "none named"
            many = "several images: name one of" if fitting else "no such image; it has"
            raise ConfigError(f"{self._shown} has {many} {names}")
        return fitting[0]

    def manifest(self, digest: str = "") -> tuple[bytes, str]:  # noqa: ARG002 - it is the only one
        """Return a manifest made of what the archive says."""
        import json

        layers = []
        for diff_id, name in self._members.items():
            with self._opened(name) as file:
                layers.append({"digest": diff_id, "size": file.seek(0, os.SEEK_END)})
        config = {"digest": spec.digest_of(self._config), "size": len(self._config)}
        document = {"schemaVersion": 2, "config": config, "layers": layers}
        return json.dumps(document).encode(), spec.DOCKER_MANIFEST

    def small(self, descriptor: Descriptor, limit: int) -> bytes:  # noqa: ARG002
        """Return the configuration."""
        return self._config

    @contextmanager
    def layer(
        self,
        descriptor: Descriptor,
        partial: str,  # noqa: ARG002 - it is all here
        tell: Callable[[int], None],
    ) -> Iterator[IO[bytes]]:
        """Open a layer."""
        with self._opened(self._members[descriptor.digest]) as file:
            tell(descriptor.size)
            yield file


def open_source(where: reference.Elsewhere) -> Source:
    """Open the layout or archive; ConfigError if there is none."""
    shown = f"{where.transport}:{where.path}"
    is_directory = os.path.isdir(where.path)
    if not os.path.exists(where.path):
        raise ConfigError(f"{shown}: there is no such {_expected(where.transport)}")
    if not is_directory and not os.path.isfile(where.path):
        raise ConfigError(f"{shown}: no regular file, which is read to and fro; save it to one")
    if where.transport == "oci" and not is_directory:
        raise ConfigError(f"{shown}: a file; give oci-archive:{where.path}")
    try:
        files: Files = DirectoryFiles(where.path) if is_directory else TarFiles(where.path)
    except OSError as error:
        raise ConfigError(f"{shown}: {error.strerror or error}") from None
    try:
        base = re.sub(r"\.(tar|oci|tgz|gz)\b.*", "", os.path.basename(where.path))
        # Recent ones of `docker save` are both; that name is what says which is meant.
        if where.transport == "docker-archive" and _has(files, "manifest.json"):
            return DockerArchive(files, shown, where.which)
        if _has(files, "index.json"):
            return OciLayout(files, shown, where.which, base)
        return DockerArchive(files, shown, where.which)
    except BaseException:
        files.close()
        raise


def _expected(transport: str) -> str:
    return "directory" if transport == "oci" else "file"


def _has(files: Files, name: str) -> bool:
    try:
        files.open(name).close()
    except OSError:
        return False
    return True


def _named(tag: str, base: str) -> reference.Reference:
    """What an image of a layout is called: its tag may be a whole name."""
    if "/" in tag or ":" in tag:
        return reference.parse_name(tag)
    plain = re.sub(r"[^a-z0-9]+", "-", base.lower()).strip("-") or "image"
    return reference.parse_name(f"localhost/{plain}:{tag}")


def _blob(digest: str) -> str:
    algorithm, _, digits = reference.check_digest(digest).partition(":")
    return f"blobs/{algorithm}/{digits}"


def _words(found: Any) -> list[str]:
    return [word for word in found if isinstance(word, str)] if isinstance(found, list) else []
