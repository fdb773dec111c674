"""Images for the tests: layers of entries that no well-meaning tool would write, and layouts."""

import io
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tinyvmm.images.oci.layer import Layer, LayerWriter, write_layout
from tinyvmm.images.oci.spec import Descriptor
from tinyvmm.images.oci.store import Image, Store

Entry = tuple[tarfile.TarInfo, bytes]
Written = tuple[Layer, IO[bytes]]


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


def layer(*entries: Entry, compress: bool = True) -> Written:
    """A layer of these entries, and its blob."""
    blob = io.BytesIO()
    writer = LayerWriter(blob, compress=compress)
    for info, data in entries:
        writer.add(info, io.BytesIO(data))
    written = writer.close()
    blob.seek(0)
    return written, blob


def tar_of(entries: Iterable[Entry]) -> bytes:
    """The tar of a layer."""
    return layer(*entries, compress=False)[1].read()


def of_blob(data: bytes, diff_id: str, media_type: str = "") -> Written:
    """A layer of which this is the blob, whatever it is."""
    import hashlib

    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return Layer(Descriptor(digest, len(data), media_type), diff_id), io.BytesIO(data)


def image(
    path: Path,
    *layers: Written,
    tag: str = "v1",
    config: Mapping[str, Any] | None = None,
    platform: Mapping[str, str] | None = None,
) -> str:
    """Add an image to the layout `path`; what `pull` calls it."""
    for _, blob in layers:
        blob.seek(0)
    write_layout(str(path), layers, tag=tag, config=config, platform=platform)
    return f"oci:{path}:{tag}"


def trees(store: Store, found: Image) -> Sequence[Path]:
    """The trees of its layers, the lowest first."""
    return [Path(path) for _, path in store.reads(found)]
