"""`--trace KINDS`: what happens between guest and machine, as it happens."""

import argparse
import os
from collections.abc import Callable

from tinyvmm import trace
from tinyvmm.errors import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--trace` and `--trace-file`."""
    parser.add_argument(
        "--trace",
        type=parse_kinds,
        metavar="KIND,...",
        help=f"show each event of these kinds: {', '.join(trace.KINDS)}",
    )
    parser.add_argument(
        "--trace-file",
        metavar="FILE",
        help="write the trace to FILE, as JSON lines if it ends in .json, not to stderr",
    )


def parse_kinds(text: str) -> list[str]:
    """Parse names of trace.KINDS with commas between."""
    kinds = text.split(",")
    for kind in kinds:
        if kind not in trace.KINDS:
            known = ", ".join(trace.KINDS)
            raise argparse.ArgumentTypeError(f"{kind!r} cannot be traced: give some of {known}")
    return kinds


def start(kinds: list[str] | None, path: str | None) -> None:
    """Begin to trace, if asked; ConfigError if the file cannot be written."""
    if kinds is None:
        if path is not None:
            raise ConfigError("--trace-file: say with --trace what to trace")
        return
    fd = 2
    if path is not None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write the trace to {path}: {error.strerror}") from None
    as_json = path is not None and path.endswith((".json", ".jsonl"))
    trace.watch(recorder(kinds, fd, as_json=as_json))


def recorder(kinds: list[str], fd: int, *, as_json: bool) -> Callable[[trace.Record], None]:
    """Return a hook that writes records of these kinds to `fd`, a line each."""
    import json

    from tinyvmm.session import write_all

    wanted = [trace.KINDS[kind] for kind in kinds]

    def record(event: trace.Record) -> None:
        if any(is_kind(event) for is_kind in wanted):
            line = json.dumps(trace.fields(event)) if as_json else trace.text(event)
            write_all(fd, line.encode(errors="replace") + b"\n")  # whole, whichever thread

    return record
