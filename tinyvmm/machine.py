"""The board: RAM, vCPUs, two buses and the devices on them. Read it as a table of contents.

A machine is made, given devices, given something to boot, started, and waited for:

    machine = Machine(memory=256 << 20)
    machine.add_board(console=sink)
    machine.add_virtio(VirtioRng())
    machine.boot_linux(kernel, initrd=[archive], cmdline="quiet")
    machine.start()
    machine.wait()

This is the board. `tinyvmm.Machine`, the package's front door (tinyvmm/vm.py), is a Linux guest on
one, made to run commands in.

Threads: one for each vCPU and for each device with ioeventfds, started by `start`. `stop` may be
called from any thread, vCPU threads and signal handlers included, so it takes no lock that a thread
may hold when a signal comes; the first caller's cause is the one that counts. `close` ends whatever
still runs and releases every descriptor.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tinyvmm import cpuid, kvm, layout
from tinyvmm.bus import Bus
from tinyvmm.errors import ConfigError
from tinyvmm.memory import GuestMemory
from tinyvmm.vcpu import StopCause, Vcpu, handle_kicks

if TYPE_CHECKING:
    from tinyvmm.acpi import DeviceNode
    from tinyvmm.bare_kernel import BareKernel, Module
    from tinyvmm.bars import Bars
    from tinyvmm.boot import Entry, Kernel
    from tinyvmm.devices.device import Device
    from tinyvmm.devices.pci import PciBus
    from tinyvmm.devices.power import PowerControl
    from tinyvmm.devices.reset_control import ResetControl
    from tinyvmm.devices.uart import Uart
    from tinyvmm.devices.virtio.device import VirtioDevice
    from tinyvmm.eventfds import Bells, Doorbells, MsiRoutes

# A thread that wants the interpreter lock asks its holder to let go after this long (seconds). At
# the default of 5 ms one busy thread beside a vCPU costs it 99 of 100 exits; `make bench` shows it.
SWITCH_INTERVAL = 1e-6

CPUS_MAX = 255  # APIC ids of 8 bits, of which 255 means everybody

# Where Linux, which reaches segment 0 by ports, has to find PCI in memory: devices/pci.py.
_LINUX_PCI_SEGMENT = 1

_MSR_IA32_MISC_ENABLE = 0x1A0  # bit 0: fast string operations (Intel SDM volume 4)
_MSR_MTRR_DEF_TYPE = 0x2FF  # bit 11: enable; low bits: type 6 is write-back (SDM 3A, 12.11.2.1)


class KvmIrqLine:
    """One GSI of the in-kernel interrupt controllers."""

    def __init__(self, vm: kvm.VM, gsi: int) -> None:
        self._vm = vm
        self._gsi = gsi

    def set(self, level: bool) -> None:
        """Drive the line; from any thread."""
        self._vm.irq_line(self._gsi, level)


class Machine:
    """A virtual machine; a context manager that leaves nothing behind."""

    def __init__(
        self,
        *,
        memory: int,
        cpus: int = 1,
        irqchip: bool = True,
        transport: str = "pci",
        ioeventfd: bool | None = None,
    ) -> None:
        """Make the bare board: `memory` bytes of RAM and `cpus` vCPUs.

        Virtio devices are on a PCI bus, or each on a page of MMIO (`transport` "mmio"). Without
        `irqchip` there are no interrupts or timers, and HLT ends the run: enough for a tiny guest.
        `ioeventfd` says whether virtio doorbells ring in a thread of the device's or are exits;
        None leaves it to each device's class.
        ConfigError where this computer cannot give what is asked.
        """
        self.ports = Bus("port")
        self.mmio = Bus("mmio")
        self.vcpus: list[Vcpu] = []
        self.transport = transport
        self.pci: PciBus | None = None  # there is one as soon as something is on it
        self.virtio_mmio: list[tuple[int, int]] = []  # (gpa, gsi) of each virtio-mmio device
        self.device_nodes: list[DeviceNode] = []  # of the user's own devices
        self._ioeventfd = ioeventfd
        self._doorbells: list[Doorbells] = []
        self._routes: MsiRoutes | None = None
        self._bars: Bars | None = None
        self._virtio_devices: list[VirtioDevice] = []
        self.uart: Uart | None = None
        self.power: PowerControl | None = None
        self._reset_control: ResetControl | None = None
        self.cause = ""
        self.exit_value: int | None = None
        """What a device gave to `end`."""
        self._error: BaseException | None = None
        self.paused = False
        self._pause_lock = threading.Lock()
        self._pauses = 0
        self._ends: dict[str, tuple[str, BaseException | None]] = {}  # the first: how it ended
        self._over = False
        self._running = threading.Lock()  # held by nobody in particular, until the run has ended
        self._running.acquire()
        self._irqchip = irqchip
        self._hurried = False
        self._vm: kvm.VM | None = None
        self.memory = GuestMemory(memory)
        try:
            with kvm.System() as system:
                self._check(system, cpus)
                self._vm = vm = system.create_vm()
                for slot, region in enumerate(self.memory.regions):
                    vm.set_user_memory_region(slot, region.gpa, region.size, region.hva)
                if irqchip:
                    if system.check_extension(kvm.KVM_CAP_SET_IDENTITY_MAP_ADDR):
                        vm.set_identity_map_addr(layout.IDENTITY_MAP_GPA)
                        vm.set_tss_addr(layout.TSS_GPA)
                    vm.create_irqchip()
                    vm.create_pit2()
                self._readonly = bool(system.check_extension(kvm.KVM_CAP_READONLY_MEM))
                supported = system.supported_cpuid()
                tsc_deadline = irqchip and bool(
                    system.check_extension(kvm.KVM_CAP_TSC_DEADLINE_TIMER)
                )
            for apic_id in range(cpus):
                vcpu = Vcpu(vm.create_vcpu(apic_id), self)
                self.vcpus.append(vcpu)
                leaves = cpuid.for_vcpu(supported, apic_id, cpus, tsc_deadline=tsc_deadline)
                vcpu.handle.set_cpuid2(leaves)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _check(system: kvm.System, cpus: int) -> None:
        limit = system.check_extension(kvm.KVM_CAP_MAX_VCPUS) or 1
        if not 1 <= cpus <= min(limit, CPUS_MAX):
            whose = "this KVM" if limit < CPUS_MAX else "a machine"
            raise ConfigError(f"--cpus {cpus}: {whose} has 1 to {min(limit, CPUS_MAX)}")

    # --- devices ----------------------------------------------------------------------------

    def irq_line(self, gsi: int) -> KvmIrqLine:
        """Return the interrupt line `gsi` (0 to 23)."""
        return KvmIrqLine(self.open_vm(), gsi)

    def open_vm(self) -> kvm.VM:
        """Return the VM; ConfigError if it is closed."""
        if self._vm is None:
            raise ConfigError("the machine is closed")
        return self._vm

    def add_board(self, console: Callable[[bytes], None]) -> None:
        """Add what a PC kernel looks for: UART, RTC, i8042, ACPI power control, reset control.

        `console` takes what the guest's kernel prints; on a vCPU thread.
        """
        from tinyvmm.devices.i8042 import I8042
        from tinyvmm.devices.power import PowerControl
        from tinyvmm.devices.reset_control import ResetControl
        from tinyvmm.devices.rtc import Rtc
        from tinyvmm.devices.uart import Uart

        def reset() -> None:
            self.stop(StopCause.RESET)

        def poweroff() -> None:
            self.stop(StopCause.POWEROFF)

        self.uart = Uart(self.irq_line(layout.COM1_GSI), console)
        self.power = PowerControl(self.irq_line(layout.POWER_GSI), poweroff, reset)
        self.ports.add(layout.COM1_PORT, 8, self.uart)
        self.ports.add(layout.RTC_PORT, 2, Rtc())
        self.ports.add(layout.I8042_PORT, 5, I8042(reset))
        self._reset_control = ResetControl(reset)
        self.ports.add(layout.RESET_CONTROL_PORT, 1, self._reset_control)
        self.ports.add(layout.POWER_PORT, self.power.length, self.power)

    def add_device(self, device: "Device", gsi: int | None = None) -> None:
        """Put a device of the user's own where it says; ACPI tells of it and its `gsi`."""
        from tinyvmm import placement

        node = placement.place(device, gsi, self.device_nodes)
        (self.ports if node.port else self.mmio).add(node.base, node.length, device)
        self.device_nodes.append(node)

    @property
    def virtio_devices(self) -> "Sequence[VirtioDevice]":
        """The virtio devices, in the order they were added."""
        return tuple(self._virtio_devices)

    def add_virtio(self, device: "VirtioDevice") -> None:
        """Put a virtio device on the bus that `transport` says."""
        if self.transport == "pci":
            self._add_virtio_pci(device)
        else:
            self._add_virtio_mmio(device)
        self._virtio_devices.append(device)

    def _add_virtio_mmio(self, device: "VirtioDevice") -> None:
        """Take the next free page of the MMIO area and the next GSI."""
        from tinyvmm.devices.virtio.mmio import VirtioMmio

        index = len(self.virtio_mmio)
        taken = [node.gsi for node in self.device_nodes if node.gsi is not None]
        most = min([layout.GSI_COUNT, *taken]) - layout.VIRTIO_GSI
        if index >= most:
            raise ConfigError(f"more than {most} virtio devices: leave one out")
        gpa = layout.VIRTIO_MMIO_GPA + index * layout.VIRTIO_MMIO_STRIDE
        gsi = layout.VIRTIO_GSI + index
        transport = VirtioMmio(device, self.memory, self.irq_line(gsi))
        self.mmio.add(gpa, layout.VIRTIO_MMIO_STRIDE, transport)
        self.virtio_mmio.append((gpa, gsi))
        doorbells = self._add_doorbells(device)
        if doorbells is not None:
            doorbells.place_mmio(gpa + transport.QUEUE_NOTIFY)

    def _add_virtio_pci(self, device: "VirtioDevice") -> None:
        """Take the next PCI slot, with its BAR where firmware would put it."""
        from tinyvmm.bars import Bar, Bars
        from tinyvmm.devices.virtio.pci import NOTIFY, NOTIFY_OFF_MULTIPLIER, VirtioPci
        from tinyvmm.eventfds import MsiRoutes

        if self._routes is None or self._bars is None:
            self._routes, self._bars = MsiRoutes(self.open_vm()), Bars(self.mmio)
        transport = VirtioPci(device, self.memory, self._routes.line)
        try:
            slot = self._pci_bus().add(transport.function)
        except IndexError:
            raise ConfigError("more virtio devices than PCI slots: leave one out") from None
        doorbells = self._add_doorbells(device)
        length = transport.function.bar_len
        bar = Bar(transport, length, doorbells, NOTIFY, NOTIFY_OFF_MULTIPLIER)
        transport.function.on_map = partial(self._bars.move, bar)
        transport.function.place(layout.PCI_WINDOW_GPA + slot * layout.PCI_SLOT_STRIDE)

    def _add_doorbells(self, device: "VirtioDevice") -> "Bells | None":
        """Make `device` a thread for its doorbells, unless the kernel answers, or exits do."""
        wanted = self._ioeventfd if self._ioeventfd is not None else device.ioeventfd
        if not wanted:
            return None
        from tinyvmm.eventfds import Bells, Doorbells

        if device.kicks:
            return Bells(self.open_vm(), device.kicks)

        def failed(error: BaseException) -> None:
            self.stop(StopCause.ERROR, error)

        doorbells = Doorbells(self.open_vm(), device, len(device.queues), failed)
        self._doorbells.append(doorbells)
        device.watcher = doorbells
        return doorbells

    def _pci_bus(self) -> "PciBus":
        if self.pci is None:
            from tinyvmm.devices.pci import ConfigPorts, Ecam, PciBus

            self.pci = PciBus()
            self.mmio.add(layout.PCI_ECAM_GPA, layout.PCI_ECAM_LEN, Ecam(self.pci))
            if self._reset_control is not None:
                self.ports.remove(self._reset_control)  # which from now on is one of those
            config_ports = ConfigPorts(self.pci, self._reset_control)
            self.ports.add(layout.PCI_CONFIG_PORT, 8, config_ports)
        return self.pci

    def _show_configuration(self, bus: "PciBus") -> None:
        """Have the guest read configuration space without exits, while reading is all it does."""
        if not self._readonly or not bus.passive:
            return
        vm, slot = self.open_vm(), len(self.memory.regions)
        hva, length = bus.memory()

        def hide() -> None:
            vm.set_user_memory_region(slot, layout.PCI_ECAM_GPA, 0, hva)

        bus.on_active = hide
        vm.set_user_memory_region(slot, layout.PCI_ECAM_GPA, length, hva, kvm.KVM_MEM_READONLY)

    # --- booting ----------------------------------------------------------------------------

    def boot_real_mode(self, code: bytes, gpa: int = 0x1000) -> None:
        """Put `code` at `gpa` (below 64 KiB) and vCPU 0 at it, in 16-bit real mode, segments 0."""
        self.memory.write(gpa, code)
        handle = self.vcpus[0].handle
        sregs = handle.get_sregs()  # as after reset, which is real mode
        sregs.cs.base = sregs.cs.selector = 0
        handle.set_sregs(sregs)
        handle.set_regs(kvm.kvm_regs(rip=gpa, rsp=gpa, rflags=1 << 1))

    def boot_linux(
        self, kernel: "Kernel", *, initrd: Sequence[bytes | memoryview], cmdline: str
    ) -> None:
        """Put `kernel`, its initramfs and the ACPI tables in RAM, and vCPU 0 at its entry."""
        from tinyvmm import boot

        self._write_acpi_tables(_LINUX_PCI_SEGMENT)
        entry = boot.load(
            self.memory, kernel, initrd=initrd, cmdline=cmdline, acpi_rsdp_gpa=layout.ACPI_GPA
        )
        self.enter_long_mode(entry)

    def boot_bare(
        self, kernel: "BareKernel", *, modules: "Sequence[Module]" = (), cmdline: str = ""
    ) -> None:
        """Put a PVH or multiboot kernel with its modules in RAM, and vCPU 0 at its entry."""
        from tinyvmm import bare_kernel

        self._write_acpi_tables(0)
        entry = bare_kernel.load(self.memory, kernel, modules=modules, cmdline=cmdline)
        self.memory.write(layout.GDT_GPA, bare_kernel.GDT)
        handle = self.vcpus[0].handle
        flat = {"limit": 0xFFFF_FFFF, "present": 1, "s": 1, "g": 1, "db": 1}
        data = kvm.kvm_segment(selector=0x10, type=0x3, **flat)
        sregs = handle.get_sregs()
        sregs.cs = kvm.kvm_segment(selector=0x8, type=0xB, **flat)
        sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
        sregs.tr = kvm.kvm_segment(limit=0x67, present=1, type=0xB)  # a busy 32-bit TSS: PVH's
        sregs.gdt = kvm.kvm_dtable(base=layout.GDT_GPA, limit=len(bare_kernel.GDT) - 1)
        sregs.cr0 = 1 << 4 | 1 << 0  # ET, PE
        handle.set_sregs(sregs)
        regs = kvm.kvm_regs(rip=entry.rip, rax=entry.rax, rbx=entry.rbx, rflags=1 << 1)
        handle.set_regs(regs)

    def _write_acpi_tables(self, pci_segment: int) -> None:
        from tinyvmm import acpi

        nodes = [
            acpi.VirtioMmioNode(gpa, layout.VIRTIO_MMIO_STRIDE, gsi)
            for gpa, gsi in self.virtio_mmio
        ]
        tables = acpi.build_tables(
            layout.ACPI_GPA,
            cpus=len(self.vcpus),
            virtio=nodes,
            uart=self.uart is not None,
            pci=None if self.pci is None else pci_segment,
            devices=self.device_nodes,
        )
        self.memory.write(layout.ACPI_GPA, tables)

    def enter_long_mode(self, entry: "Entry", extra_cr4: int = 0) -> None:
        """Set vCPU 0 as the 64-bit boot protocol demands (Documentation/x86/boot.rst)."""
        handle = self.vcpus[0].handle
        flat = {"limit": 0xFFFF_FFFF, "present": 1, "s": 1, "g": 1}
        code = kvm.kvm_segment(selector=0x10, type=0xB, l=1, **flat)
        data = kvm.kvm_segment(selector=0x18, type=0x3, db=1, **flat)
        sregs = handle.get_sregs()
        sregs.cs = code
        sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
        sregs.gdt = kvm.kvm_dtable(base=entry.gdt_gpa, limit=entry.gdt_limit)
        sregs.cr0 = 1 << 31 | 1 << 4 | 1 << 0  # PG, ET, PE
        sregs.cr3 = entry.cr3
        sregs.cr4 = 1 << 5 | extra_cr4  # PAE
        sregs.efer = 1 << 10 | 1 << 8  # LMA with LME and CR0.PG at once, or KVM refuses the state
        handle.set_sregs(sregs)
        handle.set_regs(kvm.kvm_regs(rip=entry.rip, rsi=entry.rsi, rsp=entry.rsp, rflags=1 << 1))
        for vcpu in self.vcpus:  # which a firmware sets up alike; or Linux says so
            vcpu.handle.set_msrs({_MSR_IA32_MISC_ENABLE: 1, _MSR_MTRR_DEF_TYPE: 1 << 11 | 6})

    # --- running ----------------------------------------------------------------------------

    def start(self) -> None:
        """Start every vCPU; those after the first wait for the guest's SIPI."""
        handle_kicks()
        if self.pci is not None:
            self._show_configuration(self.pci)
        if not self._hurried:
            self._hurried = True
            _hurry(1)
        for doorbells in self._doorbells:
            doorbells.start()
        for vcpu in self.vcpus:  # descriptors may be too few, and then no part of the guest has run
            vcpu.handle.open_stats()
        with self._pause_lock:
            for vcpu in self.vcpus:
                vcpu.start()

    def pause(self, cpu: int | None = None) -> None:
        """Take every vCPU, or only `cpu`, out of the guest; return when they are.

        From any thread but a vCPU's. Then registers and RAM can be read and changed, and vCPUs
        stepped (`Vcpu.step`). Devices go on: they finish what the guest has asked of them, and
        interrupts that they raise arrive once the guest goes on; but for those that the kernel
        serves, which leave RAM alone while every vCPU is paused. Harmless when paused, ended or
        not yet started; then it starts paused.
        """
        with self._pause_lock:
            vcpus = self.vcpus if cpu is None else [self.vcpus[cpu]]
            for vcpu in vcpus:
                vcpu.begin_pause()
            for device in self._virtio_devices:
                device.halt()  # a vCPU may be serving a ring that never ends
            for vcpu in vcpus:
                vcpu.await_pause()
            self._pauses += 1
            for device in self._virtio_devices:
                if device.lock.acquire(blocking=False):
                    try:
                        left = self._unhalt(device)
                    finally:
                        device.lock.release()
                    if not left:
                        continue
                self._beside(device)
            self.paused = all(vcpu.pausing for vcpu in self.vcpus)
            if self.paused:
                for device in self._virtio_devices:
                    device.suspend()

    def _unhalt(self, device: "VirtioDevice") -> bool:
        """Have `device` serve again, unless the run has ended; whether it has left something."""
        left = device.unhalt()
        if self.cause:  # set before `stop` halts them
            device.halt()
        return left

    def _beside(self, device: "VirtioDevice") -> None:
        """Have `device` serve again, and what it left, on a thread.

        A request that takes its time, in a file system that has stalled, holds the device's lock,
        and must not hold up a pause. If there is another meanwhile, that one sees to the device.
        """
        pauses = self._pauses

        def go_on() -> None:
            try:
                with device.lock:
                    if self._pauses == pauses:
                        self._unhalt(device)
                device.catch_up()
            except BaseException as error:  # noqa: BLE001 (must reach the machine)
                self.stop(StopCause.ERROR, error)

        threading.Thread(target=go_on, name=f"io {device.name}", daemon=True).start()

    def resume(self, cpu: int | None = None) -> None:
        """Have every vCPU, or only `cpu`, go on after `pause`; harmless if none is paused.

        From any thread.
        """
        with self._pause_lock:
            for device in self._virtio_devices:
                device.resume()
            for vcpu in self.vcpus if cpu is None else [self.vcpus[cpu]]:
                vcpu.resume()
            self.paused = False

    def stop(self, cause: str, error: BaseException | None = None) -> None:
        """End the run for `cause` (StopCause); the first call counts. From any thread."""
        end = cause, error
        if self._ends.setdefault("first", end) is not end:  # which is atomic
            return
        self.cause, self._error = end
        for device in self._virtio_devices:
            device.halt()
        for vcpu in self.vcpus:
            vcpu.stop()
        self._over = True
        self._running.release()

    def end(self, value: int) -> None:
        """End the run as a device asks, leaving `value` in `exit_value`; from any thread."""
        if self.exit_value is None:
            self.exit_value = value
        self.stop(StopCause.DEVICE)

    def wait(self, timeout: float | None = None) -> str | None:
        """Wait for the end of the run and return its StopCause, or None after `timeout` seconds.

        An error on a vCPU thread is raised here: VcpuError, or a bug of ours as it was.
        """
        if not self._over:  # not an Event, whose lock a signal handler could not take here
            if not self._running.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
                return None
            self._running.release()  # for whoever else waits
        for vcpu in self.vcpus:
            vcpu.join()
        for doorbells in self._doorbells:  # what the guest rang for last is answered, too
            doorbells.finish()
        if self._error is not None:
            raise self._error
        return self.cause

    def close(self) -> None:
        """Stop, and release the vCPUs, the VM and its RAM; harmless when done twice."""
        self.stop(StopCause.STOPPED)
        for vcpu in self.vcpus:
            vcpu.join()
        for doorbells in self._doorbells:
            doorbells.close()
        self._doorbells = []
        for device in self._virtio_devices:
            device.detach()
        self._virtio_devices = []
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus = []
        if self._vm is not None:
            self._vm.close()
            self._vm = None
        if self._routes is not None:
            self._routes.close()
            self._routes = None
        self.memory.close()
        if self._hurried:
            self._hurried = False
            _hurry(-1)

    def read_code(self, gpa: int, length: int) -> bytes:
        """Copy up to `length` bytes of RAM for a report; none where `gpa` is not RAM."""
        for count in (length, 1):
            try:
                return self.memory.read(gpa, count)
            except ValueError:
                continue
        return b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


_hurry_lock = threading.Lock()  # guards the two below
_running = 0
_interval = 0.0  # what it was before the first machine ran


def _hurry(change: int) -> None:
    """One more machine runs in this process, or one less: it has the switch interval for it."""
    global _running, _interval
    with _hurry_lock:
        if not _running:
            _interval = sys.getswitchinterval()
        _running += change
        sys.setswitchinterval(SWITCH_INTERVAL if _running else _interval)
