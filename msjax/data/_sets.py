"""Sets that fit in memory: decoded once into the array cache, read from there as memory-mapped arrays."""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msjax.checks import integer
from msjax.data import _cache, _images, _official, _records, _registry, _tfds, _words
from msjax.data._columns import MOST_TEXTS
from msjax.data._error import DataError
from msjax.data._measure import measure_images

_log = logging.getLogger("msjax")


def check_image_size(image_size: int | None) -> None:
    """None (as they are) or a positive number of pixels."""
    if image_size is not None:
        integer("image_size", image_size, 1)


class _Part(NamedTuple):
    """One split to be written: `read(lo, hi)` gives inputs [n, *shape] of this dtype and labels [n]."""

    count: int
    shape: tuple[int, ...]
    read: Callable[[int, int], tuple[np.ndarray, np.ndarray]]
    dtype: type = np.uint8
    columns: list[dict[str, Any]] | None = None
    """Of a table: what the metadata say of each; see `_table_columns`."""

    @property
    def kind(self) -> str:
        """What the inputs are."""
        return {np.uint8: "image", np.uint32: "text", np.float64: "table"}[self.dtype]

    def statistics(self, inputs: np.ndarray) -> tuple[list[float], list[float]]:
        """Mean and std as `Dataset` has them."""
        if self.kind == "image":
            return measure_images(inputs)
        return [], []  # of texts there are none, and those of a table depend on what is missing


def cached(
    name: str, data_dir: str | os.PathLike | None, cache_dir: str | os.PathLike | None, image_size: int | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and metadata of a set: from the cache, else decoded or downloaded into it."""
    _tfds.check_name(name)
    directory, asked = _tfds.root(data_dir)
    caches = _cache.directory(cache_dir)
    stem = f"{name.replace('/', '--')}-{image_size or 'native'}-"
    problems: list[str] = []

    def read(entry: Path, digest: str | None) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        try:
            found = _cache.read(entry, digest)
            if found:
                _check_meaning(found[1])
            return found
        except _cache.Damaged as damage:
            _log.info("array cache %s: %s; making it again", entry, damage)
            problems.append(f"The array cache {entry} cannot be used ({damage})")
            return None

    folder = _tfds.locate(name, directory)
    entry, digest = caches / (stem + _tfds.place(directory, asked)), _tfds.digest(folder) if folder else None
    if found := read(entry, digest):
        return found
    try:
        if folder is None and asked:
            _tfds.check_root(directory)
        if folder is None and _registry.find(name).sources:
            entry, digest = caches / (stem + "official"), _official.digest(name)
            if found := read(entry, digest):
                return found
            looked = (
                f"looked for {name} in {directory} (has {', '.join(_tfds.prepared(directory)) or 'no prepared set'})"
            )
            parts = {s: _from_arrays(x, y, image_size) for s, x, y in _official.download(name, looked)}
            num_classes, source = _registry.find(name).num_classes, _registry.find(name).sources[0][0]
            classes: list[str] = []
        else:
            folder = _tfds.find(name, directory, asked)
            digest = _tfds.digest(folder)
            splits = {"train": _tfds.open_split(name, folder, "train")}
            with contextlib.suppress(_tfds.NoSplit):  # a share of the other is set aside when it is loaded
                splits["test"] = _tfds.open_split(name, folder, "test")
            known = _known_texts(name, splits["train"])
            parts = {s: _from_tfds(name, s, opened, image_size, known) for s, opened in splits.items()}
            num_classes, source = splits["train"].num_classes, str(directory)
            classes = list(splits["train"].classes)
        meta = {"name": name, "digest": digest, "num_classes": num_classes, "classes": classes, "source": source}
        _build(entry, parts, meta)
    except DataError as error:
        for other in sorted(caches.glob(stem + "*")) if caches.is_dir() else ():
            if other != entry and (made_from := _cache.source(other)):
                problems.append(f"The cache {caches} holds a copy made from {made_from}: give that data_dir to use it")
        if problems:
            raise DataError(f"{error}. {'. '.join(problems)}") from error
        raise
    if found := read(entry, digest):
        return found
    raise DataError(
        f"the array cache {entry} cannot be read after it was written; try again, or name another cache_dir"
    )


def _check_meaning(meta: dict[str, Any]) -> None:
    """Raises `Damaged` where an entry's arrays are what an earlier version took for the texts or the table."""
    if meta["kind"] == "text" and (made := meta.get("tokenizer", 1)) != _words.TOKENIZER:
        raise _cache.Damaged(f"its words are those of tokenizer {made}, this version has {_words.TOKENIZER}")
    if meta["kind"] == "table" and not all("refused" in column for column in meta.get("columns", [{}])):
        raise _cache.Damaged("its table is not kept as it was read, which this version does")


def _from_arrays(images: np.ndarray, labels: np.ndarray, image_size: int | None) -> _Part:
    h, w, c = images.shape[1:]
    shape = (h, w, c) if image_size is None else (image_size, image_size, c)

    def read(lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        x = images[lo:hi]
        return (x if image_size is None else _images.resized(np.ascontiguousarray(x), image_size)), labels[lo:hi]

    return _Part(len(images), shape, read)


def _known_texts(name: str, train: _tfds.Records) -> dict[str, tuple[str, ...]]:
    """The texts of a table's columns of texts, for which all training records are read."""
    if not (isinstance(train.inputs, _records.Columns) and any(f.is_text for f in train.inputs.features)):
        return {}
    return _records.known_texts(_tfds.read(name, train, range(len(train.records))), train.inputs)


def _table_columns(inputs: _records.Columns, known: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """What the metadata say of each column: its name, classes or first texts, how many texts, why it is refused."""
    return [
        {
            "name": name,
            "classes": list(known[name][: MOST_TEXTS + 1] if feature.is_text else feature.classes),
            "texts": len(known[name]) if feature.is_text else 0,
            "refused": feature.refused,
        }
        for feature in inputs.features
        for name in feature.names
    ]


def _from_tfds(
    name: str, split_name: str, split: _tfds.Records, image_size: int | None, known: dict[str, tuple[str, ...]]
) -> _Part:
    count, inputs = len(split.records), split.inputs

    def records(lo: int, hi: int) -> tuple[list[dict[str, Any]], np.ndarray]:
        found = _tfds.read(name, split, range(lo, hi))
        return found, _tfds.labels(name, split, found)

    if isinstance(inputs, _records.Columns):

        def read(lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
            found, labels = records(lo, hi)
            return _records.table_of(found, inputs, known), labels

        columns = _table_columns(inputs, known)
        return _Part(count, (len(columns),), read, np.float64, columns)
    if isinstance(inputs, _records.Texts):
        # All of them at once: how wide the array is follows from the longest.
        found, labels = records(0, count)
        hashes = _words.word_hashes(_records.texts_of(found, inputs))
        return _Part(count, hashes.shape[1:], lambda lo, hi: (hashes[lo:hi], labels[lo:hi]), np.uint32)
    h, w, c = inputs.shape
    _images.pillow()  # say so now, not in a worker
    if image_size is not None:
        h = w = image_size
    if h is None or w is None:
        raise DataError(
            f"the images of {name} differ in size: give image_size to load them as arrays, or use data.stream"
        )

    def read_images(lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        found, labels = records(lo, hi)
        images = np.empty((len(found), h, w, c), np.uint8)
        for i, record in enumerate(found):
            with _images.decoding(f"image {lo + i} of {name} ({split_name})"):
                images[i] = _images.decode_as(_records.value(record, inputs.key), (h, w, c), image_size)
        return images, labels

    return _Part(count, (h, w, c), read_images)


def _build(entry: Path, parts: dict[str, _Part], meta: dict[str, Any]) -> None:
    """Write every split into a new entry of the cache, in chunks, on all cores."""
    _log.info("decoding %s into the array cache %s", meta["name"], entry)
    with _cache.writing(entry) as draft:
        for split, part in parts.items():
            inputs = draft.array(f"{split}_inputs", (part.count, *part.shape), part.dtype)
            labels = draft.array(f"{split}_labels", (part.count,), np.int32)

            def fill(lo: int, part: _Part = part, inputs: np.ndarray = inputs, labels: np.ndarray = labels) -> None:
                hi = min(lo + 500, part.count)
                inputs[lo:hi], labels[lo:hi] = part.read(lo, hi)

            for_each(fill, range(0, part.count, 500))
            if split == "train":
                meta["kind"] = part.kind
                meta["mean"], meta["std"] = part.statistics(inputs)
                if part.columns:
                    meta["columns"] = part.columns
                if part.kind == "text":
                    meta["tokenizer"] = _words.TOKENIZER
        draft.meta = meta


def for_each(function: Callable[[int], None], items: Sequence[int], *, threads: int | None = None) -> None:
    """Call on each item, by default on a thread a core; the first exception stops the rest."""
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        try:
            for _ in pool.map(function, items):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
