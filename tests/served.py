"""A directory, and a server of it on a thread, for tests of clients."""

import socket
import threading
from pathlib import Path

from tinyvmm.fileserver.address import Address
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.server import Server

HANG = 30.0  # seconds; nothing here takes one
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
