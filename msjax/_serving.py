"""The ends of training over a network as programs: a server and a client."""

import logging
import pathlib
import time
import uuid

import numpy as np

from msjax import assemble, config, data, halves, metrics, parties, runs, train
from msjax.protocol import Phase
from msjax.transport import client as client_lib
from msjax.transport._metrics import Metrics
from msjax.transport._security import Tokens
from msjax.transport._store import ClientStore, ServerStore
from msjax.transport.coordinator import Coordinator
from msjax.transport.options import ClientOptions, ConnectOptions, ServeOptions
from msjax.transport.server import Endpoint, Servicer

log = logging.getLogger("msjax.client")


def check_serve(cfg: config.Config, options: ServeOptions) -> None:
    """Raises ValueError for a run that cannot be served, or options that cannot work."""
    options.check()
    if cfg.data.name in train.STREAMED:
        raise ValueError(f"data.name must be a set that fits in memory for msjax serve, got {cfg.data.name!r}")
    if cfg.model.weights is not None:  # a file here, which the clients do not have
        raise ValueError(f"model.weights must be None for msjax serve, got {cfg.model.weights!r}")


def _run_name(folder):
    """Names the run of a folder, also when it is resumed."""
    file = folder / "run"
    if not file.exists():
        runs.write_whole(file, uuid.uuid4().hex)
    return file.read_text()


class Serving:
    """A training server that is up: the coordinator behind gRPC."""

    def __init__(self, cfg: config.Config, options: ServeOptions, folder: pathlib.Path):
        check_serve(cfg, options)
        self.cfg, self.folder = cfg, folder
        self.progress = {}
        self.metrics = Metrics()
        self.coordinator = Coordinator(
            cfg,
            self._assemble,
            ServerStore(folder / "checkpoints", self.progress),
            options.policy,
            self.metrics,
            run=_run_name(folder),
            checkpoint_steps=options.checkpoint_steps,
            compression=options.compression,
        )
        servicer = Servicer(self.coordinator, Tokens(options.tokens), options.max_messages_per_second)
        self._endpoint = Endpoint(options, servicer, self.metrics, cfg.clients)
        self.port = self._endpoint.port
        self._step_began = self._began = time.monotonic()
        self._earlier: dict[str, float] | None = None

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

    @property
    def history(self) -> list[dict]:
        """The epochs' records."""
        return self.progress.setdefault("history", [])

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
            record |= self._so_far(traffic)
            party.train = party.test = parties.NONE
            self.history.append(record)
            runs.write_history(self.folder, self.history)
            self._on_epoch(record)

    def _so_far(self, traffic):
        """What was sent and how long it took, with what an earlier process had recorded of this run."""
        now = self.metrics.totals() | {"seconds": time.monotonic() - self._began}
        if self._earlier is None:
            last = self.history[-1] if self.history else {}
            self._earlier = {name: (last.get("traffic", {}) | last).get(name, 0) for name in now}
        total = {name: value + self._earlier[name] for name, value in now.items()}
        return {"seconds": round(total.pop("seconds"), 3), "traffic": traffic.to_json() | total}

    def summary(self):
        last = self.history[-1]
        summary = {name: last[name] for name in ("train", "test", "traffic") if name in last}
        summary |= {"config": config.to_json(self.cfg), "environment": runs.environment()}
        runs.write_summary(self.folder, summary)
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
            compression=options.compression,
            answer_seconds=options.answer_seconds,
            retry_seconds=options.retry_seconds,
        )

    def train(self) -> pathlib.Path | None:
        """Trains to the end; returns where the client's half is, None where another client has the trained one.

        Raises:
          Refused, ConnectionError: see `Runner.train`.
        """
        self._path = None
        self.runner.train(self._tell, self._save_half)
        return self._path

    def _save_half(self, party):
        if party.keeps_result:
            self._path = self._options.folder() / "client.safetensors"
            run, steps = self.runner.run, party.end
            halves.save(self._path, "client", party.state, self.runner.config, self._info, run=run, step=steps)

    def _tell(self, exchange):
        place = self._plan.place(exchange.step)
        if place.epoch != self._epoch:
            self._epoch = place.epoch
            log.info("epoch %d of %d", place.epoch + 1, self._plan.epochs)

    def _load(self, cfg):
        options = self._options
        ds = load_data(cfg, options)
        self._info = assemble.SetInfo.of(ds).normalised_as(cfg.data)
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
