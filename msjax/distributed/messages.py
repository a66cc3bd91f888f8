"""Between the parties' messages and what travels: nothing here computes."""

import math

import jax
import numpy as np

from msjax import wire
from msjax.distributed.rpc import split_pb2 as pb
from msjax.logs import shorten
from msjax.split.budget import grad_bits_range
from msjax.split.metrics import MetricSums
from msjax.split.parties import Message
from msjax.split.payloads import Payload, PayloadSpec
from msjax.split.schedule import Exchange, Phase, Schedule
from msjax.split.spec import RunSpec

PROTOCOL = 5


class ProtocolError(Exception):
    """The other party sent what the schedule does not allow; the connection is of no more use."""

    def __init__(self, fault: str):
        super().__init__(shorten(fault))  # it may repeat what was sent, and goes back to who sent it


def to_position(exchange: Exchange) -> pb.Position:
    """Returns what names an exchange within its run."""
    return pb.Position(step=exchange.step, phase=int(exchange.phase), test_round=exchange.test_round)


def from_position(schedule: Schedule, position: pb.Position, client: int) -> Exchange:
    """Returns the exchange of the schedule at a position.

    Raises:
      ProtocolError: there is none, or this client has no part in it.
    """
    wanted = position.step, position.phase, position.test_round
    if position.step < schedule.total_steps:
        for exchange in schedule.step_exchanges(position.step):
            if exchange.position == wanted and client in exchange.clients:
                return exchange
    raise ProtocolError(f"no exchange (step, phase, test round) = {wanted} of client {client}")


def encode(payload: Payload | None, spec: PayloadSpec | None, compression: str | None) -> list[bytes]:
    """Returns the bytes of each array of a payload in `msjax.wire`'s format; none where there is no payload."""
    if payload is None:
        return []
    arrays = zip(payload, spec.codecs, spec.likes, strict=True)
    return [wire.encode(one, codec, like, compression=compression) for one, codec, like in arrays]


def decode(data: list[bytes], spec: PayloadSpec | None, *, optional: bool = False) -> Payload | None:
    """Returns what `encode` was given.

    Raises:
      ProtocolError: the bytes are not what the exchange calls for.
    """
    if not data and (spec is None or optional):
        return None
    if len(data) != (0 if spec is None else len(spec.codecs)):
        expected = "none" if spec is None else len(spec.codecs)
        raise ProtocolError(f"arrays in the payload of this exchange must be {expected}, got {len(data)}")
    try:
        arrays = zip(data, spec.codecs, spec.likes, strict=True)
        return tuple(wire.decode(one, expect=(codec, like)).payload for one, codec, like in arrays)
    except wire.WireError as error:
        raise ProtocolError(str(error)) from None


def encode_part(payload: Payload, spec: RunSpec, compression: str | None) -> bytes:
    """Returns the bytes of a client's part with its optimizer state."""
    return encode(payload, spec.part_payload(), compression)[0]


def decode_part(data: bytes, spec: RunSpec) -> Payload:
    """Returns what `encode_part` was given; raises ProtocolError where the bytes are none of such a part."""
    return decode([data], spec.part_payload())


def to_request(
    message: Message, exchange: Exchange, spec: RunSpec, *, compression: str | None = None, **fields
) -> pb.FromClient:
    """Returns a client's message in an exchange; `fields` are the request's others: generation, saved, part."""
    out = pb.FromClient()
    # Filled in place: a message that is passed to a constructor is copied.
    request = out.request
    request.position.CopyFrom(to_position(exchange))
    request.payload.extend(encode(message.payload, spec.up(exchange), compression))
    for name, value in fields.items():
        setattr(request, name, value)
    if message.grad_bits is not None:
        request.grad_bits = float(message.grad_bits)
    if message.labels is not None:
        request.labels.extend(_label_bytes(leaf) for leaf in jax.tree.leaves(message.labels))
    if message.metrics is not None:
        request.metrics.CopyFrom(_to_metrics(message.metrics, spec))
    return out


def from_request(request: pb.Request, spec: RunSpec, exchange: Exchange) -> Message:
    """Returns what a client says in an exchange.

    Raises:
      ProtocolError: it is not what the exchange calls for.
    """
    payload = decode(list(request.payload), spec.up(exchange))
    labels = metrics = None
    if exchange.phase in (Phase.FEATURES, Phase.TEST) and spec.sends_labels:
        labels = _labels(request.labels, spec, spec.schedule.batch_size_of(exchange))
    elif request.labels:
        raise ProtocolError("labels in an exchange that has none")
    if exchange.phase in (Phase.GRADIENT, Phase.RESULT):
        metrics = _from_metrics(request.metrics, spec, exchange)
    return Message(payload, labels, metrics, _grad_bits(request, spec, exchange))


def _grad_bits(request, spec, exchange):
    if spec.cut_seconds is None or exchange.phase != Phase.FEATURES:
        if request.grad_bits:
            raise ProtocolError(f"grad_bits must not be in an exchange that has no use for it, got {request.grad_bits}")
        return None
    least, most = grad_bits_range(spec)
    if not least <= request.grad_bits <= most:
        raise ProtocolError(f"grad_bits must be in {least:g}..{most:g}, got {request.grad_bits}")
    return np.float32(request.grad_bits)


def check(message: Message, spec: RunSpec, exchange: Exchange, *, allow_nonfinite: bool = False) -> None:
    """Checks what a client says in an exchange: a number that is not finite would spoil the part of all.

    Raises:
      ProtocolError: a number of the payload or a metric is not finite, or a label is none that the task takes.
    """
    where = f"in step {exchange.step} (counted from 0), phase {exchange.phase.name}"
    if message.payload is not None and not allow_nonfinite:
        _check_finite(message.payload, spec.up(exchange), where)
    # Where the loss is not finite either, training diverges, and the server's own check ends the run.
    if message.metrics is not None and not allow_nonfinite and math.isfinite(message.metrics.loss):
        for name, sums in (message.metrics.sums or {}).items():
            if (wrong := _nonfinite(sums)) is not None:
                raise ProtocolError(f"metrics must be finite, got {wrong} of {name} {where}")
    if message.labels is not None and spec.task.check_labels is not None:
        outputs = jax.tree.unflatten(spec.outputs.structure, spec.outputs.leaves)
        try:
            spec.task.check_labels(message.labels, outputs)
        except ValueError as error:
            raise ProtocolError(f"{error}, {where}") from None


def check_part(data: bytes, spec: RunSpec, *, allow_nonfinite: bool = False) -> None:
    """Checks what a client sends as its part, from which another one is to go on.

    Raises:
      ProtocolError: the bytes are none of such a part, or a number in it is not finite.
    """
    part = decode_part(data, spec)
    if not allow_nonfinite:
        _check_finite(part, spec.part_payload(), "in its part")


def _check_finite(payload, spec, where):
    for one, like in zip(payload, spec.likes, strict=True):
        for leaf in jax.tree.leaves(one):
            if (wrong := _nonfinite(leaf)) is not None:
                raise ProtocolError(
                    f"what a client sends must be finite, got {wrong} among {like.dtype}{list(like.shape)} {where}"
                )


def _nonfinite(array):
    """The first value of an array that is not finite, or None."""
    if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
        return None
    flat = np.asarray(array).reshape(-1)
    found = flat[~np.isfinite(flat)]
    return found[0] if found.size else None


def _label_bytes(leaf):
    array = np.ascontiguousarray(leaf)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _labels(data, spec, batch_size):
    likes = spec.labels.batch_leaves(batch_size)
    if len(data) != len(likes):
        raise ProtocolError(f"labels must have {len(likes)} arrays, got {len(data)}")
    found = []
    for one, like in zip(data, likes, strict=True):
        if len(one) != like.size * like.dtype.itemsize:
            raise ProtocolError(f"labels must be {like.size * like.dtype.itemsize} bytes, got {len(one)}")
        found.append(np.frombuffer(one, np.dtype(like.dtype).newbyteorder("<")).astype(like.dtype).reshape(like.shape))
    return jax.tree.unflatten(spec.labels.structure, found)


def _to_metrics(metrics, spec):
    sums = {} if metrics.sums is None else metrics.sums
    values = [np.asarray(sums[name], np.float64).reshape(-1) for name in spec.metric_sums_like if name in sums]
    values = np.concatenate(values).tolist() if values else []
    return pb.MetricSums(loss=metrics.loss, samples=metrics.samples, values=values)


def _from_metrics(message, spec, exchange):
    if exchange.phase == Phase.GRADIENT:
        least = most = spec.schedule.batch_size_of(exchange)
    else:
        least, most = 0, sum(round_.shape[1] for round_ in spec.schedule.test_rounds())
    if not least <= message.samples <= most:
        raise ProtocolError(f"metrics must be of {least} to {most} samples, got {message.samples}")
    likes = spec.metric_sums_like
    size = sum(like.size for like in likes.values())
    if len(message.values) != size:
        raise ProtocolError(f"metrics must have {size} values, got {len(message.values)}")
    sums, at = {}, 0
    for name, like in likes.items():
        values = np.asarray(message.values[at : at + like.size], np.float64)
        if np.issubdtype(like.dtype, np.integer):
            most = np.iinfo(like.dtype).max
            if not np.all(np.abs(values) <= most):  # also of what is no number
                raise ProtocolError(f"metrics must be integers of at most {most}, got {values} of {name}")
        with np.errstate(over="ignore"):  # what becomes infinite is found by `check`
            values = values.astype(like.dtype)
        sums[name], at = values.reshape(like.shape), at + like.size
    return MetricSums(message.loss, message.samples, sums)
