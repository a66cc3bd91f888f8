"""What a network has to know of a data set."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from msjax import config, data
from msjax.split.spec import Preprocess
from msjax.split.trees import TreeSpec


def _alike(one, other):
    """Whether values are equal, numbers but for what another machine rounds otherwise."""
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12)
    return one == other


class DataSummary(NamedTuple):
    """What a network has to know of a data set.

    Attributes:
      inputs, labels: of one example, as they are stored.
      num_classes: where labels are classes.
      mean, std: for `data.normalize`; None where inputs are taken as they are.
      augment: the usual augmentation of the set.
      columns: of a table, how its columns became inputs.
      tokenizer: of texts, what split them: of words a version, of a tokenizer.json its hash.
      classes: the names of the classes, where they are known.
    """

    inputs: TreeSpec
    labels: TreeSpec
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: str = "none"
    tokenizer: int | str | None = None
    columns: tuple[data.Column, ...] | None = None
    classes: tuple[str, ...] | None = None

    @classmethod
    def of(cls, ds: data.Dataset) -> "DataSummary":
        """Returns the summary of a data set."""
        mean, std = (None if v is None else tuple(map(float, v)) for v in (ds.mean, ds.std))
        inputs, labels = TreeSpec.of(ds.input_like), TreeSpec.of(ds.label_like)
        num_classes = None if ds.num_classes is None else int(ds.num_classes)  # NumPy's are no JSON
        return cls(inputs, labels, num_classes, mean, std, ds.augment, ds.tokenizer, ds.columns, ds.classes)

    def normalized_as(self, cfg: config.DataConfig) -> "DataSummary":
        """Returns it with the config's `mean` and `std`, where it has them.

        Raises:
          ValueError: they are not as many as the inputs have channels.
        """
        if cfg.mean is None or cfg.std is None:
            return self
        for name, values in (("mean", cfg.mean), ("std", cfg.std)):
            if len(values) != self.input_shape[-1]:
                raise ValueError(f"data.{name} must have {self.input_shape[-1]} numbers, got {values}")
        if self.columns is None:
            return self._replace(mean=cfg.mean, std=cfg.std)
        # What the config's mean and std are of the columns as they were, in terms of the inputs that came of them.
        own_mean, own_std = map(np.asarray, data.column_statistics(self.columns))
        mean, std = (np.asarray(cfg.mean) - own_mean) / own_std, np.asarray(cfg.std) / own_std
        return self._replace(mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def check_trained(self, trained: "DataSummary") -> None:
        """Raises ValueError where data to test on are read otherwise than those that a part was trained on."""
        for name in ("inputs", "num_classes", "classes", "columns"):
            mine, theirs = getattr(self, name), getattr(trained, name)
            # In a file trees of inputs are flat.
            same = mine.to_json() == theirs.to_json() if name == "inputs" else _alike(mine, theirs)
            if not same and (name != "classes" or None not in (mine, theirs)):
                shown = ("", "") if name == "columns" else (f" {theirs}", f", got {mine}")
                raise ValueError(
                    f"the data must have the {name.replace('_', ' ')} of those that the part was trained on{shown[0]}, "
                    f"which say what its inputs and outputs mean{shown[1]}: give the same data to train on"
                )

    def normalize(self, inputs: Any) -> Any:
        """Returns a batch of inputs, as the data set stores them, as a network takes them: in float32 where they are.

        Images and other numbers with `mean` and `std` are normalised by them; all else stays as it is.
        """
        return Preprocess("none", self.mean, self.std, maximum=pixel_maximum(self.inputs))(inputs)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example's inputs.

        Raises:
          ValueError: they are a tree of several arrays.
        """
        if len(self.inputs.leaves) != 1:
            raise ValueError(f"the model takes one array of inputs, but the data set has {self.inputs}")
        return tuple(self.inputs.leaves[0].shape)

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON-ready values."""
        found = {"inputs": self.inputs.to_json(), "labels": self.labels.to_json(), "num_classes": self.num_classes}
        for name, spec in (("inputs", self.inputs), ("labels", self.labels)):
            if (structure := _structure(spec)) is not None:
                found[f"{name}_structure"] = structure
        if len(self.inputs.leaves) == 1:
            found["input_shape"] = list(self.input_shape)
        if self.tokenizer is not None:
            found["tokenizer"] = self.tokenizer
        if self.classes is not None:
            found["classes"] = list(self.classes)
        if self.columns is not None:
            found["columns"] = [column._asdict() for column in self.columns]
        mean, std = (None if v is None else np.asarray(v).tolist() for v in (self.mean, self.std))
        return found | {"mean": mean, "std": std}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "DataSummary":
        """Returns what `to_json` made, or an earlier version's, in which trees are flat dicts by their arrays' names.

        Raises:
          KeyError, TypeError, ValueError: it is neither.
        """
        mean, std = (None if tree[name] is None else tuple(map(float, tree[name])) for name in ("mean", "std"))
        shape = tree.get("input_shape")
        first = "uint8" if shape is not None and len(shape) == 3 else "float32"  # images, where dtypes are not said yet
        inputs = _from_names(tree.get("inputs", [["", first, shape]]), tree.get("inputs_structure"))
        labels = _from_names(tree.get("labels", [["", "int32", []]]), tree.get("labels_structure"))
        columns = tree.get("columns")
        if columns is not None:
            columns = tuple(data.Column(**(column | {"texts": tuple(column["texts"])})) for column in columns)
        classes = None if tree.get("classes") is None else tuple(map(str, tree["classes"]))
        rest = {"tokenizer": tree.get("tokenizer"), "columns": columns, "classes": classes}
        return cls(inputs, labels, tree["num_classes"], mean, std, **rest)


def pixel_maximum(inputs: TreeSpec) -> float | None:
    """Returns what `data.normalize` divides by: a data set's mean and std are of pixels / 255, or of floats.

    None of all others: tokens are not divided, and whatever else there might be is refused.
    """
    dtypes = [leaf.dtype for leaf in inputs.leaves]
    return {np.dtype(np.uint8): 255.0, np.dtype(np.float32): 1.0}.get(dtypes[0]) if len(dtypes) == 1 else None


def _from_names(arrays, structure=None):
    leaves = [jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for _, dtype, shape in arrays]
    if structure is not None:
        numbers, tree = jax.tree.flatten(_filled(structure, len(leaves)))
        if numbers != list(range(len(leaves))):
            raise ValueError(f"a structure must have each of {len(leaves)} arrays once, in order, got {structure!r}")
        return TreeSpec(tree, tuple(leaves))
    found = dict(zip((name for name, *_ in arrays), leaves, strict=True))
    return TreeSpec.of(found[""] if list(found) == [""] else found)


_DEEPEST = 32  # of trees of inputs and labels in a file or message


def _structure(spec):
    """How arrays are nested, as JSON of their numbers.

    None where names do: of one array, or a flat dict. And of other containers than dicts and tuples.
    """
    tree = jax.tree.unflatten(spec.structure, range(len(spec.leaves)))
    if isinstance(tree, int) or (type(tree) is dict and all(isinstance(value, int) for value in tree.values())):
        return None

    def nested(tree):
        if isinstance(tree, int):
            return tree
        if type(tree) is dict and all(isinstance(name, str) for name in tree):
            return {"dict": {name: nested(value) for name, value in tree.items()}}
        if type(tree) is tuple:
            return {"tuple": [nested(value) for value in tree]}
        raise TypeError(type(tree))

    try:
        return nested(tree)
    except TypeError:
        return None


def _filled(structure, count, depth=0):
    """The tree of numbers below `count` that `_structure` described."""
    if isinstance(structure, int) and not isinstance(structure, bool) and 0 <= structure < count:
        return structure
    if depth < _DEEPEST and isinstance(structure, dict) and len(structure) == 1:
        match structure:
            case {"dict": dict(inner)}:
                return {name: _filled(value, count, depth + 1) for name, value in inner.items()}
            case {"tuple": list(inner)}:
                return tuple(_filled(value, count, depth + 1) for value in inner)
    raise ValueError(f"a structure must be of dicts, tuples and numbers of arrays, got {structure!r}")


def check_tokenizer(present: int | str | None, trained: int | str | None) -> None:
    """Raises ValueError where texts have other words here than those that a checkpoint or part was trained on.

    Args:
      present: what splits the texts here, as of `data.Dataset.tokenizer`; None where there are none.
      trained: what was written down with what was trained: not the first version of words, nor at first a hash.
    """
    if isinstance(present, str):
        if trained not in (None, present):
            raise ValueError(f"data.tokenizer must be that of the run, of hash {trained}, got one of hash {present}")
        return
    if present not in (None, trained or 1):
        raise ValueError(
            f"what goes on must be trained on words of tokenizer {present}, which this version of msjax has, got what "
            f"was trained on those of tokenizer {trained or 1}: train it anew, or use the version that began it"
        )
