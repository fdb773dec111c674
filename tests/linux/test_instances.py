"""Machines with names: what is done with them while they run, and what is left of them."""

import json
import signal
from typing import Any

import pytest

from tests.linux.conftest import LONG, ROOT, Runner, interpreter

pytestmark = pytest.mark.linux

STEPS = ROOT / "tests" / "linux" / "instances_steps.py"


def cli(*argv: str, **more: Any) -> dict[str, Any]:
    return {"argv": list(argv), **more}


def run(*argv: str, **more: Any) -> dict[str, Any]:
    return cli("run", "--no-lab", *argv, **more)


def sh(script: str, **more: Any) -> dict[str, Any]:
    return {"sh": script, **more}


def do(guest: Runner, steps: list[dict[str, Any]]) -> list[Any]:
    """Do the steps where machines run, in a new directory of machines."""
    script = 'd=$(mktemp -d) && export XDG_RUNTIME_DIR=$d && exec "$@"'
    command = [interpreter(), "-I", "-S", str(STEPS), str(ROOT), json.dumps(steps)]
    done = guest.program(["sh", "-c", script, "sh", *command], timeout=LONG)
    assert (done.status, done.stderr) == (0, b""), done
    found: list[Any] = json.loads(done.stdout)
    return found


def ok(stdout: str = "", stderr: str = "", status: int = 0) -> dict[str, Any]:
    return {"status": status, "stdout": stdout, "stderr": stderr}


OUT = "/tmp/tinyvmm-cp"
WAS = "data\n750\n8388608\n1000\n"
WORDS = "echo hello; echo oops >&2; while read -r x; do echo got $x; done; echo over; exit 9"


def test_commands_come_and_go_in_a_machine_that_runs(guest: Runner) -> None:
    many = "i=0; while [ $i -lt 20 ]; do echo $i; i=$((i+1)); done"
    script: list[tuple[dict[str, Any], Any]] = [
        (run("-di", "--name", "web", "--hostname", "webby", "--", "sh", "-c", WORDS), ok("web\n")),
        (cli("ps", "-q"), ok("web\n")),
        (cli("exec", "-i", "web", "--", "sh", "-c", "hostname; cat; echo e >&2; exit 7",
             stdin="in\n"), ok("webby\nin\n", "e\n", 7)),
        (cli("exec", "web", "--", "cat", stdin="not for it\n"), ok()),
        (cli("exec", "web", "--", "nothing-there"),
         ok("", "tinyvmm: nothing-there: command not found in the guest\n", 127)),
        (cli("exec", "--user", "nobody:daemon", "--workdir", "/usr", "--env", "A=b c", "web", "--",
             "sh", "-c", "id -un; id -gn; pwd; echo $A"), ok("nobody\ndaemon\n/usr\nb c\n")),
        (cli("exec", "--user", "no-one-here", "web", "--", "true"), 125),
        (cli("exec", "--timeout", "2", "web", "--", "sleep", "100"), 124),
        (cli("exec", "-t", "web", "--", "sh", "-c", "stty size; test -t 0"), ok("24 80\r\n")),
        (cli("exec", "web", "--", "sh", "-c", many), ok("".join(f"{n}\n" for n in range(20)))),
        # Its client is killed: the command goes on, and its end is known.
        (cli("exec", "web", "--", "sh", "-c", "echo up; sleep 3; touch /tmp/alive; exit 5",
             background=True, signal=int(signal.SIGKILL)), None),
        # A signal of its client's is its own.
        (cli("exec", "web", "--", "sh", "-c",
             "trap 'echo got; exit 3' TERM; echo up; sleep 99 & wait",
             background=True, signal=int(signal.SIGTERM)), None),
        ({"join": 11}, ok("up\ngot\n", "", 3)),
        (cli("exec", "web", "--", "sh", "-c", "until [ -e /tmp/alive ]; do sleep 0.2; done"), ok()),
        (cli("control", "web", "execs"), 0),
        (sh(f"mkdir -p -m 750 {OUT}/d && cd {OUT} && echo data > d/f && ln -s f d/l && "
            "touch -d @1000 d/f && truncate -s 8M sparse"), ok()),
        (cli("cp", OUT, "web:/tmp/inside"), ok()),
        (cli("exec", "web", "--", "sh", "-c",
             "cd /tmp/inside; cat d/l; stat -c %a d; stat -c %s sparse; stat -c %Y d/f;"
             " echo more > d/g; mknod d/null c 1 3"), ok(WAS)),
        (cli("cp", "web:/tmp/inside/.", f"{OUT}/back"),
         ok("", "tinyvmm: d/null is a device or a socket: left out\n")),
        (sh(f"cd {OUT}/back && cat d/l d/g && stat -c '%a %Y' d/f && ls d && du -m sparse && "
            f"rm -r {OUT}"), ok("data\nmore\n644 1000\nf\ng\nl\n0\tsparse\n")),
        (cli("top", "--json", "web"), 0),
        (cli("attach", "web", stdin="one\n"), 9),
        (cli("ps"), 0),
        (cli("ps", "--all", "--json"), 0),
        (cli("logs", "web"), ok("hello\ngot one\nover\n", "oops\n")),
        (cli("exec", "web", "--", "true"),
         ok("", "tinyvmm: machine web has ended, with status 9\n", 125)),
        (run("--name", "web", "--", "true"), 125),
        (cli("wait", "web"), ok("9\n")),
        (cli("rm", "web"), ok("web\n")),
        (sh("ls -A $XDG_RUNTIME_DIR/tinyvmm"), ok()),
    ]  # fmt: skip
    found = do(guest, [step for step, _ in script])
    for (step, expected), got in zip(script, found, strict=True):
        seen = got["status"] if isinstance(expected, int) else got
        assert seen == expected, (step, got)
    execs = json.loads(found[14]["stdout"])
    assert execs["running"] == [] or len(execs["running"]) == 1  # the one of --timeout goes on
    assert 5 in execs["ended"].values()
    processes = {process["command"]: process for process in json.loads(found[20]["stdout"])}
    (command,) = (process for name, process in processes.items() if name.startswith("sh -c echo"))
    assert (command["ppid"], command["user"], command["state"]) == (1, "root", "S")
    assert command["resident"] > 1 << 16
    assert processes["[kthreadd]"]["resident"] == 0
    assert "no-one-here" in found[6]["stderr"]
    assert "web" not in found[22]["stdout"]
    (known,) = json.loads(found[23]["stdout"])
    assert (known["name"], known["status"], known["state"]) == ("web", 9, "ended")
    assert "tinyvmm rm web" in found[26]["stderr"]


CHANGES = "C /etc\nD /etc/debian_version\nC /srv\nA /srv/new\nA /srv/new/file\n"


def test_machines_are_paused_stopped_killed_and_crash(guest: Runner) -> None:
    wait = "trap 'echo bye; exit 4' USR1; trap '' TERM; echo up; while :; do sleep 1; done"
    writes = "mkdir /srv/new; echo x > /srv/new/file; rm /etc/debian_version; "
    forever = ("--stop-signal", "USR1", "--", "sh", "-c", writes + wait)
    script: list[tuple[dict[str, Any], Any]] = [
        (run("-d", "--name", "one", *forever), ok("one\n")),
        (cli("pause", "one"), ok("one\n")),
        (cli("control", "one", "registers", "cpu=0"), 0),
        (cli("control", "one", "registers", "cpu=9"), 125),
        (cli("control", "one", "nothing"), 125),
        (cli("diff", "one"), 0),
        (cli("resume", "one"), ok("one\n")),
        (cli("exec", "one", "--", "sh", "-c", "until test ! -e /etc/debian_version; do :; done"),
         ok()),
        (cli("diff", "one"), ok(CHANGES)),
        (cli("control", "one", "memory_info"), 0),
        (cli("stop", "--time", "30", "one", "missing"), 125),
        (cli("inspect", "one"), 0),
        (cli("logs", "one"), ok("up\nbye\n", "User defined signal 1\n")),  # says sh of its sleep
        (cli("diff", "one"), ok(CHANGES)),
        (cli("commit", "one", "-o", "/tmp/layer.tar"), 0),
        (sh("tar -tf /tmp/layer.tar"),
         ok("etc/\netc/.wh.debian_version\nsrv/\nsrv/new/\nsrv/new/file\n")),
        # The machine's process is killed outright.
        (run("-d", "--name", "two", *forever), ok("two\n")),
        (sh("kill -9 $(grep -o '\"pid\": [0-9]*' $XDG_RUNTIME_DIR/tinyvmm/two/state | cut -c8-)"),
         ok()),
        (cli("wait", "two"), ok("255\n")),
        (cli("ps", "-aq"), ok("one\ntwo\n")),
        (cli("rm", "one", "two"), ok("one\ntwo\n")),
        # The guest's kernel panics.
        (run("-d", "--name", "three", "--", "sh", "-c", "sleep 1; echo c > /proc/sysrq-trigger"),
         ok("three\n")),
        (cli("wait", "three"), ok("255\n")),
        (cli("inspect", "three"), 0),
        (cli("logs", "--console", "three"), 0),
        (cli("rm", "-f", "three"), ok("three\n")),
        # What nobody is to keep, and what never came to be.
        (run("-d", "--rm", "--", "sleep", "2"), 0),
        (run("-d", "--", "nothing-there"),
         ok("", "tinyvmm: nothing-there: command not found in the guest\n", 127)),
        (sh("while ls -A $XDG_RUNTIME_DIR/tinyvmm | grep -q .; do sleep 0.2; done"), ok()),
        (run("--user", "nobody", "--workdir", "/usr", "--", "sh", "-c", "id -un; pwd; echo $HOME"),
         ok("nobody\n/usr\n/nonexistent\n")),
        (sh("ls -A $XDG_RUNTIME_DIR/tinyvmm"), ok()),
    ]  # fmt: skip
    found = do(guest, [step for step, _ in script])
    for (step, expected), got in zip(script, found, strict=True):
        seen = got["status"] if isinstance(expected, int) else got
        assert seen == expected, (step, got)
    assert json.loads(found[2]["stdout"])["rip"] > 0
    assert json.loads(found[9]["stdout"])["size"] == 1 << 30
    assert found[10]["stdout"] == "one\n"
    assert "no machine is named missing" in found[10]["stderr"]
    (one,) = json.loads(found[11]["stdout"])
    assert (one["state"], one["status"]) == ("ended", 4)
    (three,) = json.loads(found[23]["stdout"])
    assert three["status"] == 255
    assert "panic" in three["message"]
    assert "Kernel panic" in found[24]["stdout"]
