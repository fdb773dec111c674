"""The KVM ABI: structs, ioctl numbers, and the three handles System, VM and VCPU.

Everything here follows <linux/kvm.h> and Documentation/virt/kvm/api.rst; the names are theirs, and
a test compiles C against the header to compare every size, offset and number. Nothing else in the
package knows an ioctl. Read it from the top: how a struct is declared, the structs, the numbers,
then the handles, each of which owns one descriptor and closes it exactly once.
"""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_int16, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Annotated, Any, Self, TypeVar, cast, dataclass_transform

from tinyvmm.errors import ConfigError, KvmError

# --- declaring a C struct -------------------------------------------------------------------
# A struct is a class whose annotations become its fields. ctypes itself accepts unknown keywords
# and truncates numbers silently; `Struct` refuses both.

u8 = Annotated[int, c_uint8]
u16 = Annotated[int, c_uint16]
u32 = Annotated[int, c_uint32]
u64 = Annotated[int, c_uint64]
s16 = Annotated[int, c_int16]
s32 = Annotated[int, c_int32]
s64 = Annotated[int, c_int64]


class Struct(ctypes.Structure):
    """A C struct; fields not given are zero. x86 is little-endian, and so is this machine."""

    def __init__(self, **fields: Any) -> None:
        """Set the named fields; ValueError for an unknown name or a number that does not fit."""
        super().__init__()
        for name, value in fields.items():
            if not hasattr(type(self), name):
                raise ValueError(f"{type(self).__name__} has no field {name!r}")
            setattr(self, name, value)
            if isinstance(value, int) and getattr(self, name) != value:
                raise ValueError(f"{type(self).__name__}.{name} cannot hold {value:#x}")


S = TypeVar("S", bound=Struct)


@dataclass_transform(kw_only_default=True)
def c_struct(size: int) -> Callable[[type[S]], type[S]]:
    """Turn a class's annotations into `_fields_`; its C size in bytes is checked at once."""

    def declare(cls: type[S]) -> type[S]:
        cls._fields_ = [
            (name, hint.__metadata__[0] if hasattr(hint, "__metadata__") else hint)
            for name, hint in cls.__annotations__.items()
        ]
        if ctypes.sizeof(cls) != size:
            raise AssertionError(f"{cls.__name__}: {ctypes.sizeof(cls)} bytes, not {size}")
        return cls

    return declare


# --- structs, in the order of <linux/kvm.h> and <asm/kvm.h> ---------------------------------


@c_struct(size=32)
class kvm_userspace_memory_region(Struct):
    """A slot of guest-physical memory backed by our own; sizes in bytes, page-aligned."""

    slot: u32 = 0
    flags: u32 = 0
    guest_phys_addr: u64 = 0
    memory_size: u64 = 0
    userspace_addr: u64 = 0


@c_struct(size=8)
class kvm_irq_level(Struct):
    """One GSI's new level, 0 or 1."""

    irq: u32 = 0
    level: u32 = 0


@c_struct(size=48)
class kvm_irq_routing_entry(Struct):
    """Where one GSI leads; the union `u` as `irqchip_route` and `msi_route` fill it."""

    gsi: u32 = 0
    type: u32 = 0
    flags: u32 = 0
    pad: u32 = 0
    u: Annotated[Sequence[int], c_uint32 * 8] = ()


@c_struct(size=32)
class kvm_irqfd(Struct):
    """An eventfd whose being written to interrupts as the GSI's route says."""

    fd: u32 = 0
    gsi: u32 = 0
    flags: u32 = 0
    resamplefd: u32 = 0
    pad: Annotated[Sequence[int], c_uint8 * 16] = ()


@c_struct(size=64)
class kvm_ioeventfd(Struct):
    """A guest's write of `len` bytes (0: any number) to `addr` that becomes an eventfd's event."""

    datamatch: u64 = 0
    addr: u64 = 0
    len: u32 = 0
    fd: s32 = 0
    flags: u32 = 0
    pad: Annotated[Sequence[int], c_uint8 * 36] = ()


@c_struct(size=24)
class kvm_stats_header(Struct):
    """How a file of statistics begins: where in it their names and values are."""

    flags: u32 = 0
    name_size: u32 = 0
    num_desc: u32 = 0
    id_offset: u32 = 0
    desc_offset: u32 = 0
    data_offset: u32 = 0


@c_struct(size=16)
class kvm_stats_desc(Struct):
    """One statistic: `size` numbers at `offset` of the values; its name follows."""

    flags: u32 = 0
    exponent: s16 = 0
    size: u16 = 0
    offset: u32 = 0
    bucket_size: u32 = 0


@c_struct(size=72)
class kvm_guest_debug(Struct):
    """How a vCPU is debugged; `arch` is its debug registers DR0 to DR7."""

    control: u32 = 0
    pad: u32 = 0
    arch: Annotated[Sequence[int], c_uint64 * 8] = ()


@c_struct(size=144)
class kvm_regs(Struct):
    """General registers."""

    rax: u64 = 0
    rbx: u64 = 0
    rcx: u64 = 0
    rdx: u64 = 0
    rsi: u64 = 0
    rdi: u64 = 0
    rsp: u64 = 0
    rbp: u64 = 0
    r8: u64 = 0
    r9: u64 = 0
    r10: u64 = 0
    r11: u64 = 0
    r12: u64 = 0
    r13: u64 = 0
    r14: u64 = 0
    r15: u64 = 0
    rip: u64 = 0
    rflags: u64 = 0


@c_struct(size=24)
class kvm_segment(Struct):
    """A segment register with its hidden part; `type`, `s`, `dpl`... as in a descriptor."""

    base: u64 = 0
    limit: u32 = 0
    selector: u16 = 0
    type: u8 = 0
    present: u8 = 0
    dpl: u8 = 0
    db: u8 = 0
    s: u8 = 0
    l: u8 = 0  # noqa: E741 (the header's name)
    g: u8 = 0
    avl: u8 = 0
    unusable: u8 = 0
    padding: u8 = 0


@c_struct(size=16)
class kvm_dtable(Struct):
    """GDTR or IDTR."""

    base: u64 = 0
    limit: u16 = 0
    padding: Annotated[Sequence[int], c_uint16 * 3] = ()


@c_struct(size=312)
class kvm_sregs(Struct):
    """Segment, control and descriptor-table registers."""

    cs: kvm_segment = kvm_segment()
    ds: kvm_segment = kvm_segment()
    es: kvm_segment = kvm_segment()
    fs: kvm_segment = kvm_segment()
    gs: kvm_segment = kvm_segment()
    ss: kvm_segment = kvm_segment()
    tr: kvm_segment = kvm_segment()
    ldt: kvm_segment = kvm_segment()
    gdt: kvm_dtable = kvm_dtable()
    idt: kvm_dtable = kvm_dtable()
    cr0: u64 = 0
    cr2: u64 = 0
    cr3: u64 = 0
    cr4: u64 = 0
    cr8: u64 = 0
    efer: u64 = 0
    apic_base: u64 = 0
    interrupt_bitmap: Annotated[Sequence[int], c_uint64 * 4] = ()


@c_struct(size=16)
class kvm_msr_entry(Struct):
    """One model-specific register."""

    index: u32 = 0
    reserved: u32 = 0
    data: u64 = 0


@c_struct(size=40)
class kvm_cpuid_entry2(Struct):
    """What CPUID answers for one leaf (`function`) and subleaf (`index`)."""

    function: u32 = 0
    index: u32 = 0
    flags: u32 = 0
    eax: u32 = 0
    ebx: u32 = 0
    ecx: u32 = 0
    edx: u32 = 0
    padding: Annotated[Sequence[int], c_uint32 * 3] = ()


@c_struct(size=64)
class kvm_pit_config(Struct):
    """How to create the in-kernel i8254."""

    flags: u32 = 0
    pad: Annotated[Sequence[int], c_uint32 * 15] = ()


@c_struct(size=24)
class kvm_translation(Struct):
    """A linear address walked through the vCPU's page tables."""

    linear_address: u64 = 0
    physical_address: u64 = 0
    valid: u8 = 0
    writeable: u8 = 0
    usermode: u8 = 0
    pad: Annotated[Sequence[int], c_uint8 * 5] = ()


# --- struct kvm_run, mmap'd from a vCPU's descriptor ----------------------------------------
# The kernel fills in a header and, at KVM_RUN_UNION, what belongs to the exit reason.


@c_struct(size=32)
class kvm_run(Struct):
    """The header, before the union."""

    request_interrupt_window: u8 = 0
    immediate_exit: u8 = 0
    padding1: Annotated[Sequence[int], c_uint8 * 6] = ()
    exit_reason: u32 = 0
    ready_for_interrupt_injection: u8 = 0
    if_flag: u8 = 0
    flags: u16 = 0
    cr8: u64 = 0
    apic_base: u64 = 0


KVM_RUN_UNION = 32


@c_struct(size=16)
class kvm_run_io(Struct):
    """KVM_EXIT_IO: `count` items of `size` bytes at `data_offset` of the mapping."""

    direction: u8 = 0
    size: u8 = 0
    port: u16 = 0
    count: u32 = 0
    data_offset: u64 = 0


@c_struct(size=24)
class kvm_run_mmio(Struct):
    """KVM_EXIT_MMIO: `len` bytes of `data` at guest-physical `phys_addr`."""

    phys_addr: u64 = 0
    data: Annotated[Sequence[int], c_uint8 * 8] = ()
    len: u32 = 0
    is_write: u8 = 0


@c_struct(size=16)
class kvm_run_fail_entry(Struct):
    """KVM_EXIT_FAIL_ENTRY: the hardware refused the guest state."""

    hardware_entry_failure_reason: u64 = 0
    cpu: u32 = 0


@c_struct(size=136)
class kvm_run_internal(Struct):
    """KVM_EXIT_INTERNAL_ERROR; `data` may hold the instruction that was not emulated."""

    suberror: u32 = 0
    ndata: u32 = 0
    data: Annotated[Sequence[int], c_uint64 * 16] = ()


@c_struct(size=136)
class kvm_run_system_event(Struct):
    """KVM_EXIT_SYSTEM_EVENT: the guest asked KVM itself for an end (KVM_SYSTEM_EVENT_*)."""

    type: u32 = 0
    ndata: u32 = 0
    data: Annotated[Sequence[int], c_uint64 * 16] = ()


KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3

# --- ioctl numbers, composed as <asm-generic/ioctl.h> does ----------------------------------

KVMIO = 0xAE
_IOC_NONE, _IOC_WRITE, _IOC_READ = 0, 1, 2


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | KVMIO << 8 | number


def _io(number: int) -> int:
    return _ioc(_IOC_NONE, number, 0)


def _iow(number: int, size: int) -> int:
    return _ioc(_IOC_WRITE, number, size)


def _ior(number: int, size: int) -> int:
    return _ioc(_IOC_READ, number, size)


def _iowr(number: int, size: int) -> int:
    return _ioc(_IOC_READ | _IOC_WRITE, number, size)


_sizeof = ctypes.sizeof
_COUNTED_HEADER = 8  # kvm_cpuid2 and kvm_msrs: u32 count, u32 pad, then the entries

# system: on /dev/kvm
KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_CHECK_EXTENSION = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _iowr(0x05, _COUNTED_HEADER)
# VM: on what KVM_CREATE_VM returned
KVM_CREATE_VCPU = _io(0x41)
KVM_SET_USER_MEMORY_REGION = _iow(0x46, _sizeof(kvm_userspace_memory_region))
KVM_SET_TSS_ADDR = _io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, 8)
KVM_CREATE_IRQCHIP = _io(0x60)
KVM_IRQ_LINE = _iow(0x61, _sizeof(kvm_irq_level))
KVM_SET_GSI_ROUTING = _iow(0x6A, _COUNTED_HEADER)
KVM_IRQFD = _iow(0x76, _sizeof(kvm_irqfd))
KVM_CREATE_PIT2 = _iow(0x77, _sizeof(kvm_pit_config))
KVM_IOEVENTFD = _iow(0x79, _sizeof(kvm_ioeventfd))
# vCPU: on what KVM_CREATE_VCPU returned
KVM_RUN = _io(0x80)
KVM_GET_REGS = _ior(0x81, _sizeof(kvm_regs))
KVM_SET_REGS = _iow(0x82, _sizeof(kvm_regs))
KVM_GET_SREGS = _ior(0x83, _sizeof(kvm_sregs))
KVM_SET_SREGS = _iow(0x84, _sizeof(kvm_sregs))
KVM_SET_GUEST_DEBUG = _iow(0x9B, _sizeof(kvm_guest_debug))
KVM_TRANSLATE = _iowr(0x85, _sizeof(kvm_translation))
KVM_SET_MSRS = _iow(0x89, _COUNTED_HEADER)
KVM_SET_CPUID2 = _iow(0x90, _COUNTED_HEADER)
KVM_GET_STATS_FD = _io(0xCE)  # also of a VM, which has others

KVM_API_VERSION = 12

KVM_CAP_IRQCHIP = 0
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_NR_VCPUS = 9
KVM_CAP_PIT2 = 33
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_SET_GUEST_DEBUG = 23
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_READONLY_MEM = 81
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_BINARY_STATS_FD = 203

KVM_MEM_READONLY = 1 << 1

KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2
KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2
KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2

KVM_GUESTDBG_ENABLE = 1 << 0
KVM_GUESTDBG_SINGLESTEP = 1 << 1

KVM_PIT_SPEAKER_DUMMY = 1 << 0
KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0  # spelled so in the header

_CPUID_MAX_ENTRIES = 256


# --- handles --------------------------------------------------------------------------------


class Handle:
    """Owner of one KVM descriptor; a context manager. Closing twice is harmless."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close the descriptor now."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ioctl(self, what: str, argument: int | Struct | bytearray = 0) -> int:
        """Issue the ioctl named `what`; its result, or KvmError naming it."""
        try:
            return cast("int", fcntl.ioctl(self.fd, globals()[what], argument))
        except OSError as error:
            raise KvmError(what, error.errno or 0) from None


class System(Handle):
    """/dev/kvm itself: what this KVM offers, and the way to a VM."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open `path`; ConfigError with the remedy if it is missing, forbidden or not KVM."""
        super().__init__(-1)
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist: enable virtualization in the firmware and load the kvm "
                "module of this CPU (modprobe kvm_intel or kvm_amd)"
            ) from None
        except PermissionError:
            raise ConfigError(
                f"no permission to open {path}: join its group (usermod -aG kvm USER), log in anew"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot open {path}: {error.strerror}") from None
        try:
            version = self._ioctl("KVM_GET_API_VERSION")
        except KvmError as error:
            self.close()
            raise ConfigError(f"{path} is not KVM: {error}") from None
        if version != KVM_API_VERSION:
            self.close()
            raise ConfigError(f"{path} speaks KVM API {version}; {KVM_API_VERSION} is needed")

    def check_extension(self, capability: int) -> int:
        """Answer 0 where `capability` (KVM_CAP_*) is absent, else a positive number."""
        return self._ioctl("KVM_CHECK_EXTENSION", capability)

    def vcpu_mmap_size(self) -> int:
        """Bytes to map for a vCPU's struct kvm_run."""
        return self._ioctl("KVM_GET_VCPU_MMAP_SIZE")

    def supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """CPUID leaves this KVM can offer to a guest."""
        size = _sizeof(kvm_cpuid_entry2)
        buffer = bytearray(_CPUID_MAX_ENTRIES.to_bytes(_COUNTED_HEADER, "little"))
        buffer += bytes(_CPUID_MAX_ENTRIES * size)
        self._ioctl("KVM_GET_SUPPORTED_CPUID", buffer)
        return [
            kvm_cpuid_entry2.from_buffer_copy(buffer, _COUNTED_HEADER + index * size)
            for index in range(int.from_bytes(buffer[:4], "little"))
        ]

    def create_vm(self) -> "VM":
        """Return a new, empty virtual machine."""
        return VM(self._ioctl("KVM_CREATE_VM"), self.vcpu_mmap_size())


class VM(Handle):
    """One virtual machine: its memory slots, interrupt controllers and vCPUs."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self._vcpu_mmap_size = vcpu_mmap_size

    def set_user_memory_region(
        self, slot: int, gpa: int, size: int, hva: int, flags: int = 0
    ) -> None:
        """Back `size` bytes at guest-physical `gpa` by our memory at `hva`; size 0 removes.

        With KVM_MEM_READONLY in `flags` the guest's writes are exits.
        """
        region = kvm_userspace_memory_region(
            slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=hva
        )
        self._ioctl("KVM_SET_USER_MEMORY_REGION", region)

    def set_tss_addr(self, gpa: int) -> None:
        """Give VMX three pages for a task state segment, below 4 GiB and outside RAM."""
        # fcntl.ioctl refuses integers above 2^31, so this one goes through libc.
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ioctl(self.fd, c_uint64(KVM_SET_TSS_ADDR), c_uint64(gpa)) < 0:
            raise KvmError("KVM_SET_TSS_ADDR", ctypes.get_errno())

    def set_identity_map_addr(self, gpa: int) -> None:
        """Give VMX one page for an identity-mapped page table, outside RAM."""
        self._ioctl("KVM_SET_IDENTITY_MAP_ADDR", bytearray(gpa.to_bytes(8, "little")))

    def create_irqchip(self) -> None:
        """Emulate the PICs, the IOAPIC and the local APICs in the kernel."""
        self._ioctl("KVM_CREATE_IRQCHIP")

    def create_pit2(self) -> None:
        """Emulate the i8254 timer in the kernel, with port 0x61 but no speaker."""
        self._ioctl("KVM_CREATE_PIT2", kvm_pit_config(flags=KVM_PIT_SPEAKER_DUMMY))

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drive interrupt line `gsi` of the in-kernel controllers."""
        self._ioctl("KVM_IRQ_LINE", kvm_irq_level(irq=gsi, level=int(level)))

    def set_gsi_routing(self, routes: Sequence[kvm_irq_routing_entry]) -> None:
        """Replace the whole table that says where each GSI leads."""
        self._ioctl("KVM_SET_GSI_ROUTING", _counted(routes))

    def irqfd(self, fd: int, gsi: int) -> None:
        """Have an event of eventfd `fd` raise `gsi`, until either is closed."""
        self._ioctl("KVM_IRQFD", kvm_irqfd(fd=fd, gsi=gsi))

    def ioeventfd(
        self, fd: int, gpa: int, size: int = 0, match: int | None = None, *, remove: bool = False
    ) -> None:
        """Have a guest's write to `gpa` be an event of eventfd `fd` instead of an exit.

        Of `size` bytes and the value `match`, if given; `remove` ends what was begun so.
        """
        flags = KVM_IOEVENTFD_FLAG_DEASSIGN if remove else 0
        flags |= 0 if match is None else KVM_IOEVENTFD_FLAG_DATAMATCH
        event = kvm_ioeventfd(fd=fd, addr=gpa, len=size, datamatch=match or 0, flags=flags)
        self._ioctl("KVM_IOEVENTFD", event)

    def create_vcpu(self, vcpu_id: int) -> "VCPU":
        """Return a new vCPU; on x86 its id is its local APIC id."""
        return VCPU(self._ioctl("KVM_CREATE_VCPU", vcpu_id), vcpu_id, self._vcpu_mmap_size)


class VCPU(Handle):
    """One virtual CPU and its mapped struct kvm_run (`run_area`, shared with the kernel)."""

    def __init__(self, fd: int, vcpu_id: int, mmap_size: int) -> None:
        super().__init__(fd)
        self.vcpu_id = vcpu_id
        self.run_area = mmap.mmap(fd, mmap_size, mmap.MAP_SHARED)
        self._stats: Handle | None = None

    def close(self) -> None:
        """Unmap struct kvm_run and close the descriptor; BufferError if a view is still alive."""
        self.run_area.close()
        if self._stats is not None:
            self._stats.close()
        super().close()

    def get_regs(self) -> kvm_regs:
        """General registers; only while the vCPU is not running."""
        regs = kvm_regs()
        self._ioctl("KVM_GET_REGS", regs)
        return regs

    def set_regs(self, regs: kvm_regs) -> None:
        """Replace the general registers."""
        self._ioctl("KVM_SET_REGS", regs)

    def get_sregs(self) -> kvm_sregs:
        """Segment and control registers."""
        sregs = kvm_sregs()
        self._ioctl("KVM_GET_SREGS", sregs)
        return sregs

    def set_sregs(self, sregs: kvm_sregs) -> None:
        """Replace the segment and control registers."""
        self._ioctl("KVM_SET_SREGS", sregs)

    def set_cpuid2(self, entries: Iterable[kvm_cpuid_entry2]) -> None:
        """Say what CPUID answers; once, before the vCPU first runs."""
        self._ioctl("KVM_SET_CPUID2", _counted(list(entries)))

    def set_msrs(self, values: dict[int, int]) -> None:
        """Set model-specific registers by index; KvmError names the first one refused."""
        entries = [kvm_msr_entry(index=index, data=data) for index, data in values.items()]
        done = self._ioctl("KVM_SET_MSRS", _counted(entries))
        if done != len(entries):
            raise KvmError(f"KVM_SET_MSRS of {entries[done].index:#x}", errno.EINVAL)

    def set_guest_debug(self, control: int) -> None:
        """Have KVM_RUN come back with KVM_EXIT_DEBUG as `control` (KVM_GUESTDBG_*) says."""
        self._ioctl("KVM_SET_GUEST_DEBUG", kvm_guest_debug(control=control))

    def translate(self, linear_address: int) -> int | None:
        """Return the guest-physical address behind a linear one, or None where none is mapped."""
        translation = kvm_translation(linear_address=linear_address)
        self._ioctl("KVM_TRANSLATE", translation)
        return translation.physical_address if translation.valid else None

    def open_stats(self) -> None:
        """Make `stats` work; not while the vCPU runs, because KVM then keeps the ioctl waiting.

        Harmless where KVM_CAP_BINARY_STATS_FD is absent (Linux before 5.14).
        """
        try:
            self._stats = Handle(self._ioctl("KVM_GET_STATS_FD"))
        except KvmError as error:
            if error.errno not in {errno.ENOTTY, errno.EINVAL}:
                raise

    def stats(self) -> dict[str, int]:
        """What the kernel counts of this vCPU, by its names; from any thread, at any time.

        Nothing before or without `open_stats`. Histograms are left out. Layout:
        Documentation/virt/kvm/api.rst, 4.131.
        """
        found: dict[str, int] = {}
        if self._stats is None:
            return found
        fd = self._stats.fd
        header = kvm_stats_header.from_buffer_copy(os.pread(fd, _sizeof(kvm_stats_header), 0))
        entry_len = _sizeof(kvm_stats_desc) + header.name_size
        entries = os.pread(fd, header.num_desc * entry_len, header.desc_offset)
        for at in range(0, len(entries), entry_len):
            entry = kvm_stats_desc.from_buffer_copy(entries, at)
            name = entries[at + _sizeof(kvm_stats_desc) : at + entry_len]
            if entry.size == 1:
                value = os.pread(fd, 8, header.data_offset + entry.offset)
                found[name.split(b"\0")[0].decode()] = int.from_bytes(value, "little")
        return found

    def run(self) -> int:
        """Run the guest until it exits; the KVM_EXIT_* reason.

        For small programs; a machine's exit loop is in vcpu.py. KvmError on failure, of which
        EINTR means that a signal arrived.
        """
        self._ioctl("KVM_RUN")
        return kvm_run.from_buffer(self.run_area).exit_reason


def irqchip_route(gsi: int, chip: int, pin: int) -> kvm_irq_routing_entry:
    """Return the route of `gsi` to an input of a controller (KVM_IRQCHIP_*)."""
    # u.irqchip: irqchip, pin
    return kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_IRQCHIP, u=(chip, pin))


def msi_route(gsi: int, address: int, data: int) -> kvm_irq_routing_entry:
    """Return the route of `gsi` to a message: `data` written to a local APIC's `address`."""
    message = (address & 0xFFFF_FFFF, address >> 32, data)  # u.msi: address_lo, address_hi, data
    return kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_MSI, u=message)


def _counted(entries: Sequence[Struct]) -> bytearray:
    """Lay `entries` out behind their count; mutable, as the kernel writes to it."""
    return bytearray(len(entries).to_bytes(_COUNTED_HEADER, "little")) + b"".join(
        bytes(cast("bytes", entry)) for entry in entries
    )
