"""Run the benches named on the command line, or all of them.

Each compares things side by side: interleaved rounds in one run, medians, ratios. Nothing here
asserts; docs/benchmarks.md says how to read it.
"""

import sys
from importlib import import_module

NAMES = (
    "exits",
    "doorbells",
    "handover",
    "startup",
    "boot",
    "caching",
    "codec",
    "server",
    "guest9p",
    "disk",
    "requests",
    "frames",
    "net",
    "vsock",
    "console",
    "echo",
    "kernels",
    "commands",
    "erofs",
    "roots",
)


def main() -> None:
    names = sys.argv[1:] or NAMES
    for name in names:
        if name not in NAMES:
            sys.exit(f"no bench {name!r}: there are {', '.join(NAMES)}")
    for name in names:
        print(f"== {name}")
        import_module(f"bench.{name}").main()


main()
