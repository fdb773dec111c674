"""What to run and in what machine: the options of one run, and the kernel modules they ask for."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tinyvmm.fileserver.tree import Tree
from tinyvmm.guest.init import VSOCK_MODULES
from tinyvmm.guest.relay import User
from tinyvmm.named import NamedTuple
from tinyvmm.roots.mounts import Shared

# What most runs have none of is imported where it is made: the lab pays dearly for each module.
if TYPE_CHECKING:
    from tinyvmm.disks.opening import DiskOptions
    from tinyvmm.fileserver.watched import Access
    from tinyvmm.net.options import NetOptions, Published
    from tinyvmm.roots.pack_mounts import PackMap


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
    vsock: tuple[str | None, int] | None = None
    """Path of the host's Unix socket to the guest's AF_VSOCK, and the guest's CID.

    No path: the host's kernel has it, by vhost.
    """
    ioeventfd: bool | None = None
    """Whether virtio queues are served on devices' threads; None: as each device's class says."""


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
