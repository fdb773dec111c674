"""PID 1 as the first process of a real kernel, on QEMU's emulated processor: a boot a test.

test_init.py holds what needs no kernel of its own; here are modules, ports, mounts, the root and
power off, with Linux's own virtio_console, v9fs and devpts.
"""

import errno
import os
import shutil
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tinyvmm.guest import abi, init, protocol
from tinyvmm.guest.asm import dword, edi, rax, rsp
from tinyvmm.guest.elf import Program
from tinyvmm.guest.init import NEW_ROOT, ROOT_9P_OPTIONS, InitConfig, Mkdir, Mount
from tinyvmm.guest.initramfs import Archive
from tinyvmm.guest.modules import closure
from tinyvmm.images import kernels
from tinyvmm.lab.qemu import MIB, Hardware, Qemu, kernel_file

pytestmark = [
    pytest.mark.linux,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed"),
]

LIMIT = 400.0  # seconds: only a hang takes as long
MODULES = ("virtio_pci", "virtio_console", "9p", "9pnet_virtio", "overlay")
PATH = "/usr/local/bin:/usr/bin:/bin"

OVER_THE_HOST = (
    Mount("root", "/lower", "9p", abi.MS_RDONLY, ROOT_9P_OPTIONS),
    Mount("tmpfs", "/rw", "tmpfs"),
    Mkdir("/rw/upper"),
    Mkdir("/rw/work"),
    Mount("overlay", NEW_ROOT, "overlay", 0, "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work"),
)
OVER_A_SHARE = (Mount("share0", NEW_ROOT, "9p", data=ROOT_9P_OPTIONS),)


class Kernel(NamedTuple):
    fd: int
    modules: str


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    wanted = os.environ.get("TINYVMM_TEST_KERNEL")
    installed = kernels.find(wanted) if wanted else kernels.default()
    if installed is None or installed.modules is None:
        pytest.skip("no kernel with modules: tinyvmm kernel fetch, or set TINYVMM_TEST_KERNEL")
    fd = kernel_file(installed.vmlinuz)
    yield Kernel(fd, installed.modules)
    os.close(fd)


class Outcome(NamedTuple):
    records: list[tuple[int, int]]
    stdout: bytes
    stderr: bytes
    console: str


def receive(sock: socket.socket) -> bytes:
    """All that comes until the other end is gone."""
    chunks = []
    try:
        while chunk := sock.recv(1 << 16):
            chunks.append(chunk)
    except ConnectionResetError:
        pass  # QEMU ended with something of ours unread
    return b"".join(chunks)


def boot(
    kernel: Kernel, config: InitConfig, share: Path | None = None, stdin: bytes | None = b""
) -> Outcome:
    """Boot it, feed and end the command's stdin (None: leave it open), wait until power off."""
    chosen = closure(kernel.modules, MODULES)
    archive = Archive()
    for module in chosen:
        archive.add_file(f"modules/{module.name}.ko", module.read())
    paths = [f"/modules/{module.name}.ko" for module in chosen]
    config = config._replace(modules=[*paths, *config.modules])
    archive.add_file("init", init.build_init(config), mode=0o755)
    hardware = Hardware(512 * MIB, 1, [str(share)] if share else [])
    with Qemu(hardware, kernel.fd, archive.finish()) as qemu:
        results: dict[int, bytes] = {}

        def drain(number: int) -> None:
            results[number] = receive(qemu.sockets[number])

        def feed() -> None:
            if stdin is not None:
                qemu.sockets[0].sendall(stdin)
                qemu.sockets[0].shutdown(socket.SHUT_WR)

        threads = [threading.Thread(target=drain, args=(number,)) for number in (1, 2, 3)]
        threads.append(threading.Thread(target=feed))
        for thread in threads:
            thread.start()
        ended = qemu.wait(LIMIT)
        if not ended:
            qemu.kill()
        for thread in threads:
            thread.join()
        assert ended, qemu.last_words()
        records = list(struct.iter_unpack("<II", results[3]))
        return Outcome(records, results[1], results[2], qemu.last_words())


def configure(*argv: str, **more: Any) -> InitConfig:
    commands = init.search_path(argv[0], PATH)
    config = InitConfig(commands, argv, (f"PATH={PATH}", "HOME=/root"), root=OVER_THE_HOST)
    return config._replace(**more)


def static_program() -> bytes:
    """It copies a line from 0 to 1, makes a directory, and exits with its argument count."""
    p = Program()
    p.variable("line", 100)
    p.label("_start")
    p.mov(edi, dword[rsp])
    p.mov(dword["count"], edi)
    p.system_call(abi.SYS_READ, 0, "line", 100)
    p.system_call(abi.SYS_WRITE, 1, "line", rax)
    p.system_call(abi.SYS_MKDIR, p.string("/made"), 0o700)
    p.system_call(abi.SYS_EXIT, dword["count"])
    p.variable("count")
    return p.link()


def test_a_static_binary_runs_in_a_root_that_holds_nothing_else(
    kernel: Kernel, tmp_path: Path
) -> None:
    (tmp_path / "program").write_bytes(static_program())
    (tmp_path / "program").chmod(0o755)
    config = configure("/program", "one", "two", root=OVER_A_SHARE)
    outcome = boot(kernel, config, share=tmp_path, stdin=b"a line\n")
    pid = outcome.records[0][1]
    assert outcome.records == [(protocol.STARTED, pid), (protocol.EXITED, 3 << 8)], outcome.console
    assert (outcome.stdout, outcome.stderr) == (b"a line\n", b"")
    assert stat.S_ISDIR((tmp_path / "made").stat().st_mode)
    # Mount points were missing; in them nothing of the guest's remains.
    made = {path.name: list(path.iterdir()) for path in tmp_path.iterdir() if path.is_dir()}
    assert made == {name: [] for name in ("made", "dev", "proc", "run", "sys")}


CHECK = """
    set -e
    [ $(stat -fc %T /proc) = proc ]; [ $(stat -fc %T /sys) = sysfs ]
    [ $(stat -fc %T /dev/shm) = tmpfs ]; [ $(stat -fc %T /run) = tmpfs ]
    [ $(stat -fc %T /) = overlayfs ]; [ $(stat -c %a /dev/shm) = 1777 ]
    echo 3 | { read three < /dev/stdin; [ $three = 3 ]; }
    echo here > /dev/fd/2; echo there > /dev/stderr; echo hello > /dev/stdout
    [ $(hostname) = host-of-test ]; [ $(ulimit -n)/$(ulimit -Hn) = 1024/1048576 ]
    [ $$ -ne 1 ]; [ "$(cat /proc/1/comm)" = init ]; [ $PWD = /usr ]
    [ "$(ls /proc/1/root/)" = "$(ls /)" ]
    ping() { (exec 3<>/dev/tcp/127.0.0.1/9) 2>&1 | grep -q refused; }; ping
    grep -q '^devpts /dev/pts .*ptmxmode=666' /proc/mounts
    [ "$(ls /dev/pts)" = ptmx ]
    script -qec 'tty' /dev/null | grep -q /dev/pts/0
    echo x > /etc/probe; cat /etc/probe
    exit 9
"""


def test_the_root_has_what_programs_expect(kernel: Kernel) -> None:
    config = configure("bash", "-c", CHECK, cwd="/usr", hostname="host-of-test")
    outcome = boot(kernel, config)
    assert outcome.stderr == b"here\nthere\n", outcome
    assert outcome.stdout == b"hello\nx\n"
    assert outcome.records[-1] == (protocol.EXITED, 9 << 8)
    assert not Path("/etc/probe").exists()


def test_ten_megabytes_go_in_and_out_unchanged(kernel: Kernel) -> None:
    data = os.urandom(10_000_000)
    outcome = boot(kernel, configure("tee", "/dev/stderr"), stdin=data)
    assert outcome.records[-1] == (protocol.EXITED, 0), outcome.console
    assert outcome.stdout == data
    assert outcome.stderr == data


def test_a_terminal_is_one(kernel: Kernel) -> None:
    script = "tty; stty size; read word; echo $word; echo controlling >/dev/tty"
    config = configure("sh", "-c", script, terminal=(33, 101))
    outcome = boot(kernel, config, stdin=b"typed\n")
    assert outcome.stdout.replace(b"typed\r\n", b"", 1) == (
        b"/dev/pts/0\r\n33 101\r\ntyped\r\ncontrolling\r\n"
    )


def test_what_cannot_be_mounted_is_reported_by_its_step(kernel: Kernel) -> None:
    config = configure("true", root=(Mount("no-such-tag", NEW_ROOT, "9p", data=ROOT_9P_OPTIONS),))
    outcome = boot(kernel, config)
    ((kind, value),) = outcome.records
    assert (kind, value & 0xFFFF) == (protocol.SETUP_FAILED, errno.ENOENT)
    # `boot` put the modules in front, three steps each.
    index = (value >> 16) - 3 * len(closure(kernel.modules, MODULES))
    assert init.describe_step(config, index) == "mount no-such-tag (9p) on /newroot"


def test_what_fails_before_there_is_a_port_is_said_on_the_console(kernel: Kernel) -> None:
    outcome = boot(kernel, configure("true", modules=("/modules/missing.ko",)))
    assert outcome.records == []
    assert "tinyvmm: cannot open /modules/missing.ko: errno 002" in outcome.console


def test_a_process_that_ignores_everything_does_not_outlive_the_command(kernel: Kernel) -> None:
    script = "trap '' TERM HUP INT; setsid sh -c 'trap \"\" TERM; sleep 1000' & sleep 0.2; echo end"
    outcome = boot(kernel, configure("sh", "-c", script), stdin=None)
    assert (outcome.stdout, outcome.records[-1]) == (b"end\n", (protocol.EXITED, 0))
