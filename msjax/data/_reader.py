"""Reading what is not in memory, in a known order and ahead of time: by grain's threads or its worker processes.

A `Reader` goes over a sequence of `Read`s, one a step. Each is cut into as many parts, and these are the elements that
grain reads: element p of n parts a step is part p mod n of read p div n. So a step's images are decoded by several
workers, each element can be found by its number alone, and what comes does not depend on how many workers there are.
"""

import contextlib
import io
import itertools
import logging
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from msjax.data._dataset import Split, Tree, map_arrays
from msjax.data._error import DataError

_log = logging.getLogger("msjax")

_PART = 64  # examples of an element, about: fewer cost more messages between processes, more come later
_ELEMENTS_A_WORKER = 32  # with fewer to read it does not pay to start a process, which takes seconds
_MOST_WORKERS = 32  # by default; each has a few hundred megabytes
_MOST_PICKLED_BYTES = 256 << 20  # of splits that are sent to workers by default: each has a copy
_KEPT = 2  # batches that can be had again; a client asks for the batch before the last when the answer comes


class Read(NamedTuple):
    """What is read at once.

    Attributes:
        indices: int (*batch): the examples.
        entropy: of what is random about them, see `Split.fetch`.
        split: which of a reader's splits they are of.
    """

    indices: np.ndarray
    entropy: tuple[int, ...] = ()
    split: str = "train"


class Reader:
    """The batches of `reads` by their number: quick where one comes after the other.

        with data.Reader({"train": ds.train}, reads) as reader:
            inputs, labels = reader[n]

    Reading begins at the first batch that is asked for, and anew where another than the next is; so a run goes on
    anywhere with the batches that it would have had. The last two can be had again. Needs grain.

    Worker processes are started by "spawn", as JAX needs it: each imports the main module of the program, which must
    therefore not do its work when it is imported but under `if __name__ == "__main__":`. JAX sees the CPU alone there.

    Args:
        splits: what is read, by the names that reads have for them; sent to workers by cloudpickle.
        reads: (n,) of `Read`; sent to workers, too, so what is long should be computed when it is asked for.
        workers: how many processes read and decode; 0: threads of this one. By default one fewer than there are cores,
            and at most 32; threads where there are two cores or fewer, where little is to be read, or where the splits
            cannot be pickled or only into more than 256 MiB.
        threads: how many threads, where there are no workers; by default as many as cores.
        prefetch: how many reads are made ahead, about.

    Raises:
        DataError: grain is missing; reading fails, which names the example; a worker died; all but the first where a
            batch is asked for.
        ValueError: `workers` or `prefetch` is negative.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        reads: Sequence[Read],
        *,
        workers: int | None = None,
        threads: int | None = None,
        prefetch: int = 2,
    ):
        for name, value in {"workers": workers, "prefetch": prefetch}.items():
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self._grain = _import_grain()
        self._splits, self._reads = dict(splits), reads
        self._workers, self._threads, self._prefetch = workers, threads, prefetch
        # One at a time, where a split was made so.
        self._alone = any(getattr(split, "threads", None) == 1 for split in splits.values())
        self._elements: Any = None
        self._next: int | None = None
        self._parts = 1
        self._kept: deque[tuple[int, tuple[Tree, Tree]]] = deque(maxlen=_KEPT)

    def __len__(self) -> int:
        return len(self._reads)

    def __getitem__(self, n: int) -> tuple[Tree, Tree]:
        """Returns inputs (*batch, ...) and labels (*batch, ...) of read `n`."""
        if not 0 <= n < len(self):
            raise IndexError(f"n must be in 0..{len(self) - 1}, got {n}")
        for kept, batch in self._kept:
            if kept == n:
                return batch
        try:
            batch = self._take(n)
        except BaseException:
            self.close()
            raise
        self._next = n + 1
        self._kept.append((n, batch))
        return batch

    def _take(self, n: int) -> tuple[Tree, Tree]:
        begins = self._elements is None or n != self._next
        with _cpu_for_children() if begins else contextlib.nullcontext(), self._errors():
            if begins:
                self._open(n)
            found = list(itertools.islice(self._elements, self._parts))
        batch_shape = np.shape(self._reads[n].indices)

        def join(*parts: np.ndarray) -> np.ndarray:
            # Plain arrays: parts from workers lie in memory that they share, which is given back now.
            return np.concatenate(list(map(np.asarray, parts))).reshape(*batch_shape, *parts[0].shape[1:])

        inputs, labels = (map_arrays(join, *column) for column in zip(*(part for part in found if part), strict=True))
        return inputs, labels

    def _open(self, n: int) -> None:
        """Begins to read at read `n`."""
        self.close()
        grain, examples = self._grain, np.size(self._reads[n].indices)
        self._parts = max(1, round(examples / _PART))
        source = _Elements(self._splits, self._reads, self._parts)
        workers = self._count_workers(len(source) - n * self._parts)
        threads = 1 if self._alone else self._threads or count_cores()
        ahead = max(1, self._prefetch * self._parts)
        # Without a buffer grain's threads read nothing ahead; a worker reads ahead by its own buffer.
        is_threaded = not workers and self._prefetch
        options = grain.ReadOptions(
            num_threads=threads if is_threaded else 0, prefetch_buffer_size=max(ahead, threads) if is_threaded else 0
        )
        elements = grain.MapDataset.source(source)[n * self._parts :].to_iter_dataset(options)
        if workers:
            each = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=-(-ahead // workers))
            elements = elements.mp_prefetch(each, worker_init_fn=_begin_worker)
        self._elements = iter(elements)

    def _count_workers(self, elements: int) -> int:
        if self._workers is not None:
            return min(self._workers, elements)
        cores = count_cores()
        workers = min(cores - 1, _MOST_WORKERS, elements // _ELEMENTS_A_WORKER)
        if cores <= 2 or workers < 1 or self._alone:
            return 0
        try:
            _pickle(self._splits, _MOST_PICKLED_BYTES)
        except Exception as error:  # whatever the user's own classes raise
            _log.info("read by threads, not by worker processes: %s", error)
            return 0
        return workers

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What grain raises, as a `DataError` that says what to do."""
        what = ", ".join(dict.fromkeys(getattr(split, "name", name) for name, split in self._splits.items()))
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            if found := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error)):
                raise DataError(_of_death(what, int(found[1]))) from error
            raise DataError(
                f"{what} cannot be read by worker processes ({type(error).__name__}: {error}): workers=0 reads in this "
                "process"
            ) from error

    def close(self) -> None:
        """Ends what reads ahead; a batch that is asked for after this makes it begin anew."""
        if self._elements is not None:
            self._elements.close()
        self._elements = self._next = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Elements:
    """What grain reads by number, in a worker or here: parts of reads, which may be empty."""

    def __init__(self, splits: dict[str, Split], reads: Sequence[Read], parts: int):
        self._splits, self._reads, self._parts = splits, reads, parts

    def __len__(self) -> int:
        return len(self._reads) * self._parts

    def __getitem__(self, element: int) -> tuple[Tree, Tree] | tuple[()]:
        n, part = divmod(int(element), self._parts)
        read = self._reads[n]
        indices = np.array_split(np.ravel(read.indices), self._parts)[part]
        if not len(indices):
            return ()
        split = self._splits[read.split]
        try:
            return split.fetch(indices, read.entropy)
        except DataError as error:
            error.__cause__ = None  # which need not be one that can be sent
            raise
        # Whatever else is raised may not be such as can be sent, and a worker that ends by itself is waited for.
        except (Exception, SystemExit) as error:
            name = getattr(split, "name", read.split)
            shown = ", ".join(map(str, indices[:3])) + (" …" if len(indices) > 3 else "")
            raise DataError(f"examples {shown} of {name} cannot be read: {type(error).__name__}: {error}") from error


def _import_grain() -> ModuleType:
    try:
        import grain
        from absl import flags
    except ImportError as error:
        raise DataError(
            f"reading what is not in memory needs grain, which cannot be imported ({error}): pip install 'msjax[data]'"
        ) from error
    if not flags.FLAGS.is_parsed():  # as in a program that does not begin by absl's app.run; grain asks for its own
        flags.FLAGS.mark_as_parsed()
    return grain


def count_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pickle(value: Any, most_bytes: int) -> None:
    """Raises where a value cannot be sent to a process, or has too many bytes for that."""
    import cloudpickle  # which grain brings, and sends by

    class Counter(io.RawIOBase):
        total = 0

        def write(self, data: Any) -> int:
            self.total += len(memoryview(data).cast("B"))
            if self.total > most_bytes:
                raise DataError(f"it has more than {most_bytes >> 20} MiB pickled")
            return len(data)

    cloudpickle.dump(value, Counter())


def _of_death(what: str, code: int) -> str:
    """Why a worker may have died, by its exit code."""
    reasons = {
        1: "its own error is above. A program that trains must do so under if __name__ == '__main__':, since workers "
        "import it",
    }
    for name, reason in (
        ("SIGKILL", "the system may have had too little memory for so many workers"),
        ("SIGBUS", "the shared memory, /dev/shm, may be full: give it more, or have fewer workers"),
    ):
        if hasattr(signal, name):  # Windows has neither
            reasons[-getattr(signal, name)] = reason
    why = reasons.get(code, "what it wrote is above")
    return f"a worker process that reads {what} died with exit code {code}: {why}. workers=0 reads in this process"


@contextlib.contextmanager
def _cpu_for_children() -> Iterator[None]:
    """Processes that begin meanwhile see the CPU alone, also while they import this one's main module."""
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        if before is None:
            del os.environ["JAX_PLATFORMS"]
        else:
            os.environ["JAX_PLATFORMS"] = before


def _begin_worker(index: int, count: int) -> None:
    """What a worker does first."""
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, but it is the parent that ends the run
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker of grain would wait for ever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
