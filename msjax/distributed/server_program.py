"""The server of a run as a program: the coordinator behind gRPC, its records and its trained part in a run folder."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from msjax import build, config, plan
from msjax.distributed import agreement, drive, served_folder
from msjax.distributed.channel import Stop
from msjax.distributed.coordinator import Coordinator
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ServeOptions
from msjax.distributed.own_parts import SECONDS_BETWEEN_TRIES, SERVER, OwnParts
from msjax.distributed.rpc.admission import Certificates
from msjax.distributed.rpc.security import Tokens
from msjax.distributed.rpc.server import most_silent
from msjax.distributed.rpc.training import TrainEndpoint, TrainServicer
from msjax.distributed.server_run import CHECKPOINT_CLIENTS
from msjax.distributed.stores import ServerStore
from msjax.parts import save_trained, served_run_id
from msjax.runs import RunFolder, plots
from msjax.runs.progress import SECONDS_BETWEEN_LINES, Pace
from msjax.split.finite import check_test_loss
from msjax.split.metrics import MetricSums
from msjax.split.schedule import Exchange, Phase
from msjax.split.spec import RunSpec

log = logging.getLogger("msjax.server")

_COUNTS_EVERY_SECONDS = 5.0
"""A process that is killed loses what it has counted since; and before a checkpoint, so that no payload of what led to
it is missing where the run goes on from there."""


def check_serve(cfg: config.Config, options: ServeOptions) -> None:
    """Raises ValueError for a run that cannot be served, or options that cannot work."""
    options.check()
    if options.policy.min_clients > cfg.clients:
        raise ValueError(
            f"policy.min_clients must be in 1..{cfg.clients}, the number of clients, got {options.policy.min_clients}"
        )
    if (start := options.policy.start_clients) is not None and start > cfg.clients:
        raise ValueError(f"policy.start_clients must be in 1..{cfg.clients}, the number of clients, got {start}")
    Tokens(options.tokens, cfg.clients, start)
    Certificates(options.certificates, cfg.clients, start)
    build.check_without_data(cfg)
    _check_with_known_data(cfg)


def _check_with_known_data(cfg):
    """Raises ValueError for what the clients' data would make fail, where the set's name says what these are."""
    if not config.references(cfg) and (known := plan.describe_known_data(cfg)) is not None:
        plan.describe_run(cfg, known[0], None)  # without counts: clients may each have a whole set of their own


def listen(cfg: config.Config, options: ServeOptions) -> TrainEndpoint:
    """Returns the end where the server of a run will answer; it has its ports, so that a folder can be made.

    Raises:
      ValueError: see `check_serve`, or a port cannot be had.
    """
    check_serve(cfg, options)
    return TrainEndpoint(options, Metrics(), cfg.clients)


class ServerProgram:
    """A training server that is up, from when it is made; `train` leads the run.

    Args:
      endpoint: where it listens, of `listen`, if that was called already.

    Raises:
      ValueError: see `listen`.
    """

    def __init__(
        self, cfg: config.Config, options: ServeOptions, folder: RunFolder, *, endpoint: TrainEndpoint | None = None
    ):
        self._endpoint = listen(cfg, options) if endpoint is None else endpoint
        self.cfg, self.folder = cfg, folder
        self.progress: dict[str, Any] = {}
        self.metrics = self._endpoint.metrics
        self._store = ServerStore(folder.path / "checkpoints", self.progress, before_save=self._before_save)
        self._parts: OwnParts | None = None
        self._built_from = served_folder.read_built_from(folder)
        self._told, self._wrote_built_from = None, False
        self._lacks_part = False  # at the end, where it could not be written yet
        self.coordinator = Coordinator(
            cfg,
            self._build,
            self._store,
            options.policy,
            self.metrics,
            run=served_folder.run_id(folder),
            progress=self.progress,
            checkpoint_steps=options.checkpoint_steps,
            compression=options.compression,
            max_message_bytes=options.max_megabytes << 20,
            on_exchange=self._count,
            on_end=self._save_part,
            samples=None if self._built_from is None or self._store.latest() is None else self._built_from[:2],
            first_seconds=served_folder.read_first_seconds(folder),
        )
        tokens = Tokens(options.tokens)
        self._servicer = TrainServicer(
            tokens,
            self.metrics,
            options.max_messages_per_second,
            max_bytes=options.max_megabytes << 20,
            most_silent=most_silent(cfg.clients),
            **options.admission(),
        )
        self._endpoint.start(self._servicer)
        self.port = self._endpoint.address.port
        self._began, self._step_began = time.monotonic(), 0.0
        self._earlier = served_folder.read_counts(folder)
        self._counts_written = 0.0
        self._pace = Pace()
        self._told_at: float | None = None
        self._events: tuple[contextlib.ExitStack, Callable, int] | None = None
        self._on_epoch: Callable[[dict[str, Any]], None] = lambda record: None

    def _build(self, samples, test_samples, description):
        summary, parts = agreement.summary_of(description), self._parts
        # Once training has begun, a client of other data is to be told so, and changes nothing.
        began = self.coordinator.run is not None
        if not began:
            self._built_from = samples, test_samples, description
        if parts is None or parts.summary != summary:
            parts = OwnParts(self.cfg, summary, () if began else SERVER)
            self._parts = self._parts if began else parts
        if (small := build.batch_of_small_share(self.cfg, samples)) and small != self._told:
            log.warning("%s", small)
            self._told = small
        spec = served_folder.describe(self.cfg, parts, samples, test_samples, description)
        build.check_tail(self.cfg, spec)
        return spec, functools.partial(parts.first_state, spec.optimizer)

    def train(self, on_epoch: Callable[[dict[str, Any]], None] = lambda record: None) -> dict[str, Any]:
        """Trains to the end, writes the server's part and the summary, and returns this.

        Raises:
          Stopped: `stop` was called, or the policy says so.
        """
        self._on_epoch = on_epoch
        try:
            drive.serve(*self._ends)
        finally:
            self._close_events()
        while self._lacks_part:
            drive.linger(*self._ends, SECONDS_BETWEEN_TRIES)
            self._save_part()
        self._save_end()
        return served_folder.write_results(self.cfg, self.folder, self.coordinator.run.spec, self.history)

    def stop(self, reason: str) -> None:
        """Ends training at the next opportunity; from any thread, or a signal's handler."""
        self._servicer.inbox.put(Stop(reason))

    def close(self) -> None:
        """Closes all connections."""
        if self.coordinator.run is not None or self._earlier is not None:
            self._write_counts()
        try:
            self._store.close()
        except OSError as error:
            log.error("no checkpoint: %s", error)
        self._servicer.close()
        self._endpoint.close()

    @property
    def history(self) -> list[dict[str, Any]]:
        """The epochs' records."""
        return self.progress.setdefault("history", [])

    @property
    def _part_run_id(self):
        return served_run_id(self.coordinator.name, self.coordinator.membership.generation)

    @property
    def _ends(self):
        return self.coordinator, self._servicer.inbox, self._servicer.carry

    def _save_part(self):
        """Where it cannot be written, the clients can keep theirs all the same, and `train` tries again."""
        run = self.coordinator.run
        steps, path = run.schedule.total_steps, self.folder.path / "server.safetensors"
        names = {"run_id": self._part_run_id, "step": steps}
        try:
            save_trained(path, "server", run.party.state, self.cfg, self._parts.summary, **names)
        except OSError as error:
            said = "%s cannot be written: %s; once all clients have ended, it is tried again every %.0f s"
            log.warning(said, path, error, SECONDS_BETWEEN_TRIES)
            self._lacks_part = True
        else:
            self._lacks_part = False

    def _count(self, exchange: Exchange):
        """After each exchange: the metrics, and an epoch's record at its end."""
        self.metrics.exchanges.labels(exchange.phase.name).inc()
        run = self.coordinator.run
        schedule, party, task = run.schedule, run.party, run.spec.task
        if time.monotonic() - self._counts_written >= _COUNTS_EVERY_SECONDS:
            self._write_counts()
        if exchange.phase == Phase.FEATURES:
            now, restored_at = time.monotonic(), self.coordinator.restored_at
            self.metrics.step.set(exchange.step)
            self.metrics.saved_step.set(run.saved_step)
            if self._step_began < restored_at:  # what passed before was a wait for clients
                self._step_began = restored_at
                self._pace.begin(restored_at)
            self.metrics.step_seconds.observe(now - self._step_began)
            self._step_began = now
            self._tell_step(exchange, now)
        position = schedule.position(exchange.step)
        if position.epoch_ends and exchange == list(schedule.step_exchanges(exchange.step))[-1]:
            record = {"epoch": position.epoch + 1, "step": exchange.step + 1, "train": party.train.means(task)}
            if schedule.tests_after(position.epoch):
                record |= record_of_test(party.test, run.spec, position.epoch)
                if "test" in record and not self.cfg.allow_nonfinite:
                    check_test_loss(record["test"]["loss"], position.epoch + 1)
            counts = self._so_far()
            seconds = {name: round(counts.pop(name), 3) for name in ("seconds", "waited_seconds")}
            record |= seconds | {"traffic": run.traffic.to_json() | run.coded_bytes() | counts}
            party.train = party.test = MetricSums()
            self.history.append(record)
            for write in (lambda: self.folder.write_history(self.history), lambda: self._write_events(record)):
                try:
                    write()
                except OSError as error:  # the clients need not end for it: the next one has this epoch, too
                    log.error("no record of epoch %d yet: %s", record["epoch"], error)
            self._write_counts()
            self._pace.epoch()
            self._on_epoch(record)

    def _tell_step(self, exchange, now):
        schedule, position = self.coordinator.run.schedule, self.coordinator.run.schedule.position(exchange.step)
        batch_size, left = position.stop - position.start, schedule.total_steps - exchange.step - 1
        if self._told_at is None:
            self._told_at = now
            seconds = now - self.coordinator.ready_at
            log.info("step %d of %d, %.0f s after training began", exchange.step + 1, schedule.total_steps, seconds)
        here = set(exchange.clients).intersection(self.coordinator.membership.active)
        self._pace.step(1, batch_size * len(here), batch_size)
        if now - self._told_at >= SECONDS_BETWEEN_LINES:
            self._told_at = now
            log.info("step %d of %d: %s", exchange.step + 1, schedule.total_steps, self._pace.status(left))

    def _write_events(self, record):
        """To TensorBoard; an epoch that is done again takes the place of the first."""
        if not plots.available():
            return
        if self._events is not None and record["epoch"] <= self._events[2]:
            self._close_events()
        if self._events is None:
            stack = contextlib.ExitStack()
            events = plots.tensorboard(self.folder.path / "tensorboard", first_epoch=record["epoch"])
            write = stack.enter_context(events)
        else:
            stack, write, _ = self._events
        write(record)
        self._events = stack, write, record["epoch"]

    def _close_events(self):
        if self._events is not None:
            self._events[0].close()
            self._events = None

    def _so_far(self):
        """What was sent and received and how long it took, with what earlier processes of this run have counted.

        The wait until all clients are ready is apart: it says nothing about training.
        """
        now, ready_at = time.monotonic(), self.coordinator.ready_at
        waited = (now if ready_at is None else ready_at) - self._began
        totals = self.metrics.totals()
        counts = totals | {"seconds": now - self._began - waited, "waited_seconds": waited}
        if self._earlier is None:  # there are none, or they are of a version that wrote no file of them
            last = self.history[-1] if self.history else {}
            self._earlier = last.get("traffic", {}) | last
        sums = {name: value + self._earlier.get(name, 0) for name, value in counts.items()}
        return sums | {name: int(sums[name]) for name in totals}

    def _write_counts(self):
        self._counts_written = time.monotonic()
        try:
            served_folder.write_counts(self.folder, self._so_far(), self.coordinator.membership.first_seconds)
        except OSError as error:
            log.error("no counts of bytes: %s", error)

    def _before_save(self):
        """What a later process that goes on from a checkpoint needs beside it."""
        self._write_counts()
        if self._built_from is not None and not self._wrote_built_from:
            served_folder.write_built_from(self.folder, self._built_from)
            self._wrote_built_from = True

    def _save_end(self):
        """Keeps what `served_folder.finish` needs: all clients have ended, so that nobody goes back any more."""
        run = self.coordinator.run
        self.progress[served_folder.PART_RUN_ID] = self._part_run_id
        saved = self.coordinator.saved_at_end.items()  # those with full disks, and who was dropped, lack one
        clients = sorted(client for client, step in saved if step == run.schedule.total_steps)
        clients = clients or sorted(self.coordinator.membership.active)  # of an earlier version, which does not say
        try:
            self._store.save(run.schedule.total_steps, self._store.hold(run.party), **{CHECKPOINT_CLIENTS: clients})
            self._store.wait()
        except OSError as error:
            log.error("no checkpoint of the end: %s", error)


def record_of_test(sums: MetricSums, spec: RunSpec, epoch: int) -> dict[str, Any]:
    """Returns what a record says of the test after an epoch, counted from 0."""
    samples, expected = int(sums.samples), spec.schedule.tested_samples
    record: dict[str, Any] = {"test": sums.means(spec.task)} if samples else {}
    if samples < expected:
        record["test_samples"] = samples
        said = "the test after epoch %d is of %d of %d samples, as clients are away that had a share of it"
        log.warning(said, epoch + 1, samples, expected)
    return record
