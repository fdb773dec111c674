"""Where the root and the command of `tinyvmm run` come from: this computer, or an image."""

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack

from tinyvmm.errors import ConfigError
from tinyvmm.named import NamedTuple
from tinyvmm.options import environment

POLICIES = ("missing", "always", "never")


class Root(NamedTuple):
    """What `run` takes from where its root comes from; the fields are those of RunOptions."""

    argv: list[str]
    reads: list[tuple[str, str]]
    env: list[str]
    cwd: str
    user: str | None
    directories: Sequence[str] = ()
    stop_signal: str | int | None = None
    inner_options: Sequence[str] = ()
    """What `run` in the lab is told besides: which image was found out here."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of an image to run."""
    group = parser.add_argument_group("an image")
    add = group.add_argument
    add("--image", metavar="REF", help="the root and the command of an OCI image (tinyvmm pull)")
    add(
        "--pull",
        choices=POLICIES,
        default="missing",
        help="when to get the image from its registry (default missing)",
    )
    add("--entrypoint", metavar="CMD", help="in place of the image's: a word, or a JSON list")
    add("--insecure", action="store_true", help="pull over http, or without checking certificates")
    add("--image-id", help=argparse.SUPPRESS)  # of what was pulled outside the lab


def given(args: argparse.Namespace) -> bool:
    """Whether the root is an image."""
    return args.image is not None or args.image_id is not None


def root(args: argparse.Namespace, argv: list[str], cleanup: ExitStack) -> Root:
    """Return the root and the command; an image is pulled if need be, and held until `cleanup`."""
    if not given(args):
        if args.entrypoint is not None:
            raise ConfigError("--entrypoint is an image's: give --image, or the command behind --")
        return Root(
            argv,
            read_maps(args.read),
            environment(args.env, home=args.user is None),
            os.getcwd() if args.workdir is None else args.workdir,
            args.user,
        )
    from tinyvmm.images.oci.config import parse_entrypoint
    from tinyvmm.images.oci.prepare import prepare
    from tinyvmm.images.progress import TerminalProgress

    progress = TerminalProgress()
    try:
        found = prepare(
            args.image_id or args.image,
            argv,
            cleanup,
            policy="never" if args.image_id else args.pull,
            insecure=args.insecure,
            entrypoint=None if args.entrypoint is None else parse_entrypoint(args.entrypoint),
            env=args.env,
            workdir=args.workdir,
            user=args.user,
            progress=progress,
        )
    finally:
        progress.finish()
    command = found.command
    has_terminal = args.tty or os.isatty(0)
    terminal = [f"TERM={os.environ['TERM']}"] if has_terminal and "TERM" in os.environ else []
    return Root(
        command.argv,
        [*found.reads, *args.read],
        [*terminal, *command.env],
        command.workdir,
        command.user,
        found.directories,
        _stop_signal(found.stop_signal) if args.stop_signal is None else None,
        ["--image-id", found.image.id],
    )


def _stop_signal(said: str) -> int | None:
    """Return the signal that an image says stops it; None if it says none."""
    if not said:
        return None
    from tinyvmm.methods.supervisor import signal_number

    try:
        return signal_number(said)
    except ConfigError:
        raise ConfigError(
            f"the image's StopSignal {said!r} is no signal; give --stop-signal, e.g. TERM"
        ) from None


def read_maps(maps: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the read trees: this computer's / underneath, unless something else is given for /."""
    if any(guest == "/" for guest, _ in maps):
        return maps
    return [("/", "/"), *maps]
