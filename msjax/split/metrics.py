"""Losses and metrics, added up over batches, clients and devices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax.split.spec import RunSpec
from msjax.split.step import StepMetrics
from msjax.tasks import Task


class MetricSums(NamedTuple):
    """Sums over the samples seen so far in an epoch, over all clients; on the host or the device."""

    loss: Any = 0.0
    """Of the losses, in the task's unit."""
    samples: Any = 0
    sums: Any = None
    """Each metric's sums by name; see `tasks.Metric`. None before the first batch."""
    uplink_bytes: Any = 0.0
    """As of `StepMetrics`: of one program, where a codec is entropy-coded."""
    downlink_bytes: Any = 0.0

    def __add__(self, other: "MetricSums") -> "MetricSums":
        if self.sums is None or other.sums is None:
            sums = other.sums if self.sums is None else self.sums
        else:
            sums = jax.tree.map(np.add, self.sums, other.sums)
        rest = zip(self._replace(sums=0), other._replace(sums=0), strict=True)
        return MetricSums(*(a + b for a, b in rest))._replace(sums=sums)

    def means(self, task: Task) -> dict[str, float]:
        """Returns the mean loss a sample, and each metric."""
        return {"loss": float(self.loss) / max(int(self.samples), 1), **task.finish(self.sums or {})}


def add_step(sums: MetricSums, metrics: StepMetrics, samples: int) -> MetricSums:
    """Returns the sums with those of a step of `samples` samples; inside `jit`."""
    return MetricSums(
        sums.loss + metrics.loss * samples,
        sums.samples + samples,
        jax.tree.map(jnp.add, sums.sums, metrics.sums),
        sums.uplink_bytes + metrics.uplink_bytes,
        sums.downlink_bytes + metrics.downlink_bytes,
    )


def zero_sums(spec: RunSpec) -> MetricSums:
    """Returns the sums of a run's epoch before its first step: arrays of their own, since they are given away."""
    sums = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in spec.metric_sums_like.items()}
    shape = (2,) if spec.compresses_updates else ()
    nbytes = (jnp.zeros(shape, jnp.float32) for _ in range(2))
    return MetricSums(jnp.array(0, jnp.float32), jnp.array(0, jnp.int32), sums, *nbytes)


def sums_of(metrics: StepMetrics, samples: int) -> MetricSums:
    """Returns the sums of one batch, on the host."""
    return MetricSums(float(metrics.loss) * samples, samples, jax.tree.map(np.asarray, metrics.sums))


def total(sums: list[MetricSums]) -> MetricSums:
    """Returns the sum of all of them."""
    return sum(sums, MetricSums())
