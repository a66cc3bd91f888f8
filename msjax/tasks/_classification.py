"""One class a sample, or several labels that are each there or not."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Integer

from msjax.checks import number
from msjax.tasks._task import Metric, Ratio, Task, check_class_dtype, check_class_labels, check_outputs, mean_of


def classification(*, label_smoothing: float = 0.0) -> Task:
    """Returns the task of one class a sample: outputs are logits (B, C), labels integers (B,) in 0 … C − 1.

    The loss is the softmax cross-entropy in nats; metrics are `top1_percent` and `top5_percent`.

    Args:
      label_smoothing: the part of the target that is spread over all classes in training, in [0, 1); the loss on test
        data has none.

    Raises:
      ValueError: `label_smoothing` is out of range.
    """
    label_smoothing = number("label_smoothing", label_smoothing, "a number in [0, 1)", lambda value: 0 <= value < 1)
    metrics = (("top1_percent", Metric(_Top(1), Ratio(100))), ("top5_percent", Metric(_Top(5), Ratio(100))))
    plain = CrossEntropy()
    return Task("classification", CrossEntropy(label_smoothing), metrics, plain, _check_classes)


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy of each sample, in nats; see `cross_entropy`."""

    label_smoothing: float = 0.0

    def __call__(self, outputs, labels):
        check_outputs(outputs, "classification")
        check_class_dtype(labels.dtype)
        if outputs.ndim != 2 or labels.ndim != 1:
            raise ValueError(
                "outputs must be logits (B, C) and labels (B,) for classification, got one sample's of shapes "
                f"{outputs.shape[1:]} and {labels.shape[1:]}"
            )
        return cross_entropy(outputs, labels, self.label_smoothing)


def cross_entropy(
    logits: Float[Array, "b c"], labels: Integer[Array, "b"], label_smoothing: float = 0.0
) -> Float[Array, "b"]:
    """Returns the softmax cross-entropy of each sample in nats, computed in float32.

    With `label_smoothing` s the target is 1 − s at the label plus s/c everywhere (arXiv 1512.00567, section 7).
    """
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))
    if label_smoothing:
        uniform = jax.nn.logsumexp(logits, axis=1) - logits.mean(axis=1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    return losses


def count_correct(logits: Float[Array, "b c"], labels: Integer[Array, "b"], top: int = 1) -> Int[Array, ""]:
    """Returns how many labels are among the `top` largest logits.

    A label's rank is the number of classes above it or beside it with a smaller number; a row with NaN or ±Inf counts
    as wrong, and so does a label that is no class.
    """
    labels = labels.astype(jnp.int32)  # narrow dtypes do not hold the number of classes
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    classes = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    before = (logits == own) & (classes < labels[:, None])
    rank = jnp.sum((logits > own) | before, axis=1)
    is_class = (labels >= 0) & (labels < logits.shape[1])
    return jnp.sum(jnp.isfinite(logits).all(axis=1) & is_class & (rank < top))


@dataclasses.dataclass(frozen=True)
class _Top:
    """The share of samples whose label is among the `top` largest logits, in percent."""

    top: int

    def __call__(self, outputs, labels):
        correct = count_correct(outputs, labels, self.top)
        return jnp.stack([correct.astype(jnp.int32), jnp.int32(labels.shape[0])])


def _check_classes(labels, outputs):
    check_class_labels(labels, outputs.shape[-1])


def multi_label() -> Task:
    """Returns the task of labels that are each there or not: outputs are logits (B, C), labels 0 or 1 in (B, C).

    The loss is the mean over labels of the sigmoid cross-entropy in nats; metrics are `accuracy_percent`, of labels,
    and `exact_percent`, of samples all of whose labels are right. A logit above 0 says that the label is there.
    """
    metrics = (
        ("accuracy_percent", mean_of(_labels_right, 100.0)),
        ("exact_percent", mean_of(_all_right, 100.0)),
    )
    return Task("multi_label", _sigmoid_cross_entropy, metrics, None, _check_binary)


def _sigmoid_cross_entropy(outputs, labels):
    check_outputs(outputs, "multi_label")
    labels = _with_axis(labels, outputs.shape)
    if outputs.shape != labels.shape:
        raise ValueError(
            f"labels must have the outputs' shape {outputs.shape[1:]} a sample for multi_label, got {labels.shape[1:]}"
        )
    losses = optax.sigmoid_binary_cross_entropy(outputs.astype(jnp.float32), labels.astype(jnp.float32))
    # Labels of data that are read as they are needed have not been checked before: the loss is then no number.
    losses = jnp.where((labels == 0) | (labels == 1), losses, jnp.nan)
    return losses.reshape(losses.shape[0], -1).mean(1)


def _right(outputs, labels):
    labels = _with_axis(labels, outputs.shape)
    return ((outputs > 0) == (labels.astype(jnp.float32) > 0.5)).reshape(outputs.shape[0], -1)


def _labels_right(outputs, labels):
    return _right(outputs, labels).mean(1, dtype=jnp.float32)


def _all_right(outputs, labels):
    return _right(outputs, labels).all(1)


def _with_axis(labels, shape):
    """Labels (N,) of one class as (N, 1)."""
    return labels[:, None] if labels.ndim == 1 and tuple(shape[1:]) == (1,) else labels


def _check_binary(labels, outputs):
    labels = _with_axis(labels, (len(labels), *outputs.shape))
    if labels.shape[1:] != outputs.shape:
        raise ValueError(f"labels must have the outputs' shape {outputs.shape} a sample, got {labels.shape[1:]}")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"labels must be 0 or 1 for multi_label, got {labels[(labels != 0) & (labels != 1)][0]}")
