"""What a step is fed: the splits of a data set, and an epoch's order cut into calls of the jitted functions."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from msjax import data


class Split(NamedTuple):
    """One split of a data set, in memory or streamed."""

    source: Any  # (inputs, labels) on the device, or a data.ImageStream
    count: int

    def labels(self) -> np.ndarray:
        """Returns the int32 labels (N,)."""
        return np.asarray(self.source[1]) if isinstance(self.source, tuple) else self.source.labels()


def epoch_calls(order: np.ndarray, batch_size: int, steps_per_call: int) -> list[np.ndarray]:
    """Cuts an epoch's order (K, n) into calls of int32 (S, K, B), the last step smaller where B does not divide n."""
    clients, n = order.shape
    full = n // batch_size
    body = order[:, : full * batch_size].reshape(clients, full, batch_size).transpose(1, 0, 2)
    calls = [body[i : i + steps_per_call] for i in range(0, full, steps_per_call)]
    if full * batch_size < n:
        calls.append(order[None, :, full * batch_size :])
    return calls


def eval_calls(count: int, clients: int, batch_size: int) -> list[np.ndarray]:
    """Cuts 0 … count − 1 into calls of int32 (1, K, B): rounds of all clients, then single batches, then the rest."""
    order = np.arange(count, dtype=np.int32)
    calls, at = [], 0
    for k, b in ((clients, batch_size), (1, batch_size)):
        while at + k * b <= count:
            calls.append(order[at : at + k * b].reshape(1, k, b))
            at += k * b
    if at < count:
        calls.append(order[at:].reshape(1, 1, -1))
    return calls


def feed(split: Split, calls: list[np.ndarray], *, seed: int = 0, epoch: int = 0, done: int = 0) -> Iterator[tuple]:
    """Yields (inputs, labels, order) for each call after the first `done` steps, as `simulate` takes them.

    Streams come a step at a time; consecutive steps of one shape are read ahead together.
    """
    if isinstance(split.source, tuple):
        for call in _after(calls, done):
            yield *split.source, call
        return
    for _, group in itertools.groupby(calls, key=lambda call: call.shape):
        steps = np.concatenate(list(group))
        start = min(done, len(steps))
        done -= start
        for inputs, labels in data.batches(split.source, steps, seed=seed, epoch=epoch, start=start):
            yield inputs, labels, None


def _after(calls, done):
    """`calls` without their first `done` steps."""
    for call in calls:
        if done < len(call):
            yield call[done:]
        done = max(0, done - len(call))
