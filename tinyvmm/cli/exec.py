"""`tinyvmm exec NAME -- CMD`: another command in a machine that runs."""

import argparse
import os

from tinyvmm.cli.values import parse_environment, parse_seconds, warn
from tinyvmm.errors import ConfigError

_EPILOG = """\
The command needs no agent in the machine's root, and no shell. Its output and its exit status are
its own; if this side ends first, it goes on, and is seen in `tinyvmm control NAME execs`.

On a terminal, the terminal is the command's. Otherwise its stdin is empty unless -i is given: an
exec in a loop leaves alone what the loop reads.

exit status: as of `tinyvmm run`.

examples:
  tinyvmm exec web -- ps aux
  tinyvmm exec web -- sh
  tinyvmm exec -i web -- tee /etc/motd < motd
  tinyvmm exec --user nobody --env WORD=hello web -- sh -c 'echo $WORD'
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "exec",
        help="run another command in a machine that runs",
        usage="tinyvmm exec [OPTION]... NAME -- CMD [ARG]...",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main)
    add = parser.add_argument
    add("-i", "--interactive", action="store_true", help="stdin is the command's, terminal or not")
    add("-t", "--tty", action="store_true", help="give the command a terminal in any case")
    add(
        "--env",
        type=parse_environment,
        action="append",
        default=[],
        metavar="K[=V]",
        help="a variable of the command's environment, beside the machine's",
    )
    add("--user", metavar="U[:G]", help="whom the command runs as (default: as the machine's)")
    add("--workdir", metavar="DIR", help="where the command starts (default: as the machine's)")
    add("--timeout", type=parse_seconds, metavar="S", help="give up after S seconds, status 124")
    add("name", metavar="NAME", help="of the machine")
    add("argv", metavar="CMD", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Run it; the exit status."""
    argv = args.argv + args.guest_argv
    if not argv:
        raise ConfigError("no command: give one behind --, e.g. tinyvmm exec web -- ps")
    from tinyvmm.instances.exec_client import execute
    from tinyvmm.session import host_files

    files = host_files()
    terminal = None
    if os.isatty(0) and os.isatty(1):  # what is of no use otherwise is not imported: each exec pays
        from tinyvmm.terminal import Terminal

        terminal = Terminal()
    elif not args.interactive:
        files = files._replace(stdin=None)
    env = list(args.env)
    if "TERM" in os.environ and terminal is not None:
        env.insert(0, f"TERM={os.environ['TERM']}")
    result = execute(
        args.name,
        argv,
        env=env,
        cwd=args.workdir,
        user=args.user,
        terminal=terminal,
        size=(24, 80) if args.tty else None,
        timeout=args.timeout,
        files=files,
    )
    if result.message is not None:
        warn(result.message)
    return result.status
