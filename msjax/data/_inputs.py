"""Inputs without labels, to predict from: files as what a data set stores of them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from msjax.data import _images, _records, _words
from msjax.data._arrays import TOGETHER, TRAIN_AND_TEST, read_npz
from msjax.data._check import check_inputs
from msjax.data._columns import Column, standardized, table_inputs
from msjax.data._convert import convert_inputs
from msjax.data._csv import read_frame
from msjax.data._dataset import Tree
from msjax.data._error import DataError
from msjax.data._folder import SUFFIXES, images_in
from msjax.data._registry import find, is_streamed
from msjax.data._stream import test_resize
from msjax.data._table import TableFormat
from msjax.data._text_sources import lines_of


class Inputs(NamedTuple):
    """Inputs with names, read where they are needed.

    Attributes:
        names: what each is called: an image's file, or a file and a row's number, from 1 on.
        fetch: from first and last (exclusive) to the inputs between them, (n, ...), as a data set stores them.
    """

    names: list[str]
    fetch: Callable[[int, int], np.ndarray]


def read_inputs(
    path: str | os.PathLike,
    *,
    like: Tree,
    columns: tuple[Column, ...] | None = None,
    is_text: bool = False,
    vocabulary: int = _records.VOCABULARY,
    set_name: str = "",
    streamed: bool | None = None,
) -> Inputs:
    """Find inputs in a file or folder, and make of them what a data set would that they came with.

    Images (a file, or all that lie in a folder, however deep) are decoded as by `from_image_folder`; where they have
    another size than the network's, which must be a square then, their shorter side is resized and the middle cropped,
    as of the set's test images. An .npz has its inputs under one of the usual names; labels are passed over. A .csv has
    the columns that the network was trained on, or, of texts, as a .txt, one text a line.

    Args:
        path: the file or folder.
        like: shape and dtype of one input of the data set.
        columns: of a table, how its columns became inputs.
        is_text: whether inputs are texts that `load` split into words.
        vocabulary: of texts, as of `load`.
        set_name: of the data set: some sets' test images are cropped otherwise where they are streamed.
        streamed: whether they were; None where nothing was chosen.

    Raises:
        DataError: there is no such file, or nothing in it that is such an input.
    """
    path = Path(path).expanduser()
    if not isinstance(like, jax.ShapeDtypeStruct):
        raise DataError(f"inputs must be one array to be read from files, and this data set has {like}: give arrays")
    kind, is_pixels = path.suffix.lower(), like.dtype == np.uint8 and len(like.shape) == 3
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir() or kind in SUFFIXES:
        if not is_pixels:
            raise DataError(f"{path} must hold inputs such as the network takes, {_shown(like)}, got images")
        crops = find(set_name).random_crop and (is_streamed(set_name) if streamed is None else streamed)
        return _from_images(path, like, crops)
    if kind == ".npz":
        return _of_array(path, _from_npz(path, like, columns))
    if is_text and kind == ".txt":
        lines = lines_of(path.read_text("utf-8-sig", errors="replace"))
        return _of_array(path, _records.tokens(_words.word_hashes(lines), like.shape[0], vocabulary))
    if kind == ".csv" and not is_text and not is_pixels:
        if columns is None:
            raise DataError(f"{path} must be an .npz file, as the columns that the network takes have no names")
        frame = read_frame(path, columns)
        try:
            array = TableFormat("", None, columns).inputs(frame)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        return _of_array(path, array)
    known = "an image, a folder or an .npz" if is_pixels else "a .txt or .npz" if is_text else "a .csv or .npz"
    raise DataError(f"{path} must be {known} file: the network takes {_shown(like)}")


def _shown(like: jax.ShapeDtypeStruct) -> str:
    return f"{like.dtype}{list(like.shape)}"


def _of_array(path: Path, array: np.ndarray) -> Inputs:
    """The rows of an array, all in memory."""
    if not len(array):
        raise DataError(f"{path} must have inputs, and has none")
    check_inputs(array, f"{path}: inputs")
    return Inputs([f"{path}:{row}" for row in range(1, len(array) + 1)], lambda lo, hi: array[lo:hi])


def _from_images(path: Path, like: jax.ShapeDtypeStruct, crops: bool) -> Inputs:
    """One image, or all in a folder."""
    height, width, channels = like.shape
    files = images_in(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} must hold images ({', '.join(SUFFIXES)}), and has none")

    def read(file: Path) -> np.ndarray:
        with _images.decoding(f"image {file}"):
            with _images.pillow().open(file) as opened:
                image = _images.flatten(opened, channels)
            if crops:
                image = _images.resize_center_crop(image, height, test_resize(height))
            elif image.size != (width, height):
                if width != height:
                    got = f"{image.size[0]} x {image.size[1]}"
                    raise DataError(f"it must have {width} x {height} pixels as the network takes them, got {got}")
                image = _images.resize_center_crop(image, height, height)
        return _images.to_array(image)

    _images.pillow()
    return Inputs(list(map(str, files)), lambda lo, hi: np.stack([read(file) for file in files[lo:hi]]))


def _from_npz(path: Path, like: jax.ShapeDtypeStruct, columns: Sequence[Column] | None) -> np.ndarray:
    """The inputs of a file, standardised as those of the training data were."""
    (found,) = read_npz(path, lambda there: [_inputs_name(path, there)])
    role = f"array of {path}"
    is_grey = like.dtype == np.uint8 and like.shape[2:] == (1,)  # which may come without their last axis
    if found.shape == like.shape or found.ndim < len(like.shape) + 1 - is_grey:
        raise DataError(f"{role} must have inputs along its first axis, got the shape {list(found.shape)} of one")
    array = convert_inputs(found, role, wide=columns is not None)
    if columns is not None:
        if any(column.texts for column in columns):
            raise DataError(f"{path} must be a .csv file, as the network was trained on a table with columns of texts")
        array = _standardized(array, columns, role)
    if (array.shape[1:], array.dtype) != (like.shape, like.dtype):
        got = f"{array.dtype}{list(array.shape[1:])}"
        raise DataError(f"{role} must have inputs such as the network takes, {_shown(like)}, got {got}")
    return array


def standardized_inputs(values: Any, columns: Sequence[Column] | None) -> np.ndarray:
    """Inputs as a `Dataset` stores them, of values as they were before it standardised them.

    Args:
        values: numbers, (N, columns) or (N, ..., C); or a pandas.DataFrame, of which other columns than the data set
            had are passed over. Where that came of arrays its columns had no names, and they go by their order.
        columns: `Dataset.columns`.

    Raises:
        DataError: there are no columns, or the values do not fit them.
    """
    if columns is None:
        raise DataError("inputs must be given as they are stored, as the data set has not standardised them")
    # Columns that came of an array have numbers for names, whatever a table with as many calls them.
    if hasattr(values, "columns") and [column.name for column in columns] != list(map(str, range(len(columns)))):
        return TableFormat("", None, columns).inputs(values)
    if any(column.texts for column in columns):
        raise DataError(
            f"inputs must be a pandas.DataFrame, as there are columns of texts, got {type(values).__name__}"
        )
    return _standardized(convert_inputs(np.asarray(values), "inputs", wide=True), columns, "inputs")


def _standardized(array: np.ndarray, columns: Sequence[Column], role: str) -> np.ndarray:
    """Of numbers alone: the rows of a table, or the last axis of what has more axes."""
    if array.shape[-1:] != (len(columns),):
        raise DataError(f"{role} must have {len(columns)} columns, got the shape {list(array.shape)}")
    return table_inputs(columns, array, role) if array.ndim == 2 else standardized(array, columns)


_USUAL = tuple(
    dict.fromkeys([*(n[0] for n in TOGETHER), *(n[2] for n in TRAIN_AND_TEST), *(n[0] for n in TRAIN_AND_TEST)])
)
"""Names of inputs: of both kinds those to test on before those to train on."""


def _inputs_name(path: Path, there: list[str]) -> str:
    """The name of the inputs in a file: a usual one, or that of its only array."""
    if len(there) == 1:
        return there[0]
    if (found := next((name for name in _USUAL if name in there), None)) is None:
        raise DataError(f"{path} must have one array, or one named {', '.join(_USUAL)}; it has {', '.join(there)}")
    return found
