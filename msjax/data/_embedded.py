"""Sets that come with scikit-learn and need no download."""

from collections.abc import Callable
from typing import Any

import numpy as np

from msjax.data import _images
from msjax.data._dataset import Dataset, measure_columns, measure_images
from msjax.data._error import DataError


def digits(image_size: int | None) -> Dataset:
    """scikit-learn's digits."""
    bunch = _embedded("digits")
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    if image_size is not None:
        images = _images.resized(images, image_size)
    return _split("digits", images, bunch.target, 36, measure_images)


def breast_cancer() -> Dataset:
    """scikit-learn's copy of Breast Cancer Wisconsin (Diagnostic)."""
    bunch = _embedded("breast_cancer")
    everything = np.ones(bunch.data.shape[1], bool)
    return _split(
        "breast_cancer", bunch.data.astype(np.float32), bunch.target, 57, lambda x: measure_columns(x, everything)
    )


def _embedded(name: str) -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(
            f"the {name} set comes with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    return getattr(datasets, f"load_{name}")()


def _split(name: str, inputs: np.ndarray, labels: np.ndarray, test_of_class: int, measure: Callable) -> Dataset:
    """Of each class so many, drawn once and for all, are the test set."""
    labels = labels.astype(np.int32)
    classes = int(labels.max()) + 1
    rng = np.random.default_rng(0)
    test = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:test_of_class] for c in range(classes)])
    is_test = np.zeros(len(labels), bool)
    is_test[test] = True
    mean, std = (np.asarray(v, np.float32) for v in measure(inputs[~is_test]))
    return Dataset(name, inputs[~is_test], labels[~is_test], inputs[is_test], labels[is_test], classes, mean, std)
