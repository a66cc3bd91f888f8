"""What every data set must keep to, checked when it is loaded."""

from collections.abc import Iterable, Sequence, Set

import jax
import numpy as np

from msjax.checks import is_integer
from msjax.data._dataset import Dataset, Tree, named_arrays
from msjax.data._error import DataError

_CHUNK = 1 << 22  # numbers looked at at a time

TEST_NAMES = ("test", "val", "valid", "validation")
"""Of what is tested on, beside "train"; the first that is there is used."""
SPLIT_NAMES = f"train and {TEST_NAMES[0]} (or {', '.join(TEST_NAMES[1:])})"
"""As errors say it."""


def check(ds: Dataset, columns: Sequence[str] | None = None) -> Dataset:
    """Returns the data set if it keeps the rules; what is not in memory is checked when it is read.

    Args:
        columns: names of the columns of a table, for messages.

    Raises:
        DataError: no example to train on; inputs or labels of train and test differ in shape or dtype; labels of
            classes outside 0..num_classes - 1, or more or fewer names of classes; a number that is not finite.
    """
    if len(ds.train) == 0:
        raise DataError(f"{ds.name} must have examples to train on, got none")
    if ds.num_classes is not None and not (is_integer(ds.num_classes) and ds.num_classes >= 1):
        raise DataError(f"num_classes of {ds.name} must be an integer of at least 1, got {ds.num_classes!r}")
    if ds.classes is not None and len(ds.classes) != ds.num_classes:
        raise DataError(f"classes of {ds.name} must be as many as num_classes, {ds.num_classes}, got {len(ds.classes)}")
    if len(ds.test):
        for what in ("input_like", "label_like"):
            _check_alike(ds, what.partition("_")[0], getattr(ds.train, what), getattr(ds.test, what))
    for name, split in (("train", ds.train), ("test", ds.test)):
        if split.in_memory:
            check_inputs(split.inputs, f"{ds.name}: {name} inputs", columns=columns)
            check_labels(split.targets, f"{ds.name}: {name} labels", ds.num_classes)
    return ds


def check_classes(classes: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of all classes, in order; DataError if they are not different texts."""
    names = () if isinstance(classes, str | Set) else tuple(classes)  # a set has no order
    texts = all(isinstance(name, str) and name for name in names)
    if not names or not texts or len(set(names)) < len(names):
        raise DataError(f"classes must be the different names of all classes, in order, got {classes!r}")
    return tuple(map(str, names))


def _check_alike(ds: Dataset, what: str, train: Tree, test: Tree) -> None:
    """One shape and dtype in both splits."""
    if jax.tree.structure(train) != jax.tree.structure(test):
        raise DataError(f"{ds.name}: {what}s of train and test must have one structure, got {train} and {test}")
    for (name, a), (_, b) in zip(named_arrays(train, f"{what}s"), named_arrays(test, f"{what}s"), strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise DataError(
                f"{ds.name}: {name} of train and test must have one shape and dtype, got {a.dtype}{list(a.shape)} and "
                f"{b.dtype}{list(b.shape)}"
            )


def check_inputs(
    tree: Tree, name: str, *, indices: np.ndarray | None = None, columns: Sequence[str] | None = None
) -> None:
    """Floats must be finite. `indices` are the examples' numbers, where they do not count from 0."""
    for leaf, array in named_arrays(tree, name):
        _check_finite(array, leaf, indices, columns)


def check_labels(tree: Tree, name: str, num_classes: int | None, indices: np.ndarray | None = None) -> None:
    """Floats must be finite; one class an example must be an integer in 0..num_classes - 1."""
    for leaf, array in named_arrays(tree, name):
        _check_finite(array, leaf, indices, None)
    if num_classes is None or not isinstance(tree, np.ndarray) or tree.ndim != 1:
        return  # labels of more axes are for the task to check, which knows whether some count for nothing
    if not np.issubdtype(tree.dtype, np.integer):
        raise DataError(
            f"{name} must be integers where there are classes, got {tree.dtype}: without num_classes they are numbers "
            "to predict"
        )
    if tree.size and (tree.min() < 0 or tree.max() >= num_classes):
        at = int(np.flatnonzero((tree < 0) | (tree >= num_classes))[0])
        raise DataError(
            f"{name} must be in 0..{num_classes - 1} (num_classes is {num_classes}), got {tree[at]} at index "
            f"{at if indices is None else indices[at]}"
        )


def _check_finite(
    array: np.ndarray, name: str, indices: np.ndarray | None, columns: Sequence[str] | None = None
) -> None:
    """Raises where a float is NaN or infinite, in one pass over pieces of bounded size."""
    if not np.issubdtype(array.dtype, np.floating) or not array.size:
        return
    rows = max(1, _CHUNK // max(1, array[0].size))
    for lo in range(0, len(array), rows):
        finite = np.isfinite(array[lo : lo + rows])
        if not finite.all():
            at = np.argwhere(~finite)[0]
            at[0] += lo
            value, row = array[tuple(at)], at[0] if indices is None else indices[at[0]]
            place = f" at {tuple(at[1:].tolist())}" if len(at) > 1 else ""
            if columns is not None and len(at) == 2:
                place = f", column {columns[at[1]]}"
            raise DataError(f"{name} must be finite (as float32), got {value} at index {row}{place}")
