"""What does a command change? It runs in a machine; this computer's files stay as they are.

    python -m examples.write_diff sh -c 'echo x >> /etc/hosts; rm /etc/motd; mkdir /srv/new'

Prints A, C or D and a path for each file that it added, changed or deleted.
"""

import os
import sys
from tempfile import TemporaryDirectory

import tinyvmm
from tinyvmm.fileserver.written import list_changes


def write_diff(argv: list[str], **machine: object) -> list[str]:
    """Run a command in a machine; a line for each file that it changed."""
    with TemporaryDirectory() as writes:
        tinyvmm.run(argv, write=writes, **machine)  # type: ignore[arg-type]
        changes = list_changes([("/", "/")], [("/", writes)])
        return [f"{change.kind} {os.fsdecode(change.path)}" for change in changes]


if __name__ == "__main__":
    try:
        print("\n".join(write_diff(sys.argv[1:])))
    except tinyvmm.TinyvmmError as error:
        sys.exit(f"write_diff: {error}")
