"""Run a machine that writes to its disks, and kill it: kill_disk.py FILES SECONDS COMMAND...

Passes on what the command writes, kills it SECONDS after line FILES, and says what became of it.
"""

import subprocess
import sys
import time

lines, seconds = int(sys.argv[1]), float(sys.argv[2])
with subprocess.Popen(sys.argv[3:], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.buffer.write(line)
        lines -= 1
        if not lines:
            break
    time.sleep(seconds)
    process.kill()
    sys.stdout.buffer.write(process.stdout.read())
sys.stdout.write(f"\nstatus {process.returncode}\n")
