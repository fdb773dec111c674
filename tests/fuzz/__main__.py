"""Fuzz by coverage, with atheris: `python -m tests.fuzz TARGET CORPUS... [-libFuzzer_option=N]`.

New inputs go into the first corpus directory. `python -m tests.fuzz TARGET --keep N FROM INTO`
copies up to N inputs from FROM into INTO, those that together reach most. The file of an input that
fails is named at the end; so is it played again: `python -m tests.fuzz TARGET FILE`.
"""

import importlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from types import FrameType

# Imported only once atheris is there to instrument it.
TARGETS = {
    "ninep": ("tests.fuzz.ninep_session", "tinyvmm.fileserver", "tinyvmm.ninep"),
    "control": (
        "tests.fuzz.control_client",
        "tinyvmm.instances.control",
        "tinyvmm.methods.supervisor",
    ),
    "virtio": ("tests.fuzz.virtio_device", "tinyvmm.devices", "tinyvmm.devices"),
}


def player(name: str, directory: str) -> Callable[[bytes], None]:
    """Return what plays one input of a target."""
    module = importlib.import_module(TARGETS[name][0])
    place = module.Place(directory)
    return lambda data: module.play(data, place)


def fuzz(name: str, arguments: list[str]) -> None:
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=list(TARGETS[name][1:])):
        importlib.import_module(TARGETS[name][0])
    with tempfile.TemporaryDirectory(dir=_fast()) as directory:
        atheris.Setup([sys.argv[0], *arguments], player(name, directory))
        atheris.Fuzz()


def keep(name: str, most: int, source: str, target: str) -> None:
    """Choose inputs that together reach nearly what all do: always the one that adds most."""
    reach: dict[str, set[tuple[str, int, int]]] = {}
    with tempfile.TemporaryDirectory(dir=_fast()) as directory:
        play = player(name, directory)
        for entry in os.listdir(source):
            with open(os.path.join(source, entry), "rb") as file:
                reach[entry] = _lines(play, file.read())
    every = len(set().union(*reach.values()))
    reached: set[tuple[str, int, int]] = set()
    kept = 0
    while kept < most:
        best = max(reach, key=lambda entry: len(reach[entry] - reached))
        if reach[best] <= reached:
            break
        reached |= reach[best]
        kept += 1
        with (
            open(os.path.join(source, best), "rb") as file,
            open(os.path.join(target, best), "wb") as copy,
        ):
            copy.write(file.read())
    print(f"{kept} of {len(reach)} inputs: {len(reached)} of {every} lines and counts")  # noqa: T201


def _lines(play: Callable[[bytes], None], data: bytes) -> set[tuple[str, int, int]]:
    """The lines of ours that an input reaches, each with the magnitude of how often."""
    counts: dict[tuple[str, int], int] = {}

    def trace(frame: FrameType, event: str, _: object) -> object:
        name = frame.f_code.co_filename
        if f"{os.sep}tinyvmm{os.sep}" not in name:
            return None
        if event == "line":
            key = (name, frame.f_lineno)
            counts[key] = counts.get(key, 0) + 1
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]  # a trace function returns one
    threading.settrace(trace)  # type: ignore[arg-type]
    try:
        play(data)
    finally:
        sys.settrace(None)
        threading.settrace(None)
    return {(name, line, min(count.bit_length(), 4)) for (name, line), count in counts.items()}


def _fast() -> str | None:
    """A directory whose fsync costs nothing, if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    target, *rest = sys.argv[1:]
    if rest[:1] == ["--keep"]:
        keep(target, int(rest[1]), rest[2], rest[3])
    else:
        fuzz(target, rest)
