"""Type into a command's terminal as a person does: wait for something to appear, then type.

Usage: typist.py ROWS COLUMNS '[["wait for", "then type"], ...]' COMMAND...
Prints JSON: the exit status, and all that the terminal showed. Needs no package of ours.
"""

import fcntl
import json
import os
import pty
import select
import struct
import sys
import termios
import time

LIMIT = 500  # seconds in all


def main() -> None:
    rows, columns = int(sys.argv[1]), int(sys.argv[2])
    steps = json.loads(sys.argv[3])
    child, master = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
        os.execvp(sys.argv[4], sys.argv[4:])
    shown, seen = "", 0
    before = termios.tcgetattr(master)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        ready, _, _ = select.select([master], [], [], 1)
        if ready:
            try:
                data = os.read(master, 65536)
            except OSError:
                break  # the other side is closed: the command has ended
            shown += data.decode(errors="replace")
        while steps and (at := shown.find(steps[0][0], seen)) >= 0:
            seen = at + len(steps[0][0])
            os.write(master, steps.pop(0)[1].encode())
    _, status = os.waitpid(child, os.WNOHANG if time.monotonic() >= deadline else 0)
    restored = termios.tcgetattr(master)[:4] == before[:4]
    result = {
        "status": os.waitstatus_to_exitcode(status),
        "shown": shown,
        "left": steps,
        "restored": restored,
    }
    sys.stdout.write(json.dumps(result))


main()
