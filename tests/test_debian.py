"""Kernel packages made here, honest, hostile and damaged; and an apt that is a script of ours."""

import io
import lzma
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyvmm.errors import ConfigError
from tinyvmm.images import debian
from tinyvmm.images.package import Unpacking
from tinyvmm.images.version import version_key

V = "6.1.0-56-amd64"


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def member(name: str, data: bytes = b"", **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, data


def ar(members: list[tuple[str, bytes]]) -> bytes:
    packed = b"!<arch>\n"
    for name, data in members:
        packed += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data
        packed += b"\n" * (len(data) % 2)
    return packed


def deb(members: list[tuple[tarfile.TarInfo, bytes]], compression: str = "xz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w|{compression}") as archive:  # type: ignore[call-overload]
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    suffix = f".{compression}" if compression else ""
    return ar(
        [
            ("debian-binary", b"2.0\n"),
            ("control.tar.xz", lzma.compress(b"odd")),
            (f"data.tar{suffix}", buffer.getvalue()),
        ]
    )


HONEST = [
    member("./", type=tarfile.DIRTYPE),
    member("./boot/", type=tarfile.DIRTYPE),
    member(f"./boot/System.map-{V}", b"map"),
    member(f"./boot/config-{V}", b"CONFIG_64BIT=y\n"),
    member(f"./boot/vmlinuz-{V}", b"kernel" * 1000),
    member(f"./lib/modules/{V}/kernel/fs/9p/9p.ko", b"9p"),
    member(f"./lib/modules/{V}/modules.builtin", b"kernel/x.ko\n"),
    member(f"./lib/modules/{V}/build", type=tarfile.SYMTYPE, linkname="/usr/src"),
    member("./usr/share/doc/copyright", b"(c)"),
]
WHOLE = deb(HONEST)


def unpack(package: bytes, directory: Path) -> str:
    path = directory / "some.deb"
    path.write_bytes(package)
    target = directory / "draft"
    target.mkdir(exist_ok=True)
    into = Unpacking(str(target))
    debian.unpack(str(path), into, quiet)
    return into.finish(str(path), "give another")


def contents(directory: Path) -> dict[str, bytes]:
    found = {}
    for path in directory.rglob("*"):
        assert stat.S_ISREG(path.lstat().st_mode) or path.is_dir()
        if path.is_file():
            found[str(path.relative_to(directory))] = path.read_bytes()
    return found


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2", ""])
def test_a_kernel_package_gives_kernel_config_and_modules_and_nothing_else(
    compression: str, tmp_path: Path
) -> None:
    assert unpack(deb(HONEST, compression), tmp_path) == V
    assert contents(tmp_path / "draft") == {
        "vmlinuz": b"kernel" * 1000,
        "config": b"CONFIG_64BIT=y\n",
        "modules/kernel/fs/9p/9p.ko": b"9p",
        "modules/modules.builtin": b"kernel/x.ko\n",
    }


def test_a_package_packed_with_zstd_is_read_too(tmp_path: Path) -> None:
    members = deb(HONEST, "").partition(b"data.tar")
    tar = members[2][60 - len("data.tar") :]
    packed = subprocess.run(["zstd", "-qc"], input=tar, capture_output=True, check=True).stdout
    control = ("control.tar.xz", lzma.compress(b"odd"))
    package = ar([("debian-binary", b"2.0\n"), control, ("data.tar.zst", packed)])
    assert unpack(package, tmp_path) == V
    assert contents(tmp_path / "draft")["vmlinuz"] == b"kernel" * 1000
    damaged = ar([("debian-binary", b"2.0\n"), control, ("data.tar.zst", packed[:-30])])
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="is damaged"):
        unpack(damaged, tmp_path / "other")


def test_modules_below_usr_are_found_as_well(tmp_path: Path) -> None:
    moved = [(i, d) for i, d in HONEST if "modules" not in i.name]
    moved.append(member(f"./usr/lib/modules/{V}/kernel/fs/9p/9p.ko.xz", b"9p"))
    assert unpack(deb(moved), tmp_path) == V
    assert contents(tmp_path / "draft")["modules/kernel/fs/9p/9p.ko.xz"] == b"9p"


def test_packages_of_the_distributions_own_tools_are_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for info, data in HONEST:
        if info.isreg():
            (root / info.name).parent.mkdir(parents=True, exist_ok=True)
            (root / info.name).write_bytes(data)
    (root / "DEBIAN").mkdir()
    control = f"Package: linux-image-{V}\nVersion: 1\nArchitecture: amd64\nMaintainer: x\n"
    (root / "DEBIAN/control").write_text(control + "Description: x\n")
    try:
        subprocess.run(
            ["dpkg-deb", "-b", "-Zxz", str(root), str(tmp_path / "x.deb")],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("needs dpkg-deb")
    assert unpack((tmp_path / "x.deb").read_bytes(), tmp_path) == V


HOSTILE = {
    "absolute": [member("/boot/vmlinuz-6.1", b"x")],
    "parent": [member(f"./lib/modules/{V}/../../../../escape", b"x")],
    "parent at the end": [member(f"./lib/modules/{V}/..", b"x")],
    "twice": [member(f"./boot/vmlinuz-{V}", b"other")],
    "a file as directory": [member(f"./lib/modules/{V}/modules.builtin/x", b"x")],
    "a directory as file": [member(f"./lib/modules/{V}/kernel", b"x")],
    "through a link": [
        member(f"./lib/modules/{V}/out", type=tarfile.SYMTYPE, linkname="/"),
        member("../out/escape", b"x"),
    ],
    "a NUL": [member(f"./lib/modules/{V}/a", b"x", pax_headers={"path": f"lib/modules/{V}/a\0b"})],
    "another kernel's modules": [member("./lib/modules/5.0/x.ko", b"x")],
    "two kernels": [member("./boot/vmlinuz-5.0", b"x")],
}


@pytest.mark.parametrize("trick", sorted(HOSTILE))
def test_a_hostile_package_is_refused_and_writes_nothing_outside(
    trick: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        unpack(deb(HONEST + HOSTILE[trick]), tmp_path)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"some.deb", "draft"}


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_never_made(kind: bytes, tmp_path: Path) -> None:
    odd = member(f"./lib/modules/{V}/odd", type=kind, linkname="/etc/passwd", devmajor=1)
    through = member(f"./lib/modules/{V}/odd/file", b"x")
    assert unpack(deb([*HONEST, odd, through]), tmp_path) == V
    files = contents(tmp_path / "draft")
    assert files["modules/odd/file"] == b"x"


@pytest.mark.parametrize(
    ("package", "why"),
    [
        (b"", "not a .deb"),
        (b"!<arch>\n", "no data.tar"),
        (ar([("debian-binary", b"2.0\n")]), "no data.tar"),
        (WHOLE[:-100], "cut short"),
        (ar([("data.tar.xz", b"junk")]), "damaged"),
        (ar([("data.tar.rar", b"junk")]), "dpkg -x"),
        (deb([]), "no kernels"),
        (deb([member("./usr/share/doc/x", b"x")]), "no kernels"),
    ],
)
def test_a_package_without_a_kernel_says_so(package: bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        unpack(package, tmp_path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["xz", "gz", "bz2", ""]), st.floats(0, 1), st.integers(1, 255), st.booleans()
)
def test_a_package_cut_or_damaged_anywhere_unpacks_or_is_a_config_error(
    tmp_path: Path, compression: str, where: float, change: int, cut: bool
) -> None:
    package = bytearray(deb(HONEST, compression))
    place = int(where * (len(package) - 1))
    package[place] ^= change
    if cut:
        del package[place:]
    shutil.rmtree(tmp_path / "draft", ignore_errors=True)
    try:
        unpack(bytes(package), tmp_path)
    except ConfigError as error:
        text = str(error)
    else:
        text = ""
    assert "\n" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"some.deb", "draft"}


# --- apt -----------------------------------------------------------------------------------------

SEARCH = """linux-image-6.1.0-9-amd64 - Linux 6.1 for 64-bit PCs (signed)
linux-image-6.1.0-56-cloud-amd64 - Linux 6.1 for x86-64 cloud (signed)
linux-image-6.12-amd64 - Linux for 64-bit PCs (meta-package)
linux-image-6.1.0-56-amd64 - Linux 6.1 for 64-bit PCs (signed)
linux-image-6.1.0-57-rt-amd64 - Linux 6.1 for 64-bit PCs, PREEMPT_RT (signed)
linux-image-6.1.0-58-amd64-dbg - Debug symbols
linux-image-6.1.0-59-amd64-unsigned - Linux 6.1 for 64-bit PCs
"""


class FakeApt:
    """Programs `apt-get` and `apt-cache` on a PATH of their own, which log how they are called."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.log = directory / "log"
        directory.mkdir()
        monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")

    def program(self, name: str, script: str) -> None:
        path = self.directory / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.log}\n{script}\n')
        path.chmod(0o755)

    def answers(self, **answers: str) -> None:
        """What `apt-cache ACTION` prints; without an answer it fails as apt does."""
        cases = "".join(
            f"{action}) cat <<'END'\n{text}\nEND\n;;\n" for action, text in answers.items()
        )
        self.program("apt-cache", f'case "$1" in\n{cases}*) echo "E: none" >&2; exit 100;;\nesac')


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    return FakeApt(tmp_path / "bin", monkeypatch)


def test_the_meta_packages_dependency_is_what_debian_means(apt: FakeApt) -> None:
    apt.answers(depends="linux-image-amd64\n  Depends: linux-image-6.1.0-9-amd64", search=SEARCH)
    assert debian.find_package() == "linux-image-6.1.0-9-amd64"


def test_without_a_meta_package_the_newest_plain_image_is_taken(apt: FakeApt) -> None:
    apt.answers(search=SEARCH)
    assert debian.find_package() == "linux-image-6.1.0-56-amd64"


@pytest.mark.parametrize(
    ("version", "flavour", "package"),
    [
        (None, "cloud", "6.1.0-56-cloud-amd64"),
        ("6.1.0-48", "amd64", "6.1.0-48-amd64"),
        ("6.1.0-48-amd64", "amd64", "6.1.0-48-amd64"),
        ("linux-image-6.1.0-48-cloud-amd64", "amd64", "6.1.0-48-cloud-amd64"),
        ("6.1.0-48", "rt", "6.1.0-48-rt-amd64"),
        ("6.1", "amd64", "6.1.0-56-amd64"),
        ("6.12.9", "amd64", "6.12.9+deb12-amd64"),
    ],
)
def test_kernels_are_found_by_version_and_flavour(
    apt: FakeApt, version: str | None, flavour: str, package: str
) -> None:
    images = ["6.1.0-48", "6.1.0-56", "6.1.0-9", "6.12.9+deb12"]
    lines = [f"linux-image-{v}{f}-amd64 - Linux" for v in images for f in ("", "-cloud", "-rt")]
    lines += [f"{line.partition(' ')[0]}-dbg - Linux" for line in lines]
    apt.answers(search="\n".join(lines[::-1]))
    if version is not None or flavour != "cloud":
        assert debian.find_package(version, flavour) == f"linux-image-{package}"
        return
    apt.answers(depends="Depends: linux-image-6.1.0-56-cloud-amd64", search="\n".join(lines))
    assert debian.find_package(version, flavour) == f"linux-image-{package}"
    assert "linux-image-cloud-amd64" in apt.log.read_text()


@pytest.mark.parametrize("version", ["6.1.0-4", "6", "5.10", "6.1.0-48-cloud"])
def test_a_version_apt_does_not_know_names_those_it_does(apt: FakeApt, version: str) -> None:
    apt.answers(search="linux-image-6.1.0-48-amd64 - Linux\nlinux-image-6.1.0-9-amd64 - Linux")
    if version == "6":
        assert debian.find_package(version) == "linux-image-6.1.0-48-amd64"
        return
    with pytest.raises(ConfigError, match=r"no such kernel, but 6\.1\.0-48-amd64, 6\.1\.0-9-amd64"):
        debian.find_package(version)


def test_an_unknown_flavour_names_those_there_are(apt: FakeApt) -> None:
    with pytest.raises(ConfigError, match="'desktop' is no flavour: give amd64, cloud, rt"):
        debian.find_package(None, "desktop")


def test_without_lists_they_are_asked_for_by_root_and_recommended_to_others(
    apt: FakeApt, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt.answers(search="")
    apt.program("apt-get", "exit 0")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="sudo apt-get update"):
        debian.find_package()
    assert "update" not in apt.log.read_text()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(ConfigError, match="knows no"):
        debian.find_package()
    assert "apt-get -q update" in apt.log.read_text()


def test_what_keeps_apt_from_searching_is_told_in_its_words(apt: FakeApt) -> None:
    apt.program("apt-cache", 'echo "E: Unable to mkstemp /tmp/x" >&2; exit 100')
    with pytest.raises(ConfigError, match=r"apt-cache search .*: Unable to mkstemp /tmp/x") as told:
        debian.find_package()
    assert "\n" not in str(told.value)


def test_a_download_tells_its_progress_and_where_it_went(apt: FakeApt, tmp_path: Path) -> None:
    apt.program(
        "apt-get",
        'case "$*" in *print-uris*) echo "\'there\' x_1.deb 6 SHA256:0";;'
        "*) printf abc > x_1.deb; sleep 0.5; printf def >> x_1.deb;; esac",
    )
    told: list[tuple[int, int]] = []
    path = debian.download("x", str(tmp_path), lambda what, done, total: told.append((done, total)))
    assert Path(path).read_bytes() == b"abcdef"
    assert (3, 6) in told


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ('echo "W: slow" >&2; echo "E: Failed to fetch: no network" >&2; exit 100', "no network"),
        ("exit 1", "failed"),
        ("exit 0", "does not say where"),
        ("echo \"'there' x_1.deb 6 SHA256:0\"", "downloaded no x_1.deb"),
    ],
)
def test_what_apt_cannot_do_is_one_line(
    apt: FakeApt, tmp_path: Path, script: str, why: str
) -> None:
    apt.program("apt-get", script)
    with pytest.raises(ConfigError, match=why) as caught:
        debian.download("x", str(tmp_path), quiet)
    assert "\n" not in str(caught.value)


def test_a_computer_without_apt_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"apt-cache is not on this computer.*kernel import"):
        debian.find_package()


def test_versions_sort_as_people_mean_them() -> None:
    ordered = ["5.10", "6.1~rc2", "6.1", "6.1.0-9-amd64", "6.1.0-10-amd64", "6.1.0-10-rt-amd64"]
    ordered += ["6.1.10", "6.12.9+deb12-amd64", "6.12.10+deb12-amd64", "6.12.10+deb13-amd64"]
    backwards = ordered[::-1]
    assert sorted(backwards, key=version_key) == ordered


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=4), st.integers(0, 3), st.text(max_size=5)
)
def test_a_greater_number_is_a_later_version(parts: list[int], place: int, tail: str) -> None:
    place %= len(parts)
    later = [*parts[:place], parts[place] + 1, *parts[place + 1 :]]
    older, newer = (".".join(map(str, p)) + "-" + tail for p in (parts, later))
    assert version_key(older) < version_key(newer)


@pytest.mark.parametrize(
    ("older", "newer"),
    [("6.1.0-9-amd64", "6.1.0-10-amd64"), ("6.12~rc1", "6.12"), ("6.1", "6.1.1")],
)
def test_the_order_is_dpkgs(older: str, newer: str) -> None:
    assert version_key(older) < version_key(newer)
    try:
        subprocess.run(["dpkg", "--compare-versions", older, "lt", newer], check=True)
    except FileNotFoundError:
        pytest.skip("needs dpkg")
