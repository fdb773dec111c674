"""`tinyvmm run`: a command in a virtual machine, with this computer's directories as its root."""

import argparse
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tinyvmm import options as shared_options
from tinyvmm.cli import image_options, instance, no_root, tracing
from tinyvmm.cli.values import parse_count, parse_environment, parse_seconds, warn
from tinyvmm.errors import ConfigError

if TYPE_CHECKING:
    from tinyvmm.disks.opening import DiskOptions
    from tinyvmm.net.options import NetOptions, Published
    from tinyvmm.roots.mounts import Shared
    from tinyvmm.roots.pack_mounts import PackMap

LAB_ALLOWANCE = 120.0  # seconds for the lab to come up
CONSOLE_PATIENCE = 5.0  # seconds that whoever reads the console may take for it

_EPILOG = """\
A MAP is [GUEST=]HOST: the host's directory HOST appears at GUEST, / by default. Several read
trees at one place are united, and later ones win; what the guest writes goes to the write tree,
or is thrown away where there is none. Maps whose GUEST is not / are seen on top of what is there.

A shared directory is the host's own, live on both sides: --shared [GUEST=]HOST[,ro][,cache=POLICY],
at the same path in the guest by default. POLICY says what the guest may remember of its files:
none or mmap (the default) nothing, so that each side sees the other's changes at once; loose (the
default with ro, and for the root) all it has seen, which is much quicker, but it may go on seeing
a file as it was when it first looked, until it forgets: echo 3 > /proc/sys/vm/drop_caches.

An IMAGE is PATH[,OPTION]...: a raw image, a block device of this computer or, with format=qcow2, a
qcow2 image, which the guest sees as /dev/vda, the next as /dev/vdb; ext4 is there to mount it with.
What it writes goes to the image, with overlay=FILE to that file, with ephemeral nowhere; with ro it
cannot. Also serial=ID and queues=N. A comma that begins no option is part of the path.

--private-writes says where writes go that nothing keeps: to a temporary directory here (server),
or to the guest's RAM (guest), which is quicker, up to half of --memory.

--root-mode says how the root gets there: over 9P, or as a disk (erofs) that is made of the read
trees while it is read. The disk needs no 9P in the kernel and is quicker where there are many
files, but does not see what changes here: a file that changed gives an error. What is written to it
goes to the guest's RAM, with --private-writes server to a disk, and with --write DIR to the disk
DIR/upper.ext4, which keeps it. auto is 9p where the kernel has it.

Ctrl-C interrupts the command, and a second one ends the machine; on a terminal, typing Ctrl-]
three times does.

exit status: the command's; 128+N if signal N killed it; 124 after --timeout; 125 if the machine
could not be made; 126 and 127 if the command could not be executed or found; 255 if the guest
crashed.

examples:
  tinyvmm run -- uname -a
  tinyvmm run --memory 2G --write ./out -- make -C /usr/src/hello
  tinyvmm run --read / --read /data=/srv/set1 --write /data=./new -- ls /data
  tinyvmm run --shared . --shared /models=/srv/models,ro -- make
  tinyvmm run --image debian:stable-slim -- cat /etc/os-release
"""


def parse_size(text: str) -> int:
    """Parse `512M`, `2G`, `1048576`: bytes, in units of 1024. Sizes of RAM are whole MiB."""
    try:
        return shared_options.parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_balloon(text: str) -> int:
    """Parse the size of a balloon: as of RAM, or 0."""
    return 0 if text == "0" else parse_size(text)


def parse_map(text: str) -> tuple[str, str]:
    """Parse `[GUEST=]HOST`, or novm's `GUEST=>HOST`, into (guest path, absolute host path)."""
    guest, equals, host = text.partition("=")
    if not equals or not guest.startswith("/"):
        guest, host = "/", text
    host = host.removeprefix(">")
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} names no host directory")
    return os.path.normpath(guest).replace("//", "/"), os.path.abspath(host)


def parse_shared(text: str) -> "Shared":
    """Parse `[GUEST=]HOST[,ro][,cache=POLICY]`. Other commas are part of the directory's name."""
    from tinyvmm.roots.mounts import Shared

    rest, readonly, cache = text, False, None
    while True:
        head, _, option = rest.rpartition(",")
        if option in {"ro", "rw"}:
            readonly = option == "ro"
        elif option.startswith("cache="):
            cache = option.removeprefix("cache=")
        else:
            break
        rest = head
    guest, equals, host = rest.partition("=")
    if not equals:
        host = rest
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} names no host directory")
    host = os.path.abspath(host)
    return Shared(guest if equals else host, host, readonly, cache)


def parse_disk(text: str) -> "DiskOptions":
    """Parse `PATH[,OPTION]...`, as disks/opening.py says; the path is made absolute."""
    from tinyvmm.disks import opening

    try:
        options = opening.parse_disk(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    overlay = None if options.overlay is None else os.path.abspath(options.overlay)
    return options._replace(path=os.path.abspath(options.path), overlay=overlay)


def parse_pack(text: str) -> "PackMap":
    """Parse `[GUEST=]NAME`, a pack of the store or of a file."""
    from tinyvmm.roots import pack_mounts

    try:
        return pack_mounts.parse_pack(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_vsock(text: str) -> tuple[str | None, int]:
    """Parse `PATH[,cid=N]` into (absolute path, or None for `vhost`; the guest's CID)."""
    from tinyvmm.devices.virtio.vsock_device import CID_MAX, CID_MIN

    path, comma, number = text.rpartition(",cid=")
    if not comma:
        path, number = text, str(CID_MIN)
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r} names no socket")
    if path.startswith("vhost,"):
        raise argparse.ArgumentTypeError(f"{text!r}: give vhost or vhost,cid=N; ./vhost is a path")
    if not number.isascii() or not number.isdigit() or not CID_MIN <= int(number) <= CID_MAX:
        raise argparse.ArgumentTypeError(f"{text!r}: give a CID of {CID_MIN} to {CID_MAX}")
    return None if path == "vhost" else os.path.abspath(path), int(number)


def parse_net(text: str) -> "NetOptions | None":
    """Parse `none`, `user` or `tap`, with options as net/options.py says."""
    from tinyvmm.net import options

    try:
        return options.parse_net(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--net ")) from None


def parse_publish(text: str) -> "Published":
    """Parse `[ADDRESS:]HOST:GUEST[/udp]`."""
    from tinyvmm.net import options

    try:
        return options.parse_publish(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--publish ")) from None


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "run",
        help="run a command in a virtual machine",
        usage="tinyvmm run [OPTION]... -- CMD [ARG]...",
        description="Run a command in a virtual machine whose root is this computer's directories.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main)
    add = parser.add_argument
    add("--memory", type=parse_size, default=1 << 30, metavar="SIZE", help="RAM (default 1G)")
    add("--cpus", type=parse_count, default=1, metavar="N", help="vCPUs (default 1)")
    add(
        "--read",
        type=parse_map,
        action="append",
        default=[],
        metavar="MAP",
        help="a read-only tree of the root (default /)",
    )
    add(
        "--write",
        type=parse_map,
        action="append",
        default=[],
        metavar="MAP",
        help="a directory that keeps what the guest writes",
    )
    add(
        "--shared",
        type=parse_shared,
        action="append",
        default=[],
        metavar="DIR",
        help="a directory of the host, live on both sides",
    )
    add(
        "--disk",
        type=parse_disk,
        action="append",
        default=[],
        metavar="IMAGE",
        help="a disk image, /dev/vda in the guest",
    )
    add(
        "--pack",
        type=parse_pack,
        action="append",
        default=[],
        metavar="[GUEST=]NAME",
        help="a pack (tinyvmm pack create) as one more read-only tree of the root",
    )
    add("--cache", metavar="POLICY", help="what the guest remembers of the root (default loose)")
    add(
        "--private-writes",
        metavar="WHERE",
        help="where writes go that nothing keeps: server or guest (default server)",
    )
    add(
        "--root-mode",
        choices=("auto", "9p", "erofs"),
        default="auto",
        help="how the root gets there: over 9P, or as a disk made of the directories",
    )
    add(
        "--env",
        type=parse_environment,
        action="append",
        default=[],
        metavar="K[=V]",
        help="a variable of the command's environment",
    )
    add("--kernel", metavar="PATH|VERSION", help="which kernel to boot (default: the newest)")
    add("--append", default="", metavar="ARGS", help="more of the kernel's command line")
    add("--timeout", type=parse_seconds, metavar="S", help="end it after S seconds, status 124")
    add("--console", metavar="FILE|-", help="the kernel's own console, to FILE or stderr")
    add("--transport", choices=("pci", "mmio"), default="pci", help="of virtio (default pci)")
    add(
        "--balloon",
        type=parse_balloon,
        metavar="SIZE",
        help="give memory the guest frees back to this computer, and SIZE (or 0) from the start",
    )
    add(
        "--device",
        action="append",
        default=[],
        metavar="MODULE:CLASS[,K=V]",
        help="a device of your own: a Python class, found from here (the guide's chapter 7)",
    )
    add(
        "--net",
        type=parse_net,
        nargs="?",
        const="user",
        metavar="KIND",
        help="a network interface: user (so is --net alone), "
        "tap=NAME[,address=A/P][,gateway=G][,dns=D][,queues=N] or none",
    )
    add(
        "--publish",
        type=parse_publish,
        action="append",
        default=[],
        metavar="[ADDRESS:]HOST:GUEST[/udp]",
        help="with --net user: a port of this computer that leads to one of the guest's",
    )
    add(
        "--vsock",
        type=parse_vsock,
        metavar="PATH|vhost[,cid=N]",
        help="a Unix socket that leads to the guest's AF_VSOCK, and PATH_N what leads from it; or "
        "vhost: this computer's own AF_VSOCK, where the guest is CID N (3)",
    )
    add(
        "--ioeventfd",
        choices=("auto", "on", "off"),
        default="auto",
        help="serve virtio queues on threads of the devices', or on the vCPUs' (default auto)",
    )
    image_options.add_options(parser)
    instance.add_options(parser)
    no_root.add_options(parser)
    tracing.add_options(parser)
    add(
        "--no-lab",
        action="store_true",
        help="refuse, rather than use the lab, where this KVM cannot run Linux",
    )
    add("argv", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # the -- may be left out


def open_console(where: str | None) -> Callable[[bytes], None] | None:
    """Return the sink for `--console`; ConfigError if the file cannot be written.

    From the first failure on (a full disk, say) what comes is dropped: the guest goes on. A pipe
    that nobody reads holds it up for CONSOLE_PATIENCE, and then drops until somebody does.
    """
    if where is None:
        return None
    if where == "-":
        fd = 2
    else:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            fd = os.open(where, flags, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write the console to {where}: {error.strerror}") from None
    import select
    import threading

    failed = stalled = told = False
    regular = fd != 2 and stat.S_ISREG(os.fstat(fd).st_mode)  # which has no reader to wait for
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    lock = threading.Lock()  # one vCPU at a time, or another may take the room that was found

    def write(data: bytes) -> None:
        nonlocal failed, stalled, told
        why = None
        with lock:
            while data and not failed:
                # Whoever waits in write(2) cannot be told to stop; a pipe that has room has it for
                # this much.
                if not regular and not poller.poll(0 if stalled else 1000 * CONSOLE_PATIENCE):
                    why = None if told else "nobody reads it: what comes meanwhile is lost"
                    stalled = told = True
                    break
                stalled = False
                try:
                    data = data[os.write(fd, data[: select.PIPE_BUF]) :]
                except OSError as error:
                    failed = True
                    why = f"{error.strerror}; the rest is lost"
        if why and fd != 2:
            warn(f"cannot write the console to {where}: {why}")

    return write


def main(args: argparse.Namespace) -> int:
    """Run it: here if this KVM can, else in the lab."""
    if args.no_root:
        return no_root.main(args)
    no_root.check_unused(args)
    argv = args.argv + args.guest_argv
    if args.stop_signal is not None:
        from tinyvmm.methods.supervisor import signal_number

        signal_number(args.stop_signal)  # what is none shows here, not in a lab
    if args.init:
        argv = argv or ["/sbin/init"]
        if args.user is not None:
            raise ConfigError("--user: an init is root's; leave it out, or --init")
    if not argv and not image_options.given(args):
        raise ConfigError("no command: give one behind --, e.g. tinyvmm run -- uname -a")
    if args.publish:
        from tinyvmm.net.options import check_kind

        check_kind(args.net)
    from tinyvmm.lab.probe import missing_for_linux

    problem = missing_for_linux()
    with ExitStack() as cleanup:
        root = image_options.root(args, argv, cleanup)
        return _run(args, root) if problem is None else run_in_lab(args, root, problem)


def _run(args: argparse.Namespace, root: image_options.Root) -> int:
    """Run it here."""
    from tinyvmm.command.options import RunOptions
    from tinyvmm.terminal import is_terminal_session

    tracing.start(args.trace, args.trace_file)

    options = RunOptions(
        argv=root.argv,
        memory=args.memory,
        cpus=args.cpus,
        reads=root.reads,
        directories=root.directories,
        writes=args.write,
        shared=args.shared,
        disks=args.disk,
        packs=args.pack,
        cache=args.cache,
        root_mode=args.root_mode,
        private_writes=args.private_writes,
        env=root.env,
        cwd=root.cwd,
        kernel=args.kernel,
        append=args.append,
        timeout=args.timeout,
        console=open_console(args.console),
        terminal=args.tty or (not args.detach and is_terminal_session()),
        detached=args.detach,
        user=None if args.init else root.user,
        own_init=args.init,
        stop_signal=root.stop_signal if args.stop_signal is None else args.stop_signal,
        hostname=args.hostname,
        transport=args.transport,
        balloon=args.balloon,
        devices=args.device,
        net=args.net,
        publish=args.publish,
        on_reboot=args.on_reboot,
        vsock=args.vsock,
        ioeventfd={"on": True, "off": False}.get(args.ioeventfd),
    )
    return instance.run(args, options, warn)


def run_in_lab(args: argparse.Namespace, root: image_options.Root, problem: str) -> int:
    """Do the same in the lab, where KVM is a hardware one; say so first."""
    if args.no_lab:
        raise ConfigError(
            f"this KVM cannot run Linux: {problem}; leave out --no-lab to use the lab"
        )
    from tinyvmm.command.checks import check_options, settle
    from tinyvmm.command.options import RunOptions, modules_for
    from tinyvmm.command.parts import open_disks
    from tinyvmm.command.run import prepare_kernel

    if args.net is not None:
        raise ConfigError(
            f"--net: this KVM cannot run Linux ({problem}), and the lab has no network; use a "
            "computer with a KVM of its own"
        )
    if args.detach:
        raise ConfigError(
            f"--detach: this KVM cannot run Linux ({problem}), and the lab ends with its command; "
            "use a computer with a KVM of its own"
        )
    if args.vsock is not None:
        raise ConfigError(
            f"--vsock: this KVM cannot run Linux ({problem}), and sockets of the lab cannot be "
            "reached from here; use a computer with a KVM of its own"
        )
    from tinyvmm.lab.lab import reexec
    from tinyvmm.lab.qemu import find_program

    try:
        find_program()
    except ConfigError as error:
        raise ConfigError(
            f"this KVM cannot run Linux ({problem}), and for the lab {error}"
        ) from None
    options = RunOptions(
        argv=root.argv,
        reads=root.reads,
        writes=args.write,
        shared=args.shared,
        disks=args.disk,
        packs=args.pack,
        cache=args.cache,
        root_mode=args.root_mode,
        private_writes=args.private_writes,
        memory=args.memory,
        balloon=args.balloon,
        devices=args.device,
        kernel=args.kernel,
        append=args.append,
        transport=args.transport,
    )
    shared = check_options(options)  # what is wrong with a map shows here
    for disk in args.disk:
        if stat.S_ISBLK(os.stat(disk.path).st_mode if os.path.exists(disk.path) else 0):
            raise ConfigError(
                f"disk {disk.path} is a block device, which the lab cannot reach: copy it to a file"
            )
    # What is fetched, unpacked and cached here need not be there, where everything is slow.
    options = settle(options)
    prepare_kernel(args.kernel, modules_for(options), options.root_mode)[0].close()
    if options.root_mode == "erofs" and options.writes:
        from tinyvmm.roots.erofs_root import open_upper

        open_upper(options.writes[0][1]).close()  # made here, where it is quick
    shares = [host for _, host in args.write]
    # The lab has all of / for reading; but what changes there it need not see.
    shares += [item.host for item in shared if item.host != "/" or not item.readonly]
    for path in (args.console, args.trace_file, *[disk.written for disk in args.disk]):
        if path not in {None, "-"}:
            shares.append(os.path.dirname(os.path.realpath(path)))
    warn(f"this KVM cannot run Linux ({problem}): running in the lab, which takes a while")
    own = [args.own_argv[0], "--no-lab", *root.inner_options, *args.own_argv[1:]]
    # The limit is kept in there; out here only a lab that hangs is in question.
    limit = None if args.timeout is None else args.timeout + LAB_ALLOWANCE
    command = [*own, "--", *args.guest_argv]
    with ExitStack() as cleanup:
        # Locked out here, because in there nobody else's locks show.
        open_disks(options.disks, cleanup)
        return reexec(command, shares=list(dict.fromkeys(shares)), timeout=limit)
