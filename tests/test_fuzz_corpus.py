"""What the fuzzer has found worth keeping is played again; `make fuzz` looks for more."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import control_client, ninep_session, virtio_device
from tinyvmm.devices.virtio.queue import Virtqueue
from tinyvmm.devices.virtio.rng import VirtioRng
from tinyvmm.fileserver import host, hostfile
from tinyvmm.methods.supervised import Supervised

HERE = Path(__file__).parent / "fuzz"


def inputs(corpus: str) -> list[Path]:
    found = sorted((HERE / corpus).iterdir())
    assert len(found) > 20
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> ninep_session.Place:
    return ninep_session.Place(str(tmp_path_factory.mktemp("place")))


@pytest.mark.parametrize("path", inputs("ninep_corpus"), ids=lambda path: path.name[:8])
def test_a_9p_conversation_of_the_corpus_does_no_harm(
    path: Path, place: ninep_session.Place
) -> None:
    ninep_session.play(path.read_bytes(), place)


@settings(deadline=None, max_examples=100)
@given(head=st.integers(0, 63), script=st.binary(max_size=200))
def test_any_9p_conversation_does_no_harm(
    head: int, script: bytes, place: ninep_session.Place
) -> None:
    ninep_session.play(bytes([head]) + script, place)


@pytest.mark.parametrize("path", inputs("virtio_corpus"), ids=lambda path: path.name[:8])
def test_a_driver_of_the_corpus_does_no_harm(path: Path) -> None:
    virtio_device.play(path.read_bytes(), virtio_device.Place(""))


@settings(deadline=None, max_examples=100)
@given(head=st.integers(0, 255), script=st.binary(max_size=200))
def test_any_driver_does_no_harm(head: int, script: bytes) -> None:
    virtio_device.play(bytes([head]) + script, virtio_device.Place(""))


@pytest.fixture(scope="module")
def socket_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[control_client.Place]:
    place = control_client.Place(str(tmp_path_factory.mktemp("control")))
    yield place
    place.close()


@pytest.mark.parametrize("path", inputs("control_corpus"), ids=lambda path: path.name[:8])
def test_a_client_of_the_corpus_does_no_harm(
    path: Path, socket_place: control_client.Place
) -> None:
    control_client.play(path.read_bytes(), socket_place)


@settings(deadline=None, max_examples=60)
@given(script=st.binary(max_size=200))
def test_any_client_does_no_harm(script: bytes, socket_place: control_client.Place) -> None:
    control_client.play(script, socket_place)


# --- the checks themselves ------------------------------------------------------------------


def walk_open_write(*names: bytes) -> bytes:
    """A script: walk from the root by these names, open for reading and writing, write."""
    picked = [ninep_session.NAMES.index(name) for name in names]
    read_write = 128 + ninep_session.NUMBERS.index(os.O_RDWR)
    return bytes([0, 110, 1, 0, 1, len(picked), *picked, 12, 1, 1, read_write, 118, 1, 1, 0, 3])


def test_a_way_out_of_the_tree_would_be_noticed(
    place: ninep_session.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = walk_open_write(b"outdir", b"secret")
    ninep_session.play(script, place)
    follow = os.O_PATH | os.O_CLOEXEC
    monkeypatch.setattr(
        host, "open_path", lambda name, dir_fd: os.open(name, follow, dir_fd=dir_fd)
    )
    with pytest.raises(AssertionError):
        ninep_session.play(script, place)


def test_an_exception_and_a_leaked_descriptor_would_be_noticed(
    place: ninep_session.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = walk_open_write(b"file")
    ninep_session.play(script, place)
    leaked: list[int | None] = []
    with monkeypatch.context() as broken:
        broken.setattr(hostfile.HostFile, "writev", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            ninep_session.play(script, place)
    with monkeypatch.context() as broken:
        broken.setattr(hostfile.HostFile, "close", lambda file: leaked.append(file.fd))
        with pytest.raises(AssertionError):
            ninep_session.play(script, place)
    for fd in leaked:
        assert fd is not None
        os.close(fd)


def test_ram_written_where_it_was_not_given_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kick = bytes([0, 4, 0])  # the entropy device's queue
    virtio_device.play(kick, virtio_device.Place(""))

    def scribble(device: VirtioRng, queue: Virtqueue) -> None:
        del queue
        assert device._memory is not None
        device._memory.view(0x10_2000, 1)[:] = b"x"

    monkeypatch.setattr(VirtioRng, "handle", scribble)
    with pytest.raises(AssertionError):
        virtio_device.play(kick, virtio_device.Place(""))


def test_a_bug_of_a_method_and_an_answer_that_is_not_as_described_would_be_noticed(
    socket_place: control_client.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(Supervised("").methods())
    ask_status = bytes([64 + (names.index("status") - 64) % len(names), 0])
    control_client.play(ask_status, socket_place)
    with monkeypatch.context() as broken:
        broken.setattr(os, "getpid", lambda: "none")  # which is what "pid" says
        with pytest.raises(AssertionError):
            control_client.play(ask_status, socket_place)
    with monkeypatch.context() as broken:
        broken.setattr(os, "getpid", lambda: 1 // 0)
        with pytest.raises(AssertionError, match="a bug"):
            control_client.play(ask_status, socket_place)
