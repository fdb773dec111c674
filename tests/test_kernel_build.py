"""The steps of `kernel build`, with a make of ours; `make kernel-build` does it in earnest."""

import io
import os
import re
import tarfile
from pathlib import Path

import pytest

from tests.test_kernels import make_vmlinuz
from tinyvmm.errors import ConfigError
from tinyvmm.images import kernel_build, kernels

MAKE = """#!/bin/sh
echo "$* user=$KBUILD_BUILD_USER" >> {log}
for word in "$@"; do
  case "$word" in
  O=*) made=${{word#O=}};;
  KCONFIG_ALLCONFIG=*) config=${{word#*=}};;
  esac
done
case "$*" in
*allnoconfig*)
  grep -v NR_CPUS "$config" > "$made/.config"
  echo CONFIG_NR_CPUS=8 >> "$made/.config";;
*bzImage*)
  {fail}
  mkdir -p "$made/arch/x86/boot"
  cp {image} "$made/arch/x86/boot/bzImage";;
esac
"""


class Computer:
    """Everything that a build needs, make being ours."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.programs = directory / "bin"
        self.programs.mkdir()
        self.log = directory / "calls"
        for program in kernel_build.PROGRAMS:
            self.program(program, "#!/bin/sh\nexit 0\n")
        (self.programs / "tar").unlink()
        (directory / "image").write_bytes(make_vmlinuz("6.1.192-tinyvmm"))
        self.make()
        (directory / "include").mkdir()
        (directory / "include/gelf.h").write_text("")
        monkeypatch.setenv("PATH", f"{self.programs}:/usr/bin:/bin")
        monkeypatch.setenv("XDG_DATA_HOME", str(directory / "data"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        monkeypatch.setattr(kernel_build, "HEADER_DIRS", (str(directory / "include"),))
        monkeypatch.setattr(kernel_build, "SOURCES", str(directory / "linux-source-*.tar.*"))

    def program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def make(self, fail: str = "") -> None:
        image = self.directory / "image"
        self.program("make", MAKE.format(log=self.log, image=image, fail=fail))

    def source(self, version: str = "6.1") -> Path:
        path = self.directory / f"linux-source-{version}.tar.xz"
        with tarfile.open(path, "w:xz") as archive:
            for name in ("Kbuild", "Makefile"):
                info = tarfile.TarInfo(f"linux-source-{version}/{name}")
                archive.addfile(info, io.BytesIO())
        return path


@pytest.fixture
def computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Computer:
    return Computer(tmp_path, monkeypatch)


def test_a_kernel_is_configured_built_and_stored_with_its_configuration(
    computer: Computer, capsys: pytest.CaptureFixture[str]
) -> None:
    computer.source("6.1")
    newest = computer.source("6.12")
    built = kernel_build.build(jobs=3)
    assert built.version == "6.1.192-tinyvmm"
    assert built.source == f"built of {newest}"
    assert built.modules is None
    configure, make = computer.log.read_text().splitlines()
    assert configure.endswith("allnoconfig user=tinyvmm")
    assert make.endswith("-j3 bzImage user=tinyvmm")
    assert [name for name, has in kernels.able(built).items() if not has] == ["kvm-amd"]
    assert kernels.find(built.version) == built
    assert "otherwise decides, NR_CPUS=64" in capsys.readouterr().err


def test_options_of_ones_own_count_before_ours(computer: Computer) -> None:
    computer.source()
    own = computer.directory / "own"
    own.write_text("# mine\n\nCONFIG_XFS_FS=y\n# CONFIG_EXT4_FS is not set\n")
    built = kernel_build.build(config=str(own))
    config = (Path(built.vmlinuz).parent / "config").read_text()
    assert "CONFIG_XFS_FS=y\n" in config
    assert kernels.able(built)["ext4"] is False


def test_a_second_build_unpacks_nothing_again(computer: Computer) -> None:
    computer.source()
    where = computer.directory / "where"
    kernel_build.build(directory=str(where))
    (tree,) = where.glob("linux-source-*")
    (tree / "kept").write_text("")
    kernel_build.build(directory=str(where))
    assert (tree / "kept").exists()


def test_what_is_missing_is_said_in_one_line_with_the_packages(computer: Computer) -> None:
    with pytest.raises(ConfigError, match=r"apt-get install linux-source\)"):
        kernel_build.build()
    computer.source()
    os.environ["PATH"] = str(computer.programs)
    for name in ("flex", "bison"):
        (computer.programs / name).unlink()
    (computer.directory / "include/gelf.h").unlink()
    with pytest.raises(ConfigError, match=r"apt-get install flex bison tar libelf-dev$"):
        kernel_build.build()


def test_what_make_says_went_wrong_is_the_error(computer: Computer) -> None:
    computer.make('echo "  CC x.o"; echo "x.c:1: error: no such thing"; echo "stop"; exit 2')
    computer.source()
    with pytest.raises(ConfigError, match=r"x\.c:1: error: no such thing; all it said is in") as e:
        kernel_build.build()
    log = Path(str(e.value).rpartition(" ")[2])
    assert "CC x.o" in log.read_text()
    assert kernels.list_() == []


@pytest.mark.parametrize(
    ("source", "why"),
    [("missing", "no such file"), (".", "no kernel's source"), ("fifo", "no regular file")],
)
def test_a_source_that_is_none_is_named(computer: Computer, source: str, why: str) -> None:
    os.mkfifo(computer.directory / "fifo")
    with pytest.raises(ConfigError, match=why):
        kernel_build.build(source=str(computer.directory / source))


def test_two_builds_in_one_directory_do_not_meet(computer: Computer) -> None:
    import fcntl

    computer.source()
    where = computer.directory / "where"
    where.mkdir()
    with (where / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another is at work"):
            kernel_build.build(directory=str(where))


def test_our_options_are_written_as_kconfig_writes_them_and_each_group_says_why() -> None:
    groups = Path(kernel_build.CONFIG).read_text().split("\n\n")
    for group in groups:
        lines = group.strip().splitlines()
        assert lines[0].startswith("# ")
        for line in lines:
            assert re.fullmatch(r'# .*|CONFIG_[A-Z0-9_a-z]+=(y|\d+|"[^"]*")', line), line
    options = kernel_build.read_options(kernel_build.CONFIG)
    assert len(options) == sum(text.count("\nCONFIG_") for text in groups)


def test_a_line_that_is_no_option_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("CONFIG_NET=y\nNET=y\n")
    with pytest.raises(ConfigError, match=r"config:2: give CONFIG_NAME=value"):
        kernel_build.read_options(str(path))
