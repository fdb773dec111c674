"""Talks with guests over this computer's AF_VSOCK; says `name=value` for test_vsock.py.

usage: vhost_talk.py ROOT COMMAND [ARGUMENT]... -- SCRIPT

COMMAND runs `tinyvmm` with the device that moves devices (device_mover.py). SCRIPT is the guest's:
it echoes at port 1024, and at a line on stdin has its devices saved and loaded.
"""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from time import monotonic, sleep

ROOT, *COMMAND = sys.argv[1:]
sys.path.insert(0, ROOT)

from bench.links import insert  # noqa: E402
from tinyvmm.instances.control import ControlClient  # noqa: E402

CID, OTHER = 7, 8
SHORT, MIB = 25, 1 << 20


def say(name: str, value: object) -> None:
    sys.stdout.write(f"{name}={value}\n")
    sys.stdout.flush()


def connect(cid: int, port: int) -> socket.socket:
    """Connect, as soon as somebody listens."""
    end = monotonic() + 400
    while True:
        client = socket.socket(socket.AF_VSOCK)
        client.settimeout(400)
        try:
            client.connect((cid, port))
        except ConnectionResetError:
            client.close()
            if monotonic() > end:
                raise
            sleep(0.2)
        else:
            return client


def read_all(client: socket.socket, count: int) -> bytes:
    got = bytearray()
    with suppress(TimeoutError):
        while len(got) < count:
            piece = client.recv(65536)
            if not piece:
                break
            got += piece
    return bytes(got)


def echoed(client: socket.socket, control: ControlClient | None = None) -> list[bool]:
    """Whether bytes come back as they went, and none while it is paused."""
    data = os.urandom(2 * MIB)
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    got = read_all(client, 65536)
    stalled = True
    if control is not None:
        control.call("pause")
        client.settimeout(2)
        got += read_all(client, len(data) - len(got))
        stalled = len(got) < len(data)
        client.settimeout(400)
        control.call("resume")
    got += read_all(client, len(data) - len(got))
    sender.join()
    return [got == data, stalled]


def files_of(process: "subprocess.Popen[bytes]") -> int:
    """How many descriptors it has; without files, which are the guest's root."""
    links = []
    for fd in os.listdir(f"/proc/{process.pid}/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{process.pid}/fd/{fd}"))
    return len([link for link in links if not link.startswith("/")])


def start(cid: int, *more: str) -> "subprocess.Popen[bytes]":
    *options, script = COMMAND
    command = [*options[:-1], "--vsock", f"vhost,cid={cid}", *more, "--", "sh", "-c", script]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def line(process: "subprocess.Popen[bytes]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def tell(process: "subprocess.Popen[bytes]", data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data)
    process.stdin.flush()


def on_pci(service: socket.socket) -> None:
    with start(CID, "--name", "vhost") as vmm:
        say("guest", line(vmm))
        server, (cid, _) = service.accept()
        with server:
            say("asked", [cid, read_all(server, 15)])
            server.sendall(b"from the host\n")
        say("told", line(vmm))
        say("refused", line(vmm))

        control = ControlClient(f"{os.environ['XDG_RUNTIME_DIR']}/tinyvmm/vhost/control")
        with connect(CID, 1024) as client:
            say("echo", echoed(client, control))
        try:
            control.call("exec", argv=["true"])
        except Exception as error:  # noqa: BLE001 (which is what is asked for)
            say("exec", error)
        before = files_of(vmm)
        good = 0
        for number in range(SHORT):
            with connect(CID, 1024) as client:
                client.sendall(b"%d" % number)
                good += client.recv(10) == b"%d" % number
        say("short", [good, files_of(vmm) - before])

        taken = start(CID)
        say("taken", [taken.wait(60), taken.communicate()[0]])

        with connect(CID, 1024) as client:
            client.sendall(b"x")
            client.recv(1)
            tell(vmm, b"move\n")
            say("moved", line(vmm))
            try:
                say("old", client.recv(1))
            except ConnectionResetError:
                say("old", "reset")
        with connect(CID, 1024) as client:
            say("new", echoed(client))
        control.close()
        vmm.communicate()
        say("status", vmm.returncode)


def on_mmio(service: socket.socket) -> None:
    with start(OTHER, "--transport", "mmio") as vmm:
        line(vmm)
        with service.accept()[0] as server:
            read_all(server, 15)
        line(vmm)
        with connect(OTHER, 1024) as client:
            say("mmio", echoed(client))
        vmm.communicate()
        say("mmio status", vmm.returncode)


def main() -> None:
    insert("vhost_vsock")
    with socket.socket(socket.AF_VSOCK) as service, tempfile.TemporaryDirectory() as where:
        os.environ["XDG_RUNTIME_DIR"] = where
        service.bind((socket.VMADDR_CID_ANY, 5000))
        service.listen()
        service.settimeout(600)
        on_pci(service)
        on_mmio(service)


main()
