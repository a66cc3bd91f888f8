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
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from msjax.distributed.channel import Close, Lost, Received, Send, Stop
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ListenOptions
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.admission import Admission, Certificates, WrongTokens, peer_of
from msjax.distributed.rpc.event_loop import event_loop, run
from msjax.distributed.rpc.frames import BESIDE_BYTES, FRAME_BYTES, FrameError, Joiner, to_frames
from msjax.distributed.rpc.security import Rate, Tokens
from msjax.distributed.rpc.server import NO_WATCH, Listening, limits, most_calls, open_port, say_refused
from msjax.logs import Seldom

log = logging.getLogger("msjax.server")

_HELLO_BYTES = BESIDE_BYTES
"""That the first message of a stream may have, with its chunks: a stranger is not to fill the memory."""
_MOST_UNREAD = 16
"""Messages that may wait for a client to read them. It asks for one at a time, so an honest one has a few."""


class _NotAdmitted(Close):
    """Its token or certificate is not that of the client that it says it is."""


class TrainServicer:
    """The RPC of training: checks who calls, and puts what is said into `inbox`, where the coordinator's loop takes it.

    Clients say Hello at once: a stream that does not in `hello_seconds` is closed, and of more than `most_silent` that
    have not yet, the oldest. All but `inbox`, `carry` and `close` is for the event loop alone.

    Args:
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
        self._silent: dict[int, asyncio.Queue] = {}  # the outboxes of streams without a Hello, oldest first
        self.inbox: queue.SimpleQueue[Received | Lost | Stop] = queue.SimpleQueue()
        self._refused = Seldom(say_refused)
        self._sessions = itertools.count(1)
        self._outboxes: dict[int, asyncio.Queue[list[bytes] | Close | None]] = {}
        self._writers: dict[int, asyncio.Task[Close | None]] = {}
        self._carried: deque[tuple[int, list[bytes] | Close]] = deque()
        self._will_deliver = False

    # -- From the coordinator's thread. ----------------------------------------------------------------------------

    def carry(self, out: Send | Close) -> None:
        """Hands what the coordinator says to the stream that it is for; nothing where that has ended."""
        frames = list(to_frames(out.message)) if isinstance(out, Send) else out
        self._carried.append((out.session, frames))
        # The loop is woken once for all that is said until it comes to it.
        if not self._will_deliver:
            self._will_deliver = True
            event_loop().call_soon_threadsafe(self._deliver)

    def close(self) -> None:
        """Ends all streams after what was sent."""
        event_loop().call_soon_threadsafe(self._close_all)

    # -- In the event loop. ----------------------------------------------------------------------------------------

    def _deliver(self):
        self._will_deliver = False  # first: what is carried from now on asks for another call
        while self._carried:
            session, said = self._carried.popleft()
            if (outbox := self._outboxes.get(session)) is None:
                continue
            outbox.put_nowait(said)
            if outbox.qsize() > _MOST_UNREAD:
                # It asks again and again, and reads nothing: its answers would fill the memory.
                del self._outboxes[session]
                self._writers[session].cancel()

    def _close_all(self):
        self._deliver()
        for session, outbox in self._outboxes.items():
            outbox.put_nowait(Close(session))

    async def Train(self, _, context: grpc.aio.ServicerContext) -> None:
        """Carries one client's messages, to the end of its stream."""
        # Before anything is read: a stranger is not to hold a place by saying nothing.
        if refusal := self._admission.refusal(context):
            self._metrics.refused.inc()
            if not refusal.is_told:
                self._refused(f"{peer_of(context)}: {refusal.reason}")
            await context.abort(refusal.code, refusal.reason)
        session, outbox = next(self._sessions), asyncio.Queue()
        self._outboxes[session], self._writers[session] = outbox, asyncio.create_task(self._write(context, outbox))
        self._wait_for_hello(session, outbox)
        too_late = asyncio.get_running_loop().call_later(self._hello_seconds, self._end_silent, session)
        reader = asyncio.create_task(self._read(context, session, outbox))
        try:
            said = await self._writers[session]
        except asyncio.CancelledError:
            if session in self._outboxes:  # it is this stream that ends, and not its writer alone
                raise
            self._metrics.refused.inc()
            self._refused(f"{peer_of(context)}: it does not read what it is sent")
            said = Close(session, f"answers must be read, but more than {_MOST_UNREAD} wait", final=True)
        finally:
            self._writers.pop(session).cancel()
            too_late.cancel()
            reader.cancel()
            self._heard(session)
            self._outboxes.pop(session, None)
            self.inbox.put(Lost(session))
        if isinstance(said, Close) and said.reason:
            code = grpc.StatusCode.INVALID_ARGUMENT if said.final else grpc.StatusCode.UNAVAILABLE
            if isinstance(said, _NotAdmitted):
                code = grpc.StatusCode.UNAUTHENTICATED
            await context.abort(code, said.reason)

    async def _write(self, context, outbox):
        """Writes what comes to a stream's outbox; returns what ends it."""
        while isinstance(said := await outbox.get(), list):
            for frame in said:
                await context.write(frame)
        return said

    def _wait_for_hello(self, session, outbox):
        """Makes room for one that says it: a stranger with one valid token is not to hold all streams."""
        if len(self._silent) >= self._most_silent:
            oldest = next(iter(self._silent))
            self._metrics.refused.inc()
            self._silent.pop(oldest).put_nowait(
                Close(oldest, "Hello must come before so many other streams are opened")
            )
        self._silent[session] = outbox

    def _end_silent(self, session):
        if (outbox := self._silent.get(session)) is not None and self._heard(session):
            outbox.put_nowait(Close(session, f"Hello must come within {self._hello_seconds:g} s"))

    def _heard(self, session):
        """Whether a stream had been silent, which it no longer is."""
        return self._silent.pop(session, None) is not None

    async def _read(self, context, session, outbox):
        first_bytes = _HELLO_BYTES if self._max_bytes < 0 else min(_HELLO_BYTES, self._max_bytes)
        rate, joiner, first = Rate(self._max_messages_per_second), Joiner(pb.FromClient, first_bytes), True
        peer = peer_of(context)
        try:
            while (frame := await context.read()) is not grpc.aio.EOF:
                at = time.monotonic()
                if seconds := rate.delay():
                    await asyncio.sleep(seconds)
                message = joiner.add(frame)
                if message is None:
                    continue
                # Whom a stream is let in as is asked once, so that it cannot say later that it is another.
                if first != (message.WhichOneof("kind") == "hello"):
                    raise FrameError("the first message must be Hello, and no other may")
                if first:
                    client = message.hello.client
                    if refusal := self._admission.refusal(context, client):
                        self._refused(f"{peer} as client {client}: {refusal.reason}")
                        self._metrics.refused.inc()
                        outbox.put_nowait(_NotAdmitted(session, refusal.reason, final=True))
                        return
                    self._heard(session)
                    joiner.max_bytes = self._max_bytes
                first = False
                self.inbox.put(Received(session, message, peer, at, joiner.nbytes))
        except FrameError as error:
            self._metrics.refused.inc()
            outbox.put_nowait(Close(session, str(error), final=True))
            return
        except Exception as error:
            if not isinstance(error, grpc.RpcError | grpc.aio.UsageError):  # else the client is gone
                log.exception("reading from %s", peer)
        outbox.put_nowait(None)


class _Health(health.aio.HealthServicer):
    """See `rpc.server`."""

    async def Watch(self, request, context):
        await context.abort(*NO_WATCH)


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
        self._health = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
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
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Lets what is under way end, for five seconds, and stops."""
        run(self._close())
        self._close_metrics()

    async def _close(self):
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(grace=5)
