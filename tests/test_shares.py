"""Directories shared with a guest that runs: a guest that does as it is told, or does not."""

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.client import Client
from tinyvmm.guest import abi
from tinyvmm.inside import guest_calls
from tinyvmm.inside.guest_calls import Answer, Call
from tinyvmm.methods import shares
from tinyvmm.methods.shares import Shares

FD = 77


class Host:
    """Takes offers, as a VsockHost does; `dial` is the guest's."""

    def __init__(self) -> None:
        self.offers: dict[int, Callable[[socket.socket], None]] = {}

    def offer(self, port: int, take: Callable[[socket.socket], None]) -> None:
        self.offers[port] = take

    def withdraw(self, port: int) -> None:
        self.offers.pop(port, None)

    def dial(self, port: int) -> socket.socket:
        theirs, ours = socket.socketpair()
        self.offers[port](theirs)
        return ours


class Guest:
    """A kernel that does what it is asked, but for what `fails` says of a call's number."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.fails: dict[int, int] = {}
        self.calls: list[tuple[int, str]] = []
        self.streams: list[socket.socket] = []
        self.mounted: dict[str, str] = {}
        self.silent = False
        self.asked, self.given_up = threading.Event(), threading.Event()

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        """What it had open stays."""

    def give_up(self) -> None:
        self.given_up.set()

    def do(self, wanted: Call) -> Answer:
        if self.silent:
            self.asked.set()
            assert self.given_up.wait(30)
            raise ConfigError("the guest hung up")
        return self.all([wanted])[0].check()

    def all(self, wanted: Sequence[Call]) -> list[Answer]:
        return [self.make(one) for one in wanted]

    def make(self, wanted: Call) -> Answer:
        number = struct.unpack_from("<Q", wanted.request)[0]
        self.calls.append((number, wanted.what))
        result = -self.fails.get(number, 0)
        if number == abi.SYS_SOCKET:
            result = result or FD
        elif number == abi.SYS_CONNECT and not result:
            self.streams.append(self.host.dial(struct.unpack_from("<HHI", wanted.data)[2]))
        elif number == abi.SYS_MOUNT and not result:
            self.mounted[wanted.what] = wanted.data.decode()
        elif number == abi.SYS_UMOUNT2 and not result:
            self.mounted.pop(wanted.what)
            self.streams.pop().close()
        return Answer(result, b"", wanted.what)


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    guest = Guest(Host())
    monkeypatch.setattr(guest_calls, "open_guest", lambda _caller: guest)
    yield guest
    for stream in guest.streams:
        stream.close()


@pytest.fixture
def added(guest: Guest) -> Iterator[Shares]:
    host: Any = guest.host
    caller: Any = None
    modules = [("9pnet_fd", b"module")]
    made = Shares(lambda: host, caller, lambda names: modules if "9pnet_fd?" in names else [])
    yield made
    made.close()
    assert not any(thread.name == "share" for thread in threading.enumerate())


def test_a_directory_is_mounted_over_a_stream_and_served_there(
    guest: Guest, added: Shares, tmp_path: Path
) -> None:
    (tmp_path / "hello").write_text("hi")
    info = added.share_add(guest="/mnt/./data/", host=str(tmp_path))
    assert info == {
        "guest": "/mnt/data",
        "host": str(tmp_path),
        "readonly": False,
        "cache": "mmap",
    }
    assert added.shares() == [info]
    assert [what for _, what in guest.calls] == [
        "9pnet_fd", "/mnt", "/mnt/data",
        "socket", "connect timeout", "connect", "/mnt/data", "close",
    ]  # fmt: skip
    assert f"trans=fd,rfdno={FD},wfdno={FD}," in guest.mounted["/mnt/data"]
    assert "cache=mmap" in guest.mounted["/mnt/data"]
    assert guest.host.offers == {}
    with Client(guest.streams[0].dup()) as client, client.attach() as root:
        assert root.walk(b"hello").open().read() == b"hi"
    added.share_remove(guest="/mnt/data")
    assert added.shares() == []


def test_a_read_only_one_refuses_writes_whatever_the_guest_mounts(
    guest: Guest, added: Shares, tmp_path: Path
) -> None:
    (tmp_path / "hello").write_text("hi")
    assert added.share_add(guest="/ro", host=str(tmp_path), readonly=True)["cache"] == "loose"
    with (
        Client(guest.streams[0].dup()) as client,
        client.attach() as root,
        pytest.raises(OSError, match="Read-only"),
    ):
        root.walk(b"hello").open(os.O_WRONLY)


def test_what_the_guest_has_already_is_no_failure(
    guest: Guest, added: Shares, tmp_path: Path
) -> None:
    guest.fails = {abi.SYS_INIT_MODULE: errno.EEXIST, abi.SYS_MKDIRAT: errno.EEXIST}
    added.share_add(guest="/mnt", host=str(tmp_path))
    assert len(added.shares()) == 1


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (abi.SYS_INIT_MODULE, "insert the kernel module 9pnet_fd"),
        (abi.SYS_MKDIRAT, "make the directory /mnt"),
        (abi.SYS_CONNECT, "connect to this computer"),
        (abi.SYS_MOUNT, "mount it at /mnt"),
    ],
)
def test_a_guest_that_cannot_is_told_of_and_leaves_nothing(
    guest: Guest, added: Shares, tmp_path: Path, number: int, why: str
) -> None:
    guest.fails = {number: errno.EPERM}
    with pytest.raises(ConfigError, match=f"could not {why}: Operation not permitted"):
        added.share_add(guest="/mnt", host=str(tmp_path))
    assert added.shares() == []
    assert guest.host.offers == {}
    assert not any(thread.name == "share" for thread in threading.enumerate())


def test_one_in_use_stays_unless_it_is_taken_lazily(
    guest: Guest, added: Shares, tmp_path: Path
) -> None:
    added.share_add(guest="/mnt", host=str(tmp_path))
    with pytest.raises(ConfigError, match="/mnt is shared already"):
        added.share_add(guest="/mnt", host=str(tmp_path))
    guest.fails = {abi.SYS_UMOUNT2: errno.EBUSY}
    with pytest.raises(ConfigError, match="/mnt is in use in the guest"):
        added.share_remove(guest="/mnt")
    assert len(added.shares()) == 1
    guest.fails = {}
    stream = guest.streams[0].dup()
    added.share_remove(guest="/mnt", lazy=True)
    assert stream.recv(1) == b""  # this side has ended, whoever holds the other
    stream.close()
    with pytest.raises(ConfigError, match="nothing was shared at /mnt while it ran"):
        added.share_remove(guest="/mnt")


def test_one_that_the_guest_unmounts_by_itself_is_forgotten(
    guest: Guest, added: Shares, tmp_path: Path
) -> None:
    added.share_add(guest="/mnt", host=str(tmp_path))
    guest.streams.pop().close()
    while added.shares():
        threading.Event().wait(0.01)
    added.share_add(guest="/mnt", host=str(tmp_path))
    assert len(added.shares()) == 1


def test_what_cannot_be_shared_says_why(
    guest: Guest, added: Shares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where, what, why in (
        ("/mnt", "relative", "give its whole path"),
        ("/mnt", "/nothing/there", "no such directory"),
        ("mnt", str(tmp_path), "starts with a slash"),
        ("/", str(tmp_path), "which is private"),
    ):
        with pytest.raises(ConfigError, match=why):
            added.share_add(guest=where, host=what)
    monkeypatch.setattr(shares, "SHARES_MAX", 0)
    with pytest.raises(ConfigError, match="0 shares already"):
        added.share_add(guest="/mnt", host=str(tmp_path))
    assert guest.calls == []


def test_a_guest_that_never_answers_does_not_hold_up_the_end(
    guest: Guest, added: Shares, tmp_path: Path
) -> None:
    guest.silent = True
    said: list[ConfigError] = []

    def add() -> None:
        with pytest.raises(ConfigError) as raised:
            added.share_add(guest="/mnt", host=str(tmp_path))
        said.append(raised.value)

    thread = threading.Thread(target=add)
    thread.start()
    assert guest.asked.wait(30)
    added.close()
    thread.join(30)
    assert [str(error) for error in said] == ["the guest hung up"]
    guest.silent = False
    added.share_add(guest="/mnt", host=str(tmp_path))  # the next machine's, after a reboot
