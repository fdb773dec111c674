"""How a long job tells that it goes on: a bar on a terminal, one line in all elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total), in bytes; `total` is 0 while it is not known."""

BAR_LEN = 30
REDRAW_SECONDS = 0.1


class TerminalProgress:
    """A `Progress` that writes to `stream` (default: standard error). One thread at a time."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.on_terminal = self.stream.isatty()
        self.told = False
        self.what = ""
        self.drawn_at = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of the job `what` are done."""
        begins = what != self.what
        if begins:
            self.finish()
            self.what = what
            if not self.on_terminal and not self.told:
                self.stream.write(f"tinyvmm: {what}\n")
                self.told = True
        now = time.monotonic()
        if self.on_terminal and (begins or now - self.drawn_at >= REDRAW_SECONDS):
            self.drawn_at = now
            self.stream.write(f"\r{what} {_bar(done, total)}\x1b[K")
            self.stream.flush()

    def finish(self) -> None:
        """Take the bar off the terminal."""
        if self.on_terminal and self.what:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
        self.what = ""


def _bar(done: int, total: int) -> str:
    megabytes = f"{done / 1e6:.0f} MB"
    if not total:
        return megabytes
    part = min(done / total, 1)
    bar = "#" * int(part * BAR_LEN)
    return f"[{bar:<{BAR_LEN}}] {part:4.0%}  {megabytes}"
