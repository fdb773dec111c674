"""Stream sockets between guest and host: ours beside QEMU's. bench/links.py says how."""

from bench import links


def main() -> None:
    """Measure and print."""
    links.main(("vsock",))
