"""A console port led to a Unix socket: ours beside QEMU's. bench/turns.py says how."""

from bench import turns


def main() -> None:
    """Measure and print."""
    turns.main("console")
