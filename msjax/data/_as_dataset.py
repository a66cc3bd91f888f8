"""From whatever a user has to a `Dataset`."""

import os
from pathlib import Path
from typing import Any

from msjax.data import _tfds
from msjax.data._arrays import find_names, from_arrays, from_npz
from msjax.data._check import SPLIT_NAMES, TEST_NAMES, check
from msjax.data._csv import from_csv
from msjax.data._dataset import Dataset
from msjax.data._error import DataError
from msjax.data._folder import from_image_folder, is_image
from msjax.data._sequence import from_sequence
from msjax.data._text import from_text
from msjax.data._text_sources import TEXT_SUFFIXES

FILE_SUFFIXES = (".npz", ".csv", *TEXT_SUFFIXES)
"""Of files that are data sets by themselves."""
_UNUSED = ("unsupervised",)
"""Splits of published sets that are neither trained nor tested on."""


def as_dataset(value: Any, **options: Any) -> Dataset:
    """Make a `Dataset` of what there is.

    Args:
        value: a `Dataset`, which is checked and returned; (inputs, labels) of arrays, or two such pairs, to train and
            to test on, or four arrays in that order; a dict of arrays as an .npz file has them, or of such pairs or
            sequences under "train" and "test"; a path of an .npz, .csv, .txt or .jsonl file or a folder of images; the
            name of a set that `load` knows; anything with `__len__` and `__getitem__`.
        **options: those of `from_arrays`, `from_npz`, `from_csv`, `from_image_folder`, `from_sequence`, `from_text` or
            `load`.

    Raises:
        DataError: `value` is none of these, or the data break a rule.
        TypeError: an option is not of the adapter that is used.
    """
    if isinstance(value, Dataset):
        if options:
            raise TypeError(f"a Dataset takes no options, got {', '.join(options)}: dataclasses.replace changes it")
        return check(value)
    if isinstance(value, os.PathLike) or (isinstance(value, str) and is_path(value)):
        return from_path(value, **options)
    if isinstance(value, str):
        from msjax.data._load import load

        return load(value, **options)
    if isinstance(value, tuple):
        return _from_tuple(value, options)
    if isinstance(value, dict) and "train" in value:
        if unknown := [name for name in value if name not in ("train", *TEST_NAMES, *_UNUSED)]:
            raise DataError(f"data must have its splits as {SPLIT_NAMES}, got {unknown[0]!r}, which would not be used")
        test = next((value[name] for name in TEST_NAMES if name in value), None)
        return _from_parts(value["train"], test, options)
    if isinstance(value, dict):
        found = [value[name] for name in find_names(list(value), "the dict")]
        return _from_tuple(tuple(found), options)
    if _is_sequence(value):
        return from_sequence(value, **options)
    if _is_array(value):
        hint = ": give (table.drop(columns=LABEL), table[LABEL])" if hasattr(value, "columns") else ""
        raise DataError(f"data must be (inputs, labels), got one {type(value).__name__}{hint}")
    raise DataError(
        "data must be a Dataset, arrays (inputs, labels), a path of an .npz, .csv, .txt or .jsonl file or a folder of "
        f"images, the name of a set, or have __len__ and __getitem__, got {type(value).__name__}" + _hint(value)
    )


def _hint(value: Any) -> str:
    """What to give in place of a value that cannot be data."""
    if isinstance(value, list) and len(value) == 2:
        return ": give (inputs, labels) as a tuple"
    if _is_sequence(getattr(value, "dataset", None)):
        return ": batches and their order are msjax's own, so give its .dataset"
    if hasattr(value, "__iter__") and not hasattr(value, "__getitem__"):
        return ": samples are drawn anew in each epoch, so they must be found by number, not only one after the other"
    return ""


def _from_tuple(value: tuple, options: dict[str, Any]) -> Dataset:
    if len(value) == 4:
        return from_arrays(value[:2], value[2:], **options)
    if len(value) == 2 and all(isinstance(part, tuple) and len(part) == 2 for part in value):
        try:
            return from_arrays(*value, **options)
        except DataError as error:
            one, other = (getattr(inputs, "shape", ())[1:] for inputs, _ in value)
            if one == other:
                raise
            raise DataError(
                f"{error} (a tuple of two pairs is taken for what to train and what to test on; inputs or labels that "
                "are several arrays can be dicts)"
            ) from error
    if len(value) == 2 and all(_is_sequence(part) for part in value):
        return from_sequence(*value, **options)
    if len(value) == 2:
        return from_arrays(value, **options)
    raise DataError(f"data must be (inputs, labels), two such pairs or four arrays, got a tuple of {len(value)}")


def _from_parts(train: Any, test: Any, options: dict[str, Any]) -> Dataset:
    if isinstance(train, tuple):
        return from_arrays(train, test, **options)
    if isinstance(train, dict):
        names = find_names(list(train), "train")
        if isinstance(test, dict) and (lacking := [name for name in names if name not in test]):
            raise DataError(f"test must have the arrays of train, {', '.join(names)}, got none named {lacking[0]!r}")
        pairs = [part and tuple(part[name] for name in names) for part in (train, test)]
        return from_arrays(*pairs, **options)
    return from_sequence(train, test, **options)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__") or hasattr(value, "__dlpack__")


def _is_sequence(value: Any) -> bool:
    """Random access to items; a list only where the items are pairs or dicts."""
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], tuple | dict)
    if isinstance(value, str | bytes | tuple | dict) or _is_array(value):
        return False
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def is_path(name: str) -> bool:
    """Whether a name is one of a file or folder: ends as one of `FILE_SUFFIXES`, or has a separator and is a folder.

    A folder that TFDS prepared, such as glue/sst2 in the working directory, is no folder of images.
    """
    if name.lower().endswith(FILE_SUFFIXES):
        return True
    separators = {"/", os.sep}
    folder = Path(os.path.expanduser(name))  # as it is where the user has no home folder
    return any(s in name for s in separators) and folder.is_dir() and not _tfds.is_prepared(folder)


def holds_images(path: str | os.PathLike) -> bool:
    """Whether a folder has images in folders, and is no set that TFDS prepared."""
    folder = Path(os.path.expanduser(path))
    return folder.is_dir() and not _tfds.is_prepared(folder) and any(map(is_image, folder.glob("[!.]*/**/*")))


def from_path(path: str | os.PathLike, **options: Any) -> Dataset:
    """A data set of an .npz, .csv, .txt or .jsonl file, or a folder of images.

    Raises:
        DataError: it is none of them, or cannot be read.
        TypeError: an option is not of the adapter that is used.
    """
    path = Path(path).expanduser()
    kind = path.suffix.lower()
    if kind != ".csv" and (drop := options.pop("drop", ())):
        raise DataError(f"drop is for columns of tables with names, got {drop!r} with {path}")
    if kind in FILE_SUFFIXES and not path.is_dir():
        if not path.exists():
            raise DataError(f"{path} does not exist")
        if options.pop("image_size", None) is not None:
            raise DataError(f"image_size is for folders of images and sets by name, got it with {path}")
        if options.pop("streamed", None):
            raise DataError(f"streamed must be None or False for {path}, which is read whole, got True")
        if kind in TEXT_SUFFIXES:
            if (missing := options.pop("missing", "refuse")) != "refuse":
                raise DataError(f'missing must be "refuse" for texts and not a table, got {missing!r} with {path}')
            if lacking := [name for name in ("tokenizer", "length") if name not in options]:
                raise DataError(f"{lacking[0]} must be given for {path}, see from_text: texts become tokens of a model")
            return from_text(path, **options)
        return (from_npz if kind == ".npz" else from_csv)(path, **options)
    if path.is_dir():
        if (missing := options.pop("missing", "refuse")) != "refuse":
            raise DataError(
                f'missing must be "refuse" for a folder of images and not a table, got {missing!r} with {path}'
            )
        return from_image_folder(path, **({"image_size": None} | options))
    raise DataError(f"{path} must be an .npz, .csv or .txt file or a folder of images")
