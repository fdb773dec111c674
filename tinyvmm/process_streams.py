"""The streams of a command in a guest: what a caller may give, and what a session is given for it.

PIPE, STDOUT, DEVNULL, an open file, a number, or None mean what they do to subprocess, but that
stdin is empty where nothing is given. `open_ends` makes of them both sides' ends.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from subprocess import DEVNULL, PIPE, STDOUT
from typing import IO, Any, NamedTuple, TypedDict, cast

from tinyvmm.session import HostFiles, write_all

Sinks = Mapping[str, Callable[[bytes], None]]
OUTPUTS = ("stdout", "stderr")
Given = int | IO[Any] | None
"""What stdin, stdout and stderr may be."""


class StreamOptions(TypedDict, total=False):
    """What a `Process` takes, as subprocess.Popen does; and `timeout`, seconds until it runs."""

    stdin: Given
    stdout: Given
    stderr: Given
    text: bool
    encoding: str | None
    errors: str | None
    timeout: float | None


class CompleteOptions(TypedDict, total=False):
    """What is more for a command that is run to its end, as subprocess.run has it."""

    input: str | bytes | None
    capture_output: bool
    check: bool


class Completion(NamedTuple):
    """How a process is run to its end."""

    input: str | bytes | None
    timeout: float | None
    check: bool


def take_streams(options: Mapping[str, Any]) -> tuple[StreamOptions, dict[str, Any]]:
    """Take apart what a command was given: what its `Process` takes, and the rest."""
    streams = {name: options[name] for name in options if name in StreamOptions.__optional_keys__}
    rest = {name: options[name] for name in options if name not in streams}
    return cast("StreamOptions", streams), rest


def take_complete(options: Mapping[str, Any]) -> tuple[Completion, dict[str, Any]]:
    """Take apart what a `run` was given: what `complete` takes, and the rest, which is popen's.

    ValueError for what contradicts itself, as from subprocess.run.
    """
    rest = {
        name: options[name] for name in options if name not in CompleteOptions.__optional_keys__
    }
    given = options.get("input")
    if given is not None:
        if rest.get("stdin") is not None:
            raise ValueError("stdin and input cannot both be given")
        rest["stdin"] = PIPE
    if options.get("capture_output", False):
        if rest.get("stdout") is not None or rest.get("stderr") is not None:
            raise ValueError("stdout and stderr cannot be given with capture_output")
        rest["stdout"] = rest["stderr"] = PIPE
    return Completion(given, rest.get("timeout"), options.get("check", False)), rest


class Ends(NamedTuple):
    """The two sides of a command's streams: ours for the session, and the caller's."""

    files: HostFiles
    sinks: Sinks
    merged: bool
    pipes: Mapping[str, int]
    """The caller's ends, by name."""
    outputs: Sequence["_Output"]

    def close(self) -> None:
        """Close what the session had."""
        if self.files.stdin is not None:
            os.close(self.files.stdin)
        for output in self.outputs:
            output.close()


class _Output:
    """A descriptor that a session's thread writes to; it may still do so when the session ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()  # guards the two below
        self._writing = False
        self._closed = False

    def write(self, data: bytes) -> None:
        with self._lock:
            if self._closed:
                return
            self._writing = True
        try:
            write_all(self._fd, data)
        finally:
            with self._lock:
                self._writing = False
                if self._closed:
                    os.close(self._fd)

    def close(self) -> None:
        with self._lock:
            if not self._closed and not self._writing:
                os.close(self._fd)
            self._closed = True


def open_ends(stdin: Given, stdout: Given, stderr: Given) -> Ends:
    """Make pipes where they are wanted; ValueError for what cannot be."""
    if STDOUT in (stdin, stdout):
        raise ValueError("STDOUT can only be given for stderr")
    merged = stderr == STDOUT
    wanted: dict[str, Given] = {
        "stdin": DEVNULL if stdin is None else stdin,
        "stdout": 1 if stdout is None else stdout,
        "stderr": DEVNULL if merged else 2 if stderr is None else stderr,
    }
    fds: dict[str, int] = {}
    pipes: dict[str, int] = {}
    try:
        for name, given in wanted.items():
            if given == PIPE:
                ours, theirs = os.pipe2(os.O_CLOEXEC)
                if name != "stdin":
                    ours, theirs = theirs, ours
                fds[name], pipes[name] = ours, theirs
            elif given != DEVNULL:
                # Not the caller's own descriptor, which it may close.
                fds[name] = os.dup(given if isinstance(given, int) else _fileno(given))
    except BaseException:
        for fd in (*fds.values(), *pipes.values()):
            os.close(fd)
        raise
    outputs = {name: _Output(fd) for name, fd in fds.items() if name != "stdin"}
    sinks = {name: outputs[name].write if name in outputs else _discard for name in OUTPUTS}
    files = HostFiles(fds.get("stdin"), None, None)
    return Ends(files, sinks, merged, pipes, list(outputs.values()))


def _fileno(given: IO[Any] | None) -> int:
    if given is None:
        raise AssertionError("None has been replaced")
    return given.fileno()


def _discard(_data: bytes) -> None:
    """Nobody wants it."""
