"""`load`: a data set by its name."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from msjax.data import _embedded, _records, _registry, _sets, _stream, _tfds
from msjax.data._arrays import share_indices
from msjax.data._as_dataset import from_path, is_path
from msjax.data._check import check
from msjax.data._columns import MOST_TEXTS, Column, Missing, check_missing, measure_table, table_inputs, too_many_texts
from msjax.data._dataset import Arrays, Dataset
from msjax.data._error import DataError
from msjax.data._measure import measure_images


def load(
    name: str = "digits",
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    text_length: int = _records.TEXT_LENGTH,
    vocabulary: int = _records.VOCABULARY,
    missing: Missing = "refuse",
    drop: Sequence[str] = (),
    test_share: float | None = 0.2,
    streamed: bool | None = None,
    **options: Any,
) -> Dataset:
    """Load a classification set of images, texts or a table: as arrays, from the cache where it was decoded before.

    `digits` comes with this package: 8x8x1, 1,437 train and 360 test (36 a class), no download; so is a table,
    `breast_cancer`: 30 columns, 455 train and 114 test (57 a class). Any other set is looked for as
    `data_dir`/NAME/VERSION, prepared by TFDS as array_record; `cifar10`, `cifar100`, `mnist`, `fashion_mnist` are
    otherwise downloaded from their authors' sites, and what else TFDS knows is prepared by TFDS.
    The test data are the split `test`, else `validation` (ImageNet, and sets that hide the labels of `test`:
    `validation` first). Of a set that has neither, `test_share` of the training examples is set aside.

    A name that ends in .npz, .csv or .txt, or has a separator and is a folder (./photos), is read by `from_npz`,
    `from_csv`, `from_text` or `from_image_folder`, with `image_size` and `options`.

    A set with an image is one of images, else one with texts is of those, else all features are columns of a table.
    Its numbers are centred and scaled in float64 by the training rows, then float32; `columns` of the data set says
    how. Features in dicts are columns, too, and so is each number of a vector. Texts of which the training rows have at
    most 100 different ones are classes (as they are where the set's features are strings; a feature that TFDS calls
    `Text` makes a set one of texts).

    Images are decoded as by `from_image_folder`: turned as EXIF says, transparent pixels over black, of more than 8
    bits the upper 8.

    Texts are normalised and split into words and punctuation (`_words.words` has the rules); each word's token is a
    hash of it.

    With `streamed=True` images are decoded as they are read, with the same pixels, mean and std as in memory; what a
    pass over the set finds (mean and std, where none are published) is kept in the cache. `imagenet2012`, too large for
    memory, is streamed by default; its training images are random-resized-crops, and its test images the middle, see
    `stream`.

    The cache is keyed by name, directory and `image_size`. Where the prepared set is at hand, an entry made from
    another version of it is rebuilt; where it is not, the entry alone is enough: neither TFDS nor the directory is
    needed then.

    Args:
        name: `set` or `set/config`.
        data_dir: TFDS data directory; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.
        cache_dir: where decoded arrays are kept; by default $MSJAX_CACHE, $XDG_CACHE_HOME/msjax or ~/.cache/msjax.
        image_size: resize the shorter side to this and crop the middle; needed where a set's images differ in size.
            Of `imagenet2012` as a stream: the side of the crops, 224 by default.
        text_length: tokens of a text; longer ones are cut, shorter ones padded.
        vocabulary: how many tokens there are. Words get theirs by a hash, see `_records.tokens`.
        missing: of a table: "refuse" values that are NaN or infinite, naming row and column; or take the "median" of
            the training rows for them and add a column that says which were missing, see `from_csv`. The array cache
            keeps a table as it is, so both come from one entry.
        drop: columns of a table that are not used; a vector's or a dict's name stands for all its columns.
        test_share: of a set without test data and of one's own: this part of the training examples is set aside, of
            each class alike, always the same; None: nothing. Mean and std are those of the others.
        streamed: read images as they are needed rather than into memory; by default as the set needs it. Of a path:
            of a folder of images, see `from_image_folder`.
        **options: of the adapter, where `name` is a path.

    Raises:
        DataError: the set is unknown, missing, unreadable or not a classification set of one of these kinds; it has
            labels out of range or numbers that are not finite; no network; a package is missing.
        ValueError: `image_size`, `text_length` or `vocabulary` is too small.
    """
    _sets.check_image_size(image_size)
    _records.check_tokens(text_length, vocabulary)
    check_missing(missing)
    if is_path(name):
        options |= ({"drop": drop} if drop else {}) | ({} if streamed is None else {"streamed": streamed})
        return from_path(name, image_size=image_size, missing=missing, test_share=test_share, **options)
    drop = (drop,) if isinstance(drop, str) else tuple(drop)
    if options:
        raise TypeError(f"load takes {', '.join(options)} only where name is a path, got {name!r}")
    entry = _registry.find(name)
    if entry.streamed if streamed is None else streamed:
        _refuse_options(name, missing, drop, "images")
        return _streamed(name, entry, test_share, image_size, {"data_dir": data_dir, "cache_dir": cache_dir})
    if entry.test_of_class is not None:
        if name == "digits":
            _refuse_options(name, missing, drop, "images")
        if drop:
            raise DataError(f"drop must be empty for {name}, whose columns have no names, got {', '.join(drop)}")
        return check(_embedded.load(name, image_size))
    arrays, meta = _sets.cached(name, data_dir, cache_dir, image_size)
    labels = {
        split: np.asarray(arrays[f"{split}_labels"]) for split in ("train", "test") if f"{split}_labels" in arrays
    }
    chosen: dict[str, Any] = dict.fromkeys(labels, slice(None))
    if "test" not in labels:
        chosen = {"train": slice(None), "test": slice(0)}
        if test_share is not None:
            chosen = dict(zip(chosen, share_indices(labels["train"], test_share, 0), strict=True))
    origin = {split: split if split in labels else "train" for split in chosen}
    inputs = {split: arrays[f"{origin[split]}_inputs"][rows] for split, rows in chosen.items()}
    targets = {split: labels[origin[split]][rows] for split, rows in chosen.items()}
    if meta["kind"] == "table":
        return _table(name, inputs, targets, meta, missing, drop, entry.augment)
    _refuse_options(name, missing, drop, f"{meta['kind']}s")
    if meta["kind"] == "text":
        inputs = {split: _records.tokens(hashes, text_length, vocabulary) for split, hashes in inputs.items()}
    mean, std = (entry.mean, entry.std) if entry.mean else (meta["mean"], meta["std"])
    if meta["kind"] == "image" and not entry.mean and "test" not in labels:
        mean, std = measure_images(inputs["train"])
    train, test = (Arrays(inputs[split], targets[split]) for split in ("train", "test"))
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    ds = Dataset(name, train, test, meta["num_classes"], mean, std, entry.augment, meta.get("tokenizer"))
    return check(dataclasses.replace(ds, classes=_class_names(meta)))


def _streamed(
    name: str, entry: _registry.Entry, test_share: float | None, image_size: int | None, where: dict[str, Any]
) -> Dataset:
    """A set of images that are decoded as they are read."""
    if entry.test_of_class is not None:
        raise DataError(f"streamed must be None or False for {name}, which comes with this package, got True")
    if entry.random_crop:
        size = _stream.IMAGE_SIZE if image_size is None else image_size
        train, test = (_stream.stream(name, split, image_size=size, **where) for split in ("train", "test"))
    else:
        options = where | {"image_size": image_size, "crop": "whole"}
        train = _stream.stream(name, "train", **options)
        try:
            test = _stream.stream(name, "test", **options)
        except _tfds.NoSplit:
            chosen = np.arange(len(train)), np.arange(0)
            if test_share is not None:
                chosen = share_indices(train.labels(), test_share, 0)
            train, test = map(train.only, chosen)
    mean, std = (train.mean, train.std) if entry.mean or entry.random_crop else train.measure()
    return check(Dataset(name, train, test, train.num_classes, mean, std, entry.augment, classes=train.classes))


def _class_names(meta: dict[str, Any]) -> tuple[str, ...] | None:
    """What the classes are called, where the prepared set said it and this version made the entry."""
    return tuple(meta.get("classes", ())) or None


def _refuse_options(name: str, missing: str, drop: tuple[str, ...], kind: str) -> None:
    """Of a table alone something may be missing or left out."""
    for option, given, default in (("missing", missing, '"refuse"'), ("drop", drop, "empty")):
        if given and given != "refuse":
            raise DataError(f"{option} must be {default} for {name}, a set of {kind} and not a table, got {given!r}")


def _table(
    name: str,
    inputs: dict[str, np.ndarray],
    targets: dict[str, np.ndarray],
    meta: dict[str, Any],
    missing: str,
    drop: tuple[str, ...],
    augment: str,
) -> Dataset:
    """The columns as inputs, by what the training rows say."""
    used = _used(name, meta["columns"], drop)
    like = [Column(meta["columns"][i]["name"], tuple(meta["columns"][i]["classes"])) for i in used]
    tables = {split: table[:, used] for split, table in inputs.items()}
    columns = measure_table(like, tables["train"], missing, f"{name} (train)")
    train, test = (
        Arrays(table_inputs(columns, tables[split], f"{name} ({split})"), targets[split]) for split in ("train", "test")
    )
    options = {"columns": columns, "classes": _class_names(meta)}
    ds = Dataset(name, train, test, meta["num_classes"], None, None, augment, **options)
    return check(ds, [input_name for column in columns for input_name in column.names])


def _used(name: str, columns: list[dict[str, Any]], drop: tuple[str, ...]) -> list[int]:
    """Which columns of a table are inputs; all of them must be such that they can be."""
    names = [column["name"] for column in columns]
    dropped = {d: {n for n in names if n == d or n.startswith(f"{d}/")} for d in drop}
    if unknown := [d for d, found in dropped.items() if not found]:
        raise DataError(f"drop must name columns of {name}, which has {', '.join(names)}, got {unknown[0]!r}")
    used = [i for i, n in enumerate(names) if n not in set().union(*dropped.values())]
    if not used:
        raise DataError(f"drop must leave columns of {name}, got all of them: {', '.join(drop)}")
    for column in (columns[i] for i in used):
        if column["refused"]:
            raise DataError(f"column {column['name']!r} of {name} {column['refused']}: leave it out by drop")
        if (count := column["texts"]) > MOST_TEXTS:
            raise too_many_texts(column["name"], count, column["classes"][0], MOST_TEXTS, "leave it out by drop")
    return used
