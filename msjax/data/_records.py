"""What a prepared set's records hold: images, texts or the columns of a table; texts and tables as arrays."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

TEXT_LENGTH, VOCABULARY = 64, 8192
"""Defaults: tokens of a text, and how many different ones there are."""
PAD = 0
"""The token behind a text's end; words take the numbers from 1 on."""


class Images(NamedTuple):
    """Encoded images in one feature; a side that varies is None."""

    key: str
    shape: tuple[int | None, int | None, int]


class Texts(NamedTuple):
    """Texts in one feature, or in several that are read one after the other."""

    keys: tuple[str, ...]


class Feature(NamedTuple):
    """A feature of a table, which is a column or, a vector, several.

    Attributes:
        key: where it is in a record; the names of nested features are joined by "/".
        classes: of a class, the names; else empty.
        length: how many values a vector has; None: one value.
        is_text: whether values are texts, of which the training records tell which there are.
        refused: why it is no column; it is not read then, and a user must leave it out.
    """

    key: str
    classes: tuple[str, ...] = ()
    length: int | None = None
    is_text: bool = False
    refused: str = ""

    @property
    def names(self) -> list[str]:
        """A name for each of its columns."""
        return [self.key] if self.length is None else [f"{self.key}/{i}" for i in range(self.length)]


class Columns(NamedTuple):
    """A table's features."""

    features: tuple[Feature, ...]

    @property
    def names(self) -> list[str]:
        """A name for each column."""
        return [name for feature in self.features for name in feature.names]


def tokens(hashes: np.ndarray, length: int, vocabulary: int) -> np.ndarray:
    """int32 (N, length): the words as 1 … vocabulary − 1 by their hashes, then `PAD`.

    By hashes rather than by a list of words (the "hashing trick", arXiv 0902.2206), so that clients who have never seen
    each other's texts number words alike. Words may share a number.
    """
    found = np.full((len(hashes), length), PAD, np.int32)
    words = np.asarray(hashes[:, :length])
    found[:, : words.shape[1]] = np.where(words == 0, PAD, 1 + words % np.uint32(vocabulary - 1))
    return found


def check_tokens(length: int, vocabulary: int) -> None:
    """Room for a word, and numbers for words and padding."""
    if length < 1:
        raise ValueError(f"text_length must be at least 1, got {length}")
    if vocabulary < 2:
        raise ValueError(f"vocabulary must be at least 2, got {vocabulary}")


def value(record: dict[str, Any], key: str) -> Any:
    """What a record has under a key, which joins the names of nested features by "/"."""
    if key in record:
        return record[key]
    found: Any = record
    for name in key.split("/"):
        found = found[name]
    return found


def _text(found: Any) -> str:
    return found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)


def texts_of(records: Sequence[dict[str, Any]], inputs: Texts) -> list[str]:
    """The text of each record."""
    return [" ".join(_text(value(record, key)) for key in inputs.keys) for record in records]


def _columns_of_texts(records: Sequence[dict[str, Any]], feature: Feature) -> list[list[str]]:
    """The texts of each column of a feature."""
    rows = [np.atleast_1d(np.asarray(value(record, feature.key), object)).tolist() for record in records]
    return [[_text(row[i]) for row in rows] for i in range(len(feature.names))]


def known_texts(records: Sequence[dict[str, Any]], inputs: Columns) -> dict[str, tuple[str, ...]]:
    """Which texts each column of texts has, in order, by its name."""
    found = {}
    for feature in inputs.features:
        if feature.is_text:
            texts = _columns_of_texts(records, feature)
            found |= {name: tuple(sorted(set(column))) for name, column in zip(feature.names, texts, strict=True)}
    return found


def table_of(records: Sequence[dict[str, Any]], inputs: Columns, known: dict[str, tuple[str, ...]]) -> np.ndarray:
    """float64 (n, columns): numbers as they are, the number of a class or of one of the `known` texts; -1: none."""
    parts = []
    for feature in inputs.features:
        if feature.refused:
            parts.append(np.full((len(records), len(feature.names)), np.nan))
        elif feature.is_text:
            for name, texts in zip(feature.names, _columns_of_texts(records, feature), strict=True):
                number = {text: i for i, text in enumerate(known[name])}
                parts.append(np.asarray([[number.get(text, -1)] for text in texts], np.float64))
        else:
            values = np.asarray([value(record, feature.key) for record in records], np.float64)
            parts.append(values.reshape(len(records), len(feature.names)))
    return np.concatenate(parts, axis=1)
