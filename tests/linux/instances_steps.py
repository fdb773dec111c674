"""Do the steps of a script in one process, and say what came of each.

Usage: instances_steps.py ROOT 'JSON'. A step is {"argv": [...]} for a command line of tinyvmm, or
{"sh": "..."} for the shell; further "stdin": text, "background": true to go on as soon as it has
written something, with "signal": N to send it one then, and "join": the index of a step in the
background to wait for. Prints JSON: status, stdout and stderr of each step. In an emulated
computer it takes seconds to import what a command line needs: here it is imported once, and each
command line is a fork(2).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any


class Step:
    """One that runs, or has ended."""

    def __init__(self, step: dict[str, Any]) -> None:
        self.files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 (until `wait`)
        self.files[0].write(step.get("stdin", "").encode())
        self.files[0].seek(0)
        self.pid = os.fork()
        if self.pid == 0:
            for fd, file in enumerate(self.files):
                os.dup2(file.fileno(), fd)
            os._exit(self.work(step))

    @staticmethod
    def work(step: dict[str, Any]) -> int:
        if "sh" in step:
            return subprocess.run(["sh", "-c", step["sh"]], check=False).returncode
        from tinyvmm.cli.main import main

        status = 2
        try:
            status = main(step["argv"])
        except SystemExit as error:
            status = int(error.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        return status

    def wait(self) -> dict[str, Any]:
        _, status = os.waitpid(self.pid, 0)
        found: dict[str, Any] = {"status": os.waitstatus_to_exitcode(status)}
        for name, file in zip(("stdout", "stderr"), self.files[1:], strict=True):
            file.seek(0)
            found[name] = file.read().decode()
            file.close()
        return found


def main() -> None:
    """Do as the arguments say."""
    sys.path.insert(0, sys.argv[1])
    import tinyvmm.cli.inside
    import tinyvmm.cli.instance
    import tinyvmm.cli.instances
    import tinyvmm.cli.run
    import tinyvmm.command.run
    import tinyvmm.inside.guest_files
    import tinyvmm.inside.guest_processes
    import tinyvmm.instances.attach
    import tinyvmm.instances.control
    import tinyvmm.instances.control_server
    import tinyvmm.instances.exec_client
    import tinyvmm.methods.supervisor  # noqa: F401 (what each step needs)

    found: list[Any] = []
    running: dict[int, Step] = {}
    for number, step in enumerate(json.loads(sys.argv[2])):
        if "join" in step:
            found.append(running.pop(step["join"]).wait())
            continue
        made = Step(step)
        if not step.get("background"):
            found.append(made.wait())
            continue
        running[number] = made
        while not os.fstat(made.files[1].fileno()).st_size:
            time.sleep(0.05)
        found.append(None)
        if "signal" in step:
            os.kill(made.pid, step["signal"])
    sys.stdout.write(json.dumps(found))


main()
