"""`load`: a data set by its name."""

import os
from typing import Any

import numpy as np

from msjax.data import _embedded, _records, _registry, _sets, _stream
from msjax.data._as_dataset import from_path, is_path
from msjax.data._check import check
from msjax.data._columns import Column, Missing, check_missing, measure_table, table_inputs
from msjax.data._dataset import Arrays, Dataset
from msjax.data._error import DataError


def load(
    name: str = "digits",
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    text_length: int = _records.TEXT_LENGTH,
    vocabulary: int = _records.VOCABULARY,
    missing: Missing = "refuse",
    streamed: bool | None = None,
    **options: Any,
) -> Dataset:
    """Load a classification set of images, texts or a table: as arrays, from the cache where it was decoded before.

    `digits` comes with this package: 8x8x1, 1,437 train and 360 test (36 a class), no download; so is a table,
    `breast_cancer`: 30 columns, 455 train and 114 test (57 a class). Any other set is looked for as
    `data_dir`/NAME/VERSION, prepared by TFDS as array_record; `cifar10`, `cifar100`, `mnist`, `fashion_mnist` are
    otherwise downloaded from their authors' sites, and what else TFDS knows is prepared by TFDS.
    The test data are the split `test`, else `validation` (ImageNet, and sets that hide the labels of `test`:
    `validation` first).

    A name that ends in .npz or .csv, or has a separator and is a folder (./photos), is read by `from_npz`, `from_csv`
    or `from_image_folder`, with `image_size` and `options`.

    A set with an image is one of images, else one with texts is of those, else all features are columns of a table.
    Its numbers are centred and scaled in float64 by the training rows, then float32; `columns` of the data set says
    how.

    Images are decoded as by `from_image_folder`: turned as EXIF says, transparent pixels over black, of more than 8
    bits the upper 8.

    Texts are normalised and split into words and punctuation (`_words.words` has the rules); each word's token is a
    hash of it.

    A set too large for memory (`imagenet2012`) comes as splits that are read and cropped batch by batch, see `stream`;
    so does any set of images with `streamed=True`.

    The cache is keyed by name, directory and `image_size`. Where the prepared set is at hand, an entry made from
    another version of it is rebuilt; where it is not, the entry alone is enough: neither TFDS nor the directory is
    needed then.

    Args:
        name: `set` or `set/config`.
        data_dir: TFDS data directory; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.
        cache_dir: where decoded arrays are kept; by default $MSJAX_CACHE, $XDG_CACHE_HOME/msjax or ~/.cache/msjax.
        image_size: resize the shorter side to this and crop the middle; needed where a set's images differ in size.
            Of a streamed set: the side of the crops, 224 by default.
        text_length: tokens of a text; longer ones are cut, shorter ones padded.
        vocabulary: how many tokens there are. Words get theirs by a hash, see `_records.tokens`.
        missing: of a table: "refuse" values that are NaN or infinite, naming row and column; or take the "median" of
            the training rows for them and add a column that says which were missing, see `from_csv`. The array cache
            keeps a table as it is, so both come from one entry.
        streamed: read images as they are needed rather than into memory; by default as the set needs it.
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
        return from_path(name, image_size=image_size, missing=missing, **options)
    if options:
        raise TypeError(f"load takes {', '.join(options)} only where name is a path, got {name!r}")
    entry = _registry.find(name)
    if entry.streamed if streamed is None else streamed:
        _refuse_missing(name, missing, "images")
        size = _stream.IMAGE_SIZE if image_size is None else image_size
        options = {"data_dir": data_dir, "cache_dir": cache_dir, "image_size": size}
        train, test = (_stream.stream(name, split, **options) for split in ("train", "test"))
        return Dataset(name, train, test, train.num_classes, train.mean, train.std, entry.augment)
    if entry.test_of_class is not None:
        if name == "digits":
            _refuse_missing(name, missing, "images")
        return check(_embedded.load(name, image_size))
    arrays, meta = _sets.cached(name, data_dir, cache_dir, image_size)
    if meta["kind"] == "table":
        return _table(name, arrays, meta, missing, entry.augment)
    _refuse_missing(name, missing, f"{meta['kind']}s")
    mean, std = (entry.mean, entry.std) if entry.mean else (meta["mean"], meta["std"])
    splits = []
    for split in ("train", "test"):
        inputs = arrays[f"{split}_inputs"]
        if meta["kind"] == "text":
            inputs = _records.tokens(inputs, text_length, vocabulary)
        splits.append(Arrays(inputs, np.asarray(arrays[f"{split}_labels"])))
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    tokenizer = meta.get("tokenizer")
    return check(Dataset(name, *splits, meta["num_classes"], mean, std, entry.augment, tokenizer))


def _refuse_missing(name: str, missing: str, kind: str) -> None:
    """Of a table alone something may be missing."""
    if missing != "refuse":
        raise DataError(f'missing must be "refuse" for {name}, a set of {kind} and not a table, got {missing!r}')


def _table(name: str, arrays: dict[str, np.ndarray], meta: dict[str, Any], missing: str, augment: str) -> Dataset:
    """The columns as inputs, by what the training rows say."""
    like = [Column(column["name"], tuple(column["classes"])) for column in meta["columns"]]
    columns = measure_table(like, arrays["train_inputs"], missing, f"{name} (train)")
    splits = (
        Arrays(
            table_inputs(columns, arrays[f"{split}_inputs"], f"{name} ({split})"), np.asarray(arrays[f"{split}_labels"])
        )
        for split in ("train", "test")
    )
    ds = Dataset(name, *splits, meta["num_classes"], None, None, augment, columns=columns)
    return check(ds, [input_name for column in columns for input_name in column.names])
