"""`tinyvmm run` as a user sees it, on a stock kernel. A boot is slow: few boots, many checks."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.linux.conftest import LONG, MAIN, ROOT, Runner, interpreter
from tests.waiting import with_time_enough
from tinyvmm.devices.virtio.pci import NOTIFY
from tinyvmm.images import kernels
from tinyvmm.lab.lab import python_command
from tinyvmm.layout import PCI_SLOT_STRIDE, VIRTIO_MMIO_STRIDE

pytestmark = pytest.mark.linux


def script(*lines: str) -> list[str]:
    return ["--", "sh", "-c", "\n".join(lines)]


def test_the_kernel_is_the_guests_and_output_is_only_the_commands(guest: Runner) -> None:
    done = guest.run("--", "sh", "-c", "uname -r; echo err >&2; echo again > /dev/stderr")
    installed = kernels.default()
    assert installed is not None
    assert (done.status, done.stdout) == (0, f"{installed.version}\n".encode())
    assert done.stdout.decode().strip() != os.uname().release
    assert done.stderr == b"err\nagain\n"


def test_the_exit_status_comes_back(guest: Runner) -> None:
    done = guest.run("--", "sh", "-c", "exit 7")
    assert (done.status, done.stdout, done.stderr) == (7, b"", b"")


def test_a_signal_that_killed_the_command_is_128_more(guest: Runner) -> None:
    done = guest.run("--", "sh", "-c", "kill -SEGV $$")
    assert done.status == 128 + signal.SIGSEGV


def test_ten_megabytes_of_random_bytes_survive_the_round_trip(guest: Runner) -> None:
    data = os.urandom(10 << 20)
    done = guest.run("--", "cat", stdin=data)
    assert (done.status, done.stderr) == (0, b"")
    assert done.stdout == data


def test_what_the_command_finds_in_its_guest(guest: Runner) -> None:
    """One boot, many questions: one line of output each."""
    questions = {
        "memory": "read -r _ kib _ < /proc/meminfo; echo $kib",
        "cpus": "nproc",
        "cwd": "pwd",
        "home": "echo $HOME",
        "path": "echo $PATH",
        "given": 'echo "$GIVEN"',
        "not passed on": 'echo "[$PYTEST_CURRENT_TEST]"',
        "hostname": "read -r name < /proc/sys/kernel/hostname; echo $name",
        "private write": "echo x > /etc/tinyvmm-probe && cat /etc/tinyvmm-probe",
        "root": "stat -f -c %T /",
        "loopback": "read -r flags < /sys/class/net/lo/flags; echo $flags",
        "stdin is a pipe": "stat -L -c %F /dev/stdin",
        "no terminal": "tty",
        "null": "stat -c %t:%T /dev/null",
        "random": "head -c 64 /dev/hwrng | wc -c",
        "shared memory": "touch /dev/shm/x && echo yes",
        "complaints": "dmesg --level=emerg,alert,crit,err | wc -l",
        "acpi complaints": "dmesg | grep -cE 'ACPI.*(Error|Warning|Exception)'",
        "acpi tables": "cd /sys/firmware/acpi/tables; echo *",
        "power button": "ls -d /sys/bus/acpi/devices/PNP0C0C:00",
        "clock": "cat /sys/devices/system/clocksource/clocksource0/current_clocksource",
        "time": "date +%s",
        "hardware clock": "cat /sys/class/rtc/rtc0/since_epoch",
        "hypervisor": "grep -cw hypervisor /proc/cpuinfo",
        "uart": "cat /sys/class/tty/ttyS0/type",
    }
    lines = [f"echo '{what}='\"$({command} 2>&1)\"" for what, command in questions.items()]
    host_time = int(guest.program(["date", "+%s"]).stdout)
    done = guest.run(
        "--memory", "512M", "--cpus", "2", "--env", "GIVEN=a b", *script(*lines), cwd="/usr/share"
    )
    assert done.stderr == b""
    found = dict(line.split("=", 1) for line in done.stdout.decode().splitlines())
    assert 400_000 < int(found["memory"]) < 512 * 1024
    assert found["cpus"] == "2"
    assert found["cwd"] == "/usr/share"
    assert found["home"] == os.environ["HOME"]
    assert found["path"] == os.environ["PATH"]
    assert found["given"] == "a b"
    assert found["not passed on"] == "[]"
    assert found["hostname"] == "tinyvmm"
    assert found["private write"] == "x"
    assert found["root"] == "v9fs"
    assert int(found["loopback"], 16) & 1
    assert found["stdin is a pipe"] == "fifo"
    assert found["no terminal"] == "not a tty"
    assert found["null"] == "1:3"
    assert found["random"] == "64"
    assert found["shared memory"] == "yes"
    assert int(found["complaints"]) <= 1  # "PCI: Fatal: No config space access function found"
    assert found["acpi complaints"] == "0"
    assert found["acpi tables"].split()[:3] == ["APIC", "DSDT", "FACP"]
    assert found["power button"] == "/sys/bus/acpi/devices/PNP0C0C:00"
    assert found["clock"] == "kvm-clock"
    assert abs(int(found["time"]) - host_time) < 240
    assert abs(int(found["hardware clock"]) - host_time) < 240
    assert found["hypervisor"] == "2"
    assert found["uart"] == "4"  # PORT_16550A
    assert not Path("/etc/tinyvmm-probe").exists()
    assert guest.program(["ls", "/etc/tinyvmm-probe"]).status != 0


def test_a_write_tree_keeps_what_the_guest_wrote(guest: Runner) -> None:
    kept = guest.directory("kept")
    done = guest.run(
        "--write",
        str(kept),
        *script(
            "echo new > /etc/tinyvmm-new",
            "echo more >> /etc/hostname",
            "rm /etc/issue",
            "mv /etc/motd /etc/moved",
            "mkdir -m 711 /srv/made; ln -s made /srv/link",
        ),
    )
    assert (done.status, done.stdout, done.stderr) == (0, b"", b"")
    assert (kept / "etc/tinyvmm-new").read_text() == "new\n"
    assert (kept / "etc/hostname").read_text() == Path("/etc/hostname").read_text() + "more\n"
    assert (kept / "etc/moved").read_bytes() == Path("/etc/motd").read_bytes()
    assert (kept / "srv/made").stat().st_mode & 0o7777 == 0o711
    assert os.readlink(kept / "srv/link") == "made"
    again = guest.run(
        "--write", str(kept), *script("cat /etc/tinyvmm-new; ls /etc/issue /etc/motd 2>&1; ls /srv")
    )
    assert again.stdout.startswith(b"new\n")
    assert again.stdout.count(b"No such file") == 2
    assert again.stdout.endswith(b"link\nmade\n")


def test_maps_put_directories_where_they_are_told(guest: Runner) -> None:
    data, more, new = (guest.directory(name) for name in ("data", "more", "new"))
    (data / "one").write_text("1")
    (data / "both").write_text("earlier")
    (more / "both").write_text("later")
    done = guest.run(
        "--read",
        "/",
        "--read",
        f"/data={data}",
        "--read",
        f"/data=>{more}",
        "--write",
        f"/data={new}",
        *script("ls /data; cat /data/both; echo; echo x > /data/two; echo y > /elsewhere"),
    )
    assert (done.stdout, done.stderr) == (b"both\none\nlater\n", b"")
    assert (new / "two").read_text() == "x\n"
    assert sorted(path.name for path in new.iterdir()) == ["two"]
    assert sorted(path.name for path in data.iterdir()) == ["both", "one"]


def test_the_console_is_the_kernels_own(guest: Runner) -> None:
    log = guest.shared / "console"
    done = guest.run("--console", str(log), "--append", "tinyvmm.test=1", "--", "true")
    assert (done.status, done.stdout, done.stderr) == (0, b"", b"")
    text = log.read_text()
    assert text.startswith("[    0.000000] Linux version ")
    assert "tinyvmm.test=1" in text
    assert "Run /init as init process" in text
    assert not re.search(r"ACPI.*(Error|Warning|Exception)", text)


def test_a_time_limit_ends_it_with_124(guest: Runner) -> None:
    def ended(seconds: float) -> bytes:
        done = guest.run("--timeout", f"{seconds:g}", *script("echo begun; sleep 1000"))
        assert done.status == 124
        told = f"tinyvmm: timed out after {seconds:g} s: the machine was stopped\n"
        assert done.stderr.decode() == told
        return done.stdout

    assert with_time_enough(ended, (30, 90, 180)) == b"begun\n"


def test_what_cannot_be_executed_says_so(guest: Runner) -> None:
    done = guest.run("--", "no-such-command")
    assert (done.status, done.stdout) == (127, b"")
    assert done.stderr == b"tinyvmm: no-such-command: command not found in the guest\n"
    done = guest.run("--", "/etc/passwd")
    assert (done.status, done.stdout) == (126, b"")
    assert done.stderr == b"tinyvmm: /etc/passwd: Permission denied, in the guest\n"


def test_a_panic_is_255_with_its_last_lines(guest: Runner) -> None:
    done = guest.run(*script("echo before; echo c > /proc/sysrq-trigger; sleep 100"))
    assert (done.status, done.stdout) == (255, b"before\n")
    lines = done.stderr.decode().splitlines()
    assert lines[0] == "tinyvmm: the guest's kernel panicked:"
    assert "Kernel panic - not syncing: sysrq triggered crash" in lines[1]


def test_poweroff_reboot_and_triple_fault_are_told_apart(guest: Runner) -> None:
    off = guest.run(*script("echo o > /proc/sysrq-trigger; while :; do :; done"))
    assert off.status == 0
    assert off.stderr == b"tinyvmm: the guest powered off before the command ended\n"
    reboot = guest.run(*script("echo b > /proc/sysrq-trigger; sleep 100"))
    assert reboot.status == 0
    assert reboot.stderr.startswith(b"tinyvmm: the guest rebooted before the command ended")
    # reboot=t: Linux empties the interrupt table and traps, as its last resort.
    fault = guest.run("--append", "reboot=t", *script("echo b > /proc/sysrq-trigger; sleep 100"))
    assert fault.status == 255
    assert b"triple fault" in fault.stderr


def test_a_static_binary_runs_in_an_otherwise_empty_tree(guest: Runner) -> None:
    root = guest.directory("empty")
    source = guest.shared / "static.c"
    source.write_text('#include <stdio.h>\nint main(void) { puts("alone"); return 3; }\n')
    subprocess.run(["gcc", "-static", "-o", root / "alone", source], check=True)
    done = guest.run("--read", f"/={root}", "--", "/alone")
    assert (done.status, done.stdout, done.stderr) == (3, b"alone\n", b"")
    assert [path.name for path in root.iterdir()] == ["alone"]


def test_a_full_write_tree_is_said_once_and_the_guest_sees_enospc(guest: Runner) -> None:
    small = "/run/small"
    mount = f"mkdir -p {small} && mount -t tmpfs -o size=256k tmpfs {small}"
    fill = script("dd if=/dev/zero of=/big bs=64k count=64 conv=fsync; sync; true")
    with guest.standing(mount, f"umount {small}"):
        done = guest.run("--write", small, *fill)
    assert done.status == 0
    assert os.strerror(errno.ENOSPC).encode() in done.stderr
    assert done.stderr.count(b"tinyvmm: no space left for the guest's writes") == 1


def typed(
    guest: Runner, size: tuple[int, int], steps: list[tuple[str, str]], *command: str
) -> dict[str, Any]:
    helper = str(Path(__file__).parent / "typist.py")
    tinyvmm = python_command(MAIN, ["run", "--no-lab", *command])
    arguments = [*map(str, size), json.dumps(steps), *tinyvmm]
    done = guest.program([interpreter(), "-I", "-S", helper, *arguments])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_an_interactive_shell(guest: Runner) -> None:
    steps = [
        ("$ ", "stty size; tty\r"),
        ("/dev/pts/0", ""),
        ("$ ", "echo wroX\x7fng-then-$((6*7))\r"),  # DEL takes the X back
        ("wrong-then-42", ""),
        ("$ ", "echo slee''ping; sleep 1000\r"),
        ("sleeping", "\x03"),  # interrupts the command, not the machine
        ("$ ", "echo still $((1+1))\r"),
        ("still 2", ""),
        ("$ ", "exit 5\r"),
    ]
    done = typed(guest, (31, 117), steps, "--env", "PS1=$ ", "--", "bash", "--norc")
    assert done["left"] == [], done["shown"]
    assert done["status"] == 5, done["shown"]
    assert "31 117" in done["shown"]
    assert done["restored"]


def test_a_terminal_is_restored_when_the_machine_is_killed(guest: Runner) -> None:
    steps = [("ready", "\x1d\x1d\x1d")]  # Ctrl-] three times
    done = typed(guest, (24, 80), steps, "--", "sh", "-c", "stty raw; echo ready; sleep 1000")
    assert done["status"] == 130, done["shown"]
    assert done["restored"]


def signalled(guest: Runner, numbers: str, *command: str) -> dict[str, Any]:
    helper = str(Path(__file__).parent / "signals.py")
    tinyvmm = python_command(MAIN, ["run", "--no-lab", *command])
    done = guest.program([interpreter(), "-I", "-S", helper, numbers, *tinyvmm])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def leftovers(guest: Runner) -> str:
    look = (
        "ls /tmp | grep tinyvmm-; pgrep -fc 'tinyvmm.cli.main'; ls -l /proc/*/fd | grep -c kvm-vm"
    )
    return guest.program(["sh", "-c", look]).stdout.decode()


def test_ctrl_c_reaches_the_command_and_a_second_one_the_machine(guest: Runner) -> None:
    loop = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 1; done"
    once = signalled(guest, "2", "--", "sh", "-c", loop)
    assert (once["status"], once["stdout"]) == (9, "ready\ncaught\n")
    deaf = "trap '' INT; echo ready; while :; do sleep 1; done"
    twice = signalled(guest, "2,2", "--", "sh", "-c", deaf)
    assert (twice["status"], twice["stdout"]) == (130, "ready\n")


def test_sigterm_leaves_nothing_behind(guest: Runner) -> None:
    before = leftovers(guest)
    ended = signalled(guest, "15", "--", "sh", "-c", "echo ready; sleep 1000")
    assert (ended["status"], ended["stdout"], ended["stderr"]) == (143, "ready\n", "")
    assert leftovers(guest) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernel", "/nowhere/vmlinuz"], r"/nowhere/vmlinuz"),
        (["--kernel", "/etc/passwd"], r"/etc/passwd.*not a.*kernel"),
        (["--read", "/nowhere"], r"/nowhere"),
        (["--read", "/x=/etc/passwd"], r"/etc/passwd.*directory"),
        (["--write", "/nowhere"], r"/nowhere"),
        (["--memory", "32M"], r"memory"),
        (["--cpus", "300"], r"--cpus 300"),
        (["--console", "/nowhere/log"], r"/nowhere/log: No such file"),
    ],
)
def test_bad_input_is_one_clear_line(guest: Runner, options: list[str], message: str) -> None:
    done = guest.run(*options, "--", "true")
    lines = done.stderr.decode().splitlines()
    assert (done.status, done.stdout) == (125, b"")
    assert len(lines) == 1, lines
    assert re.match(rf"tinyvmm: .*{message}", lines[0]), lines


def test_a_c_project_builds_and_runs_and_a_repository_is_cloned(guest: Runner) -> None:
    """gcc, make and git on a 9P root: create, rename, link, mmap, lock, many small files."""
    for program in ("gcc", "make", "git"):
        assert shutil.which(program), f"{program} is not installed"
    project = guest.directory("project")
    (project / "hello.h").write_text("const char *text(void);\n")
    (project / "text.c").write_text(
        '#include "hello.h"\nconst char *text(void) { return "built"; }\n'
    )
    (project / "main.c").write_text(
        '#include <stdio.h>\n#include "hello.h"\nint main(void) { puts(text()); return 0; }\n'
    )
    (project / "Makefile").write_text(
        "hello: main.o text.o\n\t$(CC) -o $@ $^\n%.o: %.c hello.h\n\t$(CC) -O1 -c $<\n"
    )
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=project, check=True)
    done = guest.run(
        *script(
            "set -e",
            "git config --global safe.directory '*'",
            f"git clone -q {project} /root/clone",
            "cd /root/clone",
            "make -s",
            "./hello",
            "git status --short",
            "git log --oneline | wc -l",
            "mv hello hello2 && ./hello2",
            "python3 -c 'print(6*7)' 2>/dev/null || echo 42",
        ),
        timeout=LONG,
    )
    assert (done.status, done.stderr) == (0, b""), done
    assert done.stdout == b"built\n?? hello\n?? main.o\n?? text.o\n1\nbuilt\n42\n"
    assert not (project / "hello").exists()


def test_the_demo_and_the_examples_run_on_this_kvm_too(guest: Runner) -> None:
    demo = guest.tinyvmm("demo")
    assert demo.stdout.startswith(b"Hello from a guest of 15 bytes"), demo
    assert demo.status == 0
    hello = guest.program([interpreter(), "-m", "examples.hello_vm"])
    assert hello.stdout == b"ABCDEFGHIJKLMNOPQRSTUVWXYZ\n", hello
    doctor = guest.tinyvmm("doctor")
    assert b"linux on kvm  guests run directly" in doctor.stdout
    assert ROOT.is_dir()


def test_a_trace_shows_the_messages_that_the_guide_says(guest: Runner) -> None:
    page = (ROOT / "docs/guide/05-ninep.md").read_text()
    capture = page.partition("<!-- capture: cat /etc/hostname -->")[2].partition("\n```\n")[0]
    done = guest.run("--trace", "9p", "--", "cat", "/etc/hostname")
    assert done.stdout == Path("/etc/hostname").read_bytes()
    messages = re.compile(r"^9p root +\d+ (\w+)", re.MULTILINE)
    said, seen = messages.findall(capture), done.stderr.decode()
    assert len(said) == 12
    begin = seen.index("wname=(b'hostname',)")
    after = messages.findall(seen[seen.rindex("\n", 0, begin) + 1 :])
    assert after[: len(said)] == said


def test_a_reboot_may_boot_the_guest_anew(guest: Runner) -> None:
    live = guest.directory("reboots")
    command = script(
        "echo boot >> /live/log; echo private >> /var/tmp/probe; sync; read -r line && echo $line",
        "test $(wc -l < /live/log) -ge 2 || echo b > /proc/sysrq-trigger",
        "wc -l < /var/tmp/probe; exit 5",
    )
    options = ("--on-reboot", "reset", "--shared", f"/live={live}")
    done = guest.run(*options, *command, stdin=b"typed once\n")
    assert (live / "log").read_text() == "boot\n" * 2
    assert (done.status, done.stderr) == (5, b"")
    assert done.stdout == b"typed once\n2\n"  # what the guest wrote to its root is still there


def test_virtio_works_over_either_bus_with_doorbells_of_either_kind(guest: Runner) -> None:
    command = script("cat", "ls -l /etc /sys/bus/pci/devices >&2", "cat /proc/interrupts >&2")
    bells = {}
    for transport, ioeventfd, interrupts in (
        ("mmio", "on", "IO-APIC.*virtio"),
        ("pci", "off", "PCI-MSI.*virtio.*requests"),
        ("pci", "on", "PCI-MSI.*virtio.*requests"),
    ):
        options = ("--transport", transport, "--ioeventfd", ioeventfd, "--trace", "mmio,9p")
        done = guest.run(*options, *command, stdin=b"in and out")
        assert (done.status, done.stdout) == (0, b"in and out")
        said = done.stderr.decode()
        assert re.search(interrupts, said)
        requests = len(re.findall(r"^9p root +\d+ T", said, re.MULTILINE))
        assert requests > 200
        writes = [int(gpa, 16) for gpa in re.findall(r"^mmio (\S+) <-", said, re.MULTILINE)]
        bell, end, stride = (
            (0x050, 0x054, VIRTIO_MMIO_STRIDE)
            if transport == "mmio"
            else (NOTIFY, NOTIFY + 0x1000, PCI_SLOT_STRIDE)
        )
        rung = [gpa for gpa in writes if bell <= gpa % stride < end]
        bells[transport, ioeventfd] = len(rung) / requests
    assert bells["pci", "off"] > 0.9
    assert bells["pci", "on"] == bells["mmio", "on"] == 0
