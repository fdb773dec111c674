"""Many uses of tinyvmm.run and tinyvmm.Machine, in one process where machines run.

Usage: api_checks.py ROOT. Prints JSON: what each check found. test_api.py says what it should be.
"""

import asyncio
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
    """A root of objects, seen by a hook; commands, signals, RAM, registers, a trace, files."""
    import tinyvmm

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
    with tinyvmm.Machine(memory="512M", root=root, on_access=on_access) as vm:
        done = vm.run(["cat", "/hello.txt", "/called"], capture_output=True, text=True)
        found["objects"] = [done.returncode, done.stdout]
        done = vm.run(["cat", "/broken"], capture_output=True, text=True)
        found["broken"] = [done.returncode, done.stderr]
        script = sh("cat; echo e >&2; echo o; echo w > /new && cat /new; exit 3")
        done = vm.run(script, input="in\n", stdout=tinyvmm.PIPE, stderr=tinyvmm.STDOUT, text=True)
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
        found["left"] = (
            sorted(set(vm.run(["ls", "/"], capture_output=True).stdout.split()))[:2] != []
        )
    found["seen"] = {("open", "/hello.txt"), ("open", "/called")} <= seen
    return found


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
    """A machine for one command; one that is awaited, from a thread; what a command changes."""
    import tinyvmm
    from examples.build_manifest import manifest
    from examples.write_diff import write_diff
    from tinyvmm import aio

    found: dict[str, Any] = {}
    script = sh("cat; pwd; echo e >&2; exit 4")
    done = tinyvmm.run(script, input="in\n", capture_output=True, text=True, timeout=60, cwd="/usr")
    found["run"] = [done.returncode, done.stdout, done.stderr]
    with tempfile.TemporaryDirectory() as here:
        for name in ("changed", "gone"):
            with open(f"{here}/{name}", "w") as file:
                file.write("old\n")
        change = sh(f"cd {here}; echo new >> changed; rm gone; echo x > added")
        lines = write_diff(change)
        found["diff"] = sorted(line.replace(here, "") for line in lines if here in line)

    status, files = manifest(["cat", "/etc/hostname"], stdout=tinyvmm.DEVNULL)
    found["manifest"] = [status, "/etc/hostname" in files, len(files) > 2]

    async def main() -> list[bytes]:
        async with aio.AsyncMachine(memory="512M") as vm:
            both = await asyncio.gather(
                vm.run(["echo", "a"], capture_output=True),
                vm.run(["echo", "b"], capture_output=True),
            )
            return [each.stdout.decode() for each in both]

    awaited: list[Any] = []
    thread = threading.Thread(target=lambda: awaited.extend(asyncio.run(main())))
    thread.start()
    thread.join()
    found["awaited"] = awaited
    return found


def main() -> None:
    """Do as the arguments say."""
    sys.path.insert(0, sys.argv[1])
    before = len(os.listdir("/proc/self/fd"))
    found = {"machine": in_one_machine(), "alone": alone()}
    found["descriptors"] = {"more": len(os.listdir("/proc/self/fd")) - before}
    found["threads"] = {"left": [t.name for t in threading.enumerate() if not t.daemon][1:]}
    scratch = [name for name in os.listdir("/tmp") if name.startswith("tinyvmm-scratch")]
    found["directories"] = {"left": scratch}
    sys.stdout.write(json.dumps(found))


main()
