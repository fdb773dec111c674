"""`tinyvmm demo`: a tiny guest says hello through the UART and halts, on any working /dev/kvm."""

import argparse
import sys
from time import monotonic

from tinyvmm import layout
from tinyvmm.devices.uart import Uart
from tinyvmm.errors import ConfigError
from tinyvmm.machine import Machine
from tinyvmm.vcpu import StopCause

# 16-bit code at 0x1000; the text lies behind it.
GUEST = bytes.fromhex(
    "be 0f 10"  # mov si, 0x100f      the text
    "ba f8 03"  # mov dx, 0x3f8       COM1's transmitter holding register
    "ac"  #       lodsb               next character
    "84 c0"  #    test al, al
    "74 03"  #    jz +3               the terminating zero: halt
    "ee"  #       out dx, al
    "eb f8"  #    jmp -8
    "f4"  #       hlt
)
TEXT = b"Hello from a guest of {length} bytes: real mode, one UART, no kernel.\n\0"


class NoInterrupts:
    """The UART's interrupt line, wired to nothing: this guest does not use it."""

    def set(self, level: bool) -> None:
        """Ignore the level."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command, which has no options."""
    parser = subparsers.add_parser(
        "demo", help="run a tiny guest of our own; needs no kernel", epilog="example: tinyvmm demo"
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the guest; 0 if it said its line and halted."""
    del args
    printed = bytearray()
    begin = monotonic()
    text = TEXT.replace(b"{length}", b"%d" % len(GUEST))
    with Machine(memory=1 << 20, irqchip=False) as machine:
        machine.ports.add(layout.COM1_PORT, 8, Uart(NoInterrupts(), printed.extend))
        machine.boot_real_mode(GUEST + text)
        machine.start()
        cause = machine.wait(timeout=10)
    sys.stdout.write(printed.decode())
    if cause != StopCause.HALT:
        raise ConfigError(f"the guest did not halt ({cause or 'no end in 10 s'}): see doctor")
    milliseconds = (monotonic() - begin) * 1000
    print(f"It halted after {len(printed)} port exits, {milliseconds:.0f} ms from first to last.")
    return 0
