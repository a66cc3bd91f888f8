"""The training server's end of gRPC: an asyncio loop carries messages between streams and the coordinator.

The coordinator is in a thread of its own, where JAX computes, too. What clients say goes there by
`TrainServicer.inbox`, and what it says comes back by `TrainServicer.carry`. A stream is two coroutines and holds no
thread, so there can be thousands.
"""

import asyncio
import itertools
import logging
import queue
import time
from collections import deque

import grpc

from msjax.distributed.channel import Close, Handled, Lost, Received, Send, Stop
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ListenOptions
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.admission import Admission, Certificates, WrongTokens, peer_of
from msjax.distributed.rpc.event_loop import event_loop, run
from msjax.distributed.rpc.frames import BESIDE_BYTES, FRAME_BYTES, FrameError, Joiner, to_frames
from msjax.distributed.rpc.health import Health
from msjax.distributed.rpc.security import Rate, Rates, Tokens
from msjax.distributed.rpc.server import (
    MOST_STREAMS,
    Listening,
    limits,
    most_calls,
    open_port,
    say_refused,
)
from msjax.logs import Seldom

log = logging.getLogger("msjax.server")

_HELLO_BYTES = BESIDE_BYTES
"""That the first message of a stream may have, with its chunks: a stranger is not to fill the memory."""
_MOST_UNREAD = 16
"""Messages that may wait for a client to read them. It asks for one at a time, so an honest one has a few."""
_MOST_UNHANDLED = 2
"""Messages of a stream that may wait for the coordinator before more is read: a client says one and waits."""


class _NotAdmitted(Close):
    """Its token or certificate is not that of the client that it says it is."""


class _Stream:
    """A stream that is read, and to which the coordinator speaks."""

    def __init__(self, peer: str):
        self.peer = peer
        self.outbox: asyncio.Queue[list[bytes] | Close | None] = asyncio.Queue()
        self.unhandled = asyncio.Semaphore(_MOST_UNHANDLED - 1)  # taken after each message, before the next is read
        self.reader: asyncio.Task[None] | None = None


class TrainServicer:
    """The RPC of training: checks who calls, and puts what is said into `inbox`, where the coordinator's loop takes it.

    Clients say Hello at once: a stream that does not in `hello_seconds` is closed, and of more than `most_silent` that
    have not yet, the oldest. A stream is read on once the coordinator has handled what it said, so `inbox` stays small.
    All but `inbox`, `carry` and `close` is for the event loop alone.

    gRPC has no way to end a call whose client takes nothing: aborted or cancelled, it counts until that client reads,
    cancels, or loses its connection. So a client has no more than `MOST_STREAMS` of these.

    Args:
      max_messages_per_second: of each client, over all its streams.
      max_bytes: of a message, over all its frames; -1 for any.
    """

    def __init__(
        self,
        tokens: Tokens,
        metrics: Metrics,
        max_messages_per_second: float = 1000.0,
        *,
        max_bytes: int = -1,
        hello_seconds: float = 10.0,
        most_silent: int = 6,
        certificates: Certificates | None = None,
        wrong_tokens: WrongTokens | None = None,
    ):
        self._admission = Admission(tokens, certificates, wrong_tokens)
        self._metrics, self._max_messages_per_second = metrics, max_messages_per_second
        self._max_bytes = max_bytes
        self._hello_seconds, self._most_silent = hello_seconds, most_silent
        self._silent: dict[int, None] = {}  # the streams without a Hello, oldest first
        self.inbox: queue.SimpleQueue[Received | Lost | Stop] = queue.SimpleQueue()
        self._refused = Seldom(say_refused)
        self._sessions = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._rates = Rates(max_messages_per_second)
        self._carried: deque[tuple[int, list[bytes] | Close | Handled]] = deque()
        self._will_deliver = False

    # -- From the coordinator's thread. ----------------------------------------------------------------------------

    def carry(self, out: Send | Close | Handled) -> None:
        """Hands what the coordinator says to the stream that it is for; nothing where that has ended."""
        said = list(to_frames(out.message)) if isinstance(out, Send) else out
        self._carried.append((out.session, said))
        # The loop is woken once for all that is said until it comes to it.
        if not self._will_deliver:
            self._will_deliver = True
            event_loop().call_soon_threadsafe(self._deliver)

    def close(self) -> None:
        """Ends all streams after what was sent, and logs who was refused and is not in the log yet."""
        event_loop().call_soon_threadsafe(self._close_all)
        self._refused.flush()

    # -- In the event loop. ----------------------------------------------------------------------------------------

    def _deliver(self):
        self._will_deliver = False  # first: what is carried from now on asks for another call
        while self._carried:
            session, said = self._carried.popleft()
            if (stream := self._streams.get(session)) is None:
                continue
            if isinstance(said, Handled):
                stream.unhandled.release()
            elif isinstance(said, Close):
                self._end(session, said)
            else:
                stream.outbox.put_nowait(said)
                if stream.outbox.qsize() > _MOST_UNREAD:
                    self._end_unread(session, stream)

    def _close_all(self):
        self._deliver()
        for session in list(self._streams):
            self._end(session, Close(session))

    def _end(self, session, close=None):
        """Ends a stream after what was sent: nothing of it is read any more, and `close` says why."""
        if (stream := self._streams.pop(session, None)) is None:
            return
        self._silent.pop(session, None)
        stream.reader.cancel()
        stream.outbox.put_nowait(close)
        self.inbox.put(Lost(session))

    def _end_unread(self, session, stream):
        """Ends a stream whose client asks again and again, and reads nothing: its answers would fill the memory."""
        while not stream.outbox.empty():
            stream.outbox.get_nowait()
        self._metrics.refused.inc()
        self._refused(f"{stream.peer}: it does not read what it is sent")
        why = f"answers must be read, but more than {_MOST_UNREAD} wait"
        self._end(session, Close(session, why, final=True))

    async def Train(self, _, context: grpc.aio.ServicerContext) -> None:
        """Carries one client's messages, to the end of its stream."""
        # Before anything is read: a stranger is not to hold a place by saying nothing.
        if refusal := self._admission.refusal(context):
            self._metrics.refused.inc()
            if not refusal.is_told:
                self._refused(f"{peer_of(context)}: {refusal.reason}")
            await context.abort(refusal.code, refusal.reason)
        session, stream = next(self._sessions), _Stream(peer_of(context))
        self._streams[session] = stream
        stream.reader = asyncio.create_task(self._read(context, session, stream))
        self._wait_for_hello(session)
        too_late = asyncio.get_running_loop().call_later(self._hello_seconds, self._end_silent, session)
        try:
            # A write is not cancelled: `abort` fails beside one, and the stream would count as ended, which it is not.
            while isinstance(said := await stream.outbox.get(), list):
                for frame in said:
                    await context.write(frame)
        finally:
            too_late.cancel()
            self._end(session)
        if isinstance(said, Close) and said.reason:
            code = grpc.StatusCode.INVALID_ARGUMENT if said.final else grpc.StatusCode.UNAVAILABLE
            if isinstance(said, _NotAdmitted):
                code = grpc.StatusCode.UNAUTHENTICATED
            await context.abort(code, said.reason)

    def _wait_for_hello(self, session):
        """Makes room for one that says it: a stranger with one valid token is not to hold all streams."""
        if len(self._silent) >= self._most_silent:
            oldest = next(iter(self._silent))
            self._metrics.refused.inc()
            self._end(oldest, Close(oldest, "Hello must come before so many other streams are opened"))
        self._silent[session] = None

    def _end_silent(self, session):
        if session in self._silent:
            self._end(session, Close(session, f"Hello must come within {self._hello_seconds:g} s"))

    async def _read(self, context, session, stream):
        first_bytes = _HELLO_BYTES if self._max_bytes < 0 else min(_HELLO_BYTES, self._max_bytes)
        rate, joiner, first = Rate(self._max_messages_per_second), Joiner(pb.FromClient, first_bytes), True
        try:
            while (frame := await context.read()) is not grpc.aio.EOF:
                at = time.monotonic()
                await _hold(rate)
                message = joiner.add(frame)
                if message is None:
                    continue
                # Whom a stream is let in as is asked once, so that it cannot say later that it is another.
                if first != (message.WhichOneof("kind") == "hello"):
                    raise FrameError("the first message must be Hello, and no other may")
                version, close = self._admission.version, None
                if first:
                    client, admitted = message.hello.client, version
                    close = self._refuse(context, session, client)
                elif version != admitted:
                    admitted, close = version, self._not_admitted(context, session, client, again=True)
                if close:
                    self._refused(f"{stream.peer} as client {client}: {close.reason}")
                    self._metrics.refused.inc()
                    return self._end(session, close)
                if first:
                    del self._silent[session]
                    joiner.max_bytes, rate = self._max_bytes, self._admit(context, client)
                    await _hold(rate)
                first = False
                self.inbox.put(Received(session, message, stream.peer, at, joiner.nbytes))
                await stream.unhandled.acquire()
        except FrameError as error:
            self._metrics.refused.inc()
            return self._end(session, Close(session, str(error), final=True))
        except Exception as error:
            if not isinstance(error, grpc.RpcError | grpc.aio.UsageError):  # else the client is gone
                log.exception("reading from %s", stream.peer)
        self._end(session)

    def _refuse(self, context, session, client):
        """What ends the stream of who says that it is this client, if it is not let in."""
        if close := self._not_admitted(context, session, client):
            return close
        if self._rates.streams(client) >= MOST_STREAMS:
            return Close(session, f"a client must have at most {MOST_STREAMS} streams that have not ended")
        return None

    def _not_admitted(self, context, session, client, *, again=False):
        refusal = self._admission.refusal(context, client, again=again)
        return None if refusal is None else _NotAdmitted(session, refusal.reason, final=True)

    def _admit(self, context, client):
        """Counts a stream of a client until it has ended; returns the rate of them all."""
        rate = self._rates.open(client)
        context.add_done_callback(lambda _: self._rates.close(client))
        return rate


async def _hold(rate):
    if seconds := rate.delay():
        await asyncio.sleep(seconds)


class TrainEndpoint(Listening):
    """A gRPC server on the event loop, with health service and metrics. It has its ports from when it is made.

    Args:
      streams: how many clients there are at once.

    Raises:
      ValueError: an option cannot work, or a port cannot be had.
    """

    def __init__(self, options: ListenOptions, metrics: Metrics, streams: int):
        super().__init__(options, metrics)
        run(self._open(options, streams))
        self._serve_metrics(options, lambda: run(self._server.stop(grace=None)))

    async def _open(self, options, streams):
        settings = limits(options, streams, min(options.max_megabytes << 20, FRAME_BYTES + BESIDE_BYTES))
        self._server = grpc.aio.server(options=settings, maximum_concurrent_rpcs=most_calls(streams))
        self._health = Health()
        self._server.add_generic_rpc_handlers((self._health.on_loop(),))
        self.address = open_port(self._server, options)

    def start(self, servicer: TrainServicer) -> None:
        """Answers with `servicer` from now on."""
        run(self._start(servicer))

    async def _start(self, servicer):
        # As bytes: what is longer than a frame is no message by itself.
        handler = grpc.stream_stream_rpc_method_handler(servicer.Train)
        service = pb.DESCRIPTOR.services_by_name["Split"].full_name
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Train": handler}),))
        await self._server.start()
        self._health.serves = True

    def close(self) -> None:
        """Lets what is under way end, for five seconds, and stops."""
        run(self._close())
        self._close_metrics()

    async def _close(self):
        self._health.serves = False
        await self._server.stop(grace=5)
