"""HTTP as a registry is spoken to: over TLS or, where it may be, without, and with authorisation.

An Authorization header goes to the registry alone: not where a redirect leads (blobs often are in
another's storage), not to a realm over http if the registry is spoken to over https. What fails for
a while, a connection or the server, is tried again.
"""

import http.client
import ipaddress
import json
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPResponse
from typing import IO, TypeVar, cast

from tinyvmm.errors import ConfigError
from tinyvmm.images.oci import challenge, credentials
from tinyvmm.images.oci.challenge import Challenge
from tinyvmm.images.oci.reference import DOCKER_HUB, Reference

TIMEOUT = 30.0  # seconds of silence
TRIES = 4
PAUSE = 0.5  # seconds before the second try; each next waits twice as long
PATIENCE = 60.0  # seconds that we wait if a registry asks us to; one that wants more is given up
_ANSWER_MAX = 1 << 20
_TRANSIENT = {408, 429, 500, 502, 503, 504}
Result = TypeVar("Result")
# What OpenSSL says of an answer that is none of TLS's, in its versions.
_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"}
_CERTIFICATES = ("/etc/containers/certs.d", "/etc/docker/certs.d")


class TransientError(Exception):
    """What may go better the next time, in `after` seconds; the text says what it was."""

    def __init__(self, text: str, after: float = 0) -> None:
        super().__init__(text)
        self.after = after


class AnswerError(ConfigError):
    """An answer that is an error: `status` is HTTP's, `challenges` what a 401 asks for."""

    def __init__(self, status: int, text: str, challenges: Sequence[Challenge] = ()) -> None:
        super().__init__(text)
        self.status = status
        self.challenges = challenges


class UnreachableError(ConfigError):
    """There is nobody at the address."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects as far as is safe; secrets stay with whom they are for."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is None:
            return None
        if new.type not in {"http", "https"} or (req.type == "https" and new.type != "https"):
            raise ConfigError(f"the registry leads to {newurl[:80]}, which is not to be trusted")
        if (new.type, new.host) == (req.type, req.host):
            secret = req.unredirected_hdrs.get("Authorization")
            if secret is not None:
                new.add_unredirected_header("Authorization", secret)
        return new


class Transport:
    """Requests to the registry of `wanted`; may be called on several threads."""

    def __init__(self, wanted: Reference, *, insecure: bool) -> None:
        self._host = "registry-1.docker.io" if wanted.host == DOCKER_HUB else wanted.host
        self._shown = wanted.host
        self._wanted = wanted
        self._lax = insecure or _is_loopback(self._host)
        self._insecure = insecure
        self._scope = f"repository:{wanted.name}:pull"
        self._lock = threading.Lock()
        self._authorization = ""
        self._base = ""
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=self._context()),
            urllib.request.HTTPDefaultErrorHandler(),
            _Redirects(),
            urllib.request.HTTPErrorProcessor(),
        ):
            self._opener.add_handler(handler)

    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        for directory in _CERTIFICATES:
            path = os.path.join(directory, self._host)
            for name in sorted(os.listdir(path)) if os.path.isdir(path) else ():
                if name.endswith(".crt"):
                    context.load_verify_locations(os.path.join(path, name))
        if self._lax:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    # --- asking -----------------------------------------------------------------------------------
    def get(self, path: str, headers: Mapping[str, str]) -> HTTPResponse:
        """GET /v2/PATH; the caller closes the answer, and reads it with TransientError in mind.

        AnswerError for an answer that is an error, TransientError for one that may be none later.
        """
        if not self._base:
            self._find_base()
        url = f"{self._base}/v2/{path}"
        sent = self._authorization
        try:
            return self._open(url, headers, sent)
        except AnswerError as error:
            if error.status != 401:
                raise
            asked = error.challenges
        with self._lock:
            if self._authorization == sent:  # nobody else has meanwhile
                self._authorization = self._authorize(asked)
        return self._open(url, headers, self._authorization)

    def retried(
        self, what: str, attempt: Callable[[], Result], waiting: Callable[[], None] = lambda: None
    ) -> Result:
        """Return what `attempt()` does, tried again while it raises TransientError.

        `waiting` is called now and then between tries, and may raise to break it off.
        """
        for number in range(TRIES - 1):
            try:
                return attempt()
            except TransientError as error:
                if error.after > PATIENCE:
                    raise ConfigError(
                        f"{self._shown} failed at {what}: {error}; it wants us to wait "
                        f"{error.after:.0f} seconds: try again then"
                    ) from None
                pause = max(PAUSE * 2**number, error.after)
            end = time.monotonic() + pause
            while (left := end - time.monotonic()) > 0:
                waiting()
                time.sleep(min(left, PAUSE))
        try:
            return attempt()
        except TransientError as error:
            raise ConfigError(f"{self._shown} failed {TRIES} times at {what}: {error}") from None

    def _find_base(self) -> None:
        """Find out whether the registry speaks TLS, where it need not."""
        with self._lock:
            if self._base:
                return
            if not self._lax:
                self._base = f"https://{self._host}"
                return
            schemes = ("https", "http") if self._insecure else ("http", "https")
            problem: Exception = TransientError("it speaks neither http nor https")
            for scheme in schemes:
                try:
                    if self._answers(f"{scheme}://{self._host}"):
                        self._base = f"{scheme}://{self._host}"
                        return
                except (TransientError, UnreachableError) as error:
                    problem = error
        raise problem

    def _answers(self, base: str) -> bool:
        try:
            self._open(f"{base}/v2/", {}, "").close()
        except AnswerError as error:
            return error.status != 400  # what a server of TLS says to http
        return True

    def _open(self, url: str, headers: Mapping[str, str], authorization: str) -> HTTPResponse:
        request = urllib.request.Request(url)  # noqa: S310 - http or https, as above
        for name, value in {"User-Agent": "tinyvmm", **headers}.items():
            request.add_header(name, value)
        if authorization:
            request.add_unredirected_header("Authorization", authorization)
        return self._send(request)

    def _send(self, request: urllib.request.Request) -> HTTPResponse:
        try:
            return cast("HTTPResponse", self._opener.open(request, timeout=TIMEOUT))
        except urllib.error.HTTPError as error:
            with error:
                raise self._answer_error(error) from None
        except urllib.error.URLError as error:
            reason = error.reason
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise ConfigError(
                    f"{self._shown}: its certificate is not to be trusted: "
                    f"{reason.verify_message}; put the authority's into "
                    f"{_CERTIFICATES[0]}/{self._host}/ca.crt, or give --insecure"
                ) from None
            if isinstance(reason, ssl.SSLError) and reason.reason in _NO_TLS:
                raise UnreachableError(
                    f"{self._shown} does not speak TLS; if http will do, give --insecure"
                ) from None
            text = getattr(reason, "strerror", None) or str(reason)
            if isinstance(reason, ConnectionRefusedError | socket.gaierror):
                raise UnreachableError(f"cannot reach {self._shown}: {text}") from None
            raise TransientError(text) from error
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(str(error) or type(error).__name__) from error

    def _answer_error(self, error: urllib.error.HTTPError) -> Exception:
        if error.code in _TRANSIENT:
            after = _seconds(error.headers.get("Retry-After", ""))
            return TransientError(f"{error.code} {error.reason}", after)
        asked = challenge.parse(error.headers.get_all("WWW-Authenticate", []))
        return AnswerError(error.code, f"{self._shown} says: {_message(error)}", asked)

    # --- authorisation ----------------------------------------------------------------------------
    def _authorize(self, asked: Sequence[Challenge]) -> str:
        """Return an Authorization header that fits what the registry asked for."""
        known = credentials.find(self._wanted)
        for one in asked:
            if one.scheme == "bearer":
                return "Bearer " + self._token(one, known)
            if one.scheme == "basic" and known is not None and known.user:
                return known.basic()
        if known is None and asked:
            raise ConfigError(
                f"{self._shown} wants a user and password: log in first, with "
                f"`podman login {self._shown}` or docker's or skopeo's"
            )
        schemes = ", ".join(one.scheme for one in asked) or "nothing"
        raise ConfigError(f"{self._shown} wants to know who we are, by {schemes}: not known here")

    def _token(self, one: Challenge, known: credentials.Credentials | None) -> str:
        request = challenge.token_request(one, self._scope, known)
        if request.type == "http" and self._base.startswith("https:") and not self._lax:
            raise ConfigError(f"{self._shown} wants tokens to be asked for without TLS: refused")
        try:
            with self._send(request) as answer:
                return challenge.parse_token(answer.read(_ANSWER_MAX))
        except AnswerError as error:
            if error.status not in {400, 401, 403}:
                raise
            who = f"user {known.user!r}" if known is not None and known.user else "us"
            hint = (
                "" if known is not None else "; log in with `podman login`, or docker's or skopeo's"
            )
            raise ConfigError(f"{self._shown} gives no token to {who}: {error}{hint}") from None


def _seconds(retry_after: str) -> float:
    """How long a Retry-After asks for: seconds or a date (RFC 9110, 10.2.3); 0 if it is neither."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:12])
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _message(error: urllib.error.HTTPError) -> str:
    """What an answer says went wrong: the registry's own words, or HTTP's."""
    try:
        first = json.loads(error.read(_ANSWER_MAX))["errors"][0]
        words = " ".join(str(first.get(key) or "") for key in ("code", "message")).strip()
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError):
        words = ""
    words = "".join(char if char.isprintable() else " " for char in words)[:200]
    return f"{error.code} {words or error.reason}"


def _is_loopback(host: str) -> bool:
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
