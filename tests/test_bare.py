"""A student's own kernel: built here with gcc, run as `tinyvmm run --no-root` on this KVM."""

import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from time import sleep

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_kernel_image import CODE_GPA, make_vmlinux
from tests.waiting import wait_for
from tinyvmm import bare, bare_kernel
from tinyvmm.bare_kernel import Module
from tinyvmm.devices.virtio.pci import NOTIFY
from tinyvmm.errors import ConfigError
from tinyvmm.kernel_files import elf_image
from tinyvmm.lab import probe
from tinyvmm.layout import HIGH_RAM_GPA, PCI_SLOT_STRIDE, PCI_WINDOW_GPA
from tinyvmm.memory import GuestMemory

ROOT = Path(__file__).parent.parent
MIB = 1 << 20

Build = Callable[..., str]


def tinyvmm(
    *arguments: str, stdin: bytes = b"", timeout: float = 60
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tinyvmm", "run", "--no-root", "--memory", "64M", *arguments]
    return subprocess.run(
        command, cwd=ROOT, input=stdin, capture_output=True, timeout=timeout, check=False
    )


def said(output: bytes) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in output.decode().splitlines():
        name, _, value = line.partition("=")
        found.setdefault(name, []).append(value)
    return found


# --- what kernels are told --------------------------------------------------------------------


@pytest.fixture
def modules(tmp_path: Path) -> list[str]:
    (tmp_path / "first").write_bytes(b"the first module")
    (tmp_path / "second").write_bytes(b"x" * 5000)
    return ["--module", f"{tmp_path}/first one two", "--initrd", f"{tmp_path}/second"]


RANGES = {
    "range": ["0x0", "0x9fc00", "0xe0000", "0x100000"],
    "size": ["0x9fc00", "0x400", "0x20000", hex(63 * MIB)],
    "type": ["0x1", "0x2", "0x3", "0x1"],
    "content": ["the first module", "x" * 32],
    "length": ["0x10", "0x1388"],
    "words": ["one two", ""],
    "cmdline": ["all of it"],
    "interrupts": ["0x0"],
}


@pytest.mark.kvm
def test_a_multiboot_kernel_is_told_what_the_specification_says(
    build: Build, modules: list[str]
) -> None:
    done = tinyvmm("--kernel", build("told"), "--append", "all of it", *modules)
    assert (done.returncode, done.stderr) == (21 << 1 | 1, b"")
    told = said(done.stdout)
    assert told["magic"] == ["0x2badb002"]
    assert told["cr0"] == ["0x11"]
    assert told["flags"] == ["0x24d"]  # memory, command line, modules, memory map, our name
    assert (told["lower"], told["upper"]) == ([hex(639)], [hex(63 * 1024)])
    assert told["loader"] == ["tinyvmm"]
    assert {name: told[name] for name in RANGES} == RANGES
    assert all(int(gpa, 16) % 4096 == 0 for gpa in told["module"])


@pytest.mark.kvm
def test_a_pvh_kernel_is_told_what_xen_says(build: Build, modules: list[str]) -> None:
    done = tinyvmm("--kernel", build("told", "pvh"), "--append", "all of it", *modules)
    assert (done.returncode, done.stderr) == (21 << 1 | 1, b"")
    told = said(done.stdout)
    assert told["start info"] == ["0x336ec578"]
    assert told["version"] == ["0x1"]
    assert told["cr0"] == ["0x11"]
    assert told["rsdp"] == ["RSD PTR "]
    assert {name: told[name] for name in RANGES} == RANGES


@pytest.mark.kvm
def test_a_kernel_drives_a_device_of_the_users_own(build: Build) -> None:
    device = ["--device", "tests.own_copier:Copier,limit=100"]
    done = tinyvmm("--kernel", build("own"), *device)
    assert (done.returncode, done.stderr) == (9 << 1 | 1, b"")
    told = said(done.stdout)
    assert told["status"] == ["0x1"] * 3
    assert told["text"] == ["moved by the device"] * 3
    assert told["bad"] == ["0x2"]


@pytest.mark.kvm
def test_a_kernel_may_go_on_to_64_bits(build: Build) -> None:
    done = tinyvmm("--kernel", build("long", None))
    assert (done.returncode, done.stdout, done.stderr) == (1 << 1 | 1, b"", b"")


@pytest.mark.kvm
def test_fw_cfg_has_numbers_and_files(build: Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from the host")
    file = f"opt/greeting={tmp_path}/file"
    done = tinyvmm("--kernel", build("ask"), "--cpus", "3", "--fw-cfg", file)
    assert (done.returncode, done.stderr) == (1, b"")
    assert said(done.stdout) == {
        "signature": ["QEMU"],
        "id": ["0x1"],
        "ram": [hex(64 * MIB)],
        "cpus": ["0x3"],
        "files": ["0x1"],
        "name": ["opt/greeting"],
        "content": ["from the host"],
        "past the end": ["0x0"],
    }


@pytest.mark.kvm
@pytest.mark.parametrize("cpus", [2, 16, 255])
def test_processors_wake_by_init_and_sipi(build: Build, cpus: int) -> None:
    done = tinyvmm("--kernel", build("wake"), "--cpus", str(cpus))
    assert (done.returncode, done.stdout) == (
        (cpus - 1) << 1 & 0xFF | 1,
        f"awake={cpus - 1:#x}\n".encode(),
    )


@pytest.mark.kvm
def test_the_timer_interrupts_through_the_pic(build: Build) -> None:
    done = tinyvmm("--kernel", build("tick"))
    assert (done.returncode, done.stdout) == (3, b"ticks=0xa\n")


# --- exits ------------------------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize(("ioeventfd", "exits"), [("auto", 0), ("on", 0), ("off", 1000)])
def test_a_thousand_requests_of_a_disk_cost_no_exit_for_doorbells_nor_for_interrupts(
    build: Build, tmp_path: Path, ioeventfd: str, exits: int
) -> None:
    image, seen = tmp_path / "image", tmp_path / "trace.json"
    content = bytes(range(256)) * 2
    image.write_bytes(content)
    options = ["--disk", f"{image},ro", "--ioeventfd", ioeventfd]
    options += ["--trace", "port,mmio", "--trace-file", str(seen)]
    done = tinyvmm("--kernel", build("disk"), *options)
    # Each read brings a byte that the kernel had zeroed.
    total = sum(content[n % 512] for n in range(1000))
    assert done.stdout.decode() == f"failed=0x0\nsum={total:#x}\n"
    assert (done.returncode, done.stderr) == (1, b"")
    records = [json.loads(line) for line in seen.read_text().splitlines()]
    places = [(record["space"], record["address"]) for record in records]
    begin, end = (n for n, place in enumerate(places) if place == ("port", 0x80))
    steady = Counter(places[begin + 1 : end])
    bells = {("mmio", PCI_WINDOW_GPA + slot * PCI_SLOT_STRIDE + NOTIFY) for slot in range(32)}
    assert list(steady.values()) == ([exits] if exits else [])
    assert steady.keys() <= bells


# --- the serial line --------------------------------------------------------------------------


@pytest.mark.kvm
def test_the_serial_line_goes_both_ways(build: Build) -> None:
    text = b"all that is typed, and more than the UART holds: " + b"0123456789abcdef" * 400
    done = tinyvmm("--kernel", build("echo"), stdin=text + b".not this")
    assert (done.returncode, done.stderr) == (2 << 1 | 1, b"")
    assert done.stdout == b"ready\n" + text.upper()


@pytest.mark.kvm
def test_the_serial_line_may_be_a_file_or_nowhere(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "line"
    done = tinyvmm("--kernel", build("tick"), "--serial", f"file:{path}")
    assert (done.returncode, done.stdout) == (3, b"")
    assert path.read_bytes() == b"ticks=0xa\n"
    done = tinyvmm("--kernel", build("tick"), "--serial", "none")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"")


# --- how it ends ------------------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("byte", 0x41 << 1 & 0xFF | 1),
        ("word", 0x1234 << 1 & 0xFF | 1),
        ("dword", 0x12345678 << 1 & 0xFF | 1),
        ("acpi-off", 0),
        ("acpi-reset", 0),
        ("cf9", 0),
        ("i8042", 0),
    ],
)
def test_the_end_of_the_run_is_its_exit_status(build: Build, how: str, status: int) -> None:
    done = tinyvmm("--kernel", build("leave"), "--append", how)
    assert (done.returncode, done.stdout, done.stderr) == (status, b"once\n", b"")


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("transport", "how"),
    [("pci", "cf9"), ("mmio", "cf9"), ("pci", "i8042"), ("pci", "acpi-reset")],
)
def test_a_reset_may_start_the_machine_anew(build: Build, transport: str, how: str) -> None:
    options = ["--append", how, "--on-reboot", "reset", "--transport", transport]
    command = [sys.executable, "-m", "tinyvmm", "run", "--no-root", "--kernel", build("leave")]
    with subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == b"once\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


@pytest.mark.kvm
def test_a_time_limit_ends_a_kernel_that_does_not(build: Build) -> None:
    done = tinyvmm("--kernel", build("leave"), "--timeout", "0.5")
    assert done.returncode == 124
    assert done.stderr == b"tinyvmm: timed out after 0.5 s: the machine was stopped\n"


@pytest.mark.kvm
def test_a_triple_fault_is_a_crash(build: Build) -> None:
    done = tinyvmm("--kernel", build("leave"), "--append", "fault")
    assert (done.returncode, done.stdout) == (255, b"once\n")
    lines = done.stderr.decode().splitlines()
    if lines != [
        "tinyvmm: the guest crashed: triple fault"
    ]:  # on AMD's processors the rest is lost
        assert lines[0] == "tinyvmm: the guest crashed: vCPU 0: triple fault"
        assert lines[-1].startswith("  code at rip: 0f 0b ")  # ud2


@pytest.mark.kvm
def test_a_disk_too_full_for_what_a_kernel_says_is_one_line(build: Build) -> None:
    done = tinyvmm("--kernel", build("told"), "--serial", "file:/dev/full")
    assert done.returncode == 125
    assert done.stderr == (
        b"tinyvmm: cannot write what the kernel says: No space left on device; see --serial\n"
    )


@pytest.mark.kvm
def test_too_few_descriptors_are_one_line_wherever_they_end(build: Build, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    words = ["run", "--no-root", "--kernel", build("tick"), "--cpus", "8", "--disk", str(image)]
    command = [sys.executable, "-m", "tinyvmm", *words]
    failed = 0
    for limit in range(8, 60, 3):

        def few(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            preexec_fn=few,
            check=False,
        )
        if done.returncode == 3:
            break
        failed += 1
        (line,) = done.stderr.decode().splitlines()
        assert (done.returncode, done.stdout) == (125, b"")
        assert "Too many open files" in line
    assert done.returncode == 3
    assert failed > 5


@pytest.mark.kvm
def test_ctrl_c_ends_a_kernel_that_does_not(build: Build) -> None:
    command = [sys.executable, "-m", "tinyvmm", "run", "--no-root", "--kernel", build("leave")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"once\n"
        sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


@pytest.mark.kvm
@pytest.mark.parametrize("problem", ["it cannot execute popcnt in ring 0", None])
def test_a_kernel_that_is_started_as_linux_runs_with_a_warning_where_linux_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str | None
) -> None:
    code = b"\xb0\x09\xe6\xf4\xf4"  # mov al, 9; out 0xF4, al; hlt
    (tmp_path / "kernel").write_bytes(make_vmlinux(((CODE_GPA, code, MIB),)))
    monkeypatch.setattr(probe, "missing_for_linux", lambda: problem)
    said: list[str] = []
    options = bare.BareOptions(str(tmp_path / "kernel"), memory=64 * MIB, serial="none")
    assert bare.run_bare(options, said.append).status == 9 << 1 | 1
    assert len(said) == (problem is not None)
    assert all(f"cannot run Linux ({problem}); there is one that can:" in line for line in said)


@pytest.mark.kvm
def test_a_signal_that_comes_between_two_machines_is_not_lost(build: Build) -> None:
    options = bare.BareOptions(build("leave"), memory=64 << 20, serial="none", timeout=5.0)
    with ExitStack() as cleanup:
        interruption = bare._Interruption(cleanup)
        os.kill(os.getpid(), signal.SIGINT)
        result, again = bare._run_once(
            options, [], lambda _: None, interruption, bare._Deadline(5.0), pytest.fail, typed=False
        )
    assert (result.status, result.reason, again) == (130, "signal", False)


def test_streams_that_were_closed_at_the_start_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their numbers may be any file's by now."""
    monkeypatch.setattr(sys, "__stdout__", None)
    monkeypatch.setattr(sys, "__stdin__", None)
    with ExitStack() as cleanup:
        output, typed = bare._open_serial("stdio", bool, cleanup)
    assert not typed
    read_end, write_end = os.pipe()
    kept = os.dup(1)
    os.dup2(write_end, 1)
    try:
        output(b"not for this file")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        assert pipe.read() == b""


def catches(pid: int, number: int) -> bool:
    """Whether a process catches a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.kvm
@pytest.mark.parametrize("end", ["signal", "timeout"])
def test_a_kernel_that_nobody_listens_to_ends_all_the_same(build: Build, end: str) -> None:
    command = [sys.executable, "-m", "tinyvmm", "run", "--no-root", "--kernel", build("told")]
    command += ["--timeout", "2"] if end == "timeout" else []
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write_end, bytes(select.PIPE_BUF))
    os.set_blocking(write_end, True)
    with subprocess.Popen(command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE) as process:
        if end == "signal":
            wait_for(lambda: catches(process.pid, signal.SIGTERM))
            sleep(0.5)  # by then it writes
            process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(30) == {"signal": 143, "timeout": 124}[end]
        finally:
            process.kill()
    os.close(read_end)
    os.close(write_end)


# --- files that are no kernels ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "--no-root needs a kernel: give --kernel FILE"),
        (["--kernel", "KERNEL", "--", "true"], "--no-root runs no command"),
        (["--kernel", "/nowhere"], "nowhere"),
        (["--kernel", "KERNEL", "--read", "/"], "--read is for a root"),
        (["--kernel", "KERNEL", "--serial", "telnet"], "--serial telnet: give stdio"),
        (["--kernel", "KERNEL", "--serial", ""], "--serial : give stdio"),
        (["--kernel", "KERNEL", "--serial", "file:/nowhere/x"], "cannot be written"),
        (["--kernel", "KERNEL", "--module", "/nowhere/x"], "module /nowhere/x: cannot be opened"),
        (["--kernel", "KERNEL", "--fw-cfg", "a=/nowhere"], "fw_cfg file /nowhere"),
        (
            ["--kernel", "KERNEL", "--fw-cfg", "a=/dev"],
            "/dev: cannot be opened (Is a directory",
        ),
        (
            ["--kernel", "KERNEL", "--module", "/dev/zero"],
            "/dev/zero: cannot be opened (no regular",
        ),
        (["--kernel", "KERNEL", "--initrd", "FIFO"], "no regular file; name one"),
        (["--kernel", "KERNEL", "--fw-cfg", f"{'n' * 56}=/etc/hostname"], "1 to 55"),
        (["--kernel", "KERNEL", *(["--fw-cfg", "a=/etc/hostname"] * 2)], "two of that name"),
        (["--kernel", "KERNEL", "--boot-protocol", "pvh"], "is no ELF file with a PVH entry"),
        (["--kernel", "KERNEL", "--boot-protocol", "linux"], "is no Linux but a multiboot"),
        (["--kernel", "PVH", "--boot-protocol", "linux"], "is an ELF file, but not for x86-64"),
        (["--kernel", "/bin/true"], "where no kernel can be"),
        (["--kernel", "/bin/true"], "no multiboot header in its first 8 KiB, and no PVH entry"),
    ],
)
@pytest.mark.kvm
def test_what_cannot_be_is_one_line(
    build: Build, tmp_path: Path, arguments: list[str], why: str
) -> None:
    there = {"KERNEL": build("told"), "FIFO": str(tmp_path / "fifo"), "PVH": build("told", "pvh")}
    os.mkfifo(there["FIFO"])
    done = tinyvmm(*[there.get(word, word) for word in arguments])
    assert done.returncode == 125
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert why in line


def test_options_of_a_kernel_by_itself_need_no_root() -> None:
    command = [sys.executable, "-m", "tinyvmm", "run", "--serial", "none", "--", "true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 125
    assert done.stderr == b"tinyvmm: --serial needs --no-root; leave it out\n"


def test_a_kernel_too_large_for_its_ram_is_refused(build: Build, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(3 * MIB))
    kernel = bare_kernel.read_kernel(build("told"))
    assert kernel is not None
    with pytest.raises(ConfigError, match="needs 4 MiB of RAM or more, there are 2"):
        bare_kernel.load(GuestMemory(2 * MIB), kernel, modules=[Module(str(tmp_path / "large"))])


def test_demands_that_cannot_be_met_are_refused(build: Build, tmp_path: Path) -> None:
    data = bytearray(Path(build("told")).read_bytes())
    at = data.index(0x1BADB002.to_bytes(4, "little"))
    for flags, why in ((1 << 2, "a video mode"), (1 << 5, "features 0x20")):
        checksum = -(0x1BADB002 + flags) & 0xFFFF_FFFF
        data[at + 4 : at + 12] = flags.to_bytes(4, "little") + checksum.to_bytes(4, "little")
        path = tmp_path / "kernel"
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=why):
            bare_kernel.read_kernel(str(path))


def test_a_flat_file_says_in_its_header_where_it_goes(tmp_path: Path) -> None:
    """The a.out kludge: header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr."""
    flags = 1 << 16
    words = [0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFF_FFFF]
    words += [HIGH_RAM_GPA + 16, HIGH_RAM_GPA, 0, HIGH_RAM_GPA + 0x3000, HIGH_RAM_GPA + 48]
    path = tmp_path / "flat"
    path.write_bytes(bytes(16) + b"".join(w.to_bytes(4, "little") for w in words) + b"\xf4" * 100)
    kernel = bare_kernel.read_kernel(str(path))
    assert kernel is not None
    assert kernel.segments == ((HIGH_RAM_GPA, 0, 16 + 32 + 100),)
    assert (kernel.memory_end, kernel.entry) == (HIGH_RAM_GPA + 0x3000, HIGH_RAM_GPA + 48)


def test_what_is_near_a_multiboot_kernel_is_told_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(struct.pack("<3I", 0x1BADB002, 0, -0x1BADB002 & 0xFFFF_FFFF) + bytes(100))
    with pytest.raises(ConfigError, match=r"nor says its multiboot header where it goes .* ELF"):
        bare_kernel.read_kernel(str(path))
    # magic, architecture, header_length, checksum; behind that the tag that ends the list
    words = (0xE85250D6, 0, 24, -(0xE85250D6 + 24) & 0xFFFF_FFFF, 0, 8)
    path.write_bytes(bytes(4096) + struct.pack("<6I", *words))
    for protocol in (None, "multiboot"):
        with pytest.raises(ConfigError, match=r"is for multiboot 2, which .*; give it a header of"):
            bare_kernel.read_kernel(str(path), protocol)
    path.write_bytes(bytes(4096) + struct.pack("<6I", *words)[:15])
    assert bare_kernel.read_kernel(str(path)) is None


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_refused_or_harmless(
    build: Build, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(
        Path(build("told", data.draw(st.sampled_from(["multiboot", "pvh"])))).read_bytes()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, 0x200) | st.integers(0, len(whole) - 1))
        whole[where] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(whole[:end])
    memory = GuestMemory(4 * MIB)
    try:
        kernel = bare_kernel.read_kernel(str(path))
        if kernel is not None:
            bare_kernel.load(memory, kernel)
    except ConfigError as error:
        words = str(error)
    else:
        words = ""
    finally:
        memory.close()
    assert "\n" not in words


@given(st.binary(max_size=300))
def test_any_bytes_are_an_elf_file_or_none(content: bytes) -> None:
    for prefix in (b"", b"\x7fELF\1\1", b"\x7fELF\2\1"):
        with suppress(elf_image.ElfError):
            assert elf_image.parse(prefix + content).loads


def test_nothing_is_left_behind(build: Build) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        bare_kernel.read_kernel(build("told"))
    assert len(os.listdir("/proc/self/fd")) == before
