"""`--device`: a class of the user's own becomes a device, or one clear line says why not."""

import itertools
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tinyvmm import layout, own_device, placement
from tinyvmm.acpi import DeviceNode
from tinyvmm.cli.main import main
from tinyvmm.command.checks import check_options
from tinyvmm.command.options import RunOptions
from tinyvmm.devices.device import Device, GuestMemory, IrqLine
from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import Virtqueue
from tinyvmm.errors import ConfigError
from tinyvmm.machine import Machine
from tinyvmm.vcpu import StopCause

_numbers = itertools.count()
START = "from tinyvmm.devices.device import Device\n"
VIRTIO = "from tinyvmm.devices.virtio.device import VirtioDevice\n"
WIDGET = (
    START
    + """
class Widget(Device):
    PORTS = (0x500, 4)

    def __init__(self, count: int = 1, big: bool = False, label="x", ratio: float | None = None):
        self.told = (count, big, label, ratio)
"""
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def module(here: Path, source: str) -> str:
    """Write a module of a name never used before into the current directory; its name."""
    name = f"own{next(_numbers)}"
    (here / f"{name}.py").write_text(textwrap.dedent(source))
    return name


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        own_device.load(text)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith("--device ")
    return message


# --- finding it -------------------------------------------------------------------------------


def test_a_class_is_found_in_the_current_directory_and_its_values_converted(here: Path) -> None:
    name = module(here, WIDGET)
    own = own_device.load(f"{name}:Widget,count=0x10,big=on,label=a,,b=c,ratio=1.5")
    assert own.cls(**own.values).told == (16, True, "a,b=c", 1.5)  # type: ignore[union-attr]
    assert own_device.load(f"{name}:Widget").values == {}


def test_a_class_is_found_in_a_package_and_on_the_path(here: Path) -> None:
    (here / "lessons").mkdir()
    (here / "lessons" / "third.py").write_text(WIDGET)
    assert own_device.load("lessons.third:Widget").cls.__name__ == "Widget"
    assert own_device.load("examples.dice_port:Dice,sides=20").values == {"sides": 20}


def test_annotations_may_be_strings(here: Path) -> None:
    name = module(here, "from __future__ import annotations\n" + WIDGET)
    assert own_device.load(f"{name}:Widget,count=3").values == {"count": 3}


def test_a_file_here_takes_no_module_of_pythons_own_away(here: Path) -> None:
    (here / "colorsys.py").write_text("raise SystemExit")
    own_device.load(f"{module(here, WIDGET)}:Widget")
    sys.modules.pop("colorsys", None)
    import colorsys

    assert hasattr(colorsys, "rgb_to_hsv")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "package.module:Class"),
        ("Widget", "package.module:Class"),
        ("a b:Widget", "package.module:Class"),
        ("..a:Widget", "package.module:Class"),
        ("nowhere:Widget", "no module nowhere in /"),
        ("examples.nowhere:Widget", "no module examples.nowhere in /"),
        ("examples.dice_port:Coin", "has no Coin"),
        ("examples.dice_port:Any", "Any is no device: derive"),
        ("examples.pattern_rng:FILL_MAX", "FILL_MAX is no device"),
        ("examples.dice_port:Dice,side=3", "Dice has no 'side'; its keys: sides, seed"),
        ("examples.dice_port:Dice,sides", "'sides' is no key=value"),
        ("examples.dice_port:Dice,sides=six", "sides is to be an int, not 'six'"),
        ("examples.dice_port:Dice,sides=1,sides=2", "given twice"),
        ("examples.crc_device:CrcDevice,x=1", "its keys: none"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(here: Path, text: str, words: str) -> None:
    assert words in refused(text)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nowhere_at_all", "No module named 'nowhere_at_all' (/"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit('two\\nlines')", "SystemExit: two"),
        (START + "class Widget(Device):\n    def __init__(self, x): pass", "Widget needs x=..."),
        (
            START + "class Widget(Device):\n    def __init__(self, x: list = ()): pass",
            "x cannot be given here",
        ),
        (
            START + "class Widget(Device):\n    def __init__(self, x: 'Nothing' = 1): pass",
            "NameError",
        ),
        (
            VIRTIO + "class Widget(VirtioDevice):\n    def __init__(self, irq): pass",
            "Widget has no irq",
        ),
        (START + "class Widget(Device):\n    def __init__(self, big: bool): pass", "on or off"),
    ],
)
def test_a_module_that_is_broken_is_said_in_one_line(here: Path, source: str, words: str) -> None:
    value = {"on or off": ",big=1", "x cannot be given here": ",x=1"}.get(words, "")
    assert words in refused(f"{module(here, source)}:Widget{value}")


def test_a_run_is_checked_before_anything_is_started(here: Path) -> None:
    with pytest.raises(ConfigError, match="no module nowhere"):
        check_options(RunOptions(["true"], devices=["nowhere:Widget"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "nowhere:Widget"], "no module nowhere"),
        (["--balloon", "2G"], "--balloon 2048M takes all of --memory 1024M"),
        (["--append", "quiet pci=noaer,nommconf"], "--append pci=noaer,nommconf: it hides the bus"),
        (["--append", "pci=off"], "or give --transport mmio"),
        (["--append", "acpi=noirq"], "--append acpi=noirq: ACPI says where the devices are: leave"),
        (["--append", "a noapic"], "--append noapic: without APICs nothing interrupts: leave"),
        (["--append", "pci=conf1"], "--append pci=conf1: it hides the bus"),
        (["--append", "pci=nocrs,nomsi"], "pci=nocrs,nomsi: the devices would interrupt nobody: "),
        (["--transport", "mmio", "--append", "acpi=off pci=off"], "--append acpi=off: ACPI says"),
    ],
)
def test_the_command_fails_with_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *options, "--", "true"]) == 125
    out, said = capsys.readouterr()
    assert out == ""
    assert len(said.splitlines()) == 1
    assert words in said


# --- making it --------------------------------------------------------------------------------


class Lever(Device):
    """Wants all there is."""

    MMIO_LEN = 0x10
    made: ClassVar[list[Any]] = []

    def __init__(self, irq: IrqLine, memory: GuestMemory, on_exit: Any, teeth: int = 3) -> None:
        self.irq, self.memory, self.on_exit, self.teeth = irq, memory, on_exit, teeth
        self.made.append(self)


class Broken(Device):
    PORTS = (0x500, 1)

    def __init__(self) -> None:
        raise ValueError("no teeth")


class Plain(VirtioDevice):
    def __init__(self, memory: GuestMemory) -> None:
        super().__init__("plain", 42, queue_sizes=(4,))
        self.own_memory = memory


HERE = "tests.test_own_device"


@pytest.mark.kvm
def test_a_machine_gives_a_device_what_its_constructor_names() -> None:
    with Machine(memory=1 << 20) as machine:
        Lever.made.clear()
        for _ in range(2):
            own_device.add(own_device.load(f"{HERE}:Lever,teeth=4"), machine)
        own_device.add(own_device.load(f"{HERE}:Plain"), machine)
        lever = Lever.made[0]
        assert (lever.teeth, lever.name, lever.memory) == (4, "Lever", machine.memory)
        lever.irq.set(True)
        lever.irq.set(False)
        first, second = machine.device_nodes
        assert (first.gsi, second.gsi) == (23, 22)
        assert (first.base, second.base) == (0xD800_0000, 0xD800_1000)
        found = machine.mmio.find(0xD800_0008, 4)
        assert found is not None
        assert found[1] == 8
        lever.on_exit(7)
        lever.on_exit(8)
        assert machine.wait(60) == StopCause.DEVICE
        assert machine.exit_value == 7


@pytest.mark.kvm
def test_what_a_device_or_the_machine_refuses_is_one_line() -> None:
    with Machine(memory=1 << 20) as machine:
        machine.add_board(console=lambda data: None)
        for text, words in (
            (f"{HERE}:Broken", r"Broken: ValueError: no teeth \(/.*test_own_device.py line \d+\)"),
            ("examples.dice_port:Dice,sides=0", "a die of 0 sides"),
        ):
            with pytest.raises(ConfigError, match=words):
                own_device.add(own_device.load(text), machine)
        own_device.add(own_device.load("examples.dice_port:Dice"), machine)
        with pytest.raises(ConfigError, match="dice at port 0x500 overlaps dice"):
            own_device.add(own_device.load("examples.dice_port:Dice"), machine)


class Wrong(Device):
    """Does what `how` says, once it is asked."""

    PORTS = (0x500, 1)

    def __init__(self, how: str) -> None:
        self.how = how

    def read(self, offset: int, size: int) -> int:
        if self.how == "raises":
            raise RuntimeError("no\nteeth")
        if self.how == "exits":
            sys.exit(4)
        if self.how == "says nothing":
            return None  # type: ignore[return-value]
        return super().read(offset, size) if self.how == "has none" else 0


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", r"RuntimeError: no \(/.*test_own_device.py line \d+\)"),
        ("exits", r"SystemExit: 4 \(/.*test_own_device.py line \d+\)"),
        ("says nothing", "read gave None, and is to give an int"),
        ("has none", "there is no method read"),
        ("cannot write", "there is no method write"),
    ],
)
def test_what_a_device_raises_when_the_guest_asks_ends_the_run_with_one_line(
    how: str, words: str
) -> None:
    with Machine(memory=1 << 20, irqchip=False) as machine:
        own_device.add(own_device.load(f"{HERE}:Wrong,how={how}"), machine)
        machine.boot_real_mode(bytes.fromhex("ba 00 05  ec  ee  f4"))  # in al, dx; out dx, al
        machine.start()
        with pytest.raises(ConfigError, match=f"^--device {HERE}:Wrong,how={how}: {words}$"):
            machine.wait(60)


class Chain(VirtioDevice):
    """As ill as it is told; one that is not raises once it is kicked."""

    def __init__(self, ill: str) -> None:
        if ill != "made":
            device_id = 64 if ill == "numbered" else 42
            super().__init__("chain", device_id, queue_sizes=(3 if ill == "sized" else 4,))

    def handle(self, queue: Virtqueue) -> None:
        raise RuntimeError(f"queue {queue.index}")


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("ill", "words"),
    [
        ("made", r"Chain: its __init__ does not call super\(\)"),
        ("numbered", "Chain: device_id 64: give one"),
        ("sized", "Chain: a queue of 3: give a power of two"),
    ],
)
def test_a_virtio_device_that_no_transport_can_carry_is_one_line(ill: str, words: str) -> None:
    with Machine(memory=1 << 20) as machine:
        with pytest.raises(ConfigError, match=f"--device {HERE}:Chain,ill={ill}: {words}"):
            own_device.add(own_device.load(f"{HERE}:Chain,ill={ill}"), machine)
        assert machine.virtio_devices == ()


@pytest.mark.kvm
def test_what_a_virtio_device_raises_is_one_line() -> None:
    with Machine(memory=1 << 20) as machine:
        own_device.add(own_device.load(f"{HERE}:Chain,ill=not"), machine)
        (device,) = machine.virtio_devices
        with pytest.raises(ConfigError, match=r"ill=not: RuntimeError: queue 0 \(/.* line \d+\)$"):
            device.handle(device.queues[0])


@pytest.mark.kvm
def test_a_guest_reads_a_device_of_the_users_own() -> None:
    guest = bytes.fromhex("ba 00 05  ec  a2 00 20  ec  a2 01 20  f4")  # two throws, to 0x2000
    with Machine(memory=1 << 20, irqchip=False) as machine:
        own_device.add(own_device.load("examples.dice_port:Dice,sides=200,seed=5"), machine)
        machine.boot_real_mode(guest)
        machine.start()
        assert machine.wait(60) == StopCause.HALT
        thrown = machine.memory.read(0x2000, 2)
    from examples.dice_port import Dice

    die = Dice(200, 5)
    assert thrown == bytes([die.read(0, 1), die.read(0, 1)])


# --- where it goes ----------------------------------------------------------------------------


def declared(**attributes: Any) -> Device:
    thing: type[Device] = type("Thing", (Device,), attributes)
    return thing()


def test_registers_in_memory_have_pages_of_their_own_and_never_overlap() -> None:
    nodes: list[DeviceNode] = []
    for length in (1, 0x1001, 0x1000, 0x100_0000, 4):
        nodes.append(placement.place(declared(MMIO_LEN=length), None, nodes))
    assert [node.base for node in nodes] == [
        *(0xD800_0000, 0xD800_2000, 0xD800_4000, 0xD900_0000, 0xDA00_0000)
    ]


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({}, "either PORTS"),
        ({"PORTS": (0x500, 1), "MMIO_LEN": 4}, "either PORTS"),
        ({"PORTS": (0x500, 0)}, "1 to 255 ports"),
        ({"PORTS": (0xFFFF, 2)}, "below 0x10000"),
        ({"PORTS": 0x500}, r"PORTS 1280: give two numbers, \(first, count\)"),
        ({"PORTS": (0x500,)}, "give two numbers"),
        ({"PORTS": ("500", 1)}, "give two numbers"),
        ({"PORTS": (-1, 1)}, "below 0x10000"),
        ({"PORTS": (0x60, 4)}, "port 0x61 is KVM's own"),
        ({"MMIO_LEN": -1}, "no length"),
        ({"MMIO_LEN": "4K"}, "'4K' is no length"),
        ({"MMIO_LEN": 0x800_0001}, "no room"),
        ({"MMIO_LEN": 4, "HID": "mine"}, "make it like ABCD0123"),
        ({"MMIO_LEN": 4, "HID": 5}, "make it like ABCD0123"),
    ],
)
def test_a_place_that_cannot_be_had_is_refused(attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"Thing: .*{words}"):
        placement.place(declared(**attributes), None, [])


def test_there_is_an_end_to_devices_and_to_interrupts() -> None:
    nodes: list[DeviceNode] = []
    for _ in range(10):
        gsi = placement.free_gsi(nodes, virtio_mmio=4)
        nodes.append(placement.place(declared(MMIO_LEN=4), gsi, nodes))
    assert [node.gsi for node in nodes] == list(range(23, 13, -1))
    with pytest.raises(ConfigError, match="more devices than interrupt lines"):
        placement.free_gsi(nodes, virtio_mmio=4)
    with pytest.raises(ConfigError, match="more than 64 devices"):
        placement.place(declared(MMIO_LEN=4), None, nodes * 7)


@pytest.mark.kvm
def test_virtio_mmio_devices_leave_the_interrupts_of_others_alone() -> None:
    with Machine(memory=1 << 20, transport="mmio") as machine:
        own_device.add(own_device.load(f"{HERE}:Lever"), machine)
        for _ in range(layout.VIRTIO_MAX - 1):
            own_device.add(own_device.load(f"{HERE}:Plain"), machine)
        with pytest.raises(ConfigError, match="more than 13 virtio devices"):
            own_device.add(own_device.load(f"{HERE}:Plain"), machine)
        with pytest.raises(ConfigError, match="interrupt lines"):
            own_device.add(own_device.load(f"{HERE}:Lever"), machine)


def test_collaborators_are_no_keys() -> None:
    assert "has no 'irq'; its keys: teeth" in refused(f"{HERE}:Lever,irq=4")
