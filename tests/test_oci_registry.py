"""Images from registries: Debian's docker-registry on loopback, and proxies that do it harm."""

import base64
import datetime as dt
import email.utils
import http.client
import http.server
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.oci import directory, entry, image, layer, trees
from tinyvmm.cli.main import main
from tinyvmm.errors import ConfigError
from tinyvmm.images.oci import challenge, credentials, transport
from tinyvmm.images.oci.credentials import Credentials
from tinyvmm.images.oci.pull import pull
from tinyvmm.images.oci.reference import parse_name
from tinyvmm.images.oci.registry import RegistrySource
from tinyvmm.images.oci.store import Store

USER, PASSWORD = "someone", "secret:with colon"
SERVER = shutil.which("docker-registry") or "/usr/bin/docker-registry"
_CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http:
  addr: "127.0.0.1:{port}"
"""
_AUTH = """\
auth: {{htpasswd: {{realm: here, path: {path}}}}}
"""


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No passwords and no proxies of whoever runs this, and no pauses."""
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "DOCKER_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(transport, "PAUSE", 0.01)


@pytest.fixture
def store() -> Store:
    return Store()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_registry(directory: Path, more: str = "") -> Iterator[str]:
    """Debian's registry on a port of its own; its HOST:PORT."""
    directory.mkdir(exist_ok=True)
    port = free_port()
    config = directory / "config.yml"
    config.write_text(_CONFIG.format(root=directory / "blobs", port=port) + more)
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([SERVER, "serve", str(config)], stdout=log, stderr=log)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (directory / "log").read_text()
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def open_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry for everybody."""
    with running_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(scope="module")
def closed_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that wants a user and password."""
    path = tmp_path_factory.mktemp("closed")
    hashed = subprocess.run(
        ["htpasswd", "-Bbn", USER, PASSWORD], check=True, capture_output=True, text=True
    ).stdout
    (path / "htpasswd").write_text(hashed)
    with running_registry(path, _AUTH.format(path=path / "htpasswd")) as host:
        yield host


def push(origin: str, host: str, name: str, *, auth: bool = False) -> None:
    """Push with skopeo, whose word is not ours."""
    words = ["--dest-creds", f"{USER}:{PASSWORD}"] if auth else []
    _skopeo(
        [
            *("skopeo", "copy", "-q", "--all", "--dest-tls-verify=false", *words),
            *(origin, f"docker://{host}/{name}"),
        ],
    )


def _skopeo(command: list[str]) -> None:
    """Run it, without the passwords of whoever runs this."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": os.environ["HOME"]}
    subprocess.run(command, check=True, env=environment)


def log_in(path: Path, host: str, **entry_: str) -> None:
    """Write what `docker login` writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: entry_ or {"auth": auth}}}))


# --- Debian's registry ----------------------------------------------------------------------------


def test_an_image_is_pulled_by_tag_and_by_digest(
    tmp_path: Path, store: Store, open_registry: str
) -> None:
    origin = image(
        tmp_path / "lay",
        layer(entry("base", b"base"), entry("gone")),
        layer(entry("top", b"top"), entry(".wh.gone")),
        layer(directory("third")),
    )
    push(origin, open_registry, "some/app:1.0")
    found = pull(f"{open_registry}/some/app:1.0", store)
    assert found.names == [f"{open_registry}/some/app:1.0"]
    low, middle, _ = trees(store, found)
    assert (low / "base").read_bytes() == b"base"
    assert (middle / "top").read_bytes() == b"top"
    assert os.listdir(f"{store.path}/partial") == []
    again = pull(f"{open_registry}/some/app@{found.manifest}", store)
    assert again.id == found.id
    assert f"{open_registry}/some/app@{found.manifest}" in again.names


def test_of_an_index_what_is_for_this_platform_is_pulled(
    tmp_path: Path, store: Store, open_registry: str
) -> None:
    lay = tmp_path / "lay"
    for architecture in ("arm64", "amd64"):
        platform = {"os": "linux", "architecture": architecture}
        written = layer(entry("is", architecture.encode()))
        image(lay, written, tag=architecture, platform=platform)
    index = json.loads((lay / "index.json").read_bytes())
    for manifest in index["manifests"]:
        del manifest["annotations"]
    data = json.dumps(index).encode()
    import hashlib

    digest = hashlib.sha256(data).hexdigest()
    (lay / "blobs/sha256" / digest).write_bytes(data)
    top = {
        "schemaVersion": 2,
        "manifests": [
            {
                "mediaType": "application/vnd.oci.image.index.v1+json",
                "digest": f"sha256:{digest}",
                "size": len(data),
                "annotations": {"org.opencontainers.image.ref.name": "both"},
            }
        ],
    }
    (lay / "index.json").write_text(json.dumps(top))
    for name in (f"oci:{lay}:both", f"{open_registry}/two/archs:both"):
        if name.startswith("127"):
            push(f"oci:{lay}:both", open_registry, "two/archs:both")
        [tree] = trees(store, pull(name, store))
        assert (tree / "is").read_bytes() == b"amd64"
    foreign = index["manifests"][0]["digest"]
    with pytest.raises(ConfigError, match=r"is for linux/arm64, and this computer runs"):
        pull(f"{open_registry}/two/archs@{foreign}", store)


def test_docker_schema_2_and_its_lists_are_read_too(
    tmp_path: Path, store: Store, open_registry: str
) -> None:
    origin = image(tmp_path / "lay", layer(entry("f", b"data")))
    _skopeo(
        [
            *("skopeo", "copy", "-q", "--format", "v2s2", "--dest-tls-verify=false"),
            *(origin, f"docker://{open_registry}/v2s2:1"),
        ],
    )
    [tree] = trees(store, pull(f"{open_registry}/v2s2:1", store))
    assert (tree / "f").read_bytes() == b"data"


def test_what_is_not_there_is_told_with_the_registrys_words(
    store: Store, open_registry: str
) -> None:
    with pytest.raises(ConfigError, match=r"no such image: .* says: 404 MANIFEST_UNKNOWN"):
        pull(f"{open_registry}/no/such", store)
    with pytest.raises(ConfigError, match=r"cannot reach 127\.0\.0\.1:1: Connection refused"):
        pull("127.0.0.1:1/x", store)


def test_a_registry_wants_passwords_and_finds_them_where_login_keeps_them(
    tmp_path: Path, store: Store, closed_registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = closed_registry
    push(image(tmp_path / "lay", layer(entry("f"))), host, "private/app:1", auth=True)
    name = f"{host}/private/app:1"
    with pytest.raises(ConfigError, match=f"wants a user and password.*podman login {host}"):
        pull(name, store)
    home, runtime = tmp_path / "home", tmp_path / "runtime"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    places = [
        home / ".docker/config.json",
        home / ".config/containers/auth.json",
        runtime / "containers/auth.json",
    ]
    for place in places:
        log_in(place, host)
        assert pull(name, Store(str(tmp_path / place.parent.name))).names == [name]
        place.unlink()
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth"))
    with pytest.raises(ConfigError, match="REGISTRY_AUTH_FILE: there is no file"):
        pull(name, store)
    log_in(tmp_path / "auth", host)
    assert pull(name, store).names == [name]
    log_in(tmp_path / "auth", host, username=USER, password="wrong")  # noqa: S106
    with pytest.raises(ConfigError, match="says: 401"):
        pull(name, store)


def test_layers_come_side_by_side_and_progress_is_told(
    tmp_path: Path, store: Store, open_registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [layer(entry(f"{n}", os.urandom(100_000))) for n in range(8)]
    push(image(tmp_path / "lay", *layers), open_registry, "many:1")
    told: list[tuple[str, int, int]] = []
    now, lock = 0, threading.Lock()

    def progress(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    at_once = threading.Barrier(2, timeout=120)

    original = RegistrySource._download

    def meet(self: RegistrySource, *args: object) -> None:
        nonlocal now
        with lock:
            now += 1
            first = now <= 2
        if first:
            at_once.wait()  # breaks if layers come one after the other
        original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(RegistrySource, "_download", meet)
    pull(f"{open_registry}/many:1", store, progress=progress)
    sizes = sum(len(written.blob) for written in layers)
    assert told[0] == (f"pulling {open_registry}/many:1", 0, sizes)
    assert told[-1][1] == sizes
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_certificate_is_checked_and_may_be_named_or_waived(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(key), "-out", str(certificate), "-subj", "/CN=test"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    tls = f"  tls: {{certificate: {certificate}, key: {key}}}\n"
    with running_registry(tmp_path / "registry", tls) as host:
        push(image(tmp_path / "lay", layer(entry("f"))), host, "tls/app:1")
        name = f"{host}/tls/app:1"
        assert pull(name, store).names == [name]  # on loopback, as docker has it
        monkeypatch.setattr(transport, "_is_loopback", lambda _: False)
        with pytest.raises(ConfigError, match=r"certificate is not to be trusted.*--insecure"):
            pull(name, store)
        assert pull(name, store, insecure=True).names == [name]
        monkeypatch.setattr(transport, "_CERTIFICATES", (str(tmp_path / "certs.d"),))
        (tmp_path / "certs.d" / host).mkdir(parents=True)
        shutil.copy(certificate, tmp_path / "certs.d" / host / "ca.crt")
        assert pull(name, store).names == [name]
    with running_registry(tmp_path / "plain") as host:
        push(f"oci:{tmp_path}/lay:v1", host, "app:1")
        with pytest.raises(
            ConfigError, match="does not speak TLS; if http will do, give --insecure"
        ):
            pull(f"{host}/app:1", store)
        assert f"{host}/app:1" in pull(f"{host}/app:1", store, insecure=True).names


# --- a proxy that does harm -----------------------------------------------------------------------

Harm = Callable[["Proxy", http.client.HTTPResponse, bytes], bool]


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on to `behind`; `harm` may answer in its place, saying so by True."""

    protocol_version = "HTTP/1.1"
    behind = ""
    harm: Harm
    seen: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        self.seen.append((self.path, dict(self.headers)))
        connection = http.client.HTTPConnection(self.behind)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
        connection.request("GET", self.path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        if not type(self).harm(self, answer, body):
            self.pass_on(answer, body, len(body))
        connection.close()

    def pass_on(self, answer: http.client.HTTPResponse, body: bytes, length: int) -> None:
        """Answer with `body`, and say it is of `length`."""
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in {"content-length", "date", "server", "connection"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def harmful(behind: str, harm: Harm) -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """A proxy in front of a registry: its HOST:PORT, and the requests it has seen."""
    seen: list[tuple[str, dict[str, str]]] = []
    handler = type("Harmful", (Proxy,), {"behind": behind, "harm": harm, "seen": seen})
    with serving(handler) as host:
        yield host, seen


@pytest.fixture
def pushed(tmp_path: Path, open_registry: str) -> tuple[str, str, int]:
    """An image with one layer of 300 kB: the registry, the layer's digest and length."""
    written = layer(entry("data", os.urandom(300_000)))
    push(image(tmp_path / "pushed", written), open_registry, "harm/app:1")
    return open_registry, written.digest, len(written.blob)


def is_layer(proxy: Proxy, digest: str) -> bool:
    return proxy.path.endswith(digest)


def cut(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes, keep: int) -> bool:
    """Send the beginning of an answer, and close."""
    proxy.pass_on(answer, body[:keep], len(body))
    proxy.close_connection = True
    return True


def ranges(seen: list[tuple[str, dict[str, str]]], digest: str) -> list[str | None]:
    return [headers.get("Range") for path, headers in seen if path.endswith(digest)]


def test_what_is_cut_off_is_gone_on_with_where_it_was(
    store: Store, pushed: tuple[str, str, int]
) -> None:
    host, digest, size = pushed

    def harm(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> bool:
        return is_layer(proxy, digest) and len(body) > 1000 and cut(proxy, answer, body, 100_000)

    told: list[int] = []
    with harmful(host, harm) as (proxy, seen):
        found = pull(f"{proxy}/harm/app:1", store, progress=lambda _, done, __: told.append(done))
    assert ranges(seen, digest) == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert told[-1] == size
    assert (trees(store, found)[0] / "data").stat().st_size == 300_000


def test_what_was_broken_off_is_gone_on_with_the_next_time(
    store: Store, pushed: tuple[str, str, int]
) -> None:
    host, digest, _ = pushed
    down = True

    def harm(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> bool:
        if not down or not is_layer(proxy, digest):
            return False
        return cut(proxy, answer, body, 70_000 if "Range" not in proxy.headers else 0)

    with harmful(host, harm) as (proxy, seen):
        with pytest.raises(ConfigError, match=r"failed 4 times at layer .* ended after 70000 of"):
            pull(f"{proxy}/harm/app:1", store)
        assert store.images() == []
        down = False
        pull(f"{proxy}/harm/app:1", store)
    assert ranges(seen, digest)[-1] == "bytes=70000-"


def test_a_registry_without_ranges_is_asked_for_all_of_it_again(
    store: Store, pushed: tuple[str, str, int]
) -> None:
    host, digest, _ = pushed
    times = 0

    def harm(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> bool:
        nonlocal times
        if not is_layer(proxy, digest):
            return False
        times += 1
        if times == 1:
            return cut(proxy, answer, body, 50_000)
        connection = http.client.HTTPConnection(host)
        connection.request("GET", proxy.path)
        whole = connection.getresponse()
        data = whole.read()
        proxy.pass_on(whole, data, len(data))
        connection.close()
        return True

    with harmful(host, harm) as (proxy, seen):
        pull(f"{proxy}/harm/app:1", store)
    assert ranges(seen, digest) == [None, "bytes=50000-"]


def test_a_registry_that_will_not_go_on_is_given_up(
    store: Store, pushed: tuple[str, str, int]
) -> None:
    host, digest, _ = pushed

    def harm(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> bool:
        if not is_layer(proxy, digest):
            return False
        if "Range" not in proxy.headers:
            return cut(proxy, answer, body, 1000)
        answer.status = 416
        assert len(seen) < 50, "asked for ever"
        proxy.pass_on(answer, b"", 0)
        return True

    with harmful(host, harm) as (proxy, seen), pytest.raises(ConfigError, match="416"):
        pull(f"{proxy}/harm/app:1", store)


def test_a_layer_that_is_not_what_its_digest_says_is_refused(
    store: Store, pushed: tuple[str, str, int]
) -> None:
    host, digest, _ = pushed

    def harm(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> bool:
        if not is_layer(proxy, digest):
            return False
        proxy.pass_on(answer, body[:-1] + bytes([body[-1] ^ 1]), len(body))
        return True

    with harmful(host, harm) as (proxy, _), pytest.raises(ConfigError, match="corrupted"):
        pull(f"{proxy}/harm/app:1", store)
    assert os.listdir(f"{store.path}/layers") == []
    assert os.listdir(f"{store.path}/partial") == []


def test_a_wrong_beginning_that_lay_there_is_thrown_away_once(
    store: Store, pushed: tuple[str, str, int]
) -> None:
    host, digest, size = pushed
    for wrong in (bytes(1000), bytes(size), bytes(size + 1)):
        with store.shared():
            Path(store.partial(digest)).write_bytes(wrong)
        found = pull(f"{host}/harm/app:1", store)
        assert (trees(store, found)[0] / "data").stat().st_size == 300_000
        assert main(["prune", "--all"]) == 0


def test_a_layer_larger_than_it_was_said_to_be_is_read_no_further(
    store: Store, pushed: tuple[str, str, int]
) -> None:
    host, digest, size = pushed

    def harm(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> bool:
        if not is_layer(proxy, digest):
            return False
        proxy.pass_on(answer, body + bytes(10_000_000), len(body) + 10_000_000)
        return True

    with harmful(host, harm) as (proxy, _), pytest.raises(ConfigError, match="corrupted"):
        pull(f"{proxy}/harm/app:1", store)
    assert size < 1_000_000


@pytest.mark.parametrize("what", ["manifest", "config"])
def test_a_manifest_or_configuration_that_another_made_is_refused(
    store: Store, pushed: tuple[str, str, int], what: str
) -> None:
    host, digest, _ = pushed
    manifest = pull(f"{host}/harm/app:1", Store(f"{store.path}-other")).manifest

    def harm(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> bool:
        if "/manifests/" in proxy.path:
            if what != "manifest":
                return False
        elif is_layer(proxy, digest):
            return False
        if "/v2/harm" not in proxy.path:
            return False
        proxy.pass_on(answer, body.replace(b"2", b"3"), len(body))
        return True

    with harmful(host, harm) as (proxy, _), pytest.raises(ConfigError, match="corrupted"):
        pull(f"{proxy}/harm/app@{manifest}", store)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"nonsense", b"[]", b"{}", b'{"schemaVersion": 1}', b'{"manifests": [{}]}'),
        *(b'{"manifests": []}', b'{"layers": [{"digest": "x"}]}', b"[" * 100_000, bytes(5 << 20)),
        b'{"config": {"digest": "sha256:../../x", "size": 1}, "layers": []}',
    ],
)
def test_a_manifest_that_is_none_is_one_line(
    store: Store, pushed: tuple[str, str, int], body: bytes
) -> None:
    def harm(proxy: Proxy, answer: http.client.HTTPResponse, _: bytes) -> bool:
        if "/manifests/" not in proxy.path:
            return False
        proxy.pass_on(answer, body, len(body))
        return True

    with harmful(pushed[0], harm) as (proxy, _), pytest.raises(ConfigError) as told:
        pull(f"{proxy}/harm/app:1", store)
    assert "\n" not in str(told.value)


def test_a_server_that_fails_for_a_while_is_asked_again(
    store: Store, pushed: tuple[str, str, int]
) -> None:
    failures = 0

    def harm(proxy: Proxy, _: http.client.HTTPResponse, __: bytes) -> bool:
        nonlocal failures
        if "/v2/harm" not in proxy.path or failures == 3:
            return False
        failures += 1
        proxy.send_error(503)
        return True

    with harmful(pushed[0], harm) as (proxy, _):
        assert pull(f"{proxy}/harm/app:1", store).names == [f"{proxy}/harm/app:1"]


@pytest.mark.parametrize("how", ["seconds", "date", "neither", "too long"])
def test_a_registry_that_wants_us_to_wait_is_waited_for_or_told_of(
    store: Store, pushed: tuple[str, str, int], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC 9110, 10.2.3 and RFC 6585, 4."""
    wanted = {
        "seconds": "2",
        "date": email.utils.format_datetime(
            dt.datetime.now(dt.UTC) + dt.timedelta(seconds=30), usegmt=True
        ),
        "neither": "soon",
        "too long": "3600",
    }[how]
    slept: list[float] = []
    clock = SimpleNamespace(sleep=slept.append, monotonic=lambda: sum(slept), time=time.time)
    monkeypatch.setattr(transport, "time", clock)
    failures = 0

    def harm(proxy: Proxy, _: http.client.HTTPResponse, __: bytes) -> bool:
        nonlocal failures
        if not is_layer(proxy, pushed[1]) or failures:
            return False
        failures += 1
        proxy.send_response(429)
        proxy.send_header("Retry-After", wanted)
        proxy.send_header("Content-Length", "0")
        proxy.end_headers()
        return True

    with harmful(pushed[0], harm) as (proxy, _):
        if how == "too long":
            with pytest.raises(ConfigError, match=r"429.*wait 3600 seconds"):
                pull(f"{proxy}/harm/app:1", store)
            return
        pull(f"{proxy}/harm/app:1", store)
    low, high = {"seconds": (2, 2.1), "date": (15, 30.1), "neither": (0, 1)}[how]
    assert low <= sum(slept) <= high
    assert max(slept) <= transport.PAUSE  # so that Ctrl-C need not wait


# --- who we are, and who need not know ------------------------------------------------------------


class Storage(http.server.BaseHTTPRequestHandler):
    """A blob storage that registries lead to."""

    blobs: dict[str, bytes]
    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        self.seen.append(dict(self.headers))
        data = self.blobs[self.path]
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start:])

    def log_message(self, *_: object) -> None:
        pass


def test_a_password_does_not_go_where_a_redirect_leads(
    tmp_path: Path, store: Store, closed_registry: str
) -> None:
    push(image(tmp_path / "lay", layer(entry("f"))), closed_registry, "led/app:1", auth=True)
    seen: list[dict[str, str]] = []
    blobs: dict[str, bytes] = {}
    handler = type("Seen", (Storage,), {"seen": seen, "blobs": blobs})

    def harm(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> bool:
        if answer.status != 200 or "/blobs/" not in proxy.path:
            return False
        blobs[proxy.path] = body
        proxy.send_response(307)
        # The same address under another name is another's.
        proxy.send_header("Location", f"http://{elsewhere}{proxy.path}")
        proxy.send_header("Content-Length", "0")
        proxy.end_headers()
        return True

    with serving(handler) as elsewhere, harmful(closed_registry, harm) as (proxy, asked):
        log_in(tmp_path / "home/.docker/config.json", proxy)
        pull(f"{proxy}/led/app:1", store)
    assert any("Authorization" in headers for _, headers in asked)
    assert len(seen) == 2
    assert not [headers for headers in seen if "Authorization" in headers]


def test_a_redirect_from_https_to_http_is_refused() -> None:
    import urllib.request

    request = urllib.request.Request("https://registry.example/v2/")
    headers = http.client.HTTPMessage()
    for target in ("http://registry.example/", "ftp://registry.example/"):
        with pytest.raises((ConfigError, urllib.error.HTTPError)):
            transport._Redirects().redirect_request(
                request,
                None,  # type: ignore[arg-type]
                307,
                "",
                headers,
                target,
            )


class Tokens(http.server.BaseHTTPRequestHandler):
    """A registry that wants tokens, and the service that gives them, in one."""

    behind = ""
    asked: list[tuple[str, dict[str, list[str]], str]]
    lifetime = 1000  # answers a token is good for
    used = 0

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/token":
            self.give(urllib.parse.parse_qs(url.query))
            return
        cls = type(self)
        if self.headers.get("Authorization") != f"Bearer token{len(self.asked)}" or (
            cls.used >= cls.lifetime
        ):
            cls.used = 0
            self.send_response(401)
            host = self.headers["Host"]
            self.send_header(
                "WWW-Authenticate",
                f'Bearer realm="http://{host}/token",service="svc, of ours",'
                'scope="repository:tok/app:pull"',
            )
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        cls.used += 1
        connection = http.client.HTTPConnection(self.behind)
        accept = {"Accept": self.headers["Accept"]} if "Accept" in self.headers else {}
        connection.request("GET", self.path, headers=accept)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.give(urllib.parse.parse_qs(body))

    def give(self, query: dict[str, list[str]]) -> None:
        """Answer a request for a token, unless the user is unknown."""
        self.asked.append((self.command, query, self.headers.get("Authorization", "")))
        body = json.dumps({"token": f"token{len(self.asked)}", "expires_in": 60}).encode()
        refused = query.get("account") == ["nobody"]
        if refused:
            body = b'{"errors": [{"code": "DENIED", "message": "go away"}]}'
        self.send_response(401 if refused else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("kept", ["nothing", "password", "identity", "unknown"])
def test_tokens_are_asked_for_as_the_registry_says(
    tmp_path: Path, store: Store, open_registry: str, kept: str
) -> None:
    push(image(tmp_path / "lay", layer(entry("f"))), open_registry, "tok/app:1")
    asked: list[tuple[str, dict[str, list[str]], str]] = []
    handler = type("Service", (Tokens,), {"behind": open_registry, "asked": asked})
    with serving(handler) as host:
        file = tmp_path / "home/.docker/config.json"
        if kept == "password":
            log_in(file, host)
        elif kept == "identity":
            log_in(file, host, identitytoken="refresh")
        elif kept == "unknown":
            log_in(file, f"{host}/tok", username="nobody", password="x")  # noqa: S106
        if kept == "unknown":
            with pytest.raises(ConfigError, match=r"no token to user 'nobody'.*DENIED go away"):
                pull(f"{host}/tok/app:1", store)
            return
        pull(f"{host}/tok/app:1", store)
    [(method, query, authorization)] = asked
    assert query["service"] == ["svc, of ours"]
    assert query["scope"] == ["repository:tok/app:pull"]
    if kept == "identity":
        assert (method, query["refresh_token"]) == ("POST", ["refresh"])
        assert query["grant_type"] == ["refresh_token"]
    elif kept == "password":
        assert authorization == Credentials(USER, PASSWORD).basic()
    else:
        assert authorization == ""


def test_a_token_that_runs_out_on_the_way_is_asked_for_anew(
    tmp_path: Path, store: Store, open_registry: str
) -> None:
    push(image(tmp_path / "lay", layer(entry("f"))), open_registry, "tok/long:1")
    asked: list[tuple[str, dict[str, list[str]], str]] = []
    contents = {"behind": open_registry, "asked": asked, "lifetime": 2}
    with serving(type("Service", (Tokens,), contents)) as host:
        name = f"{host}/tok/long:1"
        pull(name, store)
    assert len(asked) == 2  # it was good for the manifest and the configuration


def test_challenges_are_read_as_servers_write_them() -> None:
    found = challenge.parse(
        ['Bearer realm="https://a/t?x=1",service="s",scope="a:b:pull,push", Basic realm="b, c"']
    )
    assert [(c.scheme, c.parameters) for c in found] == [
        ("bearer", {"realm": "https://a/t?x=1", "service": "s", "scope": "a:b:pull,push"}),
        ("basic", {"realm": "b, c"}),
    ]
    assert challenge.parse(["Negotiate", 'basic realm="a \\"b\\""'])[1].parameters == {
        "realm": 'a "b"'
    }
    with pytest.raises(ConfigError, match="none"):
        challenge.token_request(challenge.Challenge("bearer", {"realm": "file:///x"}), "", None)


def test_the_longest_key_and_helpers_say_who_we_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "bin/docker-credential-test"
    helper.parent.mkdir()
    helper.write_text(
        '#!/bin/sh\nread key; echo "{\\"Username\\": \\"$key\\", \\"Secret\\": \\"s\\"}"\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    auth = {name: {"username": name, "password": "p"} for name in ("h", "h/a", "h/a/b")}
    hub = {"https://index.docker.io/v1/": {"username": "hub", "password": "p"}}
    file = tmp_path / "home/.docker/config.json"
    file.parent.mkdir(parents=True)
    document = {"auths": auth | hub, "credHelpers": {"h.example": "test", "x.example": "absent"}}
    file.write_text(json.dumps(document))

    def who(name: str) -> str | None:
        found = credentials.find(parse_name(name))
        return None if found is None else found.user

    assert who("h.example/x") == "h.example"
    assert who("debian") == "hub"
    assert who("x.example/y") is None
    document = {"auths": {k.replace("h", "h.example", 1): v for k, v in auth.items()}}
    file.write_text(json.dumps(document | {"credsStore": "test"}))
    assert who("h.example/a/b") == "h/a/b"
    assert who("h.example/a/c") == "h/a"
    assert who("h.example/c") == "h"
    assert who("other.example/c") == "other.example/c"
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json"):
        who("debian")
