"""The server's end of gRPC: threads carry messages between the clients' streams and the coordinator."""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from msjax.distributed.channel import Close, Lost, Received, Send, Stop
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ListenOptions
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc import split_pb2_grpc
from msjax.distributed.rpc.addresses import parse_address
from msjax.distributed.rpc.admission import Admission, Certificates, WrongTokens
from msjax.distributed.rpc.connection import channel_options
from msjax.distributed.rpc.security import Rate, Tokens
from msjax.logs import Seldom

log = logging.getLogger("msjax.server")


def say_refused(count: int, last: str) -> None:
    """Logs calls that were refused because of their token or certificate, which may be very many."""
    log.warning("refused: %d call%s, the last from %s", count, "" if count == 1 else "s", last)


class TrainServicer(split_pb2_grpc.SplitServicer):
    """The RPC of training: checks who calls, and puts what is said into `inbox`, where the coordinator's loop takes it.

    A stream holds two threads of gRPC's: one that reads, one that writes. Clients say Hello at once: a stream that does
    not in `hello_seconds` is closed, and of more than `_MOST_SILENT` that have not yet, the oldest.
    """

    def __init__(
        self,
        tokens: Tokens,
        metrics: Metrics,
        max_messages_per_second: float = 1000.0,
        *,
        hello_seconds: float = 10.0,
        certificates: Certificates | None = None,
        wrong_tokens: WrongTokens | None = None,
    ):
        self._admission = Admission(tokens, certificates, wrong_tokens)
        self._metrics, self._max_messages_per_second = metrics, max_messages_per_second
        self._hello_seconds = hello_seconds
        self._silent: dict[int, queue.Queue] = {}  # the outboxes of streams without a Hello, oldest first
        self._lock = threading.Lock()
        self.inbox: queue.Queue[Received | Lost | Stop] = queue.Queue()
        self._refused = Seldom(say_refused)
        self._sessions = itertools.count(1)
        self._outboxes: dict[int, queue.Queue[pb.FromServer | Close | None]] = {}

    def carry(self, out: Send | Close) -> None:
        """Hands what the coordinator says to the stream that it is for; nothing where that has ended."""
        outbox = self._outboxes.get(out.session)
        if outbox is not None:
            outbox.put(out.message if isinstance(out, Send) else out)

    def close(self) -> None:
        """Ends all streams after what was sent."""
        for session in list(self._outboxes):
            self.carry(Close(session))

    def Train(self, requests: Iterator[pb.FromClient], context: grpc.ServicerContext) -> Iterator[pb.FromServer]:
        """Carries one client's messages, to the end of its stream."""
        # Before anything is read: a stranger is not to hold a thread by saying nothing.
        if refusal := self._admission.refusal(context):
            self._metrics.refused.inc()
            if not refusal.is_told:
                self._refused(f"{context.peer()}: {refusal.reason}")
            context.abort(refusal.code, refusal.reason)
        session, outbox = next(self._sessions), queue.Queue()
        self._outboxes[session] = outbox
        self._wait_for_hello(session, outbox)
        threading.Thread(target=self._read, args=(requests, context, session, outbox), daemon=True).start()
        context.add_callback(lambda: outbox.put(None))
        try:
            try:
                message = outbox.get(timeout=self._hello_seconds)
            except queue.Empty:
                if self._heard(session):  # where it was not heard before
                    outbox.put(Close(session, f"Hello must come within {self._hello_seconds:g} s"))
                message = outbox.get()
            while isinstance(message, pb.FromServer):
                yield message
                message = outbox.get()
        finally:
            self._heard(session)
            del self._outboxes[session]
            self.inbox.put(Lost(session))
        if isinstance(message, Close) and message.reason:
            code = grpc.StatusCode.INVALID_ARGUMENT if message.final else grpc.StatusCode.UNAVAILABLE
            if isinstance(message, _NotAdmitted):
                code = grpc.StatusCode.UNAUTHENTICATED
            context.abort(code, message.reason)

    def _wait_for_hello(self, session, outbox):
        """Makes room for one that says it: a stranger with one valid token is not to hold all streams."""
        with self._lock:
            if len(self._silent) >= _MOST_SILENT:
                oldest = next(iter(self._silent))
                self._metrics.refused.inc()
                self._silent.pop(oldest).put(Close(oldest, "Hello must come before so many other streams are opened"))
            self._silent[session] = outbox

    def _heard(self, session):
        """Whether a stream had been silent, which it no longer is."""
        with self._lock:
            return self._silent.pop(session, None) is not None

    def _read(self, requests, context, session, outbox):
        rate, first = Rate(self._max_messages_per_second), True
        try:
            for message in requests:
                at = time.monotonic()
                rate.wait()
                client = message.hello.client
                is_hello = first and message.WhichOneof("kind") == "hello"
                if is_hello and (refusal := self._admission.refusal(context, client)):
                    self._refused(f"{context.peer()} as client {client}: {refusal.reason}")
                    self._metrics.refused.inc()
                    outbox.put(_NotAdmitted(session, refusal.reason, final=True))
                    return
                if first:
                    self._heard(session)
                first = False
                self.inbox.put(Received(session, message, context.peer(), at))
        except grpc.RpcError:
            pass  # the client is gone
        except Exception:
            log.exception("reading from %s", context.peer())
        outbox.put(None)


class _NotAdmitted(Close):
    """Its token or certificate is not that of the client that it says it is."""


_MOST_SILENT = 6
"""Below the number of streams that there may be besides two a client; see `Endpoint`."""


class Endpoint:
    """A gRPC server with health service and metrics. It has its ports from when it is made, and answers from `start`.

    Args:
      streams: how many clients there are at once.

    Raises:
      ValueError: an option cannot work, or a port cannot be had.
    """

    def __init__(self, options: ListenOptions, metrics: Metrics, streams: int):
        options.check()
        if fault := options.tls.fault("server"):
            log.warning("%s; clients will not take it", fault)
        self.metrics = metrics
        # A stream holds a thread for as long as it lasts.
        workers = futures.ThreadPoolExecutor(2 * streams + 8, thread_name_prefix="rpc")
        limits = channel_options(options.max_megabytes << 20)
        # Two servers must not share a port unawares, and their clients with it.
        limits += [("grpc.max_concurrent_streams", streams + 8), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(workers, options=limits, maximum_concurrent_rpcs=2 * streams + 8)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        address = parse_address("listen", options.listen, any_port=True)
        try:
            if options.tls:
                port = self._server.add_secure_port(str(address), options.tls.server())
            else:
                port = self._server.add_insecure_port(str(address))
        except RuntimeError as error:
            reason = str(error).partition("; last error: ")[2] or str(error)
            raise ValueError(f"listen must be a free host:port, got {options.listen!r}: {reason}") from None
        self.address = address._replace(port=port)
        """Where it listens, with the port that it has got."""
        self.metrics_port: int | None = None
        self._close_metrics: Callable[[], None] = lambda: None
        if options.metrics_port is not None:
            try:
                self.metrics_port, self._close_metrics = metrics.serve(options.metrics_port)
            except OSError as error:
                self._server.stop(grace=None)
                raise ValueError(
                    f"metrics_port must be a free port, got {options.metrics_port}: {error.strerror}"
                ) from None

    def start(self, servicer: split_pb2_grpc.SplitServicer) -> None:
        """Answers with `servicer` from now on."""
        split_pb2_grpc.add_SplitServicer_to_server(servicer, self._server)
        self._server.start()
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Lets what is under way end, for five seconds, and stops."""
        self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server.stop(grace=5).wait()
        self._close_metrics()

    def __str__(self):
        """Says where it listens."""
        metrics = "" if self.metrics_port is None else f", metrics at http://127.0.0.1:{self.metrics_port}/metrics"
        return f"{self.address}{metrics}"
