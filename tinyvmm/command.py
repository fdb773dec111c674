"""Run one command in one virtual machine: what `tinyvmm run` does, as an API.

`run_command` reads as the whole story: find a kernel, join the directories into one tree, make an
initramfs around PID 1, build a machine with a console and that tree as its root, boot, relay the
command's streams, and turn the end into an exit status. Everything opened on the way is closed on
the way out, whatever happened.

Threads: all of it runs on the main thread, except `_watch`, which waits for the machine to end by
itself, and the console's sink, which runs on vCPU threads.
"""

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from tinyvmm.boot import load_kernel
from tinyvmm.devices.virtio.console import ConsolePort, VirtioConsole
from tinyvmm.devices.virtio.p9 import Virtio9P
from tinyvmm.devices.virtio.rng import VirtioRng
from tinyvmm.errors import ConfigError, VcpuError
from tinyvmm.fileserver.descriptors import raise_nofile_limit
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.session import Session as FileSession
from tinyvmm.fileserver.tree import Tree
from tinyvmm.fileserver.union import UnionTree, open_tree
from tinyvmm.guest.archive import ModuleArchive, init_archive, module_archive
from tinyvmm.guest.init import (
    ROOT_TAG,
    STANDARD_MOUNTS,
    VSOCK_MODULES,
    Filesystem,
    InitConfig,
    Mkdir,
    Network,
    describe_step,
    search_path,
)
from tinyvmm.guest.relay import User
from tinyvmm.images import kernels
from tinyvmm.kernel_files.kernel_cache import default_dir
from tinyvmm.machine import Machine
from tinyvmm.roots.mounts import (
    Shared,
    arrange,
    open_shared,
    root_mounts,
    shared_mounts,
    shared_tag,
)
from tinyvmm.scratch import ScratchDirectory
from tinyvmm.session import (
    STATUS_MACHINE_FAILED,
    STATUS_SIGNAL,
    HostFiles,
    Ports,
    Result,
    Session,
    host_files,
)
from tinyvmm.streams import PortInput, PortOutput
from tinyvmm.vcpu import StopCause

# What most runs have none of is imported where it is made: the lab pays dearly for each module.
if TYPE_CHECKING:
    from tinyvmm.devices.virtio.net import VirtioNet
    from tinyvmm.devices.virtio.vsock import VirtioVsock
    from tinyvmm.disks.opening import DiskOptions
    from tinyvmm.disks.qcow2 import Qcow2Image
    from tinyvmm.disks.raw import RawDisk
    from tinyvmm.fileserver.watched import Access
    from tinyvmm.inside.executor import Executor
    from tinyvmm.kernel_files.kernel_image import Kernel
    from tinyvmm.methods.supervisor import Context, Supervisor
    from tinyvmm.net.options import NetOptions, Published
    from tinyvmm.net.pump import Pump
    from tinyvmm.own_device import OwnDevice
    from tinyvmm.roots.erofs_root import RootDisks
    from tinyvmm.roots.pack_mounts import PackMap
    from tinyvmm.terminal import Terminal
    from tinyvmm.vsock_host import VsockHost

FILE_MODULES = ("9pnet_virtio", "9p")
MODULES = ("virtio_pci", "virtio_console", *FILE_MODULES, "virtio_rng")
ROOT_MODES = ("9p", "erofs", "auto")
# The file system is not found by itself, because the guest's /lib/modules is another kernel's; nor
# is what it computes checksums with, which newer kernels have built in.
DISK_MODULES = ("virtio_blk", "crc32c_generic?", "ext4")
NET_MODULES = ("virtio_net",)
GUEST_CID = 3  # where nothing else is asked for
UNSENT_MS = 10_000  # for peers that acknowledge late what the command sent; docs/network.md
OVERLAY_MODULES = (*MODULES, "overlay")  # with private_writes="guest"
_TAIL_LEN = 4096  # of the kernel's console, kept for the report of a panic
_PANIC = b"Kernel panic"
_PANIC_LINES = 12
_OUT_OF_MEMORY = b"Out of memory: Killed process"  # mm/oom_kill.c

# `panic=-1` makes a panic reset at once, which ends the run; what the kernel printed tells why. And
# `reboot=a` makes a reset use the register that ACPI names: see acpi.py.
CMDLINE = "console=ttyS0 panic=-1 reboot=a no_timer_check"


class RunOptions(NamedTuple):
    """What to run and in what machine; sizes in bytes, times in seconds."""

    argv: Sequence[str]
    """Nothing at all: the guest waits for what it is sent (exec_client.py)."""
    memory: int = 1 << 30
    cpus: int = 1
    reads: Sequence[tuple[str, str]] = (("/", "/"),)
    """(guest path, host path) of each read tree; later ones win."""
    writes: Sequence[tuple[str, str]] = ()
    """As `reads`, for the trees that keep the guest's writes; / has a private one by default."""
    root: Tree | None = None
    """Another tree for the root, in place of `reads` and `writes`; it stays its maker's."""
    on_access: "Callable[[Access], None] | None" = None
    """Is told what is done to the root's files, before it is done, and may refuse (watched.py)."""
    shared: Sequence[Shared] = ()
    """Host directories that are live on both sides, mounted in the root."""
    disks: "Sequence[DiskOptions]" = ()
    """/dev/vda, /dev/vdb and so on."""
    packs: "Sequence[PackMap]" = ()
    """Trees of files that are one file each, joined with the root; later ones win."""
    cache: str | None = None
    """The cache policy of the root (mounts.CACHES); None for the one that fits."""
    root_mode: str = "auto"
    """One of ROOT_MODES: how the root gets there; "auto" for 9p where the kernel has it."""
    private_writes: str | None = None
    """Where writes nobody keeps go: to this side (the "server"'s), or the "guest"'s RAM; None for
    "server" with a root over 9P, "guest" with one of EROFS."""
    directories: Sequence[str] = ()
    """What of the root is made if it is missing, mount points too; outer ones first."""
    env: Sequence[str] = ()
    """`NAME=VALUE` each."""
    cwd: str = "/"
    kernel: str | None = None
    """A path, or the version of an installed kernel; None for the newest."""
    append: str = ""
    """More of the kernel's command line."""
    timeout: float | None = None
    console: Callable[[bytes], None] | None = None
    """Takes everything the kernel prints; None keeps the kernel quiet."""
    merged: bool = False
    """Whether the command's stderr is its stdout."""
    terminal: bool = False
    detached: bool = False
    """Whether our own stdin, stdout and stderr are none of the command's."""
    user: str | None = None
    """USER[:GROUP], names or numbers of the guest; None for root."""
    account: User | None = None
    """Who that is, once it has been looked up."""
    own_init: bool = False
    """Whether the command is an init of the root's own, and PID 1."""
    stop_signal: str | int | None = None
    """What asks the command to end: a name, a number; None for SIGTERM, or what its init takes."""
    hostname: str = "tinyvmm"
    transport: str = "pci"
    """Where the virtio devices are: "pci", or "mmio"."""
    devices: Sequence[str] = ()
    """Devices of the user's own, each `package.module:Class[,key=value...]` (own_device.py)."""
    balloon: int | None = None
    """Have a balloon, of so many bytes at first; with 0, free memory returns to the host too."""
    net: "NetOptions | None" = None
    """The network interface; None for none."""
    keep_writes: str | None = None
    """Path of a link to make to what the guest writes, which then stays (scratch.py)."""
    publish: "Sequence[Published]" = ()
    """Ports of this computer's that lead to the guest's."""
    on_reboot: str = "exit"
    """What a reset by the guest does: "exit" ends the run, "reset" boots it anew."""
    vsock: tuple[str, int] | None = None
    """Path of the host's Unix socket to the guest's AF_VSOCK, and the guest's CID."""
    ioeventfd: bool | None = None
    """Whether virtio queues are served on devices' threads; None: as each device's class says."""


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


def run_command(
    options: RunOptions,
    warn: Callable[[str], None],
    supervisor: "Supervisor | None" = None,
    sinks: Mapping[str, Callable[[bytes], None]] | None = None,
    *,
    files: HostFiles | None = None,
    on_session: Callable[[Session], None] | None = None,
) -> Result:
    """Run `options.argv` in a new virtual machine and return how it ended.

    `warn` takes lines for the user, on any thread. `supervisor` then answers for the machine;
    `files` and `sinks` are as for `Session`, which `on_session` is given before it runs.
    ConfigError for what cannot be done.
    """
    with ExitStack() as cleanup:
        options = settle(options._replace(shared=arrange(options.shared)))
        _check_balloon(options)
        options = _with_packs(options)
        own_devices = load_devices(options.devices)
        disks = open_disks(options.disks, cleanup)
        kernel, modules = prepare_kernel(options.kernel, modules_for(options), options.root_mode)
        cleanup.callback(kernel.close)
        root, trees = _trees(options, warn, cleanup)
        served: list[tuple[str, Tree]] = [*trees, *_pack_trees(options, cleanup)]
        root_disks = _open_root_disks(options, warn, cleanup)
        terminal = _terminal(options)
        options = _with_stop_signal(_with_user(options, root), root)
        config = _init_config(options, modules, terminal, root_disks)
        if supervisor is not None:
            supervisor.stop_signal = int(options.stop_signal or signal.SIGTERM)
            supervisor.begin(_context(options, root, modules))
        initrd = [modules.archive, init_archive(config)]
        ends = _Ends(files, sinks or {}, on_session)
        timeout, begin = options.timeout, monotonic()
        while True:  # once, unless the guest reboots and is to
            turn = _Turn(
                options,
                served,
                disks,
                root_disks,
                own_devices,
                terminal,
                timeout,
                warn,
                supervisor,
                ends,
            )
            result = turn.run(kernel, initrd, lambda step: describe_step(config, step))
            if not (turn.rebooted and options.on_reboot == "reset"):
                return result
            if options.timeout is not None:
                timeout = max(0.0, options.timeout - (monotonic() - begin))


class _Ends(NamedTuple):
    """This side of the session; as for `run_command`."""

    files: HostFiles | None
    sinks: Mapping[str, Callable[[bytes], None]]
    on_session: Callable[[Session], None] | None


class _Turn:
    """One machine, from its making to its end; `rebooted` says that the guest wanted another."""

    def __init__(
        self,
        options: RunOptions,
        trees: "Sequence[tuple[str, Tree]]",
        disks: "list[RawDisk | Qcow2Image]",
        root_disks: "RootDisks | None",
        own_devices: "list[OwnDevice]",
        terminal: "Terminal | None",
        timeout: float | None,
        warn: Callable[[str], None],
        supervisor: "Supervisor | None",
        ends: _Ends,
    ) -> None:
        self._supervisor = supervisor
        self._ends = ends
        self._options = options
        self._warn = warn
        self._trees = trees
        self._disks = disks
        self._root_disks = root_disks
        self._own_devices = own_devices
        self._terminal = terminal
        self._timeout = timeout
        self._tail = _Tail(options.console)
        self._executor: Executor | None = None
        self._vsock_host: VsockHost | None = None
        self.rebooted = False

    def run(
        self,
        kernel: "Kernel",
        initrd: Sequence[bytes | memoryview],
        describe: Callable[[int], str],
    ) -> Result:
        """Make the machine, boot it, and relay the command's streams until the end."""
        with ExitStack() as cleanup:
            machine, ports, vsock = self._machine(cleanup)
            machine.boot_linux(kernel, initrd=initrd, cmdline=_cmdline(self._options))
            stdin, stdout, stderr, control = ports
            session = Session(
                Ports(
                    PortInput(stdin),
                    PortOutput(stdout),
                    PortOutput(stderr),
                    PortOutput(control),
                    PortInput(control),
                ),
                command="".join(self._options.argv[:1]),
                timeout=self._timeout,
                terminal=self._terminal,
                describe_step=describe,
                files=self._files(),
                sinks=self._ends.sinks,
                stops=_stops(self._options),
                on_record=self._on_record,
            )
            if self._ends.on_session is not None:
                self._ends.on_session(session)
            self._supervise(machine, session, vsock)
            machine.start()
            arguments = (machine, session, self._tail, self._options.own_init)
            watch = threading.Thread(target=_watch, args=arguments, daemon=True)
            watch.start()
            try:
                result = session.run()
            finally:
                if self._supervisor is not None:
                    self._supervisor.detach()
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
        if self._ends.files is not None:
            return self._ends.files
        if self._supervisor is None or not self._ends.sinks:
            return host_files()
        return HostFiles(self._supervisor.stdin, None, None)

    def _supervise(self, machine: Machine, session: Session, vsock: "VirtioVsock | None") -> None:
        host = self._vsock_host
        if self._supervisor is None or vsock is None or host is None:
            return
        from tinyvmm.inside.executor import Executor

        self._executor = Executor(session.send)
        self._supervisor.attach(machine, session, self._executor, self._tail.last, vsock, host)

    def _on_record(self, kind: int, value: int) -> None:
        if self._executor is not None and self._supervisor is not None:
            self._executor.on_record(kind, value)
            self._supervisor.on_record(kind, value)

    def _machine(
        self, cleanup: ExitStack
    ) -> "tuple[Machine, list[ConsolePort], VirtioVsock | None]":
        """Make the machine with its devices, until `cleanup`; the session's ports, the vsock."""
        options = self._options
        vsock_at = options.vsock
        if vsock_at is None and self._supervisor is not None:
            vsock_at = (self._supervisor.vsock_path, GUEST_CID)
        self._vsock_host = vsock_host = _open_vsock(vsock_at, cleanup)
        net = _open_net(options, self._warn, cleanup)
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
        add_devices(machine, self._own_devices)
        for tag, tree in self._trees:
            machine.add_virtio(Virtio9P(tag, FileSession(tree, name=tag)))
        add_disks(machine, options.disks, self._disks)
        _add_root_disks(machine, self._root_disks)
        vsock = None
        if vsock_at is not None and vsock_host is not None:
            vsock = _add_vsock(machine, vsock_host, vsock_at[1])
        if net is not None:
            _add_net(machine, net)
        return machine, ports, vsock


def prepare_kernel(
    wanted: str | None, names: Sequence[str] = MODULES, root: str = "9p"
) -> tuple["Kernel", ModuleArchive]:
    """Find, unpack and cache the kernel and its modules; the caller closes the kernel.

    `root` is the kind of root that the kernel has to serve for.
    """
    installed = kernels.find(wanted, root=root)
    kernel = load_kernel(installed.vmlinuz)
    if installed.modules is None:
        return kernel, ModuleArchive((), b"")  # then everything must be built in
    return kernel, module_archive(installed.modules, names, default_dir())


def modules_for(options: RunOptions) -> Sequence[str]:
    """Return the names of the kernel modules that the guest needs."""
    names: Sequence[str] = MODULES
    if options.root_mode == "erofs":
        from tinyvmm.roots.erofs_root import MODULES as EROFS_MODULES

        files = FILE_MODULES if options.shared else ()
        upper = DISK_MODULES if options.writes or options.private_writes == "server" else ()
        names = [name for name in MODULES if name not in FILE_MODULES]
        names += [*files, *EROFS_MODULES, *upper]
    elif options.private_writes == "guest":
        names = OVERLAY_MODULES
    balloon = () if options.balloon is None else ("virtio_balloon",)
    disks = DISK_MODULES if options.disks else ()
    net = () if options.net is None else NET_MODULES
    vsock = () if options.vsock is None else VSOCK_MODULES
    packs: Sequence[str] = ()
    if options.packs:
        from tinyvmm.roots import pack_mounts

        packs = pack_mounts.modules(options.packs)
    wanted = (f"virtio_{options.transport}", *names[1:], *balloon, *disks, *net, *vsock, *packs)
    return tuple(dict.fromkeys(wanted))


def settle(options: RunOptions) -> RunOptions:
    """Decide what was left open of the root; ConfigError for what does not go together."""
    mode = options.root_mode
    if mode not in ROOT_MODES:
        raise ConfigError(f"{mode!r} is no kind of root: give {' or '.join(ROOT_MODES)}")
    if mode == "auto":
        mode = "9p"
        given = options.kernel
        found = kernels.default() if given is None else kernels.look_up(given)
        if found and kernels.missing(found, "9p") and not kernels.missing(found, "erofs"):
            mode = "erofs"
    if mode == "erofs":
        from tinyvmm.roots.erofs_root import check_shared, upper_directory

        upper_directory(options.writes)
        if options.cache is not None:
            raise ConfigError("--cache is about 9P, and the root is none: leave out --cache")
        if options.shared:
            check_shared(kernels.find(options.kernel, root="erofs"))
    usual = "guest" if mode == "erofs" and not options.writes else "server"
    return options._replace(root_mode=mode, private_writes=options.private_writes or usual)


def check_options(options: RunOptions) -> Sequence[Shared]:
    """Raise ConfigError for directories and policies that cannot be; return what is shared."""
    shared = arrange(options.shared)
    options = settle(options)
    root_mounts(options.cache, options.private_writes)
    _check_balloon(options)
    load_devices(options.devices)
    _with_packs(options)
    _open_root(options, None).close()
    return shared


def _check_balloon(options: RunOptions) -> None:
    if options.balloon is not None and options.balloon >= options.memory:
        raise ConfigError(
            f"--balloon {options.balloon >> 20}M takes all of --memory {options.memory >> 20}M: "
            "give it less"
        )


def _with_packs(options: RunOptions) -> RunOptions:
    """Add the disks that packs are; ConfigError for packs that cannot be where they are to be."""
    if not options.packs:
        return options
    from tinyvmm.roots import pack_mounts

    pack_mounts.check(options.packs, options.writes)
    return options._replace(disks=(*options.disks, *pack_mounts.disks(options.packs)))


def _pack_trees(options: RunOptions, cleanup: ExitStack) -> "Sequence[tuple[str, Tree]]":
    """Open the packs that are served, with their mount tags, until `cleanup`."""
    if not options.packs:
        return ()
    from tinyvmm.roots import pack_mounts

    return pack_mounts.open_trees(options.packs, cleanup)


def _pack_mounts(options: RunOptions) -> "Sequence[Filesystem]":
    """How PID 1 joins packs with the root."""
    if not options.packs:
        return ()
    from tinyvmm.roots import pack_mounts

    own = len(options.disks) - len(pack_mounts.disks(options.packs))
    return pack_mounts.mounts(options.packs, own)


def load_devices(texts: Sequence[str]) -> "list[OwnDevice]":
    """Find the classes of the user's own devices; ConfigError for what is none."""
    if not texts:
        return []
    from tinyvmm import own_device

    return [own_device.load(text) for text in texts]


def add_devices(machine: Machine, devices: "Sequence[OwnDevice]") -> None:
    """Make the user's own devices and add them."""
    if not devices:
        return
    from tinyvmm import own_device

    for device in devices:
        own_device.add(device, machine)


def open_disks(disks: "Sequence[DiskOptions]", cleanup: ExitStack) -> "list[RawDisk | Qcow2Image]":
    """Open and lock every disk, until `cleanup`; ConfigError for what cannot be."""
    if not disks:
        return []
    from tinyvmm.disks.opening import open_disk

    opened = []
    for given in disks:
        disk = open_disk(given)
        cleanup.callback(disk.close)
        opened.append(disk)
    return opened


def add_disks(
    machine: Machine, given: "Sequence[DiskOptions]", opened: "Sequence[RawDisk | Qcow2Image]"
) -> None:
    """Add a device for each disk."""
    if not opened:
        return
    from tinyvmm.devices.virtio.blk import VirtioBlk

    for number, (options, disk) in enumerate(zip(given, opened, strict=True)):
        serial = f"disk{number}" if options.serial is None else options.serial
        machine.add_virtio(VirtioBlk(disk, serial=serial, queues=options.queues))


def _open_root(options: RunOptions, scratch: str | None) -> UnionTree:
    """Join the root's read and write trees; `scratch` takes writes that nothing keeps."""
    writes = list(options.writes)
    if options.private_writes == "guest" and options.writes:
        raise ConfigError(
            "--private-writes guest throws away what the guest writes, --write keeps it: "
            "leave one out"
        )
    if options.root_mode == "erofs":
        writes = []  # they are a disk's
    elif scratch is not None:
        writes.append(("/", scratch))
    return open_tree(options.reads, writes)


def _open_root_disks(
    options: RunOptions, warn: Callable[[str], None], cleanup: ExitStack
) -> "RootDisks | None":
    """Open the disks of a root of EROFS, until `cleanup`; None if it is another."""
    if options.root_mode != "erofs":
        return None
    from tinyvmm.roots.erofs_root import open_root

    return open_root(
        options.reads,
        options.writes,
        private_writes=options.private_writes or "guest",
        number=len(options.disks),
        warn=warn,
        cleanup=cleanup,
    )


def _add_root_disks(machine: Machine, root: "RootDisks | None") -> None:
    """Add a device for each disk of the root."""
    if root is None:
        return
    from tinyvmm.devices.virtio.blk import VirtioBlk
    from tinyvmm.roots.erofs_root import SERIAL, UPPER_SERIAL

    machine.add_virtio(VirtioBlk(root.image, serial=SERIAL))
    if root.upper is not None:
        machine.add_virtio(VirtioBlk(root.upper, serial=UPPER_SERIAL))


def _add_vsock(machine: Machine, host: "VsockHost", cid: int) -> "VirtioVsock":
    """Add a vsock device with `host` behind it."""
    from tinyvmm.devices.virtio.vsock import VirtioVsock

    device = VirtioVsock(cid, host)
    machine.add_virtio(device)

    def failed(error: BaseException) -> None:
        machine.stop(StopCause.ERROR, error)

    host.start(device, failed)
    return device


def _open_net(
    options: RunOptions, warn: Callable[[str], None], cleanup: ExitStack
) -> "tuple[VirtioNet, list[Pump]] | None":
    """Open what the network interface leads to, until `cleanup`; None if there is none."""
    if options.net is None:
        return None
    from tinyvmm.devices.virtio.net import VirtioNet
    from tinyvmm.net.options import open_backend, random_mac

    mac = options.net.mac or random_mac()
    backends = open_backend(options.net, mac, options.publish, warn, cleanup)
    device = VirtioNet(backends, mac, mtu=options.net.mtu)
    return device, [backend.pump for backend in backends]


def _add_net(machine: Machine, net: "tuple[VirtioNet, list[Pump]]") -> None:
    """Add a network interface, and begin to wait for frames."""
    device, pumps = net
    machine.add_virtio(device)

    def failed(error: BaseException) -> None:
        machine.stop(StopCause.ERROR, error)

    for pair, pump in zip(device.pairs, pumps, strict=True):
        pump.start(pair, failed)


def _open_vsock(given: tuple[str, int] | None, cleanup: ExitStack) -> "VsockHost | None":
    """Listen for the vsock device, until `cleanup`."""
    if given is None:
        return None
    from tinyvmm.vsock_host import VsockHost

    host = VsockHost(given[0])
    cleanup.callback(host.close)
    return host


def _trees(
    options: RunOptions, warn: Callable[[str], None], cleanup: ExitStack
) -> tuple[Tree, list[tuple[str, Tree]]]:
    """Open the root's tree, and all that is served, with its mount tag."""
    raise_nofile_limit()
    scratch = None
    over_9p = options.root_mode == "9p"
    if (
        over_9p
        and options.root is None
        and options.private_writes == "server"
        and all(guest != "/" for guest, _ in options.writes)
    ):
        directory = ScratchDirectory(kept_by=options.keep_writes)
        cleanup.callback(directory.close)
        scratch = directory.path

    def no_space(path: bytes) -> None:
        warn(f"no space left for the guest's writes: {os.fsdecode(path)} is full")

    trees: list[tuple[str, Tree]] = []

    def add(tag: str, tree: HostTree | UnionTree) -> None:
        cleanup.callback(tree.close)
        tree.on_no_space = no_space
        trees.append((tag, tree))

    root: Tree
    if options.root is not None:
        root = options.root
        trees.append((ROOT_TAG, root))
    else:
        root = opened = _open_root(options, scratch)
        if over_9p:
            add(ROOT_TAG, opened)
        else:
            cleanup.callback(opened.close)
    if options.on_access is not None and over_9p:
        from tinyvmm.fileserver.watched import WatchedTree

        trees[0] = (ROOT_TAG, WatchedTree(root, options.on_access))
    for number, shared in enumerate(options.shared):
        add(shared_tag(number), open_shared(shared))
    return root, trees


def _with_user(options: RunOptions, root: Tree) -> RunOptions:
    """Look up whom the command runs as; ConfigError if there is no such user."""
    if options.user is None:
        return options
    from tinyvmm.inside.guest_users import resolve

    account = resolve(options.user, root)
    env = list(options.env)
    if not any(entry.startswith("HOME=") for entry in env):
        env.append(f"HOME={account.home}")
    return options._replace(account=account.user, env=env)


def _with_stop_signal(options: RunOptions, root: Tree) -> RunOptions:
    """Find out the number of what asks the command to end; ConfigError if it is no signal."""
    if options.stop_signal is not None:
        from tinyvmm.methods.supervisor import signal_number

        return options._replace(stop_signal=signal_number(options.stop_signal))
    number = int(signal.SIGTERM)
    if options.own_init:
        from tinyvmm.own_init import stop_signal

        number = stop_signal(root, options.argv[0])
    return options._replace(stop_signal=number)


def _stops(options: RunOptions) -> Mapping[int, int]:
    """Return which signals of ours ask the command to end, and by which."""
    number = int(options.stop_signal or signal.SIGTERM)
    stops: dict[int, int] = {signal.SIGTERM: number, signal.SIGHUP: number}
    if options.own_init:  # to it, SIGINT is Ctrl-Alt-Delete
        stops[signal.SIGINT] = number
    return stops


def _context(options: RunOptions, root: Tree, inserted: ModuleArchive) -> "Context":
    """Return what a command of `exec` has in common with ours."""
    from tinyvmm.methods.supervisor import Context

    def modules(names: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        from tinyvmm.guest.modules import closure

        where = kernels.find(options.kernel, root=options.root_mode).modules
        if where is None:
            return ()  # then everything must be built in
        there = {os.path.basename(path).removesuffix(".ko") for path in inserted.paths}
        needed = closure(where, names)
        return [(module.name, module.read()) for module in needed if module.name not in there]

    return Context(options.env, options.cwd, root, modules)


def _init_config(
    options: RunOptions,
    modules: ModuleArchive,
    terminal: "Terminal | None",
    root_disks: "RootDisks | None",
) -> InitConfig:
    mounts = (
        root_disks.mounts() if root_disks else root_mounts(options.cache, options.private_writes)
    )
    path = dict(entry.split("=", 1) for entry in options.env).get("PATH", "/usr/bin:/bin")
    return InitConfig(
        commands=search_path(options.argv[0], path) if options.argv else (),
        argv=options.argv,
        env=options.env,
        cwd=options.cwd,
        modules=modules.paths,
        root=(*mounts, *_pack_mounts(options)),
        mounts=(
            *(Mkdir(path) for path in options.directories),
            *STANDARD_MOUNTS,
            *shared_mounts(options.shared),
        ),
        hostname=options.hostname,
        network=_network(options),
        terminal=_terminal_size(options, terminal),
        user=options.account,
        merged=options.merged,
        idle=not options.argv,
        own_init=options.own_init,
        # An init of the root's own shuts down as it likes.
        unsent_ms=0 if options.net is None or options.own_init else UNSENT_MS,
        # The end of the run is ours to make: on its way down Linux resets its devices, and what we
        # had not yet taken from their queues would be gone.
        await_goodbye=True,
    )


def _network(options: RunOptions) -> Network | None:
    """Return how PID 1 sets the interface up; None if there is none, or it is left alone."""
    net = options.net
    if net is None or net.address is None:
        return None
    return Network(net.address, net.gateway, net.nameservers)


def _cmdline(options: RunOptions) -> str:
    quiet = "" if options.console is not None else " quiet"
    # Linux looks for old chipsets' flaws by asking 256 buses, blindly: 35,000 exits.
    pci = " pci=noearly" if options.transport == "pci" else " pci=off"
    more = f" {options.append}" if options.append else ""
    return CMDLINE + pci + quiet + more


def _terminal_size(options: RunOptions, terminal: "Terminal | None") -> tuple[int, int] | None:
    if terminal is None:
        return (24, 80) if options.terminal else None  # until somebody attaches to it
    return terminal.size()


def _terminal(options: RunOptions) -> "Terminal | None":
    if not options.terminal or options.detached:
        return None
    from tinyvmm.terminal import Terminal, is_terminal_session

    return Terminal() if is_terminal_session() else None


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
