"""Which kernel is chosen, and what the store does with good kernels, poor ones and accidents."""

import argparse
import fcntl
import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.test_rpm import cpio
from tests.test_rpm import package as rpm_package
from tinyvmm.cli import kernel as command
from tinyvmm.errors import ConfigError
from tinyvmm.images import kernel_store, kernels
from tinyvmm.images.features import embedded_config
from tinyvmm.images.progress import TerminalProgress

V = "6.1.0-56-amd64"
MODULES = {
    "fs/9p/9p.ko": "9pnet",
    "net/9p/9pnet.ko": "",
    "net/9p/9pnet_virtio.ko": "9pnet",
    "drivers/virtio/virtio_mmio.ko": "",
    "drivers/char/virtio_console.ko": "",
}


def make_vmlinuz(version: str) -> bytes:
    """The setup code of a bzImage, which is where the version stands, and nothing to boot."""
    setup = bytearray(1024)
    setup[0x1F1] = 1
    struct.pack_into("<HH4sH", setup, 0x1FE, 0xAA55, 0x6AEB, b"HdrS", 0x20F)
    struct.pack_into("<H", setup, 0x20E, 0x300 - 0x200)
    struct.pack_into("<H", setup, 0x236, 1)
    text = version.encode() + b" (builder) #1 SMP"
    setup[0x300 : 0x300 + len(text)] = text
    return bytes(setup)


def make_module(depends: str) -> bytes:
    """An ELF file with the one section that says what a module depends on."""
    modinfo = f"license=GPL\0depends={depends}\0".encode()
    names = b"\0.modinfo\0.shstrtab\0"
    ehdr = struct.pack("<16sHHIQQQ", b"\x7fELF\2\1\1", 1, 62, 1, 0, 0, 64)
    ehdr += struct.pack("<IHHHHHH", 0, 64, 0, 0, 64, 3, 2)
    start = 64 + 3 * 64
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, start, len(modinfo), 0, 0, 1, 0)
    strings = start + len(modinfo)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, strings, len(names), 0, 0, 1, 0)
    return ehdr + sections + modinfo + names


def make_boot(root: Path, version: str = V, *, without: str = "", dep: bool = True) -> Path:
    """A kernel as installed below `root`; the path of its vmlinuz."""
    directory = root / "lib/modules" / version
    names = [name for name in MODULES if not without or without not in name]
    for name in names:
        (directory / "kernel" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "kernel" / name).write_bytes(make_module(MODULES[name]))
    if dep:
        (directory / "modules.dep").write_text("".join(f"kernel/{name}:\n" for name in names))
    (root / "boot").mkdir(exist_ok=True)
    path = root / "boot" / f"vmlinuz-{version}"
    path.write_bytes(make_vmlinuz(version))
    return path


def make_deb(version: str = V, *, without: str = "") -> bytes:
    buffer = io.BytesIO()
    files = {f"boot/vmlinuz-{version}": make_vmlinuz(version)}
    for name, depends in MODULES.items():
        if not without or without not in name:
            files[f"lib/modules/{version}/kernel/{name}"] = make_module(depends)
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    packed = b"!<arch>\n"
    members = {"debian-binary": b"2.0\n", "control.tar.xz": lzma.compress(b"")}
    for name, data in {**members, "data.tar.xz": buffer.getvalue()}.items():
        packed += f"{name:<48}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return packed


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and a computer whose own kernel cannot be read."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(kernels, "BOOT_DIR", str(tmp_path / "no-boot"))
    return tmp_path / "data/tinyvmm/kernels"


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt that knows and downloads one kernel; its log of calls."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "archive.deb").write_bytes(make_deb())
    log = tmp_path / "log"
    scripts = {
        "apt-cache": f"echo '  Depends: linux-image-{V}'",
        "apt-get": f"""echo "$*" >> {log}
            case "$*" in
            *print-uris*) echo "'there' linux_1.deb 9 SHA256:0";;
            *) cp {tmp_path}/archive.deb linux_1.deb;;
            esac""",
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return log


def test_an_imported_kernel_has_its_modules_and_their_dependencies(
    tmp_path: Path, store: Path
) -> None:
    path = make_boot(tmp_path, dep=False)
    imported = kernel_store.import_([str(path)])
    assert imported == kernels.InstalledKernel(
        V, f"{store}/{V}/vmlinuz", f"{store}/{V}/modules", f"imported from {path}"
    )
    assert Path(imported.vmlinuz).read_bytes() == path.read_bytes()
    dep = (store / V / "modules/modules.dep").read_text()
    assert "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko\n" in dep
    assert kernels.find(V) == imported
    assert kernels.find(None) == imported


def test_a_package_is_imported_by_what_it_holds_not_by_its_name(
    tmp_path: Path, store: Path
) -> None:
    path = tmp_path / "kernel.download"
    path.write_bytes(make_deb())
    imported = kernel_store.import_([str(path)])
    assert imported.version == V
    assert (store / V / "modules/modules.dep").exists()
    assert sorted(p.name for p in (store / V).iterdir()) == [
        "features",
        "modules",
        "source",
        "vmlinuz",
    ]


def test_modules_can_be_told(tmp_path: Path) -> None:
    make_boot(tmp_path)
    alone = tmp_path / "alone/bzImage"
    alone.parent.mkdir()
    alone.write_bytes(make_vmlinuz(V))
    imported = kernel_store.import_([str(alone)], str(tmp_path / "lib/modules" / V))
    assert imported.modules
    assert kernels.able(imported)["9p"] is True
    with pytest.raises(ConfigError, match="holds no kernel modules"):
        kernel_store.import_([str(alone)], str(tmp_path))


def test_the_newest_version_in_the_store_is_the_default(tmp_path: Path) -> None:
    for version in ("6.1.0-9-amd64", "6.1.0-10-amd64", "5.10.0-99-amd64"):
        kernel_store.import_([str(make_boot(tmp_path, version))])
    assert kernels.find().version == "6.1.0-10-amd64"
    assert [k.version for k in kernels.list_()] == [
        "6.1.0-10-amd64",
        "6.1.0-9-amd64",
        "5.10.0-99-amd64",
    ]


def test_with_an_empty_store_this_computers_kernel_is_taken_if_it_can_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apt: Path
) -> None:
    path = make_boot(tmp_path, os.uname().release)
    monkeypatch.setattr(kernels, "BOOT_DIR", str(path.parent))
    found = kernels.find()
    assert found.vmlinuz == str(path)
    assert found.modules == str(tmp_path / "lib/modules" / os.uname().release)
    assert not apt.exists()
    (tmp_path / "lib/modules" / os.uname().release / "modules.dep").write_text("")
    assert kernels.find().version == V  # it lacks 9p now: Debian's was fetched


def test_with_nothing_at_all_debians_kernel_is_fetched_once(
    store: Path, apt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = kernels.find()
    assert (found.version, found.source) == (V, f"linux-image-{V}")
    assert kernels.find() == found
    assert kernel_store.fetch() == found
    assert len([line for line in apt.read_text().splitlines() if "print-uris" not in line]) == 1
    assert sorted(p.name for p in store.iterdir()) == [".lock", V]
    assert not list((store / V).glob("*.deb"))
    assert capsys.readouterr().err == f"tinyvmm: downloading linux-image-{V}\n"


def test_two_fetches_at_once_fetch_once(store: Path, apt: Path) -> None:
    found: list[kernels.InstalledKernel] = []
    threads = [
        threading.Thread(target=lambda: found.append(kernel_store.fetch())) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert len([line for line in apt.read_text().splitlines() if "print-uris" not in line]) == 1


def test_a_kernel_without_9p_is_refused_with_reason_and_remedy(tmp_path: Path, store: Path) -> None:
    version = "6.1.0-56-cloud-amd64"
    path = make_boot(tmp_path, version, without="9p")
    refused = r"no 9p.*cloud.*tinyvmm kernel fetch"
    with pytest.raises(ConfigError, match=refused):
        kernels.find(str(path))
    with pytest.raises(ConfigError, match=refused):
        kernel_store.import_([str(path)])
    package = tmp_path / "cloud.deb"
    package.write_bytes(make_deb(version, without="9p"))
    with pytest.raises(ConfigError, match="no 9p"):
        kernel_store.import_([str(package)])
    assert [p.name for p in store.iterdir()] == [".lock"]


def test_a_kernel_with_everything_built_in_needs_no_modules(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz-7.0"
    path.write_bytes(make_vmlinuz("7.0"))
    options = ["9P_FS", "NET_9P_VIRTIO", "VIRTIO_MMIO", "VIRTIO_CONSOLE", "OVERLAY_FS"]
    config = tmp_path / "config-7.0"
    config.write_text("#\n" + "".join(f"CONFIG_{option}=y\n" for option in options))
    found = kernels.find(str(path))
    assert found.modules is None
    assert [name for name, has in kernels.able(found).items() if has] == [
        "9p",
        "overlay",
        "virtio-mmio",
        "virtio-console",
    ]
    config.write_text("#\n" + "".join(f"CONFIG_{option}=m\n" for option in options))
    with pytest.raises(ConfigError, match=r"no modules beside it.*--modules"):
        kernels.find(str(path))


def test_a_kernel_that_tells_nothing_is_given_the_benefit_of_the_doubt(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(make_vmlinuz("7.0-mine"))
    found = kernels.find(str(path))
    assert found == kernels.InstalledKernel("7.0-mine", str(path), None, str(path))
    assert set(kernels.able(found).values()) == {None}


def test_modules_without_modules_dep_are_to_be_imported(tmp_path: Path) -> None:
    path = make_boot(tmp_path, dep=False)
    with pytest.raises(ConfigError, match=r"no modules\.dep.*tinyvmm kernel import"):
        kernels.find(str(path))


@pytest.mark.parametrize("name", ["6.9", "..", ".lock", "nothing"])
def test_an_unknown_version_names_those_there_are(name: str, tmp_path: Path) -> None:
    kernel_store.import_([str(make_boot(tmp_path))])
    with pytest.raises(ConfigError):
        kernels.find(name)
    with pytest.raises(ConfigError, match=rf"no such file|{V}"):
        kernels.find("6.9")


def test_importing_again_replaces_and_what_a_killed_process_left_goes(
    tmp_path: Path, store: Path
) -> None:
    path = make_boot(tmp_path)
    kernel_store.import_([str(path)])
    (store / ".draft-killed/modules").mkdir(parents=True)
    path.write_bytes(path.read_bytes() + b"newer")
    imported = kernel_store.import_([str(path)])
    assert Path(imported.vmlinuz).read_bytes().endswith(b"newer")
    assert sorted(p.name for p in store.iterdir()) == [".lock", V]


def test_an_import_that_fails_leaves_the_store_as_it_was(tmp_path: Path, store: Path) -> None:
    kernel_store.import_([str(make_boot(tmp_path))])
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")  # which is not waited for
    for bad in ("missing", "empty", "fifo"):
        with pytest.raises(ConfigError):
            kernel_store.import_([str(tmp_path / bad)])
    assert sorted(p.name for p in store.iterdir()) == [".lock", V]


def test_a_store_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_boot(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_DATA_HOME"):
        kernel_store.import_([str(path)])
    assert kernels.list_() == []


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, os.strerror(28))

    path = make_boot(tmp_path)
    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(ConfigError, match=r"No space left.*free 0.5 GB.*, or set XDG_DATA_HOME"):
        kernel_store.import_([str(path)])
    assert [p.name for p in store.iterdir()] == [".lock"]


def test_finding_takes_no_lock(tmp_path: Path, store: Path) -> None:
    kernel_store.import_([str(make_boot(tmp_path))])
    with (store / ".lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert kernels.find().version == V


def test_finding_imports_nothing_heavy(tmp_path: Path) -> None:
    kernel_store.import_([str(make_boot(tmp_path))])
    script = (
        "import typing, sys; before = set(sys.modules)\n"
        "from tinyvmm.images import kernels; kernels.find()\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert not loaded & {"json", "tarfile", "subprocess", "shutil", "tempfile", "pathlib", "lzma"}


# --- choosing and removing -----------------------------------------------------------------------


def test_the_version_in_use_is_the_default_until_newest_is_again(tmp_path: Path) -> None:
    for version in ("6.1.0-9-amd64", V):
        kernel_store.import_([str(make_boot(tmp_path, version))])
    chosen = kernel_store.use("6.1.0-9-amd64")
    assert chosen
    assert kernels.find() == chosen
    assert [k.version for k in kernels.list_()] == [V, "6.1.0-9-amd64"]
    newest = kernel_store.use("newest")
    assert newest
    assert newest.version == V
    assert kernels.find() == newest
    with pytest.raises(ConfigError, match=rf"no such version.*{V}, 6\.1\.0-9-amd64"):
        kernel_store.use("6.9")


def test_a_kernel_that_was_built_here_is_the_default_when_it_is_chosen(tmp_path: Path) -> None:
    built = kernel_store.import_([str(make_boot(tmp_path, "6.1.192-tinyvmm"))])
    assert kernels.find() == built
    stock = kernel_store.import_([str(make_boot(tmp_path))])
    assert kernels.find() == stock
    kernel_store.use(built.version)
    assert kernels.find() == built


def test_the_lab_has_a_kernel_with_kvm_whatever_a_run_boots(tmp_path: Path) -> None:
    kernel_store.import_([str(make_boot(tmp_path))])
    path = make_boot(tmp_path, "5.10")
    config = [f"CONFIG_{name}=y\n" for name in ("KVM", "KVM_AMD", "OVERLAY_FS")]
    (path.parent / "config-5.10").write_text("#\n" + "".join(config))
    old = kernel_store.import_([str(path)])
    kernel_store.use(V)
    assert kernels.find().version == V
    assert kernels.find(root=kernels.LAB) == old
    with pytest.raises(ConfigError, match="no overlay and no kvm-amd"):
        kernels.find(V, root=kernels.LAB)


def test_removing_takes_the_choice_with_it_and_all_or_none(tmp_path: Path, store: Path) -> None:
    for version in ("6.1.0-9-amd64", V):
        kernel_store.import_([str(make_boot(tmp_path, version))])
    kernel_store.use("6.1.0-9-amd64")
    with pytest.raises(ConfigError, match=r"kernel rm 6\.9: no such version"):
        kernel_store.remove(["6.1.0-9-amd64", "6.9"])
    assert len(kernels.list_()) == 2
    kernel_store.remove(["6.1.0-9-amd64"])
    assert [k.version for k in kernels.list_()] == [V]
    assert kernels.find().version == V
    assert sorted(p.name for p in store.iterdir()) == [".lock", V]


def test_a_kernel_that_a_machine_runs_stays(tmp_path: Path) -> None:
    """A command of `exec` may want modules that were not inserted at boot."""
    for version in ("6.1.0-9-amd64", V):
        kernel_store.import_([str(make_boot(tmp_path, version))])
    with ExitStack() as machine:
        kernels.hold(kernels.find(V), machine)
        with pytest.raises(ConfigError, match=f"kernel rm {V}: a machine runs it"):
            kernel_store.remove(["6.1.0-9-amd64", V])
        assert len(kernels.list_()) == 2
    kernel_store.remove([V])
    with ExitStack() as machine:  # nothing to hold
        kernels.hold(kernels.beside(str(make_boot(tmp_path, "6.7"))), machine)


@pytest.mark.parametrize("name", [".lock", "default", "..", ""])
def test_what_is_no_version_is_not_removed_or_used(name: str, tmp_path: Path, store: Path) -> None:
    kernel_store.import_([str(make_boot(tmp_path))])
    kernel_store.use(V)
    with pytest.raises(ConfigError):
        kernel_store.remove([name])
    with pytest.raises(ConfigError):
        kernel_store.use(name)
    assert sorted(p.name for p in store.iterdir()) == [".lock", V, "default"]


CLOUD = {"9P_FS": False, "EROFS_FS": True, "OVERLAY_FS": True, "VIRTIO_BLK": True}
CLOUD |= {"VIRTIO_PCI": True, "VIRTIO_CONSOLE": True}


def test_a_kernel_without_9p_is_kept_for_roots_that_need_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vmlinuz-6.1.0-99-cloud"
    path.write_bytes(make_vmlinuz("6.1.0-99-cloud"))
    lines = [f"CONFIG_{name}=y\n" for name, has in CLOUD.items() if has]
    (tmp_path / "config-6.1.0-99-cloud").write_text("#\n" + "".join(lines))
    cloud = kernel_store.import_([str(path)])
    assert kernels.find(root="erofs") == cloud
    assert tinyvmm_kernel("use", "newest") == 0
    assert "no kernel here can do a root over 9P" in capsys.readouterr().out
    usual = kernel_store.import_([str(make_boot(tmp_path))])
    assert kernels.find() == usual
    with pytest.raises(ConfigError, match=r"cloud.*has no 9p"):
        kernels.find(cloud.version)


def test_a_root_of_erofs_has_the_usual_kernel_where_that_can(tmp_path: Path) -> None:
    for version, has_9p in (("6.1.0-99-cloud", False), ("6.1.0-50-full", True)):
        path = tmp_path / f"vmlinuz-{version}"
        path.write_bytes(make_vmlinuz(version))
        able = CLOUD | {"9P_FS": has_9p, "NET_9P_VIRTIO": has_9p}
        lines = [f"CONFIG_{name}=y\n" for name, has in able.items() if has]
        (tmp_path / f"config-{version}").write_text("#\n" + "".join(lines))
        kernel_store.import_([str(path)])
        assert kernels.find(root="erofs").version == version
    assert kernels.find().version == "6.1.0-50-full"


def test_an_imported_kernel_that_tells_nothing_has_to_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_store, "embedded_config", lambda _: None)
    path = tmp_path / "bzImage"
    path.write_bytes(make_vmlinuz("7.0-mine"))
    mine = kernel_store.import_([str(path)])
    assert kernels.find() == mine  # as long as there is no other
    stock = kernel_store.import_([str(make_boot(tmp_path))])
    assert kernels.find() == stock
    kernel_store.use(mine.version)
    assert kernels.find() == mine


def test_a_configuration_inside_the_kernel_is_read(tmp_path: Path) -> None:
    inside = gzip.compress(b"#\nCONFIG_9P_FS=y\nCONFIG_VIRTIO_PCI=y\n")
    path = tmp_path / "vmlinux"
    banner = b"Linux version 7.0-own (me@here) #1\n\0"
    entry = 0x100_0000
    program = b"\xf4" + bytes(63) + banner + b"IKCFG_ST" + inside + b"IKCFG_ED"
    ehdr = struct.pack("<16sHHIQQQ", b"\x7fELF\2\1\1", 2, 62, 1, entry, 64, 0)
    ehdr += struct.pack("<IHHHHHH", 0, 64, 56, 1, 64, 0, 0)
    length = len(program)
    phdr = struct.pack("<IIQQQQQQ", 1, 5, 0x1000, entry, entry, length, length, 0x1000)
    path.write_bytes((ehdr + phdr).ljust(0x1000, b"\0") + program)
    assert embedded_config(str(path)) == gzip.decompress(inside)
    with pytest.raises(ConfigError, match=r"7\.0-own.*has no virtio-console"):
        kernel_store.import_([str(path)])
    path.write_bytes(path.read_bytes().replace(b"IKCFG_ED", b"damaged!"))
    assert embedded_config(str(path)) is None
    stored = kernel_store.import_([str(path)])
    assert set(kernels.able(stored).values()) == {None}


def test_what_a_stored_kernel_can_do_is_looked_up_once(tmp_path: Path) -> None:
    stored = kernel_store.import_([str(make_boot(tmp_path))])
    before = kernels.able(stored)
    assert stored.modules
    (Path(stored.modules) / "modules.dep").write_text("")
    assert kernels.able(stored) == before
    noted = Path(stored.vmlinuz).parent / "features"
    noted.write_text("+of another version\n")
    assert kernels.able(stored)["9p"] is False
    assert "-9p\n" in noted.read_text(), "what is found then is written down again"
    noted.unlink()
    assert kernels.able(stored)["9p"] is False
    assert noted.exists()


def test_beside_a_kernel_of_somebody_elses_nothing_is_written_down(tmp_path: Path) -> None:
    path = make_boot(tmp_path)
    before = set(path.parent.iterdir())
    assert kernels.able(kernels.look_up(str(path)))["9p"] is not None
    assert set(path.parent.iterdir()) == before


def test_several_packages_can_make_one_kernel(tmp_path: Path) -> None:
    whole = make_deb()
    names = ["core.deb", "modules.deb"]
    for name in names:
        (tmp_path / name).write_bytes(whole)
    with pytest.raises(ConfigError, match="twice"):
        kernel_store.import_([str(tmp_path / name) for name in names])
    apart = {
        "core.rpm": {"vmlinuz": make_vmlinuz(V), "config": b"#\n"},
        "modules.rpm": {f"kernel/{name}": make_module(need) for name, need in MODULES.items()},
    }
    for name, members in apart.items():
        packed = [cpio(f"./lib/modules/{V}/{path}", data) for path, data in members.items()]
        (tmp_path / name).write_bytes(rpm_package(*packed))
    imported = kernel_store.import_([str(tmp_path / name) for name in apart])
    assert imported.version == V
    assert kernels.able(imported)["9p"] is True
    with pytest.raises(ConfigError, match="no kernels"):
        kernel_store.import_([str(tmp_path / "modules.rpm")])
    path = str(make_boot(tmp_path))
    with pytest.raises(ConfigError, match=r"vmlinuz-.*is no package"):
        kernel_store.import_([str(tmp_path / "core.deb"), path])
    with pytest.raises(ConfigError, match="give one kernel"):
        kernel_store.import_([path, path])


# --- the command ---------------------------------------------------------------------------------


def tinyvmm_kernel(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["kernel", *arguments])
    return int(args.main(args))


def test_the_list_marks_the_default_and_shows_what_each_kernel_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tinyvmm_kernel("list") == 0
    assert "tinyvmm kernel fetch" in capsys.readouterr().out
    for version in ("6.1.0-9-amd64", V):
        assert tinyvmm_kernel("import", str(make_boot(tmp_path, version))) == 0
    capsys.readouterr()
    assert tinyvmm_kernel("list") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"* {V}")
    assert second.startswith("  6.1.0-9-amd64")
    assert first.endswith(f"imported from {tmp_path}/boot/vmlinuz-{V}")
    assert tinyvmm_kernel("list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["version"], row["default"]) for row in rows] == [
        (V, True),
        ("6.1.0-9-amd64", False),
    ]
    assert rows[0]["features"]["9p"] is True


def test_fetch_prints_what_it_got(apt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tinyvmm_kernel("fetch") == 0
    assert capsys.readouterr().out.startswith(V)


def test_import_says_what_the_kernel_can_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tinyvmm_kernel("import", str(make_boot(tmp_path))) == 0
    assert capsys.readouterr().out.splitlines()[1] == "can do: 9p virtio-mmio virtio-console"


def test_the_running_kernel_is_imported_by_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_boot(tmp_path, os.uname().release)
    monkeypatch.setattr(kernels, "BOOT_DIR", str(path.parent))
    assert tinyvmm_kernel("import", "--running") == 0
    assert capsys.readouterr().out.startswith(os.uname().release)


def test_a_running_kernel_without_a_file_here_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BOOT_DIR", str(tmp_path))
    why = f"the kernel that runs has no file {tmp_path}/vmlinuz-.* here; give .* kernel fetch$"
    with pytest.raises(ConfigError, match=why):
        tinyvmm_kernel("import", "--running")


def test_show_tells_all_of_one_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no kernel here yet"):
        tinyvmm_kernel("show")
    path = make_boot(tmp_path)
    kernel_store.import_([str(path)])
    assert tinyvmm_kernel("show") == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    told = {name: lines[name].strip() for name in ("version", "default", "roots", "9p", "erofs")}
    assert told == {"version": V, "default": "yes", "roots": "9p", "9p": "yes", "erofs": "no"}
    assert tinyvmm_kernel("show", str(path), "--json") == 0
    known = json.loads(capsys.readouterr().out)
    assert known["vmlinuz"] == str(path)
    assert known["default"] is False
    assert known["features"]["virtio-pci"] is False


def test_use_and_rm_are_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel_store.import_([str(make_boot(tmp_path))])
    assert tinyvmm_kernel("use", V) == 0
    assert capsys.readouterr().out == f"{V}\n"
    assert tinyvmm_kernel("rm", V) == 0
    assert kernels.list_() == []


# --- progress ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_and_is_left_clean() -> None:
    terminal = Terminal()
    progress = TerminalProgress(terminal)
    progress("downloading", 50, 100)
    assert "[###############               ]  50%" in terminal.getvalue()
    progress.finish()
    assert terminal.getvalue().endswith("\r\x1b[K")
    assert "\n" not in terminal.getvalue()


def test_elsewhere_one_line_is_all() -> None:
    pipe = io.StringIO()
    progress = TerminalProgress(pipe)
    for done in range(100):
        progress("downloading" if done < 50 else "unpacking", done, 100)
    progress.finish()
    assert pipe.getvalue() == "tinyvmm: downloading\n"
