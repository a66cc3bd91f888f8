"""What the server counts, for Prometheus."""

import math
from collections.abc import Callable

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram

from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.frames import nbytes_of

ANYONE = "any"
"""The client in metrics of who asks a trained part, and has no number."""
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one run, in a registry of their own."""

    def __init__(self):
        self.registry = prometheus_client.CollectorRegistry()
        labels = {"registry": self.registry, "namespace": "msjax"}
        self._received = Counter("received_bytes", "Bytes of messages, as serialized", ["client"], **labels)
        self._sent = Counter("sent_bytes", "Bytes of messages, as serialized", ["client"], **labels)
        self.exchanges = Counter("exchanges", "Exchanges done", ["phase"], **labels)
        self.step = Gauge("step", "The training step under way", **labels)
        self.connected = Gauge("connected_clients", "Clients with a stream; of a trained part, streams", **labels)
        self.wait_seconds = Histogram("wait_seconds", "An exchange's wait for its clients", buckets=_SECONDS, **labels)
        self.step_seconds = Histogram("step_seconds", "From step to step", buckets=_SECONDS, **labels)
        self.stragglers = Counter("stragglers", "Clients that missed a deadline", **labels)
        self.restarts = Counter("restarts", "Times that training went back to a checkpoint", **labels)
        self.saved_step = Gauge("checkpoint_step", "That of the last checkpoint, to which all could go back", **labels)
        self.failed_saves = Counter("failed_saves", "Checkpoints that could not be written", **labels)
        self.requests = Counter("requests", "Requests to a trained part that were answered", **labels)
        self.samples = Counter("samples", "Samples in them", **labels)
        self.sessions = Gauge("sessions", "Texts under way, whose caches a trained part keeps", **labels)
        self.evicted = Counter("evicted_sessions", "Texts and other streams that were ended for want of room", **labels)
        self.answer_seconds = Histogram("answer_seconds", "From a request to its answer", buckets=_SECONDS, **labels)
        self.refused = Counter("refused_clients", "Streams turned away, or ended for what they sent", **labels)

    def received(
        self, client: int | str, message: pb.FromClient | pb.Features | pb.NextTokens, nbytes: int | None = None
    ) -> None:
        """Counts a message's bytes, which are `nbytes` where that is known; also one that has come before."""
        self._received.labels(client).inc(nbytes_of(message) if nbytes is None else nbytes)

    def sent(self, client: int | str, message: pb.FromServer | pb.Outputs) -> None:
        """Counts a message's bytes, also one that is repeated."""
        self._sent.labels(client).inc(nbytes_of(message))

    def answered(self, samples: int, seconds: float) -> None:
        """Counts a request to a trained part."""
        self.requests.inc()
        self.samples.inc(samples)
        self.answer_seconds.observe(seconds)

    def summary(self) -> str:
        """Returns what a server with a trained part has done, as a line."""
        found = {sample.name: sample.value for metric in self.registry.collect() for sample in metric.samples}
        requests, samples, seconds, refused = (
            found[f"msjax_{name}"]
            for name in ("requests_total", "samples_total", "answer_seconds_sum", "refused_clients_total")
        )
        totals = self.totals()
        return (
            f"{requests:,.0f} requests of {samples:,.0f} samples answered in {seconds:,.1f} s; "
            f"{totals['received_bytes']:,.0f} bytes received, {totals['sent_bytes']:,.0f} sent; {refused:,.0f} refused"
        )

    def watch_certificate(self, expires_at: Callable[[], float | None]) -> None:
        """Also tells when a server's certificate expires, as it is when it is asked: 0 for one that is not valid."""

        def value():
            try:
                return expires_at() or 0.0
            except ValueError:  # as while the files are renewed
                return math.nan

        names = {"registry": self.registry, "namespace": "msjax"}
        gauge = Gauge("certificate_expiry_timestamp_seconds", "When this server's certificate expires", **names)
        gauge.set_function(value)

    def waited(self, seconds: float) -> None:
        """Counts how long an exchange waited for its clients."""
        self.wait_seconds.observe(seconds)

    def totals(self) -> dict[str, int]:
        """Returns the bytes both ways over all clients."""
        return {
            f"{name}_bytes": sum(
                int(s.value) for m in counter.collect() for s in m.samples if s.name.endswith("_total")
            )
            for name, counter in (("received", self._received), ("sent", self._sent))
        }

    def text(self) -> str:
        """Returns all counters in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry).decode()

    def serve(self, port: int) -> tuple[int, Callable[[], None]]:
        """Serves /metrics to this machine by HTTP; returns the port, which for 0 is one that is free, and what ends it.

        Raises:
          OSError: the port cannot be had.
        """
        server, thread = prometheus_client.start_http_server(port, "127.0.0.1", registry=self.registry)

        def close():
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, close
