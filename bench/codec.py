"""Messages a second, encoded and decoded: our codec beside py9p's (in p9fs) and pyroute2's.

Each round measures every codec in turn; figures are medians over the rounds. Everybody starts from
a message made already, as an object of its own kind, and ends with one: making our tuple, their
Fcall or nlmsg is left out. What a codec cannot do (py9p cannot write Rgetattr and Rreaddir,
pyroute2 knows no .L) is a dash. A round trip counts as one message.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

from py9p import py9p  # type: ignore[import-untyped] # has no types
from pyroute2 import plan9  # type: ignore[import-untyped] # has no types

from tinyvmm import ninep
from tinyvmm.ninep import NINEP2000, Dirent, Message, Qid

ROUNDS, SECONDS = 15, 0.02

Work = Callable[[], object]
NAMES = ("tinyvmm", "py9p", "pyroute2")

ENTRIES = [Dirent(Qid(0, 1, number), number + 1, 8, b"file%04d" % number) for number in range(100)]
MESSAGES: list[Message] = [
    ninep.Twalk(1, 2, (b"usr",)),
    ninep.Twalk(1, 2, (b"usr", b"share", b"doc", b"python3")),
    ninep.Rwalk((Qid(0x40, 1, 2),)),
    ninep.Tgetattr(1, 0x7FF),
    ninep.Rgetattr(0x7FF, Qid(0, 1, 2), 0o100644, 0, 0, 1, *range(14)),
    ninep.Tread(1, 4096, 4096),
    ninep.Rread(bytes(4096)),
    ninep.Rreaddir(ninep.encode_records(ENTRIES)),
]


class Wire:
    """Where py9p writes to and reads from."""

    def __init__(self) -> None:
        self.data = b""
        self.at = 0

    def write(self, data: bytes) -> None:
        """Take a message."""
        self.data = data

    def read(self, count: int) -> bytes:
        """Give the next bytes."""
        self.at += count
        return self.data[self.at - count : self.at]


def ours(message: Message) -> tuple[Work, Work]:
    """Encode a message, and decode it: a directory to its entries."""
    wire = ninep.encode(message, 1)
    if not isinstance(message, ninep.Rreaddir):
        return lambda: ninep.encode(message, 1), lambda: ninep.decode(wire)

    def encode() -> object:
        pack = ninep.pack_dirent
        data = b"".join([pack(*qid, at, kind, len(name)) + name for qid, at, kind, name in ENTRIES])
        return ninep.encode(ninep.Rreaddir(data), 1)

    def decode() -> object:
        _, reply = ninep.decode(wire)
        return ninep.decode_records(Dirent, reply[0])

    return encode, decode


def with_py9p(message: Message) -> tuple[Work | None, Work]:
    """The same by py9p."""
    marshal = py9p.Marshal9P(dotu=1)
    stream = Wire()
    stream.data = ninep.encode(message, 1)
    call = py9p.Fcall(message.number, 1)
    for name, value in zip(message.fields, message, strict=True):
        setattr(call, name, [py9p.Qid(*qid) for qid in value] if name == "wqid" else value)
    out = Wire()

    def decode() -> object:
        stream.at = 0
        return marshal.recv(stream)

    if isinstance(message, ninep.Rgetattr | ninep.Rreaddir):
        return None, decode
    return lambda: marshal.send(out, call), decode


def with_pyroute2(message: Message) -> tuple[Work | None, Work | None]:
    """The same by pyroute2."""
    kind = getattr(plan9, f"msg_{type(message).__name__.lower()}", None)
    if kind is None:
        return None, None
    wire = NINEP2000.encode(message, 1)
    theirs = kind(wire)
    theirs.decode()
    marshal = plan9.Marshal9P()

    def encode() -> object:
        theirs.reset()
        theirs.encode()
        return theirs.data

    return encode, lambda: next(marshal.parse(wire))


def rate(work: Work) -> float:
    """Calls a second."""
    done = 0
    start = perf_counter()
    while (spent := perf_counter() - start) < SECONDS:
        for _ in range(50):
            work()
        done += 50
    return done / spent


def label(message: Message) -> str:
    text = type(message).__name__
    if isinstance(message, ninep.Twalk | ninep.Rwalk):
        text += f" of {len(message[-1])}"
    elif isinstance(message, ninep.Rread):
        text += " of 4096"
    elif isinstance(message, ninep.Rreaddir):
        text += " of 100"
    return text


def main() -> None:
    works: dict[tuple[str, str, int], Work] = {}
    for message in MESSAGES:
        for name, make in zip(NAMES, (ours, with_py9p, with_pyroute2), strict=True):
            for side, work in enumerate(make(message)):
                if work is not None:
                    works[label(message), name, side] = work
    samples: dict[tuple[str, str, int], list[float]] = {key: [] for key in works}
    for _ in range(ROUNDS):
        for key, work in works.items():
            samples[key].append(rate(work))
    speed = {key: median(rates) for key, rates in samples.items()}

    header = "".join([f"{name:>12}" for name in NAMES])
    print(f"{'messages/s':12} {'':10}{header}   to the faster of the others")
    for message in MESSAGES:
        row = label(message)
        both: dict[str, Any] = {
            name: 1 / sum([1 / speed[row, name, side] for side in (0, 1)])
            for name in NAMES
            if all((row, name, side) in speed for side in (0, 1))
        }
        encoded = {name: speed[row, name, 0] for name in NAMES if (row, name, 0) in speed}
        decoded = {name: speed[row, name, 1] for name in NAMES if (row, name, 1) in speed}
        for what, rates in (("encode", encoded), ("decode", decoded), ("both", both)):
            figures = "".join([f"{rates.get(name, 0):12,.0f}" for name in NAMES])
            others = [value for name, value in rates.items() if name != NAMES[0]]
            ratio = f"{rates[NAMES[0]] / max(others):6.1f}x" if others else ""
            print(f"{row:12} {what:10}{figures.replace('           0', '           -')}   {ratio}")
