"""What holds for every device on the board, whatever a guest does to it."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm.devices.debug_exit import DebugExit
from tinyvmm.devices.device import Device
from tinyvmm.devices.fw_cfg import FwCfg
from tinyvmm.devices.i8042 import I8042
from tinyvmm.devices.power import PowerControl
from tinyvmm.devices.reset_control import ResetControl
from tinyvmm.devices.rtc import Rtc
from tinyvmm.devices.uart import Uart

NOON = 1_700_000_000.5


class World:
    """All that a device can do to the rest of the machine, noted."""

    def __init__(self) -> None:
        self.level = False
        self.events: list[object] = []

    def set(self, level: bool) -> None:
        self.level = level

    def note(self, value: object = None) -> None:
        self.events.append(value)


DEVICES: dict[str, tuple[int, Callable[[World], Device]]] = {
    "debug_exit": (4, lambda world: DebugExit(world.note)),
    "uart": (8, lambda world: Uart(world, world.note)),
    "rtc": (2, lambda _: Rtc(lambda: NOON)),
    "i8042": (5, lambda world: I8042(world.note)),
    "fw_cfg": (FwCfg.length, lambda _: FwCfg(ram_size=1 << 20, cpus=1, files={"a": b"12"})),
    "reset_control": (ResetControl.length, lambda world: ResetControl(world.note)),
    "power": (PowerControl.length, lambda world: PowerControl(world, world.note, world.note)),
}
NAMES = sorted(DEVICES)

# An access: offset, width, and the value written, or None for a read.
BYTE = st.integers(0, 0xFF) | st.sampled_from([0x80, 0x8A, 0x8B, 0x0A, 0x0B, 0x60, 0xD1, 0xFE])
BYTE_ACCESS = st.tuples(st.integers(0, 7), st.just(1), st.none() | BYTE)
ANY_ACCESS = st.sampled_from([1, 2, 4, 8]).flatmap(
    lambda size: st.tuples(
        st.integers(0, 1 << 16), st.just(size), st.none() | st.integers(0, (1 << 8 * size) - 1)
    )
)
ACCESSES = st.lists(BYTE_ACCESS | ANY_ACCESS, max_size=40)
Access = tuple[int, int, int | None]


def perform(device: Device, accesses: list[Access]) -> list[int]:
    """What the reads among `accesses` answered."""
    answers = []
    for offset, size, value in accesses:
        if value is None:
            answers.append(device.read(offset, size))
            assert 0 <= answers[-1] < 1 << 8 * size
        else:
            device.write(offset, size, value)
    return answers


@pytest.mark.parametrize("name", NAMES)
@given(accesses=ACCESSES)
def test_no_access_raises_and_every_answer_fits_its_width(
    name: str, accesses: list[Access]
) -> None:
    perform(DEVICES[name][1](World()), accesses)


@pytest.mark.parametrize("name", NAMES)
@given(before=ACCESSES, after=ACCESSES)
def test_a_device_restored_from_json_behaves_like_the_one_saved(
    name: str, before: list[Access], after: list[Access]
) -> None:
    make = DEVICES[name][1]
    world, other_world = World(), World()
    device, other = make(world), make(other_world)
    perform(device, before)
    state: dict[str, Any] = json.loads(json.dumps(device.save()))
    other.load(state)
    assert other.save() == device.save()
    assert other_world.level == world.level
    world.events.clear()
    other_world.events.clear()
    assert perform(other, after) == perform(device, after)
    assert (other_world.events, other_world.level) == (world.events, world.level)


@pytest.mark.parametrize("name", NAMES)
def test_a_device_says_what_it_is_and_what_it_does_not_do(name: str) -> None:
    length, make = DEVICES[name]
    device = make(World())
    module = __import__(type(device).__module__, fromlist=["__doc__"])
    documentation = f"{module.__doc__}\n{type(device).__doc__}"
    assert "Not emulated" in documentation
    assert "Port" in documentation
    assert device.name
    assert length > 0
