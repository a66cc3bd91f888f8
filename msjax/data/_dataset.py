"""What a data set is: two splits, and what a network has to know of them."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from msjax.data._columns import Column
from msjax.data._error import DataError

Tree = Any
"""An array, or a dict or tuple (of dicts or tuples …) of arrays."""


@runtime_checkable
class Split(Protocol):
    """Examples with random access: what `batches` reads.

    Inputs and labels are arrays, or dicts or tuples of arrays, with the examples along the first axis.

    Attributes:
        in_memory: whether everything is in arrays already: `inputs` and `targets`, as `Arrays` has them. What is not
            is sent to worker processes by pickle.
        input_like: shape and dtype of one example's inputs as they are stored, for example uint8 (32, 32, 3).
        label_like: the same of one label.
    """

    in_memory: bool

    @property
    def input_like(self) -> Tree: ...

    @property
    def label_like(self) -> Tree: ...

    def __len__(self) -> int: ...

    def labels(self) -> Tree:
        """Returns the labels (N, ...) of the whole split, which may take a pass over it."""
        ...

    def fetch(self, indices: np.ndarray, entropy: tuple[int, ...] = ()) -> tuple[Tree, Tree]:
        """Returns inputs (n, ...) and labels (n, ...) of these examples, in host memory.

        Called from several threads or processes at once. What is random about example i depends on (*entropy, i)
        alone.
        """
        ...

    def only(self, indices: np.ndarray) -> "Split":
        """Returns the split of these examples alone, each with what is random about it here."""
        ...


class Arrays:
    """A split in memory.

    Attributes:
        inputs: (N, ...) arrays as they were given; memory maps stay memory maps.
        targets: (N, ...) labels.
    """

    in_memory = True

    def __init__(self, inputs: Tree, labels: Tree):
        """Takes NumPy arrays, and whatever `np.asarray` makes arrays of; nothing is copied or cast.

        Raises:
            DataError: the arrays have no first axis or not one length.
        """
        self.inputs, self.targets = map_arrays(as_array, inputs), map_arrays(as_array, labels)
        lengths = {}
        for role, tree in (("inputs", self.inputs), ("labels", self.targets)):
            for name, array in named_arrays(tree, role):
                if array.ndim == 0:
                    raise DataError(f"{name} must have the examples along a first axis, got one {array.dtype}")
                lengths[name] = len(array)
        if len(set(lengths.values())) != 1:
            found = ", ".join(f"{n} {name}" for name, n in lengths.items()) or "no array"
            raise DataError(f"inputs and labels must have one length, got {found}")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    @property
    def input_like(self) -> Tree:
        """Shape and dtype of one example's inputs."""
        return map_arrays(_one, self.inputs)

    @property
    def label_like(self) -> Tree:
        """Shape and dtype of one label."""
        return map_arrays(_one, self.targets)

    def labels(self) -> Tree:
        """Returns the labels (N, ...)."""
        return self.targets

    def fetch(self, indices: np.ndarray, entropy: tuple[int, ...] = ()) -> tuple[Tree, Tree]:
        """Returns inputs and labels of these examples; nothing is random."""
        return self[indices]

    def only(self, indices: np.ndarray) -> "Arrays":
        """Returns the split of these examples alone, copied."""
        return Arrays(*self[indices])

    def __getitem__(self, indices: Any) -> tuple[Tree, Tree]:
        inputs, targets = (map_arrays(lambda a: a[indices], tree) for tree in (self.inputs, self.targets))
        return inputs, targets

    def __repr__(self) -> str:
        return f"Arrays({len(self)} of {self.input_like} and {self.label_like})"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set: what is trained and tested on, and what a network has to know of it.

    Attributes:
        name: as given to `load`.
        train: the split to train on.
        test: the split to test on; of length 0 where there is none.
        num_classes: number of classes where labels are classes, 0 <= label < num_classes; else None.
        mean, std: float32 [C] for `normalize`: of pixels / 255 of images, of the last axis of floats, empty of tokens.
            None: inputs are taken as they are.
        augment: the usual one of `AUGMENTATIONS` for the set.
        columns: of a table, or other numbers that are standardised already: how each column became inputs (mean, std
            and median of the training rows, names of classes). `table_inputs` and `TableFormat` make inputs of other
            rows by them; `mean` and `std` are None then.
        tokenizer: of texts, what split them: of words of `load` a version, of a tokenizer.json its hash; else None.
        classes: the names of the classes in the order of their numbers, where they are known.
    """

    name: str
    train: Split
    test: Split
    num_classes: int | None
    mean: np.ndarray | None
    std: np.ndarray | None
    augment: str = "none"
    tokenizer: int | str | None = None
    columns: tuple[Column, ...] | None = None
    classes: tuple[str, ...] | None = None

    @property
    def input_like(self) -> Tree:
        """Shape and dtype of one example's inputs as they are stored."""
        return self.train.input_like

    @property
    def label_like(self) -> Tree:
        """Shape and dtype of one label."""
        return self.train.label_like

    @property
    def in_memory(self) -> bool:
        """Whether both splits are."""
        return self.train.in_memory and self.test.in_memory

    @property
    def train_inputs(self) -> Tree:
        """Inputs (N, ...) to train on; images uint8 [N, H, W, C], tokens int32 [N, length], a table float32."""
        return self._arrays("train").inputs

    @property
    def train_labels(self) -> Tree:
        """Labels (N, ...) to train on; int32 [N] where they are classes."""
        return self._arrays("train").targets

    @property
    def test_inputs(self) -> Tree:
        """Inputs (N, ...) to test on."""
        return self._arrays("test").inputs

    @property
    def test_labels(self) -> Tree:
        """Labels (N, ...) to test on."""
        return self._arrays("test").targets

    def _arrays(self, split: str) -> Any:
        found = getattr(self, split)
        if not found.in_memory:
            raise DataError(f"the {split} split of {self.name} is not in memory: read it by data.batches or its fetch")
        return found


def _digest(split: Split) -> str | int:
    if not split.in_memory:
        return len(split)
    found = hashlib.sha256()
    for leaf in jax.tree.leaves((split.inputs, split.targets)):  # type: ignore[attr-defined]  # it is in memory
        found.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return found.hexdigest()


def digests(ds: Dataset) -> list[str | int]:
    """Returns what tells the data to train and those to test on from others.

    Of each, a SHA-256 of its bytes in memory, inputs and then labels; of what is streamed, its length.
    """
    return [_digest(split) for split in (ds.train, ds.test)]


def as_array(value: Any) -> np.ndarray:
    """A NumPy array; memory maps as they are."""
    return value if type(value) in (np.ndarray, np.memmap) else np.asarray(value)


def _is_leaf(value: Any) -> bool:
    """Dicts and tuples are trees; a list is an array that is not made yet."""
    return not isinstance(value, dict | tuple)


def map_arrays(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Maps over the arrays of a tree; a bare array is a tree."""
    return jax.tree.map(function, tree, *rest, is_leaf=_is_leaf)


def named_arrays(tree: Tree, role: str) -> list[tuple[str, Any]]:
    """The arrays of a tree with names such as inputs['image']."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    return [(role + jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _one(array: np.ndarray) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one example."""
    return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
