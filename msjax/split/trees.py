"""Trees of arrays as hashable descriptions, and the parts of a tree that have a gradient."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """Shapes and dtypes of the arrays of a tree, of one sample: without the batch axis.

    Equal by value and hashable, so it may be a static argument of `jax.jit`.
    """

    structure: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, tree: Any) -> "TreeSpec":
        """Returns the spec of a tree whose arrays are those of one sample."""
        leaves, structure = jax.tree.flatten(tree)
        return cls(structure, tuple(jax.ShapeDtypeStruct(leaf.shape, _dtype(leaf)) for leaf in leaves))

    @classmethod
    def of_batch(cls, tree: Any, batch_size: int, name: str) -> "TreeSpec":
        """Returns the spec of one sample of a batch.

        Args:
          tree: arrays, or their shapes and dtypes, of a batch.
          batch_size: the length that the first axis of every array must have.
          name: what an error calls the tree.

        Raises:
          ValueError: an array has no batch axis in front, or the tree has no array.
        """
        leaves, structure = jax.tree.flatten(tree)
        if not leaves:
            raise ValueError(f"{name} must have at least one array, got {tree!r}")
        for leaf_name, leaf in zip(leaf_names(structure), leaves, strict=True):
            if not hasattr(leaf, "shape") or not leaf.shape or leaf.shape[0] != batch_size:
                where = f" {leaf_name}" if leaf_name else ""
                found = describe_array(leaf) if hasattr(leaf, "shape") else repr(leaf)
                raise ValueError(f"{name}{where} must have the batch of {batch_size} as its first axis, got {found}")
        return cls(structure, tuple(jax.ShapeDtypeStruct(leaf.shape[1:], _dtype(leaf)) for leaf in leaves))

    def batch(self, batch_size: int) -> Any:
        """Returns the tree with the shapes and dtypes of a batch."""
        return jax.tree.unflatten(self.structure, self.batch_leaves(batch_size))

    def batch_leaves(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns shape and dtype of each array of a batch."""
        return tuple(jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype) for leaf in self.leaves)

    def of_length(self, length: int) -> "TreeSpec":
        """Returns the spec of the same arrays with another length of their first axes, such as of a text's tokens."""
        leaves = (jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype) for leaf in self.leaves)
        return dataclasses.replace(self, leaves=tuple(leaves))

    @property
    def names(self) -> tuple[str, ...]:
        """The path of each array in the tree, as "skips/0"; empty for a tree that is one array."""
        return leaf_names(self.structure)

    @property
    def nbytes(self) -> int:
        """Bytes of one sample, uncompressed."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.leaves)

    def to_json(self) -> list[list[Any]]:
        """Returns [name, dtype, shape] of each array."""
        return [[n, leaf.dtype.name, list(leaf.shape)] for n, leaf in zip(self.names, self.leaves, strict=True)]

    def __str__(self):
        arrays = ", ".join(
            f"{n} {describe_array(leaf)}".strip() for n, leaf in zip(self.names, self.leaves, strict=True)
        )
        return arrays if len(self.leaves) == 1 else f"({arrays})"


def leaf_names(structure: Any) -> tuple[str, ...]:
    """Returns the path of each leaf of a tree, its parts joined by "/"."""
    tree = jax.tree.unflatten(structure, range(structure.num_leaves))
    return tuple(name for name, _ in named_leaves(tree))


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Returns each leaf of a tree behind its path, the path's parts joined by "/"."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in pairs]


def describe_array(array: Any) -> str:
    """Returns dtype and shape, as "float32[4, 8, 8]"."""
    return f"{_dtype(array).name}{list(array.shape)}"


def is_float(leaf: Any) -> bool:
    """Whether an array has a gradient: its dtype is a floating one."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def float_leaves(tree: Any) -> list[Any]:
    """Returns the floating arrays of a tree, in order: those that have a gradient."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


def with_float_leaves(tree: Any, floats: list[Any]) -> Any:
    """Returns `tree` with its floating arrays replaced, in order."""
    leaves, structure = jax.tree.flatten(tree)
    floats = iter(floats)
    return jax.tree.unflatten(structure, [next(floats) if is_float(leaf) else leaf for leaf in leaves])


def count_floats(tree: Any) -> int:
    """Returns how many floating values a tree has."""
    return sum(math.prod(leaf.shape) for leaf in float_leaves(tree))


def to_vector(tree: Any) -> jax.Array:
    """Returns all floating values of a tree as one float32 vector."""
    return ravel_pytree([leaf.astype(jnp.float32) for leaf in float_leaves(tree)])[0]


def from_vector(vector: jax.Array, like: Any) -> Any:
    """Returns the tree `like` with the values of a vector; arrays that are not floating are kept."""
    floats = float_leaves(like)
    ends = np.cumsum([leaf.size for leaf in floats])[:-1]
    parts = jnp.split(vector, ends) if floats else []
    return with_float_leaves(
        like, [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, floats, strict=True)]
    )


def stack(trees: list[Any]) -> Any:
    """Returns one tree of NumPy arrays with a leading axis for the trees."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def unstack(tree: Any, count: int) -> list[Any]:
    """Returns the `count` trees of which `tree` has the arrays, taken apart on the host."""
    tree = jax.tree.map(np.asarray, tree)
    return [jax.tree.map(lambda leaf, k=k: leaf[k], tree) for k in range(count)]


def mean(tree: Any) -> Any:
    """Returns the mean over the leading axis of every floating array; of others, which are equal, the first."""
    return jax.tree.map(lambda leaf: leaf.mean(0) if is_float(leaf) else leaf[0], tree)


def sum_floats(tree: Any) -> Any:
    """Returns the sum over the leading axis of every floating array, in float32 at least; of others the first."""

    def total(leaf):
        return leaf.sum(0, dtype=jnp.promote_types(leaf.dtype, jnp.float32)) if is_float(leaf) else leaf[0]

    return jax.tree.map(total, tree)


def add_floats(a: Any, b: Any) -> Any:
    """Returns the sum of two such sums; of what is not floating, the second."""
    return jax.tree.map(lambda x, y: x + y if is_float(y) else y, a, b)


def zero_floats(tree: Any) -> Any:
    """Returns a sum of nothing, for `add_floats`, in the shapes of `tree`."""

    def zero(leaf):
        return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) if is_float(leaf) else leaf

    return jax.tree.map(zero, tree)


def _dtype(array):
    return np.dtype(array.dtype)
