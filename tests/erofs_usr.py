"""All of /usr, or of another directory: an image of it in a file, checked and compared.

`make erofs-usr` runs it. It takes the tree's size in $TMPDIR, and a few minutes.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.erofs_reader import read_image, read_tree
from tinyvmm.images.erofs.writer import write_image


def main() -> None:
    """Exit with status 1 if there is a difference."""
    top = Path(sys.argv[1] if len(sys.argv) > 1 else "/usr")
    with tempfile.TemporaryDirectory() as where:
        image = Path(where) / "image"
        written = write_image([("/", str(top))], str(image))
        subprocess.run(["fsck.erofs", str(image)], check=True)
        expected, found = read_tree(top), read_image(image)
    differing = [path for path in expected | found if expected.get(path) != found.get(path)]
    counts = f"{len(found)} names, {written.inodes} inodes, {len(differing)} differences"
    sys.stdout.write(f"{top}: {counts}\n")
    for path in differing[:20]:
        sys.stdout.write(f"{path!r} {expected.get(path)} {found.get(path)}\n")
    sys.exit(bool(differing))


main()
