"""Podman's own storage as a source, through the tools that know it.

What lies there is podman's: files of users that only it may become, in a form of its driver's
(docs/decisions/0008-podmans-images-are-copied.md). So skopeo, or podman itself, copies the image
into a layout of ours, of which the layers are taken that are not here yet.
"""

import os
import re
import shutil
import subprocess
import tempfile

from tinyvmm.errors import ConfigError
from tinyvmm.images.oci import reference
from tinyvmm.images.oci.layout import DirectoryFiles, OciLayout, TarFiles
from tinyvmm.images.oci.source import Source


class _Copied(OciLayout):
    """A layout that goes when it is closed."""

    def __init__(self, files: DirectoryFiles | TarFiles, name: str, directory: str) -> None:
        self._directory = directory
        super().__init__(files, f"containers-storage:{name}", "", "")
        plain = re.sub(r"\A\[[^]]*\]", "", name).removeprefix("@")
        is_id = re.fullmatch(r"[0-9a-f]{12,64}", plain)
        self.names = [] if is_id else [str(reference.parse_name(plain))]

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._directory)


def open_storage(wanted: reference.Elsewhere) -> Source:
    """Copy the image out of the storage; ConfigError if it cannot be had."""
    name = wanted.path
    skopeo, podman = shutil.which("skopeo"), shutil.which("podman")
    if skopeo is None and podman is None:
        raise ConfigError(
            "podman's storage is read by skopeo or podman, and neither is here: install one"
        )
    directory = tempfile.mkdtemp(prefix="tinyvmm-")
    try:
        layout = os.path.join(directory, "layout")
        if skopeo is not None:
            _run(
                name,
                [skopeo, "copy", "--quiet", "--dest-oci-accept-uncompressed-layers"],
                [f"containers-storage:{name}", f"oci:{layout}:image"],
            )
            return _Copied(DirectoryFiles(layout), name, directory)
        _run(name, ["podman", "save", "--quiet", "--format=oci-archive"], ["-o", layout, name])
        return _Copied(TarFiles(layout), name, directory)
    except BaseException:
        shutil.rmtree(directory)
        raise


def _run(name: str, command: list[str], arguments: list[str]) -> None:
    done = subprocess.run(
        [*command, *arguments], capture_output=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        program = os.path.basename(command[0])
        why = _message(lines[-1])
        if "does not resolve to an image ID" in why or "image not known" in why:
            raise ConfigError(f"containers-storage:{name}: no such image there; see: podman images")
        raise ConfigError(f"containers-storage:{name}: {program} says: {why[-300:]}")


def _message(line: str) -> str:
    """What a line of logrus's, `time=... level=... msg="..."`, says; or the line."""
    found = re.search(r'msg="((?:[^"\\]|\\.)*)"', line)
    return line if found is None else re.sub(r"\\(.)", r"\1", found[1])
