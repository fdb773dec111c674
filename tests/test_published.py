"""Ports of the host's that lead to the guest's: what is said, refused and carried."""

import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.passt_guest import SHORT
from tinyvmm.errors import ConfigError
from tinyvmm.net import options
from tinyvmm.net.handshake import acknowledgement
from tinyvmm.net.options import Published
from tinyvmm.net.passt import Passt

GUEST_MAC, PEER_MAC = bytes.fromhex("525400123456"), bytes.fromhex("9a5554000001")
GUEST, PEER = bytes((10, 0, 2, 15)), bytes((10, 0, 2, 2))
SYN, ACK, FIN, RST = 2, 16, 1, 4


def frame_of(
    flags: int, *, sequence: int = 7, expected: int = 9, tcp_options: bytes = b""
) -> bytes:
    words = (20 + len(tcp_options)) // 4
    tcp = struct.pack(">HHIIBBHHH", 80, 5000, sequence, expected, words << 4, flags, 64240, 0, 0)
    tcp += tcp_options
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0, GUEST, PEER)
    return PEER_MAC + GUEST_MAC + b"\x08\0" + ip + tcp


def answer_to(frame: bytes) -> bytes | None:
    return acknowledgement([memoryview(frame[:5]), memoryview(frame[5:])])


def checksum_is_good(data: bytes) -> bool:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    return total % 0xFFFF == 0 and total > 0


@given(
    sequence=st.integers(0, 0xFFFF_FFFF),
    expected=st.integers(0, 0xFFFF_FFFF),
    words=st.integers(0, 10),
)
def test_a_guests_syn_ack_is_acknowledged(sequence: int, expected: int, words: int) -> None:
    asked = frame_of(SYN | ACK, sequence=sequence, expected=expected, tcp_options=bytes(4 * words))
    answer = answer_to(asked)
    assert answer is not None
    assert answer[:14] == GUEST_MAC + PEER_MAC + b"\x08\0"
    ip, tcp = answer[14:34], answer[34:]
    assert checksum_is_good(ip)
    assert ip[12:] == PEER + GUEST
    assert checksum_is_good(PEER + GUEST + struct.pack(">HH", 6, len(tcp)) + tcp)
    source, target, number, ack, offset, flags, window = struct.unpack(">HHIIBBH", tcp[:16])
    assert (source, target, number, ack) == (5000, 80, expected, (sequence + 1) % 2**32)
    assert (offset, flags, window) == (5 << 4, ACK, 256)


@pytest.mark.parametrize(
    "frame",
    [
        frame_of(ACK), frame_of(SYN), frame_of(RST | ACK), frame_of(SYN | ACK | RST),
        frame_of(SYN | ACK | FIN), frame_of(SYN | ACK)[:50], frame_of(SYN | ACK) + bytes(100),
        frame_of(SYN | ACK).replace(b"\x08\0", b"\x86\xdd", 1), b"", bytes(60),
        frame_of(SYN | ACK).replace(b"\x40\x06", b"\x40\x11", 1),
    ],
)  # fmt: skip
def test_nothing_else_is_answered(frame: bytes) -> None:
    assert answer_to(frame) is None


@given(st.binary(max_size=140))
def test_any_frame_is_survived(frame: bytes) -> None:
    answer_to(PEER_MAC + GUEST_MAC + b"\x08\0" + frame)


# --- what the user says -----------------------------------------------------------------------


def test_ports_are_read() -> None:
    assert options.parse_publish("8080:80") == ("tcp", None, 8080, 80)
    assert options.parse_publish("8080:80/tcp") == ("tcp", None, 8080, 80)
    assert options.parse_publish("127.0.0.1:53:5353/udp") == ("udp", "127.0.0.1", 53, 5353)


@pytest.mark.parametrize(
    "text", ["80", "0:80", "80:70000", "a:b", "80:80/icmp", "80:80/", "x:80:80", "::1:80:80", ""]
)
def test_ports_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--publish .*give \[ADDRESS:\]HOST:GUEST"):
        options.parse_publish(text)


def taken_port(kind: socket.SocketKind, others: socket.SocketKind) -> socket.socket:
    """Return a socket at a port which nobody has for the other protocol."""
    while True:
        taken = socket.socket(socket.AF_INET, kind)
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        with socket.socket(socket.AF_INET, others) as other:
            try:
                other.bind(taken.getsockname())
            except OSError:  # some program's own
                taken.close()
            else:
                return taken


@pytest.mark.parametrize(
    ("protocol", "kind"), [("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)]
)
def test_a_port_in_use_is_one_line(protocol: str, kind: socket.SocketKind) -> None:
    others = socket.SOCK_DGRAM if kind == socket.SOCK_STREAM else socket.SOCK_STREAM
    with taken_port(kind, others) as taken:
        port = taken.getsockname()[1]
        for address in (None, "127.0.0.1"):
            with pytest.raises(ConfigError, match=f"Address already in use for {protocol} port"):
                options.check_published([Published(protocol, address, port, 80)])
        other = "udp" if protocol == "tcp" else "tcp"
        options.check_published([Published(other, "127.0.0.1", port, 80)])


def test_an_address_of_another_computer_is_one_line() -> None:
    with pytest.raises(ConfigError, match="Cannot assign requested address"):
        options.check_published([Published("tcp", "192.0.2.200", 8080, 80)])


def test_only_passt_has_ports_to_lead_from() -> None:
    options.check_kind(options.parse_net("user"))
    for net in (None, options.parse_net("tap")):
        with pytest.raises(ConfigError, match="needs --net user"):
            options.check_kind(net)


def test_one_port_leads_to_one_port() -> None:
    twice = [Published("tcp", "127.0.0.1", 48080, 80), Published("tcp", "127.0.0.2", 48080, 81)]
    with pytest.raises(ConfigError, match="leave one out"):
        options.check_published(twice)


# --- passt ------------------------------------------------------------------------------------


def fake_passt(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "passt"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_what_passt_says_when_it_gives_up_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "echo 'No external routable interface' >&2; echo 'Failed to send 7' >&2; exit 1"
    fake_passt(tmp_path, script, monkeypatch)
    with pytest.raises(
        ConfigError, match=r"^--net user: passt: No external routable interface; .*--net tap"
    ):
        Passt([], pytest.fail, mac=GUEST_MAC, gateway=PEER)
    fake_passt(tmp_path, "exit 1", monkeypatch)
    with pytest.raises(ConfigError, match=r"^--net user: passt: it does not answer$"):
        Passt([], pytest.fail, mac=GUEST_MAC, gateway=PEER)


def _root_can_play() -> bool:
    programs: list[Callable[[], bool]] = [
        lambda: os.geteuid() == 0,
        lambda: Path("/dev/net/tun").exists(),
        lambda: all(shutil.which(name) for name in ("passt", "ip", "unshare", "nsenter")),
    ]
    return all(program() for program in programs)


@pytest.mark.skipif(not _root_can_play(), reason="needs root, passt, iproute2 and /dev/net/tun")
def test_all_that_published_ports_carry_arrives() -> None:
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-m", "tests.passt_guest"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert dict(line.split("=", 1) for line in done.stdout.splitlines()) == {
        "passt is of": "1234",  # an ordinary user
        "greeting": "who speaks first?",
        "to the host": "True",
        "to the guest": "True",
        "both ways": "True",
        "short": str(SHORT),
        "datagram": "cba",
        "ended of itself": "True",
    }
