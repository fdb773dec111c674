"""What a guest may do to the host's side of its command and of its devices, and must not gain."""

import errno
from collections.abc import Callable

import pytest

from tests.test_session_host import GuestPort, Host
from tinyvmm.guest.protocol import EXEC_FAILED, EXITED, RECORD, SETUP_FAILED, STARTED
from tinyvmm.session import HostFiles, Ports, Session
from tinyvmm.streams import PortInput, PortOutput

# --- records of PID 1 -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [STARTED, EXITED, EXEC_FAILED, SETUP_FAILED])
@pytest.mark.parametrize("value", [0, 1 << 31, (1 << 32) - 1, 0xFFFF_0000, errno.ENOENT])
def test_a_record_with_any_value_ends_in_a_status(kind: int, value: int) -> None:
    host = Host()
    try:

        def guest(g: object) -> None:
            host.guest.record(kind, value)
            host.guest.record(EXITED, 0)

        assert 0 <= host.run(guest).status <= 255
    finally:
        host.close()


class Flood(PortOutput):
    """A control port that always holds more records, until the session lets go of it."""

    LIMIT = 100_000  # so that a session that never looks up fails instead of hanging

    def __init__(self, on_read: Callable[[], None]) -> None:
        super().__init__(GuestPort())
        self.reads = 0
        self.released = False
        self._on_read = on_read

    def read(self) -> bytes:
        self.reads += 1
        self._on_read()
        if self.released or self.reads > self.LIMIT:
            return b""
        return RECORD.pack(99, 0) * 100

    def release(self) -> None:
        self.released = True


def test_a_flood_of_records_neither_outruns_the_timeout_nor_piles_up() -> None:
    most = 0

    def watch() -> None:
        nonlocal most
        most = max(most, len(session._events))

    flood = Flood(watch)
    out, err = PortOutput(GuestPort()), PortOutput(GuestPort())
    ports = Ports(PortInput(GuestPort()), out, err, flood, PortInput(GuestPort()))
    files = HostFiles(None, None, None)
    session = Session(ports, command="prog", timeout=0.2, files=files)
    assert session.run().status == 124
    assert flood.reads <= Flood.LIMIT
    assert most < 1000
