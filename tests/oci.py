"""Images for the tests: layers of entries that no well-meaning tool would write, and layouts."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinyvmm.images.oci import spec
from tinyvmm.images.oci.store import Image, Store

Entry = tuple[tarfile.TarInfo, bytes]


class Layer(NamedTuple):
    """A layer's blob, and the digest that its tar has, or is said to have."""

    blob: bytes
    diff_id: str

    @property
    def digest(self) -> str:
        return spec.digest_of(self.blob)


def entry(
    name: str | bytes,
    data: bytes = b"",
    kind: bytes = tarfile.REGTYPE,
    *,
    to: str | bytes = "",
    mode: int = 0o644,
    owner: tuple[int, int] = (0, 0),
    device: tuple[int, int] = (0, 0),
    mtime: int = 1_000_000_000,
    pax: Mapping[str, str] | None = None,
) -> Entry:
    """One entry of a layer."""
    info = tarfile.TarInfo(os.fsdecode(name))
    info.type, info.size, info.mode, info.mtime = kind, len(data), mode, mtime
    info.uid, info.gid = owner
    info.devmajor, info.devminor = device
    info.linkname = os.fsdecode(to)
    info.pax_headers = dict(pax or {})
    return info, data


def directory(name: str | bytes, mode: int = 0o755, owner: tuple[int, int] = (0, 0)) -> Entry:
    return entry(name, kind=tarfile.DIRTYPE, mode=mode, owner=owner)


def symlink(name: str | bytes, to: str | bytes, owner: tuple[int, int] = (0, 0)) -> Entry:
    return entry(name, kind=tarfile.SYMTYPE, to=to, owner=owner)


def hard_link(name: str | bytes, to: str | bytes) -> Entry:
    return entry(name, kind=tarfile.LNKTYPE, to=to)


def tar_of(*entries: Entry) -> bytes:
    """The tar of a layer."""
    file = io.BytesIO()
    with tarfile.open(
        fileobj=file,
        mode="w",
        format=tarfile.PAX_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def layer(*entries: Entry) -> Layer:
    """A gzipped layer of these entries."""
    tar = tar_of(*entries)
    return Layer(gzip.compress(tar, mtime=0), spec.digest_of(tar))


def image(
    path: Path,
    *layers: Layer,
    tag: str = "v1",
    config: Mapping[str, Any] | None = None,
    platform: Mapping[str, str] | None = None,
) -> str:
    """Add an image to the OCI layout `path`, made if need be; what `pull` calls it."""
    (path / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    platform = {"os": "linux", "architecture": "amd64", **(platform or {})}
    document = {
        **platform,
        "created": "1970-01-01T00:00:00Z",
        "config": config or {},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": spec.OCI_MANIFEST,
        "config": _blob(path, json.dumps(document).encode(), spec.OCI_CONFIG),
        "layers": [_blob(path, layer.blob, f"{spec.OCI_LAYER}+gzip") for layer in layers],
    }
    found = _blob(path, json.dumps(manifest).encode(), spec.OCI_MANIFEST)
    index_path = path / "index.json"
    index: dict[str, Any] = {"schemaVersion": 2, "manifests": []}
    if index_path.exists():
        index = json.loads(index_path.read_bytes())
    others = [e for e in index["manifests"] if e["annotations"][spec.REF_NAME] != tag]
    named = {**found, "platform": platform, "annotations": {spec.REF_NAME: tag}}
    index["manifests"] = [*others, named]
    index_path.write_text(json.dumps(index))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{path}:{tag}"


def _blob(path: Path, data: bytes, media_type: str) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    (path / "blobs/sha256" / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def trees(store: Store, found: Image) -> Sequence[Path]:
    """The trees of its layers, the lowest first."""
    return [Path(path) for _, path in store.reads(found)]
