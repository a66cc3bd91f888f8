"""Reading a split batch by batch, in the order asked for."""

from collections.abc import Iterator

import numpy as np

from msjax.data._dataset import Arrays, Split, Tree
from msjax.data._reader import Read, Reader


def batches(
    source: Split | tuple[Tree, Tree],
    indices: np.ndarray,
    *,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    workers: int | None = None,
    threads: int | None = None,
    prefetch: int = 2,
) -> Iterator[tuple[Tree, Tree]]:
    """Yield inputs [*batch, ...] and labels [*batch, ...] for each step of an epoch.

    `source` is a split such as `ds.train`, or a pair (inputs, labels) of arrays. What is in memory comes as it is.
    What is not is read ahead by a `Reader`; random crops depend on (seed, epoch, step, index) alone: not on the number
    of workers or threads, on `start`, nor on which other examples are in the batch.

    Args:
        indices: int [steps, *batch], for example [steps, client, example].
        seed, epoch: choose the crops.
        start: first step to yield, to go on where an interrupted run stopped.
        workers, threads, prefetch: of the `Reader`. Workers are started for each call: over many epochs let one reader
            go over all of them.

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
    reads = [Read(step, (seed, epoch, n)) for n, step in enumerate(indices)]
    return _read(Reader({"train": split}, reads, workers=workers, threads=threads, prefetch=prefetch), start)


def _read(reader: Reader, start: int) -> Iterator[tuple[Tree, Tree]]:
    with reader:
        for n in range(start, len(reader)):
            yield reader[n]
