"""The server on sockets: many clients, each its own session; nobody is hurt by another.

Clients are our own (`tinyvmm.fileserver.client`), or plain sockets where the bytes themselves are
in question. Other people's clients and servers are in test_interop.py.
"""

import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from errno import EBADF, EIO, ENOENT
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.served import CONTENT, HANG, Gate, Service, gated
from tests.waiting import wait_for
from tinyvmm import ninep, trace
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver import client as client_module
from tinyvmm.fileserver import connection
from tinyvmm.fileserver.address import Address, parse_address
from tinyvmm.fileserver.client import Client
from tinyvmm.fileserver.connection import FIRST_MAX, HELD_MAX, IN_FLIGHT_MAX
from tinyvmm.fileserver.server import Server
from tinyvmm.ninep import NINEP2000_L, NOFID, NOTAG, Message


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    service.close()


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of clients, beside their messages."""
    said: list[str] = []

    def hook(record: trace.Record) -> None:
        if isinstance(record, trace.Message):
            said.append(trace.text(record))

    monkeypatch.setattr(trace, "hook", hook)
    return said


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    yield from gated(monkeypatch)


def connect(address: str, msize: int = 512 * 1024) -> Client:
    """A client that does not wait for ever."""
    client = client_module.connect(address, msize=msize)
    client._sock.settimeout(HANG)
    return client


def read(fid: int, count: int = 4, offset: int = 0) -> ninep.Tread:
    return ninep.Tread(fid, offset, count)


def receive_all(sock: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    pieces = []
    with suppress(ConnectionResetError):
        while piece := sock.recv(1 << 20):
            pieces.append(piece)
    return b"".join(pieces)


def messages(data: bytes) -> list[tuple[int, Message]]:
    return [ninep.decode(data) for data in ninep.Framer(1 << 20).feed(data)]


def version(msize: int = 8192) -> bytes:
    return ninep.encode(ninep.Tversion(msize, ninep.VERSION), NOTAG)


def attach(fid: int = 0) -> bytes:
    return ninep.encode(ninep.Tattach(fid, NOFID, b"", b"", os.getuid()), 1)


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_what_a_client_does_happens_to_the_directory(service: Service, kind: str) -> None:
    files = service.files
    with connect(getattr(service, kind)) as client, client.attach(n_uname=os.getuid()) as root:
        with root.walk(b"motd") as file:
            assert file.open().read() == b"hello\n"
        with root.walk() as made:
            assert made.create(b"new").write(CONTENT) == len(CONTENT)
            assert (files / "new").read_bytes() == CONTENT
            assert made.read() == CONTENT
            assert made.read(10, 5) == CONTENT[5:15]
        root.mkdir(b"directory")
        assert (files / "directory").is_dir()
        with root.walk() as listed:
            assert sorted(listed.open().names()) == sorted(map(os.fsencode, os.listdir(files)))
        root.walk(b"new").remove()
        assert not (files / "new").exists()
        with pytest.raises(FileNotFoundError):
            root.walk(b"directory", b"nothing", b"at", b"all")


def test_a_walk_may_be_as_long_as_it_likes(service: Service) -> None:
    deep = service.files.joinpath(*"abcdefghijklmnopqrstuvwxyz")
    deep.mkdir(parents=True)
    with connect(service.unix) as client, client.attach() as root:
        names = [bytes([letter]) for letter in b"abcdefghijklmnopqrstuvwxyz"]
        with root.walk(*names) as file:
            found = file.stat()
            assert isinstance(found, ninep.Rgetattr)
            assert found.mode == deep.stat().st_mode
        with pytest.raises(FileNotFoundError):
            root.walk(*names, b"more")


def test_each_client_has_fids_of_its_own_and_all_have_one_tree(service: Service) -> None:
    with (
        connect(service.unix) as one,
        connect(service.tcp) as other,
        one.attach() as root,
        root.walk(b"motd") as file,
    ):
        with pytest.raises(OSError, match="Bad file") as refused:
            other.ask(ninep.Tclunk(file.fid), Message)
        assert refused.value.errno == EBADF
        with other.attach() as theirs, theirs.walk(b"motd") as same:
            assert same.qid == file.qid


def test_locks_of_one_client_stand_against_another_until_it_leaves(service: Service) -> None:
    def lock(client: Client, name: bytes) -> int:
        file = client.attach().walk(b"motd").open(os.O_RDWR)
        request = ninep.Tlock(file.fid, ninep.P9_LOCK_TYPE_WRLCK, 0, 0, 0, 1, name)
        return client.ask(request, ninep.Rlock).status

    with connect(service.unix) as other:
        with connect(service.tcp) as one:
            assert lock(one, b"one") == ninep.P9_LOCK_SUCCESS
            assert lock(other, b"other") == ninep.P9_LOCK_BLOCKED
        wait_for(lambda: lock(other, b"other") == ninep.P9_LOCK_SUCCESS)


def test_a_client_that_leaves_leaves_nothing_open(service: Service) -> None:
    with connect(service.unix) as client:
        root = client.attach()
        for name in (b"motd", b"big", b"slow"):
            root.walk(name).open()
        assert len(service.tree.nodes) == 4
    wait_for(lambda: len(service.tree.nodes) == 1)


def test_clients_side_by_side_each_find_what_they_wrote(service: Service) -> None:
    wrong: list[str] = []

    def work(number: int) -> None:
        with connect(service.unix if number % 2 else service.tcp) as client:
            root = client.attach(n_uname=os.getuid())
            for round_ in range(20):
                data = f"{number} {round_} ".encode() * 3000
                with root.walk() as file:
                    file.create(b"file%d" % number, os.O_RDWR | os.O_TRUNC).write(data)
                with root.walk(b"file%d" % number) as file:
                    if file.open().read() != data:
                        wrong.append(f"{number} {round_}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert wrong == []
    assert [(service.files / f"file{number}").read_bytes()[:5] for number in range(6)] == [
        f"{number} 19 ".encode()[:5] for number in range(6)
    ]


# --- bytes --------------------------------------------------------------------------------------


def conversation() -> bytes:
    requests = [
        ninep.Twalk(0, 1, (b"motd",)),
        ninep.Tlopen(1, os.O_RDONLY),
        ninep.Tread(1, 0, 100),
        ninep.Tgetattr(99, 0),
        ninep.Tclunk(1),
    ]
    sent = [ninep.encode(request, tag) for tag, request in enumerate(requests, 2)]
    return version() + attach() + b"".join(sent)


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_replies_do_not_depend_on_how_the_requests_were_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sent = conversation()
    cuts = data.draw(st.sets(st.integers(1, len(sent) - 1), max_size=20))
    edges = [0, *sorted(cuts), len(sent)]
    service = Service(tmp_path_factory.mktemp("cut"))
    try:
        with service.socket() as sock:
            for start, end in pairwise(edges):
                sock.sendall(sent[start:end])
            sock.shutdown(socket.SHUT_WR)
            replies = messages(receive_all(sock))
    finally:
        service.close()
    assert [tag for tag, _ in replies] == [NOTAG, 1, 2, 3, 4, 5, 6]
    assert [type(reply).__name__[1:] for _, reply in replies] == (
        ["version", "attach", "walk", "lopen", "read", "lerror", "clunk"]
    )
    assert replies[4][1] == ninep.Rread(b"hello\n")


def test_requests_byte_by_byte_are_answered_as_whole_ones(service: Service) -> None:
    with service.socket() as whole, service.socket() as pieces:
        whole.sendall(conversation())
        for byte in conversation():
            pieces.sendall(bytes([byte]))
        for sock in (whole, pieces):
            sock.shutdown(socket.SHUT_WR)
        assert messages(receive_all(pieces)) == messages(receive_all(whole))


def test_many_requests_at_once_with_replies_larger_than_any_buffer(service: Service) -> None:
    with connect(service.unix) as client, client.attach() as root:
        file = root.walk(b"big").open()
        requests = [read(file.fid, 100_000, offset) for offset in range(0, len(CONTENT), 100_000)]
        replies = client.ask_all(requests * 5, window=20)
        got = [reply.data for reply in replies if isinstance(reply, ninep.Rread)]
        assert b"".join(bytes(data) for data in got if isinstance(data, bytes)) == CONTENT * 5


@pytest.mark.parametrize("msize", [256, 4096, 65536, 1 << 30])
def test_data_is_whole_whatever_size_of_message_was_agreed(service: Service, msize: int) -> None:
    data = os.urandom(70_000)
    with connect(service.unix, msize=min(msize, 1 << 24)) as client, client.attach() as root:
        assert client.msize <= min(msize, 512 * 1024)
        with root.walk() as file:
            assert file.create(b"data").write(data) == len(data)
            assert file.read() == data


def test_a_new_version_begins_anew_on_the_same_stream(service: Service) -> None:
    with service.socket() as sock:
        sock.sendall(version() + attach() + version(4096) + attach())
        sock.sendall(ninep.encode(ninep.Tclunk(7), 3))
        sock.shutdown(socket.SHUT_WR)
        assert [reply for _, reply in messages(receive_all(sock))] == [
            ninep.Rversion(8192, ninep.VERSION),
            ninep.Rattach(service.tree.root().qid()),
            ninep.Rversion(4096, ninep.VERSION),
            ninep.Rattach(service.tree.root().qid()),
            ninep.Rlerror(EBADF),
        ]


# --- what is no 9P ------------------------------------------------------------------------------

HEAD = struct.Struct("<IBH")
GARBAGE = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a size of nothing": HEAD.pack(0, 100, 1),
    "a size less than a header": HEAD.pack(6, 100, 1),
    "the largest size": HEAD.pack(0xFFFF_FFFF, 100, 1),
    "one more than may come first": HEAD.pack(FIRST_MAX + 1, 100, 1),
    "no version first": attach(),
    "more than was agreed": version(4096) + HEAD.pack(4097, ninep.Twrite.number, 1),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_its_connection_with_one_record_and_hurts_nobody_else(
    service: Service, records: list[str], data: bytes
) -> None:
    with connect(service.unix) as other, other.attach() as root, service.socket() as sock:
        sock.sendall(data)
        replies = messages(receive_all(sock))
        assert [type(reply) for _, reply in replies] == [ninep.Rversion] * data.startswith(
            version(4096)
        )
        assert len(records) == 1
        assert "no 9P" in records[0]
        assert root.walk(b"motd").open().read() == b"hello\n"


@given(st.lists(st.binary(max_size=60), max_size=6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_whatever_bytes_come_the_next_client_is_served(
    fuzzed: Service, pieces: list[bytes], greeted: bool
) -> None:
    framed = [struct.pack("<I", len(piece) + 4) + piece for piece in pieces]
    with fuzzed.socket() as sock:
        with suppress(ConnectionError):
            sock.sendall((version() + attach() if greeted else b"") + b"".join(framed))
            sock.shutdown(socket.SHUT_WR)
        receive_all(sock)
    with connect(fuzzed.unix) as client, client.attach() as root:
        assert root.walk(b"motd").open().read() == b"hello\n"


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("fuzzed"))
    yield service
    service.close()


def test_a_message_of_no_known_type_is_answered_and_the_next_one_too(service: Service) -> None:
    with service.socket() as sock:
        sock.sendall(version() + HEAD.pack(7, 255, 5) + attach())
        sock.shutdown(socket.SHUT_WR)
        replies = messages(receive_all(sock))
        assert isinstance(replies[1][1], ninep.Rlerror)
        assert replies[1][0] == 5
        assert isinstance(replies[2][1], ninep.Rattach)


def test_a_client_that_is_gone_in_the_midst_of_a_message_is_forgotten(
    service: Service, records: list[str]
) -> None:
    with service.socket() as sock:
        sock.sendall(version() + attach()[:-1])
    wait_for(lambda: threads_of_clients() == 0)
    assert records == []


def threads_of_clients() -> int:
    return sum(thread.name.startswith("9P client") for thread in threading.enumerate())


# --- requests that wait -------------------------------------------------------------------------


def test_a_read_that_waits_delays_no_other_request_and_no_other_client(
    service: Service, gate: Gate
) -> None:
    with connect(service.unix) as client, connect(service.unix) as other:
        root = client.attach()
        slow = root.walk(b"slow").open()
        tag = client.send(read(slow.fid))
        gate.wait_until_reached()
        assert root.walk(b"motd").open().read() == b"hello\n"
        assert other.attach().walk(b"motd").open().read() == b"hello\n"
        gate.passes.release()
        assert client.wait(tag) == ninep.Rread(b"slow")


def test_too_much_at_once_is_held_and_then_answered_in_full(service: Service, gate: Gate) -> None:
    count = IN_FLIGHT_MAX + 500
    with connect(service.unix) as client, connect(service.unix) as other:
        slow = client.attach().walk(b"slow").open()
        tags = [client.send(read(slow.fid, 2, number % 10)) for number in range(count)]
        gate.wait_until_reached()
        assert other.attach().walk(b"motd").open().read() == b"hello\n"
        gate.passes.release(count)
        for number, tag in enumerate(tags):
            at = number % 10
            assert client.wait(tag) == ninep.Rread(b"slow and steady"[at : at + 2])


def test_a_client_that_asks_for_more_than_is_held_is_not_read_until_there_is_room(
    service: Service, gate: Gate
) -> None:
    chunk = 50_000
    count = IN_FLIGHT_MAX + 4 * HELD_MAX // chunk
    with connect(service.unix) as client:
        root = client.attach(n_uname=os.getuid())
        slow = root.walk(b"slow").open()
        file = root.walk().create(b"written")
        for _ in range(IN_FLIGHT_MAX):
            client.send(read(slow.fid))
        tags: list[int] = []

        def send() -> None:
            for number in range(count - IN_FLIGHT_MAX):
                request = ninep.Twrite(file.fid, number * chunk, bytes(chunk))
                tags.append(client.send(request))

        sender = threading.Thread(target=send)
        sender.start()
        gate.wait_until_reached()
        sender.join(0.3)  # it would have been done
        assert sender.is_alive()
        assert os.stat(service.files / "written").st_size == 0
        gate.passes.release(IN_FLIGHT_MAX)
        sender.join(HANG)
        assert [client.wait(tag) for tag in tags] == [ninep.Rwrite(chunk)] * len(tags)
    assert os.stat(service.files / "written").st_size == chunk * len(tags)


def test_a_flush_passes_what_is_held(service: Service, gate: Gate) -> None:
    with connect(service.unix) as client:
        slow = client.attach().walk(b"slow").open()
        tags = [client.send(read(slow.fid)) for _ in range(IN_FLIGHT_MAX + 3)]
        gate.wait_until_reached()
        *_, first_held, second_held, last_held = tags
        assert client.flush(second_held) is None
        assert client.flush(tags[0]) is None  # so there is room for the first one held
        gate.passes.release(len(tags))
        for tag in tags[1:IN_FLIGHT_MAX]:
            assert client.wait(tag) == ninep.Rread(b"slow")
        assert client.wait(first_held) == ninep.Rread(b"slow")
        assert client.wait(last_held) == ninep.Rread(b"slow")
        client.attach().close()  # and no reply came for those given up
        assert client._replies == {}


def test_a_new_version_passes_what_is_held_and_ends_it(service: Service, gate: Gate) -> None:
    with connect(service.unix) as client:
        slow = client.attach().walk(b"slow").open()
        for _ in range(IN_FLIGHT_MAX + 3):
            client.send(read(slow.fid))
        gate.wait_until_reached()
        client._sock.sendall(version())
        assert client.receive() == (NOTAG, ninep.Rversion(8192, ninep.VERSION))
        gate.passes.release(10_000)
        client._sock.sendall(attach())
        assert isinstance(client.receive()[1], ninep.Rattach)


def test_who_asks_no_more_still_gets_every_reply(service: Service, gate: Gate) -> None:
    with connect(service.unix) as client:
        slow = client.attach().walk(b"slow").open()
        tags = [client.send(read(slow.fid)) for _ in range(IN_FLIGHT_MAX + 30)]
        client._sock.shutdown(socket.SHUT_WR)
        gate.wait_until_reached()
        gate.passes.release(len(tags))
        assert [client.wait(tag) for tag in tags] == [ninep.Rread(b"slow")] * len(tags)
        with pytest.raises(ConnectionError, match="hung up"):
            client.receive()


def test_who_leaves_while_requests_wait_is_forgotten_when_they_end(
    service: Service, gate: Gate
) -> None:
    with connect(service.unix) as client:
        slow = client.attach().walk(b"slow").open()
        for _ in range(IN_FLIGHT_MAX + 30):
            client.send(read(slow.fid))
        gate.wait_until_reached()
    gate.passes.release(10_000)
    wait_for(lambda: threads_of_clients() == 0 and len(service.tree.nodes) == 1)


def test_who_does_not_read_its_replies_delays_only_itself(service: Service) -> None:
    count = 40
    with service.socket() as lazy, connect(service.unix) as other:
        lazy.sendall(version(1 << 20) + attach())
        lazy.sendall(ninep.encode(ninep.Twalk(0, 1, (b"big",)), 1))
        lazy.sendall(ninep.encode(ninep.Tlopen(1, os.O_RDONLY), 1))
        for tag in range(count):
            lazy.sendall(ninep.encode(read(1, 400_000), tag))
        root = other.attach()
        for _ in range(50):
            assert root.walk(b"motd").open().read() == b"hello\n"
        lazy.shutdown(socket.SHUT_WR)
        replies = messages(receive_all(lazy))[4:]
        assert replies == [(tag, ninep.Rread(CONTENT[:400_000])) for tag in range(count)]


# --- limits -------------------------------------------------------------------------------------


def test_one_client_too_many_waits_for_another_to_leave(tmp_path: Path) -> None:
    service = Service(tmp_path, connections_max=2)
    try:
        one, two = connect(service.unix), connect(service.unix)
        with service.socket() as waiting:
            waiting.sendall(version())
            waiting.settimeout(0.2)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
            one.close()
            waiting.settimeout(HANG)
            assert ninep.decode(waiting.recv(100))[1] == ninep.Rversion(8192, ninep.VERSION)
        two.close()
    finally:
        service.close()


def test_who_comes_when_no_thread_can_be_had_is_hung_up_on_and_the_next_is_served(
    service: Service, records: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with connect(service.unix) as other:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with service.socket() as sock:
                assert receive_all(sock) == b""
        assert [record for record in records if "no more threads" in record]
        assert other.attach().walk(b"motd").open().read() == b"hello\n"
        with connect(service.unix) as late:
            late.attach().close()


def test_who_never_says_what_it_wants_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[str]
) -> None:
    monkeypatch.setattr(connection, "GREETING", 1)
    service = Service(tmp_path)
    try:
        with service.socket() as silent:
            assert receive_all(silent) == b""
    finally:
        service.close()
    assert "too long" in records[0]


def test_who_says_it_a_byte_now_and_then_is_hung_up_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[str]
) -> None:
    monkeypatch.setattr(connection, "GREETING", 1)
    service = Service(tmp_path)
    try:
        with service.socket() as slow:
            slow.sendall(struct.pack("<I", 8000))
            for _ in range(400):
                try:
                    slow.sendall(b"x")
                except OSError:
                    break  # it has had enough
                time.sleep(0.05)
            else:
                pytest.fail("it is still listening")
    finally:
        service.close()
    assert "too long" in records[0]


def test_who_is_silent_is_hung_up_on_if_so_wished(tmp_path: Path, records: list[str]) -> None:
    service = Service(tmp_path, idle=1)
    try:
        with connect(service.unix) as silent, pytest.raises(ConnectionError):
            silent.receive()
    finally:
        service.close()
    assert "too long" in records[0]


# --- the end ------------------------------------------------------------------------------------


def test_the_end_of_the_server_is_the_end_of_every_client_and_of_the_socket_file(
    tmp_path: Path, gate: Gate
) -> None:
    service = Service(tmp_path)
    with connect(service.unix) as idle, connect(service.tcp) as waiting, service.socket() as lazy:
        waiting.send(read(waiting.attach().walk(b"slow").open().fid))
        gate.wait_until_reached()
        lazy.sendall(version(1 << 20) + attach())
        lazy.sendall(ninep.encode(ninep.Twalk(0, 1, (b"big",)), 1))
        lazy.sendall(ninep.encode(ninep.Tlopen(1, os.O_RDONLY), 1))
        for tag in range(20):
            lazy.sendall(ninep.encode(read(1, 400_000), tag))
        service.close()
        assert threads_of_clients() == 0
        for client in (idle, waiting):
            with pytest.raises(ConnectionError):
                client.receive()
    assert not os.path.exists(service.path)


def test_a_socket_file_that_is_another_servers_by_now_is_left_to_it(tmp_path: Path) -> None:
    service = Service(tmp_path)
    os.unlink(service.path)
    with Server(service.tree, [Address(service.path)]):
        service.close()
        assert stat.S_ISSOCK(os.lstat(service.path).st_mode)


# --- addresses ----------------------------------------------------------------------------------


def test_the_socket_of_a_dead_server_is_replaced(tmp_path: Path, service: Service) -> None:
    path = str(tmp_path / "stale")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with Server(service.tree, [Address(path)]):
        assert stat.S_ISSOCK(os.lstat(path).st_mode)
        with pytest.raises(ConfigError, match="another server"):
            Server(service.tree, [Address(path)])
        assert os.path.exists(path)


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_a_socket_is_its_owners_alone_unless_told_otherwise(
    tmp_path: Path, service: Service, umask: int
) -> None:
    before = os.umask(umask)
    try:
        with Server(service.tree, [Address(f"{tmp_path}/own")]):
            assert stat.S_IMODE(os.lstat(f"{tmp_path}/own").st_mode) == 0o600
        with Server(service.tree, [Address(f"{tmp_path}/all")], socket_mode=0o666):
            assert stat.S_IMODE(os.lstat(f"{tmp_path}/all").st_mode) == 0o666
    finally:
        os.umask(before)


def test_what_is_there_and_no_socket_is_left_alone(tmp_path: Path, service: Service) -> None:
    (tmp_path / "file").write_text("precious")
    for name in ("file", "files"):
        with pytest.raises(ConfigError, match="another path"):
            Server(service.tree, [Address(f"{tmp_path}/{name}")])
    assert (tmp_path / "file").read_text() == "precious"


def test_a_server_that_cannot_have_one_address_leaves_nothing_at_the_others(
    tmp_path: Path, service: Service
) -> None:
    taken = parse_address(service.tcp)
    with pytest.raises(ConfigError, match="another port"):
        Server(service.tree, [Address(f"{tmp_path}/first"), taken])
    assert not os.path.exists(tmp_path / "first")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/9p", Address("/run/9p")),
        ("unix:relative:path", Address("relative:path")),
        ("tcp:localhost:5640", Address("", "localhost", 5640)),
        ("tcp:localhost", Address("", "localhost", 564)),
        ("tcp:[::1]:5640", Address("", "::1", 5640)),
        ("tcp:[::1]", Address("", "::1", 564)),
        ("tcp:0.0.0.0:0", Address("", "0.0.0.0", 0)),  # noqa: S104 - only parsed
    ],
)
def test_addresses_are_read_and_written(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", "unix:", "unix:" + "x" * 108, "unix:/a\0b", "/run/9p", "udp:host:1"),
        *("tcp:", "tcp::80", "tcp:host:", "tcp:host:http", "tcp:host:65536", "tcp:host:-1"),
        "tcp:[::1:80",
    ],
)
def test_what_is_no_address_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(ConfigError, match="give"):
        parse_address(text)


# --- the client ---------------------------------------------------------------------------------


def test_a_client_says_who_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start a server there first"):
        connect(f"unix:{tmp_path}/nobody")


def test_a_client_says_that_its_dialect_is_not_spoken() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(ninep.encode(ninep.Rversion(8192, b"unknown"), NOTAG))
    with theirs, pytest.raises(OSError, match=r"does not speak 9P2000\.L"):
        Client(ours)


def test_a_client_given_plan_9s_errors_says_them() -> None:
    ours, theirs = socket.socketpair()
    plain = ninep.NINEP2000
    theirs.sendall(plain.encode(ninep.Rversion(8192, b"9P2000"), NOTAG))
    theirs.sendall(plain.encode(ninep.Rerror(b"phase error"), 0))
    with theirs, Client(ours, dialect=plain) as client:
        with pytest.raises(OSError, match="phase error") as refused:
            client.attach()
        assert refused.value.errno == EIO


def test_a_client_does_not_take_more_than_was_agreed() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(ninep.encode(ninep.Rversion(1024, ninep.VERSION), NOTAG))
    theirs.sendall(ninep.encode(ninep.Rread(bytes(1024)), 0))
    refused = pytest.raises(ninep.ProtocolError, match="1024 at most")
    with theirs, Client(ours, dialect=NINEP2000_L) as client, refused:
        client.attach()


def test_a_reply_to_a_request_given_up_that_was_quicker_is_not_lost(service: Service) -> None:
    with connect(service.unix) as client, client.attach() as root:
        tag = client.send(ninep.Twalk(root.fid, 50, (b"motd",)))
        assert isinstance(client.flush(tag), ninep.Rwalk)
        with pytest.raises(OSError, match=os.strerror(ENOENT)):
            root.walk(b"nothing")
