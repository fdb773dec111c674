"""Who we are to a registry: what `docker login`, `podman login` and `skopeo login` have kept.

The first of these files that has something for the registry says it (containers-auth.json(5)):

    $REGISTRY_AUTH_FILE, and then no other
    $XDG_RUNTIME_DIR/containers/auth.json
    $XDG_CONFIG_HOME/containers/auth.json, by default ~/.config
    $DOCKER_CONFIG/config.json, by default ~/.docker

In each, `auths` has keys HOST[/NAMESPACE...], the longest that fits counts; `credHelpers` and
`credsStore` name programs docker-credential-NAME to ask (docker-credential-helpers' protocol).
"""

import base64
import binascii
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.images.oci.reference import DOCKER_HUB, Reference

HELPER_TIMEOUT = 30.0  # seconds
_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io")


class Credentials(NamedTuple):
    """A user and password, or an identity token that stands for both."""

    user: str
    password: str
    identity_token: str = ""

    def basic(self) -> str:
        """Return the value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def find(wanted: Reference) -> Credentials | None:
    """Return what is kept for the image's registry, or None; ConfigError if it is broken."""
    for path in _files():
        try:
            with open(path, encoding="utf-8") as file:
                document = json.load(file)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot read {path}, which has registries' passwords: {error}"
            ) from None
        if isinstance(document, dict):
            found = _find(document, wanted, path)
            if found is not None:
                return found
    return None


def _files() -> Iterator[str]:
    given = os.environ.get("REGISTRY_AUTH_FILE")
    if given:
        if not os.path.exists(given):
            raise ConfigError(f"$REGISTRY_AUTH_FILE: there is no file {given}")
        yield given
        return
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        yield os.path.join(runtime, "containers", "auth.json")
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    yield os.path.join(config, "containers", "auth.json")
    docker = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    yield os.path.join(docker, "config.json")


def _find(document: dict[str, Any], wanted: Reference, path: str) -> Credentials | None:
    auths = _dict(document.get("auths"))
    helpers = _dict(document.get("credHelpers"))
    for key in _keys(wanted):
        helper = helpers.get(key)
        if isinstance(helper, str) and helper:
            return _ask(helper, key)
        entry = auths.get(key)
        if isinstance(entry, dict):
            found = _decode(entry, path)
            if found is not None:
                return found
    store = document.get("credsStore")
    if isinstance(store, str) and store:
        for key in _keys(wanted):
            found = _ask(store, key)
            if found is not None:
                return found
    return None


def _keys(wanted: Reference) -> list[str]:
    """The keys that may be the image's, the most particular first."""
    parts = wanted.repository.split("/")
    keys = ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]
    if wanted.host == DOCKER_HUB:
        keys += _HUB_KEYS
    return [*keys, f"https://{wanted.host}", f"https://{wanted.host}/v1/", f"http://{wanted.host}"]


def _decode(entry: dict[str, Any], path: str) -> Credentials | None:
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credentials("", "", token)
    auth = entry.get("auth")
    if isinstance(auth, str) and auth:
        try:
            user, colon, password = base64.b64decode(auth).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            colon = ""
        if not colon:
            raise ConfigError(
                f"{path}: an `auth` in it is not base64 of USER:PASSWORD; log in anew"
            )
        return Credentials(user, password.rstrip("\0"))
    name, secret = entry.get("username"), entry.get("password")
    if isinstance(name, str) and isinstance(secret, str) and name:
        return Credentials(name, secret)
    return None


def _ask(helper: str, key: str) -> Credentials | None:
    """What the program says of `key`; None if it knows nothing, or is not there."""
    if "/" in helper:
        return None
    try:
        done = subprocess.run(
            [f"docker-credential-{helper}", "get"],
            input=key.encode(),
            capture_output=True,
            timeout=HELPER_TIMEOUT,
            check=False,
        )
    except (FileNotFoundError, PermissionError):  # what of PATH cannot be searched is the latter
        return None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"docker-credential-{helper} does not answer") from None
    try:
        found = json.loads(done.stdout) if done.returncode == 0 else {}
    except ValueError:
        found = {}
    user, secret = _dict(found).get("Username"), _dict(found).get("Secret")
    if not isinstance(user, str) or not isinstance(secret, str):
        return None
    return Credentials("", "", secret) if user == "<token>" else Credentials(user, secret)


def _dict(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}
