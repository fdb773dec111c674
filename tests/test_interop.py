"""Other people's clients at our server, and our client at other people's servers.

Debian's diod (9P2000.L, in C), pyroute2 (9P2000) and p9fs with its py9p (all three dialects).
What they find is compared with the directory itself. Linux's own client is in tests/linux.
"""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.served import CONTENT, HANG, Service
from tinyvmm import ninep
from tinyvmm.fileserver.client import Client, File, connect

DIALECTS = pytest.mark.parametrize("dialect", ninep.DIALECTS.values(), ids=str)
USER = pwd.getpwuid(os.getuid()).pw_name
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    files = service.files
    (files / "directory").mkdir()
    (files / "directory" / "with a space").write_bytes(b"found\n")
    (files / "link").symlink_to("motd")
    yield service
    service.close()


def port_of(service: Service) -> int:
    return int(service.tcp.rpartition(":")[2])


# --- Debian's diod ------------------------------------------------------------------------------


def diod(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run one of diod's programs."""
    program = shutil.which(arguments[0], path=SBIN)
    assert program is not None, "apt-get install diod"
    return subprocess.run([program, *arguments[1:]], capture_output=True, timeout=HANG, check=False)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_diods_tools_list_and_read_what_we_serve(service: Service, kind: str) -> None:
    where = service.path if kind == "unix" else service.tcp.removeprefix("tcp:")
    listed = diod("diodls", "-s", where, "-a", "/")
    assert (listed.returncode, listed.stderr) == (0, b"")
    assert sorted(listed.stdout.split()) == sorted(map(os.fsencode, os.listdir(service.files)))

    read = diod("diodcat", "-s", where, "-a", "/", "motd", "big", "directory/with a space")
    assert (read.returncode, read.stderr) == (0, b"")
    assert read.stdout == b"hello\n" + CONTENT + b"found\n"

    below = diod("diodls", "-s", where, "-a", "/directory", "-l")
    assert b"with a space" in below.stdout
    assert b" 6 " in below.stdout

    missing = diod("diodcat", "-s", where, "-a", "/", "nothing")
    assert missing.returncode != 0
    assert b"No such file or directory" in missing.stderr


@contextmanager
def diod_server(directory: Path, address: str) -> Iterator[None]:
    program = shutil.which("diod", path=SBIN)
    assert program is not None, "apt-get install diod"
    arguments = ["-f", "-n", "-N", "-c", "/dev/null", "-e", str(directory), "-l", address]
    arguments += ["-L", "stderr"]
    # Its end is now and then a crash, and a core file where it was started.
    with subprocess.Popen(
        [program, *arguments], stderr=subprocess.PIPE, cwd=directory.parent
    ) as process:
        try:
            wait_until_it_listens(address)
            yield
        finally:
            process.terminate()
            process.communicate(timeout=HANG)


def wait_until_it_listens(path: str) -> None:
    for _ in range(600):
        with socket.socket(socket.AF_UNIX) as sock:
            if sock.connect_ex(path) == 0:
                return
        subprocess.run(["sleep", "0.05"], check=True)
    raise AssertionError(f"nobody listens at {path}")


def exercise(client: Client, root: File, directory: Path) -> None:
    """Do what the client can; compare with the directory."""
    root.mkdir(b"made", 0o750)
    assert (directory / "made").is_dir()
    with root.walk(b"made") as file:
        file.create(b"file", os.O_RDWR, 0o640)
        assert file.write(CONTENT) == len(CONTENT)
        assert file.read() == CONTENT
        assert file.read(1000, len(CONTENT) - 10) == CONTENT[-10:]
    assert (directory / "made/file").read_bytes() == CONTENT
    assert os.stat(directory / "made/file").st_mode & 0o777 == 0o640
    (directory / "made/other").write_bytes(b"from this side")
    with root.walk(b"made", b"other") as file:
        st = file.stat()
        size = st.size if isinstance(st, ninep.Rgetattr) else st.length
        assert size == 14
        assert file.open(os.O_RDONLY).read() == b"from this side"
    with root.walk(b"made") as made:
        names = set(made.open(os.O_RDONLY).names())
        assert names - {b".", b".."} == {b"file", b"other"}
    with pytest.raises(OSError, match="No such file"):
        root.walk(b"made", b"nothing")
    root.walk(b"made", b"other").remove()
    assert os.listdir(directory / "made") == ["file"]
    with root.walk(b"made", b"file") as file:
        file.open(os.O_RDONLY)
        chunk = 8192
        requests = [ninep.Tread(file.fid, at, chunk) for at in range(0, len(CONTENT), chunk)]
        replies = list(client.ask_all(requests, window=20))
        assert replies == [
            ninep.Rread(CONTENT[at : at + chunk]) for at in range(0, len(CONTENT), chunk)
        ]


def test_our_client_at_diod(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    address = str(tmp_path / "diod")
    with (
        diod_server(directory, address),
        connect(f"unix:{address}") as client,
        client.attach(os.fsencode(directory), n_uname=os.getuid()) as root,
    ):
        assert client.msize == 65536
        exercise(client, root, directory)


@DIALECTS
def test_our_client_at_our_server_in_every_dialect(
    service: Service, dialect: ninep.Dialect
) -> None:
    with connect(service.unix, dialect=dialect) as client:
        root = client.attach(uname=USER.encode(), n_uname=os.getuid())
        exercise(client, root, service.files)


# --- p9fs: an fsspec file system over py9p --------------------------------------------------------


@pytest.mark.parametrize("version", ["9P2000", "9P2000.u", "9P2000.L"])
def test_p9fs_reads_and_changes_what_we_serve(service: Service, version: str) -> None:
    from p9fs import P9FileSystem  # type: ignore[import-untyped] # has no types

    def names(path: str) -> list[str]:
        """What it lists, whichever way it writes directories."""
        return sorted(name.strip("/") for name in fs.ls(path, detail=False))

    files = service.files
    fs = P9FileSystem(
        host="127.0.0.1",
        port=port_of(service),
        username=USER,
        version=version,
        skip_instance_cache=True,
    )
    try:
        assert names("") == sorted(os.listdir(files))
        assert fs.cat("motd") == b"hello\n"
        assert fs.cat("big") == CONTENT
        info = fs.info("big")
        assert (info["type"], info["size"]) == ("file", len(CONTENT))
        assert fs.info("directory")["type"] == "directory"

        fs.mkdir("new")
        with fs.open("new/file", "wb") as file:
            file.write(CONTENT)
        assert (files / "new/file").read_bytes() == CONTENT
        fs.cp_file("motd", "new/copy")
        assert (files / "new/copy").read_bytes() == b"hello\n"
        assert sorted(path.rpartition("/")[2] for path in names("new")) == ["copy", "file"]
        for name in ("copy", "file"):
            fs.rm(f"new/{name}")
        if version != "9P2000.L":  # there p9fs asks to remove a file, and is told it is none
            fs.rmdir("new")
            assert not (files / "new").exists()
    finally:
        fs.client.fd.sock.close()


# --- pyroute2 -------------------------------------------------------------------------------------

# Its client neither opens files nor leaves its event loop tidy: hence the messages by hand, and a
# process of its own.
PYROUTE2 = """
import asyncio, json, sys
from pyroute2 import Plan9ClientSocket
from pyroute2.plan9 import msg_topen, msg_tstat

async def converse(port):
    client = Plan9ClientSocket(address=("127.0.0.1", port))
    await client.start_session()
    walked = await client.walk("directory/with a space", newfid=5)
    opened = msg_topen()
    opened["fid"], opened["mode"] = 5, 2  # ORDWR
    await client.request(opened)
    data = (await client.read(5))["data"]
    count = (await client.write(5, b"FOUND"))["count"]
    asked = msg_tstat()
    asked["fid"] = 5
    stat = (await client.request(asked))["stat"]
    print(json.dumps({
        "qids": len(walked["wqid"]), "data": bytes(data).decode(), "count": count,
        "stat": [stat["name"], stat["length"], stat["uid"]],
    }))

asyncio.run(converse(int(sys.argv[1])))
"""


def test_pyroute2_reads_and_writes_what_we_serve(service: Service) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PYROUTE2, str(port_of(service))],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "qids": 2,
        "data": "found\n",
        "count": 5,
        "stat": ["with a space", 6, USER],
    }
    assert (service.files / "directory" / "with a space").read_bytes() == b"FOUND\n"
