"""What a registry's 401 asks for (RFC 9110, section 11.6.1), and how a token is come by.

Distribution's token authentication: the registry names a realm, a service and a scope; the realm
gives a token for them, to whoever we say we are, or to anybody (spec/auth/token.md, oauth.md).
"""

import json
import re
import urllib.parse
import urllib.request
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.images.oci.credentials import Credentials

_PARAMETER = re.compile(r'([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))')
_SCHEME = re.compile(r"(?:^|,\s*)([A-Za-z]+)(?=\s+[A-Za-z0-9_-]+\s*=|\s*(?:$|,))")
CLIENT_ID = "tinyvmm"


class Challenge(NamedTuple):
    """One way to authenticate: `scheme` in lower case, and its parameters."""

    scheme: str
    parameters: dict[str, str]


def parse(headers: list[str]) -> list[Challenge]:
    """Parse the WWW-Authenticate headers of an answer."""
    found = []
    for header in headers:
        starts = [match for match in _SCHEME.finditer(header) if not _in_quotes(header, match)]
        for number, match in enumerate(starts):
            end = starts[number + 1].start() if number + 1 < len(starts) else len(header)
            parameters = {
                name.lower(): re.sub(r"\\(.)", r"\1", quoted) if quoted else plain
                for name, quoted, plain in _PARAMETER.findall(header[match.end(1) : end])
            }
            found.append(Challenge(match[1].lower(), parameters))
    return found


def _in_quotes(header: str, match: re.Match[str]) -> bool:
    return header.count('"', 0, match.start(1)) % 2 == 1


def token_request(
    challenge: Challenge, scope: str, credentials: Credentials | None
) -> urllib.request.Request:
    """Return how the realm is asked for a token; ConfigError for a realm that is none."""
    realm = challenge.parameters.get("realm", "")
    parts = urllib.parse.urlsplit(realm)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"the registry names a place for tokens that is none: {realm[:80]!r}")
    service = challenge.parameters.get("service", "")
    scope = challenge.parameters.get("scope") or scope
    if credentials is not None and credentials.identity_token:
        fields = {
            "grant_type": "refresh_token",
            "service": service,
            "scope": scope,
            "client_id": CLIENT_ID,
            "refresh_token": credentials.identity_token,
        }
        return urllib.request.Request(realm, urllib.parse.urlencode(fields).encode())  # noqa: S310
    query = [*urllib.parse.parse_qsl(parts.query), ("service", service)]
    query += [("scope", one) for one in scope.split(" ") if one]
    if credentials is not None:
        query.append(("account", credentials.user))
    query_text = urllib.parse.urlencode([(name, value) for name, value in query if value])
    url = urllib.parse.urlunsplit(parts._replace(query=query_text))
    request = urllib.request.Request(url)  # noqa: S310 - the scheme has been looked at
    if credentials is not None:
        request.add_unredirected_header("Authorization", credentials.basic())
    return request


def parse_token(data: bytes) -> str:
    """Return the token of the realm's answer; ConfigError if there is none."""
    try:
        document = json.loads(data)
    except ValueError:
        document = None
    if isinstance(document, dict):
        for name in ("token", "access_token"):
            token = document.get(name)
            if isinstance(token, str) and token and token.isascii() and token.isprintable():
                return token
    raise ConfigError("the registry's token service gave no token")
