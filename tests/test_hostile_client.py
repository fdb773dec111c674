"""A 9P client that means harm: it may break its own session and get errors, and nothing else."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_session import Client, connect
from tinyvmm import ninep
from tinyvmm.fileserver import locks
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.locks import Lock, LockTable

RD, UN = ninep.P9_LOCK_TYPE_RDLCK, ninep.P9_LOCK_TYPE_UNLCK


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    (tmp_path / "file").write_bytes(b"hello")
    tree = HostTree(str(tmp_path))
    client = connect(tree)
    yield client
    client.session.close()
    tree.close()


# --- locks ----------------------------------------------------------------------------------


def test_unlocking_holes_into_a_lock_makes_no_more_locks_than_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(locks, "LOCKS_MAX", 10)
    table = LockTable()
    fid, owner = object(), (b"", 1)
    assert table.set(1, Lock(0, 1000, RD, owner, fid)) == ninep.P9_LOCK_SUCCESS
    answers = [table.set(1, Lock(at, at + 1, UN, owner, fid)) for at in range(10, 900, 10)]
    assert answers[:9] == [ninep.P9_LOCK_SUCCESS] * 9
    assert set(answers[9:]) == {ninep.P9_LOCK_ERROR}
    assert len(table._files[1]) == table._count == 10
    assert table.set(1, Lock(0, 1000, UN, owner, fid)) == ninep.P9_LOCK_SUCCESS
    assert not table._files


def test_a_lock_keeps_no_more_of_its_client_than_a_host_name(client: Client) -> None:
    client.walk(0, 1, b"file")
    client.open(1, os.O_RDWR)
    name = b"n" * 255
    assert client.ask(ninep.Tlock(1, RD, 0, 0, 1, 1, name), ninep.Rlock).status == 0
    client.fails(ninep.Tlock(1, RD, 0, 0, 1, 1, name + b"n"), errno.EINVAL)
    client.fails(ninep.Tgetlock(1, RD, 0, 1, 1, name + b"n"), errno.EINVAL)
