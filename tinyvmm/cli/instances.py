"""The commands about machines that have a name: ps, logs, stop, kill, wait, rm and the like."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tinyvmm.cli.values import warn
from tinyvmm.errors import ConfigError

if TYPE_CHECKING:
    from tinyvmm.instances.registry import State

_PATIENCE = 2.0  # seconds for a machine to take calls, or to be gone when it takes no more


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands and their options."""

    def command(
        name: str, says: str, main: Callable[[argparse.Namespace], int], example: str
    ) -> argparse.ArgumentParser:
        parser = subparsers.add_parser(
            name, help=says, epilog=f"example: tinyvmm {example}", allow_abbrev=False
        )
        parser.set_defaults(main=main)
        return parser

    def named(parser: argparse.ArgumentParser, count: str | None = None) -> None:
        if count is None:
            parser.add_argument("name", metavar="NAME", help="of the machine")
        else:
            parser.add_argument("names", metavar="NAME", nargs=count, help="of the machines")

    ps = command("ps", "list machines", _ps, "ps --all")
    ps.add_argument("-a", "--all", action="store_true", help="also those that have ended")
    ps.add_argument("--json", action="store_true", help="for programs")
    ps.add_argument("-q", "--quiet", action="store_true", help="names only")

    logs = command("logs", "show what a detached machine's command wrote", _logs, "logs -f web")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it writes more")
    logs.add_argument("--timestamps", action="store_true", help="say when each piece came")
    logs.add_argument("--console", action="store_true", help="what the kernel printed, instead")
    named(logs)

    attach = command("attach", "connect to a detached machine's command", _attach, "attach web")
    attach.add_argument(
        "--detach-keys",
        default="ctrl-p,ctrl-q",
        metavar="KEYS",
        help="what to type to leave it (default ctrl-p,ctrl-q)",
    )
    attach.add_argument("--no-stdin", action="store_true", help="only look")
    named(attach)

    stop = command(
        "stop", "ask a machine's command to end, then end the machine", _stop, "stop web"
    )
    stop.add_argument("--time", type=float, default=10.0, metavar="S", help="patience (default 10)")
    stop.add_argument("-a", "--all", action="store_true", help="every machine")
    named(stop, "*")

    kill = command("kill", "send a machine's command a signal", _kill, "kill --signal HUP web")
    kill.add_argument(
        "--signal", default="KILL", metavar="S", help="KILL, the default, ends it all"
    )
    named(kill, "+")

    wait = command(
        "wait", "wait for the end of machines, and print their statuses", _wait, "wait web"
    )
    named(wait, "+")

    rm = command("rm", "forget machines that have ended", _rm, "rm web")
    rm.add_argument("-f", "--force", action="store_true", help="end them first")
    named(rm, "+")

    named(command("inspect", "show all that is known of machines", _inspect, "inspect web"), "+")
    named(command("pause", "stop a machine's vCPUs", _call("pause"), "pause web"), "+")
    named(command("resume", "let a paused machine go on", _call("resume"), "resume web"), "+")

    control = command(
        "control", "call a method of a machine's control socket", _control, "control web status"
    )
    named(control)
    control.add_argument("method", metavar="METHOD", help="see docs/control.md")
    control.add_argument(
        "params", metavar="KEY=VALUE", nargs="*", default=[], help="its parameters"
    )


def _ps(args: argparse.Namespace) -> int:
    from tinyvmm.cli.table import duration, print_table, printable
    from tinyvmm.instances import registry

    states = [state for state in registry.list_() if args.all or state.running]
    if args.quiet:
        for state in states:
            print(state.name)
    elif args.json:
        print(json.dumps([_known(state) for state in states], indent=2))
    else:
        rows = [("NAME", "PID", "STATE", "TIME", "CPUS", "MEMORY", "RESIDENT", "COMMAND")]
        for state in states:
            known = _known(state)
            resident = "-" if known["resident"] is None else f"{known['resident'] >> 20}M"
            what = known["state"] if state.running else f"ended ({state.status})"
            memory = f"{state.memory >> 20}M"
            rows.append(
                (
                    state.name,
                    str(state.pid) if state.running else "-",
                    what,
                    duration(known["uptime"]),
                    str(state.cpus),
                    memory,
                    resident,
                    printable(" ".join(state.command)),
                )
            )
        print_table(rows)
    return 0


def _known(state: "State") -> dict[str, Any]:
    """Return all that is known of a machine, and what can be seen of one that runs."""
    from tinyvmm.instances import registry

    known: dict[str, Any] = {**state._asdict(), "state": "ended", "resident": None}
    end = time.time() if state.ended is None else state.ended
    known["uptime"] = max(0.0, end - state.created)
    if state.running:
        known["resident"] = _resident(state.pid)
        known["control"] = registry.path_of(state.name, "control")
        try:
            known |= _ask(state.name, "status")
        except ConfigError:
            known["state"] = "starting"  # or just ending
    return known


def _resident(pid: int) -> int | None:
    """Return how many bytes of a process are in RAM (proc(5), statm)."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _ask(name: str, method: str, **params: Any) -> Any:
    from tinyvmm.instances.exec_client import connect

    with connect(name) as client:
        return client.call(method, **params)


def _logs(args: argparse.Namespace) -> int:
    from tinyvmm.instances import registry
    from tinyvmm.instances.output_log import read_pieces
    from tinyvmm.session import write_all

    state = registry.find(args.name)
    if args.console:
        if state.running:
            text = _ask(args.name, "console")
        else:
            try:
                with open(
                    registry.path_of(args.name, "console"), encoding="utf-8", errors="replace"
                ) as file:
                    text = file.read()
            except FileNotFoundError:
                raise ConfigError(
                    f"what machine {args.name}'s kernel printed was not kept: {state.message}"
                ) from None
        sys.stdout.write(text)
        return 0
    if not state.detached:
        raise ConfigError(f"machine {args.name} is not detached: its output went to its terminal")

    def running() -> bool:
        found = registry.read(args.name)
        return found is not None and found.running

    follow = running if args.follow else None
    for piece in read_pieces(registry.path_of(args.name, "output"), follow=follow):
        data = piece.data
        if args.timestamps:
            when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(piece.when // 10**9))
            data = f"{when}.{piece.when % 10**9:09}Z ".encode() + data
        write_all(1 if piece.stream == "stdout" else 2, data)
    return 0


def _attach(args: argparse.Namespace) -> int:
    from tinyvmm.instances.attach import attach, parse_keys

    return attach(args.name, stdin=not args.no_stdin, keys=parse_keys(args.detach_keys))


def _each(names: list[str], work: Callable[[str], None]) -> int:
    """Do it for each machine, tell what failed, and go on; the exit status."""
    failed = 0
    for name in names:
        try:
            work(name)
        except ConfigError as error:
            warn(str(error))
            failed = 125
    return failed


def _stop(args: argparse.Namespace) -> int:
    from tinyvmm.instances import registry

    names = [state.name for state in registry.list_() if state.running] if args.all else args.names
    if not names and not args.all:
        raise ConfigError("name the machines to stop, or give --all")

    def stop(name: str) -> None:
        if registry.find(name).running:
            _end(name, "stop", time=args.time)
        print(name)

    return _each(names, stop)


def _end(name: str, method: str, **params: Any) -> None:
    """Have a machine end, which may do so by itself meanwhile, or only just have begun."""
    from tinyvmm.instances import registry

    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            _ask(name, method, **params)
        except ConfigError:
            state = registry.read(name)
            if state is not None and state.running:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
                continue
        registry.wait(name)
        return


def _kill(args: argparse.Namespace) -> int:
    from tinyvmm.methods.supervisor import signal_number

    number = signal_number(args.signal)

    def kill(name: str) -> None:
        _ask(name, "kill", signal=number)
        print(name)

    return _each(args.names, kill)


def _wait(args: argparse.Namespace) -> int:
    from tinyvmm.instances import registry

    def wait(name: str) -> None:
        registry.find(name)
        state = registry.wait(name)
        print("-" if state is None else state.status)

    return _each(args.names, wait)


def _rm(args: argparse.Namespace) -> int:
    from tinyvmm.instances import registry

    def rm(name: str) -> None:
        if args.force and registry.find(name).running:
            _end(name, "kill")
        if registry.read(name) is not None or not args.force:
            registry.remove(name)
        print(name)

    return _each(args.names, rm)


def _inspect(args: argparse.Namespace) -> int:
    from tinyvmm.instances import registry

    print(json.dumps([_known(registry.find(name)) for name in args.names], indent=2))
    return 0


def _call(method: str) -> Callable[[argparse.Namespace], int]:
    def main(args: argparse.Namespace) -> int:
        def call(name: str) -> None:
            _ask(name, method)
            print(name)

        return _each(args.names, call)

    return main


def _control(args: argparse.Namespace) -> int:
    params = {}
    for text in args.params:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r}: give KEY=VALUE, e.g. cpu=0 or signal=HUP")
        try:
            params[key] = json.loads(value)
        except ValueError:
            params[key] = value  # a string without its quotes: what it should be is checked there
    from tinyvmm.instances.exec_client import connect

    with connect(args.name) as client:
        result = client.call(args.method, **params)
        if args.method != "trace":
            print(json.dumps(result, indent=2))
            return 0
        while True:  # until the machine's end, or Ctrl-C
            try:
                _, told = client.notification()
            except ConfigError:
                return 0
            print(json.dumps(told), flush=True)
