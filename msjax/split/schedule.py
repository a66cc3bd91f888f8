"""The schedule of a run: who exchanges what with the server, and in what order.

A run is one sequence of exchanges. In each, certain clients send the server one message each; when all are there, the
server answers each of them. Which exchanges there are follows from the run's description alone, so nobody has to be
told what comes next, and a party that was away knows where it stands from the exchange that it waits for.

| phase | clients | up | down |
|---|---|---|---|
| FETCH_PART | those whose turn or round begins | nothing | the part of those before (nothing at the very first) |
| FEATURES | all, a round's, or the one in turn | features, labels | gradient at the cut; U-shaped: features |
| GRADIENT | the same, U-shaped only | gradient at the tail's cut, loss and metrics | gradient at the cut |
| AVERAGE | all | what is averaged: gradients or weights, and statistics | their mean |
| AVERAGE, of a round | those of the round | their part | where an epoch ends, the mean |
| RETURN_PART | the one whose turn ends | its part: weights, statistics, momentum | nothing |
| TEST | some | test features, labels | nothing; U-shaped: the server's features |
| RESULT | those that tested, U-shaped only | loss and metrics | nothing |
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from msjax.split.modes import Mode


class Phase(enum.IntEnum):
    """What an exchange is about; the numbers travel."""

    FETCH_PART = 1
    FEATURES = 2
    GRADIENT = 3
    AVERAGE = 4
    RETURN_PART = 5
    TEST = 6
    RESULT = 7


class Exchange(NamedTuple):
    """One message of each of `clients` to the server, and its answers."""

    step: int
    """The training step; tests have that of the step before them."""
    phase: Phase
    clients: tuple[int, ...]
    test_round: int = 0
    """Of a test: which of its rounds of batches."""

    @property
    def position(self) -> tuple[int, int, int]:
        """What names it within its run; it grows from exchange to exchange."""
        return self.step, int(self.phase), self.test_round


class StepPosition(NamedTuple):
    """Where in the data a training step is."""

    epoch: int
    start: int
    """The batch is samples start … stop − 1 of each of `clients` in its order of the epoch."""
    stop: int
    clients: tuple[int, ...]
    turn_starts: bool
    turn_ends: bool
    epoch_ends: bool


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the order of exchanges follows from.

    Attributes:
      mode: how the clients work together.
      clients: their number K.
      samples: of each client in an epoch.
      test_samples: of the test set that the clients share out, or of each client; 0 for no tests.
      batch_size: samples of each client in a step.
      epochs: of the run.
      test_every: epochs between two tests.
      u_shaped: whether the last layers and the labels stay with the clients.
      own_tests: whether each client that tests has `test_samples` of its own, in place of a share of one test set.
    """

    mode: "Mode"
    clients: int
    samples: int
    test_samples: int
    batch_size: int
    epochs: int
    test_every: int = 1
    u_shaped: bool = False
    own_tests: bool = False

    @property
    def full_batch_size(self) -> int:
        """Samples of each client in a full step: no more than it has."""
        return min(self.batch_size, self.samples)

    @property
    def client_steps(self) -> int:
        """Steps of one client in an epoch."""
        return math.ceil(self.samples / self.batch_size)

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch."""
        return self.mode.epoch_steps(self)

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.epoch_steps * self.epochs

    @property
    def test_clients(self) -> tuple[int, ...]:
        """The clients that have the trained part at the end of the run."""
        return self.test_clients_after(self.epochs - 1)

    def test_clients_after(self, epoch: int) -> tuple[int, ...]:
        """Returns the clients that have the trained part after an epoch: a round of the test is spread over them."""
        return self.mode.test_clients(self, epoch)

    def position(self, step: int) -> StepPosition:
        """Returns where step `step` is."""
        return self.mode.position(self, step)

    def samples_before(self, step: int) -> int:
        """Returns how many samples all clients together send in the steps before step `step`."""
        positions = map(self.position, range(step))
        return sum(len(at.clients) * (at.stop - at.start) for at in positions)

    def tests_after(self, epoch: int) -> bool:
        """Whether the test set goes through after epoch `epoch`, counted from 0."""
        return self.test_samples > 0 and ((epoch + 1) % self.test_every == 0 or epoch == self.epochs - 1)

    def test_rounds(self) -> list[np.ndarray]:
        """Returns the positions in the test set, or in each client's, that each round is about: int32 (K, B)."""
        return _test_rounds(self.test_samples, len(self.test_clients), self.batch_size, self.own_tests)

    @property
    def tested_samples(self) -> int:
        """Samples of all clients together in a test."""
        return sum(samples.size for samples in self.test_rounds())

    def batch_size_of(self, exchange: Exchange) -> int:
        """Returns the number of samples of each client in an exchange of features."""
        if exchange.phase in (Phase.TEST, Phase.RESULT):
            return self.test_rounds()[exchange.test_round].shape[1]
        position = self.position(exchange.step)
        return position.stop - position.start

    def exchanges(self, start: int = 0) -> Iterator[Exchange]:
        """Yields the exchanges of the run from step `start` on."""
        for step in range(start, self.total_steps):
            yield from self.step_exchanges(step)

    def step_exchanges(self, step: int) -> Iterator[Exchange]:
        """Yields those of one step, with the test behind it where it ends an epoch that has one."""
        yield from self.mode.exchanges(self, step)
        position = self.position(step)
        if position.epoch_ends and self.tests_after(position.epoch):
            yield from self._test(step, position.epoch)

    def _test(self, step, epoch):
        testing = set()
        for number, samples in enumerate(self.test_rounds()):
            clients = self.test_clients_after(epoch)[: samples.shape[0]]
            testing |= set(clients)
            yield Exchange(step, Phase.TEST, clients, number)
        if self.u_shaped:
            yield Exchange(step, Phase.RESULT, tuple(sorted(testing)))

    def may_checkpoint(self, step: int, every: int) -> bool:
        """Whether the state before step `step` is saved, where checkpoints are `every` steps apart."""
        if step in (0, self.total_steps):
            return step > 0
        return self.mode.may_checkpoint(self, step, every)


@functools.lru_cache(maxsize=16)
def _test_rounds(count, clients, batch_size, is_own):
    """0 … count − 1 cut into rounds of all clients, then single batches, then the rest; or into batches of each."""
    order = np.arange(count, dtype=np.int32)
    if is_own:
        return [np.tile(order[at : at + batch_size], (clients, 1)) for at in range(0, count, batch_size)]
    rounds, at = [], 0
    for k, b in ((clients, batch_size), (1, batch_size)):
        while at + k * b <= count:
            rounds.append(order[at : at + k * b].reshape(k, b))
            at += k * b
    if at < count:
        rounds.append(order[at:].reshape(1, -1))
    return rounds
