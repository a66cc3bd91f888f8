"""Sets that come with this package and need no download; `embedded/README.md` says where they are from."""

import importlib.resources
from collections.abc import Callable

import numpy as np

from msjax.data import _images, _registry
from msjax.data._dataset import Arrays, Dataset
from msjax.data._measure import measure_columns, measure_images


def arrays(name: str) -> dict[str, np.ndarray]:
    """As they are in the file."""
    with (importlib.resources.files("msjax.data") / "embedded" / f"{name}.npz").open("rb") as file:
        return dict(np.load(file))


def load(name: str, image_size: int | None) -> Dataset:
    """`digits`, or `breast_cancer`."""
    found = arrays(name)
    if name == "digits":
        inputs = np.round(found["images"] * (255 / 16)).astype(np.uint8)[..., None]
        if image_size is not None:
            inputs = _images.resized(inputs, image_size)
        return _split(name, inputs, found["labels"], measure_images)
    return _split(name, found["columns"], found["labels"], measure_columns)


def _split(name: str, inputs: np.ndarray, labels: np.ndarray, measure: Callable) -> Dataset:
    """Of each class so many as the registry says, drawn once and for all, are the test set."""
    entry, labels = _registry.find(name), labels.astype(np.int32)
    rng = np.random.default_rng(0)
    order = [rng.permutation(np.flatnonzero(labels == c))[: entry.test_of_class] for c in range(entry.num_classes)]
    is_test = np.zeros(len(labels), bool)
    is_test[np.concatenate(order)] = True
    mean, std = (np.asarray(v, np.float32) for v in measure(inputs[~is_test]))
    splits = (Arrays(inputs[chosen], labels[chosen]) for chosen in (~is_test, is_test))
    return Dataset(name, *splits, entry.num_classes, mean, std, entry.augment)
