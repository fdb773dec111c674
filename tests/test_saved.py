"""Every class of device can be saved as JSON and loaded elsewhere, and goes on as if nothing were.

The list is not written here: it is every class below tinyvmm.devices, and those of examples, that
has `save` and `load`. One for which DOINGS has nothing fails, and so does one without a page in
docs/devices.
"""

import importlib
import inspect
import json
import pkgutil
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tinyvmm.devices
from examples.crc_device import CrcDevice
from examples.dice_port import Dice
from examples.pattern_rng import PatternRng
from tests.bad_guests import TRANSPORTS, VIRTIO, Made, OverPci
from tests.test_board_devices import DEVICES, World
from tinyvmm.devices.debug_exit import DebugExit
from tinyvmm.devices.device import Device
from tinyvmm.devices.fw_cfg import FwCfg
from tinyvmm.devices.i8042 import I8042
from tinyvmm.devices.msix import Msix
from tinyvmm.devices.pci import ConfigPorts, Ecam, Function, PciBus, host_bridge
from tinyvmm.devices.power import PowerControl
from tinyvmm.devices.register import RegisterDevice
from tinyvmm.devices.reset_control import ResetControl
from tinyvmm.devices.rtc import Rtc
from tinyvmm.devices.uart import Uart
from tinyvmm.devices.virtio.balloon import VirtioBalloon
from tinyvmm.devices.virtio.blk import VirtioBlk
from tinyvmm.devices.virtio.console import VirtioConsole
from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.mmio import VirtioMmio
from tinyvmm.devices.virtio.net import VirtioNet
from tinyvmm.devices.virtio.p9 import NinePHandler, Virtio9P
from tinyvmm.devices.virtio.pci import CommonConfiguration, VirtioFunction, VirtioPci
from tinyvmm.devices.virtio.queue import Virtqueue
from tinyvmm.devices.virtio.rng import VirtioRng
from tinyvmm.devices.virtio.vhost_vsock import VhostVsock
from tinyvmm.devices.virtio.vsock import VirtioVsock
from tinyvmm.devices.virtio.vsock_device import VsockDevice

BASES = {
    Device,
    NinePHandler,
    RegisterDevice,
    VirtioDevice,
    VsockDevice,
}  # which are nothing by themselves


def classes() -> list[type]:
    """Every class that is a device, or a part of one with a state of its own."""
    found = {CrcDevice, Dice, PatternRng}
    for info in pkgutil.walk_packages(tinyvmm.devices.__path__, "tinyvmm.devices."):
        for _, kind in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            if kind.__module__ == info.name and hasattr(kind, "save") and hasattr(kind, "load"):
                found.add(kind)
    return sorted(found - BASES, key=lambda kind: kind.__name__)


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    """What is left of a state in a file; a tuple, bytes or a key of no text would not be."""
    read = json.loads(json.dumps(state))
    assert read == state
    return dict(read)


def registers(make: Callable[[], Device], length: int) -> None:
    """Write and read all over one, move it, and have both do the same from then on."""
    chosen = random.Random(7)  # noqa: S311 (a test is to be repeated)
    first, second = make(), make()

    def touch(device: Device, seed: int) -> list[int]:
        own = random.Random(seed)  # noqa: S311
        answers = []
        for _ in range(200):
            size = own.choice((1, 1, 1, 2, 4))
            offset = own.randrange(length)
            device.write(offset, size, own.randrange(1 << 8 * size))
            answers.append(device.read(own.randrange(length), size))
        return answers

    touch(first, chosen.randrange(1 << 30))
    state = through_json(first.save())
    second.load(state)
    assert second.save() == state
    seed = chosen.randrange(1 << 30)
    assert touch(second, seed) == touch(first, seed)


def board(name: str) -> Callable[[], None]:
    length, make = DEVICES[name]
    return lambda: registers(lambda: make(World()), length)


def pci_function() -> None:
    first, second = host_bridge(), host_bridge()
    first.write_config(0x3C, 1, 0x5A)
    second.load(through_json(first.save()))
    assert second.read_config(0x3C, 1) == 0x5A


def virtio(name: str, *transports: str) -> Callable[[], None]:
    """A driver that has used a device goes on with another one, on the same transport."""

    def do() -> None:
        for transport in transports or TRANSPORTS:
            first, second = VIRTIO[name](), VIRTIO[name]()
            try:
                goes_on_elsewhere(first, second, transport)
            finally:
                first.end()
                second.end()

    return do


def goes_on_elsewhere(first: Made, second: Made, transport: str) -> None:
    here, there = TRANSPORTS[transport](first.device), TRANSPORTS[transport](second.device)
    queues = here.start()
    if isinstance(here, OverPci):
        here.pci.enable_msix()
    assert first.works(queues)
    first.device.set_config(bytes(len(first.device.config)))  # which the other must take over
    there.ram.data[:] = here.ram.data
    there.ram._next = here.ram._next
    state = through_json(saved(here))
    loaded(there, state)
    assert saved(there) == state
    if isinstance(there, OverPci) and isinstance(here, OverPci):
        there.pci, there.features = type(here.pci)(there.board), here.features
    elif not isinstance(there, OverPci) and not isinstance(here, OverPci):
        there.driver.features = here.driver.features
    for queue in queues:
        queue.ram = there.ram
        queue.driver = there if isinstance(there, OverPci) else there.driver  # type: ignore[assignment]
    assert second.device.config == bytes(len(first.device.config))
    assert second.works(queues)


def saved(where: Any) -> dict[str, Any]:
    """What a machine would keep of a device, its transport and its bus."""
    if isinstance(where, OverPci):
        inside = where.board
        parts = {"ecam": inside.ecam, "ports": inside.ports, "transport": inside.transport}
    else:
        parts = {"transport": where.driver.mmio}
    return {name: part.save() for name, part in parts.items()}


def loaded(where: Any, state: dict[str, Any]) -> None:
    parts = vars(where.board) if isinstance(where, OverPci) else {"transport": where.driver.mmio}
    for name, part in state.items():
        parts[name].load(part)


PAGES = {
    "p9": "virtio-9p",
    "msix": "virtio-pci",
    "queue": "virtio-mmio",
    "vhost_vsock": "virtio-vsock",
}
DOCS = Path(__file__).parent.parent / "docs" / "devices"

DOINGS: dict[type, Callable[[], None]] = {
    DebugExit: board("debug_exit"),
    Uart: board("uart"),
    Rtc: board("rtc"),
    I8042: board("i8042"),
    FwCfg: board("fw_cfg"),
    ResetControl: board("reset_control"),
    PowerControl: board("power"),
    ConfigPorts: lambda: registers(lambda: ConfigPorts(PciBus()), 8),
    Ecam: lambda: registers(lambda: Ecam(PciBus()), 0x1000),
    Function: pci_function,
    VirtioRng: virtio("rng"),
    VirtioConsole: virtio("console"),
    Virtio9P: virtio("9p"),
    VirtioBalloon: virtio("balloon"),
    VirtioBlk: virtio("block"),
    VirtioVsock: virtio("vsock"),
    VhostVsock: virtio("vhost vsock"),
    VirtioNet: virtio("net"),
    Virtqueue: virtio("rng"),
    VirtioMmio: virtio("rng", "mmio"),
    VirtioPci: virtio("rng", "pci"),
    VirtioFunction: virtio("rng", "pci"),
    CommonConfiguration: virtio("rng", "pci"),
    Msix: virtio("rng", "pci"),
    CrcDevice: lambda: registers(CrcDevice, 16),
    Dice: lambda: registers(lambda: Dice(seed=1), 1),
    PatternRng: virtio("example pattern"),
}


@pytest.mark.parametrize("kind", classes())
def test_it_goes_on_where_its_state_is_loaded(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind in DOINGS, f"say in DOINGS what is to be done with a {kind.__name__}"
    seen: set[type] = set()
    for owner in {base for base in kind.__mro__ if "load" in vars(base)}:
        load = vars(owner)["load"]

        def noted(self: Any, *args: Any, _load: Callable[..., None] = load) -> None:
            seen.add(type(self))
            _load(self, *args)

        monkeypatch.setattr(owner, "load", noted)
    DOINGS[kind]()
    assert kind in seen


@pytest.mark.parametrize("kind", classes())
def test_it_has_a_page_that_says_what_it_is_and_what_it_is_not(kind: type) -> None:
    *package, module = kind.__module__.split(".")
    if package[0] == "examples":
        text = (DOCS.parent / "guide" / "07-write-a-device.md").read_text()
        assert f"{module}.py" in text
        return
    prefix = "virtio-" if package[-1] == "virtio" else ""
    text = (DOCS / f"{PAGES.get(module, prefix + module.replace('_', '-'))}.md").read_text()
    assert f"tinyvmm/{'/'.join(package[1:])}/{module}.py" in text
    assert "Not emulated" in text
