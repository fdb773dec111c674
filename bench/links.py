"""What leads out of a guest: network interfaces, vsock, console ports; beside QEMU's.

The same stock kernel boots, by turns, in our VMM, with doorbells that are exits ("inline") and with
ioeventfds ("thread"), and in QEMU's (`-accel kvm`, q35 machine), with one vCPU and the same things
behind its devices: a tap (vhost off), a passt of each one's own (`-netdev stream`), this computer's
sockets (QEMU has AF_VSOCK there, by vhost, which is the kernel's; ours are Unix sockets, and in a
third guest, "vhost", the kernel's as well) and one console port that is led to a Unix socket. PID 1
is a C program, which also answers on the host; for the throughput of interfaces it runs Debian's
iperf3. All times are by the guest's own clock. Where this computer's KVM cannot run Linux all of it
happens in one lab, where Python is slowed down more than C is. A first round only warms caches.
Guests with a console or vsock are up all at once, and take turns: bench/turns.py.

Everything is in a network namespace of its own, so this needs root where there is no lab.
"""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from bench.guest9p import COMMON
from bench.place import ROOT

if TYPE_CHECKING:
    from tinyvmm.devices.virtio.console import ConsolePort
    from tinyvmm.machine import Machine

C_PROGRAM = Path(__file__).with_suffix(".c")
COUNT, MIB, ROUNDS = 200, 16, 3
INLINE, THREAD, VHOST = "inline", "thread", "vhost"
OURS = (INLINE, THREAD)
LIMIT = 400  # seconds for one guest
TRIES = 3  # of a lab that dies before there is a figure
PORT = 5000
VSOCK_SERVED = f"vsock_{PORT}"
QEMU_CID, VHOST_CID = 3, 4
TAP = "bench0"
MACS = {"tap": "52:54:00:00:00:01", "passt": "52:54:00:00:00:02"}
MODULES = {
    "tap": "virtio_net",
    "passt": "virtio_net",
    "vsock": "vmw_vsock_virtio_transport",
    "console": "virtio_console",
}
HOST_MODULES = {"tap": ("tun", "/dev/net/tun"), "vsock": ("vhost_vsock", "/dev/vhost-vsock")}


class Entry(NamedTuple):
    """One thing done: how often, and how long it took."""

    vmm: str
    turn: int
    what: str
    often: int
    ns: int


def initramfs(program: str, what: Sequence[str]) -> tuple[bytes, list[str]]:
    """Return the archive: modules, `program` as PID 1 and iperf3; and the modules' paths in it."""
    from tinyvmm.command.run import prepare_kernel
    from tinyvmm.guest.initramfs import Archive

    names = dict.fromkeys(MODULES[link] for link in what)
    kernel, modules = prepare_kernel(None, ("virtio_pci", *names))
    kernel.close()
    own = Archive().add_device("/dev/console", stat.S_IFCHR | 0o600, 5, 1)
    own.add_file("/init", Path(program).read_bytes(), mode=0o755)
    iperf = shutil.which("iperf3")
    if "virtio_net" in names and iperf is not None:
        needed = subprocess.run(["ldd", iperf], capture_output=True, text=True, check=True).stdout
        for path in re.findall(r"(/\S+) \(0x", needed):
            own.add_file(path, Path(path).read_bytes(), mode=0o755)
        own.add_file("/usr/bin/iperf3", Path(iperf).read_bytes(), mode=0o755)
    return bytes(modules.archive) + own.finish(), list(modules.paths)


class Bench(NamedTuple):
    """What all turns have in common."""

    what: Sequence[str]
    where: str
    vmlinuz: str
    archive: bytes
    cmdline: str

    @property
    def vsock(self) -> str:
        """The Unix socket of our vsock."""
        return os.path.join(self.where, "vsock")

    @property
    def console(self) -> str:
        """The Unix socket that ports lead to."""
        return os.path.join(self.where, "console")


def passt_options() -> list[str]:
    """How each VMM's passt is run."""
    options = ["--ipv4-only", "--address", "10.0.2.15", "--netmask", "255.255.255.0"]
    return [*options, "--gateway", "10.0.2.2"]


def add_ours(bench: Bench, vmm: str, machine: "Machine", cleanup: ExitStack) -> None:
    """Give our machine its devices."""
    from tinyvmm.command.parts import add_vhost_vsock
    from tinyvmm.devices.virtio.console import ConsolePort, VirtioConsole
    from tinyvmm.devices.virtio.net import VirtioNet
    from tinyvmm.devices.virtio.vsock import VirtioVsock
    from tinyvmm.net.options import USER_MTU
    from tinyvmm.net.passt import Passt
    from tinyvmm.net.tap import Tap
    from tinyvmm.vsock_host import VsockHost

    def failed(error: BaseException) -> None:
        raise error

    if "console" in bench.what:
        port = ConsolePort("bench")
        machine.add_virtio(VirtioConsole([port]))
        cleanup.callback(relay(port, bench.console))
    if "tap" in bench.what:
        tap = Tap(TAP)
        cleanup.callback(tap.close)
        device = VirtioNet([tap], bytes.fromhex(MACS["tap"].replace(":", "")))
        machine.add_virtio(device)
        tap.pump.start(device.pairs[0], failed)
    if "passt" in bench.what:
        mac = bytes.fromhex(MACS["passt"].replace(":", ""))
        passt = Passt(passt_options(), print, mac=mac, gateway=bytes((10, 0, 2, 2)))
        cleanup.callback(passt.close)
        device = VirtioNet([passt.frames], mac, mtu=USER_MTU)
        machine.add_virtio(device)
        passt.frames.pump.start(device.pairs[0], failed)
    if vmm == VHOST:
        add_vhost_vsock(machine, VHOST_CID, cleanup)
    elif "vsock" in bench.what:
        host = VsockHost(bench.vsock)
        cleanup.callback(host.close)
        vsock = VirtioVsock(3, host)
        machine.add_virtio(vsock)
        host.start(vsock, failed)


def relay(port: "ConsolePort", path: str) -> Callable[[], None]:
    """Lead a port to the Unix socket at `path`; returns what ends that."""
    from tinyvmm.streams import CHUNK, PortInput, PortOutput, Receiver, Sender

    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    source, target = PortOutput(port), PortInput(port)
    sender, receiver = Sender.of(sock.fileno()), Receiver.of(sock.fileno())
    if sender is None or receiver is None:
        raise RuntimeError("no socket")
    source.pass_to(sender.send)

    def out() -> None:
        while data := source.read():
            sock.sendall(data)

    def given() -> bytes:
        data = target.attend(receiver)
        return sock.recv(CHUNK) if data is None else data

    def back() -> None:
        while data := given():
            target.write(data)

    threads = [threading.Thread(target=main, daemon=True) for main in (out, back)]
    for thread in threads:
        thread.start()

    def end() -> None:
        source.release()
        target.release()
        sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        sender.close()
        receiver.close()
        sock.close()

    return end


def run_ours(bench: Bench, vmm: str) -> Iterator[str]:
    """Boot our VMM, and return the lines that the program said."""
    shown = bytearray()
    boot_ours(bench, vmm, shown.extend)
    yield from shown.decode(errors="replace").splitlines()


def boot_ours(bench: Bench, vmm: str, console: Callable[[bytes], None]) -> None:
    """Boot our VMM, have `console` take what is said, and return at its end."""
    from tinyvmm.boot import load_kernel
    from tinyvmm.machine import Machine

    with ExitStack() as cleanup:
        machine = Machine(memory=512 << 20, ioeventfd=vmm != INLINE)
        machine.add_board(console=console)
        add_ours(bench, vmm, machine, cleanup)
        cleanup.enter_context(machine)
        kernel = cleanup.enter_context(load_kernel(bench.vmlinuz))
        machine.boot_linux(kernel, initrd=[bench.archive], cmdline=f"reboot=a {bench.cmdline}")
        machine.start()
        machine.wait(LIMIT)


def run_qemu(bench: Bench) -> Iterator[str]:
    """Boot QEMU, and yield the lines that the program says."""
    initrd = os.path.join(bench.where, "initrd")
    Path(initrd).write_bytes(bench.archive)
    qemu = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "512", "-nodefaults"]
    qemu += ["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-M", "q35"]
    qemu += ["-kernel", bench.vmlinuz, "-initrd", initrd, "-append", bench.cmdline]
    with ExitStack() as cleanup:
        pass_fds = []
        if "console" in bench.what:
            qemu += ["-chardev", f"socket,id=c,path={bench.console}", "-device"]
            qemu += ["virtio-serial-pci", "-device", "virtserialport,chardev=c,name=bench"]
        if "tap" in bench.what:
            qemu += ["-netdev", f"tap,id=t,ifname={TAP},script=no,downscript=no,vhost=off"]
            qemu += ["-device", f"virtio-net-pci,netdev=t,mac={MACS['tap']}"]
        if "passt" in bench.what:
            ours, its = socket.socketpair()
            cleanup.enter_context(ours)
            command = ["passt", "--foreground", "--quiet", "--fd", str(its.fileno())]
            with its:
                passt = subprocess.Popen(
                    [*command, *passt_options()],
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[its.fileno()],
                )
            cleanup.callback(passt.wait)
            cleanup.callback(passt.kill)
            pass_fds.append(ours.fileno())
            address = f"addr.type=fd,addr.str={ours.fileno()}"
            qemu += ["-netdev", f"stream,id=p,server=off,{address}", "-device"]
            qemu += [f"virtio-net-pci,netdev=p,mac={MACS['passt']},host_mtu=65520"]
        if "vsock" in bench.what:
            qemu += ["-device", f"vhost-vsock-pci,guest-cid={QEMU_CID}"]
        yield from said(qemu, pass_fds)


def said(command: Sequence[str], pass_fds: Sequence[int] = ()) -> Iterator[str]:
    """Run a guest's VMM, and yield the lines that it says, as they come."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=pass_fds,
    ) as process:
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        try:
            if process.stdout is not None:
                yield from (line.rstrip() for line in process.stdout)
        finally:
            timer.cancel()
            process.kill()


def entries(lines: Iterable[str], vmm: str, turn: int) -> Iterator[Entry]:
    """Yield what is measured, as it is; RuntimeError if the program does not come to its end."""
    last: deque[str] = deque(maxlen=10)
    done = False
    for line in lines:
        match line.split():
            case ["done"]:
                done = True
            case ["end", what, often, ns]:
                yield Entry(vmm, turn, what, int(often), int(ns))
            case _:
                last.append(line)
    if not done:
        raise RuntimeError(f"the guest of {vmm} died: " + "\n".join(last))


def insert(name: str) -> None:
    """Have the host's kernel load a module and those it needs, of the kernel that guests run."""
    from tinyvmm.guest.modules import closure
    from tinyvmm.images import kernels

    where = kernels.find().modules
    if where is None:
        return
    there = {line.split()[0] for line in Path("/proc/modules").read_text().splitlines()}
    with tempfile.TemporaryDirectory() as directory:
        for module in closure(where, (name,)):
            if module.name not in there:
                path = Path(directory, f"{module.name}.ko")
                path.write_bytes(module.read())
                subprocess.run(["insmod", str(path)], check=True)


@contextmanager
def hosting(
    what: Sequence[str], program: str, where: str, turns: Sequence[str] = ("1", "1")
) -> Iterator[None]:
    """Be what the guests talk to; `turns`: how many use the console or vsock, and how often."""
    for link, (module, device) in HOST_MODULES.items():
        if (link in what or (link == "tap" and "passt" in what)) and not os.path.exists(device):
            insert(module)
    commands = []
    if {"tap", "passt"} & set(what):
        # passt stands for an interface with a default route, and the tap is one.
        for line in (
            "ip link set lo up",
            f"ip tuntap add {TAP} mode tap",
            f"ip address add 192.0.2.1/24 dev {TAP}",
            f"ip link set {TAP} up",
            f"ip route add default via 192.0.2.9 dev {TAP}",
        ):
            subprocess.run(line.split(), check=True)
        commands += [["iperf3", "-s"], [program, "serve", *turns, "tcp", str(PORT)]]
    if "vsock" in what:
        served = ["unix", os.path.join(where, VSOCK_SERVED), "vsock", str(PORT)]
        commands.append([program, "serve", *turns, *served])
    if "console" in what:
        commands.append([program, "serve", *turns, "unix", os.path.join(where, "console")])
    running = []
    try:
        for command in commands:
            ours = command[0] == program  # and says when it is ready
            stdout = subprocess.PIPE if ours else subprocess.DEVNULL
            process = subprocess.Popen(command, stdout=stdout)
            running.append(process)
            if process.stdout is not None:
                process.stdout.readline()
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()


def measure(program: str, what: Sequence[str], rounds: int) -> Iterator[Entry]:
    """Run each VMM `rounds` times in turn, after once to warm caches."""
    from tinyvmm.images import kernels

    with tempfile.TemporaryDirectory() as where, hosting(what, program, where):
        archive, modules = initramfs(program, what)
        cmdline = f"{COMMON} -- {','.join(what)} {COUNT} {MIB} {' '.join(modules)}"
        bench = Bench(what, where, kernels.find().vmlinuz, archive, cmdline)
        for turn in range(rounds + 1):
            for vmm in OURS:
                yield from entries(run_ours(bench, vmm), vmm, turn)
            yield from entries(run_qemu(bench), "QEMU", turn)


def show(found: list[Entry]) -> None:
    """Print one line for each thing done."""
    mine = OURS
    columns = *mine, "QEMU", *["ratio"] * len(mine)
    print(f"{'microseconds for each':26}" + "".join(f"{name:>11}" for name in columns))
    for what in dict.fromkeys(entry.what for entry in found):
        middle = {
            vmm: median(
                e.ns / e.often / 1000 for e in found if (e.vmm, e.what) == (vmm, what) and e.turn
            )
            for vmm in (*mine, "QEMU")
        }
        print(
            f"{what:26}"
            + "".join(f"{middle[vmm]:11.1f}" for vmm in middle)
            + "".join(f"{middle[vmm] / middle['QEMU']:11.2f}" for vmm in mine)
        )


def main(what: Sequence[str] = tuple(MODULES)) -> None:
    """Measure, here or in the lab, and print."""
    show(run("links", what, int(os.environ.get("ROUNDS", ROUNDS))))


def run(
    module: str, what: Sequence[str], *arguments: object, cpus: int | None = None
) -> list[Entry]:
    """Have `measure` of a module of bench/ measure, here or in the lab, which has `cpus`.

    `arguments` are what it takes besides the C program and `what`. What was measured before a guest
    or the lab died is returned as well, and why it ended is said on stderr.
    """
    from tinyvmm.lab.lab import Lab, LabError, python_command
    from tinyvmm.lab.probe import missing_for_linux

    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as share:
        program, found = os.path.join(directory, "program"), Path(share, "found")
        found.touch()
        gcc = ["gcc", "-O2", "-static", "-pthread", "-o", program, str(C_PROGRAM)]
        subprocess.run(gcc, check=True)
        initramfs(program, what)  # which fills the cache that the lab sees as well
        wanted = program, tuple(what), *arguments
        code = (
            f"import sys; sys.path.insert(0, {ROOT!r}); from bench import links, {module}; "
            f"links.write({str(found)!r}, {module}.measure(*{wanted!r}))"
        )
        command = ["unshare", "-n", *python_command(code, [])]
        if missing_for_linux() is None:
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            status, why = done.returncode, done.stderr
        else:
            for left in reversed(range(TRIES)):
                try:
                    with Lab(shares=[share], cpus=cpus) as lab:
                        ran = lab.run(command, timeout=LIMIT * 20)
                    status, why = ran.status, ran.stderr.decode(errors="replace")
                    break
                except LabError as error:
                    status, why = 1, str(error)
                if found.stat().st_size or not left:
                    break
                print(f"once more, as nothing was measured before {why}", file=sys.stderr)
        if status:
            print(why or f"the measuring process ended with status {status}", file=sys.stderr)
        return [Entry(*json.loads(line)) for line in found.read_text().splitlines()]


def write(path: str, found: Iterable[Entry]) -> None:
    """Write each entry to a file as soon as it is there: who measures, or the lab, may die."""
    with open(path, "w", encoding="ascii", buffering=1) as file:
        try:
            file.writelines(json.dumps(entry) + "\n" for entry in found)
        except RuntimeError as error:
            sys.exit(str(error))
