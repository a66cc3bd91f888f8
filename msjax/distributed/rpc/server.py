"""What gRPC servers have in common, and the one of a trained part."""

import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc

from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ListenOptions
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc import split_pb2_grpc
from msjax.distributed.rpc.addresses import Address, parse_address
from msjax.distributed.rpc.connection import channel_options
from msjax.distributed.rpc.health import MOST_CHECKS, Health

log = logging.getLogger("msjax.server")


def say_refused(count: int, last: str) -> None:
    """Logs calls that were refused because of their token or certificate, which may be very many."""
    log.warning("refused: %d call%s, the last from %s", count, "" if count == 1 else "s", last)


def limits(options: ListenOptions, streams: int, max_bytes: int) -> list[tuple[str, Any]]:
    """Returns gRPC's options of a server that takes messages up to `max_bytes`, of so many clients at once."""
    # Two servers must not share a port unawares, and their clients with it.
    return [*channel_options(max_bytes), ("grpc.max_concurrent_streams", streams + 8), ("grpc.so_reuseport", 0)]


MOST_STREAMS = 2
"""Of a client that have not ended: it may come again before its last stream has."""


def most_calls(streams: int) -> int:
    """Returns how many calls there may be at once: those of clients, of strangers, and checks."""
    return MOST_STREAMS * streams + most_silent(streams) + MOST_CHECKS


def most_silent(streams: int) -> int:
    """Returns how many streams of a training server may be without a Hello: all clients may come at once."""
    return streams + 6


def open_port(server: grpc.Server | grpc.aio.Server, options: ListenOptions) -> Address:
    """Returns where a server listens from now on; raises ValueError where a port cannot be had."""
    address = parse_address("listen", options.listen, any_port=True)
    why = _why_not_free(address)
    if why is None:
        try:
            if options.tls:
                port = server.add_secure_port(str(address), options.tls.server())
            else:
                port = server.add_insecure_port(str(address))
            return address._replace(port=port)
        except RuntimeError as error:
            why = str(error).partition("; last error: ")[2] or str(error)
    raise ValueError(f"listen must be a free host:port of this machine, got {options.listen!r}: {why}")


def _why_not_free(address):
    """Why nobody can listen there, or None. Of several addresses of a name, gRPC takes those that it gets."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        found = list(dict.fromkeys(found))
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    faults = []
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as one:
                if os.name == "posix":  # as gRPC does: not taken by connections that have ended
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6 and socket.has_dualstack_ipv6():
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                one.bind(where)
                one.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"{error.strerror}, {where[0]}"
            faults.append(error.strerror or str(error))
    return faults[0] if len(faults) == len(found) else None


class Listening:
    """What all servers have beside gRPC: a check of the options, and metrics over HTTP.

    Raises:
      ValueError: an option cannot work, or a port cannot be had.
    """

    address: Address
    """Where it listens, with the port that it has got."""

    def __init__(self, options: ListenOptions, metrics: Metrics):
        options.check()
        self.metrics = metrics
        if options.tls:
            if warning := options.tls.warning("server", time.time()):
                log.warning("%s", warning)
            metrics.watch_certificate(lambda: options.tls.own("server").expires_at)
        if not (
            options.tokens or options.certificates or parse_address("listen", options.listen, any_port=True).is_loopback
        ):
            who = "has a certificate of tls.authority" if options.tls else "reaches this port"
            log.warning("whoever %s can call as any client: tokens or certificates would tell them apart", who)
        self.metrics_port: int | None = None
        self._close_metrics: Callable[[], None] = lambda: None

    def _serve_metrics(self, options, close):
        """Serves metrics, if there is a port for them; closes gRPC's where it cannot be had."""
        if options.metrics_port is None:
            return
        try:
            self.metrics_port, self._close_metrics = self.metrics.serve(options.metrics_port)
        except OSError as error:
            close()
            raise ValueError(
                f"metrics_port must be a free port, got {options.metrics_port}: {error.strerror}"
            ) from None

    def __str__(self):
        """Says where it listens."""
        metrics = "" if self.metrics_port is None else f", metrics at http://127.0.0.1:{self.metrics_port}/metrics"
        return f"{self.address}{metrics}"


class Endpoint(Listening):
    """A gRPC server in threads, one a stream, with health service and metrics; of a trained part, which computes.

    It has its ports from when it is made, and answers from `start`.

    Args:
      streams: how many clients there are at once.

    Raises:
      ValueError: an option cannot work, or a port cannot be had.
    """

    def __init__(self, options: ListenOptions, metrics: Metrics, streams: int):
        super().__init__(options, metrics)
        # A stream holds a thread for as long as it lasts.
        calls = most_calls(streams)
        workers = futures.ThreadPoolExecutor(calls, thread_name_prefix="rpc")
        settings = limits(options, streams, options.max_megabytes << 20)
        self._server = grpc.server(workers, options=settings, maximum_concurrent_rpcs=calls)
        self._health = Health()
        self._server.add_generic_rpc_handlers((self._health.in_threads(),))
        self.address = open_port(self._server, options)
        self._serve_metrics(options, lambda: self._server.stop(grace=None))

    def start(self, servicer: split_pb2_grpc.SplitServicer) -> None:
        """Answers with `servicer` from now on."""
        self._server.add_generic_rpc_handlers((_split(servicer),))
        self._server.start()
        self._health.serves = True

    def close(self) -> None:
        """Lets what is under way end, for five seconds, and stops."""
        self._health.serves = False
        self._server.stop(grace=5).wait()
        self._close_metrics()


def _split(servicer):
    """The service of a trained part. All calls are streams to it: it looks at who calls before a message is there."""
    stream = grpc.stream_stream_rpc_method_handler
    forms = pb.DescribeRequest.FromString, pb.Description.SerializeToString
    handlers = {
        "Train": stream(servicer.Train, pb.FromClient.FromString, pb.FromServer.SerializeToString),
        "Describe": grpc.stream_unary_rpc_method_handler(servicer.Describe, *forms),
        "Infer": stream(servicer.Infer, pb.Features.FromString, pb.Outputs.SerializeToString),
        "Generate": stream(servicer.Generate, pb.NextTokens.FromString, pb.Outputs.SerializeToString),
    }
    return grpc.method_handlers_generic_handler(pb.DESCRIPTOR.services_by_name["Split"].full_name, handlers)
