"""The file server over a Unix socket beside Debian's diod, which is C: one client for both.

Rounds are interleaved; each figure is the median of its rounds, and the ratio is ours to diod's:
operations a second, so that 0.5 means half of what diod does. `make bench` in docs/benchmarks.md.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from bench.place import MAIN
from tinyvmm import ninep
from tinyvmm.fileserver.client import Client, File, connect

ROUNDS = 9
ENTRIES = 1000
BIG = 64 << 20
MSIZE = 64 * 1024  # the most diod has
CHUNK = MSIZE - ninep.IOHDRSZ


def stat(client: Client, root: File) -> None:
    """Walk + getattr + clunk."""
    fid = 1000
    client.ask(ninep.Twalk(root.fid, fid, (b"small",)), ninep.Rwalk)
    client.ask(ninep.Tgetattr(fid, ninep.P9_GETATTR_BASIC), ninep.Rgetattr)
    client.ask(ninep.Tclunk(fid), ninep.Rclunk)


def read_4k(client: Client, root: File) -> None:
    """Open + read 4k + close."""
    fid = 1000
    client.ask(ninep.Twalk(root.fid, fid, (b"small",)), ninep.Rwalk)
    client.ask(ninep.Tlopen(fid, os.O_RDONLY), ninep.Rlopen)
    client.ask(ninep.Tread(fid, 0, 4096), ninep.Rread)
    client.ask(ninep.Tclunk(fid), ninep.Rclunk)


def readdir(_: Client, root: File) -> None:
    """Readdir of 1,000."""
    with root.walk(b"many") as many:
        found = sum(1 for _ in many.open(os.O_RDONLY).names())
    if found != ENTRIES:
        sys.exit(f"{found} entries where {ENTRIES} are")


def read_big(client: Client, root: File) -> None:
    """Sequential read of 64 MiB, one request after the other."""
    with root.walk(b"big") as big:
        big.open(os.O_RDONLY)
        for offset in range(0, BIG, CHUNK):
            client.ask(ninep.Tread(big.fid, offset, CHUNK), ninep.Rread)


def write_big(client: Client, root: File) -> None:
    """Sequential write of 64 MiB."""
    data = bytes(CHUNK)
    with root.walk(b"written") as big:
        big.open(os.O_WRONLY)
        for offset in range(0, BIG, CHUNK):
            client.ask(ninep.Twrite(big.fid, offset, data), ninep.Rwrite)


def pipelined(client: Client, root: File) -> None:
    """100 getattrs, 32 in flight."""
    request = ninep.Tgetattr(root.fid, ninep.P9_GETATTR_BASIC)
    for _ in client.ask_all([request] * 100):
        pass


CASES: list[tuple[str, Callable[[Client, File], None], int]] = [
    ("walk+getattr+clunk", stat, 500),
    ("open+read 4k+close", read_4k, 400),
    ("readdir of 1,000", readdir, 15),
    ("100 getattrs, pipelined", pipelined, 20),
    ("read 64 MiB", read_big, 1),
    ("write 64 MiB", write_big, 1),
]


@contextmanager
def server(arguments: list[str], path: str) -> Iterator[None]:
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, cwd=os.path.dirname(path)
    ) as process:
        try:
            for _ in range(200):
                if os.path.exists(path):
                    break
                time.sleep(0.05)
            time.sleep(0.1)
            yield
        finally:
            process.terminate()


def make_files(where: str) -> None:
    os.chmod(where, 0o755)
    with open(f"{where}/small", "wb") as file:
        file.write(bytes(8192))
    with open(f"{where}/big", "wb") as file:
        file.writelines(bytes(1 << 20) for _ in range(BIG >> 20))
    with open(f"{where}/written", "wb") as file:
        file.truncate(BIG)
    os.mkdir(f"{where}/many")
    for number in range(ENTRIES):
        with open(f"{where}/many/entry{number:04}", "wb"):
            pass


def main() -> None:
    diod = shutil.which("diod", path=f"{os.environ['PATH']}:/usr/sbin")
    if diod is None:
        print("no diod here: apt-get install diod")
        return
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        files = f"{directory}/files"
        os.mkdir(files)
        make_files(files)
        ours, theirs = f"{directory}/ours", f"{directory}/theirs"
        command = [sys.executable, "-c", MAIN, "serve", "--listen", f"unix:{ours}"]
        stack.enter_context(server([*command, "--shared", files], ours))
        command = [diod, "-f", "-n", "-N", "-c", "/dev/null", "-e", files, "-l", theirs]
        stack.enter_context(server([*command, "-L", f"{directory}/log"], theirs))
        clients = [
            (stack.enter_context(connect(f"unix:{path}", msize=MSIZE)), aname)
            for path, aname in ((ours, b""), (theirs, files.encode()))
        ]
        roots = [(client, client.attach(aname, n_uname=os.getuid())) for client, aname in clients]
        print(f"msize: ours {roots[0][0].msize}, diod's {roots[1][0].msize}")
        for name, case, count in CASES:
            times: list[list[float]] = [[], []]
            for turn in range(ROUNDS * 2):
                client, root = roots[turn % 2]
                begin = time.perf_counter()
                for _ in range(count):
                    case(client, root)
                times[turn % 2].append((time.perf_counter() - begin) / count)
            mine, other = map(statistics.median, times)
            print(
                f"{name:24} {1 / mine:9.0f}/s  diod {1 / other:9.0f}/s  ratio {other / mine:5.2f}"
            )


if __name__ == "__main__":
    main()
