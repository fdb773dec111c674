"""RPM packages: made by rpmbuild, and hostile and damaged ones made here."""

import gzip
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyvmm.errors import ConfigError
from tinyvmm.images import rpm
from tinyvmm.images.package import Unpacking

V = "6.11.4-301.fc41.x86_64"
FILES = {
    f"/lib/modules/{V}/vmlinuz": b"kernel" * 1000,
    f"/lib/modules/{V}/config": b"CONFIG_64BIT=y\n",
    f"/lib/modules/{V}/modules.builtin": b"kernel/x.ko\n",
    f"/lib/modules/{V}/kernel/fs/9p/9p.ko.xz": b"9p",
    "/usr/share/doc/kernel/COPYING": b"(c)",
}
SPEC = """
Name: kernel-core
Version: 1
Release: 1
Summary: s
License: x
%define _build_id_links none
%define __os_install_post %{nil}
%description
d
%files
/lib
/usr
"""


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def unpack(path: Path, target: Path) -> str:
    target.mkdir(exist_ok=True)
    into = Unpacking(str(target))
    rpm.unpack(str(path), into, quiet)
    return into.finish(str(path), "give another")


def contents(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def rpmbuild(directory: Path, compression: str) -> Path:
    """A package of FILES, with a link and a second name, by the distribution's own tool."""
    root = directory / "root"
    for name, data in FILES.items():
        path = root / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    modules = root / f"lib/modules/{V}"
    (modules / "kernel/fs/9p/again.ko.xz").hardlink_to(modules / "kernel/fs/9p/9p.ko.xz")
    (modules / "build").symlink_to("/usr/src/kernels")
    (directory / "kernel.spec").write_text(SPEC)
    settings = {"_binary_payload": compression, "_topdir": f"{directory}/top"}
    defines = [word for k, v in settings.items() for word in ("--define", f"{k} {v}")]
    command = ["rpmbuild", "-bb", "--target", "x86_64", f"--buildroot={root}", *defines]
    subprocess.run([*command, str(directory / "kernel.spec")], check=True, capture_output=True)
    (package,) = (directory / "top/RPMS").rglob("*.rpm")
    return package


@pytest.mark.parametrize("compression", ["w6.gzdio", "w6.xzdio", "w6.bzdio", "w3.zstdio"])
def test_a_package_of_rpmbuilds_gives_kernel_config_and_modules(
    compression: str, tmp_path: Path
) -> None:
    package = rpmbuild(tmp_path, compression)
    assert unpack(package, tmp_path / "draft") == V
    assert contents(tmp_path / "draft") == {
        "vmlinuz": b"kernel" * 1000,
        "config": b"CONFIG_64BIT=y\n",
        "modules/modules.builtin": b"kernel/x.ko\n",
        "modules/kernel/fs/9p/9p.ko.xz": b"9p",
        "modules/kernel/fs/9p/again.ko.xz": b"9p",
    }


def header(tags: dict[int, bytes]) -> bytes:
    index, data = b"", b""
    for tag, text in tags.items():
        index += struct.pack(">IIII", tag, 6, len(data), 1)
        data += text + b"\0"
    return struct.pack(">4s4xII", b"\x8e\xad\xe8\x01", len(tags), len(data)) + index + data


def cpio(name: str, data: bytes = b"", mode: int = 0o100644, **fields: int) -> bytes:
    values = {"ino": 1, "mode": mode, "uid": 0, "gid": 0, "nlink": 1, "mtime": 0}
    values |= {"filesize": len(data), "devmajor": 0, "devminor": 0, "rmajor": 0, "rminor": 0}
    values |= {"namesize": len(name) + 1, "check": 0}
    values |= fields
    out = b"070701" + b"".join(b"%08x" % value for value in values.values())
    out += name.encode() + b"\0"
    out += bytes(-len(out) % 4) + data
    return out + bytes(-len(data) % 4)


def package(*members: bytes, end: bytes = cpio("TRAILER!!!"), **tags: bytes) -> bytes:
    signature = header({1000: b"x"})
    signature += bytes(-len(signature) % 8)
    named = {1124: tags.get("format", b"cpio"), 1125: tags.get("compressor", b"gzip")}
    lead = b"\xed\xab\xee\xdb" + bytes(92)
    return lead + signature + header(named) + gzip.compress(b"".join(members) + end)


KERNEL = cpio(f"./lib/modules/{V}/vmlinuz", b"kernel")


def test_the_makers_here_agree_with_rpmbuilds(tmp_path: Path) -> None:
    path = tmp_path / "x.rpm"
    path.write_bytes(package(KERNEL))
    assert unpack(path, tmp_path / "draft") == V
    assert contents(tmp_path / "draft") == {"vmlinuz": b"kernel"}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (package(), "no kernels"),
        (package(KERNEL, cpio("lib/modules/other/vmlinuz", b"k")), "2 kernels"),
        (package(KERNEL, cpio("lib/modules/other/kernel/x.ko", b"k")), "of another kernel"),
        (package(KERNEL, KERNEL), "twice"),
        (package(cpio("../../etc/passwd", b"x")), "a path out of it"),
        (package(cpio("/lib/../../x", b"x", mode=0o120777)), "a path out of it"),
        (package(KERNEL, cpio("lib/modules/x/y/z", filesize=3 << 30)), "of 3 GiB"),
        (package(KERNEL, end=b""), "ends too early"),
        (package(cpio("x", b"12345678", filesize=64)), "damaged"),
        (package(cpio("x", namesize=0)), "a name of 0 bytes"),
        (package(cpio("x", namesize=1 << 31)), "a name of"),
        (package(b"07070X" + bytes(200)), "4 GiB or more"),
        (package(b"0707010000zzzz" + bytes(200)), "damaged"),
        (package(b"hello" * 40), "no cpio archive"),
        (package(KERNEL, format=b"drpm"), "format 'drpm'"),
        (package(KERNEL, compressor=b"lzip"), "compressed with 'lzip'"),
        (package(KERNEL, compressor=b"xz"), "damaged"),
        (package(KERNEL)[:-9], "damaged"),
        (package(KERNEL)[:100], "cut short"),
        (package(KERNEL)[:130], "cut short"),
        (package(KERNEL)[:96] + bytes(200), "no header"),
        (b"\xed\xab\xee\xdb" + bytes(92) + b"\x8e\xad\xe8\x01" + b"\xff" * 12, "no header"),
        (b"!<arch>\n", r"is not a \.rpm"),
    ],
)
def test_what_is_wrong_with_a_package_is_one_line(data: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "x.rpm"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=why) as caught:
        unpack(path, tmp_path / "draft")
    assert "\n" not in str(caught.value)
    outside = {p.name for p in tmp_path.iterdir()}
    assert outside == {"x.rpm", "draft"}


def test_tags_that_are_all_one_long_text_take_no_room(tmp_path: Path) -> None:
    many, text = 100, bytes([0x78]) * (4 << 20)
    index = b"".join(struct.pack(">IIII", tag, 6, 0, 1) for tag in range(1125, 1125 + many))
    header = struct.pack(">4s4xII", b"\x8e\xad\xe8\x01", many, len(text)) + index + text
    path = tmp_path / "x.rpm"
    path.write_bytes(b"\xed\xab\xee\xdb" + bytes(92) + header + bytes(-len(header) % 8) + header)
    tracemalloc.start()
    try:
        with path.open("rb") as file:
            assert rpm.read_compressor(str(path), file) == "x" * 64
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_names_of_one_file_all_have_its_contents(tmp_path: Path) -> None:
    path = tmp_path / "x.rpm"
    inner = f"lib/modules/{V}/kernel"
    several = [cpio(f"{inner}/{name}.ko", data, nlink=3) for name, data in
               (("a", b""), ("b", b""), ("c", b"module"))]  # fmt: skip
    path.write_bytes(package(KERNEL, *several))
    unpack(path, tmp_path / "draft")
    for name in "abc":
        assert (tmp_path / f"draft/modules/kernel/{name}.ko").read_bytes() == b"module"


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(at=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_package_is_refused_or_read_but_nothing_else(
    at: int, value: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(package(KERNEL))
    data[at % len(data)] = value
    path = tmp_path / "x.rpm"
    path.write_bytes(data)
    target: Callable[..., Path] = tmp_path_factory.mktemp
    with suppress(ConfigError):
        assert unpack(path, target("draft"))
