"""The user's terminal, with a pseudo-terminal in its place."""

import os
import pty
import signal
import termios
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm.terminal import EscapeKeys, Terminal


@pytest.fixture
def tty_pair() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def test_raw_mode_passes_control_c_as_a_byte_and_is_undone(tty_pair: tuple[int, int]) -> None:
    master, slave = tty_pair
    before = termios.tcgetattr(slave)
    terminal = Terminal(slave)
    terminal.enter_raw()
    os.write(master, b"\x03\x04\r")
    assert os.read(slave, 10) == b"\x03\x04\r"
    terminal.restore()
    assert termios.tcgetattr(slave) == before


def test_entering_twice_still_restores_the_first_modes(tty_pair: tuple[int, int]) -> None:
    _, slave = tty_pair
    before = termios.tcgetattr(slave)
    terminal = Terminal(slave)
    terminal.enter_raw()
    terminal.enter_raw()
    terminal.restore()
    terminal.restore()
    assert termios.tcgetattr(slave) == before


def test_what_was_typed_ahead_survives_going_raw(tty_pair: tuple[int, int]) -> None:
    master, slave = tty_pair
    os.write(master, b"typed early\n")
    terminal = Terminal(slave)
    terminal.enter_raw()
    assert os.read(slave, 100) == b"typed early\n"
    terminal.restore()


def test_the_size_is_rows_then_columns(tty_pair: tuple[int, int]) -> None:
    _, slave = tty_pair
    termios.tcsetwinsize(slave, (33, 99))
    assert Terminal(slave).size() == (33, 99)
    termios.tcsetwinsize(slave, (0, 0))
    assert Terminal(slave).size() == (24, 80)


def run_in_a_terminal(body: str, before_end: bytes = b"") -> tuple[int, list[object], list[object]]:
    """Run Python code with a terminal as stdin and stdout; its modes before and after."""
    import subprocess
    import sys

    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    with subprocess.Popen(
        [sys.executable, "-c", body],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        shown = b""
        while b"ready" not in shown:
            shown += os.read(master, 100)
        if before_end:
            os.write(master, before_end)
        if b"wait for a signal" in shown:
            assert termios.tcgetattr(slave) != before
            child.send_signal(signal.SIGTERM)
        status = child.wait(60)
    after = termios.tcgetattr(slave)
    os.close(master)
    os.close(slave)
    return status, before, after


SESSION = """
import os, threading
from tinyvmm.session import *
from tinyvmm.streams import PortInput, PortOutput
from tinyvmm.terminal import Terminal
class Port:
    sent = ()
    def __init__(self): self.sent = []
    def take_output(self): return self.sent.pop(0) if self.sent else b""
    def pass_to(self, send): pass
    def put_input(self, data, patient): return len(data)
    def close(self): pass
stdin, stdout, stderr, control = (Port() for _ in range(4))
ports = Ports(PortInput(stdin), PortOutput(stdout), PortOutput(stderr),
              PortOutput(control), PortInput(control))
session = Session(ports, command="prog", terminal=Terminal())
class Shouting(Terminal):
    def enter_raw(self):
        super().enter_raw()
        os.write(1, b"ready MARK")
session._terminal = Shouting()
control.sent.append(RECORD.pack(STARTED, 2))
"""


def test_the_escape_keys_end_a_session_and_the_terminal_is_as_before() -> None:
    status, before, after = run_in_a_terminal(
        SESSION + "result = session.run()\nassert result.reason == 'escape', result\nos._exit(5)",
        b"ab\x1d\x1d\x1d",
    )
    assert status == 5
    assert before == after


def test_a_termination_signal_leaves_the_terminal_as_before() -> None:
    status, before, after = run_in_a_terminal(
        SESSION.replace("MARK", "wait for a signal") + "os._exit(session.run().status)"
    )
    assert status == 143
    assert before == after


def test_a_crash_in_a_relay_leaves_the_terminal_as_before() -> None:
    broken = """
def fail(data, patient): raise RuntimeError("a bug of ours")
stdin.put_input = fail
session.run()
"""
    status, before, after = run_in_a_terminal(SESSION + broken, b"x")
    assert status == 1
    assert before == after


def test_leaving_without_restore_is_caught_at_exit() -> None:
    status, before, after = run_in_a_terminal(
        "from tinyvmm.terminal import Terminal\nimport os, sys\n"
        "Terminal().enter_raw()\nos.write(1, b'ready')\nos.read(0, 1)\nsys.exit(3)",
        b"x",  # without Return: only a raw terminal hands it over
    )
    assert status == 3
    assert before == after


@given(st.lists(st.binary(max_size=5) | st.just(b"\x1d")))
def test_escape_keys_count_only_presses_in_a_row(parts: list[bytes]) -> None:
    keys = EscapeKeys()
    seen = False
    typed = b""
    for part in parts:
        typed += part
        seen = keys.seen(part)
        if seen:
            break
    assert seen == (b"\x1d\x1d\x1d" in typed)
