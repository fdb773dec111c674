"""The root's own init as PID 1: busybox's, in a root of nothing else; and a guest out of memory."""

import json
from typing import Any

import pytest

from tests.linux.conftest import Runner
from tests.linux.test_instances import cli, do, ok, run, sh

pytestmark = pytest.mark.linux

INITTAB = """
::sysinit:/bin/busybox echo up
::once:/bin/busybox sleep 1000
::shutdown:/bin/busybox echo down
"""
TREE = "/tmp/tinyvmm-init"


def test_an_init_of_its_own_is_shut_down_properly(guest: Runner) -> None:
    make = (
        f"mkdir -p {TREE}/bin {TREE}/sbin {TREE}/etc && cp /bin/busybox {TREE}/bin && "
        f"ln -s ../bin/busybox {TREE}/sbin/init && printf '{INITTAB}' > {TREE}/etc/inittab"
    )
    busy = ("exec", "one", "--", "/bin/busybox")
    script: list[tuple[dict[str, Any], Any]] = [
        (sh(make), ok()),
        (run("-d", "--name", "one", "--read", TREE, "--init"), ok("one\n")),
        (cli(*busy, "cat", "/proc/1/comm"), ok("init\n")),
        (cli(*busy, "sh", "-c", "until /bin/busybox pidof busybox; do :; done"), 0),
        (cli("top", "--json", "one"), 0),
        (cli("cp", f"{TREE}/etc/inittab", "one:/copied"), ok()),
        (cli(*busy, "cat", "/copied"), ok(INITTAB)),
        (cli("stop", "--time", "60", "one"), ok("one\n")),
        (cli("logs", "one"), 0),
        (cli("inspect", "one"), 0),
        # And what a guest without memory says.
        (run("--memory", "96M", "--", "tail", "/dev/zero"),
         ok("", "tinyvmm: the guest ran out of memory and killed the command: give more than 96M "
            "(--memory)\n", 137)),
        (sh(f"rm -r {TREE}"), ok()),
    ]  # fmt: skip
    found = do(guest, [step for step, _ in script])
    for (step, expected), got in zip(script, found, strict=True):
        seen = got["status"] if isinstance(expected, int) else got
        assert seen == expected, (step, got)
    assert found[8]["stdout"] == "up\ndown\n"
    assert "The system is going down" in found[8]["stderr"]
    commands = [process["command"] for process in json.loads(found[4]["stdout"])]
    assert "/bin/busybox sleep 1000" in commands
    (one,) = json.loads(found[9]["stdout"])
    assert (one["state"], one["status"], one["message"]) == ("ended", 0, None)
