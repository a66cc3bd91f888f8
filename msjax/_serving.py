"""The ends of the network as programs: a server that trains, one that only answers, and a client."""

import dataclasses
import logging
import pathlib
import time
import uuid
from concurrent import futures
from typing import Literal

import grpc
import numpy as np
import tyro
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from msjax import assemble, config, data, halves, metrics, parties, runs, train
from msjax.protocol import Phase
from msjax.transport import client as client_lib
from msjax.transport import server as server_lib
from msjax.transport import split_pb2_grpc
from msjax.transport._metrics import Metrics
from msjax.transport._security import TlsFiles, Tokens, check_plaintext
from msjax.transport._store import ClientStore, ServerStore

log = logging.getLogger("msjax.client")


def _check_positive(options, *names):
    for name in names:
        if not getattr(options, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(options, name)}")


def _check_checkpoint_steps(options):
    if options.checkpoint_steps < 1:
        raise ValueError(f"checkpoint_steps must be at least 1, got {options.checkpoint_steps}")


@dataclasses.dataclass(frozen=True)
class ListenOptions:
    """Where a server listens, and whom it lets in."""

    listen: str = "localhost:50051"
    """host:port to listen on."""
    tls: TlsFiles = dataclasses.field(default_factory=TlsFiles)
    tokens: str | None = None
    """A file of lines `NUMBER TOKEN`, one a client (or `NUMBER sha256:HEX`)."""
    insecure: bool = False
    """Listen in the open on an address that is not this machine's own."""
    compression: Literal["huffman"] | None = None
    """Lossless coding of what is sent, beside the codec: see msjax.wire."""
    metrics_port: int | None = None
    """Port of Prometheus metrics, on this machine alone."""
    max_megabytes: int = 1024
    """Of a message that is received, and of the features in it."""
    max_messages_per_second: float = 1000.0
    """Of each client; one that sends more is read more slowly."""

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        check_plaintext(self.listen, self.tls, self.insecure)
        if self.tls:
            self.tls.server()
        Tokens(self.tokens)
        _check_positive(self, "max_megabytes", "max_messages_per_second")
        if self.metrics_port is not None and not 1 <= self.metrics_port <= 65535:
            raise ValueError(f"metrics_port must be in 1..65535, got {self.metrics_port}")


@dataclasses.dataclass(frozen=True)
class ServeOptions(ListenOptions):
    """Of a server that trains: also what it does about late clients."""

    policy: server_lib.Policy = dataclasses.field(default_factory=server_lib.Policy)
    checkpoint_steps: int = 100
    """Steps between two checkpoints; a run that is interrupted goes back to the last."""

    def check_run(self, cfg: config.Config) -> None:
        """Raises ValueError also for a run that cannot be served."""
        self.check()
        _check_checkpoint_steps(self)
        if cfg.data.name in train.STREAMED:
            raise ValueError(f"data.name must be a set that fits in memory for msjax serve, got {cfg.data.name!r}")


@dataclasses.dataclass(frozen=True)
class ConnectOptions:
    """Where the server is, and who asks."""

    server: str = "localhost:50051"
    """host:port of the server."""
    tls: TlsFiles = dataclasses.field(default_factory=TlsFiles)
    token_file: str | None = None
    """File with this client's token."""
    insecure: bool = False
    """Send in the open to an address that is not this machine's own."""
    compression: Literal["huffman"] | None = None
    """Lossless coding of what is sent, beside the codec: see msjax.wire."""
    encoder: Literal["jax", "numpy"] = "jax"
    """What encodes what is sent, to the same bytes: numpy takes it off the device and out of JAX. Not for random
    codecs."""
    data_dir: str | None = None
    """Where the data set is on this machine, as `--data.data-dir` of `msjax train`."""
    cache_dir: str | None = None
    """Where this machine keeps decoded arrays; by default ~/.cache/msjax."""

    def token(self) -> str | None:
        """The token, once it is sure that it is not sent in the open unasked."""
        check_plaintext(self.server, self.tls, self.insecure)
        return pathlib.Path(self.token_file).read_text().strip() if self.token_file else None


@dataclasses.dataclass(frozen=True)
class ClientOptions(ConnectOptions):
    """Of a client that takes part in training."""

    number: int = tyro.MISSING
    """Of this client, from 0."""
    state: str | None = None
    """Folder for this client's checkpoints and its half at the end; by default clientNUMBER."""
    own_data: bool = False
    """Train on all of the data set that is here; by default on this client's share, as a simulation does."""
    checkpoint_steps: int = 100
    """As of the server."""
    retry_seconds: float = 600.0
    """For how long a server that is away is tried again."""
    answer_seconds: float = 600.0
    """After how long an answer counts as lost, and the request is repeated."""

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        if self.number < 0:
            raise ValueError(f"number must be at least 0, got {self.number}")
        _check_checkpoint_steps(self)
        _check_positive(self, "retry_seconds", "answer_seconds")

    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.state or f"client{self.number}")


class Endpoint:
    """A gRPC server with health service and metrics, up until it is closed."""

    def __init__(self, options: ListenOptions, servicer: split_pb2_grpc.SplitServicer, metrics: Metrics, streams: int):
        options.check()
        # A stream holds a thread for as long as it lasts.
        workers = futures.ThreadPoolExecutor(2 * streams + 8, thread_name_prefix="rpc")
        limits = client_lib.channel_options(options.max_megabytes << 20)
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


def _run_name(folder):
    """Names the run of a folder, also when it is resumed."""
    file = folder / "run"
    if not file.exists():
        runs.write_whole(file, uuid.uuid4().hex)
    return file.read_text()


class Serving:
    """A training server that is up: the coordinator behind gRPC."""

    def __init__(self, cfg: config.Config, options: ServeOptions, folder: pathlib.Path):
        options.check_run(cfg)
        self.cfg, self.folder = cfg, folder
        self.progress = {"history": []}
        self.metrics = Metrics()
        self.coordinator = server_lib.Coordinator(
            cfg,
            self._assemble,
            ServerStore(folder / "checkpoints", self.progress),
            options.policy,
            self.metrics,
            run=_run_name(folder),
            checkpoint_steps=options.checkpoint_steps,
            compression=options.compression,
        )
        servicer = server_lib.Servicer(self.coordinator, Tokens(options.tokens), options.max_messages_per_second)
        self._endpoint = Endpoint(options, servicer, self.metrics, cfg.clients)
        self.port = self._endpoint.port
        self._step_began = self._began = time.monotonic()

    def _assemble(self, samples, test_samples, input_shape, num_classes):
        # What inputs are normalised by is the clients' business.
        self._info = assemble.SetInfo(input_shape, num_classes, (), ())
        return assemble.assemble(self.cfg, self._info, samples=samples, test_samples=test_samples)

    def train(self, on_epoch=lambda record: None):
        """Trains to the end, writes the server's half and the summary, and returns this."""
        self._on_epoch = on_epoch
        self.coordinator.train(self._count, self._save_half)
        return self.summary()

    def _save_half(self):
        party, steps = self.coordinator.party, self.coordinator.parts.plan.total_steps
        path = self.folder / "server.safetensors"
        halves.save(path, "server", party.state, self.cfg, self._info, run=self.coordinator.run, step=steps)

    def _count(self, exchange):
        """After each exchange: the metrics, and an epoch's record at its end."""
        self.metrics.exchanges.labels(exchange.phase.name).inc()
        plan, party = self.coordinator.parts.plan, self.coordinator.party
        if exchange.phase == Phase.FEATURES:
            now = time.monotonic()
            self.metrics.step.set(exchange.step)
            self.metrics.step_seconds.observe(now - self._step_began)
            self._step_began = now
        if plan.place(exchange.step).epoch_ends and exchange == list(plan.step_exchanges(exchange.step))[-1]:
            epoch = plan.place(exchange.step).epoch
            record = {"epoch": epoch + 1, "step": exchange.step + 1, "train": party.train.means()}
            if party.test.samples:
                record["test"] = party.test.means()
            traffic = metrics.run_traffic(self.coordinator.shapes, epoch + 1)
            record |= {
                "traffic": traffic.to_json() | self.metrics.totals(),
                "seconds": round(time.monotonic() - self._began, 3),
            }
            party.train = party.test = parties.NONE
            self.progress["history"].append(record)
            (self.folder / "metrics.jsonl").write_text(
                "".join(runs.to_json(r) + "\n" for r in self.progress["history"])
            )
            self._on_epoch(record)

    def summary(self):
        last = self.progress["history"][-1]
        summary = {name: last[name] for name in ("train", "test", "traffic") if name in last}
        summary |= {"config": config.to_json(self.cfg), "environment": runs.environment()}
        (self.folder / "summary.json").write_text(runs.to_json(summary, indent=2) + "\n")
        return summary

    def close(self):
        self._endpoint.close()


class TakingPart:
    """A client of a training run, not yet connected."""

    def __init__(self, options: ClientOptions):
        options.check()
        self._options, self._token = options, options.token()
        self._epoch = None
        self.runner = client_lib.Runner(
            options.number,
            lambda: client_lib.Connection(options.server, options.tls, self._token),
            self._load,
            self._build,
            lambda run: ClientStore(options.folder() / "checkpoints" / run),
            checkpoint_steps=options.checkpoint_steps,
            compression=options.compression,
            answer_seconds=options.answer_seconds,
            retry_seconds=options.retry_seconds,
        )

    def train(self) -> pathlib.Path | None:
        """Trains to the end; returns where the client's half is, None where another client has the trained one.

        Raises:
          Refused, ConnectionError: see `Runner.train`.
        """
        party = self.runner.train(self._tell)
        plan = self._plan
        if self._options.number not in plan.place(plan.total_steps - 1).clients:
            return None
        path = self._options.folder() / "client.safetensors"
        run, steps = self.runner.run, plan.total_steps
        halves.save(path, "client", party.state, self.runner.config, self._info, run=run, step=steps)
        return path

    def _tell(self, exchange):
        place = self._plan.place(exchange.step)
        if place.epoch != self._epoch:
            self._epoch = place.epoch
            log.info("epoch %d of %d", place.epoch + 1, self._plan.epochs)

    def _load(self, cfg):
        options = self._options
        ds = load_data(cfg, options)
        self._info = assemble.SetInfo.of(ds)
        own, samples = slice(None), len(ds.train_labels)
        if not options.own_data:
            pools, samples = assemble.share_out(cfg, lambda: ds.train_labels, samples)
            own = pools[options.number]
        arrays = (ds.train_inputs[own], ds.train_labels[own], ds.test_inputs, ds.test_labels)
        self._data = parties.ClientData(*map(np.asarray, arrays))
        return client_lib.Own(samples, len(ds.test_labels), ds.train_inputs.shape[1:], ds.num_classes)

    def _build(self, cfg, samples, test_samples):
        parts = assemble.assemble(cfg, self._info, samples=samples, test_samples=test_samples)
        self._plan = parts.plan
        programs = parts.programs(cfg.seed, numpy_encoder=self._options.encoder == "numpy")
        number = self._options.number
        return parties.Client(number, parts.plan, parts.shapes(), programs, parts.client, self._data, cfg.seed)


def load_data(cfg: config.Config, options: ConnectOptions) -> data.Dataset:
    """The run's data set, as it is on this machine."""
    return data.load(cfg.data.name, **cfg.data.form, data_dir=options.data_dir, cache_dir=options.cache_dir)
