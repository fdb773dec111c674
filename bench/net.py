"""Network interfaces on a tap and through passt: ours beside QEMU's. bench/links.py says how."""

from bench import links


def main() -> None:
    """Measure and print."""
    links.main(("tap", "passt"))
