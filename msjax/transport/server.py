"""The server's end of gRPC: a thread a client reads and checks what comes, for the coordinator or for inference."""

import logging
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from msjax.transport import _messages, split_pb2_grpc
from msjax.transport import split_pb2 as pb
from msjax.transport._metrics import Metrics
from msjax.transport._security import Rate, Tokens
from msjax.transport.client import channel_options
from msjax.transport.coordinator import Coordinator
from msjax.transport.options import ListenOptions

log = logging.getLogger("msjax.server")


class Servicer(split_pb2_grpc.SplitServicer):
    """The RPCs: authentication, and the pumping of messages between streams and the coordinator."""

    def __init__(self, coordinator: Coordinator, tokens: Tokens, max_messages_per_second: float = 1000.0):
        self._coordinator, self._tokens = coordinator, tokens
        self._max_messages_per_second = max_messages_per_second

    def Train(self, requests: Iterator[pb.FromClient], context: grpc.ServicerContext) -> Iterator[pb.FromServer]:
        try:
            hello = self._hello(requests, context)
        except Exception:  # how gRPC leaves a call that is aborted
            self._coordinator.metrics.refused.inc()
            raise
        session = self._coordinator.join(hello, context.peer())
        reader = threading.Thread(target=self._read, args=(requests, context, session), daemon=True)
        reader.start()
        context.add_callback(session.close)
        try:
            while (message := session.outbox.get()) is not None:
                yield message
        finally:
            self._coordinator.leave(session)
        if session.fault:
            self._coordinator.metrics.refused.inc()
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, session.fault)

    def _hello(self, requests, context):
        # Before anything is read: a stranger is not to hold a thread by saying nothing.
        if not self._tokens.accept_any(_messages.token(context)):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such token")
        first = next(requests, None)
        if first is None or first.WhichOneof("kind") != "hello":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be Hello")
        hello = first.hello
        if not self._tokens.accept(hello.client, _messages.token(context)):
            log.warning("client %d from %s: wrong token", hello.client, context.peer())
            context.abort(grpc.StatusCode.UNAUTHENTICATED, f"no such token for client {hello.client}")
        if hello.protocol != _messages.PROTOCOL:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"protocol must be {_messages.PROTOCOL}, got {hello.protocol}"
            )
        if hello.client >= self._coordinator.cfg.clients:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"client must be in 0..{self._coordinator.cfg.clients - 1}, got {hello.client}",
            )
        return hello

    def _read(self, requests, context, session):
        rate = Rate(self._max_messages_per_second)
        try:
            for message in requests:
                rate.wait()
                match message.WhichOneof("kind"):
                    case "ready":
                        self._coordinator.ready(session, message.ready)
                    case "request":
                        self._coordinator.receive(session, message.request)
                    case "farewell":
                        self._coordinator.farewell(session)
                        break
                    case kind:
                        raise _messages.ProtocolError(f"unexpected {kind}")
        except _messages.ProtocolError as error:
            log.warning("client %d: %s", session.client, error)
            session.fault = str(error)
        except grpc.RpcError:
            pass  # the client is gone
        except Exception:
            log.exception("client %d", session.client)
            session.fault = "internal error"
        session.close()


class Endpoint:
    """A gRPC server with health service and metrics, up until it is closed."""

    def __init__(self, options: ListenOptions, servicer: split_pb2_grpc.SplitServicer, metrics: Metrics, streams: int):
        options.check()
        # A stream holds a thread for as long as it lasts.
        workers = futures.ThreadPoolExecutor(2 * streams + 8, thread_name_prefix="rpc")
        limits = channel_options(options.max_megabytes << 20)
        # Two servers must not share a port unawares, and their clients with it.
        limits += [("grpc.max_concurrent_streams", streams + 8), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(workers, options=limits, maximum_concurrent_rpcs=2 * streams + 8)
        split_pb2_grpc.add_SplitServicer_to_server(servicer, self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            if options.tls:
                self.port = self._server.add_secure_port(options.listen, options.tls.server())
            else:
                self.port = self._server.add_insecure_port(options.listen)
        except RuntimeError as error:
            raise ValueError(
                f"listen must be a free host:port, and tls files in PEM format, got {options.listen!r}: {error}"
            ) from None
        self._server.start()
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._close_metrics = metrics.serve(options.metrics_port) if options.metrics_port else lambda: None

    def close(self) -> None:
        self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server.stop(grace=5).wait()
        self._close_metrics()
