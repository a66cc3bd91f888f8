"""Texts from a decoder whose server part is behind gRPC: the server's caches, and the client's end of a session."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grpc
import jax

from msjax import build, models, wire
from msjax.distributed.compiled import CompiledPrograms
from msjax.distributed.fair_share import FairShare
from msjax.distributed.metrics import ANYONE, Metrics
from msjax.distributed.rpc import split_pb2 as pb
from msjax.keys import make_key
from msjax.parts import TrainedPart
from msjax.session import Piece, ServerSession, Terms, padded

_MOST_PROGRAMS = 512
"""Compiled at a time, one for each length of a prompt and codec; a new one beyond them lets go of all."""


class Limits(NamedTuple):
    """What the texts under way may take of a server: how many there are, and the bytes of their keys and values."""

    sessions: int = 32
    cache_bytes: int = 1 << 30


class Evicted(Exception):
    """A text was ended, since another one needed its room."""

    def __init__(self):
        super().__init__("the text was ended, as others needed its room on the server: begin it again")


class _Text:
    """A text under way, whose cache is given back when it is evicted: also of a client that does not read its answer.

    Its stream and the thread of that remain until the client reads, or goes.
    """

    def __init__(self, inbox):
        self._inbox, self._session, self._is_evicted = inbox, None, False

    def begin(self, session: ServerSession) -> None:
        """Has a session to answer with, unless it was evicted already."""
        self._session = session
        if self._is_evicted:
            self._session = None

    def answer(self, piece: Piece) -> list[bytes]:
        """Returns what the session answers; raises Evicted where it has none any more."""
        if (session := self._session) is None:
            raise Evicted
        return session.answer([piece])

    def evict(self) -> None:
        """Ends it, from any thread."""
        self._is_evicted = True  # first: `begin` may be under way
        self._session = None
        self._inbox.put(Evicted)


class Texts:
    """Answers texts under way with a trained server part of a decoder.

    A text has a stream of its own, with which its cache begins and ends, so that no client can name another's.
    """

    def __init__(self, trained: TrainedPart, metrics: Metrics, limits: Limits):
        self._metrics, self._limits = metrics, limits
        self._sessions = FairShare(limits.sessions, limits.cache_bytes)
        metrics.sessions.set_function(lambda: len(self._sessions))
        self._name = trained.config.model.name
        self._part = self._tail = None
        if self._name == models.DECODER:
            _, server, *tail = jax.eval_shape(lambda: build.make_parts(trained.config, trained.summary))
            params, stats = jax.device_put((trained.params, trained.stats))
            self._part, self._tail = server._replace(params=params, stats=stats), tail[0] if tail else None
        self._key = make_key(trained.config.seed)
        self._programs = CompiledPrograms(_MOST_PROGRAMS)
        self._lock = threading.Lock()

    def answers(self, requests: Iterator[pb.NextTokens], caller: str = "") -> Iterator[pb.Outputs]:
        """Answers each message of one text, of one caller, in order.

        Raises:
          Evicted: another text needed its room.
          WireError: a message is not as it should be, or the part is not a decoder's.
        """
        if self._part is None:
            raise wire.WireError(f"the server's part must be of a decoder to continue texts, got one of {self._name!r}")
        # Read by a thread, so that an eviction ends a stream that waits; a message is read when the last is answered.
        inbox: queue.Queue[pb.NextTokens | type[Evicted] | None] = queue.Queue()
        turn = threading.Semaphore(1)
        threading.Thread(target=_read, args=(requests, inbox, turn), daemon=True).start()
        text, own, terms = _Text(inbox), None, None
        try:
            while (request := inbox.get()) is not None:
                if request is Evicted:
                    raise Evicted
                self._metrics.received(ANYONE, request)
                began = time.perf_counter()
                if terms is None:
                    terms, own = self._begin(request, text, caller)
                self._sessions.use(own)
                outputs = pb.Outputs(payload=text.answer(Piece(request.count, request.features)))
                # Behind the answer: a message that is none has compiled nothing.
                self._programs.use((terms.codec, terms.candidates, terms.capacity, request.count))
                self._metrics.answered(1, time.perf_counter() - began)
                self._metrics.sent(ANYONE, outputs)
                yield outputs
                turn.release()
        finally:
            turn.release()
            self._sessions.close(own)

    def _begin(self, request, text, caller):
        begin, config = request.begin, models.part_config(self._part)
        if not request.HasField("begin"):
            raise wire.WireError("begin must be in the first message of a text, got one without it")
        most = config.max_position_embeddings
        if not 1 <= begin.capacity <= most:
            raise wire.WireError(f"capacity must be in 1..{most} (max_position_embeddings), got {begin.capacity}")
        if begin.compression not in ("", *filter(None, wire.COMPRESSIONS)):
            raise wire.WireError(f"compression must be huffman, all or empty, got {begin.compression[:80]!r}")
        codec = wire.read_codec(begin.codec.encode())
        candidates = min(begin.candidates, config.vocab_size) or None
        terms = Terms(1, padded(begin.capacity, most), codec, candidates, begin.compression or None)
        cache_bytes = ServerSession.cache_bytes(self._part, terms)
        if cache_bytes > (room := self._limits.cache_bytes):
            raise wire.WireError(f"capacity must need at most {room} bytes of cache, got {cache_bytes}")
        own, evicted = self._sessions.open(text.evict, caller, cache_bytes)
        self._metrics.evicted.inc(evicted)
        try:
            with self._lock:
                self._key, key = jax.random.split(self._key)
            text.begin(ServerSession(self._part, terms, tail=self._tail, key=key))
        except BaseException:  # no memory for its cache
            self._sessions.close(own)
            raise
        return terms, own


def _read(requests, inbox, turn):
    """Puts one message after the other into `inbox`, each when the one before it is answered; None at the end."""
    try:
        turn.acquire()
        for request in requests:
            inbox.put(request)
            turn.acquire()
    except grpc.RpcError:
        pass  # the client is gone
    inbox.put(None)


class RemoteSession:
    """A session with a server elsewhere; see `msjax.session.Session`.

    Args:
      open_stream: from requests to answers.
      call: calls a function, with gRPC's errors as those of `remote.RemoteServer`.
      terms: of one text.
      check: raises where a stream, of which there is an answer, is not from the part that the text began with.

    Raises:
      ValueError: `terms` are of several texts.
    """

    def __init__(
        self,
        open_stream: Callable[[Iterator[pb.NextTokens]], Iterator[pb.Outputs]],
        call: Callable[[Callable[[], Any]], Any],
        terms: Terms,
        check: Callable[[Any], None] = lambda stream: None,
    ):
        if terms.batch_size != 1:
            raise ValueError(f"prompts must be one where the server is elsewhere, got {terms.batch_size}")
        self._requests: queue.Queue[pb.NextTokens | None] = queue.Queue()
        self._open, self._call, self._terms, self._check, self._stream = open_stream, call, terms, check, None
        self.serialized_bytes = 0
        """Of all messages so far, both ways."""

    def answer(self, pieces: Sequence[Piece]) -> list[bytes]:
        """Returns what the server answers.

        Raises:
          ValueError, ConnectionError: as `remote.RemoteServer`; also where the server has ended the text for others.
        """
        (piece,) = pieces
        request = pb.NextTokens(count=piece.count, features=piece.data)
        if self._stream is None:
            terms = self._terms
            request.begin.capacity, request.begin.codec = terms.capacity, repr(terms.codec)
            request.begin.candidates, request.begin.compression = terms.candidates or 0, terms.compression or ""
            self._stream = self._open(iter(self._requests.get, None))
        self._requests.put(request)
        try:
            answer = self._call(lambda: next(self._stream))
        except ConnectionError as error:
            if request.HasField("begin"):
                raise
            raise ConnectionError(f"{error}; with the connection the text has ended: begin it again") from None
        if request.HasField("begin"):
            self._check(self._stream)
        self.serialized_bytes += request.ByteSize() + answer.ByteSize()
        return list(answer.payload)

    def close(self) -> None:
        """Ends the text, and the server's cache of it."""
        self._requests.put(None)
