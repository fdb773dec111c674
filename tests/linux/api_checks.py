"""Many uses of tinyvmm.run and tinyvmm.Machine, in one process where machines run.

Usage: api_checks.py ROOT. Prints JSON: what each check found. test_api.py says what it should be.
"""

import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


def in_one_machine() -> dict[str, Any]:
    """One that is awaited, on a thread; with a root of objects, which is seen by a hook."""
    import tinyvmm
    from tinyvmm import aio

    found: dict[str, Any] = {}
    seen: set[tuple[str, str]] = set()

    def on_access(access: tinyvmm.Access) -> None:
        seen.add((access.op, access.path))
        if access.path == "/broken" and access.op == "read":
            raise OSError(5, "broken")

    root = {
        "hello.txt": b"hi",
        "called": lambda: "made when opened\n",
        "broken": b"never seen",
        **{name: f"/{name}" for name in ("bin", "lib", "lib64", "usr", "etc")},
    }

    async def main() -> None:
        own = aio.AsyncMachine(memory="512M", root=root, on_access=on_access, user="nobody")
        async with own as machine:
            both = await asyncio.gather(
                machine.run(["id", "-un"], capture_output=True),
                machine.run(["id", "-un"], capture_output=True, user="root"),
            )
            found["awaited"] = [each.stdout.decode() for each in both]
            commands(machine.machine, found)
            inside(machine.machine, found)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    thread.join()
    found["seen"] = {("open", "/hello.txt"), ("open", "/called")} <= seen
    return found


def commands(vm: Any, found: dict[str, Any]) -> None:
    """Streams, statuses, errors."""
    import tinyvmm

    done = vm.run(["cat", "/hello.txt", "/called"], capture_output=True, text=True)
    found["objects"] = [done.returncode, done.stdout]
    done = vm.run(["cat", "/broken"], capture_output=True, text=True)
    found["broken"] = [done.returncode, done.stderr]
    script = sh("cat; echo e >&2; echo o; echo w > /new && cat /new; exit 3")
    merged = {"stdout": tinyvmm.PIPE, "stderr": tinyvmm.STDOUT}
    done = vm.run(script, input="in\n", text=True, user="root", **merged)
    found["merged"] = [done.returncode, done.stdout]
    try:
        vm.run(["sleep", "100"], timeout=2)
    except subprocess.TimeoutExpired as error:
        found["timeout"] = error.timeout
    try:
        vm.run(["nothing-there"])
    except FileNotFoundError as error:
        found["missing"] = str(error)
    try:
        vm.run(["false"], check=True)
    except subprocess.CalledProcessError as error:
        found["checked"] = error.returncode
    found["thread"] = in_a_thread(vm)


def inside(vm: Any, found: dict[str, Any]) -> None:
    """RAM, registers, a trace, files."""
    import tinyvmm

    found["rip"] = vm.cpus[0].regs.rip >> 63
    vm.memory[0x5000:0x5004] = b"abcd"
    found["memory"] = vm.memory[0x5000:0x5004].decode()
    with vm.trace("9p") as records:
        vm.run(["cat", "/hello.txt"], stdout=tinyvmm.DEVNULL)
    found["trace"] = len(records) > 0
    with tempfile.TemporaryDirectory() as here:
        with open(f"{here}/in", "w") as file:
            file.write("x" * 100_000)
        vm.put(f"{here}/in", "/copied")
        vm.get("/copied", f"{here}/out")
        found["copied"] = os.path.getsize(f"{here}/out")


def in_a_thread(vm: Any) -> list[int]:
    """Several at once, from other threads."""
    codes: list[int] = []
    scripts = [sh(f"exit {number}") for number in range(5)]
    threads = [
        threading.Thread(target=lambda s=script: codes.append(vm.run(s).returncode))
        for script in scripts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(codes)


def alone() -> dict[str, Any]:
    """A machine for one command: what it says, which files it opens, and what it changes."""
    import tinyvmm
    from examples.write_diff import write_diff

    opened: set[str] = set()

    def on_access(access: tinyvmm.Access) -> None:
        if access.op == "open" and not access.changes:
            opened.add(access.path)

    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryFile("w+") as said:
        for name in ("changed", "gone"):
            with open(f"{here}/{name}", "w") as file:
                file.write("old\n")
        change = f"cat /etc/hostname > {here}/added; cd {here}; echo new >> changed; rm gone"
        lines = write_diff(
            sh(f"cat; pwd; {change}"),
            input="in\n",
            text=True,
            stdout=said,
            cwd="/usr",
            on_access=on_access,
            timeout=400,
        )
        said.seek(0)
        return {
            "said": said.read(),
            "diff": sorted(line.replace(here, "") for line in lines if here in line),
            "opened": "/etc/hostname" in opened,
        }


def open_files() -> list[str]:
    """What this process has open, but for the directory that is listed."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return sorted(found)


def main() -> None:
    """Do as the arguments say."""
    sys.path.insert(0, sys.argv[1])
    gc.disable()  # what is closed is closed at once, and not when the collector comes by
    before = open_files()
    found = {"machine": in_one_machine(), "alone": alone()}
    left = open_files()
    for name in before:
        if name in left:
            left.remove(name)
    found["left"] = {
        "descriptors": left,
        "threads": [t.name for t in threading.enumerate() if not t.daemon][1:],
        "directories": [name for name in os.listdir("/tmp") if name.startswith("tinyvmm-scratch")],
    }
    sys.stdout.write(json.dumps(found))


main()
