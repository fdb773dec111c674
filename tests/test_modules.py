"""Modules are chosen in an order the kernel accepts, from depmod's modules.dep or from ours."""

import gzip
import lzma
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvmm.errors import ConfigError
from tinyvmm.guest import modules
from tinyvmm.guest.modules import closure, dependencies, module_name, write_modules_dep

needs_depmod = pytest.mark.skipif(not shutil.which("depmod"), reason="kmod is not installed")


def module(name: str, depends: Sequence[str]) -> bytes:
    """A kernel module as the tools see it, made by GNU as: an ELF file with .modinfo.

    depmod does not look there, but for who exports the symbols that another uses.
    """
    info = [f"name={name}", f"depends={','.join(depends)}", "license=GPL"]
    text = '.section .modinfo,"a"\n' + "".join(f'.asciz "{entry}"\n' for entry in info)
    text += f'.section __ksymtab_strings,"a"\n.asciz "of_{name}"\n.data\n'
    text += "".join(f".quad of_{needed}\n" for needed in depends)
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run(["as", "--64", "-o", file.name, "-"], input=text.encode(), check=True)
        return Path(file.name).read_bytes()


def hand_made(depends: Sequence[str]) -> bytes:
    """The same by hand: a header, two sections' content, three section headers."""
    info = b"license=GPL\0" + b"depends=" + ",".join(depends).encode() + b"\0name=x\0"
    names = b"\0.shstrtab\0.modinfo\0"
    at = 64 + len(info) + len(names)
    header = b"\x7fELF\2\1\1" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, at, 0, 64, 0, 0, 64, 3, 1)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, 64 + len(info), len(names), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 11, 1, 2, 0, 64, len(info), 0, 0, 1, 0)
    return header + info + names + sections


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """As a package unpacks: top needs left_side and right_side, and these need base."""
    directory = tmp_path / "lib" / "modules" / "6.1.0-test"
    for path, depends in {
        "kernel/base.ko": [],
        "kernel/a/left-side.ko": ["base"],
        "kernel/b/right_side.ko": ["base"],
        "kernel/top.ko": ["left_side", "right_side"],
        "kernel/alone.ko": [],
    }.items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(module(module_name(path), depends))
    (directory / "modules.builtin").write_text("kernel/drivers/built-in-one.ko\n")
    (directory / "modules.order").write_text("")
    return directory


def names(chosen: Sequence[modules.Module]) -> list[str]:
    return [each.name for each in chosen]


def test_a_module_comes_after_all_it_needs_and_only_once(kernel: Path) -> None:
    write_modules_dep(str(kernel))
    chosen = names(closure(str(kernel), ["top", "left-side", "alone", "base"]))
    assert sorted(chosen) == ["alone", "base", "left_side", "right_side", "top"]
    assert chosen[0] == "base"
    assert chosen.index("top") > max(chosen.index("left_side"), chosen.index("right_side"))


@needs_depmod
def test_modules_dep_says_what_depmod_says(kernel: Path) -> None:
    write_modules_dep(str(kernel))
    ours = modules.read_modules_dep(str(kernel))
    (kernel / "modules.dep").unlink()
    (kernel / "modules.builtin.modinfo").touch()
    subprocess.run(["depmod", "-b", kernel.parents[2], kernel.name], check=True)
    theirs = modules.read_modules_dep(str(kernel))
    # Equally distant modules may come in either order, where each still precedes what needs it.
    assert {path: set(needed) for path, needed in ours.items()} == {
        path: set(needed) for path, needed in theirs.items()
    }
    assert names(closure(str(kernel), ["top"]))[0] == "base"


def test_dash_underscore_path_and_suffix_make_no_difference(kernel: Path) -> None:
    write_modules_dep(str(kernel))
    for name in ("left-side", "left_side", "left_side.ko", "kernel/a/left-side.ko.xz"):
        assert names(closure(str(kernel), [name])) == ["base", "left_side"]


def test_built_in_modules_need_no_file(kernel: Path) -> None:
    write_modules_dep(str(kernel))
    assert names(closure(str(kernel), ["built_in-one", "alone"])) == ["alone"]


def test_a_missing_module_is_named_with_the_kernel_that_lacks_it(kernel: Path) -> None:
    write_modules_dep(str(kernel))
    with pytest.raises(ConfigError, match=r"6\.1\.0-test.*'9pnet_virtio'"):
        closure(str(kernel), ["9pnet_virtio"])


def test_without_modules_dep_the_remedy_is_given(kernel: Path) -> None:
    with pytest.raises(ConfigError, match=r"modules\.dep.*depmod"):
        closure(str(kernel), ["alone"])


def test_a_dependency_that_is_not_there_is_named(kernel: Path) -> None:
    (kernel / "kernel" / "base.ko").unlink()
    with pytest.raises(ConfigError, match="needs base"):
        write_modules_dep(str(kernel))


def test_modules_that_depend_on_each_other_are_refused(kernel: Path) -> None:
    (kernel / "kernel" / "base.ko").write_bytes(module("base", ["top"]))
    with pytest.raises(ConfigError, match="depends on itself"):
        write_modules_dep(str(kernel))


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: b"\x7fELF\2\1\1" + tail))
def test_what_is_no_module_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        dependencies(data)


@settings(max_examples=50)
@given(st.lists(st.from_regex(r"[a-z0-9_]{1,20}", fullmatch=True), max_size=5), st.data())
def test_a_truncated_or_damaged_module_never_raises_anything_else(
    depends: list[str], data: st.DataObject
) -> None:
    whole = hand_made(depends)
    assert dependencies(whole) == tuple(depends)
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        dependencies(bytes(damaged))
    except ValueError as error:
        assert str(error)  # noqa: PT017 - either answer is fine, another exception is not


def test_a_damaged_module_is_named_by_its_file(kernel: Path) -> None:
    file = kernel / "kernel" / "base.ko"
    for damaged in (b"", b"nothing", file.read_bytes()[:-70]):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"base\.ko"):
            write_modules_dep(str(kernel))


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_modules_are_found_and_decompressed(
    kernel: Path, suffix: str, compress: "type[bytes]"
) -> None:
    plain = {path: path.read_bytes() for path in kernel.rglob("*.ko")}
    for path, data in plain.items():
        path.with_name(path.name + suffix).write_bytes(compress(data))
        path.unlink()
    write_modules_dep(str(kernel))
    for each in closure(str(kernel), ["top"]):
        assert each.path.endswith(suffix)
        assert each.read() == plain[Path(each.path.removesuffix(suffix))]
    Path(closure(str(kernel), ["alone"])[0].path).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"alone\.ko.*damaged"):
        closure(str(kernel), ["alone"])[0].read()


@pytest.mark.parametrize("program", ["xz", "gzip", "zstd"])
def test_a_module_that_unpacks_without_end_is_refused(
    kernel: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "MODULE_MAX", 10 << 20)
    suffix = {"xz": ".xz", "gzip": ".gz", "zstd": ".zst"}[program]
    path = kernel / "kernel" / f"alone.ko{suffix}"
    for size in (10 << 20, (10 << 20) + 1):
        packed = subprocess.run(
            [program, "-qc"], input=bytes(size), capture_output=True, check=True
        )
        path.write_bytes(packed.stdout)
        found = modules.Module("alone", str(path))
        if size <= 10 << 20:
            assert found.read() == bytes(size)
            continue
        with pytest.raises(ConfigError, match=r"alone\.ko.*unpacks to more"):
            found.read()


def test_a_module_packed_with_zstd_is_read_and_a_damaged_one_named(kernel: Path) -> None:
    path = kernel / "kernel" / "alone.ko.zst"
    packed = subprocess.run(["zstd", "-qc"], input=b"module", capture_output=True, check=True)
    path.write_bytes(packed.stdout)
    assert modules.Module("alone", str(path)).read() == b"module"
    path.write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ConfigError, match=r"alone\.ko\.zst is damaged"):
        modules.Module("alone", str(path)).read()


def test_a_module_that_cannot_be_read_says_why(kernel: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        modules.Module("x", str(kernel / "x.ko")).read()


def real_modules() -> Path | None:
    for directory in (os.environ.get("TINYVMM_TEST_MODULES"), f"/lib/modules/{platform.release()}"):
        if directory and (Path(directory) / "modules.order").exists():
            return Path(directory)
    return None


@needs_depmod
@pytest.mark.skipif(real_modules() is None, reason="no kernel's modules: set TINYVMM_TEST_MODULES")
def test_a_real_kernels_modules_depend_as_depmod_says(tmp_path: Path) -> None:
    source = real_modules()
    assert source is not None
    copy = tmp_path / "lib" / "modules" / source.name
    copy.mkdir(parents=True)
    for file in source.glob("modules.*"):
        if file.name != "modules.dep":
            shutil.copy(file, copy)
    every = sorted(path.relative_to(source) for path in (source / "kernel").rglob("*.ko*"))
    # A part, with all it needs: thousands of links would only test the file system.
    chosen = every[:: len(every) // 100 + 1]
    by_name = {module_name(str(path)): path for path in every}
    waiting = [module_name(str(path)) for path in chosen]
    while waiting:
        path = by_name[waiting.pop()]
        if not (copy / path).exists():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).symlink_to(source / path)
            waiting += dependencies(modules.Module("", str(source / path)).read())
    write_modules_dep(str(copy))
    ours = modules.read_modules_dep(str(copy))
    (copy / "modules.dep").unlink()
    subprocess.run(["depmod", "-b", tmp_path, source.name], check=True)
    theirs = modules.read_modules_dep(str(copy))
    assert {path: set(needed) for path, needed in ours.items()} == {
        path: set(needed) for path, needed in theirs.items()
    }
