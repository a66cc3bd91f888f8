"""Bytes up and down: what a run moves, exactly, and what the paper counts of it."""

import dataclasses
from collections.abc import Iterable

from msjax.parties import Form, Shapes
from msjax.protocol import Exchange, Phase

LABEL_BYTES = 4  # labels travel as int32


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Payload bytes over all clients; headers are not in it, nor what is sent to test.

    Of U-shaped training the features and gradients go both ways, and labels none. `synchronization` is what keeps the
    clients' halves together: in parallel mode every client sends its gradients and batch statistics in each step and
    gets their mean. The paper counts features on their way up alone, of training and of test samples: `paper_bytes`.
    """

    uplink_feature_bytes: int = 0
    uplink_gradient_bytes: int = 0
    uplink_label_bytes: int = 0
    uplink_synchronization_bytes: int = 0
    downlink_feature_bytes: int = 0
    downlink_gradient_bytes: int = 0
    downlink_synchronization_bytes: int = 0
    paper_bytes: int = 0

    @property
    def uplink_bytes(self) -> int:
        return (
            self.uplink_feature_bytes
            + self.uplink_gradient_bytes
            + self.uplink_label_bytes
            + self.uplink_synchronization_bytes
        )

    @property
    def downlink_bytes(self) -> int:
        return self.downlink_feature_bytes + self.downlink_gradient_bytes + self.downlink_synchronization_bytes

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(*(times * a for a in dataclasses.astuple(self)))

    def to_json(self) -> dict[str, int]:
        """Returns every count, with the two sums."""
        return dataclasses.asdict(self) | {"uplink_bytes": self.uplink_bytes, "downlink_bytes": self.downlink_bytes}


def count(shapes: Shapes, exchanges: Iterable[Exchange]) -> Traffic:
    """Returns the bytes of these exchanges."""
    total = Traffic()
    for exchange in exchanges:
        total += _of(shapes, exchange) * len(exchange.clients)
    return total


def epoch_traffic(shapes: Shapes, epoch: int) -> Traffic:
    """Returns the bytes of an epoch, counted from 0."""
    plan = shapes.plan
    steps = range(epoch * plan.epoch_steps, (epoch + 1) * plan.epoch_steps)
    return count(shapes, (exchange for step in steps for exchange in plan.step_exchanges(step)))


def run_traffic(shapes: Shapes, epochs: int) -> Traffic:
    """Returns the bytes of the first `epochs` epochs."""
    return sum((epoch_traffic(shapes, epoch) for epoch in range(epochs)), Traffic())


def _of(shapes, exchange):
    """Of one client."""
    up, down = (0 if form is None else _bytes(form) for form in (shapes.up(exchange), shapes.down(exchange)))
    head = shapes.plan.mode.head_cut is not None
    match exchange.phase:
        case Phase.FEATURES if head:
            return Traffic(uplink_feature_bytes=up, downlink_feature_bytes=down, paper_bytes=up)
        case Phase.FEATURES:
            labels = shapes.batch(exchange) * LABEL_BYTES
            return Traffic(up, uplink_label_bytes=labels, downlink_gradient_bytes=down, paper_bytes=up)
        case Phase.GRADIENT:
            return Traffic(uplink_gradient_bytes=up, downlink_gradient_bytes=down)
        case Phase.TEST:
            return Traffic(paper_bytes=up)
    return Traffic(uplink_synchronization_bytes=up, downlink_synchronization_bytes=down)


def _bytes(form: Form) -> int:
    return form.codec.payload_bytes(form.like)
