"""The exit loop: one thread for each vCPU runs the guest until it needs us.

`_loop` is the hottest code of the project. A common exit costs one ioctl, one integer read from the
mapped struct kvm_run, one table look-up and one call. Two things make that true. The first eight
bytes of a port exit (direction, size, port, count) are read as one integer, which is the key of a
table of ready-made handlers; and nothing in the loop allocates, chases attributes or raises.

Threads: `_loop` runs on the vCPU's own thread and is the only code that touches struct kvm_run,
but for `immediate_exit`: who wants the vCPU out of KVM_RUN, or never to enter it, sets that and
sends a signal (api.rst, "immediate_exit"). The vCPU then looks why, in `_interrupted`: to end, or
to pause. By then it has been in KVM_RUN once more since the last exit it handled, so what the guest
read from a device has reached its register (api.rst, KVM_RUN, the note on KVM_EXIT_IO).

To stop takes no lock, so that signal handlers may: `_stopping` is set first and `immediate_exit`
after, and the vCPU clears the latter first and looks at the former after. To pause does: `_gate`
guards `_pausing` and whether the vCPU is `_parked`. A parked vCPU makes the steps that arrive in
`_mail`, whose `put` anybody may call, a signal handler too; what arrives too late is told so.
"""

import ctypes
import errno
import fcntl
import os
import signal
import threading
from collections.abc import Callable
from mmap import mmap
from queue import Empty, SimpleQueue
from typing import Protocol

from tinyvmm import kvm
from tinyvmm.bus import Bus
from tinyvmm.errors import KvmError, VcpuError

# A real-time signal: nobody who uses this package for a library has another use for it.
KICK_SIGNAL = signal.SIGRTMIN

_MAX_HANDLERS = 1024  # a guest that touches every port in every width must not fill our memory
_PR_SET_TIMERSLACK = 29
_RESET_VECTOR = 0xFFFF_FFF0  # where a processor begins (Intel SDM 3A, 9.1.4)
_SYS_TGKILL = 234  # <asm/unistd_64.h>

_libc = ctypes.CDLL(None, use_errno=True)
_Answers = SimpleQueue[str | BaseException]


class _sigaction(ctypes.Structure):
    """struct sigaction as the C library has it (<bits/sigaction.h>)."""

    _fields_ = (
        ("sa_handler", ctypes.c_void_p),
        ("sa_mask", ctypes.c_ulong * 16),
        ("sa_flags", ctypes.c_int),
        ("sa_restorer", ctypes.c_void_p),
    )


def handle_kicks() -> None:
    """Have KICK_SIGNAL interrupt system calls and do nothing else, in this process. Any thread.

    Python's own handlers can only be set on the main thread, and are run there. The handler here is
    a function of the C library that takes an int and has no effect: abs(3).
    """
    action = _sigaction(sa_handler=ctypes.cast(_libc.abs, ctypes.c_void_p))
    if _libc.sigaction(int(KICK_SIGNAL), ctypes.byref(action), None):
        number = ctypes.get_errno()
        raise OSError(number, f"sigaction: {os.strerror(number)}")


class StopCause:
    """Why a vCPU left its loop; the machine makes the end of the run of it."""

    STEP = "step"  # one instruction was executed; ends no run
    INTERRUPTED = "interrupted"  # it was not; ends no run

    HALT = "halt"
    TRIPLE_FAULT = "triple fault"
    POWEROFF = "poweroff"
    RESET = "reset"
    CRASH = "crash"
    DEVICE = "device"
    STOPPED = "stopped"
    ERROR = "error"


class Owner(Protocol):
    """What a vCPU needs of its machine."""

    ports: Bus
    mmio: Bus

    def stop(self, cause: str, error: BaseException | None = None) -> None:
        """End the run, for everybody."""

    def read_code(self, gpa: int, length: int) -> bytes:
        """Copy up to `length` bytes of RAM for a report."""


class Vcpu:
    """One vCPU, its thread and its exit loop; `handle` is the KVM descriptor."""

    def __init__(self, handle: kvm.VCPU, owner: Owner) -> None:
        self.handle = handle
        self.crash = ""
        """What is known of the triple fault that it ended with."""
        self._owner = owner
        self._stopping = False
        self._gate = threading.Lock()
        self._pausing = False
        self._parked = threading.Event()
        self._mail: SimpleQueue[_Answers | None] = SimpleQueue()  # steps to make; None: look again
        self._thread: threading.Thread | None = None
        self._run = kvm.kvm_run.from_buffer(handle.run_area)
        self._views = Views(handle.run_area)
        self._handlers = _PortHandlers(owner.ports, self._views)

    def start(self) -> None:
        """Start the thread that runs the guest."""
        name = f"vcpu{self.handle.vcpu_id}"
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Make the vCPU leave its loop soon; from any thread, also before it has started."""
        self._stopping = True
        self._mail.put(None)
        self._kick()

    def _kick(self) -> None:
        """Get the vCPU out of KVM_RUN."""
        self._run.immediate_exit = 1
        thread = self.thread_id
        if thread is not None:
            # Not pthread_kill(3): the thread may be ending, and then that reads freed memory.
            _libc.syscall(_SYS_TGKILL, os.getpid(), thread, int(KICK_SIGNAL))

    @property
    def pausing(self) -> bool:
        """Whether it is to stay out of the guest, and after `await_pause` does."""
        return self._pausing

    @property
    def thread_id(self) -> int | None:
        """The kernel's number of its thread; None before it has started."""
        return None if self._thread is None else self._thread.native_id

    def begin_pause(self) -> None:
        """Have the vCPU stay out of the guest from soon on; from any thread but its own."""
        with self._gate:
            if self._pausing:
                return
            self._pausing = True
            self._kick()

    def await_pause(self) -> None:
        """Wait until it is out, or has not started, or has ended: its registers can be read."""
        if self._thread is not None:
            self._parked.wait()

    def resume(self) -> None:
        """Go on with the guest; harmless if it was not paused."""
        with self._gate:
            self._pausing = False
        self._mail.put(None)

    def step(self, timeout: float = 1.0) -> bool:
        """Execute one instruction of a paused vCPU; False if the guest waits at it for something.

        Also if the vCPU goes on, or ends, before its turn comes. Not on the vCPU's own thread. What
        the instruction asks of devices is done. An interrupt that is due comes first, and then its
        handler's first instruction is not executed. `timeout` is in seconds. KvmError where this
        KVM cannot step.
        """
        done: _Answers = SimpleQueue()
        with self._gate:
            if not self._pausing or not self._parked.is_set() or self._stopping:
                raise RuntimeError(f"vCPU {self.handle.vcpu_id} is not paused")
            self._mail.put(done)
        try:
            result = done.get(timeout=timeout)
        except Empty:
            self._kick()
            result = done.get()
        if isinstance(result, BaseException):
            raise result
        if result not in {StopCause.STEP, StopCause.INTERRUPTED}:
            self._owner.stop(result)
        return result != StopCause.INTERRUPTED

    def _step(self) -> str:
        self.handle.set_guest_debug(kvm.KVM_GUESTDBG_ENABLE | kvm.KVM_GUESTDBG_SINGLESTEP)
        answered = False
        try:
            while True:
                try:
                    self.handle.run()
                except KvmError as error:
                    if error.errno not in {errno.EINTR, errno.EAGAIN}:
                        raise
                    return StopCause.STEP if answered else StopCause.INTERRUPTED
                cause = self._answer()
                if cause is not None:
                    return cause
                # KVM reports no step for an instruction that it had to ask us about. So complete it
                # (it may ask for another part), and go no further.
                answered = True
                self._run.immediate_exit = 1
        finally:
            self._run.immediate_exit = 0
            self.handle.set_guest_debug(0)

    def _answer(self) -> str | None:
        """Handle one exit, as `_loop` does."""
        views, mmio = self._views, self._owner.mmio
        reason, size = views.u32[2], views.u32[12]
        if reason == kvm.KVM_EXIT_IO:
            self._handlers[views.u64[4]]()
        elif reason != kvm.KVM_EXIT_MMIO:
            return self._uncommon(reason)
        elif views.u8[52]:
            mmio.write(views.u64[4], size, views.u64[5] & (1 << 8 * size) - 1)
        else:
            views.u64[5] = mmio.read(views.u64[4], size)
        return None

    def _interrupted(self) -> str | None:
        """Say how to leave the loop after KVM_RUN was interrupted; None to go on."""
        self._run.immediate_exit = 0
        while not self._stopping:
            with self._gate:
                if not self._pausing:
                    self._parked.clear()
                    self._refuse_steps()
                    return None
                self._parked.set()
            done = self._mail.get()
            if done is not None:
                try:
                    done.put(self._step())
                except BaseException as error:  # noqa: BLE001 (belongs to who asked)
                    done.put(error)
        return StopCause.STOPPED

    def _refuse_steps(self) -> None:
        """Answer whoever asked for a step too late; the gate is held, so nobody asks any more."""
        while not self._mail.empty():
            done = self._mail.get()
            if done is not None:
                done.put(StopCause.INTERRUPTED)

    def join(self) -> None:
        """Wait until the thread has ended, unless this is that thread."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def close(self) -> None:
        """Release struct kvm_run and the descriptor; the thread must have ended."""
        self._handlers.clear()
        del self._run
        self._views.release()
        self.handle.close()

    def _main(self) -> None:
        # Waiting for the interpreter lock is a timed wait, and by default Linux lets timers slip
        # by 50 us: five exits' worth.
        _libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        try:
            self._owner.stop(self._loop())
        except BaseException as error:  # noqa: BLE001 (a thread's end must reach the machine)
            from traceback import clear_frames

            # The frames may hold structs that lie in the mapping, which would keep it open.
            clear_frames(error.__traceback__)
            self._owner.stop(StopCause.ERROR, error)
        finally:
            with self._gate:
                self._stopping = True
                self._refuse_steps()
                self._parked.set()

    def _loop(self) -> str:
        """Run the guest until it ends or `stop` is called; a StopCause."""
        ioctl, fd, KVM_RUN = fcntl.ioctl, self.handle.fd, kvm.KVM_RUN
        KVM_EXIT_IO, KVM_EXIT_MMIO = kvm.KVM_EXIT_IO, kvm.KVM_EXIT_MMIO
        # Offsets in struct kvm_run: exit_reason 8; io: the key 32; mmio: phys_addr 32, data 40,
        # len 48, is_write 52.
        u8, u32, u64 = self._views.u8, self._views.u32, self._views.u64
        handlers = self._handlers
        mmio_read, mmio_write = self._owner.mmio.read, self._owner.mmio.write
        while True:
            try:
                ioctl(fd, KVM_RUN, 0)
            except OSError as error:
                if error.errno not in (errno.EINTR, errno.EAGAIN):
                    raise VcpuError(
                        self.describe(str(KvmError("KVM_RUN", error.errno or 0)))
                    ) from None
                cause = self._interrupted()
                if cause is not None:
                    return cause
                continue
            reason = u32[2]
            if reason == KVM_EXIT_IO:
                handlers[u64[4]]()
            elif reason == KVM_EXIT_MMIO:
                size = u32[12]
                if u8[52]:
                    mmio_write(u64[4], size, u64[5] & (1 << 8 * size) - 1)
                else:
                    u64[5] = mmio_read(u64[4], size)
            else:
                cause = self._uncommon(reason)
                if cause is not None:
                    return cause

    def _uncommon(self, reason: int) -> str | None:
        """Return the StopCause of a rare exit, or None to go on; VcpuError if it cannot go on."""
        if reason == kvm.KVM_EXIT_HLT:  # only without an in-kernel irqchip: nothing can wake it
            return StopCause.HALT
        if reason == kvm.KVM_EXIT_SHUTDOWN:
            self.crash = self._describe_crash()
            return StopCause.TRIPLE_FAULT
        if reason == kvm.KVM_EXIT_DEBUG:
            return StopCause.STEP
        if reason in {kvm.KVM_EXIT_INTR, kvm.KVM_EXIT_IRQ_WINDOW_OPEN}:
            return self._interrupted()
        if reason == kvm.KVM_EXIT_SYSTEM_EVENT:
            event = kvm.kvm_run_system_event.from_buffer(
                self.handle.run_area, kvm.KVM_RUN_UNION
            ).type
            return _SYSTEM_EVENTS.get(event, StopCause.CRASH)
        if reason == kvm.KVM_EXIT_INTERNAL_ERROR:
            internal = kvm.kvm_run_internal.from_buffer(self.handle.run_area, kvm.KVM_RUN_UNION)
            what = f"KVM_EXIT_INTERNAL_ERROR, suberror {internal.suberror}"
        elif reason == kvm.KVM_EXIT_FAIL_ENTRY:
            entry = kvm.kvm_run_fail_entry.from_buffer(self.handle.run_area, kvm.KVM_RUN_UNION)
            what = f"KVM_EXIT_FAIL_ENTRY, reason {entry.hardware_entry_failure_reason:#x}"
        else:
            what = f"KVM exit reason {reason}, which this VMM does not handle"
        raise VcpuError(self.describe(what))

    def _describe_crash(self) -> str:
        """Say where a triple fault was; "" if that is lost.

        It is on AMD's processors, where KVM then puts the vCPU into the state after INIT
        (shutdown_interception in Linux's arch/x86/kvm/svm/svm.c).
        """
        regs, sregs = self.handle.get_regs(), self.handle.get_sregs()
        lost = sregs.cs.base + regs.rip == _RESET_VECTOR
        return "" if lost else self.describe(StopCause.TRIPLE_FAULT)

    def describe(self, what: str) -> str:
        """Say `what` happened to this vCPU, with its registers and the code at its RIP."""
        regs, sregs = self.handle.get_regs(), self.handle.get_sregs()
        linear = (sregs.cs.base + regs.rip) & (1 << 64) - 1
        gpa = self.handle.translate(linear)
        code = b"" if gpa is None else self._owner.read_code(gpa, 16)
        names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "rip", "rflags")
        values = " ".join(f"{name}={getattr(regs, name):#x}" for name in names)
        control = " ".join(f"{name}={getattr(sregs, name):#x}" for name in ("cr0", "cr3", "cr4"))
        return (
            f"vCPU {self.handle.vcpu_id}: {what}\n  {values}\n  cs={sregs.cs.selector:#x} "
            f"{control} efer={sregs.efer:#x}\n  code at rip: {code.hex(' ') or 'not mapped'}"
        )


_SYSTEM_EVENTS = {
    kvm.KVM_SYSTEM_EVENT_SHUTDOWN: StopCause.POWEROFF,
    kvm.KVM_SYSTEM_EVENT_RESET: StopCause.RESET,
    kvm.KVM_SYSTEM_EVENT_CRASH: StopCause.CRASH,
}


class Views:
    """A vCPU's mapped struct kvm_run as arrays of 8, 16, 32 and 64-bit numbers."""

    def __init__(self, run_area: mmap) -> None:
        self.u8 = memoryview(run_area).cast("B")
        self.u16, self.u32, self.u64 = self.u8.cast("H"), self.u8.cast("I"), self.u8.cast("Q")
        self.by_size = {1: self.u8, 2: self.u16, 4: self.u32}

    def release(self) -> None:
        """Let go of the mapping, so that it can be closed whoever still holds this object."""
        for view in (self.u64, self.u32, self.u16, self.u8):
            view.release()


class _PortHandlers(dict[int, Callable[[], None]]):
    """The first eight bytes of struct kvm_run's `io` -> a function that performs the exit."""

    def __init__(self, ports: Bus, views: Views) -> None:
        super().__init__()
        self._ports = ports
        self._views = views

    def __missing__(self, key: int) -> Callable[[], None]:
        direction, size, port, count = key & 0xFF, key >> 8 & 0xFF, key >> 16 & 0xFFFF, key >> 32
        # io.data_offset: the data is in the mapping's second page, always at its start.
        data, first = self._views.by_size[size], self._views.u64[5] // size
        bus_read, bus_write = self._ports.read, self._ports.write

        def write() -> None:
            bus_write(port, size, data[first])

        def read() -> None:
            data[first] = bus_read(port, size)

        def write_string() -> None:
            for index in range(first, first + count):
                bus_write(port, size, data[index])

        def read_string() -> None:
            for index in range(first, first + count):
                data[index] = bus_read(port, size)

        out = direction == kvm.KVM_EXIT_IO_OUT
        if count != 1:  # INS and OUTS are rare and their counts many: not worth keeping
            return write_string if out else read_string
        if len(self) >= _MAX_HANDLERS:
            self.clear()
        handler = self[key] = write if out else read
        return handler
