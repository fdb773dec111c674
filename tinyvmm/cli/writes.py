"""`tinyvmm diff` and `tinyvmm commit`: what a machine's guest wrote, listed and kept."""

import argparse
import json
import os
import sys

from tinyvmm.cli.values import warn
from tinyvmm.errors import ConfigError

_EPILOG = """\
OUTPUT says by its name what it is to be:

  x.tar, x.tar.gz, x.tgz   a layer of an OCI image: what is gone are .wh. files in it
  x.erofs                  a pack, for run --pack, with what is gone
  x.zip                    the same, if nothing is gone
  x/                       a directory, for run --read over what the machine read

A machine that runs is paused meanwhile.

example: tinyvmm commit web -o layer.tar.gz
"""
_LAYERS = (".tar", ".tar.gz", ".tgz")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands and their options."""
    diff = subparsers.add_parser(
        "diff",
        help="list what a machine wrote: A added, C changed, D deleted",
        epilog="example: tinyvmm diff web",
        allow_abbrev=False,
    )
    diff.add_argument("name", metavar="NAME", help="of the machine")
    diff.add_argument("--json", action="store_true", help="for programs")
    diff.set_defaults(main=_diff)
    commit = subparsers.add_parser(
        "commit",
        help="make a layer, a pack or a directory of what a machine wrote",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commit.add_argument("name", metavar="NAME", help="of the machine")
    commit.add_argument("-o", "--output", required=True, metavar="OUTPUT", help="what to make")
    commit.set_defaults(main=_commit)


def _diff(args: argparse.Namespace) -> int:
    from tinyvmm.methods.writes import written

    with written(args.name, warn) as found:
        changes = found.changes
        if args.json:
            records = [{"kind": c.kind, "path": os.fsdecode(c.path)} for c in changes]
            print(json.dumps(records, indent=2))
            return 0
        for change in changes:
            sys.stdout.flush()
            sys.stdout.buffer.write(b"%s %s\n" % (change.kind.encode(), _one_line(change.path)))
    sys.stdout.flush()
    return 0


def _one_line(path: bytes) -> bytes:
    """As it is, but for what would be no line, or act on a terminal, or is no text."""
    return "".join(
        char
        if char.isprintable()
        else "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))
        for char in path.decode(errors="surrogateescape")
    ).encode()


def _commit(args: argparse.Namespace) -> int:
    from tinyvmm.images import packs
    from tinyvmm.methods.writes import written

    kind = args.output.rpartition(".")[2]
    if kind in packs.KINDS:
        with written(args.name, warn) as found:
            packs.write(packs.Files(found.changes, found.trees), args.output, kind, warn)
        print(f"{args.output}  {os.stat(args.output).st_size} bytes")
        return 0
    if args.output.endswith("/") or os.path.isdir(args.output):
        from tinyvmm.images.changed_tree import write_directory

        with written(args.name, warn) as found:
            count = write_directory(found.changes, args.output, warn)
        print(f"{args.output}  {count} entries")
        return 0
    if not args.output.endswith(_LAYERS):
        ends = ", ".join((*_LAYERS, *(f".{kind}" for kind in packs.KINDS), "/"))
        raise ConfigError(f"commit -o {args.output}: a name that ends in {ends} says what to make")
    from tinyvmm.images.layer import write_layer

    with written(args.name, warn) as found:
        compress = not args.output.endswith(".tar")
        layer = write_layer(found.changes, args.output, warn, compress=compress)
    print(f"{args.output}  {layer.entries} entries  {layer.size} bytes  {layer.digest}")
    return 0
