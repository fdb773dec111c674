"""Run a kernel by itself, with no root and no PID 1 of ours: `tinyvmm run --kernel K --no-root`.

The machine is the same board: what the kernel has beside it are the UART, whose line leads where
`serial` says, the debug exit port, fw_cfg, and the disks and devices that were asked for. It may be
a PVH or multiboot kernel, or a Linux one with an initramfs of the user's.

How it ends is the exit status: a value written to port 0xF4 gives (value << 1) | 1, of which the
shell sees eight bits, so 0 and a success can be told apart; power off and reset give 0.

Threads: the main thread waits for the machine and for signals; `_Typist` reads standard input on a
thread of its own; the UART's output is written on vCPU threads.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from tinyvmm import bare_kernel, boot, layout
from tinyvmm.bare_kernel import Module
from tinyvmm.command.parts import add_devices, add_disks, load_devices, open_disks
from tinyvmm.devices.debug_exit import DebugExit
from tinyvmm.devices.fw_cfg import FwCfg
from tinyvmm.devices.virtio.rng import VirtioRng
from tinyvmm.disks.opening import DiskOptions
from tinyvmm.errors import ConfigError, VcpuError
from tinyvmm.machine import Machine
from tinyvmm.session import (
    INPUT_PATIENCE,
    STATUS_MACHINE_FAILED,
    STATUS_SIGNAL,
    STATUS_TIMEOUT,
    Result,
    write_all,
)
from tinyvmm.terminal import EscapeKeys, Terminal, is_terminal_session
from tinyvmm.vcpu import StopCause

if TYPE_CHECKING:
    from tinyvmm.devices.uart import Uart
    from tinyvmm.disks.qcow2 import Qcow2Image
    from tinyvmm.disks.raw import RawDisk

_LOOK_AGAIN_MS = 10  # for a guest that does not read what was typed
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class BareOptions(NamedTuple):
    """What to run and in what machine; sizes in bytes, times in seconds."""

    kernel: str
    protocol: str | None = None
    """One of bare_kernel.PROTOCOLS; None for what the file says it wants."""
    modules: Sequence[Module] = ()
    """What else is in RAM; for Linux they are the initramfs, one behind the other."""
    append: str = ""
    """The kernel's command line."""
    memory: int = 1 << 30
    cpus: int = 1
    serial: str = "stdio"
    """Where the UART's line leads: "stdio", "none", or "file:PATH"."""
    fw_cfg: Sequence[tuple[str, str]] = ()
    """(name, path) of each file offered by fw_cfg."""
    disks: Sequence[DiskOptions] = ()
    devices: Sequence[str] = ()
    timeout: float | None = None
    on_reboot: str = "exit"
    """What a reset does: "exit" ends the run, "reset" starts the machine anew."""
    transport: str = "pci"
    ioeventfd: bool | None = None


def run_bare(options: BareOptions, warn: Callable[[str], None]) -> Result:
    """Run the kernel to its end. Main thread. ConfigError for what cannot be done.

    `warn` takes what may keep it from running.
    """
    with ExitStack() as cleanup:
        console = _Interruption(cleanup)
        output, typed = _open_serial(options.serial, console.is_over, cleanup)
        deadline = _Deadline(options.timeout)
        disks = open_disks(options.disks, cleanup)
        while True:
            result, again = _run_once(options, disks, output, console, deadline, warn, typed=typed)
            if not again:
                return result


def _run_once(
    options: BareOptions,
    disks: "list[RawDisk | Qcow2Image]",
    output: Callable[[bytes], None],
    interruption: "_Interruption",
    deadline: "_Deadline",
    warn: Callable[[str], None],
    *,
    typed: bool,
) -> tuple[Result, bool]:
    """Make the machine and run it once; whether it is to be run again."""
    with ExitStack() as cleanup:
        files: dict[str, bytes] = {}
        for name, path in options.fw_cfg:
            if name in files:
                raise ConfigError(f"--fw-cfg {name}: there are two of that name: leave one out")
            files[name] = bare_kernel.read_file(path, "fw_cfg file")
        machine = cleanup.enter_context(
            Machine(
                memory=options.memory,
                cpus=options.cpus,
                transport=options.transport,
                ioeventfd=options.ioeventfd,
            )
        )
        machine.add_board(console=output)
        machine.ports.add(layout.DEBUG_EXIT_PORT, 4, DebugExit(machine.end))
        fw_cfg = FwCfg(ram_size=options.memory, cpus=options.cpus, files=files)
        machine.ports.add(layout.FW_CFG_PORT, fw_cfg.length, fw_cfg)
        machine.add_virtio(VirtioRng())
        add_devices(machine, load_devices(options.devices))
        add_disks(machine, options.disks, disks)
        _boot(machine, options, warn)
        interruption.machine = machine
        if interruption.result is not None:  # which came while there was no machine to stop
            return interruption.result, False
        if typed and machine.uart is not None:
            typist = _Typist(machine.uart, interruption.escape)
            cleanup.callback(typist.close)
        machine.start()
        try:
            cause = machine.wait(deadline.left())
        except VcpuError as error:
            return Result(STATUS_MACHINE_FAILED, "machine", str(error)), False
        if cause is None:
            late = f"timed out after {options.timeout:g} s: the machine was stopped"
            return Result(STATUS_TIMEOUT, "timeout", late), False
        if interruption.result is not None:
            return interruption.result, False
        again = cause == StopCause.RESET and options.on_reboot == "reset"
        return _meaning(cause, machine), again


def _boot(machine: Machine, options: BareOptions, warn: Callable[[str], None]) -> None:
    kernel = bare_kernel.read_kernel(options.kernel, options.protocol)
    if kernel is not None:
        machine.boot_bare(kernel, modules=options.modules, cmdline=options.append)
        return
    archives = [bare_kernel.read_file(module.path, "initrd") for module in options.modules]
    try:
        linux = boot.load_kernel(options.kernel)
    except ConfigError as error:
        if options.protocol is not None:
            raise
        neither = "no multiboot header in its first 8 KiB, and no PVH entry point"
        raise ConfigError(f"{error} (it has {neither} either)") from None
    from tinyvmm.lab.probe import missing_for_linux

    problem = missing_for_linux()
    if problem is not None:  # what else is started like Linux may do without
        warn(f"this KVM cannot run Linux ({problem}); there is one that can: tinyvmm lab -- CMD")
    with linux:
        machine.boot_linux(linux, initrd=archives, cmdline=options.append)


def _meaning(cause: str, machine: Machine) -> Result:
    value = machine.exit_value
    if cause == StopCause.DEVICE and value is not None:
        return Result((value << 1 | 1) & 0xFF, "exited")
    if cause in {StopCause.POWEROFF, StopCause.RESET}:
        return Result(0, cause)
    what = next((vcpu.crash for vcpu in machine.vcpus if vcpu.crash), cause)
    return Result(STATUS_MACHINE_FAILED, "machine", f"the guest crashed: {what}")


class _Deadline:
    """A time limit that begins now."""

    def __init__(self, timeout: float | None) -> None:
        from time import monotonic

        self._now = monotonic
        self._end = None if timeout is None else monotonic() + timeout

    def left(self) -> float | None:
        """Seconds left, at least 0."""
        return None if self._end is None else max(0.0, self._end - self._now())


class _Interruption:
    """Signals, and the keys that stand for one: they stop whichever machine runs."""

    def __init__(self, cleanup: ExitStack) -> None:
        """Catch signals until `cleanup`."""
        self.machine: Machine | None = None
        self.result: Result | None = None
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    cleanup.callback(signal.signal, number, signal.signal(number, self._handle))

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._end(Result(STATUS_SIGNAL + number, "signal"))

    def escape(self) -> None:
        """End the run as Ctrl-C would; from any thread."""
        number = STATUS_SIGNAL + signal.SIGINT
        self._end(Result(number, "escape", "stopped by Ctrl-]"))

    def is_over(self) -> bool:
        """Whether the machine is to end, and with it what it says."""
        return self.machine is not None and bool(self.machine.cause)

    def _end(self, result: Result) -> None:
        if self.result is None:
            self.result = result
        if self.machine is not None:
            self.machine.stop(StopCause.STOPPED)


def _open_serial(
    where: str, is_over: Callable[[], bool], cleanup: ExitStack
) -> tuple[Callable[[bytes], None], bool]:
    """Return what takes the UART's output, and whether standard input is typed into it."""
    kind, _, path = where.partition(":")
    if where == "stdio":
        if is_terminal_session():
            terminal = Terminal()
            cleanup.callback(terminal.restore)
            terminal.enter_raw()
        # One that was closed at the start may be any file by now, the guest's RAM too.
        output = _nobody if sys.__stdout__ is None else _writer(1, is_over)
        return output, sys.__stdin__ is not None
    if where == "none":
        return _nobody, False
    if kind == "file" and path:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"--serial {where}: cannot be written ({error.strerror})") from None
        cleanup.callback(os.close, fd)
        return _writer(fd, is_over), False
    raise ConfigError(f"--serial {where}: give stdio, none or file:PATH")


def _writer(fd: int, is_over: Callable[[], bool]) -> Callable[[bytes], None]:
    """A sink that forgets what its reader does not want any more, or not before the end."""
    poller = select.poll()
    poller.register(fd, select.POLLOUT)

    def write(data: bytes) -> None:
        # Whoever waits in write(2) for a reader cannot be told to stop; a pipe that has room has it
        # for this much.
        for start in range(0, len(data), select.PIPE_BUF):
            while not poller.poll(_LOOK_AGAIN_MS):
                if is_over():
                    return
            try:
                write_all(fd, data[start : start + select.PIPE_BUF])
            except BrokenPipeError:
                return
            except OSError as error:
                raise ConfigError(
                    f"cannot write what the kernel says: {error.strerror}; see --serial"
                ) from None

    return write


def _nobody(_data: bytes) -> None:
    """Take output that nobody wants."""


class _Typist:
    """Types standard input into the UART, on a thread of its own, until it ends or is closed."""

    def __init__(self, uart: "Uart", escape: Callable[[], None]) -> None:
        self._uart = uart
        self._escape = escape
        self._closing = False
        self._quit_read, self._quit_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._main, name="serial input", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        keys = EscapeKeys() if is_terminal_session() else None
        waiting = b""
        poller = select.poll()
        poller.register(self._quit_read, select.POLLIN)
        while True:
            if waiting:
                waiting = waiting[self._uart.receive(waiting) :]
                if poller.poll(_LOOK_AGAIN_MS if waiting else 0):
                    return
                continue
            with_input = select.poll()
            with_input.register(self._quit_read, select.POLLIN)
            with_input.register(0, select.POLLIN)
            if any(fd == self._quit_read for fd, _ in with_input.poll()):
                return
            try:
                waiting = os.read(0, 4096)
            except OSError:
                return  # a closed standard input, or a terminal that hung up, types nothing
            if not waiting or self._closing:
                return
            if keys is not None and keys.seen(waiting):
                self._escape()
                return

    def close(self) -> None:
        """Stop typing; what was read and not yet typed is gone."""
        self._closing = True
        os.close(self._quit_write)
        self._thread.join(INPUT_PATIENCE)
        if not self._thread.is_alive():  # else somebody else got what was there to read
            os.close(self._quit_read)
