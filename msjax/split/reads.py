"""What a run, or a client of it, reads of data that are not in memory, step by step: each by its number alone.

A `data.Reader` goes over these; it sends them to worker processes, which compute what they are asked for.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from msjax import data
from msjax.split.schedule import Exchange, Phase, Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class RunReads:
    """What each training step of a run reads: (K, B), the batches of the clients that take part.

    Attributes:
      schedule: of the run.
      client_indices: of each client the training samples that it holds.
      seed: of orders and random crops.
      rows: of the clients of a step those whose batches are read; None: all.
    """

    schedule: Schedule
    client_indices: Sequence[np.ndarray]
    seed: int
    rows: slice | None = None

    def __len__(self) -> int:
        return self.schedule.total_steps

    def __getitem__(self, step: int) -> data.Read:
        position = self.schedule.position(step)
        clients = list(position.clients)[self.rows or slice(None)]
        at = self._order(position.epoch)[clients, position.start : position.stop]
        return data.Read(at, _entropy(self.seed, position.epoch, position.start // self.schedule.batch_size))

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _order(self, epoch):
        return data.epoch_indices(self.client_indices, self.schedule.samples, seed=self.seed, epoch=epoch)


@dataclasses.dataclass(frozen=True, eq=False)
class ClientReads:
    """What each training step of one client reads of its own samples: (B,).

    Attributes:
      schedule: of the run.
      client_id: its number.
      held: how many samples it holds.
      seed: of orders and random crops.
    """

    schedule: Schedule
    client_id: int
    held: int
    seed: int

    def __len__(self) -> int:
        return self.schedule.client_steps * self.schedule.epochs

    def __getitem__(self, number: int) -> data.Read:
        epoch, step = divmod(number, self.schedule.client_steps)
        start = step * self.schedule.batch_size
        at = self._order(epoch)[start : start + self.schedule.batch_size]
        return data.Read(at, _entropy(self.seed, epoch, step))

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _order(self, epoch):
        own = np.arange(self.held, dtype=np.int32)
        return data.epoch_order(own, self.schedule.samples, seed=self.seed, epoch=epoch, client=self.client_id)


@dataclasses.dataclass(frozen=True, eq=False)
class TestReads:
    """What one client reads in the tests of a run: the same rounds in each.

    Attributes:
      rounds: (B,) of each round that it takes part in.
      tests: how many tests there are at most.
    """

    rounds: tuple[np.ndarray, ...]
    tests: int

    def __len__(self) -> int:
        return len(self.rounds) * self.tests

    def __getitem__(self, number: int) -> data.Read:
        return data.Read(self.rounds[number % len(self.rounds)])


class ClientBatches:
    """The batches of one client's exchanges; what is not in memory is read ahead.

    Args:
      schedule: of the run.
      client_id: its number.
      train, test: its data.
      seed: of orders and random crops.
      workers: of the `data.Reader` of what is not in memory.
    """

    def __init__(
        self,
        schedule: Schedule,
        client_id: int,
        train: data.Split,
        test: data.Split,
        seed: int,
        *,
        workers: int | None = None,
    ):
        self._schedule = schedule
        testing = {}
        for number, rows in enumerate(schedule.test_rounds()):
            clients = schedule.test_clients[: len(rows)]
            if client_id in clients:
                testing[number] = rows[clients.index(client_id)]
        self._rounds = {number: place for place, number in enumerate(testing)}
        tests = TestReads(tuple(testing.values()), schedule.epochs)
        self._train = _reader(train, ClientReads(schedule, client_id, len(train), seed), workers)
        self._test = _reader(test, tests, workers)

    def __getitem__(self, exchange: Exchange) -> tuple[Any, Any]:
        """Returns inputs and labels of an exchange of features, as the data set stores them."""
        schedule, position = self._schedule, self._schedule.position(exchange.step)
        if exchange.phase == Phase.TEST:
            before = position.epoch // schedule.test_every
            return self._test[before * len(self._rounds) + self._rounds[exchange.test_round]]
        return self._train[position.epoch * schedule.client_steps + position.start // schedule.batch_size]

    def close(self) -> None:
        """Ends what reads ahead."""
        for reader in (self._train, self._test):
            if isinstance(reader, data.Reader):
                reader.close()


class _InMemory:
    """Reads of a split in memory, as a reader has them."""

    def __init__(self, split, reads):
        self._split, self._reads = split, reads

    def __getitem__(self, number):
        read = self._reads[number]
        return self._split.fetch(read.indices, read.entropy)


def _reader(split, reads, workers):
    return _InMemory(split, reads) if split.in_memory else data.Reader({"train": split}, reads, workers=workers)


def _entropy(seed, epoch, step):
    """What random crops depend on beside the sample: the same for a client in one program and by itself."""
    return seed, epoch, step
