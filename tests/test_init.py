"""PID 1 does its work: run as it is, in a process namespace of this computer instead of a guest."""

import errno
import os
import signal
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pid1 import POWERED_OFF, Guest, Start, configure, needs_namespaces
from tests.pid1 import start as start  # noqa: PLC0414 (a fixture)
from tinyvmm.guest import abi, init, protocol
from tinyvmm.guest.init import InitConfig, Mkdir, Mount, Symlink, search_path


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.fixture(scope="module")
def start_many(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """As `start` for tests with many examples, each of which finishes its guest."""
    return lambda *argv, **more: Guest(tmp_path_factory.mktemp("guest"), configure(*argv, **more))


pytestmark = needs_namespaces


# --- how the command ends --------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(code=st.integers(0, 255))
def test_the_exit_code_arrives(start_many: Start, code: int) -> None:
    guest = start_many("sh", "-c", f"exit {code}")
    assert guest.started[0] == protocol.STARTED
    status = guest.finish()[2]
    assert os.waitstatus_to_exitcode(status) == code
    guest.destroy()


def test_a_command_killed_by_a_signal_says_which(start: Start) -> None:
    status = start("sh", "-c", "kill -9 $$").finish()[2]
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_the_process_id_of_the_command_is_reported(start: Start) -> None:
    guest = start("sh", "-c", "echo $$")
    assert int(guest.finish()[0]) == guest.started[1]


def test_a_command_that_does_not_exist_is_reported_as_enoent(start: Start) -> None:
    guest = start("no-such-command")
    assert guest.started == (protocol.EXEC_FAILED, errno.ENOENT)
    assert guest.process.wait() == POWERED_OFF


def test_a_file_that_may_not_be_executed_is_reported_as_eacces(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "data").write_text("no program")
    paths = (f"{tmp_path}/data", f"{tmp_path}/missing", f"{tmp_path}/data/below")
    guest = start("data", commands=paths)
    assert guest.started == (protocol.EXEC_FAILED, errno.EACCES)


def test_a_file_that_is_no_program_is_reported_as_enoexec(start: Start, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("no program")
    (tmp_path / "data").chmod(0o755)
    assert start(f"{tmp_path}/data").started == (protocol.EXEC_FAILED, errno.ENOEXEC)


def test_the_first_candidate_that_can_be_executed_is_the_command(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "echo").write_text("not executable")
    directories = f"/nonexistent:/etc/passwd:{tmp_path}:/usr/bin:/bin"
    guest = start("echo", "found", commands=search_path("echo", directories))
    assert guest.finish()[0] == b"found\n"


# --- what the command gets -------------------------------------------------------------------
words = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=5)


@settings(max_examples=15, deadline=None)
@given(arguments=words, environment=words)
def test_arguments_and_environment_arrive_byte_for_byte(
    start_many: Start, arguments: list[str], environment: list[str]
) -> None:
    env = [f"V{number}={word}" for number, word in enumerate(environment)]
    script = 'printf "%s\\0" "$@"; cat /proc/self/environ >&2'
    # dash sets PWD by itself
    guest = start_many("sh", "-c", 'exec "$0" "$@"', "sh", "-c", script, "sh", *arguments, env=env)
    output, errors, _ = guest.finish()
    assert output == "".join(f"{word}\0" for word in (arguments or [""])).encode()
    passed = set(errors.split(b"\0")) - {b""}
    assert passed - {b"PWD=/", b"OLDPWD=/"} == {entry.encode() for entry in env}
    guest.destroy()


def test_names_that_are_not_utf_8_arrive_as_they_are(start: Start) -> None:
    assert start("printf", "%s", "a\udcff\udc80").finish()[0] == b"a\xff\x80"


def test_the_command_starts_in_its_directory_or_else_in_the_root(
    start: Start, tmp_path: Path
) -> None:
    assert start("pwd", cwd=str(tmp_path)).finish()[0] == f"{tmp_path}\n".encode()
    assert start("pwd", cwd=f"{tmp_path}/missing").finish()[0] == b"/\n"


def test_a_relative_command_is_looked_for_from_its_directory(start: Start, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/sh\necho here\n")
    (tmp_path / "script").chmod(0o755)
    assert start("./script", cwd=str(tmp_path)).finish()[0] == b"here\n"


def test_no_signal_is_blocked_or_ignored_and_no_descriptor_inherited(start: Start) -> None:
    # Not "none is ignored": here, unlike in a guest, PID 1 may be born with a signal ignored.
    command = ("grep", "Sig[^Q]", "/proc/self/status")
    plain = subprocess.run(command, capture_output=True, check=True)
    assert start(*command).finish()[0] == plain.stdout
    # ls has the directory itself open as 3
    assert start("ls", "/proc/self/fd").finish()[0].split() == [b"0", b"1", b"2", b"3"]


def test_the_command_leads_its_own_session(start: Start) -> None:
    guest = start("cat", "/proc/self/stat")
    fields = guest.finish()[0].split()
    pid = str(guest.started[1]).encode()
    assert (fields[0], fields[4], fields[5]) == (pid, pid, pid)  # pid, pgrp, session


def test_umask_host_name_and_loopback_are_set(start: Start) -> None:
    script = "umask; hostname; cat /sys/class/net/lo/flags"
    mounts = (Mount("sysfs", "/sys", "sysfs"),)
    guest = start("sh", "-c", script, umask=0o027, hostname="träumer", mounts=mounts)
    output = guest.finish()[0].decode().split()
    assert output[:2] == ["0027", "träumer"]
    assert int(output[2], 16) & 1  # IFF_UP


# --- streams ---------------------------------------------------------------------------------
@settings(max_examples=10, deadline=None)
@given(
    size=st.sampled_from([0, 1, 4095, 4096, 32768, 32769, 65537, 1_000_003]),
    seed=st.binary(min_size=1),
)
def test_what_goes_in_comes_out(start_many: Start, size: int, seed: bytes) -> None:
    data = (seed * (size // len(seed) + 1))[:size]
    guest = start_many("tee", "/dev/fd/2")
    output, errors, status = guest.finish(data)
    assert status == 0
    assert output == data
    assert errors == data
    guest.destroy()


def test_stdout_and_stderr_arrive_apart_and_can_be_opened_again(start: Start) -> None:
    script = "echo out >/proc/self/fd/1; echo err >/proc/self/fd/2; stat -Lc %F /proc/self/fd/0"
    output, errors, _ = start("sh", "-c", script).finish()
    assert (output, errors) == (b"out\nfifo\n", b"err\n")


def test_output_nobody_takes_stops_its_writer_and_no_other_stream(start: Start) -> None:
    script = "head -c 1000000 /dev/zero & echo alive >&2; cat >&2; wait"
    guest = start("sh", "-c", script)
    assert os.read(guest.stderr, 6) == b"alive\n"
    os.write(guest.stdin, b"still\n")
    # sh gives a background command /dev/null to read: this goes through cat
    assert os.read(guest.stderr, 6) == b"still\n"
    assert guest.finish()[0] == bytes(1_000_000)


def test_output_still_on_its_way_when_the_command_ends_arrives(start: Start) -> None:
    # It fits into both pipes and the buffer between them, so that the command can end.
    guest = start("sh", "-c", "head -c 100000 /dev/zero; echo written >&2")
    assert os.read(guest.stderr, 8) == b"written\n"
    (pid_1,) = children(guest.process.pid)
    while children(int(pid_1)):
        os.sched_yield()  # until the command is gone and reaped
    assert guest.finish()[0] == bytes(100_000)


def test_input_nobody_reads_waits_and_arrives_later(start: Start) -> None:
    data = os.urandom(1_000_000)
    guest = start("sh", "-c", "echo ready >&2; head -c 5; sleep 0.1; cat")
    assert os.read(guest.stderr, 6) == b"ready\n"
    assert guest.finish(data)[0] == data


def test_a_command_that_closes_its_input_goes_on(start: Start) -> None:
    guest = start("sh", "-c", "exec <&-; echo closed; sleep 0.1; echo done")
    output, _, status = guest.finish(bytes(1_000_000))
    assert (output, status) == (b"closed\ndone\n", 0)


def test_a_command_whose_reader_has_gone_gets_sigpipe(start: Start) -> None:
    guest = start("yes")
    os.read(guest.stdout, 100)
    guest.close("stdout")
    kind, status = guest.record()
    assert (kind, os.WTERMSIG(status)) == (protocol.EXITED, signal.SIGPIPE)


def test_an_empty_input_is_at_its_end_at_once(start: Start) -> None:
    assert start("cat").finish(b"") == (b"", b"", 0)


# --- processes -------------------------------------------------------------------------------
def test_what_the_command_left_running_is_ended_and_its_output_kept(start: Start) -> None:
    guest = start("sh", "-c", "(echo left; exec sleep 1000) & read word; echo done")
    assert os.read(guest.stdout, 5) == b"left\n"
    assert guest.finish(b"now\n")[0] == b"done\n"


def test_what_the_command_left_writing_is_ended(start: Start) -> None:
    guest = start("sh", "-c", "yes >&2 & read word; echo done")
    assert os.read(guest.stderr, 2) == b"y\n"
    output, errors, status = guest.finish(b"now\n")
    assert (output, status) == (b"done\n", 0)
    assert set(errors.split(b"\n")[:-1]) <= {b"y"}


def test_orphans_are_reaped(start: Start) -> None:
    script = """
        for i in 1 2 3; do sh -c 'sh -c "exit 3" &'; done
        while ps -e -o state= | grep -q Z; do sleep 0.05; done
        echo none
    """
    assert start("sh", "-c", script).finish()[0] == b"none\n"


# --- control ---------------------------------------------------------------------------------
def test_a_signal_from_the_host_reaches_the_command_and_its_group(start: Start) -> None:
    script = "trap 'echo caught; exit 3' USR1; echo ready; sleep 1000 & wait"
    guest = start("sh", "-c", script)
    assert os.read(guest.stdout, 6) == b"ready\n"
    guest.send(protocol.SIGNAL, signal.SIGUSR1)
    output, _, status = guest.finish()
    assert (output, os.waitstatus_to_exitcode(status)) == (b"caught\n", 3)


def test_a_guest_without_a_command_waits_for_a_signal(start: Start) -> None:
    guest = start("unused", commands=(), argv=(), idle=True)
    assert guest.started[0] == protocol.STARTED
    guest.send(protocol.SIGNAL, signal.SIGTERM)
    output, errors, status = guest.finish()
    assert (output, errors, os.waitstatus_to_exitcode(status)) == (b"", b"", -signal.SIGTERM)


def test_a_guest_without_a_command_ends_with_its_host(start: Start) -> None:
    guest = start("unused", commands=(), argv=(), idle=True)
    guest.close("control")
    assert guest.process.wait() == POWERED_OFF


def test_errors_may_be_merged_into_the_output_in_their_order(start: Start) -> None:
    guest = start("sh", "-c", "for i in 1 2 3; do echo $i; echo e$i >&2; done", merged=True)
    assert guest.finish()[:2] == (b"1\ne1\n2\ne2\n3\ne3\n", b"")


def test_records_may_arrive_in_pieces_or_together(start: Start) -> None:
    script = "trap 'echo 1' USR1; trap 'echo 2; exit' USR2; echo ready; while :; do sleep 0.1; done"
    guest = start("sh", "-c", script)
    assert os.read(guest.stdout, 6) == b"ready\n"
    nonsense = struct.pack("<II", 99, 1) + struct.pack("<II", protocol.WINSIZE, 1)
    for piece in nonsense + struct.pack("<II", protocol.SIGNAL, signal.SIGUSR1):
        os.write(guest.control, bytes([piece]))
    assert os.read(guest.stdout, 2) == b"1\n"
    os.write(guest.control, nonsense + struct.pack("<II", protocol.SIGNAL, signal.SIGUSR2))
    assert guest.finish()[0] == b"2\n"


def test_the_guest_ends_with_its_host(start: Start) -> None:
    guest = start("sleep", "1000")
    guest.close("control")
    assert guest.process.wait() == POWERED_OFF


def test_a_host_that_asked_for_it_says_when_to_power_off(start: Start) -> None:
    guest = start("true", await_goodbye=True)
    assert guest.record() == (protocol.EXITED, 0)
    assert guest.process.poll() is None
    guest.send(protocol.SIGNAL, signal.SIGTERM)  # too late to matter
    guest.send(protocol.GOODBYE, 0)
    assert guest.process.wait() == POWERED_OFF


# --- terminal --------------------------------------------------------------------------------
def test_a_terminal_has_its_size_and_is_the_controlling_one(start: Start) -> None:
    script = "stty size; tty -s && echo tty; echo controlling >/dev/tty; stty size <&2"
    output, errors, _ = start("sh", "-c", script, terminal=(37, 119)).finish()
    assert output == b"37 119\r\ntty\r\ncontrolling\r\n37 119\r\n"
    assert errors == b""


def test_a_new_size_reaches_the_terminal_and_its_command(start: Start) -> None:
    script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"
    guest = start("sh", "-c", script, terminal=(24, 80))
    assert os.read(guest.stdout, 7) == b"ready\r\n"
    guest.send(protocol.WINSIZE, 50 | 132 << 16)
    assert guest.finish()[0] == b"50 132\r\n"


def test_control_c_typed_or_sent_interrupts_the_foreground(start: Start) -> None:
    for by_key in (True, False):
        guest = start(
            "sh",
            "-c",
            "trap 'echo int; exit 1' INT; echo ready; while :; do sleep 0.05; done",
            terminal=(24, 80),
        )
        assert os.read(guest.stdout, 7) == b"ready\r\n"
        if by_key:
            os.write(guest.stdin, b"\3")
        else:
            guest.send(protocol.SIGNAL, signal.SIGINT)
        assert guest.finish()[0].endswith(b"int\r\n")


def test_a_signal_goes_to_the_job_in_the_foreground_not_to_its_shell(start: Start) -> None:
    job = "trap 'echo job; exit' INT; echo ready; while :; do sleep 0.05; done"
    script = f"""trap 'echo shell' INT; sh -c "{job}"; echo after"""
    guest = start("bash", "-mc", script, terminal=(24, 80))
    assert os.read(guest.stdout, 7) == b"ready\r\n"
    guest.send(protocol.SIGNAL, signal.SIGINT)
    assert guest.finish()[0] == b"job\r\nafter\r\n"


def test_the_end_of_input_does_not_hang_up_a_terminal(start: Start) -> None:
    script = "echo ready; read word; sleep 0.1; echo $word"
    guest = start("sh", "-c", script, terminal=(24, 80))
    assert os.read(guest.stdout, 7) == b"ready\r\n"
    assert guest.finish(b"typed\n")[0] == b"typed\r\ntyped\r\n"


def test_a_terminal_the_host_hangs_up_hangs_up_the_command(start: Start) -> None:
    guest = start("sh", "-c", "while echo x; do sleep 0.05; done", terminal=(24, 80))
    assert os.read(guest.stdout, 1) == b"x"
    guest.close("stdout")
    kind, status = guest.record()
    assert (kind, os.WTERMSIG(status)) == (protocol.EXITED, signal.SIGHUP)


# --- setup -----------------------------------------------------------------------------------
def test_mounts_directories_and_links_are_made_in_order(start: Start, tmp_path: Path) -> None:
    t = str(tmp_path / "mnt")
    mounts = (
        Mount("tmpfs", t, "tmpfs", data="mode=0700"),
        Mkdir(f"{t}/a", 0o750),
        Mkdir(f"{t}/a"),
        Symlink("a", f"{t}/link"),
        Symlink("b", f"{t}/link"),
        Mount("none", f"{t}/missing/deep", "no-such-fs", required=False),
    )
    guest = start("stat", "-c", "%n %a %F", t, f"{t}/a", f"{t}/link", mounts=mounts)
    assert guest.finish()[0].decode().splitlines() == [
        f"{t} 700 directory",
        f"{t}/a 750 directory",
        f"{t}/link 777 symbolic link",
    ]
    assert list((tmp_path / "mnt").iterdir()) == []  # all that was in the namespace only


def test_a_step_that_fails_is_reported_and_has_a_name(start: Start) -> None:
    mounts = (Mkdir("/tmp"), Mount("source", "/tmp", "no-such-fs"))
    guest = start("true", mounts=mounts)
    kind, value = guest.started
    config = configure("true", mounts=mounts, port_prefix="elsewhere")
    assert (kind, value & 0xFFFF) == (protocol.SETUP_FAILED, errno.ENODEV)
    assert init.describe_step(config, value >> 16) == "mount source (no-such-fs) on /tmp"
    assert guest.process.wait() == POWERED_OFF


def test_a_module_has_its_parameters() -> None:
    steps = init.setup_steps(InitConfig(("true",), ("true",), modules=("a.ko", "b.ko debug=1 x=y")))
    opened = [step.arguments[0] for step in steps if step.says in {"open a.ko", "open b.ko"}]
    inserted = [step.arguments[1] for step in steps if step.number == abi.SYS_FINIT_MODULE]
    assert (opened, inserted) == (["a.ko", "b.ko"], ["", "debug=1 x=y"])


def test_each_step_of_every_kind_of_setup_has_its_own_description() -> None:
    for config in (
        InitConfig(("/bin/true",), ("true",), modules=("a.ko", "b.ko debug=1")),
        InitConfig(("/bin/true",), ("true",), terminal=(24, 80)),
    ):
        steps = init.setup_steps(config)
        assert [init.describe_step(config, i) for i in range(len(steps))] == [s.says for s in steps]
        assert init.describe_step(config, 999) == "step 999"
    assert any("a.ko" in step.says for step in steps) is False
