"""Real work in a guest: package managers, databases, benchmarks that verify what they read.

One guest does all of it (real_work.sh), on its private root and in a shared directory. What fails
here fails on ext4 as well, or is in docs/limits-9p.md.
"""

import base64
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.linux.conftest import LONG, Runner, interpreter

pytestmark = pytest.mark.linux

SCRIPT = Path(__file__).parent / "real_work.sh"
PACKAGES = "hello", "bc"
STRESSORS = SCRIPT.read_text().partition('stressors="')[2].partition('"')[0].split()
BOTH = "sqlite rollback", "sqlite wal", "sqlite writers", "fio random writes", "fio mmap"
NAMES = [
    "dpkg -i",
    "dpkg -r",
    "venv and pip install",
    "dbench",
    *BOTH,
    *(f"{name}, shared" for name in BOTH),
    *(f"stress-ng {name}" for name in STRESSORS),
]


def make_wheel(directory: Path) -> None:
    """A package with a console script, as PyPA's binary distribution format has it."""
    files = {
        "tinyvmm_test_hello.py": "def main():\n    print('hello from a wheel')\n",
        "tinyvmm_test_hello-1.dist-info/METADATA": (
            "Metadata-Version: 2.1\nName: tinyvmm-test-hello\nVersion: 1\n"
        ),
        "tinyvmm_test_hello-1.dist-info/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        "tinyvmm_test_hello-1.dist-info/entry_points.txt": (
            "[console_scripts]\ntinyvmm-test-hello = tinyvmm_test_hello:main\n"
        ),
    }
    record = "tinyvmm_test_hello-1.dist-info/RECORD"
    lines = []
    with zipfile.ZipFile(directory / "tinyvmm_test_hello-1-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest())
            lines.append(f"{name},sha256={digest.decode().rstrip('=')},{len(content)}")
            wheel.writestr(name, content)
        wheel.writestr(record, "\n".join([*lines, f"{record},,"]))


@pytest.fixture(scope="module")
def results(guest: Runner) -> dict[str, str]:
    """What became of each: "ok", or how it failed."""
    inputs, shared = guest.directory("inputs"), guest.directory("live")
    make_wheel(inputs)
    download = ["apt-get", "download", "--quiet", *PACKAGES]
    if subprocess.run(download, cwd=inputs, capture_output=True, check=False).returncode:
        subprocess.run(["apt-get", "update", "--quiet"], capture_output=True, check=False)
        subprocess.run(download, cwd=inputs, capture_output=True, check=True)
    command = ["sh", str(SCRIPT), str(inputs), interpreter(), "/live"]
    options = ["--memory", "1G", "--shared", f"/live={shared}"]
    # Hundreds of processes: in the lab, those at the same addresses share QEMU's translations.
    options += ["--append", "norandmaps"]
    done = guest.run(*options, "--", *command, timeout=LONG)
    found = {}
    for line in done.stdout.decode().splitlines():
        word, _, rest = line.partition(" ")
        if word == "ok":
            found[rest.rpartition(" ")[0]] = "ok"
        else:
            name, _, why = rest.partition(": ")
            found[name] = why
    assert done.status == 0, done
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_works_as_on_a_disk(results: dict[str, str], name: str) -> None:
    assert results.get(name) == "ok"
