"""A machine's control socket, used as a program would; says what came of it, as JSON.

Usage: control_steps.py ROOT DIRECTORY COMMANDS KILLS. In an emulated computer Python takes seconds
to start: so all of it is one process, and its clients are forks of it or threads.
"""

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

ROOT, WHERE, COMMANDS, KILLS = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sys.path.insert(0, ROOT)

import tinyvmm.cli.instance  # noqa: E402
import tinyvmm.cli.instances  # noqa: E402
import tinyvmm.cli.run  # noqa: E402
import tinyvmm.command.run  # noqa: E402
import tinyvmm.fileserver.connection  # noqa: E402
import tinyvmm.guest.calls  # noqa: E402
import tinyvmm.guest.execution  # noqa: E402
import tinyvmm.inside.guest_calls  # noqa: E402
import tinyvmm.instances.control_schema  # noqa: E402
import tinyvmm.methods.exec_streams  # noqa: E402
import tinyvmm.methods.shares  # noqa: E402, F401
from tinyvmm.cli.main import main  # noqa: E402
from tinyvmm.errors import ConfigError  # noqa: E402
from tinyvmm.instances.control import ControlClient  # noqa: E402
from tinyvmm.instances.exec_client import connect, execute  # noqa: E402
from tinyvmm.session import HostFiles  # noqa: E402

found: dict[str, Any] = {}
# Nothing to link: it is our side that is tried here, and a guest in an emulated computer is slow.
SHELL = ("/bin/busybox", "sh", "-c")


class Client(ControlClient):
    """Keeps what streams said."""

    def __init__(self) -> None:
        super().__init__(f"{os.environ['XDG_RUNTIME_DIR']}/tinyvmm/m/control")
        self.said: dict[str, str] = {}
        self.ends: dict[str, int] = {}
        self.traced: list[dict[str, Any]] = []

    def listen(self) -> None:
        method, params = self.notification()
        if method == "trace_record":
            self.traced.append(params)
        elif method == "exec_output":
            text = b64decode(params["data"]).decode()
            self.said[params["stream"]] = self.said.get(params["stream"], "") + text
        else:
            self.ends[params["stream"]] = params["status"]

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.listen()

    def run(self, *argv: str, stdin: str = "") -> list[Any]:
        """Run a command to its end: what it said, and its status."""
        stream = f"run{len(self.ends)}"
        self.call("exec", argv=list(argv), stream=stream)
        self.call("exec_stdin", stream=stream, data=b64encode(stdin.encode()).decode(), eof=True)
        self.until(lambda: stream in self.ends)
        return [self.said.get(stream, ""), self.ends[stream]]


def said(client: "Client", stream: str, text: str) -> bool:
    return text in client.said.get(stream, "")


def refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except ConfigError as error:
        return str(error)
    return "no error"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited in vain: {found}")
        time.sleep(0.05)


def start() -> None:
    if os.fork() == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        # Little memory: the first use of each page costs an emulated computer much.
        os._exit(main(["run", "--no-lab", "-d", "--name", "m", "--balloon", "0", "--cpus", "2",
                       "--memory", "256M", "--", "sleep", "100000"]))  # fmt: skip
    _, status = os.wait()
    found["started"] = status


def ask(client: Client) -> None:
    """What there is to be seen of it."""
    found["status"] = client.call("status")["state"]
    found["run"] = client.run("sh", "-c", "cat; echo err >&2; exit 3", stdin="in\n")
    # What is typed goes another way than the size, and may be there first.
    resized = 'while [ "$(stty size)" = "11 22" ]; do sleep 0.1; done'
    client.call("exec", argv=["sh", "-c", f"stty size; read x; {resized}; stty size"], stream="t",
                terminal=[11, 22])  # fmt: skip
    client.until(lambda: "11 22" in client.said.get("t", ""))
    client.call("exec_resize", stream="t", rows=33, columns=44)
    client.call("exec_stdin", stream="t", data="Cg==")
    client.until(lambda: "t" in client.ends)
    found["sizes"] = client.said["t"]
    script = 'for s in HUP INT TERM USR1; do trap "echo $s" $s; done; echo up; '
    client.call("exec", argv=["sh", "-c", script + "while :; do sleep 0.05; done"], stream="s")
    client.until(lambda: "up" in client.said.get("s", ""))
    for name in ("HUP", "INT", "TERM", "USR1"):
        client.call("exec_signal", stream="s", signal=name)
        client.until(partial(said, client, "s", f"{name}\n"))
    client.call("exec_signal", stream="s", signal="KILL")
    client.until(lambda: "s" in client.ends)
    found["signalled"] = client.ends["s"]
    client.call("pause", cpu=1)
    found["rip"] = client.call("registers", cpu=1)["rip"]
    found["cr0"] = client.call("sregs", cpu=1)["cr0"]
    client.call("resume")
    client.call("trace", kinds=["9p"], device="virtio-9p root")
    client.run("stat", "/etc/hostname")
    client.call("untrace")
    found["traced"] = {record["kind"] for record in client.traced}
    found["traced"] = [sorted(found["traced"]), bool(client.traced)]
    found["debugged"] = client.call("device_debug", pattern="virtio-9p root")
    client.run("stat", "/etc/passwd")
    found["log"] = len(client.call("debug_log")) > 0
    client.call("device_debug", pattern=None)
    stats = client.call("stats")
    found["exits"] = [vcpu["exits"] for vcpu in stats["vcpus"]]
    found["requests"] = stats["requests"]["virtio-9p root"][0]
    found["memory"] = stats["memory"]
    client.call("balloon", size=64 << 20)
    until(lambda: client.call("balloon", size=64 << 20)["actual"] == 64 << 20)


def share(client: Client) -> None:
    """Directories that come and go."""
    here = os.path.join(WHERE, "shared")
    os.mkdir(here)
    with open(os.path.join(here, "hello"), "w", encoding="ascii") as file:
        file.write("from the host\n")
    found["added"] = client.call("share_add", guest="/mnt/a/b", host=here)
    found["read"] = client.run("cat", "/mnt/a/b/hello")
    found["wrote"] = client.run("sh", "-c", "echo from the guest > /mnt/a/b/there")
    with open(os.path.join(here, "there"), encoding="ascii") as file:
        found["there"] = file.read()
    found["twice"] = refusal(lambda: client.call("share_add", guest="/mnt/a/b", host=here))
    client.call("share_add", guest="/mnt/ro", host=here, readonly=True)
    found["readonly"] = client.run("sh", "-c", "cat /mnt/ro/hello; echo x > /mnt/ro/y")
    found["listed"] = [info["guest"] for info in client.call("shares")]
    script = "cd /mnt/a/b; echo up; read x; cat hello && exit 1; echo gone"
    client.call("exec", argv=["sh", "-c", script], stream="in")
    client.until(lambda: "up" in client.said.get("in", ""))
    found["busy"] = refusal(lambda: client.call("share_remove", guest="/mnt/a/b"))
    client.call("share_remove", guest="/mnt/a/b", lazy=True)
    client.call("exec_stdin", stream="in", data="Cg==")
    client.until(lambda: "in" in client.ends)
    found["gone"] = client.ends["in"]
    client.call("share_remove", guest="/mnt/ro")
    found["empty"] = client.run("ls", "-A", "/mnt/ro", "/mnt/a/b")
    found["unlisted"] = client.call("shares")
    for guest, host in (("/x", "relative"), ("/x", "/nothing/there"), ("/", here)):
        found.setdefault("refused", []).append(
            refusal(partial(client.call, "share_add", guest=guest, host=host))
        )


def many_on_one_connection(count: int, chosen: random.Random) -> int:
    """All at once, each with its words and status; how many of them were killed.

    A fifth is killed in the midst of it, and a tenth is left to itself: its client goes first.
    """
    with Client() as client:
        names = [f"n{number}" for number in range(count)]
        for number, name in enumerate(names):
            script = f"read x; echo $x; exit {number % 100}"
            client.call("exec", argv=[*SHELL, script], stream=name)
        fates = chosen.sample(names, len(names))
        killed_ones, left = fates[: count // 5], fates[count // 5 : count // 5 + count // 10]
        for name in names:
            if name in killed_ones:
                client.call("exec_signal", stream=name, signal="KILL")
            elif name not in left:
                data = b64encode(name.encode() + b"\n").decode()
                client.call("exec_stdin", stream=name, data=data)
        client.until(lambda: len(client.ends) == count - len(left))
        for number, name in enumerate(names):
            expected = ("", 137) if name in killed_ones else (f"{name}\n", number % 100)
            if name not in left and (client.said.get(name, ""), client.ends[name]) != expected:
                found.setdefault("wrong", []).append([name, client.said.get(name)])
    return len(killed_ones)


def clients_that_are_killed(count: int, chosen: random.Random) -> None:
    """Each a process, at most 16 at once; half of them are killed sooner or later."""
    running: dict[int, bool] = {}
    statuses: list[int] = []
    killed_ones: list[int] = []

    def reap() -> None:
        pid, status = os.wait()
        (killed_ones if running.pop(pid) else statuses).append(os.waitstatus_to_exitcode(status))

    for number in range(count):
        while len(running) >= 16:
            reap()
        kill = number % 2 == 1
        pid = os.fork()
        if pid == 0:
            argv = [*SHELL, f"echo {'x' * 100}; sleep 0.{chosen.randrange(3)}; exit 5"]
            nobody = HostFiles(None, None, None)
            sinks = dict.fromkeys(("stdout", "stderr"), swallow)
            os._exit(execute("m", argv, files=nobody, sinks=sinks).status)
        running[pid] = kill
        if kill:
            threading.Timer(0 if number == 1 else chosen.random() * 2, killed, (pid,)).start()
    while running:
        reap()
    found["statuses"] = sorted(set(statuses))
    found["killed"] = killed_ones.count(-signal.SIGKILL)


def swallow(_data: bytes) -> None:
    """Want nothing of what a command says."""


def killed(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def guests_processes(client: Client) -> list[str]:
    """Name of each process of the guest's that is no kernel thread, and " Z" after a zombie's.

    What asks is one of them. A file of /proc has no size: it has to be read; a zombie's is empty.
    """
    script = "for p in /proc/[0-9]*; do x= c=; "
    script += "{ read x < $p/stat; read c < $p/cmdline; } 2> /dev/null; "
    script += "case $x in *') Z '*) echo $x;; *) [ -z \"$c\" ] || echo $x;; esac; done"
    said, status = client.run(*SHELL, script)
    if status:
        raise SystemExit(f"the guest's processes: status {status}: {said}")
    lines = (line.split(" ", 1)[1].rsplit(")", 1) for line in said.splitlines())
    return sorted(name + ")" + (" Z" if rest.startswith(" Z ") else "") for name, rest in lines)


def files_in_use(client: Client) -> int:
    """How many files the guest's kernel has open (proc_sys_fs(5): file-nr)."""
    said, _ = client.run("/bin/busybox", "cat", "/proc/sys/fs/file-nr")
    return int(said.split()[0])


def soak(client: Client) -> None:
    client.run("/bin/busybox", "true")
    until(lambda: client.call("execs")["running"] == [])
    before = guests_processes(client)
    files = files_in_use(client)
    until(lambda: client.call("execs")["running"] == [])
    stats = client.call("stats")
    begin = time.monotonic()
    chosen = random.Random(7)  # noqa: S311 (no secret)
    found["commands_killed"] = 0
    batch = 200 if COMMANDS > 400 else 40
    for first in range(0, COMMANDS, batch):
        count = min(batch, COMMANDS - first)
        found["commands_killed"] += many_on_one_connection(count, chosen)
    middle = time.monotonic()
    clients_that_are_killed(KILLS, chosen)
    found["seconds"] = [round(middle - begin, 1), round(time.monotonic() - middle, 1)]
    until(lambda: client.call("execs")["running"] == [])
    found["processes"] = [before, guests_processes(client)]
    # The last of them may have been told of as ended a moment before PID 1 reaped it.
    deadline = time.monotonic() + 120
    while found["processes"][1] != before and time.monotonic() < deadline:
        found["processes"][1] = guests_processes(client)
    found["files"] = [files, files_in_use(client)]
    until(lambda: client.call("execs")["running"] == [])
    until(lambda: client.call("stats")["descriptors"] <= stats["descriptors"])
    until(lambda: client.call("stats")["threads"] <= stats["threads"])
    found["ended"] = len(client.call("execs")["ended"])
    found["overhead"] = [stats["memory"]["overhead"], client.call("stats")["memory"]["overhead"]]
    names = os.listdir(f"{os.environ['XDG_RUNTIME_DIR']}/tinyvmm/m")
    found["sockets"] = [name for name in names if name.startswith("vsock_")]


def finish() -> None:
    with connect("m") as client:
        client.call("kill")
    status = 0
    if os.fork() == 0:
        os._exit(main(["rm", "-f", "m"]))
    _, status = os.wait()
    found["removed"] = [status, os.listdir(f"{os.environ['XDG_RUNTIME_DIR']}/tinyvmm")]


os.environ["XDG_RUNTIME_DIR"] = os.path.join(WHERE, "run")
os.mkdir(os.environ["XDG_RUNTIME_DIR"])
out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
times = [time.monotonic()]
start()
times.append(time.monotonic())
with Client() as first:
    if "ask" in sys.argv[5:]:
        ask(first)
        times.append(time.monotonic())
        share(first)
        times.append(time.monotonic())
    soak(first)
times.append(time.monotonic())
finish()
found["times"] = [round(after - before, 1) for before, after in pairwise(times)]
os.write(out, json.dumps(found).encode())
