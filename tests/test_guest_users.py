"""Whom --user names, by the guest's own passwd and group."""

from pathlib import Path

import pytest

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.host import HostTree
from tinyvmm.guest.relay import User
from tinyvmm.inside.guest_users import Account, resolve

USERS = """root:x:0:0:root:/root:/bin/sh
web:x:33:34:web:/srv:/bin/false
# not an entry
odd:x:many:1:no number:/:/bin/sh
broken line
"""
GROUP = "root:x:0:\nwww:x:34:\nlogs:x:50:web,other\nmore:x:60:other,web\n"


@pytest.fixture
def root(tmp_path: Path) -> HostTree:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text(USERS)
    (tmp_path / "etc" / "group").write_text(GROUP)
    return HostTree(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("root", Account(User(0, 0, (0,)), "/root")),
        ("web", Account(User(33, 34, (34, 50, 60)), "/srv")),
        ("33", Account(User(33, 34, (34, 50, 60)), "/srv")),
        ("web:logs", Account(User(33, 50, (50,)), "/srv")),
        ("web:77", Account(User(33, 77, (77,)), "/srv")),
        ("1234", Account(User(1234, 0, (0,)), "/")),
        ("1234:www", Account(User(1234, 34, (34,)), "/")),
    ],
)
def test_names_and_numbers(root: HostTree, text: str, expected: Account) -> None:
    assert resolve(text, root) == expected
    root.close()


@pytest.mark.parametrize("text", ["", "nobody", "web:none", "odd", "-1", "4294967295", "²"])
def test_who_is_not_there_is_refused(root: HostTree, text: str) -> None:
    with pytest.raises(ConfigError, match=r"named|number"):
        resolve(text, root)
    root.close()


def test_a_root_without_the_files_has_numbers(tmp_path: Path) -> None:
    root = HostTree(str(tmp_path))
    assert resolve("7:8", root) == Account(User(7, 8, (8,)), "/")
    with pytest.raises(ConfigError, match="passwd"):
        resolve("root", root)
    root.close()
