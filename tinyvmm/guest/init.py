"""PID 1: the first program of a guest, made here at run time and needing nothing from its root.

`InitConfig` says what a guest shall do; `build_init` turns it into a static executable for the
initramfs. That program

1. mounts /dev, inserts the kernel modules and opens its four ports to the host;
2. mounts the root, moves into it, and mounts there what every program expects (/proc, /dev/pts...);
3. starts the command on pipes or on a terminal, and carries bytes between those and the ports;
4. when the command ends, ends every other process, waits for TCP to send what they wrote if there
   is a network, reports, and powers the machine off.

Where the command is the root's own init (`own_init`), that becomes PID 1 and step 3 is done by a
child of it, for as long as it lets it live; the machine ends when that init powers it off.

How to read it: parts 1 and 2 are a table, `setup_steps`: one `Step` is one system call (steps.py).
A step that fails ends the guest and tells the host its index, which `describe_step` puts into
words. Parts 3 and 4 are loops, in relay.py, but for that wait, in unsent.py; what is said to the
host is in protocol.py, and how in report.py. Meanwhile the host may send programs to start beside
the command: programs.py.

Strings are str (surrogateescape) as from os.fsdecode. The host's half is session.py.
"""

import errno
import struct
from collections.abc import Sequence
from typing import TypeAlias

from tinyvmm.errors import ConfigError
from tinyvmm.guest import abi, relay
from tinyvmm.guest.asm import qword, rsp
from tinyvmm.guest.elf import Program
from tinyvmm.guest.steps import ANYTHING, Step, Value, birth_steps, check_command, emit_step
from tinyvmm.named import NamedTuple

NEW_ROOT = "/newroot"  # where the initramfs mounts what becomes the root


class Mount(NamedTuple):
    """mount(2); the target directory is made if it is missing."""

    source: str
    target: str
    fstype: str
    flags: int = 0
    data: str = ""
    required: bool = True


class Mkdir(NamedTuple):
    """mkdir(2); it is fine if there is something by that name."""

    path: str
    mode: int = 0o755


class Symlink(NamedTuple):
    """symlink(2); it is fine if there is something by that name."""

    target: str
    path: str


Filesystem: TypeAlias = Mount | Mkdir | Symlink

ROOT_TAG = "root"
MSIZE = 512_000  # as much as Linux's virtio transport takes (net/9p/trans_virtio.c, .maxsize)


def v9fs_options(cache: str) -> str:
    """Return the mount options of a 9P tree; `cache` is v9fs's policy (mounts.py says which)."""
    return f"trans=virtio,version=9p2000.L,msize={MSIZE},cache={cache}"


VSOCK_MODULES = ("vmw_vsock_virtio_transport",)
"""The kernel modules that connect to the host take."""

ROOT_9P_OPTIONS = v9fs_options("loose")
ROOT_OVER_9P = (Mount(ROOT_TAG, NEW_ROOT, "9p", data=ROOT_9P_OPTIONS),)


SCRATCH = "/scratch"
SCRATCH_IN_RAM = Mount("tmpfs", SCRATCH, "tmpfs", data="size=50%,mode=0755")
"""Half of the RAM at most: the other half is for programs."""


def disk_name(number: int) -> str:
    """Return what Linux calls the virtio disk of that number: vda to vdz, vdaa... (sd_format)."""
    name = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, 26)
        name = chr(ord("a") + letter) + name
    return "vd" + name


def lower_9p(tag: str, options: str) -> Mount:
    """Return how to mount the 9P tree `tag` read-only, as what `overlay_root` lays over."""
    return Mount(tag, "/lower", "9p", abi.MS_RDONLY, options)


def overlay_root(
    lower: Mount, scratch: Mount = SCRATCH_IN_RAM, over: Sequence[str] = ()
) -> tuple[Filesystem, ...]:
    """Return how to mount `lower`, which is only read, as the root; `scratch` takes all writes.

    `over` are directories that lie between the two, the uppermost first.
    """
    # With redirect_dir a directory from below can be renamed; without, that is EXDEV.
    upper, work = f"{SCRATCH}/upper", f"{SCRATCH}/work"
    below = ":".join([*over, lower.target])
    layers = f"lowerdir={below},upperdir={upper},workdir={work},redirect_dir=on"
    return (
        lower,
        scratch,
        Mkdir(upper),
        Mkdir(work),
        Mount("overlay", NEW_ROOT, "overlay", data=layers),
    )


_NOTHING_SPECIAL = abi.MS_NOSUID | abi.MS_NODEV | abi.MS_NOEXEC
STANDARD_MOUNTS: tuple[Filesystem, ...] = (
    Mount("proc", "/proc", "proc", _NOTHING_SPECIAL),
    Mount("sysfs", "/sys", "sysfs", _NOTHING_SPECIAL, required=False),
    Mount("devtmpfs", "/dev", "devtmpfs", abi.MS_NOSUID, "mode=0755"),
    Mount(
        "devpts",
        "/dev/pts",
        "devpts",
        abi.MS_NOSUID | abi.MS_NOEXEC,
        "newinstance,gid=5,mode=0620,ptmxmode=0666",
    ),
    Mount("tmpfs", "/dev/shm", "tmpfs", abi.MS_NOSUID | abi.MS_NODEV, "mode=1777", required=False),
    Mount("tmpfs", "/run", "tmpfs", abi.MS_NOSUID | abi.MS_NODEV, "mode=0755", required=False),
    Symlink("/proc/self/fd", "/dev/fd"),
    Symlink("/proc/self/fd/0", "/dev/stdin"),
    Symlink("/proc/self/fd/1", "/dev/stdout"),
    Symlink("/proc/self/fd/2", "/dev/stderr"),
)


class Network(NamedTuple):
    """How the guest's network interface is set up, IPv4."""

    address: str
    """`192.0.2.15/24`"""
    gateway: str | None = None
    nameservers: Sequence[str] = ()
    interface: str = "eth0"


class InitConfig(NamedTuple):
    """What one guest does. Every default is that of `tinyvmm run`."""

    commands: Sequence[str]
    """Paths to try with execve, in order: from `search_path`."""
    argv: Sequence[str]
    env: Sequence[str] = ()
    """`NAME=VALUE` each."""
    cwd: str = "/"
    """Where the command starts; / if there is no such directory."""
    modules: Sequence[str] = ()
    """Kernel modules: paths in the initramfs, in the order to insert them.

    Each may have parameters behind a space: `/kvm.ko tsc_tolerance_ppm=250`.
    """
    root: Sequence[Filesystem] = ROOT_OVER_9P
    """What to mount in the initramfs so that the root is at `NEW_ROOT`."""
    mounts: Sequence[Filesystem] = STANDARD_MOUNTS
    """What to mount and make inside the new root."""
    hostname: str = "tinyvmm"
    network: Network | None = None
    """None to leave every interface but lo alone."""
    terminal: tuple[int, int] | None = None
    """Rows and columns of the command's terminal, or None to start it on three pipes."""
    console: int = 0
    """I of /dev/vport<I>p1 to 4: the index of the ports' device among the virtio devices."""
    user: relay.User | None = None
    """None for root, as PID 1 is."""
    merged: bool = False
    """Whether the command's stderr is its stdout."""
    idle: bool = False
    """No command at all: the guest waits for what it is sent (execution.py), or a signal."""
    umask: int = 0o022
    sync: bool = True
    """Write dirty data back before reporting the end."""
    own_init: bool = False
    """Whether the command is an init of the root's own: it becomes PID 1, and we its child."""
    unsent_ms: int = 0
    """How long to wait, at the end, for TCP's peers to acknowledge what they were sent; 0: not."""
    await_goodbye: bool = False
    """Power off only when the host says GOODBYE or closes the control port."""
    port_prefix: str | None = None
    """Paths of the ports without their number, where they are not the console's."""


def search_path(command: str, path: str) -> tuple[str, ...]:
    """Where execvp would look for `command` given $PATH: the candidates for `commands`."""
    if "/" in command or not command:
        return (command,)
    return tuple(f"{directory or '.'}/{command}" for directory in path.split(":"))


def upper_directories(root: Sequence[Filesystem]) -> list[str]:
    """Return the upper directories of the overlays among what is mounted."""
    options = [
        item.data.split(",")
        for item in root
        if isinstance(item, Mount) and item.fstype == "overlay"
    ]
    return [
        option.removeprefix("upperdir=")
        for found in options
        for option in found
        if option.startswith("upperdir=")
    ]


# --- the table -----------------------------------------------------------------------------
def setup_steps(config: InitConfig) -> tuple[Step, ...]:
    """Every step from the first instruction to the command's birth; vfork is the last."""
    return (*_steps_to_the_host(config), *_steps_to_the_command(config))


def describe_step(config: InitConfig, index: int) -> str:
    """What step `index` of SETUP_FAILED tried to do, in words."""
    steps = setup_steps(config)
    return steps[index].says if 0 <= index < len(steps) else f"step {index}"


def _steps_to_the_host(config: InitConfig) -> list[Step]:
    """From nothing to open ports: /dev, descriptors 0 to 2, modules, ports."""
    steps: list[Step] = []
    if config.port_prefix is None:
        steps += _filesystem(Mount("devtmpfs", "/dev", "devtmpfs"))
    # The kernel could not open /dev/console for us if the board has none: 0, 1 and 2 are filled
    # here, so that no descriptor below can be one of them.
    flags = abi.O_RDWR | abi.O_CLOEXEC
    steps.append(Step("open /dev/null", abi.SYS_OPEN, ("/dev/null", flags), into="null"))
    null = Value("null")
    steps += [Step(f"make it descriptor {fd}", abi.SYS_DUP2, (null, fd)) for fd in range(3)]
    for module in config.modules:
        path, _, parameters = module.partition(" ")
        flags = abi.O_RDONLY | abi.O_CLOEXEC
        steps += [
            Step(f"open {path}", abi.SYS_OPEN, (path, flags), into="module"),
            Step(
                f"insert the kernel module {path}",
                abi.SYS_FINIT_MODULE,
                (Value("module"), parameters, 0),
                tolerates=(errno.EEXIST,),
            ),
            Step(f"close {path}", abi.SYS_CLOSE, (Value("module"),)),
        ]
    prefix = config.port_prefix or f"/dev/vport{config.console}p"
    for number, name, mode in (
        (4, "control", abi.O_RDWR),
        (1, "stdin port", abi.O_RDONLY),
        (2, "stdout port", abi.O_WRONLY),
        (3, "stderr port", abi.O_WRONLY),
    ):
        flags = mode | abi.O_NONBLOCK | abi.O_CLOEXEC | abi.O_NOCTTY
        says = f"open {prefix}{number} ({name})"
        path = f"{prefix}{number}"
        steps.append(Step(says, abi.SYS_OPEN, (path, flags), into=name, patience_ms=30_000))
    return steps


def _steps_to_the_command(config: InitConfig) -> list[Step]:
    """From open ports to the command: root, mounts, name, loopback, signals, pipes, vfork."""
    steps: list[Step] = []
    for filesystem in config.root:
        steps += _filesystem(filesystem)
    for number, upper in enumerate(upper_directories(config.root)):
        # No path will lead there, but /proc/1/fd: guest_writes.py looks at what is written.
        flags = abi.O_RDONLY | abi.O_DIRECTORY | abi.O_CLOEXEC
        steps.append(Step(f"open {upper}", abi.SYS_OPEN, (upper, flags), into=f"upper {number}"))
    if config.root:
        steps += [
            Step("enter the new root", abi.SYS_CHDIR, (NEW_ROOT,)),
            Step("move the root", abi.SYS_MOUNT, (".", "/", 0, abi.MS_MOVE, 0)),
            Step("change root", abi.SYS_CHROOT, (".",)),
            Step("change to /", abi.SYS_CHDIR, ("/",)),
        ]
    for filesystem in config.mounts:
        steps += _filesystem(filesystem)
    hostname = config.hostname.encode()
    lo_up = struct.pack("16sH22x", b"lo", abi.IFF_UP | abi.IFF_RUNNING)  # struct ifreq
    open_files = struct.pack("<QQ", 1 << 10, 1 << 20)  # struct rlimit64: soft, hard
    steps += [
        Step("set the host name", abi.SYS_SETHOSTNAME, (hostname, len(hostname))),
        Step(
            "make a socket for lo",
            abi.SYS_SOCKET,
            (abi.AF_INET, abi.SOCK_DGRAM | abi.SOCK_CLOEXEC, 0),
            into="socket",
            tolerates=ANYTHING,  # a kernel without a network has no lo either
        ),
        Step(
            "bring lo up",
            abi.SYS_IOCTL,
            (Value("socket"), abi.SIOCSIFFLAGS, lo_up),
            tolerates=ANYTHING,
        ),
        *(_network_steps(config.network) if config.network else ()),
        Step("close the socket", abi.SYS_CLOSE, (Value("socket"),), tolerates=ANYTHING),
        Step("set the umask", abi.SYS_UMASK, (config.umask,)),
        Step(
            "limit open files",
            abi.SYS_PRLIMIT64,
            (0, abi.RLIMIT_NOFILE, open_files, 0),
            tolerates=(errno.EPERM,),  # fs.nr_open is below that: the kernel's own limits stand
        ),
        *birth_steps(config.terminal, idle=config.idle, own_init=config.own_init),
    ]
    return steps


RESOLV_CONF = "/run/tinyvmm-resolv.conf"


def _network_steps(network: Network) -> list[Step]:
    """Address, netmask, up, and a default route: netdevice(7), <linux/route.h>."""
    from ipaddress import IPv4Interface

    given = IPv4Interface(network.address)
    name = network.interface.encode()

    def internet(address: bytes) -> bytes:  # struct sockaddr_in
        return struct.pack("<HH4s8x", abi.AF_INET, 0, address)

    def request(address: bytes) -> bytes:  # struct ifreq
        return struct.pack("16s16s8x", name, internet(address))

    up = struct.pack("16sH22x", name, abi.IFF_UP | abi.IFF_RUNNING)
    what = network.interface
    calls: list[tuple[str, int, bytes]] = [
        (f"give {what} its address", abi.SIOCSIFADDR, request(given.ip.packed)),
        (f"give {what} its netmask", abi.SIOCSIFNETMASK, request(given.netmask.packed)),
        (f"bring {what} up", abi.SIOCSIFFLAGS, up),
    ]
    if network.gateway is not None:
        from ipaddress import IPv4Address

        anywhere = internet(bytes(4))
        route = struct.pack(  # struct rtentry: dst, gateway, genmask, flags
            "<8x16s16s16sH62x",
            anywhere,
            internet(IPv4Address(network.gateway).packed),
            anywhere,
            abi.RTF_UP | abi.RTF_GATEWAY,
        )
        calls.append(("set the default route", abi.SIOCADDRT, route))
    steps = [Step(says, abi.SYS_IOCTL, (Value("socket"), call, data)) for says, call, data in calls]
    if network.nameservers:
        text = "".join(f"nameserver {server}\n" for server in network.nameservers).encode()
        flags = abi.O_WRONLY | abi.O_CREAT | abi.O_TRUNC | abi.O_CLOEXEC
        steps += [
            Step(f"make {RESOLV_CONF}", abi.SYS_OPEN, (RESOLV_CONF, flags, 0o644), into="file"),
            Step(f"write {RESOLV_CONF}", abi.SYS_WRITE, (Value("file"), text, len(text))),
            Step(f"close {RESOLV_CONF}", abi.SYS_CLOSE, (Value("file"),)),
            Step(  # over the host's, which stays as it is; a root without one needs none
                "bind it to /etc/resolv.conf",
                abi.SYS_MOUNT,
                (RESOLV_CONF, "/etc/resolv.conf", 0, abi.MS_BIND, 0),
                tolerates=ANYTHING,
            ),
        ]
    return steps


def _filesystem(item: Filesystem) -> list[Step]:
    match item:
        case Mkdir(path, mode):
            return [Step(f"make {path}", abi.SYS_MKDIR, (path, mode), tolerates=(errno.EEXIST,))]
        case Symlink(target, path):
            says = f"link {path} to {target}"
            return [Step(says, abi.SYS_SYMLINK, (target, path), tolerates=(errno.EEXIST,))]
        case Mount(source, target, fstype, flags, data, required):
            return [
                Step(f"make {target}", abi.SYS_MKDIR, (target, 0o755), tolerates=ANYTHING),
                Step(
                    f"mount {source} ({fstype}) on {target}",
                    abi.SYS_MOUNT,
                    (source, target, fstype, flags, data),
                    tolerates=() if required else ANYTHING,
                    patience_ms=5_000 if fstype == "9p" or source.startswith("/dev/") else 0,
                ),
            ]


# --- the program ---------------------------------------------------------------------------
def build_init(config: InitConfig) -> bytes:
    """The executable. Raises ConfigError for what can't be passed to a program."""
    env = (*config.env, config.hostname)
    check_command(config.commands, config.argv, env, config.cwd, idle=config.idle)
    if len(config.hostname.encode()) > 64:
        raise ConfigError(f"host name {config.hostname!r} is longer than 64 bytes; shorten it")
    p = Program()
    early, late = _steps_to_the_host(config), _steps_to_the_command(config)
    for name in sorted({step.into for step in early + late if step.into}):
        p.variable(name)
    p.label("_start")
    if config.own_init:
        p.mov(qword[p.variable("initial stack")], rsp)
    p.mov(qword["control"], -1)
    for index, step in enumerate(early):
        emit_step(p, index, step)
    p.call("await host")
    for index, step in enumerate(late, start=len(early)):
        emit_step(p, index, step)
    relay.emit(
        p,
        relay.Command(
            paths=config.commands,
            argv=config.argv,
            env=config.env,
            cwd=config.cwd,
            terminal=config.terminal is not None,
            user=config.user,
            merged=config.merged,
            idle=config.idle,
            own_init=config.own_init,
            sync=config.sync,
            unsent_ms=config.unsent_ms,
            await_goodbye=config.await_goodbye,
        ),
    )
    return p.link()
