"""Stream sockets between guest and host: ours beside QEMU's. bench/turns.py says how."""

from bench import links, turns


def main() -> None:
    """Measure and print."""
    turns.main("vsock", (*links.OURS, links.VHOST))
