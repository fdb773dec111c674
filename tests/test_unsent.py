"""What the command wrote to the network and closed arrives, although the machine ends with it.

PID 1 runs in namespaces of this computer (pid1.py), joined to another with a listener by a pair of
interfaces, of which the listener's can be taken down: then nothing is acknowledged.
"""

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import pytest

from tests.pid1 import POWERED_OFF, Guest, Start, needs_namespaces
from tests.pid1 import start as start  # noqa: PLC0414 (a fixture)
from tinyvmm.guest import protocol

pytestmark = [
    needs_namespaces,
    pytest.mark.skipif(not shutil.which("socat") or not shutil.which("ip"), reason="socat, ip"),
]

FIN_WAIT1 = "04"
LONG = 600_000
# Connected, it waits for a word; then it says its own, to be closed by its end or what `then` does.
SCRIPT = """
read joined
exec 3<>/dev/tcp/{address}/9000
echo connected
read cut
echo last words >&3
{then}
exit 7
"""


class Peer:
    """A network namespace with a listener whose output is what it was sent."""

    def __init__(self, family: str = "TCP4") -> None:
        listen = f"socat -u {family}-LISTEN:9000 -"
        script = f"ip link set lo up; echo ready; exec {listen}"
        self.process = subprocess.Popen(
            ["unshare", "-n", "sh", "-c", script], stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout
        assert self.output.readline() == b"ready\n"
        # The listener ends with its connection, which may be as soon as the cable is up.
        self.namespace = os.open(f"/proc/{self.process.pid}/ns/net", os.O_RDONLY)

    def run(self, namespace: str, *words: str) -> None:
        command = ["nsenter", f"--net={namespace}", "ip", *words]
        subprocess.run(command, check=True, pass_fds=[self.namespace])

    @property
    def ours(self) -> str:
        return f"/proc/self/fd/{self.namespace}"

    def join(self, pid: int) -> None:
        """Lay a cable between process `pid`'s namespace and ours."""
        theirs, ours = f"/proc/{pid}/ns/net", str(self.process.pid)
        self.run(theirs, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", ours)
        for where, name, number in ((theirs, "v0", 2), (self.ours, "v1", 1)):
            self.run(where, "address", "add", f"192.0.2.{number}/24", "dev", name)
            self.run(where, "address", "add", f"2001:db8::{number}/64", "dev", name, "nodad")
            self.run(where, "link", "set", name, "up")

    def cable(self, state: str) -> None:
        if state == "up":  # Linux has taken the address with the interface
            address = ("2001:db8::1/64", "dev", "v1", "nodad")
            self.run(self.ours, "address", "replace", *address)
        self.run(self.ours, "link", "set", "v1", state)  # the guest may end, and the cable with it

    def received(self) -> bytes:
        """All of it: the listener ends with its connection."""
        return self.output.read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.output.close()
        os.close(self.namespace)


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def peer6() -> Iterator[Peer]:
    peer = Peer("TCP6")
    yield peer
    peer.close()


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def pid_1(guest: Guest) -> int:
    (pid,) = children(guest.process.pid)
    return int(pid)


def states(pid: int, table: str) -> list[str]:
    lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    return [line.split()[3] for line in lines]


def ended_with_words_unsent(
    start: Start, peer: Peer, *, then: str = "", address: str = "192.0.2.1", **more: object
) -> Guest:
    """A guest whose command has ended, with words on their way that cannot get there."""
    script = SCRIPT.format(address=address, then=then)
    guest = start("bash", "-c", script, **more)
    pid = pid_1(guest)
    peer.join(pid)
    os.write(guest.stdin, b"joined\n")
    said = b""  # a terminal's echo, too
    while b"connected" not in said:
        said += os.read(guest.stdout, 1000)
    peer.cable("down")
    os.write(guest.stdin, b"cut\n")
    if more["unsent_ms"] != LONG:
        return guest  # it may have ended before we can look
    while children(pid):
        sleep(0.01)
    table = "tcp6" if ":" in address else "tcp"
    assert states(pid, table) == [FIN_WAIT1]
    return guest


def has_word(guest: Guest, seconds: float) -> bool:
    return bool(select.select([guest.control], [], [], seconds)[0])


@pytest.mark.parametrize("then", ["", "sleep 1000 & exec 3<&-"])
def test_what_was_written_and_closed_arrives_before_the_end(
    start: Start, peer: Peer, then: str
) -> None:
    guest = ended_with_words_unsent(start, peer, then=then, unsent_ms=LONG)
    assert not has_word(guest, 0.1)
    peer.cable("up")
    status = guest.finish()[2]
    assert peer.received() == b"last words\n"
    assert os.waitstatus_to_exitcode(status) == 7


def test_so_it_does_with_ipv6(start: Start, peer6: Peer) -> None:
    guest = ended_with_words_unsent(start, peer6, address="2001:db8::1", unsent_ms=LONG)
    assert not has_word(guest, 0.1)
    peer6.cable("up")
    assert os.waitstatus_to_exitcode(guest.finish()[2]) == 7
    assert peer6.received() == b"last words\n"


def test_a_peer_that_never_acknowledges_does_not_keep_the_machine(start: Start, peer: Peer) -> None:
    guest = ended_with_words_unsent(start, peer, unsent_ms=500)
    assert os.waitstatus_to_exitcode(guest.finish()[2]) == 7
    assert not select.select([peer.output], [], [], 0)[0]


def test_a_signal_from_the_host_ends_the_wait_and_not_the_commands_status(
    start: Start, peer: Peer
) -> None:
    guest = ended_with_words_unsent(start, peer, unsent_ms=LONG)
    assert not has_word(guest, 0.1)
    guest.send(protocol.WINSIZE, 1)  # this does not
    assert not has_word(guest, 0.1)
    guest.send(protocol.SIGNAL, signal.SIGINT)
    assert os.waitstatus_to_exitcode(guest.finish()[2]) == 7


def test_so_does_the_interrupt_key(start: Start, peer: Peer) -> None:
    guest = ended_with_words_unsent(start, peer, unsent_ms=LONG, terminal=(24, 80))
    os.write(guest.stdin, b"typed")  # this does not
    assert not has_word(guest, 0.1)
    os.write(guest.stdin, b"more \3")
    assert os.waitstatus_to_exitcode(guest.finish()[2]) == 7


def test_so_does_the_end_of_the_host(start: Start, peer: Peer) -> None:
    guest = ended_with_words_unsent(start, peer, unsent_ms=LONG, terminal=(24, 80))
    guest.close("stdin")
    guest.close("control")
    assert guest.process.wait() == POWERED_OFF


def test_a_connection_that_is_done_is_not_waited_for(start: Start, peer: Peer) -> None:
    script = SCRIPT.format(address="192.0.2.1", then="")
    guest = start("bash", "-c", script, unsent_ms=LONG)
    peer.join(pid_1(guest))
    output, _, status = guest.finish(b"joined\ncut\n")
    assert (output, os.waitstatus_to_exitcode(status)) == (b"connected\n", 7)
    assert peer.received() == b"last words\n"
