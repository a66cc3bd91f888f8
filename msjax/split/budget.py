"""One budget of bits for both ways over the cut: features get what gradients leave, step by step.

`RunSpec.cut_bits` is what a value of the features may cost up and down together, in real bits. Gradients take what
their codec's `error` needs, noise of a part of their energy, and half of the budget at most. That is little where the
energy is in few samples, as in fine-tuning, and much in the first epochs. Each client aims its features at what is
left: it adds up what its last exchange took, both ways, and moves its aim by a part of what that was off. So the budget
is met on average over some steps, whatever lossless coding makes of either message. The number of bits is an array, not
a part of the program: nothing is compiled anew.
"""

import jax
import jax.numpy as jnp

from msjax import wire
from msjax.split.payloads import Payload, PayloadSpec
from msjax.split.spec import RunSpec

GAIN = 0.2
"""Part of what the last exchange was off by which a client moves its aim."""
FIRST = 0.6
"""Part of the budget that features get in the first step."""


def first_up_bits(spec: RunSpec) -> jax.Array | None:
    """Returns the bits, float32 (), that a client aims its features of the first step at; None without a budget."""
    return None if spec.cut_bits is None else jnp.float32(FIRST * spec.cut_bits)


def next_up_bits(spec: RunSpec, up_bits: jax.Array, sent_bytes: jax.Array, batch_size: int) -> jax.Array:
    """Returns the bits to aim at in the next step.

    Args:
      up_bits: those of this step; float32, of any shape, an entry a client.
      sent_bytes: about what its messages of features and gradients took, in bytes, of the same shape.
    """
    values = sum(like.size for like in spec.feature_payload(batch_size).likes)
    off = spec.cut_bits - 8 * sent_bytes / values
    # Between half of the budget, as gradients get no more than the other half, and what no real bits come to.
    return jnp.clip(up_bits + GAIN * off, 0.5 * spec.cut_bits, 2 * spec.cut_bits)


def payload_bytes(payload_spec: PayloadSpec, payload: Payload) -> jax.Array:
    """Returns about the bytes of a message."""
    triples = zip(payload, payload_spec.codecs, payload_spec.likes, strict=True)
    return sum((wire.estimate_bytes(p, codec, like) for p, codec, like in triples), jnp.float32(0))
