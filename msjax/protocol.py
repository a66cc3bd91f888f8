"""What the parties of a run exchange, and in what order: the script that the server and every client follow.

A run is one sequence of exchanges. In each, certain clients send the server one message each; when all are there, the
server answers each of them. Which exchanges there are follows from the config alone, so nobody has to be told what
comes next, and a party that was away knows where it stands from the exchange that it waits for.

| phase | clients | up | down |
|---|---|---|---|
| TAKE | the one whose turn begins | nothing | the half of the client before (nothing at the very first) |
| FEATURES | all, or the one in turn | features, labels | gradient at the cut; U-shaped: the server's features |
| GRADIENT | the same, U-shaped only | gradient at the head's cut, loss and counts | gradient at the cut |
| AVERAGE | all | gradients and statistics, or weights and statistics | their mean |
| GIVE | the one whose turn ends | its half: weights, statistics, momentum | nothing |
| TEST | some | test features, labels | nothing; U-shaped: the server's features |
| RESULT | those that tested, U-shaped only | loss and counts | nothing |
"""

import dataclasses
import enum
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from msjax import feed
from msjax.config import Config, ModeConfig


class Phase(enum.IntEnum):
    TAKE = 1
    FEATURES = 2
    GRADIENT = 3
    AVERAGE = 4
    GIVE = 5
    TEST = 6
    RESULT = 7


class Exchange(NamedTuple):
    """One message of each of `clients` to the server, and its answers."""

    step: int
    """The training step; tests have that of the step before them."""
    phase: Phase
    clients: tuple[int, ...]
    number: int = 0
    """Of the test batch round within its epoch."""

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it from the others of its run, and increases."""
        return self.step, int(self.phase), self.number


class Place(NamedTuple):
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
class Plan:
    """What the script follows from.

    Attributes:
      samples: of each client in an epoch.
      test_samples: of the test set that the clients share out; 0 for no tests.
      test_every: epochs between two tests.
    """

    mode: ModeConfig
    clients: int
    samples: int
    test_samples: int
    batch_size: int
    epochs: int
    test_every: int = 1

    @classmethod
    def of(cls, cfg: Config, *, samples: int, test_samples: int) -> "Plan":
        return cls(cfg.mode, cfg.clients, samples, test_samples, cfg.batch_size, cfg.epochs, cfg.test_every)

    @property
    def sequential(self) -> bool:
        return self.mode.kind == "sequential"

    @property
    def averages_halves(self) -> bool:
        """Whether every client has a half of its own, which is averaged now and then."""
        return self.mode.kind == "splitfed" and self.clients > 1

    @property
    def client_steps(self) -> int:
        """Steps of one client in an epoch."""
        return math.ceil(self.samples / self.batch_size)

    @property
    def epoch_steps(self) -> int:
        return self.client_steps * (self.clients if self.sequential else 1)

    @property
    def total_steps(self) -> int:
        return self.epoch_steps * self.epochs

    def place(self, step: int) -> Place:
        """Returns where step `step` is."""
        epoch, within = divmod(step, self.epoch_steps)
        clients, index, turn_starts, turn_ends = tuple(range(self.clients)), within, False, False
        if self.sequential:
            turn = min(self.mode.turn_steps or self.client_steps, self.client_steps)
            round_, rest = divmod(within, turn * self.clients)
            # The last round of an epoch may be shorter.
            turn_length = min(turn, self.client_steps - round_ * turn)
            client, at = divmod(rest, turn_length)
            clients, index = (client,), round_ * turn + at
            turn_starts, turn_ends = at == 0, at == turn_length - 1
        start = index * self.batch_size
        stop = min(start + self.batch_size, self.samples)
        return Place(epoch, start, stop, clients, turn_starts, turn_ends, within == self.epoch_steps - 1)

    def averages(self, step: int) -> bool:
        """Whether the clients average after step `step`."""
        if self.clients == 1 or self.sequential:
            return False
        place = self.place(step)
        within = step % self.epoch_steps
        return self.mode.kind == "parallel" or place.epoch_ends or (within + 1) % self.mode.average_steps == 0

    def tests(self, epoch: int) -> bool:
        """Whether the test set goes through after epoch `epoch`, counted from 0."""
        return self.test_samples > 0 and ((epoch + 1) % self.test_every == 0 or epoch == self.epochs - 1)

    def test_clients(self) -> tuple[int, ...]:
        """The clients that a round of the test is spread over; in turns the last, which has the trained half."""
        return (self.clients - 1,) if self.sequential else tuple(range(self.clients))

    def test_calls(self) -> list[np.ndarray]:
        """The positions in the test set that the rounds of a test are about: int32 (1, K, B) each."""
        return feed.eval_calls(self.test_samples, len(self.test_clients()), self.batch_size)

    def exchanges(self, start: int = 0) -> Iterator[Exchange]:
        """Yields the exchanges of the run from step `start` on."""
        for step in range(start, self.total_steps):
            yield from self.step_exchanges(step)

    def step_exchanges(self, step: int) -> Iterator[Exchange]:
        """Yields those of one step, with the test behind it where it ends an epoch that has one."""
        place = self.place(step)
        relayed = self.sequential and self.clients > 1
        if relayed and place.turn_starts:
            yield Exchange(step, Phase.TAKE, place.clients)
        yield Exchange(step, Phase.FEATURES, place.clients)
        if self.mode.head_cut is not None:
            yield Exchange(step, Phase.GRADIENT, place.clients)
        if self.averages(step):
            yield Exchange(step, Phase.AVERAGE, place.clients)
        if relayed and place.turn_ends:
            yield Exchange(step, Phase.GIVE, place.clients)
        if place.epoch_ends and self.tests(place.epoch):
            yield from self._test(step)

    def _test(self, step):
        testing = set()
        for number, call in enumerate(self.test_calls()):
            clients = self.test_clients()[: call.shape[1]]
            testing |= set(clients)
            yield Exchange(step, Phase.TEST, clients, number)
        if self.mode.head_cut is not None:
            yield Exchange(step, Phase.RESULT, tuple(sorted(testing)))

    def may_checkpoint(self, step: int, every: int) -> bool:
        """Whether the state before step `step` is saved: every `every` steps; in sequential mode where a turn begins.

        Where a turn begins the server holds the half that goes round, so no client has to have saved anything.
        """
        if step in (0, self.total_steps):
            return step > 0
        return self.place(step).turn_starts if self.sequential and self.clients > 1 else step % every == 0
