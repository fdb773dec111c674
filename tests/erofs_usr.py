"""All of /usr, or of another directory: an image of it in a file, checked and compared.

`make erofs-usr` runs it: by fsck.erofs, by a reader of the tests' own, and, for root, by this
computer's kernel, which mounts it. It takes the tree's size in $TMPDIR, and a few minutes.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.erofs_reader import Entry, read_image, read_tree
from tinyvmm.images.erofs.writer import write_image


def main() -> None:
    """Exit with status 1 if there is a difference."""
    top = Path(sys.argv[1] if len(sys.argv) > 1 else "/usr")
    with tempfile.TemporaryDirectory() as where:
        image, at = Path(where) / "image", Path(where) / "mnt"
        written = write_image([("/", str(top))], str(image))
        subprocess.run(["fsck.erofs", str(image)], check=True)
        expected = read_tree(top)
        sys.stdout.write(f"{top}: {written.inodes} inodes\n")
        differing = compare("by a reader of ours", expected, read_image(image))
        at.mkdir()
        mount = ["mount", "-t", "erofs", "-o", "ro,loop", str(image), str(at)]
        if os.geteuid() or subprocess.run(mount, check=False).returncode:
            sys.stdout.write("not mounted: that takes root, and a kernel with EROFS\n")
        else:
            try:
                differing += compare("mounted", expected, read_tree(at))
            finally:
                subprocess.run(["umount", str(at)], check=True)
    sys.exit(bool(differing))


def compare(how: str, expected: dict[bytes, Entry], found: dict[bytes, Entry]) -> int:
    """Say what differs; how many names that is."""
    differing = [path for path in expected | found if expected.get(path) != found.get(path)]
    sys.stdout.write(f"{how}: {len(found)} names, {len(differing)} differences\n")
    for path in differing[:20]:
        sys.stdout.write(f"{path!r} {expected.get(path)} {found.get(path)}\n")
    return len(differing)


main()
