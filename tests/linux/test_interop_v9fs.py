"""Linux's own v9fs at `tinyvmm serve`, over a Unix socket, in all three versions of the protocol.

The lab's kernel is the client, so no guest need be booted; without a lab it is this computer's,
if it has the module. v9fs_client.sh does everything in each version and says what became of it.
"""

import os
import platform
from pathlib import Path

import pytest

from tests.linux.conftest import MAIN, Runner
from tinyvmm.images import kernels
from tinyvmm.lab import python_command

pytestmark = pytest.mark.linux

SCRIPT = Path(__file__).parent / "v9fs_client.sh"
VERSIONS = "9p2000", "9p2000.u", "9p2000.L"
EXPECTED = {
    "mounted": "v9fs",
    "read": "from the host",
    "stat": "14 640 1000000000 regular file",
    "written": "from the client and more",
    "other client": "from the client and more",  # a second mount, at the same time
    "listed": "directory file moved",
    "over there": "directory file moved",
    "chmod": "600",
    "truncated": "from",
    "copied": "yes",  # 1 MiB
    "agreed": "yes",
    "link": "file",
    "missing": "No such file or directory",
    "not empty": "Directory not empty",
    "left": "0",
    "unmounted": "yes",
}


@pytest.fixture(scope="module")
def said(guest: Runner) -> list[str]:
    """What the script says, line by line."""
    release = kernels.find().version if guest.lab is not None else platform.release()
    modules = kernels.find().modules if guest.lab is not None else f"/lib/modules/{release}"
    module = Path(modules or "", "kernel/net/9p/9pnet_fd.ko")
    if not module.exists():
        pytest.skip(f"the kernel {release} has no {module}")
    if guest.lab is None and os.geteuid() != 0:
        pytest.skip("only root mounts")
    argv = ["sh", str(SCRIPT), "/tmp/tinyvmm-v9fs-client", str(module)]
    done = guest.program([*argv, *python_command(MAIN, [])])
    assert done.status == 0, done
    return done.stdout.decode().splitlines()


@pytest.mark.parametrize("version", VERSIONS)
def test_v9fs_reads_and_writes_what_is_served(said: list[str], version: str) -> None:
    lines = [line.removeprefix(f"{version} ") for line in said if line.split()[0] == version]
    found = {what: result.strip() for what, _, result in (line.partition(":") for line in lines)}
    expected = dict(EXPECTED)
    if version == "9p2000":
        expected["link"] = "none"  # the protocol of Plan 9 knows no symbolic links
    assert found == expected


def test_the_server_ends_as_it_is_told_to_and_has_nothing_to_say(said: list[str]) -> None:
    assert said[-2:] == [
        "server ended: 0",
        "tinyvmm: 9P at unix:/tmp/tinyvmm-v9fs-client/socket",
    ]
