"""Reading a split batch by batch, in the order asked for; what is not in memory by threads and ahead of time."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from msjax.data._dataset import Arrays, Split, Tree, map_arrays

_CHUNK = 16  # examples that a thread fetches at a time


def batches(
    source: Split | tuple[Tree, Tree],
    indices: np.ndarray,
    *,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    threads: int | None = None,
    prefetch: int = 2,
) -> Iterator[tuple[Tree, Tree]]:
    """Yield inputs [*batch, ...] and labels [*batch, ...] for each step of an epoch.

    `source` is a split such as `ds.train`, or a pair (inputs, labels) of arrays. What is in memory comes as it is.
    What is not is fetched by threads; random crops depend on (seed, epoch, step, index) alone: not on the number of
    threads, on `start`, nor on which other examples are in the batch.

    Args:
        indices: int [steps, *batch], for example [steps, client, example].
        seed, epoch: choose the crops.
        start: first step to yield, to go on where an interrupted run stopped.
        threads: how many fetch and decode; default: as many as cores.
        prefetch: how many steps are read ahead of the consumer.

    Raises:
        IndexError: an index is negative or too large.
        DataError: reading or decoding fails.
        ValueError: `start` is out of range, or `indices` has no batch axis.
    """
    indices = np.asarray(indices)
    split = Arrays(*source) if isinstance(source, tuple) else source
    count = len(split)
    if indices.ndim < 2 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"indices must be integers [steps, *batch], got {indices.dtype} {indices.shape}")
    if not 0 <= start <= len(indices):
        raise ValueError(f"start must be in 0..{len(indices)} (the number of steps), got {start}")
    if indices.size and (indices.min() < 0 or indices.max() >= count):
        raise IndexError(f"indices must be in 0..{count - 1}, got {indices.min()}..{indices.max()}")
    if split.in_memory:
        return (split.fetch(i) for i in indices[start:])
    return _streamed(split, indices, (seed, epoch), start, threads or os.cpu_count() or 1, prefetch)


def _streamed(
    split: Split, indices: np.ndarray, entropy: tuple[int, int], start: int, threads: int, prefetch: int
) -> Iterator[tuple[Tree, Tree]]:
    """Chunks of a step as tasks of a pool, `prefetch` steps ahead; leaving the loop early cancels the rest."""
    batch_shape = indices.shape[1:]

    def join(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate(parts).reshape(*batch_shape, *parts[0].shape[1:])

    with ThreadPoolExecutor(threads) as pool:
        pending: deque[list[Future]] = deque()
        steps = iter(range(start, len(indices)))

        def submit() -> None:
            if (step := next(steps, None)) is not None:
                flat = indices[step].reshape(-1)
                chunks = [flat[i : i + _CHUNK] for i in range(0, len(flat), _CHUNK)]
                pending.append([pool.submit(split.fetch, chunk, (*entropy, step)) for chunk in chunks])

        try:
            for _ in range(max(prefetch, 0) + 1):
                submit()
            while pending:
                parts = [future.result() for future in pending.popleft()]
                submit()
                inputs, labels = (map_arrays(join, *column) for column in zip(*parts, strict=True))
                yield inputs, labels
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
