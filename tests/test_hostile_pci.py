"""Guests that mean ill, or are new to it, on PCI's configuration space: tiny ones on real KVM.

Reads of it are reads of memory there, writes are exits; tests/test_chaos.py plays with all of a
board's devices at once, and at random.
"""

import struct
from contextlib import suppress

import pytest

from tests.test_eventfds import END, Rung, copy, run, store
from tinyvmm import layout
from tinyvmm.devices.pci import PCI_BASE_ADDRESS_0, PCI_INTERRUPT_LINE, Ecam
from tinyvmm.devices.virtio.pci import BAR_LEN, NOTIFY
from tinyvmm.errors import VcpuError
from tinyvmm.machine import Machine

pytestmark = pytest.mark.kvm


def config(slot: int, register: int = 0) -> int:
    """Where a register is in the guest's memory."""
    return layout.PCI_ECAM_GPA + (slot << 15) + register


def bar(slot: int) -> int:
    """Where a function's BAR is when the guest starts."""
    return layout.PCI_WINDOW_GPA + slot * layout.PCI_SLOT_STRIDE


def test_bars_moved_over_one_another_answer_once_they_are_alone() -> None:
    """A kernel that gives out addresses by itself does so function by function, all being on."""
    first, second = Rung(), Rung()
    with Machine(memory=1 << 20) as machine:
        machine.add_virtio(first)
        machine.add_virtio(second)
        code = store(config(1, PCI_BASE_ADDRESS_0), bar(2))  # where the other still is
        code += store(bar(2) + NOTIFY, 0)
        code += store(config(2, PCI_BASE_ADDRESS_0), bar(2) + BAR_LEN)
        code += store(bar(2) + NOTIFY, 0) + store(bar(2) + BAR_LEN + NOTIFY, 0)
        exits = run(machine, code + END)
    assert [exit_.address for exit_ in exits] == [
        config(1, PCI_BASE_ADDRESS_0),
        config(2, PCI_BASE_ADDRESS_0),
        0xF4,
    ]
    assert first.bells
    assert second.bells


# Each writes 0x55s, or what differs from what is there, at EDI.
WRITES = {
    "byte": b"\xc6\x07\x55",
    "word": b"\x66\xc7\x07\x55\x55",
    "doubleword": b"\xc7\x07\x55\x55\x55\x55",
    "read, modify and write": b"\x83\x0f\x55",  # or dword [edi], 0x55
    "the same, locked": b"\xf0\x83\x0f\x55",
    "exchange": b"\xb8\x55\x55\x55\x55\x87\x07",
    "locked add": b"\xb8\x55\x55\x55\x55\xf0\x0f\xc1\x07",  # xadd
    "compare and exchange": b"\x8b\x07\xb9\x55\x55\x55\x55\xf0\x0f\xb1\x0f",
    "string": b"\xb0\x55\xb9\x09\x00\x00\x00\xfc\xf3\xaa",  # rep stosb: nine bytes
}


@pytest.mark.parametrize("how", WRITES)
def test_writes_of_any_kind_are_exits_and_change_what_may_be_changed(how: str) -> None:
    """Within a register, over two of them, over the end of a page, and over that of the memory."""
    line = config(1, PCI_INTERRUPT_LINE)
    places = [line, line - 1, line + 1, config(1, 0xFF), config(1, 0xFFE), config(2) - 1]
    places += [config(0), config(1), config(1) - 2, config(0, 1 << 12), config(3), config(40)]
    code = b"".join(b"\xbf" + struct.pack("<I", place) + WRITES[how] for place in places)
    with Machine(memory=1 << 20) as machine:
        machine.add_virtio(Rung())
        bus = machine.pci
        assert bus is not None
        before = [bytes(function.config) for function in bus.slots]
        exits = run(machine, code + copy(line & ~3, 0x6000) + END)
        seen = machine.memory.read(0x6000, 4)
        ours = bytes(bus.slots[1].config)
        assert seen == ours[PCI_INTERRUPT_LINE : PCI_INTERRUPT_LINE + 4]
        for function, was in zip(bus.slots, before, strict=True):
            for old, new, writable in zip(was, function.config, function.writable, strict=True):
                assert not (old ^ new) & ~writable
    assert seen[0]
    assert {exit_.direction for exit_ in exits if exit_.address < config(2)} == {"write"}


EDI = b"\xbf" + struct.pack("<I", config(1, 0x20))
NOT_FOR_THIS = {
    "code": b"\xb8" + struct.pack("<I", config(0, 1 << 12)) + b"\xff\xe0",  # mov eax; jmp eax
    "a stack": EDI + b"\x89\xfc\x50\x60\xe8\x00\x00\x00\x00",  # mov esp, edi; push; pusha; call
    "an interrupt's frame": EDI + b"\x89\xfc\xcd\x50",  # mov esp, edi; int 0x50
    "interrupt descriptors": EDI + b"\x0f\x01\x1f\xcd\x50",  # lidt [edi]; int 0x50
    "segment descriptors": EDI + b"\x0f\x01\x17\xb8\x08\x00\x00\x00\x8e\xd8",  # lgdt [edi]; mov ds
    "page tables": EDI + b"\x0f\x22\xdf\x0f\x20\xc0\x0d\0\0\0\x80\x0f\x22\xc0",  # cr3, cr0.pg
    "an FPU's state": EDI + b"\xdb\xe3\xdd\x37",  # fninit; fnsave [edi]
    "eight bytes at once": EDI + b"\xf0\x0f\xc7\x0f",  # lock cmpxchg8b [edi]
    "bits": EDI + b"\xf0\x0f\xba\x2f\x03\xf0\x0f\xb3\x0f",  # lock bts [edi], 3; lock btr
}


@pytest.mark.parametrize("what", NOT_FOR_THIS)
def test_whatever_else_a_kernel_takes_configuration_space_for_harms_only_itself(what: str) -> None:
    with Machine(memory=1 << 20) as machine:
        machine.add_virtio(Rung())
        bus = machine.pci
        assert bus is not None
        before = [bytes(function.config) for function in bus.slots]
        with suppress(VcpuError):  # an instruction that KVM does not emulate
            run(machine, NOT_FOR_THIS[what] + END)
        assert machine.cause
        for function, was in zip(bus.slots, before, strict=True):
            for old, new, writable in zip(was, function.config, function.writable, strict=True):
                assert not (old ^ new) & ~writable


@pytest.mark.parametrize("memory", [1 << 20, 5 << 30])
@pytest.mark.parametrize("shown", [True, False])
def test_configuration_space_reads_alike_as_memory_and_by_exits(memory: int, shown: bool) -> None:
    """Whether KVM has read-only memory, and on either side of how much RAM needs one slot of it."""
    registers = [
        config(slot, at) for slot in (0, 1) for at in (0, 8, 0x10, 0x34, 0x40, 0xFC, 0x100)
    ]
    registers += [config(1, 1 << 12), config(1, 0x7FFC), config(2), config(31)]
    code = b"".join(copy(at, 0x6000 + 4 * number) for number, at in enumerate(registers))
    with Machine(memory=memory) as machine:
        machine.add_virtio(Rung())
        machine._readonly = machine._readonly and shown
        bus = machine.pci
        assert bus is not None
        exits = run(machine, code + END)
        seen = struct.unpack(f"<{len(registers)}I", machine.memory.read(0x6000, 4 * len(registers)))
        ecam = Ecam(bus)
        assert list(seen) == [ecam.read(at - layout.PCI_ECAM_GPA, 4) for at in registers]
        by_exits = [exit_.address for exit_ in exits if exit_.direction == "read"]
        assert by_exits == (registers[-2:] if machine._readonly else registers)
