"""Sets that come with scikit-learn and need no download."""

from collections.abc import Callable
from typing import Any

import numpy as np

from msjax.data import _images, _registry
from msjax.data._dataset import Arrays, Dataset
from msjax.data._error import DataError
from msjax.data._measure import measure_columns, measure_images


def load(name: str, image_size: int | None) -> Dataset:
    """`digits`, or `breast_cancer`: scikit-learn's copy of Breast Cancer Wisconsin (Diagnostic)."""
    bunch = _bunch(name)
    if name == "digits":
        inputs = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
        if image_size is not None:
            inputs = _images.resized(inputs, image_size)
        return _split(name, inputs, bunch.target, measure_images)
    every_column = np.ones(bunch.data.shape[1], bool)
    inputs = bunch.data.astype(np.float32)
    return _split(name, inputs, bunch.target, lambda table: measure_columns(table, every_column))


def _bunch(name: str) -> Any:
    """As scikit-learn has it."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(
            f"the {name} set comes with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    return getattr(datasets, f"load_{name}")()


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
