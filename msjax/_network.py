"""`msjax serve` and `msjax client`: from the command line to the two ends of the network."""

import argparse
import contextlib
import dataclasses
import logging
import pathlib
import signal
import threading
import time
from concurrent import futures

import grpc
import numpy as np
import tyro
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from msjax import assemble, config, data, metrics, parties, runs, train
from msjax.protocol import Phase
from msjax.transport import client as client_lib
from msjax.transport import server as server_lib
from msjax.transport import split_pb2_grpc
from msjax.transport._metrics import Metrics
from msjax.transport._security import TlsFiles, Tokens, check_plaintext
from msjax.transport._store import ClientStore, ServerStore


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Where the server listens, whom it lets in, and what it does about late clients."""

    listen: str = "localhost:50051"
    """host:port to listen on."""
    tls: TlsFiles = dataclasses.field(default_factory=TlsFiles)
    tokens: str | None = None
    """A file of lines `NUMBER TOKEN`, one a client (or `NUMBER sha256:HEX`)."""
    insecure: bool = False
    """Listen in the open on an address that is not this machine's own."""
    policy: server_lib.Policy = dataclasses.field(default_factory=server_lib.Policy)
    checkpoint_steps: int = 100
    """Steps between two checkpoints; a run that is interrupted goes back to the last."""
    compression: str | None = None
    """Lossless coding of what is sent, beside the codec: see msjax.wire."""
    metrics_port: int | None = None
    """Port of Prometheus metrics, on this machine alone."""
    max_megabytes: int = 1024
    """Of a message that is received."""


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """Who this client is, where the server is, and where this client's data are."""

    number: int
    """Of this client, from 0."""
    server: str = "localhost:50051"
    """host:port of the server."""
    state: str = "client"
    """Folder for this client's checkpoints and its half at the end."""
    tls: TlsFiles = dataclasses.field(default_factory=TlsFiles)
    token_file: str | None = None
    """File with this client's token."""
    insecure: bool = False
    """Send in the open to an address that is not this machine's own."""
    own_data: bool = False
    """Train on all of the data set that is here; by default on this client's share, as a simulation does."""
    data_dir: str | None = None
    """Where the data set is on this machine, as `--data.data-dir` of `msjax train`."""
    cache_dir: str | None = None
    checkpoint_steps: int = 100
    """As of the server."""
    compression: str | None = None
    """Lossless coding of what is sent, beside the codec: see msjax.wire."""
    retry_seconds: float = 600.0
    """For how long a server that is away is tried again."""
    answer_seconds: float = 600.0
    """After how long an answer counts as lost, and the request is repeated."""


class Serving:
    """A server that is up, from its options: the coordinator behind gRPC."""

    def __init__(self, cfg: config.Config, options: ServeOptions, folder: pathlib.Path):
        check_plaintext(options.listen, options.tls, options.insecure)
        if cfg.data.name in train.STREAMED:
            raise ValueError(f"data.name must be a set that fits in memory for msjax serve, got {cfg.data.name!r}")
        self.cfg, self.folder = cfg, folder
        self.progress = {"history": []}
        self.metrics = Metrics()
        self.coordinator = server_lib.Coordinator(
            cfg,
            self._assemble,
            ServerStore(folder / "checkpoints", self.progress),
            options.policy,
            self.metrics,
            checkpoint_steps=options.checkpoint_steps,
            compression=options.compression,
        )
        # A stream holds a thread for as long as it lasts.
        workers = futures.ThreadPoolExecutor(2 * cfg.clients + 8, thread_name_prefix="rpc")
        limits = client_lib.channel_options(options.max_megabytes << 20)
        limits.append(("grpc.max_concurrent_streams", cfg.clients + 8))
        self._server = grpc.server(workers, options=limits)
        servicer = server_lib.Servicer(self.coordinator, Tokens(options.tokens))
        split_pb2_grpc.add_SplitServicer_to_server(servicer, self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if options.tls:
            self.port = self._server.add_secure_port(options.listen, options.tls.server())
        else:
            self.port = self._server.add_insecure_port(options.listen)
        self._server.start()
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._close_metrics = self.metrics.serve(options.metrics_port) if options.metrics_port else lambda: None
        self._step_began = time.monotonic()
        self._began = time.monotonic()

    def _assemble(self, samples, test_samples, image_shape, num_classes):
        info = assemble.SetInfo(image_shape, num_classes, (0.0,), (1.0,))
        return assemble.assemble(self.cfg, info, samples=samples, test_samples=test_samples)

    def train(self, on_epoch=lambda record: None):
        """Trains to the end; returns the summary."""
        self._on_epoch = on_epoch
        self.coordinator.train(self._count)
        return self.summary()

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
            traffic = sum(
                (metrics.epoch_traffic(self.coordinator.shapes, epoch=e) for e in range(epoch + 1)), metrics.Traffic()
            )
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
        self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server.stop(grace=5).wait()
        self._close_metrics()


def make_runner(options: ClientOptions) -> client_lib.Runner:
    """Returns the client of these options, not yet connected."""
    check_plaintext(options.server, options.tls, options.insecure)
    token = pathlib.Path(options.token_file).read_text().strip() if options.token_file else None
    found = {}

    def load(cfg):
        local = {
            "data_dir": options.data_dir or cfg.data.data_dir,
            "cache_dir": options.cache_dir or cfg.data.cache_dir,
        }
        ds = data.load(cfg.data.name, image_size=cfg.data.image_size, **local)
        found["info"] = assemble.SetInfo(ds.train_images.shape[1:], ds.num_classes, ds.mean, ds.std)
        own, samples = slice(None), len(ds.train_labels)
        if not options.own_data:
            pools, samples = assemble.share_out(cfg, lambda: ds.train_labels, samples)
            own = pools[options.number]
        arrays = (ds.train_images[own], ds.train_labels[own], ds.test_images, ds.test_labels)
        found["data"] = parties.ClientData(*map(np.asarray, arrays))
        return client_lib.Own(samples, len(ds.test_labels), ds.train_images.shape[1:], ds.num_classes)

    def build(cfg, samples, test_samples):
        parts = assemble.assemble(cfg, found["info"], samples=samples, test_samples=test_samples)
        return parties.Client(
            options.number, parts.plan, parts.shapes(), parts.programs(cfg.seed), parts.client, found["data"], cfg.seed
        )

    return client_lib.Runner(
        options.number,
        lambda: client_lib.Connection(options.server, options.tls, token),
        load,
        build,
        ClientStore(pathlib.Path(options.state) / "checkpoints"),
        checkpoint_steps=options.checkpoint_steps,
        compression=options.compression,
        answer_seconds=options.answer_seconds,
        retry_seconds=options.retry_seconds,
    )


def serve(arguments: list[str], default: config.Config) -> int:
    """The command `msjax serve`."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--resume")
    first.add_argument("--name")
    where, rest = first.parse_known_args(arguments)

    @dataclasses.dataclass(frozen=True)
    class Options:
        run: tyro.conf.OmitArgPrefixes[config.Config]
        net: tyro.conf.OmitArgPrefixes[ServeOptions] = dataclasses.field(default_factory=ServeOptions)

    if where.resume:
        folder, cfg = runs.RunFolder.open(where.resume)
        options = tyro.cli(ServeOptions, args=rest, prog="msjax serve")
    else:
        cfg = config.load_preset(where.config) if where.config else default
        both = tyro.cli(
            Options, args=rest, default=Options(cfg), prog="msjax serve", description="Serve split training."
        )
        cfg, options = dataclasses.replace(both.run, compare=False), both.net
        check_plaintext(options.listen, options.tls, options.insecure)
        folder = runs.RunFolder.create(cfg, where.name)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    serving = Serving(cfg, options, folder.path)
    print(f"msjax serve: listening on {options.listen}, waiting for {cfg.clients} clients; run folder: {folder.path}")
    with _stopping(serving.coordinator):
        try:
            serving.train(_print_epoch)
        except server_lib.Stopped as stopped:
            print(f"stopped: {stopped}; continue with: msjax serve --resume {folder.path}")
            return 130
        finally:
            serving.close()
    return 0


def client(arguments: list[str]) -> int:
    """The command `msjax client`."""
    options = tyro.cli(ClientOptions, args=arguments, prog="msjax client", description="Take part in split training.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        make_runner(options).train()
    except (client_lib.Refused, ConnectionError) as error:
        raise ValueError(str(error)) from None
    return 0


def _print_epoch(record):
    test = f", test {record['test']['top1_percent']:.2f} %" if "test" in record else ""
    sent = record["traffic"]
    trained = record["train"]
    print(
        f"epoch {record['epoch']}: loss {trained['loss']:.4f}, train {trained['top1_percent']:.2f} %{test}, "
        f"{sent['received_bytes'] / 1e6:,.1f} MB received, {sent['sent_bytes'] / 1e6:,.1f} MB sent",
        flush=True,
    )


@contextlib.contextmanager
def _stopping(coordinator):
    """SIGINT and SIGTERM end training; a second one acts as usual."""
    old = {}

    def handler(number, frame):
        signal.signal(number, old[number])
        # Not from within the handler: the lock may be held by the very code that it interrupts.
        threading.Thread(target=coordinator.stop, args=("by signal",), daemon=True).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
