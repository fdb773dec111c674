"""All of /usr, or of another directory: an image of it in a file, checked and compared.

`make erofs-usr` runs it: by fsck.erofs, by a reader of the tests' own, for root by this computer's
kernel, which mounts it, and by find, getfattr and sha256sum in a guest, which has it as a disk. It
takes the tree's size in $TMPDIR, and some minutes; in the lab far more.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.erofs_reader import LIST, Entry, read_image, read_tree
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
        differing += compare_in_a_guest(top, image)
    sys.exit(bool(differing))


def compare(how: str, expected: dict[bytes, Entry], found: dict[bytes, Entry]) -> int:
    """Say what differs; how many names that is."""
    differing = [path for path in expected | found if expected.get(path) != found.get(path)]
    sys.stdout.write(f"{how}: {len(found)} names, {len(differing)} differences\n")
    for path in differing[:20]:
        sys.stdout.write(f"{path!r} {expected.get(path)} {found.get(path)}\n")
    return len(differing)


def compare_in_a_guest(top: Path, image: Path) -> int:
    """Say what programs see that differs; how many lines of theirs that is."""
    mount = "mkdir -p /tmp/image && mount -t erofs -o ro /dev/vda /tmp/image &&"
    command = f"{mount} sh -c {shlex.quote(LIST)} sh /tmp/image"
    options = ["--root-mode", "erofs", "--disk", f"{image},ro"]  # for the module
    run = [sys.executable, "-m", "tinyvmm", "run", *options, "--", "sh", "-c", command]
    done = subprocess.run(run, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.stdout.write(f"in a guest: status {done.returncode}\n")
        return 1
    found = done.stdout
    listed = subprocess.run(["sh", "-c", LIST, "sh", top], stdout=subprocess.PIPE, check=True)
    expected = listed.stdout
    differing = set(expected.split(b"\n")) ^ set(found.split(b"\n"))
    lines = expected.count(b"\n")
    sys.stdout.write(f"in a guest: {lines} lines, {len(differing)} differences\n")
    for line in sorted(differing)[:20]:
        sys.stdout.write(f"{line!r}\n")
    return len(differing) + (expected != found)


main()
