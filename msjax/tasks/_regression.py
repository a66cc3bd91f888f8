"""Numbers to be predicted."""

import jax.numpy as jnp
import numpy as np

from msjax.tasks._task import Metric, Task, check_outputs, mean_of, ratio


def regression() -> Task:
    """Returns the task of predicting numbers: outputs (B, …), floating, and labels of the same shape.

    The loss is the mean squared error of a sample's values; metrics are `rmse` and `mae`, in the labels' unit. Outputs
    (B, 1) go with labels (B,).
    """
    metrics = (("rmse", Metric(_squares, _root)), ("mae", mean_of(_absolute)))
    return Task("regression", _squared, metrics, None, _check)


def _differences(outputs, labels):
    check_outputs(outputs, "regression")
    if outputs.ndim == labels.ndim + 1 and outputs.shape[-1] == 1:
        outputs = outputs[..., 0]
    if outputs.shape != labels.shape:
        raise ValueError(
            f"outputs must have the labels' shape {labels.shape[1:]} a sample for regression, got {outputs.shape[1:]}"
        )
    difference = outputs.astype(jnp.float32) - labels.astype(jnp.float32)
    return difference.reshape(difference.shape[0], -1)


def _squared(outputs, labels):
    return (_differences(outputs, labels) ** 2).mean(1)


def _absolute(outputs, labels):
    return jnp.abs(_differences(outputs, labels)).mean(1)


def _squares(outputs, labels):
    squares = _squared(outputs, labels)
    return jnp.stack([squares.sum(), jnp.float32(squares.shape[0])])


def _root(total):
    return float(np.sqrt(ratio(*total)))


def _check(labels, outputs):
    if not np.isfinite(labels).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(labels))[0])
        raise ValueError(f"labels must be finite, got {labels[at]} at index {at[0] if len(at) == 1 else at}")
