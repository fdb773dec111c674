"""One machine, from its making to its end, and what that end means.

Threads: all of it runs on the main thread, except `_watch`, which waits for the machine to end by
itself, and the console's sink, which runs on vCPU threads.
"""

import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from tinyvmm.command.init import cmdline, stops
from tinyvmm.command.options import GUEST_CID, RunOptions
from tinyvmm.command.parts import (
    add_devices,
    add_disks,
    add_net,
    add_root_disks,
    add_vhost_vsock,
    add_vsock,
    open_net,
    open_vsock,
)
from tinyvmm.devices.virtio.console import ConsolePort, VirtioConsole
from tinyvmm.devices.virtio.p9 import Virtio9P
from tinyvmm.devices.virtio.rng import VirtioRng
from tinyvmm.errors import VcpuError
from tinyvmm.fileserver.session import Session as FileSession
from tinyvmm.fileserver.tree import Tree
from tinyvmm.machine import Machine
from tinyvmm.named import NamedTuple
from tinyvmm.session import (
    STATUS_MACHINE_FAILED,
    STATUS_SIGNAL,
    HostFiles,
    Ports,
    Result,
    Session,
    host_files,
)
from tinyvmm.vcpu import StopCause

# What most runs have none of is imported where it is made: the lab pays dearly for each module.
if TYPE_CHECKING:
    from tinyvmm.devices.virtio.vsock import VirtioVsock
    from tinyvmm.disks.qcow2 import Qcow2Image
    from tinyvmm.disks.raw import RawDisk
    from tinyvmm.inside.executor import Executor
    from tinyvmm.kernel_files.kernel_image import Kernel
    from tinyvmm.methods.supervised import Supervised
    from tinyvmm.own_device import OwnDevice
    from tinyvmm.roots.erofs_root import RootDisks
    from tinyvmm.terminal import Terminal
    from tinyvmm.vsock_host import VsockHost


_TAIL_LEN = 4096  # of the kernel's console, kept for the report of a panic
_PANIC = b"Kernel panic"
_PANIC_LINES = 12
_OUT_OF_MEMORY = b"Out of memory: Killed process"  # mm/oom_kill.c


class _Tail:
    """The last of what the kernel printed, passed on if somebody wants it."""

    def __init__(self, sink: Callable[[bytes], None] | None) -> None:
        self._sink = sink
        self._data = bytearray()

    def __call__(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > 2 * _TAIL_LEN:
            del self._data[:-_TAIL_LEN]
        if self._sink is not None:
            self._sink(data)

    def last(self) -> bytes:
        """Return the last of it."""
        return bytes(self._data[-_TAIL_LEN:])

    def killed_for_memory(self) -> bool:
        """Whether the kernel told that it killed a process to have its memory."""
        return _OUT_OF_MEMORY in self._data

    def panic(self) -> str | None:
        """Return the last lines from the panic on, or None if there was none."""
        start = self._data.rfind(_PANIC)
        if start < 0:
            return None
        start = self._data.rfind(b"\n", 0, start) + 1
        lines = self._data[start:].decode(errors="replace").splitlines()
        return "\n".join(line.rstrip() for line in lines[:_PANIC_LINES])


class Ends(NamedTuple):
    """This side of the session; as for `run_command` (run.py)."""

    files: HostFiles | None
    sinks: Mapping[str, Callable[[bytes], None]]
    on_session: Callable[[Session], None] | None


class Opened(NamedTuple):
    """What a run has, and every machine of it: what was asked for, and what was opened for that."""

    options: RunOptions
    trees: "Sequence[tuple[str, Tree]]"
    disks: "list[RawDisk | Qcow2Image]"
    root_disks: "RootDisks | None"
    own_devices: "list[OwnDevice]"
    terminal: "Terminal | None"
    warn: Callable[[str], None]
    supervised: "Supervised | None"
    ends: Ends


class Turn:
    """One machine, from its making to its end; `rebooted` says that the guest wanted another."""

    def __init__(self, opened: Opened, timeout: float | None) -> None:
        """The machine of `opened` that may take `timeout` seconds."""
        self._opened = opened
        self._options = opened.options
        self._supervised = opened.supervised
        self._timeout = timeout
        self._tail = _Tail(opened.options.console)
        self._executor: Executor | None = None
        self._vsock_host: VsockHost | None = None
        self.rebooted = False

    def run(
        self, kernel: "Kernel", initrd: Sequence[bytes | memoryview], describe: Callable[[int], str]
    ) -> Result:
        """Make the machine, boot it, and relay the command's streams until the end."""
        with ExitStack() as cleanup:
            machine, ports, vsock = self._machine(cleanup)
            machine.boot_linux(kernel, initrd=initrd, cmdline=cmdline(self._options))
            session = Session(
                Ports.of(ports),
                command="".join(self._options.argv[:1]),
                timeout=self._timeout,
                terminal=self._opened.terminal,
                describe_step=describe,
                files=self._files(),
                sinks=self._opened.ends.sinks,
                stops=stops(self._options),
                on_record=self._on_record,
            )
            if self._opened.ends.on_session is not None:
                self._opened.ends.on_session(session)
            machine.start()
            try:
                self._supervise(machine, session, vsock)
                if self._opened.root_disks is not None:
                    self._opened.root_disks.image.plan_ahead()
                arguments = (machine, session, self._tail, self._options.own_init)
                watch = threading.Thread(target=_watch, args=arguments, daemon=True)
                watch.start()
                result = session.run()
            finally:
                if self._supervised is not None:
                    self._supervised.detach()
            machine.stop(StopCause.STOPPED)
            watch.join()
            with suppress(VcpuError):  # `_watch` told the session; another error is a bug of ours
                machine.wait()
            panicked = self._tail.panic() is not None  # which makes Linux reset at once
            self.rebooted = machine.cause == StopCause.RESET and not panicked
            return self._explain(result)

    def _explain(self, result: Result) -> Result:
        """Say what a signal that nobody sent is about."""
        killed = result == Result(STATUS_SIGNAL + signal.SIGKILL, "killed")
        if not killed or not self._tail.killed_for_memory():
            return result
        size = self._options.memory >> 20
        return result._replace(
            message=f"the guest ran out of memory and killed the command: give more than {size}M "
            "(--memory)"
        )

    def _files(self) -> HostFiles:
        """The session's ends on this side; a detached command has only what it is sent."""
        if self._opened.ends.files is not None:
            return self._opened.ends.files
        if self._supervised is None or not self._opened.ends.sinks:
            return host_files()
        return HostFiles(self._supervised.stdin, None, None)

    def _supervise(self, machine: Machine, session: Session, vsock: "VirtioVsock | None") -> None:
        if self._supervised is None:
            return
        from tinyvmm.inside.executor import Executor

        host = self._vsock_host
        way = None if vsock is None or host is None else (vsock, host)
        self._executor = Executor(session.send)
        self._supervised.attach(machine, session, self._executor, self._tail.last, way)

    def _on_record(self, kind: int, value: int) -> None:
        if self._executor is not None and self._supervised is not None:
            self._executor.on_record(kind, value)
            self._supervised.on_record(kind, value)

    def _machine(
        self, cleanup: ExitStack
    ) -> "tuple[Machine, list[ConsolePort], VirtioVsock | None]":
        """Make the machine with its devices, until `cleanup`; the session's ports, the vsock."""
        options = self._options
        vsock_at = options.vsock
        if vsock_at is None and self._supervised is not None:
            vsock_at = (self._supervised.vsock_path, GUEST_CID)
        self._vsock_host = vsock_host = open_vsock(vsock_at, cleanup)
        net = open_net(options, self._opened.warn, cleanup)
        machine = cleanup.enter_context(
            Machine(
                memory=options.memory,
                cpus=options.cpus,
                transport=options.transport,
                ioeventfd=options.ioeventfd,
            )
        )
        machine.add_board(console=self._tail)
        ports = [ConsolePort(name) for name in ("stdin", "stdout", "stderr", "control")]
        machine.add_virtio(VirtioConsole(ports))  # the first: its index is in the ports' names
        machine.add_virtio(VirtioRng())
        if options.balloon is not None:
            from tinyvmm.devices.virtio.balloon import VirtioBalloon

            machine.add_virtio(VirtioBalloon(machine.memory, options.balloon))
        add_devices(machine, self._opened.own_devices)
        for tag, tree in self._opened.trees:
            machine.add_virtio(Virtio9P(tag, FileSession(tree, name=tag)))
        add_disks(machine, options.disks, self._opened.disks)
        add_root_disks(machine, self._opened.root_disks)
        vsock = None
        if vsock_at is not None and vsock_host is not None:
            vsock = add_vsock(machine, vsock_host, vsock_at[1])
        elif vsock_at is not None:
            add_vhost_vsock(machine, vsock_at[1], cleanup)
        if net is not None:
            add_net(machine, net)
        return machine, ports, vsock


def _watch(machine: Machine, session: Session, tail: _Tail, own_init: bool) -> None:
    """Wait for the machine's end and tell the session; the command's own end takes precedence."""
    try:
        cause = machine.wait()
    except VcpuError as error:
        session.stopped(STATUS_MACHINE_FAILED, str(error))
    except BaseException:  # noqa: BLE001 (a bug of ours: the main thread meets it in `wait`)
        session.stopped()
    else:
        status, message = _meaning(cause, tail, machine.exit_value)
        if own_init and cause == StopCause.POWEROFF:
            message = None  # which is how it ends
        session.stopped(status, message)


def _meaning(cause: str | None, tail: _Tail, value: int | None) -> tuple[int, str | None]:
    """Return the exit status and the line for a machine that ended before its command did."""
    panic = tail.panic()
    if panic is not None:
        return STATUS_MACHINE_FAILED, f"the guest's kernel panicked:\n{panic}"
    if cause == StopCause.DEVICE:
        return (value or 0) & 0xFF, f"a device ended the run before the command ended: {value}"
    if cause == StopCause.POWEROFF:
        return 0, "the guest powered off before the command ended"
    if cause == StopCause.RESET:
        return 0, "the guest rebooted before the command ended: that ends the run"
    return STATUS_MACHINE_FAILED, f"the guest crashed before the command ended: {cause}"
