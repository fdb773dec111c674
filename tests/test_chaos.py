"""A guest that does its worst to every virtio device at once, from two processors.

tests/kernels/chaos.c is that guest: it moves BARs over each other and over RAM, litters rings and
vectors, resets devices while their threads serve them, and rings and rings. What test_bad_guests.py
plays against one device at a time is played here with KVM as part of it, its tables of doorbells
and of routes, and every device's thread.

CHAOS=N plays N games instead of a few.
"""

import os
import resource
from collections.abc import Callable, Sequence

import pytest

from tests.bad_guests import VIRTIO, Made
from tinyvmm import bare_kernel
from tinyvmm.devices.debug_exit import DebugExit
from tinyvmm.devices.fw_cfg import FwCfg
from tinyvmm.machine import Machine
from tinyvmm.vcpu import StopCause

GAMES = int(os.environ.get("CHAOS", "3"))
ENDS = 400.0  # seconds: far more than it takes
MEMORY = 64 << 20  # the guest's RAM
GROWTH_MAX = 64 << 10  # KiB of memory, of which the guest's RAM is most

DEVICES = [name for name in VIRTIO if name != "balloon"]  # whose memory here is not the machine's


def play(machine: Machine, made: Sequence[Made], kernel: str, game: int) -> None:
    """Give `machine`, of two processors, the devices and what the guest needs, and start it."""
    machine.ports.add(0xF4, 4, DebugExit(machine.end))
    machine.ports.add(0x510, 2, FwCfg(ram_size=MEMORY, cpus=2, files={}))
    for one in made:
        machine.add_virtio(one.device)
    bare = bare_kernel.read_kernel(kernel)
    assert bare is not None
    machine.boot_bare(bare, cmdline=f"game {game}")
    machine.start()


@pytest.mark.kvm
@pytest.mark.parametrize("game", range(GAMES))
def test_the_worst_guest_harms_only_itself(build: Callable[..., str], game: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = [VIRTIO[name]() for name in DEVICES]
    try:
        mode = (None, True, False)[game % 3]
        with Machine(memory=MEMORY, cpus=2, ioeventfd=mode) as machine:
            play(machine, made, build("chaos"), game)
            assert machine.wait(ENDS) == StopCause.DEVICE
            assert machine.exit_value == 3
            assert machine.pci is not None
            for one in made:
                one.device.set_status(0)  # which waits for whoever serves it
                assert one.device.status == 0
    finally:
        for one in made:
            one.end()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_MAX
