"""The command line: find the command, let its module parse and do it, report what went wrong.

Only the module of the command asked for is imported, because start-up is part of every run. What
follows `--` belongs to the guest and is never looked at. Exit statuses are the field's: that of the
command where there is one, 125 when tinyvmm itself could not do what was asked, 2 for usage.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from tinyvmm import __version__
from tinyvmm.errors import TinyvmmError

STATUS_FAILED = 125

COMMANDS = {
    "run": "run a command in a virtual machine",
    "kernel": "list, fetch and import kernels",
    "doctor": "say what this computer offers and lacks",
    "lab": "run a command where /dev/kvm is a real kvm_amd",
    "demo": "run a tiny guest of our own, no kernel needed",
}


class CommandModule(Protocol):
    """What each module tinyvmm.cli.NAME provides."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's options."""

    def main(self, args: argparse.Namespace) -> int:
        """Do it; `args.command_line` is what stood behind `--`. Return the exit status."""


def command_module(name: str) -> CommandModule:
    """Import the module of one command."""
    return cast("CommandModule", import_module(f"tinyvmm.cli.{name}"))


def split_command_line(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split at the first `--`: our own arguments, and the guest's."""
    argv = list(argv)
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the part that all commands share."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="tinyvmm",
        usage="tinyvmm COMMAND [OPTION]... [-- CMD [ARG]...]",
        description="Run commands in real virtual machines, from pure Python.",
        epilog=f"commands:\n{listing}\n\nexample: tinyvmm run -- uname -a",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tinyvmm {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv by default) and return the exit status."""
    own, guests = split_command_line(sys.argv[1:] if argv is None else argv)
    if own and own[0] in COMMANDS:
        name, rest = own[0], own[1:]
    else:
        name, rest = build_parser().parse_args(own[:1] or ["--help"]).command, own[1:]
    module = command_module(name)
    parser = argparse.ArgumentParser(
        prog=f"tinyvmm {name}",
        description=COMMANDS[name].capitalize() + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    args.command_line = guests
    try:
        return module.main(args)
    except TinyvmmError as error:
        print(f"tinyvmm: {error}", file=sys.stderr)
        return STATUS_FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; Python's own flush at exit must not complain of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
