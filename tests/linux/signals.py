"""Run a command, wait until it prints "ready", send it signals, and print how it ended.

Usage: signals.py NUMBER[,NUMBER...] COMMAND...; prints JSON. Needs no package of ours.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time


def main() -> None:
    numbers = [int(number) for number in sys.argv[1].split(",")]
    process = subprocess.Popen(
        sys.argv[2:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    threading.Timer(200, process.kill).start()
    output = b""
    while b"ready" not in output:
        data = os.read(process.stdout.fileno(), 4096)
        if not data:
            break
        output += data
    for number in numbers:
        process.send_signal(signal.Signals(number))
        time.sleep(3)
    more, errors = process.communicate()
    result = {
        "status": process.returncode,
        "stdout": (output + more).decode(),
        "stderr": errors.decode(),
    }
    sys.stdout.write(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


main()
