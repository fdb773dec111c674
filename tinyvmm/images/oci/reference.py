"""What an image is called: the names that podman, skopeo and docker users give.

    [docker://][HOST[:PORT]/]NAME[:TAG][@DIGEST]    in a registry
    oci:DIR[:TAG]                                   an OCI layout directory
    oci-archive:FILE[:TAG]                          a tar of one
    docker-archive:FILE[:NAME[:TAG]]                what `docker save` wrote
    containers-storage:NAME                         podman's own storage

A name without a host is Docker Hub's, and one without a slash is of its `library`; no tag is
`latest`. The grammar is distribution's (reference.go; OCI distribution-spec, "Pulling manifests").
"""

import os
import re
from typing import NamedTuple

from tinyvmm.errors import ConfigError

DOCKER_HUB = "docker.io"
ALGORITHMS = {"sha256": 64, "sha384": 96, "sha512": 128}
"""Digest algorithms, and how many hexadecimal digits they have."""

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")
_NAME_MAX = 255
TRANSPORTS = ("oci", "oci-archive", "docker-archive", "containers-storage")


class Reference(NamedTuple):
    """An image in a registry; `tag` or `digest` says which, and the digest counts more."""

    host: str
    name: str
    tag: str
    digest: str

    @property
    def repository(self) -> str:
        """HOST/NAME."""
        return f"{self.host}/{self.name}"

    @property
    def target(self) -> str:
        """What the registry is asked for."""
        return self.digest or self.tag

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return self.repository + tag + (f"@{self.digest}" if self.digest else "")


class Elsewhere(NamedTuple):
    """An image that is not in a registry: `transport` of TRANSPORTS, and where in it."""

    transport: str
    path: str
    which: str
    """A tag or a name; "" for the only one."""

    def __str__(self) -> str:
        return f"{self.transport}:{self.path}" + (f":{self.which}" if self.which else "")


def parse(text: str) -> Reference | Elsewhere:
    """Parse what a user gives; ConfigError says what is wrong with it."""
    transport, colon, rest = text.partition(":")
    if colon and transport in TRANSPORTS:
        return _elsewhere(transport, rest, text)
    if transport == "docker" and rest.startswith("//"):
        text = rest[2:]
    elif colon and rest.startswith("//"):
        raise ConfigError(
            f"image {text!r}: {transport}:// is no transport; give a registry's NAME[:TAG], or "
            f"{', '.join(f'{name}:' for name in TRANSPORTS)}"
        )
    return parse_name(text)


def parse_name(text: str) -> Reference:
    """Parse a name as in a registry: ConfigError for what is none."""
    rest, at, digest = text.partition("@")
    if at:
        check_digest(digest)
    head, _, last = rest.rpartition("/")
    last, colon, tag = last.partition(":")
    name = f"{head}/{last}" if head else last
    if colon and not _TAG.fullmatch(tag):
        raise ConfigError(f"image {text!r}: {tag!r} is no tag: letters, digits, _ . and -")
    host, slash, below = name.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        host, below = DOCKER_HUB, name
    if host in {"index.docker.io", "registry-1.docker.io"}:
        host = DOCKER_HUB
    if host == DOCKER_HUB and "/" not in below:
        below = f"library/{below}"
    if not _HOST.fullmatch(host) or not _NAME.fullmatch(below) or len(below) > _NAME_MAX:
        hint = ", in lower case" if below.lower() != below else ""
        raise ConfigError(f"image {text!r} is no name of one: [HOST/]NAME[:TAG][@DIGEST]{hint}")
    return Reference(host, below, tag or ("" if digest else "latest"), digest)


def check_digest(digest: str) -> str:
    """Return `digest` if it is one, ALGORITHM:HEX; ConfigError if not."""
    algorithm, _, digits = digest.partition(":")
    if not re.fullmatch(r"[0-9a-f]+", digits) or len(digits) != ALGORITHMS.get(algorithm):
        raise ConfigError(
            f"{digest!r} is no digest: {' or '.join(f'{name}:HEX' for name in ALGORITHMS)}"
        )
    return digest


def _elsewhere(transport: str, rest: str, text: str) -> Elsewhere:
    if transport == "containers-storage":
        name = re.sub(r"\A\[[^]]*\]", "", rest)
        if not name:
            raise ConfigError(f"image {text!r} names none: containers-storage:NAME")
        return Elsewhere(transport, rest, "")
    path, which = rest, ""
    if not os.path.exists(rest):  # a colon may be part of a file's name
        path, _, which = rest.partition(":")
    if not path:
        raise ConfigError(f"image {text!r} names no file: {transport}:PATH[:TAG]")
    return Elsewhere(transport, os.path.abspath(path), which)
