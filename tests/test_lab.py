"""What of the lab can be shown without booting it."""

import base64
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.waiting import with_time_enough
from tinyvmm.errors import ConfigError
from tinyvmm.kernel_files.kernel_image import Kernel, Layout, Segment
from tinyvmm.lab import lab, lab_agent, qemu

NOTE = struct.pack("<III4sQ", 4, 8, 18, b"Xen", 0x100_0070)


def kernel_of(parts: list[bytes]) -> Kernel:
    """A kernel whose segments are `parts`, 16 MiB apart."""
    segments, at = [], 0
    for number, part in enumerate(parts):
        segments.append(Segment((number + 1) << 24, at, len(part)))
        at += len(part)
    layout = Layout(tuple(segments), 1 << 30, 0x100_0000)
    return Kernel("vmlinuz", b"".join(parts), layout, b"", "")


def readelf(path: Path, option: str) -> str:
    done = subprocess.run(
        ["readelf", option, "--wide", path], capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return done.stdout


def test_readelf_finds_the_pvh_entry_and_every_segment(tmp_path: Path) -> None:
    parts = [b"text" * 3000, b"data" + NOTE + bytes(100), b"\xff" * 4096]
    headers = qemu.pvh_image(kernel_of(parts))
    assert headers is not None
    image = headers + b"".join(part.ljust(-(-len(part) // 4096) * 4096, b"\0") for part in parts)
    file = tmp_path / "kernel.elf"
    file.write_bytes(image)

    rows = [line.split() for line in readelf(file, "--program-headers").splitlines()]
    loads = [row for row in rows if row[:1] == ["LOAD"]]
    assert [int(row[3], 16) for row in loads] == [1 << 24, 2 << 24, 3 << 24]
    for row, part in zip(loads, parts, strict=True):
        offset, length = int(row[1], 16), int(row[4], 16)
        assert image[offset : offset + length] == part

    notes = readelf(file, "--notes")
    assert "Xen" in notes
    assert "70 00 00 01 00 00 00 00" in notes


@given(st.binary(max_size=2000))
def test_a_kernel_without_the_note_is_not_entered_by_pvh(data: bytes) -> None:
    if NOTE[:16] not in data:
        assert qemu.pvh_image(kernel_of([data])) is None


def test_what_cannot_be_unpacked_is_given_to_qemu_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tinyvmm.boot

    path = tmp_path / "vmlinuz"
    path.write_bytes(b"compressed somehow")
    monkeypatch.setattr(tinyvmm.boot, "load_kernel", lambda _: kernel_of([b"its own unpacker"]))
    fd = qemu.kernel_file(str(path))
    try:
        assert os.read(fd, 100) == b"compressed somehow"
    finally:
        os.close(fd)


def test_a_comma_in_a_path_is_not_the_end_of_it() -> None:
    hardware = qemu.Hardware(1 << 30, 2, ["/a,b"])
    arguments = qemu._arguments(hardware, (10, 11, 12), (13, 14, 15, 16))
    assert "local,id=share0,path=/a,,b,security_model=none,multidevs=remap" in arguments


@pytest.mark.parametrize("ticks", [True, False])
def test_the_kernel_has_ticks_where_processors_do_not_wake_each_other(ticks: bool) -> None:
    arguments = qemu._arguments(
        qemu.Hardware(1 << 30, 2, [], ticks), (10, 11, 12), (13, 14, 15, 16)
    )
    assert ("nohz=off" in arguments[arguments.index("-append") + 1]) == ticks


def test_without_qemu_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="apt-get install qemu-system-x86"):
        lab.run_in_lab(["true"])


@pytest.mark.parametrize("hardware", [{"memory": 1 << 20}, {"cpus": 0}, {"cpus": 1000}])
def test_a_machine_nobody_could_use_is_refused(hardware: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="give it"):
        lab.run_in_lab(["true"], **hardware)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "why"), [("/etc/passwd", "not a directory"), ("/nowhere", "make it"), ("/", "no lab")]
)
def test_what_cannot_be_shared_is_refused(path: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        lab._share(path)


def test_a_share_is_the_directory_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert lab._share(str(tmp_path / "link")) == str(tmp_path / "real")


def test_the_quick_python_finds_what_the_slow_one_does() -> None:
    code = "import sys; print(sys.version, sys.argv[1:])"
    done = subprocess.run(
        lab.python_command(code, ["a b", "--c"]), capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{sys.version} ['a b', '--c']\n"


def test_what_runs_again_in_the_lab_is_this_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def here(argv: list[str], **_: object) -> int:
        return subprocess.run(argv, cwd=tmp_path, env={}, check=False).returncode

    monkeypatch.setattr(lab, "run_in_lab", here)
    assert lab.reexec(["--version"]) == 0


def test_a_lab_leaves_the_host_at_least_half_of_its_memory() -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < lab.default_memory() <= physical // 2
    assert 2 <= lab.default_cpus() <= 4


# --- the agent, on this side ---------------------------------------------------------------------


def ask(*requests: tuple[dict[str, Any], bytes]) -> list[tuple[dict[str, Any], bytes, bytes]]:
    """Give requests to an agent of our own, and take its answers apart."""
    sent = b""
    for request, stdin in requests:
        whole = {"env": dict(os.environ), "cwd": "/", "timeout": 120, "pty": None, **request}
        sent += json.dumps({**whole, "stdin": len(stdin)}).encode() + b"\n" + stdin
    agent = [sys.executable, "-I", "-S", lab_agent.__file__]
    done = subprocess.run(agent, input=sent, capture_output=True, check=True)
    assert not done.stderr
    answers, rest = [], done.stdout
    while rest:
        line, _, rest = rest.partition(b"\n")
        if not line:
            continue  # a sign of life
        answer = json.loads(line)
        out, err = answer.pop("stdout"), answer.pop("stderr")
        answers.append((answer, rest[:out], rest[out : out + err]))
        rest = rest[out + err :]
    return answers


def test_the_agent_answers_one_request_after_the_other() -> None:
    data = os.urandom(300_000)
    first, second, third = ask(
        ({"argv": ["cat"]}, data),
        ({"argv": ["sh", "-c", "echo $X; pwd >&2; exit 3"], "env": {"X": "x"}, "cwd": "/usr"}, b""),
        ({"argv": ["base64", "-w0"]}, b"\n{}\n"),
    )
    assert first == ({"status": 0, "timed_out": False}, data, b"")
    assert second == ({"status": 3, "timed_out": False}, b"x\n", b"/usr\n")
    assert base64.b64decode(third[1]) == b"\n{}\n"


def test_the_agent_survives_what_cannot_be_run() -> None:
    missing, forbidden, fine = ask(
        ({"argv": ["no-such-command"]}, b"unread"),
        ({"argv": ["true"], "cwd": "/nowhere"}, b""),
        ({"argv": ["true"]}, b""),
    )
    assert "no-such-command" in missing[0]["error"]
    assert "/nowhere" in forbidden[0]["error"]
    assert fine[0]["status"] == 0


def test_the_agent_ends_what_takes_too_long_with_all_its_children() -> None:
    script = "sleep 1000 & echo $!; wait"

    def ended(timeout: float) -> bytes:
        ((answer, out, _),) = ask(({"argv": ["sh", "-c", script], "timeout": timeout}, b""))
        assert answer == {"status": -9, "timed_out": True}
        return out

    out = with_time_enough(ended)
    status = Path(f"/proc/{int(out)}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()


def test_the_agent_gives_a_terminal_of_the_size_asked_for() -> None:
    script = "stty size; tty >/dev/null && read line && echo read $line; exit 4"
    ((answer, shown, _),) = ask(({"argv": ["sh", "-c", script], "pty": [20, 70]}, b"typed\n"))
    assert answer == {"status": 4, "timed_out": False}
    assert b"20 70\r\n" in shown
    assert b"read typed\r\n" in shown


def test_the_agent_ends_a_terminal_program_that_takes_too_long() -> None:
    request = {"argv": ["sh", "-c", "echo up; sleep 1000"], "pty": [24, 80]}

    def shown(timeout: float) -> bytes:
        ((answer, shown, _),) = ask(({**request, "timeout": timeout}, b""))
        assert answer["timed_out"]
        return shown

    assert with_time_enough(shown) == b"up\r\n"


def test_the_agent_gives_signs_of_life_until_the_command_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lab_agent, "HEARTBEAT", 0.01)
    beats = threading.Event()

    class Answers(io.BytesIO):
        def flush(self) -> None:
            beats.set()

    answers = Answers()
    with lab_agent.heartbeat(answers):
        assert beats.wait(60)
    said = answers.getvalue()
    assert set(said) == set(b"\n")


def test_the_agent_visits_every_processor_from_every_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them may not be woken by its own timer."""
    monkeypatch.setattr(lab_agent, "HEARTBEAT", 0.01)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2})
    went: dict[int, list[int]] = {}
    everywhere = threading.Event()

    def go(_pid: int, where: set[int]) -> None:
        went.setdefault(threading.get_ident(), []).extend(where)
        if len(went) == 3 and all(len(places) >= 9 for places in went.values()):
            everywhere.set()

    monkeypatch.setattr(os, "sched_setaffinity", go)
    with lab_agent.heartbeat(io.BytesIO()):
        assert everywhere.wait(60)
    assert sorted(places[0] for places in went.values()) == [0, 1, 2]
    for home, *visited in went.values():
        assert visited[:4] == [0, 1, 2, home]


# --- a lab that fails, played by this side -------------------------------------------------------


class FakeQemu:
    """A lab that is up, whose agent says what the test wants, and then nothing."""

    def __init__(self, says: bytes) -> None:
        ours, theirs = socket.socketpair()
        self.sockets = (ours, ours)
        self.theirs = theirs
        self.closed = False
        theirs.sendall(says)

    def last_words(self) -> str:
        return "soft lockup"

    def close(self) -> None:
        self.closed = True
        self.sockets[0].close()
        self.theirs.close()


def fake_lab(monkeypatch: pytest.MonkeyPatch, says: bytes) -> tuple[lab.Lab, FakeQemu]:
    qemu = FakeQemu(says)
    monkeypatch.setattr(lab, "SILENCE_MAX", 0.1)
    fake = lab.Lab()
    monkeypatch.setattr(fake, "_qemu", qemu)
    return fake, qemu


def test_signs_of_life_are_not_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = b'{"status": 3, "timed_out": false, "stdout": 1, "stderr": 0}'
    fake, qemu = fake_lab(monkeypatch, b"\n\n" + answer + b"\no")
    assert fake.run(["x"]) == lab.Completed(3, b"o", b"", timed_out=False)
    qemu.close()


def test_a_lab_that_gives_no_sign_of_life_is_ended_and_said_to_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake, qemu = fake_lab(monkeypatch, b"\n")
    with pytest.raises(lab.LabHungError, match="soft lockup"):
        fake.run(["x"])
    assert qemu.closed


def test_a_lab_that_dies_is_no_lab_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, qemu = fake_lab(monkeypatch, b"")
    qemu.theirs.close()
    with pytest.raises(lab.LabError) as caught:
        fake.run(["x"])
    assert not isinstance(caught.value, lab.LabHungError)
