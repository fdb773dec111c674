"""The root's own init as PID 1: busybox's in a root of nothing else, systemd's in one of /usr and
what it needs of /etc; and a guest out of memory.
"""

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


# A target that wants one service; generators, which look for what else there may be to start, are
# masked, since each takes an emulated computer a second.
SYSTEMD_ROOT = """
for name in bin lib lib64 sbin; do ln -s usr/$name; done
mkdir -p usr var etc/systemd/system/ etc/systemd/system-generators
cp /etc/passwd /etc/group etc && echo 0123456789abcdef0123456789abcdef > etc/machine-id
for it in /usr/lib/systemd/system-generators/*; do
  ln -s /dev/null etc/systemd/system-generators/${it##*/}
done
cd etc/systemd/system
ln -s only.target default.target
printf '[Unit]\nDefaultDependencies=no\nWants=it.service\nAfter=it.service\n' > only.target
cat > it.service <<END
[Unit]
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
[Service]
Type=oneshot
RemainAfterExit=yes
StandardOutput=null
ExecStart=/bin/busybox touch /srv/up
ExecStop=/bin/busybox touch /srv/down
END
"""


def test_systemd_boots_is_asked_and_shuts_down_properly(guest: Runner) -> None:
    tree, kept = f"{TREE}-systemd", f"{TREE}-kept"
    roots = ("--read", tree, "--read", "/usr=/usr", "--shared", f"/srv={kept}")
    busy = ("exec", "one", "--", "/bin/busybox")
    script: list[tuple[dict[str, Any], Any]] = [
        (sh(f"mkdir {tree} {kept} && cd {tree} && {SYSTEMD_ROOT}"), ok()),
        (run("-d", "--name", "one", *roots, "--init", "--", "/lib/systemd/systemd"), ok("one\n")),
        (cli(*busy, "sh", "-c", "until [ -e /srv/up ]; do /bin/busybox sleep 0.1; done"), ok()),
        (cli(*busy, "cat", "/proc/1/comm"), ok("systemd\n")),
        (cli("exec", "one", "--", "systemctl", "is-active", "only.target"), ok("active\n")),
        (cli("stop", "--time", "100", "one"), ok("one\n")),
        (cli("logs", "--console", "one"), 0),
        (cli("inspect", "one"), 0),
        (sh(f"ls {kept}; rm -r {tree} {kept}"), ok("down\nup\n")),
        (cli("rm", "one"), ok("one\n")),
    ]  # fmt: skip
    found = do(guest, [step for step, _ in script])
    for (step, expected), got in zip(script, found, strict=True):
        seen = got["status"] if isinstance(expected, int) else got
        assert seen == expected, (step, got, found[6])
    (one,) = json.loads(found[7]["stdout"])
    assert (one["state"], one["status"], one["message"]) == ("ended", 0, None)
    assert "reboot: Power down" in found[6]["stdout"]
