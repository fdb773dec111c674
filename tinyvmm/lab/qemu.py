"""QEMU as the lab's machine: emulated, slow, but its AMD processor has SVM and so a real kvm_amd.

The guest is ours: our PID 1 and its four ports, on a virtio-serial device with one socket a port.
What is chosen here is chosen for a quick start under emulation, in this order of gain: entering an
unpacked kernel by PVH instead of letting it unpack itself, qboot instead of SeaBIOS, and a kernel
command line without self-tests and hardening.

Nothing outlives us. Kernel, initramfs and console log are memory files handed down by descriptor,
and the kernel ends QEMU when our thread that started it ends (PR_SET_PDEATHSIG), however that is.
"""

import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.session import Ports
from tinyvmm.streams import SocketInput, SocketOutput

if TYPE_CHECKING:
    from tinyvmm.kernel_files.kernel_image import Kernel

PROGRAM = "qemu-system-x86_64"
FIRMWARE = "qboot.rom"  # starts a PVH kernel in milliseconds; part of QEMU's own data
PORT_NAMES = ("stdin", "stdout", "stderr", "control")  # nr 1 to 4
ROOT_TAG = "root"
MIB = 1 << 20
TRANSLATIONS = 128 * MIB  # of QEMU's memory, for translated code; all is forgotten when it is full

CMDLINE = (
    "console=ttyS0 quiet panic=-1 "
    # The TSC is the host's: without these the kernel prefers the HPET, and every look is an exit.
    "tsc=reliable clocksource=tsc no_timer_check nowatchdog "
    # What costs most of an emulated boot and has no use here.
    "mitigations=off cryptomgr.notests init_on_alloc=0 rodata=off swiotlb=noforce "
    "audit=0 lsm= random.trust_cpu=on i8042.noaux i8042.nokbd "
    # A translation is found by its virtual address too: programs that are always at the same one
    # share theirs, and each start of Python need not be translated anew (docs/lab.md).
    "norandmaps"
)

# Ticks, one every 4 ms, instead of a timer that is set for each: where nobody else wakes a
# processor whose timer's interrupt QEMU lost (docs/lab.md).
CMDLINE_TICKS = " nohz=off highres=off"

XEN_ELFNOTE_PHYS32_ENTRY = 18  # <xen/interface/elfnote.h>
PT_LOAD, PT_NOTE = 1, 4
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Hardware(NamedTuple):
    """What the machine has. `memory` in bytes; `shares` are host directories, share0 the first."""

    memory: int
    cpus: int
    shares: Sequence[str] = ()
    ticks: bool = False
    """Whether its kernel has a periodic tick on each processor."""


def find_program() -> str:
    """Return the path of QEMU; ConfigError with the remedy if it is not installed."""
    path = shutil.which(PROGRAM)
    if path is None:
        raise ConfigError(f"the lab needs {PROGRAM}; install it: apt-get install qemu-system-x86")
    return path


def pvh_image(kernel: "Kernel") -> bytes | None:
    """Return the headers of an ELF file for QEMU to enter `kernel` by PVH; None if it cannot be.

    The segments follow at multiples of a page. The entry point is in a note that the kernel's
    own data carries, so it is found there (Documentation/x86/pvh, and Xen's docs/misc/pvh).
    """
    note = _entry_note(kernel)
    if note is None:
        return None
    count = len(kernel.segments) + 1
    at = 64 + 56 * count
    headers = [struct.pack("<IIQQQQQQ", PT_NOTE, 4, at, 0, 0, len(note), len(note), 4)]
    offset = first = _page_up(at + len(note))
    for segment in kernel.segments:
        where = (offset, segment.gpa, segment.gpa, segment.length, segment.length)
        headers.append(struct.pack("<IIQQQQQQ", PT_LOAD, 7, *where, 0x1000))
        offset = _page_up(offset + segment.length)
    ident = b"\x7fELF\2\1\1".ljust(16, b"\0")  # 64 bits, little-endian
    sizes = (64, 56, count, 0, 0, 0)  # of the header, of a program header; how many; no sections
    header = struct.pack("<16sHHIQQQI6H", ident, 2, 62, 1, kernel.entry, 64, 0, 0, *sizes)
    return (header + b"".join(headers) + note).ljust(first, b"\0")


def _entry_note(kernel: "Kernel") -> bytes | None:
    for desc_len in (8, 4):
        head = struct.pack("<III4s", 4, desc_len, XEN_ELFNOTE_PHYS32_ENTRY, b"Xen")
        for segment in kernel.segments:
            data = _segment_data(kernel, segment.offset, segment.length)
            found = data.find(head)
            if found >= 0:
                return data[found : found + len(head) + desc_len]
    return None


def _segment_data(kernel: "Kernel", offset: int, length: int) -> bytes:
    if isinstance(kernel.source, int):
        return os.pread(kernel.source, length, offset)
    return kernel.source[offset : offset + length]


def _page_up(value: int) -> int:
    return -(-value // 0x1000) * 0x1000


def kernel_file(path: str) -> int:
    """Return a descriptor of what QEMU shall boot for the kernel at `path`: unpacked if possible.

    ConfigError if it is no kernel that boots.
    """
    from tinyvmm.boot import load_kernel

    with load_kernel(path) as kernel:
        headers = pvh_image(kernel)
        if headers is None:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        file = memory_file("kernel", headers)
        for segment in kernel.segments:
            end = os.lseek(file, _page_up(os.lseek(file, 0, os.SEEK_CUR)), os.SEEK_SET)
            if isinstance(kernel.source, int):
                sent = 0
                while sent < segment.length:
                    at = segment.offset + sent
                    count = os.sendfile(file, kernel.source, at, segment.length - sent)
                    if not count:
                        raise ConfigError(f"kernel {path}: its unpacked form has been cut short")
                    sent += count
            else:
                os.pwrite(file, _segment_data(kernel, segment.offset, segment.length), end)
                os.lseek(file, end + segment.length, os.SEEK_SET)
    return file


def memory_file(name: str, data: bytes = b"") -> int:
    """Return a descriptor of an anonymous file that holds `data`."""
    file = os.memfd_create(name)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]
    return file


class Qemu:
    """A running QEMU with our ports; a context manager that leaves nothing behind.

    Not for several threads, except that `wait` and `kill` may come from any.
    """

    def __init__(self, hardware: Hardware, kernel: int, initrd: bytes) -> None:
        """Start it. `kernel` is a descriptor from `kernel_file`, which stays the caller's."""
        program = find_program()
        self._console = memory_file("console")
        initrd_file = memory_file("initrd", initrd)
        pairs = [socket.socketpair() for _ in PORT_NAMES]
        self.sockets = [ours for ours, _ in pairs]
        theirs = [their for _, their in pairs]
        files = [kernel, initrd_file, self._console]
        port_fds = [their.fileno() for their in theirs]
        try:
            self._process = subprocess.Popen(
                [program, *_arguments(hardware, files, port_fds)],
                stdin=subprocess.DEVNULL,
                stdout=self._console,
                stderr=self._console,
                pass_fds=files + port_fds,
                process_group=0,  # what a terminal sends to our group is for us to pass on
                preexec_fn=_die_with_parent(),  # noqa: PLW1509 - the caller has no other threads
            )
        except BaseException:
            os.close(self._console)
            for sock in self.sockets:
                sock.close()
            raise
        finally:
            os.close(initrd_file)
            for their in theirs:
                their.close()

    def ports(self) -> Ports:
        """Return our ends of the ports, for a session."""
        stdin, stdout, stderr, control = self.sockets
        return Ports(
            SocketInput(stdin),
            SocketOutput(stdout),
            SocketOutput(stderr),
            SocketOutput(control),
            SocketInput(control),
        )

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until QEMU has ended; false if it still runs after `timeout` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def last_words(self, count: int = 12) -> str:
        """Return lines of the guest kernel's console and QEMU's own messages: a panic, or the last.

        A panic begins with its reason, and goes on with a trace that may be long.
        """
        end = os.lseek(self._console, 0, os.SEEK_END)
        tail = os.pread(self._console, 1 << 16, max(0, end - (1 << 16))).decode(errors="replace")
        lines = [line.rstrip() for line in tail.splitlines() if line.strip()]
        for number, line in enumerate(lines):
            if "Kernel panic" in line:
                return "\n".join(lines[number : number + count])
        return "\n".join(lines[-count:])

    def close(self) -> None:
        """End it if it runs, and let go of everything."""
        self.kill()
        self._process.wait()
        for sock in self.sockets:
            sock.close()
        if self._console >= 0:
            os.close(self._console)
            self._console = -1

    def __enter__(self) -> "Qemu":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _arguments(hardware: Hardware, files: Sequence[int], ports: Sequence[int]) -> list[str]:
    """QEMU's command line, with the descriptors it inherits: kernel, initrd, console; ports."""
    kernel, initrd, console = files
    arguments = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    arguments += ["-machine", "q35,vmport=off,smm=off,sata=off,smbus=off,usb=off"]
    # Few translations, and no ERMS, which clears byte by byte: each store to a page that held code
    # goes through all that were made of it, one for each address a process had it at, and clearing
    # what a guest left took minutes (docs/lab.md).
    arguments += ["-accel", f"tcg,thread=multi,tb-size={TRANSLATIONS // MIB}"]
    arguments += ["-cpu", "max,-erms"]
    arguments += ["-smp", str(hardware.cpus), "-m", f"{hardware.memory // MIB}M"]
    if _has_firmware():
        arguments += ["-bios", FIRMWARE]
    arguments += ["-kernel", f"/dev/fd/{kernel}", "-initrd", f"/dev/fd/{initrd}"]
    arguments += ["-append", CMDLINE + (CMDLINE_TICKS if hardware.ticks else "")]
    arguments += ["-chardev", f"file,id=console,path=/dev/fd/{console},append=on"]
    arguments += ["-serial", "chardev:console"]
    # PCI slots are probed in order: this is virtio device 0, and its ports are /dev/vport0p1 to 4.
    arguments += ["-device", f"virtio-serial-pci,id=ports,addr=0x1,max_ports={len(ports) + 1}"]
    for number, (name, fd) in enumerate(zip(PORT_NAMES, ports, strict=True), start=1):
        arguments += ["-chardev", f"socket,id={name},fd={fd}"]
        device = f"virtserialport,bus=ports.0,nr={number},chardev={name},name={name}"
        arguments += ["-device", device]
    arguments += _filesystem(ROOT_TAG, "/", 2, ",readonly=on")
    for number, path in enumerate(hardware.shares):
        arguments += _filesystem(f"share{number}", path, 3 + number)
    return arguments


def _filesystem(tag: str, path: str, slot: int, more: str = "") -> list[str]:
    # remap: inode numbers of several host devices must not collide in one export.
    escaped = path.replace(",", ",,")
    backend = f"local,id={tag},path={escaped},security_model=none,multidevs=remap{more}"
    device = f"virtio-9p-pci,fsdev={tag},mount_tag={tag},addr={slot:#x}"
    return ["-fsdev", backend, "-device", device]


def _has_firmware() -> bool:
    data = os.path.join(os.path.dirname(os.path.dirname(find_program())), "share", "qemu")
    return os.path.exists(os.path.join(data, FIRMWARE))


def _die_with_parent() -> Callable[[], None]:
    """Return what the child runs before it becomes QEMU. All it needs is loaded beforehand."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def arm() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could take us along
            os._exit(1)

    return arm
