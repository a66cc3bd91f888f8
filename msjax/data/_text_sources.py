"""Where texts come from: files, tables and sequences, as a sequence of texts."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msjax.data._csv import read_frame
from msjax.data._error import DataError

TEXT_SUFFIXES = (".txt", ".jsonl")
"""Of files that hold texts; a .csv may hold some, too."""


def texts_of(role: str, source: Any, column: str) -> Sequence[str]:
    """The texts of a file, a table or a sequence."""
    if not isinstance(source, str | os.PathLike):
        return Items(role, _column(role, source, column), column)
    path = Path(source).expanduser()
    kind = path.suffix.lower()
    if kind not in (*TEXT_SUFFIXES, ".csv"):
        known = ", ".join(TEXT_SUFFIXES)
        raise DataError(
            f"{role} must be a {known} or .csv file, got {str(path)!r}: rename it, or give what reads its texts"
        )
    if kind == ".csv":
        return Items(role, _column(str(path), read_frame(path, texts_alone=True), column), column)
    text = _read(role, path)
    if kind == ".txt":
        return [text]
    rows, objects = _objects(path, text)
    return Items(role, objects, column, rows)


def _column(where: str, source: Any, column: str) -> Any:
    """The texts of a table, or of a column of one, as a list; anything else as it is."""
    if isinstance(source, Mapping) or hasattr(source, "columns"):
        names = list(source if isinstance(source, Mapping) else getattr(source, "column_names", source.columns))
        if names.count(column) != 1:
            known = ", ".join(map(str, names))
            raise DataError(f"column must be one of {where}, which has {known}, got {column!r}")
        source = source[column]
        if isinstance(source, str | bytes):
            raise DataError(f"{where} must have a sequence of texts in column {column!r}, got one text")
    if hasattr(source, "select_columns"):  # of Hugging Face: its items are read as they are needed
        return source.select_columns([column]) if column in (source.column_names or ()) else source
    # A column's own index may not be 0, 1, 2, …
    for name in ("to_list", "to_pylist"):
        if hasattr(source, name):
            return getattr(source, name)()
    return source


def _objects(path: Path, text: str) -> tuple[list[int], list[Any]]:
    """The numbers of the lines of a .jsonl that are not blank, and what these lines are."""
    rows, found = [], []
    for row, line in enumerate(text.split("\n"), 1):  # JSON may have other ends of lines within a text
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} must have JSON in each line, got {line[:40]!r} in line {row}: {error}") from None
        rows.append(row)
    return rows, found


def _read(role: str, path: Path) -> str:
    """The text of a file."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{role} must be a file that can be read, got {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be text in UTF-8: {error}") from error


class Items(Sequence[str]):
    """The texts of a sequence's items; `rows` are their lines in a file, where they have some."""

    def __init__(self, role: str, items: Any, column: str, rows: list[int] | None = None):
        if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
            raise DataError(f"{role} must be a path, or have __len__ and __getitem__, got {type(items).__name__}")
        self._role, self._items, self._column, self.rows = role, items, column, rows

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> str:
        item = self._items[index]
        if isinstance(item, dict):
            if self._column not in item:
                known = ", ".join(map(str, item))
                raise DataError(f"column must be one of {self._role}, which has {known}, got {self._column!r}")
            item = item[self._column]
        if isinstance(item, bytes):
            item = item.decode("utf-8", "replace")
        if not isinstance(item, str):
            raise DataError(f"{self._role} must have texts, got {item!r} at index {index}")
        return item


def lines_of(text: str) -> list[str]:
    """The lines of a text that `read_text` has read; other separators than line feeds are part of them."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def each(texts: Sequence[str]) -> Iterator[str]:
    """In order; some that have a length do not say where they end."""
    return (texts[i] for i in range(len(texts)))


def described(source: Any) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__
