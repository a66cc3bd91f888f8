"""Columns of a table as inputs of a network: numbers, classes, and what is missing. With NumPy alone."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from msjax.data._error import DataError

MOST_TEXTS = 100
"""Different texts of a column, by default."""
Missing = Literal["refuse", "median"]
"""What becomes of values that are missing or infinite; `data.from_csv` says how."""


def check_missing(missing: str) -> None:
    """One of the two."""
    if missing not in get_args(Missing):
        raise DataError(f'missing must be "refuse" or "median", got {missing!r}')


class Column(NamedTuple):
    """How one column becomes numbers.

    Attributes:
        name: in the file's first line, or of the feature.
        texts: of a column of texts or classes: each is a column of 1s among 0s; what is none of them is all 0s.
        mean, std: of a column of numbers, which become (value - mean) / std; in float64.
        median: what a missing number is taken to be.
        may_miss: whether values may be missing at all.
        has_indicator: whether a further column says what was missing, as it does where training rows miss something.
    """

    name: str
    texts: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    median: float = 0.0
    may_miss: bool = False
    has_indicator: bool = False

    @property
    def names(self) -> list[str]:
        """A name for each of its inputs, as age, job=cook, job=nurse, age missing."""
        found = [f"{self.name}={text}" for text in self.texts] or [self.name]
        return [*found, f"{self.name} missing"] if self.has_indicator else found

    @classmethod
    def of_numbers(
        cls, name: str, values: np.ndarray, gone: np.ndarray, missing: str, *, are_scaled: bool = True
    ) -> "Column":
        """Returns the column by its values in the training rows, float64; those that are gone count for nothing."""
        check_values(name, gone)
        median = float(np.median(values[~gone]))
        values = np.where(gone, median, values)
        with np.errstate(over="ignore", invalid="ignore"):  # told of below
            mean, std = float(values.mean()), float(values.std())
        if values.min() == values.max():  # whose mean may be rounded
            mean, std = float(values[0]), 0.0
        column = cls(name, (), mean, std if std > 0 else 1.0, median, missing == "median", bool(gone.any()))
        if are_scaled:
            _check_scale(column, values)
        return column

    def numbers(self, values: np.ndarray, gone: np.ndarray) -> np.ndarray:
        """Returns float32 of float64: missing ones filled in, centred, scaled; only then rounded."""
        with np.errstate(over="ignore"):  # what float32 does not hold becomes infinite, and is refused as such
            return ((np.where(gone, self.median, values) - self.mean) / self.std).astype(np.float32)


def _check_scale(column: Column, values: np.ndarray) -> None:
    """Numbers are told apart once they are scaled: not beside one that is far larger, such as a mark for no value."""
    middle = np.quantile(values, [0.25, 0.75], method="nearest")
    finite = np.isfinite([column.mean, column.std]).all()
    with np.errstate(invalid="ignore"):
        low, high = column.numbers(middle, np.zeros(2, bool))
    if not finite or (low == high and middle[0] < middle[1]):
        raise DataError(
            f"column {column.name!r} must have numbers that float32 tells apart once they are scaled by mean and std, "
            f"got {values[np.abs(values).argmax()]:.9g} beside {middle[0]:.9g} to {middle[1]:.9g}: is it a mark for a "
            "missing value?"
        )


def check_values(name: Any, gone: np.ndarray) -> None:
    """A column must have a value at least."""
    if gone.all():
        raise DataError(f"column {name!r} must have values, got none: leave it out by drop")


def missing_error(what: Any, place: str, name: Any) -> DataError:
    """A value is not there, or not finite, where it must be."""
    return DataError(
        f"every value must be there and finite, got {what} {place}, column {name!r}: "
        'training with missing="median" fills such values in (NA, None, null and the like are missing, too)'
    )


def too_many_texts(name: Any, count: int, example: str, most: int, advice: str) -> DataError:
    """A column of texts is not one of a few."""
    return DataError(
        f"column {name!r} must be numbers or at most {most} different texts, got {count} such as {example!r}: {advice}"
    )


def measure_table(
    like: Sequence[Column], table: np.ndarray, missing: str, where: str, *, are_scaled: bool = True
) -> tuple[Column, ...]:
    """The columns of a table as `table_inputs` takes them, by the training rows.

    Args:
        like: names, and texts of columns of classes.
        table: float64 (N, F): numbers, and the number of a class; what is no class is out of range.
        missing: see `Missing`; classes are never missing.
        where: for messages.
        are_scaled: whether inputs are centred and scaled by what is measured.
    """
    check_missing(missing)
    found = []
    for column, values in zip(like, table.T, strict=True):
        if not column.texts:
            gone = ~np.isfinite(values)
            _refuse(gone, missing != "refuse", values, column.name, where)
            column = Column.of_numbers(column.name, np.asarray(values), gone, missing, are_scaled=are_scaled)
        found.append(column)
    return tuple(found)


def table_inputs(columns: Sequence[Column], table: np.ndarray, where: str) -> np.ndarray:
    """float32 (N, one a name): the rows of a table as `measure_table` takes it.

    Args:
        columns: as `Dataset.columns` has them.
        table: float64 (N, a column each), a text as its number among the column's `texts`.
        where: what an error calls the table.

    Raises:
        DataError: a value is missing that must not be; its row and column are named.
    """
    inputs = np.empty((len(table), sum(len(column.names) for column in columns)), np.float32)
    at = 0
    for column, values in zip(columns, table.T, strict=True):
        if column.texts:
            inputs[:, at : at + len(column.texts)] = values[:, None] == np.arange(len(column.texts))
        else:
            gone = ~np.isfinite(values)
            _refuse(gone, column.may_miss, values, column.name, where)
            inputs[:, at] = column.numbers(values, gone)
            if column.has_indicator:
                inputs[:, at + 1] = gone
        at += len(column.names)
    return inputs


def _refuse(gone: np.ndarray, may_miss: bool, values: np.ndarray, name: str, where: str) -> None:
    if gone.any() and not may_miss:
        at = int(np.flatnonzero(gone)[0])
        raise missing_error(values[at], f"at index {at} of {where}", name)


def standardized(inputs: np.ndarray, columns: Sequence[Column]) -> np.ndarray:
    """float32 of floats (N, ..., C): each of the last axis centred and scaled in float64, in pieces."""
    mean, std = (np.asarray([getattr(column, name) for column in columns]) for name in ("mean", "std"))
    out = np.empty(inputs.shape, np.float32)
    rows = max(1, (1 << 22) // max(1, out[:1].size))
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused as such
        for lo in range(0, len(inputs), rows):
            out[lo : lo + rows] = (inputs[lo : lo + rows].astype(np.float64) - mean) / std
    return out


def column_statistics(columns: Sequence[Column]) -> tuple[list[float], list[float]]:
    """Mean and std of the inputs for `data.normalize`: those of numbers, and 0 and 1 of all others."""
    found = [
        (column.mean, column.std) if i == 0 and not column.texts else (0.0, 1.0)
        for column in columns
        for i in range(len(column.names))
    ]
    return [mean for mean, _ in found], [std for _, std in found]
