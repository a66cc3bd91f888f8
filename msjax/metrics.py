"""Bytes up and down: what a step moves, exactly, and what the paper counts of it."""

import dataclasses
from typing import Any

import jax

from msjax import compress
from msjax.step import HalfState

LABEL_BYTES = 4  # labels travel as int32


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Payload bytes of one or more steps, over all clients; transport headers are not in it.

    `synchronization` is what keeps the clients' halves equal: every client sends its gradients and batch statistics
    and gets their mean. The paper counts features alone; so does `paper_bytes`, for training and test samples.
    """

    uplink_feature_bytes: int = 0
    uplink_label_bytes: int = 0
    uplink_synchronization_bytes: int = 0
    downlink_gradient_bytes: int = 0
    downlink_synchronization_bytes: int = 0
    paper_bytes: int = 0

    @property
    def uplink_bytes(self) -> int:
        return self.uplink_feature_bytes + self.uplink_label_bytes + self.uplink_synchronization_bytes

    @property
    def downlink_bytes(self) -> int:
        return self.downlink_gradient_bytes + self.downlink_synchronization_bytes

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(*(times * a for a in dataclasses.astuple(self)))

    def to_json(self) -> dict[str, int]:
        """Returns every count, with the two sums."""
        return dataclasses.asdict(self) | {"uplink_bytes": self.uplink_bytes, "downlink_bytes": self.downlink_bytes}


def step_traffic(
    codec: compress.Codec, grad_codec: compress.Codec, features: Any, client: HalfState, *, clients: int
) -> Traffic:
    """Returns the bytes of one training step of K clients.

    Args:
      features: shape and dtype of one client's feature map (B, …).
      client: the client half, whose gradients and statistics are averaged when there are several clients.
    """
    sync = sum(leaf.nbytes for leaf in jax.tree.leaves((client.params, client.stats))) if clients > 1 else 0
    up = codec.payload_bytes(features)
    return Traffic(
        uplink_feature_bytes=clients * up,
        uplink_label_bytes=clients * features.shape[0] * LABEL_BYTES,
        uplink_synchronization_bytes=clients * sync,
        downlink_gradient_bytes=clients * grad_codec.payload_bytes(features),
        downlink_synchronization_bytes=clients * sync,
        paper_bytes=clients * up,
    )


def epoch_traffic(
    codec: compress.Codec,
    grad_codec: compress.Codec,
    features: Any,
    client: HalfState,
    *,
    clients: int,
    samples_per_client: int,
    batch_size: int,
) -> Traffic:
    """Returns the bytes of an epoch's training steps, the smaller last one counted at its own size.

    `features` gives the shape of one sample's feature map, behind its batch axis, and the dtype; the rest is as in
    `step_traffic`.
    """

    def steps(batch, count):
        like = jax.ShapeDtypeStruct((batch, *features.shape[1:]), features.dtype)
        return step_traffic(codec, grad_codec, like, client, clients=clients) * count

    full, rest = divmod(samples_per_client, batch_size)
    total = steps(batch_size, full)
    return total + steps(rest, 1) if rest else total
