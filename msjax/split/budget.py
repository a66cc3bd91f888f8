"""One budget of bits for both ways over the cut: features get what gradients leave, step by step.

`RunSpec.cut_bits` is what a value of the features may cost up and down together, in real bits. Gradients take what
their codec's `error` needs, noise of a part of their energy, and half of the budget at most. That is little where the
energy is in few samples, as in fine-tuning, and much in the first epochs. Each client aims its features at what is
left: it adds up what its last exchange took, both ways, and moves its aim by a part of what that was off. So the budget
is met on average over some steps, whatever lossless coding makes of either message. The number of bits is an array, not
a part of the program: nothing is compiled anew.

With `RunSpec.cut_seconds` that is the most that the budget can be. What it is follows from the speed of each client's
link: so many bits as go over it in that time beside the step's labels and averages. Over a network a client measures
its link in every exchange, where it is not disturbed. In one program the speed is `RunSpec.link_bytes_per_second`, with
which a network's clients begin, too. The client tells the server with its features how many bits their gradients may
take, half of the budget.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msjax.compress import EntropyMask, Identity
from msjax.split.payloads import header_bytes
from msjax.split.schedule import Phase
from msjax.split.spec import RunSpec

GAIN = 0.2
"""Part of what the last exchange was off by which a client moves its aim."""
FIRST = 0.6
"""Part of the budget that features get in the first step."""
LEAST = 0.125
"""Part of `cut_bits` that the budget never falls below, however slow the link is."""
LINK_GAIN = 0.5
"""Part of what a measured speed is off by, as a ratio, by which a client moves what it takes for its link's."""


def first_up_bits(spec: RunSpec, bytes_per_second: np.float32 | None = None) -> jax.Array | None:
    """Returns the bits, float32 (), that a client aims its features of the first step at; None without a budget.

    Args:
      bytes_per_second: of its link, 0 for what is not known; None for what links are taken to have at first.
    """
    if spec.cut_bits is None:
        return None
    speed = first_bytes_per_second(spec) if bytes_per_second is None else bytes_per_second
    return jnp.float32(FIRST * float(budget_bits(spec, speed)))


def next_up_bits(
    spec: RunSpec,
    up_bits: jax.Array,
    sent_bytes: jax.Array,
    batch_size: int,
    budgets: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Returns the bits to aim at in the next step.

    Args:
      up_bits: those of this step; float32, of any shape, an entry a client.
      sent_bytes: about what its messages of features and gradients took, of floating arrays, in bytes; of the same
        shape.
      budgets: where it follows the link, the budget of this step and that of the next, float32 ().
    """
    now, then = (spec.cut_bits, spec.cut_bits) if budgets is None else budgets
    values = spec.feature_payload(batch_size).float_values
    # The last batch of an epoch counts for as much as there is of it: its headers are many for its few values.
    gain = GAIN * batch_size / spec.schedule.full_batch_size
    aim = up_bits + gain * (now - 8 * sent_bytes / values)
    if budgets is not None:
        aim *= then / now
    # Between a quarter of the budget and what no real bits come to. Gradients aim at half at most, but small messages
    # have headers that count, and with both halves they would be more than the budget.
    return jnp.clip(aim, 0.25 * then, 2 * then)


def mean_up_bits(up_bits: Any) -> float | None:
    """Returns the mean of what clients aim at, of any shape, at which their part goes on; None without a budget."""
    return None if up_bits is None else float(np.mean(up_bits))


def first_bytes_per_second(spec: RunSpec) -> np.float32 | None:
    """Returns the speed that a link is taken to have before it is measured, 0 for any; None where it is of no use."""
    return None if spec.cut_seconds is None else np.float32(spec.link_bytes_per_second or 0)


def next_bytes_per_second(before: np.float32, measured: float | None) -> np.float32:
    """Returns the speed that a link is taken to have after an exchange.

    Args:
      before: what it was taken to have until now, in bytes a second; 0 for what is not known.
      measured: that of the exchange; None, or what is not finite and positive, where it could not be measured.
    """
    if measured is None or not (math.isfinite(measured) and measured > 0):
        return before
    # Six digits: a link of one speed is measured as one number, although differences of a clock's times are rounded.
    measured = np.float32(f"{min(max(measured, 1.0), 1e15):.5e}")
    return np.float32(before * (float(measured) / float(before)) ** LINK_GAIN) if before else measured


def budget_bits(spec: RunSpec, bytes_per_second: np.float32 | None) -> np.float32:
    """Returns the budget of a step in bits a value, up and down together.

    Args:
      bytes_per_second: of the client's link; 0 for what is not known.
    """
    if spec.cut_seconds is None or not bytes_per_second:
        return np.float32(spec.cut_bits)
    values, others = _sizes(spec)
    bits = 8 * (float(bytes_per_second) * spec.cut_seconds - others) / values
    return np.float32(min(max(bits, LEAST * spec.cut_bits), spec.cut_bits))


def least_seconds(spec: RunSpec, bytes_per_second: np.float32) -> float:
    """Returns how long a step's messages take on a client's link with the least budget that there is."""
    values, others = _sizes(spec)
    codes = max(LEAST * spec.cut_bits * values / 8, fixed_bytes(spec))
    return (codes + others) / float(bytes_per_second)


def why_too_slow(spec: RunSpec, bytes_per_second: np.float32) -> str | None:
    """Returns why a step's messages take longer than `cut_seconds` with every budget, and what helps; else None."""
    seconds = least_seconds(spec, bytes_per_second)
    if seconds <= spec.cut_seconds:
        return None
    others = synchronization_bytes(spec)
    helps = others and spec.update_codec == Identity()
    compress = ", or give an update_codec" if helps else ""
    return (
        f"cut_seconds={spec.cut_seconds:g} cannot be kept on this link: the least budget, "
        f"{LEAST * spec.cut_bits:g} bits both ways, takes about {seconds:.2g} s a step, "
        f"{others / float(bytes_per_second):.2g} s of it for what keeps clients equal. "
        f"Take a longer time, a smaller cut_bits or smaller batches{compress}"
    )


def fixed_bytes(spec: RunSpec) -> int:
    """Returns the bytes that a step's messages of a full batch have without a single code: headers and tables."""
    batch_size = spec.schedule.full_batch_size
    return sum(
        header_bytes(codec, like) + codec.payload_like(like).means.size * 2
        for payload in (spec.feature_payload(batch_size), spec.gradient_payload(batch_size))
        for codec, like in zip(payload.codecs, payload.likes, strict=True)
        if isinstance(codec, EntropyMask)
    )


@functools.lru_cache(maxsize=16)
def _sizes(spec):
    """Of a step with a full batch: how many floating values its features have, and about the bytes of all else."""
    batch_size = spec.schedule.full_batch_size
    features = spec.feature_payload(batch_size)
    others = features.exact_bytes + synchronization_bytes(spec)
    if spec.u_shaped:
        others += spec.tail_feature_payload(batch_size).aimed_bytes
        others += spec.tail_gradient_payload(batch_size).aimed_bytes
    else:
        others += batch_size * spec.labels.nbytes
    return features.float_values, others


def synchronization_bytes(spec: RunSpec) -> float:
    """Returns about the bytes of a client's averages and of parts that are handed on, up and down, in a step.

    It is the mean over the steps of an epoch. Bytes are those before coding, or what their codec aims at.
    """
    schedule, nbytes, steps = spec.schedule, 0.0, 0
    # The second epoch, which begins as all later ones do.
    for step in range(schedule.epoch_steps, 2 * schedule.epoch_steps):
        for exchange in schedule.mode.exchanges(schedule, step):
            if exchange.phase == Phase.FEATURES:
                steps += len(exchange.clients)
            elif exchange.phase != Phase.GRADIENT:
                payloads = (spec.up(exchange), spec.down(exchange))
                nbytes += len(exchange.clients) * sum(one.aimed_bytes for one in payloads if one is not None)
    return nbytes / steps


def grad_bits(spec: RunSpec, bytes_per_second: np.float32 | None) -> np.float32 | None:
    """Returns the most bits that a value's gradient may take in a step, where the budget follows the link; else None.

    Args:
      bytes_per_second: as of `budget_bits`.
    """
    return None if spec.cut_seconds is None else np.float32(budget_bits(spec, bytes_per_second) / 2)


def grad_bits_range(spec: RunSpec) -> tuple[np.float32, np.float32]:
    """Returns the least and the largest value of `grad_bits` in a run."""
    return np.float32(np.float32(LEAST * spec.cut_bits) / 2), np.float32(np.float32(spec.cut_bits) / 2)


def check_known_link(spec: RunSpec) -> None:
    """Raises ValueError where the budget follows a link that nobody measures."""
    if spec.cut_seconds is not None and spec.link_bytes_per_second is None:
        raise ValueError(
            "link_bytes_per_second must be given with cut_seconds where all parties are one program, which has no link "
            "to measure, got None"
        )
