"""`tinyvmm serve` as its user meets it: what it says, how it ends, and what it says of mistakes."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.served import CONTENT, HANG
from tinyvmm import ninep
from tinyvmm.fileserver.client import connect

ROOT = Path(__file__).parent.parent
SERVE = [sys.executable, "-m", "tinyvmm", "serve"]


@contextmanager
def serving(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A server that has said where it listens; killed at last if it has not ended."""
    with subprocess.Popen(
        [*SERVE, *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("tinyvmm: 9P at "), (said, process.communicate(timeout=HANG))
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[int, str]:
    """Its exit status, and all that it said after the first line."""
    process.send_signal(number)
    out, err = process.communicate(timeout=HANG)
    return process.returncode, out + err


@pytest.fixture
def files(tmp_path: Path) -> Path:
    files = tmp_path / "files"
    files.mkdir()
    (files / "motd").write_bytes(b"hello\n")
    (files / "big").write_bytes(CONTENT)
    return files


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_told_to_stop_and_leaves_no_socket(
    tmp_path: Path, files: Path, number: int
) -> None:
    path = tmp_path / "socket"
    with serving("--listen", f"unix:{path}", "--shared", str(files)) as process:
        with connect(f"unix:{path}") as client:
            assert client.attach().walk(b"motd").open().read() == b"hello\n"
            assert end(process, number) == (0, "")
        assert not path.exists()


def test_a_killed_servers_socket_is_in_nobodys_way(tmp_path: Path, files: Path) -> None:
    path = tmp_path / "socket"
    arguments = ["--listen", f"unix:{path}", "--shared", str(files)]
    with serving(*arguments) as process:
        end(process, signal.SIGKILL)
    assert path.is_socket()
    with serving(*arguments) as process:
        assert end(process) == (0, "")


def test_a_client_gone_in_the_midst_of_its_replies_is_not_worth_a_word(
    tmp_path: Path, files: Path
) -> None:
    path = tmp_path / "socket"
    with serving("--listen", f"unix:{path}", "--shared", str(files)) as process:
        for _ in range(3):
            with connect(f"unix:{path}") as client:
                big = client.attach().walk(b"big").open()
                for _ in range(20):
                    client.send(ninep.Tread(big.fid, 0, 100_000))
        with connect(f"unix:{path}") as client, client.attach() as root:
            assert root.walk(b"big").open().read() == CONTENT
        assert end(process) == (0, "")


def test_what_cannot_be_written_is_the_clients_error_and_serving_goes_on(
    tmp_path: Path, files: Path
) -> None:
    path = tmp_path / "socket"
    (tmp_path / "changes").mkdir()
    limited = ["prlimit", "--fsize=65536", *SERVE, "--listen", f"unix:{path}"]
    limited += ["--read", str(files), "--write", str(tmp_path / "changes")]
    with subprocess.Popen(
        limited, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("tinyvmm: 9P at ")
            with connect(f"unix:{path}") as client, client.attach() as root:
                with root.walk() as made:
                    made.create(b"new")
                    with pytest.raises(OSError, match="File too large"):
                        made.write(CONTENT)
                    made.write(b"small")
                assert root.walk(b"motd").open().read() == b"hello\n"
            assert end(process) == (0, "")
        finally:
            process.kill()


MISTAKES = [
    # what was asked for, and what is said of it
    (["--listen", "unix:{}/none/socket"], "cannot listen at unix:{}/none/socket: No such file"),
    (["--listen", "unix:{}/file"], "cannot listen at unix:{}/file: Address already in use"),
    (["--listen", "unix:{}"], "cannot listen at unix:{}: Address already in use"),
    (["--listen", "{}/socket"], "'{}/socket' is no address: give unix:PATH or tcp:HOST:PORT"),
    (["--listen", "unix:{}/s", "--shared", "{}/file"], "cannot share {}/file: Not a directory"),
    (["--listen", "unix:{}/s", "--shared", "{}/none"], "cannot share {}/none: No such file"),
    (["--listen", "unix:{}/s", "--read", "{}/file"], "one server has one tree"),
    (["--listen", "unix:{}/s", "--", "ls"], "serve runs no command"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES)
def test_a_mistake_is_one_line_with_the_remedy(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    asked = [argument.format(tmp_path) for argument in arguments]
    if "--shared" not in asked:
        asked[2:2] = ["--shared", str(tmp_path)]
    done = subprocess.run(
        [*SERVE, *asked], cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("tinyvmm: " + says.format(tmp_path))
    assert done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_an_address_in_use_is_said_to_be(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
        arguments = ["--listen", f"unix:{tmp_path}/s", "--listen", address]
        done = subprocess.run(
            [*SERVE, *arguments, "--shared", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
        )
    assert (done.returncode, done.stdout) == (125, "")
    remedy = "stop who listens there, or give another port"
    assert done.stderr == f"tinyvmm: cannot listen at {address}: Address already in use; {remedy}\n"
    assert os.listdir(tmp_path) == []


def test_an_output_that_takes_nothing_is_said_to_be(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*SERVE, "--listen", f"unix:{tmp_path}/s", "--shared", str(tmp_path)],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=HANG,
            check=False,
        )
    assert done.returncode == 125
    assert done.stderr.startswith("tinyvmm: cannot say where clients connect: No space left")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []
