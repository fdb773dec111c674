"""The tests' own Runner: what becomes of a command when its lab fails."""

from pathlib import Path

import pytest

from tests.linux import conftest
from tinyvmm.lab.lab import Completed, Lab, LabError

OK = Completed(0, b"", b"", timed_out=False)
CRASHED = Completed(255, b"", b"tinyvmm: " + conftest.TRIPLE_FAULT + b"\n", timed_out=False)


class Labs(Lab):
    """Labs that do nothing: each answer is the next of `answers`, or OK."""

    def __init__(self, *answers: Completed | LabError) -> None:
        self.answers = list(answers)
        self.commands: list[list[str]] = []

    def run(self, argv: list[str], **_: object) -> Completed:  # type: ignore[override]
        self.commands.append(argv)
        answer = self.answers.pop(0) if self.answers else OK
        if isinstance(answer, LabError):
            raise answer
        return answer

    def close(self) -> None:
        self.commands.append(["(closed)"])


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    words: list[str] = []
    monkeypatch.setattr(conftest, "FAILED_LABS", words)
    return words


def test_what_a_command_rests_on_is_made_again_in_the_lab_that_repeats_it(told: list[str]) -> None:
    lab = Labs(OK, LabError("it hung"))
    runner = conftest.Runner(lab, Path())
    with runner.standing("mkdir /x", "rmdir /x"):
        assert runner.program(["use", "/x"]) == OK
    make, undo = ["sh", "-ec", "mkdir /x"], ["sh", "-c", "rmdir /x"]
    assert lab.commands == [make, ["use", "/x"], make, ["use", "/x"], undo]
    assert told == ["it hung"]
    assert runner.program(["more"]) == OK
    assert lab.commands[5:] == [["more"]]


@pytest.mark.parametrize(
    ("argv", "runs"), [(["run"], 2), (["run", "--append", "reboot=t"], 1)], ids=["fault", "meant"]
)
def test_a_triple_fault_is_repeated_in_a_new_lab_if_it_was_not_asked_for(
    argv: list[str], runs: int, told: list[str]
) -> None:
    lab = Labs(CRASHED, CRASHED)
    assert conftest.Runner(lab, Path()).program(argv) == CRASHED
    assert lab.commands.count(argv) == runs
    assert len(told) == runs - 1
