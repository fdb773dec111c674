"""The command line: find the command, let its module parse and do it, report what went wrong.

Only the module of the command asked for is imported, because start-up is part of every run. What
follows `--` belongs to the guest and is never looked at. Exit statuses are the field's: that of the
command where there is one, 125 when tinyvmm itself could not do what was asked, 2 for usage.
"""

import argparse
import gc
import os
import sys
from collections.abc import Iterable, Sequence
from errno import EDQUOT, EFBIG, EIO, EMFILE, ENFILE, ENOSPC
from functools import partial
from importlib import import_module
from typing import Any, Protocol, cast

from tinyvmm import __version__
from tinyvmm.errors import TinyvmmError

STATUS_FAILED = 125
GARBAGE_MIN = 50_000  # objects; start-up makes half as many, none of which the collector could free
_CANNOT_WRITE = {ENOSPC, EDQUOT, EFBIG, EIO}  # of our output, or of whatever else
_REMEDIES: dict[int | None, str] = {  # wherever it is that no more files can be opened
    EMFILE: "; let it open more: ulimit -n",
    ENFILE: "; this computer has no more: see /proc/sys/fs/file-max",
}

COMMANDS = {
    "run": "run",
    "exec": "exec",
    **dict.fromkeys(
        (
            *("ps", "logs", "attach", "stop", "kill", "wait", "rm"),
            *("inspect", "pause", "resume", "control"),
        ),
        "instances",
    ),
    **dict.fromkeys(("cp", "top"), "inside"),
    "diff": "writes",
    "commit": "writes",
    **dict.fromkeys(("pull", "images", "rmi", "prune"), "images"),
    "serve": "serve",
    "pack": "pack",
    "kernel": "kernel",
    "image": "image",
    "doctor": "doctor",
    "lab": "lab",
    "demo": "demo",
    "completion": "completion",
}
"""Each command's module in tinyvmm.cli, which may declare several."""


class CommandModule(Protocol):
    """What each module tinyvmm.cli.NAME provides."""

    def add_parser(self, subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        """Declare the command and its options; `set_defaults(main=...)` says who does it.

        `main` takes the arguments, in which `guest_argv` is what stood behind `--` and `own_argv`
        what stood before it, and returns the exit status.
        """


def split_argv(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split at the first `--`: our own arguments, and the guest's."""
    argv = list(argv)
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


class _Parser(argparse.ArgumentParser):
    """Tells formatters how wide to be.

    argparse makes one for each option, to check it; left alone, that asks shutil, which imports
    three packers first: 5 ms of each command.
    """

    def __init__(self, *, formatter_class: Any = argparse.HelpFormatter, **more: Any) -> None:
        super().__init__(formatter_class=partial(formatter_class, width=_columns() - 2), **more)


def _columns() -> int:
    """Return how wide the terminal is, as shutil.get_terminal_size does."""
    try:
        return int(os.environ["COLUMNS"])
    except (KeyError, ValueError):
        pass
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


def build_parser(modules: Iterable[str]) -> argparse.ArgumentParser:
    """Return the parser of these modules' commands."""
    parser: argparse.ArgumentParser = _Parser(
        prog="tinyvmm",
        description="Run commands in real virtual machines, from pure Python.",
        epilog="example: tinyvmm run -- uname -a. Each long option can come from the environment: "
        "TINYVMM_MEMORY=2G is --memory 2G.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tinyvmm {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in modules:
        cast("CommandModule", import_module(f"tinyvmm.cli.{name}")).add_parser(subparsers)
    return parser


def all_modules() -> list[str]:
    """Return every command's module, in the order of their help."""
    return list(dict.fromkeys(COMMANDS.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv by default) and return the exit status."""
    gc.set_threshold(GARBAGE_MIN)
    _occupy_streams()
    own, guests = split_argv(sys.argv[1:] if argv is None else argv)
    known = own and own[0] in COMMANDS
    parser = build_parser([COMMANDS[own[0]]] if known else all_modules())
    try:
        if any(name.startswith("TINYVMM_") for name in os.environ):
            from tinyvmm.cli.environment import with_environment

            own = with_environment(parser, own)
        args = parser.parse_args(own)
        args.own_argv, args.guest_argv = own, guests
        status = cast("int", args.main(args))
        if sys.stdout is not None:  # it was closed
            sys.stdout.flush()
    except TinyvmmError as error:
        from tinyvmm.cli.values import warn

        warn(f"{error}{_REMEDIES.get(getattr(error, 'errno', None), '')}")
        _let_go_of_output()
        return STATUS_FAILED
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno in _REMEDIES:
            from tinyvmm.cli.values import warn

            warn(f"{error.strerror}{_REMEDIES[error.errno]}")
            _let_go_of_output()
            return STATUS_FAILED
        if error.errno not in _CANNOT_WRITE and not isinstance(error, BrokenPipeError):
            raise
        return _cannot_write(error)
    return status


def _occupy_streams() -> None:
    """Have no file of ours get the number of a stream that was closed, and be taken for it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _cannot_write(error: OSError) -> int:
    """Say so, unless it is that whoever read our output has gone; the exit status."""
    _let_go_of_output()
    if isinstance(error, BrokenPipeError):
        return 141
    from tinyvmm.cli.values import warn

    what = "" if error.filename is None else f" {os.fsdecode(error.filename)}"
    warn(f"cannot write{what}: {error.strerror}")
    return STATUS_FAILED


def _let_go_of_output() -> None:
    """Write what waits; if it cannot be, Python's own flush at exit must not complain of it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
