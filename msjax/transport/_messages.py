"""Between the parties' messages and what travels: nothing here computes."""

import numpy as np

from msjax import wire
from msjax.parties import Form, Message, Shapes
from msjax.protocol import Exchange, Phase
from msjax.simulate import Sums
from msjax.transport import split_pb2 as pb

PROTOCOL = 1


class ProtocolError(Exception):
    """The other party sent what the script does not allow; the connection is of no more use."""


def token(context) -> str:
    """The token that a call came with, or an empty one."""
    return dict(context.invocation_metadata()).get("authorization", "").removeprefix("Bearer ")


def to_key(exchange: Exchange) -> pb.Key:
    return pb.Key(step=exchange.step, phase=int(exchange.phase), number=exchange.number)


def from_key(plan, key: pb.Key, client: int) -> Exchange:
    """The exchange of the script that `key` names.

    Raises:
      ProtocolError: there is none, or this client has no part in it.
    """
    if key.step < plan.total_steps:
        for exchange in plan.step_exchanges(key.step):
            if exchange.key == (key.step, key.phase, key.number) and client in exchange.clients:
                return exchange
    raise ProtocolError(f"no exchange (step {key.step}, phase {key.phase}, number {key.number}) of client {client}")


def encode(payload: tuple | None, form: Form | None, compression: str | None) -> bytes:
    """The bytes of a payload in `msjax.wire`'s format; none where there is no payload."""
    return b"" if payload is None else wire.encode(payload, form.codec, form.like, compression=compression)


def decode(data: bytes, form: Form | None, *, optional: bool = False) -> tuple | None:
    """The inverse of `encode`.

    Raises:
      ProtocolError: the bytes are not what the exchange calls for.
    """
    if not data and (form is None or optional):
        return None
    if form is None:
        raise ProtocolError(f"a payload of {len(data)} bytes in an exchange that has none")
    try:
        return wire.decode(data, expect=form).payload
    except wire.WireError as error:
        raise ProtocolError(str(error)) from None


def to_request(
    message: Message, exchange: Exchange, form: Form | None, *, compression: str | None = None, **fields
) -> pb.FromClient:
    """`fields` are the request's others: generation, saved, half."""
    out = pb.FromClient()
    # Filled in place: a message that is passed to a constructor is copied.
    request = out.request
    request.key.CopyFrom(to_key(exchange))
    request.payload = encode(message.payload, form, compression)
    for name, value in fields.items():
        setattr(request, name, value)
    if message.labels is not None:
        request.labels = np.ascontiguousarray(message.labels, "<i4").tobytes()
    if message.sums is not None:
        request.sums.CopyFrom(
            pb.Sums(**{name: getattr(message.sums, name) for name in ("loss", "top1", "top5", "samples")})
        )
    return out


def from_request(request: pb.Request, shapes: Shapes, exchange: Exchange) -> Message:
    """What a client says in an exchange.

    Raises:
      ProtocolError: it is not what the exchange calls for.
    """
    payload = decode(request.payload, shapes.up(exchange))
    u_shaped = shapes.plan.mode.head_cut is not None
    labels = sums = None
    if exchange.phase in (Phase.FEATURES, Phase.TEST) and not u_shaped:
        batch = shapes.batch(exchange)
        if len(request.labels) != 4 * batch:
            raise ProtocolError(f"labels must be {4 * batch} bytes, got {len(request.labels)}")
        labels = np.frombuffer(request.labels, "<i4")
    elif request.labels:
        raise ProtocolError("labels in an exchange that has none")
    if exchange.phase in (Phase.GRADIENT, Phase.RESULT):
        sums = Sums(request.sums.loss, request.sums.top1, request.sums.top5, request.sums.samples)
    return Message(payload, labels, sums)
