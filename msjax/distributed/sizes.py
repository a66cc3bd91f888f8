"""How large a run's messages can become, known from shapes before the first is made."""

import jax

from msjax import wire
from msjax.split.payloads import PayloadSpec
from msjax.split.schedule import Exchange, Phase
from msjax.split.spec import RunSpec

MOST_MEGABYTES = 1 << 16
"""That a training server may be told to take of one message: it keeps one of each client at a time in memory."""

_MOST_BYTES = MOST_MEGABYTES << 20
_BESIDE = 256  # position, generation and the fields' own headers

_BY_BATCH = (Phase.FEATURES, Phase.GRADIENT, Phase.TEST)


class MessageTooLargeError(ValueError):
    """A message of the run can become larger than what carries it takes."""


def most_bytes(spec: RunSpec, exchange: Exchange) -> tuple[int, int]:
    """Returns the most bytes that a client's message in an exchange can have, and the answer to it.

    Of entropy-coded codecs these are the bytes before coding: what does not become shorter is sent as it is.
    """
    up, down = (_of_payload(payload) + _BESIDE for payload in (spec.up(exchange), spec.down(exchange)))
    if exchange.phase in (Phase.FEATURES, Phase.TEST) and spec.sends_labels:
        labels = spec.labels.batch_leaves(spec.schedule.batch_size_of(exchange))
        up += sum(leaf.size * leaf.dtype.itemsize + 8 for leaf in labels)
    if exchange.phase in (Phase.GRADIENT, Phase.RESULT):
        up += sum(8 * like.size for like in jax.tree.leaves(spec.metric_sums_like))
    return up, down


def check_sizes(spec: RunSpec, *, max_bytes: int = _MOST_BYTES, brings_part: bool = False) -> None:
    """Checks what a run's messages can become.

    Args:
      max_bytes: that the server takes of a message, as --max-megabytes says.
      brings_part: whether a client may have to send its part along with its features, and be sent another's.

    Raises:
      MessageTooLargeError: one can become too large; it says which, how large, and what would help.
    """
    schedule = spec.schedule
    part = _of_payload(spec.part_payload()) if brings_part and not spec.mode.hands_parts_on(schedule) else 0
    # The first step has the largest batch, the last what comes once in an epoch or a turn.
    for step in dict.fromkeys((0, schedule.total_steps - 1)):
        for exchange in schedule.step_exchanges(step):
            up, down = most_bytes(spec, exchange)
            if exchange.phase == Phase.FEATURES:
                up += part
            _check(spec, exchange, up, min(max_bytes, _MOST_BYTES), "a client's message", spec.up(exchange))
            _check(spec, exchange, down, _MOST_BYTES, "the server's answer", spec.down(exchange))
    if part + _BESIDE > _MOST_BYTES:
        raise MessageTooLargeError(f"a client's part must have at most {_MOST_BYTES:,} bytes, got {part:,}")


def _check(spec, exchange, nbytes, limit, whose, payload):
    if nbytes <= limit:
        return
    helps = []
    if limit < _MOST_BYTES:
        helps.append(f"a larger --max-megabytes (up to {MOST_MEGABYTES})")
    if exchange.phase in _BY_BATCH:
        helps += ["a smaller batch_size", "another codec"]
    helps.append("another cut")
    arrays = [] if payload is None else [f"{like.dtype}{list(like.shape)}" for like in payload.likes]
    shown = ", ".join(arrays[:5]) + (" …" if len(arrays) > 5 else "")
    raise MessageTooLargeError(
        f"{whose} in phase {exchange.phase.name} must have at most {limit:,} bytes, and can have {nbytes:,} "
        f"(it carries {shown}); what helps: {', '.join(helps[:-1])}{' or ' if helps[1:] else ''}{helps[-1]}"
    )


def _of_payload(payload: PayloadSpec | None) -> int:
    if payload is None:
        return 0
    pairs = zip(payload.codecs, payload.likes, strict=True)
    try:
        return sum(wire.most_bytes(codec, like) + 8 for codec, like in pairs)
    except ValueError as error:  # 2^31 values or more
        raise MessageTooLargeError(f"a message's arrays must be such as codecs take: {error}") from None
