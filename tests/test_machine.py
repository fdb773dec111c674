"""Tiny guests on /dev/kvm: the exit loop, and every way that a run can end."""

import errno
import signal
import struct
import sys
import threading

import pytest

from tests.waiting import wait_for
from tinyvmm import kvm
from tinyvmm.errors import ConfigError, KvmError, VcpuError
from tinyvmm.machine import Machine
from tinyvmm.vcpu import StopCause

pytestmark = pytest.mark.kvm

HLT = b"\xf4"


class Ports:
    """A device that logs what the guest writes and answers reads from a list."""

    name = "ports"

    def __init__(self) -> None:
        self.written: list[tuple[int, int, int]] = []
        self.answers: list[int] = []

    def read(self, offset: int, size: int) -> int:
        return self.answers.pop(0)

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


def run(code: bytes, device: Ports | None = None, memory: int = 1 << 20) -> str | None:
    with Machine(memory=memory, irqchip=False) as machine:
        machine.ports.add(0xE0, 8, device or Ports())
        machine.mmio.add(0xD000_0000, 0x1000, device or Ports())
        machine.boot_real_mode(code)
        machine.start()
        return machine.wait(timeout=30)


def test_a_guest_writes_ports_in_every_width_and_halts() -> None:
    device = Ports()
    # mov al,0x41; out 0xe0,al; mov ax,0x1234; out 0xe2,ax; mov eax,0x89abcdef; out 0xe4,eax; hlt
    code = bytes.fromhex("b041 e6e0 b83412 e7e2 66b8efcdab89 66e7e4") + HLT
    assert run(code, device) == StopCause.HALT
    assert device.written == [(0, 1, 0x41), (2, 2, 0x1234), (4, 4, 0x89ABCDEF)]


def test_a_guest_reads_what_the_device_answers() -> None:
    device = Ports()
    device.answers = [0x155, 0xBEEF]  # the first is cut to the width of the access
    # in al,0xe0; out 0xe1,al; in ax,0xe2; out 0xe2,ax; hlt
    assert run(bytes.fromhex("e4e0 e6e1 e5e2 e7e2") + HLT, device) == StopCause.HALT
    assert device.written == [(1, 1, 0x55), (2, 2, 0xBEEF)]


def test_string_instructions_move_every_item() -> None:
    device = Ports()
    device.answers = list(range(1, 11))
    # mov dx,0xe0; mov di,0x2000; mov cx,10; rep insb; mov si,0x2000; mov cx,10; rep outsb; hlt
    code = bytes.fromhex("bae000 bf0020 b90a00 f36c be0020 b90a00 f36e") + HLT
    assert run(code, device) == StopCause.HALT
    assert device.written == [(0, 1, value) for value in range(1, 11)]


def test_a_guest_that_touches_every_port_does_not_fill_the_table() -> None:
    with Machine(memory=1 << 20, irqchip=False) as machine:
        # mov dx,0; again: in al,dx; inc dx; jnz again; hlt
        machine.boot_real_mode(bytes.fromhex("ba0000 ec 42 75fc") + HLT)
        machine.start()
        assert machine.wait(60) == StopCause.HALT
        assert len(machine.vcpus[0]._handlers) <= 1024


def test_a_triple_fault_is_told_apart() -> None:
    with Machine(memory=1 << 20, irqchip=False) as machine:
        machine.boot_real_mode(b"\x0f\x0b")  # ud2
        handle = machine.vcpus[0].handle
        sregs = handle.get_sregs()  # 32-bit protected mode, and an IDT without any vector
        flat = {"limit": 0xFFFF_FFFF, "present": 1, "s": 1, "g": 1, "db": 1}
        sregs.cs = kvm.kvm_segment(selector=8, type=0xB, **flat)
        sregs.ds = sregs.es = sregs.ss = kvm.kvm_segment(selector=16, type=3, **flat)
        sregs.idt = kvm.kvm_dtable(base=0, limit=0)
        sregs.cr0 |= 1
        handle.set_sregs(sregs)
        machine.start()
        assert machine.wait(30) == StopCause.TRIPLE_FAULT


def test_a_spinning_guest_is_stopped_from_another_thread() -> None:
    with Machine(memory=1 << 20, irqchip=False) as machine:
        machine.boot_real_mode(b"\xeb\xfe")
        machine.start()
        assert machine.wait(timeout=0.05) is None
        threading.Timer(0.05, machine.stop, [StopCause.STOPPED]).start()
        assert machine.wait(timeout=30) == StopCause.STOPPED


def test_a_machine_is_used_from_another_thread_and_leaves_signals_alone() -> None:
    found: list[object] = []
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    interval = sys.getswitchinterval()

    def work() -> None:
        with Machine(memory=1 << 20, irqchip=False) as machine:
            machine.boot_real_mode(b"\xeb\xfe")
            machine.start()
            machine.pause()
            found.append(machine.vcpus[0].handle.get_regs().rip)
            machine.resume()
            machine.stop(StopCause.STOPPED)
            found.append(machine.wait(60))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0x1000, StopCause.STOPPED]
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert sys.getswitchinterval() == interval


def test_a_halted_guest_with_interrupt_controllers_waits_until_stopped() -> None:
    with Machine(memory=1 << 20) as machine:
        machine.boot_real_mode(HLT)
        machine.start()
        assert machine.wait(timeout=0.2) is None
    assert machine.cause == StopCause.STOPPED


def test_a_stop_before_the_start_still_ends_the_run() -> None:
    with Machine(memory=1 << 20, irqchip=False) as machine:
        machine.boot_real_mode(b"\xeb\xfe")
        machine.stop(StopCause.STOPPED)
        machine.start()
        assert machine.wait(timeout=30) == StopCause.STOPPED


def test_a_bug_in_a_device_is_raised_by_wait() -> None:
    class Broken(Ports):
        def write(self, offset: int, size: int, value: int) -> None:
            raise ZeroDivisionError("a bug of ours")

    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        run(b"\xe6\xe0" + HLT, Broken())


def test_a_vcpu_that_cannot_go_on_reports_its_state() -> None:
    # mov ax,0x1234; jmp 0xffff:0x0010, the first byte above RAM: nothing to execute there
    with pytest.raises(VcpuError) as caught:
        run(bytes.fromhex("b83412 ea1000ffff"))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("vCPU 0: KVM_EXIT_INTERNAL_ERROR, suberror ")
    assert "rax=0x1234" in lines[1]
    assert "cs=0xffff" in lines[2]
    assert lines[3] == "  code at rip: not mapped"


def test_several_vcpus_wait_for_the_first_to_wake_them() -> None:
    with Machine(memory=1 << 20, cpus=3) as machine:
        device = Ports()
        machine.ports.add(0xE0, 8, device)
        # mov al,1; out 0xe0,al; hlt
        machine.boot_real_mode(bytes.fromhex("b001 e6e0") + HLT)
        machine.start()
        wait_for(lambda: bool(device.written))
        assert machine.wait(timeout=0.3) is None
        assert device.written == [(0, 1, 1)]


def test_where_descriptors_are_too_few_for_the_last_vcpu_none_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_stats = kvm.VCPU.open_stats

    def one_too_few(handle: kvm.VCPU) -> None:
        if handle.vcpu_id == 2:
            raise KvmError("KVM_GET_STATS_FD", errno.EMFILE)
        open_stats(handle)

    monkeypatch.setattr(kvm.VCPU, "open_stats", one_too_few)
    with Machine(memory=1 << 20, cpus=3) as machine:
        machine.boot_real_mode(HLT)
        with pytest.raises(KvmError, match="EMFILE"):
            machine.start()
        assert [vcpu.thread_id for vcpu in machine.vcpus] == [None] * 3


def test_more_cpus_than_kvm_allows_is_one_clear_line() -> None:
    for cpus in (0, -1, 256, 100_000):
        with pytest.raises(ConfigError, match=r"^--cpus -?\d+: (this KVM|a machine) has 1 to \d+$"):
            Machine(memory=1 << 20, cpus=cpus)


def test_machines_come_and_go_without_leaving_descriptors() -> None:
    for _ in range(20):
        assert run(HLT) == StopCause.HALT


def test_mmio_reaches_the_device() -> None:
    device = Ports()
    device.answers = [0x1122_3344]
    with Machine(memory=1 << 20, irqchip=False) as machine:
        machine.mmio.add(0x10_0000, 0x1000, device)  # just above this machine's RAM
        # mov ax,0xffff; mov ds,ax; mov eax,[0x10]; mov [0x14],al; hlt  (ds:0x10 = 0x100000)
        code = bytes.fromhex("b8ffff 8ed8 66a11000 a21400") + HLT
        machine.boot_real_mode(code)
        machine.start()
        assert machine.wait(timeout=30) == StopCause.HALT
    assert device.written == [(4, 1, 0x44)]


def test_the_guest_sees_its_own_apic_id_in_cpuid() -> None:
    from tinyvmm import cpuid, kvm

    with kvm.System() as system:
        supported = system.supported_cpuid()
    for apic_id in range(3):
        leaves = cpuid.for_vcpu(supported, apic_id, 3, tsc_deadline=True)
        by_leaf = {(leaf.function, leaf.index): leaf for leaf in leaves}
        assert by_leaf[1, 0].ebx >> 16 == apic_id << 8 | 3
        assert by_leaf[1, 0].ecx >> 31 == 1
        assert by_leaf[1, 0].edx >> 28 & 1 == 1
        assert {leaf.edx for leaf in leaves if leaf.function in {0xB, 0x1F}} <= {apic_id}
        core = by_leaf.get((0xB, 1))
        assert core is None or (core.eax, core.ebx, core.ecx) == (2, 3, 0x201)
    assert struct.pack("<I", supported[0].eax)  # the list given is left as it was
