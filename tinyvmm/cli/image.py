"""`tinyvmm image build DIR -o FILE`: a directory tree as an EROFS image in a file."""

import argparse
import os

from tinyvmm.cli.run import parse_map
from tinyvmm.errors import ConfigError

_EPILOG = """\
A MAP is [GUEST=]DIR, as for tinyvmm run: several directories at one place are united, and later
ones win. The image is one that Linux mounts (mount -t erofs) and fsck.erofs checks: names, modes,
owners, times, links, devices and extended attributes are the tree's, to the last bit; it is not
compressed. What cannot be read, or changes meanwhile, ends it, and FILE is then what it was.

examples:
  tinyvmm image build ./rootfs -o rootfs.erofs
  tinyvmm image build base /opt/tool=./tool -o both.erofs
  tinyvmm run --disk both.erofs,ro -- sh -c 'mount -t erofs /dev/vda /mnt; ls /mnt'
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the `tinyvmm` parser."""
    parser = subparsers.add_parser(
        "image",
        help="make an EROFS image of a directory tree",
        epilog="example: tinyvmm image build ./rootfs -o rootfs.erofs",
    )
    parser.set_defaults(main=main)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser(
        "build",
        help="write directories as one EROFS image",
        usage="tinyvmm image build MAP... -o FILE [--name NAME]",
        description="Write directories of this computer as one EROFS image.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = build.add_argument
    add("maps", nargs="+", type=parse_map, metavar="MAP", help="a directory, [GUEST=]DIR")
    add("-o", "--output", required=True, metavar="FILE", help="the image")
    add("--name", default="", metavar="NAME", help="the volume's, 16 bytes at most")


def main(args: argparse.Namespace) -> int:
    """Write it, and say what it is."""
    from tinyvmm.images.erofs.writer import write_image

    if args.guest_argv:
        raise ConfigError("image build runs no command: leave out what is behind --")
    name = os.fsencode(args.name)
    if len(name) > 16:
        raise ConfigError(f"--name {args.name}: {len(name)} bytes, of 16 at most; shorten it")
    written = write_image(args.maps, args.output, name=name)
    print(f"{args.output}: {written.inodes} inodes, {written.size} bytes")
    return 0
