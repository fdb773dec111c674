"""Which files of this computer does a command read? A dependency manifest of a build, say.

    python -m examples.build_manifest cc -c hello.c -o /tmp/hello.o

The command runs in a virtual machine on this computer's files, and each access is seen on its way.
"""

import os
import sys

import tinyvmm


def manifest(argv: list[str], **machine: object) -> tuple[int, set[str]]:
    """Run a command in a machine; its exit status, and the files that it opened to read."""
    opened: set[str] = set()

    def on_access(access: tinyvmm.Access) -> None:
        if access.op == "open" and not access.changes:
            opened.add(access.path)

    done = tinyvmm.run(argv, cwd=os.getcwd(), on_access=on_access, **machine)  # type: ignore[arg-type]
    return done.returncode, {path for path in opened if os.path.isfile(path)}


if __name__ == "__main__":
    try:
        status, files = manifest(sys.argv[1:])
    except tinyvmm.TinyvmmError as error:
        sys.exit(f"build_manifest: {error}")
    print("\n".join(sorted(files)))
    sys.exit(status)
