"""The ACPI tables as a real kernel reads them: QEMU lends processor, UART, clock, and two ports.

QEMU's microvm has no ACPI of its own here; our tables are put in its RAM and named on the kernel's
command line. Where they promise sleep and reset registers, the machine has QEMU's isa-debug-exit,
which ends it with the status (value << 1 | 1): what the kernel wrote there is what we see.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tinyvmm import layout
from tinyvmm.acpi import VirtioMmioNode, build_tables
from tinyvmm.devices import power
from tinyvmm.guest.elf import Program
from tinyvmm.guest.initramfs import Archive
from tinyvmm.images import kernels
from tinyvmm.lab.qemu import kernel_file, memory_file

pytestmark = [
    pytest.mark.linux,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed"),
]

LIMIT = 400.0  # seconds: only a hang takes as long
TABLES_GPA = 0x700_0000
CMDLINE = (
    # reboot=a: where hardware is reduced Linux else asks EFI, and without EFI jumps to a BIOS.
    f"console=ttyS0 panic=-1 reboot=a nokaslr acpi_rsdp={TABLES_GPA:#x} memmap=64K#{TABLES_GPA:#x} "
    # With reduced hardware no timer is left to calibrate by. KVM tells its guests the frequency;
    # the emulator does not, and any plausible one will do.
    "tsc=reliable tsc_early_khz=2000000 lpj=8000000 no_timer_check mitigations=off"
)
SYS_REBOOT = 169
LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2 = 0xFEE1_DEAD, 672274793  # <linux/reboot.h>
LINUX_REBOOT_CMD_POWER_OFF = 0x4321_FEDC
COMPLAINTS = (
    "ACPI Error",
    "ACPI BIOS Error",
    "ACPI Warning",
    "ACPI Exception",
    "ACPI BIOS Warning",
    "[Firmware Bug]",
    "[Firmware Warn]",
    "acpi-ged",  # the driver only speaks of failures
)


class Outcome(NamedTuple):
    status: int
    log: str


@pytest.fixture(scope="module")
def kernel() -> Iterator[int]:
    wanted = os.environ.get("TINYVMM_TEST_KERNEL")
    installed = kernels.find(wanted) if wanted else kernels.default()
    if installed is None:
        pytest.skip("no kernel: tinyvmm kernel fetch, or set TINYVMM_TEST_KERNEL")
    fd = kernel_file(installed.vmlinuz)
    yield fd
    os.close(fd)


def boot(kernel: int, directory: Path, initrd: bytes | None) -> Outcome:
    """Boot to the end that the guest makes of it."""
    nodes = [VirtioMmioNode(0xFEB0_0000 + i * 0x200, 0x200, 10 + i) for i in range(4)]
    tables = directory / "tables"
    tables.write_bytes(build_tables(TABLES_GPA, cpus=2, virtio=nodes, uart=True))
    files = [kernel]
    arguments = ["-kernel", f"/proc/self/fd/{kernel}", "-append", CMDLINE]
    if initrd is not None:
        files.append(memory_file("initrd", initrd))
        arguments += ["-initrd", f"/proc/self/fd/{files[-1]}"]
    for offset in (power.SLEEP_CONTROL, power.RESET):
        port = layout.POWER_PORT + offset
        arguments += ["-device", f"isa-debug-exit,iobase={port:#x},iosize=1"]
    command = [
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"),
        *("-M", "microvm,acpi=off,rtc=on,auto-kernel-cmdline=off", "-m", "256"),
        *("-bios", "qboot.rom", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-serial", "stdio", "-no-reboot"),
        *("-device", f"loader,file={tables},addr={TABLES_GPA:#x},force-raw=on"),
        *arguments,
    ]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        pass_fds=files,
        timeout=LIMIT,
        check=False,
    )
    for fd in files[1:]:
        os.close(fd)
    return Outcome(done.returncode, (done.stdout + done.stderr).decode("ascii", "replace"))


@pytest.fixture(scope="module")
def power_off(kernel: int, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A boot whose PID 1 powers off."""
    program = Program()
    program.label("_start")
    program.system_call(
        SYS_REBOOT, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF
    )
    archive = Archive()
    archive.add_file("init", program.link(), 0o755)
    return boot(kernel, tmp_path_factory.mktemp("power_off"), archive.finish())


def test_the_kernel_has_no_complaint_about_the_tables(power_off: Outcome) -> None:
    assert "ACPI: RSDP" in power_off.log
    assert "ACPI: Interpreter enabled" in power_off.log
    complaints = [
        line for line in power_off.log.splitlines() if any(text in line for text in COMPLAINTS)
    ]
    assert complaints == []


def test_the_kernel_finds_what_the_tables_describe(power_off: Outcome) -> None:
    log = power_off.log
    assert "ACPI: PM: (supports S0 S5)" in log
    assert "smp: Brought up 1 node, 2 CPUs" in log
    assert "00:00: ttyS0 at I/O 0x3f8" in log, "00:00 is the DSDT's COM1"
    assert "rtc_cmos 00:01: no alarms, y3k, 114 bytes nvram" in log
    assert "i8042: PNP: No PS/2 controller found." in log


def test_power_off_writes_s5_with_sleep_enable_to_sleep_control(power_off: Outcome) -> None:
    value = power.SLP_TYP_S5 << power.SLP_TYP_SHIFT | power.SLP_EN
    assert power_off.status == value << 1 | 1, power_off.log[-2000:]


def test_a_panicking_kernel_resets_through_the_reset_register(kernel: int, tmp_path: Path) -> None:
    outcome = boot(kernel, tmp_path, None)
    assert "Unable to mount root fs" in outcome.log
    assert outcome.status == power.RESET_VALUE << 1 | 1, outcome.log[-2000:]
