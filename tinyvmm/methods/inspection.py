"""What can be seen and changed of a machine that runs: devices, vCPUs, memory, counters.

Methods of the control socket, on its clients' threads; supervisor.py says which there are.
"""

import os
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from tinyvmm.errors import ConfigError, KvmError
from tinyvmm.instances.control import remote
from tinyvmm.instances.control_schema import limits
from tinyvmm.instances.watching import Names, Pattern, Watching

if TYPE_CHECKING:
    from tinyvmm.machine import Machine
    from tinyvmm.vcpu import Vcpu

MEMORY_AT_ONCE = 512 << 10  # bytes of RAM in one answer

Cpu = Annotated[int, limits(minimum=0)]
Gpa = Annotated[int, limits(minimum=0, maximum=(1 << 52) - 1)]


class DeviceInfo(TypedDict):
    """A device; `running` only if it is virtio, `ranges` where on which bus its registers are."""

    name: str
    kind: str
    running: bool | None
    debug: bool
    requests: list[int] | None
    ranges: list[dict[str, Any]]
    state: dict[str, Any] | None


class VcpuInfo(TypedDict):
    """A vCPU."""

    cpu: int
    paused: bool


class VcpuStats(TypedDict):
    """A vCPU's counters: seconds of processor time, exits, and by its names all KVM counts."""

    cpu: int
    cpu_time: float | None
    exits: int | None
    kvm: dict[str, int]


class MemoryStats(TypedDict):
    """In bytes: the guest's RAM, what of it is in the host's, and what else we take."""

    given: int
    resident: int
    overhead: int


class Stats(TypedDict):
    """Counters of the machine."""

    cpu_time: float
    memory: MemoryStats
    vcpus: list[VcpuStats]
    requests: dict[str, list[int]]
    threads: int
    descriptors: int


class MemoryInfo(TypedDict):
    """How much RAM there is, and where."""

    size: int
    regions: list[dict[str, int]]


class Balloon(TypedDict):
    """How many bytes the guest has given up so far."""

    actual: int


class Inspection:
    """`machine` is asked at each call; ConfigError if there is none."""

    def __init__(self, machine: "Callable[[], Machine]", watching: Watching) -> None:
        self._machine = machine
        self._watching = watching

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Return every method by its name on the wire."""
        return {
            "devices": self.devices,
            "vcpus": self.vcpus,
            "registers": self.registers,
            "sregs": self.sregs,
            "step": self.step,
            "memory_info": self.memory_info,
            "memory_read": self.memory_read,
            "memory_write": self.memory_write,
            "stats": self.stats,
            "balloon": self.balloon,
        }

    # --- devices ----------------------------------------------------------------------------

    def devices(self, *, pattern: Pattern = ".*", state: bool = False) -> list[DeviceInfo]:
        """List the devices whose whole name matches a regular expression; perhaps their state.

        `requests` are how many were served of each queue.
        """
        machine = self._machine()
        wanted = Names(pattern)
        ranges: dict[str, list[dict[str, Any]]] = {}
        found: dict[str, Any] = {device.name: device for device in machine.virtio_devices}
        for bus in (machine.ports, machine.mmio):
            for base, end, device in bus.ranges:
                found.setdefault(device.name, device)
                place = {"bus": bus.name, "base": base, "length": end - base}
                ranges.setdefault(device.name, []).append(place)
        virtio = {id(device) for device in machine.virtio_devices}
        return [
            {
                "name": name,
                "kind": type(device).__name__,
                "running": device.running if id(device) in virtio else None,
                "debug": name in self._watching.debugged,
                "requests": [q.served for q in device.queues] if id(device) in virtio else None,
                "ranges": ranges.get(name, []),
                "state": _state(device) if state else None,
            }
            for name, device in found.items()
            if name in wanted
        ]

    # --- vCPUs ------------------------------------------------------------------------------

    def vcpus(self) -> list[VcpuInfo]:
        """List the vCPUs."""
        vcpus = self._machine().vcpus
        return [{"cpu": cpu, "paused": vcpu.pausing} for cpu, vcpu in enumerate(vcpus)]

    @remote(waits=True, lane="machine")
    def registers(self, *, cpu: Cpu = 0) -> dict[str, int]:
        """Return a vCPU's general registers; it must be paused."""
        regs = self._paused(cpu).handle.get_regs()
        return {name: getattr(regs, name) for name in type(regs).__annotations__}

    @remote(waits=True, lane="machine")
    def sregs(self, *, cpu: Cpu = 0) -> dict[str, Any]:
        """Return a vCPU's segment, table and control registers; it must be paused."""
        sregs: dict[str, Any] = _plain(self._paused(cpu).handle.get_sregs())
        return sregs

    @remote(waits=True, lane="machine")
    def step(self, *, cpu: Cpu = 0) -> bool:
        """Let a paused vCPU execute one instruction; False if it waits for an interrupt instead."""
        vcpu = self._paused(cpu)
        try:
            return vcpu.step()
        except KvmError as error:
            raise ConfigError(f"this KVM cannot step: {error}") from None

    # --- memory -----------------------------------------------------------------------------

    def memory_info(self) -> MemoryInfo:
        """Say how much RAM there is, and where."""
        memory = self._machine().memory
        regions = [{"gpa": region.gpa, "size": region.size} for region in memory.regions]
        return {"size": memory.size, "regions": regions}

    @remote(waits=True, lane="machine")
    def memory_read(
        self, *, gpa: Gpa, length: Annotated[int, limits(minimum=0, maximum=MEMORY_AT_ONCE)]
    ) -> str:
        """Copy out RAM (base64)."""
        try:
            return b64encode(self._machine().memory.read(gpa, length)).decode()
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @remote(waits=True, lane="machine")
    def memory_write(self, *, gpa: Gpa, data: str) -> None:
        """Change RAM (base64)."""
        try:
            self._machine().memory.write(gpa, decode(data))
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def balloon(self, *, size: Annotated[int, limits(minimum=0)]) -> Balloon:
        """Ask the guest to give up so many bytes of its RAM."""
        from tinyvmm.devices.virtio.balloon import VirtioBalloon

        machine = self._machine()
        if size >= machine.memory.size:
            raise ConfigError(f"the guest has no {size} bytes to give up")
        for device in machine.virtio_devices:
            if isinstance(device, VirtioBalloon):
                device.resize(size)
                return {"actual": device.actual}
        raise ConfigError("the machine has no balloon; run it with --balloon")

    # --- counters ---------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return counters of vCPUs, devices, memory and of the machine's process."""
        machine = self._machine()
        memory = _status()
        vcpus: list[VcpuStats] = []
        for cpu, vcpu in enumerate(machine.vcpus):
            counted = vcpu.handle.stats()
            exits = counted.get("exits")
            spent = _thread_time(vcpu.thread_id)
            vcpus.append({"cpu": cpu, "cpu_time": spent, "exits": exits, "kvm": counted})
        return {
            "cpu_time": time.process_time(),
            "memory": {
                "given": machine.memory.size,
                "resident": os.fstat(machine.memory.fd).st_blocks * 512,
                "overhead": memory["VmRSS"] - memory["RssShmem"],
            },
            "vcpus": vcpus,
            "requests": {
                device.name: [queue.served for queue in device.queues]
                for device in machine.virtio_devices
            },
            "threads": memory["Threads"],
            "descriptors": len(os.listdir("/proc/self/fd")),
        }

    # --- how --------------------------------------------------------------------------------

    def _paused(self, cpu: int) -> "Vcpu":
        vcpus = self._machine().vcpus
        if cpu >= len(vcpus):
            raise ConfigError(f"there is no vCPU {cpu}: the machine has {len(vcpus)}")
        if not vcpus[cpu].pausing:
            raise ConfigError(f"vCPU {cpu} runs: pause it first")
        return vcpus[cpu]


def decode(data: str) -> bytes:
    """Decode base64; ConfigError if it is none."""
    try:
        return b64decode(data, validate=True)
    except ValueError as error:
        raise ConfigError(f"no base64: {error}") from None


def _state(device: Any) -> dict[str, Any] | None:
    save = getattr(device, "save", None)
    try:
        return None if save is None else save()
    except NotImplementedError:
        return None


def _plain(struct: Any) -> Any:
    """Render a C struct in JSON types; arrays as lists."""
    if hasattr(struct, "_fields_"):
        return {name: _plain(getattr(struct, name)) for name, *_ in struct._fields_}
    return struct if isinstance(struct, int) else [_plain(item) for item in struct]


def _status() -> dict[str, int]:
    """Return what proc(5) says in /proc/self/status; memory in bytes."""
    found = {}
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, text = line.partition(":")
            words = text.split()
            if name in {"VmRSS", "RssShmem"}:
                found[name] = int(words[0]) << 10
            elif name == "Threads":
                found[name] = int(words[0])
    return found


def _thread_time(thread_id: int | None) -> float | None:
    """Return the seconds of processor time that a thread of ours took (proc(5), stat)."""
    try:
        with open(f"/proc/self/task/{thread_id}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None  # not yet, or no more
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
