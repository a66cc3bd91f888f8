"""Bytes up and down: what a run moves, exactly, and what the paper counts of it."""

import dataclasses
import operator
from collections.abc import Callable, Iterable

from msjax.split.payloads import PayloadSpec
from msjax.split.schedule import Exchange, Phase
from msjax.split.spec import RunSpec


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Payload bytes over all clients; headers are not in it.

    U-shaped, features and gradients go both ways, and no labels. `synchronization` is what keeps the clients' parts
    together: in parallel mode every client sends its gradients and batch statistics in each step and gets their mean.
    What is sent to test, features and labels up and U-shaped the tail's features down, is counted by itself and in no
    sum. The paper counts features on their way up alone, of training and of test samples: `paper_bytes`.
    """

    uplink_feature_bytes: int = 0
    uplink_gradient_bytes: int = 0
    uplink_label_bytes: int = 0
    uplink_synchronization_bytes: int = 0
    downlink_feature_bytes: int = 0
    downlink_gradient_bytes: int = 0
    downlink_synchronization_bytes: int = 0
    uplink_test_bytes: int = 0
    downlink_test_bytes: int = 0
    paper_bytes: int = 0

    @property
    def uplink_bytes(self) -> int:
        """All that the clients send to train."""
        parts = (self.uplink_feature_bytes, self.uplink_gradient_bytes, self.uplink_label_bytes)
        return sum(parts) + self.uplink_synchronization_bytes

    @property
    def downlink_bytes(self) -> int:
        """All that the server sends to train."""
        return self.downlink_feature_bytes + self.downlink_gradient_bytes + self.downlink_synchronization_bytes

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(*(times * a for a in dataclasses.astuple(self)))

    def to_json(self) -> dict[str, int]:
        """Returns every count, with the two sums."""
        return dataclasses.asdict(self) | {"uplink_bytes": self.uplink_bytes, "downlink_bytes": self.downlink_bytes}


Measure = Callable[[PayloadSpec], int]

_nbytes: Measure = operator.attrgetter("nbytes")  # of entropy-coded codecs those before coding


def exchange_traffic(spec: RunSpec, exchanges: Iterable[Exchange], measure: Measure = _nbytes) -> Traffic:
    """Returns the bytes of these exchanges; `measure` says how many a payload has."""
    return sum((_of_client(spec, exchange, measure) * len(exchange.clients) for exchange in exchanges), Traffic())


def traffic_before(spec: RunSpec, step: int) -> Traffic:
    """Returns the bytes of the exchanges before step `step`."""
    return exchange_traffic(spec, (each for earlier in range(step) for each in spec.schedule.step_exchanges(earlier)))


def epoch_traffic(spec: RunSpec, epoch: int, measure: Measure = _nbytes) -> Traffic:
    """Returns the bytes of an epoch, counted from 0; `measure` says how many a payload has."""
    schedule = spec.schedule
    steps = range(epoch * schedule.epoch_steps, (epoch + 1) * schedule.epoch_steps)
    exchanges = (exchange for step in steps for exchange in schedule.step_exchanges(step))
    return exchange_traffic(spec, exchanges, measure)


def run_traffic(spec: RunSpec, epochs: int) -> Traffic:
    """Returns the bytes of the first `epochs` epochs."""
    return sum((epoch_traffic(spec, epoch) for epoch in range(epochs)), Traffic())


def _of_client(spec, exchange, measure):
    up, down = (0 if payload is None else measure(payload) for payload in (spec.up(exchange), spec.down(exchange)))
    labels = 0
    if exchange.phase in (Phase.FEATURES, Phase.TEST) and spec.sends_labels:
        labels = spec.schedule.batch_size_of(exchange) * spec.labels.nbytes
    match exchange.phase:
        case Phase.FEATURES if spec.u_shaped:
            return Traffic(uplink_feature_bytes=up, downlink_feature_bytes=down, paper_bytes=up)
        case Phase.FEATURES:
            return Traffic(up, uplink_label_bytes=labels, downlink_gradient_bytes=down, paper_bytes=up)
        case Phase.GRADIENT:
            return Traffic(uplink_gradient_bytes=up, downlink_gradient_bytes=down)
        case Phase.TEST:
            return Traffic(uplink_test_bytes=up + labels, downlink_test_bytes=down, paper_bytes=up)
    return Traffic(uplink_synchronization_bytes=up, downlink_synchronization_bytes=down)
