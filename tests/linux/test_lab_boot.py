"""The lab for real: QEMU, a stock kernel, our PID 1. The slowest tests; a few seconds a boot."""

import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import with_time_enough
from tinyvmm.lab.lab import Lab, LabError, python_command

pytestmark = [
    pytest.mark.linux,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed"),
]

LIMIT = 600  # seconds: only a hang takes as long


def tinyvmm_lab(
    *arguments: str, stdin: bytes = b"", check: bool = False
) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "tinyvmm", "lab", *arguments],
        input=stdin,
        capture_output=True,
        timeout=LIMIT,
        check=check,
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


TINY_GUEST = """
import ctypes, fcntl, mmap, os, struct
KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU, KVM_RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
page = mmap.mmap(-1, 4096)
page[0xFF0] = 0xF4  # HLT, at the reset vector
hva = ctypes.addressof(ctypes.c_char.from_buffer(page))
fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0xFFFFF000, 4096, hva))
vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
run = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
fcntl.ioctl(vcpu, KVM_RUN, 0)
print(struct.unpack_from("<I", run, 8)[0])  # exit_reason
"""
KVM_EXIT_HLT = 5


def test_dev_kvm_is_a_kvm_amd_that_runs_a_guest(lab: Lab) -> None:
    done = lab.run(python_command(TINY_GUEST, []))
    assert (done.status, done.stdout, done.stderr) == (0, b"%d\n" % KVM_EXIT_HLT, b"")
    log = lab.run(["dmesg"]).stdout
    assert b"kvm: Nested Virtualization enabled" in log
    assert b"SVM: kvm: Nested Paging enabled" in log


def test_a_lab_keeps_machines_so_that_its_kernel_is_not_patched_with_each_of_a_commands(
    lab: Lab,
) -> None:
    kept = lab.run(["sh", "-c", "ls -l /proc/$PPID/fd"], timeout=LIMIT)
    names = [line.partition(" -> ")[2] for line in kept.stdout.decode().splitlines()]
    assert [names.count(name) for name in ("anon_inode:kvm-vm", "anon_inode:kvm-vcpu:0")] == [2, 2]


def test_a_lab_lets_guests_keep_their_clocks_however_badly_it_measured_its_own(lab: Lab) -> None:
    allowed = lab.run(["cat", "/sys/module/kvm/parameters/tsc_tolerance_ppm"], timeout=LIMIT)
    assert int(allowed.stdout) > 10_000  # Linux's own limit (arch/x86/kernel/tsc.c)


def test_a_command_sees_our_files_and_cannot_change_them(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "ours").write_text("ours\n")
    script = f"cat {tmp_path}/ours; echo theirs > {tmp_path}/ours; cat {tmp_path}/ours"
    assert lab.run(["sh", "-c", script]).stdout == b"ours\ntheirs\n"
    assert (tmp_path / "ours").read_text() == "ours\n"


def test_streams_are_byte_exact_and_apart(lab: Lab) -> None:
    data = os.urandom(1 << 20)
    assert lab.run(["cat"], stdin=data).stdout == data
    done = lab.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert done[:3] == (3, b"out\n", b"err\n")


def test_a_signal_shows_as_in_a_shell(lab: Lab) -> None:
    assert lab.run(["sh", "-c", "kill -SEGV $$"]).status == 128 + signal.SIGSEGV


def test_environment_and_directory_are_as_asked_for(lab: Lab) -> None:
    done = lab.run(["sh", "-c", "echo $GREETING; pwd"], env={"GREETING": "hello"}, cwd="/usr")
    assert done.stdout == b"hello\n/usr\n"


def test_a_command_that_takes_too_long_is_ended_and_the_lab_goes_on(lab: Lab) -> None:
    def ended(seconds: float) -> bytes:
        done = lab.run(["sh", "-c", "echo begun; sleep 1000"], timeout=seconds)
        assert done.timed_out
        return done.stdout

    assert with_time_enough(ended) == b"begun\n"
    assert lab.run(["true"]).status == 0


def test_a_missing_command_is_a_lab_error_and_the_lab_goes_on(lab: Lab) -> None:
    with pytest.raises(LabError, match="no-such-command"):
        lab.run(["no-such-command"])
    assert lab.run(["true"]).status == 0


def test_a_command_can_have_a_terminal(lab: Lab) -> None:
    done = lab.run(["sh", "-c", "stty size; read x; echo got $x"], stdin=b"line\n", pty=(33, 99))
    assert b"33 99\r\n" in done.stdout
    assert b"got line\r\n" in done.stdout


def test_a_lab_that_was_crashed_says_so_and_starts_anew() -> None:
    with Lab() as lab:
        with pytest.raises(LabError, match="sysrq"):
            lab.run(["sh", "-c", "echo c > /proc/sysrq-trigger"], timeout=240)
        assert lab.run(["true"]).status == 0


def test_the_command_line_passes_everything_through(tmp_path: Path) -> None:
    data = os.urandom(10_000_000)
    done = tinyvmm_lab("--", "cat", stdin=data)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == data


def test_a_share_is_ours_read_write(tmp_path: Path) -> None:
    inside = tmp_path / "with,comma"
    inside.mkdir()
    (inside / "in").write_text("from here")
    script = "cat in > out && cat /proc/cmdline > ticks && mkdir d && echo done; exit 9"
    script = f"cd '{inside}' && {script}"
    done = tinyvmm_lab("--share", str(inside), "--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (9, b"done\n", b"")
    assert (inside / "out").read_text() == "from here"
    assert (inside / "d").is_dir()
    assert "nohz=off" in (inside / "ticks").read_text()  # for there is no agent


def test_a_command_that_is_not_there_is_127() -> None:
    done = tinyvmm_lab("--", "no-such-command")
    assert done.returncode == 127
    assert done.stderr == b"tinyvmm: lab: no-such-command: command not found in the guest\n"


def test_a_panic_ends_it_with_255_and_its_reason() -> None:
    done = tinyvmm_lab("--", "sh", "-c", "echo c > /proc/sysrq-trigger")
    assert done.returncode == 255
    assert b"tinyvmm: lab: the lab ended before its command did\n" in done.stderr
    assert b"Kernel panic - not syncing: sysrq triggered crash\n" in done.stderr


def test_a_slow_reader_gets_all_output() -> None:
    # The command ends long before: what it wrote waits in pipes, queues and sockets.
    command = [sys.executable, "-m", "tinyvmm", "lab", "--", "seq", "200000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        first = child.stdout.read(1)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(2)
        rest = child.stdout.read()
    assert child.returncode == 0
    assert (first + rest) == b"".join(b"%d\n" % n for n in range(1, 200001))


def children_of(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_we_are_killed(number: int) -> None:
    command = [sys.executable, "-m", "tinyvmm", "lab", "--", "sh", "-c", "echo up; sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        (qemu,) = children_of(child.pid)
        handle = os.pidfd_open(qemu)
        child.send_signal(number)
        status = child.wait(60)
    try:
        assert status == (143 if number == signal.SIGTERM else -signal.SIGKILL)

        assert select.select([handle], [], [], 60)[0], "QEMU has outlived us"
    finally:
        os.close(handle)


def test_an_interrupt_reaches_the_command() -> None:
    script = "trap 'echo caught; exit 5' INT; echo up; while :; do sleep 0.1; done"
    # What runs the tests in the background may have SIGINT ignored, which is inherited.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "tinyvmm", "lab", "--"]
    with subprocess.Popen([*command, "sh", "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == b"caught\n"
        assert child.wait(60) == 5
