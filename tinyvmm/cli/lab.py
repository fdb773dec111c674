"""`tinyvmm lab`: a command on this computer's files, where /dev/kvm is a real kvm_amd."""

import argparse

from tinyvmm.cli.run import parse_size
from tinyvmm.cli.values import parse_count, parse_seconds

_EPILOG = """\
The command sees this computer's files; what it writes is forgotten, except below the directories
given with --share. Python is about 30 times slower there than here.

examples:
  tinyvmm lab -- ls -l /dev/kvm
  tinyvmm lab --share . -- make test
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "lab",
        help="run a command where /dev/kvm is a real kvm_amd",
        usage="tinyvmm lab [OPTION]... -- CMD [ARG]...",
        description="Run a command on this computer's files, in a machine with a real /dev/kvm.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main)
    add = parser.add_argument
    add("--memory", type=parse_size, metavar="SIZE", help="RAM (default 4G, or half of ours)")
    add(
        "--cpus", type=parse_count, metavar="N", help="processors (default as many as here, 2 to 4)"
    )
    add(
        "--share",
        action="append",
        default=[],
        metavar="DIR",
        help="a directory the command may change",
    )
    add("--kernel", metavar="PATH|VERSION", help="which kernel to boot (default: the newest)")
    add("--timeout", type=parse_seconds, metavar="S", help="end it after S seconds, status 124")


def main(args: argparse.Namespace) -> int:
    """Run it and return its exit status; ConfigError for what cannot be done."""
    from tinyvmm.lab.lab import run_in_lab

    return run_in_lab(
        args.guest_argv,
        shares=args.share,
        memory=args.memory,
        cpus=args.cpus,
        kernel=args.kernel,
        timeout=args.timeout,
    )
