"""What a run, or a client of it, reads of data that are not in memory, step by step: each by its number alone.

A `data.Reader` goes over these; it sends them to worker processes, which compute what they are asked for.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from msjax import data
from msjax.split.schedule import Exchange, Phase, Schedule


class _Orders:
    """The orders of the last two epochs: who reads ahead is in the next one already."""

    def __init__(self):
        self._found: dict[int, np.ndarray] = {}

    def __reduce__(self):
        return _Orders, ()  # workers make their own, rather than get them by pickle

    def of(self, epoch: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns an epoch's order, which `make` makes where it is not there."""
        if (found := self._found.get(epoch)) is None:
            found = self._found[epoch] = make()
            for other in list(self._found)[:-2]:
                self._found.pop(other, None)
        return found


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
    _orders: _Orders = dataclasses.field(default_factory=_Orders, init=False, repr=False)

    def __len__(self) -> int:
        return self.schedule.total_steps

    def __getitem__(self, step: int) -> data.Read:
        position = self.schedule.position(step)
        clients = list(position.clients)[self.rows or slice(None)]
        at = self._order(position.epoch)[clients, position.start : position.stop]
        return data.Read(at, _entropy(self.schedule, self.seed, position))

    def _order(self, epoch):
        return self._orders.of(
            epoch, lambda: data.epoch_indices(self.client_indices, self.schedule.samples, seed=self.seed, epoch=epoch)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ClientReads:
    """What one client reads of its own samples, (B,), in the training steps that it takes part in.

    Attributes:
      schedule: of the run.
      client_id: its number.
      held: how many samples it holds.
      seed: of orders and random crops.
      steps: those that it takes part in, in order.
    """

    schedule: Schedule
    client_id: int
    held: int
    seed: int
    steps: Sequence[int] = ()
    _orders: _Orders = dataclasses.field(default_factory=_Orders, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, number: int) -> data.Read:
        return self.of_step(self.steps[number])

    def of_step(self, step: int) -> data.Read:
        """Returns what it reads in a step of the run."""
        position = self.schedule.position(step)
        at = self._order(position.epoch)[position.start : position.stop]
        return data.Read(at, _entropy(self.schedule, self.seed, position))

    def _order(self, epoch):
        own = np.arange(self.held, dtype=np.int32)
        return self._orders.of(
            epoch,
            lambda: data.epoch_order(own, self.schedule.samples, seed=self.seed, epoch=epoch, client=self.client_id),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TestReads:
    """What one client reads in the tests of a run.

    Attributes:
      schedule: of the run.
      places: of each of its batches the epoch, the round of the test, and the row of the round, in order.
    """

    schedule: Schedule
    places: Sequence[tuple[int, int, int]]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> data.Read:
        _, round_, row = self.places[number]
        return data.Read(self.schedule.test_rounds()[round_][row])


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
        self._schedule, self._client_id, self._train, self._test = schedule, client_id, train, test
        self._reads = ClientReads(schedule, client_id, len(train), seed)
        self._train_reader = self._test_reader = None
        if not train.in_memory:
            steps = [step for step in range(schedule.total_steps) if client_id in schedule.position(step).clients]
            self._reads = dataclasses.replace(self._reads, steps=np.asarray(steps, np.int64))
            self._train_reader = data.Reader({"train": train}, self._reads, workers=workers)
        if not test.in_memory:
            tests = TestReads(schedule, _test_places(schedule, client_id))
            self._test_numbers = {place[:2]: number for number, place in enumerate(tests.places)}
            self._test_reader = data.Reader({"train": test}, tests, workers=workers)

    def __getitem__(self, exchange: Exchange) -> tuple[Any, Any]:
        """Returns inputs and labels of an exchange of features, as the data set stores them."""
        if exchange.phase == Phase.TEST:
            if self._test_reader is None:
                rows = self._schedule.test_rounds()[exchange.test_round]
                return self._test.fetch(rows[exchange.clients.index(self._client_id)])
            epoch = self._schedule.position(exchange.step).epoch
            return self._test_reader[self._test_numbers[epoch, exchange.test_round]]
        if self._train_reader is None:
            read = self._reads.of_step(exchange.step)
            return self._train.fetch(read.indices, read.entropy)
        return self._train_reader[int(np.searchsorted(self._reads.steps, exchange.step))]

    def close(self) -> None:
        """Ends what reads ahead."""
        for reader in (self._train_reader, self._test_reader):
            if reader is not None:
                reader.close()


def _test_places(schedule, client_id):
    """The places of a client's batches in the tests of a run, as `TestReads` has them."""
    places = []
    for epoch in filter(schedule.tests_after, range(schedule.epochs)):
        clients = schedule.test_clients_after(epoch)
        for number, rows in enumerate(schedule.test_rounds()):
            if client_id in (testing := clients[: len(rows)]):
                places.append((epoch, number, testing.index(client_id)))
    return places


def _entropy(schedule, seed, position):
    """What random crops depend on beside the sample: the same for a client in one program and by itself."""
    return seed, position.epoch, position.start // schedule.batch_size
