"""What an image says of the command it is made for, and how that meets the command line.

OCI image-spec, config.md. Where a command line says otherwise, it counts, by podman's rules: words
behind `--` take the place of the image's Cmd, an --entrypoint that of its Entrypoint and makes
its Cmd void.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.images.oci.reference import check_digest
from tinyvmm.images.oci.spec import ARCHITECTURE, OS, parse_json

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ImageConfig(NamedTuple):
    """What an image's configuration says, with nothing left open."""

    entrypoint: list[str]
    cmd: list[str]
    env: list[str]
    """`NAME=VALUE` each."""
    workdir: str
    user: str
    stop_signal: str
    exposed_ports: list[str]
    """`PORT/tcp` or `PORT/udp` each."""
    volumes: list[str]
    labels: dict[str, str]
    diff_ids: list[str]
    """The digest of each layer's tar, the lowest first."""
    created: str
    architecture: str


class Command(NamedTuple):
    """What is to be run of an image."""

    argv: list[str]
    env: list[str]
    workdir: str
    user: str


def parse_config(data: bytes) -> ImageConfig:
    """Parse an image's configuration; ConfigError for what is none, or for another platform."""
    document = parse_json(data, "the image's configuration")
    inner = document.get("config")
    config = inner if isinstance(inner, dict) else {}
    rootfs = document.get("rootfs")
    diff_ids = _list(rootfs.get("diff_ids")) if isinstance(rootfs, dict) else []
    found = ImageConfig(
        entrypoint=_list(config.get("Entrypoint")),
        cmd=_list(config.get("Cmd")),
        env=[entry for entry in _list(config.get("Env")) if entry.partition("=")[0]],
        workdir=_text(config.get("WorkingDir")),
        user=_text(config.get("User")),
        stop_signal=_text(config.get("StopSignal")),
        exposed_ports=_keys(config.get("ExposedPorts")),
        volumes=_keys(config.get("Volumes")),
        labels={k: v for k, v in _dict(config.get("Labels")).items() if isinstance(v, str)},
        diff_ids=[check_digest(digest) for digest in diff_ids],
        created=_text(document.get("created")),
        architecture=_text(document.get("architecture")),
    )
    of = _text(document.get("os")) or OS
    if (of, found.architecture or ARCHITECTURE) != (OS, ARCHITECTURE):
        raise ConfigError(
            f"the image is for {of}/{found.architecture}, and this computer runs "
            f"{OS}/{ARCHITECTURE}: pull one for that"
        )
    return found


def combine(
    config: ImageConfig,
    argv: Sequence[str],
    *,
    entrypoint: Sequence[str] | None = None,
    env: Sequence[str] = (),
    workdir: str | None = None,
    user: str | None = None,
) -> Command:
    """Return what to run: the image's word, where the command line has none of its own.

    `entrypoint` None is none given; an empty one leaves the image's out. ConfigError if there is
    no command at all.
    """
    first = config.entrypoint if entrypoint is None else list(entrypoint)
    rest = list(argv) or ([] if entrypoint else config.cmd)
    if not [*first, *rest]:
        raise ConfigError("the image says no command: give one behind --")
    variables = {"PATH": DEFAULT_PATH}
    for entry in (*config.env, *env):
        name, _, value = entry.partition("=")
        variables[name] = value
    return Command(
        [*first, *rest],
        [f"{name}={value}" for name, value in variables.items()],
        workdir or config.workdir or "/",
        user or config.user or "0",
    )


def parse_entrypoint(text: str) -> list[str]:
    """Parse --entrypoint: a JSON list of words, one word, or "" for none at all."""
    if text.startswith("["):
        try:
            words = json.loads(text)
        except ValueError:
            words = None
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            return words
    return [text] if text else []


def _text(found: Any) -> str:
    return found if isinstance(found, str) and "\0" not in found else ""


def _list(found: Any) -> list[str]:
    """A list of strings; the old form of one, a single string, is one word."""
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list):
        return []
    if not all(isinstance(word, str) and "\0" not in word for word in found):
        raise ConfigError("the image's configuration has a list of words that are none")
    return found


def _dict(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _keys(found: Any) -> list[str]:
    return sorted(_dict(found))
