"""Talks with a guest over vsock, from where its VMM runs; says `name=value` for test_vsock.py.

usage: vsock_talk.py PATH COMMAND...    COMMAND runs a guest with --vsock PATH and socat in it
"""

import hashlib
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from time import sleep

MIB = 1 << 20
SHORT = 25


def say(name: str, value: object) -> None:
    sys.stdout.write(f"{name}={value}\n")
    sys.stdout.flush()


def connect(path: str, port: int) -> tuple[socket.socket, bytes]:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(400)
    client.connect(path)
    client.sendall(b"CONNECT %d\n" % port)
    answer = b""
    while not answer.endswith(b"\n"):
        piece = client.recv(1)
        if not piece:
            break
        answer += piece
    return client, answer


def read_all(client: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        piece = client.recv(65536)
        if not piece:
            break
        got += piece
    return got


def sockets_of(pid: int) -> int:
    """How many sockets a process has open."""
    where = f"/proc/{pid}/fd"
    links = []
    for fd in os.listdir(where):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"{where}/{fd}"))
    return sum(link.startswith("socket:") for link in links)


def main(path: str, *command: str) -> None:
    service = socket.socket(socket.AF_UNIX)
    service.bind(f"{path}_5000")
    service.listen()
    service.settimeout(600)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as vmm:
        assert vmm.stdin is not None
        assert vmm.stdout is not None
        say("guest", vmm.stdout.readline().decode().strip())
        server, _ = service.accept()
        with server:
            say("asked", read_all(server, 15).decode().strip())
            server.sendall(b"from the host\n")
        say("told", vmm.stdout.readline().decode().strip())
        say("refused", vmm.stdout.readline().decode().strip())

        sockets = sockets_of(vmm.pid)
        client, answer = connect(path, 1024)
        while not answer:  # socat does not listen yet
            sleep(0.2)
            client, answer = connect(path, 1024)
        say("ok", answer.decode().split()[0])
        data = os.urandom(MIB)
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        say("echo", read_all(client, len(data)) == data)
        sender.join()
        client.close()

        client, _ = connect(path, 1025)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        digest = client.recv(200).decode().split()[0]
        say("half closed", digest == hashlib.sha256(data).hexdigest())
        client.close()

        say("nobody", connect(path, 9999)[1])
        good = 0
        for number in range(SHORT):
            client, _ = connect(path, 1024)
            word = b"%d" % number
            client.sendall(word)
            good += client.recv(len(word)) == word
            client.close()
        say("short", good)
        for _ in range(300):  # the guest closes its ends when it comes to it
            left = sockets_of(vmm.pid) - sockets
            if left <= 0:
                break
            sleep(0.2)
        say("left behind", left)
        vmm.stdin.close()
        say("status", vmm.wait(400))
    say("socket", os.path.exists(path))
    service.close()


main(*sys.argv[1:])
