"""NBD: a disk for nbdinfo, nbdcopy and qemu-img, and for clients who do not mean well."""

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.erofs_reader import read_image, read_tree
from tinyvmm import nbd
from tinyvmm.cli.main import main
from tinyvmm.fileserver.address import Address, parse_address
from tinyvmm.nbd import Export, NbdServer

SIZE = 3 << 20
CONTENT = bytes(range(256)) * (SIZE // 256)


class Disk:
    """Bytes, of which one sector cannot be read."""

    size = SIZE
    bad = range(8192, 8704)

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        for view in views:
            if offset < self.bad.stop and offset + len(view) > self.bad.start:
                raise OSError(5, "a bad sector")
            view[:] = CONTENT[offset : offset + len(view)]
            offset += len(view)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NbdServer]:
    export = Export(b"disk", b"a disk of the tests'", Disk())
    with NbdServer(export, [Address(str(tmp_path / "nbd"))], connections_max=8) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        yield server
        server.stop()
        thread.join()


class Client:
    """A client, in bytes."""

    def __init__(self, server: NbdServer, flags: int = 3) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(server.addresses[0].path)
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.sock.sendall(struct.pack(">I", flags))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count and (more := self.sock.recv(count - len(data))):
            data += more
        return data

    def option(self, number: int, data: bytes = b"") -> tuple[int, bytes]:
        self.sock.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        return self.reply(number)

    def reply(self, number: int) -> tuple[int, bytes]:
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        assert (magic, option) == (0x3E889045565A9, number)
        return kind, self.receive(length)

    def go(self, name: bytes = b"disk") -> list[tuple[int, bytes]]:
        replies = [self.option(7, struct.pack(">I", len(name)) + name + b"\0\2\0\1\0\3")]
        while replies[-1][0] == 3:
            replies.append(self.reply(7))
        return replies

    def request(self, kind: int, offset: int, length: int, data: bytes = b"") -> tuple[int, bytes]:
        self.sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 77, offset, length) + data)
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert (magic, cookie) == (0x67446698, 77)
        return error, self.receive(length) if kind == 0 and not error else b""

    def ended(self) -> bool:
        return self.sock.recv(1) == b""


# --- the protocol -----------------------------------------------------------------------------


def test_a_client_asks_for_limits_and_reads(server: NbdServer) -> None:
    with Client(server) as client:
        export, name, sizes, end = client.go()
        assert export == (3, struct.pack(">HQH", 0, SIZE, 1 | 2 | 4 | 256 | 1024))
        assert name == (3, b"\0\1disk")
        assert sizes == (3, struct.pack(">HIII", 3, 1, 4096, 32 << 20))
        assert end == (1, b"")
        for offset, length in ((0, 512), (1, 3), (SIZE - 1, 1), (1 << 20, 2 << 20)):
            assert client.request(0, offset, length) == (0, CONTENT[offset : offset + length])
        assert client.request(3, 0, 0) == (0, b"")


def test_an_old_client_gets_zeroes_behind_the_size(server: NbdServer) -> None:
    for flags, zeroes in ((1, 124), (3, 0)):
        with Client(server, flags) as client:
            client.sock.sendall(b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"disk")
            size, _ = struct.unpack(">QH", client.receive(10))
            assert size == SIZE
            assert client.receive(zeroes) == bytes(zeroes)
            assert client.request(0, 5, 5) == (0, CONTENT[5:10])


def test_errors_are_told_and_the_connection_goes_on(server: NbdServer) -> None:
    with Client(server) as client:
        assert client.option(5)[0] == 1 << 31 | 1  # STARTTLS: not supported
        assert client.option(3, b"x")[0] == 1 << 31 | 3
        assert client.option(6, b"\0\0\0\7other\0")[0] == 1 << 31 | 3  # cut short
        assert client.go(b"another") == [(1 << 31 | 6, b"")]
        assert client.option(9, bytes(5000))[0] == 1 << 31 | 9
        client.sock.sendall(b"IHAVEOPT" + struct.pack(">II", 3, 0))
        assert client.reply(3) == (2, b"\0\0\0\4disk")
        assert client.reply(3) == (1, b"")
        assert client.go(b"")[-1] == (1, b"")
        assert client.request(0, SIZE, 1)[0] == 22
        assert client.request(0, 0, 0)[0] == 22
        assert client.request(0, 1 << 63, 512)[0] == 22
        assert client.request(0, 0, (32 << 20) + 1)[0] == 22
        assert client.request(0, 8000, 512)[0] == 5
        assert client.request(1, 0, 70_000, bytes(70_000))[0] == 1
        assert client.request(4, 0, 512)[0] == 1
        assert client.request(6, 0, 512)[0] == 1
        assert client.request(42, 0, 512)[0] == 22
        assert client.request(0, 0, 4) == (0, CONTENT[:4])


HOSTILE = {
    "unknown flags": b"\xff\xff\xff\xff",
    "no option": b"\0\0\0\3" + b"x" * 16,
    "a name too long": b"\0\0\0\3IHAVEOPT" + struct.pack(">II", 1, 1 << 31),
    "an option too long": b"\0\0\0\3IHAVEOPT" + struct.pack(">II", 3, 0xFFFF_FFFF),
    "too many options": b"\0\0\0\3" + (b"IHAVEOPT" + struct.pack(">II", 5, 0)) * 101,
    "no such export": b"\0\0\0\3IHAVEOPT" + struct.pack(">II", 1, 3) + b"foo",
    "an abort": b"\0\0\0\3IHAVEOPT" + struct.pack(">II", 2, 0),
    "no request": b"\0\0\0\3IHAVEOPT" + struct.pack(">II", 1, 4) + b"disk" + b"x" * 28,
    "too much to write": b"\0\0\0\3IHAVEOPT"
    + struct.pack(">II", 1, 4)
    + b"disk"
    + struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 0xFFFF_FFFF),
    "a good bye": b"\0\0\0\3IHAVEOPT"
    + struct.pack(">II", 1, 4)
    + b"disk"
    + struct.pack(">IHHQQI", 0x25609513, 0, 2, 1, 0, 0),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_cannot_be_understood_ends_the_connection_and_no_other(
    what: str, server: NbdServer
) -> None:
    with Client(server) as good, socket.socket(socket.AF_UNIX) as sock:
        good.go()
        sock.settimeout(60)
        sock.connect(server.addresses[0].path)
        sock.sendall(HOSTILE[what])
        while True:
            try:
                if not sock.recv(4096):
                    break
            except ConnectionResetError:
                break
        assert good.request(0, 0, 4) == (0, CONTENT[:4])


def test_who_says_nothing_is_hung_up_on(server: NbdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "GREETING", 0.2)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(server.addresses[0].path)
        while sock.recv(100):  # its greeting
            pass


def test_who_says_little_at_a_time_is_hung_up_on_too(
    server: NbdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd, "GREETING", 0.5)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.addresses[0].path)
        begun = struct.pack(">I8sII", 3, b"IHAVEOPT", 3, 4000)
        for piece in (begun, *[b"x"] * 400):
            try:
                sock.sendall(piece)
            except OSError:
                return  # it has had enough
            time.sleep(0.05)
        pytest.fail("it is still listening")


def test_clients_beyond_the_limit_wait(server: NbdServer) -> None:
    clients = [Client(server) for _ in range(8)]
    with socket.socket(socket.AF_UNIX) as late:
        late.connect(server.addresses[0].path)
        late.settimeout(0.3)
        with pytest.raises(TimeoutError):
            late.recv(1)
        clients[0].sock.close()
        late.settimeout(60)
        assert late.recv(8) == b"NBDMAGIC"
    for client in clients:
        client.sock.close()


# --- tools that people have -------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "d").mkdir(parents=True)
    (top / "d" / "file").write_bytes(os.urandom(300_000))
    (top / "link").symlink_to("d/file")
    (top / "other").write_text("other")
    return top


@pytest.fixture
def served(tree: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    path = tmp_path / "socket"
    argv = [sys.executable, "-m", "tinyvmm", "serve", "--nbd", f"unix:{path}", "--read", str(tree)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == f"tinyvmm: NBD at unix:{path}\n"
        yield process, f"nbd+unix:///erofs?socket={path}"
        process.terminate()
        assert process.wait(60) == 0
    assert not path.exists()


def test_nbdinfo_nbdcopy_and_qemu_img_read_a_tree(
    served: tuple[subprocess.Popen[str], str], tree: Path, tmp_path: Path
) -> None:
    _, uri = served
    told = subprocess.run(["nbdinfo", uri], capture_output=True, text=True, check=True).stdout
    assert "is_read_only: true" in told
    assert "can_multi_conn: true" in told
    listed = subprocess.run(
        ["nbdinfo", "--list", uri.replace("/erofs", "/")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert 'export="erofs"' in listed
    copied, converted = tmp_path / "copied", tmp_path / "converted"
    subprocess.run(["nbdcopy", uri, str(copied)], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", uri, str(converted)], check=True)
    assert copied.read_bytes() == converted.read_bytes()
    assert read_image(copied) == read_tree(tree)
    subprocess.run(["fsck.erofs", str(copied)], check=True)


def test_a_file_that_changes_is_an_error_to_a_client_and_a_line_to_us(
    served: tuple[subprocess.Popen[str], str], tree: Path, tmp_path: Path
) -> None:
    process, uri = served
    (tree / "other").write_text("changed")
    done = subprocess.run(
        ["nbdcopy", uri, str(tmp_path / "copy")], capture_output=True, check=False
    )
    assert done.returncode != 0
    assert process.stderr is not None
    assert str(tree / "other") in process.stderr.readline()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nowhere to serve"),
        (["--nbd", "unix:s"], "--read DIR"),
        (["--nbd", "unix:s", "--read", ".", "--write", "."], "only read"),
        (["--nbd", "unix:s", "--read", ".", "--listen", "unix:t"], "one protocol"),
        (["--nbd", "unix:s", "--read", "/nowhere"], "/nowhere"),
        (["--nbd", "nowhere", "--read", "."], "no address"),
    ],
)
def test_serve_nbd_refuses_in_one_line(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *arguments]) == 125
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_usual_port_is_nbds() -> None:
    assert parse_address("tcp:localhost", nbd.PORT).port == 10809
