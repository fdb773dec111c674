"""Run a guest's shell and this side's in turn: one step of one, then one of the other.

Usage: converse.py '[["guest", "COMMAND"], ["host", "COMMAND"], ...]' PROGRAM...
PROGRAM must read shell commands on stdin. Prints JSON: the output of each step, and how PROGRAM
ended. Needs no package of ours.
"""

import json
import subprocess
import sys
import threading

LIMIT = 500  # seconds in all
MARK = "==end of step=="


def main() -> None:
    steps = json.loads(sys.argv[1])
    process = subprocess.Popen(
        sys.argv[2:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(LIMIT, process.kill)
    timer.start()
    outputs = []
    for side, command in steps:
        if side == "host":
            done = subprocess.run(
                ["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
            )
            outputs.append(done.stdout.decode())
            continue
        try:
            process.stdin.write(f"{{ {command}\n}} 2>&1; echo {MARK}\n".encode())
            process.stdin.flush()
        except BrokenPipeError:
            break  # it ended too early, and its last words are told below
        lines = []
        for line in process.stdout:
            if line.decode().endswith(MARK + "\n"):
                lines.append(line.decode().removesuffix(MARK + "\n"))
                break
            lines.append(line.decode())
        outputs.append("".join(lines))
    more, errors = process.communicate()
    timer.cancel()
    result = {
        "status": process.returncode,
        "outputs": outputs,
        "rest": more.decode(),
        "stderr": errors.decode(),
    }
    sys.stdout.write(json.dumps(result))


main()
