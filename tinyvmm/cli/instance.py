"""What `tinyvmm run` has of a machine with a name: its options, its state, and detaching."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tinyvmm.errors import ConfigError, TinyvmmError

if TYPE_CHECKING:
    from tinyvmm.command.options import RunOptions
    from tinyvmm.instances.output_log import OutputLog
    from tinyvmm.session import Result

STATUS_FAILED = 125


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a machine that others can reach, and those of its command."""
    group = parser.add_argument_group("a machine with a name")
    add = group.add_argument
    add("-d", "--detach", action="store_true", help="leave it running, and print its name")
    add("--name", default="", metavar="NAME", help="what it is called (default: a new name)")
    add("--rm", action="store_true", help="forget a named or detached machine when it ends")
    add(
        "-i",
        "--interactive",
        action="store_true",
        help="with --detach: keep the command's stdin open, for attach, where it is empty else; "
        "without, stdin is the command's in any case",
    )
    add("-t", "--tty", action="store_true", help="give the command a terminal in any case")
    add(
        "--init",
        action="store_true",
        help="CMD is the root's own init (default /sbin/init), and PID 1",
    )
    add(
        "--stop-signal",
        metavar="S",
        help="what asks the command to end (default TERM, or what its init understands)",
    )
    add("--user", metavar="U[:G]", help="whom the command runs as (default root)")
    add("--workdir", metavar="DIR", help="where the command starts (default: where you are)")
    add("--hostname", default="tinyvmm", metavar="NAME", help="of the guest (default tinyvmm)")


def run(args: argparse.Namespace, options: "RunOptions", warn: Callable[[str], None]) -> int:
    """Run it as a machine that others can reach; the exit status."""
    if args.detach:
        return _detach(args, options)
    result = _run(args, options, warn)
    if result.message is not None:
        warn(result.message)
    return result.status


def _run(
    args: argparse.Namespace,
    options: "RunOptions",
    warn: Callable[[str], None],
    ready: Callable[[str], None] | None = None,
) -> "Result":
    """Run it, while others can reach it; `ready` is told its name when the command runs."""
    from tinyvmm.command.checks import settle
    from tinyvmm.command.run import run_command
    from tinyvmm.instances.control_server import ControlServer
    from tinyvmm.instances.registry import WRITES, Instance, State
    from tinyvmm.methods.supervised import Supervised
    from tinyvmm.session import Result

    options = settle(options)
    over_disk = options.root_mode == "erofs"  # then what is written is in memory, or in a disk
    instance = Instance(
        State(
            name=args.name,
            pid=os.getpid(),
            command=list(options.argv),
            memory=options.memory,
            cpus=options.cpus,
            created=time.time(),
            detached=args.detach,
            keep=(args.detach or bool(args.name)) and not args.rm,
            reads=tuple(options.reads),
            in_memory=options.private_writes == "guest"
            or over_disk
            or any(guest == "/" for guest, _ in options.packs),
            writes=() if over_disk else tuple(options.writes),
            upper=_upper_disk(options.writes[0][1]) if over_disk and options.writes else "",
        )
    )
    options = options._replace(keep_writes=instance.file(WRITES))
    result = Result(STATUS_FAILED, "machine", "interrupted")
    vsock = (options.vsock and options.vsock[0]) or instance.file("vsock")
    supervised = Supervised(vsock, keep_stdin=args.detach and args.interactive)
    try:
        started = False

        def on_started() -> None:
            nonlocal started
            started = True
            if ready is not None:
                ready(instance.state.name)

        supervised.on_started = on_started
        sinks = {}
        if args.detach:
            from tinyvmm.instances.output_log import STREAMS, OutputLog

            log = OutputLog(instance.file("output"))
            sinks = {stream: _logging(log, stream) for stream in STREAMS}
            warn = _warning(log, warn)
        server = ControlServer(instance.file("control"), supervised.methods)
        try:
            result = run_command(options, warn, supervised, sinks)
            supervised.end(result)
        finally:
            server.close()
        if args.detach and not started:  # nobody has a use for a machine that never was
            instance.state = instance.state._replace(keep=False)
    except TinyvmmError as error:
        result = Result(STATUS_FAILED, "machine", str(error))
        raise
    finally:
        try:
            instance.end(result.status, result.message, supervised.last_console)
        except ConfigError as error:  # which makes no difference to the command's status
            warn(str(error))
    return result


def _upper_disk(directory: str) -> str:
    from tinyvmm.roots.erofs_root import UPPER_FILE

    return os.path.join(directory, UPPER_FILE)


def _logging(log: "OutputLog", stream: str) -> Callable[[bytes], None]:
    return lambda data: log.write(stream, data)


def _warning(log: "OutputLog", warn: Callable[[str], None]) -> Callable[[str], None]:
    """Tell it, and put it where it can still be seen when there is nobody to be told."""

    def told(line: str) -> None:
        log.write("stderr", f"tinyvmm: {line}\n".encode(errors="surrogateescape"))
        warn(line)

    return told


def _detach(args: argparse.Namespace, options: "RunOptions") -> int:
    """Run it in a process of its own; return when the command runs, or cannot."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        os.close(read_end)
        os._exit(_detached(args, options, write_end))
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        word, _, text = pipe.read().decode(errors="surrogateescape").partition(" ")
    if word == "ready":
        print(text)
        return 0
    if word.isdigit():
        print(f"tinyvmm: {text}" if text else "tinyvmm: it ended at once", file=sys.stderr)
        return int(word)
    raise ConfigError("the machine's process died before its command ran")


def _detached(args: argparse.Namespace, options: "RunOptions", report: int) -> int:
    """In the process of the machine: let go of the terminal, run, and report once on the pipe."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
    told: list[str] = []
    open_report = [report]

    def tell(text: str) -> None:
        if open_report:
            os.write(open_report[0], text.encode(errors="surrogateescape"))
            os.close(open_report.pop())

    try:
        result = _run(args, options, told.append, lambda name: tell(f"ready {name}"))
        message = result.message or "\n".join(told)
        tell(f"{result.status} {message}")
    except TinyvmmError as error:
        tell(f"{STATUS_FAILED} {error}")
        return STATUS_FAILED
    except BaseException as error:  # noqa: BLE001 (there is no terminal left to show it on)
        tell(f"{STATUS_FAILED} {type(error).__name__}: {error}")
        return STATUS_FAILED
    return result.status & 0xFF
