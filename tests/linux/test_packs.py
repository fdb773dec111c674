"""Packs in a guest: EROFS over its root, a zip at a place of its own, both written over."""

import os
from typing import Any

import pytest

from tests.linux.conftest import Runner
from tests.linux.test_instances import cli, do, ok, run, sh
from tinyvmm.fileserver.written import list_changes
from tinyvmm.images import packs

pytestmark = pytest.mark.linux

SCRIPT = """
cat /etc/of-erofs /opt/z/of-zip /opt/z/link
stat -c '%a %u %g %Y' /etc/of-erofs /opt/z/of-zip
test -e /etc/passwd && echo the root is below
echo more >> /etc/of-erofs && cat /etc/of-erofs
echo new > /opt/z/new && rm /opt/z/of-zip && ls /opt/z
rm /etc/passwd && test ! -e /etc/passwd && mkdir /srv/made && rmdir /srv/made && echo written over
"""
SAID = """\
erofs
zip
zip
640 0 0 1500000000
4755 5 70000 1500000000
the root is below
erofs
more
link
new
written over
"""


CHANGES = """\
C /etc
A /etc/of-erofs
D /etc/passwd
C /opt
A /opt/z
C /srv
A /opt/z/new
D /opt/z/of-zip
"""
# Overlayfs calls every directory opaque that it makes beside what is merged.
NAMES = (
    "etc/ etc/of-erofs etc/.wh.passwd opt/ opt/z/ opt/z/.wh..wh..opq srv/ "
    "opt/z/new opt/z/.wh.of-zip"
)


# What it wrote and removed, as a pack over the root of another.
AGAIN = """
test ! -e /etc/passwd
ls /etc | grep ^passwd$ || cat /etc/of-erofs
ls /opt/z /etc/group
"""
AGAIN_SAID = "erofs\nmore\n/etc/group\n\n/opt/z:\nnew\n"


def test_packs_are_joined_with_the_root_and_written_over(guest: Runner) -> None:
    made = guest.directory("packs")
    for kind, name, mode in (("erofs", "etc/of-erofs", 0o640), ("zip", "of-zip", 0o4755)):
        top = made / f"of {kind}"
        path = top / name
        path.parent.mkdir(parents=True)
        path.write_text(f"{kind}\n")
        if kind == "zip":
            (top / "link").symlink_to("of-zip")
            if os.geteuid() == 0:
                os.chown(path, 5, 70_000)
        path.chmod(mode)
        os.utime(path, (1_500_000_000, 1_500_000_000))
        trees = [("/", str(top))]
        files = packs.Files(list_changes([], trees), trees)
        packs.write(files, str(made / f"pack.{kind}"), kind, print)
    arguments = ["--pack", str(made / "pack.erofs"), "--pack", f"/opt/z={made / 'pack.zip'}"]
    script: list[tuple[dict[str, Any], Any]] = [
        (run("-d", "--name", "web", *arguments, "--", "sleep", "1000"), ok("web\n")),
        (cli("exec", "web", "--", "sh", "-ec", SCRIPT), ok(SAID)),
        (cli("diff", "web"), ok(CHANGES)),
        (cli("commit", "web", "-o", "/tmp/packs.tar"), 0),
        (sh("tar -tf /tmp/packs.tar"), ok("\n".join(NAMES.split()) + "\n")),
        (cli("commit", "web", "-o", "/dev/shm/packs.erofs"), 0),
        (cli("kill", "web"), 0),
        (cli("wait", "web"), ok("137\n")),
        (cli("diff", "web"), 125),
        (cli("rm", "web"), ok("web\n")),
        (run("--pack", "/dev/shm/packs.erofs", "--", "sh", "-ec", AGAIN), ok(AGAIN_SAID)),
        (sh("rm /tmp/packs.tar /dev/shm/packs.erofs"), ok()),
    ]
    found = do(guest, [step for step, _ in script])
    for (step, expected), got in zip(script, found, strict=True):
        seen = got["status"] if isinstance(expected, int) else got
        assert seen == expected, (step, got)
    assert "was in its own memory" in found[8]["stderr"]
