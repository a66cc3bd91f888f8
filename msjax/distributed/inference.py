"""The server of split inference: it has a trained part, takes features and answers with outputs."""

import functools
import json
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import grpc
import jax
import jax.numpy as jnp

from msjax import build, config, models, session, wire
from msjax.compress import Exact, Identity
from msjax.distributed import messages
from msjax.distributed.compiled import CompiledPrograms
from msjax.distributed.fair_share import FairShare
from msjax.distributed.generation import Evicted, Limits, Texts
from msjax.distributed.metrics import ANYONE, Metrics
from msjax.distributed.options import MOST_SESSIONS
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc import split_pb2_grpc
from msjax.distributed.rpc.admission import Admission, Certificates, WrongTokens, peer_of
from msjax.distributed.rpc.connection import OTHER_SERVER, RUN_KEY
from msjax.distributed.rpc.security import Rates, Tokens
from msjax.distributed.rpc.server import say_refused
from msjax.logs import Seldom
from msjax.parts import TrainedPart, check_complete
from msjax.split.payloads import Codecs, PayloadSpec
from msjax.split.state import PartState, prediction_key, tail_key
from msjax.split.trees import describe_array

_MOST_PROGRAMS = 64
"""Compiled at a time, one for each batch size and codec; a new one beyond them lets go of all, so memory is bounded."""
_MOST_OF_TEXTS = 512
"""The same where there is one for each length of a text, too: of those most decode or encode alone, and are small."""


class InferenceServicer(split_pb2_grpc.SplitServicer):
    """Answers with a trained server part.

    A message says itself by which codec its features are coded. U-shaped, the answer is coded by the same.

    Args:
      texts: of a decoder, what the texts under way may take; see `generation.Texts`.
      most_streams: how many there may be at once. One that comes beyond them ends one of the caller that has most: a
        stream lasts until its answers are read, and holds a thread.

    Raises:
      ValueError: `trained` is not a server's part, or its model is not here.
    """

    def __init__(
        self,
        trained: TrainedPart,
        tokens: Tokens,
        metrics: Metrics,
        *,
        max_bytes: int = 1 << 30,
        max_messages_per_second: float = 1000.0,
        compression: str | None = None,
        certificates: Certificates | None = None,
        wrong_tokens: WrongTokens | None = None,
        texts: Limits | None = None,
        most_streams: int = MOST_SESSIONS,
    ):
        if trained.part != "server":
            raise ValueError(f"part must be that of a server, got that of a {trained.part}")
        check_complete(trained, "part")
        self._admission = Admission(tokens, certificates, wrong_tokens)
        self._trained, self._metrics, self._max_bytes = trained, metrics, max_bytes
        self._state = PartState(trained.params, trained.stats, ())
        self._compression, self._rates = compression, Rates(max_messages_per_second)
        spec = build.spec_of(trained.config, trained.summary, test_samples=0)
        self._features, self._outputs, self._u_shaped = spec.features, spec.outputs, spec.u_shaped
        self._is_decoder = trained.config.model.name == models.DECODER
        self._default, self._named = spec.test_codec.default, {name for name, _ in trained.config.array_codecs}
        self._key = prediction_key(trained.config.seed)
        self._refused = Seldom(say_refused)
        self._programs = CompiledPrograms(_MOST_OF_TEXTS if self._is_decoder else _MOST_PROGRAMS)
        self._texts = Texts(trained, metrics, texts or Limits())
        self._streams = FairShare(most_streams)

    def Describe(self, requests: Iterator[pb.DescribeRequest], context: grpc.ServicerContext) -> pb.Description:
        """Answers what part this is; it reads nothing, so that nobody holds a thread who sends nothing."""
        self._authenticate(context)
        trained = self._trained
        cfg = json.dumps(config.to_json(config.without_paths(trained.config), paths=False))
        return pb.Description(protocol=messages.PROTOCOL, run=trained.run_id, config=cfg, step=trained.step)

    def Infer(self, requests: Iterator[pb.Features], context: grpc.ServicerContext) -> Iterator[pb.Outputs]:
        """Answers each message of features, in order."""
        admitted = self._authenticate(context)
        context.send_initial_metadata(((RUN_KEY, self._trained.run_id),))
        for request in self._held(requests, context, admitted):
            self._metrics.received(ANYONE, request)
            began = time.perf_counter()
            try:
                payload, up = self._read(request)
            except wire.WireError as error:
                self._metrics.refused.inc()
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            outputs = pb.Outputs(payload=self._answer(payload, up))
            self._metrics.answered(up.likes[0].shape[0], time.perf_counter() - began)
            self._metrics.sent(ANYONE, outputs)
            yield outputs

    def Generate(self, requests: Iterator[pb.NextTokens], context: grpc.ServicerContext) -> Iterator[pb.Outputs]:
        """Answers what comes next in one text, as often as it is asked."""
        admitted = self._authenticate(context)
        context.send_initial_metadata(((RUN_KEY, self._trained.run_id),))
        try:
            yield from self._texts.answers(self._held(requests, context, admitted), self._admission.caller_of(context))
        except Evicted as error:
            context.abort(grpc.StatusCode.ABORTED, str(error))
        except wire.WireError as error:
            self._metrics.refused.inc()
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def Train(self, requests: Iterator[pb.FromClient], context: grpc.ServicerContext) -> NoReturn:
        """Refuses a client of a training run."""
        self._authenticate(context)
        context.abort(grpc.StatusCode.UNIMPLEMENTED, OTHER_SERVER)

    def close(self) -> None:
        """Logs who was refused and is not in the log yet."""
        self._refused.flush()

    def _authenticate(self, context):
        """Ends a call that is not let in; returns the version of what it was let in by."""
        version = self._admission.version
        if refusal := self._admission.refusal(context):
            self._metrics.refused.inc()
            if not refusal.is_told:
                self._refused(f"{peer_of(context)}: {refusal.reason}")
            context.abort(refusal.code, refusal.reason)
        return version

    def _held(self, requests, context, admitted):
        """Returns the requests of a stream, which is open from now on; another is ended where there are too many.

        They come as fast as the caller may ask, over all its streams.
        """
        caller = self._admission.caller_of(context)
        stream, evicted = self._streams.open(context.cancel, caller)
        rate = self._rates.open(caller)
        self._metrics.evicted.inc(evicted)
        self._metrics.connected.inc()

        ended = threading.Event()

        def close():
            ended.set()
            self._metrics.connected.dec()
            self._streams.close(stream)
            self._rates.close(caller)

        if not context.add_callback(close):
            close()  # it has ended already

        def noted():
            nonlocal admitted
            for request in requests:
                rate.wait(ended)
                if ended.is_set():
                    return
                if self._admission.version != admitted:
                    admitted = self._authenticate(context)
                self._streams.use(stream)
                yield request

        return noted()

    def _read(self, request):
        if len(request.payload) != len(self._features.leaves):
            raise wire.WireError(f"features must have {len(self._features.leaves)} arrays, got {len(request.payload)}")
        found, size = [], None
        for data, wanted in zip(request.payload, self._features.leaves, strict=True):
            message = wire.decode(data, max_bytes=self._max_bytes)
            like = message.like
            if not self._fits(like, wanted):
                shape = ["batch", *map(str, wanted.shape)]
                if self._is_decoder:
                    shape[1] = f"1 to {shape[1]}"
                raise wire.WireError(f"features must be {wanted.dtype}[{', '.join(shape)}], got {describe_array(like)}")
            if like.shape[0] != (size := like.shape[0] if size is None else size):
                raise wire.WireError(f"features must have one batch size, got {size} and {like.shape[0]}")
            found.append(message)
        places = tuple(range(len(found)))
        codecs, likes = tuple(m.codec for m in found), tuple(m.like for m in found)
        up = PayloadSpec(self._features.structure, codecs, likes, places)
        self._programs.use(up)
        return tuple(m.payload for m in found), up

    def _fits(self, like, wanted):
        shape = like.shape[1:]
        if self._is_decoder and shape and 1 <= shape[0] <= wanted.shape[0]:  # a text may be shorter than the run's
            shape = (wanted.shape[0], *shape[1:])
        return like.shape[0] > 0 and (shape, like.dtype) == (wanted.shape, wanted.dtype)

    def _answer(self, payload, up):
        batch_size, codec = up.likes[0].shape[0], Identity()
        if self._u_shaped and not all(isinstance(own, Identity | Exact) for own in up.codecs):
            # As the caller codes those features that no codec of their own is named for; see `RunSpec.tail_codec`.
            pairs = zip(self._features.names, up.codecs, strict=True)
            default = [c for name, c in pairs if name not in self._named and not isinstance(c, Exact)]
            codec = default[0] if default else self._default
        outputs = self._outputs
        if self._is_decoder:
            outputs = outputs.of_length(up.likes[0].shape[1])
        down = PayloadSpec.of_features(outputs, Codecs(codec), batch_size)
        args = (self._trained.apply, up, down, self._state, payload, self._key)
        out = _infer_texts(*args, self._features.leaves[0].shape[0]) if self._is_decoder else _infer(*args)
        return messages.encode(out, down, self._compression if self._u_shaped else None)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _infer(apply, up, down, state, payload, key):
    outputs, _ = apply(state.params, state.stats, up.decode(payload), train=False, key=None)
    return down.encode(outputs, tail_key(key))


def _infer_texts(apply, up, down, state, payload, key, longest):
    """The same of a decoder and a text of at most `longest` tokens.

    The part is compiled for few lengths: what is behind a text does not change it.
    """
    features = _decode(up, payload)
    length = down.likes[0].shape[1]
    most = session.padded(length, longest)
    features = jax.tree.map(lambda h: jnp.pad(h, ((0, 0), (0, most - length), (0, 0))), features)
    outputs = _apply(apply, state, features)
    return _encode(down, jax.tree.map(lambda y: y[:, :length], outputs), tail_key(key))


@functools.partial(jax.jit, static_argnums=0)
def _decode(up, payload):
    return up.decode(payload)


@functools.partial(jax.jit, static_argnums=0)
def _apply(apply, state, features):
    return apply(state.params, state.stats, features, train=False, key=None)[0]


@functools.partial(jax.jit, static_argnums=0)
def _encode(down, outputs, key):
    return down.encode(outputs, key)
