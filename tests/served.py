"""A directory, and a server of it on a thread, for tests of clients."""

import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tinyvmm.fileserver.address import Address
from tinyvmm.fileserver.host import HostNode, HostTree
from tinyvmm.fileserver.hostfile import HostFile
from tinyvmm.fileserver.server import Server

HANG = 120.0  # seconds; nothing here takes one
CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Service:
    """A server on a thread, its tree, and its clients to be."""

    def __init__(self, directory: Path, **options: int) -> None:
        self.files = directory / "files"
        self.files.mkdir()
        (self.files / "motd").write_bytes(b"hello\n")
        (self.files / "slow").write_bytes(b"slow and steady")
        (self.files / "big").write_bytes(CONTENT)
        self.tree = HostTree(str(self.files))
        self.path = f"{directory}/socket"
        addresses = [Address(self.path), Address("", "127.0.0.1", 0)]
        self.server = Server(self.tree, addresses, **options)
        self.unix, self.tcp = map(str, self.server.addresses)
        self.thread = threading.Thread(target=self.server.serve)
        self.thread.start()

    def close(self) -> None:
        self.server.stop()
        self.thread.join(HANG)
        assert not self.thread.is_alive()
        self.server.close()
        self.tree.close()

    def socket(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(HANG)
        sock.connect(self.path)
        return sock


class Gate:
    """Where reads of the file `slow` wait until the test lets them pass."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.passes = threading.Semaphore(0)

    def wait_until_reached(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.arrived.acquire(timeout=HANG)

    def wait(self) -> None:
        self.arrived.release()
        assert self.passes.acquire(timeout=HANG)


def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Have reads of `slow` wait at the gate which this gives."""
    gate = Gate()

    class GatedFile(HostFile):
        __slots__ = ()  # laid out as a HostFile, which is made one below

        def readv_now(self, buffers: Sequence[memoryview], offset: int) -> None:
            del buffers, offset

        def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
            gate.wait()
            return super().readv(buffers, offset)

    def open_gated(node: HostNode, flags: int) -> object:
        file = opened(node, flags)
        if node.name == b"slow":
            assert isinstance(file, HostFile)
            file.__class__ = GatedFile
        return file

    opened = HostNode.open
    monkeypatch.setattr(HostNode, "open", open_gated)
    yield gate
    gate.passes.release(10_000)
