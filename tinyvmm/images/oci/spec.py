"""Manifests and indexes: what an image consists of, as registries and layouts say it.

OCI image-spec (manifest.md, image-index.md, descriptor.md) and Docker's image manifest version 2,
schema 2, which differ in little but the names of the media types. Everything here comes from
outside and is checked before it is used: digests above all, since they become file names.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.images.oci.reference import check_digest

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+"
INDEXES = {OCI_INDEX, DOCKER_INDEX}
ACCEPTED = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX)
REF_NAME = "org.opencontainers.image.ref.name"

OS, ARCHITECTURE = "linux", "amd64"
_VARIANTS = ("", "v1", "v2", "v3")  # of x86-64: the older runs on more
MANIFEST_MAX = 4 << 20  # bytes: distribution-spec, "Pushing Manifests"
CONFIG_MAX = 8 << 20
LAYERS_MAX = 500


class Descriptor(NamedTuple):
    """What a blob is: its digest, length in bytes and media type."""

    digest: str
    size: int
    media_type: str = ""
    platform: Mapping[str, str] = {}
    annotations: Mapping[str, str] = {}


class Manifest(NamedTuple):
    """An image for one platform."""

    config: Descriptor
    layers: list[Descriptor]


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object; ConfigError names `what` if it is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{what} is no JSON object")
    return found


def media_type_of(data: bytes, told: str = "") -> str:
    """Which of ACCEPTED a document is: by its own word, else by what was `told`, else its look."""
    document = parse_json(data, "the manifest")
    own = document.get("mediaType")
    if isinstance(own, str) and own:
        return own
    told = told.partition(";")[0].strip()
    if told in ACCEPTED:
        return told
    if document.get("schemaVersion") == 1:
        return DOCKER_SCHEMA_1
    return OCI_INDEX if "manifests" in document else OCI_MANIFEST


def parse_index(data: bytes) -> list[Descriptor]:
    """Parse an index's descriptors, in order."""
    return _descriptors(parse_json(data, "the image index").get("manifests"), "the image index")


def parse_manifest(data: bytes, media_type: str) -> Manifest:
    """Parse a manifest of one platform; ConfigError for what is none."""
    if media_type.startswith(DOCKER_SCHEMA_1):
        raise ConfigError(
            "the image is of Docker's schema 1, which was given up in 2017: push it again with a "
            "newer docker, or convert it with skopeo copy"
        )
    if media_type not in {OCI_MANIFEST, DOCKER_MANIFEST}:
        raise ConfigError(f"not an image, but {media_type[:80]}")
    document = parse_json(data, "the manifest")
    layers = _descriptors(document.get("layers"), "the manifest")
    if len(layers) > LAYERS_MAX:
        raise ConfigError(f"the image has {len(layers)} layers: more than {LAYERS_MAX}")
    return Manifest(_descriptor(document.get("config"), "the manifest's config"), layers)


def choose(found: list[Descriptor]) -> Descriptor:
    """Return what of an index is for this platform; ConfigError says what there is instead."""

    def rank(entry: Descriptor) -> int:
        variant = entry.platform.get("variant", "")
        return _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)

    fitting = [
        entry
        for entry in found
        if entry.platform.get("os", OS) == OS
        and entry.platform.get("architecture", ARCHITECTURE) == ARCHITECTURE
    ]
    if not fitting:
        known = sorted({_platform(e) for e in found} - {"unknown/unknown"})
        raise ConfigError(
            f"the image is not for {OS}/{ARCHITECTURE}, only for {', '.join(known) or 'nothing'}"
        )
    return min(fitting, key=rank)  # the first of them that are alike


def verify(data: bytes, digest: str, what: str) -> None:
    """Raise ConfigError unless `data` has that digest."""
    algorithm = check_digest(digest).partition(":")[0]
    if f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}" != digest:
        raise ConfigError(f"{what} is corrupted: it has not the digest {digest}")


def digest_of(data: bytes) -> str:
    """Return the sha256 digest of `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _platform(entry: Descriptor) -> str:
    parts = [entry.platform.get(key, "") for key in ("os", "architecture", "variant")]
    return "/".join(part for part in parts if part)


def _descriptors(found: Any, what: str) -> list[Descriptor]:
    if not isinstance(found, list):
        raise ConfigError(f"{what} has no list where one is due")
    return [_descriptor(entry, what) for entry in found]


def _descriptor(found: Any, what: str) -> Descriptor:
    match found:
        case {"digest": str(digest), "size": int(size)} if size >= 0:
            return Descriptor(
                check_digest(digest),
                size,
                str(found.get("mediaType") or ""),
                _strings(found.get("platform")),
                _strings(found.get("annotations")),
            )
    raise ConfigError(f"{what} has a descriptor without digest and size")


def _strings(found: Any) -> dict[str, str]:
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}
