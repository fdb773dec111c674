"""The probe's guest: that its bytes are the instructions it names, and what it says of a KVM."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tinyvmm import kvm
from tinyvmm.lab import probe
from tinyvmm.lab.probe import TRIALS, first_failure, missing_for_linux, offered_trials


def test_every_trial_is_the_instruction_it_names(tmp_path: Path) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("no objdump on this machine")
    for trial in TRIALS:
        (tmp_path / "code").write_bytes(bytes.fromhex(trial.code))
        listing = subprocess.run(
            ["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", tmp_path / "code"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        last = listing.splitlines()[-1].split("\t")[2].split()[0]
        assert last.removesuffix("64") == trial.name


def test_an_instruction_cpuid_does_not_offer_is_not_tried() -> None:
    nothing = [kvm.kvm_cpuid_entry2(function=leaf) for leaf in (1, 7)]
    assert [trial.name for trial in offered_trials(nothing)] == ["int3"]
    smap = [kvm.kvm_cpuid_entry2(function=7, ebx=1 << 20)]
    assert [trial.name for trial in offered_trials(smap)] == ["int3", "stac", "clac"]


@pytest.mark.kvm
def test_the_probe_answers_and_names_what_is_missing() -> None:
    with kvm.System() as system:
        trials = offered_trials(system.supported_cpuid())
    missing = first_failure(trials)
    assert missing is None or any(trial.name in missing for trial in TRIALS)
    assert missing_for_linux() == missing


@pytest.mark.kvm
def test_a_kvm_of_the_processors_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(probe, "first_failure", asked.append)
    monkeypatch.setattr(probe, "HARDWARE", (str(tmp_path / "kvm_intel"), str(tmp_path)))
    assert missing_for_linux() is None
    assert asked == []
    monkeypatch.setattr(probe, "HARDWARE", (str(tmp_path / "kvm_intel"),))
    missing_for_linux()
    assert len(asked) == 1
