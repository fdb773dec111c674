"""`tinyvmm pull | images | rmi | prune`: the OCI images there are to run."""

import argparse
import json
import re
import time
from datetime import datetime
from typing import TYPE_CHECKING

from tinyvmm.cli.table import print_table, size
from tinyvmm.errors import ConfigError

if TYPE_CHECKING:
    from tinyvmm.images.oci.store import Image

ID_LEN = 12  # hexadecimal digits, as everybody shows
_EPILOG = """\
A REF is [HOST/]NAME[:TAG][@DIGEST] in a registry (docker://... also), or
  oci:DIR[:TAG]                   an OCI layout
  oci-archive:FILE[:TAG]          a tar of one
  docker-archive:FILE[:NAME]      what `docker save` or `podman save` wrote
  containers-storage:NAME         what podman has, by way of skopeo or podman

Passwords are those of `podman login`, `docker login` or `skopeo login`.

examples:
  tinyvmm pull debian:stable-slim && tinyvmm run --image debian:stable-slim -- cat /etc/os-release
  tinyvmm pull localhost:5000/app@sha256:...
  docker save app | gzip > app.tar.gz; tinyvmm pull docker-archive:app.tar.gz
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the `tinyvmm` parser."""
    pulling = subparsers.add_parser(
        "pull",
        help="get an OCI image",
        description="Get an OCI image from a registry, a file or podman, and print its ID.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pulling.add_argument("image", metavar="REF", help="which image")
    pulling.add_argument(
        "--insecure", action="store_true", help="over http, or without checking certificates"
    )
    pulling.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    pulling.set_defaults(main=_pull)

    listing = subparsers.add_parser(
        "images", help="list the OCI images here", epilog="example: tinyvmm images --json"
    )
    listing.add_argument("--json", action="store_true", help="for programs, and with all they say")
    listing.set_defaults(main=_images)

    removing = subparsers.add_parser(
        "rmi", help="remove OCI images", epilog="example: tinyvmm rmi alpine:3.20"
    )
    removing.add_argument("images", nargs="+", metavar="IMAGE", help="a name or an ID")
    removing.add_argument("-f", "--force", action="store_true", help="with all of its names")
    removing.set_defaults(main=_rmi)

    pruning = subparsers.add_parser(
        "prune", help="remove what no OCI image has any more", epilog="example: tinyvmm prune --all"
    )
    pruning.add_argument(
        "-a", "--all", action="store_true", help="every image, too, that no machine runs"
    )
    pruning.set_defaults(main=_prune)


def _pull(args: argparse.Namespace) -> int:
    from tinyvmm.images.oci.pull import pull
    from tinyvmm.images.oci.store import Store
    from tinyvmm.images.progress import TerminalProgress

    progress = TerminalProgress()
    try:
        image = pull(
            args.image,
            Store(),
            insecure=args.insecure,
            progress=None if args.quiet else progress,
        )
    finally:
        progress.finish()
    print(image.id.partition(":")[2])
    return 0


def _images(args: argparse.Namespace) -> int:
    from tinyvmm.images.oci.store import Store

    store = Store()
    images = store.images()
    if args.json:
        from tinyvmm.images.oci.config import parse_config

        records = []
        for image in images:
            config = parse_config(store.config(image))._asdict()
            records.append({**image._asdict(), "config": config})
        print(json.dumps(records, indent=2))
        return 0
    rows = [("REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE")]
    for image in images:
        for name in image.names or ["<none>"]:
            repository, tag = split_name(name)
            digits = image.id.partition(":")[2][:ID_LEN]
            rows.append((repository, tag, digits, age(image.created), size(image.size)))
    print_table(rows)
    return 0


def _rmi(args: argparse.Namespace) -> int:
    from tinyvmm.images.oci.reference import parse_name
    from tinyvmm.images.oci.store import Store

    store = Store()
    for text in args.images:
        image = store.find(text)
        if image is None:
            raise ConfigError(f"image {text} is not here; see: tinyvmm images")
        known = {text, f"localhost/{text}", f"localhost/{text}:latest"}
        if not text.startswith("sha256:"):
            known.add(str(parse_name(text)))
        name = next((name for name in image.names if name in known), None)
        if name is None and len(image.names) > 1 and not args.force:
            raise ConfigError(
                f"image {text} has several names: give one of {', '.join(image.names)}, or --force"
            )
        if args.force or len(image.names) <= 1:
            if store.in_use(image):
                raise ConfigError(f"image {text} is being run: stop its machines first")
            name = None
        store.forget(image, name)
        print("\n".join([name] if name else image.names or [image.id.partition(":")[2]]))
    store.collect(partial=False, wait=False)
    return 0


def _prune(args: argparse.Namespace) -> int:
    from tinyvmm.images.oci.store import Store

    store = Store()
    removed: list[Image] = []
    for image in store.images():
        if (args.all or not image.names) and not store.in_use(image):
            store.forget(image, None)
            removed.append(image)
    freed = store.collect(partial=True, wait=True)
    for image in removed:
        print(", ".join(image.names) or image.id.partition(":")[2][:ID_LEN])
    print(f"{size(freed)} freed")
    return 0


def split_name(name: str) -> tuple[str, str]:
    """Split a name into its repository and its tag or digest."""
    if "@" in name:
        repository, _, digest = name.partition("@")
        return repository, digest[: 7 + ID_LEN]
    found = re.fullmatch(r"(.+):([^:/]+)", name)
    return (found[1], found[2]) if found else (name, "<none>")


def age(created: str) -> str:
    """Say how long ago a time of RFC 3339 was."""
    try:
        then = datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", created)).timestamp()
    except (ValueError, OverflowError, OSError):
        return "unknown"
    seconds = max(0, int(time.time() - then))
    for name, length in (("year", 31557600), ("month", 2629800), ("day", 86400), ("hour", 3600)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {name}{'s' * (count > 1)} ago"
    return f"{seconds // 60} minutes ago"
