"""`tinyvmm pack`: trees of files, each as one file, to be read trees of machines."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from tinyvmm.cli.values import warn

if TYPE_CHECKING:
    from tinyvmm.images.packs import Pack

_EPILOG = """\
A PATTERN is a shell's. With a slash in it, it is of the path from the top on (usr/share/doc), and
without of a name at any depth ('*.pyc'); it stands for all that is below what it matches.

examples:
  tinyvmm pack create tools /opt/tools --exclude '*.pyc'
  tinyvmm run --pack /opt/tools=tools -- ls /opt/tools
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the `tinyvmm` parser."""
    parser = subparsers.add_parser(
        "pack",
        help="make, fetch, list and remove packs: trees of files, each as one file",
        epilog="example: tinyvmm pack create tools /opt/tools",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, says: str, main: Any, example: str) -> argparse.ArgumentParser:
        epilog = _EPILOG if name == "create" else f"example: tinyvmm pack {example}"
        formatter = argparse.RawDescriptionHelpFormatter
        added = actions.add_parser(
            name, help=says, epilog=epilog, formatter_class=formatter, allow_abbrev=False
        )
        added.set_defaults(main=main)
        return added

    creating = action("create", "make one of a directory, or of what a machine wrote", _create, "")
    creating.add_argument("name", metavar="NAME", help="what it is to be called")
    what = creating.add_mutually_exclusive_group(required=True)
    what.add_argument("directory", metavar="DIR", nargs="?", help="the directory")
    what.add_argument("--machine", metavar="VM", help="what this machine wrote, instead")
    creating.add_argument(
        "--format", choices=("erofs", "zip"), default="erofs", help="of the file (default erofs)"
    )
    for option, says in (("include", "only what matches"), ("exclude", "not what matches")):
        creating.add_argument(
            f"--{option}", metavar="PATTERN", action="append", default=[], help=says
        )

    getting = action(
        "get", "fetch one", _get, "get tools http://server/tools.erofs --sha256 0123...cdef"
    )
    getting.add_argument("name", metavar="NAME", help="what it is to be called")
    getting.add_argument("url", metavar="URL", help="file:, http: or https:")
    getting.add_argument("--sha256", metavar="HEX", help="what it must be; file: needs none")

    listing = action("list", "the packs here", _list, "list --json")
    listing.add_argument("--json", action="store_true", help="for programs")

    removing = action("rm", "remove packs", _rm, "rm tools")
    removing.add_argument("names", metavar="NAME", nargs="+", help="of the packs")


def _create(args: argparse.Namespace) -> int:
    from tinyvmm.images import packs
    from tinyvmm.images.selection import Selection, select

    selection = Selection(args.include, args.exclude)
    if args.machine is not None:
        from tinyvmm.methods.writes import written

        with written(args.machine, warn) as found:
            files = packs.Files(select(found.changes, selection), found.trees)
            source = f"what {args.machine} wrote"
            _print(packs.create(args.name, files, source, args.format, warn))
        return 0
    from tinyvmm.errors import ConfigError
    from tinyvmm.fileserver.written import list_changes

    if not os.path.isdir(args.directory):
        why = "is no directory" if os.path.lexists(args.directory) else "is not there"
        raise ConfigError(f"pack create {args.name}: {args.directory} {why}; name a directory")
    trees = [("/", os.path.abspath(args.directory))]
    files = packs.Files(select(list_changes([], trees), selection), trees)
    _print(packs.create(args.name, files, trees[0][1], args.format, warn))
    return 0


def _get(args: argparse.Namespace) -> int:
    from tinyvmm.images import packs
    from tinyvmm.images.progress import TerminalProgress

    progress = TerminalProgress()
    try:
        pack = packs.get(args.name, args.url, args.sha256, progress)
    finally:
        progress.finish()
    _print(pack)
    return 0


def _list(args: argparse.Namespace) -> int:
    from tinyvmm.cli.table import size
    from tinyvmm.images import packs

    found = packs.list_()
    if args.json:
        import json

        print(json.dumps([pack._asdict() for pack in found], indent=2))
        return 0
    if not found:
        print("no pack here yet; make one: tinyvmm pack create NAME DIR")
    name_len = max((len(pack.name) for pack in found), default=0)
    for pack in found:
        print(f"{pack.name:<{name_len}}  {pack.kind:<5}  {size(pack.size):>7}  {pack.source}")
    return 0


def _rm(args: argparse.Namespace) -> int:
    from tinyvmm.images import packs

    packs.remove(args.names)
    return 0


def _print(pack: "Pack") -> None:
    print(f"{pack.name}  {pack.path}\nsha256:{pack.digest}")
