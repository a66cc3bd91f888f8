"""An epoch's order cut into calls of the compiled functions, and the batches that go with each."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from msjax import data
from msjax.split.schedule import Schedule


def epoch_calls(order: np.ndarray, batch_size: int, steps_per_call: int) -> list[np.ndarray]:
    """Cuts an epoch's order (K, n) into calls of int32 (S, K, B), the last step smaller where B does not divide n."""
    clients, n = order.shape
    full = n // batch_size
    body = order[:, : full * batch_size].reshape(clients, full, batch_size).transpose(1, 0, 2)
    calls = [body[i : i + steps_per_call] for i in range(0, full, steps_per_call)]
    if full * batch_size < n:
        calls.append(order[None, :, full * batch_size :])
    return calls


def schedule_calls(schedule: Schedule, order: np.ndarray, epoch: int, steps_per_call: int) -> list[np.ndarray]:
    """Cuts an epoch's order (K, n) into calls; in turns or rounds, of (S, M, B) of the M clients that take part."""
    if not schedule.mode.hands_parts_on(schedule):
        return epoch_calls(order, schedule.batch_size, steps_per_call)
    calls = []
    for step in range(schedule.epoch_steps):
        position = schedule.position(epoch * schedule.epoch_steps + step)
        if position.turn_starts:
            start = position.start
        if position.turn_ends:
            turn = order[list(position.clients), start : position.stop]
            calls += epoch_calls(turn, schedule.batch_size, steps_per_call)
    return calls


def batches_on_device(
    split: data.Split, resident: Any, calls: list[np.ndarray], *, seed: int = 0, epoch: int = 0, done: int = 0
) -> Iterator[tuple[Any, Any, Any]]:
    """Yields (inputs, labels, order) for each call after the first `done` steps, as `program.train_steps` takes them.

    Args:
      split: what the batches are of.
      resident: the whole split's (inputs, labels) on the device, or None to read it batch by batch: a step at a time,
        read ahead.
    """
    if resident is not None:
        for call in _after(calls, done):
            yield *resident, call
        return
    for _, group in itertools.groupby(calls, key=lambda call: call.shape):
        steps = np.concatenate(list(group))
        start = min(done, len(steps))
        done -= start
        for inputs, labels in data.batches(split, steps, seed=seed, epoch=epoch, start=start):
            yield inputs, labels, None


def make_resident(split: data.Split, put: Any) -> Any:
    """Returns a split's (inputs, labels) on the device by `put`; None of one that is not in memory."""
    if not split.in_memory:
        return None
    # Copied off the cache's memory map: on a CPU JAX would use that itself, and wait for the disk in every step.
    return put(jax.tree.map(np.array, (split.inputs, split.targets)))


def _after(calls, done):
    """`calls` without their first `done` steps."""
    for call in calls:
        if done < len(call):
            yield call[done:]
        done = max(0, done - len(call))
