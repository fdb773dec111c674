"""Pulling: what an image consists of is asked for, and what of it is not here yet is fetched.

Layers come side by side, each verified by its digest, unpacked into a draft, verified by its
diff_id, and then in the store; the image is recorded last. What was cut off or broken off leaves
nothing but the beginnings of downloads, which the next one goes on with.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager

from tinyvmm.errors import ConfigError
from tinyvmm.images.oci import reference, spec
from tinyvmm.images.oci.config import ImageConfig, parse_config
from tinyvmm.images.oci.source import Source
from tinyvmm.images.oci.store import Image, Store
from tinyvmm.images.oci.tree_writer import LayerError
from tinyvmm.images.oci.unpack import LAYER_MAX, open_compressed, unpack
from tinyvmm.images.progress import Progress
from tinyvmm.images.storing import storing

INDEX_DEPTH = 4  # indexes in indexes


def pull(
    text: str, store: Store, *, insecure: bool = False, progress: Progress | None = None
) -> Image:
    """Have the image called `text` (see reference) in the store, as it is there now.

    With `insecure` a registry's certificate is not checked, and http will do. ConfigError for what
    cannot be had. Main thread: an interrupt breaks it off.
    """
    wanted = reference.parse(text)
    named = storing("image", store.path, "free some (tinyvmm prune)")
    with store.shared(), _source(wanted, insecure=insecure) as source, named:
        try:
            return _Pull(source, store, str(wanted), progress).run()
        except ConfigError as error:
            raise ConfigError(f"image {wanted}: {error}") from None


@contextmanager
def _source(
    wanted: reference.Reference | reference.Elsewhere, *, insecure: bool
) -> Iterator[Source]:
    source: Source
    if isinstance(wanted, reference.Reference):
        from tinyvmm.images.oci.registry import RegistrySource

        source = RegistrySource(wanted, insecure=insecure)
    elif wanted.transport == "containers-storage":
        from tinyvmm.images.oci.containers_storage import open_storage

        source = open_storage(wanted)
    else:
        from tinyvmm.images.oci.layout import open_source

        source = open_source(wanted)
    try:
        yield source
    finally:
        source.close()


class _Pull:
    """One pull: the source, the store, and how far it is."""

    def __init__(self, source: Source, store: Store, shown: str, progress: Progress | None) -> None:
        self._source = source
        self._store = store
        self._what = f"pulling {shown}"
        self._progress = progress
        self._cancelled = threading.Event()
        self._telling = threading.Lock()
        self._done = self._total = 0

    def run(self) -> Image:
        data, manifest, digest = self._manifest()
        config_data = self._source.small(manifest.config, spec.CONFIG_MAX)
        config = parse_config(config_data)
        if len(config.diff_ids) != len(manifest.layers):
            raise ConfigError(
                f"it has {len(manifest.layers)} layers and {len(config.diff_ids)} diff_ids"
            )
        self._fetch(manifest, config)
        image = Image(
            id=manifest.config.digest,
            names=self._source.names,
            manifest=digest,
            layers=config.diff_ids,
            size=sum(self._store.layer_size(diff_id) for diff_id in config.diff_ids),
            created=config.created,
            pulled=time.time(),
        )
        return self._store.record(image, {image.id: config_data, digest: data})

    def _manifest(self) -> tuple[bytes, spec.Manifest, str]:
        """The manifest for this platform: as it is, parsed, and its digest."""
        data, told = self._source.manifest()
        for _ in range(INDEX_DEPTH):
            media_type = spec.media_type_of(data, told)
            if media_type not in spec.INDEXES:
                return data, spec.parse_manifest(data, media_type), spec.digest_of(data)
            chosen = spec.choose(spec.parse_index(data))
            data, told = self._source.manifest(chosen.digest)
        raise ConfigError(f"it has indexes in indexes, {INDEX_DEPTH} deep")

    def _fetch(self, manifest: spec.Manifest, config: ImageConfig) -> None:
        missing = {
            diff_id: layer
            for diff_id, layer in zip(config.diff_ids, manifest.layers, strict=True)
            if not self._store.has_layer(diff_id)
        }
        for layer in missing.values():
            if layer.size > LAYER_MAX:
                raise ConfigError(
                    f"layer {layer.digest[:19]} is said to have {layer.size} bytes: more than "
                    f"{LAYER_MAX >> 30} GiB"
                )
        self._total = sum(layer.size for layer in missing.values())
        if not missing:
            return
        self._tell(0)
        with ThreadPoolExecutor(self._source.parallel) as pool:
            try:
                tasks = [pool.submit(self._one, *item) for item in missing.items()]
                wait(tasks, return_when=FIRST_EXCEPTION)
            finally:
                self._cancelled.set()
                pool.shutdown(wait=True, cancel_futures=True)
        for failed in (task.exception() for task in tasks if not task.cancelled()):
            if failed is not None and not isinstance(failed, KeyboardInterrupt):
                raise failed

    def _one(self, diff_id: str, layer: spec.Descriptor) -> None:
        """Have one layer in the store; on a thread of the pool."""
        with self._store.making(diff_id, self._cancelled) as there:
            if there:
                return
            partial = self._store.partial(layer.digest)
            with (
                self._source.layer(layer, partial, self._tell) as file,
                self._store.draft() as draft,
            ):
                stream = open_compressed(file)
                try:
                    done = unpack(
                        stream,
                        os.path.join(draft, "diff"),
                        algorithm=diff_id.partition(":")[0],
                        tell=self._check,
                    )
                except LayerError as error:
                    raise LayerError(f"layer {layer.digest[:19]}: {error}") from None
                finally:
                    if stream is not file:
                        stream.close()
                if done.diff_id != diff_id:
                    raise ConfigError(
                        f"layer {layer.digest[:19]} is corrupted: it is not what its diff_id says"
                    )
                self._store.keep_layer(draft, diff_id, done.size)

    def _check(self, _: int = 0) -> None:
        if self._cancelled.is_set():
            raise KeyboardInterrupt

    def _tell(self, count: int) -> None:
        """Note that `count` bytes more have come."""
        self._check()
        with self._telling:
            self._done += count
            if self._progress is not None:
                self._progress(self._what, self._done, self._total)
