"""Arrays of any origin to the few dtypes that networks take; nothing is rounded or dropped without being said."""

import numbers
from typing import Any

import jax.numpy as jnp
import numpy as np

from msjax.data._dataset import Tree, as_array, map_arrays, named_arrays
from msjax.data._error import DataError

_INT32 = np.iinfo(np.int32)


def convert_inputs(tree: Tree, role: str, *, wide: bool = False) -> Tree:
    """Inputs (N, ...): uint8 as they are, other integers int32, floats float32; grey images get a channel.

    Bools become float32 where they are the only array, and stay what they are, such as masks, beside others. Images are
    uint8 (N, H, W, C), or (N, H, W), which becomes (N, H, W, 1). `wide`: see `cast`.
    """
    options = {"wide": wide, "masks": has_masks(tree)}
    return map_arrays(lambda name, array: _images(cast(array, name, **options), name), *_with_names(tree, role))


def has_masks(inputs: Tree) -> bool:
    """Whether bools among the inputs stay bools: where they are not all that there is."""
    return isinstance(inputs, dict | tuple) and len(named_arrays(inputs, "")) > 1


def convert_labels(tree: Tree, role: str) -> Tree:
    """Labels (N, ...): integers and bools int32, floats float32; one integer a row, (N, 1), becomes (N,)."""
    found = map_arrays(lambda name, array: cast(array, name, labels=True), *_with_names(tree, role))
    if isinstance(found, np.ndarray) and found.shape[1:] == (1,) and found.dtype == np.int32:
        return found[:, 0]
    return found


def _with_names(tree: Tree, role: str) -> tuple[Tree, Tree]:
    """A tree of names as in `named_arrays`, and the tree."""
    names = iter([name for name, _ in named_arrays(tree, role)])
    return map_arrays(lambda _: next(names), tree), tree


def cast(
    value: Any, name: str, *, labels: bool = False, wide: bool = False, axes: int = 1, masks: bool = False
) -> np.ndarray:
    """An array of one of the dtypes that are taken: uint8 (inputs only), int32, float32 or, with `masks`, bool.

    `wide`: of numbers that are centred before float32 holds them: float64 stays, and integers become it but for images,
    which have two axes or more behind the `axes` of the examples.

    Raises:
        DataError: numbers that int32 does not hold, masked arrays, and what is no number: texts, objects, dates.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise DataError(f"{name} must be a plain array, got a masked one: fill it first (array.filled(...))")
    if hasattr(value, "detach"):  # a PyTorch tensor
        value = value.detach().cpu()
    try:
        array = as_array(value)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"{name} must make one array: {error}") from error
    if array.dtype == object:
        array = _of_objects(array, value, name, labels)
    if array.dtype == bool and masks:
        return array
    if array.dtype == bool:
        return array.astype(np.int32 if labels else np.float32)
    if wide and (is_wide(array.dtype) or (array.dtype.kind in "iu" and not _is_image(array, axes))):
        return array.astype(np.float64, copy=False)
    if jnp.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):  # what float32 does not hold becomes infinite, and is refused as such
            return array.astype(np.float32, copy=False)
    if array.dtype == np.uint8 and not labels:
        return array
    if np.issubdtype(array.dtype, np.integer):
        if not labels and array.ndim - axes == 3 and array.shape[-1] in (1, 3):  # would be tokens, never divided by 255
            raise DataError(
                f"{name} must be uint8 where they are images (H, W, C), got {array.dtype} {array.shape}: "
                "array.astype(np.uint8) for pixels in 0..255, and others by normalize=True"
            )
        if array.size and (array.max() > _INT32.max or array.min() < _INT32.min):
            raise DataError(f"{name} must be in {_INT32.min}..{_INT32.max} (int32), got {array.min()}..{array.max()}")
        return array.astype(np.int32, copy=False)
    if array.dtype.kind in "UST":
        raise _no_numbers(name, array.dtype, repr(array.reshape(-1)[0]) if array.size else "none", labels)
    raise DataError(f"{name} must be integers, floats or bools, got {array.dtype}")


def is_wide(dtype: np.dtype) -> bool:
    """Whether floats are of more bits than float32 has, in whatever order of bytes."""
    return dtype.kind == "f" and dtype.itemsize >= 8


def unrounded(value: Any, name: str) -> np.ndarray | None:
    """The floats of an array or table as they are, where they have more bits than float32; else None."""
    value = value.detach().cpu() if hasattr(value, "detach") else value
    array = as_array(value)
    if array.dtype == object:
        array = _of_objects(array, value, name, False)
    return array if is_wide(array.dtype) else None


def _of_objects(array, value, name, labels):
    """Objects that are all numbers, as of a table whose columns differ in type, as such; what lacks is NaN."""
    kinds = {type(one) for one in array.flat}
    if kinds <= {bool, np.bool_}:
        return array.astype(bool)
    if all(issubclass(kind, numbers.Integral | np.bool_) for kind in kinds):
        try:
            return array.astype(np.int64)
        except OverflowError:
            raise DataError(f"{name} must be in {_INT32.min}..{_INT32.max} (int32), got {array.max()}") from None
    lacks = {kind for kind in kinds if kind is type(None) or kind.__name__ == "NAType"}  # pandas.NA
    if all(issubclass(kind, numbers.Real | np.bool_) for kind in kinds - lacks):
        filled = [np.nan if type(one) in lacks else float(one) for one in array.flat]
        return np.asarray(filled, np.float64).reshape(array.shape)
    at = next(
        i for i, one in np.ndenumerate(array) if not isinstance(one, numbers.Real | np.bool_) and type(one) not in lacks
    )
    where = f" in column {value.columns[at[-1]]!r}" if hasattr(value, "columns") else ""
    raise _no_numbers(name, array.dtype, repr(array[at]) + where, labels)


def _no_numbers(name, dtype, example, labels):
    advice = "number the classes 0, 1, …" if labels else "make numbers of them, such as tokens or columns"
    return DataError(
        f"{name} must be numbers, got {dtype} (the first that is none is {example}): {advice}; of a table in a file, "
        "data.from_csv does it"
    )


def _is_image(array: np.ndarray, axes: int) -> bool:
    """Whether integers are pixels by their dtype and shape."""
    return array.dtype == np.uint8 and array.ndim - axes in (2, 3)


def _images(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 (N, H, W) with a channel; images with the channels first are refused."""
    if array.dtype != np.uint8:
        return array
    check_channels_last(array.shape[1:], name)
    return array[..., None] if array.ndim == 3 else array


def check_channels_last(shape: tuple[int, ...], name: str) -> None:
    """Raises DataError for images, by the shape of one, that have their channels first, as PyTorch's do."""
    if len(shape) == 3 and shape[0] in (1, 3) and shape[1] > 4 and shape[2] > 4:
        raise DataError(
            f"{name} must have the channels of images last, (H, W, C), got {shape} of each: np.moveaxis(array, -3, -1) "
            "puts them there"
        )
