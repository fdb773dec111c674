"""What several commands read of a command line, and how they warn; this imports next to nothing."""

import argparse
import os
import sys


def parse_seconds(text: str) -> float:
    """Parse a time limit in seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give seconds, more than 0")
    return seconds


def parse_count(text: str) -> int:
    """Parse a number, 1 or more."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 20):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number, 1 or more")
    return int(text)


def parse_environment(text: str) -> str:
    """Parse `K=V`, or `K` to pass on the variable of this process."""
    name, equals, _ = text.partition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=VALUE")
    if equals:
        return text
    if name not in os.environ:
        raise argparse.ArgumentTypeError(f"{name} is not set here: give {name}=VALUE")
    return f"{name}={os.environ[name]}"


def harmless(text: str) -> str:
    """Return text with what would do something to a terminal spelled out, as of a guest's names."""
    return "".join(
        char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text
    )


def warn(line: str) -> None:
    """Tell the user one thing."""
    print(f"tinyvmm: {harmless(line)}", file=sys.stderr, flush=True)
