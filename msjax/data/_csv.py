"""CSV files as data sets."""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msjax.data._arrays import finish, share_indices
from msjax.data._columns import MOST_TEXTS, Column, Missing
from msjax.data._dataset import Arrays, Dataset
from msjax.data._error import DataError
from msjax.data._table import (
    Classes,
    TableFormat,
    are_classes,
    are_named,
    check_label,
    columns_of_texts,
    is_no_value,
    pandas,
)


def from_csv(
    path: str | os.PathLike,
    *,
    label: str = "label",
    test: str | os.PathLike | None = None,
    test_share: float | None = 0.2,
    classes: Classes = None,
    missing: Missing = "refuse",
    drop: Sequence[str] = (),
    most_texts: int = MOST_TEXTS,
    table_format: TableFormat | None = None,
    seed: int = 0,
) -> Dataset:
    """Make a data set of a CSV file whose first line names the columns; needs pandas.

    Numbers are centred and scaled by mean and std of the training rows, in float64, then float32 (so `mean` and `std`
    of the data set are None, and its `columns` say what they were); a column of texts becomes a column of 0 and 1 for
    each text of the training rows. Labels are classes, numbered in order, where they are texts or bools; numbers are
    predicted as float32, and not scaled.

    Args:
        path: the file.
        label: the column to predict.
        test: a second file; else `test_share` of the rows is set aside, of each class alike; None: nothing.
        classes: True: numbers are classes too. "integers": integers are, of at most `most_texts` different ones; other
            numbers are predicted. False: there are none, and texts are refused. Names: all classes in order, also
            those that no row here has, as where several parties have rows of the same table. A column of numbers has
            names without zeros that say nothing: 7 and 1.5, also where the file has 007 and 1.50.
        missing: "refuse"; or "median": a missing or infinite number becomes the median of the training rows, a missing
            text none of the texts; where training rows miss values a further column says which. A column that only
            test rows miss values of gets no further one, since the network would not learn what it means. Nothing, NA,
            NaN, None, null and the like are missing, as pandas reads them.
        drop: columns that are not used, such as a row's number.
        most_texts: a column of more different texts is refused.
        table_format: as another party measured it (`TableFormat.measure`), in place of all options above but `test` and
            `test_share`, so that both make the same inputs of the same row.
        seed: chooses what is set aside.

    Raises:
        DataError: the file cannot be read; a column is missing; a value is missing or infinite (row and column are
            named); a column has too many texts; a test row has an unknown class; pandas is missing.
    """
    path = Path(path).expanduser()
    options = {"label": label, "classes": classes, "missing": missing, "drop": drop, "most_texts": most_texts}
    if table_format:
        label, classes = table_format.label, table_format.classes
    known = [Column(label, tuple(classes))] if are_named(classes) else []
    known += table_format.columns if table_format else ()
    frame, test_rows = read_frame(path, known), None
    if test is not None:
        # As the rows to train on have it: 01 is a text where there is an x1, too, and the number 1 where there is not.
        test_rows = read_frame(Path(test).expanduser(), known if table_format else [*known, *columns_of_texts(frame)])
    with _naming(path):
        train_rows = frame
        if test is None:
            train_rows, test_rows = _shared_out(frame, test_share, table_format, seed, options)
        table_format = table_format or TableFormat.measure(train_rows, **options)
        train_split = _arrays(table_format, train_rows)
    with _naming(path if test is None else test):
        test_split = _arrays(table_format, test_rows)
    with _naming(path):
        return finish(path.name, train_split, test_split, columns=table_format.columns, classes=table_format.classes)


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """Has errors begin with the file that they are of."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _arrays(table_format: TableFormat, rows: Any) -> Arrays:
    return Arrays(table_format.inputs(rows), table_format.labels(rows))


def _shared_out(
    frame: Any, test_share: float | None, table_format: TableFormat | None, seed: int, options: dict[str, Any]
) -> tuple[Any, Any]:
    """Rows to train and to test on."""
    if test_share is None:
        return frame, frame.iloc[:0]
    label = table_format.label if table_format else options["label"]
    check_label(frame, label)
    if table_format:
        classes = bool(table_format.classes)
    else:
        classes = are_classes(frame[label], options["classes"], options["most_texts"])
    of_class = frame[label].factorize()[0] if classes else len(frame)
    train, test = share_indices(of_class, test_share, seed)
    return frame.iloc[train], frame.iloc[test]


def read_frame(path: Path, columns: Sequence[Column] = (), *, texts_alone: bool = False) -> Any:
    """The rows of a file, which have no more values than its first line has names, each another.

    Args:
        columns: of texts among these, of which some are no numbers or bools, the file's texts are taken as they are,
            also where all of them are digits.
        texts_alone: take all columns for texts, of which none is missing.
    """
    texts = {column.name: str for column in columns if any(map(is_no_value, column.texts))}

    def read(**options):
        return pandas().read_csv(path if piped is None else io.BytesIO(piped), low_memory=False, **options)

    try:
        piped = None if path.is_file() else path.read_bytes()
        # Without this, what the first rows have too much would become names of rows, and all others one off.
        head = read(header=None, nrows=2, dtype=str, keep_default_na=False)
        as_texts = {"dtype": str, "keep_default_na": False}
        frame = read(index_col=False, **(as_texts if texts_alone else {"dtype": texts}))
    except (OSError, ValueError, UnicodeDecodeError) as error:  # pandas' own are ValueErrors
        raise DataError(f"{path} cannot be read as a CSV file: {error}") from error
    if not len(frame):
        raise DataError(f"{path} must have rows below the line of names, got none")
    names = head.iloc[0]
    if (again := names[names.duplicated() & (names != "")]).size:
        raise DataError(f"{path} must have another name for each column, got {again.iloc[0]!r} twice")
    return frame
