"""Pause, resume and single step, on tiny guests: at any moment, from any thread, nothing lost."""

import os
import random
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from time import sleep
from types import FrameType

import pytest

from tests.test_eventfds import MESSAGE, UP_GPA, Ender, protected_mode, writes
from tests.waiting import wait_for
from tinyvmm import bare_kernel, kvm, layout
from tinyvmm.devices.debug_exit import DebugExit
from tinyvmm.devices.virtio.blk import VirtioBlk
from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import Virtqueue
from tinyvmm.disks.raw import RawDisk
from tinyvmm.errors import KvmError
from tinyvmm.eventfds import MsiRoutes
from tinyvmm.machine import Machine
from tinyvmm.vcpu import StopCause

pytestmark = pytest.mark.kvm

COUNTER = 0x3000
COUNT = bytes.fromhex("66ff060030 ebf9")  # again: inc dword [0x3000]; jmp again
HLT = b"\xf4"


class Slow:
    """A device that answers when it is let, and counts."""

    name = "slow"

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.may_answer = threading.Event()
        self.written: list[int] = []

    def read(self, offset: int, size: int) -> int:
        self.asked.set()
        assert self.may_answer.wait(30)
        return 0x5A

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append(value)


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(memory=1 << 20, irqchip=False) as machine:
        yield machine


def count(machine: Machine) -> int:
    return int(struct.unpack("<I", machine.memory.read(COUNTER, 4))[0])


def wait_for_progress(machine: Machine) -> None:
    before = count(machine)
    while count(machine) == before:
        assert not machine.cause
        sleep(0.001)


def test_a_paused_guest_stands_still_and_goes_on(machine: Machine) -> None:
    machine.boot_real_mode(COUNT)
    machine.start()
    for _ in range(20):
        wait_for_progress(machine)
        machine.pause()
        before = count(machine)
        assert 0x1000 <= machine.vcpus[0].handle.get_regs().rip < 0x1000 + len(COUNT)
        sleep(0.005)
        assert count(machine) == before
        machine.resume()


def test_pause_and_resume_are_idempotent_and_may_come_first(machine: Machine) -> None:
    machine.boot_real_mode(COUNT)
    machine.resume()
    machine.pause()
    machine.pause()
    machine.start()
    sleep(0.02)
    machine.pause()
    assert count(machine) == 0
    assert machine.paused
    machine.resume()
    machine.resume()
    wait_for_progress(machine)


def test_what_a_device_answers_while_a_pause_is_wanted_is_in_the_register(
    machine: Machine,
) -> None:
    device = Slow()
    machine.ports.add(0xE0, 1, device)
    machine.boot_real_mode(bytes.fromhex("e4e0 e6e0") + HLT)  # in al,0xe0; out 0xe0,al; hlt
    machine.start()
    assert device.asked.wait(30)
    pauser = threading.Thread(target=machine.pause)
    pauser.start()
    while not machine.vcpus[0]._pausing:
        sleep(0.001)
    device.may_answer.set()
    pauser.join(30)
    regs = machine.vcpus[0].handle.get_regs()
    assert (regs.rax & 0xFF, regs.rip) == (0x5A, 0x1002)
    assert device.written == []
    machine.resume()
    assert machine.wait(30) == StopCause.HALT
    assert device.written == [0x5A]


def test_a_paused_machine_can_be_stopped(machine: Machine) -> None:
    machine.boot_real_mode(COUNT)
    machine.start()
    machine.pause()
    machine.stop(StopCause.STOPPED)
    assert machine.wait(30) == StopCause.STOPPED
    machine.pause()
    machine.resume()


def test_registers_changed_while_paused_are_the_guests(machine: Machine) -> None:
    machine.boot_real_mode(COUNT)
    machine.memory.write(0x2000, HLT)
    machine.start()
    machine.pause()
    handle = machine.vcpus[0].handle
    regs = handle.get_regs()
    regs.rip = 0x2000
    handle.set_regs(regs)
    machine.resume()
    assert machine.wait(30) == StopCause.HALT


def test_vcpus_that_wait_for_their_sipi_or_are_halted_are_paused_too() -> None:
    with Machine(memory=1 << 20, cpus=3) as machine:
        machine.boot_real_mode(HLT)
        machine.start()
        for _ in range(10):
            machine.pause()
            machine.resume()
        assert machine.wait(0) is None


def test_an_interrupt_that_comes_while_paused_arrives_after() -> None:
    with Machine(memory=1 << 20) as machine:
        machine.ports.add(0xF4, 4, Ender(machine))
        enable = writes((layout.LOCAL_APIC_GPA + 0xF0, 0x1FF), (UP_GPA, 1))[:-3]
        protected_mode(machine, enable + b"\xfb\xf4\xeb\xfd")  # sti; hlt for ever
        machine.memory.write(0x2000, b"\xb0\x42\xe6\xf4\xf4")  # mov al, 0x42; out 0xF4, al
        machine.memory.write(0x4000 + 8 * MESSAGE[1], struct.pack("<HHHH", 0x2000, 8, 0x8E00, 0))
        routes = MsiRoutes(machine.open_vm())
        line = routes.line()
        line.route(*MESSAGE)
        machine.start()
        wait_for(lambda: machine.memory.read(UP_GPA, 1) == b"\1")
        machine.pause()
        line.fire()
        assert machine.wait(0.05) is None
        machine.resume()
        assert machine.wait(30) == "0x42"
        routes.close()


def can_step() -> bool:
    """A software KVM may not."""
    with Machine(memory=1 << 20, irqchip=False) as machine:
        machine.boot_real_mode(COUNT)
        machine.pause()
        machine.start()
        machine.pause()
        try:
            machine.vcpus[0].step()
        except KvmError:
            return False
        return machine.vcpus[0].handle.get_regs().rip == 0x1005


def test_a_step_is_one_instruction(machine: Machine) -> None:
    if not can_step():
        pytest.skip("this KVM cannot single-step")
    # inc ax; inc ax; out 0xe0,al; in al,0xe0; jmp +0; hlt
    starts = [0x1000, 0x1001, 0x1002, 0x1004, 0x1006, 0x1008]
    device = Slow()
    device.may_answer.set()
    machine.ports.add(0xE0, 1, device)
    machine.boot_real_mode(bytes.fromhex("40 40 e6e0 e4e0 eb00") + HLT)
    machine.pause()
    machine.start()
    machine.pause()
    vcpu = machine.vcpus[0]
    seen = [vcpu.handle.get_regs().rip]
    for _ in range(5):
        assert vcpu.step()
        seen.append(vcpu.handle.get_regs().rip)
    assert seen == starts
    assert device.written == [2]
    assert vcpu.handle.get_regs().rax & 0xFF == 0x5A
    machine.resume()
    assert machine.wait(30) == StopCause.HALT


def test_only_a_paused_vcpu_can_be_stepped(machine: Machine) -> None:
    machine.boot_real_mode(COUNT)
    with pytest.raises(RuntimeError, match="vCPU 0 is not paused"):
        machine.vcpus[0].step()
    machine.start()
    with pytest.raises(RuntimeError, match="vCPU 0 is not paused"):
        machine.vcpus[0].step()


def test_a_step_of_a_vcpu_that_sleeps_gives_up() -> None:
    with Machine(memory=1 << 20) as machine:
        machine.boot_real_mode(HLT)
        machine.start()

        def halted() -> bool:
            machine.resume()
            machine.pause()
            return machine.vcpus[0].handle.get_regs().rip == 0x1000 + len(HLT)

        wait_for(halted)
        assert not machine.vcpus[0].step(timeout=0.05)
        machine.resume()
        assert machine.wait(0.05) is None


@pytest.mark.parametrize("end", ["resume", "stop"])
def test_a_step_whose_turn_never_comes_is_told_so(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    machine.boot_real_mode(COUNT)
    machine.start()
    machine.pause()
    vcpu = machine.vcpus[0]
    begun, may_go_on = threading.Event(), threading.Event()

    def step() -> str:
        begun.set()
        assert may_go_on.wait(30)
        return StopCause.STEP

    monkeypatch.setattr(vcpu, "_step", step)
    answers: list[bool] = []
    first, second = (
        threading.Thread(target=lambda: answers.append(vcpu.step()), daemon=True) for _ in range(2)
    )
    first.start()
    assert begun.wait(30)
    vcpu._mail.put(None)  # as a resume that came before leaves one
    second.start()
    while vcpu._mail.qsize() < 2:
        sleep(0.001)
    if end == "resume":
        machine.resume()
    else:
        machine.stop(StopCause.STOPPED)
    may_go_on.set()
    for thread in (first, second):
        thread.join(30)
        assert not thread.is_alive()
    assert sorted(answers) == [False, True]


def test_a_signal_handler_may_stop_a_machine_at_any_moment_of_its_wait() -> None:
    class Interrupted:
        """Stops the machine at each line that Python executes, as a handler could run there."""

        def __init__(self, machine: Machine, line: int) -> None:
            self.machine, self.left = machine, line

        def __call__(self, frame: FrameType, event: str, _: object) -> "Interrupted":
            if event in {"line", "return"}:
                self.left -= 1
                if self.left == 0:
                    sys.settrace(before)
                    self.machine.stop(StopCause.STOPPED)
            return self

    before = sys.gettrace()
    reached = True
    line = 0
    while reached:
        line += 1
        with Machine(memory=1 << 20, irqchip=False) as machine:
            handler = Interrupted(machine, line)
            sys.settrace(handler)
            try:
                machine.wait(0)
                machine.stop(StopCause.POWEROFF)
            finally:
                sys.settrace(before)
            reached = handler.left <= 0
            assert machine.wait(30) in {StopCause.STOPPED, StopCause.POWEROFF}
    assert line > 10


def test_whoever_pauses_resumes_and_stops_when_they_like_nothing_hangs_or_is_lost() -> None:
    for seed in range(3):
        with Machine(memory=1 << 20, cpus=2, irqchip=False) as machine:
            machine.boot_real_mode(COUNT)
            second = machine.vcpus[1].handle
            sregs = second.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            second.set_sregs(sregs)
            second.set_regs(kvm.kvm_regs(rip=0x1000, rsp=0x1000, rflags=1 << 1))
            machine.start()

            def meddle(number: int, machine: Machine = machine, seed: int = seed) -> None:
                choose = random.Random(f"{seed} {number}")  # noqa: S311 (the same each time)
                for _ in range(60):
                    choose.choice((machine.pause, machine.resume, os.sched_yield))()

            meddlers = [threading.Thread(target=meddle, args=(n,), daemon=True) for n in range(3)]
            for thread in meddlers:
                thread.start()
            for thread in meddlers:
                thread.join(60)
                assert not thread.is_alive()
            machine.resume()
            wait_for_progress(machine)
            machine.pause()
            before = count(machine)
            sleep(0.002)
            assert count(machine) == before
            stoppers = [
                threading.Thread(target=machine.stop, args=(cause,))
                for cause in (StopCause.POWEROFF, StopCause.RESET)
            ]
            for thread in stoppers:
                thread.start()
            for thread in stoppers:
                thread.join(30)
            assert machine.wait(30) in {StopCause.POWEROFF, StopCause.RESET}


class Watched(RawDisk):
    """Has every tenth read wait until somebody has seen to it."""

    def __init__(self, path: str, see_to: Callable[[], None]) -> None:
        super().__init__(path, read_only=True)
        self.reads = 0
        self.see_to = see_to

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        super().read_into(views, offset)
        self.reads += 1
        if self.reads % 10 == 0:
            self.see_to()


@pytest.mark.parametrize("ioeventfd", [True, False])
def test_interrupts_of_requests_that_end_while_paused_all_arrive(
    build: Callable[..., str], tmp_path: Path, ioeventfd: bool
) -> None:
    """A kernel that sleeps from each doorbell to its interrupt reads a sector 1,000 times.

    With ioeventfds every tenth ends, and interrupts, when no vCPU is in the guest.
    """
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    wanted, paused = SimpleQueue[bool](), SimpleQueue[None]()
    pauses = 0

    def see_to() -> None:
        wanted.put(True)
        if ioeventfd:  # else it is the vCPU that is here, and the pause waits for it
            paused.get(timeout=60)

    def meddle(machine: Machine) -> None:
        nonlocal pauses
        while wanted.get():
            machine.pause()
            pauses += 1
            paused.put(None)
            sleep(0.001)
            machine.resume()

    disk = Watched(str(image), see_to)
    with Machine(memory=4 << 20, ioeventfd=ioeventfd) as machine:
        machine.ports.add(0xF4, 4, DebugExit(machine.end))
        machine.add_virtio(VirtioBlk(disk))
        kernel = bare_kernel.read_kernel(build("disk"))
        assert kernel is not None
        machine.boot_bare(kernel)
        machine.start()
        meddler = threading.Thread(target=meddle, args=(machine,))
        meddler.start()
        try:
            assert machine.wait(120) == StopCause.DEVICE
        finally:
            wanted.put(False)
            meddler.join(60)
    disk.close()
    assert (machine.exit_value, disk.reads, pauses) == (0, 1000, 100)


class Endless(VirtioDevice):
    """Its ring fills itself: each chain that is served makes another one available."""

    def __init__(self, chains: int) -> None:
        super().__init__("endless", 77, queue_sizes=(1,))
        self.left = chains
        self.served = 0

    def more_than(self, served: int) -> Callable[[], bool]:
        return lambda: self.served > served

    def handle(self, queue: Virtqueue) -> None:
        while (chain := queue.pop()) is not None:
            self.served += 1
            self.left -= 1
            if self.left:
                queue._avail[1] = (queue._avail[1] + 1) & 0xFFFF
            queue.push(chain, 0)


@pytest.mark.parametrize("ioeventfd", [False, True])
@pytest.mark.parametrize("chains", [1 << 62, 20_000])
def test_a_ring_that_fills_itself_holds_up_no_pause_and_is_served_on(
    chains: int, ioeventfd: bool
) -> None:
    device = Endless(chains)
    with Machine(memory=1 << 20, transport="mmio", ioeventfd=ioeventfd) as machine:
        machine.add_virtio(device)
        base = layout.VIRTIO_MMIO_GPA
        machine.memory.write(0x8000, struct.pack("<QIHH", 0x9000, 4, 2, 0))  # one descriptor
        machine.memory.write(0x8100, struct.pack("<HHH", 1, 1, 0))  # available; no interrupts
        for offset, value in (
            *((0x070, 3), (0x024, 1), (0x020, 1), (0x070, 11), (0x030, 0), (0x038, 1)),
            *((0x080, 0x8000), (0x090, 0x8100), (0x0A0, 0x8200), (0x044, 1)),
        ):
            machine.mmio.write(base + offset, 4, value)
        protected_mode(machine, writes((base + 0x070, 15), (base + 0x050, 0))[:-3] + b"\xeb\xfe")
        machine.start()
        while device.served < 1000:
            sleep(0.001)
        for _ in range(10):
            machine.pause()
            assert machine.paused
            if chains == 1 << 62:  # devices go on meanwhile
                wait_for(device.more_than(device.served))
            machine.resume()
        if chains < 1 << 62:
            wait_for(lambda: device.served == chains)
        machine.stop(StopCause.STOPPED)
        assert machine.wait(30) == StopCause.STOPPED


def test_a_request_that_takes_its_time_holds_up_no_pause() -> None:
    begun, may_end = threading.Event(), threading.Event()

    class Stalled(Endless):
        def notify(self, index: int) -> None:
            with self.lock:
                begun.set()
                assert may_end.wait(30)
                super().notify(index)

    device = Stalled(1)
    with Machine(memory=1 << 20, transport="mmio", ioeventfd=True) as machine:
        machine.add_virtio(device)
        bell = layout.VIRTIO_MMIO_GPA + 0x050
        protected_mode(machine, writes((bell, 0))[:-3] + b"\xeb\xfe")
        machine.start()
        assert begun.wait(30)
        for _ in range(3):
            machine.pause()
            machine.resume()
        assert all(queue.halted for queue in device.queues)
        may_end.set()
        wait_for(lambda: not any(queue.halted for queue in device.queues))
        machine.stop(StopCause.STOPPED)
        assert machine.wait(30) == StopCause.STOPPED
        assert all(queue.halted for queue in device.queues)
