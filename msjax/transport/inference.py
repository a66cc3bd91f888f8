"""Split inference: features to a server that has a trained half, logits back."""

import functools
import json
import queue
from collections.abc import Iterator

import grpc
import jax
import numpy as np

from msjax import assemble, config, halves, step, wire
from msjax.compress import Codec, Identity
from msjax.transport import _messages, split_pb2_grpc
from msjax.transport import split_pb2 as pb
from msjax.transport._metrics import Metrics
from msjax.transport._security import Rate, TlsFiles, Tokens
from msjax.transport.client import Refused, open_channel

ANYONE = "any"
"""The client in metrics: who asks has no number."""
_MAX_SHAPES = 64  # of features and codecs that are compiled for in the life of a server


class Servicer(split_pb2_grpc.SplitServicer):
    """Answers with a trained server half.

    A message says itself by which codec its features are coded. U-shaped, the answer is coded by the same.

    Raises:
      ValueError: `trained` is not a server's half.
    """

    def __init__(
        self,
        trained: halves.TrainedHalf,
        tokens: Tokens,
        metrics: Metrics,
        *,
        max_bytes: int = 1 << 30,
        max_messages_per_second: float = 1000.0,
        compression: str | None = None,
    ):
        if trained.part != "server":
            raise ValueError(f"half must be that of a server, got that of a {trained.part}")
        self._trained, self._tokens, self._metrics, self._max_bytes = trained, tokens, metrics, max_bytes
        self._half = step.HalfState(trained.params, trained.stats, ())
        self._compression, self._max_messages_per_second = compression, max_messages_per_second
        cfg, info = trained.config, trained.info
        self._features, self._outputs = _feature_shapes(cfg, info)
        self._to_head = cfg.head_cut is not None
        self._key = jax.random.key(cfg.seed)
        self._seen: set[tuple] = set()
        infer = functools.partial(step.infer_outputs, trained.apply, to_head=self._to_head)
        self._infer = jax.jit(infer, static_argnums=0, static_argnames="features")

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        self._authenticate(context)
        trained = self._trained
        return pb.Description(
            protocol=_messages.PROTOCOL,
            run=trained.run,
            config=json.dumps(config.to_json(trained.config)),
            step=trained.step,
            input_shape=trained.info.input_shape,
            num_classes=trained.info.num_classes,
        )

    def Infer(self, requests: Iterator[pb.Features], context: grpc.ServicerContext) -> Iterator[pb.Outputs]:
        self._authenticate(context)
        rate = Rate(self._max_messages_per_second)
        for number, request in enumerate(requests):
            rate.wait()
            self._metrics.received(ANYONE, request)
            try:
                message = self._read(request)
            except wire.WireError as error:
                self._metrics.refused.inc()
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            outputs = pb.Outputs(payload=self._answer(message, number))
            self._metrics.sent(ANYONE, outputs)
            yield outputs

    def _authenticate(self, context):
        if not self._tokens.accept_any(_messages.token(context)):
            self._metrics.refused.inc()
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such token")

    def _read(self, request):
        message = wire.decode(request.payload, max_bytes=self._max_bytes)
        like = message.like
        if (like.shape[1:], like.dtype) != (self._features.shape, self._features.dtype) or not like.shape[0]:
            raise wire.WireError(
                f"features must be {self._features.dtype}[batch, {', '.join(map(str, self._features.shape))}], "
                f"got {like.dtype}{list(like.shape)}"
            )
        form = message.codec, like.shape
        if form not in self._seen and len(self._seen) >= _MAX_SHAPES:
            raise wire.WireError(f"this server has met {_MAX_SHAPES} codecs and batch sizes and takes no new ones")
        self._seen.add(form)
        return message

    def _answer(self, message, number):
        key = jax.random.fold_in(self._key, number)
        out = self._infer(message.codec, self._half, message.payload, key, features=message.like)
        if self._to_head:
            like = jax.ShapeDtypeStruct((message.like.shape[0], *self._outputs.shape), self._outputs.dtype)
            return wire.encode(out, message.codec, like, compression=self._compression)
        return wire.encode((np.asarray(out),), Identity(), out)


def _feature_shapes(cfg, info):
    """Shape and dtype of what one sample is at the cut, and behind the server."""
    client, server, *_ = jax.eval_shape(lambda: assemble.make_halves(cfg, info))
    x = jax.ShapeDtypeStruct((1, *info.input_shape), assemble.make_model(cfg, info).input_dtype)
    found = []
    for half in (client, server):
        x = jax.eval_shape(lambda p, s, x, half=half: half.apply(p, s, x, train=False)[0], half.params, half.stats, x)
        found.append(jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    return found


class Remote:
    """A trained server half behind a network.

    Raises, from every method:
      Refused: the server will not answer this client, or not this request.
      ConnectionError: it cannot be reached, or was lost.
    """

    def __init__(self, address: str, tls: TlsFiles | None = None, token: str | None = None, *, max_bytes: int = -1):
        self._channel = open_channel(address, tls or TlsFiles(), max_bytes)
        self._stub = split_pb2_grpc.SplitStub(self._channel)
        self._metadata = [("authorization", f"Bearer {token}")] if token else None
        self._requests: queue.Queue[pb.Features | None] = queue.Queue()
        self._stream = None

    def describe(self, seconds: float = 60.0) -> pb.Description:
        """What the server has; waits for it to come up for as long as `seconds`."""
        return self._call(
            lambda: self._stub.Describe(
                pb.DescribeRequest(), metadata=self._metadata, timeout=seconds, wait_for_ready=True
            )
        )

    def send(self, payload: tuple, codec: Codec, like: jax.ShapeDtypeStruct, compression: str | None = None) -> int:
        """Sends the features `payload`, made by `codec` of an array like `like`; returns the message's bytes.

        Several may be on their way; `receive` gives the answers in order.
        """
        if self._stream is None:
            self._stream = self._stub.Infer(iter(self._requests.get, None), metadata=self._metadata)
        data = wire.encode(payload, codec, like, compression=compression)
        self._requests.put(pb.Features(payload=data))
        return len(data)

    def receive(self) -> wire.Message:
        """The next answer: logits, or U-shaped the features for the head."""
        if self._stream is None:
            raise ValueError("receive must follow a send")
        answer = self._call(lambda: next(self._stream))
        return wire.decode(answer.payload)

    def close(self) -> None:
        self._requests.put(None)
        self._channel.close()

    def _call(self, function):
        try:
            return function()
        except StopIteration:
            raise ConnectionError("the server closed the stream") from None
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise ConnectionError(error.details()) from None
            raise Refused(error.details()) from None
