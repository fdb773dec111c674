"""Disk images: what the user says, whose they are, and who may write to them."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tinyvmm.cli.main import main
from tinyvmm.disks import files
from tinyvmm.disks.opening import DiskOptions, open_disk, parse_disk
from tinyvmm.disks.raw import RawDisk
from tinyvmm.errors import ConfigError

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    return path


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a", DiskOptions("a")),
        ("a,ro", DiskOptions("a", read_only=True)),
        ("a,b,ro", DiskOptions("a,b", read_only=True)),
        ("a,ro,b", DiskOptions("a,ro,b")),
        ("a,serial=x,queues=4", DiskOptions("a", serial="x", queues=4)),
        ("a,overlay=b,c,ro", DiskOptions("a,overlay=b,c", read_only=True)),
        ("a,overlay=b", DiskOptions("a", overlay="b")),
        ("a,format=qcow2,ephemeral", DiskOptions("a", ephemeral=True, format="qcow2")),
        ("a=b,serial=", DiskOptions("a=b", serial="")),
    ],
)
def test_what_is_said_of_a_disk_is_understood(text: str, options: DiskOptions) -> None:
    assert parse_disk(text) == options


@pytest.mark.parametrize(
    "text", ["", ",ro", "a,queues=two", "a,queues=-1", "a,queues=", "a,overlay="]
)
def test_what_is_no_disk_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="give"):
        parse_disk(text)


@pytest.mark.parametrize(
    ("options", "written"),
    [
        (DiskOptions("a"), "a"),
        (DiskOptions("a", overlay="b"), "b"),
        (DiskOptions("a", read_only=True), None),
        (DiskOptions("a", ephemeral=True), None),
    ],
)
def test_one_file_is_written_or_none(options: DiskOptions, written: str | None) -> None:
    assert options.written == written


# --- what cannot be opened --------------------------------------------------------------------


def a_fifo(where: Path) -> str:
    os.mkfifo(where / "fifo")
    return str(where / "fifo")


def a_size(size: int) -> Callable[[Path], str]:
    def make(where: Path) -> str:
        (where / "odd").write_bytes(bytes(size))
        return str(where / "odd")

    return make


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda where: str(where / "none"), "No such file or directory; make one"),
        (str, "is a directory: name an image"),
        (a_fifo, "neither a file nor a block device"),
        (lambda _: "/dev/null", "neither a file nor a block device"),
        (a_size(0), "0 bytes.*truncate -s"),
        (a_size(513), "513 bytes.*truncate -s [+]511"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_what_cannot_be_a_disk_is_one_line_with_the_remedy(
    make: Callable[[Path], str], why: str, read_only: bool, tmp_path: Path
) -> None:
    path = make(tmp_path)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match=why) as raised:
        open_disk(DiskOptions(path, read_only=read_only))
    assert "\n" not in str(raised.value)
    assert path in str(raised.value)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_the_command_line_says_so_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyvmm.lab.probe.missing_for_linux", lambda: None)
    monkeypatch.setattr("tinyvmm.command.run.prepare_kernel", pytest.fail)
    assert main(["run", "--disk", str(tmp_path / "none"), "--", "true"]) != 0
    told = capsys.readouterr().err
    assert told.startswith("tinyvmm: cannot open the disk")
    assert told.count("\n") == 1


@pytest.mark.parametrize("more", ["read-only", "bogus=1", "ephemeral=1", "a b"])
def test_an_option_that_is_none_is_told_from_a_name_with_a_comma(
    image: Path, tmp_path: Path, more: str
) -> None:
    with pytest.raises(ConfigError, match=f"disk {image}: '{more}' is no option; there are ro, "):
        open_disk(parse_disk(f"{image},{more}"))
    for words in (f"{more},ro", f"ro,{more}", f"overlay={tmp_path}/delta,{more}"):
        with pytest.raises(ConfigError, match=f"disk {image}: '{more}' is no option"):
            open_disk(parse_disk(f"{image},{words}"))
    assert os.listdir(tmp_path) == ["disk.img"]
    (tmp_path / f"disk.img,{more}").write_bytes(bytes(512))
    open_disk(parse_disk(f"{image},{more}")).close()


# --- locks ------------------------------------------------------------------------------------


def test_one_writes_or_many_read(image: Path) -> None:
    path = str(image)
    with contextlib.closing(RawDisk(path)):
        for read_only in (False, True):
            with pytest.raises(ConfigError, match="in use by another machine, or named twice"):
                RawDisk(path, read_only=read_only)
    with contextlib.closing(RawDisk(path, read_only=True)):
        with pytest.raises(ConfigError, match="overlay"):
            RawDisk(path)
        RawDisk(path, read_only=True).close()
    RawDisk(path).close()


def test_the_lock_is_qemus(image: Path) -> None:
    write = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(image)]
    read = ["qemu-io", "-r", "-f", "raw", "-c", "read 0 512", str(image)]
    for read_only in (False, True):
        with contextlib.closing(RawDisk(str(image), read_only=read_only)):
            done = subprocess.run(write, capture_output=True, text=True, check=False)
            assert 'Failed to get "write" lock' in done.stdout + done.stderr
            if read_only:
                subprocess.run(read, capture_output=True, check=True)
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        qemu.stdin.write(b"read 0 512\n")
        qemu.stdin.flush()
        while b"ops" not in qemu.stdout.readline():
            assert qemu.poll() is None
        with pytest.raises(ConfigError, match="in use"):
            RawDisk(str(image), read_only=True)
        qemu.stdin.close()
        qemu.wait(30)
    RawDisk(str(image)).close()


def test_the_lock_of_a_killed_process_is_gone(image: Path) -> None:
    code = (
        "import sys; from tinyvmm.disks.raw import RawDisk; d = RawDisk(sys.argv[1]); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(ConfigError, match="in use"):
            RawDisk(str(image))
        other.kill()
        other.wait()
    RawDisk(str(image)).close()


# --- devices ----------------------------------------------------------------------------------


def test_a_block_device_is_a_disk_of_its_size(image: Path) -> None:
    try:
        attached = subprocess.run(
            ["losetup", "--show", "-f", str(image)], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop device to be had: {error}")
    device = attached.stdout.strip()
    try:
        with contextlib.closing(RawDisk(device)) as disk:
            assert disk.size == MIB
            disk.write_from([memoryview(b"w" * 1024)], 4096)
            disk.write_zeroes(8192, 8192, unmap=False)
            disk.discard(65536, 512)
            disk.discard(131072, 65536)
            disk.flush()
            with pytest.raises(ConfigError, match="in use"):
                RawDisk(device)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
    found = image.read_bytes()
    assert found[4096:5120] == b"w" * 1024
    assert found[8192:16384] == bytes(8192)


# --- space ------------------------------------------------------------------------------------


def test_discarded_space_is_given_back_and_reads_as_zeros(image: Path) -> None:
    with contextlib.closing(RawDisk(str(image))) as disk:
        before = os.fstat(disk.fd).st_blocks
        disk.discard(0, MIB // 2)
        disk.write_zeroes(MIB // 2, MIB // 4, unmap=True)
        assert os.fstat(disk.fd).st_blocks <= before // 4 + 8
        assert image.read_bytes()[: MIB * 3 // 4] == bytes(MIB * 3 // 4)
        assert image.stat().st_size == MIB


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize("fallocate", [False, True])
def test_zeroes_are_written_where_they_cannot_be_punched(
    image: Path, monkeypatch: pytest.MonkeyPatch, unmap: bool, fallocate: bool
) -> None:
    monkeypatch.setattr(files, "_ZEROS_LEN", 4096)
    if not fallocate:
        monkeypatch.setattr(files, "_fallocate", lambda *_: False)
    data = image.read_bytes()
    with contextlib.closing(RawDisk(str(image))) as disk:
        disk.write_zeroes(512, 10240, unmap=unmap)
        disk.discard(65536, 4096)
    found = image.read_bytes()
    assert found[:512] == data[:512]
    assert found[512:10752] == bytes(10240)
    assert found[10752:65536] == data[10752:65536]
