"""The user's terminal: raw while the guest's command has it, as it was before whatever happens.

In raw mode (termios(3), "cfmakeraw") every key, Ctrl-C included, is a byte for the guest, whose
own pseudo-terminal gives it its meaning. One thing must stay with the host: a way out when the
guest no longer listens. That is Ctrl-] typed three times in a row; each one is still sent on, so
nothing has to be held back or timed.

Used from the main thread only, except `EscapeKeys`, which belongs to the thread that reads keys.
"""

import atexit
import os
import termios
import tty

ESCAPE_KEY = 0x1D  # Ctrl-]
ESCAPE_PRESSES = 3


def is_terminal_session() -> bool:
    """Say whether standard input and standard output are both terminals."""
    try:
        return os.isatty(0) and os.isatty(1)
    except OSError:
        return False


class Terminal:
    """The terminal behind descriptor `fd` (standard input by default)."""

    def __init__(self, fd: int = 0) -> None:
        self._fd = fd
        self._saved: list[int | list[bytes | int]] | None = None

    def enter_raw(self) -> None:
        """Go raw, keeping what was typed ahead; again after SIGCONT, since shells reset modes.

        From a background job this stops the process with SIGTTOU until it is in the foreground,
        as any full-screen program.
        """
        if self._saved is None:
            self._saved = termios.tcgetattr(self._fd)
            atexit.register(self.restore)
        tty.setraw(self._fd, termios.TCSADRAIN)

    def restore(self) -> None:
        """Put the modes back; harmless when never raw or when the terminal is gone."""
        if self._saved is None:
            return
        saved, self._saved = self._saved, None
        atexit.unregister(self.restore)
        try:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, saved)
        except termios.error:
            return  # hung up: there is nothing left to restore

    def size(self) -> tuple[int, int]:
        """Rows and columns; 24 by 80 when the terminal does not know."""
        try:
            columns, rows = os.get_terminal_size(self._fd)
        except OSError:
            return 24, 80
        return (rows, columns) if rows and columns else (24, 80)


class EscapeKeys:
    """Watches typed bytes for `ESCAPE_KEY` pressed `ESCAPE_PRESSES` times in a row."""

    def __init__(self) -> None:
        self._presses = 0

    def seen(self, data: bytes) -> bool:
        """Account for `data`; true once the sequence is complete."""
        for byte in data:
            self._presses = self._presses + 1 if byte == ESCAPE_KEY else 0
            if self._presses == ESCAPE_PRESSES:
                return True
        return False
