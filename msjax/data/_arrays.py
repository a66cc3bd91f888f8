"""Arrays and .npz files as data sets."""

import dataclasses
import logging
import numbers
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from msjax.data._check import check, check_classes, check_inputs
from msjax.data._columns import Column, Missing, check_missing, measure_table, standardized, table_inputs
from msjax.data._convert import convert_inputs, convert_labels, unrounded
from msjax.data._dataset import Arrays, Dataset, Split, Tree, named_arrays
from msjax.data._error import DataError
from msjax.data._measure import measure_images, measure_last_axis

_log = logging.getLogger("msjax")
_SHARE = 4  # keeps this stream of random numbers apart from those of the other modules
_MEASURED = 1000  # examples that the mean and std of a split are measured on where it is not in memory

TRAIN_AND_TEST = (
    ("x_train", "y_train", "x_test", "y_test"),  # Keras
    ("X_train", "y_train", "X_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),  # MedMNIST
    ("train_inputs", "train_labels", "test_inputs", "test_labels"),
)
TOGETHER = (("x", "y"), ("X", "y"), ("inputs", "labels"), ("images", "labels"), ("data", "labels"), ("data", "target"))


def from_arrays(
    train: tuple[Tree, Tree],
    test: tuple[Tree, Tree] | None = None,
    *,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    test_share: float | None = None,
    normalize: bool = False,
    missing: Missing = "refuse",
    name: str = "arrays",
    seed: int = 0,
) -> Dataset:
    """Make a data set of arrays.

    Inputs are an array (N, ...), or a dict or tuple of arrays; NumPy's, JAX's, PyTorch's or what else `np.asarray`
    takes. uint8 stays, other integers (tokens) become int32, floats float32. Bools become float32 where they are the
    only array, and stay what they are, such as masks, beside others. uint8 (N, H, W, C), or (N, H, W), which gets a
    channel, are images: their mean and std are measured on the training images and applied by `data.normalize`. Other
    integers of such a shape, (N, H, W, 1) or (N, H, W, 3), are refused: as tokens they would not be divided by 255.
    Everything else is taken as it is, unless `normalize`.

    Labels are of any shape. Integers (N,) or (N, 1) are classes. Other labels (floats to predict, integers for each
    pixel or token) become float32 or int32, and `num_classes` is what it is given as.

    Args:
        train: (inputs, labels).
        test: the same for testing; without it and `test_share` the set has no test data.
        num_classes: by default one more than the largest label, or the number of `classes`.
        classes: names of the classes, in order.
        test_share: instead of `test`: this part of `train` is set aside, at random, of each class alike.
        normalize: standardise numbers (N, ..., C), floats or integers, by mean and std of the training inputs, one each
            of the last axis. A table (N, F), and what is not float32, is centred and scaled in float64, before float32
            would round what large numbers differ in, such as dates; `columns` of the data set says how. float32 of
            more axes is not copied: `mean` and `std` are for `data.normalize`. Without this a table of float64 is
            refused where float32 would leave little of what a column's values differ in.
        missing: "refuse" NaN and infinite inputs; or, of a table, floats (N, F), take the "median" of the training rows
            for them, and behind each column that training rows miss values of add one that says which, see `from_csv`.
        name: for messages and records.
        seed: chooses what is set aside.

    Raises:
        DataError: the arrays break a rule of `check`, are no numbers, or differ in length; `test` is empty or
            `test_share` leaves one side without examples.
    """
    train_split = _converted(train, "train", normalize)
    if test is None:
        train_split, test_split = share_out(train_split, test_share, seed)
    else:
        if test_share is not None:
            raise DataError(f"test_share must be None where test is given, got {test_share}")
        test_split = _converted(test, "test", normalize)
        _check_columns(train[0], test[0])
        if not len(test_split):
            raise DataError("test must have examples, got none: leave it out where there is no test set")
        if normalize:
            train_split, test_split = _of_one_float(train_split, test_split)
    options = {
        "normalize": normalize,
        "missing": missing,
        "classes": None if classes is None else check_classes(classes),
    }
    return finish(name, train_split, test_split, num_classes=num_classes, **options)


def _converted(pair: Any, role: str, normalize: bool) -> Arrays:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        found = f"{len(pair)} of them" if isinstance(pair, tuple | list) else type(pair).__name__
        raise DataError(f"{role} must be (inputs, labels), got {found}")
    inputs = convert_inputs(pair[0], f"{role} inputs", wide=normalize)
    if not normalize and role == "train":
        _check_resolution(pair[0], f"{role} inputs")
    return Arrays(inputs, convert_labels(pair[1], f"{role} labels"))


def _check_columns(train: Any, test: Any) -> None:
    """Raises where two tables have columns of other names, or in another order: arrays do not know them any more."""
    names = (getattr(inputs, "column_names", None) or getattr(inputs, "columns", ()) for inputs in (train, test))
    mine, theirs = map(list, names)
    if mine and theirs and mine != theirs:
        at = next(n for n in range(max(len(mine), len(theirs))) if mine[n : n + 1] != theirs[n : n + 1])
        found = [names[at] if at < len(names) else "none" for names in (mine, theirs)]
        has_order = sorted(mine, key=str) == sorted(theirs, key=str) and hasattr(test, "iloc")  # of pandas
        advice = ": test[train.columns] puts them in order" if has_order else ""
        raise DataError(
            f"test must have the columns of train, in the same order, got {found[1]!r} in place of {found[0]!r} as "
            f"column {at}{advice}"
        )


def _check_resolution(tree: Tree, role: str) -> None:
    """Raises where rounding to float32 leaves little of what the numbers of a table differ in, such as dates."""
    for name, value in named_arrays(tree, role):
        array = unrounded(value, name)
        if array is None or array.ndim not in (1, 2) or not len(array):
            continue
        array = array.reshape(len(array), -1)
        known = np.isfinite(array)  # others are told of elsewhere, or filled in
        count = np.maximum(known.sum(0), 1)
        with np.errstate(all="ignore"):
            # From the first of each column, so that equal numbers differ by 0.
            array_from = np.where(known, array - array[known.argmax(0), np.arange(array.shape[1])], 0)
            centred = np.where(known, array_from - array_from.sum(0) / count, 0)
            spread = np.sqrt((centred**2).sum(0) / count)
            most = np.where(known, np.abs(array), 0).max(0).astype(np.float32)
            coarse = (spread > 0) & (spread < 100 * np.spacing(most))
        if coarse.any():
            at = int(np.flatnonzero(coarse)[0])
            raise DataError(
                f"{name} must be such as float32 tells apart, got numbers up to {most[at]:.9g} in column {at}, where "
                f"it has steps of {np.spacing(most[at]):.3g} and they differ by {spread[at]:.3g}: "
                "normalize=True centres them first"
            )


def _of_one_float(*splits: Arrays) -> list[Arrays]:
    """Floats of one dtype, the wider one of the two, where they are not rounded to float32 yet."""
    inputs = [split.inputs for split in splits]
    if all(isinstance(x, np.ndarray) and x.dtype in (np.float32, np.float64) for x in inputs):
        dtype = np.result_type(*inputs)
        return [Arrays(x.astype(dtype, copy=False), split.targets) for x, split in zip(inputs, splits, strict=True)]
    return list(splits)


def share_out(split: Arrays, test_share: float | None, seed: int) -> tuple[Arrays, Arrays]:
    """Train and test, of each class `test_share` for testing; None: nothing."""
    if test_share is None:
        return split, Arrays(*split[:0])
    train, test = share_indices(split.targets if are_classes(split.label_like) else len(split), test_share, seed)
    return Arrays(*split[train]), Arrays(*split[test])


def share_indices(labels: np.ndarray | int, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train and to test on, each in order; `labels` are classes, or only the number of examples."""
    if not isinstance(test_share, numbers.Real) or not 0 < test_share < 1:
        raise DataError(f"test_share must be between 0 and 1, or None for no test set, got {test_share!r}")
    count = labels if isinstance(labels, int) else len(labels)
    classes = np.zeros(count, np.int32) if isinstance(labels, int) else labels
    rng = np.random.default_rng([_SHARE, seed])
    _, classes, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    wanted = sizes * test_share
    amounts = np.floor(wanted).astype(int)
    # What rounding down leaves goes to the classes that lost most by it.
    most = np.lexsort((rng.permutation(len(sizes)), amounts - wanted))
    amounts[most[: round(count * test_share) - amounts.sum()]] += 1
    is_test = np.zeros(count, bool)
    for c, amount in enumerate(amounts):
        is_test[rng.permutation(np.flatnonzero(classes == c))[:amount]] = True
    if is_test.all() or not is_test.any():
        side = "train" if is_test.all() else "test"
        raise DataError(f"test_share must leave examples to {side} on, got {test_share} of {count} examples")
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def are_classes(label_like: Tree) -> bool:
    """Whether a label is one integer."""
    return isinstance(label_like, jax.ShapeDtypeStruct) and label_like.shape == () and label_like.dtype == np.int32


def finish(
    name: str,
    train: Split,
    test: Split,
    *,
    num_classes: int | None = None,
    normalize: bool = False,
    missing: Missing = "refuse",
    columns: tuple[Column, ...] | None = None,
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    """The data set of two splits of converted arrays: classes counted, inputs measured, everything checked.

    `columns` are those of a table that is standardised already, `classes` the names of the classes.
    """
    if num_classes is None and classes is not None:
        num_classes = len(classes)
    if num_classes is None and are_classes(train.label_like) and len(train):
        if not (train.in_memory and test.in_memory):
            raise DataError(f"num_classes must be given for {name}: its labels are not in memory to be counted")
        labels = [s.targets for s in (train, test) if len(s)]
        least, most = min(int(one.min()) for one in labels), max(int(one.max()) for one in labels)
        num_classes = max(most + 1, 1)  # a negative label is told of below
        if least > 0:
            _log.warning(
                "labels of %s are from %d to %d; they count from 0, so the classes below %d have no samples. Where "
                "this is meant, classes or num_classes says so",
                *(name, least, most, least),
            )
    kind = _kind(train.input_like, normalize, missing)
    if kind in ("table", "numbers") and len(train) and not (len(test) and test.input_like != train.input_like):
        train, test, columns = _standardized(train, test, kind, normalize, missing)
    names = [one for column in columns for one in column.names] if columns else None
    ds = check(Dataset(name, train, test, num_classes, None, None, columns=columns, classes=classes), names)
    _warn_of_channels(name, train.input_like)
    if kind in ("images", "floats"):
        mean, std = (measure_images if kind == "images" else measure_last_axis)(_some(train))
        ds = dataclasses.replace(ds, mean=np.asarray(mean, np.float32), std=np.asarray(std, np.float32))
    return ds


def _warn_of_channels(name: str, like: Tree) -> None:
    """Floats may have any axes; those of an image as PyTorch has it are told."""
    shape = getattr(like, "shape", ())
    if len(shape) == 3 and shape[0] in (1, 3) and shape[1] == shape[2] > 4 and like.dtype == np.float32:
        said = "inputs of %s, %s each, look like images with their channels first; Flax takes them last: "
        _log.warning(said + "np.moveaxis(array, -3, -1)", name, shape)


def _kind(like: Tree, normalize: bool, missing: str) -> str:
    """What is done to inputs: images and floats are measured, a table and numbers standardised, others left alone.

    Floats are float32 of more axes than a table, which need not be copied; numbers are those that float32 would round.
    """
    check_missing(missing)
    single = isinstance(like, jax.ShapeDtypeStruct)
    is_float = single and like.dtype in (np.float32, np.float64)
    if missing != "refuse" and not (is_float and len(like.shape) == 1):
        raise DataError(
            f'missing must be "refuse" for inputs that are no table, floats (N, F), got {missing!r} with {like}'
        )
    if single and like.dtype == np.uint8 and len(like.shape) == 3:
        return "images"
    if not normalize and missing == "refuse":
        return "as they are"
    if not (is_float and like.shape):
        raise DataError(f"normalize must be False for inputs that are no images or one array of numbers, got {like}")
    if len(like.shape) == 1:
        return "table"
    return "floats" if like.dtype == np.float32 else "numbers"


def _standardized(
    train: Split, test: Split, kind: str, normalize: bool, missing: str
) -> tuple[Split, Split, tuple[Column, ...]]:
    """Inputs in float64 made float32, by what the training data say."""
    inputs = _some(train)
    columns = tuple(Column(str(i)) for i in range(inputs.shape[-1]))
    if kind == "table":
        columns = measure_table(columns, inputs, missing, "train inputs", are_scaled=normalize)
    else:
        check_inputs(inputs, "train inputs")
        statistics = zip(*measure_last_axis(inputs), strict=True)
        columns = tuple(
            c._replace(mean=float(mean), std=float(std)) for c, (mean, std) in zip(columns, statistics, strict=True)
        )
    if not normalize:
        columns = tuple(column._replace(mean=0.0, std=1.0) for column in columns)
    splits = [
        split.standardized(columns)
        if not split.in_memory
        else Arrays(
            table_inputs(columns, split.inputs, where) if kind == "table" else standardized(split.inputs, columns),
            split.targets,
        )
        for split, where in ((train, "train inputs"), (test, "test inputs"))
    ]
    return splits[0], splits[1], columns


def _some(split: Split) -> np.ndarray:
    """The inputs of a split, or of 1,000 examples where it is not in memory."""
    if split.in_memory:
        return split.inputs
    chosen = np.random.default_rng(0).permutation(len(split))[:_MEASURED]
    return split.fetch(np.sort(chosen))[0]


def from_npz(
    path: str | os.PathLike,
    *,
    inputs: str | None = None,
    labels: str | None = None,
    test_inputs: str | None = None,
    test_labels: str | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    test_share: float | None = 0.2,
    normalize: bool = False,
    missing: Missing = "refuse",
    seed: int = 0,
) -> Dataset:
    """Make a data set of an .npz file, as `from_arrays` does of its arrays.

    Looked for are x_train, y_train, x_test, y_test (Keras); train_images, train_labels, test_images, test_labels
    (MedMNIST); and x, y or inputs, labels or images, labels. Pickled objects are never read.

    Args:
        inputs, labels, test_inputs, test_labels: names of the arrays, where they have others.
        test_share: what is set aside where the file has no test arrays; None: nothing.
        num_classes, classes, normalize, missing, seed: see `from_arrays`.

    Raises:
        DataError: there is no such file or array, or as `from_arrays`.
    """
    path = Path(path).expanduser()
    names = [inputs, labels, test_inputs, test_labels]
    if any(names) and (not (inputs and labels) or bool(test_inputs) != bool(test_labels)):
        raise DataError(f"inputs and labels must both be named, and test_inputs and test_labels too, got {names}")
    found = read_npz(path, lambda there: [n for n in names if n] if inputs else find_names(there, str(path)))
    test = (found[2], found[3]) if len(found) == 4 else None
    return from_arrays(
        (found[0], found[1]),
        test,
        num_classes=num_classes,
        classes=classes,
        test_share=None if test else test_share,
        normalize=normalize,
        missing=missing,
        name=path.name,
        seed=seed,
    )


def read_npz(path: Path, choose: Callable[[list[str]], list[str]]) -> list[np.ndarray]:
    """The arrays of an .npz file that are chosen among the names there; objects, which only pickle reads, never."""
    try:
        with path.open("rb") as opened, np.lib.npyio.NpzFile(opened, allow_pickle=False) as file:
            return [_read(file, key, path) for key in choose(file.files)]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as an .npz file: {error}") from error


def _read(file: Mapping[str, np.ndarray], key: str, path: Path) -> np.ndarray:
    if key not in file:
        raise DataError(f"{path} has no array {key}; it has {', '.join(file)}")
    try:
        return file[key]
    except ValueError as error:  # objects, which only pickle can read
        raise DataError(f"array {key} of {path} cannot be read: {error}") from error


def find_names(there: list[str], where: str) -> list[str]:
    """The names of inputs and labels, of train and where they are there of test."""
    for names in TRAIN_AND_TEST:
        if all(name in there for name in names):
            return list(names)
    for names in (*TOGETHER, *(names[:2] for names in TRAIN_AND_TEST)):
        if all(name in there for name in names):
            if unused := [n for n in there if n not in names and _is_of_test(n)]:
                raise DataError(
                    f"{where} has arrays that would not be used, {', '.join(unused)}: name those of a test set "
                    f"{', '.join(TRAIN_AND_TEST[0][2:])}, or give the names of all"
                )
            return list(names)
    usual = "; ".join(", ".join(names) for names in (TRAIN_AND_TEST[0], TRAIN_AND_TEST[2], TOGETHER[0], TOGETHER[2]))
    raise DataError(f"{where} must have arrays named {usual}, or their names must be given; it has {', '.join(there)}")


def _is_of_test(name):
    """Whether an array's name says that it is of a test or validation set, as do y_test, valImages and xval."""
    words = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return re.search("(?<![a-z])[xy]?(test|val|valid|validation|dev|eval)(?![a-z])", words) is not None
