"""A directory that is not there: files made by functions, served over 9P.

python -m examples.files_from_python                     shows what a client sees
python -m examples.files_from_python unix:/tmp/files     serves it until Ctrl-C; then, as root:
    mount -t 9p -o trans=unix,version=9p2000.L,cache=none /tmp/files /mnt
"""

import sys
import threading
import time
from collections.abc import Iterator

from tinyvmm.fileserver.client import connect
from tinyvmm.fileserver.entry import Entry, Symlink
from tinyvmm.fileserver.serving import FileServer

started = time.monotonic()


def uptime() -> str:
    """Be called whenever somebody opens the file."""
    return f"{time.monotonic() - started:.1f} seconds\n"


def primes() -> Iterator[str]:
    """Give a file of which nobody knows the size."""
    found: list[int] = []
    for number in range(2, 100):
        if all(number % prime for prime in found):
            found.append(number)
            yield f"{number}\n"


FILES = {
    "readme": "Nothing here is on a disk.\n",
    "uptime": uptime,
    "math": {"primes": primes, "pi": b"3.14159\n"},
    "hello": Entry("#!/bin/sh\necho hello\n", mode=0o755),
    "latest": Symlink("uptime"),
}

if len(sys.argv) > 1:
    with FileServer(FILES, sys.argv[1]) as server:
        sys.stdout.write(f"serving at {server.address}\n")
        threading.Event().wait()

with FileServer(FILES) as server, connect(server.address) as client, client.attach() as root:
    for name in sorted(root.walk().open().names()):
        sys.stdout.write(f"{name.decode()}\n")
    sys.stdout.write(root.walk(b"readme").open().read().decode())
    lines = root.walk(b"math", b"primes").open().read().decode().split()
    sys.stdout.write(f"{len(lines)} primes, the last is {lines[-1]}\n")
