"""A class for every pixel, or for every token."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax

from msjax.checks import integer
from msjax.tasks._task import Metric, Ratio, Task, check_class_labels, check_outputs, ratio


def segmentation(num_classes: int, *, ignore: int | None = None) -> Task:
    """Returns the task of a class a pixel: outputs are logits (B, …, C), labels integers (B, …) in 0 … C − 1.

    The loss is the mean over a sample's pixels of the softmax cross-entropy in nats; metrics are `mean_iou_percent`,
    the mean over all classes, the background's too, of intersection over union, counted over the whole set,
    `mean_dice_percent`, the same of the Dice coefficient, and `pixel_accuracy_percent`.

    Args:
      num_classes: C.
      ignore: a label whose pixels count for nothing. A sample with no other pixels has the loss 0.

    Raises:
      ValueError: `num_classes` is no integer of at least 1, or `ignore` none.
    """
    num_classes = integer("num_classes", num_classes, 1)
    ignore = None if ignore is None else integer("ignore", ignore)
    confusion = _Confusion(num_classes, ignore)
    metrics = (
        ("mean_iou_percent", Metric(confusion, _OverClasses(ignore, _iou))),
        ("mean_dice_percent", Metric(confusion, _OverClasses(ignore, _dice))),
        ("pixel_accuracy_percent", Metric(confusion, _right)),
    )
    loss = DenseCrossEntropy(ignore)
    return Task("segmentation", loss, metrics, None, _ClassesAre(num_classes, ignore))


def next_token(*, ignore: int | None = -100) -> Task:
    """Returns the task of language modelling: outputs are logits (B, T, V), labels the tokens to predict (B, T).

    The labels are already shifted: the label at place t is the token behind input token t. The loss is the mean over a
    sample's tokens of the cross-entropy in nats; metrics are `perplexity` and `accuracy_percent`, over all tokens.

    Args:
      ignore: a label that counts for nothing, as of padding. A sample with no other labels has the loss 0, which lowers
        the mean loss; metrics are of the tokens that count.

    Raises:
      ValueError: `ignore` is no integer.
    """
    ignore = None if ignore is None else integer("ignore", ignore)
    metrics = (
        ("perplexity", Metric(_Nats(ignore), _perplexity)),
        ("accuracy_percent", Metric(_Hits(ignore), Ratio(100))),
    )
    return Task("next_token", DenseCrossEntropy(ignore), metrics, None, _ClassesAre(None, ignore))


@dataclasses.dataclass(frozen=True)
class DenseCrossEntropy:
    """The mean over a sample's places of the softmax cross-entropy in nats; places with label `ignore` do not count."""

    ignore: int | None = None

    def __call__(self, outputs, labels):
        check_outputs(outputs, "a class a place")
        losses, weights = _nats(outputs, labels, self.ignore)
        return (losses * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def _nats(outputs, labels, ignore):
    """(cross-entropy, weight 0 or 1) of every place, each (B, places)."""
    places = outputs.shape[:-1]
    if labels.shape != places:
        raise ValueError(f"labels must have the outputs' shape without its last axis, {places}, got {labels.shape}")
    labels = labels.astype(jnp.int32)  # narrow dtypes hold neither every class nor `ignore`
    weights = jnp.ones(labels.shape, jnp.float32) if ignore is None else (labels != ignore).astype(jnp.float32)
    safe = jnp.clip(labels, 0, outputs.shape[-1] - 1)
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), safe)
    # Labels of data that are read as they are needed have not been checked before: the loss is then no number.
    losses = jnp.where((labels == safe) | (weights == 0), losses, jnp.nan)
    return losses.reshape(labels.shape[0], -1), weights.reshape(labels.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class _Confusion:
    """Of every class intersection, pixels that have it, pixels that are given it: (3·C,), float32."""

    num_classes: int
    ignore: int | None

    def __call__(self, outputs, labels):
        _check_count(outputs, self.num_classes)
        classes, labels = jnp.arange(self.num_classes), labels.astype(jnp.int32)
        valid = jnp.ones(labels.shape, bool) if self.ignore is None else labels != self.ignore
        is_label = (labels[..., None] == classes) & valid[..., None]
        is_guess = (outputs.argmax(-1)[..., None] == classes) & valid[..., None]
        counts = [(is_label & is_guess), is_label, is_guess]
        return jnp.concatenate([c.reshape(-1, self.num_classes).sum(0, dtype=jnp.float32) for c in counts])


@dataclasses.dataclass(frozen=True)
class _OverClasses:
    """The mean over the classes that are there, or are given to a pixel; not of the one that counts for nothing."""

    ignore: int | None
    overlap: Callable[..., np.ndarray]

    def __call__(self, total):
        sums = np.asarray(total, np.float64).reshape(3, -1)
        present = (sums[1:].sum(0) > 0) & (np.arange(sums.shape[1]) != self.ignore)
        return 100 * float(self.overlap(*sums[:, present]).mean()) if present.any() else math.nan


def _iou(both, label, guess):
    return both / (label + guess - both)


def _dice(both, label, guess):
    return 2 * both / (label + guess)


def _right(total):
    both, label, _ = np.asarray(total, np.float64).reshape(3, -1)
    return ratio(both.sum(), label.sum(), 100)


@dataclasses.dataclass(frozen=True)
class _Nats:
    """The cross-entropy of all tokens, and their number."""

    ignore: int | None

    def __call__(self, outputs, labels):
        losses, weights = _nats(outputs, labels, self.ignore)
        return jnp.stack([(losses * weights).sum(), weights.sum()])


@dataclasses.dataclass(frozen=True)
class _Hits:
    """How many tokens have the largest logit, and how many there are."""

    ignore: int | None

    def __call__(self, outputs, labels):
        labels = labels.astype(jnp.int32)
        valid = jnp.ones(labels.shape, bool) if self.ignore is None else labels != self.ignore
        hits = (outputs.argmax(-1) == labels) & valid
        return jnp.stack([hits.sum(dtype=jnp.float32), valid.sum(dtype=jnp.float32)])


def _perplexity(total):
    return float(np.exp(ratio(*total)))


@dataclasses.dataclass(frozen=True)
class _ClassesAre:
    """Checks labels that are classes, as many as `num_classes` or as the outputs' last axis has."""

    num_classes: int | None
    ignore: int | None

    def __call__(self, labels, outputs):
        if self.num_classes is not None:
            _check_count(outputs, self.num_classes)
        check_class_labels(labels, outputs.shape[-1], ignore=self.ignore)


def _check_count(outputs, num_classes):
    if (found := outputs.shape[-1]) != num_classes:
        raise ValueError(f"outputs must have num_classes={num_classes} values a pixel, got {found}")
