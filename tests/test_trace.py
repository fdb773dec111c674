"""What is traced, and how it reads."""

import argparse
import json
from pathlib import Path

import pytest

from tinyvmm import ninep, trace
from tinyvmm.cli import tracing
from tinyvmm.errors import ConfigError

RECORDS: list[trace.Record] = [
    trace.Access("port", "write", 0x3F8, 1, 0x41),
    trace.Unclaimed("mmio", "read", 0xD000_0000, 4, 0xFFFF_FFFF),
    trace.Message("virtio-rng", "needs a reset: no bytes"),
    trace.NineP("root", 7, ninep.Twalk(1, 2, (b"etc", b"passwd"))),
    trace.NineP("root", 7, ninep.Rlerror(2)),
]
LINES = [
    "port 0x03f8 <- 0x41",
    "mmio 0xd0000000 -> 0xffffffff (nobody's)",
    "virtio-rng: needs a reset: no bytes",
    "9p root     7 Twalk(fid=1, newfid=2, wname=(b'etc', b'passwd'))",
    "9p root     7 Rlerror(ecode=2)",
]


def test_each_record_is_a_line_for_people() -> None:
    assert [trace.text(record) for record in RECORDS] == LINES


def test_each_record_is_a_json_object_for_programs() -> None:
    plain = [json.loads(json.dumps(trace.fields(record))) for record in RECORDS]
    assert [entry["record"] for entry in plain] == [
        "Access",
        "Unclaimed",
        "Message",
        "NineP",
        "NineP",
    ]
    assert plain[0]["address"] == 0x3F8
    assert plain[3]["tag"] == 7
    assert plain[3]["message"].startswith("Twalk(fid=1")


@pytest.mark.parametrize(
    ("kinds", "lines"),
    [("9p", [3, 4]), ("port", [0]), ("mmio,device", [1, 2]), ("port,9p", [0, 3, 4])],
)
def test_only_what_was_asked_for_is_shown(kinds: str, lines: list[int], tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+") as out:
        hook = tracing.recorder(tracing.parse_kinds(kinds), out.fileno(), as_json=False)
        for record in RECORDS:
            hook(record)
        out.seek(0)
        assert out.read().splitlines() == [LINES[index] for index in lines]


def test_a_trace_goes_to_a_file_as_its_name_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "hook", None)
    monkeypatch.setattr(trace, "_watchers", ())
    for name, expected in (("t.txt", LINES[3]), ("t.json", json.dumps(trace.fields(RECORDS[3])))):
        tracing.start(["9p"], str(tmp_path / name))
        assert trace.hook is not None
        trace.hook(RECORDS[3])
        assert (tmp_path / name).read_text() == expected + "\n"


def test_what_cannot_be_traced_or_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"'disk' cannot be traced.*9p, port"):
        tracing.parse_kinds("9p,disk")
    with pytest.raises(ConfigError, match="--trace"):
        tracing.start(None, "file")
    with pytest.raises(ConfigError, match="No such file"):
        tracing.start(["9p"], str(tmp_path / "no" / "file"))
    assert trace.hook is None
