"""`tinyvmm diff` and `tinyvmm commit`: what a machine's guest wrote, listed and kept."""

import argparse
import json
import os
import sys

from tinyvmm.errors import ConfigError

_EPILOG = """\
OUTPUT says by its name what it is to be:

  x.tar, x.tar.gz, x.tgz   a layer of an OCI image: what is gone are .wh. files in it

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
        help="make a layer of what a machine wrote",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commit.add_argument("name", metavar="NAME", help="of the machine")
    commit.add_argument("-o", "--output", required=True, metavar="OUTPUT", help="the file to make")
    commit.set_defaults(main=_commit)


def _diff(args: argparse.Namespace) -> int:
    from tinyvmm.writes import written

    with written(args.name, _warn) as changes:
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
    """As it is, but for what would be no line, or harm a terminal."""
    return b"".join(b"\\x%02x" % c if c < 0x20 or c == 0x7F else bytes((c,)) for c in path)


def _commit(args: argparse.Namespace) -> int:
    from tinyvmm.writes import written

    if not args.output.endswith(_LAYERS):
        raise ConfigError(
            f"commit -o {args.output}: a name that ends in {', '.join(_LAYERS)} says what to make"
        )
    from tinyvmm.images.layer import write_layer

    with written(args.name, _warn) as changes:
        layer = write_layer(changes, args.output, _warn, compress=not args.output.endswith(".tar"))
    print(f"{args.output}  {layer.entries} entries  {layer.size} bytes  {layer.digest}")
    return 0


def _warn(line: str) -> None:
    print(f"tinyvmm: {line}", file=sys.stderr)
