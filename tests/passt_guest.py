"""Publishes ports of a guest that is a network namespace, through passt and our Frames; for root.

usage: unshare -n python -m tests.passt_guest    says `name=value` for test_published.py

Linux's TCP answers for the guest without a machine: its interface is a tap, whose frames go to
passt and back as virtio-net would carry them.
"""

import hashlib
import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tinyvmm.net import passt as module
from tinyvmm.net.passt import Passt
from tinyvmm.net.tap import Tap

HEADER = 12  # a struct virtio_net_hdr
DATA = os.urandom(1 << 20)
DIGEST = hashlib.sha256(DATA).digest()
GREET, SINK, ECHO, REVERSE = 7001, 7002, 7003, 7004  # the guest's ports; the host's are 1000 above
MAC = bytes.fromhex("525400123456")
SHORT = 100
USER = 1234  # an ordinary one
DEADLINE = 60.0


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


def serve(port: int, talk: Callable[[socket.socket], None]) -> None:
    """Listen as the guest, and `talk` with each that comes."""
    listener = socket.create_server(("", port), backlog=SHORT)

    def main() -> None:
        while True:
            with listener.accept()[0] as sock:
                talk(sock)

    threading.Thread(target=main, daemon=True).start()


def received(sock: socket.socket) -> bytes:
    got = bytearray()
    while data := sock.recv(1 << 16):
        got += data
    return bytes(got)


def echo(sock: socket.socket) -> None:
    while data := sock.recv(1 << 16):
        sock.sendall(data)


def guest() -> None:
    """Be what runs in the guest; in its namespace, until standard input ends."""
    serve(GREET, lambda sock: sock.sendall(b"who speaks first?\n" + DATA))
    serve(SINK, lambda sock: sock.sendall(hashlib.sha256(received(sock)).digest()))
    serve(ECHO, echo)
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("", REVERSE))
    sys.stdout.buffer.write(DIGEST)
    sys.stdout.flush()
    while True:
        data, sender = datagrams.recvfrom(2000)
        datagrams.sendto(data[::-1], sender)


def carry(tap: Tap, passt: Passt, *, stop: int) -> None:
    """Be the device: frames of the tap go to passt, and passt's to the tap."""
    frames = passt.frames
    buffer = memoryview(bytearray(70_000))
    waiting: memoryview | None = None
    poller = select.poll()
    for fd in (tap.fd, frames.sock.fileno(), stop):
        poller.register(fd, select.POLLIN)
    while all(fd != stop for fd, _ in poller.poll(1 if waiting else 50)):
        while waiting is not None or (count := tap.receive([buffer])):
            frame = waiting if waiting is not None else memoryview(bytes(buffer[HEADER:count]))
            waiting = None if frames.send([frame]) else frame
            if waiting is not None:
                break
        frames.drain()
        frames.settle()
        while (count := frames.receive([buffer[HEADER:]])) is not None:
            buffer[:HEADER] = bytes(HEADER)
            tap.send([buffer[: HEADER + count]])


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port + 1000), timeout=DEADLINE)


def say(name: str, value: object) -> None:
    sys.stdout.write(f"{name}={value}\n")
    sys.stdout.flush()


def ask(digest: bytes) -> None:
    """Be the programs of the host that want something of the guest."""
    with connect(GREET) as sock:
        word, _, data = received(sock).partition(b"\n")
    say("greeting", word.decode())
    say("to the host", hashlib.sha256(data).digest() == digest)
    with connect(SINK) as sock:
        sock.sendall(DATA)
        sock.shutdown(socket.SHUT_WR)
        say("to the guest", received(sock) == DIGEST)
    with connect(ECHO) as sock:

        def send() -> None:
            sock.sendall(DATA)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        say("both ways", received(sock) == DATA)
        sender.join()
    good = 0
    for number in range(SHORT):
        with connect(ECHO) as sock:
            sock.sendall(b"%d" % number)
            good += sock.recv(10) == b"%d" % number
    say("short", good)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(("127.0.0.1", REVERSE + 1000))
        sock.send(b"abc")
        say("datagram", sock.recv(10).decode())


def main() -> None:
    run("ip link set lo up")
    uplink = Tap("up0")  # passt wants to stand for an interface with a default route
    run("ip address add 192.0.2.1/24 dev up0")
    run("ip link set up0 up")
    run("ip route add default via 192.0.2.9 dev up0")
    tap = Tap("guest0")
    tap.use(0)
    ours = ["unshare", "-n", sys.executable, "-m", "tests.passt_guest", "guest"]
    with subprocess.Popen(ours, stdout=subprocess.PIPE) as inside:
        assert inside.stdout is not None
        digest = inside.stdout.read(len(DIGEST))
        run(f"ip link set guest0 netns {inside.pid}")
        for command in (
            "ip address add 10.0.2.15/24 dev guest0",
            f"ip link set guest0 address {MAC.hex(':')} up",
            "ip route add default via 10.0.2.2",
        ):
            run(f"nsenter -t {inside.pid} -n {command}")
        options = ["--ipv4-only", "--address", "10.0.2.15", "--netmask", "255.255.255.0"]
        options += ["--gateway", "10.0.2.2", "--udp-ports", f"{REVERSE + 1000}:{REVERSE}"]
        for port in (GREET, SINK, ECHO):
            options += ["--tcp-ports", f"127.0.0.1/{port + 1000}:{port}"]
        os.setgroups([])  # passt needs nobody's privileges; root's it would give up by itself
        os.setresgid(USER, USER, 0)
        os.setresuid(USER, USER, 0)
        passt = Passt(
            options,
            lambda words: say("warned", words),
            mac=MAC,
            gateway=bytes((10, 0, 2, 2)),
            published=True,
        )
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        status = Path(f"/proc/{passt._process.pid}/status").read_text()
        say("passt is of", re.findall(r"^Uid:\t(\d+)", status, re.MULTILINE)[0])
        stop = os.eventfd(0)
        carrier = threading.Thread(target=carry, args=(tap, passt), kwargs={"stop": stop})
        carrier.start()
        try:
            ask(digest)
        finally:
            os.eventfd_write(stop, 1)
            carrier.join()
            module._END_TIMEOUT = DEADLINE  # or it might be killed where the computer is busy
            passt.close()
            say("ended of itself", passt._process.returncode == 0)
            inside.kill()
    tap.close()
    uplink.close()
    os.close(stop)


if __name__ == "__main__":
    if sys.argv[1:] == ["guest"]:
        guest()
    else:
        main()
