"""An image made ready to run: found or pulled, held in the store, and met with the command line."""

import posixpath
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.images.oci import reference
from tinyvmm.images.oci.config import Command, combine, parse_config
from tinyvmm.images.oci.pull import pull
from tinyvmm.images.oci.store import Image, Store
from tinyvmm.images.progress import Progress

POLICIES = ("missing", "always", "never")


class Prepared(NamedTuple):
    """What a run takes of an image."""

    image: Image
    reads: list[tuple[str, str]]
    """("/", host path) of each layer, the lowest first."""
    command: Command
    directories: list[str]
    """What the image has to have, and may not: mount points, volumes, the working directory."""
    stop_signal: str
    """"" for the usual one."""


def find_or_pull(
    text: str,
    store: Store,
    *,
    policy: str = "missing",
    insecure: bool = False,
    progress: Progress | None = None,
) -> Image:
    """Return the image called `text` (reference.py; or an ID), pulled as `policy` of POLICIES says.

    What is in a file or in podman's storage is looked at anew each time, unless "never".
    """
    if policy not in POLICIES:
        raise ConfigError(f"{policy!r} is no policy: give {' or '.join(POLICIES)}")
    elsewhere = text.partition(":")[0] in reference.TRANSPORTS and ":" in text
    if policy != "always" and not elsewhere:
        found = store.find(text.removeprefix("docker://"))
        if found is not None:
            return found
    if policy == "never" or text.startswith("sha256:"):
        raise ConfigError(f"image {text} is not here: tinyvmm pull {text}")
    return pull(text, store, insecure=insecure, progress=progress)


def prepare(
    text: str,
    argv: Sequence[str],
    cleanup: ExitStack,
    *,
    policy: str = "missing",
    insecure: bool = False,
    entrypoint: Sequence[str] | None = None,
    env: Sequence[str] = (),
    workdir: str | None = None,
    user: str | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
) -> Prepared:
    """Make an image ready, and keep its layers in the store until `cleanup`.

    The options are those of `find_or_pull` and of `combine`. ConfigError for what cannot be.
    """
    store = Store() if store is None else store
    found = find_or_pull(text, store, policy=policy, insecure=insecure, progress=progress)
    with store.shared():
        store.hold(found, cleanup)
        config = parse_config(store.config(found))
        reads = store.reads(found)
    command = combine(config, argv, entrypoint=entrypoint, env=env, workdir=workdir, user=user)
    command = command._replace(workdir=_absolute(command.workdir))
    made = ["/proc", "/sys", "/dev", "/run", "/tmp"]
    for path in [*config.volumes, *([] if workdir else [command.workdir])]:
        names = _absolute(path).split("/")[1:]
        made += ["/" + "/".join(names[:end]) for end in range(1, len(names) + 1)]
    return Prepared(
        found,
        reads,
        command,
        [path for path in dict.fromkeys(made) if path != "/"],
        config.stop_signal,
    )


def _absolute(path: str) -> str:
    """A path of the image's as one of the guest's: whole, and plain."""
    return posixpath.normpath("/" + path).replace("//", "/")
