"""FileServer: Python objects, a directory or any tree, over 9P from a thread of this process.

with FileServer({"hello": b"hi", "now": lambda: time.ctime()}) as server:
    with connect(server.address) as client, client.attach() as root:
        print(root.walk(b"now").open().read())
"""

import os
import tempfile
import threading
from typing import Self

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.address import parse_address
from tinyvmm.fileserver.objects import ObjectTree
from tinyvmm.fileserver.server import Server


class FileServer:
    """Serves `files` for as long as a `with` or `serve` lasts."""

    def __init__(
        self,
        files: object,
        listen: str | None = None,
        *,
        writable: bool = False,
        connections_max: int = 64,
    ) -> None:
        """Listen at `unix:PATH`, `tcp:HOST:PORT`, or a Unix socket in a private directory.

        `files` is what ObjectTree takes. ConfigError for files that cannot be served and an address
        that cannot be had.
        """
        self._directory = None
        if listen is None:
            self._directory = tempfile.TemporaryDirectory(prefix="tinyvmm-9p-")
            listen = f"unix:{os.path.join(self._directory.name, 'socket')}"
        self._tree: ObjectTree | None = None
        try:
            self._tree = ObjectTree(files, writable=writable)
            self._server = Server(
                self._tree, [parse_address(listen)], connections_max=connections_max
            )
        except ConfigError:
            self._clean()
            raise
        self.address = str(self._server.addresses[0])
        """Where clients connect."""
        self._thread = threading.Thread(target=self._server.serve, name="9P server", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._thread.join()
        self._end()

    def serve(self) -> None:
        """Serve on this thread, without a `with`, until `stop` or an exception such as Ctrl-C."""
        try:
            self._server.serve()
        finally:
            self._end()

    def stop(self) -> None:
        """Have `serve` return soon; any thread or signal handler may call."""
        self._server.stop()

    def _end(self) -> None:
        self._server.close()
        self._clean()

    def _clean(self) -> None:
        if self._tree is not None:
            self._tree.close()
        if self._directory is not None:
            self._directory.cleanup()
