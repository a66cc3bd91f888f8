"""gRPC's health service, answered without reading what is asked: anyone may ask, and may send nothing at all."""

import threading
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2

MOST_CHECKS = 8
"""Health checks at a time: a stranger who does not read the answers would hold all calls that there are."""
_TOO_MANY = grpc.StatusCode.RESOURCE_EXHAUSTED, "too many checks at a time"
_NO_WATCH = grpc.StatusCode.UNIMPLEMENTED, "the health service answers Check alone"
"""Who watches holds one of the calls that there are, and needs no token for it."""


class Health:
    """The state of one server, whatever service of it is asked for.

    A unary call would wait for its message, however long, before anything of it is seen; so these are streams.

    Attributes:
      serves: whether the server answers; False at first.
    """

    def __init__(self):
        self.serves = False
        self._checks, self._lock = 0, threading.Lock()

    def in_threads(self) -> grpc.GenericRpcHandler:
        """Returns what answers at a server in threads."""

        def check(requests, context):
            if not self._begin():
                context.abort(*_TOO_MANY)
            if not context.add_callback(self._end):
                self._end()
            return self._answer()

        def watch(requests, context):
            context.abort(*_NO_WATCH)

        return _service(check, watch)

    def on_loop(self) -> grpc.GenericRpcHandler:
        """Returns what answers at a server on the event loop."""

        async def check(requests, context):
            if not self._begin():
                await context.abort(*_TOO_MANY)
            context.add_done_callback(lambda _: self._end())
            return self._answer()

        async def watch(requests, context):
            await context.abort(*_NO_WATCH)

        return _service(check, watch)

    def _begin(self):
        with self._lock:
            if self._checks >= MOST_CHECKS:
                return False
            self._checks += 1
            return True

    def _end(self):
        with self._lock:
            self._checks -= 1

    def _answer(self):
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if self.serves else status.NOT_SERVING)


def _service(check: Callable, watch: Callable) -> grpc.GenericRpcHandler:
    forms = health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
    handlers = {
        "Check": grpc.stream_unary_rpc_method_handler(check, *forms),
        "Watch": grpc.stream_stream_rpc_method_handler(watch, *forms),
    }
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", handlers)
