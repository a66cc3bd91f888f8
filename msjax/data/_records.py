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


class Columns(NamedTuple):
    """A table's features: each a number, or one of `classes[i]`, which are empty for a number."""

    keys: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...]


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


def texts_of(records: Sequence[dict[str, Any]], inputs: Texts) -> list[str]:
    """The text of each record."""

    def text(value):
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    return [" ".join(text(record[key]) for key in inputs.keys) for record in records]


def table_of(records: Sequence[dict[str, Any]], inputs: Columns) -> np.ndarray:
    """float64 (n, columns): numbers as they are, and the number of a class."""
    return np.stack([np.asarray([record[key] for record in records], np.float64) for key in inputs.keys], axis=1)
