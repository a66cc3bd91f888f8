"""A task: loss and metrics, and what they ask of outputs and labels."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msjax.checks import quoted

Loss = Callable[[Any, Any], jax.Array]
"""From outputs and labels of a batch of B samples to a floating array (B,)."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that is found from sums over batches.

    Attributes:
      sums: from outputs and labels of a batch to an array, (n,) or (), which is added up over batches and clients.
      finish: from the total to the number; where it divides by zero, the number is NaN.
    """

    sums: Callable[[Any, Any], jax.Array]
    finish: Callable[[np.ndarray], float]


def mean_of(values: Loss, scale: float = 1.0) -> Metric:
    """Returns the metric that is the mean over samples of `values`, (B,), times `scale`."""
    return Metric(_SumAndCount(values), Ratio(scale))


@dataclasses.dataclass(frozen=True)
class _SumAndCount:
    """The sum of a function's values (B,), and their number."""

    values: Loss

    def __call__(self, outputs, labels):
        values = self.values(outputs, labels)
        if values.ndim != 1:
            raise ValueError(
                f"a metric must return one value a sample, shape (B,), got shape {values.shape}; "
                "for one that adds up in another way give a tasks.Metric"
            )
        return jnp.stack([values.astype(jnp.float32).sum(), jnp.float32(values.shape[0])])


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Of a total (sum, count), their ratio times `scale`."""

    scale: float = 1.0

    def __call__(self, total):
        return ratio(*total, self.scale)


def ratio(total: Any, count: Any, scale: float = 1.0) -> float:
    """Returns total / count, times `scale`; NaN where nothing was counted."""
    return scale * float(total) / float(count) if count else math.nan


@dataclasses.dataclass(frozen=True)
class Task:
    """Loss and metrics of a run. Equal tasks are equal by value if their functions are.

    Attributes:
      name: what the parties of a network call it: they must agree.
      loss: one value a sample, (B,), of which training follows the mean.
      metrics: pairs of name and `Metric`; the first is shown while training.
      test_loss: the loss on test data, where it is another; by default the same.
      check_labels: raises ValueError for labels (NumPy arrays) that the task cannot take, given shape and dtype of the
        outputs of one sample.
    """

    name: str
    loss: Loss
    metrics: tuple[tuple[str, Metric], ...] = ()
    test_loss: Loss | None = None
    check_labels: Callable[[Any, Any], None] | None = None

    def __post_init__(self):
        object.__setattr__(self, "metrics", tuple(map(tuple, self.metrics)))  # so that the task can be hashed
        names = [name for name, _ in self.metrics]
        if len(set(names)) < len(names):
            raise ValueError(f"metrics must have a name each, got {', '.join(names)}")
        if "loss" in names:
            raise ValueError("metrics must have other names than 'loss', which is the loss itself, got 'loss'")

    def losses(self, outputs: Any, labels: Any, *, train: bool) -> jax.Array:
        """Returns the loss of each sample, float32 (B,).

        Raises:
          ValueError: the loss does not return one floating value a sample.
        """
        function = self.loss if train or self.test_loss is None else self.test_loss
        losses = function(outputs, labels)
        batch = jax.tree.leaves(labels)[0].shape[0]
        if getattr(losses, "shape", None) != (batch,):
            found = getattr(losses, "shape", losses)
            raise ValueError(f"loss of task {self.name!r} must return one value a sample, ({batch},), got {found}")
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise ValueError(f"loss of task {self.name!r} must return floating values, got {losses.dtype}")
        return losses.astype(jnp.float32)

    def sums(self, outputs: Any, labels: Any) -> dict[str, jax.Array]:
        """Returns each metric's sums of a batch, by name; narrow floats as float32, as batches are added up."""
        return {name: _to_add(metric.sums(outputs, labels)) for name, metric in self.metrics}

    def finish(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Returns each metric's number from its total."""
        return {name: _finished(metric, np.asarray(sums[name])) for name, metric in self.metrics}

    @property
    def headline(self) -> str:
        """The name of the number that is shown: the first metric, or the loss."""
        return self.metrics[0][0] if self.metrics else "loss"

    def check(self, outputs: Any, labels: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Checks loss and metrics on shapes alone, and returns shape and dtype of each metric's sums.

        Args:
          outputs, labels: shapes and dtypes of a batch.

        Raises:
          ValueError: the loss does not return one value a sample, a metric's sums depend on the batch size, or either
            fails on such arrays.
        """
        try:
            for train in (True, False):
                jax.eval_shape(lambda o, y, train=train: self.losses(o, y, train=train), outputs, labels)
            found = jax.eval_shape(self.sums, outputs, labels)
        except Exception as error:
            if isinstance(error, ValueError) and str(error).startswith(_RULES):
                raise
            raise ValueError(
                f"task {self.name!r} must take outputs {_shapes(outputs)} and labels {_shapes(labels)}, but its loss "
                f"or a metric raised {quoted(error)}"
            ) from error
        for name, sums in found.items():
            if len(sums.shape) > 1:
                raise ValueError(f"metric {name!r} must have sums of shape (n,) or (), got {sums.shape}")
            larger = jax.eval_shape(self.sums, *_doubled((outputs, labels)))[name]
            if larger.shape != sums.shape:
                raise ValueError(
                    f"metric {name!r} must have sums whose shape does not depend on the batch, as they are added up, "
                    f"got {sums.shape} and {larger.shape}"
                )
        return found

    def _check_apart(self, outputs, labels):
        """Raises ValueError where (B, 1) and (B,) are broadcast, so that each value is of all samples."""
        narrow, wide = sorted((getattr(tree, "shape", ()) for tree in (outputs, labels)), key=len)
        if len(narrow) != 1 or wide != (*narrow, 1):
            return
        labels = jnp.arange(len(labels)).reshape(labels.shape).astype(labels.dtype)
        functions = {f"loss of task {self.name!r}": functools.partial(self.losses, train=True)}
        if self.test_loss is not None:
            functions[f"test_loss of task {self.name!r}"] = functools.partial(self.losses, train=False)
        plain = {name: metric.sums for name, metric in self.metrics if isinstance(metric.sums, _SumAndCount)}
        functions |= {f"metric {name!r}": sums.values for name, sums in plain.items()}
        for name, function in functions.items():
            whole, first = function(outputs, labels)[:1], function(outputs[:1], labels[:1])
            if not np.allclose(whole, first, rtol=1e-2, atol=1e-3, equal_nan=True):
                which = "outputs" if outputs.ndim == 2 else "labels"
                raise ValueError(
                    f"{name} must give each sample its own value, but outputs {_shapes(outputs)} and labels "
                    f"{_shapes(labels)} make it depend on other samples, as where they are broadcast: take "
                    f"{which}[..., 0]. Labels of integers (N, 1) are taken as (N,)"
                )

    def check_sums(self, outputs: Any, labels: Any) -> None:
        """Checks on random outputs that metrics add up over batches and finish as a number.

        Args:
          outputs, labels: shapes and dtypes of a batch; labels are taken to be 0.

        Raises:
          ValueError: a metric's sums of a batch are not those of its parts added up, or its total is no number.
        """
        if sum(leaf.size for leaf in jax.tree.leaves(outputs)) > _MOST_VALUES:
            return
        rng = np.random.default_rng(0)
        o = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), outputs)
        y = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), labels)
        self._check_apart(o, y)
        for name, metric in self.metrics:
            if isinstance(metric.sums, _SumAndCount):
                continue
            total = np.asarray(metric.sums(o, y))
            whole = total.astype(np.float64)
            added = np.zeros_like(whole)
            for part in (slice(0, 1), slice(1, None)):
                one = jax.tree.map(lambda leaf, part=part: leaf[part], (o, y))
                added += np.asarray(metric.sums(*one), np.float64)
            if not np.allclose(whole, added, rtol=1e-2, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"metric {name!r} must have sums that add up over batches, got {whole.tolist()} of a batch and "
                    f"{added.tolist()} of its two parts; see tasks.Metric"
                )
            try:
                with np.errstate(all="ignore"):
                    float(_finished(metric, total))
            except Exception as error:
                raise ValueError(
                    f"metric {name!r} must make a number of a total of shape {whole.shape}, but `finish` raised or "
                    f"returned what is none: {type(error).__name__}: {error}"
                ) from error


# How errors begin that say themselves what is wrong.
_RULES = ("outputs must", "labels must", "loss of task", "a metric must")
_MOST_VALUES = 1 << 20  # of outputs that are made up to check metrics


def custom(
    loss: Loss,
    metrics: Mapping[str, Loss | Metric] | None = None,
    *,
    name: str | None = None,
    test_loss: Loss | None = None,
) -> Task:
    """Returns a task of one's own.

    Args:
      loss: `loss(outputs, labels) -> (B,)`.
      metrics: by name, functions like the loss, which are averaged over samples, or `Metric`s.
      name: what the parties of a network call it; by default the loss function's name.
      test_loss: the loss on test data, if it is another.

    Raises:
      TypeError: the loss or a metric is no function, or metrics have no names.
      ValueError: a metric is called "loss".
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function of outputs and labels, got {loss!r}")
    if test_loss is not None and not callable(test_loss):
        raise TypeError(f"test_loss must be a function of outputs and labels, or None, got {test_loss!r}")
    if not isinstance(metrics, Mapping | None):
        raise TypeError(f"metrics must be functions by name, as {{'error': function}}, got {metrics!r}")
    found = []
    for metric_name, metric in (metrics or {}).items():
        if not isinstance(metric, Metric):
            if not callable(metric):
                raise TypeError(f"metrics[{metric_name!r}] must be a function or a tasks.Metric, got {metric!r}")
            metric = mean_of(metric)
        found.append((metric_name, metric))
    return Task(str(name or getattr(loss, "__name__", type(loss).__name__)), loss, tuple(found), test_loss)


def _to_add(sums):
    sums = jnp.asarray(sums)
    narrow = jnp.issubdtype(sums.dtype, jnp.floating) and sums.dtype.itemsize < 4
    return sums.astype(jnp.float32) if narrow else sums


def _finished(metric, total):
    """A metric's number; NaN where it divides by zero, as of a class of which these labels have none."""
    try:
        return float(metric.finish(total))  # NumPy's numbers are no JSON
    except ZeroDivisionError:
        return math.nan


def _doubled(batch):
    """A batch of twice as many samples, from shapes and dtypes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2 * leaf.shape[0], *leaf.shape[1:]), leaf.dtype), batch)


def _shapes(tree):
    return str(jax.tree.map(_Shape, tree))


class _Shape:
    """What is printed of an array in a tree."""

    def __init__(self, leaf):
        self._text = f"{leaf.dtype}{list(leaf.shape)}"

    def __repr__(self):
        return self._text


def check_outputs(outputs: Any, task: str) -> None:
    """Raises ValueError where outputs are not one floating array."""
    if not hasattr(outputs, "dtype"):
        raise ValueError(f"outputs must be one array for {task}, got {_shapes(outputs)}: see tasks.custom")
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"outputs must be floating for {task}, got {outputs.dtype}")


def check_class_dtype(dtype: Any) -> None:
    """Raises ValueError where labels of this dtype are no numbers of classes."""
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers, the numbers of classes, got {dtype}: labels.astype(int), or of one-hot rows "
            "labels.argmax(-1); data.from_csv takes classes=True for them"
        )


def check_class_labels(labels: Any, num_classes: int, *, ignore: int | None = None) -> None:
    """Raises ValueError where integer labels are not in 0 … num_classes − 1 (or `ignore`)."""
    labels = np.asarray(labels)
    check_class_dtype(labels.dtype)
    wrong = (labels < 0) | (labels >= num_classes)
    if ignore is not None:
        wrong &= labels != ignore
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = at[0] if len(at) == 1 else at
        raise ValueError(
            f"labels must be in 0..{num_classes - 1} for {num_classes} outputs, got {labels[at]} at index {where}"
        )
