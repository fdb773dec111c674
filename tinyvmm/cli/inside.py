"""What is done inside a machine that runs without a program of its own for it: cp and top."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from tinyvmm.errors import ConfigError

if TYPE_CHECKING:
    from tinyvmm.inside.guest_calls import Guest

_CP_EPILOG = """\
One side is NAME:PATH, a path in machine NAME, from its root; the other is a path here, or - for a
tar archive on stdin or stdout. A path here that has a colon is written ./PATH.

A directory becomes DEST if that is not there, and a directory in DEST if that is one; with /. at
its end what is in it is copied, and not itself. A file becomes DEST, or a file in it if that is a
directory. Modes, times, symbolic and hard links, holes and user.* attributes are kept, and owners
where we are root. What comes out of a machine gets no set-user-ID or set-group-ID bit here, and
no device is made.

examples:
  tinyvmm cp ./site web:/srv
  tinyvmm cp web:/var/log/. logs
  tinyvmm cp web:/etc - | tar t
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands and their options."""
    cp = subparsers.add_parser(
        "cp",
        help="copy files into a machine that runs, or out of it",
        usage="tinyvmm cp SOURCE NAME:DEST | NAME:SOURCE DEST",
        epilog=_CP_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cp.set_defaults(main=_cp)
    cp.add_argument("source", metavar="SOURCE", help="what to copy")
    cp.add_argument("dest", metavar="DEST", help="where to")
    top = subparsers.add_parser(
        "top",
        help="list the processes in a machine that runs",
        epilog="example: tinyvmm top web",
        allow_abbrev=False,
    )
    top.set_defaults(main=_top)
    top.add_argument("--json", action="store_true", help="for programs")
    top.add_argument("name", metavar="NAME", help="of the machine")


def _side(text: str) -> tuple[str, str] | None:
    """Split NAME:PATH; None for a path here."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name or name.startswith("."):
        return None
    if not name or not path:
        raise ConfigError(f"{text!r}: give NAME:PATH, or ./{text} for a path here")
    return name, path if path.startswith("/") else f"/{path}"


def _cp(args: argparse.Namespace) -> int:
    source, dest = _side(args.source), _side(args.dest)
    if (source is None) == (dest is None):
        which = "neither is" if source is None else "both are"
        raise ConfigError(f"{args.source} and {args.dest}: {which} NAME:PATH; one has to be")
    from tinyvmm.inside.guest_calls import open_guest
    from tinyvmm.instances.exec_client import connect

    name = (source or dest or ("",))[0]
    if dest is not None and args.source != "-":
        from tinyvmm.inside.guest_copy import check_source

        check_source(args.source)
    with connect(name) as client, open_guest(client) as guest:
        if dest is not None:
            _in(guest, args.source, dest[1])
        elif source is not None:
            _out(guest, source[1], args.dest)
    return 0


def _in(guest: "Guest", source: str, dest: str) -> None:
    from tinyvmm.inside.guest_copy import copy_in

    if source != "-":
        copy_in(guest, source, dest)
        return
    from tinyvmm import tree_tar
    from tinyvmm.inside.guest_files import look, put

    found = look(guest, dest)
    if found is None or not found.is_directory:
        raise ConfigError(f"{dest} in the machine is no directory to unpack an archive in")
    put(guest, tree_tar.read(sys.stdin.buffer), dest)


def _out(guest: "Guest", source: str, dest: str) -> None:
    from tinyvmm.cli.values import warn
    from tinyvmm.inside.guest_copy import copy_out

    if dest != "-":
        copy_out(guest, source, dest, warn)
        return
    from tinyvmm import tree_tar
    from tinyvmm.inside.guest_files import walk

    if sys.stdout.isatty():
        raise ConfigError("a tar archive is not for a terminal: send it to a file or a pipe")
    name = os.path.basename(source.rstrip("/"))
    tree_tar.write(walk(guest, source), name or ".", sys.stdout.buffer)
    sys.stdout.buffer.flush()


def _top(args: argparse.Namespace) -> int:
    from tinyvmm.cli.table import duration, print_table, printable
    from tinyvmm.inside.guest_calls import open_guest
    from tinyvmm.inside.guest_processes import processes
    from tinyvmm.instances.exec_client import connect

    with connect(args.name) as client, open_guest(client) as guest:
        found = processes(guest)
    if args.json:
        print(json.dumps([process._asdict() for process in found], indent=2))
        return 0
    rows = [("PID", "PPID", "USER", "S", "TIME", "RESIDENT", "COMMAND")]
    rows += [
        (
            str(process.pid),
            str(process.ppid),
            printable(process.user),
            printable(process.state),
            duration(process.cpu_time),
            f"{process.resident / (1 << 20):.1f}M",
            printable(process.command),
        )
        for process in found
    ]
    print_table(rows)
    return 0
