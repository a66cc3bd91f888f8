"""Tables: which columns there are, and how they become numbers."""

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Container, Hashable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from msjax.data._check import check_classes
from msjax.data._columns import MOST_TEXTS, Column, Missing, check_missing, check_values, missing_error, too_many_texts
from msjax.data._error import DataError

_log = logging.getLogger("msjax")

_NAMELESS = re.compile(r"Unnamed: \d+")  # as pandas calls them
_FEW_CODES = 10
"""Of so many different numbers among texts, none is warned of: they may be codes."""
Classes = bool | Literal["integers"] | Sequence[str] | None
"""Which labels of a table are classes beside texts and bools, or what all classes are; see `from_csv`."""


@dataclasses.dataclass(frozen=True)
class TableFormat:
    """How the rows of a table become inputs and labels; the same for every party that has rows of it.

    Attributes:
        label: the column to predict.
        classes: its values in the order of their numbers; None: it is a number.
        columns: the inputs.
    """

    label: str
    classes: tuple[str, ...] | None
    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        """A name for each input, as age, job=cook, job=nurse."""
        return [name for column in self.columns for name in column.names]

    @classmethod
    def measure(
        cls,
        frame: Any,
        *,
        label: str,
        classes: Classes = None,
        missing: Missing = "refuse",
        drop: Sequence[str] = (),
        most_texts: int = MOST_TEXTS,
    ) -> "TableFormat":
        """Returns the format of a pandas.DataFrame of training rows; see `from_csv`.

        Raises:
            DataError: as `from_csv`.
        """
        check_missing(missing)
        drop = (drop,) if isinstance(drop, str) else drop
        for name in drop:
            _check_column(frame, name)
        check_label(frame, label)
        found = None
        if are_classes(frame[label], classes, most_texts):
            found = check_classes(classes) if are_named(classes) else _found_classes(frame[label])
        columns = [name for name in frame if name != label and name not in drop]
        if nameless := [name for name in columns if not str(name).strip() or _NAMELESS.fullmatch(str(name))]:
            raise DataError(
                f"every column must have a name, got one without, {nameless[0]!r}, such as the numbers of rows that "
                "pandas writes: leave it out by drop, or name it"
            )
        if not columns:
            raise DataError(f"the table must have columns beside {label!r}, got none")
        return cls(label, found, tuple(_measure_column(frame[name], missing, most_texts) for name in columns))

    def inputs(self, frame: Any) -> np.ndarray:
        """Returns float32 (N, len(names)) of a pandas.DataFrame, of which other columns are passed over.

        A text that no training row has counts as none of its column's texts, and the log has a warning.
        """
        parts = []
        for column in self.columns:
            _check_column(frame, column.name)
            series = frame[column.name]
            gone = _is_missing(series)
            if gone.any() and not column.may_miss:
                raise _missing_error(series, gone)
            if column.texts:
                known = frozenset(column.texts)
                texts = np.asarray([_text_of(v, known) for v in series], dtype=object)
                is_text = [(texts == text) & ~gone for text in column.texts]
                _warn_of_others(series, ~np.any(is_text, axis=0) & ~gone)
                parts += [one.astype(np.float32) for one in is_text]
            else:
                parts.append(column.numbers(_numbers(series), gone))
            if column.has_indicator:
                parts.append(gone.astype(np.float32))
        return np.stack(parts, axis=1)

    def labels(self, frame: Any) -> np.ndarray:
        """Returns int32 (N,) classes, or float32 (N,) numbers."""
        check_label(frame, self.label)
        series = frame[self.label]
        if self.classes is None:
            return _numbers(series).astype(np.float32)
        number = {text: i for i, text in enumerate(self.classes)}
        found = np.asarray([number.get(_text_of(value, number), -1) for value in series], np.int32)
        if (found < 0).any():
            at = _first(series, found < 0)
            raise DataError(
                f"column {self.label!r} must be one of the classes that are given or are there to train on "
                f"({', '.join(self.classes)}), got {_text(series.iloc[at])!r} in {_row(series, at)}"
            )
        return found

    def to_json(self) -> str:
        """Returns a text that `from_json` reads."""
        return json.dumps(
            {"label": self.label, "classes": self.classes, "columns": [column._asdict() for column in self.columns]}
        )

    @classmethod
    def from_json(cls, text: str) -> "TableFormat":
        """Returns what `to_json` wrote."""
        tree = json.loads(text)
        columns = (Column(**(column | {"texts": tuple(column["texts"])})) for column in tree["columns"])
        return cls(tree["label"], None if tree["classes"] is None else tuple(tree["classes"]), tuple(columns))


def pandas() -> Any:
    """The pandas module, or a DataError that says how to get it."""
    try:
        import pandas as module
    except ImportError as error:
        raise DataError("reading tables needs pandas, which is not installed: pip install 'msjax[tables]'") from error
    return module


def _found_classes(labels: Any) -> tuple[str, ...]:
    """The different values of a column, as texts in order."""
    values = labels.unique().tolist()
    numeric = all(isinstance(value, int | float) for value in values)
    return tuple(map(_text, sorted(values, key=None if numeric else str)))


def columns_of_texts(frame: Any) -> list[Column]:
    """Those columns that are not of numbers or bools, with their texts."""
    numeric = pandas().api.types.is_numeric_dtype
    of_texts = [frame[name] for name in frame if not numeric(frame[name])]
    return [Column(series.name, tuple(map(_text, series.dropna().unique()))) for series in of_texts]


def _measure_column(series: Any, missing: str, most_texts: int) -> Column:
    """How a column becomes numbers, by the training rows."""
    gone = _is_missing(series)
    if gone.any() and missing == "refuse":
        raise _missing_error(series, gone)
    if pandas().api.types.is_numeric_dtype(series):
        return Column.of_numbers(series.name, _numbers(series), gone, missing)
    check_values(series.name, gone)
    texts = sorted({_text(v) for v in series[~gone]})
    stray = _no_numbers(series) & ~gone
    are_few = 0 < stray.sum() < 0.5 * len(series)
    at = _first(series, stray) if are_few and series[~gone & ~stray].nunique() > _FEW_CODES else None
    if len(texts) > most_texts:
        mistake = "" if at is None else f"; or is {_text(series.iloc[at])!r} a mistake among numbers?"
        advice = f"leave it out by drop, or raise most_texts{mistake}"
        raise too_many_texts(series.name, len(texts), texts[0], most_texts, advice)
    if at is not None:
        said = "column %r: most of its values are numbers, but all are taken for texts because of %r in %s"
        _log.warning(said, series.name, _text(series.iloc[at]), _row(series, at))
    return Column(series.name, tuple(texts), may_miss=missing == "median", has_indicator=bool(gone.any()))


def _numbers(series: Any) -> np.ndarray:
    """float64 of a column of numbers."""
    try:
        return series.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        wrong = _no_numbers(series)
        at = _first(series, wrong) if wrong.any() else None
        told = error if at is None else f"got {_text(series.iloc[at])!r} in {_row(series, at)}"
        raise DataError(f"column {series.name!r} must be numbers: {told}") from error


def _no_numbers(series: Any) -> np.ndarray:
    """Which values are there and no numbers."""
    return (pandas().to_numeric(series, errors="coerce").isna() & series.notna()).to_numpy(dtype=bool)


def _is_missing(series: Any) -> np.ndarray:
    """Which values are missing, or are infinite numbers."""
    gone = series.isna().to_numpy(dtype=bool)
    if pandas().api.types.is_numeric_dtype(series):
        gone = gone | ~np.isfinite(_numbers(series))
    return gone


def _warn_of_others(series: Any, is_other: np.ndarray) -> None:
    if is_other.any():
        at = _first(series, is_other)
        said = "column %r: %d rows have texts that no training row has, such as %r in %s; they count as none of its own"
        _log.warning(said, series.name, np.count_nonzero(is_other), _text(series.iloc[at]), _row(series, at))


def _missing_error(series: Any, gone: np.ndarray) -> DataError:
    at = _first(series, gone)
    what = "missing" if series.isna().iloc[at] else str(series.iloc[at])
    return missing_error(what, f"in {_row(series, at)}", series.name)


def _check_column(frame: Any, name: str) -> None:
    if name not in frame:
        raise DataError(f"the table has no column {name!r}; it has {', '.join(map(repr, frame))}")


def are_classes(labels: Any, classes: Classes, most: int = MOST_TEXTS) -> bool:
    """Whether labels are numbered as classes: texts and bools are, numbers where they are said to be."""
    types = pandas().api.types
    numeric = types.is_numeric_dtype(labels) and not types.is_bool_dtype(labels)
    if are_named(classes):
        return True
    if classes == "integers":
        return not numeric or (types.is_integer_dtype(labels) and labels.nunique() <= most)
    if classes is False and not numeric:
        wrong = np.array([isinstance(value, bool) or is_no_value(str(value)) for value in labels])
        at = _first(labels, wrong) if wrong.any() else 0
        raise DataError(
            f"column {labels.name!r} must be numbers where classes is False, as for regression, got "
            f"{labels.iloc[at]!r} in {_row(labels, at)}"
        )
    return not numeric if classes is None else classes


def are_named(classes: Classes) -> bool:
    """Whether all classes are named, rather than found."""
    return isinstance(classes, Iterable) and not (isinstance(classes, str) and classes == "integers")


def check_label(frame: Any, label: str) -> None:
    """The label's column is there, and every row has a value."""
    if not isinstance(label, Hashable):
        raise DataError(f"label must be the name of a column, got {label!r}")
    _check_column(frame, label)
    gone = _is_missing(frame[label])
    if gone.any():
        at = _first(frame, gone)
        what = "none" if frame[label].isna().iloc[at] else frame[label].iloc[at]
        raise DataError(
            f"every row must have a finite label, got {what} in {_row(frame, at)}, column {label!r} (NA, None, null "
            "and the like are none)"
        )


def _first(rows: Any, wrong: np.ndarray) -> int:
    """The place of that one of the wrong rows that is the first in its file."""
    places = np.flatnonzero(wrong)
    numbers = rows.index[places]
    return int(places[numbers.argmin() if pandas().api.types.is_integer_dtype(numbers) else 0])


def _row(rows: Any, at: int) -> str:
    """A row's number in its file, below the line of names, where the frame is as it was read."""
    return f"row {int(rows.index[at]) + 1}" if isinstance(rows.index[at], int | np.integer) else f"row {rows.index[at]}"


def is_no_value(text: str) -> bool:
    """Whether a text is not what pandas would make of it: a bool, or a number without zeros that say nothing."""
    try:
        return text not in ("True", "False") and _text(float(text)) != text
    except ValueError:
        return True


def _text_of(value: Any, known: Container[str]) -> str:
    """A value as one of the known texts, also 1.0 as 1; else as it is."""
    text = _text(value)
    if text not in known:
        with contextlib.suppress(ValueError):
            text = number if (number := _text(float(text))) in known else text
    return text


def _text(value: Any) -> str:
    """A value as a text; whole numbers without a fraction."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
