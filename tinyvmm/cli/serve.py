"""`tinyvmm serve`: directories of this computer for other 9P clients than our own machines."""

import argparse
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tinyvmm.cli import tracing
from tinyvmm.cli.run import parse_map, parse_shared
from tinyvmm.cli.values import parse_count, warn
from tinyvmm.errors import ConfigError

if TYPE_CHECKING:
    from types import FrameType

    from tinyvmm.fileserver.server import Listener
    from tinyvmm.fileserver.tree import Tree

_STOP = (signal.SIGINT, signal.SIGTERM)

_EPILOG = """\
With --nbd ADDRESS instead of --listen the --read trees are served as a disk to NBD clients: an
EROFS image of them, read-only, made while it is read. What cannot be read ends it before it begins,
and a file that changes then gives its readers an error.

An ADDRESS is unix:PATH or tcp:HOST:PORT; port 0 is any that is free. Nobody is asked who he is:
whoever can connect can do, in what is served, all that you can. A Unix socket is its owner's alone,
unless --mode says otherwise; keep TCP to 127.0.0.1, or to a network that you trust.

What is served is one tree: either the directory of --shared, live on both sides, or the union of
the --read trees with the changes in the --write trees, as for tinyvmm run; without --write nothing
can be changed.

It serves until SIGINT or SIGTERM, with exit status 0.

examples:
  tinyvmm serve --listen unix:/run/user/1000/9p --shared .
  tinyvmm serve --listen tcp:127.0.0.1:5640 --read /srv/data
  mount -t 9p -o trans=unix,version=9p2000.L /run/user/1000/9p /mnt
  tinyvmm serve --nbd unix:/run/user/1000/nbd --read /srv/data
  nbdcopy 'nbd+unix:///?socket=/run/user/1000/nbd' data.erofs
"""


def parse_mode(text: str) -> int:
    """Parse the permissions of a file, in octal."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is no mode: give e.g. 600 or 660")
    return mode


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "serve",
        help="serve directories to 9P clients",
        usage="tinyvmm serve --listen ADDRESS [OPTION]...",
        description="Serve directories of this computer, over 9P2000.L, .u or plain 9P2000.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main)
    add = parser.add_argument
    add(
        "--listen",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="where 9P clients connect; may be given more than once",
    )
    add(
        "--nbd",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="where NBD clients connect, to read the trees as an EROFS disk",
    )
    add(
        "--read",
        type=parse_map,
        action="append",
        default=[],
        metavar="MAP",
        help="a read-only tree, [PLACE=]DIR",
    )
    add(
        "--write",
        type=parse_map,
        action="append",
        default=[],
        metavar="MAP",
        help="a directory that keeps what clients write, [PLACE=]DIR",
    )
    add(
        "--shared",
        type=parse_shared,
        action="append",
        default=[],
        metavar="DIR[,ro]",
        help="a directory, live on both sides",
    )
    add("--mode", type=parse_mode, default=0o600, help="of a Unix socket (default 600)")
    add(
        "--connections",
        type=parse_count,
        metavar="N",
        help="clients served at once (default 64, with --nbd 16); others wait",
    )
    add(
        "--idle",
        type=parse_count,
        default=0,
        metavar="S",
        help="hang up on clients silent for S seconds (default: never)",
    )
    tracing.add_options(parser)


def main(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    from tinyvmm.fileserver.descriptors import raise_nofile_limit

    if args.guest_argv:
        raise ConfigError("serve runs no command: leave out what is behind --")
    if not args.listen and not args.nbd:
        raise ConfigError("nowhere to serve: give --listen ADDRESS, or --nbd ADDRESS for a disk")
    tracing.start(args.trace, args.trace_file)
    raise_nofile_limit()
    with ExitStack() as cleanup:
        server = open_nbd(args, cleanup) if args.nbd else open_server(args, cleanup)

        def stop(number: int, frame: "FrameType | None") -> None:
            del number, frame
            server.stop()

        before = {number: signal.signal(number, stop) for number in _STOP}
        try:
            say_where(server)
            server.serve()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


def open_server(args: argparse.Namespace, cleanup: ExitStack) -> "Listener":
    """Listen for 9P clients, until `cleanup`."""
    from tinyvmm.fileserver.address import parse_address
    from tinyvmm.fileserver.server import Server

    addresses = [parse_address(text) for text in args.listen]
    tree = open_served(args)
    cleanup.callback(tree.close)
    server = Server(
        tree,
        addresses,
        connections_max=args.connections or 64,
        idle=args.idle,
        socket_mode=args.mode,
    )
    return cleanup.enter_context(server)


def open_nbd(args: argparse.Namespace, cleanup: ExitStack) -> "Listener":
    """Listen for NBD clients, until `cleanup`; ConfigError for what cannot be served as a disk."""
    from tinyvmm import nbd
    from tinyvmm.fileserver.address import parse_address
    from tinyvmm.images.erofs.image import ErofsImage

    if args.listen:
        raise ConfigError("one server speaks one protocol: give --listen or --nbd")
    if args.write or args.shared or not args.read:
        raise ConfigError("--nbd serves a disk that is only read: name directories with --read DIR")
    addresses = [parse_address(text, nbd.PORT) for text in args.nbd]
    image = ErofsImage(args.read, warn, whole=True)
    cleanup.callback(image.close)
    trees = " ".join(f"{guest}={host}" for guest, host in args.read)
    export = nbd.Export(b"erofs", trees.encode("utf-8", "replace")[:4096], image)
    return cleanup.enter_context(
        nbd.NbdServer(
            export,
            addresses,
            connections_max=args.connections or 16,
            idle=args.idle,
            socket_mode=args.mode,
        )
    )


def say_where(server: "Listener") -> None:
    """Tell who waits for it that clients can come, and at which ports."""
    where = " and ".join(map(str, server.addresses))
    try:
        print(f"tinyvmm: {server.what} at {where}", flush=True)
    except BrokenPipeError:
        raise  # for who reads all our output
    except OSError as error:
        raise ConfigError(
            f"cannot say where clients connect: {error.strerror}; give an output that takes a line"
        ) from None


def open_served(args: argparse.Namespace) -> "Tree":
    """Open what is to be served; ConfigError if it cannot be."""
    from tinyvmm.fileserver.union import open_tree
    from tinyvmm.roots.mounts import open_shared

    if not args.shared:
        if not args.read and not args.write:
            raise ConfigError("nothing to serve: name a directory with --shared DIR or --read DIR")
        return open_tree(args.read, args.write)
    if args.read or args.write or len(args.shared) > 1:
        raise ConfigError(
            "one server has one tree: give one --shared, or --read and --write, "
            "and serve the others by servers of their own"
        )
    (shared,) = args.shared
    if shared.guest != shared.host or shared.cache is not None:
        raise ConfigError(
            f"--shared {shared.host}: give DIR or DIR,ro; where it is mounted and what is cached "
            "there is for the client to say"
        )
    return open_shared(shared)
