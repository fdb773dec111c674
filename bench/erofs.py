"""Planning an EROFS image of /usr: CPU time and memory an inode; and the first read of a huge tree.

Each round is a process of its own: the walk alone (scandir and lstat), planning everything, and,
as a guest has it, planning what its first reads need. With mkfs.erofs beside it, which also copies
the data, where erofs-utils are installed and there is room in /dev/shm.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = str(Path(__file__).parent.parent)
TREE = "/usr"
ROUNDS = 3
LARGE = 1 << 40


def walk(top: str) -> int:
    """Look at everything, as a planner has to at least."""
    count, pending = 1, [top]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return count


def plan(top: str) -> int:
    """Plan all of an image."""
    from tinyvmm.images.erofs.image import ErofsImage

    image = ErofsImage([("/", top)], sys.exit, whole=True)
    KEPT.append(image)
    return image.plan.inodes


def first_reads(top: str) -> int:
    """Read the superblock and the root's inode, as mount(2) does."""
    from tinyvmm.images.erofs.image import ErofsImage

    image = ErofsImage([("/", top)], print)
    for offset in (0, 1 << 20):
        image.read_into([memoryview(bytearray(4096))], offset)
    KEPT.append(image)
    return image.plan.inodes


KEPT: list[object] = []  # so that memory is asked for while it is used


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(what: str, top: str) -> None:
    """In a process of its own: print CPU seconds, inodes, and bytes of memory more than before."""
    import tinyvmm.images.erofs.image  # noqa: F401 (what it takes is no part of a plan)

    before, begin = resident(), time.process_time()
    count = {"walk": walk, "plan": plan, "first": first_reads}[what](top)
    print(time.process_time() - begin, count, resident() - before)


def measured(what: str, top: str) -> tuple[float, int, int]:
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from bench.erofs import measure; "
    argv = [sys.executable, "-c", f"{code}measure({what!r}, {top!r})"]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    cpu, count, size = done.stdout.splitlines()[-1].split()
    return float(cpu), int(count), int(size)


def main() -> None:
    rounds: dict[str, list[tuple[float, int, int]]] = {}
    for _ in range(ROUNDS):
        for what in ("walk", "plan", "first"):
            rounds.setdefault(what, []).append(measured(what, TREE))
    names = {"walk": "walk alone", "plan": "plan all", "first": "first reads"}
    for what, found in rounds.items():
        cpu = median(seconds for seconds, _, _ in found)
        count, size = found[0][1], median(size for _, _, size in found)
        memory = f"{size / count:6.0f} bytes an inode" if what == "plan" else ""
        print(f"{TREE}, {names[what]:12} {cpu:7.3f} s CPU  {count:8} inodes  {memory}")
    with tempfile.TemporaryDirectory() as top:
        with open(os.path.join(top, "huge"), "wb") as file:
            file.truncate(LARGE)
        from tinyvmm.images.erofs.image import ErofsImage

        begin = time.perf_counter()
        image = ErofsImage([("/", top)], sys.exit)
        room = memoryview(bytearray(4096))
        image.read_into([room], 1 << 20)
        image.read_into([room], image.plan.files.starts[0] * 4096 + LARGE // 2)
        print(f"first byte in the midst of 1 TiB: {(time.perf_counter() - begin) * 1000:.1f} ms")
        image.close()


if __name__ == "__main__":
    main()
