"""Anything with `__len__` and `__getitem__` as a data set."""

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from msjax.data import _images, _sets
from msjax.data._arrays import are_classes, finish, share_indices
from msjax.data._check import check_inputs, check_labels
from msjax.data._columns import Column, standardized
from msjax.data._convert import cast, check_channels_last, has_masks
from msjax.data._dataset import Arrays, Dataset, Split, Tree, map_arrays, named_arrays
from msjax.data._error import DataError

log = logging.getLogger("msjax")

_IN_MEMORY_BYTES = 2 << 30
_CHUNK = 64  # examples that a thread reads at a time
INPUT_KEYS = ("image", "img", "images", "inputs", "input", "x", "features", "input_ids", "pixel_values")
LABEL_KEYS = ("label", "labels", "y", "target", "targets", "class")

Keys = str | int | Sequence[str | int] | None


def from_sequence(
    train: Any,
    test: Any = None,
    *,
    inputs: Keys = None,
    labels: Keys = None,
    num_classes: int | None = None,
    test_share: float | None = None,
    streamed: bool | None = None,
    threads: int | None = None,
    normalize: bool = False,
    name: str = "sequence",
    seed: int = 0,
) -> Dataset:
    """Make a data set of anything with `__len__` and `__getitem__`.

    So have grain's random-access sources, TFDS's data sources, Hugging Face's data sets and PyTorch's map-style sets.
    Items are pairs (input, label) or dicts; their values are arrays, numbers, PIL images or PyTorch tensors, and become
    what `from_arrays` makes of them; PIL images as by `from_image_folder`. Where there is a `__getitems__`, it is used.
    The set is read into memory where it is small, else streamed: its items are read while it is used, ahead of time, by
    worker processes where that pays (see `Reader`), to which `train` and `test` are sent by pickle. So a set on disk
    should keep what it opens out of its pickle, or open it when an item is asked for. What an item is must not change
    from one reading to the next.

    Args:
        train, test: the items; without `test` and `test_share` the set has no test data.
        inputs, labels: which keys of a dict (or places of a tuple) are the input and the label; several make a dict.
            By default the usual names (image, inputs, x, …; label, y, target, …).
        num_classes: where labels are classes; by default counted, or as Hugging Face's features say. It must be given
            where the set is not read into memory and nothing says it.
        test_share: instead of `test`: this part of `train` is set aside, at random; in memory of each class alike, but
            of what is streamed by number alone, so that the two set aside other examples.
        streamed: read items while they are used, rather than into memory; by default whether all items together have 2
            GiB or more, going by the first.
        threads: how many read into memory; by default as many as cores. 1 where the items must not be read by two at
            once: then neither do several read a streamed set.
        normalize: standardise numbers as `from_arrays` does; what is streamed is measured on 1,000 examples.
        name: for messages and records.
        seed: chooses what is set aside.

    Raises:
        DataError: items differ in shape, dtype or structure (their index is named), are no numbers, or break a rule of
            `check`.
    """
    options = {"inputs": inputs, "labels": labels, "threads": threads, "num_classes": num_classes, "wide": normalize}
    splits = [SequenceSplit(train, name, "train", **options)]
    if test is not None:
        if test_share is not None:
            raise DataError(f"test_share must be None where test is given, got {test_share}")
        splits.append(SequenceSplit(test, name, "test", **options))
    if streamed is None:
        streamed = are_large(splits)
    if not streamed:
        splits = [split.read() for split in splits]
    if test is None:
        splits = share_split(splits[0], test_share, seed)
    known, classes = _known_classes(train, splits[0].label_like, labels)
    if test is not None and classes is not None:
        _, others = _known_classes(test, splits[1].label_like, labels)
        if others not in (None, classes):
            raise DataError(f"test must have the classes of train, {classes}, in the same order, got {others}")
    if num_classes not in (None, known):
        classes = None
    num_classes = known if num_classes is None else num_classes
    ds = finish(name, *splits, num_classes=num_classes, normalize=normalize, classes=classes)
    for split in (ds.train, ds.test):
        if isinstance(split, SequenceSplit):
            split.num_classes = ds.num_classes
    return ds


def are_large(splits: Sequence["SequenceSplit"]) -> bool:
    """Whether splits are streamed by default."""
    return sum(split.total_bytes for split in splits) >= _IN_MEMORY_BYTES


def share_split(split: Split, test_share: float | None, seed: int, labels: np.ndarray | None = None) -> list[Split]:
    """Train and test of one split; of each class alike where the labels are in memory or given."""
    if test_share is None:
        chosen = np.arange(len(split)), np.arange(0)
    else:
        if labels is None and split.in_memory and are_classes(split.label_like):
            labels = split.targets
        chosen = share_indices(len(split) if labels is None else labels, test_share, seed)
    return [split.only(indices) for indices in chosen]


def _known_classes(items: Any, label_like: Tree, key: Keys) -> tuple[int | None, tuple[str, ...] | None]:
    """What Hugging Face's features say of the labels: how many classes, and their names."""
    features = getattr(items, "features", None)
    if not isinstance(features, dict) or not are_classes(label_like):
        return None, None
    keys = [key] if isinstance(key, str) else [k for k in LABEL_KEYS if k in features]
    feature = features.get(keys[0]) if keys else None
    count, names = getattr(feature, "num_classes", None), getattr(feature, "names", None)
    names = tuple(map(str, names or ()))
    return count, names if names and len(set(names)) == len(names) == count else None


class SequenceSplit:
    """A split of items that are read when they are asked for; see `from_sequence`.

    Attributes:
        input_like, label_like: shape and dtype of the first item's, which all must have.
        num_classes: labels are checked against it when they are read.
        threads: how many may read at once; None: any number.
    """

    in_memory = False

    def __init__(
        self,
        items: Any,
        name: str,
        split: str,
        *,
        inputs: Keys = None,
        labels: Keys = None,
        threads: int | None = None,
        num_classes: int | None = None,
        wide: bool = False,
    ):
        if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
            raise DataError(f"{split} must have __len__ and __getitem__, got {type(items).__name__}")
        self.name, self.split, self.num_classes = name, split, num_classes
        self._items, self._keys, self.threads = items, (inputs, labels), threads
        self._wide, self._columns = wide, None
        self._chosen: np.ndarray | None = None
        self._lock = _lock(threads)
        if not len(items):
            raise DataError(f"{split} of {name} must have examples, got none")
        item = self._get([0])[0]
        if inputs is None and isinstance(item, dict) and {"input_ids", "attention_mask"} <= item.keys():
            said = "%s of %s: attention_mask is not used; inputs=('input_ids', 'attention_mask') takes both"
            log.warning(said, split, name)
        first = self._example(0, item)
        self._read_like, self.label_like = (
            map_arrays(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree) for tree in first
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=_lock(state["threads"]))

    @property
    def input_like(self) -> Tree:
        """Shape and dtype of one example's inputs."""
        return self._read_like if self._columns is None else jax.ShapeDtypeStruct(self._read_like.shape, np.float32)

    def standardized(self, columns: Sequence[Column]) -> "SequenceSplit":
        """Returns the split of inputs that are centred and scaled before they become float32."""
        new = self.only(np.arange(len(self)))
        new._columns = columns
        return new

    def __len__(self) -> int:
        return len(self._items) if self._chosen is None else len(self._chosen)

    @property
    def total_bytes(self) -> int:
        """About the memory of all examples."""
        likes = jax.tree.leaves((self.input_like, self.label_like))
        return len(self) * sum(int(np.prod(like.shape)) * like.dtype.itemsize for like in likes)

    def only(self, indices: np.ndarray) -> "SequenceSplit":
        """Returns the split of these examples alone."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._chosen = indices if self._chosen is None else self._chosen[indices]
        return new

    def fetch(self, indices: np.ndarray, entropy: tuple[int, ...] = ()) -> tuple[Tree, Tree]:
        """Returns inputs (n, ...) and labels (n, ...) of these examples, checked."""
        inner = np.asarray(indices) if self._chosen is None else self._chosen[indices]
        examples = [self._example(int(i), item) for i, item in zip(inner, self._get(inner), strict=True)]
        found = []
        for what, like, column in zip(
            ("inputs", "labels"), (self._read_like, self.label_like), zip(*examples, strict=True), strict=True
        ):
            if self._wide and isinstance(like, jax.ShapeDtypeStruct):  # one float or the other
                column = [one.astype(like.dtype) if one.dtype.kind == like.dtype.kind == "f" else one for one in column]
            for i, example in zip(inner, column, strict=True):
                self._check_alike(f"the {what} of item {i}", example, like)
            found.append(map_arrays(lambda *leaves: np.stack(leaves), *column))
        inputs, labels = found
        if self._columns is not None:
            inputs = standardized(inputs, self._columns)
        check_inputs(inputs, f"{self.name}: {self.split} inputs", indices=inner)
        check_labels(labels, f"{self.name}: {self.split} labels", self.num_classes, inner)
        return inputs, labels

    def labels(self) -> Tree:
        """Returns the labels (N, ...) of the whole split, for which every item is read."""
        return self._read_all(lambda inputs, labels: labels, self.label_like)

    def read(self) -> Arrays:
        """Returns the split in memory."""
        return Arrays(*self._read_all(lambda inputs, labels: (inputs, labels), (self.input_like, self.label_like)))

    def _read_all(self, choose: Callable, like: Tree) -> Tree:
        out = jax.tree.map(lambda one: np.empty((len(self), *one.shape), one.dtype), like)

        def fill(lo: int) -> None:
            hi = min(lo + _CHUNK, len(self))
            found = choose(*self.fetch(np.arange(lo, hi)))
            for whole, part in zip(jax.tree.leaves(out), jax.tree.leaves(found), strict=True):
                whole[lo:hi] = part

        _sets.for_each(fill, range(0, len(self), _CHUNK), threads=self.threads)
        return out

    def _get(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        """The items as they come."""
        indices = [int(i) for i in indices]
        with self._lock:
            if hasattr(self._items, "__getitems__"):
                try:
                    found = list(self._items.__getitems__(indices))
                except DataError:
                    raise
                except Exception:  # one by one, to name it
                    return [self._item(i) for i in indices]
                if len(found) != len(indices):
                    raise DataError(f"__getitems__ of {self.name} must give an item an index, got {len(found)}")
                return found
            return [self._item(i) for i in indices]

    def _item(self, index: int) -> Any:
        try:
            return self._items[index]
        except DataError:
            raise
        except Exception as error:  # whatever the user's own class raises
            what = f"item {index} of {self.name} ({self.split})"
            raise DataError(f"{what} cannot be read: {type(error).__name__}: {error}") from error

    def _example(self, index: int, item: Any) -> tuple[Tree, Tree]:
        """Input and label of an item as arrays."""
        values = _choose(item, self._keys, f"item {index} of {self.name} ({self.split})")
        split, (inputs, labels) = f"{self.name}: {self.split}", values
        options = {"wide": self._wide, "masks": has_masks(inputs)}
        inputs = map_arrays(lambda one: _array(one, f"{split} inputs of item {index}", **options), inputs)
        labels = map_arrays(lambda one: _array(one, f"{split} labels of item {index}", label=True), labels)
        if isinstance(labels, np.ndarray) and labels.shape == (1,) and labels.dtype == np.int32:
            labels = labels[0:1].reshape(())
        return inputs, labels

    def _check_alike(self, what: str, found: Tree, like: Tree) -> None:
        single = isinstance(found, np.ndarray) and isinstance(like, jax.ShapeDtypeStruct)
        if single and (found.shape, found.dtype) == (like.shape, like.dtype):
            return  # the usual case, quickly
        pairs = [named_arrays(tree, what) for tree in (found, like)]
        shapes = [[(name, leaf.shape, leaf.dtype) for name, leaf in pair] for pair in pairs]
        if shapes[0] != shapes[1]:
            described = [", ".join(f"{n.removeprefix(what)}{d}{list(s)}" for n, s, d in found) for found in shapes]
            raise DataError(
                f"{what} of {self.name} ({self.split}) must be as the first item's, {described[1]}, got {described[0]}"
            )


def _lock(threads: int | None) -> Any:
    """What lets one thread at a time read, where it must be so."""
    return threading.Lock() if threads == 1 else contextlib.nullcontext()


def _array(value: Any, name: str, *, label: bool = False, **options: bool) -> np.ndarray:
    """One value of an item."""
    if hasattr(value, "getbands"):  # a PIL image: of palettes and the like only this gives pixels
        with _images.decoding(name):  # Pillow reads a file's pixels only now
            value = np.asarray(_images.upright(value)) if label else _images.to_array(_images.flatten(value))
    if isinstance(value, list) and value and hasattr(value[0], "detach"):
        value = np.stack([np.asarray(v.detach().cpu()) for v in value])
    array = cast(value, name, labels=label, axes=0, **options)
    if array.dtype == np.uint8:  # of inputs alone
        check_channels_last(array.shape, name)
    return array[..., None] if array.dtype == np.uint8 and array.ndim == 2 else array


def _choose(item: Any, keys: tuple[Keys, Keys], what: str) -> tuple[Any, Any]:
    """The input and the label of an item."""
    if isinstance(item, dict):
        return tuple(
            _pick(item, key, usual, role, what)
            for key, usual, role in zip(keys, (INPUT_KEYS, LABEL_KEYS), ("inputs", "labels"), strict=True)
        )
    if not isinstance(item, tuple | list):
        raise DataError(f"{what} must be a pair (input, label) or a dict, got {type(item).__name__}")
    if keys == (None, None) and len(item) != 2:
        raise DataError(f"{what} must be a pair (input, label), got {len(item)} values: name their places")
    places = [default if key is None else key for key, default in zip(keys, (0, 1), strict=True)]
    return tuple(
        _pick(dict(enumerate(item)), key, (), role, what)
        for key, role in zip(places, ("inputs", "labels"), strict=True)
    )


def _pick(item: dict, key: Keys, usual: tuple[str, ...], role: str, what: str) -> Any:
    there = ", ".join(map(str, item))
    if isinstance(key, list | tuple):
        if missing := [k for k in key if k not in item]:
            raise DataError(f"{what} has no {missing[0]} for {role}; it has {there}")
        return {str(k): item[k] for k in key}
    if key is None:
        key = next((k for k in usual if k in item), None)
        if key is None:
            raise DataError(f"{role} must name a key of {what}, which has {there}")
    if key not in item:
        raise DataError(f"{what} has no {key} for {role}; it has {there}")
    return item[key]
