"""The board's devices under a real kernel, driven from our side: button pressed, keys typed."""

import pytest

from tests.linux.conftest import ROOT, Runner
from tinyvmm.images import kernels
from tinyvmm.lab.lab import python_command

pytestmark = pytest.mark.linux

# A guest whose PID 1 waits for ever: what happens then, the kernel alone does.
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from tinyvmm.boot import load_kernel
from tinyvmm.guest.elf import Program
from tinyvmm.guest.initramfs import Archive
from tinyvmm.machine import Machine

SYS_PAUSE = 34

def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()

init = Program()
init.label("_start")
init.system_call(SYS_PAUSE)
archive = Archive()
archive.add_file("init", init.link(), 0o755)
out = bytearray()
with load_kernel(sys.argv[2]) as kernel, Machine(memory=256 << 20) as machine:
    machine.add_board(out.extend)
    machine.boot_linux(
        kernel,
        initrd=[archive.finish()],
        cmdline="console=ttyS0 panic=-1 reboot=a no_timer_check pci=off loglevel=7",
    )
    machine.start()
    booted = wait_for(lambda: b"Run /init" in out or machine.cause, 600)
    print("booted" if booted and not machine.cause else f"failed: {machine.cause} {bytes(out)}")
    for _ in range(3):
        machine.power.press_power_button()
        taken = wait_for(lambda: machine.power.values["EVENT"] == 0, 240)
        print("taken" if taken else "not taken")
    machine.uart.receive(b"echo from the tty")
    echoed = wait_for(lambda: b"echo from the tty" in out, 240)
    print("echoed" if echoed else f"not echoed: {bytes(out[-100:])}")
"""


def test_the_power_button_and_the_serial_line_reach_the_kernel_by_interrupt(guest: Runner) -> None:
    installed = kernels.default()
    assert installed is not None, "the fixture saw to it"
    done = guest.program(python_command(PROGRAM, [str(ROOT), installed.vmlinuz]))
    assert (done.stdout, done.stderr) == (b"booted\ntaken\ntaken\ntaken\nechoed\n", b"")
