"""A directory becomes a layer: the other way round than unpack.

What a write tree of a union has taken (tinyvmm.fileserver.writetree), or any directory, is written
as an OCI layer (image-spec, layer.md): whiteouts in any of the forms of tinyvmm.fileserver.whiteout
become files `.wh.NAME`, opaque directories have a `.wh..wh..opq`, and owners, kinds and attributes
kept beside the files are those of the entries. Entries are in the order of their names, so that the
same tree gives the same layer.
"""

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import IO, Any, NamedTuple, cast

from tinyvmm.fileserver import beside
from tinyvmm.fileserver.beside import Notes
from tinyvmm.fileserver.hostfile import fd_path, open_contents, open_path
from tinyvmm.fileserver.whiteout import (
    NAME_MARK,
    NAME_OPAQUE,
    NAME_PREFIX,
    PRIVATE_XATTRS,
    is_whiteout,
    layer_xattr,
)
from tinyvmm.fileserver.writetree import WORK_NAME
from tinyvmm.images.oci import spec
from tinyvmm.images.oci.spec import Descriptor

_XATTR = "SCHILY.xattr."
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


class Layer(NamedTuple):
    """A layer that has been written: its blob, and the digest of its tar."""

    blob: Descriptor
    diff_id: str


class _Hashed:
    """A file on its way out: hashed and counted."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"


class LayerWriter:
    """Writes a layer to `file`, gzipped or, without `compress`, as it is."""

    def __init__(self, file: IO[bytes], *, compress: bool = True) -> None:
        self._compressed = compress
        self._blob = _Hashed(file)
        self._close = ExitStack()
        self._tar_bytes = self._blob
        if compress:
            zipped = gzip.GzipFile(fileobj=cast("IO[bytes]", self._blob), mode="wb", mtime=0)
            self._close.callback(zipped.close)
            self._tar_bytes = _Hashed(cast("IO[bytes]", zipped))
        self._tar = tarfile.open(  # noqa: SIM115 - closed by `close`
            fileobj=cast("IO[bytes]", self._tar_bytes),
            mode="w|",
            format=tarfile.PAX_FORMAT,
            encoding="utf-8",
            errors="surrogateescape",
        )

    def add(self, entry: tarfile.TarInfo, contents: IO[bytes] | None = None) -> None:
        """Add one entry."""
        self._tar.addfile(entry, contents)

    def whiteout(self, path: bytes) -> None:
        """Say that what lower layers have at `path` is gone."""
        head, _, name = path.rpartition(b"/")
        self.add(tarfile.TarInfo(os.fsdecode(os.path.join(head, NAME_PREFIX + name))))

    def opaque(self, path: bytes) -> None:
        """Say that what lower layers have in the directory `path` is gone."""
        self.add(tarfile.TarInfo(os.fsdecode(os.path.join(path, NAME_OPAQUE))))

    def tree(self, path: str) -> None:
        """Add everything in the directory `path`, which nobody changes meanwhile."""
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _TreeReader(self, fd).read()
        finally:
            os.close(fd)

    def close(self) -> Layer:
        """End the layer, and say what it is; `file` stays open."""
        self._tar.close()
        self._close.close()
        media_type = spec.OCI_LAYER + ("+gzip" if self._compressed else "")
        blob = Descriptor(self._blob.digest, self._blob.size, media_type)
        return Layer(blob, self._tar_bytes.digest)


class _TreeReader:
    """Walks one directory for a LayerWriter; owners are those of a write tree."""

    def __init__(self, writer: LayerWriter, root: int) -> None:
        self._writer = writer
        self._root = root
        # A write tree has records where it could not do without; in it they count as well.
        self._notes = beside.notes_of(root) or Notes(None)
        self._by_name = _exists(NAME_MARK, root)
        self._seen: dict[tuple[int, int], str] = {}

    def read(self) -> None:
        self._directory(self._root, b"")

    def _directory(self, fd: int, path: bytes) -> None:
        if layer_xattr(fd_path(fd), b"opaque") == b"y":
            self._writer.opaque(path)
        with os.scandir(fd_path(fd)) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            if self._by_name and name.startswith(NAME_PREFIX):
                if name != NAME_MARK:  # it is in a layer's form already
                    self._writer.add(tarfile.TarInfo(os.fsdecode(os.path.join(path, name))))
            elif path or name != WORK_NAME:
                inner = open_path(name, fd)
                try:
                    self._entry(inner, os.path.join(path, name))
                finally:
                    os.close(inner)

    def _entry(self, fd: int, path: bytes) -> None:
        on_host = os.fstat(fd)
        if is_whiteout(fd_path(fd), on_host):
            self._writer.whiteout(path)
            return
        st = beside.presented(fd, on_host, self._notes)
        kind = stat.S_IFMT(st.st_mode)
        if kind not in _TYPES:
            return  # a socket: a tar has no such thing
        entry = self._described(fd, path, st)
        inode = (st.st_dev, st.st_ino)
        if kind != stat.S_IFDIR and st.st_nlink > 1:
            if inode in self._seen:
                entry.type, entry.linkname, entry.size = tarfile.LNKTYPE, self._seen[inode], 0
                self._writer.add(entry)
                return
            self._seen[inode] = entry.name
        if kind != stat.S_IFREG:
            self._writer.add(entry)
            if kind == stat.S_IFDIR:
                self._directory(fd, path)
            return
        with os.fdopen(open_contents(fd, kind, os.O_RDONLY, ours=True), "rb") as contents:
            self._writer.add(entry, contents)

    def _described(self, fd: int, path: bytes, st: os.stat_result) -> tarfile.TarInfo:
        entry = tarfile.TarInfo(os.fsdecode(path))
        kind = stat.S_IFMT(st.st_mode)
        entry.type = _TYPES[kind]
        entry.mode, entry.uid, entry.gid = stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid
        entry.mtime = st.st_mtime_ns // 10**9
        headers = {}
        if st.st_mtime_ns % 10**9:
            whole, part = divmod(st.st_mtime_ns, 10**9)
            headers["mtime"] = f"{whole}.{part:09}"
        if kind == stat.S_IFREG:
            entry.size = st.st_size
        elif kind == stat.S_IFLNK:
            entry.linkname = os.fsdecode(beside.read_link(fd))
        elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
            entry.devmajor, entry.devminor = os.major(st.st_rdev), os.minor(st.st_rdev)
        entry.pax_headers = headers | _xattrs(fd)
        return entry


def _xattrs(fd: int) -> dict[str, str]:
    """The attributes a guest sees, as pax records."""
    path, found = fd_path(fd), {}
    try:
        names = [os.fsencode(name) for name in os.listxattr(path)]
    except OSError:
        return {}  # a file system that has none
    for name in names:
        shown = name.removeprefix(beside.XATTR_PREFIX)
        if not shown.startswith(PRIVATE_XATTRS):
            found[_XATTR + os.fsdecode(shown)] = os.fsdecode(os.getxattr(path, name))
    return found


def write_layout(
    path: str,
    layers: Sequence[tuple[Layer, IO[bytes]]],
    *,
    tag: str,
    config: Mapping[str, Any] | None = None,
    platform: Mapping[str, str] | None = None,
    created: str = "1970-01-01T00:00:00Z",
) -> Descriptor:
    """Add an image to the OCI layout directory `path`, made if need be; returns its manifest.

    `layers` are the lowest first, each with a file of its blob; `config` is what the image's
    configuration has as `config` (Entrypoint, Env and so on); `platform` is linux/amd64.
    """
    os.makedirs(os.path.join(path, "blobs", "sha256"), exist_ok=True)
    for layer, blob in layers:
        _write_blob(path, layer.blob.digest, blob)
    platform = {"os": spec.OS, "architecture": spec.ARCHITECTURE, **(platform or {})}
    document = {
        **platform,
        "created": created,
        "config": config or {},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer, _ in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": spec.OCI_MANIFEST,
        "config": _json_blob(path, document, spec.OCI_CONFIG),
        "layers": [_descriptor(layer.blob) for layer, _ in layers],
    }
    entry = _json_blob(path, manifest, spec.OCI_MANIFEST)
    index_path = os.path.join(path, "index.json")
    index: dict[str, Any] = {"schemaVersion": 2, "mediaType": spec.OCI_INDEX, "manifests": []}
    if os.path.exists(index_path):
        with open(index_path, encoding="utf-8") as file:
            index = json.load(file)
    others = [e for e in index["manifests"] if e.get("annotations", {}).get(spec.REF_NAME) != tag]
    named = {**entry, "platform": platform, "annotations": {spec.REF_NAME: tag}}
    index["manifests"] = [*others, named]
    for name, content in (("index.json", index), ("oci-layout", {"imageLayoutVersion": "1.0.0"})):
        with open(os.path.join(path, name), "w", encoding="utf-8") as file:
            json.dump(content, file)
    return Descriptor(entry["digest"], entry["size"], entry["mediaType"])


def _json_blob(path: str, document: Mapping[str, Any], media_type: str) -> dict[str, Any]:
    data = json.dumps(document).encode()
    digest = spec.digest_of(data)
    _write_blob(path, digest, io.BytesIO(data))
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _descriptor(blob: Descriptor) -> dict[str, Any]:
    return {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}


def _write_blob(path: str, digest: str, contents: IO[bytes]) -> None:
    import shutil

    with open(os.path.join(path, "blobs", *digest.split(":")), "wb") as file:
        shutil.copyfileobj(contents, file)


def _exists(name: bytes, dir_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
