"""What a steady stream of requests costs in exits to us, with Linux's own drivers: none."""

import json
import os
from collections import Counter

import pytest

from bench.requests import MARK
from bench.requests import guest as script
from tests.linux.conftest import Runner
from tinyvmm import layout

pytestmark = pytest.mark.linux

READS, FILES = 500, 100
CONFIGURATION = range(layout.PCI_ECAM_GPA, layout.PCI_ECAM_GPA + layout.PCI_ECAM_LEN)


def test_a_stream_of_requests_rings_no_doorbell_and_takes_no_interrupt_that_we_see(
    guest: Runner,
) -> None:
    live = guest.directory("exits")
    for number in range(FILES):
        (live / f"file{number}").write_text(f"{number}\n")
    (live / "image").write_bytes(bytes(4096 * READS))
    seen = f"/dev/shm/tinyvmm-exits-{os.getpid()}.json"  # no file system of the lab's that is slow
    try:
        done = guest.run(
            *("--ioeventfd", "on", "--disk", f"{live / 'image'},ro"),
            *("--shared", f"/live={live},ro,cache=none"),
            *("--trace", "9p,port,mmio", "--trace-file", seen),
            *("--", "sh", "-c", script(READS, FILES) + "echo done"),
        )
        assert (done.status, done.stdout, done.stderr) == (0, b"done\n", b"")
        lines = guest.program(["cat", seen]).stdout.splitlines()
    finally:
        guest.program(["rm", "-f", seen])
    rows: list[Counter[str]] = [Counter()]
    looked_for: list[int] = []  # values of PCI configuration space that Linux read by an exit
    for record in map(json.loads, lines):
        if record["record"] == "NineP":
            rows[-1][record["message"].partition("(")[0]] += 1
        elif (record["space"], record["address"]) == MARK:
            rows.append(Counter())
        else:
            if record["direction"] == "read" and record["address"] in CONFIGURATION:
                looked_for.append(record["value"])
            rows[-1][f"{record['space']} {record['address']:#x}"] += 1
    boot, _, disk, files, _ = rows
    assert any(what.startswith("mmio") for what in boot), "the trace shows what there is to see"
    assert set(looked_for) == {0xFFFF_FFFF}, "what is there is read without"
    assert boot["port 0xcfc"] <= 3, "and not by ports, but to find out that there are some"
    exits = [what for row in (disk, files) for what in row if what.startswith(("mmio", "port"))]
    assert exits == []
    assert files["Tread"] >= FILES
    assert files["Tlopen"] >= FILES
    assert sum(files[what] for what in files if what.startswith("T")) > 4 * FILES
